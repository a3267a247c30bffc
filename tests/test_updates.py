"""One update of each script is its paper's, to float32 rounding: metrics, gradients, parameters."""

from types import SimpleNamespace

import numpy as np
import pytest
import reference
import torch
from environments import LADDER, start
from torch import nn

import ppo
import reinforce
import trpo
import vpg

SPACES = pytest.mark.parametrize("env_id", ["Scripted-v0", "Echo-v0"])
SIZES = {"num_envs": 4, "num_steps": 16, "seed": 5, "learning_rate": 0.02, "vf_learning_rate": 0.01}


def small_mlp(num_inputs, num_outputs):
    """Few enough parameters for central differences, and outputs that are not near 0."""
    sizes = zip((num_inputs, 4, 3), (4, 3, num_outputs))
    first, second, last = (nn.Linear(*size) for size in sizes)
    return nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), last)


@pytest.fixture(autouse=True)
def small_networks(monkeypatch):
    for script in LADDER:
        monkeypatch.setattr(script, "mlp", small_mlp)


def recorded(script, env_id, **wanted):
    """A run at its second rollout: the run, its batch, and the batch as the reference takes it.

    Observations are scaled by statistics of the first rollout.
    """
    run = start(script, env_id, **SIZES | {"normalize_observations": True} | wanted)
    seen = run.estimate(run.collect()).obs
    run.agent.obs_stats.update(seen)
    batch = run.estimate(run.collect())
    columns = {name: x.numpy() for name, x in batch._asdict().items()}
    columns = {name: x.astype(float) for name, x in columns.items() if name != "actions"}
    columns["obs"] = reference.scale_observations(columns["obs"], seen.double().numpy())
    actions = batch.actions.numpy()
    actions = actions if actions.ndim == 1 else actions.astype(float)
    return run, batch, SimpleNamespace(**columns, actions=actions)


def parameters_of(module, prefix=""):
    named = module.named_parameters()
    return {n: p.detach().numpy().astype(float) for n, p in named if n.startswith(prefix)}


def gradients_of(optimizer):
    """A list that grows by the gradient of each step."""
    gradients = []

    def record(*_):
        parts = [parameter.grad.flatten() for parameter in optimizer.param_groups[0]["params"]]
        gradients.append(torch.cat(parts).numpy())

    optimizer.register_step_pre_hook(record)
    return gradients


def assert_close(actual, expected, tolerance=5e-5):
    """Arrays or dicts of them. The error is relative to the largest entry, or a step of Adam."""
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys()
        for name in expected:
            assert_close(actual[name], expected[name], tolerance)
        return
    scale = max(np.abs(expected).max(), 0.02)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * scale)


def assert_steps(gradients, adam):
    """The optimizer's clipped gradients are those of the reference."""
    assert len(gradients) == len(adam.gradients)
    for actual, expected in zip(gradients, adam.gradients):
        assert_close(actual, expected, 1e-4)


def explained(batch):
    return reference.explained_variance(batch.returns - batch.advantages, batch.returns)


def mean_entropy(parameters, batch):
    return reference.entropy(reference.policy_at(parameters, batch.obs)).mean()


@SPACES
@pytest.mark.parametrize("max_grad_norm", [0.3, 1e9])
def test_reinforce(env_id, max_grad_norm):
    run, batch, known = recorded(reinforce, env_id, max_grad_norm=max_grad_norm)
    parameters = parameters_of(run.agent)
    adam, gradients = reference.Adam(0.02, max_grad_norm), gradients_of(run.optimizers[0])

    def loss(p):
        return reference.reinforce_loss(p, known, num_episodes=4)

    for _ in range(2):
        wanted = {"losses/policy_loss": loss(parameters)}
        wanted["losses/entropy"] = mean_entropy(parameters, known)
        assert_close(run.update(batch), wanted)
        parameters = adam.minimize(loss, parameters)
        assert_close(parameters_of(run.agent), parameters)
    assert_steps(gradients, adam)


def fit_values(parameters, known, args, adam):
    """The critic's steps of VPG and TRPO: its parameters afterwards, and its last loss."""
    for _ in range(args.vf_epochs):
        loss = reference.value_loss(parameters, known)
        parameters = adam.minimize(lambda p: reference.value_loss(p, known), parameters)
    return parameters, loss


