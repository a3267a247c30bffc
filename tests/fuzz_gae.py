"""Random calls of the kernel: each must give the reference's answer or a clear exception.

python -m tests.fuzz_gae 1000000
"""

import sys

import numpy as np

from gae_kernel import compute_gae
from vpg import compute_gae_python

NAMES = ["rewards", "values", "terminations", "truncations", "gamma", "gae_lambda"]


def same_bits(actual, expected):
    """Equal dtypes, shapes and bits, where a NaN equals a NaN whatever its payload."""
    canonical = [np.where(np.isnan(x), np.nan, x).tobytes() for x in (actual, expected)]
    same_type = actual.dtype == expected.dtype and actual.shape == expected.shape
    return same_type and canonical[0] == canonical[1]


def agrees(case):
    with np.errstate(all="ignore"):
        expected = compute_gae_python(*case)
    return all(map(same_bits, compute_gae(*case), expected))


def random_floats(rng, shape, dtype):
    """Normal values, of which none, some or all are replaced by special ones."""
    limits = np.finfo(dtype)
    special = [0.0, np.inf, np.nan, limits.smallest_subnormal, limits.tiny, limits.max, 1.0]
    floats = rng.standard_normal(shape).astype(dtype)
    replaced = rng.random(shape) < rng.choice([0.0, 0.1, 1.0])
    return np.where(replaced, np.copysign(rng.choice(special, shape), floats).astype(dtype), floats)


def lay_out(rng, array):
    """The same values elsewhere: strided, reversed, Fortran, unaligned or read-only memory."""
    layout = rng.integers(6)
    if layout == 1:
        array = np.asfortranarray(array)
    elif layout == 2:
        strided = np.zeros([2 * n + 1 for n in array.shape], array.dtype)
        strided = strided[tuple(slice(1, None, 2) for _ in array.shape)]
        strided[...] = array
        array = strided
    elif layout == 3:
        array = np.flip(np.flip(array).copy())
    elif layout == 4:
        unaligned = np.frombuffer(b"x" + array.tobytes(), array.dtype, offset=1)
        array = unaligned.reshape(array.shape)
    elif layout == 5:
        array.flags.writeable = False
    return array


def random_case(rng, shape, dtype, gamma, gae_lambda):
    values_shape = (shape[0] + 1, *shape[1:])
    floats = [random_floats(rng, s, dtype) for s in (shape, values_shape)]
    flags = [rng.random(shape) < rng.choice([0.0, 0.1, 0.5, 1.0]) for _ in range(2)]
    return [*(lay_out(rng, array) for array in floats + flags), gamma, gae_lambda]


def spoil(rng, case):
    """Makes one argument wrong, more often than not."""
    case, i = list(case), rng.integers(6)
    if i >= 4:
        wrong = [np.nan, np.inf, -np.inf, -1e-9, 1 + 1e-9, 1e308, 10**400, -1, 2, "0.9", None, 1j]
        case[i] = wrong[rng.integers(len(wrong))]
        return case
    array = case[i]
    dtypes = [array.dtype.newbyteorder(), *"efdgiB?FOUV", "f4,f4"]
    wrong = [
        None,
        object(),
        case,
        0.5,
        array.tolist(),
        array.tobytes(),
        memoryview(array) if array.flags.c_contiguous else "buffer",
        np.zeros(array.shape, dtypes[rng.integers(len(dtypes))]),
        array[None],
        array[..., None],
        array[1:],
        array[:, :0] if array.ndim > 1 else array[:0],
        array.T,
        array.ravel(),
        np.array(array.flat[0] if array.size else 0),
        np.broadcast_to(array.dtype.type(0), (2**40, 1)),
        case[rng.integers(4)],
    ]
    case[i] = wrong[rng.integers(len(wrong))]
    return case


def fuzz(calls, seed=0):
    """Returns how many calls were answered and how many refused."""
    rng = np.random.default_rng(seed)
    answered = refused = 0
    for _ in range(calls):
        shape = (rng.integers(5), rng.integers(40))[: rng.integers(1, 3)]
        gamma, gae_lambda = rng.choice([0.0, 1.0, rng.random()], 2)
        case = random_case(rng, shape, rng.choice(["f4", "f8"]), float(gamma), float(gae_lambda))
        if rng.random() < 0.5:
            assert agrees(case), case
            answered += 1
            continue
        case = spoil(rng, case)
        references = [sys.getrefcount(x) for x in case if isinstance(x, np.ndarray)]
        try:
            compute_gae(*case)
        except (TypeError, ValueError) as error:
            assert str(error).split(maxsplit=1)[0] in NAMES, error
            refused += 1
        else:
            assert agrees(case), case
            answered += 1
        assert references == [sys.getrefcount(x) for x in case if isinstance(x, np.ndarray)]
    return answered, refused


if __name__ == "__main__":
    import resource

    calls = int(sys.argv[1])
    fuzz(calls // 10)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    answered, refused = fuzz(calls, seed=1)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(f"{answered} calls answered as the reference does, {refused} refused; {grown} KiB more")
