"""Each update follows the gradient that its script claims, without bias."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from environments import MDP, Watcher, arguments, start, watchers
from torch import nn

import ppo
import reinforce
import vpg

HORIZON, NUM_STATES = MDP["horizon"], len(MDP["start"])
# A row more than an episode: the reset. So each rollout is one whole episode of every environment.
BASE = {"num_envs": 1000, "num_steps": HORIZON + 1, "gae_lambda": 1.0, "norm_adv": False}
BASE |= {"max_grad_norm": float("inf"), "vf_epochs": 1}


def trajectories(stop):
    """(probability but for the policy's, [(state, action, mean reward)]) of every trajectory."""

    def extend(probability, state, steps):
        for action in range(2):
            longer = [*steps, (state, action, MDP["rewards"][state, action])]
            if len(longer) == HORIZON:
                yield probability, longer
                continue
            if stop:
                yield probability * stop, longer
            for successor, chance in enumerate(MDP["transitions"][state, action]):
                if chance:
                    yield from extend(probability * (1 - stop) * chance, successor, longer)

    for state, chance in enumerate(MDP["start"]):
        if chance:
            yield from extend(chance, state, [])


def exact(agent, gamma, reward_to_go, stop=0.0):
    """The gradient that sampling must meet, from every trajectory; sum R p by default.

    A discounted reward-to-go drops the factor gamma^t of the gradient of J, as all practice does.
    So its claim is E[sum_t grad log pi(a_t|s_t) R_t], which is the gradient of J for gamma = 1.
    """
    log_probs = agent.policy(torch.eye(NUM_STATES)).logits.log_softmax(-1).double()
    claim = 0.0
    for probability, steps in trajectories(stop):
        states, actions, rewards = zip(*steps, strict=True)
        discounted = np.array(rewards) * gamma ** np.arange(len(rewards))
        taken = log_probs[list(states), list(actions)]
        chance = probability * taken.sum().exp()
        if reward_to_go:
            togo = discounted[::-1].cumsum()[::-1] / gamma ** np.arange(len(rewards))
            claim = claim + chance.detach() * taken @ torch.tensor(togo)
        else:
            claim = claim + chance * discounted.sum()
    return flat(torch.autograd.grad(claim, list(agent.actor.parameters())))


def flat(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors]).double()


def values(agent, gamma):
    """V of the agent's policy, by the Bellman equation."""
    with torch.no_grad():
        probs = agent.policy(torch.eye(NUM_STATES)).probs.double().numpy()
    value = np.zeros(NUM_STATES)
    alive = np.arange(NUM_STATES)[:, None] < NUM_STATES - NUM_STATES // HORIZON
    for _ in range(HORIZON):
        action_values = MDP["rewards"] + gamma * alive * (MDP["transitions"] @ value)
        value = (probs * action_values).sum(-1)
    return torch.tensor(value)


def no_change(batch, args):
    return batch


def table(weights):
    """A network that holds a number for each output and state."""
    network = nn.Linear(NUM_STATES, len(weights), bias=False)
    network.weight.data[:] = weights
    return nn.Sequential(network)


def sample(
    script, env_id="Layered-v0", baseline=None, change=no_change, count=50, gamma=1.0, **wanted
):
    """count estimates of the gradient by update, and the agent whose gradient it is."""
    args = arguments(script, env_id, gamma=gamma, **BASE | wanted)
    agent, _, batches = start(script, args)
    agent.actor = table(torch.arange(2 * NUM_STATES).sin().view(2, NUM_STATES))
    if baseline is not None:
        agent.critic = table(baseline(agent, gamma)[None])
    optimizers, estimates = watchers(agent), []
    for _, batch in zip(range(count), batches, strict=False):
        script.update(agent, optimizers, change(batch, args), args)
        estimates.append(-optimizers[0].last.double())
    # REINFORCE's mean is over trajectories; the others' is over steps.
    scale = 1 if script is reinforce else HORIZON
    return SimpleNamespace(estimates=torch.stack(estimates) * scale, agent=agent)


def distance(sampled, claimed):
    """The largest |z| of the mean of the estimates, over all parameters."""
    estimates = sampled.estimates
    error = estimates.mean(0) - claimed
    return (error / estimates.std(0) * len(estimates) ** 0.5).abs().max()


def nothing(agent, gamma):
    return torch.zeros(NUM_STATES)


def arbitrary(agent, gamma):
    return torch.linspace(-6, 7, NUM_STATES).roll(4)


BASELINES = pytest.mark.parametrize("baseline", [nothing, arbitrary, values, None])


@pytest.mark.parametrize("gamma", [1.0, 0.8])
@pytest.mark.parametrize("env_id, stop", [("Layered-v0", 0.0), ("Stopping-v0", 0.3)])
@pytest.mark.parametrize("reward_to_go", [False, True])
def test_reinforce_is_unbiased(reward_to_go, env_id, stop, gamma):
    sampled = sample(reinforce, env_id, reward_to_go=reward_to_go, gamma=gamma)
    assert distance(sampled, exact(sampled.agent, gamma, reward_to_go, stop)) < 4


