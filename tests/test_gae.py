"""What GAE is: the kernel equals its reference bit for bit, and both equal the definition."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from random_rollouts import agrees, random_case

from gae_kernel import compute_gae
from vpg import compute_gae_python

both = pytest.mark.parametrize("gae", [compute_gae, compute_gae_python])
unit = st.sampled_from([0.0, 1.0]) | st.floats(0, 1)


@given(
    st.integers(0, 2**32 - 1),
    st.tuples(st.integers(0, 33)) | st.tuples(st.integers(0, 9), st.integers(0, 150)),
    st.sampled_from(["f4", "f8"]),
    unit,
    unit,
)
def test_the_kernel_equals_the_reference_bit_for_bit(seed, shape, dtype, gamma, gae_lambda):
    assert agrees(random_case(np.random.default_rng(seed), shape, dtype, gamma, gae_lambda))


@pytest.mark.parametrize("shape", [(2048, 1), (2048,), (2048, 64), (128, 1029), (500, 2500)])
@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_large_rollouts_too_are_equal_bit_for_bit(shape, dtype):
    rng = np.random.default_rng(0)
    assert agrees(random_case(rng, shape, dtype, 0.99, 0.95))


def rollout(steps=40, envs=3, ends=0.1):
    rng = np.random.default_rng(0)
    floats = rng.standard_normal((steps, envs)), rng.standard_normal((steps + 1, envs))
    return *floats, *(rng.random((2, steps, envs)) < ends)


def definition(rewards, values, terminations, truncations, gamma, gae_lambda):
    """Eq. 16 as it is written: a sum of TD errors up to the end of the episode."""
    advantages = np.zeros_like(rewards)
    for t, n in np.ndindex(rewards.shape):
        for k in range(t, len(rewards)):
            successor = 0.0 if terminations[k, n] else values[k + 1, n]
            delta = rewards[k, n] + gamma * successor - values[k, n]
            advantages[t, n] += (gamma * gae_lambda) ** (k - t) * delta
            if terminations[k, n] or truncations[k, n]:
                break
    return advantages


@both
@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("gae_lambda", [0.0, 0.8, 1.0])
@pytest.mark.parametrize("dtype, rtol", [("f4", 1e-5), ("f8", 1e-13)])
def test_both_equal_the_definition_to_rounding(gae, gamma, gae_lambda, dtype, rtol):
    rewards, values, *flags = rollout()
    expected = definition(rewards, values, *flags, gamma, gae_lambda)
    advantages, returns = gae(
        rewards.astype(dtype), values.astype(dtype), *flags, gamma, gae_lambda
    )
    np.testing.assert_allclose(advantages, expected, rtol, atol=rtol * 10)
    np.testing.assert_allclose(returns, expected + values[:-1], rtol, atol=rtol * 10)


@both
@pytest.mark.parametrize("terminated, truncated", [(True, False), (False, True), (True, True)])
def test_an_end_cuts_the_trace_and_only_a_truncation_bootstraps(gae, terminated, truncated):
    rewards, values, terminations, truncations = rollout(ends=0)
    terminations[20], truncations[20] = terminated, truncated
    head = [rewards[:21], values[:22].copy(), np.zeros((21, 3), bool), np.zeros((21, 3), bool)]
    if terminated:
        head[1][-1] = 0.0
    whole = gae(rewards, values, terminations, truncations, 0.9, 0.8)
    for actual, expected in zip(whole, gae(*head, 0.9, 0.8), strict=True):
        np.testing.assert_array_equal(actual[:21], expected)


def test_numpy_scalars_for_discounts_change_no_dtype():
    """A sweep over np.linspace gives such discounts; a NumPy scalar would promote float32."""
    *arrays, _, _ = random_case(np.random.default_rng(0), (20, 3), "f4", 0.9, 0.8)
    assert agrees([*arrays, np.float64(0.99), np.float64(0.95)])
