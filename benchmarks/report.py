"""The runs of a suite's folder as a table, and as a figure of learning curves an environment.

    python -m uv run benchmarks/report.py [--folder suite] [--results benchmarks/results]

Writes learning.json (an entry a command, replaced if the folder has finished runs of it), and from
all its entries learning.md and learning_<env_id>.png. RESULTS is by default the folder itself.
"""

import csv
import json
import shlex
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import tyro
from matplotlib.ticker import EngFormatter
from scipy.stats import bootstrap, trim_mean

COMMANDS = json.loads(Path(__file__).with_name("commands.json").read_text())
POINTS = 50  # of a learning curve
LADDER = ["reinforce", "vpg", "trpo", "ppo"]
# Okabe and Ito's colours, which all eyes tell apart; line styles and markers say the same again.
LOOKS = [
    {"color": color, "linestyle": line, "marker": marker}
    for color, line, marker in zip(
        ("#000000", "#E69F00", "#009E73", "#0072B2", "#CC79A7"),
        (":", "--", "-.", "-", "--"),
        "ovs^D",
    )
]


@dataclass
class Options:
    folder: Path = Path("suite")  # the suite's
    results: Path | None = None  # where to write; the same folder by default


def interval(samples, statistic=np.mean) -> np.ndarray:
    """A statistic and its 95 % bootstrap interval over seeds, the first axis: (3, ...)."""
    samples = np.asarray(samples, dtype=float)
    value = statistic(samples, axis=0)
    if len(samples) < 2:
        return np.stack((value, value * np.nan, value * np.nan))
    found = bootstrap((samples,), statistic, axis=0, n_resamples=2000, method="percentile", rng=0)
    return np.stack((value, *found.confidence_interval))


def iqm(samples, axis: int):
    """Interquartile mean: that of the middle half."""
    return trim_mean(samples, 0.25, axis=axis)


