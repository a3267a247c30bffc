"""Proximal Policy Optimization (Schulman et al. 2017, https://arxiv.org/abs/1707.06347).

VPG + a clipped probability ratio, which makes several epochs of minibatches over one rollout safe:
    L(theta) = E[min(r A, clip(r, 1 - eps, 1 + eps) A)],    r = pi_theta(a|s) / pi_old(a|s)
Run: python ppo.py --env-id CartPole-v1
"""

import json
import math
import os
import shutil
import signal
import subprocess
import time
from collections import namedtuple
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from threading import Timer

import gymnasium as gym
import numpy as np
import torch
import torch.distributed as dist
import tyro
from gymnasium.wrappers import vector as wrappers
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, Independent, Normal

try:
    from tqdm import tqdm
except ImportError:  # no progress bar, then
    from unittest.mock import MagicMock as tqdm

Distribution.set_default_validate_args(False)
Batch = namedtuple("Batch", "observations actions rewards terminations truncations valid episodes")
interrupts: list = []  # Ctrl-C appends to it, which ends the training after its iteration


@dataclass
class Args:
    env_id: str = "CartPole-v1"  # Gymnasium id of the environment
    exp_name: str = Path(__file__).stem  # part of the run folder's name
    seed: int = 1  # decides everything: parameters, actions, environments, minibatches
    total_timesteps: int = 50_000  # environment steps to train for, over all environments
    num_envs: int = 8  # environments stepped side by side
    vectorization_mode: str | None = None  # sync or async; None leaves it to Gymnasium
    device: str = "cpu"  # where the networks live; small ones are fastest on the CPU
    learning_rate: float = 5e-3  # Adam's step size
    anneal_lr: bool = True  # lower the learning rate linearly to zero
    gamma: float = 0.99  # discount factor
    max_grad_norm: float = 0.5  # longest gradient of one optimizer step
    normalize_observations: bool = False  # scale observations by their running statistics
    normalize_rewards: bool = False  # scale rewards by the running deviation of the return
    eval_episodes: int = 100  # episodes of the evaluation at the end
    capture_video: bool = False  # film an evaluation episode, into the run folder's videos/
    checkpoint_interval: int = 10  # iterations from one checkpoint to the next
    resume: str | None = None  # run folder or checkpoint to go on with
    track: bool = False  # log to Weights & Biases, too
    wandb_project_name: str = "policy-ladder"  # W&B project
    wandb_entity: str | None = None  # W&B user or team
    wandb_group: str | None = None  # W&B group of runs
    num_steps: int = 128  # steps of each environment in a rollout
    gae_lambda: float = 0.97  # GAE's lambda: 0 is one-step TD, 1 is Monte Carlo
    norm_adv: bool = True  # scale advantages to mean 0 and deviation 1
    vf_coef: float = 0.5  # weight of the value loss
    ent_coef: float = 0.01  # weight of the entropy bonus
    num_minibatches: int = 4  # minibatches in an epoch
    update_epochs: int = 6  # epochs over a rollout
    clip_coef: float = 0.2  # eps: how far from 1 the ratio still counts
    clip_vloss: bool = False  # clip the change of the value, too
    target_kl: float | None = None  # bound on the KL to the old policy
    compile: bool = False  # compile the loss: pays after a million steps, needs a C++ compiler


def compute_gae_python(rewards, values, terminations, truncations, gamma, gae_lambda):
    """Generalized advantage estimation (Schulman et al. 2016, eq. 16), backwards in time.
    rewards, terminations, truncations: (T, N) or (T,); values: a row more, the last the bootstrap.
    All float32 or float64, flags bool. Returns (advantages, returns), shaped like rewards.
    """
    discounts = float(gamma) * (~terminations).astype(values.dtype)
    decays = float(gamma * gae_lambda) * (~(terminations | truncations)).astype(values.dtype)
    deltas = rewards + discounts * values[1:] - values[:-1]
    advantages, advantage = np.empty_like(deltas), 0
    for t in reversed(range(len(deltas))):
        advantages[t] = advantage = deltas[t] + decays[t] * advantage
    return advantages, advantages + values[:-1]


try:
    from gae_kernel import compute_gae  # the same in Rust, bit for bit
