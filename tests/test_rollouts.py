"""Episode boundaries: what a rollout holds, what is left out, and what stays frozen within it."""

import math

import gymnasium as gym
import numpy as np
import pytest
import torch
from environments import CRITICS, LADDER, OBSERVATIONS, Scripted, arguments, metrics, start

import ppo
import reinforce

NUM_ENVS, NUM_STEPS, SEED = 3, 7, 5
SCRIPTED = {"num_envs": NUM_ENVS, "num_steps": NUM_STEPS, "seed": SEED, "gamma": 0.9}

each = pytest.mark.parametrize("script", LADDER)
critics = pytest.mark.parametrize("script", CRITICS)


def rolled(script, env_id, count, **wanted):
    """An agent and its first rollouts."""
    args = arguments(script, env_id, **wanted)
    agent, _, batches = start(script, args)
    return agent, args, [batch for _, batch in zip(range(count), batches, strict=False)]


def replay(batches, num_envs, seed, whole=False):
    """Steps every environment by itself, with the actions that the batches recorded.

    Yields (batch, environment, first row, steps, (return, length) or None) for what one batch
    holds of each episode; a step is (observation, reward, successor, terminated, truncated).
    Environments of a vector have seeds one apart. whole: each batch starts with a reset.
    """
    for number in range(num_envs):
        env, ended, steps, total, length = Scripted(), True, [], 0.0, 0
        for index, batch in enumerate(batches):
            if whole or not index:
                observation, _ = env.reset(seed=None if index else seed + number)
                ended, first, total, length = False, 0, 0.0, 0
            for t, actions in enumerate(batch.actions):
                if ended:
                    if whole:
                        break
                    observation, _ = env.reset()
                    ended, first, total, length = False, t + 1, 0.0, 0
                    continue
                successor, reward, *ends, _ = env.step(actions[number])
                steps.append((observation, reward, successor, *ends))
                observation, total, length = successor, total + reward, length + 1
                if ended := any(ends):
                    yield index, number, first, steps, (total, length)
                    steps = []
            if steps:  # cut by the end of the rollout
                yield index, number, first, steps, None
                steps = []
            first = 0


def compared(batches, expected):
    """Asserts that the batches hold the expected steps and no others."""
    masks = [np.zeros_like(batch.valid) for batch in batches]
    ended = [[] for _ in batches]
    kinds = set()
    for index, env, first, steps, episode in expected:
        batch, column = batches[index], (slice(first, first + len(steps)), env)
        masks[index][column] = True
        observations, rewards, successors, terminations, truncations = zip(*steps, strict=True)
        np.testing.assert_array_equal(batch.observations[:-1][column], observations)
        np.testing.assert_array_equal(batch.observations[1:][column], successors)
        np.testing.assert_array_equal(batch.rewards[column], rewards)
        np.testing.assert_array_equal(batch.terminations[column], terminations)
        np.testing.assert_array_equal(batch.truncations[column], truncations)
        kinds.add((terminations[-1], truncations[-1]))
        if episode:
            ended[index].append(episode)
    for batch, mask, episodes in zip(batches, masks, ended, strict=True):
        np.testing.assert_array_equal(batch.valid, mask)
        assert sorted(batch.episodes) == sorted(episodes)
    return kinds


@critics
def test_rollouts_are_the_episodes_of_each_environment(script):
    """valid, successors, rewards, flags, returns and lengths, across the borders of rollouts."""
    _, _, batches = rolled(script, "Scripted-v0", 12, **SCRIPTED)
    kinds = compared(batches, replay(batches, NUM_ENVS, SEED))
    assert kinds == {(True, False), (False, True), (True, True), (False, False)}
    assert any(not batch.valid[0].all() for batch in batches[1:]), "no reset at a border"
    assert all(batch.valid.dtype == bool for batch in batches)


def test_reinforce_collects_one_whole_episode_of_each_environment():
    _, _, batches = rolled(reinforce, "Scripted-v0", 12, **SCRIPTED)
    for batch in batches:
        ends = (batch.terminations | batch.truncations) & batch.valid
        np.testing.assert_array_equal(ends.sum(axis=0), 1)
        np.testing.assert_array_equal(batch.valid.sum(axis=0), ends.argmax(axis=0) + 1)
        assert len(batch.episodes) == NUM_ENVS and ends.any(axis=1)[-1]
    first = batches[:1]  # the environments go on after their episode; a reset then skips some
    compared(first, replay(first, NUM_ENVS, SEED, whole=True))


