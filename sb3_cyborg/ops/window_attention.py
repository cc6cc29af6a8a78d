"""
Attention of every step over the entries of the last ``S`` steps, with a learned null entry and episode masks.

Only blocks around the band that can be seen are computed, so time and memory are linear in the number of steps. It is
causal sliding-window attention (Beltagy et al. 2020, https://arxiv.org/abs/2004.05150) that excludes
the step itself, plus one entry that is always there: an empty past reads it (cf. the attention sink of Xiao et al.
2023, https://arxiv.org/abs/2309.17453).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch as th
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from sb3_cyborg.ops.masking import finite, masked_softmax


class Read(NamedTuple):
    """
    What :func:`window_attention` read.

    In row c of a block of C queries, columns c to c + S - 1 of the first S + C - 1 are the entries that the query may see,
    oldest first; then come the extra entries, and the last column is the null entry. The rest has no weight.
    """

    context: th.Tensor
    """Weighted values, the null entry's among them, (B, T, H, d)."""
    logits: th.Tensor
    """(H, B, n, C, S + C + E), without gradient."""
    probabilities: th.Tensor
    """Likewise."""
    window: int
    """S."""

    def weights(self) -> th.Tensor:
        """:return: Weights of the entries, (B, T, H, S), oldest first."""
        return self._by_step(_band(self.probabilities, self.window))

    def extra(self) -> th.Tensor:
        """:return: Weights of the extra entries, (B, T, H, E)."""
        entries = self.window + self.probabilities.shape[-2] - 1
        return self._by_step(self.probabilities[..., entries:-1])

    def null(self) -> th.Tensor:
        """:return: Weight of the null entry, (B, T, H)."""
        return self._by_step(self.probabilities[..., -1:]).squeeze(-1)

    def _by_step(self, columns: th.Tensor) -> th.Tensor:
        """:return: (H, B, n, C, ...) as (B, T, H, ...)."""
        return columns.permute(1, 2, 3, 0, 4).flatten(1, 2)[:, : self.context.shape[1]]

    def entropy(self) -> th.Tensor:
        """:return: Mean entropy in nats, (): ``logsumexp(logits) - p . logits``, as logarithms of all p take longer."""
        log_sum = self.logits.amax(-1) - self.probabilities.amax(-1).log()
        logits = self.logits.clamp(min=th.finfo(self.logits.dtype).min)  # of no weight: 0 * -inf
        total = log_sum.sum() - self.probabilities.flatten().dot(logits.flatten())
        return total / self.context[..., 0].numel()  # steps that pad the last block read only the null entry: entropy 0


class ExtraEntries(NamedTuple):
    """
    Entries besides those of the window, E of them for each block of C steps; see :func:`block_starts`.

    :param keys: (B, n, E, H, d).
    :param values: Likewise.
    :param bias: Added to their scores, (H, E).
    :param visible: Which of its block's a step may see, boolean, (B, T, E).
    """

    keys: th.Tensor
    values: th.Tensor
    bias: th.Tensor
    visible: th.Tensor


def block_starts(steps: int, window: int) -> range:
    """:return: The first step of each block of queries; a block has as many steps as the window, or all there are."""
    return range(0, steps, min(steps, window))


