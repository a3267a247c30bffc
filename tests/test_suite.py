"""The benchmark suite: runs end, go on and fail as they should, and the report counts right."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "benchmarks"))
import suite  # noqa: E402

SMALL = "--total-timesteps 2048 --eval-episodes 2"


def test_names_give_their_commands():
    entries = suite.plan(suite.Options(only=["acrobot-ppo"], seeds=3), ["--num-envs", "4"])
    command = suite.COMMANDS["acrobot-ppo"]["command"] + " --num-envs 4"
    goal = suite.COMMANDS["acrobot-ppo"]["goal"]
    assert entries == {"acrobot-ppo": {"command": command, "seeds": 3, "goal": goal}}
    assert suite.plan(suite.Options(), []) == suite.COMMANDS


def test_scripts_and_environments_are_crossed():
    scripts, env_ids = ["ppo.py", "vpg.py"], ["CartPole-v1", "ALE/Pong-v5"]
    entries = suite.plan(suite.Options(scripts=scripts, env_ids=env_ids), [])
    assert " ".join(entries) == "CartPole-v1-ppo CartPole-v1-vpg ALE-Pong-v5-ppo ALE-Pong-v5-vpg"
    assert entries["ALE-Pong-v5-vpg"] == {"command": "vpg.py --env-id ALE/Pong-v5", "seeds": 5}


@pytest.mark.parametrize(
    "wanted, named",
    [
        ({"only": ["pong"]}, "pong"),
        ({"scripts": ["ppo.py"]}, "--env-ids"),
        ({"scripts": ["a2c.py"], "env_ids": ["CartPole-v1"]}, "a2c.py"),
        ({"seeds": 0}, "--seeds 0"),
    ],
)
def test_what_cannot_be_planned_is_named(wanted, named):
    with pytest.raises(SystemExit, match=named):
        suite.plan(suite.Options(**wanted), [])


def test_a_folder_has_one_suite_and_one_command_a_name(tmp_path):
    entry = {"command": "ppo.py", "seeds": 1}
    lock = suite.claim(tmp_path, {"one": entry})
    with pytest.raises(SystemExit, match="another suite"):
        suite.claim(tmp_path, {"one": entry})
    lock.close()
    suite.claim(tmp_path, {"one": entry | {"seeds": 2}}).close()
    with pytest.raises(SystemExit, match=r"vpg\.py"):
        suite.claim(tmp_path, {"one": entry | {"command": "vpg.py"}})


def test_a_run_starts_then_goes_on_then_is_left_alone(tmp_path):
    job = f"vpg.py {SMALL} --num-envs 2", 7, tmp_path, []
    assert suite.run(*job)[0] == 0
    (evaluation,) = tmp_path.glob("runs/*/evaluation.json")
    (evaluation.parents[1] / f"{evaluation.parent.name}.new").mkdir()  # of a run killed at birth
    (evaluation.parents[1] / f"{evaluation.parent.name}.new" / "checkpoint.pt").touch()
    score = evaluation.read_text()
    evaluation.unlink()
    assert suite.run(*job)[0] == 0
    assert evaluation.read_text() == score
    assert suite.run(*job) == (0, "")
    started = [line for line in (tmp_path / "log.txt").read_text().splitlines() if line[:1] == "$"]
    assert ["--seed 7" in line for line in started] == [True, False]
    assert f"--resume runs/{evaluation.parent.name}" in started[1]


def test_a_failed_run_tells_its_last_lines(tmp_path):
    status, lines = suite.run("vpg.py --gamma 2", 1, tmp_path, [])
    assert status == 1
    assert "ValueError: --gamma 2" in lines.splitlines()[-1]


def call(script: str, arguments: str) -> subprocess.CompletedProcess:
    process = [sys.executable, ROOT / "benchmarks" / script, *shlex.split(arguments)]
    return subprocess.run(process, capture_output=True, text=True)


def test_the_suite_on_ray_and_its_report(tmp_path):
    pytest.importorskip("ray")
    pytest.importorskip("matplotlib")
    arguments = (
        f"--folder {tmp_path} --scripts ppo.py vpg.py --env-ids CartPole-v1 --seeds 1 --workers 2"
        f" --address local -- {SMALL} --num-minibatches 2"
    )
    first = call("suite.py", arguments)
    assert first.returncode == 1, first
    assert "CartPole-v1-vpg seed 1 failed with status 2" in first.stderr
    assert "--num-minibatches" in first.stderr.split("CartPole-v1-vpg seed 1 failed")[1]
    assert "ppo seed 1 failed" not in first.stderr
    log = tmp_path / "CartPole-v1-ppo" / "1" / "log.txt"
    told = log.read_text()
    second = call("suite.py", arguments)
    assert "2 runs, 1 of them are finished" in second.stdout
    assert log.read_text() == told, "a finished run was run again"

    report = call("report.py", f"--folder {tmp_path}")
    assert report.returncode == 0, report
    assert "CartPole-v1-vpg: 0 of 1 runs are finished" in report.stdout
    results = json.loads((tmp_path / "learning.json").read_text())
    assert list(results) == ["CartPole-v1-ppo"]
    assert [run["seed"] for run in results["CartPole-v1-ppo"]["runs"]] == [1]
    assert (tmp_path / "learning_CartPole-v1.png").stat().st_size > 10_000


def test_the_report_keeps_results_of_before(tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("scipy")
    import report

    runs = [{"seed": s, "return": 10.0 * s, "steps": 5, "seconds": 1.0} for s in (1, 2, 3, 4)]
    old = {"cartpole-ppo": {"command": "ppo.py", "machine": "of before", "runs": runs}}
    (tmp_path / "learning.json").write_text(json.dumps(old))
    (tmp_path / "cartpole-vpg").mkdir()
    (tmp_path / "cartpole-vpg" / "command.json").write_text('{"command": "vpg.py", "seeds": 1}')
    report.main(report.Options(folder=tmp_path))
    assert json.loads((tmp_path / "learning.json").read_text()) == old
    lines = (tmp_path / "learning.md").read_text().splitlines()
    (row,) = [line.split(" | ") for line in lines if line.startswith("| `ppo.py")]
    assert row[1] == "4" and row[4:7] == ["10.0", "500", "0"]
    assert row[2].startswith("25.0 [") and row[3].startswith("25.0 [")


def test_intervals():
    pytest.importorskip("scipy")
    report = pytest.importorskip("report")
    middle, low, high = report.interval([0.0, 0.0, 1.0, 100.0], report.iqm)
    assert middle == 0.5 and low == 0 and 1 < high <= 100
    assert report.interval([3.0, 3.0]).tolist() == [3, 3, 3]
    assert report.interval([3.0])[0] == 3
    curves = report.interval([[1.0, 2.0], [3.0, 4.0]])
    assert curves[0].tolist() == [2, 3] and curves.shape == (3, 2)
