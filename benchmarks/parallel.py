"""Steps a second of ppo.py in one process, with environments in processes, and under torchrun.

    python -m uv run --extra mujoco benchmarks/parallel.py

Alternating runs of the script itself; writes benchmarks/results/parallel.md.
"""

import csv
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import tyro

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENTS = {"CartPole-v1": 20_000, "HalfCheetah-v5": 20_000, "parallel:Slow-v0": 6_000}
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
WAYS = {
    "`--vectorization-mode sync`": ([], ["--vectorization-mode", "sync"]),
    "`--vectorization-mode async`": ([], ["--vectorization-mode", "async"]),
    "`torchrun --nproc-per-node 2`": (TORCHRUN, ["--vectorization-mode", "sync"]),
}


@dataclass
class Options:
    rounds: int = 3  # runs of each


class Slow(gym.Wrapper):
    """CartPole-v1 that computes for five milliseconds a step."""

    def __init__(self):
        super().__init__(gym.make("CartPole-v1"))

    def step(self, action):
        end = time.perf_counter() + 0.005
        while time.perf_counter() < end:
            pass
        return super().step(action)


gym.register("Slow-v0", Slow, max_episode_steps=500)


def speed(env_id: str, steps: int, launcher: list[str], flags: list[str]) -> float:
    """charts/SPS at the end of a run."""
    flags = [*flags, "--env-id", env_id, "--total-timesteps", str(steps), "--eval-episodes", "1"]
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"PYTHONPATH": str(ROOT / "benchmarks"), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, *launcher, str(ROOT / "ppo.py"), *flags]
        subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True)
        (metrics,) = Path(folder).glob("runs/*/metrics.csv")
        *_, last = csv.DictReader(metrics.open())
    return float(last["charts/SPS"])


def main(options: Options) -> None:
    from speed import about

    rounds: list[dict] = []
    for _ in range(options.rounds):
        rounds.append({})
        for env_id, steps in ENVIRONMENTS.items():
            for way in WAYS:
                rounds[-1][env_id, way] = speed(env_id, steps, *WAYS[way])
        print(rounds[-1], flush=True)
    lines = [
        "# Environments and learners in several processes",
        "",
        "Steps a second of `ppo.py` with 8 environments a process, medians of "
        f"{len(rounds)} alternating rounds (`benchmarks/parallel.py`);",
        "in brackets the ratio to sync. Slow-v0 computes 5 ms a step.",
        "",
        "| environment | " + " | ".join(WAYS) + " |",
        "|---" * (len(WAYS) + 1) + "|",
    ]
    sync = next(iter(WAYS))
    for env_id in ENVIRONMENTS:
        cells = []
        for way in WAYS:
            sps = statistics.median(one[env_id, way] for one in rounds)
            ratio = statistics.median(one[env_id, way] / one[env_id, sync] for one in rounds)
            cells.append(f"{sps:,.0f} ({ratio:.2f})")
        lines.append(f"| {env_id.removeprefix('parallel:')} | " + " | ".join(cells) + " |")
    text = "\n".join([*lines, "", f"{about()}.", ""])
    (ROOT / "benchmarks" / "results" / "parallel.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main(tyro.cli(Options))
