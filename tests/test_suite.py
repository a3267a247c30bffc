"""The benchmark suite: runs end, go on and fail as they should, and the report counts right."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tyro

import ppo

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))
import suite
import sweep

SMALL = "--env-id CartPole-v1 --eval-episodes 2 --save-interval 1 --total-timesteps"


def test_scripts_take_the_flags_of_the_suites_commands_and_of_a_wandb_sweep():
    for run in suite.plan(suite.Options(seeds=1), []):
        script, *flags = run.command.split()
        if not script.startswith("benchmarks/"):
            module = __import__(Path(script).stem)
            assert tyro.cli(module.Args, args=flags).env_id in run.command
    utils = pytest.importorskip("wandb.sdk.launch.sweeps.utils")
    chosen = {"anneal_lr": False, "normalize_observations": True, "target_kl": None, "seed": 3}
    command = {"args": {name: {"value": value} for name, value in chosen.items()}}
    (parameters,) = utils.create_sweep_command_args(command)["args_json"]
    args = vars(tyro.cli(ppo.Args, args=sweep.flags(json.loads(parameters))))
    assert {name: args[name] for name in chosen} == chosen


def test_patterns_seeds_goals_and_one_command_a_name_in_a_folder(tmp_path):
    options = suite.Options(only=("mujoco/Hopper-v5/*",), folder=tmp_path)
    runs = suite.plan(options, [])
    assert {run.name for run in runs} == {"mujoco/Hopper-v5/ppo", "mujoco/Hopper-v5/trpo"}
    assert [run.seed for run in runs] == [1, 2, 3, 4, 5] * 2
    assert runs[0].resume and runs[0].goal == 2609
    suite.check_commands(runs, options)
    suite.check_commands(runs, options)
    with pytest.raises(SystemExit, match="--gamma 1"):
        suite.check_commands(suite.plan(options, ["--gamma", "1"]), options)
    with pytest.raises(SystemExit, match="pong"):
        suite.plan(suite.Options(only=("pong",)), [])


@pytest.mark.slow
def test_a_run_says_why_it_failed_and_a_killed_one_goes_on_or_starts_again(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_PROGRAM", "")  # so that it is as before after the test
    # A worker of Ray has neither the run's folder nor its script at hand.
    monkeypatch.chdir(tmp_path.parent)
    monkeypatch.setattr(sys, "path", [x for x in sys.path if Path(x) != suite.ROOT])
    monkeypatch.delitem(sys.modules, "vpg", raising=False)
    result = tmp_path / "result.json"

    def execute(flags, resume=False):
        run = suite.Run("group/setting/program", f"vpg.py {SMALL} {flags}", 1, resume, 10.0, None)
        return suite.execute(run, tmp_path, False)

    assert "ValueError: gamma" in execute("2048 --gamma 2") and not result.exists()
    assert "SystemExit" in execute("2048 --gama 1") and not result.exists()
    log = (tmp_path / "log.txt").read_text()
    assert "must be at most 1" in log and "Unrecognized options: --gama" in log

    report = pytest.importorskip("report")
    for total, resume, parts in [(2048, True, 1), (4096, True, 2), (4096, False, 1)]:
        assert execute(total, resume) == ""
        record = json.loads(result.read_text())
        assert len(record["parts"]) == parts
        args = json.loads((tmp_path / "runs" / record["parts"][-1] / "args.json").read_text())
        assert bool(args["resume"]) == (parts == 2)
        assert "torch" in record["about"] and "commit" in record["about"]
        rows = report.read_metrics([tmp_path / "runs" / part for part in record["parts"]])
        steps = list(rows.dropna(subset="losses/entropy")["global_step"])
        assert steps == sorted(set(steps)) and steps[0] < 2048 <= total <= steps[-1]
        result.unlink()  # as if it had been killed


@pytest.mark.slow
def test_the_suite_on_ray_and_its_report(tmp_path):
    pytest.importorskip("ray")
    report = pytest.importorskip("report")
    programs = {"ppo": "ppo.py", "bad": "vpg.py --gamma 2"}
    entry = {"seeds": 1, "programs": programs, "settings": {"CartPole-v1": ""}, "goal": 1}
    (tmp_path / "commands.json").write_text(json.dumps({"mine": entry}))
    flags = f"--folder runs --commands commands.json --workers 2 --address local -- {SMALL} 2048"
    command = [sys.executable, suite.__file__, *flags.split()]
    first = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert first.returncode == 1, first
    assert "mine/CartPole-v1/bad seed 1 failed: ValueError: gamma" in first.stderr
    second = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert "2 runs, 1 of them are finished" in second.stdout

    old = {"command": "of before", "returns": [1.0, 2.0, 6.0], "goal": 2, "x": None, "about": []}
    old |= {"seeds": [1, 2, 3], "steps": 5, "grid": [*range(5)], "curves": 3 * [[*range(5)]]}
    (tmp_path / "learning.json").write_text(json.dumps({"mine/Other-v1/ppo": old}))
    report.main(report.Options(tmp_path / "runs", tmp_path))
    results = json.loads((tmp_path / "learning.json").read_text())
    assert list(results) == ["mine/Other-v1/ppo", "mine/CartPole-v1/ppo"]
    table = (tmp_path / "learning.md").read_text()
    assert "| Other-v1 | ppo | 3 | 3.00 [1.00, 6.00] | 1.00 | 2.00 | 2 |" in table
    assert (tmp_path / "learning_mine.png").stat().st_size > 10_000
