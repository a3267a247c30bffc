"""The tutorial's claims as experiments on CartPole-v1.

    python -m uv run --extra bench benchmarks/experiments.py NAME [--seeds 10] [--workers 2]

NAME is variance, lambda, ladder, clipping or stepsize. Data go to benchmarks/results/NAME.json, a
figure to NAME.png, tables of all to experiments.md. --redraw makes the last two from the first.
"""

import contextlib
import copy
import importlib
import json
import os
import shlex
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from unittest.mock import patch

import matplotlib.pyplot as plt
import numpy as np
import torch
import tyro
from common import COLORS, OTHER_COLORS, RESULTS, ROOT, STYLE, about, band, interval, table
from report import POINTS, curve, estimate, read_metrics
from torch.nn.utils import parameters_to_vector

sys.path.insert(0, str(ROOT))
import reinforce  # noqa: E402
import vpg  # noqa: E402

EPISODES, ESTIMATES = 8, 512  # episodes of one estimate of the gradient; estimates at a policy
TARGETS = [0, 50, 100, 200, 350, 475]  # returns at which policies are taken from one training
LAMBDAS = [0.0, 0.5, 0.8, 0.9, 0.95, 0.97, 0.99, 1.0]
PLAIN = {"norm_adv": False, "vf_epochs": 1}
WAYS: dict[str, dict] = {
    "variance": {
        "total return": (reinforce, {"reward_to_go": False}),
        "reward-to-go": (reinforce, {}),
        "minus V(s)": (vpg, {**PLAIN, "gae_lambda": 1.0}),
        "GAE, λ = 0.97": (vpg, {**PLAIN, "gae_lambda": 0.97}),
    },
    "lambda": {f"{value:g}": (vpg, {**PLAIN, "gae_lambda": value}) for value in LAMBDAS},
}
WAY_COLORS = [COLORS["reinforce"], OTHER_COLORS[0], OTHER_COLORS[1], COLORS["vpg"]]

# What the tutorial leaves open is its library's default (minibatches of 256), else the script's.
LARGE = "--no-normalize-rewards --no-anneal-lr --num-steps 2048"
TUTORIAL = {
    "reinforce": "--no-normalize-rewards --no-anneal-lr --learning-rate 3e-4",
    "vpg": f"{LARGE} --learning-rate 3e-4 --vf-learning-rate 1e-3 --vf-epochs 5",
    "trpo": f"{LARGE} --vf-learning-rate 1e-3 --vf-epochs 5",
    "ppo": f"{LARGE} --learning-rate 3e-4 --update-epochs 4 --num-minibatches 64",
}
CLIPS = {"ε = 0.05": 0.05, "ε = 0.2": 0.2, "ε = 0.5": 0.5, "no clip": 1e9}
RATES = {
    "3e-4, constant": "--learning-rate 3e-4 --no-anneal-lr",
    "5e-3, annealed": "--learning-rate 5e-3",
    "5e-2, annealed": "--learning-rate 5e-2",
}
GRIDS = dict.fromkeys(("reinforce", "vpg", "ppo"), np.logspace(-4, -1, 7))
GRIDS["trpo"] = np.logspace(-4, 2, 7)  # of the target KL, not of the learning rate
TRAININGS: dict[str, dict[str, str]] = {
    "lambda": {f"λ = {value:g}": f"vpg.py --gae-lambda {value:g}" for value in LAMBDAS},
    "ladder": {f"tutorial: {name}": f"{name}.py {TUTORIAL[name]}" for name in COLORS}
    | {f"defaults: {name}": f"{name}.py" for name in COLORS},
    "clipping": {
        f"{rate}: {clip}": f"ppo.py --clip-coef {CLIPS[clip]:g} {RATES[rate]}"
        for rate in RATES
        for clip in CLIPS
    }
    | {f"{rate}: vpg": f"vpg.py {RATES[rate]}" for rate in RATES},
    "stepsize": {
        f"{name}: {x:.1e}": f"{name}.py {'--target-kl' if name == 'trpo' else '--learning-rate'} {x}"
        for name in COLORS
        for x in GRIDS[name]
    },
}
QUESTIONS = {
    "variance": "How much of the gradient's variance does each idea remove?",
    "lambda": "What does GAE's λ trade, and which one trains best?",
    "ladder": "How do the four compare, as the tutorial sets them and by default?",
    "clipping": "What does the clip prevent?",
    "stepsize": "At which step size does each one break?",
}


