"""One update of each script is its paper's, to float32 rounding: metrics, gradients, parameters."""

import numpy as np
import pytest
import reference
import torch
from environments import LADDER, start
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


@pytest.fixture(autouse=True)
def small_networks(monkeypatch):
    for script in LADDER:
        monkeypatch.setattr(script, "mlp", small_mlp)


def recorded(script, env_id, **wanted):
    """A run with its second batch, and that batch as the reference takes it.

    Observations are scaled by statistics of the first one.
    """
    run = start(script, env_id, **SETTINGS | wanted)
    seen = run.estimate(run.collect()).obs
    run.agent.obs_stats.update(seen)
    run.batch = run.estimate(run.collect())
    columns = (x.double() if x.is_floating_point() else x for x in run.batch)
    known = script.Batch(*(x.numpy() for x in columns))
    scaled = reference.scale_observations(known.obs, seen.double().numpy())
    return run, known._replace(obs=scaled)


def parameters_of(module, prefix=""):
    named = module.named_parameters()
    return {n: p.detach().numpy().astype(float) for n, p in named if n.startswith(prefix)}


def assert_close(actual, expected, tolerance=5e-5):
    """Dicts of arrays. An error is relative to the largest entry, or to a step of Adam."""
    assert actual.keys() == expected.keys()
    for name, x in expected.items():
        scale = max(np.abs(x).max(), 0.02)
        np.testing.assert_allclose(actual[name], x, rtol=0, atol=tolerance * scale, err_msg=name)


def assert_gradients(run, *adams):
    """The clipped gradients of each optimizer's last step are those of the reference."""
    for optimizer, adam in zip(run.optimizers, adams, strict=True):
        parts = [parameter.grad.flatten() for parameter in optimizer.param_groups[0]["params"]]
        assert_close({"gradient": torch.cat(parts).numpy()}, {"gradient": adam.gradient}, 1e-4)


@SPACES
@pytest.mark.parametrize("max_grad_norm", [0.3, 1e9])
def test_reinforce(env_id, max_grad_norm):
    run, known = recorded(reinforce, env_id, max_grad_norm=max_grad_norm)
    parameters = parameters_of(run.agent)
    adam = reference.Adam(0.02, max_grad_norm)
    for _ in range(2):
        expected = {"losses/policy_loss": reference.reinforce_loss(parameters, known, 4)}
        expected["losses/entropy"] = reference.entropy(parameters, known)
        parameters = adam.minimize(reference.reinforce_loss, parameters, known, 4)
        assert_close(run.update(run.batch), expected)
        assert_close(parameters_of(run.agent), parameters)
        assert_gradients(run, adam)


def critic_and_metrics(critic, actor, batch, adam):
    """The critic after four steps, and the metrics that VPG and TRPO share."""
    for _ in range(4):
        loss = reference.value_loss(critic, batch)
        critic = adam.minimize(reference.value_loss, critic, batch)
    return critic, {
        "losses/policy_loss": reference.vpg_loss(actor, batch),
        "losses/value_loss": loss,
        "losses/entropy": reference.entropy(actor, batch),
        "losses/explained_variance": reference.explained_variance(batch),
    }


@SPACES
@pytest.mark.parametrize("max_grad_norm", [0.05, 1e9])
def test_vpg(env_id, max_grad_norm):
    run, known = recorded(vpg, env_id, max_grad_norm=max_grad_norm, ent_coef=0.2)
    actor, critic = parameters_of(run.agent, "actor"), parameters_of(run.agent, "critic")
    adams = [reference.Adam(rate, max_grad_norm) for rate in (0.02, 0.01)]
    for _ in range(2):
        critic, expected = critic_and_metrics(critic, actor, known, adams[1])
        actor = adams[0].minimize(reference.vpg_loss, actor, known, 0.2)
        assert_close(run.update(run.batch), expected)
        assert_close(parameters_of(run.agent), actor | critic)
        assert_gradients(run, *adams)


@SPACES
@pytest.mark.parametrize(
    "options",
    [{}, {"ent_coef": 0.1}, {"vf_coef": 2.0}, {"target_kl": 1e-3, "max_grad_norm": 1e9}],
    ids=str,
)
def test_ppo(env_id, options):
    sizes = {"update_epochs": 3, "num_minibatches": 2}
    run, known = recorded(ppo, env_id, clip_coef=0.03, **sizes, **options)
    args = run.args
    parameters = old = parameters_of(run.agent)
    torch.manual_seed(7)
    actual = run.update(run.batch)

    expected = {"losses/explained_variance": reference.explained_variance(known)}
    known = known._replace(advantages=reference.standardize(known.advantages))
    adam = reference.Adam(0.02, args.max_grad_norm)
    weights = args.vf_coef, args.ent_coef
    clipped_sides = set()
    torch.manual_seed(7)
    for _ in range(3):
        for rows in np.array_split(torch.randperm(len(known.obs)).numpy(), 2):
            before = parameters
            mb = ppo.Batch(*(x[rows] for x in known))
            parameters = adam.minimize(reference.ppo_loss, before, mb, old, 0.03, *weights)
            r = reference.ratios(before, mb, old)
            clipped_sides |= {*np.sign(r - 1)[abs(r - 1) > 0.03]}
        approx_kl = np.mean((r - 1) - np.log(r))  # Schulman's estimator of KL(pi_old, pi)
        if approx_kl > (args.target_kl or np.inf):
            break
    expected["losses/policy_loss"] = reference.clipped_loss(before, mb, old, 0.03)
    expected["losses/value_loss"] = reference.value_loss(before, mb)
    expected["losses/entropy"] = reference.entropy(before, mb)
    expected["losses/approx_kl"] = approx_kl
    expected["losses/clipfrac"] = np.mean(abs(r - 1) > 0.03)
    assert_close(actual, expected)
    assert_gradients(run, adam)
    assert_close(parameters_of(run.agent), parameters, 1e-4)
    assert clipped_sides == {1, -1} and actual["losses/clipfrac"] > 0
    assert (adam.t < 6) == (args.target_kl is not None)


