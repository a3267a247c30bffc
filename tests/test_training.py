"""train as a user calls it: it repeats itself, learns, refuses what cannot work."""

import math
import re
import runpy
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from environments import CRITICS, LADDER, LEARNERS, REFUSED, arguments, metrics, only_run, start

import gae_kernel
import ppo
import reinforce

SMALL = {"num_envs": 2, "num_steps": 64, "total_timesteps": 300, "eval_episodes": 2}
SCALED = {"normalize_observations": True, "save_interval": 1}
each = pytest.mark.parametrize("script", LEARNERS)


def train_in(folder, monkeypatch, script, env_id="CartPole-v1", **wanted):
    """All that a run in a new folder computes: its score, its record and its parameters."""
    folder.mkdir()
    monkeypatch.chdir(folder)
    score = script.train(arguments(script, env_id, **SMALL | wanted))
    agent = torch.load(only_run() / "checkpoint.pt", weights_only=True)["agent"]
    return score, metrics(only_run()), {name: x.tolist() for name, x in agent.items()}


@each
def test_one_seed_decides_everything(script, tmp_path, monkeypatch):
    one = train_in(tmp_path / "one", monkeypatch, script, "Echo-v0", **SCALED)
    assert one == train_in(tmp_path / "other", monkeypatch, script, "Echo-v0", **SCALED)
    assert one != train_in(tmp_path / "seed", monkeypatch, script, "Echo-v0", **SCALED, seed=2)


def test_kernel_and_fallback_train_alike(tmp_path, monkeypatch):
    assert all(script.compute_gae is gae_kernel.compute_gae for script in CRITICS)
    kernel = train_in(tmp_path / "kernel", monkeypatch, ppo)
    monkeypatch.setattr(ppo, "compute_gae", ppo.compute_gae_python)
    assert kernel == train_in(tmp_path / "fallback", monkeypatch, ppo)


@pytest.mark.slow
def test_a_script_copied_alone_runs_there_as_here(tmp_path, monkeypatch, capfd):
    """Without the kernel, wandb and the repository, and as a program with flags."""
    small = SMALL | {"total_timesteps": 1500}
    code = "import os, runpy, sys; sys.modules |= dict.fromkeys(['gae_kernel', 'wandb'])\n"
    expected = {}
    for script in LADDER:
        alone = tmp_path / "alone" / script.__name__
        expected[alone] = train_in(tmp_path / script.__name__, monkeypatch, script, **small)
        alone.mkdir(parents=True)
        path = shutil.copy(script.__file__, alone)
        args = vars(arguments(script, "CartPole-v1", **small))
        flags = [f"--{name.replace('_', '-')}={args[name]}" for name in small if name in args]
        code += f"os.chdir({str(alone)!r}); sys.argv = {[path, *flags]}\n"
        code += f"runpy.run_path({path!r}, run_name='__main__')\n"
    capfd.readouterr()
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    printed = capfd.readouterr().out
    for folder, (score, rows, _) in expected.items():
        monkeypatch.chdir(folder)
        assert metrics(only_run()) == rows
        assert f"{only_run()}: mean return of 2 greedy episodes: {score:.1f}" in printed


def test_numpy_scalars_are_arguments_like_others(tmp_path, monkeypatch):
    plain = {"learning_rate": 1e-3, "seed": 3, "num_envs": 2, "anneal_lr": False}
    kinds = np.float64, np.int64, np.int32, np.bool_
    scalars = {name: kind(plain[name]) for name, kind in zip(plain, kinds)}
    one = train_in(tmp_path / "plain", monkeypatch, ppo, **plain)
    assert one == train_in(tmp_path / "scalars", monkeypatch, ppo, **scalars)


def test_features_that_hardly_vary_do_no_harm(tmp_path, monkeypatch):
    wanted = {"num_envs": 32, "num_steps": 8, "total_timesteps": 5120, "eval_episodes": 100}
    score, *_ = train_in(tmp_path / "run", monkeypatch, ppo, "Match-v0", **SCALED | wanted)
    assert score == 1


