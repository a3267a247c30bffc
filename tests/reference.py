"""Each update as its paper writes it: NumPy, SciPy, float64, no autograd, nothing from the scripts.

parameters: a dict of arrays, named "actor.0.weight", "critic.4.bias" and so on, of P numbers.
M is the number of steps, D that of observed features, K that of a network's outputs.
"""

import numpy as np
from scipy.special import entr, log_softmax, rel_entr, softmax


def network(parameters, name, x):
    """Outputs (M, K) of a network with two tanh layers, at inputs (M, D)."""
    for layer in (0, 2, 4):
        x = x @ parameters[f"{name}.{layer}.weight"].T + parameters[f"{name}.{layer}.bias"]
        if layer < 4:
            x = np.tanh(x)
    return x


def policy(parameters, batch):
    """Logits (M, K) and None, or means (M, K) and the logarithms of their deviations (K,)."""
    return network(parameters, "actor", batch.obs), parameters.get("actor.log_std")


def log_prob(parameters, batch):
    """log pi(a|s), (M,), of actions (M,) or (M, K)."""
    outputs, log_std = policy(parameters, batch)
    if log_std is None:
        return log_softmax(outputs, -1)[np.arange(len(outputs)), batch.actions]
    z = (batch.actions - outputs) / np.exp(log_std)
    return -(z**2 / 2 + np.log(2 * np.pi) / 2 + log_std).sum(-1)


def entropy(parameters, batch):
    """E[-log pi(a|s)], with the mean over actions exact."""
    outputs, log_std = policy(parameters, batch)
    if log_std is None:
        return entr(softmax(outputs, -1)).sum(-1).mean()
    return 0.5 * np.log(2 * np.pi * np.e * np.exp(log_std) ** 2).sum()


def kl(parameters, batch, old_parameters):
    """E[KL(pi_old, pi)] = E[log pi_old(a|s) - log pi(a|s)], with a of pi_old."""
    old, old_log_std = policy(old_parameters, batch)
    new, log_std = policy(parameters, batch)
    if log_std is None:
        return rel_entr(softmax(old, -1), softmax(new, -1)).sum(-1).mean()
    z2 = (np.exp(2 * old_log_std) + (old - new) ** 2) / np.exp(2 * log_std)  # E[(a - new)^2 / var]
    return (log_std - old_log_std + (z2 - 1) / 2).sum(-1).mean()


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


def score_loss(parameters, batch, weights, ent_coef=0.0):
    """Minus the sum of weights (M,) times log pi(a|s), and minus the entropy bonus."""
    return -weights @ log_prob(parameters, batch) - ent_coef * entropy(parameters, batch)


def value_loss(parameters, batch):
    """Half the mean squared error of V."""
    return 0.5 * np.mean((network(parameters, "critic", batch.obs)[:, 0] - batch.returns) ** 2)


def ratios(parameters, batch, old_parameters):
    """r = pi(a|s) / pi_old(a|s), (M,)."""
    return np.exp(log_prob(parameters, batch) - log_prob(old_parameters, batch))


def surrogate_loss(parameters, batch, old_parameters, ent_coef=0.0, eps=np.inf):
    """-E[min(r A, clip(r) A)], and minus the entropy bonus."""
    r = ratios(parameters, batch, old_parameters)
    # Where A > 0 only r > 1 + eps is clipped, else only r < 1 - eps.
    r = np.where(batch.advantages > 0, np.minimum(r, 1 + eps), np.maximum(r, 1 - eps))
    return -np.mean(r * batch.advantages) - ent_coef * entropy(parameters, batch)


def ppo_loss(parameters, batch, old_parameters, ent_coef, eps, vf_coef):
    """Minus eq. 9 of the paper of PPO."""
    loss = surrogate_loss(parameters, batch, old_parameters, ent_coef, eps)
    return loss + vf_coef * value_loss(parameters, batch)


def moved(parameters, step):
    """The parameters after a step (P,)."""
    parts = np.split(step, np.cumsum([x.size for x in parameters.values()])[:-1])
    return {name: x + part.reshape(x.shape) for (name, x), part in zip(parameters.items(), parts)}


def derivative(function, parameters, *rest):
    """d function(parameters, *rest) / d parameters by central differences, (P, ...)."""
    steps = 1e-5 * np.eye(sum(x.size for x in parameters.values()))
    sides = [[function(moved(parameters, s), *rest) for s in (step, -step)] for step in steps]
    return np.array([right - left for right, left in sides]) / 2e-5


class Adam:
    """Kingma and Ba (2015), algorithm 1, on clipped gradients, which it keeps."""

    def __init__(self, learning_rate, max_grad_norm):
        self.learning_rate, self.max_grad_norm, self.gradients = learning_rate, max_grad_norm, []

    def minimize(self, loss, parameters, *rest):
        """The parameters after one step down loss(parameters, *rest)."""
        gradient = derivative(loss, parameters, *rest)
        self.gradients.append(gradient * min(1, self.max_grad_norm / np.linalg.norm(gradient)))
        # Divided by 1 - beta^t, the moments are averages with weights that fall by beta a step.
        ages = np.arange(len(self.gradients))[::-1]
        m_hat = np.average(self.gradients, 0, 0.9**ages)
        v_hat = np.average(np.square(self.gradients), 0, 0.999**ages)
        return moved(parameters, -self.learning_rate * m_hat / (np.sqrt(v_hat) + 1e-5))
