"""Writes the table and the figure of a run of bench_gae.py.

python benchmarks/gae_report.py gae.json
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import matplotlib.pyplot as plt

RESULTS = Path(__file__).parent / "results"
PACKAGES = ["numpy", "torch", "numba", "rlox", "torchrl", "jax"]
FIGURE = ["gae_kernel", "numba", "rlox, its layout", "JAX scan", "TorchRL vectorized"]
FIGURE += ["compute_gae_python", "torch rows", "memcpy"]


def duration(seconds):
    for unit, factor in [("s", 1), ("ms", 1e3), ("us", 1e6)]:
        if seconds * factor >= 1 or unit == "us":
            return f"{seconds * factor:.3g} {unit}"


def load(path):
    run = json.loads(Path(path).read_text())
    cpu, commit = run["machine_info"]["cpu"], run["commit_info"]
    packages = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    machine = f"{cpu['brand_raw']}, {cpu['count']} cores, {run['machine_info']['system']}"
    dirty = " with changes" if commit["dirty"] else ""
    about = f"{machine}; Python {run['machine_info']['python_version']}, {packages}; "
    about += f"commit {commit['id'][:10]}{dirty}, {run['datetime'][:10]}"
    medians = {}
    for benchmark in run["benchmarks"]:
        info = benchmark["extra_info"]
        case = info["dtype"], (info["steps"], info["envs"])
        medians.setdefault(info["peer"], {})[case] = benchmark["stats"]["median"]
    return about, medians


def table(medians, dtype):
    shapes = sorted({shape for name, shape in medians["memcpy"] if name == dtype}, key=size)
    lines = [f"| {dtype}, (T, N) = | " + " | ".join(map(str, shapes)) + " |"]
    lines += ["|---" * (len(shapes) + 1) + "|"]
    for peer, times in medians.items():
        cells = [duration(times[dtype, s]) if (dtype, s) in times else "-" for s in shapes]
        lines.append(f"| {peer} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def size(shape):
    return shape[0] * shape[1], shape


def figure(about, medians):
    plt.rcParams["font.size"] = 11
    fig, axes = plt.subplots(1, 2, figsize=(11, 5), sharey=True, layout="constrained")
    for ax, dtype in zip(axes, ["float32", "float64"], strict=True):
        for number, peer in enumerate(FIGURE):
            color = "black" if peer == "memcpy" else f"C{number}"
            for steps, style in ((2048, "-o"), (128, ":s")):
                points = sorted(
                    (t * n, 1e6 * seconds)
                    for (name, (t, n)), seconds in medians[peer].items()
                    if (name, t) == (dtype, steps)
                )
                label = peer if steps == 2048 else None
                ax.loglog(*zip(*points), style, ms=4, color=color, label=label)
        ax.set(title=f"{dtype} (solid: T = 2048, dotted: T = 128)", xlabel="elements, T × N")
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("median time of a call (µs)")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    machine, rest = about.split("; ", 1)
    fig.suptitle(f"{machine}\n{rest}", fontsize=8)
    fig.savefig(RESULTS / "gae.png", dpi=120)


if __name__ == "__main__":
    RESULTS.mkdir(exist_ok=True)
    about, medians = load(sys.argv[1])
    tables = [table(medians, dtype) for dtype in ("float32", "float64")]
    rows = [[p, d, *s, t] for p, times in medians.items() for (d, s), t in times.items()]
    text = "\n\n".join(["Median time of a call.", *tables, about])
    (RESULTS / "gae.md").write_text(text + "\n")
    lines = ",\n".join(map(json.dumps, rows))
    (RESULTS / "gae.json").write_text(f"[\n{lines}\n]\n")
    figure(about, medians)
    print(text)
