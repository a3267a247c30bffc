"""REINFORCE (Williams 1992, https://doi.org/10.1007/BF00992696): the score-function gradient.

Whole episodes, each action's log-probability weighted by the rewards that follow it:
    grad J ~ E[sum_t grad log pi(a_t|s_t) R_t],    R_t = sum_(t' >= t) gamma^(t' - t) r_t'
For gamma = 1 they are equal; for less, a factor gamma^t is dropped from R_t, as all practice does.
Run: python reinforce.py --env-id CartPole-v1
"""

import json
import os
import shutil
import signal
import time
from collections import namedtuple
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Thread, Timer

import gymnasium as gym
import numpy as np
import torch
import torch.distributed as dist
import tyro
from gymnasium.wrappers import vector as wrappers
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, Independent, Normal
from torch.hub import tqdm  # or something plainer, where tqdm is not installed
from torch.nn.utils import parameters_to_vector, vector_to_parameters

Distribution.set_default_validate_args(False)
Batch = namedtuple("Batch", "observations actions rewards terminations truncations valid episodes")
interrupts: list = []  # Ctrl-C appends to it, which ends the training after its iteration


@dataclass
class Args:
    env_id: str = "CartPole-v1"  # Gymnasium id of the environment
    exp_name: str = Path(__file__).stem  # part of the run folder's name
    seed: int = 1  # decides everything: parameters, actions, environments, minibatches
    device: str = "cpu"  # where the networks live; small ones are fastest on the CPU
    vectorization_mode: str | None = None  # sync or async; None leaves it to Gymnasium
    eval_episodes: int = 100  # episodes of the evaluation at the end
    capture_video: bool = False  # film an evaluation episode, into the run folder's videos/
    checkpoint_interval: int = 10  # iterations from one checkpoint to the next
    resume: str | None = None  # run folder or checkpoint to go on with
    track: bool = False  # log to Weights & Biases, too
    wandb_project_name: str = "policy-ladder"  # W&B project
    wandb_entity: str | None = None  # W&B user or team
    wandb_group: str | None = None  # W&B group of runs
    num_envs: int = 8  # environments stepped side by side
    gamma: float = 0.99  # discount factor
    max_grad_norm: float = 0.5  # longest gradient of one optimizer step
    normalize_observations: bool = False  # scale observations by their running statistics
    normalize_rewards: bool = False  # scale rewards by the running deviation of the return
    anneal_lr: bool = True  # lower the learning rate linearly to zero
    total_timesteps: int = 200_000  # environment steps to train for, over all environments
    learning_rate: float = 2e-3  # Adam's step size
    reward_to_go: bool = True  # weigh an action by the rewards after it, not by all of the episode


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
    for layer, gain in zip(linear, (2**0.5, 2**0.5, std)):
        nn.init.orthogonal_(layer.weight, gain)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(linear[0], nn.Tanh(), linear[1], nn.Tanh(), linear[2])


