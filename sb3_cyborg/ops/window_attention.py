"""
Causal sliding-window attention over the entries of the last ``S`` steps, with a learned null entry and episode masks.

Only blocks that contain the band of visible entries are computed, so time and memory are linear in the number of steps. It is
the sliding-window attention of Beltagy et al. 2020 (https://arxiv.org/abs/2004.05150) without the step itself, plus a null
entry that is always visible, also with an empty past (cf. the attention sink of Xiao et al. 2023,
https://arxiv.org/abs/2309.17453).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch as th
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from sb3_cyborg.kernels import primitives as kernels
from sb3_cyborg.ops.masking import finite, masked_softmax


class BlockRead(NamedTuple):
    """
    Result of :func:`window_attention`.

    In row c of a block of C queries, the columns c to c + S - 1 of the first S + C - 1 are the visible entries, oldest first.
    Then follow the extra entries, and the last column is the null entry. All other columns have no weight.
    """

    context: th.Tensor
    """Weighted sum of the values, the null entry's included, (B, T, H, d)."""
    logits: th.Tensor
    """Scores, (H, B, n, C, S + C + E), without gradient."""
    probabilities: th.Tensor
    """Attention weights, (H, B, n, C, S + C + E), without gradient."""
    window: int
    """Window size S."""

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
        """:return: Mean entropy in nats, (): ``logsumexp(logits) - p . logits``, which is faster than ``-p . log(p)``."""
        log_sum = self.logits.amax(-1) - self.probabilities.amax(-1).log()
        logits = self.logits.clamp(min=th.finfo(self.logits.dtype).min)  # 0 * -inf would be NaN
        total = log_sum.sum() - self.probabilities.flatten().dot(logits.flatten())
        return total / self.context[..., 0].numel()  # padding steps of the last block read only the null entry: entropy 0


class StepRead(NamedTuple):
    """Result of :func:`window_attention` by the compiled kernels."""

    context: th.Tensor
    """Weighted sum of the values, the null entry's included, (B, T, H, d)."""
    probabilities: th.Tensor
    """Attention weights of the window, oldest first, of the extra entries, of the null entry, (B, H, T, S + E + 1)."""
    window: int
    """Window size S."""

    def weights(self) -> th.Tensor:
        """:return: Weights of the entries, (B, T, H, S), oldest first."""
        return self.probabilities[..., : self.window].transpose(1, 2)

    def extra(self) -> th.Tensor:
        """:return: Weights of the extra entries, (B, T, H, E)."""
        return self.probabilities[..., self.window : -1].transpose(1, 2)

    def null(self) -> th.Tensor:
        """:return: Weight of the null entry, (B, T, H)."""
        return self.probabilities[..., -1].transpose(1, 2)

    def entropy(self) -> th.Tensor:
        """:return: Mean entropy in nats, ()."""
        entropy: th.Tensor = th.special.entr(self.probabilities).sum(-1).mean()
        return entropy


Read = BlockRead | StepRead
"""Result of :func:`window_attention`."""


class ExtraEntries(NamedTuple):
    """
    E entries in addition to those of the window, for each of n blocks of C steps; see :func:`block_starts`.

    :param keys: (B, n, E, H, d).
    :param values: (B, n, E, H, d).
    :param bias: Added to their scores, (H, E).
    :param visible: Whether a step may read each extra entry of its block, bool, (B, T, E).
    """

    keys: th.Tensor
    values: th.Tensor
    bias: th.Tensor
    visible: th.Tensor


def block_starts(steps: int, window: int) -> range:
    """
    :param steps: T, >= 1.
    :param window: S, >= 1.
    :return: The first step of each block of queries; a block has ``min(S, T)`` steps.
    """
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
    Step-by-step reference; parameters are those of :func:`window_attention`.

    :return: Weighted values (B, T, H, d), weights of the extra entries and the window's (B, T, H, E + S), weight of the null
        entry (B, T, H).
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
    Attention of each step to the S entries before it; once differentiable.

    :param query: (B, T, H, d).
    :param keys: The S stored entries, oldest first, then those of the sequence, (B, S + T, H, d). No step reads the last one.
    :param values: (B, S + T, H, d).
    :param reach: Number of entries that each step may read, >= 0, (B, T); values above S mean S.
    :param null_key: Key of the null entry, (H, d).
    :param null_value: Value of the null entry, (H, d).
    :param age_key: Relative position keys, added to the keys by age, age 1 first, (H, S, d); or ``None``.
    :param age_bias: Added to the scores by age, (H, S); ``None`` without ``age_key``.
    :param extra: Additional entries, or ``None``.
    :return: The weighted values and the attention weights.
    """
    batch_size, steps = query.shape[:2]
    window = keys.shape[1] - steps
    if kernels.usable(query, keys, null_key):
        extras = (None,) * 4 if extra is None else tuple(extra)
        return StepRead(*_window_kernel(query, keys, values, reach, *extras, null_key, null_value, age_key, age_bias), window)
    shape = (batch_size, len(block_starts(steps, window)), 1, *null_key.shape)
    extra_keys, extra_values, extra_bias, visible = null_key.expand(shape), null_value.expand(shape), None, None
    if extra is not None:
        extra_keys, extra_values = th.cat([extra.keys, extra_keys], dim=2), th.cat([extra.values, extra_values], dim=2)
        extra_bias, visible = extra.bias, extra.visible
    read = _window_attention(query, keys, values, reach, extra_keys, extra_values, extra_bias, visible, age_key, age_bias)
    return BlockRead(*read, window)


class _WindowAttention(th.autograd.Function):
    """
    :func:`window_attention` as one autograd node.

    A block of C queries is multiplied with the S + C - 1 entries that any of them may read, and with the extra entries, the
    last of which is the null entry. Invisible entries get a bias of -inf. (Adding a bias is ten times faster than selecting.
    Extracting the band and writing it back would take as long as computing the entries outside of it.)
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


