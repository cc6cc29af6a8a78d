"""
The core of Mamba-2: a linear recurrence over a matrix state, for all steps at once.

``h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T``, ``y_t = h_t C_t``. State-space duality (Dao & Gu 2024,
https://arxiv.org/abs/2405.21060, section 6) makes it matmuls: within a chunk every step reads every earlier one with a
weight ``C_i . B_j exp(sum of dt A)``; between chunks the state is carried.

Episodes may start in mid-sequence. Two things keep them apart, exactly: the sums of ``dt A`` restart with each episode,
and what is not finite never enters a matmul, for a weight of zero would not silence it.
"""

import torch as th
from torch.nn import functional as F

CHUNK = 32
"""Steps that are handled at once; the work within a chunk grows with its square, the number of loop turns falls."""

LOWEST_LOG_DECAY = -1000.0
"""``exp`` of anything lower is 0 even in fp64; without a floor, a huge step would eat the digits of the sums."""


def ssd_step(
    x: th.Tensor, dt: th.Tensor, a: th.Tensor, b: th.Tensor, c: th.Tensor, state: th.Tensor
) -> tuple[th.Tensor, th.Tensor]:
    """
    Read one step. Heads share the ``b`` and ``c`` of their group; H is a multiple of G.

    :param x: Inputs of the heads, (B, H, P).
    :param dt: Step sizes, >= 0, (B, H).
    :param a: Decay rates, < 0, (H,).
    :param b: Where in the state to write, (B, G, N).
    :param c: What of the state to read, (B, G, N).
    :param state: The state before the step, (B, H, P, N).
    :return: Outputs (B, H, P) and the state after the step.
    """
    batch_size, heads, width, size = state.shape
    groups = b.shape[1]
    write = (x * dt.unsqueeze(-1)).view(batch_size, groups, -1, 1)  # the heads of a group and their P: one axis
    faded = state * th.exp(dt * a).view(batch_size, heads, 1, 1)
    state = th.addcmul(faded.view(batch_size, groups, -1, size), write, b.unsqueeze(2))
    y = state @ c.unsqueeze(-1)  # (B, G, H/G P, 1)
    return y.view(batch_size, heads, width), state.view(batch_size, heads, width, size)


def ssd_reference(
    x: th.Tensor,
    dt: th.Tensor,
    a: th.Tensor,
    b: th.Tensor,
    c: th.Tensor,
    state: th.Tensor,
    masks: th.Tensor | None = None,
) -> tuple[th.Tensor, th.Tensor]:
    """One step after the other; arguments and results as in :func:`ssd_chunked`."""
    outputs = []
    for t in range(x.shape[1]):
        if masks is not None:
            state = th.where(masks[:, t, None, None, None] > 0.5, state, 0.0)
        y, state = ssd_step(x[:, t], dt[:, t], a, b[:, t], c[:, t], state)
        outputs.append(y)
    return th.stack(outputs, dim=1), state


def ssd_chunked(
    x: th.Tensor,
    dt: th.Tensor,
    a: th.Tensor,
    b: th.Tensor,
    c: th.Tensor,
    state: th.Tensor,
    masks: th.Tensor | None = None,
    chunk_size: int = CHUNK,
) -> tuple[th.Tensor, th.Tensor]:
    """
    Read a sequence. Heads share the ``b`` and ``c`` of their group; H is a multiple of G.

    A value that is not finite makes every output from its step to the end of its episode NaN, in all heads of the row;
    nothing before it and nothing of the next episode.

    :param x: Inputs of the heads, (B, T, H, P) with T >= 1.
    :param dt: Step sizes, >= 0, (B, T, H).
    :param a: Decay rates, < 0, (H,).
    :param b: Where in the state to write, (B, T, G, N).
    :param c: What of the state to read, (B, T, G, N).
    :param state: The state before the first step, (B, H, P, N).
    :param masks: Keep-masks, (B, T), or ``None``; a reset makes the state zeros before the step reads.
    :param chunk_size: Steps in a chunk, >= 1; T need not be a multiple.
    :return: Outputs (B, T, H, P) and the state after the last step (B, H, P, N); gradients flow through both, and into
        ``state``.
    """
    batch_size, steps, heads, width = x.shape
    chunk = min(chunk_size, steps)
    count = -(-steps // chunk)
    padding = count * chunk - steps

    def split(tensor: th.Tensor) -> th.Tensor:
        """(B, T, ...) to (B, chunks, C, ...); a padded step has dt 0: it writes nothing and lets nothing fade."""
        if padding:
            tensor = F.pad(tensor, (*[0, 0] * (tensor.dim() - 2), 0, padding))
        return tensor.view(batch_size, count, chunk, *tensor.shape[2:])

    write = x * dt.unsqueeze(-1)
    taint = _taint(write, dt, b, masks)
    writes, reads, keys = split(_finite(write)), split(c), split(_finite(b))
    episodes = _episodes_of_chunks(masks, batch_size, count, chunk, x.device)
    seen = (episodes.unsqueeze(-1) == episodes.unsqueeze(-2)).tril()  # (B, chunks, C, C)
    log_decay = (dt.double() * a.double()).nan_to_num(LOWEST_LOG_DECAY).clamp(min=LOWEST_LOG_DECAY)
    sums = seen.double() @ split(log_decay)  # (B, chunks, C, H): of dt A, since the chunk or the episode began

    within = _within_chunks(writes, reads, keys, sums, seen)
    before, state = _carry(writes, keys, sums, episodes, state)
    carried = _read_carried(reads, before, sums, episodes, split(taint))
    y = (carried + within).reshape(batch_size, count * chunk, heads, width)
    return y[:, :steps], state + taint[:, -1, None, None, None]


def _finite(values: th.Tensor) -> th.Tensor:
    return th.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)


