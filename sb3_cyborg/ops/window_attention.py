"""
Attention of every step over the entries of the last ``S`` steps, with a learned null entry and episode masks.

Only the band that can be seen is computed, in blocks of queries, so time and memory are linear in the number of
steps. It is causal sliding-window attention (Beltagy et al. 2020, https://arxiv.org/abs/2004.05150) that excludes
the step itself, plus one entry that is always there: an empty past reads it (cf. the attention sink of Xiao et al.
2023, https://arxiv.org/abs/2309.17453).
"""

from collections.abc import Callable
from typing import Any

import torch as th
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def steps_since_start(count: th.Tensor, masks: th.Tensor | None, steps: int) -> th.Tensor:
    """
    How many steps of its episode lie before each step.

    :param count: The same number before the first step, without its reset, (B,).
    :param masks: Keep-masks, (B, T), or ``None``.
    :param steps: T.
    :return: (B, T), in the dtype of ``count``.
    """
    time = th.arange(steps, device=count.device)
    running = count.unsqueeze(1) + time
    if masks is None:
        return running
    last_reset = th.where(masks > 0.5, -1, time).cummax(dim=1).values
    return th.where(last_reset >= 0, (time - last_reset).to(count.dtype), running)


def masked_softmax(logits: th.Tensor, visible: th.Tensor, null_logits: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
    """
    Softmax over the visible entries and one null entry, which is always visible.

    :param logits: (..., S); what stands at an invisible entry, NaN included, has no effect.
    :param visible: Boolean, broadcastable to ``logits``.
    :param null_logits: (...,).
    :return: Weights of the entries (..., S) and of the null entry (...,).
    """
    return _masked_softmax(logits, visible, null_logits)


class _MaskedSoftmax(th.autograd.Function):
    """:func:`masked_softmax`; of its own, because the backward passes of ``cat``, ``where`` and slices fill much memory."""

    @staticmethod
    def forward(ctx: Any, logits: th.Tensor, visible: th.Tensor, null_logits: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        logits = th.where(visible, logits, float("-inf"))
        weights = th.softmax(th.cat([logits, null_logits.unsqueeze(-1)], dim=-1), dim=-1)
        weights, null = weights[..., :-1].contiguous(), weights[..., -1].contiguous()
        ctx.save_for_backward(weights, null)
        return weights, null

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: th.Tensor, grad_null: th.Tensor) -> tuple[th.Tensor | None, ...]:
        weights, null = ctx.saved_tensors
        mean = (grad * weights).sum(-1).addcmul_(grad_null, null)
        return (grad - mean.unsqueeze(-1)).mul_(weights), None, (grad_null - mean).mul_(null)


_masked_softmax: Callable[..., tuple[th.Tensor, th.Tensor]] = _MaskedSoftmax.apply  # torch gives it no types


def finite(values: th.Tensor) -> th.Tensor:
    """
    :return: ``values`` with zeros for what is not finite: in a matmul, a weight of zero cannot silence a NaN. A NaN that
        may be seen still shows, because it stands in the logits, too.
    """
    return th.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)


def window_attention_reference(
    query: th.Tensor,
    keys: th.Tensor,
    values: th.Tensor,
    reach: th.Tensor,
    null_logits: th.Tensor,
    age_logits: th.Tensor | None = None,
) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
    """One step after the other; arguments and results as in :func:`window_attention`."""
    steps, window = query.shape[1], keys.shape[1] - query.shape[1] + 1
    ages = th.arange(window, 0, -1, device=query.device)  # oldest first
    contexts, all_weights, all_nulls = [], [], []
    for t in range(steps):
        logits = th.einsum("bhd,bshd->bhs", query[:, t], keys[:, t : t + window]) / query.shape[-1] ** 0.5
        if age_logits is not None:
            logits = logits + age_logits[:, t].flip(-1)
        visible = (ages <= reach[:, t, None])[:, None]
        weights, null = masked_softmax(logits, visible, null_logits[:, t])
        contexts.append(th.einsum("bhs,bshd->bhd", weights, finite(values[:, t : t + window])))
        all_weights.append(weights)
        all_nulls.append(null)
    return th.stack(contexts, 1), th.stack(all_weights, 1), th.stack(all_nulls, 1)


