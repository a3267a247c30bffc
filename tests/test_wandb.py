"""W&B with its real client: an offline run holds all, no account stops before training."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from environments import metrics

import ppo

CODE = """
import ppo, pytest, wandb
own = wandb.init(project="own")
small = dict(num_envs=2, num_steps=64, eval_episodes=2, total_timesteps=300, track=True)
ppo.train(ppo.Args(env_id="environments:Scripted-v0", wandb_project_name="p", **small))
assert wandb.run is own
own.log({"still": "open"})
own.finish()
del ppo.update
with pytest.raises(NameError):
    ppo.train(ppo.Args(**small))
assert wandb.run is None
"""


@pytest.mark.slow
def test_no_account_stops_first_and_an_offline_run_holds_all_and_leaves_others_alone(tmp_path):
    env = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "NETRC"))}
    here = Path(__file__).parent
    env |= {"HOME": str(tmp_path), "PYTHONPATH": f"{here}{os.pathsep}{here.parent}"}
    run = partial(subprocess.run, cwd=tmp_path, env=env, input="", capture_output=True, text=True)

    done = run([sys.executable, ppo.__file__, "--track", "--total-timesteps", "2048"])
    assert done.returncode != 0 and "wandb login" in done.stderr, done.stderr
    assert not [*tmp_path.glob("runs/*/metrics.jsonl")]
    env |= {"WANDB_MODE": "offline", "WANDB_RUN_GROUP": "g"}
    done = run([sys.executable, "-c", CODE])
    assert done.returncode == 0, done.stderr
    local = []
    for path in tmp_path.glob("wandb/offline-run-*/*.wandb"):
        lines = run([sys.executable, "-m", "wandb", "leet", "inspect", "--json", path]).stdout
        records = [json.loads(line) for line in lines.splitlines()]
        *_, found = (record["run"] for record in records if record["type"] == "run")
        rows = [record["history"] for record in records if record["type"] == "history"]
        local.append((found["project"], found, rows))
    (own, _, own_rows), (p, found, rows), (failed, *_) = sorted(local)
    assert (own, p, failed) == ("own", "p", "policy-ladder")
    assert "still" in str(own_rows)
    assert found["display_name"].startswith("environments:Scripted-v0__ppo__1__")
    assert found["run_group"] == "g"
    assert {"num_steps": 64}.items() <= found["config"]["update"].items()
    (run_dir,) = tmp_path.glob("runs/environments-Scripted-v0__ppo__1__*")
    assert {row["step"]["num"] for row in rows} == {x["global_step"] for x in metrics(run_dir)}
