"""W&B logging, with the real client: whole offline, whole online, never in the training's way."""

import csv
import json
import os
import pty
import subprocess
import sys
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import ppo

SCRIPT = Path(__file__).resolve().parents[1] / "ppo.py"
SMALL = ["--num-envs", "2", "--num-steps", "64", "--eval-episodes", "2"]
FLAGS = [
    SCRIPT,
    *SMALL,
    "--track",
    "--wandb-project-name",
    "p",
    "--wandb-group",
    "g",
    "--total-timesteps",
]


def environment(folder):
    """Variables under which no W&B account is found and, if asked for, no server."""
    base = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "NETRC"))}
    base |= {"HOME": str(folder), "PYTHONPATH": str(SCRIPT.parent), "WANDB_FINISH_TIMEOUT": "2"}
    return base | {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_INIT_TIMEOUT": "2"}


def run_script(folder, *arguments, **env):
    """Run Python on these arguments with no terminal; return what it printed and its run folder."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=folder, env=environment(folder) | env,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, timeout=90,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return done.stdout, next(folder.glob("runs/*"))


def metrics_steps(run_dir):
    with open(run_dir / "metrics.csv") as file:
        return [int(row["global_step"]) for row in csv.DictReader(file)]


def wandb_records(run_dir):
    """Each record of the fullest local W&B run as (type, content), from wandb's own reader."""
    path = max(run_dir.glob("wandb/*/*.wandb"), key=lambda path: path.stat().st_size)
    reader = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", path]
    lines = subprocess.run(reader, capture_output=True, text=True, check=True).stdout.splitlines()
    return [(record["type"], record[record["type"]]) for record in map(json.loads, lines)]


def wandb_steps(run_dir):
    steps = [
        content["step"]["num"] for kind, content in wandb_records(run_dir) if kind == "history"
    ]
    return sorted(set(steps))  # the scores of the end belong to the last step


class Server(BaseHTTPRequestHandler):
    """Just enough of W&B's interface for a run to start, to upload its history and to resume."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.habit = body.get("habit", self.server.habit)  # so that a test can change it
        habit, rows = self.server.habit, self.server.rows
        if habit == "silent" or (habit == "fading" and self.path != "/graphql"):
            return self.server.end.wait()
        rows += body.get("files", {}).get("wandb-history.jsonl", {}).get("content", [])
        run = {"name": body.get("variables", {}).get("name"), "id": "r", "displayName": "r"}
        run |= {"project": {"name": "p", "entity": {"name": "e"}}, "config": "{}", "tags": []}
        run |= {"historyLineCount": len(rows), "historyTail": json.dumps(rows[-1:])}
        run |= {"eventsLineCount": 0, "eventsTail": "[]", "logLineCount": 0}
        run |= {"summaryMetrics": "{}", "wandbConfig": '{"t": 1}'}
        answer = {"upsertBucket": {"bucket": run}, "createRunFiles": {"files": []}}
        answer["model"] = {"bucket": run if rows else None}
        self.send_response(401 if habit == "refusing" else 200)
        self.end_headers()
        self.wfile.write(json.dumps({"data": answer}).encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def server(request):
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        server.habit, server.rows, server.end = request.param, [], threading.Event()
        threading.Thread(target=server.serve_forever, daemon=True).start()
        port = 9 if server.habit == "absent" else server.server_port
        server.env = {"WANDB_BASE_URL": f"http://127.0.0.1:{port}", "WANDB_API_KEY": "0" * 40}
        yield server
        server.end.set()
        server.shutdown()


def test_without_key_the_run_is_offline_and_whole(tmp_path):
    output, run_dir = run_script(tmp_path, *FLAGS, 1024, WANDB_TAGS="a,b")
    (line,) = (line for line in output.splitlines() if "W&B is offline" in line)
    assert line.endswith(f"wandb sync {run_dir.relative_to(tmp_path)}/wandb")
    records = wandb_records(run_dir)
    run = next(content for kind, content in records if kind == "run")
    assert (run["project"], run["run_group"], run["tags"]) == ("p", "g", ["a", "b"])
    assert run["config"]["update"]["total_timesteps"] == 1024
    assert (run["run_id"], run["display_name"]) == (run_dir.name, run_dir.name)
    assert wandb_steps(run_dir) == metrics_steps(run_dir) != []
    assert ("files", {"files": [{"path": SCRIPT.name}]}) in records
    saved = list(run_dir.glob(f"wandb/*/files/{SCRIPT.name}"))
    assert saved and all(path.read_bytes() == SCRIPT.read_bytes() for path in saved)


@pytest.mark.parametrize("server", ["absent", "refusing", "silent", "fading"], indirect=True)
def test_bad_server_costs_a_warning_and_seconds(tmp_path, server):
    start = time.monotonic()
    output, run_dir = run_script(tmp_path, *FLAGS, 1024, **server.env)
    seconds = time.monotonic() - start
    print(f"{server.habit}: {seconds:.1f} s")
    assert seconds < 45 and "Traceback" not in output, output
    assert ("Timed out finishing" if server.habit == "fading" else "W&B is offline (") in output
    assert output.count("wandb sync") >= 1
    assert wandb_steps(run_dir) == metrics_steps(run_dir)


@pytest.mark.parametrize("server", ["good"], indirect=True)
def test_online_run_resumes_with_each_step_once(tmp_path, server):
    _, run_dir = run_script(tmp_path, *FLAGS, 1024, **server.env)
    run_script(tmp_path, *FLAGS, 2048, "--resume", run_dir, **server.env)
    rows = [json.loads(row) for row in server.rows]
    assert [row["_step"] for row in rows if "global_step" in row] == metrics_steps(run_dir)


PREAMBLE = f"""
import os, subprocess, sys, threading, time, wandb, {SCRIPT.stem} as script
start = time.monotonic()
small = dict(num_envs=2, num_steps=64, eval_episodes=2, total_timesteps=1024, track=True)
"""


@pytest.mark.parametrize("signal", ["KILL", "STOP"])
def test_dead_client_costs_a_warning_and_the_next_run_is_well(signal, tmp_path):
    """Nor does one that no longer reads, once the pipe to it is full; here a minute is 4 s."""
    code = f"""
def strike_then_log(run, row, **rest):
    wandb.Run.log = log  # wandb-core is the client's own child process
    subprocess.run(["pkill", "-{signal}", "-P", str(os.getpid()), "wandb-core"])
    log(run, row | {{"long": "x" * 10**6}}, **rest)
log, wandb.Run.log = wandb.Run.log, strike_then_log
script.Timer = lambda seconds, *rest: threading.Timer(seconds / 15, *rest)
script.train(script.Args(**small))
assert time.monotonic() - start < 30
script.Timer = threading.Timer
script.train(script.Args(**small, exp_name="second"))
"""
    output = run_script(tmp_path, "-c", PREAMBLE + code, WANDB_MODE="offline")[0]
    first, second = sorted(tmp_path.glob("runs/*"))
    assert output.count("W&B is offline (") == 1 and "Traceback" not in output, output
    if signal == "STOP":  # the training did not wait for it
        assert output.index("Mean return") < output.index("W&B is offline ("), output
    assert metrics_steps(first) == metrics_steps(second) == wandb_steps(second) != []
    rest = wandb_steps(first)  # in a second local run: all that the dead client had not been given
    assert rest == metrics_steps(first)[-len(rest) :]


@pytest.mark.parametrize("server", ["good", "fading"], indirect=True)
def test_exit_of_a_training_that_raises_does_not_hang(tmp_path, server):
    code = """
def update(*rest, count=[]):
    count.append(0)
    return {"policy_loss": float("nan")} if len(count) > 3 else right(*rest)
right, script.update = script.update, update
try:
    script.train(script.Args(**small))
except FloatingPointError as error:
    print(repr(error))
"""
    start = time.monotonic()
    output = run_script(tmp_path, "-c", PREAMBLE + code, **server.env)[0]
    assert time.monotonic() - start < 60
    assert output.count("FloatingPointError") == 1 and "Traceback" not in output, output


@pytest.mark.parametrize("server", ["refusing"], indirect=True)
def test_threads_and_a_failed_start_leave_the_next_run_well(tmp_path, server):
    """In one process: a run in a thread, whose key is refused, then an online one."""
    code = """
import urllib.request
first = threading.Thread(target=script.train, args=(script.Args(**small),))
first.start(), first.join()
urllib.request.urlopen(os.environ["WANDB_BASE_URL"], b'{"habit": "good"}')
script.train(script.Args(**small, exp_name="second"))
"""
    output = run_script(tmp_path, "-c", PREAMBLE + code, **server.env)[0]
    first, second = sorted(tmp_path.glob("runs/*"))
    assert output.count("W&B is offline (") == 1 and "Traceback" not in output, output
    assert wandb_steps(first) == metrics_steps(first) != []
    rows = [json.loads(row) for row in server.rows]
    assert [row["_step"] for row in rows if "global_step" in row] == metrics_steps(second) != []
    scores = json.loads((second / "evaluation.json").read_text())
    logged = {key: value for row in rows for key, value in row.items() if key in scores}
    assert logged == scores and rows[-1]["_step"] == metrics_steps(second)[-1]


@pytest.mark.parametrize("answer", ["3\n", ""])
def test_terminal_is_asked_before_training(tmp_path, answer):
    """3 means offline; where nobody answers training goes on, without W&B."""
    ours, theirs = pty.openpty()
    env = environment(tmp_path) | {"WANDB_LOGIN_TIMEOUT": "4"}
    command = [sys.executable, *map(str, FLAGS), "1024"]
    streams = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
    process = subprocess.Popen(command, cwd=tmp_path, env=env, **streams)
    os.close(theirs)
    output, asked = "", False
    with open(ours, "r+b", 0) as terminal, suppress(OSError):  # which is how it ends
        while text := terminal.read(1024).decode(errors="replace"):
            output += text
            if not asked and "Enter your choice" in output:
                asked = not list(tmp_path.glob("runs/*/metrics.csv"))
                terminal.write(answer.encode())
    assert process.wait(60) == 0, output
    assert asked and "Mean return" in output, output
    assert output.count("offline" if answer else "login timeout") and "Traceback" not in output
    (run_dir,) = tmp_path.glob("runs/*")
    assert metrics_steps(run_dir) != []
    assert not answer or wandb_steps(run_dir) == metrics_steps(run_dir)


def test_torchrun_tracks_once(tmp_path):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    output, run_dir = run_script(tmp_path, *launcher, *FLAGS, 1024)
    assert len(list(tmp_path.glob("**/*.wandb"))) == output.count("W&B is offline (") == 1, output
    assert wandb_steps(run_dir) == metrics_steps(run_dir) != []


def test_absent_client_costs_one_warning(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "wandb", None)
    small = {"num_envs": 2, "num_steps": 64, "eval_episodes": 2, "total_timesteps": 300}
    ppo.train(ppo.Args(track=True, **small))
    output = capsys.readouterr()
    assert output.out.count("W&B is offline (ModuleNotFoundError") == 1
    assert "Traceback" not in output.err
    (run_dir,) = tmp_path.glob("runs/*")
    assert (run_dir / "evaluation.json").exists() and len(metrics_steps(run_dir)) == 3
