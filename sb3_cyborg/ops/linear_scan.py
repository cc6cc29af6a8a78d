"""
The recurrence of slots that are written by convex combination, for all steps at once.

``M_t[s] = (1 - a_t[s]) M_{t-1}[s] + a_t[s] w_t`` is linear in M: it is gated linear attention (Yang et al. 2023,
https://arxiv.org/abs/2312.06635) whose keys are the write strengths and whose queries are the read weights. Within a
chunk, what is left at step t of a write at step j is ``exp(c_t - c_j)`` with c the running sum of log(1 - a); as a
product of a factor of t and one of j it is a matmul. Between chunks the slots are carried.
"""

import torch as th
from torch.nn import functional as F

from sb3_cyborg.ops.window_attention import finite

CHUNK = 8
"""Steps that are handled at once."""
MAX_WRITE = 1 - 1e-3
"""Strongest write: over a chunk, exp(-c) stays below 1e24, far from overflow in fp32 and bf16."""


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
    :param write: Write strengths in [0, MAX_WRITE], (B, T, H, S).
    :param items: What is written, (B, T, H, d).
    :param slots: The slots before the first step, (B, H, S, d).
    :param masks: Keep-masks, (B, T), or ``None``; a reset empties the slots (zeros) before the step reads.
    :param chunk: Steps in a chunk, at most ``CHUNK``.
    :return: What was read, (B, T, H, d), and the slots after the last step.
    """
    batch_size, steps, heads, _ = read.shape
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
    kept = th.log1p(-writes.double()).cumsum(dim=-2)  # log of what is left after each step of what the chunk began with
    before = F.pad(kept, (0, 0, 1, 0))[..., :-1, :]  # the same before each step
    queries = reads * before.exp().to(read.dtype)
    keys = writes * (-kept).exp().to(read.dtype)
    left = kept[..., -1:, :].exp().to(read.dtype)  # (chunks, B, H, 1, S)

    chunk_steps = th.arange(chunk, device=read.device)
    earlier = chunk_steps.unsqueeze(-1) > chunk_steps
    seen = earlier & (segments.unsqueeze(-1) == segments.unsqueeze(-2))  # of one episode: (chunks, B, 1, C, C)
    within = th.where(seen, queries @ keys.transpose(-1, -2), 0.0) @ values
    in_last = (segments == segments[..., -1:]).unsqueeze(-1)  # of the episode that the chunk ends in
    added = th.where(in_last, keys * left, 0.0).transpose(-1, -2) @ values  # (chunks, B, H, S, d)
    untouched = (segments == 0).unsqueeze(-1)  # no reset since the chunk began
    queries, fades, carries = th.where(untouched, queries, 0.0), left.transpose(-1, -2), untouched[..., -1:, :]

    outputs = []
    # Unbound, not indexed: the backward pass of each index would fill and add a gradient of all chunks.
    for own, query, fade, carry, new in zip(
        *(part.unbind() for part in (within, queries, fades, carries, added)), strict=True
    ):
        outputs.append(own + query @ finite(slots))
        slots = th.where(carry, fade * slots, 0.0) + new
    out = th.stack(outputs)  # (chunks, B, H, C, d)
    return out.permute(1, 0, 3, 2, 4).reshape(batch_size, count * chunk, heads, -1)[:, :steps], slots
