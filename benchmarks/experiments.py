"""What each idea does to the gradient's variance and bias on CartPole-v1, as the tutorial claims.

    python -m uv run --extra bench benchmarks/experiments.py

Writes gradient.json, gradient.md, variance.png and bias.png to benchmarks/results. The tutorial's
claims about training are groups of commands.json: tutorial, clipping, stepsize and others.
"""

import contextlib
import copy
import json
import sys
import tempfile
from unittest.mock import patch

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from common import COLORS, OTHER_COLORS, RESULTS, ROOT, STYLE, about, table
from torch.nn.utils import parameters_to_vector

sys.path.insert(0, str(ROOT))
import reinforce
import vpg

EPISODES = 8  # of one estimate of the gradient
ESTIMATES = 512  # at each policy
TARGETS = [0, 50, 100, 200, 350, 475]  # returns at which policies are taken from one training
BIAS_TARGET = 3  # which of them GAE's bias is measured at
LAMBDAS = ["0", "0.5", "0.8", "0.9", "0.95", "0.97", "0.99", "1"]
IDEAS = {
    "total return": (reinforce, {"reward_to_go": False}),
    "reward-to-go": (reinforce, {}),
    "minus V(s)": (vpg, {"gae_lambda": 1.0}),
    "GAE, λ = 0.97": (vpg, {"gae_lambda": 0.97}),
}
GAES = {name: (vpg, {"gae_lambda": float(name)}) for name in LAMBDAS}
IDEA_COLORS = [COLORS["reinforce"], OTHER_COLORS[0], OTHER_COLORS[1], COLORS["vpg"]]


def take_policies(targets: list[int]) -> list[vpg.Agent]:
    """vpg.py's agents of one training, when a rollout first returned each target on average."""
    found: list[vpg.Agent] = []
    estimate_advantages = vpg.estimate_advantages

    def watch(agent, rollout, last_obs, args):
        episodes = (rollout.terminations | rollout.truncations).sum()
        mean_return = rollout.valid.sum() / max(episodes, 1)  # each step pays 1
        while len(found) < len(targets) and mean_return >= targets[len(found)]:
            found.append(copy.deepcopy(agent))
        return estimate_advantages(agent, rollout, last_obs, args)

    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.chdir(folder),
        patch.object(vpg, "estimate_advantages", watch),
    ):
        raw = {"normalize_observations": False, "normalize_rewards": False}
        vpg.train(vpg.Args(eval_episodes=1, **raw))
    if len(found) < len(targets):
        raise RuntimeError(f"vpg.py never returned {targets[len(found)]} in a rollout")
    return found