@SPACES
@pytest.mark.parametrize("max_grad_norm", [0.05, 1e9])
def test_vpg(env_id, max_grad_norm):
    wanted = {"max_grad_norm": max_grad_norm, "vf_epochs": 4, "ent_coef": 0.2}
    run, batch, known = recorded(vpg, env_id, **wanted)
    actor, critic = parameters_of(run.agent, "actor"), parameters_of(run.agent, "critic")
    adams = [reference.Adam(rate, max_grad_norm) for rate in (0.02, 0.01)]
    gradients = [gradients_of(optimizer) for optimizer in run.optimizers]

    def loss(p):
        return reference.vpg_loss(p, known) - 0.2 * mean_entropy(p, known)

    for _ in range(2):
        expected = {"losses/policy_loss": reference.vpg_loss(actor, known)}
        expected["losses/entropy"] = mean_entropy(actor, known)
        expected["losses/explained_variance"] = explained(known)
        actor = adams[0].minimize(loss, actor)
        critic, expected["losses/value_loss"] = fit_values(critic, known, run.args, adams[1])
        assert_close(run.update(batch), expected)
        assert_close(parameters_of(run.agent), actor | critic)
    for pair in zip(gradients, adams):
        assert_steps(*pair)


PPO_OPTIONS = [
    {},
    {"ent_coef": 0.1},
    {"vf_coef": 2.0},
    {"target_kl": 1e-3, "max_grad_norm": 1e9},
]