except ImportError:
    compute_gae = compute_gae_python


def mlp(num_inputs: int, num_outputs: int, std: float) -> nn.Sequential:
    """Two tanh layers of 64 with orthogonal weights; std scales those of the output."""
    linear = nn.Linear(num_inputs, 64), nn.Linear(64, 64), nn.Linear(64, num_outputs)
    for layer, gain in zip(linear, (math.sqrt(2), math.sqrt(2), std)):
        nn.init.orthogonal_(layer.weight, gain)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(linear[0], nn.Tanh(), linear[1], nn.Tanh(), linear[2])


class Agent(nn.Module):
    def __init__(self, envs, args: Args):
        super().__init__()
        space, num_inputs = envs.single_action_space, envs.single_observation_space.shape[0]
        self.discrete, self.shape = isinstance(space, gym.spaces.Discrete), space.shape
        self.device = args.device
        self.normalize: nn.Module = nn.Identity()
        if args.normalize_observations:  # by the mean and the variance over all rollouts
            norm = nn.BatchNorm1d(num_inputs, eps=1e-8, momentum=None, affine=False)
            self.normalize = nn.Sequential(norm, nn.Hardtanh(-10, 10)).eval()
        self.actor = mlp(num_inputs, int(space.n) if self.discrete else math.prod(self.shape), 0.01)
        if not self.discrete:
            self.actor.log_std = self.log_std = nn.Parameter(torch.zeros(self.shape))  # actor's
        self.critic = mlp(num_inputs, 1, 1.0)

    def observe(self, observations: np.ndarray) -> None:
        """Takes a rollout's (T, N, D) float32 observations into the running statistics."""
        mean, variance, count = self.normalize.buffers()
        old_mean = mean.clone()
        self.normalize.train()(torch.as_tensor(observations, device=self.device).flatten(0, 1))
        self.normalize.eval()
        # BatchNorm1d averages the variances within rollouts; this is that between their means.
        variance += (count - 1) * (mean - old_mean).square()

    def policy(self, observations: Tensor) -> Distribution:
        """The distribution of the actions at each of (M, D) float32 observations."""
        outputs = self.actor(self.normalize(observations))
        if self.discrete:
            return Categorical(logits=outputs)
        means = outputs.unflatten(-1, self.shape)
        return Independent(Normal(means, self.log_std.exp()), len(self.shape))

    def value(self, observations: Tensor) -> Tensor:
        """V(s), (M,), at each of (M, D) float32 observations."""
        return self.critic(self.normalize(observations)).squeeze(-1)


def make_envs(args: Args, num_envs: int, mode: str | None = None) -> gym.vector.VectorEnv:
    """num_envs environments with flat observations; actions beyond the bounds are clipped."""
    try:
        options: dict = {"render_mode": "rgb_array"} if args.capture_video else {}
        envs = gym.make_vec(args.env_id, num_envs, mode, **options)
    except (gym.error.Error, ValueError) as error:
        name = f"--env-id {args.env_id}" + f" --vectorization-mode {mode}" * (mode is not None)
        raise ValueError(f"{name}: {error}") from error
    observations, actions = envs.single_observation_space, envs.single_action_space
    if (mode := envs.metadata.get("autoreset_mode")) != gym.vector.AutoresetMode.NEXT_STEP:
        raise ValueError(f"--env-id {args.env_id}: autoreset mode {mode}, must be NEXT_STEP")
    served = isinstance(actions, gym.spaces.Box | gym.spaces.Discrete)
    if not (served and observations.is_np_flattenable and getattr(actions, "start", 0) == 0):
        raise ValueError(f"--env-id {args.env_id}: cannot serve {observations} with {actions}")
    if not isinstance(observations, gym.spaces.Box) or len(observations.shape) != 1:
        envs = wrappers.FlattenObservation(envs)
    if isinstance(actions, gym.spaces.Box):
        envs = wrappers.TransformAction(envs, lambda a: a.clip(actions.low, actions.high))
    return envs


