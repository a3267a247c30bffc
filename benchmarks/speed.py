"""How fast ours and others train CartPole-v1, how soon they solve it, and where our time goes.

    python -m uv run --extra peers benchmarks/speed.py train --cleanrl PATH/TO/cleanrl/ppo.py
    python -m uv run --extra peers benchmarks/speed.py solve --cleanrl PATH/TO/cleanrl/ppo.py
    python -m uv run --extra bench benchmarks/speed.py share

Writes benchmarks/results/speed_NAME.md; benchmarks/README.md says how to read it.
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
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

import pandas as pd
import tyro
from common import RESULTS, ROOT, about, table
from peers import LASTING

# CleanRL's hyperparameters, all written out, so that they do not change with our defaults
SAME = "--gamma 0.99 --no-normalize-observations --no-normalize-rewards"
PPO = f"""{SAME} --num-envs 4 --num-steps 128 --num-minibatches 4 --update-epochs 4
    --learning-rate 2.5e-4 --gae-lambda 0.95 --clip-coef 0.2 --ent-coef 0.01 --vf-coef 0.5
    --max-grad-norm 0.5 --anneal-lr""".split()
TRPO = f"""{SAME} --num-envs 4 --num-steps 128 --gae-lambda 0.95 --cg-iterations 15 --vf-epochs 10
    --vf-learning-rate 1e-3 --no-anneal-lr --target-kl 0.01 --cg-damping 0.1 --ent-coef 0""".split()
PACKAGES = ("stable-baselines3", "sb3-contrib", "rlox", "torchrl", "jax")


def run(commands: dict[str, list]) -> dict[str, tuple[str, dict[str, float]]]:
    """Runs peers.py for each command. Returns their outputs, and what the processes took.

    They take turns of 0.2 seconds, so that what else the machine does slows all of them alike.
    """
    env = os.environ | {"OMP_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu"}
    env["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"
    found, running = {}, {}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        for name, arguments in commands.items():
            command = [sys.executable, str(ROOT / "benchmarks" / "peers.py"), *map(str, arguments)]
            place = Path(tempfile.mkdtemp(dir=folder))
            with open(place / "log", "w") as log:
                process = subprocess.Popen(command, stdout=log, stderr=log, cwd=place, env=env)
            os.kill(process.pid, signal.SIGSTOP)
            stack.callback(process.kill)
            running[name] = process, place / "log"
        while running:
            for name, (process, log) in list(running.items()):
                os.kill(process.pid, signal.SIGCONT)
                time.sleep(0.2)
                ended, status, usage = os.wait4(process.pid, os.WNOHANG)
                if not ended:
                    os.kill(process.pid, signal.SIGSTOP)
                    continue
                process.returncode = os.waitstatus_to_exitcode(status)
                del running[name]
                output = log.read_text()
                if process.returncode:
                    raise SystemExit(f"{shlex.join(process.args)} failed:\n{output[-2000:]}")
                memory = usage.ru_maxrss / (2**20 if platform.system() == "Darwin" else 2**10)
                took = {"process, s": usage.ru_utime + usage.ru_stime, "memory, MiB": memory}
                found[name] = output, took
    return found


def summary(results: list[dict], columns: dict[str, str]) -> str:
    """A row for each program: columns with their formats of median, lowest and highest."""
    rows = []
    for program, runs in pd.DataFrame(results).groupby("program", sort=False):
        found = runs[[*columns]].agg(["median", "min", "max"])
        rows.append([program, *(form.format(*found[name]) for name, form in columns.items())])
    return table(pd.DataFrame(rows, columns=["program", *columns]))


def write(name: str, text: str, facts: str) -> None:
    (RESULTS / f"speed_{name}.md").write_text(f"{text}\n\n{facts}.\n")
    print(text)


def machine(cleanrl: Path | None) -> str:
    facts = about(*PACKAGES)
    if cleanrl:
        digest = hashlib.sha256(cleanrl.read_bytes()).hexdigest()
        facts += f"; CleanRL's ppo.py with SHA-256 {digest[:10]}"
    return facts


def train(
    cleanrl: Path | None = None,
    first: Path | None = None,
    rounds: int = 5,
    total_timesteps: int = 50_176,
) -> None:
    """Training speed and memory.

    Args:
        cleanrl: CleanRL's ppo.py; left out without.
        first: ppo.py of this project's first edition; left out without.
        rounds: runs of each program.
        total_timesteps: steps of each run: whole rollouts of all programs.
    """
    steps = ["--total-timesteps", total_timesteps]
    programs = {  # each is compared with the last name in bold before it
        "**ppo.py**": ["ours", ROOT / "ppo.py", *PPO, *steps],
        "ppo.py, first edition": first and ["ours", first.resolve(), *PPO, *steps],
        "CleanRL PPO": cleanrl
        and ["cleanrl", cleanrl.resolve(), "--no-cuda", "--no-clip-vloss", *steps],
        "Stable-Baselines3 PPO": ["sb3_ppo", total_timesteps],
        "rlox PPO": ["rlox_ppo", total_timesteps],
        "TorchRL PPO": ["torchrl_ppo", total_timesteps],
        "PPO fused by XLA": ["xla_ppo", total_timesteps],
        "**trpo.py**": ["ours", ROOT / "trpo.py", *TRPO, *steps],
        "sb3-contrib TRPO": ["sb3_trpo", total_timesteps],
    }
    facts = machine(cleanrl)
    results = []
    chosen = {name: arguments for name, arguments in programs.items() if arguments}
    for number in range(1, rounds + 1):
        found = run(chosen)
        for name in chosen:
            output, result = found[name]
            # CleanRL and the progress bar print the speed so far, too: the last one counts.
            speeds = re.findall(r"(?<=SPS: )\d+|[\d.]+(?= steps/s)", output)
            result["steps/s"] = float(speeds[-1])
            if name.startswith("**"):
                base = result
            result["ours / this"] = base["steps/s"] / result["steps/s"]
            results.append({"program": name, **result})
            print(f"round {number}: {results[-1]}", flush=True)

    columns = {
        "steps/s": "{:,.0f} [{:,.0f}, {:,.0f}]",
        "ours / this": "{:.2f} [{:.2f}, {:.2f}]",
        "process, s": "{:.1f}",
        "memory, MiB": "{:,.0f}",
    }
    text = f"""# Training speed and memory

