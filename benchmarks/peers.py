"""The programs that speed.py times, each in a process of its own, on CartPole-v1.

    python -m uv run --extra peers benchmarks/peers.py NAME ARGUMENTS

`ours SCRIPT FLAGS`, `cleanrl SCRIPT FLAGS` and a library's name with a number of STEPS print the
steps a second of training. `solve_ours` and `solve_cleanrl` print when CartPole-v1 is solved. Each
function imports what it needs, so that no program pays for another's imports.
"""

import importlib
import json
import os
import runpy
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))
LASTING = 5_000  # steps over which every look must pass


def print_speed(train: Callable[[int], Any], steps: str) -> None:
    start = time.perf_counter()
    train(int(steps))
    print(f"{int(steps) / (time.perf_counter() - start)} steps/s")


def load_script(path: str, flags: tuple[str, ...]):
    """The module of one of our scripts, and its arguments."""
    import tyro

    sys.path.insert(0, str(Path(path).parent))
    module = importlib.import_module(Path(path).stem)
    return module, tyro.cli(module.Args, args=flags)


def ours(path: str, *flags: str) -> None:
    """The progress bar ends with the speed of the loop, its logs and checkpoints included."""
    import gymnasium as gym

    gym.registry["CartPole-v1"].vector_entry_point = None  # one by one, as the others step them
    module, args = load_script(path, flags)
    module.evaluate = lambda *_: 0.0
    module.train(args)


def cleanrl(path: str, *flags: str) -> None:
    """CleanRL prints its speed itself, as steps over seconds since the first reset."""
    sys.argv = [path, *flags]
    runpy.run_path(path, run_name="__main__")


def sb3_ppo(steps: str) -> None:
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_vec_env

    settings: dict = {"learning_rate": lambda remaining: 2.5e-4 * remaining, "gae_lambda": 0.95}
    settings |= {"ent_coef": 0.01, "vf_coef": 0.25, "device": "cpu"}
    envs = make_vec_env("CartPole-v1", 4)
    model = PPO("MlpPolicy", envs, n_steps=128, batch_size=128, n_epochs=4, **settings)
    print_speed(model.learn, steps)


def sb3_trpo(steps: str) -> None:
    from sb3_contrib import TRPO
    from stable_baselines3.common.env_util import make_vec_env

    envs = make_vec_env("CartPole-v1", 4)
    model = TRPO("MlpPolicy", envs, n_steps=128, batch_size=512, device="cpu")
    print_speed(model.learn, steps)


def rlox_ppo(steps: str) -> None:
    from rlox.algorithms.ppo import PPO

    settings: dict = {"n_steps": 128, "batch_size": 128, "n_epochs": 4, "clip_vloss": False}
    settings |= {"learning_rate": 2.5e-4, "anneal_lr": True}
    model = PPO("gymnasium:CartPole-v1", n_envs=4, **settings)
    print_speed(model.train, steps)


