"""Runs a training script until CartPole-v1 is solved; solved.py starts it.

    python benchmarks/watch.py ours|cleanrl TIME_OF_THE_START SCRIPT [its arguments]

After each iteration the policy is evaluated while the clocks stand still. The process ends when the
mean over 100 greedy episodes has been at least 475 at every look for LASTING steps, and tells when
that began, and when the first such look was. It imports nothing that the script does not.
"""

import json
import os
import runpy
import sys
import time

LASTING = 5_000
paused = 0.0  # seconds of evaluation so far
solved: dict = {}  # the first look at a policy that is good enough, and the first of those in a row


def greedy_return(actor) -> float:
    """Mean return over the first episode of each of 100 environments."""
    import gymnasium as gym
    import numpy as np
    import torch

    envs = gym.make_vec("CartPole-v1", 100)
    observations, _ = envs.reset(seed=0)
    returns, running = np.zeros(100), np.ones(100, dtype=bool)
    while running.any():
        with torch.no_grad():
            actions = actor(torch.as_tensor(observations)).argmax(-1).numpy()
        observations, rewards, terminations, truncations, _ = envs.step(actions)
        returns += rewards * running
        running &= ~(terminations | truncations)
    envs.close()
    return float(returns.mean())


def watch(agent, steps: int, train: float) -> None:
    """Ends the process if agent has solved it; train is the time since the first reset."""
    global paused
    pause = time.time()
    look = {"steps": steps, "train": train - paused, "command": pause - began - paused}
    if greedy_return(agent.actor) < 475:
        solved.pop("lasting", None)
    else:
        solved.setdefault("first", look)
        if steps - solved.setdefault("lasting", look)["steps"] >= LASTING:
            print("solved", json.dumps(solved), flush=True)
            os._exit(0)
    paused += time.time() - pause


def hook_ours() -> None:
    """Lets ppo.py's progress bar, updated at the end of an iteration, call watch."""
    import tqdm

    class Bar(tqdm.tqdm):
        def update(self, n=1):
            super().update(n)
            names = sys._getframe(1).f_locals
            watch(names["agent"], names["global_step"], time.perf_counter() - names["start"])

    tqdm.tqdm = Bar


def hook_cleanrl() -> None:
    """Lets the last scalar of an iteration call watch, once it is written."""
    from torch.utils.tensorboard import SummaryWriter

    add_scalar = SummaryWriter.add_scalar

    def watched(self, tag, value, step):
        add_scalar(self, tag, value, step)
        if tag == "charts/SPS":
            names = sys._getframe(1).f_globals
            watch(names["agent"], step, time.time() - names["start_time"])

    SummaryWriter.add_scalar = watched


if __name__ == "__main__":
    _, program, start, *sys.argv = sys.argv
    began = float(start)
    {"ours": hook_ours, "cleanrl": hook_cleanrl}[program]()
    runpy.run_path(sys.argv[0], run_name="__main__")
