"""One update of each script is its paper's, to float32 rounding: metrics, gradients, parameters."""

import copy

import numpy as np
import pytest
import reference
import torch
from environments import start
from scipy.sparse.linalg import cg
from torch import nn

import ppo
import reinforce
import trpo
import vpg

SPACES = pytest.mark.parametrize("env_id", ["Scripted-v0", "Echo-v0"])
SETTINGS = {"num_envs": 4, "num_steps": 16, "seed": 5, "normalize_observations": True}
SETTINGS |= {"learning_rate": 0.02, "vf_learning_rate": 0.01, "vf_epochs": 4}


def small_mlp(num_inputs, num_outputs):
    """Few enough parameters for central differences, and outputs that are not near 0."""
    hidden = nn.Linear(num_inputs, 4), nn.Tanh(), nn.Linear(4, 3), nn.Tanh()
    return nn.Sequential(*hidden, nn.Linear(3, num_outputs))


def recorded(script, env_id, **wanted):
    """A run with its second batch, and that batch and the parameters as the reference takes them.

    Observations are scaled by statistics of the first batch. Advantages are standardized.
    run.weights are those of the steps in the policy gradient.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "mlp", small_mlp)
        run = start(script, env_id, **SETTINGS, **wanted)
    seen = run.estimate(run.collect()).obs
    run.agent.obs_stats.update(seen)
    run.batch = run.estimate(run.collect())
    columns = (x.double() if x.is_floating_point() else x for x in run.batch)
    known = script.Batch(*(x.numpy() for x in columns))
    known = known._replace(obs=reference.scale_observations(known.obs, seen.double().numpy()))
    if script is reinforce:
        run.weights = known.returns / 4  # the mean over episodes
    else:
        a = known.advantages
        known = known._replace(advantages=(a - a.mean()) / (np.std(a, ddof=1) + 0.1))
        run.weights = known.advantages / len(a)
    named = run.agent.named_parameters()
    return run, known, {name: x.detach().numpy().astype(float) for name, x in named}


def assert_close(actual, expected, tolerance):
    """An error is relative to the largest entry, or to a step of Adam."""
    scale = max(np.abs(expected).max(), 0.02)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * scale)


def check(run, metrics, parameters, *adams, tolerance=5e-5):
    """One update gives these metrics and parameters, and each optimizer's last clipped gradient."""
    torch.manual_seed(7)
    actual = run.update(run.batch)
    assert actual.keys() == metrics.keys()
    assert all(len(x.state) == len(x.param_groups[0]["params"]) for x in run.optimizers)
    for name, expected in metrics.items():
        assert_close(actual[name], expected, tolerance)
    actual = [*run.agent.parameters()]
    for x, expected in zip(actual, parameters.values(), strict=True):
        assert_close(x.detach().numpy(), expected, tolerance)
    gradients = [torch.zeros_like(x) if x.grad is None else x.grad for x in actual]
    actual = nn.utils.parameters_to_vector(gradients).numpy()
    # The reference's gradient is exactly 0 for what an optimizer does not have.
    for adam in adams:
        learns = adam.gradients[-1] != 0
        assert_close(actual[learns], adam.gradients[-1][learns], 1e-4)
    assert not actual[sum(adam.gradients[-1] for adam in adams) == 0].any()


@SPACES
@pytest.mark.parametrize("max_grad_norm", [0.05, 1e9])
@pytest.mark.parametrize(
    "script, ent_coef", [(reinforce, 0.0), (vpg, 0.2)], ids=["reinforce", "vpg"]
)
def test_reinforce_and_vpg(script, ent_coef, max_grad_norm, env_id):
    options = {"max_grad_norm": max_grad_norm, "ent_coef": ent_coef}
    run, known, parameters = recorded(script, env_id, **options)
    adams = [reference.Adam(rate, max_grad_norm) for rate in (0.02, 0.01)[: len(run.optimizers)]]
    objective = known, run.weights
    for _ in range(2):
        expected = {
            "losses/policy_loss": reference.score_loss(parameters, *objective),
            "losses/entropy": reference.entropy(parameters, known),
        }
        parameters = adams[0].minimize(reference.score_loss, parameters, *objective, ent_coef)
        for _ in range(4 if script is vpg else 0):
            expected["losses/value_loss"] = reference.value_loss(parameters, known)
            parameters = adams[1].minimize(reference.value_loss, parameters, known)
        check(run, expected, parameters, *adams)