def gradients(agent: vpg.Agent, ways: dict) -> tuple[dict[str, np.ndarray], float]:
    """Estimates (ESTIMATES, parameters) of each way from the scripts' batches, and the mean return.

    All ways see the same whole episodes. Each estimate is the gradient of the mean over episodes
    of sum log pi(a|s) A, where A is the advantage or the return.
    """
    width = 64
    envs = vpg.make_envs(vpg.Args(), width)
    envs.reset(seed=1)
    parameters = list(agent.actor.parameters())
    estimates: dict[str, list[np.ndarray]] = {way: [] for way in ways}
    returns = []
    for _ in range(ESTIMATES * EPISODES // width):
        obs, _ = envs.reset()
        start = (obs, np.zeros(width, bool), np.zeros(width))
        # 500 is the limit of an episode's length
        rollout, last_obs, _, _ = vpg.collect_rollout(agent, envs, *start, 500)
        ends = rollout.terminations | rollout.truncations
        valid = np.cumsum(ends, axis=0) - ends == 0  # each environment's first episode
        rollout = rollout._replace(valid=valid, rewards=rollout.rewards * valid)
        returns.append(rollout.rewards.sum() / width)
        for first in range(0, width, EPISODES):
            columns = slice(first, first + EPISODES)
            part = vpg.Rollout(*(x[:, columns] for x in rollout))
            whole = reinforce.Rollout(part.valid, part.obs, part.actions, part.rewards)
            for way, (module, changes) in ways.items():
                args = module.Args(normalize_rewards=False, **changes)
                if module is reinforce:
                    batch = reinforce.compute_returns(agent, whole, args)
                    weights = batch.returns
                else:
                    batch = vpg.estimate_advantages(agent, part, last_obs[columns], args)
                    weights = batch.advantages
                log_probs = agent.policy(batch.obs).log_prob(batch.actions)
                gradient = torch.autograd.grad((log_probs * weights).sum() / EPISODES, parameters)
                estimates[way].append(parameters_to_vector(gradient).double().numpy())
    return {way: np.array(rows) for way, rows in estimates.items()}, float(np.mean(returns))


def moments(estimates: np.ndarray, reference: np.ndarray) -> list[list[float]]:
    """What estimates (n, P) of a gradient are worth, each as [value, low, high] (95 % bootstrap).

    With variance = trace of the covariance of one estimate, signal = squared norm of the mean:
    variance / reference's variance; squared bias / reference's signal; variance / that signal.
    """
    half = len(estimates) // 2
    drawn = np.random.default_rng(0).multinomial(half, np.full(half, 1 / half), (2, 1000)) / half
    first, second = np.concatenate((np.full((2, 1, half), 1 / half), drawn), axis=1)
    both = np.concatenate((first, second), axis=1) / 2

    def signal(x):  # the product of two independent means; the square of one would be too large
        return (first @ x[:half] * (second @ x[half:])).sum(1)

    def variance(x):
        x = x - x.mean(0)
        return (both @ np.square(x).sum(1) - np.square(both @ x).sum(1)) * len(x) / (len(x) - 1)

    noise, true = variance(estimates), signal(reference)
    ratios = noise / variance(reference), signal(estimates - reference) / true, noise / true
    return [[r[0], *np.percentile(r[1:], (2.5, 97.5))] for r in ratios]


def compare(agent: vpg.Agent, ways: dict, reference: str) -> dict:
    """The moments of each way's estimates at one policy, against those of reference."""
    estimates, mean_return = gradients(agent, ways)
    worth = {way: moments(rows, estimates[reference]) for way, rows in estimates.items()}
    return {"return": mean_return, "ways": worth}


def band(ax, x, estimates, label: str, **look) -> None:
    """A line of estimates (3, K) with its interval shaded."""
    mean, low, high = estimates
    ax.plot(x, mean, label=label, linewidth=2, marker="o", **look)
    ax.fill_between(x, low, high, color=look["color"], alpha=0.18, linewidth=0)


def draw(data: dict) -> None:
    plt.rcParams.update(STYLE)
    title = f"CartPole-v1, {ESTIMATES} estimates of {EPISODES} episodes, 95 % intervals"
    fig, ax = plt.subplots(figsize=(8, 5.2), layout="constrained")
    x = [policy["return"] for policy in data["ideas"]]
    for way, color in zip(IDEAS, IDEA_COLORS):
        values = np.transpose([policy["ways"][way][0] for policy in data["ideas"]])
        band(ax, x, values, way, color=color)
    ax.set(yscale="log", xlabel="mean return of the policy", xlim=(x[0], x[-1]))
    ax.set_ylabel("variance / that of total return")
    fig.legend(loc="outside upper center", ncols=2, title=title)
    fig.savefig(RESULTS / "variance.png")

    fig, ax = plt.subplots(figsize=(8, 5.2), layout="constrained")
    bias, variance = (np.transpose([w[n] for w in data["gae"]["ways"].values()]) for n in (1, 2))
    band(ax, LAMBDAS[:-1], bias[:, :-1], "squared bias", color=OTHER_COLORS[2])
    band(ax, LAMBDAS, variance, "variance", color=OTHER_COLORS[1])
    ax.set(yscale="log", xlabel="λ of GAE", ylabel="share of |mean at λ = 1|²", xmargin=0)
    fig.legend(loc="outside upper center", ncols=2, title=title)
    fig.savefig(RESULTS / "bias.png")


def tables(data: dict) -> str:
    text = "# The gradient's variance and bias\n\nWritten by `benchmarks/experiments.py`.\n"
    text += "Each value has a 95 % bootstrap interval. The reference is total return, or λ = 1."
    heads = ["variance / reference's", "bias² / signal", "variance / signal"]
    for policy in [*data["ideas"], data["gae"]]:
        rows = [
            [way, *("{:.3g} [{:.3g}, {:.3g}]".format(*value) for value in values)]
            for way, values in policy["ways"].items()
        ]
        text += f"\n\nAt a policy of mean return {policy['return']:.0f}:\n\n"
        text += table(pd.DataFrame(rows, columns=["estimate", *heads]))
    return f"{text}\n\n{data['about']}."


def main() -> None:
    torch.set_num_threads(1)
    agents = take_policies(TARGETS)
    data = {
        "about": about(),
        "ideas": [compare(agent, IDEAS, "total return") for agent in agents],
        "gae": compare(agents[BIAS_TARGET], GAES, "1"),
    }
    (RESULTS / "gradient.json").write_text(json.dumps(data) + "\n")
    (RESULTS / "gradient.md").write_text(tables(data) + "\n")
    draw(data)


if __name__ == "__main__":
    main()