@critics
@pytest.mark.parametrize("gae_lambda", [0.0, 0.7, 1.0])
def test_estimates_are_those_of_one_episode_at_a_time(script, gae_lambda):
    agent, args, batches = rolled(
        script, "Scripted-v0", 12, **SCRIPTED | {"gae_lambda": gae_lambda}
    )

    def value(observation):
        with torch.no_grad():
            return agent.value(torch.tensor(observation)[None]).item()

    shape = NUM_STEPS, NUM_ENVS
    advantages, returns = ([np.full(shape, np.nan) for _ in batches] for _ in range(2))
    for index, env, first, steps, _ in replay(batches, NUM_ENVS, SEED):
        deltas = [
            reward + args.gamma * (not terminated) * value(successor) - value(observation)
            for observation, reward, successor, terminated, _ in steps
        ]
        for t, (observation, *_) in enumerate(steps):
            weights = (args.gamma * gae_lambda) ** np.arange(len(deltas) - t)
            advantages[index][first + t, env] = weights @ deltas[t:]
            returns[index][first + t, env] = weights @ deltas[t:] + value(observation)
    for batch, *columns in zip(batches, advantages, returns, strict=True):
        observations, actions, *estimates = script.estimate(agent, batch, args)
        np.testing.assert_array_equal(observations, batch.observations[:-1][batch.valid])
        np.testing.assert_array_equal(actions, batch.actions[batch.valid])
        for estimate, wanted in zip(estimates, columns, strict=True):
            np.testing.assert_allclose(estimate, wanted[batch.valid], rtol=1e-4, atol=1e-4)


@each
def test_rows_that_only_reset_leak_nothing(script):
    """Junk in the rewards and actions of those rows changes no bit of an update."""
    wanted = SCRIPTED | {"num_minibatches": 1}
    agents = []
    for junk in (False, True):
        agent, args, (batch,) = rolled(script, "Scripted-v0", 1, **wanted)
        assert not batch.valid.all()
        if junk:
            batch.rewards[~batch.valid] = 1e9
            batch.actions[~batch.valid] = 1
        torch.manual_seed(0)
        losses = script.update(agent, script.make_optimizers(agent, args), batch, args)
        agents.append((agent.state_dict(), losses))
    (one, one_losses), (other, other_losses) = agents
    assert one_losses == other_losses
    assert all(torch.equal(one[name], other[name]) for name in one)


@each
@pytest.mark.parametrize("normalize_rewards", [False, True])
def test_metrics_count_valid_steps_and_raw_returns(
    script, normalize_rewards, tmp_path, monkeypatch
):
    """TimeLimit pays 1 a step, 20 steps an episode; the row after them only resets."""
    monkeypatch.chdir(tmp_path)
    wanted = {"num_envs": 2, "num_steps": 21, "total_timesteps": 200, "num_minibatches": 1}
    wanted |= {"normalize_rewards": normalize_rewards, "eval_episodes": 3}
    assert script.train(arguments(script, "TimeLimit-v0", **wanted)) == 20
    rows = metrics(tmp_path)
    assert [row["global_step"] for row in rows] == [40, 80, 120, 160, 200]
    assert all(row["charts/episodic_return"] == 20 for row in rows)
    assert all(row["charts/episodic_length"] == 20 for row in rows)


@each
@pytest.mark.parametrize("name", OBSERVATIONS)
def test_observations_are_flattened(script, name):
    args = script.Args(f"{name}-v0")
    envs, reference = script.make_envs(args, 2), gym.make_vec(f"{name}-v0", 2)
    space = reference.single_observation_space
    flat, _ = envs.reset(seed=3)
    observations, _ = reference.reset(seed=3)
    expected = [
        gym.spaces.flatten(space, observation)
        for observation in gym.vector.utils.iterate(reference.observation_space, observations)
    ]
    np.testing.assert_array_equal(flat, expected)
    assert script.Agent(envs, args).act(flat).shape == (2,)


@each
@pytest.mark.parametrize("name", OBSERVATIONS)
def test_they_can_be_learned_from(script, name):
    agent, args, (batch,) = rolled(script, f"{name}-v0", 1, num_envs=2, num_steps=8)
    assert batch.observations.dtype == np.float32 and batch.observations.ndim == 3
    losses = script.update(agent, script.make_optimizers(agent, args), batch, args)
    assert np.isfinite(list(losses.values())).all()


@each
def test_continuous_actions_are_stored_as_sampled_and_clipped_for_the_environment(script):
    _, _, (batch,) = rolled(script, "Echo-v0", 1, num_envs=4, num_steps=5)
    actions = batch.actions[:5]  # Echo shows what it received; five steps are an episode
    assert actions.shape[2:] == (6,)
    assert (actions < -0.5).any() and (actions > 0.25).any()
    received = batch.observations[1:6].reshape(actions.shape)
    np.testing.assert_array_equal(received, actions.clip(-0.5, 0.25))


