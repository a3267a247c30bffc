"""Training speed of ppo.py and trpo.py against peers, with the peers' settings, on CartPole-v1.

    python -m uv run --extra peers benchmarks/speed.py --cleanrl PATH/TO/cleanrl/ppo.py

Each round runs every program once, in a process of its own, one after the other; a ratio is the
median over rounds of the two programs' speeds in the same round. Steps a second are those of the
training loop, as each program measures them itself; seconds are those of the whole process.
Writes benchmarks/results/speed.md and speed.json.
"""

import json
import os
import platform
import re
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
CLEANRL = "--num-envs 4 --learning-rate 2.5e-4 --gae-lambda 0.95 --update-epochs 4 --clip-vloss"
SB3 = """
import time, torch
from stable_baselines3.common.env_util import make_vec_env
{imports}
torch.set_num_threads(1)
envs = make_vec_env("CartPole-v1", 4)
model = {model}
start = time.perf_counter()
model.learn({steps})
print("SPS:", model.num_timesteps / (time.perf_counter() - start))
"""
SB3_PPO = """PPO("MlpPolicy", envs, n_steps=128, batch_size=128, n_epochs=4, gae_lambda=0.95,
    learning_rate=lambda left: 2.5e-4 * left, ent_coef=0.01, clip_range_vf=0.2, device="cpu")"""
SB3_TRPO = 'TRPO("MlpPolicy", envs, n_steps=128, batch_size=512, gae_lambda=0.95, device="cpu")'
SB3_FLAGS = "--num-envs 4 --num-steps 128 --gae-lambda 0.95 --cg-iterations 15 --vf-epochs 10"


@dataclass
class Options:
    cleanrl: Path | None = None  # CleanRL's ppo.py; it is left out without
    rounds: int = 5  # runs of each program
    total_timesteps: int = 50_000  # steps of each run


def programs(options: Options) -> dict[str, list[str]]:
    """Command lines by name; every peer's stands right after ours, which it is compared with."""
    steps = options.total_timesteps
    ours = ["--total-timesteps", str(steps), "--eval-episodes", "1"]
    commands = {"ppo.py": [str(ROOT / "ppo.py"), *shlex.split(CLEANRL), *ours]}
    if options.cleanrl:
        flags = ["--no-cuda", "--total-timesteps", str(steps)]
        commands["CleanRL ppo.py"] = [str(options.cleanrl.resolve()), *flags]
    imports = "from stable_baselines3 import PPO"
    commands["Stable-Baselines3 PPO"] = [
        "-c",
        SB3.format(imports=imports, model=SB3_PPO, steps=steps),
    ]
    commands["trpo.py"] = [str(ROOT / "trpo.py"), *shlex.split(SB3_FLAGS), *ours]
    imports = "from sb3_contrib import TRPO"
    commands["sb3-contrib TRPO"] = ["-c", SB3.format(imports=imports, model=SB3_TRPO, steps=steps)]
    return commands


def run(command: list[str]) -> dict[str, float]:
    """Steps a second of training, seconds and CPU seconds of the whole process."""
    with tempfile.TemporaryDirectory() as folder:
        start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        result = subprocess.run(
            [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True
        )
        seconds = time.perf_counter() - start
        if result.returncode:
            raise SystemExit(f"{shlex.join(command)[:200]} failed:\n{result.stderr[-2000:]}")
        printed = re.findall(r"SPS: ([\d.]+)", result.stdout)
        if not printed:
            (metrics,) = Path(folder).glob("runs/*/metrics.csv")
            header, *_, last = metrics.read_text().splitlines()
            printed = [dict(zip(header.split(","), last.split(",")))["charts/SPS"]]
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"sps": float(printed[-1]), "seconds": seconds, "cpu": cpu}


def report(rounds: list[dict[str, dict[str, float]]], options: Options) -> str:
    lines = [
        f"CartPole-v1, {options.total_timesteps:,} steps, CleanRL's PPO and sb3-contrib's TRPO",
        f"hyperparameters, one thread; {len(rounds)} alternating rounds on {platform.machine()}.",
        "",
        "| program | steps/s | whole process, s | CPU, s | ours / this, steps/s |",
        "|---|---|---|---|---|",
    ]
    for name in rounds[0]:
        if name.endswith(".py") and "CleanRL" not in name:
            ours = name
        sps, seconds, cpu = (
            statistics.median(one[name][key] for one in rounds) for key in ("sps", "seconds", "cpu")
        )
        ratio = statistics.median(one[ours]["sps"] / one[name]["sps"] for one in rounds)
        lines.append(f"| {name} | {sps:,.0f} | {seconds:.1f} | {cpu:.1f} | {ratio:.2f} |")
    return "\n".join(lines) + "\n"


def main(options: Options) -> None:
    if options.cleanrl and not options.cleanrl.is_file():
        raise SystemExit(f"--cleanrl {options.cleanrl}: no such file")
    commands, rounds = programs(options), []
    for number in range(options.rounds):
        rounds.append({name: run(command) for name, command in commands.items()})
        print(f"round {number + 1}:", {name: round(r["sps"]) for name, r in rounds[-1].items()})
    (RESULTS / "speed.json").write_text(json.dumps(rounds, indent=1) + "\n")
    (RESULTS / "speed.md").write_text(report(rounds, options))
    print(report(rounds, options))


if __name__ == "__main__":
    main(tyro.cli(Options))
