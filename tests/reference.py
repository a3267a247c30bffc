"""Each update as its paper writes it: NumPy, float64, no autograd, nothing from the scripts.

parameters: a dict of arrays, named "actor.0.weight", "critic.4.bias" and so on.
M is the number of steps, D that of observed features, K that of a network's outputs.
"""

from typing import NamedTuple

import numpy as np


class Policy(NamedTuple):
    """pi(a|s) at M observations."""

    outputs: np.ndarray  # (M, K): logits, or means if there is a log_std
    log_std: np.ndarray | None  # (K,)


def network(parameters, name, x):
    """Outputs (M, K) of a network with two tanh layers, at inputs (M, D)."""
    for layer in (0, 2, 4):
        x = x @ parameters[f"{name}.{layer}.weight"].T + parameters[f"{name}.{layer}.bias"]
        if layer < 4:
            x = np.tanh(x)
    return x


def policy_at(parameters, obs):
    return Policy(network(parameters, "actor", obs), parameters.get("actor.log_std"))


def values_at(parameters, obs):
    """V(s), (M,)."""
    return network(parameters, "critic", obs)[:, 0]


def log_softmax(logits):
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def log_prob(policy, actions):
    """log pi(a|s), (M,), of actions (M,) or (M, K)."""
    if policy.log_std is None:
        return log_softmax(policy.outputs)[np.arange(len(actions)), actions]
    variance = np.exp(2 * policy.log_std)
    density = np.exp(-((actions - policy.outputs) ** 2) / (2 * variance))
    return np.log(density / np.sqrt(2 * np.pi * variance)).sum(-1)


def entropy(policy):
    """-E[log pi(a|s)], (M,)."""
    if policy.log_std is None:
        logs = log_softmax(policy.outputs)
        return -(np.exp(logs) * logs).sum(-1)
    each = 0.5 * np.log(2 * np.pi * np.e * np.exp(policy.log_std) ** 2)
    return np.full(len(policy.outputs), each.sum())


def kl(old, new):
    """KL(old, new) = E_old[log old - log new], (M,)."""
    if old.log_std is None:
        old_logs, new_logs = log_softmax(old.outputs), log_softmax(new.outputs)
        return (np.exp(old_logs) * (old_logs - new_logs)).sum(-1)
    old_var, new_var = np.exp(2 * old.log_std), np.exp(2 * new.log_std)
    moved = (old_var + (old.outputs - new.outputs) ** 2) / new_var
    return 0.5 * (moved - 1 + np.log(new_var / old_var)).sum(-1)


def standardize(x):
    return (x - x.mean()) / np.std(x, ddof=1)


def discounted_returns(rewards, gamma):
    """R_t of one episode, (T,): the sum of what follows, gamma times smaller each step."""
    steps = range(len(rewards))
    return np.array([sum(gamma ** (k - t) * rewards[k] for k in steps[t:]) for t in steps])


def gae(rewards, values, terminated, gamma, gae_lambda):
    """Advantages (T,) of what one rollout holds of one episode. values: (T + 1,)."""
    successors = values[1:].copy()
    if terminated:
        successors[-1] = 0
    return discounted_returns(
        np.asarray(rewards) + gamma * successors - values[:-1], gamma * gae_lambda
    )


def scale_observations(obs, seen):
    """Scaled by mean and deviation of all observations seen before, (K, D)."""
    return np.clip((obs - np.mean(seen, 0)) / np.sqrt(np.var(seen, 0) + 1e-8), -10, 10)


def reinforce_loss(parameters, batch, num_episodes):
    """Minus the mean over episodes of sum_t log pi(a_t|s_t) R_t."""
    logs = log_prob(policy_at(parameters, batch.obs), batch.actions)
    return -(logs * batch.returns).sum() / num_episodes


def vpg_loss(parameters, batch):
    """-E[log pi(a|s) A]."""
    advantages = standardize(batch.advantages)
    return -np.mean(log_prob(policy_at(parameters, batch.obs), batch.actions) * advantages)


def value_loss(parameters, batch):
    """Half the mean squared error of V."""
    return 0.5 * np.mean((values_at(parameters, batch.obs) - batch.returns) ** 2)


def ratios(parameters, batch, old_parameters):
    """r = pi(a|s) / pi_old(a|s), (M,)."""
    old = log_prob(policy_at(old_parameters, batch.obs), batch.actions)
    return np.exp(log_prob(policy_at(parameters, batch.obs), batch.actions) - old)


