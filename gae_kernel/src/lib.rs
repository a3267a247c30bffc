//! The Python boundary: checks the arrays, releases the GIL, runs the recursion.

mod gae;

use numpy::npyffi::{PY_ARRAY_API, npy_intp};
use numpy::{
    Element, PyArrayDescrMethods, PyArrayDyn, PyArrayMethods, PyUntypedArray, PyUntypedArrayMethods,
};
use pyo3::exceptions::{PyOverflowError, PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{IntoPyDict, PyTuple};
use std::ffi::c_int;
use std::slice;

type Arrays<'py> = (Bound<'py, PyAny>, Bound<'py, PyAny>);

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
///
/// Any memory layout is read, C-contiguous arrays without a copy. No input is written. The GIL is
/// released, so no other thread may write the inputs meanwhile. From 2**20 elements on, threads
/// share the work: as many as the process may run at once, or RAYON_NUM_THREADS if that is less.
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
    let gae_lambda = fraction("gae_lambda", gae_lambda)?;
    let others = [values, terminations, truncations];
    if let Ok(rewards) = rewards.cast::<PyArrayDyn<f32>>() {
        run("float32 array", rewards, others, gamma, gae_lambda)
    } else if let Ok(rewards) = rewards.cast::<PyArrayDyn<f64>>() {
        run("float64 array", rewards, others, gamma, gae_lambda)
    } else {
        Err(wrong_type("rewards", "float32 or float64 array", rewards))
    }
}

fn run<'py, T: Element + gae::Float>(
    dtype: &str,
    rewards: &Bound<'py, PyArrayDyn<T>>,
    [values, terminations, truncations]: [&Bound<'py, PyAny>; 3],
    gamma: f64,
    gae_lambda: f64,
) -> PyResult<Arrays<'py>> {
    let py = rewards.py();
    let (steps, envs) = match *rewards.shape() {
        [steps] => (steps, 1),
        [steps, envs] => (steps, envs),
        ref shape => {
            let shape = PyTuple::new(py, shape)?;
            let message = format!("rewards must have shape (T, N) or (T,), not {shape}");
            return Err(PyValueError::new_err(message));
        }
    };
    let shape = &[steps, envs][..rewards.ndim()];
    let values_shape = &[steps + 1, envs][..rewards.ndim()];
    let values = checked::<T>("values", dtype, values, values_shape, shape)?;
    let terminations = checked::<bool>("terminations", "bool array", terminations, shape, shape)?;
    let truncations = checked::<bool>("truncations", "bool array", truncations, shape, shape)?;
    let (rewards, values) = (contiguous(rewards)?, contiguous(values)?);
    let (terminations, truncations) = (contiguous(terminations)?, contiguous(truncations)?);
    let outputs = empty_pair::<T>(py, shape)?;
    let length = rewards.len();
    if length > 0 {
        // SAFETY: these arrays are C-contiguous, aligned and of these lengths, and nothing else
        // points to the output, which is written before it is read. As with NumPy's own loops,
        // Python threads must not write the inputs meanwhile.
        unsafe {
            let rollout = gae::Rollout {
                envs,
                rewards: slice::from_raw_parts(rewards.data(), length),
                values: slice::from_raw_parts(values.data(), length + envs),
                terminations: slice::from_raw_parts(terminations.data().cast(), length),
                truncations: slice::from_raw_parts(truncations.data().cast(), length),
                gamma: T::round(gamma),
                decay: T::round(gamma * gae_lambda),
            };
            let outputs = slice::from_raw_parts_mut(outputs.data(), 2 * length);
            let (advantages, returns) = outputs.split_at_mut(length);
            py.detach(|| gae::compute_gae(rollout, advantages, returns));
        }
    }
    Ok((outputs.get_item(0)?, outputs.get_item(1)?))
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

fn checked<'a, 'py, T: Element>(
    name: &str,
    expected: &str,
    object: &'a Bound<'py, PyAny>,
    shape: &[usize],
    rewards_shape: &[usize],
) -> PyResult<&'a Bound<'py, PyArrayDyn<T>>> {
    let py = object.py();
    let array = object.cast::<PyArrayDyn<T>>().map_err(|_| wrong_type(name, expected, object))?;
    if array.shape() != shape {
        let [shape, rewards_shape, actual] =
            [shape, rewards_shape, array.shape()].map(|shape| PyTuple::new(py, shape));
        return Err(PyValueError::new_err(format!(
            "{name} must have shape {} for rewards of shape {}, not {}",
            shape?, rewards_shape?, actual?
        )));
    }
    Ok(array)
}

/// The array itself, or a copy where it is not aligned and in C order.
fn contiguous<'py, T: Element>(
    array: &Bound<'py, PyArrayDyn<T>>,
) -> PyResult<Bound<'py, PyArrayDyn<T>>> {
    if array.is_c_contiguous() && array.is_aligned() {
        return Ok(array.clone());
    }
    let py = array.py();
    let order = [("order", "C")].into_py_dict(py)?;
    let copy = py.import("numpy")?.getattr("array")?.call((array,), Some(&order))?;
    Ok(copy.cast_into()?)
}

fn wrong_type(name: &str, expected: &str, object: &Bound<PyAny>) -> PyErr {
    let actual = match object.cast::<PyUntypedArray>() {
        Ok(array) => format!("{} array", array.dtype()),
        Err(_) => {
            object.get_type().name().map_or_else(|error| error.to_string(), |name| name.to_string())
        }
    };
    PyTypeError::new_err(format!("{name} must be a {expected}, not {actual}"))
}

/// Both outputs in one allocation: glibc maps and unmaps large blocks on each call, at the cost of
/// page faults ten times the computation, unless it has seen one as large as all in use together.
fn empty_pair<'py, T: Element>(
    py: Python<'py>,
    shape: &[usize],
) -> PyResult<Bound<'py, PyArrayDyn<T>>> {
    let mut dims = [2, 0, 0];
    for (dim, &length) in dims[1..].iter_mut().zip(shape) {
        *dim = length as npy_intp;
    }
    let (ndim, dtype) = (shape.len() as c_int + 1, T::get_dtype(py).into_dtype_ptr());
    // SAFETY: `dims` has `ndim` lengths, the dtype is ours to give away, and null is an exception.
    unsafe {
        let array = PY_ARRAY_API.PyArray_Empty(py, ndim, dims.as_mut_ptr(), dtype, 0);
        Ok(Bound::from_owned_ptr_or_err(py, array)?.cast_into_unchecked())
    }
}

#[pymodule]
mod gae_kernel {
    #[pymodule_export]
    use super::compute_gae;
}
