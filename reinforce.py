"""REINFORCE: the score-function gradient of the expected return, on whole episodes.

Each action is reinforced by the return that followed it (reward-to-go).
    gradient = E[sum_t grad log pi(a_t|s_t) R_t],    R_t = r_t + gamma r_{t+1} + ...
Paper: Williams 1992, https://doi.org/10.1007/BF00992696
Run: python reinforce.py --env-id CartPole-v1
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import gymnasium as gym
import numpy as np
import torch
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
    normalize_observations: bool = False  # to mean 0 and deviation 1
    normalize_rewards: bool = True  # scale so that returns have deviation 1

    total_timesteps: int = 200_000  # steps of all environments together
    gamma: float = 0.99  # discount factor
    reward_to_go: bool = True  # weight an action by the rewards after it, not by all rewards
    anneal_lr: bool = True  # decrease learning rates linearly to 0
    max_grad_norm: float = 0.5  # gradients are clipped to this norm
    learning_rate: float = 2e-3  # Adam's learning rate


def check_args(args: Args) -> None:
    """Raises ValueError for a number that is out of range."""
    for name, value in vars(args).items():
        # All integers but the seed are counts. "not >=" refuses nan, too.
        lowest = 1 if Args.__annotations__[name] is int and name != "seed" else 0
        if Args.__annotations__[name] in (int, float) and not value >= lowest:
            raise ValueError(f"{name} = {value}: must be at least {lowest}")
        if name == "gamma" and value > 1:
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
        rows = rows.to(self.mean)
        self.count += len(rows)
        weight = len(rows) / self.count
        delta = rows.mean(0) - self.mean
        self.mean += weight * delta
        # The weighted mean of the two variances, plus the spread of the two means
        self.var += weight * (rows.var(0, correction=0) - self.var + (1 - weight) * delta**2)


class Agent(nn.Module):
    """A policy of observations (..., num_inputs).

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
        # With PyTorch's own initial weights a fifth of the seeds fail on CartPole.
        for layer, gain in zip(self.actor[::2], (2**0.5, 2**0.5, 0.01)):
            nn.init.orthogonal_(layer.get_parameter("weight"), gain)
            nn.init.zeros_(layer.get_parameter("bias"))
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

    @torch.inference_mode()
    def act(self, obs: np.ndarray, greedy: bool = False) -> np.ndarray:
        """An action at each observation: a sample, or the most likely one if greedy."""
        policy = self.policy(obs)
        action = policy.mode if greedy else policy.sample()
        return action.cpu().numpy()


class Rollout(NamedTuple):
    """One whole episode in each of N environments. T is the length of the longest."""

    valid: np.ndarray  # (T, N), bool: False after an episode's end
    obs: np.ndarray  # (T, N, D)
    actions: np.ndarray  # (T, N) or (T, N, A), before clipping
    rewards: np.ndarray  # (T, N), 0 after an episode's end


def collect_rollout(agent: Agent, envs, args: Args) -> Rollout:
    """Plays one episode in each environment."""
    obs, _ = envs.reset()
    obs = obs.copy()  # some environments reuse the arrays that they return
    done = np.zeros(args.num_envs, bool)
    steps: list[Rollout] = []  # each without the axis T
    while not done.all():
        if len(steps) * args.num_envs >= args.total_timesteps:
            raise ValueError(f"env_id = {args.env_id}: a batch outlasts total_timesteps")
        actions = agent.act(obs)
        next_obs, rewards, terminations, truncations = [x.copy() for x in envs.step(actions)[:4]]
        # Ended environments step on until all have ended. Those steps do not count.
        steps.append(Rollout(~done, obs, actions, rewards * ~done))
        obs = next_obs
        done = done | terminations | truncations
    return Rollout(*(np.stack(column) for column in zip(*steps)))


class Batch(NamedTuple):
    """The M valid steps of a rollout."""

    obs: Tensor  # (M, D)
    actions: Tensor  # (M,) or (M, A)
    returns: Tensor  # (M,)


def compute_returns(agent: Agent, rollout: Rollout, args: Args) -> Batch:
    """The valid steps, with discounted returns. A truncation counts as an episode's end."""
    returns = np.zeros_like(rollout.rewards)
    discounted_return = 0.0
    for t in reversed(range(len(returns))):
        discounted_return = rollout.rewards[t] + args.gamma * discounted_return
        returns[t] = discounted_return
    if args.normalize_rewards:
        agent.return_stats.update(torch.as_tensor(returns[rollout.valid][:, None]))
        returns /= torch.sqrt(agent.return_stats.var + 1e-8).item()
    if not args.reward_to_go:
        returns[:] = returns[0]  # every action gets the return of the whole episode
    columns = (rollout.obs, rollout.actions, returns.astype(np.float32))
    return Batch(*(torch.as_tensor(x[rollout.valid], device=args.device) for x in columns))


def make_optimizers(agent: Agent, args: Args) -> list[torch.optim.Adam]:
    """Adam, in a list because some scripts have one for each network."""
    return [
        torch.optim.Adam(agent.actor.parameters(), args.learning_rate, eps=1e-5, fused=True),
    ]


def update(agent: Agent, optimizers: list, batch: Batch, args: Args) -> dict[str, float]:
    """One step of the policy. Returns metrics."""
    optimizer = optimizers[0]
    policy = agent.policy(batch.obs)
    # The sum over the steps of an episode, the mean over the episodes
    policy_loss = -(policy.log_prob(batch.actions) * batch.returns).sum() / args.num_envs
    optimizer.zero_grad()
    policy_loss.backward()
    nn.utils.clip_grad_norm_(agent.actor.parameters(), args.max_grad_norm)
    optimizer.step()
    return {
        "losses/policy_loss": policy_loss.item(),
        "losses/entropy": policy.entropy().mean().item(),
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
    agent = Agent(
        num_inputs=flatdim(envs.single_observation_space),
        num_actions=flatdim(envs.single_action_space),
        continuous=isinstance(envs.single_action_space, Box),
        normalize=args.normalize_observations,
    ).to(args.device)
    optimizers = make_optimizers(agent, args)
    global_step = load(args.resume, agent, optimizers) if args.resume else 0
    torch.manual_seed(args.seed + global_step)  # so that resuming draws new numbers
    envs.reset(seed=args.seed + global_step)  # only seeds: each rollout resets again
    progress = tqdm(total=args.total_timesteps, initial=global_step, unit=" steps")
    iteration = 0

    while global_step < args.total_timesteps:
        iteration += 1

        # Anneal from the initial learning rates, which optimizer.defaults keeps
        fraction = 1 - global_step / args.total_timesteps if args.anneal_lr else 1.0
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = fraction * optimizer.defaults["lr"]

        # Collect experience and learn from it
        rollout = collect_rollout(agent, envs, args)
        batch = compute_returns(agent, rollout, args)
        metrics = update(agent, optimizers, batch, args)
        # Only now, because acting and learning must see the same statistics
        agent.obs_stats.update(batch.obs)
        steps = len(batch.obs)
        global_step += steps

        # Record
        progress.update(steps)
        metrics["global_step"] = global_step
        metrics["charts/episodic_return"] = rollout.rewards.sum(0).mean().item()
        progress.set_postfix(episodic_return=metrics["charts/episodic_return"])
        if not np.isfinite(list(metrics.values())).all():
            raise FloatingPointError(f"not finite: {metrics}")
        log(metrics, run_dir, wandb_run)
        if iteration % args.save_interval == 0 or global_step >= args.total_timesteps:
            save(run_dir / "checkpoint.pt", agent, optimizers, global_step)
    progress.close()
    envs.close()

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
    train(args)
