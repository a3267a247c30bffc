"""Runs scripts x environments x seeds, each as a process of the script itself, scheduled by Ray.

    python -m uv run benchmarks/suite.py [--only cartpole-ppo ...]     # of benchmarks/commands.json
    python -m uv run benchmarks/suite.py --folder mine --scripts ppo.py vpg.py \
        --env-ids CartPole-v1 Acrobot-v1 --seeds 5 [-- any flags of the scripts]

A run lives in FOLDER/NAME/SEED: runs/ as the script writes it, and log.txt. The same command again
skips what is finished and resumes what has a checkpoint; benchmarks/report.py tells the results.
Ray starts on this machine alone, unless --address or RAY_ADDRESS names a cluster; there FOLDER and
this project must be at the same path on each machine (a shared filesystem), with its packages
in the Python that `ray start` uses; RAY_AUTH_MODE=token if it has a token. Linux and macOS.
"""

import ctypes
import fcntl
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import tyro
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = json.loads((ROOT / "benchmarks" / "commands.json").read_text())


@dataclass
class Options:
    only: list[str] = field(default_factory=list)  # names of commands.json; all, if none is given
    scripts: list[str] = field(default_factory=list)  # instead of those: each of these scripts
    env_ids: list[str] = field(default_factory=list)  # in each of these environments
    seeds: int | None = None  # runs of each, with seeds 1 to this; commands.json's, or 5
    folder: Path = Path("suite")  # where runs live
    workers: int | None = None  # runs at a time on this machine alone; one a core by default
    address: str | None = None  # an existing Ray cluster's: auto, HOST:PORT or ray://HOST:PORT
    gpus: float = 0  # GPUs that a run takes, 0.25 puts four on one; for -- --device cuda
    track: bool = False  # log to Weights & Biases
    wandb_project_name: str = "policy-ladder"  # project there
    wandb_entity: str | None = None  # team there
    wandb_group: str | None = None  # group of all runs there, by default the folder's name


def plan(options: Options, flags: list[str]) -> dict[str, dict]:
    """What to run, by name: command, seeds and perhaps a goal, as in commands.json."""
    if bool(options.scripts) != bool(options.env_ids) or (options.scripts and options.only):
        raise SystemExit("give --scripts and --env-ids together, and no --only with them")
    if unknown := set(options.only) - set(COMMANDS):
        raise SystemExit(f"--only {sorted(unknown)}: must be among {sorted(COMMANDS)}")
    if options.seeds is not None and options.seeds < 1:
        raise SystemExit(f"--seeds {options.seeds}: must be at least 1")
    if missing := [script for script in options.scripts if not (ROOT / script).is_file()]:
        raise SystemExit(f"--scripts {missing}: no such file in {ROOT}")
    entries = {
        f"{env_id.replace('/', '-')}-{Path(script).stem}": {
            "command": shlex.join([script, "--env-id", env_id]),
            "seeds": 5,
        }
        for env_id in options.env_ids
        for script in options.scripts
    } or {name: dict(COMMANDS[name]) for name in options.only or COMMANDS}
    for entry in entries.values():
        entry["command"] = shlex.join([*shlex.split(entry["command"]), *flags])
        entry["seeds"] = options.seeds or entry["seeds"]
    return entries


def claim(folder: Path, entries: dict[str, dict]):
    """Notes each command in its folder, where no other may be. Returns the folder's lock."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = open(folder / "lock", "w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise SystemExit(f"--folder {folder}: another suite is running there") from None
    for name, entry in entries.items():
        file = folder / name / "command.json"
        if file.exists() and (was := json.loads(file.read_text())["command"]) != entry["command"]:
            raise SystemExit(
                f"--folder {folder}: its {name} is `{was}`, not `{entry['command']}`;"
                " take another --folder, or remove that one"
            )
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(entry) + "\n")
    return lock


def finished(folder: Path) -> bool:
    return any(folder.glob("runs/*/evaluation.json"))


def end_with_parent() -> None:
    """In a script's process: a worker that is killed takes it along, and SIGINT comes through."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # Ray's processes block it


