"""The tutorial's claims as experiments on CartPole-v1: data, a figure and a sentence for each.

    python -m uv run --extra bench benchmarks/experiments.py NAME [--seeds 10] [--workers 2]

NAME is variance, lambda, ladder, clipping or stepsize. Data go to benchmarks/results/NAME.json, the
figure to NAME.png, the sentence to experiments.md; --redraw makes the last two from the first.
"""

import contextlib
import copy
import csv
import importlib
import json
import os
import platform
import shlex
import sys
import tempfile
import time
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from unittest.mock import patch

import matplotlib.pyplot as plt
import numpy as np
import torch
import tyro
from report import LOOKS, band, interval

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
sys.path.insert(0, str(ROOT))
import reinforce  # noqa: E402
import vpg  # noqa: E402

SEEDS = {"variance": 1, "lambda": 10, "ladder": 10, "clipping": 10, "stepsize": 5}
SCRIPTS = ["REINFORCE", "VPG", "TRPO", "PPO"]

EPISODES, ESTIMATES = 8, 512  # episodes of one estimate of the gradient; estimates at a policy
TARGETS = [0, 50, 100, 200, 350, 475]  # returns at which the policies are taken from training
LAMBDAS = [0.0, 0.5, 0.8, 0.9, 0.95, 0.97, 0.99, 1.0]
PLAIN = {"norm_adv": False, "vf_epochs": 1}
WAYS = {
    "variance": {
        "total return": (reinforce, {"reward_to_go": False}),
        "reward-to-go": (reinforce, {}),
        "− V(s), λ = 1": (vpg, PLAIN | {"gae_lambda": 1.0}),
        "GAE, λ = 0.97": (vpg, PLAIN | {"gae_lambda": 0.97}),
    },
    "lambda": {f"{value:g}": (vpg, PLAIN | {"gae_lambda": value}) for value in LAMBDAS},
}

# What the tutorial leaves open is its library's default (minibatches of 256), else the script's.
LARGE = "--num-steps 2048 --no-anneal-lr --vf-learning-rate 1e-3 --vf-epochs 5"
TUTORIAL = {
    "REINFORCE": "--total-timesteps 50000 --learning-rate 3e-4 --no-anneal-lr",
    "VPG": f"{LARGE} --learning-rate 3e-4",
    "TRPO": LARGE,
    "PPO": "--num-steps 2048 --no-anneal-lr --learning-rate 3e-4 --update-epochs 4"
    " --num-minibatches 64",
}
CLIPS = {"ε = 0.05": 0.05, "ε = 0.2": 0.2, "ε = 0.5": 0.5, "no clip": 1e9}
RATES = {
    "3e-4, constant (tutorial)": "--learning-rate 3e-4 --no-anneal-lr",
    "5e-3, annealed (default)": "",
    "5e-2, annealed": "--learning-rate 5e-2",
}
GRID, KLS = np.logspace(-4, -1, 7), np.logspace(-4, 2, 7)
SWEEPS = {
    "lambda": {f"λ = {value:g}": f"vpg.py --gae-lambda {value:g}" for value in LAMBDAS},
    "ladder": {f"tutorial: {name}": f"{name.lower()}.py {TUTORIAL[name]}" for name in SCRIPTS}
    | {f"defaults: {name}": f"{name.lower()}.py" for name in SCRIPTS},
    "clipping": {
        f"{rate}: {clip}": f"ppo.py --clip-coef {CLIPS[clip]:g} {RATES[rate]}"
        for rate in RATES
        for clip in CLIPS
    }
    | {f"{rate}: VPG": f"vpg.py {RATES[rate]}" for rate in RATES},
    "stepsize": {
        f"{name}: {rate:.1e}": f"{name.lower()}.py --learning-rate {rate:.1e}"
        for name in ("REINFORCE", "VPG", "PPO")
        for rate in GRID
    }
    | {f"TRPO: {kl:.1e}": f"trpo.py --target-kl {kl:.1e}" for kl in KLS},
}


@dataclass
class Options:
    name: tyro.conf.Positional[Literal["variance", "lambda", "ladder", "clipping", "stepsize"]]
    seeds: int | None = None  # seeds of each training; 10 by default, 5 for stepsize
    workers: int = 2  # runs at a time
    redraw: bool = False  # run nothing, draw the data that are there


