"""
Action masks: which actions of a step are legal.

A mask is bool, true for each legal action. Its entries are those of sb3-contrib's ``MaskablePPO``: one for each action of
Discrete, one for each choice of each component of MultiDiscrete, and two for each component of MultiBinary (for 0, for 1).
"""

from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.distributions import (
    BernoulliDistribution,
    CategoricalDistribution,
    Distribution,
    MultiCategoricalDistribution,
)

ILLEGAL_LOGIT = -1e8
"""
Logit of an illegal action, as in sb3-contrib. Its probability is exactly 0 in float32. Minus infinity would be NaN in the
entropy, where it is multiplied by this probability.
"""


def component_sizes(space: spaces.Space[Any]) -> list[int]:
    """
    :param space: Action space: Discrete, MultiDiscrete or MultiBinary.
    :return: Number of mask entries of each action component. Their sum is the size of a mask, M.
    :raises ValueError: for any other space.
    """
    if isinstance(space, spaces.Discrete):
        return [int(space.n)]
    if isinstance(space, spaces.MultiDiscrete):
        return [int(size) for size in space.nvec.flatten()]
    if isinstance(space, spaces.MultiBinary):
        return [2] * int(np.prod(space.shape))
    raise ValueError(
        f"Action masks need Discrete, MultiDiscrete or MultiBinary actions, got {space}; MemoryPPO supports it without masks."
    )


def check_action_masks(masks: Any, rows: int, space: spaces.Space[Any], when: str) -> np.ndarray:
    """
    Require a mask for each row, with a legal choice for each action component.

    :param masks: The masks of B rows, M numbers or bools each, in any shape.
    :param rows: Number of rows B, >= 1.
    :param space: Action space.
    :param when: Time or origin of the masks, for the message.
    :return: Bool, (B, M).
    :raises ValueError: for masks of another size, and for a mask without a legal action, with the index of its environment.
    """
    sizes = component_sizes(space)
    try:
        legal = np.asarray(masks, dtype=bool).reshape(rows, sum(sizes))
    except ValueError:
        given = list(masks) if np.iterable(masks) else [masks]
        shapes = sorted({np.shape(mask) for mask in given})
        raise ValueError(
            f"The action masks {when} must have {sum(sizes)} entries for each of {rows} environments, one for each choice of "
            f"{space}, got {len(given)} of shape {' or '.join(map(str, shapes))}."
        ) from None
    has_legal = np.logical_or.reduceat(legal, np.cumsum([0, *sizes[:-1]]), axis=1)
    if not has_legal.all():
        env, component = np.argwhere(~has_legal)[0].tolist()
        part = f" for component {component} of {space}" if len(sizes) > 1 else ""
        raise ValueError(
            f"The action mask of environment {env} {when} has no legal action{part}: at least one entry must be true. If no "
            "action is left, end the episode."
        )
    return legal


def mask_logits(logits: th.Tensor, action_masks: th.Tensor | None) -> th.Tensor:
    """
    Mask the logits of categorical actions.

    :param logits: (B, n).
    :param action_masks: Bool, (B, n); ``None`` masks nothing.
    :return: The logits, with :data:`ILLEGAL_LOGIT` for illegal actions, (B, n).
    """
    return logits if action_masks is None else th.where(action_masks, logits, ILLEGAL_LOGIT)


def mask_distribution(distribution: Distribution, action_masks: th.Tensor) -> Distribution:
    """
    Mask a distribution: illegal actions get probability 0, and those of the legal ones are normalized to a sum of 1.

    :param distribution: SB3's distribution of Discrete, MultiDiscrete or MultiBinary actions, B rows; it is changed.
    :param action_masks: Bool, (B, M).
    :return: The distribution.
    :raises ValueError: for any other distribution.
    """
    if isinstance(distribution, CategoricalDistribution):
        return distribution.proba_distribution(mask_logits(distribution.distribution.logits, action_masks))
    if isinstance(distribution, MultiCategoricalDistribution):
        logits = th.cat([part.logits for part in distribution.distribution], dim=-1)
        return distribution.proba_distribution(mask_logits(logits, action_masks))
    if isinstance(distribution, BernoulliDistribution):
        zero, one = action_masks.unflatten(-1, (-1, 2)).unbind(-1)
        logits = th.where(one, distribution.distribution.logits, ILLEGAL_LOGIT)
        return distribution.proba_distribution(th.where(zero, logits, -ILLEGAL_LOGIT))
    raise ValueError(f"Action masks need a distribution of discrete actions, got {type(distribution).__name__}.")
