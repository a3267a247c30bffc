"""Tiny environments whose answers are known, and what runs the scripts in them."""

import csv
from dataclasses import fields
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiDiscrete, Sequence
from gymnasium.wrappers.vector import RecordEpisodeStatistics

import ppo
import reinforce
import trpo
import vpg

LADDER = [reinforce, vpg, trpo, ppo]
CRITICS = [vpg, trpo, ppo]


class Tabular(gym.vector.VectorEnv):
    """num_envs copies of a finite MDP, observed as one-hot states and stepped at once in NumPy.

    start (S,) and transitions (S, A, S) are probabilities, rewards (S, A) means: noise is added to
    or taken from each. An episode ends after horizon steps, sooner with probability stop a step.
    """

    metadata = {"autoreset_mode": gym.vector.AutoresetMode.NEXT_STEP}  # noqa: RUF012

    def __init__(
        self, num_envs, start, transitions, rewards, horizon, noise=0.0, stop=0.0, truncates=False
    ):
        self.num_envs, self.horizon, self.truncates = num_envs, horizon, truncates
        self.noise, self.stop = noise, stop
        self.start, self.transitions, self.rewards = map(np.asarray, (start, transitions, rewards))
        self.num_states, self.num_actions = self.rewards.shape
        self.single_observation_space = Box(0, 1, (self.num_states,), np.float32)
        self.single_action_space = Discrete(self.num_actions)
        self.observation_space = gym.vector.utils.batch_space(
            self.single_observation_space, num_envs
        )
        self.action_space = gym.vector.utils.batch_space(self.single_action_space, num_envs)

    def draw(self, probabilities):
        samples = self.np_random.random((self.num_envs, 1))
        return (samples > probabilities.cumsum(-1)[..., :-1]).sum(-1)

    def observation(self):
        return np.eye(self.num_states, dtype=np.float32)[self.state]

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time, self.ended = np.zeros(self.num_envs, int), np.zeros(self.num_envs, bool)
        self.state = self.draw(self.start)
        return self.observation(), {}

    def step(self, actions):
        resets = self.ended
        signs = self.np_random.choice((-1.0, 1.0), self.num_envs)
        rewards = np.where(resets, 0.0, self.rewards[self.state, actions] + self.noise * signs)
        successors = self.draw(self.transitions[self.state, actions])
        self.state = np.where(resets, self.draw(self.start), successors)
        self.time = np.where(resets, 0, self.time + 1)
        stopped = (self.np_random.random(self.num_envs) < self.stop) & ~resets
        late = self.time == self.horizon
        terminations, truncations = stopped | (late & (not self.truncates)), late & self.truncates
        self.ended = terminations | truncations
        return self.observation(), rewards, terminations, truncations, {}


class SameStep(Tabular):
    metadata = {"autoreset_mode": gym.vector.AutoresetMode.SAME_STEP}  # noqa: RUF012


