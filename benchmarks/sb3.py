"""Stable-Baselines3's PPO and A2C and sb3-contrib's TRPO with their defaults, for the suite.

    python -m uv run --extra peers benchmarks/sb3.py --algorithm PPO --env-id CartPole-v1

A run is recorded and evaluated as those of ppo.py are, by the same functions.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import gymnasium as gym
import torch
import tyro
from common import ROOT
from sb3_contrib import TRPO
from stable_baselines3 import A2C, PPO

sys.path.insert(0, str(ROOT))
import ppo

ALGORITHMS = {"PPO": PPO, "A2C": A2C, "TRPO": TRPO}


@dataclass
class Args(ppo.Args):
    """Of ppo.py's, env_id, seed, total_timesteps and eval_episodes count."""

    algorithm: Literal["PPO", "A2C", "TRPO"] = "PPO"  # with its defaults


def train(args: Args) -> float:
    """Trains in a new folder of runs/. Returns the mean return over greedy episodes."""
    torch.set_num_threads(1)
    run_dir = Path("runs", f"{args.algorithm}__{args.seed}__{time.time_ns()}")
    run_dir.mkdir(parents=True)
    env = gym.make(args.env_id)
    if len(env.observation_space.shape or ()) != 1:
        env = gym.wrappers.FlattenObservation(env)
    model = ALGORITHMS[args.algorithm]("MlpPolicy", env, seed=args.seed, device="cpu")
    model.learn(args.total_timesteps)
    agent = SimpleNamespace(act=lambda obs, greedy: model.predict(obs, deterministic=greedy)[0])
    score = ppo.evaluate(agent, args)
    ppo.log({"global_step": model.num_timesteps, "eval/episodic_return": score}, run_dir, None)
    return score


if __name__ == "__main__":
    print(train(tyro.cli(Args)))
