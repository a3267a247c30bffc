"""Small environments whose answers are known, and what runs the scripts in them."""

import json
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete
from gymnasium.vector import AutoresetMode

import ppo
import reinforce
import trpo
import vpg

LADDER = [reinforce, vpg, trpo, ppo]
CRITICS = [vpg, trpo, ppo]


class Scripted(gym.Env):
    """Episodes of 1 to 5 steps that terminate, truncate or both, told by seed and episode number.

    An observation names seed, episode and time. A reward tells them and the action, too.
    """

    observation_space, action_space = Box(-np.inf, np.inf, (3,)), Discrete(3)

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            self.seed, self.episode = seed, -1
        self.episode += 1
        self.time = 0
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
    """Random observations of any space, for five steps. Keeps the actions that it received."""

    def __init__(self, observation=None, action=None):
        self.observation_space = observation or Box(-1, 1, (2,))
        self.action_space = action or Discrete(2)
        self.received = []

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self.time = 0
        return self.observation_space.sample(), {}

    def step(self, action):
        self.received.append(action)
        self.time += 1
        reward = -float(np.square(np.asarray(action) + 0.3).sum())
        return self.observation_space.sample(), reward, False, self.time == 5, {}


class Batched(gym.vector.VectorEnv):
    """Environments stepped at once in NumPy. An observation is the one-hot index of a state."""

    metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}  # noqa: RUF012
    num_states = 1

    def __init__(self, num_envs):
        self.num_envs = num_envs
        self.single_observation_space = Box(0, 1, (self.num_states,), np.float32)
        self.single_action_space = Discrete(2)
        self.observation_space = gym.vector.utils.batch_space(
            self.single_observation_space, num_envs
        )
        self.action_space = gym.vector.utils.batch_space(self.single_action_space, num_envs)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time, self.ended = np.zeros(self.num_envs, int), np.zeros(self.num_envs, bool)
        self.state = self.first()
        return self.observation(), {}

    def first(self):
        return self.np_random.integers(self.num_states, size=self.num_envs)

    def observation(self):
        return np.eye(self.num_states, dtype=np.float32)[self.state]

    def advance(self, actions):
        """Rewards, terminations and truncations (N,) of a step at self.time."""
        raise NotImplementedError

    def step(self, actions):
        resets = self.ended
        rewards, terminations, truncations = self.advance(actions)
        self.time = np.where(resets, 0, self.time + 1)
        self.state = np.where(resets, self.first(), self.state)
        terminations, truncations = terminations & ~resets, truncations & ~resets
        self.ended = terminations | truncations
        return self.observation(), np.where(resets, 0.0, rewards), terminations, truncations, {}


class TimeLimit(Batched):
    """Reward 1 for ever, cut every 20 steps."""

    def advance(self, actions):
        late = self.time == 19
        return np.ones(self.num_envs), np.zeros_like(late), late


class Delay(Batched):
    """Two steps. Only the second pays, and only in the state that the observation tells."""

    num_states = 2

    def first(self):
        return np.zeros(self.num_envs, int)

    def advance(self, actions):
        late = self.time == 1
        self.state = np.ones(self.num_envs, int)
        return 1.0 * late, late, np.zeros_like(late)


class Match(Batched):
    """One step, which pays 1 if the action is the state and -1 if not."""

    num_states = 2

    def advance(self, actions):
        ends = np.ones(self.num_envs, bool)
        return np.where(actions == self.state, 1.0, -1.0), ends, ~ends


class Afterlife(Batched):
    """Environment n lasts n + 1 steps of reward 1. Its reset steps pay 1000, as all later ones."""

    num_states = 1
    lives = 0

    def reset(self, *, seed=None, options=None):
        self.lives = np.zeros(self.num_envs, int)
        return super().reset(seed=seed)

    def advance(self, actions):
        self.lives += self.ended
        ends = self.time == np.arange(self.num_envs)
        return np.where(self.lives > 0, 1000.0, 1.0), ends, np.zeros_like(ends)

    def step(self, actions):
        resets = self.ended
        obs, rewards, *rest = super().step(actions)
        return obs, np.where(resets, 1000.0, rewards), *rest


class Endless(Batched):
    """Pays 1 a step and never ends. It counts the steps of the last instance."""

    steps = 0

    def __init__(self, num_envs):
        super().__init__(num_envs)
        Endless.steps = 0

    def advance(self, actions):
        Endless.steps += 1
        return np.ones(self.num_envs), np.zeros(self.num_envs, bool), np.zeros(self.num_envs, bool)