@torch.inference_mode()
def act(agent: Agent, observations: np.ndarray, greedy: bool = False) -> np.ndarray:
    """One action at each of N observations: sampled or, if greedy, the most likely."""
    inputs = torch.as_tensor(observations, dtype=torch.float32, device=agent.device)
    outputs = agent.actor(agent.normalize(inputs))  # agent.policy's logits or means; it is slower
    if agent.discrete:  # Gumbel noise makes the largest logit a sample
        noise = 0 if greedy else -torch.empty_like(outputs).exponential_().log()
        return (outputs + noise).argmax(-1).cpu().numpy()
    noise = 0 if greedy else torch.randn_like(outputs) * agent.log_std.exp().flatten()
    return (outputs + noise).unflatten(-1, agent.shape).cpu().numpy()


def rollouts(agent: Agent, envs: gym.vector.VectorEnv, args: Args, seed: int):
    """Yields num_steps steps of every environment, going on where the last ones were cut.
    Arrays are (T, N, ...); observations' row t + 1, of T + 1, is the true successor of row t.
    valid marks the steps to learn from; episodes are the (return, length) of those that ended.
    """
    observation, _ = envs.reset(seed=seed)
    ended = np.zeros(args.num_envs, dtype=bool)
    while True:
        observations, steps, episodes = [observation], [], list[tuple]()
        for _ in range(args.num_steps):
            action, valid = act(agent, observation), ~ended
            observation, reward, termination, truncation, infos = envs.step(action)
            observations.append(observation)
            steps.append((action, reward.astype(np.float32), termination, truncation, valid))
            ended = termination | truncation
            if "episode" in infos:
                episodes += zip(*(infos["episode"][key][ended & valid] for key in "rl"))
        columns = map(np.stack, zip(*steps))
        yield Batch._make((np.stack(observations, dtype=np.float32), *columns, episodes))


def estimate(agent: Agent, batch: Batch, args: Args) -> list[Tensor]:
    """For the M valid steps what `update` learns from: M rows of each of its columns."""
    observations = torch.as_tensor(batch.observations, device=args.device)
    with torch.no_grad():
        values = agent.value(observations.flatten(0, 1)).view(observations.shape[:2])
    baseline, ends = values.cpu().numpy(), (batch.terminations, batch.truncations)
    advantages, returns = compute_gae(batch.rewards, baseline, *ends, args.gamma, args.gae_lambda)
    columns = (observations[:-1], batch.actions, values[:-1], advantages, returns)
    valid = torch.as_tensor(batch.valid, device=args.device)
    return [torch.as_tensor(column, device=args.device)[valid] for column in columns]


def average(x: Tensor) -> None:
    """Makes x its mean over the processes, if torchrun started several."""
    if dist.is_initialized():
        dist.all_reduce(x.div_(dist.get_world_size()))


def step(optimizer: torch.optim.Optimizer, loss: Tensor, args: Args) -> Tensor:
    """One step down the clipped gradient of loss; returns the norm that it had."""
    optimizer.zero_grad()
    loss.backward()
    grad_norm = nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], args.max_grad_norm)
    optimizer.step()
    return grad_norm


def make_optimizers(agent: Agent, args: Args) -> list[torch.optim.Optimizer]:
    """Adam for each network or pair of networks that has a learning rate of its own."""
    rates = ((agent, args.learning_rate),)
    return [torch.optim.Adam(net.parameters(), lr, eps=1e-5, fused=True) for net, lr in rates]


