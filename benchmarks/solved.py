"""How long until CartPole-v1 is solved: a greedy mean of at least 475 over 100 episodes.

    python -m uv run --extra peers benchmarks/solved.py --cleanrl PATH/TO/cleanrl/ppo.py

ppo.py and CleanRL's, each at its defaults, run in turn, a new process of watch.py for every seed.
After each iteration the policy is evaluated while the clocks stand still. Many policies pass once
by luck and soon fail again, so it counts when all looks over watch.LASTING steps are passed; the
first pass is told, too. Training time counts from the first reset, command time from the start of
the process, with all that the script imports. Writes benchmarks/results/solved.md and solved.json;
takes six minutes.
"""

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import tyro
from speed import RESULTS, ROOT, about
from watch import LASTING

WHEN = {
    "lasting": f"For good, that is at every look over the {LASTING:,} steps that follow",
    "first": "For the first time, if only at one look",
}


@dataclass
class Options:
    cleanrl: Path | None = None  # CleanRL's ppo.py; it is left out without
    seeds: int = 10  # runs of each program


def run(command: list[str]) -> dict[str, dict[str, float]]:
    """Steps, seconds of training and of the whole process until a run has solved it, or inf, at
    the "first" look at a policy that had, and at the first of a "lasting" row of such looks.
    """
    program, script, *flags = command
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    watch = [sys.executable, str(ROOT / "benchmarks" / "watch.py"), program]
    with tempfile.TemporaryDirectory() as folder:
        kwargs: dict = {"cwd": folder, "env": environment, "capture_output": True, "text": True}
        result = subprocess.run([*watch, str(time.time()), script, *flags], **kwargs)
    if result.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{result.stderr[-2000:]}")
    lines = [line for line in result.stdout.splitlines() if line.startswith("solved")]
    unsolved = dict.fromkeys(("steps", "train", "command"), math.inf)
    return json.loads(lines[0].removeprefix("solved")) if lines else dict.fromkeys(WHEN, unsolved)


def report(runs: dict[str, list[dict[str, dict[str, float]]]], machine: str) -> str:
    ours, theirs = next(iter(runs.values())), list(runs.values())[-1]
    lines = [
        "# Seconds until CartPole-v1 is solved",
        "",
        "Each program at its defaults, until the mean of 100 greedy episodes is at least 475;",
        f"median [lowest, highest] of seeds 1 to {len(ours)}, one thread (`benchmarks/solved.py`).",
        "training: from the first reset; command: from the start of Python, with imports.",
        "Evaluations, one an iteration, are off the clocks.",
    ]
    for when, title in WHEN.items():
        lines += [
            "",
            f"{title}:",
            "",
            "| program | steps | training, s | command, s |",
            "|---" * 4 + "|",
        ]
        for name, results in runs.items():
            cells = []
            for key, form in (("steps", ",.0f"), ("train", ".2f"), ("command", ".1f")):
                values = sorted(result[when][key] for result in results)
                low, middle, high = values[0], statistics.median(values), values[-1]
                cells.append(f"{middle:{form}} [{low:{form}}, {high:{form}}]")
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        if len(runs) > 1:
            ratios = [
                statistics.median(b[when][key] / a[when][key] for a, b in zip(ours, theirs))
                for key in ("steps", "train", "command")
            ]
            row = "| CleanRL's / ours, median of ratios | {:.2f} | {:.2f} | {:.2f} |"
            lines.append(row.format(*ratios))
    return "\n".join(lines) + f"\n\n{machine}.\n"


def main(options: Options) -> None:
    if options.cleanrl and not options.cleanrl.is_file():
        raise SystemExit(f"--cleanrl {options.cleanrl}: no such file")
    machine, commands = about("tensorboard"), {"ppo.py": ["ours", str(ROOT / "ppo.py")]}
    if options.cleanrl:
        commands["CleanRL ppo.py"] = ["cleanrl", str(options.cleanrl.resolve()), "--no-cuda"]
    runs: dict = {program: [] for program in commands}
    for seed in range(1, options.seeds + 1):
        for program, command in commands.items():
            runs[program].append(run([*command, "--seed", str(seed)]))
            print(program, seed, runs[program][-1], flush=True)
    (RESULTS / "solved.json").write_text(
        json.dumps({"about": machine, "runs": runs}, indent=1) + "\n"
    )
    (RESULTS / "solved.md").write_text(report(runs, machine))
    print(report(runs, machine))


if __name__ == "__main__":
    main(tyro.cli(Options))
