"""The runs of a suite's folder as tables and as figures of learning curves.

    python -m uv run benchmarks/report.py [--folder suite] [--results benchmarks/results]

Writes learning.json, and from it learning.md and learning_GROUP.png. An entry of learning.json is
replaced if the folder has finished runs of it; the others stay.
"""

import json
import shlex
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import tyro
from common import COLORS, OTHER_COLORS, STYLE, band, interval
from matplotlib.ticker import EngFormatter

POINTS = 50  # of a learning curve
LOOKS = {program: {"color": color} for program, color in COLORS.items()} | {
    "sb3-ppo": {"color": COLORS["ppo"], "linestyle": "--"},
    "sb3-a2c": {"color": COLORS["vpg"], "linestyle": "--"},
    "sb3-trpo": {"color": COLORS["trpo"], "linestyle": "--"},
}


@dataclass
class Options:
    folder: Path = Path("suite")  # the suite's
    results: Path | None = None  # where to write; by default the same folder


def read_metrics(run_dirs: list[Path]) -> list[dict[str, float]]:
    """The lines of metrics.jsonl. A resumed run has several folders: the later ones count."""
    rows: list[dict[str, float]] = []
    for run_dir in run_dirs:
        lines = (run_dir / "metrics.jsonl").read_text().splitlines()
        later = [json.loads(line) for line in lines]
        if later:
            first = later[0]["global_step"]
            rows = [row for row in rows if row["global_step"] < first] + later
    return rows


def curve(rows: list[dict[str, float]], grid: np.ndarray) -> np.ndarray:
    """Mean returns of the episodes that ended in each iteration, interpolated at steps of grid."""
    name = "charts/episodic_return"
    points = [(row["global_step"], row[name]) for row in rows if name in row]
    return np.interp(grid, *np.transpose(points)) if points else np.full(len(grid), np.nan)


def training_seconds(rows: list[dict[str, float]]) -> float:
    seconds = 0.0
    step = 0.0
    for row in rows:
        if "charts/SPS" in row:
            seconds += (row["global_step"] - step) / row["charts/SPS"]
            step = row["global_step"]
    return seconds


def collect(folder: Path) -> dict | None:
    """The entry of a program in an environment, from its finished runs in FOLDER/SEED."""
    files = sorted(folder.glob("*/result.json"), key=lambda file: int(file.parent.name))
    planned = len(list(folder.glob("*/command.json")))
    if len(files) < planned:
        print(f"{folder}: {len(files)} of {planned} runs are finished")
    if not files:
        return None
    runs = [json.loads(file.read_text()) for file in files]
    histories = []
    for file, run in zip(files, runs):
        histories.append(read_metrics([file.parent / "runs" / part for part in run["parts"]]))
    steps = [rows[-1]["global_step"] for rows in histories]
    grid = np.linspace(0, min(steps), POINTS + 1)[1:]
    curves = interval([curve(rows, grid) for rows in histories])
    return {
        "command": runs[0]["command"],
        "goal": runs[0]["goal"],
        "about": sorted({run["about"] for run in runs}),
        "seeds": [run["seed"] for run in runs],
        "returns": [round(run["return"], 4) for run in runs],
        "steps": int(np.median(steps)),
        "seconds": round(float(np.median([training_seconds(rows) for rows in histories])), 1),
        "grid": grid.round().tolist(),
        "curve": [[round(x, 2) if np.isfinite(x) else None for x in line] for line in curves],
    }


def number(value: float) -> str:
    """Two decimals below 10, one below 1,000."""
    return f"{value:,.{2 if abs(value) < 10 else 1 if abs(value) < 1000 else 0}f}"


def estimate(returns: list[float]) -> str:
    mean, low, high = interval(returns)
    return f"{number(mean)} [{number(low)}, {number(high)}]" if len(returns) > 1 else number(mean)


