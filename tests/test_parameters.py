"""Nothing that can learn is forgotten."""

import copy

import pytest
import torch
from environments import LADDER, arguments, start

import ppo
import trpo


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Echo-v0"])
@pytest.mark.parametrize("script", LADDER)
def test_every_parameter_is_held_by_a_step_and_moves(script, env_id):
    args = arguments(script, env_id, num_envs=4, num_steps=32)
    agent, optimizers, batches = start(script, args)
    held = [id(parameter) for optimizer in optimizers for parameter in optimizer.weights]
    if script is trpo:  # its natural-gradient step holds the policy
        held += map(id, agent.actor.parameters())
    assert sorted(held) == sorted(map(id, agent.parameters()))
    names = dict(agent.named_parameters())
    deviations = [name for name in names if name.endswith("log_std")]
    assert len(deviations) == (env_id == "Echo-v0")
    before = copy.deepcopy(agent.state_dict())
    script.update(agent, optimizers, next(batches), args)
    still = [name for name in names if torch.equal(names[name], before[name])]
    assert not still
    assert all(names[name].ne(before[name]).all() for name in deviations)


@pytest.mark.parametrize("max_grad_norm", [0.1, 100.0])
def test_adam_is_torchs(max_grad_norm):
    """Each step gives the parameters and the norm that torch.optim's clipped Adam gives."""
    args = ppo.Args(max_grad_norm=max_grad_norm)
    network = ppo.mlp(3, 2, 1.0)
    other = copy.deepcopy(network)
    adam = ppo.Adam(network, 1e-2)
    reference = torch.optim.Adam(other.parameters(), 1e-2, eps=1e-5)
    for _ in range(20):
        adam.learning_rate = reference.param_groups[0]["lr"] = reference.param_groups[0]["lr"] * 0.9
        inputs, targets = torch.randn(8, 3), torch.randn(8, 2)
        norm = adam.step(adam.gradient((network(inputs) - targets).square().mean()), args)
        reference.zero_grad()
        (other(inputs) - targets).square().mean().backward()
        expected = torch.nn.utils.clip_grad_norm_(other.parameters(), max_grad_norm)
        reference.step()
        torch.testing.assert_close(norm, expected)
        for one, two in zip(network.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)