def train(command: str, seed: int) -> tuple[float, list[dict[str, str]]]:
    """The mean greedy return after one run of a command, and the rows of its metrics.csv."""
    script, *flags = shlex.split(command)
    module = importlib.import_module(Path(script).stem)
    args = tyro.cli(module.Args, args=[*flags, "--seed", str(seed)])
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as silent:
        os.chdir(folder)
        with contextlib.redirect_stdout(silent), contextlib.redirect_stderr(silent):
            greedy = module.train(args)
        (metrics,) = Path("runs").glob("*/metrics.csv")
        rows = list(csv.DictReader(metrics.open()))
        os.chdir(ROOT)
    return greedy, rows


def sweep(pool: Executor, commands: dict[str, str], seeds: int) -> dict[str, dict]:
    """Each command with each seed: greedy returns (S,) after training, learning curves (S, 50).

    A point of a curve is the mean return of the episodes that ended in the rollout there, the 50
    lie evenly between steps / 50 and steps, the environment steps of the run.
    """
    jobs = [
        pool.submit(train, f"{command} --eval-episodes 20", seed)
        for command in commands.values()
        for seed in range(1, seeds + 1)
    ]
    results, runs = {}, [job.result() for job in jobs]
    for number, (name, command) in enumerate(commands.items()):
        mine, curves = runs[number * seeds : (number + 1) * seeds], []
        steps = max(int(rows[-1]["global_step"]) for _, rows in mine)
        for _, rows in mine:
            told = [(row["global_step"], row["charts/episodic_return"]) for row in rows]
            points = np.array(told, dtype=float)
            points = points[np.isfinite(points[:, 1])]  # no episode ended in the others
            curve = np.interp(np.linspace(steps / 50, steps, 50), *points.T)
            curves.append(curve.round().astype(int).tolist())
        returns = [greedy for greedy, _ in mine]
        results[name] = {"command": command, "steps": steps, "returns": returns, "curves": curves}
    return results


def snapshot(target: float) -> vpg.Agent:
    """vpg.py's agent, trained at its defaults, when a rollout first returned target on average."""
    found, update = [], vpg.update

    def watch(agent, optimizers, batch, args):
        if not found and batch.episodes and np.mean(batch.episodes, axis=0)[0] >= target:
            found.append(copy.deepcopy(agent))
        return update(agent, optimizers, batch, args)

    with patch.object(vpg, "update", watch):
        train("vpg.py --eval-episodes 1", 1)
    if not found:
        raise RuntimeError(f"vpg.py never returned {target} in a rollout")
    return found[0]


class Still(vpg.Adam):
    """Keeps the gradient of the last step, which it does not take."""

    def step(self, gradient: torch.Tensor, args) -> torch.Tensor:
        self.last = gradient
        return gradient.norm()


def gradients(agent: vpg.Agent, ways: dict) -> tuple[np.ndarray, float]:
    """Estimates (ways, ESTIMATES, parameters) by the scripts' update, and the mean return.

    All ways see the same episodes, and mean over episodes the sum over their steps (vpg.py's mean
    over steps is scaled back to that). Advantages are not normalised, gradients not clipped.
    """
    width, estimates, returns = 64, [[] for _ in ways], []
    envs = reinforce.make_envs(reinforce.Args(), width)
    actor, critic = Still(agent.actor, 0.0), Still(agent.critic, 0.0)
    for batch in reinforce.rollouts(agent, envs, reinforce.Args(num_envs=width), 0):
        returns.append((batch.rewards * batch.valid).sum() / width)
        for first in range(0, width, EPISODES):
            part = vpg.Batch(*(x[:, first : first + EPISODES] for x in batch[:-1]), [])
            for results, (script, changes) in zip(estimates, ways.values()):
                args = script.Args(num_envs=EPISODES, max_grad_norm=float("inf"), **changes)
                whole = script is reinforce
                script.update(agent, [actor] if whole else [actor, critic], part, args)
                steps = 1 if whole else part.valid.sum() / EPISODES
                results.append(-actor.last.double().numpy() * steps)
        if len(estimates[0]) >= ESTIMATES:
            return np.array(estimates), float(np.mean(returns))
    raise RuntimeError("rollouts ended")


