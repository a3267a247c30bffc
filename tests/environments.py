"""Small environments whose answers are known, and what runs the scripts in them."""

import json
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiDiscrete
from gymnasium.vector import AutoresetMode, SyncVectorEnv

import ppo
import reinforce
import trpo
import vpg

LADDER = [reinforce, vpg, trpo, ppo]
CRITICS = [vpg, trpo, ppo]
LEARNERS = [reinforce, vpg]  # the others' learn has vpg's text, as test_ladder.py checks


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


class Steady(gym.Env):
    """Pays 1 a step in its only state, until a time limit."""

    observation_space, action_space, limit, steps = Box(0, 1, (1,)), Discrete(2), 20, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time = 0
        return np.ones(1, np.float32), {}

    def step(self, action):
        Steady.steps += 1
        self.time += 1
        return np.ones(1, np.float32), 1.0, False, self.time == self.limit, {}


class Endless(Steady):
    limit = np.inf


class Once(Steady):
    """The first episode has 1 to 4 steps, by the seed. Each later step pays 1000."""

    def reset(self, *, seed=None, options=None):
        self.limit, self.reward = (seed % 4 + 1, 1.0) if seed is not None else (20, 1000.0)
        return super().reset(seed=seed)

    def step(self, action):
        obs, _, terminated, truncated, info = super().step(action)
        return obs, self.reward, terminated, truncated, info


class Match(gym.Env):
    """One step, which pays 1 if the action is the state and -1 if not.

    Two more features hardly vary: a constant and a clock of large numbers.
    """

    observation_space, action_space = Box(-np.inf, np.inf, (3,), np.float64), Discrete(2)
    clock = 0

    def observation(self):
        self.clock += 1
        return np.array([self.state, 7777.77, 1.7e9 + 0.02 * self.clock])

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state = self.np_random.integers(2)
        return self.observation(), {}

    def step(self, action):
        return self.observation(), 1.0 if action == self.state else -1.0, True, False, {}


def reusing(num_envs):
    """Environments that write each observation over the one before."""
    return SyncVectorEnv([Scripted] * num_envs, copy=False)


def same_step(num_envs):
    return SyncVectorEnv([Scripted] * num_envs, autoreset_mode=AutoresetMode.SAME_STEP)


for kind in (Scripted, Steady, Endless, Once, Match):
    gym.register(f"{kind.__name__}-v0", kind)
gym.register("my/Scripted-v0", Scripted)
gym.register("Reusing-v0", vector_entry_point=reusing)
gym.register("SameStep-v0", vector_entry_point=same_step)
OBSERVATIONS = {
    "Discrete": Discrete(3),
    "Image": Box(-1, 1, (2, 2, 3)),
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
for name, space in OBSERVATIONS.items():
    gym.register(f"{name}-v0", Spaces, kwargs={"observation": space})
for name, space in (ACTIONS | REFUSED).items():
    gym.register(f"{name}-v0", Spaces, kwargs={"action": space})


def arguments(script, env_id, **wanted):
    """Args of a script, by those wanted that it has."""
    known = {field.name for field in fields(script.Args)}
    return script.Args(env_id=env_id, **{name: wanted[name] for name in wanted if name in known})


def start(script, env_id, **wanted):
    """What learn makes before its loop, with collect(), estimate(rollout) and update(batch)."""
    args = arguments(script, env_id, **wanted)
    torch.manual_seed(args.seed)
    envs = script.make_envs(args, args.num_envs)
    agent = script.Agent(
        gym.spaces.flatdim(envs.single_observation_space),
        gym.spaces.flatdim(envs.single_action_space),
        isinstance(envs.single_action_space, Box),
        args.normalize_observations,
    )
    run = SimpleNamespace(args=args, envs=envs, agent=agent)
    run.optimizers = script.make_optimizers(agent, args)
    run.obs, _ = envs.reset(seed=args.seed)
    run.done, run.returns = np.zeros(args.num_envs, bool), np.zeros(args.num_envs)

    def collect():
        if script is reinforce:
            return script.collect_rollout(agent, envs, args)
        state = run.obs, run.done, run.returns
        rollout = script.collect_rollout(agent, envs, *state, args.num_steps)
        run.obs, run.returns = rollout.next_obs[-1], rollout.episode_returns[-1]
        run.done = rollout.terminations[-1] | rollout.truncations[-1]
        return rollout

    estimate = script.compute_returns if script is reinforce else script.estimate_advantages
    run.collect, run.estimate = collect, lambda rollout: estimate(agent, rollout, args)
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
