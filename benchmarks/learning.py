"""Trains every command below with many seeds and writes what it learned and how long it took.

    python -m uv run benchmarks/learning.py [--only cartpole-ppo ...] [--workers 1]

Results go to benchmarks/results/learning.json (one entry a command, replaced when it is run again)
and, as tables, to learning.md. Run folders are made in a temporary folder.
"""

import contextlib
import csv
import importlib
import json
import os
import platform
import shlex
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import tyro

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
COMMANDS = json.loads((ROOT / "benchmarks" / "commands.json").read_text())


@dataclass
class Options:
    only: list[str] = field(default_factory=list)  # names of commands.json; all, if none is given
    workers: int = 1  # runs at a time; seconds of training are those of one core with 1


def train(command: str, seed: int) -> tuple[float, list[dict[str, str]]]:
    """The mean greedy return after one run of a command, and the rows of its metrics.csv."""
    script, *flags = shlex.split(command)
    sys.path.insert(0, str(ROOT))
    module = importlib.import_module(Path(script).stem)
    args = tyro.cli(module.Args, args=[*flags, "--seed", str(seed)])
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as silent:
        os.chdir(folder)
        with contextlib.redirect_stdout(silent), contextlib.redirect_stderr(silent):
            greedy = module.train(args)
        (metrics,) = Path("runs").glob("*/metrics.csv")
        rows = list(csv.DictReader(metrics.open()))
        os.chdir(ROOT)
    return greedy, rows


def run(name: str, seed: int) -> dict[str, float]:
    """One seed of one command: the mean greedy return, the steps and seconds of its training."""
    greedy, (*_, last) = train(COMMANDS[name]["command"], seed)
    steps = int(last["global_step"])
    seconds = steps / float(last["charts/SPS"])
    return {"seed": seed, "return": greedy, "steps": steps, "seconds": seconds}


def table(results: dict) -> str:
    """Markdown of all results: a summary line a command, then the return of every seed."""
    lines = [
        "# What the scripts learn",
        "",
        "Written by `python -m uv run benchmarks/learning.py`. A return is the mean of 100 greedy",
        "episodes after training; seconds are those of training alone, median over seeds.",
        "",
        "| command | seeds | mean | lowest | goal | met by | steps | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, result in results.items():
        returns = np.array([run["return"] for run in result["runs"]])
        steps, seconds = (
            np.array([run[key] for run in result["runs"]]) for key in ("steps", "seconds")
        )
        goal = COMMANDS[name]["goal"]
        lines.append(
            f"| `{COMMANDS[name]['command']}` | {len(returns)} | {returns.mean():.1f} "
            f"| {returns.min():.1f} | {goal} | {(returns >= goal).sum()} "
            f"| {steps.max():,} | {np.median(seconds):.1f} |"
        )
    for name, result in results.items():
        returns = ", ".join(f"{run['return']:.1f}" for run in result["runs"])
        lines += [
            "",
            f"**{name}**, seeds 1 to {len(result['runs'])}, on {result['machine']}:",
            returns,
        ]
    return "\n".join(lines) + "\n"


def main(options: Options) -> None:
    unknown = set(options.only) - set(COMMANDS)
    if unknown:
        raise SystemExit(f"--only {sorted(unknown)}: must be among {sorted(COMMANDS)}")
    file = RESULTS / "learning.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    with ProcessPoolExecutor(options.workers) as pool:
        for name in options.only or COMMANDS:
            seeds = range(1, COMMANDS[name]["seeds"] + 1)
            runs = list(pool.map(run, [name] * len(seeds), seeds))
            results[name] = {"machine": f"{machine}, torch {torch.__version__}", "runs": runs}
            results = {name: results[name] for name in COMMANDS if name in results}
            file.write_text(json.dumps(results, indent=1) + "\n")
            (RESULTS / "learning.md").write_text(table(results))
            returns = [run["return"] for run in runs]
            print(f"{name}: mean {np.mean(returns):.1f}, lowest {min(returns):.1f}", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Options))
