"""Each update as its paper writes it: NumPy, float64, no autograd, nothing from the scripts.

parameters: a dict of arrays, named "actor.0.weight", "critic.4.bias" and so on.
M is the number of steps, D that of observed features, K that of a network's outputs.
"""

import numpy as np


def network(parameters, name, x):
    """Outputs (M, K) of a network with two tanh layers, at inputs (M, D)."""
    for layer in (0, 2, 4):
        x = x @ parameters[f"{name}.{layer}.weight"].T + parameters[f"{name}.{layer}.bias"]
        if layer < 4:
            x = np.tanh(x)
    return x


def policy(parameters, obs):
    """Logits (M, K) and None, or means (M, K) and the logarithms of their deviations (K,)."""
    return network(parameters, "actor", obs), parameters.get("actor.log_std")


def log_softmax(logits):
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def log_prob(parameters, batch):
    """log pi(a|s), (M,), of actions (M,) or (M, K)."""
    outputs, log_std = policy(parameters, batch.obs)
    if log_std is None:
        return log_softmax(outputs)[np.arange(len(outputs)), batch.actions]
    variance = np.exp(2 * log_std)
    density = np.exp(-((batch.actions - outputs) ** 2) / (2 * variance))
    return np.log(density / np.sqrt(2 * np.pi * variance)).sum(-1)


def entropy(parameters, batch):
    """E[-log pi(a|s)], with the mean over actions exact."""
    outputs, log_std = policy(parameters, batch.obs)
    if log_std is None:
        logs = log_softmax(outputs)
        return -(np.exp(logs) * logs).sum(-1).mean()
    return 0.5 * np.log(2 * np.pi * np.e * np.exp(log_std) ** 2).sum()


def kl(old_parameters, parameters, batch):
    """E[KL(pi_old, pi)] = E[log pi_old(a|s) - log pi(a|s)], with a of pi_old."""
    old, old_log_std = policy(old_parameters, batch.obs)
    new, new_log_std = policy(parameters, batch.obs)
    if old_log_std is None:
        old_logs, new_logs = log_softmax(old), log_softmax(new)
        return (np.exp(old_logs) * (old_logs - new_logs)).sum(-1).mean()
    old_var, new_var = np.exp(2 * old_log_std), np.exp(2 * new_log_std)
    moved = (old_var + (old - new) ** 2) / new_var
    return 0.5 * (moved - 1 + np.log(new_var / old_var)).sum(-1).mean()


def standardize(x):
    return (x - x.mean()) / (np.std(x, ddof=1) + 0.1)


def discounted_returns(rewards, gamma):
    """R_t of one episode, (T,): the sum of what follows, gamma times smaller each step."""
    steps = range(len(rewards))
    return np.array([sum(gamma ** (k - t) * rewards[k] for k in steps[t:]) for t in steps])


def gae(rewards, values, terminated, gamma, gae_lambda):
    """Advantages (T,) of what one rollout holds of one episode. values: (T + 1,)."""
    successors = values[1:].copy()
    if terminated:
        successors[-1] = 0
    deltas = np.asarray(rewards) + gamma * successors - values[:-1]
    return discounted_returns(deltas, gamma * gae_lambda)


def scale_observations(obs, seen):
    """Scaled by mean and deviation of all observations seen before, (K, D)."""
    return np.clip((obs - np.mean(seen, 0)) / np.sqrt(np.var(seen, 0) + 1e-8), -10, 10)


def reinforce_loss(parameters, batch, num_episodes):
    """Minus the mean over episodes of sum_t log pi(a_t|s_t) R_t."""
    return -(log_prob(parameters, batch) * batch.returns).sum() / num_episodes


def vpg_loss(parameters, batch, ent_coef=0.0):
    """-E[log pi(a|s) A], and minus the entropy bonus."""
    loss = -np.mean(log_prob(parameters, batch) * standardize(batch.advantages))
    return loss - ent_coef * entropy(parameters, batch)


def value_loss(parameters, batch):
    """Half the mean squared error of V."""
    values = network(parameters, "critic", batch.obs)[:, 0]
    return 0.5 * np.mean((values - batch.returns) ** 2)


