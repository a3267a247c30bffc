"""Episode boundaries: what a rollout holds, what is left out, and what it is worth."""

import gymnasium as gym
import numpy as np
import pytest
import reference
import torch
from environments import ACTIONS, CRITICS, LADDER, OBSERVATIONS, Scripted, Steady, start

import ppo
import reinforce

SCRIPTED = {"num_envs": 3, "num_steps": 7, "seed": 5, "gamma": 0.9}
critics = pytest.mark.parametrize("script", CRITICS)
both = pytest.mark.parametrize("env_id", ["Scripted-v0", "Reusing-v0"])


def replay(rollouts):
    """Steps every environment by itself, with the actions that the rollouts recorded.

    Yields (rollout's index, (rows, environment), steps) for what one rollout holds of each
    episode. A step is (observation, reward, successor, terminated, truncated). Environments of a
    vector have seeds one apart.
    """
    for number in range(3):
        env, steps, resets = Scripted(), [], False
        obs, _ = env.reset(seed=5 + number)
        for index, rollout in enumerate(rollouts):
            for t, actions in enumerate(rollout.actions):
                if resets:
                    obs, _ = env.reset()
                    resets = False
                    continue
                successor, reward, *ends, _ = env.step(actions[number])
                steps.append((obs, reward, successor, *ends))
                obs, resets = successor, any(ends)
                if resets or t == 6:
                    rows = slice(t + 1 - len(steps), t + 1)
                    yield index, (rows, number), steps
                    steps = []


@both
def test_rollouts_are_the_episodes_of_each_environment(env_id):
    """Reset steps are not valid. Observations that the environments write again were copied."""
    run = start(ppo, env_id, **SCRIPTED)
    rollouts = [run.collect() for _ in range(12)]
    valid, kinds = np.zeros((12, 7, 3), bool), set()
    for index, rows, steps in replay(rollouts):
        rollout, (obs, rewards, successors, *ends) = rollouts[index], zip(*steps)
        valid[index][rows] = True
        np.testing.assert_array_equal(rollout.obs[rows], obs)
        np.testing.assert_array_equal(rollout.next_obs[rows], successors)
        np.testing.assert_array_equal(rollout.rewards[rows], rewards)
        np.testing.assert_array_equal([rollout.terminations[rows], rollout.truncations[rows]], ends)
        kinds.add((ends[0][-1], ends[1][-1]))
    np.testing.assert_array_equal([rollout.valid for rollout in rollouts], valid)
    names = ("rewards", "terminations", "truncations", "episode_returns")
    rewards, *ends, returns = (
        np.concatenate([getattr(x, name) for x in rollouts]) for name in names
    )
    for env in range(3):
        last = np.flatnonzero(ends[0][:, env] | ends[1][:, env])
        episodes = np.split(rewards[:, env], last + 1)[:-1]
        np.testing.assert_allclose(returns[last, env], [episode.sum() for episode in episodes])
    assert kinds == {(True, False), (False, True), (True, True), (False, False)}
    assert not valid[1:, 0].all(), "no reset at a rollout's start"


@both
def test_reinforce_collects_one_whole_episode_of_each_environment(env_id):
    """Environments that have ended go on until all have, but that does not count."""
    run, lengths = start(reinforce, env_id, **SCRIPTED), []
    for _ in range(6):
        rollout = run.collect()
        for env in range(3):
            alone, length = Scripted(), rollout.valid[:, env].sum()
            alone.seed, alone.episode = rollout.obs[0, env, :2].astype(int) - [0, 1]
            obs, _ = alone.reset()
            for t in range(length):
                np.testing.assert_array_equal(rollout.obs[t, env], obs)
                obs, reward, *ends, _ = alone.step(rollout.actions[t, env])
                assert rollout.rewards[t, env] == reward
                assert any(ends) == (t == length - 1)
            assert rollout.valid[:length, env].all()
            assert not rollout.rewards[length:, env].any()
            lengths.append(length)
        assert len(rollout.obs) == max(lengths[-3:])
    assert len(set(lengths)) > 2