CartPole-v1, {total_timesteps:,} steps; medians of {rounds} rounds, in seconds of the CPU.

{summary(results, columns)}

benchmarks/README.md says how to read it."""
    write("train", text, facts)


def solve(cleanrl: Path | None = None, seeds: int = 10) -> None:
    """Steps and seconds until the mean of 100 greedy episodes is at least 475.

    Args:
        cleanrl: CleanRL's ppo.py; left out without.
        seeds: runs of each program.
    """
    commands: dict[str, list] = {"ppo.py": ["solve_ours", ROOT / "ppo.py"]}
    if cleanrl:
        commands["CleanRL ppo.py"] = ["solve_cleanrl", cleanrl.resolve(), "--no-cuda"]
    facts = machine(cleanrl)
    columns = {"steps": "{:,.0f} [{:,.0f}, {:,.0f}]", "training, s": "{:.2f} [{:.2f}, {:.2f}]"}
    never = dict.fromkeys(columns, math.inf)
    results = []
    for seed in range(1, seeds + 1):
        found = run({name: [*command, "--seed", seed] for name, command in commands.items()})
        for name in commands:
            solved = re.search(r"solved (\{.*\})", found[name][0])
            looks = json.loads(solved[1]) if solved else {}
            for when in ("for good", "first look"):
                results.append({"program": f"{name}, {when}", **looks.get(when, never)})
            print(name, seed, looks, flush=True)

    text = f"""# Seconds until CartPole-v1 is solved

Each program at its defaults, until the mean of 100 greedy episodes is at least 475: at a first
look, or for good, at every look over the {LASTING:,} steps that follow. There is a look after each
iteration. Training is timed from the first reset, without the looks, in seconds of the CPU.
Median [lowest, highest] of seeds 1 to {seeds}.

{summary(results, columns)}"""
    write("solve", text, facts)


def share() -> None:
    """Where the time of a run of ppo.py goes, and how much of it is torch and the environment."""
    sys.path.insert(0, str(ROOT))
    import torch._dynamo  # noqa: F401, or an optimizer would import it, for seconds

    import ppo

    profile = cProfile.Profile()
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.chdir(folder),
        patch.object(ppo, "evaluate", lambda *_: 0.0),
    ):
        profile.runcall(ppo.train, ppo.Args())
    stats = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    columns = ["first calls", "calls", "own time", "whole time", "callers"]
    calls = pd.DataFrame(stats.values(), columns=columns)
    calls["file"], _, function = zip(*stats)
    function = pd.Series(function).replace(".*compute_gae.*", "compute_gae", regex=True)
    # The path tells the package, or the name of a function in C.
    code = calls["file"].str.rpartition("site-packages")[2] + function
    ours = calls["file"] == ppo.__file__
    owner = code.str.extract("(torch|gymnasium)", expand=False).mask(ours, "ppo.py")
    own_time = calls["own time"].groupby(owner.fillna("NumPy, GAE and Python")).sum()
    named = (ours & ~function.str.startswith("<")) | (function == "compute_gae")
    whole_time = calls["whole time"][named].groupby(function).max()  # two are called update
    text = "# Where the time of a training run goes\n\n"
    text += "ppo.py with its defaults, in percent of `train` without evaluation, under cProfile."
    for head, times in {"in code of": own_time, "in a call of": whole_time}.items():
        shares = (times / whole_time["train"]).sort_values(ascending=False).map("{:.2%}".format)
        text += f"\n\n{table(shares.rename_axis(head).reset_index(name='share'))}"
    write("share", text, about())


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"train": train, "solve": solve, "share": share})
