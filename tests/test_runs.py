"""A run's record is whole whenever it ends, and it goes on from there."""

import csv
import itertools
import json
import os
import random
import runpy
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from environments import LADDER, arguments

import ppo

SMALL = {"num_envs": 2, "num_steps": 64, "eval_episodes": 2, "checkpoint_interval": 2}
NORMALIZED = {"normalize_observations": True, "normalize_rewards": True}
each = pytest.mark.parametrize("script", LADDER)


def started(script, folder, monkeypatch, **wanted):
    """The folder and the arguments of a run that is trained to its end."""
    monkeypatch.chdir(folder)
    args = arguments(script, **{"env_id": "CartPole-v1", "total_timesteps": 600} | SMALL | wanted)
    script.train(args)
    (run_dir,) = Path("runs").iterdir()
    return run_dir, args


def steps(run_dir):
    with open(run_dir / "metrics.csv") as file:
        return [int(row["global_step"]) for row in csv.DictReader(file)]


@each
def test_a_run_folder_holds_its_record(script, tmp_path, monkeypatch):
    run_dir, args = started(script, tmp_path, monkeypatch)
    assert run_dir.name.startswith(f"CartPole-v1__{script.__name__}__{args.seed}__")
    names = {"args.json", "checkpoint.pt", "evaluation.json", "metrics.csv"}
    assert {file.name for file in run_dir.iterdir()} == names
    record = json.loads((run_dir / "args.json").read_text())
    assert vars(args).items() <= record.items()
    assert record["torch"] == torch.__version__ and record["numpy"] == np.__version__
    assert record["commit"]
    assert json.loads((run_dir / "evaluation.json").read_text()).keys() == {"greedy", "sampled"}
    columns = {"global_step", "charts/episodic_return", "charts/SPS", "losses/policy_loss"}
    assert columns <= set((run_dir / "metrics.csv").read_text().splitlines()[0].split(","))
    script.train(args)
    assert len(list(Path("runs").iterdir())) == 2, "the same command again overwrites nothing"


@each
def test_a_resumed_run_goes_on_in_its_folder(script, tmp_path, monkeypatch):
    run_dir, args = started(script, tmp_path, monkeypatch, **NORMALIZED)
    before, rows = steps(run_dir), (run_dir / "metrics.csv").read_text()
    checkpoint = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    assert checkpoint["global_step"] == before[-1] and len(checkpoint["rng_state"])
    assert checkpoint["learners"]["0.powers"][0, 0] == len(before)
    script.train(replace(args, resume=str(run_dir)))
    assert (run_dir / "metrics.csv").read_text() == rows, "a finished run is only evaluated"
    args = replace(args, resume=str(run_dir / "checkpoint.pt"), total_timesteps=1200)
    script.train(args)
    after = steps(run_dir)
    assert after[: len(before)] == before and len(after) > len(before)
    assert after == sorted(set(after)) and after[-1] >= 1200
    (path,) = Path("runs").iterdir()
    resumed = torch.load(path / "checkpoint.pt", weights_only=True)
    assert resumed["return_rms"]["count"] > checkpoint["return_rms"]["count"]
    if script is not ppo or not args.anneal_lr:
        return
    with open(run_dir / "metrics.csv") as file:
        row = list(csv.DictReader(file))[len(before)]
    expected = args.learning_rate * (1 - before[-1] / 1200)
    assert float(row["charts/learning_rate"]) == pytest.approx(expected)


