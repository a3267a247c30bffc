"""train as a user calls it: it learns, it repeats itself, it refuses what cannot work."""

from pathlib import Path

import pytest
import torch
from environments import CRITICS, LADDER, REFUSED, arguments, metrics

import ppo

SMALL = {"num_envs": 2, "num_steps": 64, "total_timesteps": 1024, "eval_episodes": 2}
STEPS = {"reinforce": 90_000, "vpg": 30_000, "trpo": 40_000, "ppo": 20_000}

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="cuda works here")
each = pytest.mark.parametrize("script", LADDER)


@each
def test_it_learns_cartpole(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    total_timesteps = STEPS[script.__name__]
    args = arguments(script, "CartPole-v1", total_timesteps=total_timesteps, eval_episodes=20)
    assert script.train(args) >= 400
    returns = [row["charts/episodic_return"] for row in metrics(tmp_path)]
    assert returns[0] < 50


def run(script, folder, monkeypatch, **wanted):
    folder.mkdir()
    monkeypatch.chdir(folder)
    score = script.train(arguments(script, **{"env_id": "CartPole-v1"} | SMALL | wanted))
    return score, str(metrics(folder))  # as text: a NaN equals a NaN


@each
@pytest.mark.parametrize("env_id", ["CartPole-v1", "Echo-v0"])
def test_one_seed_decides_everything(script, env_id, tmp_path, monkeypatch):
    wanted = {"env_id": env_id, "normalize_observations": True, "normalize_rewards": True}
    one = run(script, tmp_path / "one", monkeypatch, **wanted)
    assert one == run(script, tmp_path / "other", monkeypatch, **wanted)
    assert one != run(script, tmp_path / "seed", monkeypatch, **wanted, seed=2)


def test_environments_in_processes_of_their_own_change_nothing(tmp_path, monkeypatch):
    def of(env_id, mode):
        wanted = {"env_id": env_id, "vectorization_mode": mode}
        return run(ppo, tmp_path / f"{env_id}-{mode}", monkeypatch, **wanted)

    assert of("Acrobot-v1", "async") == of("Acrobot-v1", "sync")
    cartpole = of("CartPole-v1", "async")
    assert cartpole == of("CartPole-v1", "sync")
    assert cartpole != of("CartPole-v1", None), "which is vectorized in NumPy, of other numbers"


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
def test_compiled_and_eager_train_alike(env_id, tmp_path, monkeypatch):
    """One update, of 24 minibatches: after it rounding makes them drift apart."""
    rows = []
    for wanted in ({"compile": True}, {}):
        wanted |= {"env_id": env_id, "total_timesteps": 128}
        run(ppo, tmp_path / str(len(rows)), monkeypatch, **wanted)
        rows += metrics(Path.cwd())[:1]
    assert rows[0].keys() == rows[1].keys() and rows[0]["losses/grad_norm"] > 0
    assert rows[0] == pytest.approx(rows[1], rel=1e-3, abs=1e-4, nan_ok=True)


@each
def test_kernel_and_reference_train_alike(script, tmp_path, monkeypatch):
    assert script.compute_gae is not script.compute_gae_python
    kernel = run(script, tmp_path / "kernel", monkeypatch)
    monkeypatch.setattr(script, "compute_gae", script.compute_gae_python)
    assert kernel == run(script, tmp_path / "reference", monkeypatch)


@each
@pytest.mark.parametrize(
    "name, value",
    [
        ("env_id", "NoSuchTask-v0"),
        ("total_timesteps", 0),
        ("num_envs", 0),
        ("num_envs", -3),
        pytest.param("device", "cuda", marks=no_gpu),
        pytest.param("device", "cuda:1", marks=no_gpu),
        ("device", "gpu"),
        ("device", ""),
        ("gamma", 1.5),
        ("gamma", -0.1),
        ("gamma", float("nan")),
        ("max_grad_norm", -1.0),
        ("checkpoint_interval", 0),
        ("vectorization_mode", "fast"),
        ("resume", "nowhere"),
        ("eval_episodes", 0),
        ("seed", -1),
    ]
    + [("env_id", f"{name}-v0") for name in [*REFUSED, "SameStep"]],
)
def test_what_cannot_work_is_refused_by_name(script, name, value, tmp_path, monkeypatch):
    refused(script, name, value, tmp_path, monkeypatch)


def refused(script, name, value, tmp_path, monkeypatch, **wanted):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as error:
        script.train(arguments(script, **{"env_id": "CartPole-v1"} | wanted | {name: value}))
    assert f"--{name.replace('_', '-')} {value}" in str(error.value)
    assert not any(tmp_path.iterdir()), "refused, but only after a run began"


@pytest.mark.parametrize("script", CRITICS)
@pytest.mark.parametrize(
    "name, value",
    [("gae_lambda", 1.01), ("gae_lambda", float("nan")), ("num_steps", 0), ("num_steps", -8)],
)
def test_so_are_arguments_of_the_critic(script, name, value, tmp_path, monkeypatch):
    refused(script, name, value, tmp_path, monkeypatch)


@pytest.mark.parametrize("script", CRITICS)
def test_so_is_less_than_a_rollout(script, tmp_path, monkeypatch):
    refused(script, "total_timesteps", 1023, tmp_path, monkeypatch, num_envs=8, num_steps=128)


@pytest.mark.parametrize(
    "name, value",
    [
        ("num_minibatches", 3),
        ("num_minibatches", 2048),
        ("num_minibatches", 0),
        ("clip_coef", -0.1),
        ("learning_rate", float("nan")),
        ("learning_rate", -1e-3),
        ("target_kl", float("nan")),
    ],
)
def test_so_are_arguments_of_ppo(name, value, tmp_path, monkeypatch):
    refused(LADDER[-1], name, value, tmp_path, monkeypatch)


@each
def test_a_refused_space_is_named(script):
    for env_id, named in {
        "MultiDiscrete": "MultiDiscrete",
        "DictActions": "Dict",
        "FromOne": "start=1",
        "Sequence": "Sequence",
        "SameStep": "SAME_STEP",
    }.items():
        with pytest.raises(ValueError, match=named):
            script.make_envs(script.Args(f"{env_id}-v0"), 2)
