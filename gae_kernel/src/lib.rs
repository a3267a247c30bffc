//! The Python boundary: checks the arguments, releases the GIL, runs the recursion.

#![forbid(unsafe_code)]

mod gae;

use numpy::ndarray::{ArrayView2, ArrayViewMut2};
use numpy::prelude::*;
use numpy::{Element, PyArrayDyn, PyReadonlyArrayDyn, PyUntypedArray};
use pyo3::exceptions::{PyOverflowError, PyRuntimeError, PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{IntoPyDict, PyTuple};

type Arrays<'py> = (Bound<'py, PyAny>, Bound<'py, PyAny>);

#[pyfunction]
fn compute_gae<'py>(
    rewards: &Bound<'py, PyAny>,
    values: &Bound<'py, PyAny>,
    terminations: &Bound<'py, PyAny>,
    truncations: &Bound<'py, PyAny>,
    gamma: &Bound<'py, PyAny>,
    gae_lambda: &Bound<'py, PyAny>,
) -> PyResult<Arrays<'py>> {
    let gamma = fraction("gamma", gamma)?;
    let gamma_lambda = gamma * fraction("gae_lambda", gae_lambda)?;
    let arrays = [rewards, values, terminations, truncations];
    if rewards.is_instance_of::<PyArrayDyn<f32>>() {
        run("float32 array", arrays, gamma as f32, gamma_lambda as f32)
    } else if rewards.is_instance_of::<PyArrayDyn<f64>>() {
        run("float64 array", arrays, gamma, gamma_lambda)
    } else {
        Err(wrong_type("rewards", "float32 or float64 array", rewards))
    }
}

fn fraction(name: &str, object: &Bound<PyAny>) -> PyResult<f64> {
    match object.extract::<f64>() {
        Ok(number) if (0.0..=1.0).contains(&number) => Ok(number),
        Err(error) if !error.is_instance_of::<PyOverflowError>(object.py()) => {
            Err(wrong_type(name, "number", object))
        }
        _ => Err(PyValueError::new_err(format!("{name} must be in [0, 1], not {object}"))),
    }
}

fn run<'py, T: Element + gae::Float>(
    floats: &str,
    [rewards, values, terminations, truncations]: [&Bound<'py, PyAny>; 4],
    gamma: T,
    gamma_lambda: T,
) -> PyResult<Arrays<'py>> {
    let py = rewards.py();
    let shape = rewards.cast::<PyUntypedArray>()?.shape();
    let (steps, envs) = match *shape {
        [steps] => (steps, 1),
        [steps, envs] => (steps, envs),
        _ => {
            let shape = PyTuple::new(py, shape)?;
            let message = format!("rewards must have shape (T, N) or (T,), not {shape}");
            return Err(PyValueError::new_err(message));
        }
    };
    let values_shape = &[steps + 1, envs][..shape.len()];
    let rewards = readable::<T>("rewards", floats, rewards, shape, shape)?;
    let values = readable::<T>("values", floats, values, values_shape, shape)?;
    let terminations = readable::<bool>("terminations", "bool array", terminations, shape, shape)?;
    let truncations = readable::<bool>("truncations", "bool array", truncations, shape, shape)?;
    let outputs = empty_pair::<T>(py, shape)?;
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
    };
    let advantages = ArrayViewMut2::from_shape(matrix, advantages).unwrap();
    let returns = ArrayViewMut2::from_shape(matrix, returns).unwrap();
    py.detach(|| gae::compute_gae(rollout, advantages, returns));
    Ok((outputs.get_item(0)?, outputs.get_item(1)?))
}

/// The array, or a copy where it is not aligned and in C order.
fn readable<'py, T: Element>(
    name: &str,
    expected: &str,
    object: &Bound<'py, PyAny>,
    shape: &[usize],
    rewards_shape: &[usize],
) -> PyResult<PyReadonlyArrayDyn<'py, T>> {
    let py = object.py();
    let array = object.cast::<PyArrayDyn<T>>().map_err(|_| wrong_type(name, expected, object))?;
    if array.shape() != shape {
        let shape = PyTuple::new(py, shape)?;
        let rewards_shape = PyTuple::new(py, rewards_shape)?;
        let actual = PyTuple::new(py, array.shape())?;
        return Err(PyValueError::new_err(format!(
            "{name} must have shape {shape} for rewards of shape {rewards_shape}, not {actual}"
        )));
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

/// Both outputs in one allocation, (2, T, N) or (2, T), not yet written.
/// The C library gives large blocks back to the system and takes new ones on each call, unless it
/// has seen one as large as all that are in use. With two, page faults took ten times the computation.
fn empty_pair<'py, T: Element>(
    py: Python<'py>,
    shape: &[usize],
) -> PyResult<Bound<'py, PyArrayDyn<T>>> {
    static EMPTY: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    let empty = EMPTY.import(py, "numpy", "empty")?;
    let array = empty.call1(([&[2], shape].concat(), numpy::dtype::<T>(py)))?;
    Ok(array.cast_into()?)
}

fn wrong_type(name: &str, expected: &str, object: &Bound<PyAny>) -> PyErr {
    let actual = match object.cast::<PyUntypedArray>() {
        Ok(array) => format!("{} array", array.dtype()),
        Err(_) => object.get_type().to_string(),
    };
    PyTypeError::new_err(format!("{name} must be a {expected}, not {actual}"))
}

#[pymodule]
mod gae_kernel {
    #[pymodule_export]
    use super::compute_gae;
}
