"""ppo_torchrun.py: processes with environments of their own train one agent."""

import copy
import runpy
import subprocess
import sys
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist
from environments import metrics, only_run, start

import ppo
import ppo_torchrun as script


def drive(rank, address):
    """What each of the two processes does, with an assertion that fails in either."""
    dist.init_process_group(None, address, timedelta(minutes=2), rank=rank, world_size=2)
    seen, both, update, poison = [], [None, None], script.update, False
    run = start(script, "CartPole-v1", update_epochs=1, num_minibatches=1, max_grad_norm=1e9)
    torch.manual_seed(rank)
    batch, alone = run.estimate(run.collect()), copy.deepcopy(run.agent)
    ppo.update(alone, ppo.make_optimizers(alone, run.args), batch, run.args)
    run.update(batch)
    dist.all_gather_object(both, [parameter.grad for parameter in alone.parameters()])
    for parameter, *gradients in zip(run.agent.parameters(), *both):
        torch.testing.assert_close(parameter.grad, sum(gradients) / 2)
    torch.set_printoptions(precision=17, threshold=10**9)

    def watched(agent, optimizers, batch, args):
        found = update(agent, optimizers, batch, args)
        adam = optimizers[0].state_dict()
        state = str([agent.state_dict(), adam, found["losses/approx_kl"]])
        seen.append((str(batch.actions), len(batch.obs), state, adam["state"][0]["step"].item()))
        return found | ({"losses/entropy": np.nan} if poison else {})

    script.update = watched
    small = dict(num_envs=2, num_steps=32, total_timesteps=500, eval_episodes=2)
    script.train(script.Args(**small, learning_rate=2.5e-3, clip_coef=0.2, target_kl=0.002))
    dist.all_gather_object(both, [*zip(*seen)])
    (actions, steps, states, _), (other_actions, other_steps, other_states, _) = both
    assert states == other_states, "the same bits in both"
    assert all(one != other for one, other in zip(actions, other_actions)), "but other actions"
    assert seen[-1][3] < 24 * len(seen), "target_kl ended no epochs"
    *rows, _ = metrics(only_run())
    assert [row["global_step"] for row in rows] == [*np.cumsum(np.add(steps, other_steps))]
    last = torch.load(only_run() / "checkpoint.pt", weights_only=True)
    assert 500 <= last["global_step"] == last["agent"]["obs_stats.count"] == rows[-1]["global_step"]
    dist.barrier()  # before the next run makes its folder, because only_run wants one
    poison = rank == 1
    with pytest.raises(FloatingPointError):
        script.train(script.Args(**small, exp_name="poisoned"))
    groups = [dist.group.WORLD]
    dist.destroy_process_group()
    assert sys.getrefcount(groups[0]) == 2, "something keeps the group, and its threads, at exit"


@pytest.mark.slow
def test_processes_hold_the_same_bits_and_count_and_stop_together(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.multiprocessing.spawn(drive, ((tmp_path / "group").as_uri(),), nprocs=2)
    assert not [*tmp_path.glob("runs/*__poisoned__*/metrics.jsonl")]


@pytest.mark.slow
def test_torchrun_starts_the_program(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [script.__file__, "--num-steps=32", "--total-timesteps=500"])
    with pytest.raises(SystemExit, match="start it with: torchrun --nproc-per-node 2"):
        runpy.run_path(script.__file__, run_name="__main__")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run([*torchrun, *sys.argv], check=True, timeout=300)
    assert metrics(only_run())[-1].keys() == {"global_step", "eval/episodic_return"}