def band(ax, x, estimates, look: dict, label: str) -> None:
    """A line of estimates (3, K) with its interval shaded."""
    middle, low, high = estimates
    every = max(1, len(x) // 10)
    ax.plot(x, middle, label=label, markersize=4, markevery=every, linewidth=1.6, **look)
    ax.fill_between(x, low, high, color=look["color"], alpha=0.18, linewidth=0)


def collect(folder: Path) -> dict | None:
    """The entry of a command from its finished runs in FOLDER/SEED.

    A point of a curve is the mean return of the episodes that ended in the rollout there,
    interpolated; the POINTS lie evenly up to the last step that all runs reached.
    """
    command, runs, curves, machines = json.loads((folder / "command.json").read_text()), [], [], {}
    found = folder.glob("*/runs/*[0-9]/evaluation.json")
    for file in sorted(found, key=lambda file: int(file.parts[-4])):
        args = json.loads(file.with_name("args.json").read_text())
        rows = list(csv.DictReader(file.with_name("metrics.csv").open()))
        steps, speed = int(rows[-1]["global_step"]), float(rows[-1]["charts/SPS"])
        scores, seconds = json.loads(file.read_text()), round(steps / speed, 2)
        runs.append({"seed": args["seed"], "return": scores["greedy"], "steps": steps})
        runs[-1] |= {"sampled": scores["sampled"], "seconds": seconds}
        told = [(row["global_step"], row["charts/episodic_return"]) for row in rows]
        points = np.array(told, dtype=float)
        curves.append(points[np.isfinite(points[:, 1])])  # no episode ended in the others
        versions = [f"{key} {args[key]}" for key in ("torch", "gymnasium", "numpy", "commit")]
        machines[", ".join([(file.parents[2] / "machine.txt").read_text(), *versions])] = None
    if len(runs) < command["seeds"]:
        print(f"{folder}: {len(runs)} of {command['seeds']} runs are finished")
    if not runs:
        return None
    grid = np.linspace(0, min(run["steps"] for run in runs), POINTS + 1)[1:]
    for run, points in zip(runs, curves):
        run["curve"] = np.interp(grid, *points.T).round(2).tolist() if len(points) else None
    about = {"command": command["command"], "env_id": args["env_id"]}
    return about | {"machine": "; ".join(machines), "runs": runs}


def number(value: float) -> str:
    return f"{value:.1f}" if np.isfinite(value) else "–"


def table(results: dict) -> str:
    """Markdown of all results: a summary line a command, then the return of every seed."""
    lines = [
        "# What the scripts learn",
        "",
        "Written by `benchmarks/report.py` from runs of `benchmarks/suite.py`. A return is the",
        "mean over greedy episodes after training, 100 if the command does not say else. IQM is",
        "the mean of the middle half of the seeds, [low, high] a 95 % bootstrap interval over",
        "seeds. Sampled is the mean with actions drawn from the policy. Seconds are those of",
        "training alone, median over seeds.",
        "",
        "| command | seeds | mean | IQM | lowest | goal | met by | sampled | steps | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, result in results.items():
        keys = ("return", "steps", "seconds")
        returns, steps, seconds = (np.array([run[key] for run in result["runs"]]) for key in keys)
        goal = COMMANDS.get(name, {}).get("goal")
        mean, middle = (
            "{} [{}, {}]".format(*map(number, interval(returns, statistic)))
            for statistic in (np.mean, iqm)
        )
        lines.append(
            f"| `{result['command']}` | {len(returns)} | {mean} | {middle} | {returns.min():.1f}"
            f" | {'–' if goal is None else goal}"
            f" | {'–' if goal is None else (returns >= goal).sum()}"
            f" | {number(np.mean([run.get('sampled', np.nan) for run in result['runs']]))}"
            f" | {steps.max():,} | {np.median(seconds):.1f} |"
        )
    for name, result in results.items():
        seeds, returns = zip(*((run["seed"], f"{run['return']:.1f}") for run in result["runs"]))
        told = f"{seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else seeds[0]
        if seeds != tuple(range(seeds[0], seeds[-1] + 1)):
            told = ", ".join(map(str, seeds))
        lines += ["", f"**{name}**, seeds {told}, on {result['machine']}:", ", ".join(returns)]
    return "\n".join(lines) + "\n"


def draw(env_id: str, results: dict, file: Path) -> None:
    """Learning curves of the commands in one environment."""
    fig, ax = plt.subplots(figsize=(6, 4.5), layout="constrained")
    stems = [Path(shlex.split(result["command"])[0]).stem for result in results.values()]
    known = len(set(stems)) == len(stems) and set(stems) <= set(LADDER)
    for place, (stem, (name, result)) in enumerate(zip(stems, results.items())):
        look = LOOKS[LADDER.index(stem) if known else place % len(LOOKS)]
        curves = np.array([run["curve"] for run in result["runs"]])
        grid = np.linspace(0, min(run["steps"] for run in result["runs"]), POINTS + 1)[1:]
        label = f"{name}, {len(curves)} seed{'s'[: len(curves) > 1]}"
        band(ax, grid, interval(curves), look, label)
    ax.set(title=env_id, xlabel="environment steps", ylabel="return of training episodes", xlim=0)
    ax.xaxis.set_major_formatter(EngFormatter())
    about = "mean and 95 % bootstrap interval over seeds"
    fig.legend(loc="outside lower center", ncols=2, fontsize="small", title=about)
    fig.savefig(file, dpi=120)
    plt.close(fig)


def main(options: Options) -> None:
    folders = sorted(file.parent for file in options.folder.glob("*/command.json"))
    if not folders:
        raise SystemExit(f"--folder {options.folder}: no runs of benchmarks/suite.py there")
    target = options.results or options.folder
    file = target / "learning.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    results |= {folder.name: entry for folder in folders if (entry := collect(folder))}
    names = sorted(results, key=lambda name: [*COMMANDS, name].index(name))
    lines = [f"{json.dumps(name)}: {json.dumps(results[name])}" for name in names]
    file.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    results = {name: results[name] for name in names}
    (target / "learning.md").write_text(table(results))
    plt.rcParams |= {"font.size": 11, "axes.grid": True, "grid.alpha": 0.3}
    panels: dict[str, dict] = {}  # an entry of before has no curves, nor one without episodes
    for name, result in results.items():
        if all(run.get("curve") for run in result["runs"]):
            panels.setdefault(result["env_id"], {})[name] = result
    for env_id, here in panels.items():
        draw(env_id, here, target / f"learning_{env_id.replace('/', '-')}.png")
    print(table(results))


if __name__ == "__main__":
    main(tyro.cli(Options))