def test_everything_that_learns_is_restored(tmp_path, monkeypatch):
    run_dir, args = started(ppo, tmp_path, monkeypatch, **NORMALIZED)
    saved, seen = torch.load(run_dir / "checkpoint.pt", weights_only=True), []

    def evaluate(agent, *_):
        seen.append(agent.state_dict())
        return 0.0

    monkeypatch.setattr(ppo, "evaluate", evaluate)
    ppo.train(replace(args, resume=str(run_dir)))
    assert all(torch.equal(seen[0][name], saved["learners"][f"0.{name}"]) for name in seen[0])
    assert torch.equal(torch.get_rng_state(), saved["rng_state"])
    again = torch.load(run_dir / "checkpoint.pt", weights_only=True)["learners"]
    assert again["1.steps"] > 0 and again.keys() == saved["learners"].keys()
    assert all(torch.equal(again[name], saved["learners"][name]) for name in again)


@each
@pytest.mark.parametrize("kind", ["absent", "truncated", "foreign", "incomplete", "other script"])
def test_what_is_no_checkpoint_is_refused_by_name(script, kind, tmp_path, monkeypatch):
    other = LADDER[LADDER.index(script) - 1]
    run_dir, _ = started(other if kind == "other script" else script, tmp_path, monkeypatch)
    path = run_dir / "checkpoint.pt"
    if kind == "absent":
        path = Path("nowhere")
    elif kind == "truncated":
        path.write_bytes(path.read_bytes()[:1000])
    elif kind == "foreign":
        torch.save({"weights": torch.zeros(3)}, path)
    elif kind == "incomplete":  # as an older version of the script wrote it
        checkpoint = torch.load(path, weights_only=True)
        del checkpoint["learners"]
        torch.save(checkpoint, path)
    with pytest.raises(ValueError, match=f"--resume {path}: no checkpoint of"):
        script.train(script.Args(resume=str(path)))


@each
@pytest.mark.parametrize("quantity", ["rewards", "observations", "policy_loss"])
def test_a_nan_stops_the_run_before_it_is_saved(script, quantity, tmp_path, monkeypatch):
    update, count = script.update, iter(range(99))

    def poisoned(agent, optimizers, batch, args):
        losses = update(agent, optimizers, batch, args)
        if next(count) == 3:
            if quantity == "policy_loss":
                return losses | {quantity: float("nan")}
            getattr(batch, quantity)[0, 0] = np.nan
        return losses

    monkeypatch.setattr(script, "update", poisoned)
    with pytest.raises(FloatingPointError, match=rf"step \d+ of runs/.*{quantity}.*nan"):
        started(script, tmp_path, monkeypatch)
    (run_dir,) = Path("runs").iterdir()
    assert (
        torch.load(run_dir / "checkpoint.pt", weights_only=True)["global_step"] == steps(run_dir)[1]
    )
    script.load_checkpoint(str(run_dir))


def forked(work):
    """Does work in a fork of this warm process; returns its id."""
    import torch._dynamo  # noqa: F401, or an optimizer would import it, for seconds, in each fork

    if (child := os.fork()) == 0:
        os.dup2(os.open("log.txt", os.O_WRONLY | os.O_CREAT), 1), os.dup2(1, 2)
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return child


def killed(args, seconds):
    child = forked(lambda: ppo.train(args))
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def kill_runs(times, folder):
    """Kills one run at `times` random instants; it must resume and lose at most an interval."""
    os.chdir(folder)
    random.seed(times)
    args = ppo.Args(**SMALL | {"total_timesteps": 10**7}, **NORMALIZED)
    lost = []
    while not Path("runs").exists() or not [p for p in Path("runs").iterdir() if not p.suffix]:
        killed(args, random.uniform(0.05, 0.4))
    (run_dir,) = (path for path in Path("runs").iterdir() if path.suffix != ".new")
    for _ in range(times):
        killed(replace(args, resume=str(run_dir)), random.uniform(0.02, 0.6))
        checkpoint = ppo.load_checkpoint(str(run_dir))
        rows = steps(run_dir) if (run_dir / "metrics.csv").exists() else []
        kept = [step for step in rows if step <= checkpoint["global_step"]]
        assert rows == sorted(set(rows)) and (kept or [0])[-1] == checkpoint["global_step"]
        assert np.diff([0, *rows]).max(initial=0) <= args.num_envs * args.num_steps
        lost.append(len(rows) - len(kept))
    assert max(lost) <= args.checkpoint_interval
    return f"{times} kills, {len(rows)} iterations, at most {max(lost)} lost by one kill"


