"""GAE: the kernel equals its reference bit for bit, both are the definition; what it refuses."""

import itertools
import multiprocessing
import os
import re
import sys
import threading

import numpy as np
import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st

from gae_kernel import compute_gae
from vpg import compute_gae_python

# NumPy's scalars, such as those of np.linspace, must not turn float32 arrays into float64.
unit = st.sampled_from([0.0, 1.0, np.float64(0.95)]) | st.floats(0, 1)


def lay_out(rng, array):
    """The same values elsewhere: in Fortran order, strided, reversed, unaligned and read-only."""
    strided = np.repeat(array, 2, axis=-1)[..., ::2]
    unaligned = np.frombuffer(b"x" + array.tobytes(), array.dtype, offset=1).reshape(array.shape)
    reverse = np.flip(np.flip(array).copy())
    return [array, np.asfortranarray(array), strided, reverse, unaligned][rng.integers(5)]


def random_rollout(seed, shape, dtype):
    """Normal values, of which none, some or all are replaced by special ones, and flags."""
    rng = np.random.default_rng(seed)
    limits = np.finfo(dtype)
    special = [0.0, np.inf, np.nan, limits.smallest_subnormal, limits.tiny, limits.max, 1.0]
    arrays = []
    for rows in (shape, (shape[0] + 1, *shape[1:])):
        floats = rng.standard_normal(rows)
        replaced = rng.random(rows) < rng.choice([0.0, 0.1, 1.0])
        floats = np.where(replaced, np.copysign(rng.choice(special, rows), floats), floats)
        arrays.append(floats.astype(dtype))
    for _ in range(2):
        flags = rng.random(shape) < rng.choice([0.0, 0.1, 0.5, 1.0])
        # A flag is set by any byte but 0.
        arrays.append((flags * rng.integers(1, 256, shape)).astype("u1").view(bool))
    return [lay_out(rng, array) for array in arrays]


def bits(arrays):
    """What is to be equal: dtypes, shapes and bytes. All NaNs are the same."""
    return [(x.dtype, x.shape, np.where(np.isnan(x), np.nan, x).tobytes()) for x in arrays]


def check(*arguments):
    """The kernel equals the reference, writes no input, and returns new arrays in C order."""
    inputs = arguments[:4]
    before = [array.tobytes() for array in inputs]
    outputs = compute_gae(*arguments)
    assert before == [array.tobytes() for array in inputs]
    with np.errstate(all="ignore"):
        assert bits(outputs) == bits(compute_gae_python(*arguments))
    pairs = itertools.combinations([*outputs, *inputs], 2)
    assert not any(np.shares_memory(a, b) for a, b in pairs)
    for array in outputs:
        assert type(array) is np.ndarray
        assert array.shape == inputs[0].shape and array.dtype == inputs[0].dtype
        assert array.flags.c_contiguous and array.flags.writeable


@given(
    st.integers(0, 2**32 - 1),
    st.tuples(st.integers(0, 33)) | st.tuples(st.integers(0, 9), st.integers(0, 150)),
    st.sampled_from(["f4", "f8"]),
    unit,
    unit,
)
def test_the_kernel_equals_the_reference_bit_for_bit(seed, shape, dtype, gamma, gae_lambda):
    check(*random_rollout(seed, shape, dtype), gamma, gae_lambda)


