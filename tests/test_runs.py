"""train as a user calls it: what a run leaves, repeats, learns and resumes, what is refused."""

import copy
import json
import multiprocessing
import os
import runpy
import shutil
import signal
import subprocess
import sys
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from environments import LADDER, REFUSED, Endless, Scripted, arguments, metrics, only_run, start
from gymnasium.vector import SyncVectorEnv, VectorEnv

import ppo
import reinforce
import trpo
import vpg

SMALL = dict(num_envs=2, num_steps=64, total_timesteps=512, eval_episodes=9, save_interval=1)
assert_same = partial(torch.testing.assert_close, rtol=0, atol=0)  # bit for bit
each = pytest.mark.parametrize("script", [reinforce, vpg])  # the others' learn has vpg's text


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def record(folder):
    return metrics(folder), torch.load(folder / "checkpoint.pt", weights_only=True)


def train(script, env_id="CartPole-v1", **wanted):
    """A small run, which leaves one folder more than there were, and those as they were."""
    before = {path: path.read_bytes() for path in Path().glob("runs/*/*")}
    score = script.train(arguments(script, env_id, **SMALL | wanted))
    assert all(path.read_bytes() == content for path, content in before.items())
    (folder,) = {*Path("runs").iterdir()} - {path.parent for path in before}
    rows, checkpoint = record(folder)
    return SimpleNamespace(score=score, folder=folder, rows=rows, checkpoint=checkpoint)


def watch(monkeypatch, script, *names):
    """A list that grows by each call of these functions, with copies of its arguments but envs."""
    calls = []

    def watched(name, function, *args):
        kept = [x for x in args if not isinstance(x, VectorEnv)]
        call = SimpleNamespace(name=name, before=copy.deepcopy(kept), noise=torch.get_rng_state())
        call.result = function(*args)
        call.after = copy.deepcopy(kept)
        calls.append(call)
        return call.result

    for name in names:
        monkeypatch.setattr(script, name, partial(watched, name, getattr(script, name)))
    return calls


@each
def test_a_run_folder_holds_its_record_and_one_seed_decides_everything(script, monkeypatch):
    """Again the same with Python's numbers for NumPy's, and without the kernel."""
    assert all(script.compute_gae is not script.compute_gae_python for script in LADDER[1:])
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TORCH")}
    train_here = partial(train, script, "my/Echo-v0", exp_name="a:b", normalize_observations=True)
    scalars = {"learning_rate": np.float64(1e-3), "seed": np.int64(3), "num_envs": np.int32(2)}
    scalars["anneal_lr"] = np.bool_(False)
    plain = {name: scalar.item() for name, scalar in scalars.items()}
    run = train_here(**scalars)
    assert run.folder.name.startswith("my-Echo-v0__a-b__3__")
    assert sorted(os.listdir(run.folder)) == ["args.json", "checkpoint.pt", "metrics.jsonl"]
    args = arguments(script, "my/Echo-v0", **SMALL | train_here.keywords | plain)
    assert json.loads((run.folder / "args.json").read_text()) == vars(args)
    *rows, last = run.rows
    assert last == {"global_step": rows[-1]["global_step"], "eval/episodic_return": run.score}
    assert {"charts/episodic_return", "losses/entropy"} <= rows[0].keys()
    assert rows[-1]["global_step"] >= 512 > rows[-2]["global_step"]
    assert train_here(**plain | {"seed": 2}).rows != run.rows
    # reinforce.py has no GAE.
    monkeypatch.setattr(script, "compute_gae", ppo.compute_gae_python, raising=False)
    assert_same(record(train_here(**plain).folder), record(run.folder))
    assert os.listdir() == ["runs"]
    assert environment.items() <= dict(os.environ).items()


@each
@pytest.mark.parametrize("anneal_lr", [True, False])
def test_steps_returns_learning_rates_and_checkpoints(script, anneal_lr, monkeypatch):
    """Steady pays 1 a step, 20 steps an episode. The step after them only resets."""
    updates, saves = (watch(monkeypatch, script, name) for name in ("update", "save"))
    wanted = {"num_steps": 21, "total_timesteps": 200, "anneal_lr": anneal_lr, "save_interval": 2}
    run = train(script, "Steady-v0", **wanted)
    assert run.score == 20
    first = [optimizer.defaults["lr"] for optimizer in start(script, "Steady-v0").optimizers]
    fractions = [1, 0.8, 0.6, 0.4, 0.2] if anneal_lr else [1] * 5
    rates = [[optimizer.param_groups[0]["lr"] for optimizer in x.before[1]] for x in updates]
    np.testing.assert_allclose(rates, np.outer(fractions, first))
    assert [row["global_step"] for row in run.rows[:-1]] == [40, 80, 120, 160, 200]
    assert [call.before[3] for call in saves] == [80, 160, 200]
    assert [row["charts/episodic_return"] for row in run.rows[:-1]] == [20] * 5