@pytest.mark.parametrize("gamma", [1.0, 0.8])
@BASELINES
def test_vpg_is_unbiased_with_any_baseline(baseline, gamma):
    sampled = sample(vpg, baseline=baseline, gamma=gamma)
    assert distance(sampled, exact(sampled.agent, gamma, True)) < 4


@pytest.mark.parametrize("gae_lambda", [0.0, 0.5])
def test_below_lambda_1_it_is_unbiased_with_the_true_value_and_no_other(gae_lambda):
    sampled = sample(vpg, baseline=values, gae_lambda=gae_lambda)
    assert distance(sampled, exact(sampled.agent, 1.0, True)) < 4
    sampled = sample(vpg, baseline=arbitrary, gae_lambda=gae_lambda)
    assert distance(sampled, exact(sampled.agent, 1.0, True)) > 8


def test_without_discount_all_claims_are_the_gradient_of_j():
    agent = sample(reinforce, count=1).agent
    torch.testing.assert_close(
        exact(agent, 1.0, True), exact(agent, 1.0, False), rtol=1e-4, atol=1e-6
    )
    togo, total = exact(agent, 0.8, True), exact(agent, 0.8, False)
    assert not torch.allclose(togo, total, rtol=0.1)


def shifted(batch, args):
    return batch._replace(rewards=np.roll(batch.rewards, -1, axis=0) * batch.valid)


def discounted_twice(batch, args):
    steps = np.arange(len(batch.rewards), dtype=np.float32)[:, None]
    return batch._replace(rewards=batch.rewards * np.float32(args.gamma) ** steps)


@pytest.mark.parametrize("change", [shifted, discounted_twice])
@pytest.mark.parametrize(
    "script, reward_to_go", [(reinforce, False), (reinforce, True), (vpg, True)]
)
def test_a_broken_estimator_fails_the_same_check(script, reward_to_go, change):
    sampled = sample(script, change=change, gamma=0.8, reward_to_go=reward_to_go)
    assert distance(sampled, exact(sampled.agent, 0.8, reward_to_go)) > 8


def test_variance_falls_from_total_return_to_reward_to_go_to_baseline():
    samples = (
        sample(reinforce, reward_to_go=False),
        sample(reinforce, reward_to_go=True),
        sample(vpg, baseline=values),
    )
    variances = [sampled.estimates.var(0).sum() for sampled in samples]
    assert variances[0] > 1.1 * variances[1] > 1.1 * 1.1 * variances[2]


@pytest.mark.parametrize("norm_adv", [False, True])
@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
def test_ppos_first_gradient_is_vpgs(env_id, norm_adv):
    gradients = []
    for script in (vpg, ppo):
        changes = {"norm_adv": norm_adv, "max_grad_norm": float("inf"), "ent_coef": 0.0}
        changes |= {"vf_coef": 0.0, "update_epochs": 1, "num_minibatches": 1}
        args = arguments(script, env_id, **changes)
        agent, _, batches = start(script, args)
        optimizers = watchers(agent)[: 2 if script is vpg else 1]
        script.update(agent, optimizers, next(batches), args)
        gradients.append(optimizers[0].last.double())
    assert gradients[0].norm() > 1e-3
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6 * float(gradients[0].norm()))


@pytest.mark.parametrize("outward", [True, False])
def test_ppos_gradient_is_zero_where_the_advantage_pushes_out_of_the_clip_range(outward):
    """One step moves the policy to action 1; the gradient of the second is looked at."""

    class Jump(Watcher):
        def step(self, gradient, args):
            norm = super().step(gradient, args)
            actor[-1].bias.data += torch.tensor([-1.0, 1.0])
            return norm

    args = arguments(
        ppo, "ByAction-v0", num_envs=8, num_minibatches=1, update_epochs=2, norm_adv=False
    )
    args.vf_coef = args.ent_coef = 0.0
    agent, *_ = start(ppo, args)
    actor, agent.critic = agent.actor, nn.Linear(1, 1)
    nn.init.zeros_(agent.critic.weight), nn.init.zeros_(agent.critic.bias)
    actions = np.array([[0, 1] * 4])
    rewards = np.where(actions == 1, 1, -1).astype(np.float32) * (1 if outward else -1)
    observations, ends = np.ones((2, 8, 1), np.float32), np.ones((1, 8), bool)
    batch = ppo.Batch(observations, actions, rewards, ends, ~ends, ends, [])
    optimizer = Jump(actor, 0.0)
    metrics = ppo.update(agent, [optimizer], batch, args)
    assert metrics["clipfrac"] == 0.5  # none of the first step, all of the second
    last = sum(parameter.numel() for parameter in actor[-1].parameters())
    assert optimizer.last[-last:].eq(0).all() == outward
    assert optimizer.last.eq(0).all() == outward
