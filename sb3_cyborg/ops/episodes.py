"""Sequences that hold more than one episode: how old each step's episode is, and what of the past belongs to it."""

import torch as th


def steps_since_start(count: th.Tensor, masks: th.Tensor | None, steps: int) -> th.Tensor:
    """
    Count the steps of its episode before each step.

    :param count: The same number before the first step, without its reset, (B,).
    :param masks: Keep-masks, bool, (B, T), or ``None``.
    :param steps: T.
    :return: (B, T), in the dtype of ``count``.
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

    :param x: (B, T, D).
    :param previous: The step before the first, (B, D).
    :param masks: Keep-masks, bool, (B, T), or ``None``.
    :return: Each step's predecessor in its episode, (B, T, D); zeros for the first step of an episode.
    """
    shifted = th.cat([previous.unsqueeze(1), x[:, :-1]], dim=1)
    return shifted if masks is None else th.where(masks.unsqueeze(-1), shifted, 0.0)


def zero_expired(entries: th.Tensor, count: th.Tensor, masks: th.Tensor | None) -> th.Tensor:
    """
    Zero the entries of episodes that ended within a sequence.

    :param entries: The newest S entries after a sequence, oldest first, (B, S, ...).
    :param count: Steps since the episode began, (B,).
    :param masks: Keep-masks of the sequence, bool, (B, T), or ``None``.
    :return: The entries, zeros where a reset in the sequence has erased them.
    """
    if masks is None:
        return entries
    ages = th.arange(entries.shape[1], 0, -1, device=entries.device)
    kept = (ages <= count.unsqueeze(-1)) | masks.all(dim=1, keepdim=True)
    return th.where(kept.view(*kept.shape, *[1] * (entries.dim() - 2)), entries, 0.0)
