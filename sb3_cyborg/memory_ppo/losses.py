"""The losses of PPO (Schulman et al. 2017, https://arxiv.org/abs/1707.06347) as pure functions of tensors."""

import math
from collections.abc import Sequence
from typing import Any

import torch as th
from stable_baselines3.common.distributions import Distribution
from torch.distributions import Bernoulli, Categorical
from torch.nn import functional as F


def normalize_advantages(
    advantages: th.Tensor, least_std: float = 0.0, mean: th.Tensor | None = None, std: th.Tensor | None = None
) -> th.Tensor:
    """
    Normalize the advantages of a minibatch: ``(A - mean(A)) / (max(std(A), least_std) + 1e-8)``.

    With ``least_std=0`` it equals SB3's normalization.

    :param advantages: A, any shape, at least two elements.
    :param least_std: Lower bound of the standard deviation, >= 0. It prevents the amplification of small advantages.
    :param mean: ``mean(A)``, 0-d, if ``advantages`` are a part of the minibatch; ``None`` computes it.
    :param std: ``std(A)``, in the same way.
    :return: The normalized advantages, same shape.
    """
    mean = advantages.mean() if mean is None else mean
    std = advantages.std() if std is None else std
    return (advantages - mean) / (std.clamp(min=least_std) + 1e-8)


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


def log_barrier_loss(distribution: Distribution, action_masks: th.Tensor | None = None) -> th.Tensor:
    """
    Log-barrier regularization: ``mean(KL(uniform || pi))``, where the uniform policy is that over the legal actions.

    The divergence is the mean of ``-log pi(a)`` over all legal actions, minus its value for the uniform policy.
    Its gradient grows as the probability of an action approaches 0, whereas the gradient of the entropy vanishes. Source:
    Agarwal et al. 2021, https://arxiv.org/abs/1908.00261, for tabular policies.

    :param distribution: Distribution of discrete actions, B rows. For several action components, their losses are summed.
    :param action_masks: Legal actions, bool, (B, M), see :mod:`~sb3_cyborg.memory_ppo.action_masks`; ``None`` if all are.
    :return: The loss, 0-d, >= 0.
    :raises ValueError: for actions that are not discrete.
    """
    components = [log_probs for part in _parts(distribution) for log_probs in _log_probs(part)]
    masks = [None] * len(components) if action_masks is None else action_masks.split([c.shape[-1] for c in components], dim=-1)
    total = th.zeros(())
    for log_probs, legal in zip(components, masks, strict=True):
        total = total + _barrier(log_probs, legal).mean()
    return total


def _parts(distribution: Distribution) -> list[th.distributions.Distribution]:
    """:return: PyTorch's distributions of the action components; MultiBinary has one for all."""
    parts: Any = distribution.distribution
    return parts if isinstance(parts, list) else [parts]


def _log_probs(part: th.distributions.Distribution) -> Sequence[th.Tensor]:
    """:return: The log-probabilities of all choices of each action component, (B, n) each."""
    if isinstance(part, Categorical):
        return [part.logits]  # normalized log-probabilities
    if isinstance(part, Bernoulli):
        return th.stack([F.logsigmoid(-part.logits), F.logsigmoid(part.logits)], dim=-1).unbind(-2)
    raise ValueError(f"`log_barrier_coef` is for discrete actions, got those of {type(part).__name__}.")


def _barrier(log_probs: th.Tensor, legal: th.Tensor | None) -> th.Tensor:
    """:return: The divergence of each row, (B,), for log-probabilities (B, n) and legal actions, bool, (B, n)."""
    if legal is None:
        return -log_probs.mean(-1) - math.log(log_probs.shape[-1])
    count = legal.sum(-1)
    return -th.where(legal, log_probs, 0.0).sum(-1) / count - count.log()


def approximate_kl(log_ratio: th.Tensor) -> th.Tensor:
    """
    Non-negative, low-variance estimate of KL(old || new): ``mean(exp(x) - 1 - x)``.

    Source: Schulman, http://joschu.net/blog/kl-approx.html

    :param log_ratio: x, log of new over old probability of actions of the old policy, any shape.
    :return: The estimate in nats, 0-d.
    """
    return (log_ratio.exp() - 1 - log_ratio).mean()
