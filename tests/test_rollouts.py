"""What rollouts are worth, what the networks see of them, and what environments receive."""

import gymnasium as gym
import numpy as np
import pytest
import reference
import torch
from environments import ACTIONS, OBSERVATIONS, Endless, start

import ppo
import reinforce


@pytest.mark.parametrize("normalize_rewards", [False, True])
@pytest.mark.parametrize(
    "script, option, value, tolerance",
    [
        *[(ppo, "gae_lambda", value, {"rtol": 1e-4, "atol": 1e-4}) for value in (0.0, 0.7, 1.0)],
        *[(reinforce, "reward_to_go", value, {"rtol": 1e-5}) for value in (True, False)],
    ],
)
def test_estimates_are_those_of_each_episode(script, option, value, tolerance, normalize_rewards):
    """A time limit is not death, nor does the scale of rewards see past it."""
    options = {"num_envs": 3, "num_steps": 7, "seed": 5, "gamma": 0.9, option: value}
    run = start(script, "Scripted-v0", **options, normalize_rewards=normalize_rewards)
    seen = np.zeros(0)
    for _ in range(8):
        rollout = run.collect()
        batch, valid = run.estimate(rollout), rollout.valid
        ends = ~valid, ~valid  # in reinforce.py, where nothing is paid after the first episode
        if script is ppo:
            ends = rollout.terminations, rollout.truncations
        zeros = np.zeros((len(valid) + 1, 3))
        returns = reference.gae(rollout.rewards, zeros, *ends, 0.9, 1.0)
        seen = np.append(seen, returns[valid])
        scale = np.std(seen) if normalize_rewards else 1
        if script is ppo:
            obs = np.array([*rollout.obs, run.state[0]])
            values = run.agent.value(obs).detach().double().numpy()
            advantages = reference.gae(rollout.rewards / scale, values, *ends, 0.9, value)
            expected = advantages, advantages + values[:-1]
        else:
            expected = [(returns if value else returns[:1] + np.zeros_like(returns)) / scale]
        np.testing.assert_array_equal(batch.obs, rollout.obs[valid])
        np.testing.assert_array_equal(batch.actions, rollout.actions[valid])
        for actual, wanted in zip(batch[2:], expected, strict=True):
            assert actual.dtype == torch.float32
            np.testing.assert_allclose(actual, wanted[valid], **tolerance)


def test_episodes_that_outlast_the_training_end_reinforce():
    run, before = start(reinforce, "Endless-v0", num_envs=2, total_timesteps=50), Endless.steps
    with pytest.raises(ValueError, match="Endless-v0: a batch outlasts"):
        run.collect()
    assert Endless.steps - before == 50


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
    """Also a clock of large numbers, and a feature that never varies."""
    agent, plain = (ppo.Agent(5, 2, False, normalize=normalize) for normalize in (True, False))
    rows = np.random.default_rng(0).standard_normal((50, 5)) * [1, 10, 0.1, 30, 0]
    rows += [0, 5, -100, 1.7e9, 7777.75]
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
    """They are single only for the networks, so that statistics have all digits of a clock."""
    run, plain = start(ppo, f"{name}-v0", num_envs=2, num_steps=16), gym.make_vec(f"{name}-v0", 2)
    flat, _ = run.envs.reset(seed=3)
    obs, _ = plain.reset(seed=3)
    rows = gym.vector.utils.iterate(plain.observation_space, obs)
    expected = [gym.spaces.flatten(plain.single_observation_space, row) for row in rows]
    np.testing.assert_array_equal(flat, expected)
    rollout = run.collect()
    batch = run.estimate(rollout)
    np.testing.assert_array_equal(batch.obs, rollout.obs[rollout.valid])
    assert batch.obs.numpy().dtype == rollout.obs.dtype == flat.dtype
    assert np.isfinite(list(run.update(batch).values())).all()


@pytest.mark.parametrize("name", ACTIONS)
def test_the_action_that_reaches_the_environment_is_in_its_space(name):
    """Clipped and cast. The rollout keeps what was sampled."""
    run, space = start(ppo, f"{name}-v0", num_envs=4, num_steps=5), ACTIONS[name]
    actions = run.collect().actions
    received = np.array([env.unwrapped.received for env in run.envs.unwrapped.envs]).swapaxes(0, 1)
    assert all(space.contains(action) for row in received for action in row)
    assert (actions < space.low.min()).any() and (actions > space.high.max()).any()
    np.testing.assert_array_equal(received, actions.clip(space.low, space.high))


@pytest.mark.parametrize("script", [reinforce, ppo])  # the others' agent has ppo.py's text
def test_networks(script):
    """Two layers of 64 tanh units, in reinforce.py orthogonal."""
    agent = script.Agent(4, 6, True, False)
    for part in (part for part in agent.children() if isinstance(part, torch.nn.Sequential)):
        assert "".join(type(layer).__name__ for layer in part) == "LinearTanhLinearTanhLinear"
        assert part[0].out_features == part[2].out_features == 64
    assert agent.actor.log_std.tolist() == [-0.5] * 6
    if script is reinforce:
        for layer, gain in zip(agent.actor[::2], (2**0.5, 2**0.5, 0.01)):
            norms = torch.linalg.svdvals(layer.weight.detach())
            torch.testing.assert_close(norms, torch.full_like(norms, gain), rtol=1e-4, atol=0)
            assert not layer.bias.any()


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
