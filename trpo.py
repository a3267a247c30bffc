"""Trust Region Policy Optimization: VPG whose steps are bounded in KL divergence.

Conjugate gradients find a step's direction, target_kl its length. A line search can halve it.
    maximize E[r A]  subject to  E[KL(pi_old, pi)] <= target_kl,    r = pi(a|s) / pi_old(a|s)
Paper: Schulman et al. 2015, https://arxiv.org/abs/1502.05477
Run: python trpo.py --env-id CartPole-v1
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
from torch.distributions.kl import kl_divergence
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
    target_kl: float = 0.01  # bound on the KL divergence from the old policy
    cg_iterations: int = 10  # iterations of conjugate gradients
    cg_damping: float = 0.1  # added to the diagonal of the Fisher matrix
    max_backtracks: int = 10  # halvings of the step before it is given up
    vf_learning_rate: float = 2e-2  # learning rate of the value function
    vf_epochs: int = 10  # gradient steps of the value function on each rollout


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
        torch.optim.Adam(agent.critic.parameters(), args.vf_learning_rate, eps=1e-5, fused=True),
    ]


def flat_grad(output: Tensor, parameters: list, **kwargs: Any) -> Tensor:
    """The gradient of a scalar as one vector."""
    return nn.utils.parameters_to_vector(torch.autograd.grad(output, parameters, **kwargs))


def conjugate_gradient(multiply, b: Tensor, iterations: int) -> Tensor:
    """Solves A x = b for a positive definite A, known only by multiply(p) = A p."""
    x = torch.zeros_like(b)
    r = b  # the residual b - A x
    p = b  # the direction of search
    for _ in range(iterations):
        if r.dot(r) < 1e-10:  # solved, and r.dot(r) is a divisor below
            break
        Ap = multiply(p)
        alpha = r.dot(r) / p.dot(Ap)
        x = x + alpha * p
        next_r = r - alpha * Ap
        beta = next_r.dot(next_r) / r.dot(r)
        p = next_r + beta * p
        r = next_r
    return x


def line_search(parameters: list, step: Tensor, accept, max_backtracks: int) -> float:
    """Halves a step until accept() agrees. Returns the fraction taken, or 0."""
    old_parameters = nn.utils.parameters_to_vector(parameters)
    for backtracks in range(max_backtracks + 1):
        fraction = 0.5**backtracks
        nn.utils.vector_to_parameters(old_parameters + fraction * step, parameters)
        if accept():
            return fraction
    nn.utils.vector_to_parameters(old_parameters, parameters)
    return 0.0


def update(agent: Agent, optimizers: list, batch: Batch, args: Args) -> dict[str, float]:
    """Learns from a batch. Returns metrics, with the losses of the last step."""
    # 0.1 and not 1e-8: small advantages are mostly noise, and should stay small.
    advantages = (batch.advantages - batch.advantages.mean()) / (batch.advantages.std() + 0.1)
    value_optimizer = optimizers[0]
    policy = agent.policy(batch.obs)
    # The ratios are still 1, so the objective has the same gradient as VPG's.
    policy_loss = -(policy.log_prob(batch.actions) * advantages).mean()
    entropy = policy.entropy().mean()
    loss = policy_loss - args.ent_coef * entropy
    parameters = list(agent.actor.parameters())
    gradient = flat_grad(loss, parameters, retain_graph=True)
    with torch.no_grad():
        old_policy = agent.policy(batch.obs)  # equal to policy, without gradients
    kl = kl_divergence(old_policy, policy).mean()
    kl_gradient = flat_grad(kl, parameters, create_graph=True)  # 0, but its derivative is not

    def fisher_product(p: Tensor) -> Tensor:
        # (F + damping I) p. The Fisher matrix F is the second derivative of the KL.
        return flat_grad(kl_gradient.dot(p), parameters, retain_graph=True) + args.cg_damping * p

    @torch.no_grad()
    def accept() -> bool:
        new_policy = agent.policy(batch.obs)
        log_ratio = new_policy.log_prob(batch.actions) - old_policy.log_prob(batch.actions)
        entropy_gain = new_policy.entropy().mean() - entropy
        gain = ((log_ratio.exp() - 1) * advantages).mean() + args.ent_coef * entropy_gain
        new_kl = kl_divergence(old_policy, new_policy).mean()
        return bool(gain > 0 and new_kl <= args.target_kl)

    # The natural gradient step solves (F + damping I) direction = -gradient.
    direction = conjugate_gradient(fisher_product, -gradient, args.cg_iterations)
    # The KL of a step s is about s F s / 2. Here s (F + damping I) s / 2 is target_kl.
    step = direction * torch.sqrt(2 * args.target_kl / direction.dot(fisher_product(direction)))
    step_fraction = line_search(parameters, step, accept, args.max_backtracks)
    for _ in range(args.vf_epochs):
        value_loss = 0.5 * ((agent.value(batch.obs) - batch.returns) ** 2).mean()
        value_optimizer.zero_grad()
        value_loss.backward()
        nn.utils.clip_grad_norm_(agent.critic.parameters(), args.max_grad_norm)
        value_optimizer.step()

    return {
        "losses/policy_loss": policy_loss.item(),
        "losses/value_loss": value_loss.item(),
        "losses/entropy": entropy.item(),
        "losses/kl": kl_divergence(old_policy, agent.policy(batch.obs)).mean().item(),
        "losses/step_fraction": step_fraction,
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
    obs, _ = envs.reset(seed=args.seed + global_step)
    done = np.zeros(args.num_envs, bool)
    episode_return = np.zeros(args.num_envs)
    progress = tqdm(total=args.total_timesteps, initial=global_step, unit=" steps")
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
