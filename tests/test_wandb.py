"""W&B with its real client: an offline run holds all, no account stops before training."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from environments import metrics

import ppo

HERE = Path(__file__).resolve().parent
CODE = """
import environments, math, ppo, wandb
own = wandb.init(project="own")
small = dict(num_envs=2, num_steps=64, eval_episodes=2, total_timesteps=300, track=True)
ppo.train(ppo.Args(env_id="environments:Scripted-v0", wandb_project_name="p", **small))
assert wandb.run is own
own.log({"still": "open"})
own.finish()

def update(*_):
    raise ZeroDivisionError
ppo.update = update
try:
    ppo.train(ppo.Args(**small))
except ZeroDivisionError:
    assert wandb.run is None
    print("it raised")
"""


def run_python(folder, *arguments, **variables):
    """Runs Python without a terminal, where no W&B account is found."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "NETRC"))}
    env |= {"HOME": str(folder), "PYTHONPATH": f"{HERE}:{HERE.parent}"} | variables
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True,
    )  # fmt: skip


def read(path):
    """The run and the history of a local W&B file, from wandb's own reader."""
    reader = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", path]
    lines = subprocess.run(reader, capture_output=True, text=True, check=True).stdout.splitlines()
    records = [json.loads(line) for line in lines]
    *_, run = (record["run"] for record in records if record["type"] == "run")
    return run, [record["history"] for record in records if record["type"] == "history"]


@pytest.mark.slow
def test_an_offline_run_holds_all_and_leaves_other_runs_alone(tmp_path):
    done = run_python(tmp_path, "-c", CODE, WANDB_MODE="offline", WANDB_RUN_GROUP="g")
    assert done.returncode == 0 and "it raised" in done.stdout, done.stderr
    (run_dir,) = tmp_path.glob("runs/environments-Scripted-v0__ppo__1__*")
    local = [read(path) for path in tmp_path.glob("wandb/offline-run-*/*.wandb")]
    local.sort(key=lambda pair: pair[0]["project"])
    assert [run["project"] for run, _ in local] == ["own", "p", "policy-ladder"]
    (_, own_rows), (run, rows), _ = local
    assert "still" in str(own_rows)
    assert run["display_name"].startswith("environments:Scripted-v0__ppo__1__")
    assert run["run_group"] == "g"
    assert json.loads(json.dumps(run["config"]["update"])).items() >= {"num_steps": 64}.items()
    steps = {row["step"]["num"] for row in rows}
    assert steps == {row["global_step"] for row in metrics(run_dir)}


@pytest.mark.slow
def test_without_an_account_its_own_error_comes_before_training(tmp_path):
    done = run_python(tmp_path, ppo.__file__, "--track", "--total-timesteps", "2048")
    assert done.returncode != 0
    assert "wandb login" in done.stderr, done.stderr
    assert not [*tmp_path.glob("runs/*/metrics.jsonl")]
