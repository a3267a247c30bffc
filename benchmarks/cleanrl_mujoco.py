"""CleanRL's ppo_continuous_action.py on Gymnasium >= 1, unchanged, with the returns it reaches.

    python -m uv run --extra mujoco benchmarks/cleanrl_mujoco.py
        --script PATH/TO/cleanrl/ppo_continuous_action.py --env-id Hopper-v5 --seed 1

It logs no returns there (`final_info` is gone) and lacks an argument of TransformObservation; both
are mended from outside, and its TensorBoard log is left out. The result, the mean return of the
last 100 training episodes, goes to benchmarks/results/cleanrl_mujoco.json.
"""

import json
import runpy
import sys
import tempfile
from contextlib import chdir
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest.mock import MagicMock

import gymnasium as gym
import numpy as np
import torch
import tyro

RESULTS = Path(__file__).resolve().parent / "results" / "cleanrl_mujoco.json"


@dataclass
class Options:
    script: Path  # CleanRL's ppo_continuous_action.py
    env_id: str  # a MuJoCo environment
    seed: int = 1  # of CleanRL's run
    total_timesteps: int = 1_000_000  # steps of the run


def main(options: Options) -> None:
    script = options.script.resolve(strict=True)
    returns: list[float] = []

    class RecordReturns(gym.wrappers.RecordEpisodeStatistics):
        def step(self, action):
            *rest, info = super().step(action)
            if "episode" in info:
                returns.append(float(info["episode"]["r"]))
            return *rest, info

    gym.wrappers.RecordEpisodeStatistics = RecordReturns
    transform = partial(gym.wrappers.TransformObservation, observation_space=None)
    gym.wrappers.TransformObservation = transform
    sys.modules["torch.utils.tensorboard"] = MagicMock()
    torch.set_num_threads(1)
    flags = ["--env-id", options.env_id, "--seed", str(options.seed), "--no-cuda"]
    sys.argv = [str(script), *flags, "--total-timesteps", str(options.total_timesteps)]
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        runpy.run_path(str(script), run_name="__main__")
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    result = {"steps": options.total_timesteps, "return": float(np.mean(returns[-100:]))}
    results.setdefault(options.env_id, {})[str(options.seed)] = result
    RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    print(options.env_id, options.seed, result)


if __name__ == "__main__":
    main(tyro.cli(Options))