REFUSALS = [
    ("env_id", "SameStep-v0", "NEXT_STEP"),
    *[("env_id", f"{name}-v0", "needs actions 0 to n - 1 or a vector") for name in REFUSED],
    ("total_timesteps", 0, "at least 1"),
    ("num_envs", -3, "at least 1"),
    ("save_interval", 0, "at least 1"),
    ("gamma", 1.5, "from 0 to 1"),
    ("gamma", -0.1, "from 0 to 1"),
    ("gae_lambda", 1.01, "from 0 to 1"),
    ("gae_lambda", math.nan, "from 0 to 1"),
    ("learning_rate", -0.1, "at least 0"),
    ("max_grad_norm", math.nan, "at least 0"),
    ("device", "cuda", "finds no GPU"),
]


@pytest.mark.parametrize(
    "script, name, value, message",
    [
        (script, *case)
        for script in (reinforce, ppo)
        for case in REFUSALS
        if hasattr(script.Args, case[0])
    ],
)
def test_what_cannot_work_is_refused_by_name(script, name, value, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(script.ArgumentError, match=f"^({name} = {value}: )?.*{message}"):
        script.train(script.Args(**{name: value}))
    assert not [*tmp_path.glob("runs/*/metrics.jsonl")]


def test_limits_work_themselves_and_integers_as_floats():
    ppo.check_args(ppo.Args(gamma=0, gae_lambda=1.0, seed=0, ent_coef=0, learning_rate=0))
    ppo.check_args(ppo.Args(gamma=1, gae_lambda=0.0, num_envs=1))


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--env-id CartPoll-v1", "`CartPoll` doesn't exist. Did you mean: `CartPole`?"),
        ("--env-id nowhere:Task-v0", "No module named 'nowhere'"),
        ("--num-envs 0", "num_envs = 0: must be at least 1"),
        ("--resume nowhere.pt", "resume = nowhere.pt: not a checkpoint"),
    ],
)
def test_the_program_tells_a_wrong_argument_in_one_line(flags, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [ppo.__file__, *flags.split()])
    with pytest.raises(SystemExit, match=re.escape(message)):
        runpy.run_path(ppo.__file__, run_name="__main__")
    assert not [*tmp_path.glob("runs/*/metrics.jsonl")]


@each
def test_a_number_that_is_not_finite_stops_the_run(script, tmp_path, monkeypatch):
    """Neither the checkpoint nor the record gets it."""
    update, calls = script.update, []

    def poisoned(*args):
        calls.append(args)
        return update(*args) | ({"losses/entropy": math.inf} if len(calls) == 3 else {})

    monkeypatch.setattr(script, "update", poisoned)
    with pytest.raises(FloatingPointError, match=r"not finite: .*losses/entropy.*inf"):
        train_in(tmp_path / "run", monkeypatch, script, save_interval=1)
    steps = [row["global_step"] for row in metrics(only_run())]
    checkpoint = torch.load(only_run() / "checkpoint.pt", weights_only=True)
    assert len(steps) == 2 and checkpoint["global_step"] == steps[1]


@pytest.mark.parametrize("script", CRITICS)
def test_a_time_limit_is_not_death(script):
    """Reward 1 for ever is worth 1 / (1 - gamma) = 10, though an episode lasts 20 steps."""
    wanted = {"num_envs": 4, "num_steps": 42, "gamma": 0.9, "normalize_rewards": False}
    run = start(script, "Steady-v0", **wanted, learning_rate=1e-2, vf_learning_rate=1e-2)
    for _ in range(40):
        run.update(run.estimate(run.collect()))
    assert run.agent.value(torch.ones(1)).item() == pytest.approx(10, abs=0.3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "script, steps", [*zip(LADDER, [120_000, 30_000, 40_000, 20_000])], ids=str
)
def test_it_learns_cartpole(script, steps, tmp_path, monkeypatch):
    wanted = {"num_envs": 8, "num_steps": 128, "total_timesteps": steps, "eval_episodes": 20}
    score, rows, _ = train_in(tmp_path / "run", monkeypatch, script, **wanted)
    assert score >= 400
    assert rows[0]["charts/episodic_return"] < 50
