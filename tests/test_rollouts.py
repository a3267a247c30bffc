"""Episode boundaries: what a rollout holds, what is left out, and what it is worth."""

import gymnasium as gym
import numpy as np
import pytest
import reference
import torch
from environments import ACTIONS, CRITICS, LADDER, OBSERVATIONS, Endless, Scripted, start

import ppo
import reinforce

NUM_ENVS, NUM_STEPS, SEED = 3, 7, 5
SCRIPTED = {"num_envs": NUM_ENVS, "num_steps": NUM_STEPS, "seed": SEED, "gamma": 0.9}

each = pytest.mark.parametrize("script", LADDER)
critics = pytest.mark.parametrize("script", CRITICS)


def replay(rollouts):
    """Steps every environment by itself, with the actions that the rollouts recorded.

    Yields (rollout's index, environment, first row, steps, return) for what one rollout holds of
    each episode. A step is (observation, reward, successor, terminated, truncated). The return is
    None if the episode goes on. Environments of a vector have seeds one apart.
    """
    for number in range(NUM_ENVS):
        env, steps, total, resets = Scripted(), [], 0.0, False
        obs, _ = env.reset(seed=SEED + number)
        for index, rollout in enumerate(rollouts):
            for t, actions in enumerate(rollout.actions):
                if resets:
                    obs, _ = env.reset()
                    total, resets = 0.0, False
                    continue
                successor, reward, *ends, _ = env.step(actions[number])
                steps.append((obs, reward, successor, *ends))
                obs = successor
                total += reward
                resets = any(ends)
                if resets or t == NUM_STEPS - 1:
                    first = t + 1 - len(steps)
                    yield index, number, first, steps, total if resets else None
                    steps = []


@critics
@pytest.mark.parametrize("env_id", ["Scripted-v0", "Reusing-v0"])
def test_rollouts_are_the_episodes_of_each_environment(script, env_id):
    """Reset steps are not valid, and arrays that the environments write again were copied."""
    run = start(script, env_id, **SCRIPTED)
    rollouts = [run.collect() for _ in range(12)]
    valid = [np.zeros((NUM_STEPS, NUM_ENVS), bool) for _ in rollouts]
    ended, kinds = [[] for _ in rollouts], set()
    for index, env, first, steps, total in replay(rollouts):
        rollout, rows = rollouts[index], (slice(first, first + len(steps)), env)
        valid[index][rows] = True
        obs, rewards, successors, terminations, truncations = zip(*steps)
        np.testing.assert_array_equal(rollout.obs[:-1][rows], obs)
        np.testing.assert_array_equal(rollout.obs[1:][rows], successors)
        np.testing.assert_array_equal(rollout.rewards[rows], rewards)
        np.testing.assert_array_equal(rollout.terminations[rows], terminations)
        np.testing.assert_array_equal(rollout.truncations[rows], truncations)
        kinds.add((terminations[-1], truncations[-1]))
        if total is not None:
            ended[index].append(total)
    for rollout, mask, returns in zip(rollouts, valid, ended):
        np.testing.assert_array_equal(rollout.valid, mask)
        assert sorted(rollout.episode_returns) == sorted(returns)
    assert kinds == {(True, False), (False, True), (True, True), (False, False)}
    assert any(not mask[0].all() for mask in valid[1:]), "no reset at a rollout's start"


