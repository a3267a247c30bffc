"""torchrun: several processes with environments of their own train one agent."""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

import ppo

HERE = Path(__file__).resolve().parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
DRIVER = """
import math, os, sys, torch, torch.distributed as dist
from dataclasses import replace
from pathlib import Path
from environments import LADDER, arguments
rank, resumed = int(os.environ["RANK"]), sys.argv[1]
small = {"num_envs": 2, "num_steps": 64, "total_timesteps": 1000, "eval_episodes": 2}
small |= {"normalize_observations": True, "target_kl": 0.002, "checkpoint_interval": 2}

def rows(run_dir):
    return [int(row.split(",")[0]) for row in (run_dir / "metrics.csv").read_text().split()[1:]]

for script in LADDER:
    seen, update, poison = [], script.update, None
    def watched(agent, optimizers, batch, args):
        if poison == "rewards" and len(seen) == 3:
            batch.rewards[0, 0] = math.nan
        losses = update(agent, optimizers, batch, args)
        if poison == "losses" and len(seen) == 3:
            losses["policy_loss"] = math.inf
        states = [agent.state_dict(), *(o.state_dict() for o in optimizers)]
        seen.append((str(batch.actions), int(batch.valid.sum()), states))
        return losses
    script.update = watched
    torch.set_printoptions(precision=17, threshold=10**9)
    args = arguments(script, "CartPole-v1", **small)
    script.train(args)
    everyone = [None, None]
    dist.all_gather_object(everyone, [(*counts, str(states)) for *counts, states in seen])
    one, other = everyone
    assert len(one) == len(other) > 1
    assert all(a[2] == b[2] for a, b in zip(one, other)), "the same bits in every process"
    assert all(a[0] != b[0] for a, b in zip(one, other)), "but other actions"
    if script.__name__ == "ppo":
        assert seen[-1][2][1]["steps"] < 24 * len(seen), "target_kl, in all at once"
    if rank == 0:
        (run_dir,) = Path("runs").glob(f"*__{script.__name__}__*")
        assert rows(run_dir)[-1] == sum(a[1] + b[1] for a, b in zip(one, other))
    for kind in ("rewards", "losses")[: 1 + (script.__name__ == "ppo")]:
        seen, poison = [], kind if rank else None
        try:
            script.train(replace(args, exp_name=f"{script.__name__}-{kind}"))
            raise AssertionError("it went on")
        except FloatingPointError as error:
            assert "policy_loss" in str(error)
        if rank == 0:
            (run_dir,) = Path("runs").glob(f"*__{script.__name__}-{kind}__*")
            checkpoint = script.load_checkpoint(str(run_dir))
            assert checkpoint["global_step"] == rows(run_dir)[1] and len(rows(run_dir)) == 3
            assert all(x.isfinite().all() for x in checkpoint["learners"].values())
    poison = None
script.train(replace(args, resume=resumed, total_timesteps=2000))
print("all well", rank)
dist.destroy_process_group()  # as the scripts do; without it gloo may abort at the exit
"""


def test_processes_hold_the_same_bits_and_count_and_stop_together(tmp_path, monkeypatch):
    """It goes on with a run of one process, too, and one process with what it leaves."""
    monkeypatch.chdir(tmp_path)
    small = {"num_envs": 2, "num_steps": 64, "eval_episodes": 2, "normalize_observations": True}
    ppo.train(ppo.Args(**small, total_timesteps=600, exp_name="alone"))
    (run_dir,) = Path("runs").iterdir()
    code = f"import sys; sys.path[:0] = [{str(HERE)!r}, {str(HERE.parent)!r}]\n" + DRIVER
    Path("driver.py").write_text(code)
    command = [*TORCHRUN, "driver.py", run_dir]
    result = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("all well") == 2
    ppo.train(ppo.Args(**small, total_timesteps=2500, resume=str(run_dir)))
    with open(run_dir / "metrics.csv") as file:
        steps = [int(row["global_step"]) for row in csv.DictReader(file)]
    assert steps[0] <= 128 < steps[8] - steps[7] <= 256 and steps[-1] - steps[-2] <= 128
    assert steps[-1] >= 2500 and ppo.load_checkpoint(str(run_dir))["global_step"] == steps[-1]


def test_ctrl_c_ends_all_with_a_checkpoint_and_the_death_of_one_ends_all(tmp_path):
    """torchrun hands a signal on to its processes, each of which is a group of its own."""

    def start(*flags):
        command = [*TORCHRUN, ppo.__file__, *flags, "--total-timesteps", "10000000"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        process = subprocess.Popen(command, cwd=tmp_path, start_new_session=True, **pipes)
        size = sum(path.stat().st_size for path in tmp_path.glob("runs/*/metrics.csv"))
        while sum(path.stat().st_size for path in tmp_path.glob("runs/*/metrics.csv")) <= size:
            time.sleep(0.2)
            assert process.poll() is None
        return process

    process = start("--num-envs", "2")
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    (run_dir,) = tmp_path.glob("runs/*")
    assert output.count(f"ppo.py --resume {run_dir.relative_to(tmp_path)}") == 1, output
    *_, row = (run_dir / "metrics.csv").read_text().splitlines()
    assert ppo.load_checkpoint(str(run_dir))["global_step"] == int(row.split(",")[0])

    process = start("--resume", str(run_dir))
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    os.kill(int(found.stdout.split()[-1]), signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode != 0
    ppo.load_checkpoint(str(run_dir))


def test_average_without_torchrun_changes_nothing():
    x = torch.arange(3.0)
    ppo.average(x)
    assert x.tolist() == [0, 1, 2]