class Reusing(gym.vector.VectorEnv):
    """Scripted-v0, but every array that it returns is overwritten by the next step."""

    metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}  # noqa: RUF012

    def __init__(self, num_envs):
        self.envs = gym.make_vec("Scripted-v0", num_envs)
        self.num_envs = num_envs
        self.single_observation_space = self.envs.single_observation_space
        self.single_action_space = self.envs.single_action_space
        self.observation_space = self.envs.observation_space
        self.action_space = self.envs.action_space

    def hand_out(self, *arrays):
        if not hasattr(self, "arrays"):
            self.arrays = [np.empty_like(x) for x in (arrays[0], np.zeros(self.num_envs))]
            self.arrays += [np.empty(self.num_envs, bool), np.empty(self.num_envs, bool)]
        for own, new in zip(self.arrays, arrays):
            own[:] = new
        return self.arrays[: len(arrays)]

    def reset(self, *, seed=None, options=None):
        obs, info = self.envs.reset(seed=seed)
        return *self.hand_out(obs), info

    def step(self, actions):
        *arrays, info = self.envs.step(actions)
        return *self.hand_out(*arrays), info


class Offset(Batched):
    """One feature tells the state and two hardly vary: a constant and a clock of large numbers."""

    num_states = 2

    def __init__(self, num_envs):
        super().__init__(num_envs)
        self.single_observation_space = Box(-np.inf, np.inf, (3,), np.float64)
        self.observation_space = gym.vector.utils.batch_space(
            self.single_observation_space, num_envs
        )
        self.clock = 0

    def observation(self):
        clock = np.full(self.num_envs, 1.7e9 + 0.02 * self.clock)
        return np.stack([self.state, np.full(self.num_envs, 7777.77), clock], -1)

    def advance(self, actions):
        self.clock += 1
        return Match.advance(self, actions)


class SameStep(Match):
    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}  # noqa: RUF012


for kind in (TimeLimit, Delay, Match, Afterlife, Endless, Reusing, Offset, SameStep):
    gym.register(f"{kind.__name__}-v0", vector_entry_point=kind)
gym.register("Scripted-v0", Scripted)
gym.register("my/Scripted-v0", Scripted)
OBSERVATIONS = {
    "Discrete": Discrete(3),
    "Image": Box(-1, 1, (2, 2, 3)),
    "Scalar": Box(-1, 1, ()),
    "Bytes": Box(0, 255, (4,), np.uint8),
    "Switches": MultiDiscrete([2, 3]),
    "Dict": Dict({"place": Box(-1, 1, (2, 2)), "room": Discrete(3)}),
}
ACTIONS = {
    "Echo": Box(-0.5, 0.25, (2, 3)),
    "Double": Box(-1, 1, (2,), np.float64),
    "FromMinusOne": Discrete(3, start=-1),
}
REFUSED = {
    "MultiDiscrete": MultiDiscrete([2, 3]),
    "MultiBinary": MultiBinary(2),
    "Integers": Box(0, 5, (2,), np.int64),
    "DictActions": Dict({"turn": Discrete(2)}),
}
for name, space in OBSERVATIONS.items():
    gym.register(f"{name}-v0", Spaces, kwargs={"observation": space})
for name, space in (ACTIONS | REFUSED).items():
    gym.register(f"{name}-v0", Spaces, kwargs={"action": space})


def arguments(script, env_id, **wanted):
    """Args of a script, by those wanted that it has."""
    known = {field.name for field in fields(script.Args)}
    return script.Args(env_id=env_id, **{name: wanted[name] for name in wanted if name in known})


def start(script, env_id, **wanted):
    """What learn makes before its loop, and collect() and estimate(rollout) for its loop."""
    args = arguments(script, env_id, **wanted)
    torch.manual_seed(args.seed)
    envs = script.make_envs(args, args.num_envs)
    agent = script.Agent(
        gym.spaces.flatdim(envs.single_observation_space),
        gym.spaces.flatdim(envs.single_action_space),
        isinstance(envs.single_action_space, Box),
        args.normalize_observations,
    )
    obs, _ = envs.reset(seed=args.seed)
    run = SimpleNamespace(args=args, envs=envs, agent=agent)
    run.optimizers = script.make_optimizers(agent, args)
    if script is reinforce:
        run.collect = lambda: script.collect_rollout(agent, envs, args)
        run.estimate = lambda rollout: script.compute_returns(agent, rollout, args)
    else:
        state = script.EnvState(obs, np.zeros(args.num_envs, bool), np.zeros(args.num_envs))
        run.collect = lambda: script.collect_rollout(agent, envs, state, args)
        run.estimate = lambda rollout: script.estimate_advantages(agent, rollout, args)
    run.update = lambda batch: script.update(agent, run.optimizers, batch, args)
    return run


def metrics(run_dir):
    """The lines of a run's record, without what tells the time."""
    rows = [json.loads(line) for line in Path(run_dir, "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        row.pop("charts/SPS", None)
    return rows


def only_run():
    """The only run folder in the working directory."""
    (run_dir,) = Path("runs").iterdir()
    return run_dir
