"""How fast ours and others train CartPole-v1, how soon they solve it, and where our time goes.

    python -m uv run --extra peers benchmarks/speed.py train --cleanrl PATH/TO/cleanrl/ppo.py
    python -m uv run --extra peers benchmarks/speed.py solve --cleanrl PATH/TO/cleanrl/ppo.py
    python -m uv run benchmarks/speed.py share

Each round runs every program once, one after the other, in a process of its own with one thread. A
ratio is the median over rounds of two programs' numbers in the same round. Results go to
benchmarks/results/speed_NAME.md.
"""

import contextlib
import cProfile
import hashlib
import json
import math
import os
import platform
import pstats
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated
from unittest.mock import patch

import tyro
from common import RESULTS, ROOT, about, table
from peers import LASTING

# CleanRL's hyperparameters, all written out, so that they do not change with our defaults
SAME = "--gamma 0.99 --no-normalize-observations --no-normalize-rewards"
PPO = f"{SAME} --num-envs 4 --num-steps 128 --num-minibatches 4 --update-epochs 4"
PPO += " --learning-rate 2.5e-4 --gae-lambda 0.95 --clip-coef 0.2 --ent-coef 0.01 --vf-coef 0.5"
PPO += " --max-grad-norm 0.5 --anneal-lr"
TRPO = f"{SAME} --num-envs 4 --num-steps 128 --gae-lambda 0.95 --cg-iterations 15 --vf-epochs 10"
TRPO += " --vf-learning-rate 1e-3 --no-anneal-lr --target-kl 0.01 --cg-damping 0.1 --ent-coef 0"
VPG = f"{SAME} --num-envs 8 --num-steps 128 --gae-lambda 0.97 --vf-epochs 10 --no-anneal-lr"
VPG += " --learning-rate 5e-3 --vf-learning-rate 2e-2 --ent-coef 0"
PACKAGES = ("stable-baselines3", "sb3-contrib", "rlox", "torchrl", "jax")


@dataclass
class Train:
    """Training speed and memory."""

    cleanrl: Path | None = None  # CleanRL's ppo.py; left out without
    first: Path | None = None  # ppo.py of this project's first edition; left out without
    rounds: int = 5  # runs of each program
    total_timesteps: int = 50_176  # steps of each run: whole rollouts of all programs


@dataclass
class Solve:
    """Steps and seconds until the mean of 100 greedy episodes is at least 475."""

    cleanrl: Path | None = None  # CleanRL's ppo.py; left out without
    seeds: int = 10  # runs of each program


@dataclass
class Share:
    """Where the time of a run of ppo.py goes, and how much of it is torch and the environment."""

    total_timesteps: int = 50_000  # steps of each run


def programs(options: Train) -> dict[str, list[str]]:
    """Arguments of peers.py by name. Each is compared with the last name in bold before it."""
    count = str(options.total_timesteps)
    steps = ["--total-timesteps", count]
    found = {"**ppo.py**": ["ours", str(ROOT / "ppo.py"), *PPO.split(), *steps]}
    if options.first:
        first = str(options.first.resolve())
        found["ppo.py, first edition"] = ["ours", first, *PPO.split(), *steps]
    if options.cleanrl:
        found["CleanRL PPO"] = [
            "cleanrl",
            str(options.cleanrl.resolve()),
            "--no-cuda",
            "--no-clip-vloss",
            *steps,
        ]
    return found | {
        "Stable-Baselines3 PPO": ["sb3_ppo", count],
        "rlox PPO": ["rlox_ppo", count],
        "TorchRL PPO": ["torchrl_ppo", count],
        "PPO fused by XLA": ["xla_ppo", count],
        "**trpo.py**": ["ours", str(ROOT / "trpo.py"), *TRPO.split(), *steps],
        "sb3-contrib TRPO": ["sb3_trpo", count],
        "**vpg.py**": ["ours", str(ROOT / "vpg.py"), *VPG.split(), *steps],
        "rlox VPG": ["rlox_vpg", count],
    }


