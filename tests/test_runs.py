"""What a run leaves: its record, its checkpoint, its score, and nothing else."""

import copy
import json
import os
import signal
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from environments import LEARNERS, Steady, arguments, metrics, only_run, start
from tqdm import tqdm

import ppo
import trpo
import vpg

SMALL = {"num_envs": 2, "num_steps": 64, "total_timesteps": 512, "eval_episodes": 2}
SMALL |= {"normalize_observations": True, "save_interval": 2}
each = pytest.mark.parametrize("script", LEARNERS)


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def spy(monkeypatch, script, name, before):
    """Calls before(*args) before each call of a script's function."""
    function = getattr(script, name)

    def spied(*args, **kwargs):
        before(*args)
        return function(*args, **kwargs)

    monkeypatch.setattr(script, name, spied)


def load(path):
    return torch.load(path, weights_only=True)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_same(actual, expected):
    """Equal nested dicts of tensors, bit for bit."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@each
def test_a_run_folder_holds_its_record(script):
    args = arguments(script, "my/Scripted-v0", **SMALL, exp_name="a:b")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TORCH")}
    score = script.train(args)
    run_dir = only_run()
    assert run_dir.name.startswith("my-Scripted-v0__a-b__1__")
    assert sorted(contents(run_dir)) == ["args.json", "checkpoint.pt", "metrics.jsonl"]
    assert json.loads((run_dir / "args.json").read_text()) == vars(args)
    *rows, last = metrics(run_dir)
    assert last == {"global_step": rows[-1]["global_step"], "eval/episodic_return": score}
    assert {"charts/episodic_return", "losses/entropy"} <= rows[0].keys()
    assert rows[-1]["global_step"] >= 512 > rows[-2]["global_step"]
    script.train(args)
    assert len([*Path("runs").iterdir()]) == 2, "the same command again overwrites nothing"
    assert [path.name for path in Path().iterdir()] == ["runs"]
    assert environment.items() <= dict(os.environ).items()


@each
@pytest.mark.parametrize("anneal_lr", [True, False])
def test_steps_returns_learning_rates_and_checkpoints(script, anneal_lr, monkeypatch):
    """Steady pays 1 a step, 20 steps an episode. The step after them only resets."""
    rates, saved = [], []

    def before_update(_, optimizers, *__):
        rates.append([optimizer.param_groups[0]["lr"] for optimizer in optimizers])

    spy(monkeypatch, script, "update", before_update)
    spy(monkeypatch, script, "save", lambda *args: saved.append(args[3]))
    wanted = {"num_envs": 2, "num_steps": 21, "total_timesteps": 200, "eval_episodes": 3}
    wanted["save_interval"] = 2
    assert script.train(arguments(script, "Steady-v0", **wanted, anneal_lr=anneal_lr)) == 20
    first = [optimizer.defaults["lr"] for optimizer in start(script, "Steady-v0").optimizers]
    expected = np.outer([1, 0.8, 0.6, 0.4, 0.2] if anneal_lr else np.ones(5), first)
    np.testing.assert_allclose(rates, expected)
    *rows, _ = metrics(only_run())
    assert [row["global_step"] for row in rows] == [40, 80, 120, 160, 200]
    assert saved == [80, 160, 200]
    assert [row["charts/episodic_return"] for row in rows] == [20] * 5


def test_each_rollout_goes_on_where_the_one_before_it_ended(monkeypatch):
    states, rollouts, collect = [], [], ppo.collect_rollout

    def watched(agent, envs, *state):
        states.append(state[:3])
        rollouts.append(collect(agent, envs, *state))
        return rollouts[-1]

    monkeypatch.setattr(ppo, "collect_rollout", watched)
    ppo.train(arguments(ppo, "Scripted-v0", **SMALL))
    for before, (obs, done, episode_return) in zip(rollouts, states[1:]):
        np.testing.assert_array_equal(obs, before.next_obs[-1])
        np.testing.assert_array_equal(done, before.terminations[-1] | before.truncations[-1])
        np.testing.assert_array_equal(episode_return, before.episode_returns[-1])
    assert any(done.any() for _, done, _ in states) and len(states) > 3


@each
def test_statistics_change_between_updates_only(script, monkeypatch):
    """What acts, learns and is evaluated sees the statistics of all training data before."""
    seen, phases, act, update = [], [], script.Agent.act, script.update

    def check(phase, agent):
        phases.append(phase)
        if seen:
            rows = np.concatenate(seen)
            np.testing.assert_allclose(agent.obs_stats.mean, rows.mean(0), rtol=1e-6)
            np.testing.assert_allclose(agent.obs_stats.var, rows.var(0), rtol=1e-6)
        assert agent.obs_stats.count == sum(map(len, seen))

    def checked_act(agent, obs, greedy=False):
        check("evaluate" if greedy else "act", agent)
        return act(agent, obs, greedy)

    def checked_update(agent, optimizers, batch, args):
        losses = update(agent, optimizers, batch, args)
        check("update", agent)
        seen.append(batch.obs.double().numpy())
        return losses

    monkeypatch.setattr(script.Agent, "act", checked_act)
    monkeypatch.setattr(script, "update", checked_update)
    script.train(arguments(script, "CartPole-v1", **SMALL))
    assert phases.count("update") > 2 and set(phases) == {"act", "update", "evaluate"}
    assert load(only_run() / "checkpoint.pt")["agent"]["obs_stats.count"] == sum(map(len, seen))


@each
def test_resuming_goes_on_from_what_was_saved(script, monkeypatch):
    """Parameters, statistics, the optimizers' state, the step: as the next update sees them."""
    batches, agents, states, noise = [], [], [], []

    def before_update(agent, optimizers, batch, args):
        batches.append(batch.obs)
        states.append(copy.deepcopy([optimizer.state_dict() for optimizer in optimizers]))

    def before_rollout(agent, *_):
        agents.append(copy.deepcopy(agent.state_dict()))
        noise.append(torch.get_rng_state())

    spy(monkeypatch, script, "update", before_update)
    spy(monkeypatch, script, "collect_rollout", before_rollout)
    args = arguments(script, "CartPole-v1", **SMALL)
    script.train(args)
    old, count = only_run(), len(batches)
    saved, files = load(old / "checkpoint.pt"), contents(old)
    script.train(replace(args, resume=str(old / "checkpoint.pt"), total_timesteps=1024))
    (new,) = {*Path("runs").iterdir()} - {old}
    step, rows = saved["global_step"], metrics(new)

    assert_same(agents[count], saved["agent"])
    optimizers = start(script, "CartPole-v1").optimizers
    for state, expected, fresh in zip(states[count], saved["optimizers"], optimizers, strict=True):
        assert_same(state["state"], expected["state"])
        assert len(state["state"]) == len(state["param_groups"][0]["params"])
        assert state["param_groups"][0]["lr"] == (1 - step / 1024) * fresh.defaults["lr"]
    assert rows[0]["global_step"] == step + len(batches[count])
    assert rows[-1]["global_step"] == load(new / "checkpoint.pt")["global_step"] >= 1024
    assert not torch.equal(batches[count][:2], batches[0][:2]), "the same episodes again"
    assert not torch.equal(noise[count], noise[0]), "the same actions again"
    assert contents(old) == files


