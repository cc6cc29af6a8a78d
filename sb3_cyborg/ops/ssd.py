"""
The recurrence of Mamba-2 (state-space duality): a linear recurrence of a matrix state, computed in chunks.

``h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T``, ``y_t = h_t C_t``. State-space duality (Dao & Gu 2024,
https://arxiv.org/abs/2405.21060, section 6) turns it into matmuls: within a chunk, step i reads every earlier step j with the
weight ``C_i . B_j exp(sum of dt A)``; between chunks the state is carried.

Episodes may start within a sequence, and are separated exactly: the sums of ``dt A`` restart with each episode, and non-finite
values are replaced before each matmul, because 0 * NaN is NaN. Outputs of the same episode that depend on a replaced value
become NaN afterwards (:func:`_nan_where`).

Shapes: B rows, T steps, K chunks of L steps, H heads of width P in G groups, N the size of the state.
"""

import math
from collections.abc import Callable
from typing import Any

import torch as th
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from sb3_cyborg.sequence_model import may_branch

CHUNK = 32
"""Steps in a chunk. The work within a chunk grows with its square, the number of loop iterations falls."""

LOG2_E = math.log2(math.e)

MIN_LOG2_DECAY = -115.0
"""Lower bound of the base-2 logarithm of a decay. 2^-115 is negligible. Lower values would cost precision in the sums that
contain them, and subnormal numbers are five times slower."""

MAX_MAGNITUDE = 1e15
"""Larger values count as infinite. Products of two values up to it, and their sums, do not overflow; an overflow times a
weight of zero would be NaN."""

MIN_DT = 1e-30
"""Lower bound of the step size as a divisor in the backward, which avoids a division by zero."""


def ssd_step(
    x: th.Tensor, dt: th.Tensor, a: th.Tensor, b: th.Tensor, c: th.Tensor, d: th.Tensor, state: th.Tensor
) -> tuple[th.Tensor, th.Tensor]:
    """
    Process one step. The heads of a group share ``b`` and ``c``; H is a multiple of G.

    :param x: Inputs of the heads, (B, H, P).
    :param dt: Step sizes, >= 0, (B, H).
    :param a: Decay rates, < 0, (H,).
    :param b: Input projections B (write directions in the state), (B, G, N).
    :param c: Output projections C (read directions in the state), (B, G, N).
    :param d: Weights of the skip connection, (H,).
    :param state: State before the step, (B, H, P, N).
    :return: Outputs (B, H, P) and the state after the step (B, H, P, N).
    """
    batch_size, heads, width, size = state.shape
    groups = b.shape[1]
    write = (x * dt.unsqueeze(-1)).view(batch_size, groups, -1, 1)  # (B, G, H/G P, 1)
    faded = state * th.exp(dt * a).view(batch_size, heads, 1, 1)
    state = th.addcmul(faded.view(batch_size, groups, -1, size), write, b.unsqueeze(2))
    read = (state * c.unsqueeze(2)).sum(-1).view(batch_size, heads, width)  # on a CPU, faster than a matmul this thin
    return th.addcmul(read, x, d.unsqueeze(-1)), state.view(batch_size, heads, width, size)


def ssd_reference(
    x: th.Tensor,
    dt: th.Tensor,
    a: th.Tensor,
    b: th.Tensor,
    c: th.Tensor,
    d: th.Tensor,
    state: th.Tensor,
    masks: th.Tensor | None = None,
) -> tuple[th.Tensor, th.Tensor]:
    """Step-by-step reference; parameters and results are those of :func:`ssd_chunked`."""
    outputs = []
    for t in range(x.shape[1]):
        if masks is not None:
            state = th.where(masks[:, t, None, None, None], state, 0.0)
        y, state = ssd_step(x[:, t], dt[:, t], a, b[:, t], c[:, t], d, state)
        outputs.append(y)
    return th.stack(outputs, dim=1), state


