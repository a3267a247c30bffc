"""Small faults in the scripts and the kernel, one at a time: which test notices each?

python tests/mutants.py            # writes tests/mutants.md; takes half an hour
python tests/mutants.py 12 40      # only these, printed
A fault is put into every script that has its text. Tests of learning by score and of the
scripts' text do not count.
"""
# ruff: noqa: E501

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
UPDATES, ROLLOUTS, RUNS = "test_updates.py", "test_rollouts.py", "test_runs.py"
WANDB, PROCESSES = "test_wandb.py", "test_processes.py"
GAE = "test_gae.py"
SCRIPTS = [UPDATES, ROLLOUTS, RUNS, WANDB, PROCESSES]
# The file that should notice, the text, the fault.
# fmt: off
MUTANTS = [
    # The losses and their steps
    (UPDATES, "batch.returns).sum() / args.num_envs", "batch.returns).mean()"),
    (UPDATES, "policy_loss = -(policy.log_prob", "policy_loss = (policy.log_prob"),
    (UPDATES, ".advantages.mean()) / (", ".advantages.mean() * 0) / ("),
    (UPDATES, ".advantages.std() + 0.1)", ".advantages.var() + 0.1)"),
    (UPDATES, "value_loss = 0.5 * ((agent", "value_loss = ((agent"),
    (UPDATES, "- args.ent_coef * entropy", "+ args.ent_coef * entropy"),
    (UPDATES, "- args.ent_coef * entropy", ""),
    (UPDATES, "+ args.ent_coef * entropy_gain", "- args.ent_coef * entropy_gain"),
    (UPDATES, "args.vf_coef * value_loss", "value_loss"),
    (UPDATES, "ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)", "ratio.clamp(1 - args.clip_coef)"),
    (UPDATES, "ratio.clamp(1 - args.clip_coef, ", "ratio.clamp(0, "),
    (UPDATES, "torch.min(ratio * adv", "torch.max(ratio * adv"),
    (UPDATES, "torch.min(ratio * advantages[rows], clipped", "(clipped"),
    (UPDATES, "- old_log_probs[rows]", "- old_log_probs[: len(rows)]"),
    (UPDATES, ".tensor_split(args.num_minibatches)", ".tensor_split(args.num_minibatches)[:1]"),
    (UPDATES, "for _ in range(args.update_epochs)", "for _ in range(args.update_epochs - 1)"),
    (UPDATES, "for _ in range(args.vf_epochs)", "for _ in range(args.vf_epochs + 1)"),
    (UPDATES, "            optimizers[0].zero_grad()\n", ""),
    (UPDATES, "        value_optimizer.zero_grad()\n", ""),
    (UPDATES, "clip_grad_norm_(agent.parameters()", "clip_grad_norm_(agent.actor.parameters()"),
    (UPDATES, "agent.value(batch.obs[rows]) - batch.returns[rows]", "agent.value(batch.obs[rows]) - batch.returns[: len(rows)]"),
    (UPDATES, "        nn.utils.clip_grad_norm_(agent.critic.parameters(), args.max_grad_norm)\n", ""),
    (UPDATES, "    nn.utils.clip_grad_norm_(agent.actor.parameters(), args.max_grad_norm)\n", ""),
    (UPDATES, "(ratio - 1 - log_ratio).mean()", "(-log_ratio).mean()"),
    (UPDATES, "(ratio != clipped)", "(ratio > clipped)"),
    (UPDATES, "approx_kl > args.target_kl", "approx_kl > 1.5 * args.target_kl"),
    (UPDATES, "approx_kl > args.target_kl:\n            break", "approx_kl > args.target_kl:\n            pass"),
    (UPDATES, "args.vf_learning_rate, eps=1e-5", "args.vf_learning_rate"),
    (UPDATES, "args.learning_rate, eps=1e-5", "args.learning_rate, eps=1e-8"),
    (UPDATES, "args.learning_rate, eps", "2 * args.learning_rate, eps"),
    (UPDATES, "args.vf_learning_rate, eps", "args.learning_rate, eps"),
    # The trust region
    (UPDATES, "beta = next_r.dot(next_r) / r.dot(r)", "beta = 0"),
    (UPDATES, "next_r = r - alpha * Ap", "next_r = r - Ap"),
    (UPDATES, "        if r.dot(r) < 1e-10:  # solved, and r.dot(r) is a divisor below\n            break\n", ""),
    (UPDATES, "torch.sqrt(2 * args.target_kl", "torch.sqrt(args.target_kl"),
    (UPDATES, "retain_graph=True) + args.cg_damping * p", "retain_graph=True)"),
    (UPDATES, "and new_kl <= args.target_kl", ""),
    (UPDATES, "gain > 0 and", ""),
    (UPDATES, "fraction = 0.5**backtracks", "fraction = 0.8**backtracks"),
    (UPDATES, "range(max_backtracks + 1)", "range(max_backtracks)"),
    (UPDATES, "    nn.utils.vector_to_parameters(old_parameters, parameters)\n    return 0.0", "    return 0.0"),
    (UPDATES, "kl_divergence(old_policy, new_policy)", "kl_divergence(new_policy, old_policy)"),
    # The policy and its inputs
    (UPDATES, 'get_parameter("log_std").exp()', 'get_parameter("log_std").exp() ** 2'),
    (UPDATES, "fisher_product, -gradient", "fisher_product, gradient"),
    (ROLLOUTS, "action = policy.mode if greedy", "action = policy.sample() if greedy"),
    (ROLLOUTS, "else policy.sample()", "else policy.mode"),
    (ROLLOUTS, "nn.Linear(64, 64),\n        nn.Tanh()", "nn.Linear(64, 64),\n        nn.ReLU()"),
    (ROLLOUTS, "torch.full((num_actions,), -0.5)", "torch.full((num_actions,), 0.0)"),
    (ROLLOUTS, "x = x.clamp(-10, 10)", "pass"),
    (ROLLOUTS, "(x - self.obs_stats.mean) /", "x /"),
    (ROLLOUTS, "return x.float()", "return x.double().float() * (1 + 1e-4)"),
    (ROLLOUTS, "+ (1 - weight) * delta**2", ""),
    (ROLLOUTS, ".var(0, correction=0)", ".var(0)"),
    (ROLLOUTS, "rows = rows.to(self.mean)\n        self", "rows = rows.float()\n        self"),
    (ROLLOUTS, "return gym.wrappers.vector.ClipAction(envs)", "return envs"),
    (RUNS, 'and space.dtype.kind == "f"', ""),
    (RUNS, "and len(space.shape) == 1", ""),
    (RUNS, "and space.start == 0", ""),
    (ROLLOUTS, "obs_space.shape != (flatdim(obs_space),)", "obs_space.shape == ()"),
    # Rollouts and what they are worth
    (RUNS, "step = Rollout(~done, obs", "step = Rollout(~done | True, obs"),
    (RUNS, "    obs = obs.copy()  # some", "    pass  # some"),
    (RUNS, "[x.copy() for x in envs", "[x for x in envs"),
    (RUNS, "        obs = next_obs\n        done = terminations", "        done = terminations"),
    (RUNS, "        done = terminations | truncations", "        done = terminations"),
    (RUNS, "done = done | terminations | truncations", "done = done | terminations"),
    (RUNS, "rewards * ~done)", "rewards)"),
    (RUNS, "steps.append(Rollout(~done, obs", "steps.append(Rollout(~done | True, obs"),
    (ROLLOUTS, "rewards[t] + args.gamma * discounted_return", "rewards[t] + discounted_return"),
    (ROLLOUTS, "if not args.reward_to_go:", "if args.reward_to_go:"),
    (ROLLOUTS, "returns /= torch.sqrt(agent.return_stats.var + 1e-8)", "returns /= (agent.return_stats.var + 1e-8)"),
    (ROLLOUTS, "np.zeros_like(values), *ends, args.gamma, 1.0", "np.zeros_like(values), *ends, args.gamma, args.gae_lambda"),
    (ROLLOUTS, "np.zeros_like(values), *ends, args.gamma, 1.0", "np.zeros_like(values), *ends, 1.0, 1.0"),
    (ROLLOUTS, "compute_gae(rewards, np.zeros_like(values)", "compute_gae(rewards, values"),
    (ROLLOUTS, "raw_returns[rollout.valid][:, None]", "raw_returns.reshape(-1, 1)"),
    (ROLLOUTS, "rewards /= torch.sqrt(agent.return_stats.var + 1e-8)", "rewards /= (agent.return_stats.var + 1e-8)"),
    (GAE, "values[t + 1] * ~terminations[t] -", "values[t + 1] * ~(terminations[t] | truncations[t]) -"),
    (ROLLOUTS, "np.concatenate([rollout.obs, last_obs[None]])", "np.concatenate([rollout.obs, rollout.obs[-1:]])"),
    (ROLLOUTS, "columns = (rollout.obs, rollout.actions, advantages", "columns = (obs[1:], rollout.actions, advantages"),
    (ROLLOUTS, "if len(steps) * args.num_envs >= args", "if len(steps) * args.num_envs >= 2 * args"),
    # Runs
    (RUNS, "returns[running] += rewards[running]", "returns += rewards"),
    (RUNS, "running &= ~(terminations | truncations)", "running &= ~terminations"),
    (RUNS, "agent.act(obs, greedy=True)", "agent.act(obs)"),
    (RUNS, "and steps < args.total_timesteps", "and steps < 10 * args.total_timesteps"),
    (RUNS, "steps += running.sum()", "steps += len(running)"),
    (RUNS, "fraction = 1 - global_step", "fraction = 1 - 0.5 * global_step"),
    (RUNS, "if args.anneal_lr else 1.0", "if not args.anneal_lr else 1.0"),
    (RUNS, "for optimizer in optimizers:\n            optimizer.param", "for optimizer in optimizers[:1]:\n            optimizer.param"),
    (RUNS, "        agent.obs_stats.update(batch.obs)", "        pass"),
    (RUNS, "        metrics = update(agent, optimizers, batch, args)\n", "        agent.obs_stats.update(batch.obs)\n        metrics = update(agent, optimizers, batch, args)\n"),
    (RUNS, "steps = len(batch.obs)", "steps = rollout.valid.size"),
    (RUNS, "        optimizer.load_state_dict(state)\n", "        pass\n"),
    (RUNS, 'agent.load_state_dict(checkpoint["agent"])', "pass"),
    (RUNS, 'return checkpoint["global_step"]', "return 0"),
    (RUNS, "torch.manual_seed(args.seed + global_step)  # so", "pass  # so"),
    (RUNS, "envs.reset(seed=args.seed + global_step)", "envs.reset(seed=args.seed)"),
    (RUNS, "envs.reset(seed=10**9 + args.seed * args.eval_episodes)", "envs.reset()"),
    (RUNS, "args.seed * args.eval_episodes", "args.seed"),
    (RUNS, 'torch.save(checkpoint, path.with_suffix(".tmp"))\n    path.with_suffix(".tmp").replace(path)', "torch.save(checkpoint, path)"),
    (RUNS, "iteration % args.save_interval == 0 or", ""),
    (RUNS, "or global_step >= args.total_timesteps:\n            save", "or False:\n            save"),
    (RUNS, 'open(run_dir / "metrics.jsonl", "a")', 'open(run_dir / "metrics.jsonl", "w")'),
    (RUNS, '{time.time_ns()}"', '{args.seed}"'),
    (RUNS, '.replace(":", "-")', ""),
    (RUNS, "normalize=args.normalize_observations", "normalize=True"),
    (RUNS, "normalize=args.normalize_observations", "normalize=False"),
    (RUNS, "rollout, obs, done, episode_return = collect", "rollout, _, done, episode_return = collect"),
    (RUNS, "rollout, obs, done, episode_return = collect", "rollout, obs, _, episode_return = collect"),
    (RUNS, "rollout, obs, done, episode_return = collect", "rollout, obs, done, _ = collect"),
    (RUNS, "rollout.episode_returns[ended].mean()", "rollout.episode_returns.mean()"),
    (RUNS, "(episode_return + rewards) * ~done", "episode_return + rewards"),
    (RUNS, "rollout.rewards.sum(0).mean()", "rollout.rewards.mean()"),
    # Arguments and records
    (RUNS, "args = Args(**json.loads(args_json))", "pass"),
    (RUNS, "lowest = 1 if", "lowest = 0 if"),
    (RUNS, 'and name != "seed"', ""),
    (RUNS, "in (int, float) and", "is int and"),
    (RUNS, "and value > 1:", "and value > 2:"),
    (RUNS, "not value >= lowest", "value < lowest"),
    (RUNS, 'checkpoint["agent_config"] != agent.config', "False"),
    (RUNS, ", strict=True", ""),
    (RUNS, 'envs.metadata.get("autoreset_mode") != gym', "False and gym"),
    (RUNS, "if not np.isfinite(list(metrics.values())).all():", "if False:"),
    (RUNS, "torch.manual_seed(args.seed)\n", "pass\n"),
    (WANDB, 'reinit="create_new"', 'reinit=None'),
    (WANDB, 'step=metrics["global_step"]', "step=None"),
    (WANDB, "config=vars(args)", "config=None"),
    (PROCESSES, "all_reduce(mean, dist.ReduceOp.AVG)", "all_reduce(mean)"),
    (PROCESSES, "rows = torch.cat(gathered)", "rows = gathered[0]"),
    (PROCESSES, "            nn.utils.vector_to_parameters(mean, gradients)\n", ""),
    (PROCESSES, "args.seed += dist.get_rank() * args.num_envs", "pass"),
    (PROCESSES, "dist.all_reduce(approx_kl, dist.ReduceOp.AVG)", "pass"),
    # The kernel
    (GAE, "(terminations[n] | truncations[n]) != 0", "terminations[n] != 0"),
    (GAE, "terminations[n] != 0;\n        let ended", "(terminations[n] | truncations[n]) != 0;\n        let ended"),
    (GAE, "gamma * T::zero() } else", "T::zero() - gamma } else"),
    (GAE, "discount * next_values[n] - values[n]", "discount * next_values[n] + values[n]"),
    (GAE, "delta + decay * advantage[n]", "decay * advantage[n]"),
    (GAE, "returns[n] = advantage[n] + values[n]", "returns[n] = advantage[n]"),
    (GAE, "next_values = values;", "let _ = values;"),
    (GAE, "&rollout.values[steps * rollout.envs + column..]", "&rollout.values[(steps - 1) * rollout.envs + column..]"),
    (GAE, "dispatch(rollout, i * width, chunk)", "dispatch(rollout, 0, chunk)"),
    (GAE, 'gamma * fraction("gae_lambda", gae_lambda)?', 'fraction("gae_lambda", gae_lambda)?'),
    (GAE, "gamma as f32, gamma_lambda as f32", "gamma as f32, (gamma as f32) * (gamma_lambda as f32)"),
    (GAE, "(0.0..=1.0).contains(&number)", "(0.0..=2.0).contains(&number)"),
    (ROLLOUTS, "(2**0.5, 2**0.5, 0.01)", "(2**0.5, 1.0, 0.01)"),
    (UPDATES, "kl_divergence(old_policy, agent.policy(batch.obs))", "kl_divergence(agent.policy(batch.obs), old_policy)"),
    (UPDATES, ".advantages.std() + 0.1)", ".advantages.std() + 1e-8)"),
    (UPDATES, "args.target_kl is not None and approx_kl > args.target_kl", "approx_kl > (args.target_kl or 0.01)"),
    (UPDATES, ".tensor_split(args.num_minibatches)", ".tensor_split(2)"),
    (UPDATES, "range(args.update_epochs)", "range(3)"),
    (UPDATES, "torch.optim.Adam(agent.critic.parameters()", "torch.optim.Adam(agent.parameters()"),
    (RUNS, "    envs.close()\n    if running", "    envs.step(agent.act(obs, greedy=True))\n    if running"),
]
# fmt: on


