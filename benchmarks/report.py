"""The runs of a suite's folder as tables and as figures of learning curves.

    python -m uv run --extra bench benchmarks/report.py --folder suite --results RESULTS

Writes learning.json, and from it learning.md and learning_GROUP.png. An entry of learning.json is
replaced if the folder has finished runs of it; the others stay.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import seaborn as sns
import tyro
from common import COLORS, OTHER_COLORS, STYLE, table
from matplotlib.ticker import EngFormatter
from scipy.stats import bootstrap

POINTS = 50  # of a learning curve
HEAD = """# What the programs learn

Written by `benchmarks/report.py` from runs of `benchmarks/suite.py`. A return is the mean over
greedy episodes after training. Below is its mean over seeds with a 95 % bootstrap interval, and the
lowest seed's. Met by: seeds at the goal or above.
"""


@dataclass
class Options:
    folder: Path = Path("suite")  # the suite's
    results: Path | None = None  # where to write; by default the same folder


def read_metrics(run_dirs: list[Path]) -> pd.DataFrame:
    """The lines of metrics.jsonl. A resumed run has several folders: the later ones count."""
    parts = [pd.read_json(run_dir / "metrics.jsonl", lines=True) for run_dir in run_dirs]
    ends = [*(later["global_step"].iloc[0] for later in parts[1:]), np.inf]
    return pd.concat(part[part["global_step"] < end] for part, end in zip(parts, ends))


def curve(rows: pd.DataFrame, grid: np.ndarray) -> list[float]:
    """Mean returns of the episodes that ended in each iteration, interpolated at steps of grid."""
    points = rows.reindex(columns=["global_step", "charts/episodic_return"]).dropna()
    return np.interp(grid, *points.to_numpy().T).round(2).tolist() if len(points) else []


def collect(folder: Path) -> dict | None:
    """The entry of a program in a setting, from its finished runs in FOLDER/SEED."""
    files = sorted(folder.glob("*/result.json"), key=lambda file: int(file.parent.name))
    planned = len(list(folder.glob("*/command.json")))
    if len(files) < planned:
        print(f"{folder}: {len(files)} of {planned} runs are finished")
    if not files:
        return None
    runs = [json.loads(file.read_text()) for file in files]
    histories = [
        read_metrics([file.parent / "runs" / part for part in run["parts"]])
        for file, run in zip(files, runs)
    ]
    steps = [rows["global_step"].iloc[-1] for rows in histories]
    grid = np.linspace(0, min(steps), POINTS + 1)[1:].round()
    return {
        "command": runs[0]["command"],
        "goal": runs[0]["goal"],
        "x": runs[0]["x"],
        "about": sorted({run["about"] for run in runs}),
        "seeds": [run["seed"] for run in runs],
        "returns": [round(run["return"], 4) for run in runs],
        "steps": int(np.median(steps)),
        "grid": grid.tolist(),
        "curves": [curve(rows, grid) for rows in histories],
    }


def number(value: float) -> str:
    """Two decimals below 10, one below 1,000."""
    return f"{value:,.{2 if abs(value) < 10 else 1 if abs(value) < 1000 else 0}f}"


def estimate(returns: list[float]) -> str:
    """The mean, and its 95 % bootstrap interval if there are several."""
    mean = number(np.mean(returns))
    if len(returns) == 1:
        return mean
    found = bootstrap((returns,), np.mean, n_resamples=2000, method="percentile", rng=0)
    return "{} [{}, {}]".format(mean, *map(number, found.confidence_interval))


def tables(group: str, entries: pd.DataFrame) -> str:
    """Markdown: what each program reached in each setting, every seed's return, and the machine."""
    returns, goals = entries["returns"], entries["goal"].astype(float)
    rows = entries[["setting", "program"]].copy()
    rows["seeds"] = returns.str.len().map(str)
    rows["mean"] = returns.map(estimate)
    rows["lowest"] = returns.map(min).map(number)
    rows["goal"] = ["" if np.isnan(goal) else number(goal) for goal in goals]
    met = [sum(x >= goal for x in seeds) for seeds, goal in zip(returns, goals)]
    rows["met by"] = ["" if np.isnan(goal) else str(count) for goal, count in zip(goals, met)]
    rows["steps"] = entries["steps"].map("{:,}".format)
    lines = [
        f"- {entry.program} on {entry.setting}: `{entry.command}`, seeds from {entry.seeds[0]}: "
        + ", ".join(map(number, entry.returns))
        for entry in entries.itertuples()
    ]
    places = sorted({f"{place}." for place in entries["about"].explode().dropna()})
    return "\n\n".join([f"## {group}", table(rows), "\n".join(lines), "\n".join(places)])


def draw(frame: pd.DataFrame, file: Path) -> None:
    """Learning curves with a panel for each setting; in a sweep, returns over its settings."""
    x = frame["x"].iloc[0]
    sweep = pd.notna(x)
    if sweep:
        y = "greedy return"
        frame = frame.assign(panel="")
        points = frame.rename(columns={"setting": x, "returns": y}).explode(y, ignore_index=True)
    else:
        x, y = "environment steps", "return of episodes"
        # Trainings of about the same length share a panel
        alike = frame.groupby(["setting", np.log2(frame["steps"]).round()])
        length = alike["steps"].transform("first").map(lambda steps: float(f"{steps:.1g}"))
        frame = frame.assign(panel=frame["setting"] + length.map(", {:,.0f} steps".format))
        points = frame.rename(columns={"grid": x, "curves": y}).explode(y)
        points = points[points[y].str.len() > 0].explode([x, y], ignore_index=True)
    panels = points["panel"].nunique()
    own = COLORS | {"eps=0.2": COLORS["ppo"]}
    others = [program for program in points["program"].unique() if program not in own]
    grid = sns.relplot(
        points.infer_objects(),
        x=x,
        y=y,
        hue="program",
        palette=own | dict(zip(others, OTHER_COLORS)),
        col="panel",
        col_wrap=min(3, panels),
        kind="line",
        linewidth=2,
        marker="o" if sweep else None,
        n_boot=500,
        seed=0,
        height=5 if panels == 1 else 3.8,
        aspect=1.6 if panels == 1 else 1.2,
        facet_kws={"sharex": False, "sharey": False, "legend_out": False},
    )
    grid.set_titles("{col_name}")
    for panel, ax in grid.axes_dict.items():
        for goal in frame["goal"][frame["panel"] == panel].dropna().unique():
            ax.axhline(goal, linestyle=":", color="black", linewidth=1.2)
        ax.margins(x=0)
        if not sweep:
            ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    seeds = " or ".join(map(str, sorted(points["seeds"].str.len().unique())))
    title = f"mean and 95 % interval, seeds: {seeds}; dotted: goal"
    sns.move_legend(grid, "lower center", bbox_to_anchor=(0.5, 1), ncols=6, title=title)
    grid.savefig(file)


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
            results["/".join(folder.parts[-3:])] = entry  # in the place of the one before, if any
    lines = [f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in results.items()]
    file.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    frame = pd.DataFrame(results.values())
    frame[["group", "setting", "program"]] = [name.split("/") for name in results]
    texts = [HEAD.strip()]
    sns.set_theme(style="whitegrid", rc=STYLE)
    for group, entries in frame.groupby("group", sort=False):
        texts.append(tables(group, entries))
        draw(entries, target / f"learning_{group}.png")
    (target / "learning.md").write_text("\n\n".join(texts) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options))