class Agent(nn.Module):
    def __init__(self, envs, args: Args):
        super().__init__()
        space, num_inputs = envs.single_action_space, envs.single_observation_space.shape[0]
        self.discrete, self.args = isinstance(space, gym.spaces.Discrete), args
        num_outputs = int(space.n if self.discrete else np.prod(space.shape))
        self.actor = mlp(num_inputs, num_outputs, 0.01)
        if not self.discrete:
            self.actor.log_std = self.log_std = nn.Parameter(torch.full((num_outputs,), -0.5))
        self.powers: Tensor = nn.Buffer(torch.zeros(3, num_inputs, dtype=torch.float64))
        self.statistics: Tensor = nn.Buffer(torch.tensor([[0.0], [1.0]]).repeat(1, num_inputs))

    def observe(self, observations: np.ndarray) -> None:
        """Takes a rollout's (T, N, D) observations into the running mean and variance."""
        x = torch.as_tensor(observations, dtype=torch.float64, device=self.args.device)
        self.powers += average(torch.stack([(x**power).mean((0, 1)) for power in range(3)]))
        mean, square = self.powers[1:] / self.powers[0]
        self.statistics[:] = torch.stack((mean, square - mean**2))

    def normalize(self, observations: np.ndarray) -> Tensor:
        """The networks' inputs at (M, D) observations: these or, if asked for, scaled ones."""
        x = torch.as_tensor(observations, dtype=torch.float32, device=self.args.device)
        if not self.args.normalize_observations:
            return x
        mean, variance = self.statistics
        return nn.functional.batch_norm(x, mean, variance, eps=1e-8).clamp(-10, 10)

    def policy(self, inputs: Tensor) -> Distribution:
        """The distribution of the actions at each of (M, D) inputs."""
        if self.discrete:
            return Categorical(logits=self.actor(inputs))
        return Independent(Normal(self.actor(inputs), self.log_std.exp()), 1)

    def act(self, observations: np.ndarray, greedy: bool = False) -> np.ndarray:
        """One action at each of (N, D) observations: a sample or, if greedy, the most likely."""
        outputs = self.normalize(observations)
        for layer in self.actor:  # self.actor(outputs) does the same; its hooks take as long again
            outputs = layer.forward(outputs)
        if not greedy and self.discrete:  # Gumbel noise makes the largest logit a sample
            outputs -= torch.empty_like(outputs).exponential_().log()
        elif not greedy:
            outputs += torch.randn_like(outputs) * self.log_std.exp()
        return (outputs.argmax(-1) if self.discrete else outputs).cpu().numpy()


def make_envs(args: Args, num_envs: int, mode: str | None = None) -> gym.vector.VectorEnv:
    """num_envs environments with flat observations and actions, which are clipped to the bounds."""
    try:
        options: dict = {"render_mode": "rgb_array"} if args.capture_video else {}
        envs = gym.make_vec(args.env_id, num_envs, mode, **options)
    except (gym.error.Error, ValueError) as error:
        name = f"--env-id {args.env_id}" + f" --vectorization-mode {mode}" * (mode is not None)
        raise ValueError(f"{name}: {error}") from error
    observations, actions = envs.single_observation_space, envs.single_action_space
    mode, served = envs.metadata.get("autoreset_mode"), gym.spaces.Box | gym.spaces.Discrete
    if not (isinstance(actions, served) and observations.is_np_flattenable):
        raise ValueError(f"--env-id {args.env_id}: cannot serve {observations} with {actions}")
    if getattr(actions, "start", 0) != 0 or mode != gym.vector.AutoresetMode.NEXT_STEP:
        raise ValueError(f"--env-id {args.env_id}: {actions} must start at 0, {mode} be NEXT_STEP")
    if not isinstance(observations, gym.spaces.Box) or len(observations.shape) != 1:
        envs = wrappers.FlattenObservation(envs)
    if isinstance(actions, gym.spaces.Box):
        low, high = actions.low, actions.high
        envs = wrappers.TransformAction(envs, lambda a: a.reshape(-1, *low.shape).clip(low, high))
    return envs


@torch.inference_mode()
def rollouts(agent: Agent, envs: gym.vector.VectorEnv, args: Args, seed: int):
    """Yields batch after batch of all environments' steps; the inner loop says how many.
    Arrays are (T, N, ...); observations' row t + 1, of T + 1, is the true successor of row t.
    valid marks the steps to learn from; episodes are the (return, length) of those that ended.
    """
    observation, _ = envs.reset(seed=seed)
    ended = np.zeros(args.num_envs, dtype=bool)
    while True:
        observations, steps, episodes = [observation], [], list[tuple]()
        while not ended.all():  # one whole episode of each
            action, valid = agent.act(observation), ~ended
            observation, reward, termination, truncation, infos = envs.step(action)
            observations.append(observation)
            steps.append((action, reward.astype(np.float32), termination, truncation, valid))
            ended |= termination | truncation
            if "episode" in infos:
                episodes += zip(*(infos["episode"][key][ended & valid] for key in "rl"))
        columns = map(np.stack, zip(*steps))
        yield Batch._make((np.stack(observations, dtype=np.float32), *columns, episodes))
        observation, ended[:] = envs.reset()[0], False


