"""Each update as its paper writes it: NumPy, SciPy, float64, no autograd, nothing from the scripts.

parameters: a dict of arrays, named "actor.0.weight", "critic.4.bias" and so on.
M is the number of steps, D that of observed features, K that of a network's outputs.
"""

import numpy as np
from scipy.sparse.linalg import cg
from scipy.special import entr, log_softmax, rel_entr, softmax


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


def log_prob(parameters, batch):
    """log pi(a|s), (M,), of actions (M,) or (M, K)."""
    outputs, log_std = policy(parameters, batch.obs)
    if log_std is None:
        return log_softmax(outputs, -1)[np.arange(len(outputs)), batch.actions]
    z = (batch.actions - outputs) / np.exp(log_std)
    return -(z**2 / 2 + np.log(2 * np.pi) / 2 + log_std).sum(-1)


def entropy(parameters, batch):
    """E[-log pi(a|s)], with the mean over actions exact."""
    outputs, log_std = policy(parameters, batch.obs)
    if log_std is None:
        return entr(softmax(outputs, -1)).sum(-1).mean()
    return 0.5 * np.log(2 * np.pi * np.e * np.exp(log_std) ** 2).sum()


def kl(old_parameters, parameters, batch):
    """E[KL(pi_old, pi)] = E[log pi_old(a|s) - log pi(a|s)], with a of pi_old."""
    old, old_log_std = policy(old_parameters, batch.obs)
    new, new_log_std = policy(parameters, batch.obs)
    if old_log_std is None:
        return rel_entr(softmax(old, -1), softmax(new, -1)).sum(-1).mean()
    old_var, new_var = np.exp(2 * old_log_std), np.exp(2 * new_log_std)
    moved = (old_var + (old - new) ** 2) / new_var
    return 0.5 * (moved - 1 + np.log(new_var / old_var)).sum(-1).mean()


def standardize(x):
    return (x - x.mean()) / (np.std(x, ddof=1) + 0.1)


def gae(rewards, values, terminations, truncations, gamma, gae_lambda):
    """Eq. 16 of the paper of GAE, (T, N): sums of TD errors, each up to its episode's end."""
    errors = rewards + gamma * np.where(terminations, 0, values[1:]) - values[:-1]
    advantages = np.zeros_like(errors)
    for t, n in np.ndindex(errors.shape):
        for k in range(t, len(errors)):
            advantages[t, n] += (gamma * gae_lambda) ** (k - t) * errors[k, n]
            if terminations[k, n] or truncations[k, n]:
                break
    return advantages


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
    """Kingma and Ba (2015), algorithm 1, on clipped gradients, of which it keeps the last."""

    def __init__(self, learning_rate, max_grad_norm):
        self.learning_rate, self.max_grad_norm = learning_rate, max_grad_norm
        self.m = self.v = 0.0
        self.t = 0

    def minimize(self, loss, parameters, *rest):
        """The parameters after one step down loss(parameters, *rest)."""
        gradient = derivative(loss, parameters, *rest)
        gradient *= min(1, self.max_grad_norm / np.linalg.norm(gradient))
        self.gradient = gradient
        self.t += 1
        self.m = 0.9 * self.m + 0.1 * gradient
        self.v = 0.999 * self.v + 0.001 * gradient**2
        m_hat, v_hat = self.m / (1 - 0.9**self.t), self.v / (1 - 0.999**self.t)
        step = self.learning_rate * m_hat / (np.sqrt(v_hat) + 1e-5)
        return unflatten(flatten(parameters) - step, parameters)


def fisher(parameters, obs):
    """E[score score^T], (P, P), with the mean over actions exact."""
    outputs, log_std = policy(parameters, obs)
    if log_std is None:
        scores = derivative(lambda p: log_softmax(policy(p, obs)[0], -1), parameters)  # (M, K, P)
        return np.einsum("mk, mkp, mkq -> pq", softmax(outputs, -1), scores, scores) / len(obs)
    means = derivative(lambda p: policy(p, obs)[0] / np.exp(log_std), parameters)  # (M, K, P)
    deviations = derivative(lambda p: p["actor.log_std"], parameters)  # (K, P)
    return np.einsum("mkp, mkq -> pq", means, means) / len(obs) + 2 * deviations.T @ deviations


def trust_region_step(gradient, matrix, target_kl, iterations):
    """The step s along the natural gradient with s F s / 2 = target_kl, (P,)."""
    direction, _ = cg(matrix, gradient, rtol=0, atol=1e-12, maxiter=iterations)
    return direction * np.sqrt(target_kl / (0.5 * direction @ matrix @ direction))