def mutate(copy, old, new):
    """Puts the fault into each file of the copy that has the text. Returns their names."""
    changed = []
    for path in [*copy.glob("*.py"), *copy.glob("gae_kernel/src/*.rs")]:
        if old in (text := path.read_text()):
            path.write_text(text.replace(old, new))
            changed.append(path.name)
    if not changed:
        raise ValueError(f"no file has {old!r}")
    return changed


def build_kernel(copy):
    """Returns a folder with the copy's kernel, for PYTHONPATH; None if it does not compile."""
    env = os.environ | {"CARGO_TARGET_DIR": str(ROOT / "gae_kernel/target/mutants")}
    command = ["uv", "tool", "run", "maturin", "build", "--release"]
    command += ["--interpreter", sys.executable, "--out", str(copy / "dist")]
    if subprocess.run(command, cwd=copy, env=env, capture_output=True).returncode:
        return None
    (wheel,) = (copy / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(copy / "kernel")
    return copy / "kernel"


def run_tests(copy, files, kernel):
    """Runs pytest on the copy until a test fails. Returns what it prints."""
    os.chdir(copy)
    os.environ["TMPDIR"] = str(copy.parent)
    tempfile.tempdir = None
    sys.path[:0] = [str(copy / "tests"), str(copy), *([str(kernel)] if kernel else [])]
    os.dup2(os.open(copy.parent / "log.txt", os.O_WRONLY | os.O_CREAT), 1)
    os.dup2(1, 2)
    arguments = ["-qx", "-p", "no:cacheprovider", "-p", "no:benchmark", "-k", "not learns_cartpole"]
    pytest.main([*arguments, *(f"tests/{file}" for file in files)])


def attempt(number, folder):
    """Makes a mutant in an empty folder, and tests it. Writes what notices it to result.txt."""
    first, old, new = MUTANTS[number]
    copy = folder / "copy"
    ignored = shutil.ignore_patterns(".*", "target", "runs", "benchmarks", "dist", "mutants*")
    shutil.copytree(ROOT, copy, ignore=ignored)
    changed, kernel = mutate(copy, old, new), None
    (folder / "changed.txt").write_text(" ".join(changed))
    files = SCRIPTS
    if changed[0].endswith(".rs"):
        files, kernel = [GAE], build_kernel(copy)
        if kernel is None:
            (folder / "log.txt").write_text("FAILED tests/it does not compile\n")
            return
    run_tests(copy, [first, *(file for file in files if file != first)], kernel)


def result(number, folder):
    """The row of the table."""
    _, old, new = MUTANTS[number]
    log = folder / "log.txt"
    text = log.read_text(errors="replace") if log.exists() else ""
    name = "SURVIVED" if re.search(r"^\d+ passed", text, re.M) else "no end"
    if found := re.search(r"^(?:FAILED|ERROR) tests/(.+?)(?: - |$)", text, re.M):
        name = found[1]
    changed = (folder / "changed.txt").read_text()
    cells = [changed, *(f"`{' '.join(text.split())}`" for text in (old, new)), name]
    return f"| {number} | " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def main():
    numbers = [int(x) for x in sys.argv[1:]] or [*range(len(MUTANTS))]
    waiting, running, rows = numbers[::-1], {}, {}
    while waiting or running:
        if waiting and len(running) < int(os.environ.get("MUTANT_WORKERS", "1")):
            number, folder = waiting.pop(), Path(tempfile.mkdtemp())
            child = os.fork()
            if child == 0:
                os.setpgid(0, 0)
                signal.alarm(900)
                try:
                    attempt(number, folder)
                finally:
                    os._exit(0)
            running[child] = number, folder
            continue
        number, folder = running.pop(os.wait()[0])
        rows[number] = result(number, folder)
        print(rows[number], flush=True)
        shutil.rmtree(folder)
    if len(numbers) == len(MUTANTS):
        survived = sum("SURVIVED" in row for row in rows.values())
        head = (
            f"{len(rows)} mutants, {len(rows) - survived} killed. By `python tests/mutants.py`.\n"
        )
        head += "\n| | files | text | fault | killed by |\n|---|---|---|---|---|\n"
        table = "\n".join(rows[number] for number in sorted(rows))
        (ROOT / "tests" / "mutants.md").write_text(head + table + "\n")


if __name__ == "__main__":
    # Imported once, here: each mutant is tested in a fork.
    import gymnasium  # noqa: F401
    import pytest
    import torch._dynamo
    import torch.distributions
    import tyro  # noqa: F401

    torch.set_num_threads(1)
    main()
