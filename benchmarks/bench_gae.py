"""GAE against its peers and against a memcpy of the bytes it must read and write.

uv run --extra peers pytest benchmarks/bench_gae.py --benchmark-enable --benchmark-json gae.json
python benchmarks/gae_report.py gae.json
"""

import timeit

import numpy as np
import pytest

from gae_kernel import compute_gae
from ppo import compute_gae_python

SHAPES = [(128, 4), (128, 8), (2048, 1), (2048, 8), (2048, 64), (128, 1024), (128, 4096)]
SHAPES += [(2048, 4096)]
GAMMA, GAE_LAMBDA = 0.99, 0.95


def numpy_rows(rewards, values, dones):
    """The tutorial's loop."""
    advantages, advantage = np.zeros_like(rewards), 0.0
    for t in reversed(range(len(rewards))):
        continues = 1.0 - dones[t]
        delta = rewards[t] + GAMMA * values[t + 1] * continues - values[t]
        advantages[t] = advantage = delta + GAMMA * GAE_LAMBDA * continues * advantage
    return advantages, advantages + values[:-1]


def torch_rows(torch, rewards, values, dones):
    """The loop of CleanRL-style scripts."""
    advantages, advantage = torch.zeros_like(rewards), 0
    for t in reversed(range(len(rewards))):
        continues = 1.0 - dones[t]
        delta = rewards[t] + GAMMA * values[t + 1] * continues - values[t]
        advantages[t] = advantage = delta + GAMMA * GAE_LAMBDA * continues * advantage
    return advantages, advantages + values[:-1]


def scalars(rewards, values, terminations, truncations, advantages, returns, gamma, gae_lambda):
    """The recursion, element by element: for the interpreter and for numba."""
    for n in range(rewards.shape[1]):
        advantage = 0 * rewards[0, 0]
        for t in range(rewards.shape[0] - 1, -1, -1):
            continues = gamma * (not terminations[t, n])
            delta = rewards[t, n] + continues * values[t + 1, n] - values[t, n]
            decay = gamma * gae_lambda * (not (terminations[t, n] | truncations[t, n]))
            advantages[t, n] = advantage = delta + decay * advantage
            returns[t, n] = advantage + values[t, n]


def scalars_by_row(
    rewards, values, terminations, truncations, advantages, returns, gamma, gae_lambda
):
    """The same with the environments inside, which is how the arrays lie in memory."""
    last = np.zeros_like(rewards[0])
    for t in range(rewards.shape[0] - 1, -1, -1):
        for n in range(rewards.shape[1]):
            continues = gamma * (not terminations[t, n])
            delta = rewards[t, n] + continues * values[t + 1, n] - values[t, n]
            decay = gamma * gae_lambda * (not (terminations[t, n] | truncations[t, n]))
            advantages[t, n] = last[n] = delta + decay * last[n]
            returns[t, n] = last[n] + values[t, n]


def python_scalars(case):
    if case[0].size > 2**17:
        pytest.skip("a scalar Python loop takes seconds to minutes here")
    return numba_call(case, scalars)


def numba_call(case, function):
    number = case[0].dtype.type

    def call():
        outputs = np.empty_like(case[0]), np.empty_like(case[0])
        function(*case, *outputs, number(GAMMA), number(GAE_LAMBDA))
        return outputs

    return call


def numba(case):
    """The faster of the two loop orders, compiled."""
    njit = pytest.importorskip("numba").njit
    calls = [numba_call(case, njit(function)) for function in (scalars, scalars_by_row)]
    return min(calls, key=lambda call: (call(), min(timeit.repeat(call, number=1, repeat=9)))[1])


def torch_loop(case):
    torch = pytest.importorskip("torch")
    rewards, values, terminations, _ = map(torch.from_numpy, case)
    dones = terminations.to(rewards.dtype)
    return lambda: torch_rows(torch, rewards, values, dones)


def rlox_function(case):
    rlox = pytest.importorskip("rlox")
    single = case[0].dtype == np.float32
    return rlox.compute_gae_batched_f32 if single else rlox.compute_gae_batched


def environment_major(rewards, values, terminations, _):
    transposed = rewards.T, values[:-1].T, terminations.T.astype(rewards.dtype)
    return *(np.ascontiguousarray(x).ravel() for x in transposed), values[-1].copy()