def run(command: str, seed: int, folder: Path, extra: list[str]) -> tuple[int, str]:
    """Starts or resumes one run, here on a Ray worker: its exit status and last lines of output."""
    if finished(folder):
        return 0, ""
    script, *flags = shlex.split(command)
    arguments = [*flags, "--seed", str(seed)]
    if checkpoints := sorted(folder.glob("runs/*[0-9]/checkpoint.pt")):  # the name ends in its time
        arguments = ["--resume", str(checkpoints[-1].parent.relative_to(folder))]
    about = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    (folder / "machine.txt").write_text(about)
    process = [sys.executable, str(ROOT / script), *arguments, *extra]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TQDM_MININTERVAL": "60"}
    with open(folder / "log.txt", "a+") as log:
        start = log.tell()
        print("\n$", shlex.join(process), file=log, flush=True)
        script = subprocess.Popen(
            process,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            preexec_fn=end_with_parent,
        )
        try:
            while script.poll() is None:  # not wait(), which ray.cancel could not interrupt
                time.sleep(0.1)
        except KeyboardInterrupt:
            script.send_signal(signal.SIGINT)  # it writes a checkpoint
            script.wait()
        log.seek(start)
        lines = log.read().splitlines()
    if script.returncode == 0 and not finished(folder):
        lines.append("ended without evaluation.json")
    return 0 if finished(folder) else script.returncode or 1, "\n".join(lines[-10:])


def connect(options: Options):
    """Ray, started on this machine or connected to a cluster."""
    os.environ |= {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # else `uv run` makes each worker an environment
        "RAY_worker_niceness": "0",  # runs are timed
    }
    import ray

    address = options.address or os.environ.get("RAY_ADDRESS") or "local"
    local = {"num_cpus": options.workers, "include_dashboard": False}
    if address != "local":
        local = {}
        if options.workers is not None:
            raise SystemExit(f"--workers {options.workers}: the cluster {address} decides that")
    # A shell's background process ignores SIGINT, and so would the workers, whom it cancels.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    ray.init(address, log_to_driver=False, logging_level="warning", **local)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does
    return ray


def main(options: Options, flags: list[str]) -> None:
    entries, options.folder = plan(options, flags), options.folder.resolve()
    lock = claim(options.folder, entries)
    runs = {
        f"{name} seed {seed}": (entry["command"], seed, options.folder / name / str(seed))
        for name, entry in entries.items()
        for seed in range(1, entry["seeds"] + 1)
    }
    waiting = {label: job for label, job in runs.items() if not finished(job[-1])}
    print(f"{options.folder}: {len(runs)} runs, {len(runs) - len(waiting)} of them are finished")
    if not waiting:
        return
    extra, failed, jobs = [], {}, {}
    if options.track:
        group = options.wandb_group or options.folder.name
        extra = ["--track", "--wandb-project-name", options.wandb_project_name]
        extra += ["--wandb-group", group]
        extra += ["--wandb-entity", options.wandb_entity] if options.wandb_entity else []
    ray = connect(options)
    task = ray.remote(num_cpus=1, num_gpus=options.gpus, max_retries=3)(run)
    for label, job in waiting.items():
        job[-1].mkdir(exist_ok=True)
        log = job[-1] / "log.txt"
        jobs[task.remote(*job, extra)] = label, log, log.stat().st_size if log.exists() else 0
    with tqdm(total=len(runs), initial=len(runs) - len(waiting), unit="run") as progress:
        try:
            while jobs:
                done, _ = ray.wait(list(jobs), timeout=1)
                for job in done:
                    label, log, _ = jobs.pop(job)
                    try:
                        status, lines = ray.get(job)
                    except ray.exceptions.RayError as error:
                        status, lines = 1, str(error)
                    if status:
                        failed[label] = f"{label} failed with status {status} ({log}):\n{lines}"
                    progress.update(not status)
                running = [
                    label
                    for label, log, size in jobs.values()
                    if log.exists() and log.stat().st_size > size
                ]
                counts = f"{len(failed)} failed; running: " if failed else "running: "
                progress.set_postfix_str(counts + ", ".join(running))
        except KeyboardInterrupt:
            for job in jobs:
                ray.cancel(job)
            ray.wait(list(jobs), num_returns=len(jobs), timeout=60)
            failed["interrupted"] = "Interrupted; the same command goes on from the checkpoints."
    ray.shutdown()
    lock.close()
    if failed:
        raise SystemExit("\n\n".join(["", *failed.values()]))


if __name__ == "__main__":
    arguments = sys.argv[1:]
    split = arguments.index("--") if "--" in arguments else len(arguments)
    main(tyro.cli(Options, args=arguments[:split]), arguments[split + 1 :])
