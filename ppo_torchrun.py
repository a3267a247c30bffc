"""Proximal Policy Optimization: VPG with a clipped ratio of probabilities.

The clip lets it train for several epochs of minibatches on one rollout.
    maximize E[min(r A, clip(r, 1 - eps, 1 + eps) A)],    r = pi(a|s) / pi_old(a|s)
Paper: Schulman et al. 2017, https://arxiv.org/abs/1707.06347
Each process steps its own environments. All learn from the mean of their gradients.
Run: torchrun --nproc-per-node 2 ppo_torchrun.py --env-id CartPole-v1
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import gymnasium as gym
import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn  # imported later, by Adam, it would keep the group alive
import tyro
from gymnasium.spaces import Box, Discrete, flatdim
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, Independent, Normal
from tqdm import tqdm


@dataclass
class Args:
    exp_name: str = Path(__file__).stem  # part of the run folder's name
    seed: int = 1  # seed of parameters, actions and environments
    device: Literal["cpu", "cuda"] = "cpu"  # where the networks are
    track: bool = False  # log to Weights & Biases
    wandb_project_name: str = "policy-ladder"  # W&B project
    eval_episodes: int = 100  # greedy episodes after training
    save_interval: int = 10  # iterations between checkpoints
    resume: str | None = None  # checkpoint to start from

    env_id: str = "CartPole-v1"  # Gymnasium id of the environment
    num_envs: int = 8  # environments stepped in parallel
    normalize_observations: bool = True  # to mean 0 and deviation 1
    normalize_rewards: bool = True  # scale so that returns have deviation 1

    total_timesteps: int = 50_000  # steps of all environments together
    num_steps: int = 128  # steps of each environment in a rollout
    gamma: float = 0.99  # discount factor
    gae_lambda: float = 0.97  # lambda of GAE: 0 is one-step TD, 1 is Monte Carlo
    anneal_lr: bool = True  # decrease learning rates linearly to 0
    max_grad_norm: float = 0.5  # gradients are clipped to this norm
    ent_coef: float = 0.04  # weight of the entropy bonus
    learning_rate: float = 1.5e-3  # Adam's learning rate
    update_epochs: int = 6  # epochs over each rollout
    num_minibatches: int = 8  # minibatches in an epoch
    clip_coef: float = 0.1  # eps of the clipped objective
    vf_coef: float = 0.5  # weight of the value loss
    target_kl: float | None = None  # stop the epochs once the KL divergence exceeds it


def check_args(args: Args) -> None:
    """Raises ValueError for a number that is out of range."""
    for name, value in vars(args).items():
        # All integers but the seed are counts. "not >=" refuses nan, too.
        lowest = 1 if Args.__annotations__[name] is int and name != "seed" else 0
        if Args.__annotations__[name] in (int, float) and not value >= lowest:
            raise ValueError(f"{name} = {value}: must be at least {lowest}")
        if name in ("gamma", "gae_lambda") and value > 1:
            raise ValueError(f"{name} = {value}: must be at most 1")


def make_envs(args: Args, num_envs: int) -> gym.vector.VectorEnv:
    """Environments that flatten observations and clip actions to their bounds."""
    envs = gym.make_vec(args.env_id, num_envs)
    # Rollouts rely on a reset that comes in the step after an episode's end.
    if envs.metadata.get("autoreset_mode") != gym.vector.AutoresetMode.NEXT_STEP:
        raise ValueError(f"env_id = {args.env_id}: autoreset mode is not NEXT_STEP")
    obs_space = envs.single_observation_space
    if obs_space.shape != (flatdim(obs_space),):  # not a vector yet
        envs = gym.wrappers.vector.FlattenObservation(envs)
    space: Any = envs.single_action_space
    if isinstance(space, Box) and space.dtype.kind == "f" and len(space.shape) == 1:
        return gym.wrappers.vector.ClipAction(envs)
    if isinstance(space, Discrete) and space.start == 0:
        return envs
    raise ValueError(f"env_id = {args.env_id}: needs actions 0 to n - 1 or a vector of floats")


def mlp(num_inputs: int, num_outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(num_inputs, 64),
        nn.Tanh(),
        nn.Linear(64, 64),
        nn.Tanh(),
        nn.Linear(64, num_outputs),
    )


class RunningMeanStd(nn.Module):
    """Mean and variance of all rows seen so far, merged as in Chan et al. (1979)."""

    def __init__(self, num_features: int):
        super().__init__()
        self.mean: Tensor = nn.Buffer(torch.zeros(num_features).double())
        self.var: Tensor = nn.Buffer(torch.ones(num_features).double())
        self.count: Tensor = nn.Buffer(torch.zeros(1).double())

    def update(self, rows: Tensor) -> None:
        """Adds rows (M, num_features)."""
        gathered: list = [None] * dist.get_world_size()  # M differs between processes
        dist.all_gather_object(gathered, rows.cpu())
        rows = torch.cat(gathered)
        rows = rows.to(self.mean)
        self.count += len(rows)
        weight = len(rows) / self.count
        delta = rows.mean(0) - self.mean
        self.mean += weight * delta
        # The weighted mean of the two variances, plus the spread of the two means
        self.var += weight * (rows.var(0, correction=0) - self.var + (1 - weight) * delta**2)


class Agent(nn.Module):
    """A policy and a value function of observations (..., num_inputs).

    num_actions is the number of discrete actions, or the dimension of continuous ones.
    """

    def __init__(self, num_inputs: int, num_actions: int, continuous: bool, normalize: bool):
        super().__init__()
        self.config = (num_inputs, num_actions, continuous, normalize)  # saved, for Agent(*config)
        self.continuous = continuous
        self.normalize = normalize
        self.obs_stats = RunningMeanStd(num_inputs)
        self.return_stats = RunningMeanStd(1)  # scales rewards; here so that it is saved
        self.actor = mlp(num_inputs, num_actions)
        self.critic = mlp(num_inputs, 1)
        if continuous:
            # In the actor, so that actor.parameters() is the whole policy.
            self.actor.log_std = nn.Parameter(torch.full((num_actions,), -0.5))

    def inputs(self, obs) -> Tensor:
        """Observations as the networks see them: float32, normalized if asked for."""
        x = torch.as_tensor(obs, device=self.obs_stats.mean.device)
        if self.normalize:
            x = (x - self.obs_stats.mean) / torch.sqrt(self.obs_stats.var + 1e-8)
            x = x.clamp(-10, 10)
        return x.float()

    def policy(self, obs) -> Distribution:
        """pi(a|s) at each observation."""
        outputs = self.actor(self.inputs(obs))
        # validate_args=False, because the checks take almost as long as the network.
        if self.continuous:
            std = self.actor.get_parameter("log_std").exp()
            # Independent sums log_prob and entropy over the dimensions of an action.
            return Independent(Normal(outputs, std, validate_args=False), 1)
        return Categorical(logits=outputs, validate_args=False)

    def value(self, obs) -> Tensor:
        """V(s) at each observation."""
        return self.critic(self.inputs(obs)).squeeze(-1)

    @torch.inference_mode()
    def act(self, obs: np.ndarray, greedy: bool = False) -> np.ndarray:
        """An action at each observation: a sample, or the most likely one if greedy."""
        policy = self.policy(obs)
        action = policy.mode if greedy else policy.sample()
        return action.cpu().numpy()


class Rollout(NamedTuple):
    """T steps of N environments.

    Gymnasium resets an environment in the step after an episode's end.
    That step ignores its action, and is not valid as training data.
    """

    valid: np.ndarray  # (T, N), bool: False where the step only resets
    obs: np.ndarray  # (T, N, D)
    actions: np.ndarray  # (T, N) or (T, N, A), before clipping
    rewards: np.ndarray  # (T, N)
    terminations: np.ndarray  # (T, N), bool
    truncations: np.ndarray  # (T, N), bool
    episode_returns: np.ndarray  # (T, N): the sum of the episode's rewards so far


def collect_rollout(agent: Agent, envs, obs, done, episode_return, num_steps: int) -> tuple:
    """Returns a Rollout of num_steps steps, then obs, done and episode_return after it.

    obs (N, D) are the current observations.
    done (N,) is True where an episode has ended, so that the next step only resets.
    episode_return (N,) is the sum of each episode's rewards so far.
    """
    steps = []  # each a Rollout without the axis T
    obs = obs.copy()  # some environments reuse the arrays that they return
    for _ in range(num_steps):
        actions = agent.act(obs)
        next_obs, rewards, terminations, truncations = [x.copy() for x in envs.step(actions)[:4]]
        episode_return = (episode_return + rewards) * ~done  # 0 in a reset step
        step = Rollout(~done, obs, actions, rewards, terminations, truncations, episode_return)
        steps.append(step)
        obs = next_obs
        done = terminations | truncations
    rollout = Rollout(*(np.stack(column) for column in zip(*steps)))
    return rollout, obs, done, episode_return


def compute_gae_python(rewards, values, terminations, truncations, gamma, gae_lambda):
    """Generalized advantage estimation (Schulman et al. 2016, eq. 16).

    rewards, terminations and truncations are (T, N) or (T,). values has one row more,
    which is V of the states after the rollout. Floats are float32 or float64, flags bool.
    Returns advantages and returns, both shaped like rewards.
    """
    # Python's floats, because NumPy's float64 would turn float32 arrays into float64.
    gamma, gae_lambda = float(gamma), float(gae_lambda)
    advantages = np.zeros_like(rewards)
    last_gae = np.zeros_like(values[-1])
    for t in reversed(range(len(rewards))):
        # V is 0 after a termination, but not after a truncation.
        delta = rewards[t] + gamma * values[t + 1] * ~terminations[t] - values[t]
        done = terminations[t] | truncations[t]  # both end the sum
        last_gae = delta + gamma * gae_lambda * last_gae * ~done
        advantages[t] = last_gae
    returns = advantages + values[:-1]
    return advantages, returns


try:
    from gae_kernel import compute_gae  # the same in Rust (gae_kernel/), bit for bit
except ImportError:
    compute_gae = compute_gae_python


class Batch(NamedTuple):
    """The M valid steps of a rollout."""

    obs: Tensor  # (M, D)
    actions: Tensor  # (M,) or (M, A)
    advantages: Tensor  # (M,)
    returns: Tensor  # (M,): targets of V(s)


def estimate_advantages(agent: Agent, rollout: Rollout, last_obs, args: Args) -> Batch:
    """Advantages and returns of the valid steps. last_obs (N, D) follow the rollout."""
    # obs[t + 1] is what step t led to, even at an end: the reset is a step of its own.
    obs = np.concatenate([rollout.obs, last_obs[None]])
    values = agent.value(obs).detach().cpu().numpy()
    rewards = rollout.rewards.astype(np.float32)
    ends = (rollout.terminations, rollout.truncations)
    if args.normalize_rewards:
        # With V = 0 and lambda = 1, GAE's returns are discounted sums of rewards.
        _, raw_returns = compute_gae(rewards, np.zeros_like(values), *ends, args.gamma, 1.0)
        agent.return_stats.update(torch.as_tensor(raw_returns[rollout.valid][:, None]))
        rewards /= torch.sqrt(agent.return_stats.var + 1e-8).item()
    advantages, returns = compute_gae(rewards, values, *ends, args.gamma, args.gae_lambda)
    columns = (rollout.obs, rollout.actions, advantages, returns)
    return Batch(*(torch.as_tensor(x[rollout.valid], device=args.device) for x in columns))


def make_optimizers(agent: Agent, args: Args) -> list[torch.optim.Adam]:
    """Adam, in a list because some scripts have one for each network."""
    return [
        torch.optim.Adam(agent.parameters(), args.learning_rate, eps=1e-5, fused=True),
    ]


def update(agent: Agent, optimizers: list, batch: Batch, args: Args) -> dict[str, float]:
    """Learns from a batch. Returns metrics, with the losses of the last step."""
    # 0.1 and not 1e-8: small advantages are mostly noise, and should stay small.
    advantages = (batch.advantages - batch.advantages.mean()) / (batch.advantages.std() + 0.1)
    old_log_probs = agent.policy(batch.obs).log_prob(batch.actions).detach()
    for _ in range(args.update_epochs):
        for rows in torch.randperm(len(batch.obs)).tensor_split(args.num_minibatches):
            policy = agent.policy(batch.obs[rows])
            log_ratio = policy.log_prob(batch.actions[rows]) - old_log_probs[rows]
            ratio = log_ratio.exp()
            clipped = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
            policy_loss = -torch.min(ratio * advantages[rows], clipped * advantages[rows]).mean()
            value_loss = 0.5 * ((agent.value(batch.obs[rows]) - batch.returns[rows]) ** 2).mean()
            entropy = policy.entropy().mean()
            loss = policy_loss + args.vf_coef * value_loss - args.ent_coef * entropy
            optimizers[0].zero_grad()
            loss.backward()
            # Replace each gradient by its mean over the processes
            gradients: list = [parameter.grad for parameter in agent.parameters()]
            mean = nn.utils.parameters_to_vector(gradients)
            dist.all_reduce(mean, dist.ReduceOp.AVG)
            nn.utils.vector_to_parameters(mean, gradients)
            nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
            optimizers[0].step()
        approx_kl = (ratio - 1 - log_ratio).mean().detach()  # http://joschu.net/blog/kl-approx.html
        dist.all_reduce(approx_kl, dist.ReduceOp.AVG)  # all stop after the same epoch
        if args.target_kl is not None and approx_kl > args.target_kl:
            break

    return {
        "losses/policy_loss": policy_loss.item(),
        "losses/value_loss": value_loss.item(),
        "losses/entropy": entropy.item(),
        "losses/approx_kl": approx_kl.item(),
        "losses/clipfrac": (ratio != clipped).float().mean().item(),
    }


def evaluate(agent: Agent, args: Args) -> float:
    """Mean return of greedy episodes, stopped after total_timesteps steps in all."""
    envs = make_envs(args, args.eval_episodes)
    # Seeds that neither training nor the evaluation of another seed uses
    obs, _ = envs.reset(seed=10**9 + args.seed * args.eval_episodes)
    returns = np.zeros(args.eval_episodes)
    running = np.ones(args.eval_episodes, bool)
    steps = 0
    while running.any() and steps < args.total_timesteps:
        obs, rewards, terminations, truncations, _ = envs.step(agent.act(obs, greedy=True))
        returns[running] += rewards[running]
        steps += running.sum()
        running &= ~(terminations | truncations)
    envs.close()
    if running.any():
        print(f"Evaluation stopped after {steps} steps: {running.sum()} episodes had not ended")
    return returns.mean().item()


def log(metrics: dict[str, float], run_dir: Path, wandb_run: Any) -> None:
    """Appends a line to metrics.jsonl, and logs to the W&B run if there is one."""
    with open(run_dir / "metrics.jsonl", "a") as file:
        print(json.dumps(metrics), file=file)
    if wandb_run:
        wandb_run.log(metrics, step=metrics["global_step"])


def save(path: Path, agent: Agent, optimizers: list, global_step: int) -> None:
    """Writes a checkpoint, first to a .tmp file so that path is never half written."""
    checkpoint = {
        "agent_config": agent.config,
        "agent": agent.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "global_step": global_step,
    }
    torch.save(checkpoint, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def load(path: str, agent: Agent, optimizers: list) -> int:
    """Restores agent and optimizers from a checkpoint. Returns its global_step."""
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    if checkpoint["agent_config"] != agent.config:
        raise ValueError(f"resume = {path}: other networks or another normalization")
    agent.load_state_dict(checkpoint["agent"])
    for optimizer, state in zip(optimizers, checkpoint["optimizers"], strict=True):
        optimizer.load_state_dict(state)
    return checkpoint["global_step"]


def learn(args: Args, envs: gym.vector.VectorEnv, run_dir: Path, wandb_run: Any = None) -> float:
    """Trains and evaluates an agent. Returns its mean return over greedy episodes."""
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)  # in the whole process; small networks need no more
    if args.device == "cuda":
        torch.cuda.set_device(dist.get_node_local_rank())
    agent = Agent(
        num_inputs=flatdim(envs.single_observation_space),
        num_actions=flatdim(envs.single_action_space),
        continuous=isinstance(envs.single_action_space, Box),
        normalize=args.normalize_observations,
    ).to(args.device)
    optimizers = make_optimizers(agent, args)
    global_step = load(args.resume, agent, optimizers) if args.resume else 0
    args.seed += dist.get_rank() * args.num_envs  # from here on each process has its own
    torch.manual_seed(args.seed + global_step)  # so that resuming draws new numbers
    obs, _ = envs.reset(seed=args.seed + global_step)
    done = np.zeros(args.num_envs, bool)
    episode_return = np.zeros(args.num_envs)
    progress = tqdm(total=args.total_timesteps, initial=global_step, disable=dist.get_rank() > 0)
    iteration = 0

    while global_step < args.total_timesteps:
        iteration += 1

        # Anneal from the initial learning rates, which optimizer.defaults keeps
        fraction = 1 - global_step / args.total_timesteps if args.anneal_lr else 1.0
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = fraction * optimizer.defaults["lr"]

        # Collect experience and learn from it
        rollout, obs, done, episode_return = collect_rollout(
            agent, envs, obs, done, episode_return, args.num_steps
        )
        batch = estimate_advantages(agent, rollout, obs, args)
        metrics = update(agent, optimizers, batch, args)
        # Only now, because acting and learning must see the same statistics
        agent.obs_stats.update(batch.obs)
        steps = len(batch.obs)
        # If a loss is not finite in one process, the average is not, so all stop.
        averages = torch.tensor([steps, *metrics.values()], device=args.device)
        dist.all_reduce(averages, dist.ReduceOp.AVG)
        metrics = dict(zip(metrics, averages[1:].tolist()))
        steps = round(averages[0].item() * dist.get_world_size())
        global_step += steps

        # Record
        progress.update(steps)
        metrics["global_step"] = global_step
        ended = rollout.terminations | rollout.truncations
        if ended.any():
            metrics["charts/episodic_return"] = rollout.episode_returns[ended].mean().item()
            progress.set_postfix(episodic_return=metrics["charts/episodic_return"])
        if not np.isfinite(list(metrics.values())).all():
            raise FloatingPointError(f"not finite: {metrics}")
        if dist.get_rank() > 0:
            continue
        log(metrics, run_dir, wandb_run)
        if iteration % args.save_interval == 0 or global_step >= args.total_timesteps:
            save(run_dir / "checkpoint.pt", agent, optimizers, global_step)
    progress.close()
    envs.close()

    if dist.get_rank() > 0:
        return 0.0  # the first process evaluates
    score = evaluate(agent, args)
    log({"global_step": global_step, "eval/episodic_return": score}, run_dir, wandb_run)
    print(f"{run_dir}: mean return of {args.eval_episodes} greedy episodes: {score:.1f}")
    return score


def train(args: Args) -> float:
    """Makes a run folder in runs/ and calls learn. Logs to W&B if args.track is set."""
    # JSON turns NumPy scalars, which a caller may pass, into Python's numbers.
    args_json = json.dumps(vars(args), indent=1, default=np.generic.item)
    args = Args(**json.loads(args_json))
    check_args(args)
    envs = make_envs(args, args.num_envs)
    run_name = f"{args.env_id}__{args.exp_name}__{args.seed}__{time.time_ns()}"
    run_dir = Path("runs", run_name.replace("/", "-").replace(":", "-"))
    if dist.get_rank() > 0:
        return learn(args, envs, run_dir)
    run_dir.mkdir(parents=True)
    (run_dir / "args.json").write_text(args_json)
    if not args.track:
        return learn(args, envs, run_dir)
    import wandb

    with wandb.init(
        project=args.wandb_project_name,
        name=run_name,
        config=vars(args),
        save_code=True,
        reinit="create_new",  # leaves the caller's own run alone
    ) as wandb_run:
        return learn(args, envs, run_dir, wandb_run)


if __name__ == "__main__":
    args = tyro.cli(Args)
    if not dist.is_torchelastic_launched():
        raise SystemExit("start it with: torchrun --nproc-per-node 2 ppo_torchrun.py")
    dist.init_process_group()
    train(args)
    dist.destroy_process_group()