@pytest.mark.parametrize("env_id", ["Scripted-v0", "Reusing-v0"])
def test_reinforce_collects_one_whole_episode_of_each_environment(env_id):
    """The environments that have ended go on until all have, but that does not count."""
    run = start(reinforce, env_id, **SCRIPTED)
    lengths = []
    for _ in range(6):
        rollout = run.collect()
        for env in range(NUM_ENVS):
            seed, episode, _ = rollout.obs[0, env]
            alone = Scripted()
            alone.seed, alone.episode = int(seed), int(episode) - 1
            obs, _ = alone.reset()
            length = rollout.valid[:, env].sum()
            lengths.append(length)
            assert rollout.valid[:length, env].all()
            for t in range(length):
                np.testing.assert_array_equal(rollout.obs[t, env], obs)
                obs, reward, *ends, _ = alone.step(rollout.actions[t, env])
                assert rollout.rewards[t, env] == reward
                assert any(ends) == (t == length - 1)
            assert not rollout.rewards[length:, env].any()
            assert rollout.episode_returns[env] == rollout.rewards[:, env].sum()
        assert len(rollout.obs) == max(lengths[-NUM_ENVS:])
    assert len(set(lengths)) > 2


@critics
@pytest.mark.parametrize("gae_lambda", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("normalize_rewards", [False, True])
def test_estimates_are_those_of_one_episode_at_a_time(script, gae_lambda, normalize_rewards):
    """A time limit is not death, nor does the scale of rewards see past an episode's end."""
    wanted = {"gae_lambda": gae_lambda, "normalize_rewards": normalize_rewards}
    run = start(script, "Scripted-v0", **SCRIPTED | wanted)
    rollouts, batches = [], []
    for _ in range(8):
        rollouts.append(run.collect())
        batches.append(run.estimate(rollouts[-1]))

    def value(obs):
        with torch.no_grad():
            return run.agent.value(np.stack(obs)).double().numpy()

    pieces = list(replay(rollouts))
    seen = np.zeros(0)
    for index, (rollout, batch) in enumerate(zip(rollouts, batches)):
        values, advantages = np.full((2, NUM_STEPS, NUM_ENVS), np.nan)
        deviation = (np.std(seen) if len(seen) else 1.0) + 1e-8
        for number, env, first, steps, _ in pieces:
            if number != index:
                continue
            obs, rewards, successors, terminations, _ = zip(*steps)
            if normalize_rewards:
                rewards = reference.scale_rewards(np.array(rewards), seen)
            rows, known = (slice(first, first + len(steps)), env), value([*obs, successors[-1]])
            values[rows] = known[:-1]
            advantages[rows] = reference.gae(
                np.array(rewards), known, terminations[-1], 0.9, gae_lambda
            )
        returns = (values + advantages)[rollout.valid]
        np.testing.assert_array_equal(batch.obs, rollout.obs[:-1][rollout.valid])
        np.testing.assert_array_equal(batch.actions, rollout.actions[rollout.valid])
        np.testing.assert_allclose(batch.values, values[rollout.valid], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(
            batch.advantages, advantages[rollout.valid], rtol=1e-4, atol=1e-4
        )
        np.testing.assert_allclose(batch.returns, returns, rtol=1e-4, atol=1e-4)
        assert all(x.dtype == torch.float32 for x in batch[2:])
        seen = np.append(seen, returns * deviation)


@pytest.mark.parametrize("reward_to_go", [True, False])
@pytest.mark.parametrize("normalize_rewards", [False, True])
def test_returns_of_reinforce_are_those_of_one_episode_at_a_time(reward_to_go, normalize_rewards):
    wanted = {"reward_to_go": reward_to_go, "normalize_rewards": normalize_rewards}
    run = start(reinforce, "Scripted-v0", **SCRIPTED | wanted)
    seen = np.zeros(0)
    for _ in range(4):
        rollout = run.collect()
        batch = run.estimate(rollout)
        expected, togo = np.zeros((2, *rollout.rewards.shape))
        deviation = (np.std(seen) if len(seen) else 1.0) + 1e-8
        for env in range(NUM_ENVS):
            rewards = rollout.rewards[rollout.valid[:, env], env]
            if normalize_rewards:
                rewards = reference.scale_rewards(rewards, seen)
            togo[: len(rewards), env] = reference.discounted_returns(rewards, 0.9)
            expected[:, env] = togo[:, env] if reward_to_go else togo[0, env]
        np.testing.assert_allclose(batch.returns, expected[rollout.valid], rtol=1e-5)
        np.testing.assert_array_equal(batch.obs, rollout.obs[rollout.valid])
        np.testing.assert_array_equal(batch.actions, rollout.actions[rollout.valid])
        assert batch.returns.dtype == torch.float32
        seen = np.append(seen, togo[rollout.valid] * deviation)


def test_scaled_rewards_are_clipped():
    run = start(ppo, "Scripted-v0", **SCRIPTED | {"gae_lambda": 0.0, "gamma": 0.0})
    rollout = run.collect()
    rollout.rewards[:] = np.linspace(-30, 30, rollout.rewards.size).reshape(rollout.rewards.shape)
    batch = run.estimate(rollout)
    expected = rollout.rewards.clip(-10, 10)[rollout.valid]
    np.testing.assert_allclose(batch.advantages + batch.values, expected, rtol=1e-5)


def test_reset_steps_leak_nothing():
    """Junk in the rewards and actions of those steps changes no bit of a batch."""
    batches = []
    for junk in (False, True):
        run = start(ppo, "Scripted-v0", **SCRIPTED)
        rollout = run.collect()
        assert not rollout.valid.all()
        if junk:
            rollout.rewards[~rollout.valid] = 1e9
            rollout.actions[~rollout.valid] = 1
        batches.append([*run.estimate(rollout), run.agent.return_stats.var])
    assert all(torch.equal(*pair) for pair in zip(*batches))


def test_episodes_that_outlast_the_training_end_reinforce():
    run = start(reinforce, "Endless-v0", num_envs=2, total_timesteps=50)
    with pytest.raises(reinforce.ArgumentError, match="Endless-v0: episodes outlast"):
        run.collect()
    assert Endless.steps == 26


def test_running_statistics_are_those_of_all_rows():
    """Also where the mean is a billion times the deviation, or a feature never varies."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((5000, 4)) * [1, 0.02, 0, 1e-3] + [3, 1.7e9, 7777.77, 0]
    stats = ppo.RunningMeanStd(4)
    assert torch.equal(stats.var, torch.ones(4, dtype=torch.float64))
    for part in np.array_split(rows, [1, 30, 1000, 4000]):
        stats.update(torch.tensor(part))
    np.testing.assert_allclose(stats.mean, rows.mean(0), rtol=1e-12)
    np.testing.assert_allclose(stats.var, rows.var(0), rtol=1e-5, atol=1e-15)
    assert stats.count == 5000


def test_observations_are_scaled_clipped_and_single():
    agent = ppo.Agent(3, 2, False, normalize=True)
    rows = np.random.default_rng(0).standard_normal((50, 3)) * [1, 10, 0.1] + [0, 5, -100]
    agent.obs_stats.update(torch.tensor(rows))
    obs = np.concatenate([rows, 1e6 * rows])
    inputs = agent.inputs(obs)
    assert inputs.dtype == torch.float32
    np.testing.assert_allclose(inputs, reference.scale_observations(obs, rows), rtol=1e-5)
    assert inputs.max() == 10 and inputs.min() == -10


def test_observations_are_left_alone_unless_asked_for():
    agent = ppo.Agent(3, 2, False, normalize=False)
    agent.obs_stats.update(torch.tensor([[1.0, 2.0, 3.0], [5.0, 5.0, 5.0]]))
    assert agent.inputs(np.array([[1e3, -2.0, 0.5]])).tolist() == [[1e3, -2.0, 0.5]]


MULTI_DISCRETE = pytest.mark.xfail(strict=True, reason="make_envs does not flatten MultiDiscrete")


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=MULTI_DISCRETE) if n == "Switches" else n for n in OBSERVATIONS],
)
def test_observations_are_flattened_and_learned_from(name):
    run, plain = start(ppo, f"{name}-v0", num_envs=2, num_steps=8), gym.make_vec(f"{name}-v0", 2)
    flat, _ = run.envs.reset(seed=3)
    obs, _ = plain.reset(seed=3)
    rows = gym.vector.utils.iterate(plain.observation_space, obs)
    expected = [gym.spaces.flatten(plain.single_observation_space, row) for row in rows]
    np.testing.assert_array_equal(flat, expected)
    losses = run.update(run.estimate(run.collect()))
    assert np.isfinite(list(losses.values())).all()


@pytest.mark.parametrize("name", ACTIONS)
def test_the_action_that_reaches_the_environment_is_in_its_space(name):
    """Discrete actions count from the space's start. Continuous ones are clipped, cast, shaped."""
    run, space = start(ppo, f"{name}-v0", num_envs=4, num_steps=5), ACTIONS[name]
    actions = run.collect().actions
    received = np.array([env.unwrapped.received for env in run.envs.unwrapped.envs]).swapaxes(0, 1)
    assert all(space.contains(action) for row in received for action in row)
    if isinstance(space, gym.spaces.Discrete):
        np.testing.assert_array_equal(received, actions + space.start)
        assert {*received.ravel()} == {-1, 0, 1}
        return
    assert actions.shape == (5, 4, np.prod(space.shape))
    assert (actions < space.low.min()).any() and (actions > space.high.max()).any()
    clipped = actions.reshape(received.shape).clip(space.low, space.high)
    np.testing.assert_array_equal(received, clipped)
    assert received.dtype == space.dtype


@each
@pytest.mark.parametrize("env_id", ["CartPole-v1", "Echo-v0"])
def test_networks_and_their_optimizers(script, env_id):
    """Two layers of 64 tanh units, orthogonal, with biases of 0. Each parameter is learned once."""
    run = start(script, env_id, num_envs=2, num_steps=16, seed=2)
    agent = run.agent
    gains = {"actor": 0.01, "critic": 1.0}
    for name, part in agent.named_children():
        if name.endswith("stats"):
            continue
        assert [type(layer).__name__ for layer in part] == [
            "Linear",
            "Tanh",
            "Linear",
            "Tanh",
            "Linear",
        ]
        for layer, gain in zip(part[::2], (2**0.5, 2**0.5, gains[name])):
            weight = layer.weight.detach().double()
            norms = torch.linalg.svdvals(weight)
            torch.testing.assert_close(norms, torch.full_like(norms, gain), rtol=1e-4, atol=0)
            assert not layer.bias.any()
        assert part[0].out_features == part[2].out_features == 64
    held = [id(p) for optimizer in run.optimizers for p in optimizer.param_groups[0]["params"]]
    if script.__name__ == "trpo":
        held += [id(parameter) for parameter in agent.actor.parameters()]
    assert sorted(held) == sorted(id(parameter) for parameter in agent.parameters())
    if env_id == "Echo-v0":
        assert agent.actor.log_std.tolist() == [-0.5] * 6
    before = {name: x.clone() for name, x in agent.named_parameters()}
    run.update(run.estimate(run.collect()))
    assert not [name for name, x in agent.named_parameters() if torch.equal(x, before[name])]


def test_the_greedy_action_is_the_most_likely_and_a_sample_follows_the_policy():
    agent = ppo.Agent(2, 3, False, normalize=False)
    agent.actor[-1].bias.data[:] = torch.tensor([0.0, 1.0, -1.0])
    obs = np.zeros((20_000, 2), np.float32)
    assert (agent.act(obs, greedy=True) == 1).all()
    shares = np.bincount(agent.act(obs)) / len(obs)
    np.testing.assert_allclose(shares, agent.policy(obs[0]).probs.detach(), atol=0.02)
    agent = ppo.Agent(2, 3, True, normalize=False)
    mean = agent.actor(torch.zeros(2))
    assert np.allclose(agent.act(obs, greedy=True), mean.detach())
    samples = agent.act(obs)
    np.testing.assert_allclose(samples.std(0), np.exp(-0.5), rtol=0.05)
    np.testing.assert_allclose(samples.mean(0), mean.detach(), atol=0.02)
