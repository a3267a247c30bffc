//! The Python boundary: checks the arguments, releases the GIL, runs the recursion.

#![forbid(unsafe_code)]

mod gae;

use numpy::ndarray::{ArrayViewMut3, NdFloat};
use numpy::prelude::*;
use numpy::{Element, PyArrayDyn, PyReadonlyArrayDyn, PyUntypedArray, dtype};
use pyo3::exceptions::{PyRuntimeError, PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyTuple;

/// Generalized advantage estimation (Schulman et al., 2016, eq. 16), over steps t:
///
///     delta_t = rewards_t + gamma * (1 - terminations_t) * values_{t+1} - values_t
///     A_t     = delta_t + gamma * gae_lambda * (1 - (terminations_t | truncations_t)) * A_{t+1}
///     returns = A + values
///
/// A termination has no successor; a truncation bootstraps from `values_{t+1}`; both cut the trace.
///
/// Args:
///     rewards: (T, N) or (T,), float32 or float64.
///     values: (T+1, N) or (T+1,), the dtype of `rewards`; the last row is the bootstrap.
///     terminations, truncations: the shape of `rewards`, bool.
///     gamma, gae_lambda: in [0, 1].
///
/// Returns:
///     (advantages, returns), of the shape and dtype of `rewards`: the halves of one new array.
///
/// Raises:
///     TypeError: an argument is no NumPy array, or its dtype is wrong.
///     ValueError: a shape does not fit, or gamma or gae_lambda is outside [0, 1].
///     RuntimeError: another Rust extension is writing to an argument.
///     OSError: the system refuses a thread.
///
/// Any memory layout is read, C-contiguous arrays without a copy. No input is written. The GIL is
/// released, so no other thread may write the inputs meanwhile. From 2**20 elements on, threads
/// share the work, as many as the process has processors. They end with the call.
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
    let values = readable::<T>("values", values, &[steps + 1, envs][..shape.len()], shape)?;
    let terminations = readable::<bool>("terminations", terminations, shape, shape)?;
    let truncations = readable::<bool>("truncations", truncations, shape, shape)?;
    // The last, so that no copy is made of what the others do not fit.
    let rewards = readable::<T>("rewards", rewards, shape, shape)?;

    // Both outputs in one allocation. The C library gives large blocks back to the system and takes
    // new ones at each call, unless it has seen one as large as all that are in use. With two, page
    // faults took ten times the computation.
    static EMPTY: pyo3::sync::PyOnceLock<Py<PyAny>> = pyo3::sync::PyOnceLock::new();
    let shape = PyTuple::new(py, &[2, steps, envs][..=shape.len()])?;
    let outputs = EMPTY.import(py, "numpy", "empty")?.call1((shape, dtype::<T>(py)))?;
    let mut written = outputs.cast::<PyArrayDyn<T>>()?.readwrite();
    let written = ArrayViewMut3::from_shape((2, steps, envs), written.as_slice_mut()?);

    let rollout = gae::Rollout {
        envs,
        rewards: rewards.as_slice()?,
        values: values.as_slice()?,
        // As bytes: NumPy takes all but 0 as true, and reading another than 0 and 1 as a Rust bool
        // would be undefined.
        terminations: bytemuck::cast_slice(terminations.as_slice()?),
        truncations: bytemuck::cast_slice(truncations.as_slice()?),
        gamma,
        gamma_lambda,
    };
    py.detach(|| gae::run(&rollout, written.unwrap()))?;
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
    let expected = || format!("{} array", dtype::<T>(py));
    let array =
        object.cast::<PyArrayDyn<T>>().map_err(|_| wrong_type(name, &expected(), object))?;
    if array.shape() != shape {
        let shape = PyTuple::new(py, shape)?;
        let rewards_shape = PyTuple::new(py, rewards_shape)?;
        let expected = format!("{shape} for rewards of shape {rewards_shape}");
        return Err(wrong_shape(name, &expected, array));
    }
    if !array.is_c_contiguous() || !array.is_aligned() {
        let copy = py.get_type::<PyUntypedArray>().call_method1("copy", (array,))?;
        return Ok(copy.cast_into::<PyArrayDyn<T>>()?.try_readonly()?);
    }
    // Refused while another Rust extension writes to the array.
    array.try_readonly().map_err(|error| PyRuntimeError::new_err(format!("{name}: {error}")))
}

fn wrong_type(name: &str, expected: &str, object: &Bound<PyAny>) -> PyErr {
    let actual = match object.cast::<PyUntypedArray>() {
        Ok(array) => format!("{} array", array.dtype()),
        Err(_) => object.get_type().name().map_or_else(|e| e.to_string(), |name| name.to_string()),
    };
    PyTypeError::new_err(format!("{name} must be a {expected}, not {actual}"))
}

fn wrong_shape(name: &str, expected: &str, array: &Bound<PyAny>) -> PyErr {
    let message = |shape| format!("{name} must have shape {expected}, not {shape}");
    array.getattr("shape").map_or_else(|error| error, |shape| PyValueError::new_err(message(shape)))
}

#[pymodule]
fn gae_kernel(module: &Bound<PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(compute_gae, module)?)
}