def test_only_checkpoints_of_the_same_networks_are_resumed():
    """trpo.py has one optimizer, vpg.py two: Adam's moments of other weights would be misread."""
    trpo.train(arguments(trpo, "CartPole-v1", **SMALL))
    Path("text.pt").write_text("no checkpoint")
    torch.save({"other": 1}, "other.pt")
    path = only_run() / "checkpoint.pt"
    wrong = [(trpo, "Echo-v0", path, {}), (vpg, "CartPole-v1", path, {})]
    wrong += [(trpo, "CartPole-v1", name, {}) for name in ("text.pt", "other.pt", "nowhere.pt")]
    wrong += [(trpo, "CartPole-v1", path, {"normalize_observations": False})]
    for script, env_id, resume, changes in wrong:
        args = arguments(script, env_id, **SMALL | changes, resume=str(resume))
        with pytest.raises(script.ArgumentError, match=f"resume = {resume}: not a checkpoint"):
            script.train(args)


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Echo-v0"])
def test_a_trained_policy_acts_elsewhere(env_id, monkeypatch):
    """Three lines, without environments, on observations of one environment or of many."""
    trained = []
    spy(monkeypatch, ppo, "evaluate", lambda agent, _: trained.append(agent))
    ppo.train(arguments(ppo, env_id, **SMALL))
    checkpoint = torch.load(only_run() / "checkpoint.pt", weights_only=True)
    agent = ppo.Agent(*checkpoint["agent_config"])
    agent.load_state_dict(checkpoint["agent"])
    obs = np.random.default_rng(0).standard_normal((50, checkpoint["agent_config"][0]))
    many = agent.act(obs, greedy=True)
    np.testing.assert_array_equal(many, trained[0].act(obs, greedy=True))
    np.testing.assert_allclose(agent.act(obs[7], greedy=True), many[7], rtol=1e-5, atol=1e-7)
    assert agent.act(obs[0]).shape == many[0].shape


