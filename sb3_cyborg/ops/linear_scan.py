"""
Chunked linear recurrence of slots that are written by convex combination.

``M_t[s] = (1 - a_t[s]) M_{t-1}[s] + a_t[s] w_t`` is linear in M. It is gated linear attention (Yang et al. 2023,
https://arxiv.org/abs/2312.06635) with the write strengths as keys and the read weights as queries. Within a chunk, the share
of a write at step j that remains at step t is ``p_t / p_j``, where p is the cumulative product of 1 - a. It is a product of a
factor of t and a factor of j, so all steps of a chunk are one matmul. Between chunks the slots are carried.
"""

from collections.abc import Callable
from typing import Any

import torch as th
from torch.autograd.function import once_differentiable

from sb3_cyborg.ops.masking import finite

CHUNK = 64
"""Steps in a chunk."""
MAX_WRITE = 1 - 1e-3
"""Largest write strength: over a chunk, 1 / p stays below 1e192, so that p does not overflow in fp64."""


def slot_scan_reference(
    read: th.Tensor, write: th.Tensor, items: th.Tensor, slots: th.Tensor, masks: th.Tensor | None
) -> tuple[th.Tensor, th.Tensor]:
    """Step-by-step reference; parameters and results are those of :func:`slot_scan`."""
    outputs = []
    for t in range(read.shape[1]):
        if masks is not None:
            slots = th.where(masks[:, t, None, None, None], slots, 0.0)
        outputs.append(th.einsum("bhs,bhsd->bhd", read[:, t], slots))
        a = write[:, t].unsqueeze(-1)
        slots = (1 - a) * slots + a * items[:, t].unsqueeze(2)
    return th.stack(outputs, dim=1), slots


def slot_scan(
    read: th.Tensor, write: th.Tensor, items: th.Tensor, slots: th.Tensor, masks: th.Tensor | None, chunk: int = CHUNK
) -> tuple[th.Tensor, th.Tensor]:
    """
    Read the slots, then write them, at every step; once differentiable.

    :param read: Read weights, (B, T, H, S).
    :param write: Write strengths in [0, MAX_WRITE], (B, T, H, S).
    :param items: Vectors to write, (B, T, H, d).
    :param slots: Slots before the first step, (B, H, S, d).
    :param masks: Keep-masks, bool, (B, T), or ``None``; a reset sets the slots to zeros before the step reads.
    :param chunk: Steps in a chunk, from 1 to ``CHUNK``.
    :return: Reads (B, T, H, d), and the slots after the last step (B, H, S, d).
    """
    resets = th.zeros_like(read[:, :, 0, 0], dtype=th.bool) if masks is None else ~masks
    outputs = []
    for part in zip(*(tensor.split(chunk, dim=1) for tensor in (read, write, items, resets)), strict=True):
        output, slots = _slot_chunk(*part, slots)
        outputs.append(output)
    return th.cat(outputs, dim=1), slots


class _SlotChunk(th.autograd.Function):
    """One chunk as one autograd node. Everything that p scales is in fp64, the rest in the dtype of the slots."""

    @staticmethod
    def forward(
        ctx: Any, read: th.Tensor, write: th.Tensor, items: th.Tensor, resets: th.Tensor, slots: th.Tensor
    ) -> tuple[th.Tensor, th.Tensor]:
        segments = resets.cumsum(1)  # (B, C)
        seen = (segments.unsqueeze(2) == segments.unsqueeze(1)).tril(-1).unsqueeze(1).double()  # earlier, same episode
        untouched = (segments == 0)[:, None, :, None].double()  # no reset since the start of the chunk
        in_last = (segments == segments[:, -1:])[:, None, :, None].double()  # in the episode at the end of the chunk
        # Non-finite values of an earlier episode must not enter the sums; those of the current one remain in `read`.
        write, values, held = _by_head(finite(write)), finite(items).transpose(1, 2).contiguous(), finite(slots)
        left = (1 - write).cumprod(dim=2)  # p: share of the chunk's first slots that remains after each step, (B, H, C, S)
        before = th.cat([th.ones_like(left[:, :, :1]), left[:, :, :-1]], dim=2)
        queries, keys = _by_head(read).mul_(before), write / left
        weights = (queries @ keys.mT).mul_(seen).to(read.dtype)  # (B, H, C, C)
        from_start, to_end = queries * untouched, keys * (left[:, :, -1:] * in_last)
        output = weights @ values + from_start.to(read.dtype) @ held
        carry = (left[:, :, -1:] * untouched[:, :, -1:]).mT.to(read.dtype)  # (B, H, S, 1)
        slots = th.where(carry > 0, carry * slots, 0.0) + to_end.mT.to(read.dtype) @ values
        ctx.set_materialize_grads(False)  # in training, the last slots have no gradient
        ctx.save_for_backward(write, left, before, queries, keys, weights, values, held, seen, untouched, in_last)
        return output.transpose(1, 2), slots

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: th.Tensor | None, grad_slots: th.Tensor | None) -> tuple[th.Tensor | None, ...]:
        write, left, before, queries, keys, weights, values, held, seen, untouched, in_last = ctx.saved_tensors
        dtype = held.dtype
        grad = values.new_zeros(values.shape) if grad is None else grad.transpose(1, 2).contiguous()  # (B, H, C, d)
        grad_weights = (grad @ values.mT) * seen
        grad_queries = (grad_weights @ keys).add_((grad @ held.mT) * untouched)
        grad_keys = grad_weights.mT @ queries
        grad_values = weights.mT @ grad
        grad_held = (queries * untouched).to(dtype).mT @ grad if ctx.needs_input_grad[4] else None
        # Gradient of log p: p_t divides key t and multiplies query t + 1.
        grad_log = -grad_keys * keys
        grad_log[:, :, :-1] += (grad_queries * queries)[:, :, 1:]
        if grad_slots is not None:  # slots = to_end.mT @ values + carry * held
            last = left[:, :, -1:]
            to_end, carry = keys * (last * in_last), last * untouched[:, :, -1:]
            grad_to_end = values @ grad_slots.mT
            grad_keys += grad_to_end * (last * in_last)
            grad_values += to_end.to(dtype) @ grad_slots
            grad_held = None if grad_held is None else grad_held + carry.mT.to(dtype) * grad_slots
            grad_log -= grad_to_end * to_end
            grad_log[:, :, -1] += (grad_to_end * to_end).sum(2) + carry[:, :, 0] * (held * grad_slots).sum(-1)
        grad_log = grad_log.flip(2).cumsum(2).flip(2)  # gradient of log(1 - a_t), which is part of log p from step t on
        grad_write = (grad_keys / left).sub_(grad_log.div_(1 - write))
        by_step = (tensor.transpose(1, 2).to(dtype) for tensor in (grad_queries.mul_(before), grad_write, grad_values))
        return *by_step, None, grad_held


_slot_chunk: Callable[..., tuple[th.Tensor, th.Tensor]] = _SlotChunk.apply  # torch gives it no types


def _by_head(tensor: th.Tensor) -> th.Tensor:
    """:return: A contiguous fp64 copy of (B, C, H, S) as (B, H, C, S)."""
    return tensor.transpose(1, 2).to(th.float64, memory_format=th.contiguous_format, copy=True)
