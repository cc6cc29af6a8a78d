"""The losses of PPO (Schulman et al. 2017, https://arxiv.org/abs/1707.06347) as pure functions of tensors."""

import math

import torch as th
from stable_baselines3.common.distributions import Distribution
from torch.distributions import Bernoulli, Categorical
from torch.nn import functional as F


def normalize_advantages(advantages: th.Tensor, least_std: float = 0.0) -> th.Tensor:
    """
    ``(A - mean(A)) / (max(std(A), least_std) + 1e-8)``, over the minibatch; SB3's with ``least_std=0``.

    :param advantages: Any shape, at least two elements.
    :param least_std: What is smaller than usual stays smaller.
    :return: The same shape.
    """
    return (advantages - advantages.mean()) / (advantages.std().clamp(min=least_std) + 1e-8)


def clipped_policy_loss(ratio: th.Tensor, advantages: th.Tensor, clip_range: float) -> th.Tensor:
    """
    Clipped surrogate objective, equation 7 of the paper: ``-mean(min(r A, clip(r, 1 - c, 1 + c) A))``.

    :param ratio: New over old probability of the actions.
    :param advantages: The same shape.
    :param clip_range: c.
    :return: 0-d tensor.
    """
    return -th.min(ratio * advantages, ratio.clamp(1 - clip_range, 1 + clip_range) * advantages).mean()


def value_loss(values: th.Tensor, old_values: th.Tensor, returns: th.Tensor, clip_range_vf: float | None = None) -> th.Tensor:
    """
    Squared error of the values; with ``clip_range_vf``, the larger of the clipped and the unclipped one.

    ``mean(max((v - R)^2, (v_old + clip(v - v_old, -c, c) - R)^2))``, as in OpenAI's baselines (Engstrom et al. 2020,
    https://arxiv.org/abs/2005.12729). SB3 takes the clipped one alone.

    :param values: Predicted now.
    :param old_values: Predicted while acting, same shape.
    :param returns: Targets, same shape.
    :param clip_range_vf: c, in units of the return; ``None`` does not clip.
    :return: 0-d tensor.
    """
    loss = (values - returns) ** 2
    if clip_range_vf is not None:
        clipped = old_values + (values - old_values).clamp(-clip_range_vf, clip_range_vf)
        loss = th.max(loss, (clipped - returns) ** 2)
    return loss.mean()


def entropy_loss(entropy: th.Tensor | None, log_prob: th.Tensor) -> th.Tensor:
    """
    ``-mean(H)``; where the entropy has no closed form, ``mean(log_prob)`` estimates it.

    :param entropy: Entropies, or ``None``.
    :param log_prob: Log-probabilities of the actions taken.
    :return: 0-d tensor.
    """
    return log_prob.mean() if entropy is None else -entropy.mean()


def log_barrier_loss(distribution: Distribution) -> th.Tensor:
    """
    ``mean(KL(uniform || pi))``: the mean of ``-log pi(a)`` over all actions, less that of a uniform policy.

    It has no bound: the less likely an action, the more it weighs, where the entropy's gradient vanishes with the probability.
    Source: log-barrier regularization, Agarwal et al. 2021, https://arxiv.org/abs/1908.00261, there for tabular policies.

    :param distribution: Of discrete actions; of several at once, their sum counts.
    :return: 0-d tensor, at least 0.
    :raises ValueError: for actions that are not discrete.
    """
    parts = distribution.distribution
    total = th.zeros(())
    for part in parts if isinstance(parts, list) else [parts]:
        if isinstance(part, Categorical):
            barrier = -part.logits.mean(-1) - math.log(part.logits.shape[-1])  # torch keeps them normalized
        elif isinstance(part, Bernoulli):
            barrier = (
                -(F.logsigmoid(part.logits) + F.logsigmoid(-part.logits)).sum(-1) / 2 - math.log(2) * part.logits.shape[-1]
            )
        else:
            raise ValueError(f"`log_barrier_coef` is for discrete actions, got those of {type(part).__name__}.")
        total = total + barrier.mean()
    return total


def approximate_kl(log_ratio: th.Tensor) -> th.Tensor:
    """
    Estimate of KL(old || new) that has low variance and is never negative: ``mean(exp(x) - 1 - x)``.

    :param log_ratio: x, log of new over old probability of actions of the old policy.
    :return: 0-d tensor. Source: Schulman, http://joschu.net/blog/kl-approx.html
    """
    return (log_ratio.exp() - 1 - log_ratio).mean()