@pytest.mark.parametrize("fraction, stops", [(0.9, True), (1.1, False)])
def test_ppo_stops_once_the_kl_is_too_large(fraction, stops):
    sizes = {"num_minibatches": 4, "update_epochs": 1}
    run, _ = recorded(ppo, "Scripted-v0", **sizes)
    kl = run.update(run.batch)["losses/approx_kl"]
    sizes["update_epochs"] = 3
    run, _ = recorded(ppo, "Scripted-v0", **sizes, target_kl=fraction * kl)
    run.update(run.batch)
    steps = next(iter(run.optimizers[0].state.values()))["step"]
    assert (steps == 4) == stops


@SPACES
@pytest.mark.parametrize("target_kl, cg_iterations, ent_coef", [(0.01, 3, 5.0), (0.3, 8, 0.2)])
def test_trpo(env_id, target_kl, cg_iterations, ent_coef):
    wanted = {"target_kl": target_kl, "cg_iterations": cg_iterations, "ent_coef": ent_coef}
    run, known = recorded(trpo, env_id, **wanted)
    old, critic = parameters_of(run.agent, "actor"), parameters_of(run.agent, "critic")
    adam = reference.Adam(0.01, 0.5)

    matrix = reference.fisher(old, known.obs)
    matrix += 0.1 * np.eye(len(matrix))
    objective = known, old, ent_coef
    gradient = reference.derivative(reference.surrogate, old, *objective)
    step = reference.trust_region_step(gradient, matrix, target_kl, cg_iterations)
    for fraction in 0.5 ** np.arange(11):
        actor = reference.unflatten(reference.flatten(old) + fraction * step, old)
        gain = reference.surrogate(actor, *objective) - reference.surrogate(old, *objective)
        kl = reference.kl(old, actor, known)
        if gain > 0 and kl <= target_kl:
            break
    critic, expected = critic_and_metrics(critic, old, known, adam)
    expected |= {"losses/kl": kl, "losses/step_fraction": fraction}
    assert_close(run.update(run.batch), expected, 1e-4)
    assert_close(parameters_of(run.agent), actor | critic, 1e-4)
    assert_gradients(run, adam)


@pytest.mark.parametrize("iterations", [1, 2, 6, 30])
def test_conjugate_gradients_are_scipys(iterations):
    """As many iterations as dimensions solve the system. More change nothing."""
    rng = np.random.default_rng(0)
    root, b = rng.standard_normal((6, 6)), rng.standard_normal(6)
    matrix = root @ root.T + np.eye(6)
    multiply = torch.tensor(matrix).mv
    expected, _ = cg(matrix, b, rtol=0, atol=1e-12, maxiter=iterations)
    for sign in (1, 0):
        actual = trpo.conjugate_gradient(multiply, torch.tensor(sign * b), iterations)
        np.testing.assert_allclose(actual, sign * expected, rtol=1e-4)


@pytest.mark.parametrize("accepted, fraction", [(0, 1.0), (1, 0.5), (3, 0.125), (4, 0.0)], ids=str)
def test_line_search_halves_until_accepted_and_else_restores(accepted, fraction):
    parameters = [nn.Parameter(torch.tensor([1.0, 2.0])), nn.Parameter(torch.tensor([[3.0]]))]
    step, answers = torch.tensor([8.0, -8.0, 16.0]), iter([False] * accepted + [True])
    assert trpo.line_search(parameters, step, lambda: next(answers), max_backtracks=3) == fraction
    end = nn.utils.parameters_to_vector(parameters)
    assert torch.equal(end, torch.tensor([1.0, 2.0, 3.0]) + fraction * step)


@pytest.mark.parametrize(
    "name, wrong",
    [("conjugate_gradient", lambda x: -x), ("kl_divergence", lambda kl: kl + 1)],
    ids=["no gain", "too far"],
)
def test_trpo_keeps_the_policy_if_no_step_is_accepted(name, wrong, monkeypatch):
    run, _ = recorded(trpo, "Scripted-v0")
    before, right = parameters_of(run.agent, "actor"), getattr(trpo, name)
    monkeypatch.setattr(trpo, name, lambda *args: wrong(right(*args)))
    assert run.update(run.batch)["losses/step_fraction"] == 0
    np.testing.assert_equal(parameters_of(run.agent, "actor"), before)