def moments(estimates: np.ndarray, reference: np.ndarray) -> list[list[float]]:
    """What estimates (n, P) of a gradient are worth, each as [value, low, high] (95 % bootstrap).

    With variance = trace of the covariance of one estimate, signal = squared norm of the mean:
    variance / reference's variance; signal / variance; variance / reference's signal;
    squared bias against the reference / reference's signal.
    """
    half, rng = len(estimates) // 2, np.random.default_rng(0)
    drawn = rng.multinomial(half, np.full(half, 1 / half), (2, 1000)) / half
    first, second = np.concatenate((np.full((2, 1, half), 1 / half), drawn), axis=1)
    both = np.concatenate((first, second), axis=1) / 2

    def signal(x):  # the product of two independent means, as a square of one would be too large
        return (first @ (x[:half] @ x[half:].T) * second).sum(1)

    def variance(x):
        x = x - x.mean(0)
        biased = both @ np.square(x).sum(1) - (both @ (x @ x.T) * both).sum(1)
        return biased * len(x) / (len(x) - 1)

    noise, true = variance(estimates), signal(reference)
    ratios = [noise / variance(reference), signal(estimates) / noise, noise / true]
    ratios.append(signal(estimates - reference) / true)
    found = [[r[0], *np.percentile(r[1:], (2.5, 97.5))] for r in ratios]
    return [[float(f"{value:.4g}") for value in row] for row in found]


def compare(name: str, target: float, reference: str) -> dict:
    """The moments of an experiment's estimates at one policy, against those of reference."""
    estimates, mean_return = gradients(snapshot(target), WAYS[name])
    against = estimates[list(WAYS[name]).index(reference)]
    results = {way: moments(one, against) for way, one in zip(WAYS[name], estimates)}
    return {"return": mean_return, "ways": results}


def measure(name: str, pool: Executor, seeds: int) -> dict:
    """The data of an experiment."""
    if name == "variance":
        jobs = [pool.submit(compare, name, target, "total return") for target in TARGETS]
        return {"policies": [job.result() for job in jobs]}
    data = {"runs": sweep(pool, SWEEPS[name], seeds)}
    if name == "lambda":
        data["policy"] = pool.submit(compare, name, 200, "1").result()
    return data


def written(estimate) -> str:
    return "{:.3g} [{:.3g}, {:.3g}]".format(*estimate)


def finals(runs: dict, prefix: str) -> str:
    """The greedy returns of the runs "prefix: label" in words, each label with its own."""
    told = []
    for name, run in runs.items():
        if name.startswith(prefix):
            solved = sum(value >= 475 for value in run["returns"])
            label = name.removeprefix(prefix)
            told.append(f"{label} {written(interval(run['returns']))}, {solved} solved")
    return "; ".join(told)