def run(arguments: list[str]) -> tuple[str, dict[str, float]]:
    """Runs peers.py in an empty folder. Returns its output, and what the process took."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false",
        "JAX_PLATFORMS": "cpu",
    }
    command = [sys.executable, str(ROOT / "benchmarks" / "peers.py"), *arguments]
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as log:
        start = time.perf_counter()
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        log.seek(0)
        output = log.read()
    if process.returncode:
        raise SystemExit(f"{shlex.join(command)} failed:\n{output[-2000:]}")
    unit = 2**20 if platform.system() == "Darwin" else 2**10
    cpu = usage.ru_utime + usage.ru_stime
    return output, {"process": seconds, "cpu": cpu, "memory": usage.ru_maxrss / unit}


def spread(values, form: str) -> str:
    return f"{statistics.median(values):{form}} [{min(values):{form}}, {max(values):{form}}]"


def write(name: str, text: str, facts: str) -> None:
    (RESULTS / f"speed_{name}.md").write_text(f"{text}\n\n{facts}.\n")
    print(text)


def machine(options: Train | Solve) -> str:
    facts = about(*PACKAGES)
    if options.cleanrl:
        digest = hashlib.sha256(options.cleanrl.read_bytes()).hexdigest()
        facts += f"; CleanRL's ppo.py with SHA-256 {digest[:10]}"
    return facts


def train(options: Train) -> None:
    facts = machine(options)
    rounds = []
    for number in range(options.rounds):
        results = {}
        for name, arguments in programs(options).items():
            output, usage = run(arguments)
            # CleanRL prints its speed so far after each iteration, the others once.
            sps = float(re.findall(r"SPS: ([\d.]+)", output)[-1])
            results[name] = usage | {"sps": sps}
            print(f"round {number + 1}: {name}: {results[name]}", flush=True)
        rounds.append(results)

    rows = []
    base = ""
    for name in rounds[0]:
        base = name if name.startswith("**") else base
        column = {k: [one[name][k] for one in rounds] for k in rounds[0][name]}
        speedup = [one[base]["sps"] / one[name]["sps"] for one in rounds]
        longer = [one[name]["process"] / one[base]["process"] for one in rounds]
        row = [name, spread(column["sps"], ",.0f"), f"{statistics.median(speedup):.2f}"]
        row += [f"{statistics.median(column['process']):.1f}", f"{statistics.median(longer):.2f}"]
        row += [f"{statistics.median(column[key]):,.0f}" for key in ("cpu", "memory")]
        rows.append(row)
    heads = ["program", "steps/s", "ours / this", "process, s", "this / ours", "CPU, s"]
    text = [
        "# Training speed and memory",
        "",
        f"CartPole-v1, {options.total_timesteps:,} steps; medians of {options.rounds} rounds.",
        "",
        table([*heads, "memory, MiB"], rows),
        "",
        "benchmarks/README.md says how to read it.",
    ]
    write("train", "\n".join(text), facts)


def solve(options: Solve) -> None:
    commands = {"ppo.py": ["solve_ours", str(ROOT / "ppo.py")]}
    if options.cleanrl:
        commands["CleanRL ppo.py"] = ["solve_cleanrl", str(options.cleanrl.resolve()), "--no-cuda"]
    facts = machine(options)
    runs: dict = {name: [] for name in commands}
    never = dict.fromkeys(("steps", "train", "command"), math.inf)
    for seed in range(1, options.seeds + 1):
        for name, arguments in commands.items():
            output, _ = run([*arguments, "--seed", str(seed)])
            found = re.search(r"solved (\{.*\})", output)
            result = json.loads(found[1]) if found else {"first": never, "lasting": never}
            runs[name].append(result)
            print(name, seed, result, flush=True)

    text = [
        "# Seconds until CartPole-v1 is solved",
        "",
        "Each program at its defaults, until the mean of 100 greedy episodes is at least 475;",
        f"median [lowest, highest] of seeds 1 to {options.seeds}.",
        "training: from the first reset. command: from the first line, with imports.",
        "The evaluations, one an iteration, are off the clocks.",
    ]
    titles = {
        "lasting": f"For good: at every look over the {LASTING:,} steps that follow",
        "first": "For the first time, if only at one look",
    }
    forms = {"steps": ",.0f", "train": ".2f", "command": ".1f"}
    for when, title in titles.items():
        rows = []
        for name, results in runs.items():
            cells = [spread([one[when][k] for one in results], forms[k]) for k in forms]
            rows.append([name, *cells])
        text += [
            "",
            f"{title}:",
            "",
            table(["program", "steps", "training, s", "command, s"], rows),
        ]
    write("solve", "\n".join(text), facts)


def share(options: Share) -> None:
    sys.path.insert(0, str(ROOT))
    import torch._dynamo  # noqa: F401, or an optimizer would import it, for seconds

    import ppo

    learn = ppo.learn
    total = f"--total-timesteps {options.total_timesteps}"
    text = "# Where the time of a training run goes\n\n"
    text += f"{total} of CartPole-v1 with ppo.py, in percent of `learn` under cProfile."
    for name, flags in (("its defaults", ""), ("CleanRL's hyperparameters", PPO)):
        profile = cProfile.Profile()
        with (
            tempfile.TemporaryDirectory() as folder,
            contextlib.chdir(folder),
            patch.object(ppo, "learn", lambda *run, of=profile: of.runcall(learn, *run)),
            patch.object(ppo, "evaluate", lambda *_: 0.0),
        ):
            ppo.train(tyro.cli(ppo.Args, args=shlex.split(f"{flags} {total}")))
        owners: dict[str, float] = defaultdict(float)
        parts: dict[str, float] = defaultdict(float)
        calls = pstats.Stats(profile).stats  # type: ignore[attr-defined]
        for (file, _, function), (_, _, own_time, whole_time, _) in calls.items():
            # The path tells the package, or the name of a function in C.
            code = file.rpartition("site-packages")[2] + function
            owner = "NumPy, GAE and Python"
            for package in ("torch", "gymnasium"):
                if package in code:
                    owner = package
            if file == ppo.__file__:
                owner = "ppo.py"
                parts[function] = max(parts[function], whole_time)  # two are called update
            if "compute_gae" in function:
                parts["compute_gae"] = whole_time
            owners[owner] += own_time
        whole = parts["learn"]
        for head, column in (("in code of", owners), ("in a call of", parts)):
            ordered = sorted(column.items(), key=lambda item: -item[1])
            rows = [
                [key, f"{value / whole:.2%}"]
                for key, value in ordered
                if not key.startswith("<")  # a comprehension
            ]
            text += f"\n\nWith {name}:\n\n{table([head, 'share'], rows)}"
    write("share", text, about())


if __name__ == "__main__":
    chosen = tyro.cli(
        Annotated[Train, tyro.conf.subcommand("train")]
        | Annotated[Solve, tyro.conf.subcommand("solve")]
        | Annotated[Share, tyro.conf.subcommand("share")]
    )
    {Train: train, Solve: solve, Share: share}[type(chosen)](chosen)
