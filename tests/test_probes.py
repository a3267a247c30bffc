"""Each ability alone: if one is missing, its probe fails in a second and says which."""

import pytest
import torch
from environments import CRITICS, LADDER, PROBES, arguments, start

ABLE = {"num_envs": 32, "num_steps": 8, "gamma": 0.9, "learning_rate": 1e-2}
ABLE |= {"vf_learning_rate": 1e-2, "ent_coef": 0.0, "target_kl": None}
TIME = {"num_envs": 4, "num_steps": 42}  # two episodes and their resets


def learn(script, probe, updates, change=lambda batch: batch, **wanted):
    """The agent after some updates, and all states as it observes them."""
    args = arguments(script, f"{probe}-v0", **ABLE | wanted)
    args.target_kl = 0.01  # TRPO's bound; PPO would stop its epochs early
    agent, optimizers, batches = start(script, args)
    for _, batch in zip(range(updates), batches, strict=False):
        script.update(agent, optimizers, change(batch), args)
    return agent, torch.eye(len(PROBES[probe]["start"]))


values_of = pytest.mark.parametrize("script", CRITICS)
policies_of = pytest.mark.parametrize("script", LADDER)


@values_of
@pytest.mark.parametrize(
    "probe, values", [("Constant", [1.0]), ("ByObservation", [-1.0, 1.0]), ("Delay", [0.9, 1.0])]
)
def test_the_value_is_learned(script, probe, values):
    agent, states = learn(script, probe, 40)
    with torch.no_grad():
        torch.testing.assert_close(agent.value(states), torch.tensor(values), rtol=0, atol=0.05)


@policies_of
@pytest.mark.parametrize("probe, best", [("ByAction", [1]), ("ByBoth", [1, 0])])
def test_the_policy_is_learned(script, probe, best):
    agent, states = learn(script, probe, 40)
    chances = agent.policy(states).probs[range(len(best)), best]
    assert (chances > 0.9).all()


@values_of
def test_a_time_limit_is_not_death(script):
    """Reward 1 for ever is worth 1 / (1 - gamma) = 10, though an episode lasts 20 steps."""
    agent, state = learn(script, "TimeLimit", 40, **TIME)
    assert agent.value(state).item() == pytest.approx(10, abs=0.3)


@values_of
def test_the_probe_tells_a_time_limit_from_death(script):
    """CleanRL's treatment ends at the mean of the sums of 1 to 20 discounted rewards: 6 or so."""

    def death(batch):
        return batch._replace(terminations=batch.terminations | batch.truncations)

    agent, state = learn(script, "TimeLimit", 40, death, **TIME)
    assert agent.value(state).item() < 8