def _taint(write: th.Tensor, dt: th.Tensor, b: th.Tensor, masks: th.Tensor | None) -> th.Tensor:
    """
    :return: What to add to the outputs, (B, T): NaN from the first step of an episode that wrote what is not finite up to
        the episode's end, else 0. It restores what :func:`_finite` took out, only where it belongs.
    """
    with th.no_grad():
        total = write.flatten(2).sum(-1) + b.flatten(2).sum(-1) + dt.sum(-1)
        bad = ~th.isfinite(total)
        time = th.arange(bad.shape[1], device=bad.device)
        last_bad = th.where(bad, time, -1).cummax(dim=1).values
        if masks is not None:
            start = th.where(masks > 0.5, 0, time).cummax(dim=1).values
            last_bad = th.where(last_bad < start, -1, last_bad)
        return th.where(last_bad >= 0, float("nan"), 0.0).to(write.dtype)


def _episodes_of_chunks(
    masks: th.Tensor | None, batch_size: int, count: int, chunk: int, device: th.device
) -> th.Tensor:
    """:return: How many resets there were since the chunk began, (B, chunks, C)."""
    if masks is None:
        return th.zeros(batch_size, count, chunk, dtype=th.int32, device=device)
    resets = F.pad((masks <= 0.5).int(), (0, count * chunk - masks.shape[1]))
    return resets.view(batch_size, count, chunk).cumsum(-1, dtype=th.int32)


def _within_chunks(
    writes: th.Tensor, reads: th.Tensor, keys: th.Tensor, sums: th.Tensor, seen: th.Tensor
) -> th.Tensor:
    """:return: What each step reads of its own and earlier writes of its chunk and episode, (B, chunks, C, H, P)."""
    batch_size, count, chunk, heads, _ = writes.shape
    groups = keys.shape[3]
    by_head = sums.transpose(-1, -2)
    exponent = (by_head.unsqueeze(-1) - by_head.unsqueeze(-2)).to(writes.dtype)  # (B, chunks, H, C, C)
    decay = th.exp(exponent.masked_fill(~seen.unsqueeze(2), float("-inf")))
    scores = reads.transpose(2, 3) @ keys.permute(0, 1, 3, 4, 2)  # (B, chunks, G, C, C)
    scores = scores.masked_fill(~seen.unsqueeze(2), 0.0)  # what is unseen may overflow
    weights = scores.unsqueeze(3) * decay.view(batch_size, count, groups, -1, chunk, chunk)
    return (weights.view(batch_size, count, heads, chunk, chunk) @ writes.transpose(2, 3)).transpose(2, 3)


def _carry(
    writes: th.Tensor, keys: th.Tensor, sums: th.Tensor, episodes: th.Tensor, state: th.Tensor
) -> tuple[th.Tensor, th.Tensor]:
    """:return: The states before each chunk (B, chunks, H, P, N) and after the last one (B, H, P, N)."""
    batch_size, count, chunk, heads, width = writes.shape
    groups, size = keys.shape[-2:]
    ending = (episodes == episodes[..., -1:]).unsqueeze(-1)
    to_end = th.exp((sums[:, :, -1:] - sums).to(writes.dtype).masked_fill(~ending, float("-inf")))
    kept = (writes * to_end.unsqueeze(-1)).view(batch_size, count, chunk, groups, -1)
    added = kept.permute(0, 1, 3, 4, 2) @ keys.transpose(2, 3)  # (B, chunks, G, H/G P, N)
    added = added.view(batch_size, count, heads, width, size)
    fade = th.exp(sums[:, :, -1]).to(writes.dtype)[..., None, None]  # (B, chunks, H, 1, 1)
    gone = (episodes[..., -1] > 0)[..., None, None, None]
    before = []
    for index in range(count):
        before.append(state)
        state = (fade[:, index] * state).masked_fill(gone[:, index], 0.0) + added[:, index]
    return th.stack(before, dim=1), state


def _read_carried(
    reads: th.Tensor, before: th.Tensor, sums: th.Tensor, episodes: th.Tensor, taint: th.Tensor
) -> th.Tensor:
    """:return: What each step reads of the state before its chunk, (B, chunks, C, H, P)."""
    batch_size, count, heads, width, size = before.shape
    chunk, groups = reads.shape[2:4]
    flat = before.view(batch_size, count, groups, -1, size)
    read = (reads.transpose(2, 3) @ flat.transpose(-1, -2)).transpose(2, 3)  # (B, chunks, C, G, H/G P)
    fade = th.exp(sums).to(reads.dtype)
    gone = (episodes > 0)[..., None, None]
    carried = (read.reshape(batch_size, count, chunk, heads, width) * fade.unsqueeze(-1)).masked_fill(gone, 0.0)
    return carried + taint[..., None, None]


