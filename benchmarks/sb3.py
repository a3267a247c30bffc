"""Stable-Baselines3's PPO and A2C and sb3-contrib's TRPO with their defaults, for the suite.

    python -m uv run --extra peers benchmarks/sb3.py --algorithm PPO --env-id CartPole-v1

A run is recorded and evaluated as those of ppo.py are, by the same functions.
"""

import json
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
class Args:
    algorithm: Literal["PPO", "A2C", "TRPO"] = "PPO"  # with its defaults
    env_id: str = "CartPole-v1"  # Gymnasium id of the environment
    seed: int = 1  # seed of parameters, actions and environments
    total_timesteps: int = 50_000  # steps of training
    eval_episodes: int = 100  # greedy episodes after training


def train(args: Args) -> float:
    """Trains in a new folder of runs/. Returns the mean return over greedy episodes."""
    torch.set_num_threads(1)
    run_name = f"{args.env_id}__{args.algorithm}__{args.seed}__{time.time_ns()}"
    run_dir = Path("runs", run_name.replace("/", "-"))
    run_dir.mkdir(parents=True)
    (run_dir / "args.json").write_text(json.dumps(vars(args), indent=1))
    env = gym.make(args.env_id)
    if len(env.observation_space.shape or ()) != 1:
        env = gym.wrappers.FlattenObservation(env)
    model = ALGORITHMS[args.algorithm]("MlpPolicy", env, seed=args.seed, device="cpu")
    start = time.perf_counter()
    model.learn(args.total_timesteps)
    metrics = {"global_step": model.num_timesteps}
    metrics["charts/SPS"] = model.num_timesteps / (time.perf_counter() - start)
    ppo.log(metrics, run_dir, None)
    evaluation = ppo.Args(
        env_id=args.env_id,
        seed=args.seed,
        total_timesteps=args.total_timesteps,
        eval_episodes=args.eval_episodes,
    )
    agent = SimpleNamespace(act=lambda obs, greedy: model.predict(obs, deterministic=greedy)[0])
    score = ppo.evaluate(agent, evaluation)
    metrics = {"global_step": model.num_timesteps, "eval/episodic_return": score}
    ppo.log(metrics, run_dir, None)
    return score


if __name__ == "__main__":
    print(train(tyro.cli(Args)))
