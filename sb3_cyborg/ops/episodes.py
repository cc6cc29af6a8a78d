"""Operations on sequences that contain several episodes."""

import torch as th


def steps_since_start(count: th.Tensor, masks: th.Tensor | None, steps: int) -> th.Tensor:
    """
    Number of steps since the start of the episode, at each step of a sequence.

    :param count: The number at the first step if that is no reset, >= 0, (B,).
    :param masks: Keep-masks, bool, (B, T), or ``None``.
    :param steps: T.
    :return: The numbers, 0 at a reset, (B, T), in the dtype of ``count``.
    """
    time = th.arange(steps, device=count.device)
    running = count.unsqueeze(1) + time
    if masks is None:
        return running
    last_reset = th.where(masks, -1, time).cummax(dim=1).values
    return th.where(last_reset >= 0, (time - last_reset).to(count.dtype), running)


def shift_steps(x: th.Tensor, previous: th.Tensor, masks: th.Tensor | None) -> th.Tensor:
    """
    Shift a sequence by one step, within each episode.

    :param x: Sequence, (B, T, D).
    :param previous: The step before the sequence, (B, D).
    :param masks: Keep-masks, bool, (B, T), or ``None``.
    :return: The previous step of the same episode, (B, T, D); zeros at the first step of an episode.
    """
    shifted = th.cat([previous.unsqueeze(1), x[:, :-1]], dim=1)
    return shifted if masks is None else th.where(masks.unsqueeze(-1), shifted, 0.0)


def zero_expired(entries: th.Tensor, count: th.Tensor, masks: th.Tensor | None) -> th.Tensor:
    """
    Zero the stored entries that a reset within a sequence has erased.

    :param entries: The newest S entries after the sequence, oldest first, (B, S, ...).
    :param count: Steps of the current episode after the sequence, (B,).
    :param masks: Keep-masks of the sequence, bool, (B, T), or ``None``.
    :return: The entries, (B, S, ...); zeros for entries of earlier episodes if the row was reset in the sequence.
    """
    if masks is None:
        return entries
    ages = th.arange(entries.shape[1], 0, -1, device=entries.device)
    kept = (ages <= count.unsqueeze(-1)) | masks.all(dim=1, keepdim=True)
    return th.where(kept.view(*kept.shape, *[1] * (entries.dim() - 2)), entries, 0.0)
