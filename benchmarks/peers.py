"""The libraries that speed.py compares with, on CartPole-v1: the same settings in their terms.

    python -m uv run --extra peers benchmarks/peers.py NAME STEPS

Trains with one of the functions below and prints the steps a second of its training loop.
"""

import sys
import time
from collections.abc import Callable
from typing import Any


def timed(train: Callable[[int], Any], steps: int) -> None:
    start = time.perf_counter()
    train(steps)
    print("SPS:", steps / (time.perf_counter() - start))


def sb3_ppo(steps: int) -> None:
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_vec_env

    settings: dict = {"learning_rate": lambda left: 2.5e-4 * left, "gae_lambda": 0.95}
    settings |= {"ent_coef": 0.01, "vf_coef": 0.25, "clip_range_vf": 0.2, "device": "cpu"}
    envs = make_vec_env("CartPole-v1", 4)
    timed(PPO("MlpPolicy", envs, n_steps=128, batch_size=128, n_epochs=4, **settings).learn, steps)


def sb3_trpo(steps: int) -> None:
    from sb3_contrib import TRPO
    from stable_baselines3.common.env_util import make_vec_env

    envs = make_vec_env("CartPole-v1", 4)
    timed(TRPO("MlpPolicy", envs, n_steps=128, batch_size=512, device="cpu").learn, steps)


def rlox_ppo(steps: int, env_id: str = "gymnasium:CartPole-v1") -> None:
    from rlox.algorithms.ppo import PPO

    settings = {"clip_vloss": True, "anneal_lr": True, "learning_rate": 2.5e-4}
    timed(PPO(env_id, n_envs=4, n_steps=128, batch_size=128, n_epochs=4, **settings).train, steps)


def rlox_vpg(steps: int, env_id: str = "gymnasium:CartPole-v1") -> None:
    from rlox.algorithms.vpg import VPG

    rates = {"learning_rate": 5e-3, "vf_lr": 2e-2}
    timed(VPG(env_id, n_envs=8, n_steps=128, vf_epochs=10, gae_lambda=0.97, **rates).train, steps)


def rlox_ppo_rust(steps: int) -> None:
    rlox_ppo(steps, "CartPole-v1")  # under this name it takes its own environment, in Rust


def rlox_vpg_rust(steps: int) -> None:
    rlox_vpg(steps, "CartPole-v1")


def torchrl_ppo(steps: int) -> None:
    import gymnasium as gym
    import torch
    from tensordict.nn import TensorDictModule
    from torchrl.collectors import Collector
    from torchrl.envs import GymWrapper
    from torchrl.modules import MLP, ProbabilisticActor, ValueOperator
    from torchrl.objectives import ClipPPOLoss
    from torchrl.objectives.value import GAE

    mode = {"autoreset_mode": gym.vector.AutoresetMode.DISABLED}  # the one TorchRL prefers
    envs = gym.make_vec("CartPole-v1", 4, "sync", vector_kwargs=mode)
    envs = GymWrapper(envs, categorical_action_encoding=True)
    nets = [MLP(4, size, num_cells=[64, 64], activation_class=torch.nn.Tanh) for size in (2, 1)]
    actor = ProbabilisticActor(
        TensorDictModule(nets[0], in_keys=["observation"], out_keys=["logits"]),
        in_keys=["logits"],
        spec=envs.action_spec,
        distribution_class=torch.distributions.Categorical,
        return_log_prob=True,
    )
    critic = ValueOperator(nets[1], in_keys=["observation"])
    add_advantages = GAE(gamma=0.99, lmbda=0.95, value_network=critic)
    losses = ClipPPOLoss(
        actor,
        critic,
        entropy_coeff=0.01,
        critic_coeff=0.25,  # of the mean square, without 1/2
        loss_critic_type="l2",
        clip_value=True,
        normalize_advantage=True,
    )
    optimizer = torch.optim.Adam(losses.parameters(), eps=1e-5)

    def train(steps: int) -> None:
        options = {"frames_per_batch": 512, "total_frames": steps}
        collector = Collector(envs, actor, **options, auto_register_policy_transforms=False)
        for number, batch in enumerate(collector):
            optimizer.param_groups[0]["lr"] = 2.5e-4 * (1 - 512 * number / steps)
            with torch.no_grad():
                batch = add_advantages(batch).reshape(-1)
            for _ in range(4):
                for rows in torch.randperm(512).split(128):
                    parts = losses(batch[rows])
                    optimizer.zero_grad()
                    sum(
                        parts[f"loss_{name}"] for name in ("objective", "critic", "entropy")
                    ).backward()
                    torch.nn.utils.clip_grad_norm_(losses.parameters(), 0.5)
                    optimizer.step()

    timed(train, steps)


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    globals()[sys.argv[1]](int(sys.argv[2]))