def rlox_native(case):
    function, arrays, steps = rlox_function(case), environment_major(*case), len(case[0])
    outputs = lambda: function(*arrays, steps, GAMMA, GAE_LAMBDA)  # noqa: E731
    outputs.time_major = lambda arrays: [x.reshape(-1, steps).T for x in arrays]
    return outputs


def rlox_time_major(case):
    function, steps = rlox_function(case), len(case[0])

    def call():
        outputs = function(*environment_major(*case), steps, GAMMA, GAE_LAMBDA)
        return [np.ascontiguousarray(x.reshape(-1, steps).T) for x in outputs]

    return call


def torchrl_call(case, name):
    torch = pytest.importorskip("torch")
    functional = pytest.importorskip("torchrl.objectives.value.functional")
    rewards, values, terminations, truncations = map(torch.from_numpy, case)
    arguments = (values[:-1], values[1:], rewards, terminations | truncations, terminations)
    function = getattr(functional, name)
    return lambda: function(GAMMA, GAE_LAMBDA, *arguments)


def torchrl_vectorized(case):
    if case[0].size > 2**20:
        pytest.skip("TorchRL's vectorized form needs too much memory here")
    return torchrl_call(case, "vec_generalized_advantage_estimate")


def jax_scan(case):
    jax = pytest.importorskip("jax")
    jax.config.update("jax_enable_x64", True)

    def step(advantage, row):
        reward, value, next_value, terminated, truncated = row
        delta = reward + GAMMA * next_value * ~terminated - value
        advantage = delta + GAMMA * GAE_LAMBDA * ~(terminated | truncated) * advantage
        return advantage.astype(reward.dtype), advantage.astype(reward.dtype)

    @jax.jit
    def scan(rewards, values, terminations, truncations):
        rows = rewards, values[:-1], values[1:], terminations, truncations
        _, advantages = jax.lax.scan(step, rewards[0] * 0, rows, reverse=True)
        return advantages, advantages + values[:-1]

    arrays = [jax.device_put(x) for x in case]
    return lambda: jax.block_until_ready(scan(*arrays))


def memcpy(case):
    """Half the bytes to move, because a copy reads and writes each."""
    rewards, values, *flags = case
    source = np.ones((3 * rewards.nbytes + values.nbytes + 2 * flags[0].nbytes) // 2, np.uint8)
    target = np.ones_like(source)
    return lambda: np.copyto(target, source)


PEERS = {
    "gae_kernel": lambda case: lambda: compute_gae(*case, GAMMA, GAE_LAMBDA),
    "compute_gae_python": lambda case: lambda: compute_gae_python(*case, GAMMA, GAE_LAMBDA),
    "NumPy rows": lambda case: lambda: numpy_rows(*case[:3]),
    "torch rows": torch_loop,
    "Python scalars": python_scalars,
    "numba": numba,
    "rlox, its layout": rlox_native,
    "rlox, time-major": rlox_time_major,
    "TorchRL": lambda case: torchrl_call(case, "generalized_advantage_estimate"),
    "TorchRL vectorized": torchrl_vectorized,
    "JAX scan": jax_scan,
    "memcpy": memcpy,
}


@pytest.fixture(scope="module", params=["float32", "float64"])
def dtype(request):
    return request.param


@pytest.fixture(scope="module", params=SHAPES, ids=str)
def case(request, dtype):
    """Ends are all terminations, because some peers know no truncation."""
    (steps, envs), rng = request.param, np.random.default_rng(0)
    rewards = rng.standard_normal((steps, envs), dtype)
    values = rng.standard_normal((steps + 1, envs), dtype)
    terminations = rng.random((steps, envs)) < 0.01
    return rewards, values, terminations, np.zeros_like(terminations)


@pytest.mark.benchmark(max_time=0.4, min_rounds=5, disable_gc=True)
@pytest.mark.parametrize("peer", PEERS)
def test_gae(benchmark, case, peer):
    call = PEERS[peer](case)
    if peer != "memcpy":
        outputs = getattr(call, "time_major", list)(call())
        expected = compute_gae_python(*case, GAMMA, GAE_LAMBDA)
        for actual, reference in zip(outputs, expected, strict=True):
            if peer == "gae_kernel":
                assert np.array_equal(actual, reference)
            np.testing.assert_allclose(actual, reference, rtol=1e-3, atol=1e-3)
    steps, envs = case[0].shape
    benchmark.extra_info.update(peer=peer, steps=steps, envs=envs, dtype=str(case[0].dtype))
    benchmark(call)