def test_observations_are_normalized_if_asked_for(monkeypatch):
    agents = []
    spy(monkeypatch, ppo, "evaluate", lambda agent, _: agents.append(agent))
    for wanted in (True, False):
        ppo.train(arguments(ppo, "Discrete-v0", **SMALL | {"normalize_observations": wanted}))
    assert [agent.normalize for agent in agents] == [True, False]


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
    before = Steady.steps
    assert evaluate("Endless-v0", eval_episodes=3, total_timesteps=50) == 17
    assert Steady.steps - before == 51
    told = "Evaluation stopped after 51 steps: 3 episodes had not ended\n"
    assert capsys.readouterr().out == told


def test_evaluation_is_greedy():
    """The right action is a little more likely than the other. Only a greedy policy gets all."""

    def prefer_the_right_one(agent):
        agent.actor = torch.nn.Linear(3, 2)
        agent.actor.weight.data[:] = torch.tensor([[-0.1, 0, 0], [0.1, 0, 0]])
        agent.actor.bias.data[:] = torch.tensor([0.05, -0.05])

    assert evaluate("Match-v0", prefer_the_right_one, eval_episodes=64) == 1


def test_evaluation_repeats_itself_and_depends_on_the_seed():
    scores = [evaluate("CartPole-v1", seed=seed, eval_episodes=5) for seed in (1, 1, 2)]
    assert scores[0] == scores[1] != scores[2]


def killed(work):
    """Does work in a fork of this warm process, which dies by SIGKILL."""
    import torch._dynamo  # noqa: F401, or an optimizer would import it, for seconds, in each fork

    if (child := os.fork()) == 0:
        os.dup2(os.open("log.txt", os.O_WRONLY | os.O_CREAT), 1)
        os.dup2(1, 2)
        tqdm.set_lock(threading.RLock())  # else it would die with the lock that its parent needs
        try:
            work()
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(
    "owner, name, nth, when",
    [
        (ppo, "update", 3, "before"),
        (torch, "save", 1, "half"),
        (Path, "replace", 1, "before"),
        (Path, "replace", 1, "after"),
    ],
)
def test_a_run_killed_at_the_worst_instant_resumes(owner, name, nth, when, monkeypatch):
    """Before or after the nth call of a function, or with half of what it should write."""
    args, call, calls = arguments(ppo, "CartPole-v1", **SMALL), getattr(owner, name), []

    def deadly(*args, **kwargs):
        calls.append(args)
        if len(calls) != nth + 1:
            return call(*args, **kwargs)
        if when != "before":
            call(*args, **kwargs)
        if when == "half":
            os.truncate(args[1], os.path.getsize(args[1]) // 2)
        os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, deadly)
        killed(lambda: ppo.train(args))
    old = only_run()
    files, step = contents(old), load(old / "checkpoint.pt")["global_step"]
    steps = [json.loads(line)["global_step"] for line in files["metrics.jsonl"].splitlines()]
    assert step in steps[-3:]
    ppo.train(replace(args, resume=str(old / "checkpoint.pt")))
    (new,) = {*Path("runs").iterdir()} - {old}
    assert load(new / "checkpoint.pt")["global_step"] >= args.total_timesteps
    assert metrics(new)[0]["global_step"] > step
    assert contents(old) == files
