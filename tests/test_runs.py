"""train as a user calls it: what a run leaves, repeats, learns and resumes, what is refused."""

import copy
import functools
import itertools
import json
import math
import multiprocessing
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch._dynamo  # or an optimizer would import it, for seconds, in each fork
from environments import (
    CRITICS,
    LADDER,
    REFUSED,
    Endless,
    Scripted,
    arguments,
    metrics,
    only_run,
    start,
)
from tqdm import tqdm

import gae_kernel
import ppo
import reinforce
import trpo
import vpg

SMALL = {"num_envs": 2, "num_steps": 64, "total_timesteps": 512, "eval_episodes": 2}
SMALL["save_interval"] = 2
assert_same = functools.partial(torch.testing.assert_close, rtol=0, atol=0)  # bit for bit
each = pytest.mark.parametrize("script", [reinforce, vpg])  # the others' learn has vpg's text


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def load(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def train(script, env_id="CartPole-v1", **wanted):
    """A small run, which leaves one folder more than there were."""
    before = {*Path("runs").glob("*")}
    score = script.train(arguments(script, env_id, **SMALL | wanted))
    (folder,) = {*Path("runs").iterdir()} - before
    run = SimpleNamespace(score=score, folder=folder)
    run.rows, run.checkpoint = metrics(folder), load(folder)
    return run


def resume(folder, script=ppo, **wanted):
    """A run that goes on from another, and leaves that folder as it was."""
    files = contents(folder)
    run = train(script, resume=str(folder / "checkpoint.pt"), **wanted)
    assert contents(folder) == files
    return run


def assert_same_run(one, other):
    assert one.rows == other.rows
    assert_same(one.checkpoint, other.checkpoint)


def watch(monkeypatch, *functions):
    """A list that grows by each call of functions (owner, name), with copies of its arguments."""
    calls = []
    for owner, name in functions:
        function = getattr(owner, name)

        def watched(*args, name=name, function=function, **kwargs):
            call = SimpleNamespace(name=name, before=copy.deepcopy(args))
            call.noise = torch.get_rng_state()
            call.result = function(*args, **kwargs)
            call.after = copy.deepcopy(args)
            calls.append(call)
            return call.result

        monkeypatch.setattr(owner, name, watched)
    return calls


@each
def test_a_run_folder_holds_its_record_and_one_seed_decides_everything(script):
    """The same command again computes the same, and overwrites nothing."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TORCH")}
    wanted = {"exp_name": "a:b", "normalize_observations": True}
    run = train(script, "my/Echo-v0", **wanted)
    assert run.folder.name.startswith("my-Echo-v0__a-b__1__")
    assert sorted(contents(run.folder)) == ["args.json", "checkpoint.pt", "metrics.jsonl"]
    args = arguments(script, "my/Echo-v0", **SMALL | wanted)
    assert json.loads((run.folder / "args.json").read_text()) == vars(args)
    *rows, last = run.rows
    assert last == {"global_step": rows[-1]["global_step"], "eval/episodic_return": run.score}
    assert {"charts/episodic_return", "losses/entropy"} <= rows[0].keys()
    assert rows[-1]["global_step"] >= 512 > rows[-2]["global_step"]
    assert_same_run(train(script, "my/Echo-v0", **wanted), run)
    assert train(script, "my/Echo-v0", **wanted, seed=2).rows != run.rows
    assert [path.name for path in Path().iterdir()] == ["runs"]
    assert environment.items() <= dict(os.environ).items()


@each
@pytest.mark.parametrize("anneal_lr", [True, False])
def test_steps_returns_learning_rates_and_checkpoints(script, anneal_lr, monkeypatch):
    """Steady pays 1 a step, 20 steps an episode. The step after them only resets."""
    updates = watch(monkeypatch, (script, "update"))
    saves = watch(monkeypatch, (script, "save"))
    wanted = {"num_steps": 21, "total_timesteps": 200, "eval_episodes": 3}
    run = train(script, "Steady-v0", **wanted, anneal_lr=anneal_lr)
    assert run.score == 20
    first = [optimizer.defaults["lr"] for optimizer in start(script, "Steady-v0").optimizers]
    expected = np.outer([1, 0.8, 0.6, 0.4, 0.2] if anneal_lr else np.ones(5), first)
    optimizers = [call.before[1] for call in updates]
    rates = [[optimizer.param_groups[0]["lr"] for optimizer in group] for group in optimizers]
    np.testing.assert_allclose(rates, expected)
    assert [row["global_step"] for row in run.rows[:-1]] == [40, 80, 120, 160, 200]
    assert [call.before[3] for call in saves] == [80, 160, 200]
    assert [row["charts/episodic_return"] for row in run.rows[:-1]] == [20] * 5


@pytest.mark.parametrize("script", [reinforce, ppo])
@pytest.mark.parametrize("env_id", ["Scripted-v0", "Reusing-v0"])
def test_rollouts_are_the_episodes_of_each_environment(script, env_id, monkeypatch):
    """Only reset steps are not valid. In reinforce.py nothing is, after the first episode.

    Each rollout goes on where the one before ended. What environments write again was copied.
    """
    calls = watch(monkeypatch, (script, "collect_rollout"))
    train(script, env_id, num_envs=3, num_steps=7, seed=5, total_timesteps=200)
    rollouts = [call.result if script is reinforce else call.result[0] for call in calls]
    assert len(rollouts) > 8
    if script is ppo:
        times = [rollout.obs[0, rollout.valid[0], 2] for rollout in rollouts[1:]]
        assert any(len(time) < 3 for time in times), "no reset at a rollout's start"
        assert any(time.any() for time in times), "no episode in two rollouts"
        rollouts = [ppo.Rollout(*map(np.concatenate, zip(*rollouts)))]
        np.testing.assert_array_equal(rollouts[0].obs[0], [[5, 0, 0], [6, 0, 0], [7, 0, 0]])
    kinds = set()
    for rollout, number in itertools.product(rollouts, range(3)):
        env = Scripted()
        env.seed, env.episode = rollout.obs[0, number, :2].astype(int) - [0, 1]
        obs, _ = env.reset()
        ended, episode_return = False, 0.0
        for t, action in enumerate(rollout.actions[:, number]):
            assert rollout.valid[t, number] != ended
            if not ended:
                next_obs, reward, *ends, _ = env.step(action)
                episode_return += reward
                step = (True, obs, action, reward, *ends, episode_return)
                if script is reinforce:
                    step = (True, obs, action, reward)
                for column, expected in zip(rollout, step, strict=True):
                    np.testing.assert_array_equal(column[t, number], expected)
                obs, ended = next_obs, any(ends)
                kinds.add(tuple(ends))
            elif script is ppo:
                np.testing.assert_array_equal(rollout.obs[t, number], obs)
                obs, _ = env.reset()
                ended, episode_return = False, 0.0
            else:
                assert rollout.rewards[t, number] == 0
        assert ended or script is ppo
    assert kinds == {(True, False), (False, True), (True, True), (False, False)}
    assert all(rollout.valid[-1].any() for rollout in rollouts), "steps after all have ended"


@each
def test_statistics_change_between_updates_only(script, monkeypatch):
    """What acts, learns and is evaluated sees the statistics of all training data before."""
    functions = (script.Agent, "act"), (script, "update"), (script, "evaluate")
    calls = watch(monkeypatch, *functions)
    run = train(script, normalize_observations=True)
    seen = np.zeros((0, 4))
    for call in calls:
        for agent in (call.before[0], call.after[0]):
            assert agent.obs_stats.count == len(seen)
            if len(seen):
                np.testing.assert_allclose(agent.obs_stats.mean, seen.mean(0), rtol=1e-6)
                np.testing.assert_allclose(agent.obs_stats.var, seen.var(0), rtol=1e-6)
        if call.name == "update":
            seen = np.concatenate([seen, call.before[2].obs.double().numpy()])
    names = [call.name for call in calls]
    assert names.count("update") > 2
    assert {*names} == {"act", "update", "evaluate"}
    assert run.checkpoint["agent"]["obs_stats.count"] == len(seen)


@each
def test_resuming_goes_on_from_what_was_saved(script, monkeypatch):
    """Parameters, statistics, the optimizers' state, the step: as the next update sees them."""
    rollouts = watch(monkeypatch, (script, "collect_rollout"))
    updates = watch(monkeypatch, (script, "update"))
    old = train(script, normalize_observations=True)
    count, saved, step = len(updates), old.checkpoint, old.checkpoint["global_step"]
    new = resume(old.folder, script, normalize_observations=True, total_timesteps=1024)
    assert_same(rollouts[count].before[0].state_dict(), saved["agent"])
    _, optimizers, batch, _ = updates[count].before
    fresh = start(script, "CartPole-v1").optimizers
    for optimizer, expected, other in zip(optimizers, saved["optimizers"], fresh, strict=True):
        state, (group,) = optimizer.state_dict()["state"], optimizer.param_groups
        assert_same(state, expected["state"])
        assert len(state) == len(group["params"])
        assert group["lr"] == (1 - step / 1024) * other.defaults["lr"]
    assert new.rows[0]["global_step"] == step + len(batch.obs)
    assert new.rows[-1]["global_step"] == new.checkpoint["global_step"] >= 1024
    first = updates[0].before[2]
    assert not torch.equal(batch.obs[:2], first.obs[:2]), "the same episodes again"
    assert not torch.equal(rollouts[count].noise, rollouts[0].noise), "the same actions again"


def test_only_checkpoints_of_the_same_networks_are_resumed():
    """trpo.py has one optimizer, vpg.py two: Adam's moments of other weights would be misread."""
    path = train(trpo).folder / "checkpoint.pt"
    Path("text.pt").write_text("no checkpoint")
    torch.save({"other": 1}, "other.pt")
    wrong = [(vpg, path, {}), (trpo, path, {"env_id": "Echo-v0"})]
    wrong += [(trpo, path, {"normalize_observations": False})]
    wrong += [(trpo, name, {}) for name in ("text.pt", "other.pt", "nowhere.pt")]
    for script, resume, changes in wrong:
        with pytest.raises(script.ArgumentError, match=f"resume = {resume}: not a checkpoint"):
            train(script, resume=str(resume), **changes)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("env_id", ["CartPole-v1", "Echo-v0", "Discrete-v0"])
def test_a_trained_policy_acts_elsewhere(env_id, normalize, monkeypatch):
    """Three lines, without environments, on observations of one environment or of many."""
    evaluations = watch(monkeypatch, (ppo, "evaluate"))
    checkpoint = train(ppo, env_id, normalize_observations=normalize).checkpoint
    agent = ppo.Agent(*checkpoint["agent_config"])
    agent.load_state_dict(checkpoint["agent"])
    obs = np.random.default_rng(0).standard_normal((50, checkpoint["agent_config"][0]))
    many = agent.act(obs, greedy=True)
    trained = evaluations[0].before[0]
    np.testing.assert_array_equal(many, trained.act(obs, greedy=True))
    np.testing.assert_allclose(agent.act(obs[7], greedy=True), many[7], rtol=1e-5, atol=1e-7)
    assert agent.act(obs[0]).shape == many[0].shape
    assert agent.normalize == trained.normalize == normalize


def evaluate(env_id, prepare=id, **wanted):
    run = start(ppo, env_id, **wanted)
    prepare(run.agent)
    before = copy.deepcopy(run.agent.state_dict())
    score = ppo.evaluate(run.agent, run.args)
    assert_same(run.agent.state_dict(), before)
    return score


@pytest.mark.parametrize("total_timesteps", [10, 10_000])
def test_evaluation_ends_each_episode_once(total_timesteps, capsys):
    """Episodes of 1 to 4 steps with reward 1. All that comes after pays 1000."""
    assert evaluate("Once-v0", eval_episodes=4, total_timesteps=total_timesteps) == 2.5
    assert "stopped" not in capsys.readouterr().out


def test_evaluation_takes_no_more_steps_than_training_and_says_so(capsys):
    before = Endless.steps
    assert evaluate("Endless-v0", eval_episodes=3, total_timesteps=50) == 17
    assert Endless.steps - before == 51
    told = "Evaluation stopped after 51 steps: 3 episodes had not ended\n"
    assert capsys.readouterr().out == told


def test_evaluation_is_greedy():
    """Five steps pay -0.09 each for action 0, which is a little more likely, and else less."""

    def prefer_action_0(agent):
        agent.actor[-1].weight.data.zero_()
        agent.actor[-1].bias.data[:] = torch.tensor([0.05, -0.05])

    score = evaluate("Discrete-v0", prefer_action_0, eval_episodes=64)
    assert score == pytest.approx(-0.45)


def test_evaluation_repeats_itself_and_depends_on_the_seed():
    scores = [evaluate("CartPole-v1", seed=seed, eval_episodes=5) for seed in (1, 1, 2)]
    assert scores[0] == scores[1] != scores[2]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(
    "owner, name, nth, when",
    [
        (ppo, "update", 4, "before"),
        (torch, "save", 2, "half"),
        (Path, "replace", 2, "before"),
        (Path, "replace", 2, "after"),
    ],
)
def test_a_run_killed_at_the_worst_instant_resumes(owner, name, nth, when, monkeypatch):
    """Before or after the nth call of a function, or with half of what it should write."""
    call, calls = getattr(owner, name), []

    def deadly(*args, **kwargs):
        calls.append(args)
        if len(calls) != nth:
            return call(*args, **kwargs)
        if when != "before":
            call(*args, **kwargs)
        if when == "half":
            os.truncate(args[1], os.path.getsize(args[1]) // 2)
        os.kill(os.getpid(), signal.SIGKILL)

    tqdm.set_lock(threading.RLock())  # else the process would die with a lock that this one needs
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, deadly)
        process = multiprocessing.get_context("fork").Process(target=train, args=(ppo,))
        process.start()
        process.join()
    assert process.exitcode == -signal.SIGKILL
    old = only_run()
    step = load(old)["global_step"]
    assert step in [row["global_step"] for row in metrics(old)][-3:]
    new = resume(old)
    assert new.checkpoint["global_step"] >= 512
    assert new.rows[0]["global_step"] > step


def test_kernel_and_fallback_train_alike(monkeypatch):
    assert all(script.compute_gae is gae_kernel.compute_gae for script in CRITICS)
    kernel = train(ppo)
    monkeypatch.setattr(ppo, "compute_gae", ppo.compute_gae_python)
    assert_same_run(train(ppo), kernel)


def test_numpy_scalars_are_arguments_like_others():
    scalars = {"learning_rate": np.float64(1e-3), "seed": np.int64(3), "num_envs": np.int32(2)}
    scalars["anneal_lr"] = np.bool_(False)
    plain = {name: scalar.item() for name, scalar in scalars.items()}
    assert_same_run(train(ppo, **scalars), train(ppo, **plain))


def test_features_that_hardly_vary_do_no_harm():
    wanted = {"num_envs": 32, "num_steps": 8, "total_timesteps": 5120, "eval_episodes": 100}
    assert train(ppo, "Match-v0", normalize_observations=True, **wanted).score == 1


@pytest.mark.parametrize("script", CRITICS)
def test_a_time_limit_is_not_death(script):
    """Reward 1 for ever is worth 1 / (1 - gamma) = 10, though an episode lasts 20 steps."""
    wanted = {"num_envs": 4, "num_steps": 42, "gamma": 0.9, "normalize_rewards": False}
    run = start(script, "Steady-v0", **wanted, learning_rate=1e-2, vf_learning_rate=1e-2)
    for _ in range(40):
        run.update(run.estimate(run.collect()))
    assert run.agent.value(torch.ones(1)).item() == pytest.approx(10, abs=0.3)


REFUSALS = [
    ("env_id", "SameStep-v0", "NEXT_STEP"),
    *[("env_id", f"{name}-v0", "needs actions 0 to n - 1 or a vector") for name in REFUSED],
    ("total_timesteps", 0, "at least 1"),
    ("num_envs", -3, "at least 1"),
    ("save_interval", 0, "at least 1"),
    ("seed", -1, "at least 0"),
    ("gamma", 1.5, "at most 1"),
    ("gamma", -0.1, "at least 0"),
    ("gae_lambda", 1.01, "at most 1"),
    ("gae_lambda", math.nan, "at least 0"),
    ("learning_rate", -0.1, "at least 0"),
    ("max_grad_norm", math.nan, "at least 0"),
    ("device", "cuda", "finds no GPU"),
]
CASES = [(s, *case) for s in LADDER for case in REFUSALS if hasattr(s.Args, case[0])]


@pytest.mark.parametrize("script, name, value, message", CASES)
def test_what_cannot_work_is_refused_by_name(script, name, value, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(script.ArgumentError, match=f"^({name} = {value}: )?.*{message}"):
        script.train(script.Args(**{name: value}))
    assert not [*Path().glob("runs/*/metrics.jsonl")]


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
def test_the_program_tells_a_wrong_argument_in_one_line(flags, message, monkeypatch):
    monkeypatch.setattr(sys, "argv", [ppo.__file__, *flags.split()])
    with pytest.raises(SystemExit, match=re.escape(message)):
        runpy.run_path(ppo.__file__, run_name="__main__")
    assert not [*Path().glob("runs/*/metrics.jsonl")]


@each
def test_a_number_that_is_not_finite_stops_the_run(script, monkeypatch):
    """Neither the checkpoint nor the record gets it."""
    update = script.update
    poison = [{}, {}, {"losses/entropy": math.inf}]
    monkeypatch.setattr(script, "update", lambda *args: update(*args) | poison.pop(0))
    with pytest.raises(FloatingPointError, match=r"not finite: .*losses/entropy.*inf"):
        train(script, save_interval=1)
    steps = [row["global_step"] for row in metrics(only_run())]
    assert len(steps) == 2
    assert load(only_run())["global_step"] == steps[1]


@pytest.mark.slow
def test_a_script_copied_alone_runs_there_as_here(tmp_path, monkeypatch, capfd):
    """Without the kernel, wandb and the repository, and as a program with flags."""
    small = SMALL | {"total_timesteps": 1500}
    code = "import os, runpy, sys; sys.modules |= dict.fromkeys(['gae_kernel', 'wandb'])\n"
    here = {}
    for script in LADDER:
        alone = tmp_path / script.__name__
        alone.mkdir()
        here[alone] = train(script, **small)
        path = shutil.copy(script.__file__, alone)
        known = {name: value for name, value in small.items() if hasattr(script.Args, name)}
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in known.items()]
        code += f"os.chdir({str(alone)!r}); sys.argv = {[path, *flags]}\n"
        code += f"runpy.run_path({path!r}, run_name='__main__')\n"
    capfd.readouterr()
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    printed = capfd.readouterr().out
    for alone, run in here.items():
        monkeypatch.chdir(alone)
        assert metrics(only_run()) == run.rows
        assert f"{only_run()}: mean return of 2 greedy episodes: {run.score:.1f}" in printed


@pytest.mark.slow
@pytest.mark.parametrize(
    "script, steps", [*zip(LADDER, [120_000, 30_000, 40_000, 20_000])], ids=str
)
def test_it_learns_cartpole(script, steps):
    assert script.train(script.Args(total_timesteps=steps, eval_episodes=20)) >= 400
