"""The benchmark suite: runs end, go on and fail as they should, and the report counts right."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import tyro

import ppo

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "benchmarks"))
import suite  # noqa: E402
import sweep  # noqa: E402

SMALL = "--env-id CartPole-v1 --eval-episodes 2 --save-interval 1 --total-timesteps"
make_run = partial(suite.Run, "group/setting/program", seed=1, resume=False, goal=10.0, x=None)


def test_every_command_of_the_suite_has_flags_that_its_script_takes():
    for run in suite.plan(suite.Options(seeds=1), []):
        script, *flags = run.command.split()
        if not script.startswith("benchmarks/"):
            module = __import__(Path(script).stem)
            assert tyro.cli(module.Args, args=flags).env_id in run.command


def test_patterns_seeds_and_goals():
    runs = suite.plan(suite.Options(only=("mujoco/Hopper-v5/*",)), [])
    assert {run.name for run in runs} == {"mujoco/Hopper-v5/ppo", "mujoco/Hopper-v5/trpo"}
    assert [run.seed for run in runs] == [1, 2, 3, 4, 5] * 2
    assert runs[0].resume and runs[0].goal == 2609
    with pytest.raises(SystemExit, match="pong"):
        suite.plan(suite.Options(only=("pong",)), [])


def test_a_folder_has_one_command_a_name(tmp_path):
    options = suite.Options(folder=tmp_path)
    suite.check_commands([make_run("ppo.py")], options)
    suite.check_commands([make_run("ppo.py")], options)
    with pytest.raises(SystemExit, match=r"vpg\.py"):
        suite.check_commands([make_run("vpg.py")], options)


def execute(run: suite.Run, folder: Path) -> str:
    """In a process of its own, as a worker of Ray is."""
    code = f"import sys, suite; from pathlib import Path; sys.path.pop(0); r = suite.{run!r}\n"
    code += f"print(suite.execute(r, Path({str(folder)!r}), False))"
    kwargs = {"cwd": ROOT / "benchmarks", "capture_output": True, "text": True}
    result = subprocess.run([sys.executable, "-c", code], **kwargs)
    assert result.returncode == 0, result
    return result.stdout.strip()


@pytest.mark.parametrize("resume", [False, True])
def test_a_killed_run_starts_again_or_goes_on(tmp_path, resume):
    report = pytest.importorskip("report")
    assert execute(make_run(f"vpg.py {SMALL} 2048"), tmp_path) == ""  # stands for a killed run
    (tmp_path / "result.json").unlink()
    assert execute(make_run(f"vpg.py {SMALL} 4096", resume=resume), tmp_path) == ""
    result = json.loads((tmp_path / "result.json").read_text())
    assert len(result["parts"]) == (2 if resume else 1)
    assert "torch" in result["about"] and "commit" in result["about"]
    rows = report.read_metrics([tmp_path / "runs" / part for part in result["parts"]])
    steps = list(rows.dropna(subset="charts/SPS")["global_step"])
    assert steps == sorted(set(steps)) and steps[0] < 2048 <= 4096 <= steps[-1]


@pytest.mark.parametrize("flag, problem", [("--gamma 2", "gamma"), ("--gama 1", "SystemExit")])
def test_a_failed_run_says_why(tmp_path, flag, problem):
    assert problem in execute(make_run(f"vpg.py {SMALL} 2048 {flag}"), tmp_path)
    assert flag.split()[0].strip("-") in (tmp_path / "log.txt").read_text()
    assert not (tmp_path / "result.json").exists()


def test_the_suite_on_ray_and_its_report(tmp_path):
    pytest.importorskip("ray")
    pytest.importorskip("seaborn")
    programs = {"ppo": "ppo.py", "bad": "vpg.py --gamma 2"}
    entry = {"seeds": 1, "programs": programs, "settings": {"CartPole-v1": ""}, "goal": 1}
    (tmp_path / "commands.json").write_text(json.dumps({"mine": entry}))
    command = [sys.executable, ROOT / "benchmarks" / "suite.py", "--folder", tmp_path / "runs"]
    command += ["--commands", tmp_path / "commands.json", "--workers", "2", "--address", "local"]
    command += ["--", *SMALL.split(), "2048"]
    first = subprocess.run(command, capture_output=True, text=True)
    assert first.returncode == 1, first
    assert "mine/CartPole-v1/bad seed 1 failed: ArgumentError: gamma" in first.stderr
    second = subprocess.run(command, capture_output=True, text=True)
    assert "2 runs, 1 of them are finished" in second.stdout

    import report

    old = {"mine/Other-v1/ppo": {"command": "of before", "returns": [1.0, 2.0, 6.0], "goal": 2}}
    old["mine/Other-v1/ppo"] |= {"x": None, "about": [], "seeds": [1, 2, 3], "steps": 5}
    old["mine/Other-v1/ppo"] |= {"seconds": 1.0, "grid": [*range(5)], "curves": 3 * [[*range(5)]]}
    (tmp_path / "learning.json").write_text(json.dumps(old))
    report.main(report.Options(tmp_path / "runs", tmp_path))
    results = json.loads((tmp_path / "learning.json").read_text())
    assert list(results) == ["mine/Other-v1/ppo", "mine/CartPole-v1/ppo"]
    table = (tmp_path / "learning.md").read_text()
    assert "| Other-v1 | ppo | 3 | 3.00 [1.00, 6.00] | 1.00 | 2.00 | 2 |" in table
    assert (tmp_path / "learning_mine.png").stat().st_size > 10_000


def test_wandb_sets_booleans_in_a_sweep():
    utils = pytest.importorskip("wandb.sdk.launch.sweeps.utils")
    chosen = {"anneal_lr": False, "normalize_observations": True, "target_kl": None, "seed": 3}
    command = {"args": {name: {"value": value} for name, value in chosen.items()}}
    (parameters,) = utils.create_sweep_command_args(command)["args_json"]
    args = vars(tyro.cli(ppo.Args, args=sweep.flags(json.loads(parameters))))
    assert {name: args[name] for name in chosen} == chosen