def estimate(agent: Agent, batch: Batch, args: Args) -> list[Tensor]:
    """For the M valid steps what `update` learns from: M rows of each of its columns."""
    inputs = agent.normalize(np.concatenate(batch.observations)).view(batch.observations.shape)
    # With V = 0 and lambda = 1 GAE's returns are the discounted sums of the rewards to come.
    values = np.zeros(batch.observations.shape[:2], dtype=np.float32)
    ends = batch.terminations, batch.truncations
    _, returns = compute_gae(batch.rewards, values, *ends, args.gamma, 1.0)
    if not args.reward_to_go:
        returns[:] = returns[0]
    columns = (inputs[:-1], batch.actions, returns)
    return [torch.as_tensor(column, device=args.device)[batch.valid] for column in columns]


def average(x: Tensor) -> Tensor:
    """Makes x its mean over the processes, if torchrun started several."""
    if dist.is_initialized():
        dist.all_reduce(x.div_(dist.get_world_size()))
    return x


class Adam(nn.Module):
    """Adam (https://arxiv.org/abs/1412.6980) on a network's parameters as one vector. Torch's own
    kernel, but not its class, which takes seconds to import a compiler and longer for a step.
    """

    def __init__(self, network: nn.Module, learning_rate: float):
        super().__init__()
        self.learning_rate, self.remaining = learning_rate, 1.0  # annealing lowers the latter
        self.weights = list(network.parameters())
        self.vector = parameters_to_vector(self.weights).detach()
        vector_to_parameters(self.vector, self.weights)  # they are views of it from now on
        self.moments: Tensor = nn.Buffer(self.vector.new_zeros(2, len(self.vector)))
        self.steps: Tensor = nn.Buffer(self.vector.new_zeros(()))

    def gradient(self, loss: Tensor) -> Tensor:
        """The gradient of loss, as one vector."""
        return torch.cat([x.flatten() for x in torch.autograd.grad(loss, self.weights)])

    def step(self, gradient: Tensor, args: Args) -> Tensor:
        """One step down a gradient, clipped; returns the norm that it had."""
        grad_norm = average(gradient).norm()
        gradient *= (args.max_grad_norm / (grad_norm + 1e-6)).clamp(max=1)
        self.steps += 1
        state: list = [[x] for x in (self.vector, gradient, *self.moments)] + [[], [self.steps]]
        rates: dict = {"lr": self.learning_rate * self.remaining, "beta1": 0.9, "beta2": 0.999}
        torch._fused_adam_(*state, **rates, eps=1e-5, weight_decay=0, amsgrad=False, maximize=False)
        return grad_norm


def make_optimizers(agent: Agent, args: Args) -> list[Adam]:
    """One for each network or pair of networks that has a learning rate of its own."""
    return [Adam(agent.actor, args.learning_rate)]


def update(agent: Agent, optimizers: list[Adam], batch: Batch, args: Args) -> dict[str, float]:
    """One iteration's learning from one batch; returns its metrics."""
    inputs, actions, returns = estimate(agent, batch, args)
    policy = agent.policy(inputs)
    policy_loss = -(policy.log_prob(actions) * returns).sum() / args.num_envs
    (actor,) = optimizers
    losses = {"policy_loss": policy_loss, "entropy": policy.entropy().mean()}
    losses["grad_norm"] = actor.step(actor.gradient(policy_loss), args)
    return {name: loss.item() for name, loss in losses.items()}