@SPACES
@pytest.mark.parametrize("options", PPO_OPTIONS, ids=str)
def test_ppo(env_id, options):
    wanted = {"update_epochs": 3, "num_minibatches": 2, "clip_coef": 0.03} | options
    run, batch, known = recorded(ppo, env_id, **wanted)
    args, old, gradients = run.args, parameters_of(run.agent), gradients_of(run.optimizers[0])
    torch.manual_seed(7)
    actual = run.update(batch)

    expected = {"losses/explained_variance": explained(known)}
    known.advantages = reference.standardize(known.advantages)
    parameters, adam = old, reference.Adam(0.02, args.max_grad_norm)
    clipped_sides = set()
    torch.manual_seed(7)
    for _ in range(len(gradients) // 2):
        order = torch.randperm(len(batch.obs)).numpy()
        half = -(-len(order) // 2)
        for rows in (order[:half], order[half:]):
            mb = SimpleNamespace(**{name: x[rows] for name, x in vars(known).items()})

            def parts(p, mb=mb):
                loss = reference.clipped_loss(p, mb, old, args.clip_coef)
                return loss, reference.value_loss(p, mb), mean_entropy(p, mb)

            r, last = reference.ratios(parameters, mb, old), parts(parameters)
            clipped_sides |= {*np.sign(r - 1)[abs(r - 1) > args.clip_coef]}
            parameters = adam.minimize(
                lambda p: parts(p) @ np.array([1, args.vf_coef, -args.ent_coef]), parameters
            )
    expected |= zip(("losses/policy_loss", "losses/value_loss", "losses/entropy"), last)
    expected["losses/approx_kl"] = reference.approx_kl(r)
    expected["losses/clipfrac"] = reference.clip_fraction(r, args.clip_coef)
    assert_close(actual, expected)
    assert_steps(gradients, adam)
    assert_close(parameters_of(run.agent), parameters, 1e-4)
    assert clipped_sides == {1, -1} and actual["losses/clipfrac"] > 0
    stopped = args.target_kl is not None
    assert (len(gradients) < 6) == stopped == (actual["losses/approx_kl"] > (args.target_kl or 9))


@pytest.mark.parametrize("fraction, stops", [(0.9, True), (1.1, False)])
def test_ppo_stops_once_the_kl_is_too_large(fraction, stops):
    sizes = {"num_minibatches": 4, "update_epochs": 1}
    run, batch, _ = recorded(ppo, "Scripted-v0", **sizes)
    kl = run.update(batch)["losses/approx_kl"]
    sizes["update_epochs"] = 3
    run, batch, _ = recorded(ppo, "Scripted-v0", **sizes, target_kl=fraction * kl)
    gradients = gradients_of(run.optimizers[0])
    run.update(batch)
    assert (len(gradients) == 4) == stops


@SPACES
@pytest.mark.parametrize("target_kl, cg_iterations, ent_coef", [(0.01, 3, 5.0), (0.3, 8, 0.2)])
def test_trpo(env_id, target_kl, cg_iterations, ent_coef):
    wanted = {"target_kl": target_kl, "cg_iterations": cg_iterations, "ent_coef": ent_coef}
    run, batch, known = recorded(trpo, env_id, vf_epochs=4, **wanted)
    old, critic = parameters_of(run.agent, "actor"), parameters_of(run.agent, "critic")
    adam, gradients = reference.Adam(0.01, 0.5), gradients_of(run.optimizers[0])

    def objective(p):
        return reference.surrogate(p, known, old) + ent_coef * mean_entropy(p, known)

    def divergence(p):
        policies = [reference.policy_at(p, known.obs) for p in (old, p)]
        return reference.kl(*policies).mean()

    matrix = reference.fisher(old, known.obs)
    matrix += 0.1 * np.eye(len(matrix))
    gradient = reference.derivative(objective, old)
    step = reference.trust_region_step(gradient, matrix, target_kl, cg_iterations)
    for fraction in 0.5 ** np.arange(11):
        actor = reference.unflatten(reference.flatten(old) + fraction * step, old)
        if objective(actor) > objective(old) and divergence(actor) <= target_kl:
            break
    expected = {"losses/policy_loss": reference.vpg_loss(old, known)}
    expected["losses/kl"] = divergence(actor)
    expected |= {"losses/entropy": mean_entropy(old, known), "losses/step_fraction": fraction}
    expected["losses/explained_variance"] = explained(known)
    critic, expected["losses/value_loss"] = fit_values(critic, known, run.args, adam)
    assert_close(run.update(batch), expected, 1e-4)
    assert_close(parameters_of(run.agent), actor | critic, 1e-4)
    assert_steps(gradients, adam)


@pytest.mark.parametrize("iterations", [1, 2, 6, 30])
def test_conjugate_gradients_are_the_references(iterations):
    """As many iterations as dimensions solve the system. More change nothing."""
    rng = np.random.default_rng(0)
    root, b = rng.standard_normal((6, 6)), rng.standard_normal(6)
    matrix = root @ root.T + np.eye(6)
    expected = reference.conjugate_gradient(matrix, b, iterations)
    for sign in (1, 0):
        actual = trpo.conjugate_gradient(
            torch.tensor(matrix).mv, torch.tensor(sign * b), iterations
        )
        np.testing.assert_allclose(actual, sign * expected, rtol=1e-4)


@pytest.mark.parametrize("accepted, fraction", [(0, 1.0), (1, 0.5), (3, 0.125), (4, 0.0)], ids=str)
def test_line_search_halves_until_accepted_and_else_restores(accepted, fraction):
    parameters = [nn.Parameter(torch.tensor([1.0, 2.0])), nn.Parameter(torch.tensor([[3.0]]))]
    tried = []

    def accept():
        tried.append(torch.cat([parameter.detach().flatten() for parameter in parameters]))
        return len(tried) > accepted

    step = torch.tensor([8.0, -8.0, 16.0])
    assert trpo.line_search(parameters, step, accept, max_backtracks=3) == fraction
    end = torch.cat([parameter.detach().flatten() for parameter in parameters])
    assert torch.equal(end, torch.tensor([1.0, 2.0, 3.0]) + fraction * step)
    assert torch.equal(tried[0], torch.tensor([9.0, -6.0, 19.0]))


@pytest.mark.parametrize("why", ["no gain", "too far"])
def test_trpo_keeps_the_policy_if_no_step_is_accepted(why, monkeypatch):
    run, batch, _ = recorded(trpo, "Scripted-v0")
    before = parameters_of(run.agent, "actor")
    if why == "no gain":
        solve = trpo.conjugate_gradient
        monkeypatch.setattr(trpo, "conjugate_gradient", lambda *a: -solve(*a))
    else:
        kl = trpo.kl_divergence
        monkeypatch.setattr(trpo, "kl_divergence", lambda p, q: kl(p, q) + 1)
    losses = run.update(batch)
    assert losses["losses/step_fraction"] == 0
    after = parameters_of(run.agent, "actor")
    assert all((after[name] == before[name]).all() for name in before)