def window_attention_reference(
    query: th.Tensor,
    keys: th.Tensor,
    values: th.Tensor,
    reach: th.Tensor,
    null_key: th.Tensor,
    null_value: th.Tensor,
    age_key: th.Tensor | None = None,
    age_bias: th.Tensor | None = None,
    extra: ExtraEntries | None = None,
) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
    """
    One step after the other; arguments as in :func:`window_attention`.

    :return: Weighted values (B, T, H, d), weights (B, T, H, S), with E more for extra entries before them, weight of the
        null entry (B, T, H).
    """
    steps, window = query.shape[1], keys.shape[1] - query.shape[1]
    block = min(steps, window)
    query = query / query.shape[-1] ** 0.5
    ages = th.arange(window, 0, -1, device=query.device)  # oldest first
    contexts, all_weights, all_nulls = [], [], []
    for t in range(steps):
        logits = th.einsum("bhd,bshd->bhs", query[:, t], keys[:, t : t + window])
        if age_key is not None and age_bias is not None:
            logits = logits + (th.einsum("bhd,hsd->bhs", query[:, t], age_key) + age_bias).flip(-1)
        visible = (ages <= reach[:, t, None])[:, None]
        seen = values[:, t : t + window]
        if extra is not None:
            others = th.einsum("bhd,behd->bhe", query[:, t], extra.keys[:, t // block]) + extra.bias
            logits = th.cat([others, logits], dim=-1)
            visible = th.cat([extra.visible[:, t, None], visible], dim=-1)
            seen = th.cat([extra.values[:, t // block], seen], dim=1)
        weights, null = masked_softmax(logits, visible, (query[:, t] * null_key).sum(-1))
        context = th.einsum("bhs,bshd->bhd", weights, finite(seen))
        contexts.append(context + null.unsqueeze(-1) * null_value)
        all_weights.append(weights)
        all_nulls.append(null)
    return th.stack(contexts, 1), th.stack(all_weights, 1), th.stack(all_nulls, 1)


def window_attention(
    query: th.Tensor,
    keys: th.Tensor,
    values: th.Tensor,
    reach: th.Tensor,
    null_key: th.Tensor,
    null_value: th.Tensor,
    age_key: th.Tensor | None = None,
    age_bias: th.Tensor | None = None,
    extra: ExtraEntries | None = None,
) -> Read:
    """
    Let step t attend to the S entries before it; it has no second derivative.

    :param query: (B, T, H, d).
    :param keys: (B, S + T, H, d): the S stored entries, oldest first, then those of the sequence, the last of which no step
        sees.
    :param values: Like ``keys``.
    :param reach: How many entries back each step may look, (B, T); more than S means S.
    :param null_key: Key of the null entry, (H, d).
    :param null_value: (H, d).
    :param age_key: What the query is also multiplied with, by age, (H, S, d), age 1 first; or ``None``.
    :param age_bias: Added to the scores by age, (H, S); ``None`` without ``age_key``.
    :param extra: Further entries, or ``None``.
    :return: What was read.
    """
    batch_size, steps = query.shape[:2]
    window = keys.shape[1] - steps
    shape = (batch_size, len(block_starts(steps, window)), 1, *null_key.shape)
    extra_keys, extra_values, extra_bias, visible = null_key.expand(shape), null_value.expand(shape), None, None
    if extra is not None:
        extra_keys, extra_values = th.cat([extra.keys, extra_keys], dim=2), th.cat([extra.values, extra_values], dim=2)
        extra_bias, visible = extra.bias, extra.visible
    read = _window_attention(query, keys, values, reach, extra_keys, extra_values, extra_bias, visible, age_key, age_bias)
    return Read(*read, window)


class _WindowAttention(th.autograd.Function):
    """
    All of it as one autograd node.

    A block of C queries is multiplied with all S + C - 1 entries that one of them may see, and with the extra entries, of
    which the null entry is the last, in columns of their own; what a query may not see is added to its scores as a bias of
    -inf. (To select would take ten times as long as to add, and to cut out the band and to put it back as long as to
    compute what is outside of it.)
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: th.Tensor,
        keys: th.Tensor,
        values: th.Tensor,
        reach: th.Tensor,
        extra_keys: th.Tensor,
        extra_values: th.Tensor,
        extra_bias: th.Tensor | None,
        visible: th.Tensor | None,
        age_key: th.Tensor | None,
        age_bias: th.Tensor | None,
    ) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        batch_size, steps, heads, size = query.shape
        window = keys.shape[1] - steps
        block = min(steps, window)
        padding = -steps % block
        count = (steps + padding) // block
        if padding:
            query, keys, values, reach = (_pad_steps(tensor, padding) for tensor in (query, keys, values, reach))
            visible = None if visible is None else _pad_steps(visible, padding)
        bias = _bias(reach.view(batch_size, count, block), keys, extra_keys, visible)
        query = query.view(batch_size, count, block, heads, size).permute(3, 0, 1, 2, 4) / size**0.5
        query = query.reshape(-1, block, size)  # (H B n, C, d)
        keys, values = _columns(keys, extra_keys, block), _columns(values, extra_values, block)  # (H B n, S + C + E, d)
        logits = (query @ keys.mT).view(heads, *bias.shape)
        if age_key is not None and age_bias is not None:
            age_key = age_key.flip(1)
            by_age = th.baddbmm(age_bias.flip(1).unsqueeze(1), query.view(heads, -1, size), age_key.mT)
            band = _band(logits, window)
            band += by_age.view(band.shape)
        if extra_bias is not None:
            logits[..., window + block - 1 : -1] += extra_bias[:, None, None, None]
        logits += bias
        weights = th.softmax(logits, dim=-1)
        context = (weights.view(-1, *weights.shape[-2:]) @ values).view(heads, batch_size, count * block, size)
        ctx.save_for_backward(query, keys, values, weights, age_key)
        ctx.steps, ctx.window = steps, window
        ctx.mark_non_differentiable(logits, weights)
        ctx.set_materialize_grads(False)
        return context.permute(1, 2, 0, 3)[:, :steps], logits, weights

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: th.Tensor | None, *_: Any) -> tuple[th.Tensor | None, ...]:
        if grad is None:
            return (None,) * 10
        query, keys, values, weights, age_key = ctx.saved_tensors
        heads, batch_size, count, block, columns = weights.shape
        size = query.shape[-1]
        padding = count * block - ctx.steps
        if padding:
            grad = _pad_steps(grad, padding)
        grad = grad.permute(2, 0, 1, 3).reshape(query.shape)
        grad_logits = th.ops.aten._softmax_backward_data((grad @ values.mT).view(weights.shape), weights, -1, weights.dtype)
        flat = grad_logits.view(-1, block, columns)
        grad_values, grad_extra_values = _merge(weights.view(flat.shape).mT @ grad, weights, ctx.steps, ctx.window)
        grad_keys, grad_extra_keys = _merge(flat.mT @ query, weights, ctx.steps, ctx.window)
        grad_query = (flat @ keys).view(heads, -1, size)
        grad_age_key = grad_age_bias = None
        if age_key is not None:
            by_age = _band(grad_logits, ctx.window).reshape(heads, -1, ctx.window)
            grad_query.baddbmm_(by_age, age_key)
            grad_age_key = (by_age.mT @ query.view(grad_query.shape)).flip(1)
            grad_age_bias = by_age.sum(1).flip(1)
        grad_query = grad_query.view(heads, batch_size, -1, size).permute(1, 2, 0, 3)[:, : ctx.steps] / size**0.5
        grad_extra_bias = grad_logits[..., ctx.window + block - 1 : -1].sum((1, 2, 3)) if ctx.needs_input_grad[6] else None
        grads = (grad_query, grad_keys, grad_values, None, grad_extra_keys, grad_extra_values, grad_extra_bias)
        return (*grads, None, grad_age_key, grad_age_bias)


_window_attention: Callable[..., tuple[th.Tensor, th.Tensor, th.Tensor]] = _WindowAttention.apply  # torch gives it no types


def _bias(reach: th.Tensor, keys: th.Tensor, extra_keys: th.Tensor, visible: th.Tensor | None) -> th.Tensor:
    """
    :param reach: (B, n, C).
    :param keys: Of all entries, (B, S + n C, H, d).
    :param extra_keys: (B, n, E + 1, H, d), the null entry's last.
    :param visible: (B, n C, E), or ``None`` without extra entries.
    :return: 0 where a query may look, -inf elsewhere, (B, n, C, S + C + E). A key that is not finite becomes a zero, because
        beside -inf a NaN would stay; for a query that may see it, the NaN stands here.
    """
    batch_size, count, block = reach.shape
    window = keys.shape[1] - count * block
    entries = window + block - 1
    rows, columns = th.arange(block, device=reach.device).unsqueeze(1), th.arange(entries, device=reach.device)
    ages = rows + window - columns
    ages = th.where(ages > 0, ages, window + 1)
    sees = ages.to(reach.dtype) <= reach.clamp(max=window).unsqueeze(-1)
    others = sees.new_ones(batch_size, count, block, 1)
    if visible is not None:
        others = th.cat([visible.view(batch_size, count, block, -1), others], dim=-1)
    poison = (keys * 0).sum((-1, -2)).unfold(1, entries, block)[:, :count]  # (B, n, S + C - 1)
    poison = th.cat([poison, (extra_keys * 0).sum((-1, -2))], dim=-1)
    return th.where(th.cat([sees, others], dim=-1), poison.unsqueeze(2), float("-inf"))


def _columns(tensor: th.Tensor, extra: th.Tensor, block: int) -> th.Tensor:
    """
    :param tensor: (B, S + n C, H, d).
    :param extra: (B, n, E + 1, H, d).
    :param block: C.
    :return: Windows of S + C - 1 entries every C steps, with the extra ones behind them, (H B n, S + C + E, d), zeros for
        what is not finite.
    """
    count = extra.shape[1]
    entries = tensor.shape[1] - (count - 1) * block - 1
    windows = tensor.unfold(1, entries, block)[:, :count].permute(2, 0, 1, 4, 3)  # (H, B, n, S + C - 1, d)
    out = tensor.new_empty(*windows.shape[:3], entries + extra.shape[2], tensor.shape[-1])
    out[..., :entries, :] = windows
    out[..., entries:, :] = extra.permute(3, 0, 1, 2, 4)
    return th.nan_to_num_(out, nan=0.0, posinf=0.0, neginf=0.0).flatten(0, 2)


def _merge(grad: th.Tensor, weights: th.Tensor, steps: int, window: int) -> tuple[th.Tensor, th.Tensor]:
    """
    The backward of :func:`_columns`.

    :param grad: (H B n, S + C + E, d).
    :param weights: (H, B, n, C, S + C + E), whose shape tells the sizes.
    :param steps: T.
    :param window: S.
    :return: Gradient of the entries, (B, S + T, H, d), and of the extra ones, (B, n, E + 1, H, d).
    """
    heads, batch_size, count, block, columns = weights.shape
    grad = grad.view(heads, batch_size, count, columns, -1).permute(1, 2, 3, 0, 4)  # (B, n, S + C + E, H, d)
    entries = window + block  # with the last of the block, which no step sees
    grad_extra = grad[:, :, entries - 1 :].clone()
    grad[:, :, entries - 1] = 0
    if count == 1:
        return grad[:, 0, :entries], grad_extra
    merged = grad.new_zeros(batch_size, window + count * block, *grad.shape[3:])
    for i in range(count):
        merged[:, i * block : i * block + entries] += grad[:, i, :entries]
    return merged[:, : window + steps], grad_extra


def _band(tensor: th.Tensor, window: int) -> th.Tensor:
    """:return: Of a contiguous (..., C, W), what row c may see, columns c to c + S - 1: a view, (..., C, S)."""
    *_, columns = tensor.shape
    return tensor.as_strided((*tensor.shape[:-1], window), (*tensor.stride()[:-2], columns + 1, 1))


def _pad_steps(tensor: th.Tensor, padding: int) -> th.Tensor:
    """:return: The tensor with ``padding`` more steps (dimension 1) of zeros."""
    return F.pad(tensor, (0, 0) * (tensor.dim() - 2) + (0, padding))
