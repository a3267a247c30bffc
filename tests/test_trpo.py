"""TRPO's natural gradient is one: its Fisher matrix, its solver, its bound, its retreat."""

import copy

import numpy as np
import pytest
import torch
from environments import arguments, metrics, start
from torch import nn
from torch.distributions import kl_divergence

import trpo

SPACES = pytest.mark.parametrize("env_id", ["CartPole-v1", "Echo-v0"])


def parts(env_id, **wanted):
    """A tiny network in float64, with its first rollout and what else update needs."""
    args = arguments(trpo, env_id, num_envs=4, num_steps=16, **wanted)
    agent, _, batches = start(trpo, args)
    first, last = agent.actor[0], agent.actor[-1]
    tiny = nn.Sequential(
        nn.Linear(first.in_features, 2), nn.Tanh(), nn.Linear(2, last.out_features)
    )
    if not agent.discrete:
        deviations = torch.linspace(-0.7, 0.4, last.out_features)
        tiny.log_std = agent.log_std = nn.Parameter(deviations)
    agent.actor = tiny
    batch = next(batches)
    agent.double().normalize = lambda x: torch.tensor(x, dtype=torch.float64)
    optimizers = trpo.make_optimizers(agent, args)
    return agent, optimizers, batch._replace(rewards=batch.rewards.astype(float)), args


