"""What several benchmarks share: places, looks, the record of a machine and tables."""

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
STYLE = {"font.size": 14, "axes.grid": True, "grid.alpha": 0.3}


def git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def about(*packages: str) -> str:
    """The processor, the versions and the commit that a result belongs to.

    The commit is "with changes" if files other than results differ from it.
    """
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.is_file() else None
    processor = model[1] if model else platform.processor() or platform.machine()
    versions = [f"{name} {version(name)}" for name in ("torch", "numpy", "gymnasium", *packages)]
    changes = git("status", "--porcelain", "-uno", "--", ":/", ":!/benchmarks/results")
    commit = git("rev-parse", "--short=10", "HEAD") + (" with changes" if changes else "")
    facts = [
        f"{processor}, {os.cpu_count()} cores",
        platform.system(),
        f"Python {platform.python_version()}",
        *versions,
        f"commit {commit}",
        time.strftime("%Y-%m-%d"),
    ]
    return ", ".join(facts)


def table(frame) -> str:
    """Markdown of a DataFrame of strings."""
    lines = [list(frame), ["---"] * len(frame.columns), *frame.values.tolist()]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
