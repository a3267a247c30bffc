"""GAE against its peers, and against a memcpy of the bytes it must read and write.

pytest benchmarks/bench_gae.py --benchmark-only --benchmark-json gae.json
python -m benchmarks.bench_gae gae.json  # draws results/gae.png and prints machine and versions
pytest-benchmark compare gae.json --group-by group --columns median,rounds --name short
"""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from gae_kernel import compute_gae
from vpg import compute_gae_python

SHAPES = [(128, 4), (128, 8), (2048, 1), (2048, 8), (2048, 64), (128, 4096), (2048, 4096)]
GAMMA, GAE_LAMBDA = 0.99, 0.95


def rows(xp, rewards, values, dones):
    """The usual loop, in NumPy or torch."""
    advantages, advantage = xp.zeros_like(rewards), 0.0
    for t in reversed(range(len(rewards))):
        continues = ~dones[t]
        delta = rewards[t] + GAMMA * values[t + 1] * continues - values[t]
        advantages[t] = advantage = delta + GAMMA * GAE_LAMBDA * advantage * continues
    return advantages, advantages + values[:-1]


def torch_rows(*case):
    tensors = [torch.from_numpy(x) for x in case[:3]]
    return lambda: rows(torch, *tensors)


def loops(rewards, values, terminations, truncations, gamma, decay, advantages, returns):
    advantage = np.zeros_like(rewards[0])
    for t in range(rewards.shape[0] - 1, -1, -1):
        for n in range(rewards.shape[1]):
            next_value = (not terminations[t, n]) * values[t + 1, n]
            delta = rewards[t, n] + gamma * next_value - values[t, n]
            trace = decay * (not (terminations[t, n] | truncations[t, n]))
            advantages[t, n] = advantage[n] = delta + trace * advantage[n]
            returns[t, n] = advantage[n] + values[t, n]
    return advantages, returns


def numba(*case):
    compiled = pytest.importorskip("numba").njit(loops)
    discounts = [case[0].dtype.type(x) for x in (GAMMA, GAMMA * GAE_LAMBDA)]
    return lambda: compiled(*case, *discounts, np.empty_like(case[0]), np.empty_like(case[0]))


def rlox(rewards, values, terminations, truncations):
    """In its own layout, environment after environment, which costs it no copy."""
    rlox = pytest.importorskip("rlox")
    functions = {"f": rlox.compute_gae_batched_f32, "d": rlox.compute_gae_batched}
    transposed = rewards.T, values[:-1].T, terminations.T.astype(rewards.dtype)
    arrays = [np.ascontiguousarray(x).ravel() for x in transposed]
    last_values, steps = values[-1].copy(), len(rewards)
    return lambda: functions[rewards.dtype.char](*arrays, last_values, steps, GAMMA, GAE_LAMBDA)


def memcpy(rewards, values, terminations, truncations):
    """Half the bytes to move, because a copy reads and writes each."""
    moved = 3 * rewards.nbytes + values.nbytes + terminations.nbytes + truncations.nbytes
    source = np.ones(moved // 2, np.uint8)
    target = np.ones_like(source)
    return lambda: np.copyto(target, source)


PEERS = {
    "gae_kernel": lambda *case: lambda: compute_gae(*case, GAMMA, GAE_LAMBDA),
    "compute_gae_python": lambda *case: lambda: compute_gae_python(*case, GAMMA, GAE_LAMBDA),
    "numpy_rows": lambda *case: lambda: rows(np, *case[:3]),
    "torch_rows": torch_rows,
    "numba": numba,
    "rlox": rlox,
    "memcpy": memcpy,
}


@pytest.mark.benchmark(max_time=0.4, min_rounds=5, disable_gc=True)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("peer", PEERS)
def test_gae(benchmark, shape, dtype, peer):
    """Ends are all terminations, because some peers know no truncation."""
    rng = np.random.default_rng(0)
    rewards = rng.standard_normal(shape, dtype)
    values = rng.standard_normal((shape[0] + 1, shape[1]), dtype)
    terminations = rng.random(shape) < 0.01
    case = rewards, values, terminations, np.zeros_like(terminations)
    call = PEERS[peer](*case)
    if peer != "memcpy":
        for actual, expected in zip(call(), compute_gae_python(*case, GAMMA, GAE_LAMBDA)):
            expected = expected.T.ravel() if peer == "rlox" else expected
            np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-3)
    benchmark.group = f"{dtype} {shape}"
    benchmark.extra_info["elements"] = rewards.size
    benchmark(call)


if __name__ == "__main__":
    import matplotlib.pyplot as plt
    import pandas as pd

    from benchmarks.common import RESULTS, about

    runs = pd.json_normalize(json.loads(Path(sys.argv[1]).read_text())["benchmarks"])
    plt.rcParams["font.size"] = 15
    runs["µs"] = 1e6 * runs["stats.median"]
    figure, panels = plt.subplots(1, 2, figsize=(13, 6), sharey=True, layout="constrained")
    for ax, (dtype, part) in zip(panels, runs.groupby("params.dtype")):
        lines = part.pivot_table("µs", "extra_info.elements", "params.peer")[[*PEERS]]
        lines.plot(ax=ax, title=dtype, loglog=True, marker="o", legend=False)
        ax.set(xlabel="elements, T × N", ylabel="median time of a call (µs)")
    figure.legend(*ax.get_legend_handles_labels(), loc="outside right")
    figure.savefig(RESULTS / "gae.png")
    print(about("numba", "rlox"))
