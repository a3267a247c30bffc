"""torchrun: several processes with environments of their own train one agent."""

import subprocess
import sys
import time
from pathlib import Path

import torch

import ppo

HERE = Path(__file__).resolve().parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
DRIVER = """
import os, sys, torch, torch.distributed as dist
from environments import LADDER, arguments
rank = int(os.environ["RANK"])
for script in LADDER:
    seen, update = [], script.update
    def watched(agent, optimizers, batch, args):
        losses = update(agent, optimizers, batch, args)
        states = [agent.state_dict(), *(o.state_dict()["state"] for o in optimizers)]
        seen.append((str(batch.actions), int(batch.valid.sum()), states))
        return losses
    script.update = watched
    torch.set_printoptions(precision=17, threshold=10**9)
    small = {"num_envs": 2, "num_steps": 64, "total_timesteps": 1000, "eval_episodes": 2}
    small |= {"normalize_observations": True, "target_kl": 0.002}
    script.train(arguments(script, "CartPole-v1", **small))
    everyone = [None, None]
    dist.all_gather_object(everyone, [(*counts, str(states)) for *counts, states in seen])
    one, other = everyone
    assert len(one) == len(other) > 1
    assert all(a[2] == b[2] for a, b in zip(one, other)), "the same bits in every process"
    assert all(a[0] != b[0] for a, b in zip(one, other)), "but other actions"
    if rank == 0:
        (run_dir,) = [p for p in os.listdir("runs") if f"__{script.__name__}__" in p]
        *_, last = open(f"runs/{run_dir}/metrics.csv").read().splitlines()
        assert int(last.split(",")[0]) == sum(a[1] + b[1] for a, b in zip(one, other))
print("all well", rank)
"""


def test_processes_hold_the_same_bits_and_count_all_steps(tmp_path):
    code = f"import sys; sys.path[:0] = [{str(HERE)!r}, {str(HERE.parent)!r}]\n" + DRIVER
    (tmp_path / "driver.py").write_text(code)
    command = [*TORCHRUN, "driver.py"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("all well") == 2


def test_the_death_of_one_ends_all(tmp_path):
    flags = ["--total-timesteps", "10000000", "--num-envs", "2"]
    process = subprocess.Popen(
        [*TORCHRUN, ppo.__file__, *flags],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    while not list(tmp_path.glob("runs/*/metrics.csv")):
        time.sleep(0.2)
        assert process.poll() is None
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    subprocess.run(["kill", "-KILL", found.stdout.split()[-1]], check=True)
    process.communicate(timeout=60)
    assert process.returncode != 0
    (run_dir,) = tmp_path.glob("runs/*")
    ppo.load_checkpoint(str(run_dir))


def test_average_without_torchrun_changes_nothing():
    x = torch.arange(3.0)
    ppo.average(x)
    assert x.tolist() == [0, 1, 2]