@dataclass
class Options:
    name: tyro.conf.Positional[Literal["variance", "lambda", "ladder", "clipping", "stepsize"]]
    seeds: int = 10  # seeds of each training; variance takes one training
    workers: int = 2  # runs at a time
    redraw: bool = False  # run nothing, draw the data that are there


def train(command: str, seed: int) -> tuple[float, list[dict[str, float]]]:
    """Runs a command. Returns its mean greedy return and the lines of metrics.jsonl."""
    script, *flags = shlex.split(command)
    module = importlib.import_module(Path(script).stem)
    args = tyro.cli(module.Args, args=[*flags, "--eval-episodes", "20", "--seed", str(seed)])
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as silent:
        with contextlib.chdir(folder), contextlib.redirect_stdout(silent):
            with contextlib.redirect_stderr(silent):
                greedy = module.train(args)
            return greedy, read_metrics(list(Path("runs").iterdir()))


def train_all(pool: ProcessPoolExecutor, commands: dict[str, str], seeds: int) -> dict[str, dict]:
    """Greedy returns (S,) and learning curves (S, POINTS) of each command."""
    jobs = {
        label: [pool.submit(train, command, seed) for seed in range(1, seeds + 1)]
        for label, command in commands.items()
    }
    results = {}
    for label, futures in jobs.items():
        runs = [future.result() for future in futures]
        steps = min(rows[-1]["global_step"] for _, rows in runs)
        grid = np.linspace(0, steps, POINTS + 1)[1:]
        curves = [curve(rows, grid).round(1).tolist() for _, rows in runs]
        results[label] = {"steps": steps, "returns": [r for r, _ in runs], "curves": curves}
    return results


def take_policies(targets: list[int]) -> list[vpg.Agent]:
    """vpg.py's agents of one training, when a rollout first returned each target on average."""
    found: list[vpg.Agent] = []
    estimate_advantages = vpg.estimate_advantages

    def watch(agent, rollout, args):
        while len(found) < len(targets) and np.mean(rollout.episode_returns) >= targets[len(found)]:
            found.append(copy.deepcopy(agent))
        return estimate_advantages(agent, rollout, args)

    with patch.object(vpg, "estimate_advantages", watch):
        train("vpg.py --no-normalize-rewards", 1)
    if len(found) < len(targets):
        raise RuntimeError(f"vpg.py never returned {targets[len(found)]} in a rollout")
    return found


def gradients(agent: vpg.Agent, ways: dict) -> tuple[np.ndarray, float]:
    """Estimates (ways, ESTIMATES, parameters) by the scripts' update, and the mean return.

    All ways see the same whole episodes and are scaled to the mean over episodes of the sum over
    steps. Advantages are not normalized, gradients not clipped, parameters not changed.
    """
    width = 64
    envs = vpg.make_envs(vpg.Args(), width)
    envs.reset(seed=1)
    optimizers = [torch.optim.SGD(net.parameters(), 0.0) for net in (agent.actor, agent.critic)]
    estimates: list[list[np.ndarray]] = [[] for _ in ways]
    returns = []
    while len(estimates[0]) < ESTIMATES:
        state = vpg.EnvState(envs.reset()[0], np.zeros(width, bool), np.zeros(width))
        args = vpg.Args(num_envs=width, num_steps=500)  # the limit of an episode's length
        rollout = vpg.collect_rollout(agent, envs, state, args)
        ends = rollout.terminations | rollout.truncations
        valid = np.cumsum(ends, axis=0) - ends == 0  # each environment's first episode
        rollout = rollout._replace(valid=valid, rewards=rollout.rewards * valid)
        returns.append(rollout.rewards.sum() / width)
        for first in range(0, width, EPISODES):
            part = vpg.Rollout(*(x[:, first : first + EPISODES] for x in rollout[:-1]), [])
            whole = reinforce.Rollout(part.obs[:-1], part.actions, part.rewards, part.valid, [])
            settings = {"num_envs": EPISODES, "max_grad_norm": np.inf, "normalize_rewards": False}
            for results, (module, changes) in zip(estimates, ways.values()):
                args = module.Args(**settings, **changes)
                if module is reinforce:
                    batch, scale = reinforce.compute_returns(agent, whole, args), 1.0
                else:
                    batch = vpg.estimate_advantages(agent, part, args)
                    scale = part.valid.sum() / EPISODES
                module.update(agent, optimizers, batch, args)
                gradient = parameters_to_vector([p.grad for p in agent.actor.parameters()])
                results.append(scale * gradient.double().numpy())
    return np.array(estimates), float(np.mean(returns))


