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
import tyro
from common import COLORS, OTHER_COLORS, STYLE, band, interval
from matplotlib.ticker import EngFormatter

POINTS = 50  # of a learning curve
LOOKS = {program: {"color": color} for program, color in COLORS.items()} | {
    "eps=0.2": {"color": COLORS["ppo"]},  # ppo.py's own
}
Group = dict[tuple[str, str], dict]  # an entry by setting and program


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


def collapsed(curves: np.ndarray, goal: float | None) -> int | None:
    """Seeds whose mean over five points fell below half of an earlier one of 40 % of the goal."""
    if goal is None or goal <= 0:
        return None
    smooth = np.lib.stride_tricks.sliding_window_view(curves, 5, axis=1).mean(-1)
    peaks = np.maximum.accumulate(smooth, axis=1)
    return int(((peaks >= 0.4 * goal) & (smooth < peaks / 2)).any(1).sum())


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
    curves = np.array([curve(rows, grid) for rows in histories])
    return {
        "command": runs[0]["command"],
        "goal": runs[0]["goal"],
        "x": runs[0]["x"],
        "about": sorted({run["about"] for run in runs}),
        "seeds": [run["seed"] for run in runs],
        "returns": [round(run["return"], 4) for run in runs],
        "steps": int(np.median(steps)),
        "seconds": round(float(np.median([training_seconds(rows) for rows in histories])), 1),
        "grid": grid.round().tolist(),
        "collapsed": collapsed(curves, runs[0]["goal"]),
        "curve": interval(curves).round(2).tolist() if np.isfinite(curves).all() else None,
    }


def number(value: float) -> str:
    """Two decimals below 10, one below 1,000."""
    return f"{value:,.{2 if abs(value) < 10 else 1 if abs(value) < 1000 else 0}f}"


def estimate(returns: list[float]) -> str:
    mean, low, high = interval(returns)
    return f"{number(mean)} [{number(low)}, {number(high)}]" if len(returns) > 1 else number(mean)


def tables(groups: dict[str, Group]) -> str:
    """Markdown: for each group what each program reached, then every seed's return."""
    lines = [
        "# What the programs learn",
        "",
        "Written by `benchmarks/report.py` from runs of `benchmarks/suite.py`. A return is the",
        "mean over greedy episodes after training. Below is its mean over seeds with a 95 %",
        "bootstrap interval, and the lowest seed's. Met by: seeds at the goal or above. Collapsed:",
        "seeds whose training returns fell below half of an earlier level of 40 % of the goal.",
        "Seconds are those of training alone, the median over seeds.",
    ]
    for group, entries in groups.items():
        settings = list(dict.fromkeys(setting for setting, _ in entries))
        programs = list(dict.fromkeys(program for _, program in entries))
        lines += ["", f"## {group}"]
        if len(settings) > 1 and len(programs) > 1:
            lines += ["", "| setting | " + " | ".join(programs) + " |"]
            lines += ["|---" * (len(programs) + 1) + "|"]
            for setting in settings:
                found = [entries.get((setting, program)) for program in programs]
                cells = [estimate(entry["returns"]) if entry else "" for entry in found]
                lines.append(f"| {setting} | " + " | ".join(cells) + " |")
        lines += ["", "| setting | program | seeds | mean | lowest | goal | met by | collapsed"]
        lines[-1] += " | steps | seconds |"
        lines += ["|---" * 10 + "|"]
        for (setting, program), entry in entries.items():
            returns, goal = entry["returns"], entry["goal"]
            met = "" if goal is None else sum(value >= goal for value in returns)
            lines.append(
                f"| {setting} | {program} | {len(returns)} | {estimate(returns)}"
                f" | {number(min(returns))} | {'' if goal is None else number(goal)} | {met}"
                f" | {'' if entry['collapsed'] is None else entry['collapsed']}"
                f" | {entry['steps']:,} | {entry['seconds']:,.1f} |"
            )
        lines += [""]
        for (setting, program), entry in entries.items():
            returns = ", ".join(map(number, entry["returns"]))
            lines.append(
                f"- {program} on {setting}: `{entry['command']}`, seeds from"
                f" {entry['seeds'][0]} to {entry['seeds'][-1]}: {returns}"
            )
        places: dict[str, dict[str, None]] = {}  # commits by machine and versions, in order
        for place in (place for entry in entries.values() for place in entry["about"]):
            facts, _, commit = place.rpartition(", commit ")
            places.setdefault(facts, {})[commit] = None
        lines += ["", *(f"{facts}, commit {'; '.join(c)}." for facts, c in places.items())]
    return "\n".join(lines) + "\n"