def layered(horizon=3, width=3, num_actions=2):
    """A random MDP in which a state also tells the time, so that a table holds V exactly."""
    rng, num_states = np.random.default_rng(3), horizon * width
    start, transitions = np.zeros(num_states), np.zeros((num_states, num_actions, num_states))
    start[:width] = rng.dirichlet(np.ones(width))
    for state in range(num_states):
        after = (state // width + 1) % horizon * width
        transitions[state, :, after : after + width] = rng.dirichlet(
            np.full(width, 0.3), num_actions
        )
    rewards = rng.normal(0.5, 1.5, (num_states, num_actions))
    return {"start": start, "transitions": transitions, "rewards": rewards, "horizon": horizon}


class Scripted(gym.Env):
    """Episodes of 1 to 5 steps that terminate, truncate or both, told by seed and episode number.

    An observation names seed, episode and time; a reward tells them and the action, too.
    """

    observation_space, action_space = Box(-np.inf, np.inf, (3,)), Discrete(3)
    episode = -1

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            self.seed, self.episode = seed, -1
        self.episode, self.time = self.episode + 1, 0
        return self.observation(), {}

    def observation(self):
        return np.array([self.seed, self.episode, self.time], np.float32)

    def step(self, action):
        reward = 0.25 * self.seed - 0.5 * self.episode + self.time + 2.0 * action
        self.time += 1
        ends = self.time > (3 * self.seed + 2 * self.episode) % 5
        kind = (self.seed + self.episode) % 3
        return self.observation(), reward, ends and kind != 1, ends and kind != 0, {}


class Spaces(gym.Env):
    """Random observations of any space, for five steps; any actions."""

    def __init__(self, observation=None, action=None):
        self.observation_space = observation or Box(-1, 1, (2,))
        self.action_space = action or Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self.time = 0
        return self.observation_space.sample(), {}

    def step(self, action):
        self.time += 1
        return self.observation_space.sample(), 1.0, False, self.time == 5, {}


class Echo(Spaces):
    """Shows the action that it received; it likes the first half of what lies in its bounds."""

    def __init__(self):
        super().__init__(Box(-np.inf, np.inf, (2, 3)), Box(-0.5, 0.25, (2, 3)))

    def step(self, action):
        _, _, *ends = super().step(action)
        return action, float(-np.square(action + 0.3).sum()), *ends


PROBES = {
    "Constant": {"start": [1], "rewards": [[1.0, 1.0]], "horizon": 1},
    "ByObservation": {"start": [0.5, 0.5], "rewards": [[-1.0, -1.0], [1.0, 1.0]], "horizon": 1},
    "Delay": {"start": [1, 0], "rewards": [[0.0, 0.0], [1.0, 1.0]], "horizon": 2},
    "ByAction": {"start": [1], "rewards": [[-1.0, 1.0]], "horizon": 1},
    "ByBoth": {"start": [0.5, 0.5], "rewards": [[-1.0, 1.0], [1.0, -1.0]], "horizon": 1},
    "TimeLimit": {"start": [1], "rewards": [[1.0, 1.0]], "horizon": 20, "truncates": True},
}
for name, probe in PROBES.items():  # from each state to the last
    transitions = np.eye(len(probe["start"]))[[[-1, -1]] * len(probe["start"])]
    gym.register(
        f"{name}-v0", vector_entry_point=Tabular, kwargs=probe | {"transitions": transitions}
    )
MDP = layered() | {"noise": 0.5}
gym.register("Layered-v0", vector_entry_point=Tabular, kwargs=MDP)
gym.register("Stopping-v0", vector_entry_point=Tabular, kwargs=MDP | {"stop": 0.3})
gym.register("SameStep-v0", vector_entry_point=SameStep, kwargs=MDP)
gym.register("Scripted-v0", Scripted)
gym.register("my/Scripted-v0", Scripted)
gym.register("Echo-v0", Echo)
OBSERVATIONS = {
    "Discrete": Discrete(3),
    "Image": Box(-1, 1, (2, 2, 3)),
    "Scalar": Box(-1, 1, ()),
    "Bytes": Box(0, 255, (4,), np.uint8),
    "Dict": Dict({"place": Box(-1, 1, (2, 2)), "room": Discrete(3)}),
}
REFUSED = {
    "MultiDiscrete": {"action": MultiDiscrete([2, 3])},
    "DictActions": {"action": Dict({"turn": Discrete(2)})},
    "FromOne": {"action": Discrete(2, start=1)},
    "Sequence": {"observation": Sequence(Discrete(2))},
}
for name, space in OBSERVATIONS.items():
    gym.register(f"{name}-v0", Spaces, kwargs={"observation": space})
for name, spaces in REFUSED.items():
    gym.register(f"{name}-v0", Spaces, kwargs=spaces)


def arguments(script, env_id, **wanted):
    """Args of a script, by those wanted that it has."""
    known = {field.name for field in fields(script.Args)}
    return script.Args(env_id, **{name: wanted[name] for name in wanted if name in known})


def start(script, args):
    """An agent, its optimizers and its rollouts, as in train."""
    torch.manual_seed(args.seed)
    envs = RecordEpisodeStatistics(script.make_envs(args, args.num_envs))
    agent = script.Agent(envs, args)
    batches = script.rollouts(agent, envs, args, args.seed)
    return agent, script.make_optimizers(agent, args), batches


class Watcher(ppo.Adam):
    """Keeps the gradient of the last step, which it does not take."""

    def step(self, gradient, args):
        self.last = gradient
        return gradient.norm()


def watchers(agent):
    """One of the actor and one of the critic, if there is one."""
    parts = [agent.actor, agent.critic] if hasattr(agent, "critic") else [agent.actor]
    return [Watcher(part, 0.0) for part in parts]


def metrics(folder):
    """The rows of the only run under a folder, without the column that tells the time."""
    (path,) = Path(folder).glob("runs/*/metrics.csv")
    with open(path) as file:
        rows = [{name: float(row[name]) for name in row} for row in csv.DictReader(file)]
    for row in rows:
        del row["charts/SPS"]
    return rows
