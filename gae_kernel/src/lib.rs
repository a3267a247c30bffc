//! The Python boundary: checks the arguments, releases the GIL, runs the recursion.

#![forbid(unsafe_code)]

mod gae;

use numpy::ndarray::{ArrayView2, ArrayViewMut2, NdFloat};
use numpy::prelude::*;
use numpy::{Element, PyArrayDyn, PyReadonlyArrayDyn, PyUntypedArray, dtype};
use pyo3::exceptions::{PyRuntimeError, PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{IntoPyDict, PyTuple};

/// doc
#[pyfunction]
fn compute_gae<'py>(
    rewards: &Bound<'py, PyAny>,
    values: &Bound<'py, PyAny>,
    terminations: &Bound<'py, PyAny>,
    truncations: &Bound<'py, PyAny>,
    gamma: &Bound<'py, PyAny>,
    gae_lambda: &Bound<'py, PyAny>,
) -> PyResult<Bound<'py, PyTuple>> {
    let gamma = fraction("gamma", gamma)?;
    let gamma_lambda = gamma * fraction("gae_lambda", gae_lambda)?;
    let others = [values, terminations, truncations];
    if let Ok(rewards) = rewards.cast::<PyArrayDyn<f32>>() {
        run(rewards, others, gamma as f32, gamma_lambda as f32)
    } else if let Ok(rewards) = rewards.cast::<PyArrayDyn<f64>>() {
        run(rewards, others, gamma, gamma_lambda)
    } else {
        Err(wrong_type("rewards", "float32 or float64 array", rewards))
    }
}

fn fraction(name: &str, object: &Bound<PyAny>) -> PyResult<f64> {
    let number: f64 = object.extract().map_err(|_| wrong_type(name, "number", object))?;
    if !(0.0..=1.0).contains(&number) {
        return Err(PyValueError::new_err(format!("{name} must be in [0, 1], not {object}")));
    }
    Ok(number)
}

fn run<'py, T: Element + NdFloat>(
    rewards: &Bound<'py, PyArrayDyn<T>>,
    [values, terminations, truncations]: [&Bound<'py, PyAny>; 3],
    gamma: T,
    gamma_lambda: T,
) -> PyResult<Bound<'py, PyTuple>> {
    let py = rewards.py();
    let shape = rewards.shape();
    let (steps, envs) = match *shape {
        [steps] => (steps, 1),
        [steps, envs] => (steps, envs),
        _ => return Err(wrong_shape("rewards", "(T, N) or (T,)", rewards)),
    };
    let values_shape = &[steps + 1, envs][..shape.len()];
    let rewards = readable::<T>("rewards", rewards, shape, shape)?;
    let values = readable::<T>("values", values, values_shape, shape)?;
    let terminations = readable::<bool>("terminations", terminations, shape, shape)?;
    let truncations = readable::<bool>("truncations", truncations, shape, shape)?;

    // Both outputs in one allocation. The C library gives large blocks back to the system and takes
    // new ones at each call, unless it has seen one as large as all that are in use. With two, page
    // faults took ten times the computation.
    static EMPTY: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    let empty = EMPTY.import(py, "numpy", "empty")?;
    let outputs = empty.call1(([&[2], shape].concat(), dtype::<T>(py)))?;
    let outputs = outputs.cast_into::<PyArrayDyn<T>>()?;
    let mut writable = outputs.readwrite();
    let (advantages, returns) = writable.as_slice_mut()?.split_at_mut(steps * envs);

    // The lengths were checked, so no unwrap fails.
    let matrix = (steps, envs);
    let rollout = gae::Rollout {
        rewards: ArrayView2::from_shape(matrix, rewards.as_slice()?).unwrap(),
        values: ArrayView2::from_shape((steps + 1, envs), values.as_slice()?).unwrap(),
        terminations: ArrayView2::from_shape(matrix, bytes(&terminations)?).unwrap(),
        truncations: ArrayView2::from_shape(matrix, bytes(&truncations)?).unwrap(),
        gamma,
        gamma_lambda,
        advantages: ArrayViewMut2::from_shape(matrix, advantages).unwrap(),
        returns: ArrayViewMut2::from_shape(matrix, returns).unwrap(),
    };
    py.detach(|| gae::compute_gae(rollout));
    PyTuple::new(py, [outputs.get_item(0)?, outputs.get_item(1)?])
}

/// The array, or a copy where it is not aligned and in C order.
fn readable<'py, T: Element>(
    name: &str,
    object: &Bound<'py, PyAny>,
    shape: &[usize],
    rewards_shape: &[usize],
) -> PyResult<PyReadonlyArrayDyn<'py, T>> {
    let py = object.py();
    let Ok(array) = object.cast::<PyArrayDyn<T>>() else {
        return Err(wrong_type(name, &format!("{} array", dtype::<T>(py)), object));
    };
    if array.shape() != shape {
        let shape = PyTuple::new(py, shape)?;
        let rewards_shape = PyTuple::new(py, rewards_shape)?;
        let expected = format!("{shape} for rewards of shape {rewards_shape}");
        return Err(wrong_shape(name, &expected, array));
    }
    let readonly = if array.is_c_contiguous() && array.is_aligned() {
        array.try_readonly()
    } else {
        let order = [("order", "C")].into_py_dict(py)?;
        let copy = py.import("numpy")?.call_method("array", (array,), Some(&order))?;
        copy.cast_into::<PyArrayDyn<T>>()?.try_readonly()
    };
    // Another Rust extension may be writing to it.
    readonly.map_err(|error| PyRuntimeError::new_err(format!("{name} cannot be read: {error}")))
}

/// NumPy lets a bool hold any byte and takes all but 0 as true. Rust's `bool` may hold only 0 and 1,
/// so the flags are read as bytes.
fn bytes<'a>(flags: &'a PyReadonlyArrayDyn<bool>) -> PyResult<&'a [u8]> {
    Ok(bytemuck::cast_slice(flags.as_slice()?))
}

fn wrong_type(name: &str, expected: &str, object: &Bound<PyAny>) -> PyErr {
    let actual = match object.cast::<PyUntypedArray>() {
        Ok(array) => format!("{} array", array.dtype()),
        Err(_) => object.get_type().name().map_or_else(|e| e.to_string(), |name| name.to_string()),
    };
    PyTypeError::new_err(format!("{name} must be a {expected}, not {actual}"))
}

fn wrong_shape(name: &str, expected: &str, array: &Bound<PyAny>) -> PyErr {
    match array.getattr("shape") {
        Ok(shape) => {
            PyValueError::new_err(format!("{name} must have shape {expected}, not {shape}"))
        }
        Err(error) => error,
    }
}

#[pymodule]
mod gae_kernel {
    #[pymodule_export]
    use super::compute_gae;
}
