"""What several benchmarks share: places, the record of a machine, intervals and looks."""

import os
import platform
import re
import subprocess
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"

# Okabe and Ito's colours, which all eyes tell apart. A script has one colour in every figure.
COLORS = {"reinforce": "#000000", "vpg": "#E69F00", "trpo": "#009E73", "ppo": "#0072B2"}
OTHER_COLORS = ["#CC79A7", "#56B4E9", "#D55E00", "#888888", "#B8A600"]
STYLE = {
    "font.size": 14,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 100,
}


def about(*packages: str) -> str:
    """The processor, the versions and the commit that a result belongs to."""
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.is_file() else None
    processor = model[1] if model else platform.processor() or platform.machine()
    versions = [f"{name} {version(name)}" for name in ("torch", "numpy", "gymnasium", *packages)]
    facts = [
        f"{processor}, {os.cpu_count()} cores",
        platform.system(),
        f"Python {platform.python_version()}",
        *versions,
        f"commit {commit()}",
        time.strftime("%Y-%m-%d"),
    ]
    return ", ".join(facts)


def commit() -> str:
    """The commit of the code, and whether files other than results differ from it."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()

    changes = git("status", "--porcelain", "-uno", "--", ":/", ":!/benchmarks/results")
    return git("rev-parse", "--short=10", "HEAD") + (" with changes" if changes else "")


def table(frame) -> str:
    """Markdown of a DataFrame of strings."""
    lines = [list(frame), ["---"] * len(frame.columns), *frame.values.tolist()]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def interval(samples):
    """The mean and its 95 % bootstrap interval over seeds, the first axis: (3, ...)."""
    import numpy as np
    from scipy.stats import bootstrap

    samples = np.asarray(samples, dtype=float)
    mean = samples.mean(0)
    if len(samples) < 2:
        return np.stack([mean, mean * np.nan, mean * np.nan])
    found = bootstrap((samples,), np.mean, n_resamples=2000, method="percentile", rng=0)
    return np.stack([mean, *found.confidence_interval])


def band(ax, x, estimates, label: str, **look) -> None:
    """A line of estimates (3, K) with its interval shaded."""
    mean, low, high = estimates
    ax.plot(x, mean, label=label, linewidth=2, **look)
    ax.fill_between(x, low, high, color=look["color"], alpha=0.18, linewidth=0)