@pytest.mark.parametrize("script", [reinforce, ppo])
@pytest.mark.parametrize("env_id", ["Scripted-v0", "Reusing-v0"])
def test_rollouts_are_the_episodes_of_each_environment(script, env_id, monkeypatch):
    """Only reset steps are not valid. In reinforce.py nothing is, after the first episode.

    Each rollout goes on where the one before ended. What environments write again was copied.
    """
    calls = watch(monkeypatch, script, "collect_rollout")
    train(script, env_id, num_envs=3, num_steps=7, seed=5, total_timesteps=200)
    rollouts = [call.result for call in calls]
    assert len(rollouts) > 8
    if script is ppo:
        whole = ppo.Rollout(*map(np.concatenate, zip(*(rollout for rollout, *_ in rollouts))))
        # The first step of each rollout but the first
        valid, times = whole.valid[7::7], whole.obs[7::7, :, 2]
        assert not valid.all(), "no reset at a rollout's start"
        assert times[valid].any(), "no episode in two rollouts"
        np.testing.assert_array_equal(whole.obs[0], [[5, 0, 0], [6, 0, 0], [7, 0, 0]])
        rollouts = [whole]
    kinds = set()
    for rollout, number in product(rollouts, range(3)):
        env, steps, ended, episode_return = Scripted(), [], False, 0.0
        env.seed, env.episode = rollout.obs[0, number, :2].astype(int) - [0, 1]
        obs, _ = env.reset()
        for action in rollout.actions[:, number]:
            if not ended:
                next_obs, reward, *ends, _ = env.step(action)
                episode_return += reward
                steps.append((True, obs, action, reward, *ends, episode_return))
                obs, ended = next_obs, any(ends)
                kinds.add(tuple(ends))
            elif script is ppo:
                steps.append((False, obs, action, 0, False, False, 0))
                obs, _ = env.reset()
                ended, episode_return = False, 0.0
        for column, expected in zip(rollout, zip(*steps)):
            np.testing.assert_array_equal(column[: len(steps), number], expected)
        assert ended or script is ppo
        assert not rollout.valid[len(steps) :, number].any()
        assert not rollout.rewards[len(steps) :, number].any()
    assert kinds == {(True, False), (False, True), (True, True), (False, False)}
    assert all(rollout.valid[-1].any() for rollout in rollouts), "steps after all have ended"


