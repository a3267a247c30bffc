"""Stable-Baselines3's PPO and A2C and sb3-contrib's TRPO with their defaults, for the suite.

    python -m uv run --extra peers benchmarks/sb3.py --algorithm PPO --env-id CartPole-v1

A run is recorded and evaluated as those of ppo.py are, by the same functions.
"""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
import tyro
from common import ROOT
from sb3_contrib import TRPO
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.callbacks import BaseCallback

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


class Record(BaseCallback):
    """Appends the mean return of the episodes that ended in the last 1,024 steps or more."""

    def __init__(self, run_dir: Path):
        super().__init__()
        self.run_dir = run_dir
        self.returns: list[float] = []
        self.last_step = 0
        self.last_time = time.perf_counter()

    def _on_step(self) -> bool:
        self.returns += [info["episode"]["r"] for info in self.locals["infos"] if "episode" in info]
        steps = self.num_timesteps - self.last_step
        if steps >= 1024:
            now = time.perf_counter()
            metrics = {"global_step": self.num_timesteps}
            metrics["charts/SPS"] = steps / (now - self.last_time)
            if self.returns:
                metrics["charts/episodic_return"] = float(np.mean(self.returns))
            ppo.log(metrics, self.run_dir, None)
            self.returns = []
            self.last_step = self.num_timesteps
            self.last_time = now
        return True


class Agent:
    """A model as ppo.evaluate expects it."""

    def __init__(self, model):
        self.model = model

    def act(self, obs: np.ndarray, greedy: bool) -> np.ndarray:
        return self.model.predict(obs, deterministic=greedy)[0]


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
    model.learn(args.total_timesteps, Record(run_dir))
    evaluation = ppo.Args(
        env_id=args.env_id,
        seed=args.seed,
        total_timesteps=args.total_timesteps,
        eval_episodes=args.eval_episodes,
    )
    score = ppo.evaluate(Agent(model), evaluation)
    metrics = {"global_step": model.num_timesteps, "eval/episodic_return": score}
    ppo.log(metrics, run_dir, None)
    return score


if __name__ == "__main__":
    print(train(tyro.cli(Args)))