def test_a_killed_run_resumes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kill_runs(4, tmp_path)


@pytest.mark.parametrize(
    "owner, name, nth, when, half_written",
    [
        (Path, "write_text", 0, "after", "args.json"),
        (torch, "save", 0, "after", "checkpoint.tmp"),
        (Path, "rename", 0, "before", ""),
        (Path, "rename", 0, "after", ""),
        (ppo, "update", 1, "before", "metrics.csv"),
        (torch, "save", 1, "after", "checkpoint.tmp"),
        (os, "replace", 1, "before", ""),
        (os, "replace", 1, "after", ""),
        (ppo, "update", 3, "before", "metrics.csv"),
        (Path, "write_text", 1, "after", "evaluation.tmp"),
        (os, "replace", 4, "before", ""),
    ],
)
def test_a_run_killed_at_the_worst_instant_goes_on(
    owner, name, nth, when, half_written, tmp_path, monkeypatch
):
    """Before or after the nth call of a function, the end of a file not yet on the disk."""
    monkeypatch.chdir(tmp_path)
    args, call = ppo.Args(**SMALL | {"total_timesteps": 600}), getattr(owner, name)
    calls = itertools.count()

    def deadly(*args, **kwargs):
        if next(calls) != nth:
            return call(*args, **kwargs)
        if when == "after":
            call(*args, **kwargs)
        if half_written:
            (path,) = Path("runs").glob(f"*/{half_written}")
            os.truncate(path, max(0, path.stat().st_size - 9))
        os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, deadly)
        assert os.WTERMSIG(os.waitpid(forked(lambda: ppo.train(args)), 0)[1]) == signal.SIGKILL
    runs = [path for path in Path("runs").iterdir() if path.suffix != ".new"]
    assert len(runs) == (nth > 0 or (name, when) == ("rename", "after"))
    ppo.train(replace(args, resume=str(runs[0]) if runs else None))
    (run_dir,) = (path for path in Path("runs").iterdir() if path.suffix != ".new")
    names = {"args.json", "checkpoint.pt", "evaluation.json", "metrics.csv"}
    assert {file.name for file in run_dir.iterdir()} == names
    rollout = args.num_envs * args.num_steps  # of which no more than half are resets
    assert all(rollout / 2 <= taken <= rollout for taken in np.diff([0, *steps(run_dir)]))
    assert steps(run_dir)[-1] == ppo.load_checkpoint(str(run_dir))["global_step"] >= 600


def test_ctrl_c_ends_with_a_checkpoint_and_the_command_to_resume(tmp_path):
    command = [sys.executable, ppo.__file__, "--total-timesteps", "10000000", "--num-envs", "2"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    while not list(tmp_path.glob("runs/*/metrics.csv")):
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=20)
    (run_dir,) = tmp_path.glob("runs/*")
    assert process.returncode == 0
    assert f"ppo.py --resume {run_dir.relative_to(tmp_path)}" in output
    assert ppo.load_checkpoint(str(run_dir))["global_step"] == steps(run_dir)[-1]
    flags = ["--resume", str(run_dir), "--total-timesteps", "3000", "--eval-episodes", "2"]
    subprocess.run([*command[:2], *flags], cwd=tmp_path, check=True, stdout=subprocess.PIPE)
    assert (run_dir / "evaluation.json").exists()
    assert ppo.load_checkpoint(str(run_dir))["args"]["num_envs"] == 2, "the run's own argument"


