"""Runs programs x settings x seeds of benchmarks/commands.json, scheduled by Ray.

    python -m uv run --extra suite benchmarks/suite.py --only 'cartpole/*' -- FLAGS OF THE SCRIPTS

A run lives in FOLDER/GROUP/SETTING/PROGRAM/SEED: runs/ as the script writes it, log.txt, and
result.json once it has finished. The same command again leaves finished runs alone. It starts the
others again, or resumes them from their last checkpoint where the group says so.

Ray uses this machine alone unless --address or RAY_ADDRESS names a cluster. There, FOLDER and this
project must be at the same path on each machine, with its packages in the Python of `ray start`.
"""

import fnmatch
import importlib
import json
import os
import shlex
import sys
import traceback
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import tyro
from common import ROOT, about
from tqdm import tqdm


@dataclass
class Options:
    commands: Path = ROOT / "benchmarks" / "commands.json"  # what to run
    only: tuple[str, ...] = ("*",)  # patterns of GROUP/SETTING/PROGRAM
    seeds: int | None = None  # runs of each, instead of the group's number
    folder: Path = Path("suite")  # where runs live
    workers: int | None = None  # runs at a time on this machine; by default one a core
    address: str = os.environ.get("RAY_ADDRESS") or "local"  # of Ray: auto, HOST:PORT, ray://...
    gpus: float = 0  # GPUs that a run takes; 0.25 puts four runs on one
    track: bool = False  # log to Weights & Biases, in a group named like FOLDER


@dataclass
class Run:
    name: str  # GROUP/SETTING/PROGRAM
    command: str  # without the seed
    seed: int
    resume: bool  # whether it goes on from its checkpoint
    goal: float | None  # a good mean return
    x: str | None  # what the settings are values of, in a group that is a sweep

    def folder(self, options: Options) -> Path:
        return options.folder.resolve() / self.name / str(self.seed)


def plan(options: Options, flags: list[str]) -> list[Run]:
    """What to run. A setting without --env-id is the id of an environment."""
    runs = []
    for group, entry in json.loads(options.commands.read_text()).items():
        for setting, setting_flags in entry["settings"].items():
            for program, command in entry["programs"].items():
                name = f"{group}/{setting.replace('/', '-')}/{program}"
                if not any(fnmatch.fnmatch(name, pattern) for pattern in options.only):
                    continue
                words = shlex.split(f"{command} {setting_flags}")
                if "--env-id" not in words:
                    words += ["--env-id", setting]
                line = shlex.join([*words, *flags])
                goal = entry.get("goals", {}).get(setting, {}).get(program, entry.get("goal"))
                first = entry.get("first_seed", 1)
                for seed in range(first, first + (options.seeds or entry["seeds"])):
                    resume = entry.get("resume", False)
                    runs.append(Run(name, line, seed, resume, goal, entry.get("x")))
    if not runs:
        raise SystemExit(f"--only {' '.join(options.only)}: nothing in {options.commands}")
    return runs


def check_commands(runs: list[Run], options: Options) -> None:
    """Notes each run's command in its folder. Raises where another command ran before."""
    for run in runs:
        file = run.folder(options) / "command.json"
        if file.exists() and json.loads(file.read_text())["command"] != run.command:
            raise SystemExit(f"{file} is not of `{run.command}`: take another --folder")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(vars(run)) + "\n")


def execute(run: Run, folder: Path, track: bool) -> str:
    """Trains in this process, a Ray worker of its own. Returns what went wrong, if anything did."""
    script, *flags = shlex.split(run.command)
    flags += ["--seed", str(run.seed)]
    checkpoints = sorted(folder.glob("runs/*/checkpoint.pt"))  # folders' names end in their time
    if run.resume and checkpoints:
        flags += ["--resume", str(checkpoints[-1])]
    if track and not script.startswith("benchmarks/"):  # peers are not tracked
        flags += ["--track"]
    record = vars(run) | {"about": about()}  # now: the code may change while it runs
    before = set() if run.resume else set(folder.glob("runs/*/metrics.jsonl"))
    os.chdir(folder)
    os.environ["WANDB_PROGRAM"] = str(ROOT / script)  # the code that W&B saves
    sys.path.insert(0, str((ROOT / script).parent))
    with open("log.txt", "a") as log, redirect_stdout(log), redirect_stderr(log):
        print("$", script, shlex.join(flags), flush=True)
        try:
            module = importlib.import_module(Path(script).stem)
            record["return"] = module.train(tyro.cli(module.Args, args=flags))
        except (Exception, SystemExit) as error:  # SystemExit: tyro's, for a wrong flag
            traceback.print_exc()
            return f"{type(error).__name__}: {error}"
    parts = set(folder.glob("runs/*/metrics.jsonl")) - before
    record["parts"] = sorted(part.parent.name for part in parts)  # several if it was resumed
    Path("result.tmp").write_text(json.dumps(record) + "\n")
    Path("result.tmp").rename("result.json")
    return ""


def connect(options: Options):
    """Ray, started on this machine or connected to a cluster."""
    os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"  # else each worker makes an environment
    os.environ["RAY_worker_niceness"] = "0"  # runs are timed
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray

    wandb = {name: value for name, value in os.environ.items() if name.startswith("WANDB_")}
    wandb.setdefault("WANDB_RUN_GROUP", options.folder.resolve().name)
    ray.init(
        options.address,
        num_cpus=options.workers,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="warning",
        runtime_env={"env_vars": {**wandb, "TQDM_MININTERVAL": "60"}},
    )
    return ray


def main(options: Options, flags: list[str]) -> None:
    runs = plan(options, flags)
    check_commands(runs, options)
    waiting = [run for run in runs if not (run.folder(options) / "result.json").exists()]
    print(f"{options.folder}: {len(runs)} runs, {len(runs) - len(waiting)} of them are finished")
    if not waiting:
        return
    ray = connect(options)
    # A worker that is killed is started again. max_calls gives each run a process of its own.
    task = ray.remote(num_cpus=1, num_gpus=options.gpus, max_retries=3, max_calls=1)(execute)
    jobs = {task.remote(run, run.folder(options), options.track): run for run in waiting}
    failed = []
    with tqdm(total=len(runs), initial=len(runs) - len(waiting), unit="run") as progress:
        while jobs:
            (done,), _ = ray.wait(list(jobs))
            run = jobs.pop(done)
            try:
                problem = ray.get(done)
            except ray.exceptions.RayError as error:  # its worker died again and again
                problem = str(error)
            if problem:
                log = run.folder(options) / "log.txt"
                failed.append(f"{run.name} seed {run.seed} failed: {problem} ({log})")
            progress.update(not problem)
            progress.set_postfix_str(f"{len(failed)} failed; last: {run.name} seed {run.seed}")
    ray.shutdown()
    offline = options.folder.glob("*/*/*/*/wandb/offline-run-*")
    if options.track and any(offline):
        print(f"To upload: wandb sync {options.folder}/*/*/*/*/wandb/offline-run-*")
    if failed:
        raise SystemExit("\n".join(failed))


if __name__ == "__main__":
    arguments = sys.argv[1:]
    split = arguments.index("--") if "--" in arguments else len(arguments)
    try:
        main(tyro.cli(Options, args=arguments[:split]), arguments[split + 1 :])
    except KeyboardInterrupt:
        sys.exit("Interrupted. The same command goes on.")