def ssd_chunked(
    x: th.Tensor,
    dt: th.Tensor,
    a: th.Tensor,
    b: th.Tensor,
    c: th.Tensor,
    d: th.Tensor,
    state: th.Tensor,
    masks: th.Tensor | None = None,
    chunk_size: int = CHUNK,
) -> tuple[th.Tensor, th.Tensor]:
    """
    Process a sequence in chunks. The heads of a group share ``b`` and ``c``; H is a multiple of G.

    A value that is not finite or exceeds ``MAX_MAGNITUDE`` turns all outputs of its row into NaN, from its step to the end of
    its episode; in ``c``, only those of its step. Earlier steps and other episodes are not affected. Both results are
    differentiable, once, with respect to all tensors but ``masks``. The gradient of ``dt`` is too small where ``dt`` is below
    ``MIN_DT``.

    :param x: Inputs of the heads, (B, T, H, P) with T >= 1.
    :param dt: Step sizes, >= 0, (B, T, H).
    :param a: Decay rates, < 0, (H,).
    :param b: Input projections B (write directions in the state), (B, T, G, N).
    :param c: Output projections C (read directions in the state), (B, T, G, N).
    :param d: Weights of the skip connection, (H,).
    :param state: State before the first step, (B, H, P, N).
    :param masks: Keep-masks, bool, (B, T), or ``None``; a reset sets the state to zeros before the step.
    :param chunk_size: Steps in a chunk, >= 1; T need not be a multiple of it.
    :return: Outputs (B, T, H, P) and the state after the last step (B, H, P, N).
    """
    batch_size, steps, heads, width = x.shape
    chunk = min(chunk_size, steps)
    count = -(-steps // chunk)
    padding = count * chunk - steps

    def split(tensor: th.Tensor) -> th.Tensor:
        """(B, T, ...) to (B, K, L, ...). Padding steps have dt 0, so they neither write to the state nor decay it."""
        if padding:
            tensor = F.pad(tensor, (*[0, 0] * (tensor.dim() - 2), 0, padding))
        chunks: th.Tensor = tensor.unflatten(1, (count, chunk))
        return chunks

    if masks is None:
        episodes = th.zeros(batch_size, count, chunk, dtype=th.int64, device=x.device)
    else:
        episodes = split(~masks).cumsum(-1)
    y, state = _ssd(split(x), split(dt), a, split(b), split(c), d, state, episodes)
    return y.reshape(batch_size, count * chunk, heads, width)[:, :steps], state


class _SSD(th.autograd.Function):
    """
    :func:`ssd_chunked` on chunked tensors, as one autograd node with a hand-written backward.

    ``dt`` is part of the weights, not of the inputs. For speed on a CPU, products and sums replace ``addcmul``, which is slow
    when it broadcasts, and ``masked_fill``, which is not vectorised; ``exp2`` takes a quarter of the time of ``exp``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: th.Tensor,
        dt: th.Tensor,
        a: th.Tensor,
        b: th.Tensor,
        c: th.Tensor,
        d: th.Tensor,
        state: th.Tensor,
        episodes: th.Tensor,
    ) -> tuple[th.Tensor, th.Tensor]:
        """
        :param x: (B, K, L, H, P).
        :param dt: (B, K, L, H).
        :param a: (H,).
        :param b: (B, K, L, G, N).
        :param c: (B, K, L, G, N).
        :param d: (H,).
        :param state: State before the first chunk, (B, H, P, N).
        :param episodes: Number of resets since the start of the chunk, (B, K, L).
        :return: Outputs (B, K, L, H, P), and the state after the last chunk (B, H, P, N).
        """
        groups = b.shape[3]
        # Whether step i (third axis) reads step j (last axis), (B, K, L, L).
        seen = (episodes.unsqueeze(-1) == episodes.unsqueeze(-2)).tril_()
        allowed = seen.to(x.dtype)
        nan = lost = None
        heads_x, heads_b, heads_c = map(_heads_first, (x, b, c))
        if _may_overflow(heads_x, dt, heads_b, heads_c, state):
            lost = _nan_where((seen & _overflows(x, b, dt.unsqueeze(-1)).unsqueeze(-2)).any(-1), x.dtype)  # (B, K, L)
            nan = lost + _nan_where(_overflows(c), x.dtype)
            x, dt, b, c = map(_finite, (x, dt, b, c))
            heads_x, heads_b, heads_c = map(_heads_first, (x, b, c))
        b, c = heads_b, heads_c  # (B, K, G, L, N)
        # In fp64, because differences of the sums are taken.
        log_decay = dt.double() * (LOG2_E * a.double())
        sums = allowed.double() @ log_decay.clamp(min=MIN_LOG2_DECAY)  # since the start of chunk or episode, (B, K, L, H)

        decay, weights = _weights(dt, b, c, sums, allowed)
        own = weights.diagonal(dim1=-2, dim2=-1)
        own_without_d = own.clone()
        own += d.unsqueeze(-1)
        within = weights @ heads_x  # (B, K, H, L, P)

        first = (episodes == 0).unsqueeze(-1)
        fade = _exp2(sums.to(x.dtype, copy=True)).mul_(first)  # decay of the chunk's first state, (B, K, L, H)
        to_end = (decay[:, :, :, -1] * allowed[:, :, None, -1]).transpose(2, 3)  # decay to the end of the chunk, times dt
        kept = _by_group(x * to_end.unsqueeze(-1), groups)  # (B, K, G, L, H/G P)
        added = (kept.mT @ b).view(*x.shape[:2], *state.shape[1:])
        if lost is not None:
            added += lost[..., -1, None, None, None]
        before, state = _carry(added, fade[:, :, -1], None if lost is None else episodes[..., -1] > 0, state)
        if nan is not None:
            # Outputs that read a non-finite state are NaN.
            nan = nan + th.where(first.squeeze(-1), _nan_where(_overflows(before.unsqueeze(2)), x.dtype), 0.0)
            before = _finite(before)
        read = (c @ _flat(before, groups).mT).transpose(2, 3).reshape(x.shape)
        read *= fade.unsqueeze(-1)
        y = th.add(within.transpose(2, 3), read, out=th.empty_like(read))
        if nan is not None:
            y += nan[..., None, None]
        ctx.save_for_backward(
            dt, a, b, c, heads_x, log_decay, allowed, decay, weights, own_without_d, fade, to_end, kept, before, read
        )
        return y, state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: th.Tensor, grad_state: th.Tensor) -> tuple[th.Tensor | None, ...]:
        dt, a, b, c, heads_x, log_decay, allowed, decay, weights, own_without_d, fade, to_end, kept, before, read = (
            ctx.saved_tensors
        )
        groups = b.shape[2]
        # Within chunks.
        heads_grad = _heads_first(grad)
        heads_grad_x = weights.mT @ heads_grad  # (B, K, H, L, P)
        grad_weights = heads_grad @ heads_x.mT  # (B, K, H, L, L)
        own_grad = grad_weights.diagonal(dim1=-2, dim2=-1)
        grad_d = own_grad.sum((0, 1, 3))
        # weight_ij = dt_j exp(s_i - s_j) score_ij. Row sums give the gradient of s_i, column sums those of -s_j and log dt_j;
        # in fp64, because the terms cancel.
        grad_logs = grad_weights * weights
        grad_logs.diagonal(dim1=-2, dim2=-1).copy_(own_grad * own_without_d)
        grad_log_dt = grad_logs.sum(-2, dtype=th.float64).transpose(2, 3)  # (B, K, L, H)
        grad_sums = grad_logs.sum(-1, dtype=th.float64).transpose(2, 3)
        grad_scores = grad_weights.mul_(decay).unflatten(2, (groups, -1)).sum(3).mul_(allowed.unsqueeze(2))
        # Across chunks: reads of the carried state, then writes to it.
        grad_sums = grad_sums + (grad * read).sum(-1)
        faded_grad = _by_group(grad * fade.unsqueeze(-1), groups)
        flat = _flat(before, groups)
        grad_before = (faded_grad.mT @ c).view(before.shape)
        grad_added, grad_fade, grad_state = _carry_backward(grad_before, fade[:, :, -1], before, grad_state)
        flat_grad = grad_added.view(flat.shape)
        grad_c = faded_grad @ flat + grad_scores @ b
        grad_b = kept @ flat_grad + grad_scores.mT @ c
        grad_kept = b @ flat_grad.mT  # (B, K, G, L, H/G P)
        grad_to_end = (grad_kept * kept).transpose(2, 3).reshape(read.shape).sum(-1).double()  # gradient of log(to_end)
        grad_sums[:, :, -1] += grad_to_end.sum(2) + grad_fade
        grad_log_dt = grad_log_dt + grad_to_end
        grad_x = grad_kept.transpose(2, 3).reshape(read.shape) * to_end.unsqueeze(-1)
        grad_x += heads_grad_x.transpose(2, 3)
        # Gradient of dt A, zero where the decay is clamped; from it those of dt and A.
        grad_decay = (allowed.double().mT @ (grad_sums - grad_log_dt)).mul_(log_decay >= MIN_LOG2_DECAY)
        grad_a = (grad_decay * dt).sum((0, 1, 2)).to(a.dtype)
        grad_dt = (grad_decay * a).add_(grad_log_dt.div_(dt.clamp(min=MIN_DT)))
        return grad_x, grad_dt.to(dt.dtype), grad_a, grad_b.transpose(2, 3), grad_c.transpose(2, 3), grad_d, grad_state, None


_ssd: Callable[..., tuple[th.Tensor, th.Tensor]] = _SSD.apply


def _finite(values: th.Tensor, out: th.Tensor | None = None) -> th.Tensor:
    """:return: The values, zero where they are not finite, clamped to +-``MAX_MAGNITUDE``."""
    finite = th.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0, out=out)
    return th.clamp(finite, -MAX_MAGNITUDE, MAX_MAGNITUDE, out=out)


def _overflows(*tensors: th.Tensor) -> th.Tensor:
    """:return: Whether a step of one of the tensors (B, K, L, ...) is NaN, infinite or too large, (B, K, L)."""
    norms = th.stack([th.linalg.vector_norm(tensor.flatten(3), dim=-1) for tensor in tensors])
    return ~(norms <= MAX_MAGNITUDE).all(0)


def _nan_where(condition: th.Tensor, dtype: th.dtype) -> th.Tensor:
    """:return: NaN where the condition holds, else 0; added to outputs whose inputs were replaced by finite values."""
    return th.zeros(condition.shape, dtype=dtype, device=condition.device).masked_fill_(condition, float("nan"))


def _may_overflow(*tensors: th.Tensor) -> bool:
    """:return: Whether the tensors may hold NaN, infinite or too large values; always true in the select-only form."""
    if not may_branch(tensors[0].device):
        return True
    return not all(th.linalg.vector_norm(tensor).item() <= MAX_MAGNITUDE for tensor in tensors)


def _exp2(log_decay: th.Tensor) -> th.Tensor:
    """
    :param log_decay: Base-2 logarithms of decays; overwritten.
    :return: The decays, at most 1. The clamp prevents an overflow for pairs with j > i, which are masked afterwards.
    """
    return log_decay.clamp_(MIN_LOG2_DECAY, 0.0).exp2_()


def _heads_first(tensor: th.Tensor) -> th.Tensor:
    """:return: (B, K, L, H, P) as a contiguous (B, K, H, L, P), for one matmul per head."""
    return tensor.transpose(2, 3).contiguous()


def _by_group(tensor: th.Tensor, groups: int) -> th.Tensor:
    """:return: (B, K, L, H, P) as (B, K, G, L, H/G P), for one matmul per group."""
    return tensor.reshape(*tensor.shape[:3], groups, -1).transpose(2, 3)


def _flat(states: th.Tensor, groups: int) -> th.Tensor:
    """:return: (B, K, H, P, N) as (B, K, G, H/G P, N)."""
    return states.view(*states.shape[:2], groups, -1, states.shape[-1])


def _weights(dt: th.Tensor, b: th.Tensor, c: th.Tensor, sums: th.Tensor, allowed: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
    """
    :return: ``dt_j exp(s_i - s_j)``, undefined where step ``i`` does not read step ``j``, and the weights with which step
        ``i`` reads the input of step ``j``, both (B, K, H, L, L).
    """
    sums = sums.transpose(2, 3)
    exponent = th.empty(*sums.shape, sums.shape[-1], dtype=dt.dtype, device=dt.device)
    th.sub(sums.unsqueeze(-1), sums.unsqueeze(-2), out=exponent)
    decay = _exp2(exponent).mul_(dt.transpose(2, 3).unsqueeze(-2))
    scores = (c @ b.mT).mul_(allowed.unsqueeze(2))
    weights = decay.unflatten(2, (b.shape[2], -1)) * scores.unsqueeze(3)
    return decay, weights.view(decay.shape)


def _carry(added: th.Tensor, fade: th.Tensor, reset: th.Tensor | None, state: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
    """
    :param added: Contribution of each chunk to the state, (B, K, H, P, N).
    :param fade: Decay of the state over each chunk, 0 if there was a reset, (B, K, H).
    :param reset: Whether there was a reset in a chunk, bool, (B, K); ``None`` if all states are finite, where the decay of 0
        is enough.
    :param state: State before the first chunk, (B, H, P, N).
    :return: The states before each chunk (B, K, H, P, N) and after the last one (B, H, P, N).
    """
    before = th.empty_like(added)
    for index, factor in enumerate(fade[..., None, None].unbind(1)):
        before[:, index] = state
        state = state * factor
        if reset is not None:
            state.masked_fill_(reset[:, index, None, None, None], 0.0)
        state += added[:, index]
    return before, state


def _carry_backward(
    grad_before: th.Tensor, fade: th.Tensor, before: th.Tensor, grad_state: th.Tensor
) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
    """:return: The gradients of ``added``, of the logarithm of ``fade`` (B, K, H), and of the first state."""
    grad_added = th.empty_like(before)
    factors = fade[..., None, None].unbind(1)
    for index in range(len(factors) - 1, -1, -1):
        grad_added[:, index] = grad_state
        grad_state = (grad_state * factors[index]).add_(grad_before[:, index])
    grad_fade = fade * (grad_added * before).sum((-1, -2))
    return grad_added, grad_fade, grad_state