def ratios(parameters, batch, old_parameters):
    """r = pi(a|s) / pi_old(a|s), (M,)."""
    return np.exp(log_prob(parameters, batch) - log_prob(old_parameters, batch))


def surrogate(parameters, batch, old_parameters, ent_coef):
    """E[r A] and the entropy bonus, which TRPO maximizes."""
    r = ratios(parameters, batch, old_parameters)
    bonus = ent_coef * entropy(parameters, batch)
    return np.mean(r * standardize(batch.advantages)) + bonus


def clipped_loss(parameters, batch, old_parameters, eps):
    """-E[min(r A, clip(r) A)]. Where A > 0 only r > 1 + eps is clipped, else only r < 1 - eps."""
    r = ratios(parameters, batch, old_parameters)
    r = np.where(batch.advantages > 0, np.minimum(r, 1 + eps), np.maximum(r, 1 - eps))
    return -np.mean(r * batch.advantages)


def ppo_loss(parameters, batch, old_parameters, eps, vf_coef, ent_coef):
    """Minus eq. 9 of the paper of PPO."""
    loss = clipped_loss(parameters, batch, old_parameters, eps)
    return loss + vf_coef * value_loss(parameters, batch) - ent_coef * entropy(parameters, batch)


def approx_kl(r):
    """Schulman's estimator of KL(pi_old, pi) from ratios (M,)."""
    return np.mean((r - 1) - np.log(r))


def explained_variance(batch):
    """1 - Var(R - V) / Var(R), where R - V is the advantage."""
    return 1 - np.var(batch.advantages) / np.var(batch.returns)


def flatten(parameters):
    return np.concatenate([x.ravel() for x in parameters.values()])


def unflatten(vector, like):
    """A vector as parameters of the same names and shapes."""
    parts = np.split(vector, np.cumsum([x.size for x in like.values()])[:-1])
    return {name: part.reshape(like[name].shape) for name, part in zip(like, parts)}


def derivative(function, parameters, *rest):
    """d function(parameters, *rest) / d parameters by central differences, (..., P)."""
    vector, columns = flatten(parameters), []
    for shift in 1e-5 * np.eye(len(vector)):
        sides = [function(unflatten(vector + s, parameters), *rest) for s in (shift, -shift)]
        columns.append((sides[0] - sides[1]) / 2e-5)
    return np.stack(columns, -1)


class Adam:
    """Kingma and Ba (2015), algorithm 1, on clipped gradients, which it keeps."""

    def __init__(self, learning_rate, max_grad_norm):
        self.learning_rate, self.max_grad_norm = learning_rate, max_grad_norm
        self.m = self.v = 0.0
        self.gradients = []

    def minimize(self, loss, parameters, *rest):
        """The parameters after one step down loss(parameters, *rest)."""
        gradient = derivative(loss, parameters, *rest)
        gradient *= min(1, self.max_grad_norm / np.linalg.norm(gradient))
        self.gradients.append(gradient)
        t = len(self.gradients)
        self.m = 0.9 * self.m + 0.1 * gradient
        self.v = 0.999 * self.v + 0.001 * gradient**2
        m_hat, v_hat = self.m / (1 - 0.9**t), self.v / (1 - 0.999**t)
        step = self.learning_rate * m_hat / (np.sqrt(v_hat) + 1e-5)
        return unflatten(flatten(parameters) - step, parameters)


def fisher(parameters, obs):
    """E[score score^T], (P, P), with the mean over actions exact."""
    outputs, log_std = policy(parameters, obs)
    if log_std is None:
        scores = derivative(lambda p: log_softmax(policy(p, obs)[0]), parameters)  # (M, K, P)
        probs = np.exp(log_softmax(outputs))
        return np.einsum("mk, mkp, mkq -> pq", probs, scores, scores) / len(obs)
    means = derivative(lambda p: policy(p, obs)[0], parameters)  # (M, K, P)
    deviations = derivative(lambda p: p["actor.log_std"], parameters)  # (K, P)
    precision = np.exp(-2 * log_std)
    matrix = np.einsum("k, mkp, mkq -> pq", precision, means, means) / len(obs)
    return matrix + 2 * deviations.T @ deviations


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