def surrogate(parameters, batch, old_parameters):
    """E[r A], which TRPO maximizes."""
    advantages = standardize(batch.advantages)
    return np.mean(ratios(parameters, batch, old_parameters) * advantages)


def clipped_loss(parameters, batch, old_parameters, eps):
    """-E[min(r A, clip(r) A)]. Where A > 0 only r > 1 + eps is clipped, else only r < 1 - eps."""
    r = ratios(parameters, batch, old_parameters)
    r = np.where(batch.advantages > 0, np.minimum(r, 1 + eps), np.maximum(r, 1 - eps))
    return -np.mean(r * batch.advantages)


def approx_kl(r):
    """Schulman's estimator of KL(pi_old, pi) from ratios (M,)."""
    return np.mean((r - 1) - np.log(r))


def clip_fraction(r, eps):
    return np.mean(np.abs(r - 1) > eps)


def explained_variance(values, returns):
    return 1 - np.var(returns - values) / np.var(returns)


def flatten(parameters):
    return np.concatenate([x.ravel() for x in parameters.values()])


def unflatten(vector, like):
    """A vector as parameters of the same names and shapes."""
    parts = np.split(vector, np.cumsum([x.size for x in like.values()])[:-1])
    return {name: part.reshape(like[name].shape) for name, part in zip(like, parts)}


def derivative(function, parameters):
    """d function / d parameters by central differences, (..., P)."""
    vector, columns = flatten(parameters), []
    for shift in 1e-5 * np.eye(len(vector)):
        sides = [function(unflatten(vector + sign * shift, parameters)) for sign in (1, -1)]
        columns.append((sides[0] - sides[1]) / 2e-5)
    return np.stack(columns, -1)


def clip_norm(gradient, max_norm):
    return gradient * min(1, max_norm / np.linalg.norm(gradient))


class Adam:
    """Kingma and Ba (2015), algorithm 1, on clipped gradients, which it keeps."""

    def __init__(self, learning_rate, max_grad_norm):
        self.learning_rate, self.max_grad_norm = learning_rate, max_grad_norm
        self.m = self.v = 0.0
        self.gradients = []

    def minimize(self, loss, parameters):
        """The parameters after one step down the loss."""
        gradient = clip_norm(derivative(loss, parameters), self.max_grad_norm)
        self.gradients.append(gradient)
        t = len(self.gradients)
        self.m = 0.9 * self.m + 0.1 * gradient
        self.v = 0.999 * self.v + 0.001 * gradient**2
        m_hat, v_hat = self.m / (1 - 0.9**t), self.v / (1 - 0.999**t)
        step = self.learning_rate * m_hat / (np.sqrt(v_hat) + 1e-5)
        return unflatten(flatten(parameters) - step, parameters)


def fisher(parameters, obs):
    """E[score score^T], (P, P), with the mean over actions exact."""
    policy = policy_at(parameters, obs)
    jacobians = derivative(lambda p: policy_at(p, obs).outputs, parameters)  # (M, K, P)
    matrix = 0
    for outputs, jacobian in zip(policy.outputs, jacobians):
        if policy.log_std is None:
            probs = np.exp(log_softmax(outputs))
            information = np.diag(probs) - np.outer(probs, probs)
        else:
            information = np.diag(np.exp(-2 * policy.log_std))
        matrix = matrix + jacobian.T @ information @ jacobian / len(obs)
    if policy.log_std is not None:
        deviations = derivative(lambda p: p["actor.log_std"], parameters)  # (K, P)
        matrix = matrix + 2 * deviations.T @ deviations
    return matrix


def conjugate_gradient(matrix, b, iterations):
    """Hestenes and Stiefel (1952). Each direction is conjugate to all before it."""
    x, directions = np.zeros_like(b), []
    for _ in range(min(iterations, len(b))):
        residual = b - matrix @ x
        direction = residual.copy()
        for d in directions:
            direction -= (d @ matrix @ residual) / (d @ matrix @ d) * d
        x = x + (direction @ residual) / (direction @ matrix @ direction) * direction
        directions.append(direction)
    return x


def trust_region_step(gradient, matrix, target_kl, iterations):
    """The step s along the natural gradient with s F s / 2 = target_kl, (P,)."""
    direction = conjugate_gradient(matrix, gradient, iterations)
    return direction * np.sqrt(target_kl / (0.5 * direction @ matrix @ direction))
