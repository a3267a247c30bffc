"""Training speed and memory of ppo.py, trpo.py and vpg.py against peers, on CartPole-v1.

    python -m uv run --extra peers benchmarks/speed.py --cleanrl PATH/TO/cleanrl/ppo.py

Each round runs every program once, in a process of its own, one after the other; a ratio is the
median over rounds of the two programs' numbers in the same round. Steps a second are those of the
training loop, as each program measures them itself; seconds are those of the whole process.
Writes benchmarks/results/speed.md and speed.json. Then it runs solved.py (seconds until CartPole-v1
is solved) and gae_share.py (where our time goes), unless told not to, which write files of their
own. Takes about half an hour.
"""

import csv
import hashlib
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
CLEANRL = "--vectorization-mode sync --num-envs 4 --learning-rate 2.5e-4 --gae-lambda 0.95"
CLEANRL += " --update-epochs 4 --clip-vloss"
TRPO = "--vectorization-mode sync --num-envs 4 --gae-lambda 0.95 --cg-iterations 15 --vf-epochs 10"
TRPO += " --vf-learning-rate 1e-3 --no-anneal-lr"
VPG = "--vectorization-mode sync --no-anneal-lr"
NOTES = """
- steps/s: of the training loop, median [lowest, highest]. Gymnasium's vector environments take a
  step to reset; CleanRL counts it and learns from it, ours do neither, the others have none.
- process: from the start of Python to its end, with imports, records and checkpoints, for ours also
  two evaluations of one episode. memory: the most that was resident; TORCH MiB of it is torch
  alone, after an import and one step of Adam.
- A ratio above 1 says that ours, the last name in bold, is faster or smaller than this program.
- All take gymnasium's CartPole-v1 in a SyncVectorEnv (Stable-Baselines3 in its DummyVecEnv) but in
  rows that name another: "vector CartPole" is gymnasium's, all environments at once in NumPy, which
  our scripts take by default; "Rust CartPole" is rlox's own, which it takes by default.
- PPO: CleanRL's hyperparameters. Stable-Baselines3 takes the clipped value loss, not the larger
  of it and the other. rlox reads its losses back after every minibatch. TorchRL has no
  such script: its collector, GAE and loss in a plain loop (benchmarks/peers.py), torch's weights.
- TRPO: sb3-contrib's hyperparameters, but its line search shortens a step by 0.8, ours by 0.5,
  and ours clips the value network's gradient.
- VPG: vpg.py's hyperparameters without annealing, which rlox does not have. Its value loss is twice
  ours, its Adam has eps 1e-8.
"""
TORCH_ALONE = """
import torch
parameter = torch.nn.Parameter(torch.zeros(1))
parameter.sum().backward()
torch.optim.Adam([parameter]).step()
print("SPS: 0")
"""


@dataclass
class Options:
    cleanrl: Path | None = None  # CleanRL's ppo.py; it is left out without
    rounds: int = 5  # runs of each program
    total_timesteps: int = 50_000  # steps of each run, rounded up to whole rollouts
    long_rounds: int = 3  # of runs with and without --compile, and of CleanRL's
    long_timesteps: int = 1_000_000  # steps of those
    also: tuple[str, ...] = ("solved", "gae_share")  # benchmarks to run afterwards


def about(*packages: str) -> str:
    """The machine, the versions and the commit that a result belongs to."""
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.is_file() else None
    cpu = model[1] if model else platform.processor() or platform.machine()
    versions = [f"{name} {version(name)}" for name in ("torch", "numpy", "gymnasium", *packages)]
    changed = ["git", "status", "--porcelain", "-uno", "--", ".", ":!benchmarks/results"]
    commit, changes = (
        subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()
        for command in (["git", "rev-parse", "--short=10", "HEAD"], changed)
    )
    return (
        f"{cpu}, {os.cpu_count()} cores, {platform.system()}; Python {platform.python_version()}, "
        f"{', '.join(versions)}; commit {commit}{' with changes' * bool(changes)}, "
        f"{time.strftime('%Y-%m-%d')}"
    )


def ours(script: str, flags: str, steps: int) -> list[str]:
    flags += f" --total-timesteps {steps} --eval-episodes 1"
    return [str(ROOT / script), *flags.split()]


def theirs(cleanrl: Path | None, steps: int) -> dict[str, list[str]]:
    flags = ["--no-cuda", "--total-timesteps", str(steps)]
    return {"CleanRL ppo.py": [str(cleanrl.resolve()), *flags]} if cleanrl else {}


def programs(cleanrl: Path | None, steps: int) -> dict[str, list[str]]:
    """Command lines by name; every peer's stands after ours, in bold, which it is compared with."""

    def peer(name: str) -> list[str]:
        return [str(ROOT / "benchmarks" / "peers.py"), name, str(steps)]

    vector = CLEANRL.replace("sync", "vector_entry_point")
    return {
        "**ppo.py**": ours("ppo.py", CLEANRL, steps),
        "ppo.py, vector CartPole": ours("ppo.py", vector, steps),
        **theirs(cleanrl, steps),
        "Stable-Baselines3 PPO": peer("sb3_ppo"),
        "rlox PPO": peer("rlox_ppo"),
        "rlox PPO, Rust CartPole": peer("rlox_ppo_rust"),
        "TorchRL PPO": peer("torchrl_ppo"),
        "**trpo.py**": ours("trpo.py", TRPO, steps),
        "sb3-contrib TRPO": peer("sb3_trpo"),
        "**vpg.py**": ours("vpg.py", VPG, steps),
        "vpg.py, vector CartPole": ours("vpg.py", VPG.replace("sync", "vector_entry_point"), steps),
        "rlox VPG": peer("rlox_vpg"),
        "rlox VPG, Rust CartPole": peer("rlox_vpg_rust"),
    }


