"""Small environments whose answers are known, and what runs the scripts in them."""

import json
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiDiscrete, flatdim
from gymnasium.vector import AutoresetMode, SyncVectorEnv

import ppo
import reinforce
import trpo
import vpg

LADDER = [reinforce, vpg, trpo, ppo]


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
        if seed is not None:
            self.observation_space.seed(seed)
        self.time = 0
        return self.observation_space.sample(), {}

    def step(self, action):
        self.received.append(action)
        self.time += 1
        reward = -float(np.square(np.asarray(action) + 0.3).sum())
        return self.observation_space.sample(), reward, False, self.time == 5, {}


class Endless(gym.Env):
    """Pays 1 a step in its only state, for ever."""

    observation_space, action_space = Box(0, 1, (1,)), Discrete(2)
    reward, left = 1.0, np.inf
    steps = 0  # of all environments

    def reset(self, *, seed=None, options=None):
        return np.ones(1, np.float32), {}

    def step(self, action):
        Endless.steps += 1
        self.left -= 1
        return np.ones(1, np.float32), self.reward, False, self.left == 0, {}


class Once(Endless):
    """The first episode has 1 to 4 steps, by the seed. Each later step pays 1000."""

    def reset(self, *, seed=None, options=None):
        self.left, self.reward = (np.inf, 1000.0) if seed is None else (seed % 4 + 1, 1.0)
        return super().reset()


def vector(num_envs, **options):
    return SyncVectorEnv([Scripted] * num_envs, **options)


OBSERVATIONS = {
    "Discrete": Discrete(3),
    "Image": Box(-1, 1, (2, 2, 3)),
    "Clock": Box(1.7e9 + np.zeros(2), 1.7e9 + np.array([100, 1e-6]), dtype=np.float64),
    "Bytes": Box(0, 255, (4,), np.uint8),
    "Switches": MultiDiscrete([2, 3]),
    "Dict": Dict({"place": Box(-1, 1, (2, 2)), "room": Discrete(3)}),
}
ACTIONS = {"Echo": Box(-0.5, 0.25, (6,)), "Double": Box(-0.5, 0.5, (2,), np.float64)}
REFUSED = {
    "FromMinusOne": Discrete(3, start=-1),
    "Grid": Box(-1, 1, (2, 3)),
    "Integers": Box(0, 5, (2,), np.int64),
    "Several": MultiDiscrete([2, 3]),
}
for kind in (Scripted, Endless, Once):
    gym.register(f"{kind.__name__}-v0", kind)
gym.register("Steady-v0", Endless, max_episode_steps=20)
gym.register("Reusing-v0", vector_entry_point=vector, kwargs={"copy": False})
same_step = {"autoreset_mode": AutoresetMode.SAME_STEP}
gym.register("SameStep-v0", vector_entry_point=vector, kwargs=same_step)
gym.register("my/Echo-v0", Spaces, kwargs={"action": ACTIONS["Echo"]})
for kind, spaces in (("observation", OBSERVATIONS), ("action", ACTIONS | REFUSED)):
    for name, space in spaces.items():
        gym.register(f"{name}-v0", Spaces, kwargs={kind: space})


def arguments(script, env_id, **wanted):
    """Args of a script, by those wanted that it has."""
    known = {field.name for field in fields(script.Args)}
    return script.Args(env_id=env_id, **{name: wanted[name] for name in wanted if name in known})


def start(script, env_id, **wanted):
    """What learn makes before its loop, with collect(), estimate(rollout) and update(batch)."""
    args = arguments(script, env_id, **wanted)
    torch.manual_seed(args.seed)
    envs = script.make_envs(args, args.num_envs)
    space = envs.single_action_space
    sizes = flatdim(envs.single_observation_space), flatdim(space)
    agent = script.Agent(*sizes, isinstance(space, Box), args.normalize_observations)
    optimizers = script.make_optimizers(agent, args)
    obs, _ = envs.reset(seed=args.seed)
    run = SimpleNamespace(args=args, envs=envs, agent=agent, optimizers=optimizers)
    run.state = obs, np.zeros(args.num_envs, bool), np.zeros(args.num_envs)

    def collect():
        rollout, *run.state = script.collect_rollout(agent, envs, *run.state, args.num_steps)
        return rollout

    run.collect = collect
    run.estimate = lambda rollout: script.estimate_advantages(agent, rollout, run.state[0], args)
    if script is reinforce:
        run.collect = lambda: script.collect_rollout(agent, envs, args)
        run.estimate = lambda rollout: script.compute_returns(agent, rollout, args)
    run.update = lambda batch: script.update(agent, optimizers, batch, args)
    return run


def metrics(run_dir):
    """The lines of a run's record."""
    return [json.loads(line) for line in Path(run_dir, "metrics.jsonl").read_text().splitlines()]


def only_run():
    """The only run folder in the working directory."""
    (run_dir,) = Path("runs").iterdir()
    return run_dir
