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
    assert ("actor.log_std" in names) == (env_id == "Echo-v0")
    before = copy.deepcopy(agent.state_dict())
    script.update(agent, optimizers, next(batches), args)
    still = [name for name in names if torch.equal(names[name], before[name])]
    assert not still
    if "actor.log_std" in names:
        assert names["actor.log_std"].ne(before["actor.log_std"]).all()
