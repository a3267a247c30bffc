"""What bounds the kernel: the chain of one environment, page faults, threads.

python benchmarks/measure_gae.py
"""

import os
import subprocess
import sys
import timeit
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np

from gae_kernel import compute_gae


def rollout(steps, envs, dtype="f4"):
    rng = np.random.default_rng(0)
    floats = [rng.standard_normal((t, envs)).astype(dtype) for t in (steps, steps + 1)]
    return *floats, *(rng.random((2, steps, envs)) < 0.01), 0.99, 0.95


def median(function, *arguments, budget=0.5):
    call = partial(function, *arguments)
    call()
    once = timeit.timeit(call, number=1)
    number = max(1, round(1e-3 / once))
    repeat = max(5, round(budget / (number * once)))
    return 1e6 * sorted(timeit.repeat(call, number=number, repeat=repeat))[repeat // 2] / number


def chain():
    """One multiplication and one addition a step, each waiting for the one before."""
    times = {steps: median(compute_gae, *rollout(steps, 1)) for steps in (2048, 22528)}
    step = 1e3 * (times[22528] - times[2048]) / 20480
    print(f"(2048, 1) float32: {times[2048]:.2f} us; a step more takes {step:.2f} ns")


def page_faults():
    """First of all, because what a process has freed before decides what its allocator keeps."""
    for shape in [(2048, 64), (2048, 4096)]:
        two, one = median(touch, 2, shape), median(touch, 1, (2, *shape))
        call = median(compute_gae, *rollout(*shape))
        print(
            f"{shape} float32: a call {call:.0f} us; touching fresh outputs in two allocations "
            f"{two:.0f} us, in one {one:.0f} us"
        )


def touch(count, shape):
    for array in [np.empty(shape, "f4") for _ in range(count)]:
        array.reshape(-1)[::1024] = 0


def threads():
    for shape in [(256, 4096), (512, 4096), (1024, 4096), (2048, 4096)]:
        for dtype in ("f4", "f8"):
            call = median(compute_gae, *rollout(*shape, dtype), budget=2)
            print(f"{shape} {dtype}: {call:.0f} us")
    arguments = rollout(1024, 4096)
    with ThreadPoolExecutor(4) as pool:
        calls = lambda: list(pool.map(lambda _: compute_gae(*arguments), range(8)))  # noqa: E731
        print(f"8 calls of (1024, 4096) f4 from 4 Python threads: {median(calls, budget=2):.0f} us")


if __name__ == "__main__":
    if sys.argv[1:]:
        globals()[sys.argv[1]]()
    else:
        for name, limit in [("chain", 1), ("page_faults", 1), ("threads", 1), ("threads", 2)]:
            print(f"{name}, at most {limit} threads", flush=True)
            environment = os.environ | {"RAYON_NUM_THREADS": str(limit)}
            subprocess.run([sys.executable, __file__, name], env=environment, check=True)