def run(command: list[str]) -> dict[str, float]:
    """Speed of the whole training, and of its last half if it tells; what the process took."""
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as log:
        caches = {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/cache"}  # compiles anew in each run
        environment = os.environ | {"OMP_NUM_THREADS": "1"} | caches
        start = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, *command], cwd=folder, env=environment, stdout=log, stderr=log
        )
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        log.seek(0)
        output = log.read()
        if process.returncode:
            raise SystemExit(f"{shlex.join(command)} failed:\n{output[-2000:]}")
        # (steps, steps a second so far): peers print the latter once, CleanRL after each iteration.
        rows = [(i, float(x)) for i, x in enumerate(re.findall(r"SPS: ([\d.]+)", output), 1)]
        if not rows:
            (metrics,) = Path(folder).glob("runs/*/metrics.csv")
            with open(metrics) as file:
                for row in csv.DictReader(file):
                    rows.append((float(row["global_step"]), float(row["charts/SPS"])))
    (steps, sps), speed = rows[-1], {"sps": rows[-1][1]}
    if len(rows) > 1:
        half, half_sps = rows[len(rows) // 2 - 1]
        speed["last_half_sps"] = (steps - half) / (steps / sps - half / half_sps)
    unit = 2**20 if platform.system() == "Darwin" else 2**10
    cpu, memory = usage.ru_utime + usage.ru_stime, usage.ru_maxrss / unit
    return speed | {"seconds": seconds, "cpu": cpu, "memory": memory}


def table(rounds: list[dict[str, dict[str, float]]], long: bool = False) -> str:
    """Medians over rounds; a ratio compares with the last program in bold."""
    keys = ["sps", *["last_half_sps"] * long, "seconds", "cpu", "memory"]
    heads = ["steps/s", *["steps/s of the last half"] * long, "process, s", "CPU, s", "memory, MiB"]
    heads += [f"steps/s{' of the last half' * long}, ours / this"]
    heads += ["process, this / ours", "memory, this / ours"]
    lines = ["| program | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    base = ""
    for name in rounds[0]:
        base = name if name.startswith("**") else base
        cells = []
        for key in keys:
            values = sorted(one[name][key] for one in rounds)
            form = ".1f" if key in ("seconds", "cpu") else ",.0f"
            spread = f" [{values[0]:{form}}, {values[-1]:{form}}]" if key == "sps" else ""
            cells.append(f"{statistics.median(values):{form}}{spread}")
        for key in (keys[long], "seconds", "memory"):
            ratios = (one[name][key] / one[base][key] for one in rounds)
            ratio = statistics.median(1 / x if key == keys[long] else x for x in ratios)
            cells.append(f"{ratio:.2f}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def measure(commands: dict[str, list[str]], count: int) -> list[dict[str, dict[str, float]]]:
    rounds: list = []
    for number in range(count):
        rounds.append({})
        for name, command in commands.items():
            rounds[-1][name] = run(command)
            print(f"round {number + 1}: {name}", rounds[-1][name], flush=True)
    return rounds


def main(options: Options) -> None:
    if options.cleanrl and not options.cleanrl.is_file():
        raise SystemExit(f"--cleanrl {options.cleanrl}: no such file")
    peers = about("stable-baselines3", "sb3-contrib", "rlox", "torchrl", "tensordict")
    if options.cleanrl:
        digest = hashlib.sha256(options.cleanrl.read_bytes()).hexdigest()
        peers += f"; CleanRL's ppo.py with SHA-256 {digest[:10]}"
    steps = -(-options.total_timesteps // 1024) * 1024  # whole rollouts of all programs
    rounds = measure(programs(options.cleanrl, steps), options.rounds)
    torch_alone = run(["-c", TORCH_ALONE])["memory"]
    notes = NOTES.replace("TORCH", f"{torch_alone:,.0f}")
    text = f"# Training speed and memory\n\nCartPole-v1, {steps:,} steps, one thread; medians of "
    text += f"{len(rounds)} alternating rounds (`benchmarks/speed.py`).\n\n{table(rounds)}{notes}"
    command = ours("ppo.py", CLEANRL, options.long_timesteps)
    compared = {"**ppo.py --compile**": [*command, "--compile"], "ppo.py": command}
    compared |= theirs(options.cleanrl, options.long_timesteps)
    long_rounds = measure(compared, options.long_rounds)
    if long_rounds:
        text += f"\n`--compile` in a long run: {options.long_timesteps:,} steps, CleanRL's "
        text += f"hyperparameters, one thread; medians of {len(long_rounds)} alternating rounds.\n"
        text += "Compilation, from an empty cache, counts in all but the steps/s of the last half."
        text += f"\n\n{table(long_rounds, long=True)}"
    (RESULTS / "speed.md").write_text(f"{text}\n{peers}.\n")
    results = {
        "about": peers,
        "torch_alone": torch_alone,
        "rounds": rounds,
        "long_rounds": long_rounds,
    }
    (RESULTS / "speed.json").write_text(json.dumps(results, indent=1) + "\n")
    print(f"{text}\n{peers}.")
    for name in options.also:
        flags = ["--cleanrl", str(options.cleanrl)] * (name == "solved" and bool(options.cleanrl))
        subprocess.run(
            [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), *flags], check=True
        )


if __name__ == "__main__":
    main(tyro.cli(Options))