@torch.inference_mode()
def evaluate(agent: Agent, args: Args, greedy: bool, video: Path | None = None) -> float:
    """Mean return of eval_episodes episodes, one in each of as many new environments."""
    envs = make_envs(args, 1 if video else args.eval_episodes)
    if video:
        envs = wrappers.RecordVideo(envs, str(video))
    observations, _ = envs.reset(seed=args.seed)
    returns, running = np.zeros(envs.num_envs), np.ones(envs.num_envs, dtype=bool)
    for _ in range(int(args.total_timesteps)):  # an end even where no time limit sets one
        observations, rewards, *ends, _ = envs.step(agent.act(observations, greedy))
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
    size, count = args.num_envs * getattr(args, "num_steps", 1), getattr(args, "num_minibatches", 1)
    bounds = {"gamma": (0, 1), "gae_lambda": (0, 1), "total_timesteps": (size, np.inf)}
    bounds |= {"num_steps": (2, np.inf), "seed": (0, np.inf)}  # of 2 steps 1 may be a reset
    for name, value in vars(args).items():
        low, high = bounds.get(name, (int(type(value) is int), np.inf))
        if isinstance(value, int | float) and not low <= value <= high:
            raise ValueError(f"--{name.replace('_', '-')} {value}: must be in [{low}, {high}]")
    if size % count:
        raise ValueError(f"--num-minibatches {count}: must divide {size}, the steps of a rollout")
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
        return checkpoint | {x: checkpoint[x] for x in ("learners", "return_rms", "rng_state")}
    except Exception as error:
        raise ValueError(f"--resume {path}: no checkpoint of {__file__}: {error}") from error