def moments(estimates: np.ndarray, reference: np.ndarray) -> list[list[float]]:
    """What estimates (n, P) of a gradient are worth, each as [value, low, high] (95 % bootstrap).

    With variance = trace of the covariance of one estimate, signal = squared norm of the mean:
    variance / reference's variance; signal / variance; squared bias against the reference /
    reference's signal; variance / reference's signal.
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
    ratios = [noise / variance(reference), signal(estimates) / noise]
    ratios += [signal(estimates - reference) / true, noise / true]
    return [[r[0], *np.percentile(r[1:], (2.5, 97.5))] for r in ratios]


def compare(agent: vpg.Agent, name: str, reference: str) -> dict:
    """The moments of an experiment's estimates at one policy, against those of reference."""
    torch.set_num_threads(1)
    estimates, mean_return = gradients(agent, WAYS[name])
    against = estimates[list(WAYS[name]).index(reference)]
    ways = {way: moments(one, against) for way, one in zip(WAYS[name], estimates)}
    return {"return": mean_return, "ways": ways}


def measure(name: str, pool: ProcessPoolExecutor, seeds: int) -> dict:
    data: dict = {"runs": {}, "policies": []}
    if name in WAYS:
        targets, reference = (TARGETS, "total return") if name == "variance" else ([200], "1")
        jobs = [pool.submit(compare, a, name, reference) for a in take_policies(targets)]
        data["policies"] = [job.result() for job in jobs]
    if name in TRAININGS:
        data["runs"] = train_all(pool, TRAININGS[name], seeds)
    return data


def draw_variance(data: dict, fig) -> None:
    x = [policy["return"] for policy in data["policies"]]
    titles = ("variance (total return: 1)", "|mean|² / variance")
    for number, (ax, title) in enumerate(zip(fig.subplots(1, 2), titles)):
        for way, color in zip(WAYS["variance"], WAY_COLORS):
            values = np.transpose([policy["ways"][way][number] for policy in data["policies"]])
            band(ax, x, values, way, color=color, marker="o")
        ax.set(title=title, yscale="log", xlabel="mean return of the policy", xlim=(x[0], x[-1]))


def draw_lambda(data: dict, fig) -> None:
    left, right = fig.subplots(1, 2)
    (policy,) = data["policies"]
    x = np.arange(len(LAMBDAS))
    bias, variance = (np.transpose([w[n] for w in policy["ways"].values()]) for n in (2, 3))
    band(left, x[:-1], bias[:, :-1], "squared bias", color=OTHER_COLORS[2], marker="o")
    band(left, x, variance, "variance", color=OTHER_COLORS[1], marker="o")
    left.set(title="of the gradient", yscale="log", ylabel="share of |mean at λ = 1|²")
    runs = data["runs"].values()
    greedy = interval(np.transpose([run["returns"] for run in runs]))
    during = interval(np.transpose([np.mean(run["curves"], axis=1) for run in runs]))
    band(right, x, greedy, "greedy, at the end", color=COLORS["vpg"], marker="o")
    band(right, x, during, "mean over training", color=OTHER_COLORS[0], marker="o")
    right.set(title="of training with vpg.py", ylabel="return")
    for ax in (left, right):
        ax.set(xlabel="λ", xlim=(0, x[-1]))
        ax.set_xticks(x, [f"{value:g}" for value in LAMBDAS])


def draw_curves(data: dict, fig) -> None:
    """Learning curves of the runs "panel: label"."""
    panels = list(dict.fromkeys(label.split(": ")[0] for label in data["runs"]))
    for ax, panel in zip(np.atleast_1d(fig.subplots(1, len(panels), sharey=True)), panels):
        runs = {k.split(": ")[1]: run for k, run in data["runs"].items() if k.startswith(panel)}
        shortest = min(run["steps"] for run in runs.values())
        shades = iter([OTHER_COLORS[0], COLORS["ppo"], *OTHER_COLORS[1:]])
        for label, run in runs.items():
            grid = np.linspace(0, run["steps"], POINTS + 1)[1:]
            color = COLORS.get(label) or next(shades)
            band(ax, grid / 1000, interval(run["curves"]), label, color=color)
        ax.set(title=panel, xlabel="thousand steps", xlim=(0, shortest / 1000), ylim=(0, 505))
    fig.axes[0].set_ylabel("return of training episodes")


