"""What share of a whole training run is GAE: with the kernel, the NumPy reference and a torch loop.

    python -m uv run benchmarks/gae_share.py [--env-id CartPole-v1] [any other argument of ppo.py]

Runs ppo.py with each in turn, three times over, and writes medians to results/gae_share.md.
"""

import contextlib
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import ppo  # noqa: E402


def torch_loop(rewards, values, terminations, truncations, gamma, gae_lambda):
    """GAE row by row over tensors, as CleanRL's scripts do it."""
    flags = terminations, terminations | truncations
    going, same = (1.0 - torch.from_numpy(flag).float() for flag in flags)
    rewards, values = torch.from_numpy(rewards), torch.from_numpy(values)
    advantages, advantage = torch.zeros_like(rewards), 0
    for t in reversed(range(len(rewards))):
        delta = rewards[t] + gamma * values[t + 1] * going[t] - values[t]
        advantages[t] = advantage = delta + gamma * gae_lambda * same[t] * advantage
    return advantages.numpy(), (advantages + values[:-1]).numpy()


def timed_run(args: ppo.Args, gae) -> tuple[float, float, int]:
    """Seconds of GAE and of the whole training, without evaluation, and the number of rollouts."""
    seconds, calls = 0.0, 0

    def timed(*arguments):
        nonlocal seconds, calls
        calls += 1
        start = time.perf_counter()
        result = gae(*arguments)
        seconds += time.perf_counter() - start
        return result

    ppo.compute_gae = timed
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as silent:
        os.chdir(folder)
        with contextlib.redirect_stdout(silent), contextlib.redirect_stderr(silent):
            ppo.train(args)
        (metrics,) = Path("runs").glob("*/metrics.csv")
        header, *_, last = metrics.read_text().splitlines()
        row = dict(zip(header.split(","), map(float, last.split(","))))
        os.chdir(ROOT)
    return seconds, row["global_step"] / row["charts/SPS"], calls


def main(args: ppo.Args) -> None:
    args.eval_episodes = 1
    kinds = {
        "kernel (Rust)": ppo.compute_gae,
        "reference (NumPy)": ppo.compute_gae_python,
        "torch loop": torch_loop,
    }
    timed_run(args, ppo.compute_gae)  # warms up
    runs = {name: [] for name in kinds}
    for _ in range(3):
        for name, gae in kinds.items():
            runs[name].append(timed_run(args, gae))
    shape = f"{args.num_steps} steps of {args.num_envs} environments"
    lines = [f"GAE in `ppo.py --env-id {args.env_id}`, rollouts of {shape}; medians of 3 runs:", ""]
    lines += ["| GAE by | ms a rollout | share of training | training, s |", "|---|---|---|---|"]
    for name, results in runs.items():
        seconds, total, rollouts = (statistics.median(column) for column in zip(*results))
        share = f"{seconds / total:.2%}"
        lines.append(f"| {name} | {1e3 * seconds / rollouts:.3f} | {share} | {total:.2f} |")
    (ROOT / "benchmarks" / "results" / "gae_share.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main(tyro.cli(ppo.Args))
