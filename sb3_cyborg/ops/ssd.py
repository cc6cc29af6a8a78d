"""
The core of Mamba-2: a linear recurrence over a matrix state, for all steps at once.

``h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T``, ``y_t = h_t C_t``. State-space duality (Dao & Gu 2024,
https://arxiv.org/abs/2405.21060, section 6) makes it matmuls: within a chunk every step reads every earlier one with a
weight ``C_i . B_j exp(sum of dt A)``; between chunks the state is carried.

Episodes may start in mid-sequence. Two things keep them apart, exactly: the sums of ``dt A`` restart with each episode,
and what is not finite never enters a matmul, for a weight of zero would not silence it. What belongs to the same
episode gets its NaN back afterwards (:func:`_nan_where`).

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
"""Steps that are handled at once; the work within a chunk grows with its square, the number of loop turns falls."""

LOG2_E = math.log2(math.e)

FLOOR = -115.0
"""The lowest logarithm, of base 2, of a decay: 2^-115 is nothing beside any number that matters. Lower ones would cost digits
of the sums that they are part of, and subnormal numbers are five times slower."""

LARGEST = 1e15
"""What is larger counts as infinite: two such numbers may be multiplied, and summed up, without an overflow, which beside
a weight of zero would be NaN as well."""

SMALLEST = 1e-30
"""Step sizes below it are divided by as if they were it: at zero, which writes nothing, there is nothing to divide."""


def ssd_step(
    x: th.Tensor, dt: th.Tensor, a: th.Tensor, b: th.Tensor, c: th.Tensor, d: th.Tensor, state: th.Tensor
) -> tuple[th.Tensor, th.Tensor]:
    """
    Read one step. Heads share the ``b`` and ``c`` of their group; H is a multiple of G.

    :param x: Inputs of the heads, (B, H, P).
    :param dt: Step sizes, >= 0, (B, H).
    :param a: Decay rates, < 0, (H,).
    :param b: Where in the state to write, (B, G, N).
    :param c: What of the state to read, (B, G, N).
    :param d: Weight of the input in the output, (H,).
    :param state: The state before the step, (B, H, P, N).
    :return: Outputs (B, H, P) and the state after the step.
    """
    batch_size, heads, width, size = state.shape
    groups = b.shape[1]
    write = (x * dt.unsqueeze(-1)).view(batch_size, groups, -1, 1)  # the heads of a group and their P: one axis
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
    """One step after the other; arguments and results as in :func:`ssd_chunked`."""
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
    Read a sequence. Heads share the ``b`` and ``c`` of their group; H is a multiple of G.

    A value that is not finite, or beyond ``LARGEST``, makes every output from its step to the end of its episode NaN, in
    all heads of the row (in ``c``: of its step alone); nothing before it and nothing of the next episode. Gradients flow
    into all tensors but ``masks`` and out of both results; what a ``dt`` below
    ``SMALLEST`` writes gives it less than its due.

    :param x: Inputs of the heads, (B, T, H, P) with T >= 1.
    :param dt: Step sizes, >= 0, (B, T, H).
    :param a: Decay rates, < 0, (H,).
    :param b: Where in the state to write, (B, T, G, N).
    :param c: What of the state to read, (B, T, G, N).
    :param d: Weight of the input in the output, (H,).
    :param state: The state before the first step, (B, H, P, N).
    :param masks: Keep-masks, bool, (B, T), or ``None``; a reset makes the state zeros before the step reads.
    :param chunk_size: Steps in a chunk, >= 1; T need not be a multiple.
    :return: Outputs (B, T, H, P) and the state after the last step (B, H, P, N).
    """
    batch_size, steps, heads, width = x.shape
    chunk = min(chunk_size, steps)
    count = -(-steps // chunk)
    padding = count * chunk - steps

    def split(tensor: th.Tensor) -> th.Tensor:
        """(B, T, ...) to (B, K, L, ...); a padded step has dt 0: it writes nothing and lets nothing fade."""
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
    :func:`ssd_chunked` of chunks: one function, in which nothing is copied, masked or checked that need not be, in the forward
    and in the backward, and ``dt`` is in the weights instead of the inputs.

    For a CPU: a product and a sum instead of ``addcmul``, which is slow where it broadcasts, and instead of ``masked_fill``,
    which is not vectorised; ``exp2``, which takes a quarter of the time of ``exp``.
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
        :param state: Before the first chunk, (B, H, P, N).
        :param episodes: How many resets there were since the chunk began, (B, K, L).
        :return: Outputs (B, K, L, H, P), and the state after the last chunk.
        """
        groups = b.shape[3]
        # Whether a step (third axis) sees another one (last axis), (B, K, L, L).
        seen = (episodes.unsqueeze(-1) == episodes.unsqueeze(-2)).tril_()
        allowed = seen.to(x.dtype)
        nan = lost = None
        heads_x, heads_b, heads_c = map(_heads_first, (x, b, c))
        if _any_bad(heads_x, dt, heads_b, heads_c, state):
            lost = _nan_where((seen & _bad(x, b, dt.unsqueeze(-1)).unsqueeze(-2)).any(-1), x.dtype)  # (B, K, L)
            nan = lost + _nan_where(_bad(c), x.dtype)
            x, dt, b, c = map(_finite, (x, dt, b, c))
            heads_x, heads_b, heads_c = map(_heads_first, (x, b, c))
        b, c = heads_b, heads_c  # (B, K, G, L, N)
        # fp64, because differences of sums are taken; they are few
        log_decay = dt.double() * (LOG2_E * a.double())
        sums = allowed.double() @ log_decay.clamp(min=FLOOR)  # since the chunk or the episode began, (B, K, L, H)

        decay, weights = _weights(dt, b, c, sums, allowed)
        own = weights.diagonal(dim1=-2, dim2=-1)
        own_without_d = own.clone()
        own += d.unsqueeze(-1)
        within = weights @ heads_x  # (B, K, H, L, P)

        first = (episodes == 0).unsqueeze(-1)
        fade = _exp2(sums.to(x.dtype, copy=True)).mul_(first)  # since the chunk began, (B, K, L, H)
        to_end = (decay[:, :, :, -1] * allowed[:, :, None, -1]).transpose(2, 3)  # dt included
        kept = _by_group(x * to_end.unsqueeze(-1), groups)  # (B, K, G, L, H/G P)
        added = (kept.mT @ b).view(*x.shape[:2], *state.shape[1:])
        if lost is not None:
            added += lost[..., -1, None, None, None]
        before, state = _carry(added, fade[:, :, -1], None if lost is None else episodes[..., -1] > 0, state)
        if nan is not None:
            # A state that is not finite (any more) is NaN for those who read it.
            nan = nan + th.where(first.squeeze(-1), _nan_where(_bad(before.unsqueeze(2)), x.dtype), 0.0)
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
        # Within chunks
        heads_grad = _heads_first(grad)
        heads_grad_x = weights.mT @ heads_grad  # (B, K, H, L, P)
        grad_weights = heads_grad @ heads_x.mT  # (B, K, H, L, L)
        own_grad = grad_weights.diagonal(dim1=-2, dim2=-1)
        grad_d = own_grad.sum((0, 1, 3))
        # Of weight = dt_j exp(s_i - s_j) score: by row the gradient of s_i, by column of -s_j and of log dt_j. In fp64,
        # because what is summed cancels.
        grad_logs = grad_weights * weights
        grad_logs.diagonal(dim1=-2, dim2=-1).copy_(own_grad * own_without_d)
        grad_log_dt = grad_logs.sum(-2, dtype=th.float64).transpose(2, 3)  # (B, K, L, H)
        grad_sums = grad_logs.sum(-1, dtype=th.float64).transpose(2, 3)
        grad_scores = grad_weights.mul_(decay).unflatten(2, (groups, -1)).sum(3).mul_(allowed.unsqueeze(2))
        # Across chunks: what was read, then what was kept
        grad_sums = grad_sums + (grad * read).sum(-1)
        faded_grad = _by_group(grad * fade.unsqueeze(-1), groups)
        flat = _flat(before, groups)
        grad_before = (faded_grad.mT @ c).view(before.shape)
        grad_added, grad_fade, grad_state = _carry_backward(grad_before, fade[:, :, -1], before, grad_state)
        flat_grad = grad_added.view(flat.shape)
        grad_c = faded_grad @ flat + grad_scores @ b
        grad_b = kept @ flat_grad + grad_scores.mT @ c
        grad_kept = b @ flat_grad.mT  # (B, K, G, L, H/G P)
        grad_to_end = (grad_kept * kept).transpose(2, 3).reshape(read.shape).sum(-1).double()  # of its logarithm
        grad_sums[:, :, -1] += grad_to_end.sum(2) + grad_fade
        grad_log_dt = grad_log_dt + grad_to_end
        grad_x = grad_kept.transpose(2, 3).reshape(read.shape) * to_end.unsqueeze(-1)
        grad_x += heads_grad_x.transpose(2, 3)
        # Of dt A, where it is not cut off, and so of both
        grad_decay = (allowed.double().mT @ (grad_sums - grad_log_dt)).mul_(log_decay >= FLOOR)
        grad_a = (grad_decay * dt).sum((0, 1, 2)).to(a.dtype)
        grad_dt = (grad_decay * a).add_(grad_log_dt.div_(dt.clamp(min=SMALLEST)))
        return grad_x, grad_dt.to(dt.dtype), grad_a, grad_b.transpose(2, 3), grad_c.transpose(2, 3), grad_d, grad_state, None


_ssd: Callable[..., tuple[th.Tensor, th.Tensor]] = _SSD.apply


def _finite(values: th.Tensor, out: th.Tensor | None = None) -> th.Tensor:
    """:return: The values with zeros for what is not finite, and nothing beyond ``LARGEST``."""
    return th.clamp(th.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0, out=out), -LARGEST, LARGEST, out=out)


def _bad(*tensors: th.Tensor) -> th.Tensor:
    """:return: Which steps of the tensors (B, K, L, ...) hold what is not finite or too large, (B, K, L)."""
    norms = th.stack([th.linalg.vector_norm(tensor.flatten(3), dim=-1) for tensor in tensors])
    return ~(norms <= LARGEST).all(0)


def _nan_where(condition: th.Tensor, dtype: th.dtype) -> th.Tensor:
    """:return: NaN where the condition holds, else 0: to be added to what has lost its NaN."""
    return th.zeros(condition.shape, dtype=dtype, device=condition.device).masked_fill_(condition, float("nan"))


def _any_bad(*tensors: th.Tensor) -> bool:
    """:return: Whether there may be anything to take out; always, where no branch may depend on it."""
    return not may_branch(tensors[0].device) or not all(th.linalg.vector_norm(tensor).item() <= LARGEST for tensor in tensors)


def _exp2(log_decay: th.Tensor) -> th.Tensor:
    """
    :param log_decay: Overwritten.
    :return: Its power of two, at most 1 also where it is masked afterwards: the other way in time, it would overflow.
    """
    return log_decay.clamp_(FLOOR, 0.0).exp2_()


def _heads_first(tensor: th.Tensor) -> th.Tensor:
    """:return: (B, K, H, L, P) from (B, K, L, H, P), in memory, too: for matmuls of each head."""
    return tensor.transpose(2, 3).contiguous()


def _by_group(tensor: th.Tensor, groups: int) -> th.Tensor:
    """:return: (B, K, G, L, H/G P) from (B, K, L, H, P): the heads of a group share their matmuls."""
    return tensor.reshape(*tensor.shape[:3], groups, -1).transpose(2, 3)


def _flat(states: th.Tensor, groups: int) -> th.Tensor:
    """:return: (B, K, G, H/G P, N) from (B, K, H, P, N)."""
    return states.view(*states.shape[:2], groups, -1, states.shape[-1])


def _weights(dt: th.Tensor, b: th.Tensor, c: th.Tensor, sums: th.Tensor, allowed: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
    """
    :return: ``dt_j exp(s_i - s_j)``, which means nothing where ``j`` is not seen, and the weights with which step ``i``
        reads the input of step ``j``, both (B, K, H, L, L).
    """
    sums = sums.transpose(2, 3)
    exponent = th.empty(*sums.shape, sums.shape[-1], dtype=dt.dtype, device=dt.device)
    th.sub(sums.unsqueeze(-1), sums.unsqueeze(-2), out=exponent)
    decay = _exp2(exponent).mul_(dt.transpose(2, 3).unsqueeze(-2))
    scores = (c @ b.mT).mul_(allowed.unsqueeze(2))
    weights = decay.unflatten(2, (b.shape[2], -1)) * scores.unsqueeze(3)
    return decay, weights.view(decay.shape)


def _carry(added: th.Tensor, fade: th.Tensor, gone: th.Tensor | None, state: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
    """
    :param added: What the chunks add to the state, (B, K, H, P, N).
    :param fade: By how much they fade it, (B, K, H), 0 if there was a reset.
    :param gone: Whether there was a reset, (B, K), if a state may be something that 0 does not silence.
    :param state: Before the first chunk, (B, H, P, N).
    :return: The states before each chunk (B, K, H, P, N) and after the last one (B, H, P, N).
    """
    before = th.empty_like(added)
    for index, factor in enumerate(fade[..., None, None].unbind(1)):
        before[:, index] = state
        state = state * factor
        if gone is not None:
            state.masked_fill_(gone[:, index, None, None, None], 0.0)
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
