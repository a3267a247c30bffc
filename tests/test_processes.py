"""ppo_torchrun.py: processes with environments of their own train one agent."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from environments import metrics

import ppo

DRIVER = """
import math, sys, torch, torch.distributed as dist
sys.path.insert(0, sys.argv[1])
import ppo_torchrun as script
dist.init_process_group()
assert script.average(torch.tensor(float(dist.get_rank()))) == 0.5
torch.set_printoptions(precision=17, threshold=10**9)
seen, update, poison = [], script.update, False

def watched(agent, optimizers, batch, args):
    metrics = update(agent, optimizers, batch, args)
    state = str([agent.state_dict(), optimizers[0].state_dict()])
    kl = metrics["losses/approx_kl"]
    seen.append((str(batch.actions), len(batch.obs), (state, kl), optimizers[0].state_dict()))
    return metrics | ({"losses/entropy": math.nan} if poison else {})

script.update = watched
small = dict(num_envs=2, num_steps=32, eval_episodes=2, normalize_observations=True)
script.train(script.Args(**small, total_timesteps=500, target_kl=0.002))
both = [None, None]
dist.all_gather_object(both, seen)
assert all(one[2] == other[2] for one, other in zip(*both)), "the same bits in both"
assert all(one[0] != other[0] for one, other in zip(*both)), "but other actions"
assert seen[-1][3]["state"][0]["step"] < 24 * len(seen), "target_kl ended no epochs"
if dist.get_rank() == 0:
    print("steps", *[one[1] + other[1] for one, other in zip(*both)])
poison = dist.get_rank() == 1
try:
    script.train(script.Args(**small, total_timesteps=500, exp_name="poisoned"))
except FloatingPointError:
    print("stopped")
group = dist.group.WORLD
dist.destroy_process_group()
assert sys.getrefcount(group) == 2, "something else keeps the group, and its threads, at the exit"
del group  # its threads end here, and not while Python does
"""


@pytest.mark.slow
def test_processes_hold_the_same_bits_and_count_and_stop_together(tmp_path):
    (tmp_path / "driver.py").write_text(DRIVER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "driver.py", str(Path(ppo.__file__).parent)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("stopped") == 2
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("steps"))
    (run_dir,) = tmp_path.glob("runs/*__ppo_torchrun__*")
    *rows, last = metrics(run_dir)
    assert [row["global_step"] for row in rows] == [*np.cumsum([int(x) for x in line.split()[1:]])]
    assert last.keys() == {"global_step", "eval/episodic_return"}
    checkpoint = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    assert checkpoint["global_step"] == rows[-1]["global_step"] >= 500
    assert checkpoint["agent"]["obs_stats.count"] == rows[-1]["global_step"]
    assert not [*tmp_path.glob("runs/*__poisoned__*/metrics.jsonl")]