@SPACES
@pytest.mark.parametrize(
    "options, fraction",
    [
        ({}, None),
        ({"ent_coef": 0.1}, None),
        ({"vf_coef": 2.0, "num_minibatches": 3, "update_epochs": 2}, None),
        ({"max_grad_norm": 1e9}, 0.9),
        ({"max_grad_norm": 1e9}, 1.1),
    ],
    ids=str,
)
def test_ppo(env_id, options, fraction):
    """target_kl is None, or a fraction of the divergence after the first epoch."""
    options = {"update_epochs": 3, "num_minibatches": 2} | options
    run, known, parameters = recorded(ppo, env_id, clip_coef=0.03, **options)
    args, old, clipped_sides = run.args, parameters, set()
    adam = reference.Adam(0.02, args.max_grad_norm)
    torch.manual_seed(7)
    for _ in range(args.update_epochs):
        for rows in np.array_split(torch.randperm(len(known.obs)), args.num_minibatches):
            before, mb = parameters, ppo.Batch(*(x[rows] for x in known))
            objective = mb, old, args.ent_coef, 0.03, args.vf_coef
            parameters = adam.minimize(reference.ppo_loss, before, *objective)
            r = reference.ratios(before, mb, old)
            clipped_sides |= {*np.sign(r - 1)[abs(r - 1) > 0.03]}
        approx_kl = np.mean((r - 1) - np.log(r))  # Schulman's estimator of KL(pi_old, pi)
        if fraction and args.target_kl is None:
            args.target_kl = fraction * approx_kl
        if fraction and approx_kl > args.target_kl:
            break
    expected = {
        "losses/policy_loss": reference.surrogate_loss(before, mb, old, 0.0, 0.03),
        "losses/value_loss": reference.value_loss(before, mb),
        "losses/entropy": reference.entropy(before, mb),
        "losses/approx_kl": approx_kl,
        "losses/clipfrac": np.mean(abs(r - 1) > 0.03),
    }
    check(run, expected, parameters, adam)
    assert clipped_sides == {1, -1} and expected["losses/clipfrac"] > 0


@SPACES
@pytest.mark.parametrize("target_kl, cg_iterations, ent_coef", [(0.01, 3, 5.0), (0.3, 8, 0.2)])
def test_trpo(env_id, target_kl, cg_iterations, ent_coef):
    wanted = {"target_kl": target_kl, "cg_iterations": cg_iterations, "ent_coef": ent_coef}
    run, known, parameters = recorded(trpo, env_id, **wanted)
    old = {name: x for name, x in parameters.items() if name.startswith("actor")}
    # The Fisher matrix is the second derivative of the KL.
    matrix = reference.derivative(lambda p: reference.derivative(reference.kl, p, known, old), old)
    matrix += 0.1 * np.eye(len(matrix))
    objective = known, old, ent_coef
    gradient = reference.derivative(reference.surrogate_loss, old, *objective)
    direction, _ = cg(matrix, -gradient, rtol=0, atol=1e-12, maxiter=cg_iterations)
    step = direction * np.sqrt(target_kl / (0.5 * direction @ matrix @ direction))
    old_loss = reference.surrogate_loss(old, *objective)
    for fraction in 0.5 ** np.arange(11):
        actor = reference.moved(old, fraction * step)
        kl = reference.kl(actor, known, old)
        if reference.surrogate_loss(actor, *objective) < old_loss and kl <= target_kl:
            break

    parameters |= actor
    adam = reference.Adam(0.01, 0.5)
    expected = {
        "losses/policy_loss": reference.score_loss(old, known, run.weights),
        "losses/entropy": reference.entropy(old, known),
        "losses/kl": kl,
        "losses/step_fraction": fraction,
    }
    for _ in range(4):
        expected["losses/value_loss"] = reference.value_loss(parameters, known)
        parameters = adam.minimize(reference.value_loss, parameters, known)
    check(run, expected, parameters, adam, tolerance=1e-4)


@pytest.mark.parametrize(
    "name, wrong",
    [("conjugate_gradient", lambda x: -x), ("kl_divergence", lambda kl: kl + 1)],
    ids=["no gain", "too far"],
)
def test_trpo_keeps_the_policy_if_no_step_is_accepted(name, wrong, monkeypatch):
    run, _, _ = recorded(trpo, "Scripted-v0")
    before, right = copy.deepcopy(run.agent.actor.state_dict()), getattr(trpo, name)
    monkeypatch.setattr(trpo, name, lambda *args: wrong(right(*args)))
    assert run.update(run.batch)["losses/step_fraction"] == 0
    torch.testing.assert_close(run.agent.actor.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("iterations", [1, 2, 6, 30])
def test_conjugate_gradients_are_scipys(iterations):
    """As many iterations as dimensions solve the system. More change nothing."""
    rng = np.random.default_rng(0)
    matrix, b = np.cov(rng.standard_normal((6, 20))), rng.standard_normal(6)
    expected, _ = cg(matrix, b, rtol=0, atol=1e-12, maxiter=iterations)
    for sign in (1, 0):
        right = torch.tensor(sign * b)
        actual = trpo.conjugate_gradient(torch.tensor(matrix).mv, right, iterations)
        np.testing.assert_allclose(actual, sign * expected, rtol=1e-4)


@pytest.mark.parametrize("accepted, fraction", [(0, 1.0), (1, 0.5), (3, 0.125), (4, 0.0)], ids=str)
def test_line_search_halves_until_accepted_and_else_restores(accepted, fraction):
    parameters = [nn.Parameter(torch.tensor([1.0, 2.0])), nn.Parameter(torch.tensor([[3.0]]))]
    step, answers = torch.tensor([8.0, -8.0, 16.0]), iter([False] * accepted + [True])
    assert trpo.line_search(parameters, step, lambda: next(answers), max_backtracks=3) == fraction
    end = nn.utils.parameters_to_vector(parameters)
    assert torch.equal(end, torch.tensor([1.0, 2.0, 3.0]) + fraction * step)
