"""
The recurrence of slots that are written by convex combination, for all steps at once.

``M_t[s] = (1 - a_t[s]) M_{t-1}[s] + a_t[s] w_t`` is linear in M: it is gated linear attention (Yang et al. 2023,
https://arxiv.org/abs/2312.06635) whose keys are the write strengths and whose queries are the read weights. Within a
chunk the decay between any two steps is built from the difference of sums of logarithms, never from a quotient of
products, so that it cannot overflow; between chunks the slots are carried.
"""

import torch as th
from torch.nn import functional as F

from sb3_cyborg.ops.window_attention import finite

CHUNK = 16
"""Steps that are handled at once; the work within a chunk grows with its square, the number of loop turns falls."""


def slot_scan_reference(
    read: th.Tensor, write: th.Tensor, items: th.Tensor, slots: th.Tensor, masks: th.Tensor | None
) -> tuple[th.Tensor, th.Tensor]:
    """One step after the other; arguments and results as in :func:`slot_scan`."""
    outputs = []
    for t in range(read.shape[1]):
        if masks is not None:
            slots = th.where(masks[:, t, None, None, None] > 0.5, slots, 0.0)
        outputs.append(th.einsum("bhs,bhsd->bhd", read[:, t], slots))
        a = write[:, t].unsqueeze(-1)
        slots = (1 - a) * slots + a * items[:, t].unsqueeze(2)
    return th.stack(outputs, dim=1), slots


def slot_scan(
    read: th.Tensor, write: th.Tensor, items: th.Tensor, slots: th.Tensor, masks: th.Tensor | None, chunk: int = CHUNK
) -> tuple[th.Tensor, th.Tensor]:
    """
    Read the slots, then write them, at every step.

    :param read: Read weights, (B, T, H, S).
    :param write: Write strengths in [0, 1), (B, T, H, S).
    :param items: What is written, (B, T, H, d).
    :param slots: The slots before the first step, (B, H, S, d).
    :param masks: Keep-masks, (B, T), or ``None``; a reset empties the slots (zeros) before the step reads.
    :param chunk: Steps in a chunk.
    :return: What was read, (B, T, H, d), and the slots after the last step.
    """
    batch_size, steps, heads, num_slots = read.shape
    chunk = min(chunk, steps)
    padding = -steps % chunk
    count = (steps + padding) // chunk

    def split(tensor: th.Tensor) -> th.Tensor:
        """(B, T, H, n) to chunks first: (chunks, B, H, C, n); padded steps read, write and reset nothing."""
        tensor = F.pad(tensor, (0, 0, 0, 0, 0, padding))
        return tensor.view(batch_size, count, chunk, heads, tensor.shape[-1]).permute(1, 0, 3, 2, 4)

    resets = th.zeros_like(read[:, :, 0, 0], dtype=th.int64) if masks is None else (masks <= 0.5).long()
    segments = F.pad(resets, (0, padding)).view(batch_size, count, chunk).transpose(0, 1).cumsum(-1)[:, :, None]
    # What is not finite in an episode that is over must not reach the sums; in one that goes on, it shows in `read`.
    reads, writes, values = split(read), split(th.nan_to_num(write)), split(finite(items))
    keeps = th.log1p(-writes.double()).cumsum(dim=-2)  # up to and with each step; fp64: the differences are small
    before = F.pad(keeps, (0, 0, 1, 0))[..., :-1, :]

    within = _within_chunks(reads, writes, values, keeps, before, segments)
    # What a chunk adds to the slots, and by how much it fades those that it found.
    same_as_last = segments == segments[..., -1:]
    to_end = th.exp(th.where(same_as_last.unsqueeze(-1), keeps[..., -1:, :] - keeps, float("-inf"))).to(read.dtype)
    added = (writes * to_end).transpose(-1, -2) @ values  # (chunks, B, H, S, d)
    untouched = (segments == 0).unsqueeze(-1)  # no reset since the chunk began
    fade = th.exp(th.where(untouched, before, float("-inf"))).to(read.dtype)
    fade_all = th.exp(th.where(untouched[..., -1:, :], keeps[..., -1:, :], float("-inf"))).to(read.dtype)
    gone = ~untouched[..., -1:, :]

    outputs = []
    for index in range(count):
        carried = th.where(untouched[index], reads[index] * fade[index], 0.0) @ finite(slots)
        outputs.append(within[index] + carried)
        slots = th.where(gone[index], 0.0, fade_all[index].transpose(-1, -2) * slots) + added[index]
    out = th.stack(outputs)  # (chunks, B, H, C, d)
    return out.permute(1, 0, 3, 2, 4).reshape(batch_size, count * chunk, heads, -1)[:, :steps], slots


def _within_chunks(
    reads: th.Tensor, writes: th.Tensor, values: th.Tensor, keeps: th.Tensor, before: th.Tensor, segments: th.Tensor
) -> th.Tensor:
    """What each step reads of the writes of earlier steps of its chunk and episode, (chunks, B, H, C, d)."""
    chunk = reads.shape[-2]
    earlier = th.ones(chunk, chunk, dtype=th.bool, device=reads.device).tril(-1)
    seen = earlier & (segments.unsqueeze(-1) == segments.unsqueeze(-2))  # (chunks, B, 1, C, C)
    exponent = (before.unsqueeze(-2) - keeps.unsqueeze(-3)).to(reads.dtype)  # (chunks, B, H, C, C, S)
    decay = th.exp(th.where(seen.unsqueeze(-1), exponent, float("-inf")))
    weights = th.einsum("nbhts,nbhjs,nbhtjs->nbhtj", reads, writes, decay)
    return th.where(seen, weights, 0.0) @ values