def torchrl_ppo(steps: str) -> None:
    import gymnasium as gym
    import torch
    from tensordict.nn import TensorDictModule
    from torchrl.collectors import Collector
    from torchrl.envs import GymWrapper
    from torchrl.modules import MLP, ProbabilisticActor, ValueOperator
    from torchrl.objectives import ClipPPOLoss
    from torchrl.objectives.value import GAE

    mode = {"autoreset_mode": gym.vector.AutoresetMode.DISABLED}  # the one that TorchRL prefers
    envs = gym.make_vec("CartPole-v1", 4, "sync", vector_kwargs=mode)
    envs = GymWrapper(envs, categorical_action_encoding=True)
    nets = [MLP(4, size, num_cells=[64, 64], activation_class=torch.nn.Tanh) for size in (2, 1)]
    logits = TensorDictModule(nets[0], in_keys=["observation"], out_keys=["logits"])
    sampling = {"distribution_class": torch.distributions.Categorical, "return_log_prob": True}
    actor = ProbabilisticActor(logits, spec=envs.action_spec, in_keys=["logits"], **sampling)
    critic = ValueOperator(nets[1], in_keys=["observation"])
    add_advantages = GAE(gamma=0.99, lmbda=0.95, value_network=critic)
    # "l2" is the mean square, without 1/2
    weights: dict = {"entropy_coeff": 0.01, "critic_coeff": 0.25, "loss_critic_type": "l2"}
    losses = ClipPPOLoss(actor, critic, **weights, normalize_advantage=True)
    optimizer = torch.optim.Adam(losses.parameters(), eps=1e-5)

    def train(steps: int) -> None:
        settings: dict = {"frames_per_batch": 512, "total_frames": steps}
        collector = Collector(envs, actor, **settings, auto_register_policy_transforms=False)
        for number, batch in enumerate(collector):
            optimizer.param_groups[0]["lr"] = 2.5e-4 * (1 - 512 * number / steps)
            with torch.no_grad():
                batch = add_advantages(batch).reshape(-1)
            for _ in range(4):
                for rows in torch.randperm(512).split(128):
                    parts = losses(batch[rows])
                    loss = parts["loss_objective"] + parts["loss_critic"] + parts["loss_entropy"]
                    optimizer.zero_grad()
                    loss.backward()
                    torch.nn.utils.clip_grad_norm_(losses.parameters(), 0.5)
                    optimizer.step()

    print_speed(train, steps)