def track(args: Args, run_dir: Path, rows: SimpleQueue, ready: Event) -> None:
    """Logs rows to W&B until one is None: in a thread, so that the training never waits for it."""
    # Left alone, the client waits minutes to start and forever to finish on a silent server.
    settings = "LOGIN_TIMEOUT=60 INIT_TIMEOUT=10 FINISH_TIMEOUT=30 ERROR_REPORTING=false QUIET=true"
    os.environ |= dict(f"WANDB_{x}".split("=") for x in settings.split()) | os.environ
    names: dict = {"project": args.wandb_project_name, "entity": args.wandb_entity}
    names |= {"group": args.wandb_group, "id": run_dir.name, "name": run_dir.name, "dir": run_dir}
    names |= {"config": vars(args), "resume": "allow", "reinit": "create_new"}
    for mode in (None, "offline"):
        try:
            import wandb

            run = wandb.init(**names, mode=mode)
            run.save(shutil.copy(__file__, run_dir), base_path=run_dir, policy="now")
            ready.set()
            for row in iter(rows.get, None):
                run.log(row, step=row.get("global_step"))  # None, for the scores, is the last
            return run.finish()
        except Exception as error:
            print(f"W&B is offline ({error!r:.300}); to upload the run: wandb sync {run_dir}/wandb")
            if mode or isinstance(error, ImportError):
                return ready.set()
            with suppress(BaseException):  # what a dead service raises
                wandb.teardown()  # or a failed start keeps the run's id taken


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
    learners = nn.ModuleList([agent, *(optimizers := make_optimizers(agent, args))])
    name = f"{args.env_id}__{args.exp_name}__{args.seed}__{time.time_ns()}".replace("/", "-")
    run_dir, global_step, log_size = checkpoint.get("run", (Path("runs", name), 0, 0))
    if checkpoint:
        learners.load_state_dict(checkpoint["learners"])
        vars(scaled.return_rms).update(checkpoint["return_rms"])
        torch.set_rng_state(checkpoint["rng_state"])
    if rank:  # the same parameters, then other actions
        torch.manual_seed(args.seed + global_step + rank)
    batches = rollouts(agent, envs, args, args.seed + global_step + rank * args.num_envs)

    def save(folder: Path) -> None:
        """Writes a checkpoint that is whole, the old or the new one, whenever the run is killed."""
        state = {"args": vars(args), "global_step": global_step, "log_size": log_size}
        state |= {"learners": learners.state_dict(), "rng_state": torch.get_rng_state()}
        state["return_rms"] = {key: float(x) for key, x in vars(scaled.return_rms).items()}
        with open(folder / "checkpoint.tmp", "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file)
        os.replace(file.name, folder / "checkpoint.pt")

    if rank == 0 and not args.resume:
        record = vars(args) | {module.__name__: module.__version__ for module in (gym, np, torch)}
        command = f"git -C '{Path(__file__).parent}' describe --always --dirty 2>&1"
        record["commit"] = os.popen(command).read().strip()
        (folder := Path(f"{run_dir}.new")).mkdir(parents=True)
        (folder / "args.json").write_text(json.dumps(record, indent=1))
        save(folder)
        folder.rename(run_dir)
    rows, ready = SimpleQueue[dict | None](), Event()
    tracker = Thread(target=track, args=(args, run_dir, rows, ready), daemon=True)
    if rank == 0:
        print(f"{run_dir}: {compute_gae.__name__} of {compute_gae.__module__} on {args.device}")
        if args.track:
            tracker.start()
            ready.wait(120)  # it may ask for a key
        if args.capture_video:  # untrained, which shows at once what filming lacks
            evaluate(agent, args, True, run_dir / f"videos/{global_step}")
    iteration, first_step, stopped, start = 0, global_step, False, time.perf_counter()
    total = args.total_timesteps
    progress = tqdm(total=total, initial=global_step, unit=" steps", disable=rank > 0)
    while global_step < total and not stopped:
        for optimizer in optimizers:
            optimizer.remaining = 1 - args.anneal_lr * global_step / total
        batch = next(batches)
        losses = update(agent, optimizers, batch, args)
        agent.observe(batch.observations)
        sums = {"observations": batch.observations.sum(), "rewards": batch.rewards.sum()}
        sums |= losses | {"steps": batch.valid.sum(), "interrupts": len(interrupts)}
        everyone = average(torch.tensor([float(x) for x in sums.values()], device=args.device))
        means = dict(zip(sums, everyone.tolist()))  # the same in all processes: all end together
        if broken := {name: x for name, x in means.items() if not np.isfinite(x)}:
            raise FloatingPointError(f"step {global_step} of {run_dir}: {broken}")
        steps, stopped = round(means["steps"] * world), means["interrupts"] > 0
        global_step, iteration = global_step + steps, iteration + 1
        returns, lengths = np.mean(batch.episodes or [(np.nan, np.nan)], axis=0)
        sps = (global_step - first_step) / (time.perf_counter() - start)
        rate = optimizers[0].learning_rate * optimizers[0].remaining
        metrics = {"global_step": global_step, "charts/SPS": sps, "charts/learning_rate": rate}
        metrics |= {"charts/episodic_return": returns, "charts/episodic_length": lengths}
        metrics |= {f"losses/{name}": means[name] for name in losses}
        if rank == 0:
            with open(run_dir / "metrics.csv", "a") as file:
                file.truncate(log_size)  # drops what a killed run wrote after its checkpoint
                for row in [metrics.values()] if log_size else [metrics, metrics.values()]:
                    print(*row, sep=",", file=file)
                log_size = file.tell()
            rows.put(metrics)
            if stopped or global_step >= total or iteration % args.checkpoint_interval == 0:
                save(run_dir)
        if batch.episodes:
            progress.set_description(f"return {returns:.1f}", refresh=False)
        progress.update(steps)
    progress.close()
    envs.close()
    scores = {"greedy": np.nan}
    if stopped and rank == 0:
        print(f"Stopped; to go on: python {Path(__file__).name} --resume {run_dir}")
    elif rank == 0:
        scores = {name: evaluate(agent, args, name == "greedy") for name in ("greedy", "sampled")}
        (run_dir / "evaluation.tmp").write_text(json.dumps(scores))
        os.replace(run_dir / "evaluation.tmp", run_dir / "evaluation.json")
        print(f"Mean return of {args.eval_episodes} episodes: {scores}")
        if args.capture_video:
            evaluate(agent, args, True, run_dir / f"videos/{global_step}")
    if tracker.is_alive():
        for last in (scores, None, None):  # an end for the second W&B run, if there is one
            rows.put(last)
        (watchdog := Timer(45, os.system, [f"pkill -KILL -P {os.getpid()} wandb-core"])).start()
        tracker.join(60)  # a service that is stopped would hold the exit, too
        watchdog.cancel()
    return scores["greedy"]


if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda n, _: interrupts.append(signal.signal(n, signal.SIG_DFL)))
    args = tyro.cli(Args)
    if args.resume:  # the run's own arguments, but for those given now
        args = tyro.cli(Args, default=Args(**load_checkpoint(args.resume)["args"]))
    train(args)
    if dist.is_initialized():
        dist.destroy_process_group()
