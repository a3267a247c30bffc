"""The runs of a suite's folder as tables and as figures of learning curves.

    python -m uv run --extra bench benchmarks/report.py --folder suite --results RESULTS

Writes learning.json, and from it learning.md and learning_GROUP.png. An entry of learning.json is
replaced if the folder has finished runs of it; the others stay.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import tyro
from common import COLORS, OTHER_COLORS, STYLE, interval, table
from matplotlib.ticker import EngFormatter

POINTS = 50  # of a learning curve
HEAD = """# What the programs learn

Written by `benchmarks/report.py` from runs of `benchmarks/suite.py`. A return is the mean over
greedy episodes after training. Below is its mean over seeds with a 95 % bootstrap interval, and the
lowest seed's. Met by: seeds at the goal or above. Seconds are those of training, the median.
"""


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


def curve(rows: list[dict[str, float]], grid: np.ndarray) -> list[float]:
    """Mean returns of the episodes that ended in each iteration, interpolated at steps of grid."""
    name = "charts/episodic_return"
    points = [(row["global_step"], row[name]) for row in rows if name in row]
    return np.interp(grid, *np.transpose(points)).round(2).tolist() if points else []


def training_seconds(rows: list[dict[str, float]]) -> float:
    seconds = 0.0
    step = 0.0
    for row in rows:
        if "charts/SPS" in row:
            seconds += (row["global_step"] - step) / row["charts/SPS"]
            step = row["global_step"]
    return seconds


def collect(folder: Path) -> dict | None:
    """The entry of a program in a setting, from its finished runs in FOLDER/SEED."""
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
    grid = np.linspace(0, min(steps), POINTS + 1)[1:].round()
    return {
        "command": runs[0]["command"],
        "goal": runs[0]["goal"],
        "x": runs[0]["x"],
        "about": sorted({run["about"] for run in runs}),
        "seeds": [run["seed"] for run in runs],
        "returns": [round(run["return"], 4) for run in runs],
        "steps": int(np.median(steps)),
        "seconds": round(float(np.median([training_seconds(rows) for rows in histories])), 1),
        "grid": grid.tolist(),
        "curves": [curve(rows, grid) for rows in histories],
    }


def number(value: float) -> str:
    """Two decimals below 10, one below 1,000."""
    return f"{value:,.{2 if abs(value) < 10 else 1 if abs(value) < 1000 else 0}f}"


def tables(group: str, entries: dict[tuple[str, str], dict]) -> str:
    """Markdown: what each program reached in each setting, every seed's return, and the machine."""
    rows = []
    seeds = []
    for (setting, program), entry in entries.items():
        returns, goal = entry["returns"], entry["goal"]
        mean, low, high = map(number, interval(returns))
        row = [setting, program, str(len(returns)), f"{mean} [{low}, {high}]", number(min(returns))]
        row += ["", ""] if goal is None else [number(goal), str(sum(x >= goal for x in returns))]
        row += [f"{entry['steps']:,}", f"{entry['seconds']:,.1f}"]
        rows.append(row)
        what = f"- {program} on {setting}: `{entry['command']}`, seeds from {entry['seeds'][0]}: "
        seeds.append(what + ", ".join(map(number, returns)))
    heads = ["setting", "program", "seeds", "mean", "lowest", "goal", "met by"]
    places = sorted({place for entry in entries.values() for place in entry["about"]})
    parts = [f"## {group}", table([*heads, "steps", "seconds"], rows), "\n".join(seeds)]
    return "\n\n".join([*parts, "\n".join(f"{place}." for place in places)])


def palette(programs: list[str]) -> dict[str, str]:
    """A script's own colour, which "eps=0.2" shares with ppo, or the next of the others."""
    own = COLORS | {"eps=0.2": COLORS["ppo"]}
    others = [program for program in programs if program not in own]
    return own | dict(zip(others, OTHER_COLORS))


def draw(entries: dict[tuple[str, str], dict], file: Path) -> None:
    """Learning curves with a panel for each setting; in a sweep, returns over its settings."""
    sweep = next(iter(entries.values()))["x"]
    x, y = (sweep, "greedy return") if sweep else ("environment steps", "return of episodes")
    rows = []
    lengths: dict[tuple, int] = {}  # trainings of about the same length share a panel
    goals = set()
    for (setting, program), entry in entries.items():
        length = lengths.setdefault((setting, round(np.log2(entry["steps"]))), entry["steps"])
        panel = "" if sweep else f"{setting}, {float(f'{length:.1g}'):,.0f} steps"
        goals.add((panel, entry["goal"]))
        for seed, points in enumerate(entry["curves"]):
            found = [(setting, entry["returns"][seed])] if sweep else zip(entry["grid"], points)
            rows += [{"program": program, "panel": panel, x: a, y: b} for a, b in found]
    frame = pd.DataFrame(rows)
    panels = frame["panel"].nunique()
    grid = sns.relplot(
        frame,
        x=x,
        y=y,
        hue="program",
        palette=palette(list(frame["program"].unique())),
        col="panel",
        col_wrap=min(3, panels),
        kind="line",
        linewidth=2,
        marker="o" if sweep else None,
        errorbar=("ci", 95),
        n_boot=500,
        seed=0,
        height=5 if panels == 1 else 3.8,
        aspect=1.6 if panels == 1 else 1.2,
        facet_kws={"sharex": False, "sharey": False, "legend_out": False},
    )
    grid.set_titles("{col_name}")
    for panel, ax in grid.axes_dict.items():
        for goal in (goal for where, goal in goals if where == panel and goal is not None):
            ax.axhline(goal, linestyle=":", color="black", linewidth=1.2)
        ax.margins(x=0)
        if not sweep:
            ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    seeds = " or ".join(map(str, sorted({len(entry["seeds"]) for entry in entries.values()})))
    title = f"mean and 95 % interval of {seeds} seeds; dotted: goal"
    sns.move_legend(grid, "lower center", bbox_to_anchor=(0.5, 1), ncols=6, title=title)
    grid.savefig(file)
    plt.close(grid.figure)


def main(options: Options) -> None:
    folders = sorted({file.parents[1] for file in options.folder.glob("*/*/*/*/command.json")})
    if not folders:
        raise SystemExit(f"--folder {options.folder}: no runs of benchmarks/suite.py there")
    target = options.results or options.folder
    file = target / "learning.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    for folder in folders:
        entry = collect(folder)
        if entry:
            results["/".join(folder.parts[-3:])] = entry
    commands = json.loads(Path(__file__).with_name("commands.json").read_text())
    order = [
        f"{group}/{setting}/{program}"
        for group, entry in commands.items()
        for setting in entry["settings"]
        for program in entry["programs"]
    ]
    names = [name for name in dict.fromkeys([*order, *results]) if name in results]
    lines = [f"{json.dumps(name)}: {json.dumps(results[name])}" for name in names]
    file.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    groups: dict[str, dict[tuple[str, str], dict]] = {}
    for name in names:
        group, setting, program = name.split("/")
        groups.setdefault(group, {})[setting, program] = results[name]
    texts = [tables(group, entries) for group, entries in groups.items()]
    (target / "learning.md").write_text("\n\n".join([HEAD.strip(), *texts]) + "\n")
    sns.set_theme(style="whitegrid", rc=STYLE | {"figure.constrained_layout.use": False})
    for group, entries in groups.items():
        draw(entries, target / f"learning_{group}.png")


if __name__ == "__main__":
    main(tyro.cli(Options))