def xla_ppo(steps: str) -> None:
    """The shape of PureJaxRL: environments and learning as one program, compiled by XLA."""
    import flax.linen as nn
    import jax
    import jax.numpy as jnp
    import optax
    from gymnasium.envs.phys2d.cartpole import CartPoleFunctional

    def mlp(num_outputs: int) -> nn.Sequential:
        return nn.Sequential([nn.Dense(64), nn.tanh, nn.Dense(64), nn.tanh, nn.Dense(num_outputs)])

    env = CartPoleFunctional()
    actor, critic = mlp(2), mlp(1)
    num_envs, num_steps, batch_size = 4, 128, 512
    num_updates = int(steps) // batch_size
    learning_rate = optax.linear_schedule(2.5e-4, 0.0, num_updates * 16)
    optimizer = optax.chain(optax.clip_by_global_norm(0.5), optax.adam(learning_rate, eps=1e-5))

    def step_env(state, _):
        params, obs, age, key = state
        key, act_key, reset_key = jax.random.split(key, 3)
        logits = jax.nn.log_softmax(actor.apply(params[0], obs))
        action = jax.random.categorical(act_key, logits)
        log_prob = jnp.take_along_axis(logits, action[:, None], 1)[:, 0]
        next_obs = jax.vmap(env.transition)(obs, action)
        terminated = jax.vmap(env.terminal, (0, None))(next_obs, None)
        done = terminated | (age + 1 >= 500)
        fresh = jax.vmap(env.initial)(jax.random.split(reset_key, num_envs))
        step = (obs, action, log_prob, next_obs, terminated, done)
        return (params, jnp.where(done[:, None], fresh, next_obs), (age + 1) * ~done, key), step

    def gae_step(advantage, step):
        delta, done = step
        advantage = delta + 0.99 * 0.95 * ~done * advantage
        return advantage, advantage

    def loss(params, mb):
        obs, action, old_log_prob, advantage, target = mb
        logits = jax.nn.log_softmax(actor.apply(params[0], obs))
        ratio = jnp.exp(jnp.take_along_axis(logits, action[:, None], 1)[:, 0] - old_log_prob)
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
        gain = jnp.minimum(ratio * advantage, ratio.clip(0.8, 1.2) * advantage).mean()
        errors = (critic.apply(params[1], obs)[:, 0] - target) ** 2
        entropy = -(jnp.exp(logits) * logits).sum(-1).mean()
        return -gain + 0.5 * 0.5 * errors.mean() - 0.01 * entropy

    def minibatch_step(state, mb):
        params, opt_state = state
        updates, opt_state = optimizer.update(jax.grad(loss)(params, mb), opt_state)
        return (optax.apply_updates(params, updates), opt_state), None

    def iterate(state, _):
        opt_state, acting = state
        (params, last_obs, age, key), rollout = jax.lax.scan(step_env, acting, None, num_steps)
        obs, action, log_prob, next_obs, terminated, done = rollout
        value = critic.apply(params[1], obs)[..., 0]
        next_value = critic.apply(params[1], next_obs)[..., 0]
        delta = 1.0 + 0.99 * ~terminated * next_value - value
        zeros = jnp.zeros(num_envs)
        _, advantage = jax.lax.scan(gae_step, zeros, (delta, done), reverse=True)
        batch = (obs, action, log_prob, advantage, advantage + value)
        key, *epoch_keys = jax.random.split(key, 5)
        order = jnp.stack([jax.random.permutation(k, batch_size) for k in epoch_keys])
        rows = order.reshape(16, batch_size // 4)
        batch = [x.reshape(batch_size, *x.shape[2:])[rows] for x in batch]
        (params, opt_state), _ = jax.lax.scan(minibatch_step, (params, opt_state), batch)
        return (opt_state, (params, last_obs, age, key)), None

    key = jax.random.key(1)
    obs = jax.vmap(env.initial)(jax.random.split(key, num_envs))
    params = (actor.init(key, obs), critic.init(key, obs))
    state = (optimizer.init(params), (params, obs, jnp.zeros(num_envs, int), key))
    train = jax.jit(lambda state: jax.lax.scan(iterate, state, None, num_updates))
    compiled = train.lower(state).compile()
    print_speed(lambda _: jax.block_until_ready(compiled(state)), steps)


class Watch:
    """Looks at a policy after each iteration, while its clock stands still.

    It ends the process once the mean of 100 greedy episodes has been at least 475 at every look for
    LASTING steps, and prints when that began and when the first such look was.
    """

    def __init__(self) -> None:
        self.paused = 0.0
        self.solved: dict = {}

    def look(self, act, steps: int, start: float) -> None:
        now = time.time()
        look = {"steps": steps, "training, s": now - start - self.paused}
        import ppo  # off the clock

        args = ppo.Args(env_id="CartPole-v1", total_timesteps=50_000, eval_episodes=100)
        if ppo.evaluate(SimpleNamespace(act=act), args) < 475:
            self.solved.pop("for good", None)
        else:
            self.solved.setdefault("first look", look)
            since = self.solved.setdefault("for good", look)
            if steps - since["steps"] >= LASTING:
                print("solved", json.dumps(self.solved), flush=True)
                os._exit(0)
        self.paused += time.time() - now


def solve_ours(path: str, *flags: str) -> None:
    """Looks where learn saves. Its progress bar knows when training began."""
    module, args = load_script(path, ("--save-interval", "1", *flags))
    watch = Watch()

    def save(file, agent, optimizers, global_step):
        progress = sys._getframe(1).f_locals["progress"]
        watch.look(agent.act, global_step, progress.start_t)

    module.save = save
    module.train(args)


def solve_cleanrl(path: str, *flags: str) -> None:
    """CleanRL writes its speed at the end of an iteration. Its globals hold agent and start."""
    import torch
    from torch.utils.tensorboard import SummaryWriter

    watch = Watch()
    add_scalar = SummaryWriter.add_scalar

    def watched_add_scalar(self, tag, value, step):
        add_scalar(self, tag, value, step)
        if tag == "charts/SPS":
            script = sys._getframe(1).f_globals
            actor = script["agent"].actor
            start = script["start_time"]
            watch.look(lambda obs, greedy: actor(torch.tensor(obs)).argmax(-1).numpy(), step, start)

    SummaryWriter.add_scalar = watched_add_scalar
    cleanrl(path, *flags)


if __name__ == "__main__":
    # The clock of every program, because speed.py stops it while others have their turn
    time.time = time.perf_counter = time.process_time
    name, *arguments = sys.argv[1:]
    globals()[name](*arguments)