def draw_stepsize(data: dict, fig) -> None:
    left, right = fig.subplots(1, 2, sharey=True, width_ratios=(2, 1))
    for name, grid in GRIDS.items():
        ax = right if name == "trpo" else left
        means = interval(np.transpose([data["runs"][f"{name}: {x:.1e}"]["returns"] for x in grid]))
        band(ax, grid, means, name, color=COLORS[name], marker="o")
        ax.set(xscale="log", xlim=(grid[0], grid[-1]), ylim=(0, 505))
    left.set(xlabel="learning rate", ylabel="greedy return after training")
    right.set(xlabel="target KL")


DRAWINGS = {
    "variance": draw_variance,
    "lambda": draw_lambda,
    "ladder": draw_curves,
    "clipping": draw_curves,
    "stepsize": draw_stepsize,
}


def tables(data: dict) -> list[str]:
    lines: list[str] = []
    for policy in data["policies"]:
        heads = [
            "variance / reference's",
            "signal / variance",
            "bias² / signal",
            "variance / signal",
        ]
        rows = [
            [way, *("{:.3g} [{:.3g}, {:.3g}]".format(*value) for value in values)]
            for way, values in policy["ways"].items()
        ]
        lines += ["", f"At a policy of mean return {policy['return']:.0f}:", ""]
        lines += [table(["estimate", *heads], rows)]
    rows = []
    for label, run in data["runs"].items():
        # Collapsed: the mean over five points fell below half of an earlier one of 200 or more.
        smooth = np.lib.stride_tricks.sliding_window_view(run["curves"], 5, axis=1).mean(-1)
        peaks = np.maximum.accumulate(smooth, axis=1)
        collapsed = ((peaks >= 200) & (smooth < peaks / 2)).any(1).sum()
        solved = sum(value >= 475 for value in run["returns"])
        rows.append([label, estimate(run["returns"]), str(solved), str(collapsed)])
    if rows:
        lines += ["", table(["training", "greedy return", "solved", "collapsed"], rows)]
    return lines


def report(name: str) -> None:
    """Draws NAME.png and writes the tables of all experiments that have data."""
    plt.rcParams.update(STYLE)
    lines = [
        "# The tutorial's claims as experiments",
        "",
        "Written by `benchmarks/experiments.py`; [low, high] is a 95 % bootstrap interval. Solved: a",
        "mean greedy return of 475 or more. Collapsed: the training return fell below half of an",
        "earlier one of 200 or more.",
    ]
    for known, question in QUESTIONS.items():
        if not (RESULTS / f"{known}.json").exists():
            continue
        data = json.loads((RESULTS / f"{known}.json").read_text())
        lines += ["", f"## {known}", "", question, "", f"![{known}]({known}.png)", *tables(data)]
        lines += ["", f"{data['about']}."]
        if known == name:
            fig = plt.figure(figsize=(12, 5.2))
            DRAWINGS[known](data, fig)
            handles = {}
            for ax in fig.axes:
                handles |= {label: h for h, label in zip(*ax.get_legend_handles_labels())}
            places = {"loc": "outside upper center", "ncols": 5, "title": data["title"]}
            fig.legend(handles.values(), handles, **places)
            fig.savefig(RESULTS / f"{known}.png")
    (RESULTS / "experiments.md").write_text("\n".join(lines) + "\n")


def main(options: Options) -> None:
    if not options.redraw:
        with ProcessPoolExecutor(options.workers) as pool:
            data = measure(options.name, pool, options.seeds)
        data["title"] = f"CartPole-v1, mean and 95 % interval of {options.seeds} seeds"
        if options.name == "variance":
            data["title"] = (
                f"CartPole-v1, {ESTIMATES} estimates of {EPISODES} episodes at each policy"
            )
        data["about"] = about()
        (RESULTS / f"{options.name}.json").write_text(json.dumps(data) + "\n")
    report(options.name)


if __name__ == "__main__":
    main(tyro.cli(Options))
