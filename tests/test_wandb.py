"""W&B logging, with the real client: whole offline, whole online, never in the training's way."""

import csv
import json
import os
import subprocess
import sys
import threading
import time
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


def run_script(folder, *arguments, **env):
    """Run Python on these arguments with no terminal; return what it printed and its run folder."""
    base = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "NETRC"))}
    base |= {"HOME": str(folder), "PYTHONPATH": str(SCRIPT.parent), "WANDB_FINISH_TIMEOUT": "2"}
    base |= {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_INIT_TIMEOUT": "2"}  # nobody listens
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=folder, env=base | env, text=True, check=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=90,
    )  # fmt: skip
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
    assert output.count(f"wandb sync {run_dir.relative_to(tmp_path)}/wandb") == 1
    records = wandb_records(run_dir)
    run = next(content for kind, content in records if kind == "run")
    assert (run["project"], run["run_group"], run["tags"]) == ("p", "g", ["a", "b"])
    assert run["config"]["update"]["total_timesteps"] == 1024
    assert wandb_steps(run_dir) == metrics_steps(run_dir) != []
    assert ("files", {"files": [{"path": SCRIPT.name}]}) in records
    saved = list(run_dir.glob(f"wandb/*/files/{SCRIPT.name}"))
    assert saved and all(path.read_bytes() == SCRIPT.read_bytes() for path in saved)


@pytest.mark.parametrize("server", ["absent", "refusing", "silent", "fading"], indirect=True)
def test_bad_server_costs_a_warning_and_seconds(tmp_path, server):
    start = time.monotonic()
    output, run_dir = run_script(tmp_path, *FLAGS, 1024, **server.env)
    assert time.monotonic() - start < 45
    assert ("Timed out finishing" if server.habit == "fading" else "Warning: W&B: ") in output
    assert output.count("wandb sync") >= 1
    assert wandb_steps(run_dir) == metrics_steps(run_dir)


@pytest.mark.parametrize("server", ["good"], indirect=True)
def test_online_run_resumes_with_each_step_once(tmp_path, server):
    _, run_dir = run_script(tmp_path, *FLAGS, 1024, **server.env)
    run_script(tmp_path, *FLAGS, 2048, "--resume", run_dir, **server.env)
    rows = [json.loads(row) for row in server.rows]
    assert [row["_step"] for row in rows if "global_step" in row] == metrics_steps(run_dir)


@pytest.mark.parametrize("signal", ["KILL", "STOP"])
def test_dead_client_costs_a_warning_and_the_next_run_is_well(signal, tmp_path):
    """Nor does one that no longer reads, once the pipe to it is full; here a minute is 2 s."""
    code = f"""
import os, subprocess, threading, time, {SCRIPT.stem} as script
start = time.monotonic()
def strike_then_attempt(call, *args, **kwargs):
    if call.__name__ == "log":  # wandb-core is the client's own child process
        subprocess.run(["pkill", "-{signal}", "-P", str(os.getpid()), "wandb-core"])
        args = ({{**args[0], "long": "x" * 10**6}},)
        script.Timer = lambda seconds, *rest: threading.Timer(seconds / 30, *rest)
    return attempt(call, *args, **kwargs)
attempt, script.attempt = script.attempt, strike_then_attempt
small = dict(num_envs=2, num_steps=64, eval_episodes=2, total_timesteps=1024)
script.train(script.Args(track=True, **small))
assert time.monotonic() - start < 30
script.attempt, script.Timer = attempt, threading.Timer
script.train(script.Args(track=True, **small, exp_name="second"))
"""
    output, _ = run_script(tmp_path, "-c", code, WANDB_MODE="offline")
    first, second = sorted(tmp_path.glob("runs/*"))
    told = output.split("Mean return")[0]
    assert told.count("W&B is offline") == told.count("Warning: W&B: Conn") == 1, output
    assert metrics_steps(first) == metrics_steps(second) == wandb_steps(second) != []


def test_absent_client_costs_one_warning(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "wandb", None)
    small = {"num_envs": 2, "num_steps": 64, "eval_episodes": 2, "total_timesteps": 300}
    ppo.train(ppo.Args(track=True, **small))
    assert capsys.readouterr().out.count("Warning: W&B: ModuleNotFoundError") == 1
    (run_dir,) = tmp_path.glob("runs/*")
    assert (run_dir / "evaluation.json").exists() and len(metrics_steps(run_dir)) == 3