@each
@pytest.mark.parametrize("env_id", ["Scripted-v0", "Echo-v0"])
def test_statistics_change_between_rollouts_only(script, env_id, tmp_path, monkeypatch):
    """What acted is what the update sees, so its first ratio is 1; evaluation changes nothing."""
    monkeypatch.chdir(tmp_path)
    log_probs, statistics, evaluations = [], [], []
    real_act, real_update, real_evaluate = script.Agent.act, script.update, script.evaluate

    def act(agent, observations, greedy=False):
        actions = real_act(agent, observations, greedy)
        with torch.no_grad():
            policy = agent.policy(agent.normalize(observations))
            log_probs.append(policy.log_prob(torch.as_tensor(actions)))
        return actions

    def update(agent, optimizers, batch, args):
        with torch.no_grad():
            policy = agent.policy(agent.normalize(np.concatenate(batch.observations[:-1])))
            late = policy.log_prob(torch.as_tensor(batch.actions).flatten(0, 1))
        torch.testing.assert_close(late, torch.cat(log_probs), rtol=1e-4, atol=1e-4)
        log_probs.clear()
        before = agent.statistics.clone()
        losses = real_update(agent, optimizers, batch, args)
        assert torch.equal(agent.statistics, before)
        statistics.append(before)
        return losses

    def evaluate(agent, args, greedy):
        before = str(agent.state_dict())
        score = real_evaluate(agent, args, greedy)
        evaluations.append(str(agent.state_dict()) == before)
        return score

    monkeypatch.setattr(script.Agent, "act", act)
    monkeypatch.setattr(script, "update", update)
    monkeypatch.setattr(script, "evaluate", evaluate)
    wanted = {"num_envs": 4, "num_steps": 16, "total_timesteps": 300, "eval_episodes": 2}
    script.train(arguments(script, env_id, normalize_observations=True, **wanted))
    assert len({str(x) for x in statistics}) == len(statistics) > 3
    assert evaluations and all(evaluations)


@each
def test_observations_are_normalized_by_the_statistics_of_all_rollouts(script):
    agent, _, (batch,) = rolled(
        script, "Image-v0", 1, num_envs=64, num_steps=32, normalize_observations=True
    )
    x = batch.observations[0]
    assert torch.equal(agent.normalize(x), torch.tensor(x))
    seen = [batch.observations * 7 + 3, batch.observations + 40, batch.observations * 2 - 9]
    for observations in seen:
        agent.observe(observations)
    everything = np.stack(seen).reshape(-1, 12)
    scaled = agent.normalize(everything)
    torch.testing.assert_close(scaled.mean(0), torch.zeros(12), rtol=0, atol=1e-4)
    torch.testing.assert_close(scaled.std(0), torch.ones(12), rtol=0, atol=1e-3)
    assert agent.normalize(everything * 1e6).abs().max() == 10


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Echo-v0"])
def test_ppos_first_ratio_is_1(env_id):
    wanted = {"num_envs": 4, "num_steps": 32, "normalize_observations": True}
    wanted |= {"update_epochs": 1, "num_minibatches": 1}
    agent, args, (batch,) = rolled(ppo, env_id, 1, **wanted)
    losses = ppo.update(agent, ppo.make_optimizers(agent, args), batch, args)
    assert losses["clipfrac"] == 0 and losses["approx_kl"] == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Echo-v0"])
@pytest.mark.parametrize("clip_vloss", [False, True])
def test_minibatches_of_one_row_stay_finite(env_id, clip_vloss):
    """Also where a reset leaves fewer rows than minibatches: Echo's sixth row is one."""
    wanted = {"num_envs": 1, "num_steps": 6, "num_minibatches": 6, "clip_vloss": clip_vloss}
    agent, args, (batch,) = rolled(ppo, env_id, 1, **wanted)
    assert batch.valid.all() == (env_id == "CartPole-v1")
    losses = ppo.update(agent, ppo.make_optimizers(agent, args), batch, args)
    assert all(map(math.isfinite, losses.values()))
    assert all(parameter.isfinite().all() for parameter in agent.parameters())


@critics
def test_rollouts_that_may_be_nothing_but_resets_are_refused(script):
    with pytest.raises(ValueError, match="--num-steps 1"):
        script.check(arguments(script, "ByAction-v0", num_envs=1, num_steps=1, num_minibatches=1))