def window_attention(
    query: th.Tensor,
    keys: th.Tensor,
    values: th.Tensor,
    reach: th.Tensor,
    null_logits: th.Tensor,
    age_logits: th.Tensor | None = None,
) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
    """
    Let step t attend to the S entries before it.

    :param query: (B, T, H, d).
    :param keys: (B, S + T - 1, H, d): the S stored entries, oldest first, then those of the sequence but the last.
    :param values: Like ``keys``.
    :param reach: How many entries back each step may look, (B, T); more than S means S.
    :param null_logits: Score of the null entry, (B, T, H).
    :param age_logits: Added to the scores by age, (B, T, H, S), age 1 first; or ``None``.
    :return: Weighted values (B, T, H, d), weights (B, T, H, S) oldest first, weight of the null entry (B, T, H).
    """
    batch_size, steps, heads, size = query.shape
    window = keys.shape[1] - steps + 1
    block = min(steps, window)  # a block of C queries multiplies C + S - 1 entries, of which it may see S each
    blocks = -(-steps // block)
    padding = blocks * block - steps
    if padding:
        query, reach, null_logits = (_pad_steps(tensor, padding) for tensor in (query, reach, null_logits))
        keys, values = _pad_steps(keys, padding), _pad_steps(values, padding)
        age_logits = None if age_logits is None else _pad_steps(age_logits, padding)
    width = block + window - 1
    query = query.view(batch_size, blocks, block, heads, size).transpose(2, 3) / size**0.5  # (B, n, H, C, d)
    keys = _blocks(keys, width, block)  # (B, n, H, d, W)
    logits = _band(query @ keys, window)  # (B, n, H, C, S)
    if age_logits is not None:
        logits = logits + age_logits.view(batch_size, blocks, block, heads, window).transpose(2, 3).flip(-1)
    ages = th.arange(window, 0, -1, device=query.device)
    visible = ages <= reach.view(batch_size, blocks, 1, block, 1)
    weights, null = masked_softmax(logits, visible, null_logits.view(batch_size, blocks, block, heads).transpose(2, 3))
    context = _unband(weights, width) @ _blocks(finite(values), width, block).transpose(-1, -2)  # (B, n, H, C, d)

    def by_step(tensor: th.Tensor) -> th.Tensor:
        return tensor.transpose(2, 3).reshape(batch_size, blocks * block, heads, *tensor.shape[4:])[:, :steps]

    return by_step(context), by_step(weights), by_step(null)


def _blocks(tensor: th.Tensor, width: int, block: int) -> th.Tensor:
    """:return: (B, W', H, d) cut into windows of ``width`` every ``block`` steps, (B, n, H, d, W)."""
    if tensor.shape[1] == width:  # the backward of `unfold` is a slow one
        return tensor.permute(0, 2, 3, 1).unsqueeze(1)
    return tensor.unfold(1, width, block)


def _pad_steps(tensor: th.Tensor, padding: int) -> th.Tensor:
    """:return: The tensor with ``padding`` more steps (dimension 1) of zeros."""
    return F.pad(tensor, (0, 0) * (tensor.dim() - 2) + (0, padding))


def _band(scores: th.Tensor, window: int) -> th.Tensor:
    """
    Shift row c of (..., C, W) left by c and keep the first ``window`` columns: what query c may see.

    Read as one line of numbers, row c begins at c * W; a row length of W + 1 therefore shifts each row by one more.
    """
    rows, width = scores.shape[-2:]
    flat = F.pad(scores.flatten(-2), (0, rows))
    return flat.view(*scores.shape[:-2], rows, width + 1)[..., :window]


def _unband(weights: th.Tensor, width: int) -> th.Tensor:
    """The inverse of :func:`_band`: (..., C, S) to (..., C, W), zeros where nothing may be seen."""
    rows, window = weights.shape[-2:]
    flat = F.pad(weights, (0, width + 1 - window)).flatten(-2)
    return flat[..., : rows * width].reshape(*weights.shape[:-2], rows, width)
