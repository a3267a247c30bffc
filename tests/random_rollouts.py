"""Random rollouts for the kernel, in any memory, and what it means that it agrees."""

import numpy as np

from gae_kernel import compute_gae
from vpg import compute_gae_python


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
    """The same values elsewhere: in Fortran order, strided, reversed, unaligned and read-only."""
    strided = np.zeros([2 * n + 1 for n in array.shape], array.dtype)
    strided = strided[tuple(slice(1, None, 2) for _ in array.shape)]
    strided[...] = array
    unaligned = np.frombuffer(b"x" + array.tobytes(), array.dtype, offset=1).reshape(array.shape)
    reverse = np.flip(np.flip(array).copy())
    return [array, np.asfortranarray(array), strided, reverse, unaligned][rng.integers(5)]


def random_case(rng, shape, dtype, gamma, gae_lambda):
    values_shape = (shape[0] + 1, *shape[1:])
    floats = [random_floats(rng, s, dtype) for s in (shape, values_shape)]
    flags = [rng.random(shape) < rng.choice([0.0, 0.1, 0.5, 1.0]) for _ in range(2)]
    return [*(lay_out(rng, array) for array in floats + flags), gamma, gae_lambda]