@pytest.mark.parametrize("gae_lambda", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("normalize_rewards", [False, True])
def test_estimates_are_those_of_one_episode_at_a_time(gae_lambda, normalize_rewards):
    """A time limit is not death, nor does the scale of rewards see past it."""
    run = start(
        ppo, "Scripted-v0", **SCRIPTED, gae_lambda=gae_lambda, normalize_rewards=normalize_rewards
    )
    rollouts, batches = [], []
    for _ in range(8):
        rollouts.append(run.collect())
        batches.append(run.estimate(rollouts[-1]))
    pieces, seen = [*replay(rollouts)], np.zeros(0)
    for index, (rollout, batch) in enumerate(zip(rollouts, batches)):
        own = [(rows, [*zip(*steps)]) for i, rows, steps in pieces if i == index]
        for _, (_, rewards, *_) in own:
            seen = np.append(seen, reference.discounted_returns(rewards, 0.9))
        scale = np.std(seen) if normalize_rewards else 1
        values, advantages = np.full((2, 7, 3), np.nan)
        for rows, (obs, rewards, successors, terminations, _) in own:
            with torch.no_grad():
                known = run.agent.value(np.array([*obs, successors[-1]])).double().numpy()
            scaled = np.array(rewards) / scale
            advantages[rows] = reference.gae(scaled, known, terminations[-1], 0.9, gae_lambda)
            values[rows] = known[:-1]
        expected = [advantages, values + advantages]
        np.testing.assert_array_equal(batch.obs, rollout.obs[rollout.valid])
        np.testing.assert_array_equal(batch.actions, rollout.actions[rollout.valid])
        for actual, wanted in zip(batch[2:], expected, strict=True):
            assert actual.dtype == torch.float32
            np.testing.assert_allclose(actual, wanted[rollout.valid], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("reward_to_go", [True, False])
@pytest.mark.parametrize("normalize_rewards", [False, True])
def test_returns_of_reinforce_are_those_of_one_episode_at_a_time(reward_to_go, normalize_rewards):
    options = {"reward_to_go": reward_to_go, "normalize_rewards": normalize_rewards}
    run, seen = start(reinforce, "Scripted-v0", **SCRIPTED, **options), np.zeros(0)
    for _ in range(4):
        rollout = run.collect()
        batch, valid = run.estimate(rollout), rollout.valid
        expected = np.zeros(valid.shape)
        for env in range(3):
            returns = reference.discounted_returns(rollout.rewards[valid[:, env], env], 0.9)
            seen = np.append(seen, returns)
            expected[valid[:, env], env] = returns if reward_to_go else returns[0]
        scale = np.std(seen) if normalize_rewards else 1
        np.testing.assert_allclose(batch.returns, expected[valid] / scale, rtol=1e-5)
        np.testing.assert_array_equal(batch.obs, rollout.obs[valid])
        np.testing.assert_array_equal(batch.actions, rollout.actions[valid])
        assert batch.returns.dtype == torch.float32


def test_episodes_that_outlast_the_training_end_reinforce():
    run, before = start(reinforce, "Endless-v0", num_envs=2, total_timesteps=50), Steady.steps
    with pytest.raises(reinforce.ArgumentError, match="Endless-v0: a batch outlasts"):
        run.collect()
    assert Steady.steps - before == 50


def test_running_statistics_are_those_of_all_rows():
    """Also where the mean is a billion times the deviation, or a feature never varies."""
    rng, stats = np.random.default_rng(0), ppo.RunningMeanStd(4)
    rows = rng.standard_normal((5000, 4)) * [1, 0.02, 0, 1e-3] + [3, 1.7e9, 7777.77, 0]
    assert torch.equal(stats.var, torch.ones(4, dtype=torch.float64))
    for part in np.array_split(rows, [1, 30, 1000, 4000]):
        stats.update(torch.tensor(part))
    np.testing.assert_allclose(stats.mean, rows.mean(0), rtol=1e-12)
    np.testing.assert_allclose(stats.var, rows.var(0), rtol=1e-5, atol=1e-15)
    assert stats.count == 5000


def test_observations_are_scaled_clipped_and_single_if_asked_for():
    agent, plain = (ppo.Agent(3, 2, False, normalize=normalize) for normalize in (True, False))
    rows = np.random.default_rng(0).standard_normal((50, 3)) * [1, 10, 0.1] + [0, 5, -100]
    agent.obs_stats.update(torch.tensor(rows))
    plain.obs_stats.update(torch.tensor(rows))
    obs = np.concatenate([rows, 1e6 * rows])
    inputs = agent.inputs(obs)
    assert inputs.dtype == torch.float32
    np.testing.assert_allclose(inputs, reference.scale_observations(obs, rows), rtol=1e-5)
    assert inputs.max() == 10 and inputs.min() == -10
    np.testing.assert_array_equal(plain.inputs(obs), obs.astype(np.float32))


@pytest.mark.parametrize("name", OBSERVATIONS)
def test_observations_are_flattened_and_learned_from(name):
    run, plain = start(ppo, f"{name}-v0", num_envs=2, num_steps=16), gym.make_vec(f"{name}-v0", 2)
    flat, _ = run.envs.reset(seed=3)
    obs, _ = plain.reset(seed=3)
    rows = gym.vector.utils.iterate(plain.observation_space, obs)
    expected = [gym.spaces.flatten(plain.single_observation_space, row) for row in rows]
    np.testing.assert_array_equal(flat, expected)
    losses = run.update(run.estimate(run.collect()))
    assert np.isfinite(list(losses.values())).all()


@pytest.mark.parametrize("name", ACTIONS)
def test_the_action_that_reaches_the_environment_is_in_its_space(name):
    """Clipped and cast. The rollout keeps what was sampled."""
    run, space = start(ppo, f"{name}-v0", num_envs=4, num_steps=5), ACTIONS[name]
    actions = run.collect().actions
    received = np.array([env.unwrapped.received for env in run.envs.unwrapped.envs]).swapaxes(0, 1)
    assert all(space.contains(action) for row in received for action in row)
    assert (actions < space.low.min()).any() and (actions > space.high.max()).any()
    np.testing.assert_array_equal(received, actions.clip(space.low, space.high))


@pytest.mark.parametrize("script", LADDER)
@pytest.mark.parametrize("env_id", ["CartPole-v1", "Echo-v0"])
def test_networks_and_their_optimizers(script, env_id):
    """Two layers of 64 tanh units, in reinforce.py orthogonal. Each parameter is learned once."""
    run = start(script, env_id, num_envs=2, num_steps=16, seed=2)
    agent = run.agent
    for part in (part for part in agent.children() if isinstance(part, torch.nn.Sequential)):
        assert "".join(type(layer).__name__ for layer in part) == "LinearTanhLinearTanhLinear"
        assert part[0].out_features == part[2].out_features == 64
    if script is reinforce:
        for layer, gain in zip(agent.actor[::2], (2**0.5, 2**0.5, 0.01)):
            norms = torch.linalg.svdvals(layer.weight.detach())
            torch.testing.assert_close(norms, torch.full_like(norms, gain), rtol=1e-4, atol=0)
            assert not layer.bias.any()
    held = [id(p) for optimizer in run.optimizers for p in optimizer.param_groups[0]["params"]]
    if script.__name__ == "trpo":
        held += [id(parameter) for parameter in agent.actor.parameters()]
    assert sorted(held) == sorted(id(parameter) for parameter in agent.parameters())
    assert env_id == "CartPole-v1" or agent.actor.log_std.tolist() == [-0.5] * 6
    before = {name: x.clone() for name, x in agent.named_parameters()}
    run.update(run.estimate(run.collect()))
    assert not [name for name, x in agent.named_parameters() if torch.equal(x, before[name])]


def test_the_greedy_action_is_the_most_likely_and_a_sample_follows_the_policy():
    discrete, continuous = (ppo.Agent(2, 3, kind, normalize=False) for kind in (False, True))
    discrete.actor[-1].bias.data[:] = torch.tensor([0.0, 1.0, -1.0])
    obs = np.zeros((20_000, 2), np.float32)
    assert (discrete.act(obs, greedy=True) == 1).all()
    shares = np.bincount(discrete.act(obs)) / len(obs)
    np.testing.assert_allclose(shares, discrete.policy(obs[0]).probs.detach(), atol=0.02)
    mean, samples = continuous.actor(torch.zeros(2)).detach(), continuous.act(obs)
    assert np.allclose(continuous.act(obs, greedy=True), mean)
    np.testing.assert_allclose(samples.std(0), np.exp(-0.5), rtol=0.05)
    np.testing.assert_allclose(samples.mean(0), mean, atol=0.02)