@each
def test_statistics_change_between_updates_only_and_resuming_goes_on(script, monkeypatch):
    """All that acts or learns sees those of all data before, also in a run that is resumed."""
    calls = watch(monkeypatch, script, "collect_rollout", "update", "evaluate")
    old = train(script, normalize_observations=True)
    count, saved, step = len(calls), old.checkpoint, old.checkpoint["global_step"]
    wanted = {"total_timesteps": 1024, "resume": f"{old.folder}/checkpoint.pt"}
    new = train(script, normalize_observations=True, **wanted)
    names = [call.name for call in calls]
    assert names[:count] == ["collect_rollout", "update"] * (count // 2) + ["evaluate"]
    assert count > 5
    seen = np.zeros((0, 4))
    for call in calls:
        for stats in (call.before[0].obs_stats, call.after[0].obs_stats):
            assert stats.count == len(seen)
            if len(seen):
                np.testing.assert_allclose(stats.mean, seen.mean(0), rtol=1e-6)
                np.testing.assert_allclose(stats.var, seen.var(0), rtol=1e-6)
        if call.name == "update":
            seen = np.concatenate([seen, call.before[2].obs.double().numpy()])
    assert new.checkpoint["agent"]["obs_stats.count"] == len(seen)
    # What was saved, as the resumed run's first update sees it
    first_rollout, first_update = calls[:2]
    resumed_rollout, resumed_update = calls[count : count + 2]
    assert_same(resumed_rollout.before[0].state_dict(), saved["agent"])
    _, optimizers, batch, _ = resumed_update.before
    fresh = start(script, "CartPole-v1").optimizers
    for optimizer, expected, other in zip(optimizers, saved["optimizers"], fresh, strict=True):
        state, (group,) = optimizer.state_dict()["state"], optimizer.param_groups
        assert_same(state, expected["state"])
        assert len(state) == len(group["params"])
        assert group["lr"] == (1 - step / 1024) * other.defaults["lr"]
    assert new.rows[0]["global_step"] == step + len(batch.obs)
    assert new.rows[-1]["global_step"] == new.checkpoint["global_step"] >= 1024
    assert not torch.equal(batch.obs[:2], first_update.before[2].obs[:2]), "the same episodes again"
    assert not torch.equal(resumed_rollout.noise, first_rollout.noise), "the same actions again"


def test_only_checkpoints_of_the_same_networks_are_resumed():
    """trpo.py has one optimizer, vpg.py two: Adam's moments of other weights would be misread."""
    path = f"{train(trpo).folder}/checkpoint.pt"
    for changes in [{"env_id": "Echo-v0"}, {"normalize_observations": False}]:
        with pytest.raises(ValueError, match=f"resume = {path}: other networks or another norm"):
            train(trpo, resume=path, **changes)
    with pytest.raises(ValueError, match=r"zip\(\) argument 2 is shorter"):
        train(vpg, resume=path)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("env_id", ["CartPole-v1", "Echo-v0", "Discrete-v0"])
def test_a_trained_policy_acts_elsewhere(env_id, normalize, monkeypatch):
    """Three lines, without environments, on observations of one environment or of many."""
    evaluations = watch(monkeypatch, ppo, "evaluate")
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


def test_evaluation_is_greedy_and_ends_each_episode_once_within_the_steps_of_training(capsys):
    """Else it says so. It leaves the agent as it is, and has other episodes for each seed."""

    def evaluate(env_id, **wanted):
        run = start(ppo, env_id, **wanted)
        run.agent.actor[-1].weight.data.zero_()
        run.agent.actor[-1].bias.data[:] = torch.tensor([0.05, -0.05])  # action 0 is more likely
        before = copy.deepcopy(run.agent.state_dict())
        score = ppo.evaluate(run.agent, run.args)
        assert_same(run.agent.state_dict(), before)
        return score

    # Five steps pay -0.09 each for action 0, and else less.
    reset = SyncVectorEnv.reset
    with patch.object(SyncVectorEnv, "reset", autospec=True, side_effect=reset) as resets:
        scores = [evaluate("Discrete-v0", seed=seed, eval_episodes=64) for seed in (1, 2)]
    assert scores == pytest.approx([-0.45, -0.45])
    first, second = [call.kwargs["seed"] for call in resets.mock_calls][1::2]  # not start's
    assert second == first + 64, "no episode of another seed"
    # Episodes of 1 to 4 steps with reward 1. All that comes after pays 1000.
    assert evaluate("Once-v0", eval_episodes=4, total_timesteps=10_000) == 2.5
    assert evaluate("Once-v0", eval_episodes=4, total_timesteps=10) == 2.5
    assert capsys.readouterr().out == ""
    before = Endless.steps
    assert evaluate("Endless-v0", eval_episodes=3, total_timesteps=50) == 17
    assert Endless.steps - before == 51
    told = "Evaluation stopped after 51 steps: 3 episodes had not ended\n"
    assert capsys.readouterr().out == told


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("at", ["before update", "amid save", "before replace", "after replace"])
def test_a_run_killed_at_the_worst_instant_resumes(at, monkeypatch):
    """Before or after the third call of a function, or with half of what it should write."""
    when, name = at.split()
    owner = {"update": ppo, "save": torch, "replace": Path}[name]
    call, calls = getattr(owner, name), []

    def deadly(*args):
        calls.append(args)
        if len(calls) != 3:
            return call(*args)
        if when != "before":
            call(*args)
        if when == "amid":
            os.truncate(args[1], os.path.getsize(args[1]) // 2)
        signal.raise_signal(signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, deadly)
        process = multiprocessing.get_context("fork").Process(target=train, args=(ppo,))
        process.start()
        process.join()
    assert process.exitcode == -signal.SIGKILL
    rows, checkpoint = record(only_run())
    assert checkpoint["global_step"] in [row["global_step"] for row in rows[-2:]]
    new = train(ppo, resume=f"{only_run()}/checkpoint.pt")
    assert new.checkpoint["global_step"] >= 512
    assert new.rows[0]["global_step"] > checkpoint["global_step"]


@pytest.mark.slow
@pytest.mark.parametrize("script", LADDER[1:])  # those with a critic
def test_a_time_limit_is_not_death(script):
    """Reward 1 for ever is worth 1 / (1 - gamma) = 10, though an episode lasts 20 steps."""
    wanted = {"num_envs": 4, "num_steps": 42, "gamma": 0.9, "normalize_rewards": False}
    run = start(script, "Steady-v0", **wanted, learning_rate=1e-2, vf_learning_rate=1e-2)
    for _ in range(40):
        run.update(run.estimate(run.collect()))
    assert run.agent.value(torch.ones(1)).item() == pytest.approx(10, abs=0.3)


REFUSALS = {
    "{}: autoreset mode is not NEXT_STEP": ["env_id = SameStep-v0"],
    "{}: needs actions 0 to n - 1 or a vector": [f"env_id = {name}-v0" for name in REFUSED],
    "{}: must be at least 1": ["total_timesteps = 0", "num_envs = -3", "save_interval = 0"],
    "{}: must be at least 0": ["seed = -1", "gamma = -0.1", "gae_lambda = nan"],
    "{}: must be at most 1": ["gamma = 1.5", "gae_lambda = 1.01"],
    "No such file or directory: 'nowhere.pt'": ["resume = nowhere.pt"],
    "`CartPoll` doesn't exist. Did you mean: `CartPole`?": ["env_id = CartPoll-v1"],
    "No module named 'nowhere'": ["env_id = nowhere:Task-v0"],
}
REFUSALS["{}: must be at least 0"] += ["learning_rate = -0.1", "max_grad_norm = nan"]


@pytest.mark.parametrize("script", LADDER)
@pytest.mark.parametrize("message, wrong", REFUSALS.items())
def test_the_program_tells_by_name_what_cannot_work(script, message, wrong, monkeypatch):
    """The limits themselves work, and integers as floats."""
    args = partial(arguments, script, "CartPole-v1")
    script.check_args(args(gamma=0, gae_lambda=1.0, seed=0, ent_coef=0, learning_rate=0))
    script.check_args(args(gamma=1, gae_lambda=0.0, num_envs=1))
    with pytest.raises(ValueError, match=r"^num_envs = 0: must be at least 1$"):
        script.train(args(num_envs=0))
    for argument in wrong:
        name, _, value = argument.split()
        if hasattr(script.Args, name):
            monkeypatch.setattr(sys, "argv", [script.__file__, f"--{name}={value}"])
            # Of Gymnasium and Python are the messages without the argument.
            with pytest.raises(ValueError if "{}" in message else Exception) as error:
                runpy.run_path(script.__file__, run_name="__main__")
            assert message.format(argument) in str(error.value)
    assert not [*Path().glob("runs/*/metrics.jsonl")]


@each
def test_a_number_that_is_not_finite_stops_the_run(script, monkeypatch):
    """Neither the checkpoint nor the record gets it."""
    update, poison = script.update, [{}, {}, {"losses/entropy": np.inf}]
    monkeypatch.setattr(script, "update", lambda *args: update(*args) | poison.pop(0))
    with pytest.raises(FloatingPointError, match=r"not finite: .*losses/entropy.*inf"):
        train(script)
    (_, row), checkpoint = record(only_run())
    assert checkpoint["global_step"] == row["global_step"]


@pytest.mark.slow
def test_each_script_copied_alone_runs_there_as_here(tmp_path, monkeypatch):
    """Without the kernel, wandb and the repository, and as a program with flags."""
    small, programs = SMALL | {"total_timesteps": 1500}, []
    for script in LADDER:
        flags = [f"--{name}={value}" for name, value in small.items() if hasattr(script.Args, name)]
        alone = tmp_path / script.__name__
        for module in ("gae_kernel", "wandb"):
            (alone / module).mkdir(parents=True)
            (alone / module / "__init__.py").write_text("raise ImportError")
        command = [sys.executable, shutil.copy(script.__file__, alone), *flags]
        programs.append(subprocess.Popen(command, cwd=alone, stdout=subprocess.PIPE, text=True))
    for here, program, script in zip([train(x, **small) for x in LADDER], programs, LADDER):
        printed, _ = program.communicate()
        monkeypatch.chdir(tmp_path / script.__name__)
        assert metrics(only_run()) == here.rows
        assert f"{only_run()}: mean return of 9 greedy episodes: {here.score:.1f}" in printed


@pytest.mark.slow
@pytest.mark.parametrize("script, steps", [*zip(LADDER, [120_000, 30_000, 40_000, 20_000])])
def test_it_learns_cartpole(script, steps):
    assert script.train(script.Args(total_timesteps=steps, eval_episodes=20)) >= 400
