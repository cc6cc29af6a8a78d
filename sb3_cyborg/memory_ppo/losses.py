"""The losses of PPO (Schulman et al. 2017, https://arxiv.org/abs/1707.06347) as pure functions of tensors."""

import math

import torch as th
from stable_baselines3.common.distributions import Distribution
from torch.distributions import Bernoulli, Categorical
from torch.nn import functional as F


def normalize_advantages(advantages: th.Tensor, least_std: float = 0.0) -> th.Tensor:
    """
    Normalize the advantages of a minibatch: ``(A - mean(A)) / (max(std(A), least_std) + 1e-8)``.

    With ``least_std=0`` it equals SB3's normalization.

    :param advantages: A, any shape, at least two elements.
    :param least_std: Lower bound of the standard deviation, >= 0. It prevents the amplification of small advantages.
    :return: The normalized advantages, same shape.
    """
    return (advantages - advantages.mean()) / (advantages.std().clamp(min=least_std) + 1e-8)


def clipped_policy_loss(ratio: th.Tensor, advantages: th.Tensor, clip_range: float) -> th.Tensor:
    """
    Clipped surrogate loss, equation 7 of the paper: ``-mean(min(r A, clip(r, 1 - c, 1 + c) A))``.

    :param ratio: r, new over old probability of the actions, any shape.
    :param advantages: A, same shape.
    :param clip_range: c, > 0.
    :return: The loss, 0-d.
    """
    return -th.min(ratio * advantages, ratio.clamp(1 - clip_range, 1 + clip_range) * advantages).mean()


def value_loss(
    values: th.Tensor, old_values: th.Tensor, returns: th.Tensor, clip_range_vf: float | th.Tensor | None = None
) -> th.Tensor:
    """
    Mean squared error of the values; with ``clip_range_vf``, the maximum of the unclipped and the clipped error.

    ``mean(max((v - R)^2, (v_old + clip(v - v_old, -c, c) - R)^2))``, as in OpenAI's baselines (Engstrom et al. 2020,
    https://arxiv.org/abs/2005.12729). SB3 uses only the clipped error.

    :param values: v, current value estimates, any shape.
    :param old_values: v_old, value estimates during the rollout, same shape.
    :param returns: R, targets, same shape.
    :param clip_range_vf: c, in units of the return, > 0, a number or 0-d or (1,); ``None`` does not clip.
    :return: The loss, 0-d.
    """
    loss = (values - returns) ** 2
    if clip_range_vf is not None:
        clipped = old_values + (values - old_values).clamp(-clip_range_vf, clip_range_vf)  # type: ignore[arg-type]  # numbers and tensors
        loss = th.max(loss, (clipped - returns) ** 2)
    return loss.mean()


def entropy_loss(entropy: th.Tensor | None, log_prob: th.Tensor) -> th.Tensor:
    """
    Negative mean entropy, ``-mean(H)``; if the entropy has no closed form, it is estimated by ``mean(log_prob)``.

    :param entropy: H, in nats, any shape; ``None`` if it has no closed form.
    :param log_prob: Log-probabilities of the actions, any shape.
    :return: The loss, 0-d.
    """
    return log_prob.mean() if entropy is None else -entropy.mean()


def log_barrier_loss(distribution: Distribution) -> th.Tensor:
    """
    Log-barrier regularization: ``mean(KL(uniform || pi))``.

    The divergence is the mean of ``-log pi(a)`` over all actions, minus its value for the uniform policy.
    Its gradient grows as the probability of an action approaches 0, whereas the gradient of the entropy vanishes. Source:
    Agarwal et al. 2021, https://arxiv.org/abs/1908.00261, for tabular policies.

    :param distribution: Distribution of discrete actions. For several action components, their losses are summed.
    :return: The loss, 0-d, >= 0.
    :raises ValueError: for actions that are not discrete.
    """
    parts = distribution.distribution
    total = th.zeros(())
    for part in parts if isinstance(parts, list) else [parts]:
        if isinstance(part, Categorical):
            barrier = -part.logits.mean(-1) - math.log(part.logits.shape[-1])  # `logits` are normalized log-probabilities
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
    Non-negative, low-variance estimate of KL(old || new): ``mean(exp(x) - 1 - x)``.

    Source: Schulman, http://joschu.net/blog/kl-approx.html

    :param log_ratio: x, log of new over old probability of actions of the old policy, any shape.
    :return: The estimate in nats, 0-d.
    """
    return (log_ratio.exp() - 1 - log_ratio).mean()