class _WindowKernel(th.autograd.Function):
    """:func:`window_attention` by compiled kernels, which compute the visible entries alone."""

    @staticmethod
    def forward(
        ctx: Any,
        query: th.Tensor,
        keys: th.Tensor,
        values: th.Tensor,
        reach: th.Tensor,
        extra_keys: th.Tensor | None,
        extra_values: th.Tensor | None,
        extra_bias: th.Tensor | None,
        visible: th.Tensor | None,
        null_key: th.Tensor,
        null_value: th.Tensor,
        age_key: th.Tensor | None,
        age_bias: th.Tensor | None,
    ) -> tuple[th.Tensor, th.Tensor]:
        query, reach = (query / query.shape[-1] ** 0.5).contiguous(), reach.float().contiguous()
        keys, values = (_heads_contiguous(tensor) for tensor in (keys, values))
        extra_keys, extra_values, visible = (
            None if tensor is None else tensor.contiguous() for tensor in (extra_keys, extra_values, visible)
        )
        extra = extra_keys, extra_values
        context, weights = kernels.window_forward(
            query, keys, values, reach, *extra, extra_bias, visible, null_key, null_value, age_key, age_bias
        )
        ctx.save_for_backward(query, keys, values, reach, *extra, visible, null_key, null_value, age_key, weights)
        ctx.mark_non_differentiable(weights)
        ctx.set_materialize_grads(False)
        return context, weights

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: th.Tensor | None, *_: Any) -> tuple[th.Tensor | None, ...]:
        if grad is None:
            return (None,) * 12
        grads = kernels.window_backward(ctx.saved_tensors, grad.contiguous())
        query, keys, values, extra_keys, extra_values, extra_bias, null_key, null_value, age_key, age_bias = grads
        assert query is not None
        query = query / query.shape[-1] ** 0.5
        return query, keys, values, None, extra_keys, extra_values, extra_bias, None, null_key, null_value, age_key, age_bias


_window_kernel: Callable[..., tuple[th.Tensor, th.Tensor]] = _WindowKernel.apply


def _heads_contiguous(tensor: th.Tensor) -> th.Tensor:
    """:return: (B, N, H, d) whose heads and features are contiguous; rows and steps may have any stride."""
    return tensor if tensor.stride(3) == 1 and tensor.stride(2) == tensor.shape[3] else tensor.contiguous()


def _bias(reach: th.Tensor, keys: th.Tensor, extra_keys: th.Tensor, visible: th.Tensor | None) -> th.Tensor:
    """
    :param reach: Number of entries that each step may read, (B, n, C).
    :param keys: Keys of stored and new entries, (B, S + n C, H, d).
    :param extra_keys: Keys of the extra entries and the null entry, (B, n, E + 1, H, d).
    :param visible: Visibility of the extra entries, bool, (B, n C, E), or ``None`` without extra entries.
    :return: The bias of the scores, (B, n, C, S + C + E): 0 for visible entries, -inf for others. It is NaN for visible
        entries with non-finite keys, because :func:`_columns` replaces those keys by zeros (-inf + NaN would be NaN).
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
    :return: For each block, its S + C - 1 entries, then the extra ones, (H B n, S + C + E, d); zeros for non-finite values.
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
    Backward of :func:`_columns`.

    :param grad: (H B n, S + C + E, d).
    :param weights: A tensor of shape (H, B, n, C, S + C + E); only its shape is used.
    :param steps: T.
    :param window: S.
    :return: Gradient of the entries, (B, S + T, H, d), and of the extra ones, (B, n, E + 1, H, d).
    """
    heads, batch_size, count, block, columns = weights.shape
    grad = grad.view(heads, batch_size, count, columns, -1).permute(1, 2, 3, 0, 4)  # (B, n, S + C + E, H, d)
    entries = window + block  # includes the last of the block, which no step reads
    grad_extra = grad[:, :, entries - 1 :].clone()
    grad[:, :, entries - 1] = 0
    if count == 1:
        return grad[:, 0, :entries], grad_extra
    merged = grad.new_zeros(batch_size, window + count * block, *grad.shape[3:])
    for i in range(count):
        merged[:, i * block : i * block + entries] += grad[:, i, :entries]
    return merged[:, : window + steps], grad_extra


def _band(tensor: th.Tensor, window: int) -> th.Tensor:
    """:return: The band of a contiguous (..., C, W): columns c to c + S - 1 of each row c, as a view (..., C, S)."""
    *_, columns = tensor.shape
    return tensor.as_strided((*tensor.shape[:-1], window), (*tensor.stride()[:-2], columns + 1, 1))


def _pad_steps(tensor: th.Tensor, padding: int) -> th.Tensor:
    """:return: The tensor, zero-padded by ``padding`` steps at the end of dimension 1."""
    return F.pad(tensor, (0, 0) * (tensor.dim() - 2) + (0, padding))