def look(program: str, programs: list[str]) -> dict:
    """A script's own colour, or the next of the others."""
    others = [name for name in programs if name not in LOOKS]
    if program in LOOKS:
        return LOOKS[program]
    return {"color": OTHER_COLORS[others.index(program) % len(OTHER_COLORS)]}


def draw_curves(entries: Group):
    """Learning curves, a panel for each setting and length of training."""
    panels: dict[tuple[str, float], dict[str, dict]] = {}
    for (setting, program), entry in entries.items():
        if entry["curve"]:
            panels.setdefault((setting, float(f"{entry['steps']:.1g}")), {})[program] = entry
    names = list(dict.fromkeys(program for _, program in entries))
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    size = (4.6 * columns, 3.5 * rows + 1) if columns > 1 else (8, 5)
    fig, axes = plt.subplots(rows, columns, figsize=size, squeeze=False)
    for ax in axes.flat[len(panels) :]:
        ax.remove()
    for ax, ((setting, _), programs) in zip(axes.flat, panels.items()):
        for program, entry in programs.items():
            style = look(program, names)
            band(ax, entry["grid"], entry["curve"], program, **style)
            if entry["goal"] is not None:
                ax.axhline(entry["goal"], linestyle=":", linewidth=1.5, **style)
        ax.set(title=setting, xlim=(0, min(entry["grid"][-1] for entry in programs.values())))
        ax.xaxis.set_major_formatter(EngFormatter(sep=""))
        ax.locator_params(nbins=5)
    fig.supxlabel("environment steps", fontsize="medium")
    fig.supylabel("return of training episodes", fontsize="medium")
    return fig


def draw_sweep(entries: Group):
    """Greedy returns after training over the settings, which are values of x."""
    fig, ax = plt.subplots(figsize=(8, 5))
    settings = list(dict.fromkeys(setting for setting, _ in entries))
    programs = list(dict.fromkeys(program for _, program in entries))
    for program in programs:
        here = [n for n, setting in enumerate(settings) if (setting, program) in entries]
        returns = [interval(entries[settings[n], program]["returns"]) for n in here]
        band(ax, here, np.transpose(returns), program, marker="o", **look(program, programs))
    ax.set_xticks(range(len(settings)), settings)
    ax.set(xlim=(0, len(settings) - 1), ylabel="greedy return after training")
    ax.set_xlabel(next(iter(entries.values()))["x"])
    return fig


def draw(entries: Group, file: Path) -> None:
    sweep = next(iter(entries.values()))["x"] is not None
    fig = draw_sweep(entries) if sweep else draw_curves(entries)
    handles: dict = {}
    for ax in fig.axes:
        handles |= {label: line for line, label in zip(*ax.get_legend_handles_labels())}
    seeds = " or ".join(map(str, sorted({len(entry["seeds"]) for entry in entries.values()})))
    title = f"mean and 95 % interval of {seeds} seeds" + ("" if sweep else "; dotted: goal")
    columns = min(6 if len(fig.axes) > 2 else 4, len(handles))
    places: dict = {"loc": "outside upper center", "ncols": columns, "title": title}
    fig.legend(handles.values(), handles, **places)
    fig.savefig(file)
    plt.close(fig)


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
    results = {name: results[name] for name in names}
    lines = [f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in results.items()]
    file.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    groups: dict[str, Group] = {}
    for name, entry in results.items():
        group, setting, program = name.split("/")
        groups.setdefault(group, {})[setting, program] = entry
    (target / "learning.md").write_text(tables(groups))
    print(tables(groups))
    plt.rcParams.update(STYLE)
    for group, entries in groups.items():
        if any(entry["curve"] for entry in entries.values()):
            draw(entries, target / f"learning_{group}.png")


if __name__ == "__main__":
    main(tyro.cli(Options))
