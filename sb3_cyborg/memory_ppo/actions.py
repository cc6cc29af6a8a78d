"""Encoding of actions as an input of the policy, and fast sampling and evaluation of categorical actions."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch as th
from gymnasium import spaces
from stable_baselines3.common.preprocessing import get_action_dim
from torch.distributions import Distribution

from sb3_cyborg.sequence_model import may_branch

DIVERGED = (
    "The logits of the actions are nan: training has diverged, or numbers overflow float32. Try a smaller `learning_rate`, "
    "and normalize observations and rewards."
)
"""Error message for logits, or other parameters of the distribution, that are NaN."""


def action_encoding_dim(space: spaces.Space[Any]) -> int:
    """
    :param space: Action space: Discrete, MultiDiscrete, MultiBinary or Box.
    :return: Number of features of :func:`encode_actions`.
    """
    if isinstance(space, spaces.Discrete):
        return int(space.n)
    if isinstance(space, spaces.MultiDiscrete):
        return int(space.nvec.sum())
    return get_action_dim(space)


def encode_actions(actions: th.Tensor, space: spaces.Space[Any], squashed: bool = False) -> th.Tensor:
    """
    Encode actions as an input of a network.

    :param actions: Actions as sampled, (B, A); A is 1 for Discrete.
    :param space: Action space: Discrete, MultiDiscrete, MultiBinary or Box.
    :param squashed: Whether the actions of a Box are already in [-1, 1].
    :return: float32, (B, D): one-hot for Discrete and MultiDiscrete, 0 or 1 for MultiBinary, scaled and clipped to [-1, 1] for
        Box.
    """
    if isinstance(space, spaces.Discrete):
        return _one_hot(actions.reshape(-1), int(space.n))
    if isinstance(space, spaces.MultiDiscrete):
        sizes = space.nvec.flatten().tolist()
        return th.cat([_one_hot(actions[:, i], int(size)) for i, size in enumerate(sizes)], dim=-1)
    if isinstance(space, spaces.Box) and not squashed:
        low = th.as_tensor(space.low, dtype=th.float32, device=actions.device).flatten()
        high = th.as_tensor(space.high, dtype=th.float32, device=actions.device).flatten()
        width = (high - low).clamp(min=1e-8)  # `low` and `high` of a dimension may be equal
        return (2 * (actions - low) / width - 1).clamp(-1, 1)
    return actions.float()


def _one_hot(numbers: th.Tensor, size: int) -> th.Tensor:
    """:return: One-hot vectors (B, size) of indices (B,); the range check of ``F.one_hot`` would branch on values."""
    return (numbers.unsqueeze(-1) == th.arange(size, device=numbers.device)).float()


@contextmanager
def distribution_checks(device: th.device) -> Iterator[None]:
    """
    A context in which PyTorch's distributions validate their arguments only if code may branch on values.

    :param device: Device of the arguments, see :func:`~sb3_cyborg.sequence_model.may_branch`.
    :raises ValueError: for arguments that are not finite, if they are validated.
    """
    if may_branch(device):
        try:
            yield
        except ValueError as error:
            if "invalid values" in str(error):
                raise ValueError(DIVERGED) from error
            raise
        return
    before = Distribution._validate_args
    Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        Distribution.set_default_validate_args(before)


def sample_categorical(logits: th.Tensor, deterministic: bool) -> tuple[th.Tensor, th.Tensor]:
    """
    Sample categorical actions. The result equals that of SB3's ``CategoricalDistribution``, whose construction would take as
    long as a layer.

    :param logits: (B, n).
    :param deterministic: Return the mode instead of a sample.
    :return: Actions (B,), int64 in [0, n), and their log-probabilities (B,).
    :raises ValueError: for logits that are NaN, if code may branch on values.
    """
    log_probs = logits.log_softmax(-1)
    if may_branch(logits.device) and log_probs.sum().isnan():
        raise ValueError(DIVERGED)
    # The algorithm of `multinomial(1)`, without its check of each probability.
    scores = log_probs if deterministic else log_probs.exp() / th.empty_like(log_probs).exponential_()
    actions = scores.argmax(-1, keepdim=True)
    return actions.squeeze(-1), log_probs.gather(-1, actions).squeeze(-1)


def sample_multi_categorical(logits: th.Tensor, sizes: Sequence[int], deterministic: bool) -> tuple[th.Tensor, th.Tensor]:
    """
    Sample the parts of MultiDiscrete actions, each with :func:`sample_categorical`.

    :param logits: Logits of all parts, (B, sum(sizes)).
    :param sizes: Number of choices of each of the P parts.
    :param deterministic: Return the mode instead of a sample.
    :return: Actions (B, P), int64, and their log-probabilities (B,).
    :raises ValueError: for logits that are NaN, if code may branch on values.
    """
    parts = [sample_categorical(part, deterministic) for part in logits.split(list(sizes), dim=-1)]
    actions, log_probs = zip(*parts, strict=True)
    return th.stack(actions, dim=1), th.stack(log_probs, dim=1).sum(dim=1)


def evaluate_categorical(logits: th.Tensor, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
    """
    Evaluate categorical actions, with the operations of :func:`sample_categorical`.

    :param logits: (B, n).
    :param actions: int64 in [0, n), (B, 1).
    :return: Log-probabilities of the actions and entropies in nats, (B,) each.
    """
    log_probs = logits.log_softmax(-1)
    return log_probs.gather(-1, actions).squeeze(-1), -(log_probs * log_probs.exp()).sum(-1)
