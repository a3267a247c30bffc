"""Where the time of a training run goes: acting, environments, learning, and what of it is GAE.

    python -m uv run benchmarks/gae_share.py [--env-id CartPole-v1] [any other argument of ppo.py]

Runs ppo.py with its kernel, with the NumPy reference and with a torch loop, and once more with
CleanRL's hyperparameters, in turn, three times over; writes medians to results/gae_share.md.
Takes a minute.
"""

import contextlib
import os
import shlex
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
import tyro
from speed import CLEANRL, RESULTS, ROOT, about

sys.path.insert(0, str(ROOT))
import ppo

ORIGINAL = {name: getattr(ppo, name) for name in ("update", "rollouts", "compute_gae")}
ACT = ppo.Agent.act


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


def timed_run(args: ppo.Args, gae: Callable) -> dict[str, float]:
    """Seconds of each part and of the whole training, without evaluation; rollouts and steps."""
    seconds: dict[str, float] = defaultdict(float)

    def timed(part: str, call: Callable) -> Callable:
        def timed_call(*arguments):
            start = time.perf_counter()
            result = call(*arguments)
            seconds[part] += time.perf_counter() - start
            return result

        return timed_call

    def rollouts(agent, envs, *rest):
        envs.step = timed("step", envs.step)
        return ORIGINAL["rollouts"](agent, envs, *rest)

    ppo.Agent.act, ppo.update = timed("act", ACT), timed("update", ORIGINAL["update"])
    ppo.rollouts, ppo.compute_gae = rollouts, timed("gae", gae)
    ppo.evaluate = lambda *_: 0.0  # would act and step, too
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as silent:
        os.chdir(folder)
        with contextlib.redirect_stdout(silent), contextlib.redirect_stderr(silent):
            ppo.train(args)
        (metrics,) = Path("runs").glob("*/metrics.csv")
        header, *rows = metrics.read_text().splitlines()
        last = dict(zip(header.split(","), map(float, rows[-1].split(","))))
        os.chdir(ROOT)
    steps = last["global_step"]
    seconds |= {"total": steps / last["charts/SPS"], "steps": steps, "rollouts": len(rows)}
    seconds["other"] = seconds["total"] - sum(seconds[part] for part in ("act", "step", "update"))
    return seconds


def median(results: list[dict[str, float]], part: str, unit: str) -> float:
    return statistics.median(result[part] / result[unit] for result in results)


def main(args: ppo.Args) -> None:
    machine = about()
    cleanrl = tyro.cli(ppo.Args, args=shlex.split(CLEANRL), default=args)
    kinds = {
        "kernel (Rust)": (args, ORIGINAL["compute_gae"]),
        "reference (NumPy)": (args, ppo.compute_gae_python),
        "torch loop": (args, torch_loop),
        "CleanRL's": (cleanrl, ORIGINAL["compute_gae"]),
    }
    timed_run(args, ORIGINAL["compute_gae"])  # warms up
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in kinds}
    for _ in range(3):
        for name, kind in kinds.items():
            runs[name].append(timed_run(*kind))
    shape = f"{args.num_steps} steps of {args.num_envs} environments"
    lines = ["# Where the time of a training run goes", ""]
    command, steps = shlex.join(["ppo.py", *sys.argv[1:]]), f"{args.total_timesteps:,} steps"
    lines += [f"`{command}`, one thread; medians of 3 runs of {steps}"]
    lines += ["(`benchmarks/gae_share.py`). Microseconds a step of one environment (share of all):"]
    parts = "acting | environment step | update | of which GAE | other | all"
    lines += ["", f"| hyperparameters | {parts} |"]
    lines += ["|---|---|---|---|---|---|---|"]
    given = "these" if sys.argv[1:] else "defaults"
    for title, name in ((given, "kernel (Rust)"), (f"CleanRL's: `{CLEANRL}`", "CleanRL's")):
        cells = []
        for part in ("act", "step", "update", "gae", "other", "total"):
            time_a_step = 1e6 * median(runs[name], part, "steps")
            share, gae = median(runs[name], part, "total"), part == "gae"
            cells.append(f"{time_a_step:.{1 + gae}f} ({share:.{2 * gae}%})")
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    lines += [""]
    lines += ["acting: `act`, from observations to actions. environment step: `envs.step`, with"]
    lines += ["its wrappers. update: `update`, with values, GAE, epochs of minibatches. other:"]
    lines += ["stacking rollouts, metrics, checkpoints, the progress bar.", ""]
    lines += [f"GAE with {given}, rollouts of {shape}, by what computes it:", ""]
    lines += ["| GAE by | ms a rollout | share of training | training, s |", "|---|---|---|---|"]
    for name in list(kinds)[:3]:
        milliseconds = 1e3 * median(runs[name], "gae", "rollouts")
        total = statistics.median(result["total"] for result in runs[name])
        ratio = median(runs[name], "gae", "total")
        lines.append(f"| {name} | {milliseconds:.3f} | {ratio:.2%} | {total:.2f} |")
    lines += ["", f"{machine}."]
    (RESULTS / "gae_share.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main(tyro.cli(ppo.Args))