def update(agent: Agent, optimizers: list, batch: Batch, args: Args) -> dict[str, float]:
    """One iteration's learning from one batch; returns its metrics."""
    observations, actions, values, advantages, returns = estimate(agent, batch, args)
    unexplained = (returns - values).var(0, False) / returns.var(0, False).clamp_min(1e-8)
    log_probs = agent.policy(observations).log_prob(actions).detach()
    data, metrics = (observations, actions, log_probs, values, advantages, returns), []
    losses_of = torch.compile(losses, dynamic=True) if args.compile else losses
    # Resets leave at least every other step; the count must be the same in all processes.
    count = min(args.num_minibatches, args.num_envs * (args.num_steps // 2))
    for _ in range(args.update_epochs):
        for rows in torch.randperm(len(observations), device=args.device).tensor_split(count):
            loss, *parts = losses_of(agent, args, *(x.index_select(0, rows) for x in data))
            grad_norm = step(optimizers[0], loss, args)
            metrics.append(torch.stack((*parts, grad_norm)).detach())
        average(approx_kl := parts[3].detach())
        if args.target_kl is not None and approx_kl > args.target_kl:
            break
    names = ("policy_loss", "value_loss", "entropy", "approx_kl", "clipfrac", "grad_norm")
    means = torch.stack(metrics).mean(0).tolist()
    return dict(zip(names, means)) | {"explained_variance": 1 - unexplained.item()}


def losses(agent: Agent, args: Args, *minibatch: Tensor) -> tuple[Tensor, ...]:
    """The loss of one minibatch, and the metrics that belong to it."""
    observations, actions, log_probs, values, advantages, returns = minibatch
    policy = agent.policy(observations)
    if args.norm_adv:
        advantages = nn.functional.layer_norm(advantages, advantages.shape, eps=1e-8)
    log_ratio = policy.log_prob(actions) - log_probs
    ratio = log_ratio.exp()
    clipped_ratio = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
    policy_loss = -torch.min(ratio * advantages, clipped_ratio * advantages).mean()
    new_values = agent.value(observations)
    errors = (new_values - returns).square()
    if args.clip_vloss:
        changes = (new_values - values).clamp(-args.clip_coef, args.clip_coef)
        errors = torch.max(errors, (values + changes - returns).square())
    value_loss, entropy = 0.5 * errors.mean(), policy.entropy().mean()
    loss = policy_loss + args.vf_coef * value_loss - args.ent_coef * entropy
    approx_kl = (ratio - 1 - log_ratio).mean()  # http://joschu.net/blog/kl-approx.html
    clipfrac = (ratio != clipped_ratio).float().mean()
    return loss, policy_loss, value_loss, entropy, approx_kl, clipfrac


def evaluate(agent: Agent, args: Args, greedy: bool, video: Path | None = None) -> float:
    """Mean return of eval_episodes episodes, one in each of as many new environments."""
    envs = make_envs(args, 1 if video else args.eval_episodes)
    if video:
        envs = wrappers.RecordVideo(envs, str(video))
    observations, _ = envs.reset(seed=args.seed)
    returns, running = np.zeros(envs.num_envs), np.ones(envs.num_envs, dtype=bool)
    for _ in range(int(args.total_timesteps)):  # an end even where no time limit sets one
        observations, rewards, *ends, _ = envs.step(act(agent, observations, greedy))
        returns += rewards * running
        running &= ~(ends[0] | ends[1])
        if interrupts:
            raise KeyboardInterrupt("what was trained is in the checkpoint")
        if not running.any():
            break
    envs.close()
    return float(returns.mean())


def check(args: Args) -> None:
    """Raises ValueError, naming the argument and its value, for what cannot work."""
    size = args.num_envs * getattr(args, "num_steps", 1)
    bounds = {"gamma": (0, 1), "gae_lambda": (0, 1), "total_timesteps": (size, math.inf)}
    bounds["num_steps"] = (2, math.inf)  # of two steps at most one is a reset
    for name, value in vars(args).items():
        low, high = bounds.get(name, (int(type(value) is int and name != "seed"), math.inf))
        if isinstance(value, int | float) and not low <= value <= high:
            raise ValueError(f"--{name.replace('_', '-')} {value}: must be in [{low}, {high}]")
    if size % (num_minibatches := getattr(args, "num_minibatches", 1)):
        raise ValueError(f"--num-minibatches {num_minibatches}: must divide {size} steps a rollout")
    if args.capture_video and not find_spec("moviepy"):
        raise ValueError("--capture-video True: needs moviepy, `pip install moviepy`")
    device = getattr(torch, args.device.split(":")[0], object)
    if not (hasattr(device, "is_available") and device.is_available()):
        raise ValueError(f"--device {args.device}: PyTorch finds none here, --device cpu works")


def load_checkpoint(path: str) -> dict:
    """The checkpoint in a file or run folder; ValueError if there is none of this script."""
    file = Path(path, "checkpoint.pt") if Path(path).is_dir() else Path(path)
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
        Args(**checkpoint["args"])
        checkpoint["run"] = file.parent, checkpoint["global_step"], checkpoint["log_size"]
        return checkpoint
    except Exception as error:
        raise ValueError(f"--resume {path}: no checkpoint of {__file__}: {error}") from error


def attempt(call, *args, **kwargs):
    """Calls W&B, whose failures cost a warning, its silence a minute, and none the training."""
    kill = f"pkill -KILL -P {os.getpid()} wandb-core"  # its service, which ends all waiting for it
    (watchdog := Timer(60, os.system, [kill])).start()
    try:
        return call(*args, **kwargs)
    except Exception as error:
        print(f"Warning: W&B: {error!r:.300}")
        return False
    finally:
        watchdog.cancel()


def start_wandb(args: Args, run_dir: Path):
    """The W&B run of a run folder; that of a resumed one goes on."""
    # Left alone, the client waits minutes to start and forever to finish on a silent server.
    for setting in "INIT_TIMEOUT=10 FINISH_TIMEOUT=30 ERROR_REPORTING=false QUIET=true".split():
        os.environ.setdefault(*f"WANDB_{setting}".split("="))
    import wandb

    names: dict = {"project": args.wandb_project_name, "entity": args.wandb_entity}
    names |= {"group": args.wandb_group, "id": run_dir.name, "name": run_dir.name}
    settings: dict = {"dir": run_dir, "resume": "allow", "reinit": "create_new"}
    settings["config"] = vars(args)
    if not (run := attempt(wandb.init, **names, **settings)):
        attempt(wandb.teardown)  # a failed start keeps the run's id taken
        run = wandb.init(**names, **settings, mode="offline")
    run.save(shutil.copy(__file__, run_dir), base_path=run_dir, policy="now")
    if run.offline:
        print(f"W&B is offline; to upload the run later: wandb sync {run_dir}/wandb")
    return run


def train(args: Args) -> float:
    """Trains an agent, records it in a run folder, returns its mean return over greedy episodes."""
    check(args)
    checkpoint = load_checkpoint(args.resume) if args.resume else {}
    if dist.is_torchelastic_launched() and not dist.is_initialized():  # by torchrun
        dist.init_process_group()
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if args.device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    torch.set_num_threads(1)  # as fast for networks of this size, and leaves cores to other runs
    torch.manual_seed(args.seed)
    envs: gym.vector.VectorEnv = make_envs(args, args.num_envs, args.vectorization_mode)
    scaled = wrappers.NormalizeReward(envs := wrappers.RecordEpisodeStatistics(envs), args.gamma)
    if args.normalize_rewards:
        envs = wrappers.TransformReward(scaled, lambda rewards: rewards.clip(-10, 10))
    agent = Agent(envs, args).to(args.device)
    parts: list = [agent, *(optimizers := make_optimizers(agent, args))]
    name = f"{args.env_id}__{args.exp_name}__{args.seed}__{time.time_ns()}".replace("/", "-")
    run_dir, global_step, log_size = checkpoint.get("run", (Path("runs", name), 0, 0))
    for part, state in zip(parts, checkpoint.get("parts", ())):
        part.load_state_dict(state)
    vars(scaled.return_rms).update(checkpoint.get("return_rms", {}))
    torch.set_rng_state(checkpoint.get("rng_state", torch.get_rng_state()))
    if rank:  # the same parameters, then other actions
        torch.manual_seed(args.seed + global_step + rank)
    for parameter in agent.parameters() if world > 1 else ():
        parameter.register_post_accumulate_grad_hook(lambda parameter: average(parameter.grad))
    batches = rollouts(agent, envs, args, args.seed + global_step + rank * args.num_envs)

    def save(folder: Path) -> None:
        """Writes a checkpoint that is whole, the old or the new one, whenever the run is killed."""
        state = {"args": vars(args), "global_step": global_step, "log_size": log_size}
        state["parts"] = [part.state_dict() for part in parts]
        state["return_rms"] = {key: float(x) for key, x in vars(scaled.return_rms).items()}
        with open(folder / "checkpoint.tmp", "wb") as file:
            torch.save(state | {"rng_state": torch.get_rng_state()}, file)
            file.flush()
            os.fsync(file)
        os.replace(file.name, folder / "checkpoint.pt")

    if rank == 0 and not args.resume:
        record = vars(args) | {module.__name__: module.__version__ for module in (gym, np, torch)}
        command = f"git -C '{Path(__file__).parent}' describe --always --dirty"
        record["commit"] = subprocess.getoutput(command)
        (folder := Path(f"{run_dir}.new")).mkdir(parents=True)
        (folder / "args.json").write_text(json.dumps(record, indent=1))
        save(folder)
        folder.rename(run_dir)
    run = args.track and rank == 0 and attempt(start_wandb, args, run_dir)
    if rank == 0:
        print(f"{run_dir}: {compute_gae.__name__} of {compute_gae.__module__} on {args.device}")
    if args.capture_video and rank == 0:  # untrained, which shows at once what filming lacks
        evaluate(agent, args, True, run_dir / f"videos/{global_step}")
    iteration, first_step, stopped, start = 0, global_step, False, time.perf_counter()
    total = args.total_timesteps
    progress = tqdm(total=total, initial=global_step, unit=" steps", disable=rank > 0)
    while global_step < total and not stopped:
        remaining = 1 - global_step / total if args.anneal_lr else 1.0
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = optimizer.defaults["lr"] * remaining
        batch = next(batches)
        losses = update(agent, optimizers, batch, args)
        if args.normalize_observations:
            agent.observe(batch.observations)
        sums = {"observations": batch.observations.sum(), "rewards": batch.rewards.sum()}
        sums |= losses | {"steps": batch.valid.sum(), "interrupts": len(interrupts)}
        everyone = torch.tensor([float(x) for x in sums.values()], device=args.device)
        for tensor in (everyone, *list(agent.buffers())[:2]):  # the running mean and variance
            average(tensor)
        means = dict(zip(sums, everyone.tolist()))  # the same in all processes: all end together
        if broken := {name: x for name, x in means.items() if not math.isfinite(x)}:
            raise FloatingPointError(f"step {global_step} of {run_dir}: {broken}")
        steps, stopped = round(means["steps"] * world), means["interrupts"] > 0
        global_step, iteration = global_step + steps, iteration + 1
        returns, lengths = np.mean(batch.episodes or [(math.nan, math.nan)], axis=0)
        metrics = {
            "global_step": global_step,
            "charts/episodic_return": returns,
            "charts/episodic_length": lengths,
            "charts/learning_rate": optimizers[0].param_groups[0]["lr"],
            "charts/SPS": (global_step - first_step) / (time.perf_counter() - start),
        } | {f"losses/{name}": means[name] for name in losses}
        if rank == 0:
            with open(run_dir / "metrics.csv", "a") as file:
                file.truncate(log_size)  # drops what a killed run wrote after its checkpoint
                rows = [metrics.values()] if log_size else [metrics, metrics.values()]
                file.writelines(",".join(map(str, row)) + "\n" for row in rows)
                log_size = file.tell()
            if run and attempt(run.log, metrics, step=global_step) is False:
                run = None  # its service is gone
            if stopped or global_step >= total or iteration % args.checkpoint_interval == 0:
                save(run_dir)
        if batch.episodes:
            progress.set_postfix(episodic_return=f"{returns:.1f}", refresh=False)
        progress.update(steps)
    progress.close()
    envs.close()
    scores = {"greedy": math.nan}
    if stopped and rank == 0:
        print(f"Stopped; to go on: python {Path(__file__).name} --resume {run_dir}")
    elif rank == 0:
        scores = {name: evaluate(agent, args, name == "greedy") for name in ("greedy", "sampled")}
        (run_dir / "evaluation.tmp").write_text(json.dumps(scores))
        os.replace(run_dir / "evaluation.tmp", run_dir / "evaluation.json")
        print(f"Mean return of {args.eval_episodes} episodes: {scores}")
        if args.capture_video:
            evaluate(agent, args, True, run_dir / f"videos/{global_step}")
    if run:
        attempt(run.log, scores, step=global_step)
        attempt(run.finish)
    return scores["greedy"]


if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda n, _: interrupts.append(signal.signal(n, signal.SIG_DFL)))
    args = tyro.cli(Args)
    if args.resume:  # the run's own arguments, but for those given now
        args = tyro.cli(Args, default=Args(**load_checkpoint(args.resume)["args"]))
    train(args)
