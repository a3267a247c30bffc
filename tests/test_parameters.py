"""Nothing that can learn is forgotten."""

import copy

import pytest
import torch
from environments import LADDER, arguments, start

import trpo


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Echo-v0"])
@pytest.mark.parametrize("script", LADDER)
def test_every_parameter_is_held_by_a_step_and_moves(script, env_id):
    args = arguments(script, env_id, num_envs=4, num_steps=32)
    agent, optimizers, batches = start(script, args)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    held = [id(parameter) for group in groups for parameter in group["params"]]
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
