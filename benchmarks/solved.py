"""How long until CartPole-v1 is solved: a greedy mean of at least 475 over 100 episodes.

    python -m uv run --extra peers benchmarks/solved.py --cleanrl PATH/TO/cleanrl/ppo.py

ppo.py and CleanRL's, each at its defaults, run in turn, a new process for every seed. After each
iteration the policy is evaluated while the clocks stand still. Training time counts from the first
reset, command time from the start of the process. Writes benchmarks/results/solved.md and .json.
"""

import json
import os
import platform
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import tyro

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


@dataclass
class Options:
    cleanrl: Path  # CleanRL's ppo.py
    seeds: int = 5  # runs of each program
    watch: str | None = None  # what a child process runs: program:seed:time of its start


class Watch:
    """Evaluates the policy after every iteration, off the clock; ends the process when solved."""

    def __init__(self, began: float):
        self.began, self.paused = began, 0.0

    def __call__(self, agent, start: float, steps: int) -> None:
        pause = time.time()
        import ppo

        policy = SimpleNamespace(parameters=agent.parameters, policy=agent_policy(agent))
        if ppo.evaluate(policy, ppo.Args(), greedy=True) >= 475:
            train, command = pause - start - self.paused, pause - self.began - self.paused
            print("solved", json.dumps({"steps": steps, "train": train, "command": command}))
            sys.stdout.flush()
            os._exit(0)
        self.paused += time.time() - pause


def agent_policy(agent):
    from torch.distributions import Categorical

    return lambda observations: Categorical(logits=agent.actor(observations))


def watch_ours(seed: str, watch: Watch) -> None:
    import ppo

    start, steps, update, rollouts = 0.0, 0, ppo.update, ppo.rollouts

    def timed_rollouts(*args):
        nonlocal start
        start = time.time()
        return rollouts(*args)

    def watched_update(agent, optimizers, batch, args):
        nonlocal steps
        losses = update(agent, optimizers, batch, args)
        steps += int(batch.valid.sum())
        watch(agent, start, steps)
        return losses

    ppo.rollouts, ppo.update = timed_rollouts, watched_update
    ppo.train(ppo.Args(seed=int(seed)))


def watch_cleanrl(script: Path, seed: str, watch: Watch) -> None:
    def add_scalar(tag, _value, global_step):
        if tag == "charts/SPS":  # the last of an iteration
            names = sys._getframe(1).f_globals
            watch(names["agent"], names["start_time"], global_step)

    writer = SimpleNamespace(add_scalar=add_scalar, add_text=MagicMock(), close=MagicMock())
    sys.modules["torch.utils.tensorboard"] = MagicMock(SummaryWriter=lambda _: writer)
    sys.argv = [str(script), "--no-cuda", "--seed", seed]
    runpy.run_path(str(script), run_name="__main__")


def run(program: str, seed: int, options: Options) -> dict[str, float]:
    """Steps, seconds of training and of the whole process until one run has solved it."""
    script = str(options.cleanrl.resolve())
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(Path(__file__).resolve()), "--cleanrl", script, "--watch"]
    with tempfile.TemporaryDirectory() as folder:
        command += [f"{program}:{seed}:{time.time()}"]
        kwargs = {"cwd": folder, "env": environment, "capture_output": True, "text": True}
        result = subprocess.run(command, **kwargs)
    lines = [line for line in result.stdout.splitlines() if line.startswith("solved")]
    if not lines:
        raise SystemExit(f"{program}, seed {seed}, was not solved:\n{result.stderr[-2000:]}")
    return json.loads(lines[0].removeprefix("solved"))


def report(runs: dict[str, list[dict[str, float]]]) -> str:
    ours, theirs = runs.values()
    lines = [
        "CartPole-v1, each program at its defaults, until the mean of 100 greedy episodes is 475.",
        f"Medians (lowest to highest) of {len(ours)} seeds on {platform.machine()}, one thread.",
        "",
        "| program | steps | training, s | command, s |",
        "|---|---|---|---|",
    ]
    for name, results in runs.items():
        cells = []
        for key, form in (("steps", ",.0f"), ("train", ".2f"), ("command", ".1f")):
            values = sorted(result[key] for result in results)
            low, middle, high = values[0], statistics.median(values), values[-1]
            cells.append(f"{middle:{form}} ({low:{form}} to {high:{form}})")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    ratios = [
        statistics.median(one[key] / other[key] for one, other in zip(ours, theirs))
        for key in ("train", "command")
    ]
    lines.append("| ours / CleanRL's, median | | {:.2f} | {:.2f} |".format(*ratios))
    return "\n".join(lines) + "\n"


def main(options: Options) -> None:
    if not options.cleanrl.is_file():
        raise SystemExit(f"--cleanrl {options.cleanrl}: no such file")
    if options.watch:
        program, seed, began = options.watch.split(":")
        watch = Watch(float(began))
        if program == "ppo.py":
            watch_ours(seed, watch)
        else:
            watch_cleanrl(options.cleanrl, seed, watch)
    else:
        runs: dict = {"ppo.py": [], "CleanRL ppo.py": []}
        for seed in range(1, options.seeds + 1):
            for program in runs:
                runs[program].append(run(program, seed, options))
                print(program, seed, runs[program][-1], flush=True)
        (RESULTS / "solved.json").write_text(json.dumps(runs, indent=1) + "\n")
        (RESULTS / "solved.md").write_text(report(runs))
        print(report(runs))


if __name__ == "__main__":
    main(tyro.cli(Options))