def draw_variance(data: dict, fig) -> str:
    policies = data["policies"]
    x = [policy["return"] for policy in policies]
    titles = "Variance (total return's is 1; low is good)", "|mean|² / variance (high is good)"
    for number, (ax, title) in enumerate(zip(fig.subplots(1, 2), titles)):
        for way, look in zip(WAYS["variance"], LOOKS):
            values = np.array([policy["ways"][way][number] for policy in policies]).T
            band(ax, x, values, look, way)
        ax.set(title=title, yscale="log", xlabel="mean return of the policy")
    fig.legend(*ax.get_legend_handles_labels(), loc="outside right center")
    fig.suptitle(
        f"CartPole-v1, {len(x)} policies of one training of vpg.py, {ESTIMATES} estimates of"
        f" {EPISODES} episodes each, 95 % bootstrap intervals"
    )
    told = []
    for policy in (policies[0], policies[len(x) // 2], policies[-1]):
        shares = [f"{way}: {written(policy['ways'][way][0])}" for way in list(WAYS["variance"])[1:]]
        told.append(f"at a return of {policy['return']:.0f}, {', '.join(shares)}")
    return (
        f"The gradient's variance as a share of total return's (V untrained at the first policy, so"
        f" that it changes nothing there): {'; '.join(told)}."
    )


def draw_lambda(data: dict, fig) -> str:
    left, right = fig.subplots(1, 2)
    policy, x = data["policy"], range(len(LAMBDAS))
    bias, variance = (
        np.array([policy["ways"][name][n] for name in WAYS["lambda"]]).T for n in (3, 2)
    )
    band(left, x[:-1], bias[:, :-1], LOOKS[4], "squared bias")
    band(left, x, variance, LOOKS[3], "variance")
    title = f"An estimate from {EPISODES} episodes, policy's return {policy['return']:.0f}"
    left.set(title=title, yscale="log", ylabel="as a share of |mean gradient at λ = 1|²")
    runs = data["runs"].values()
    greedy = interval(np.transpose([run["returns"] for run in runs]))
    during = interval(np.transpose([np.mean(run["curves"], axis=1) for run in runs]))
    band(right, x, greedy, LOOKS[3], "greedy, after training")
    band(right, x, during, LOOKS[1], "mean over training")
    right.set(title=f"vpg.py, {data['seeds']} seeds, 50,000 steps", ylabel="return")
    for ax in (left, right):
        ax.set_xticks(x, WAYS["lambda"])
        ax.set_xlabel("λ")
        ax.legend()
    fig.suptitle("CartPole-v1, GAE's λ, 95 % bootstrap intervals")
    best, least = during[0].argmax(), (bias + variance)[0].argmin()
    told = [
        f"λ = {name} has squared bias {written(bias[:, n])} and variance {written(variance[:, n])}"
        for n, name in enumerate(WAYS["lambda"])
        if name in ("0", "0.97", "1")
    ]
    return (
        f"At a policy of return {policy['return']:.0f}, {', '.join(told)}, as shares of the squared"
        f" mean gradient at λ = 1; variance is least at λ = {LAMBDAS[variance[0].argmin()]:g},"
        f" the sum at λ = {LAMBDAS[least]:g}; training"
        f" returns most on average at λ = {LAMBDAS[best]:g}, {written(during[:, best])},"
        f" against {written(during[:, 0])} at λ = 0 and {written(during[:, -1])} at λ = 1."
    )


def draw_panels(data: dict, fig, titles: dict[str, str]) -> None:
    """Learning curves of the runs "panel: label", with a title for each panel."""
    for ax, panel in zip(fig.subplots(1, len(titles), sharey=True), titles):
        runs = [(name, run) for name, run in data["runs"].items() if name.startswith(panel)]
        for (name, run), look in zip(runs, LOOKS):
            steps = np.linspace(run["steps"] / 50, run["steps"], 50) / 1000
            label = name.removeprefix(f"{panel}: ")
            band(ax, steps, interval(run["curves"]), look, label)
        ax.set(
            title=titles[panel], xlabel="environment steps (thousands)", xlim=(0, 66), ylim=(0, 510)
        )
    fig.axes[0].set_ylabel("return of training episodes")
    fig.legend(*fig.axes[0].get_legend_handles_labels(), loc="outside right center")
    about = f"mean and 95 % bootstrap interval over {data['seeds']} seeds"
    fig.suptitle(f"CartPole-v1, {about}")


def draw_ladder(data: dict, fig) -> str:
    titles = {"tutorial": "the tutorial's configuration"}
    titles["defaults"] = "our defaults (REINFORCE goes on to 200,000)"
    draw_panels(data, fig, titles)
    ours, theirs = (finals(data["runs"], prefix) for prefix in ("defaults: ", "tutorial: "))
    return (
        "Greedy return after training at the tutorial's configuration (50,000 steps, which are"
        f" four rollouts of 16,384, but 8 episodes in REINFORCE): {theirs}; at our defaults"
        f" (50,000 steps, REINFORCE 200,000): {ours}."
    )


def draw_clipping(data: dict, fig) -> str:
    draw_panels(data, fig, {rate: f"learning rate\n{rate}" for rate in RATES})
    told, table = (
        {},
        ["| learning rate: clip | greedy return | solved | collapsed | steps to a mean of 200 |"],
    )
    table += ["|---" * 5 + "|"]
    for name, run in data["runs"].items():
        curves = np.array(run["curves"])
        # Means of five points, as a rollout may tell of one short episode alone.
        smooth = np.lib.stride_tricks.sliding_window_view(curves, 5, axis=1).mean(-1)
        peaks = np.maximum.accumulate(smooth, axis=1)
        collapsed = ((peaks >= 200) & (smooth < peaks / 2)).any(1).sum()
        above = np.flatnonzero(curves.mean(0) >= 200)
        reached = f"{(above[0] + 1) * run['steps'] / 50:,.0f}" if len(above) else "never"
        solved = sum(value >= 475 for value in run["returns"])
        greedy = written(interval(run["returns"]))
        table += [f"| {name} | {greedy} | {solved} | {collapsed} | {reached} |"]
        told[name] = str(collapsed)
    said = []
    for rate in RATES:
        counts = ", ".join(told[name] for name in told if name.startswith(f"{rate}: "))
        said.append(f"{counts} at learning rate {rate}")
    sentence = (
        f"With {', '.join(CLIPS)} and VPG so many of {data['seeds']} seeds collapsed (training"
        f" returns fell below half of an earlier one of 200 or more): {'; '.join(said)}."
    )
    return "\n".join([sentence, "", *table])


def draw_stepsize(data: dict, fig) -> str:
    left, right = fig.subplots(1, 2, sharey=True, width_ratios=(2, 1))
    told = []
    for name, look in zip(SCRIPTS, LOOKS):
        ax, x = (right, KLS) if name == "TRPO" else (left, GRID)
        returns = [data["runs"][f"{name}: {value:.1e}"]["returns"] for value in x]
        means = interval(np.transpose(returns))
        band(ax, x, means, look, name)
        good, best = x[means[0] >= 475], means[0].argmax()
        span = f"at {', '.join(f'{value:.1e}' for value in good) or 'none'}"
        told.append(
            f"{name} {span} (best, {x[best]:.1e}: {written(means[:, best])};"
            f" largest, {x[-1]:.1e}: {written(means[:, -1])})"
        )
    left.set(
        xlabel="learning rate (PPO: of actor and critic)",
        ylabel="greedy return after training",
        xscale="log",
    )
    right.set(xlabel="target KL, nats", xscale="log", ylim=(0, 510))
    for ax in (left, right):
        ax.legend()
    about = f"mean and 95 % bootstrap interval over {data['seeds']} seeds"
    fig.suptitle(f"CartPole-v1, 50,000 steps (REINFORCE 200,000), {about}")
    return (
        f"Of learning rates from {GRID[0]:g} to {GRID[-1]:g} (PPO's moves its critic too, VPG's"
        f" does not), for TRPO target KLs from {KLS[0]:g} to {KLS[-1]:g}, a mean return of 475"
        f" or more has {'; '.join(told)}."
    )


DRAWINGS = {
    "variance": draw_variance,
    "lambda": draw_lambda,
    "ladder": draw_ladder,
    "clipping": draw_clipping,
    "stepsize": draw_stepsize,
}


def report(name: str) -> None:
    """Draws NAME.png, and writes experiments.md with a sentence for each experiment with data."""
    plt.rcParams |= {"font.size": 10, "axes.grid": True, "grid.alpha": 0.3}
    lines = ["# The tutorial's claims as experiments", ""]
    lines += ["Written by `benchmarks/experiments.py`; x [low, high] is a 95 % bootstrap interval,"]
    lines += ["solved is a mean greedy return of 475 or more over 20 episodes after training."]
    for known, draw in DRAWINGS.items():
        if not (file := RESULTS / f"{known}.json").exists():
            continue
        data, fig = (
            json.loads(file.read_text()),
            plt.figure(figsize=(10, 4.2), layout="constrained"),
        )
        sentence = draw(data, fig)
        if known == name:
            fig.savefig(RESULTS / f"{known}.png", dpi=120)
        plt.close(fig)
        trained = f"{data['seeds']} seed{'s'[: data['seeds'] > 1]}, {data['seconds']} s"
        command = f"`python -m uv run --extra bench benchmarks/experiments.py {known}`"
        lines += ["", f"## {known}", "", sentence, "", f"![{known}]({known}.png)", ""]
        lines += [f"{command} ({trained} on {data['machine']})"]
    (RESULTS / "experiments.md").write_text("\n".join(lines) + "\n")


def main(options: Options) -> None:
    file = RESULTS / f"{options.name}.json"
    seeds = SEEDS[options.name] if options.seeds is None else options.seeds
    if seeds < 2 and options.name != "variance":
        raise SystemExit(f"--seeds {seeds}: an interval needs at least 2")
    if options.name == "variance" and seeds != 1:
        raise SystemExit(f"--seeds {seeds}: variance looks at one training")
    if options.workers < 1:
        raise SystemExit(f"--workers {options.workers}: must be at least 1")
    if options.redraw and not file.exists():
        raise SystemExit(f"--redraw: {file} does not exist, run without --redraw first")
    if not options.redraw:
        start = time.perf_counter()
        with ProcessPoolExecutor(options.workers) as pool:
            data = measure(options.name, pool, seeds)
        machine = f"{platform.machine()}, {os.cpu_count()} cores, {options.workers} workers"
        machine += f", Python {platform.python_version()}, torch {torch.__version__}"
        about = {"machine": machine, "seeds": seeds, "seconds": round(time.perf_counter() - start)}
        file.write_text(json.dumps(about | data, separators=(",", ":")) + "\n")
    report(options.name)


if __name__ == "__main__":
    main(tyro.cli(Options))
