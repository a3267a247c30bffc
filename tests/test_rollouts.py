"""Episode boundaries: what a rollout holds, what is left out, and what it is worth."""

import itertools

import gymnasium as gym
import numpy as np
import pytest
import reference
import torch
from environments import ACTIONS, LADDER, OBSERVATIONS, Endless, Scripted, start

import ppo
import reinforce

SCRIPTED = {"num_envs": 3, "num_steps": 7, "seed": 5, "gamma": 0.9}


@pytest.mark.parametrize("script", [reinforce, ppo])
@pytest.mark.parametrize("env_id", ["Scripted-v0", "Reusing-v0"])
def test_rollouts_are_the_episodes_of_each_environment(script, env_id):
    """Only reset steps are not valid. In reinforce.py nothing is, after the first episode.

    Observations that the environments write again were copied.
    """
    run = start(script, env_id, **SCRIPTED)
    rollouts = [run.collect() for _ in range(12)]
    if script is ppo:
        times = [rollout.obs[0, rollout.valid[0], 2] for rollout in rollouts[1:]]
        assert any(len(time) < 3 for time in times), "no reset at a rollout's start"
        assert any(time.any() for time in times), "no episode in two rollouts"
        rollouts = [ppo.Rollout(*map(np.concatenate, zip(*rollouts)))]
        np.testing.assert_array_equal(rollouts[0].obs[0], [[5, 0, 0], [6, 0, 0], [7, 0, 0]])
    lengths, kinds = set(), set()
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
                if ended:
                    lengths.add(env.time)
            elif script is ppo:
                np.testing.assert_array_equal(rollout.obs[t, number], obs)
                obs, _ = env.reset()
                ended, episode_return = False, 0.0
            else:
                assert rollout.rewards[t, number] == 0
        assert ended or script is ppo
    assert kinds == {(True, False), (False, True), (True, True), (False, False)}
    assert all(rollout.valid[-1].any() for rollout in rollouts), "steps after all have ended"
    assert len(lengths) > 2


def episodes(rollout):
    """The steps that a rollout has of each episode. One that is not valid lies between two."""
    for env in range(3):
        steps = np.flatnonzero(rollout.valid[:, env])
        for part in np.split(steps, np.flatnonzero(np.diff(steps) > 1) + 1):
            yield part, env


def estimates(agent, obs, rollout, steps, scale, gae_lambda=None, reward_to_go=None):
    """The columns of Batch after obs and actions, for the steps of one episode.

    obs are the rollout's and those after it: (T + 1, N, D).
    """
    rewards = rollout.rewards[steps] / scale
    if gae_lambda is None:
        returns = reference.discounted_returns(rewards, 0.9)
        return [returns if reward_to_go else returns[0]]
    part, env = steps
    with torch.no_grad():
        values = agent.value(obs[part[0] : part[-1] + 2, env]).double().numpy()
    terminated = rollout.terminations[steps][-1]
    advantages = reference.gae(rewards, values, terminated, 0.9, gae_lambda)
    return advantages, advantages + values[:-1]


@pytest.mark.parametrize("normalize_rewards", [False, True])
@pytest.mark.parametrize(
    "script, option, value, tolerance",
    [
        *[(ppo, "gae_lambda", value, {"rtol": 1e-4, "atol": 1e-4}) for value in (0.0, 0.7, 1.0)],
        *[(reinforce, "reward_to_go", value, {"rtol": 1e-5}) for value in (True, False)],
    ],
)
def test_estimates_are_those_of_one_episode_at_a_time(
    script, option, value, tolerance, normalize_rewards
):
    """A time limit is not death, nor does the scale of rewards see past it."""
    options = {option: value, "normalize_rewards": normalize_rewards}
    run, seen = start(script, "Scripted-v0", **SCRIPTED, **options), np.zeros(0)
    for _ in range(8):
        rollout = run.collect()
        batch, valid = run.estimate(rollout), rollout.valid
        for steps in episodes(rollout):
            seen = np.append(seen, reference.discounted_returns(rollout.rewards[steps], 0.9))
        scale = np.std(seen) if normalize_rewards else 1
        expected = np.full((len(batch) - 2, *valid.shape), np.nan)
        obs = np.array([*rollout.obs, run.state[0]])
        for steps in episodes(rollout):
            wanted = estimates(run.agent, obs, rollout, steps, scale, **{option: value})
            expected[:, *steps] = wanted
        np.testing.assert_array_equal(batch.obs, rollout.obs[valid])
        np.testing.assert_array_equal(batch.actions, rollout.actions[valid])
        for actual, wanted in zip(batch[2:], expected, strict=True):
            assert actual.dtype == torch.float32
            np.testing.assert_allclose(actual, wanted[valid], **tolerance)


def test_episodes_that_outlast_the_training_end_reinforce():
    run, before = start(reinforce, "Endless-v0", num_envs=2, total_timesteps=50), Endless.steps
    with pytest.raises(reinforce.ArgumentError, match="Endless-v0: a batch outlasts"):
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