@pytest.mark.parametrize("nth, total_timesteps", [(0, 10**7), (1, 600)])
def test_ctrl_c_while_starting_or_evaluating_ends_soon(nth, total_timesteps, tmp_path, monkeypatch):
    """The first environments made are those to train in, the next those to evaluate in."""
    monkeypatch.chdir(tmp_path)
    flags = ["--total-timesteps", str(total_timesteps), "--num-envs", "2", "--num-steps", "64"]
    monkeypatch.setattr(sys, "argv", [ppo.__file__, *flags])
    calls, make_vec = itertools.count(), gym.make_vec

    def interrupted(*args, **kwargs):
        if next(calls) == nth:
            os.kill(os.getpid(), signal.SIGINT)
        return make_vec(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(gym, "make_vec", interrupted)
        child = forked(lambda: runpy.run_path(ppo.__file__, run_name="__main__"))
        assert os.waitpid(child, 0)[1] == (256 if nth else 0), Path("log.txt").read_text()
    (run_dir,) = Path("runs").iterdir()
    assert len(steps(run_dir)) == (5 if nth else 1)
    assert ppo.load_checkpoint(str(run_dir))["global_step"] == steps(run_dir)[-1]
    assert not (run_dir / "evaluation.json").exists()
    ppo.train(ppo.Args(**SMALL | {"total_timesteps": 600}, resume=str(run_dir)))
    assert len(steps(run_dir)) == 5 and (run_dir / "evaluation.json").exists()


def test_a_run_is_filmed_before_and_after_training(tmp_path, monkeypatch):
    from moviepy import VideoFileClip

    run_dir, _ = started(ppo, tmp_path, monkeypatch, capture_video=True, eval_episodes=1)
    greedy = json.loads((run_dir / "evaluation.json").read_text())["greedy"]
    frames = {}
    for path in run_dir.glob("videos/*/*.mp4"):
        with VideoFileClip(str(path)) as clip:
            frames[int(path.parent.name)] = clip.n_frames
            first, last = (clip.get_frame(time) for time in (0, clip.duration - 1 / clip.fps))
        assert first.shape == (400, 600, 3) and np.abs(first - 1.0 * last).max() > 99, "it moves"
    assert frames.keys() == {0, steps(run_dir)[-1]}
    assert frames[0] >= 9 and frames[steps(run_dir)[-1]] == greedy + 1, "reset and each step"


@pytest.mark.parametrize("module", ["moviepy", "pygame"])
def test_what_filming_lacks_is_told_before_training(module, tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.startswith(module)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        (ValueError, gym.error.DependencyNotInstalled), match=f"(?i){module}.*install"
    ):
        ppo.train(ppo.Args(capture_video=True))
    assert not list(tmp_path.glob("runs/*/metrics.csv"))


@pytest.mark.parametrize("env_id", ["my/Scripted-v0", "environments:Scripted-v0"])
def test_a_run_in_a_thread_of_an_environment_with_a_long_name_resumes(
    env_id, tmp_path, monkeypatch
):
    with ThreadPoolExecutor(1) as thread:
        job = thread.submit(started, ppo, tmp_path, monkeypatch, env_id=env_id)
        run_dir, args = job.result()
        assert run_dir.parent == Path("runs") and "Scripted-v0__ppo__1__" in run_dir.name
        args = replace(args, resume=str(run_dir), total_timesteps=1200)
        thread.submit(ppo.train, args).result()
    assert steps(run_dir)[-1] >= 1200


def test_unknown_and_uninstalled_environments_say_what_would_do():
    with pytest.raises(ValueError, match=r"--env-id CartPoll-v1: .*CartPole"):
        ppo.make_envs(ppo.Args("CartPoll-v1"), 2)
    with pytest.raises(ValueError, match=r"--env-id LunarLander-v3: .*pip install"):
        ppo.make_envs(ppo.Args("LunarLander-v3"), 2)
    with pytest.raises(ValueError, match="--vectorization-mode fast"):
        ppo.make_envs(ppo.Args(), 2, "fast")


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        print(kill_runs(int(sys.argv[1]), folder))