SHAPES = [(2048, 1), (2048,), (2048, 64), (128, 1029), (500, 2500), (0,), (0, 3), (3, 0), (0, 0)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_large_and_empty_rollouts_too_are_equal_bit_for_bit(shape, dtype):
    check(*random_rollout(0, shape, dtype), 0.99, 0.95)


@pytest.mark.parametrize("gae", [compute_gae, compute_gae_python])
@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("gae_lambda", [0.0, 0.8, 1.0])
@pytest.mark.parametrize("dtype, rtol", [("f4", 1e-5), ("f8", 1e-13)])
def test_both_equal_the_definition_to_rounding(gae, gamma, gae_lambda, dtype, rtol):
    rng = np.random.default_rng(0)
    rewards, values = rng.standard_normal((40, 3)), rng.standard_normal((41, 3))
    ends = rng.random((2, 40, 3)) < 0.2
    expected = reference.gae(rewards, values, *ends, gamma, gae_lambda)
    actual = gae(rewards.astype(dtype), values.astype(dtype), *ends, gamma, gae_lambda)
    np.testing.assert_allclose(actual, [expected, expected + values[:-1]], rtol, atol=rtol * 10)


REWARDS, VALUES = np.zeros((4, 2), "f4"), np.zeros((5, 2), "f4")
FLAGS = np.zeros((4, 2), bool)
FITS = "for rewards of shape (4, 2), not"


@pytest.mark.parametrize(
    "name, wrong, error, message",
    [
        ("rewards", [0.0], TypeError, "be a float32 or float64 array, not list"),
        ("rewards", FLAGS, TypeError, "be a float32 or float64 array, not bool"),
        ("values", None, TypeError, "be a float32 array, not NoneType"),
        ("values", VALUES.astype(">f4"), TypeError, "be a float32 array, not >f4"),
        ("values", VALUES.astype("f8"), TypeError, "be a float32 array, not float64"),
        ("terminations", REWARDS, TypeError, "be a bool array, not float32"),
        ("truncations", REWARDS, TypeError, "be a bool array, not float32"),
        ("rewards", VALUES[None], ValueError, "have shape (T, N) or (T,), not (1, 5, 2)"),
        ("rewards", VALUES[0, 0, ...], ValueError, "have shape (T, N) or (T,), not ()"),
        ("values", VALUES[1:], ValueError, f"have shape (5, 2) {FITS} (4, 2)"),
        ("values", VALUES[:, 0], ValueError, f"have shape (5, 2) {FITS} (5,)"),
        ("terminations", FLAGS[1:], ValueError, f"have shape (4, 2) {FITS} (3, 2)"),
        ("truncations", FLAGS.T, ValueError, f"have shape (4, 2) {FITS} (2, 4)"),
        ("gamma", 1.5, ValueError, "be in [0, 1], not 1.5"),
        ("gamma", float("nan"), ValueError, "be in [0, 1], not nan"),
        ("gamma", "0.9", TypeError, "be a number, not str"),
        ("gae_lambda", -0.1, ValueError, "be in [0, 1], not -0.1"),
        ("gae_lambda", float("inf"), ValueError, "be in [0, 1], not inf"),
        ("gae_lambda", 10**20, ValueError, "be in [0, 1], not 1"),
    ],
)
def test_a_wrong_argument_is_refused_by_name(name, wrong, error, message):
    arguments = dict(rewards=REWARDS, values=VALUES, terminations=FLAGS, truncations=FLAGS)
    with pytest.raises(error, match="^" + re.escape(f"{name} must {message}")):
        compute_gae(**arguments | {"gamma": 0.9, "gae_lambda": 0.8, name: wrong})


def test_the_gil_is_released():
    """With preemption off, the other thread ends only if the kernel lets it run."""
    arrays, interval = random_rollout(0, (256, 4096), "f4"), sys.getswitchinterval()
    lock = threading.Lock()
    thread = threading.Thread(target=lock.acquire)
    sys.setswitchinterval(1000)
    with lock:
        thread.start()
    for _ in range(1000):
        if thread.is_alive():
            compute_gae(*arrays, 0.9, 0.8)
    sys.setswitchinterval(interval)
    assert not thread.is_alive()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_after_first_use_does_not_hang():
    case = *random_rollout(0, (300, 4096), "f4"), 0.9, 0.8
    check(*case)
    child = multiprocessing.get_context("fork").Process(target=check, args=case, daemon=True)
    child.start()
    child.join(60)
    assert child.exitcode == 0
    check(*case)
