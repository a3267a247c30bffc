"""The kernel's boundary: what it refuses and how, and that it leaves all else alone."""

import itertools
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from random_rollouts import random_case, same_bits

from gae_kernel import compute_gae

REWARDS, VALUES = np.zeros((4, 2), "f4"), np.zeros((5, 2), "f4")
FLAGS = np.zeros((4, 2), bool)


def case(**changed):
    arguments = dict(rewards=REWARDS, values=VALUES, terminations=FLAGS, truncations=FLAGS)
    return arguments | dict(gamma=0.9, gae_lambda=0.8) | changed


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
    with pytest.raises(error) as raised:
        compute_gae(**case(**{name: wrong}))
    assert str(raised.value).startswith(f"{name} must {message}")


@pytest.mark.parametrize("dtype", ["f4", "f8"])
@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (0, 0)])
def test_empty_rollouts_give_empty_arrays(dtype, shape):
    values = np.zeros((shape[0] + 1, *shape[1:]), dtype)
    flags = np.zeros(shape, bool)
    for array in compute_gae(values[1:], values, flags, flags, 0.9, 0.8):
        assert array.shape == shape and array.dtype == dtype


def test_a_flag_is_set_by_any_byte_but_0():
    rng = np.random.default_rng(0)
    rewards, values, *flags, gamma, gae_lambda = random_case(rng, (20, 9), "f4", 0.9, 0.8)
    odd = [(flag * rng.integers(1, 256, flag.shape)).astype("u1").view(bool) for flag in flags]
    expected = compute_gae(rewards, values, *flags, gamma, gae_lambda)
    assert all(map(same_bits, compute_gae(rewards, values, *odd, gamma, gae_lambda), expected))


def test_inputs_are_never_written_and_outputs_are_new_arrays_in_c_order():
    rng = np.random.default_rng(0)
    for _ in range(100):
        *arrays, gamma, gae_lambda = random_case(rng, (20, 19), "f4", 0.9, 0.8)
        before = [array.tobytes() for array in arrays]
        outputs = compute_gae(*arrays, gamma, gae_lambda)
        assert before == [array.tobytes() for array in arrays]
        pairs = itertools.combinations([*outputs, *arrays], 2)
        assert not any(np.shares_memory(a, b) for a, b in pairs)
        for array in outputs:
            assert type(array) is np.ndarray
            assert array.flags.c_contiguous and array.flags.writeable


def test_the_gil_is_released():
    """With preemption off, the other thread moves on only if the kernel lets it."""
    arguments = random_case(np.random.default_rng(0), (256, 4096), "f4", 0.9, 0.8)
    progress, done = 0, False

    def count():
        nonlocal progress
        while not done:
            progress += 1
            time.sleep(0)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    thread = threading.Thread(target=count)
    try:
        thread.start()
        for _ in range(1000):
            before = progress
            compute_gae(*arguments)
            if moved := progress > before:
                break
    finally:
        done = True
        sys.setswitchinterval(interval)
        thread.join()
    assert moved


AFTER_A_FORK = """
import os, numpy as np
from gae_kernel import compute_gae
x, flags = np.ones((300, 4096), "f4"), np.zeros((300, 4096), bool)
call = lambda: compute_gae(x, np.ones((301, 4096), "f4"), flags, flags, 0.9, 0.8)[0].tobytes()
expected = call()
child = os.fork()
if not child:
    os._exit(call() != expected)
assert os.waitpid(child, 0)[1] == 0 and call() == expected
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no fork")
def test_a_fork_after_first_use_does_not_hang():
    subprocess.run([sys.executable, "-c", AFTER_A_FORK], check=True, timeout=60)