def fisher(agent, observations):
    """E[score score^T], where the mean over actions is exact."""
    parameters = list(agent.actor.parameters())

    def jacobian(outputs):
        rows = [
            torch.cat([g.flatten() for g in torch.autograd.grad(o, parameters, retain_graph=True)])
            for o in outputs
        ]
        return torch.stack(rows)

    matrix = 0
    for observation in observations:
        policy = agent.policy(observation[None])
        if agent.discrete:
            scores, chances = jacobian(policy.logits[0].log_softmax(-1)), policy.probs[0]
        else:  # for a Gaussian: the information about the mean is 1 / std^2, about log std it is 2
            normal = policy.base_dist
            outputs = torch.cat([normal.loc[0].flatten(), normal.scale[0].log().flatten()])
            scores = jacobian(outputs)
            chances = torch.cat(
                [normal.scale[0].flatten() ** -2, torch.full((len(scores) // 2,), 2)]
            )
        matrix = matrix + scores.T @ (chances[:, None] * scores) / len(observations)
    return matrix.detach()


def solve_in_update(env_id, monkeypatch, **wanted):
    """What update asks conjugate_gradient to solve: (agent, batch, args, matrix, b, solution)."""
    agent, optimizers, batch, args = parts(env_id, **wanted)
    seen = []

    def spy(product, b, iterations):
        matrix = torch.stack([product(unit) for unit in torch.eye(len(b), dtype=b.dtype)])
        solution = conjugate_gradient(product, b, iterations)
        seen.append((copy.deepcopy(agent), matrix, b, solution))
        return solution

    conjugate_gradient = trpo.conjugate_gradient
    monkeypatch.setattr(trpo, "conjugate_gradient", spy)
    trpo.update(agent, optimizers, batch, args)
    (call,) = seen
    return *call, batch, args


@SPACES
@pytest.mark.parametrize("cg_damping", [0.0, 0.1])
def test_fisher_products_are_those_of_the_dense_matrix(env_id, cg_damping, monkeypatch):
    agent, matrix, *_, batch, args = solve_in_update(env_id, monkeypatch, cg_damping=cg_damping)
    observations, *_ = trpo.estimate(agent, batch, args)
    assert len(observations) < batch.valid.size, "let a reset row be there, to be left out"
    dense = fisher(agent, observations)
    assert dense.norm() > 0.1
    torch.testing.assert_close(matrix, dense + cg_damping * torch.eye(len(dense)))


@SPACES
def test_conjugate_gradients_solve_the_system(env_id, monkeypatch):
    *_, matrix, b, solution, _, _ = solve_in_update(env_id, monkeypatch, cg_iterations=60)
    torch.testing.assert_close(solution, torch.linalg.solve(matrix, b), rtol=1e-5, atol=1e-8)


@SPACES
def test_b_is_the_gradient_of_the_surrogate(env_id, monkeypatch):
    """At the old parameters it is the policy gradient: that of mean log pi(a|s) A."""
    agent, _, b, _, batch, args = solve_in_update(env_id, monkeypatch, norm_adv=False)
    observations, actions, advantages, _ = trpo.estimate(agent, batch, args)
    objective = (agent.policy(observations).log_prob(actions) * advantages).mean()
    torch.testing.assert_close(b, trpo.flat_grad(objective, list(agent.actor.parameters())))


def test_conjugate_gradients_need_as_many_iterations_as_dimensions():
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    matrix, b = root @ root.T + torch.eye(6), root[0] + 1
    solution = trpo.conjugate_gradient(matrix.mv, b, 6)
    torch.testing.assert_close(solution, torch.linalg.solve(matrix, b), rtol=1e-8, atol=1e-8)
    assert trpo.conjugate_gradient(matrix.mv, torch.zeros_like(b), 6).eq(0).all()


@pytest.mark.parametrize(
    "env_id, target_kl", [("CartPole-v1", 0.01), ("CartPole-v1", 0.5), ("Pendulum-v1", 0.02)]
)
def test_every_step_of_a_run_obeys_the_bound(env_id, target_kl, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wanted = {"total_timesteps": 20 * 1024, "eval_episodes": 1, "target_kl": target_kl}
    trpo.train(arguments(trpo, env_id, **wanted))
    kls = np.array([row["losses/kl"] for row in metrics(tmp_path)])
    assert (kls >= 0).all() and (kls <= target_kl).all()
    # The quadratic model is good: a step taken uses a good part of what it may.
    assert (kls > target_kl / 8).mean() > 0.8


@SPACES
@pytest.mark.parametrize("target_kl", [0.001, 0.1, 3.0])
def test_an_accepted_step_improves_the_surrogate_within_the_bound(env_id, target_kl):
    """The metrics that update returns are recomputed from the agents before and after."""
    agent, optimizers, batch, args = parts(env_id, target_kl=target_kl)
    args.max_backtracks, old = 30, copy.deepcopy(agent)
    observations, actions, advantages, _ = trpo.estimate(agent, batch, args)
    losses = trpo.update(agent, optimizers, batch, args)
    with torch.no_grad():
        before, after = old.policy(observations), agent.policy(observations)
        advantages = (advantages - advantages.mean()) / advantages.std(correction=0)
        ratio = (after.log_prob(actions) - before.log_prob(actions)).exp()
        surrogate, kl = (ratio * advantages).mean(), kl_divergence(before, after).mean()
    assert losses["step_fraction"] > 0
    assert losses["kl"] == pytest.approx(kl.item(), rel=1e-6)
    assert losses["policy_loss"] == pytest.approx(-surrogate.item(), rel=1e-6)
    assert 0 < kl <= target_kl and surrogate > advantages.mean()


@SPACES
@pytest.mark.parametrize("why", ["no gradient", "downhill", "too far"])
def test_a_rejected_step_leaves_the_parameters_bit_identical(env_id, why, monkeypatch):
    agent, optimizers, batch, args = parts(env_id, norm_adv=False, max_backtracks=3)
    solve = trpo.conjugate_gradient
    if why == "no gradient":
        nn.init.zeros_(agent.critic[-1].weight)
        batch.rewards[:] = 0
    elif why == "downhill":
        monkeypatch.setattr(trpo, "conjugate_gradient", lambda *a: -solve(*a))
    else:  # with the same derivatives, so that the solver does not know
        monkeypatch.setattr(trpo, "kl_divergence", lambda p, q: kl_divergence(p, q) + 1)
    before = copy.deepcopy(agent.actor.state_dict())
    losses = trpo.update(agent, optimizers, batch, args)
    assert losses["step_fraction"] == losses["kl"] == 0
    after = agent.actor.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