def tables(results: dict[str, dict]) -> str:
    """Markdown: for each group what each program reached, then every seed's return."""
    lines = [
        "# What the programs learn",
        "",
        "Written by `benchmarks/report.py` from runs of `benchmarks/suite.py`. A return is the",
        "mean over greedy episodes after training. Below is its mean over seeds with a 95 %",
        "bootstrap interval, and the lowest seed's. Met by: seeds at the goal or above. Seconds are",
        "those of training alone, the median over seeds.",
    ]
    groups: dict[str, dict[tuple[str, str], dict]] = {}
    for name, entry in results.items():
        group, env_id, program = name.split("/")
        groups.setdefault(group, {})[env_id, program] = entry
    for group, entries in groups.items():
        env_ids = list(dict.fromkeys(env_id for env_id, _ in entries))
        programs = list(dict.fromkeys(program for _, program in entries))
        lines += ["", f"## {group}"]
        if len(env_ids) > 1 and len(programs) > 1:
            lines += ["", "| environment | " + " | ".join(programs) + " |"]
            lines += ["|---" * (len(programs) + 1) + "|"]
            for env_id in env_ids:
                found = [entries.get((env_id, program)) for program in programs]
                cells = [estimate(entry["returns"]) if entry else "" for entry in found]
                lines.append(f"| {env_id} | " + " | ".join(cells) + " |")
        heads = "environment | program | seeds | mean | lowest | goal | met by | steps | seconds"
        lines += ["", f"| {heads} |", "|---" * 9 + "|"]
        for (env_id, program), entry in entries.items():
            returns, goal = entry["returns"], entry["goal"]
            met = "" if goal is None else sum(value >= goal for value in returns)
            lines.append(
                f"| {env_id} | {program} | {len(returns)} | {estimate(returns)}"
                f" | {number(min(returns))} | {'' if goal is None else number(goal)} | {met}"
                f" | {entry['steps']:,} | {entry['seconds']:,.1f} |"
            )
        for (env_id, program), entry in entries.items():
            seeds = ", ".join(map(str, entry["seeds"]))
            returns = ", ".join(map(number, entry["returns"]))
            lines += ["", f"**{program} on {env_id}**: `{entry['command']}`"]
            lines += [f"Seeds {seeds}: {returns}. {'; '.join(entry['about'])}."]
    return "\n".join(lines) + "\n"


def draw(group: str, entries: dict[str, dict], file: Path) -> None:
    """Learning curves, a panel for each environment and length of training."""
    panels: dict[tuple[str, float], dict[str, dict]] = {}
    for name, entry in entries.items():
        _, env_id, program = name.split("/")
        panels.setdefault((env_id, float(f"{entry['steps']:.1g}")), {})[program] = entry
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    fig, axes = plt.subplots(rows, columns, figsize=(4.6 * columns, 3.5 * rows + 1), squeeze=False)
    for ax in axes.flat[len(panels) :]:
        ax.remove()
    others: list[str] = []
    for ax, ((env_id, _), programs) in zip(axes.flat, panels.items()):
        for program, entry in programs.items():
            if program not in LOOKS:
                LOOKS[program] = {"color": OTHER_COLORS[len(others) % len(OTHER_COLORS)]}
                others.append(program)
            look = LOOKS[program]
            band(ax, entry["grid"], np.array(entry["curve"], float), program, **look)
            if entry["goal"] is not None:
                ax.axhline(entry["goal"], color=look["color"], linestyle=":", linewidth=1.5)
        ax.set(title=env_id, xlim=(0, min(entry["grid"][-1] for entry in programs.values())))
        ax.xaxis.set_major_formatter(EngFormatter(sep=""))
        ax.locator_params(nbins=5)
    fig.supxlabel("environment steps", fontsize="medium")
    fig.supylabel("return of training episodes", fontsize="medium")
    handles: dict = {}
    for ax in fig.axes:
        for handle, label in zip(*ax.get_legend_handles_labels()):
            handles.setdefault(label, handle)
    counts = sorted({len(entry["seeds"]) for entry in entries.values()})
    seeds = " or ".join(map(str, counts))
    title = f"mean and 95 % interval of {seeds} seeds; dotted: goal"
    columns = min(2 * columns, len(handles))
    fig.legend(handles.values(), handles, loc="outside upper center", ncols=columns, title=title)
    fig.savefig(file)
    plt.close(fig)


def main(options: Options) -> None:
    names = sorted({file.parents[1] for file in options.folder.glob("*/*/*/*/command.json")})
    if not names:
        raise SystemExit(f"--folder {options.folder}: no runs of benchmarks/suite.py there")
    target = options.results or options.folder
    file = target / "learning.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    for folder in names:
        entry = collect(folder)
        if entry:
            results["/".join(folder.parts[-3:])] = entry
    commands = json.loads(Path(__file__).with_name("commands.json").read_text())
    order = [
        f"{group}/{env_id}/{program}"
        for group, entry in commands.items()
        for env_id in entry["environments"]
        for program in entry["programs"]
    ]
    results = {
        name: results[name] for name in dict.fromkeys(order + list(results)) if name in results
    }
    lines = [f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in results.items()]
    file.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    (target / "learning.md").write_text(tables(results))
    plt.rcParams.update(STYLE)
    for group in dict.fromkeys(name.split("/")[0] for name in results):
        entries = {name: e for name, e in results.items() if name.startswith(f"{group}/")}
        draw(group, entries, target / f"learning_{group}.png")
    print(tables(results))


if __name__ == "__main__":
    main(tyro.cli(Options))
