"""
MinGRU layers: a recurrence whose gates depend on the input alone, so that a sequence is a scan.

Feng et al. 2024, "Were RNNs All We Needed?", https://arxiv.org/abs/2410.01201. With a gate ``z_t = sigmoid(k_t)`` and a
candidate ``g(v_t)``, both linear in the input, ``h_t = (1 - z_t) h_{t-1} + z_t g(v_t)``.

The paper computes the scan with logarithms, because its textbook form divides by products of many factors. The form here forms
products of factors in [0, 1] alone, so it needs no logarithms, starts from any state, and rounds like the steps.
"""

from collections.abc import Callable
from typing import Any

import torch as th
from torch import nn
from torch.autograd.function import once_differentiable

from sb3_cyborg.checks import check_positive, divisors
from sb3_cyborg.encoders.recurrent_layer import Resets, find_resets
from sb3_cyborg.kernels import primitives as kernels
from sb3_cyborg.ops.linear import Linear
from sb3_cyborg.ops.rms_norm import RMSNorm
from sb3_cyborg.registry import ENCODERS, with_options_of
from sb3_cyborg.sequence_model import Logs, SequenceModel, Serial, State, may_branch


def gate_and_candidate(projected: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
    """
    :param projected: ``v`` and ``k``, (..., 2 D).
    :return: The gate ``sigmoid(k)`` and the candidate ``g(v)``, (..., D) each. The paper's g is ``v + 1/2`` from 0 on and
        ``sigmoid(v)`` below, which is the larger of the two everywhere. It is positive.
    """
    v, _ = projected.chunk(2, dim=-1)
    low, gate = projected.sigmoid().chunk(2, dim=-1)
    return gate, th.maximum(v + 0.5, low)


def linear_scan(decay: th.Tensor, added: th.Tensor, first: th.Tensor, masks: th.Tensor | None) -> th.Tensor:
    """
    The recurrence ``h_t = decay_t h_{t-1} + added_t`` over a sequence, without gradient.

    The sequence is cut into chunks. One loop runs over the steps of all chunks at once, each from a state of zeros. A second
    loop carries the states over the chunks. On a CPU, where a loop costs little and passes over memory much, there is one
    chunk; elsewhere there are about ``sqrt(T)``.

    :param decay: In [0, 1], (B, T, D), contiguous.
    :param added: (B, T, D), contiguous.
    :param first: State before the first step, (B, D).
    :param masks: Keep-masks, bool, (B, T), or ``None``; a reset sets the state to zeros before the step.
    :return: The states after each step, (B, T, D).
    """
    batch, steps, size = decay.shape
    length = steps if may_branch(decay.device) else next(d for d in divisors(steps) if d * d >= steps)
    rows = batch * (steps // length)
    resets = find_resets(None if masks is None else masks.reshape(rows, length))
    states = th.empty_like(added)
    by_step = [tensor.view(rows, length, size).unbind(1) for tensor in (decay, added, states)]
    state = first if rows == batch else first.new_zeros(rows, size)
    for t, (a, b, out) in enumerate(zip(*by_step, strict=True)):
        state = th.addcmul(b, a, resets.apply(t, state), out=out)
    return states if rows == batch else _carry(decay, states, first, resets, length)


def _carry(decay: th.Tensor, states: th.Tensor, first: th.Tensor, resets: Resets, length: int) -> th.Tensor:
    """:return: ``states`` (B, T, D) of chunks that started from zeros, with the states before the chunks added."""
    batch, _, size = decay.shape
    chunks = (batch, -1, length, size)
    share = decay.view(chunks).cumprod(2)  # of the state before its chunk that is left after each step
    within = states.view(chunks)
    if resets.keep is not None:
        same = resets.keep.squeeze(-1).t().reshape(batch, -1, length, 1).cumprod(2).bool()  # no reset in the chunk so far
        share = th.where(same, share, 0.0)
    before = [first]
    for left, last in zip(share[:, :, -1].unbind(1), within[:, :, -1].unbind(1), strict=True):
        # Where nothing is left, a NaN of an earlier episode must not survive as 0 * NaN.
        before.append(th.addcmul(last, left, th.where(left > 0, before[-1], 0.0)))
    carried = th.stack(before[:-1], dim=1).unsqueeze(2)
    return th.addcmul(within, share, th.where(share > 0, carried, 0.0)).view(states.shape)


class _MinGRUSequence(th.autograd.Function):
    """The recurrence over a sequence, with its gates, as one autograd node."""

    @staticmethod
    def forward(ctx: Any, projected: th.Tensor, first: th.Tensor, masks: th.Tensor | None) -> th.Tensor:
        """
        :param projected: ``v`` and ``k``, (B, T, 2 D).
        :param first: State before the first step, (B, D).
        :param masks: Keep-masks, bool, (B, T), or ``None``.
        :return: States, (B, T, D).
        """
        gate, new = gate_and_candidate(projected)
        states = linear_scan(1 - gate, gate * new, first, masks)
        ctx.save_for_backward(gate, new, states, first, masks)
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: th.Tensor) -> tuple[th.Tensor | None, ...]:
        gate, new, states, first, masks = ctx.saved_tensors
        previous = th.cat([first.unsqueeze(1), states[:, :-1]], dim=1)
        keep = None
        if masks is not None:
            previous = th.where(masks.unsqueeze(-1), previous, 0.0)
            # Backwards in time, step t + 1 passes a gradient on to step t unless it resets.
            keep = th.cat([masks[:, 1:], masks.new_ones(len(masks), 1)], dim=1).flip(1)
        decay = 1 - gate
        later = th.cat([decay[:, 1:], th.zeros_like(decay[:, :1])], dim=1).flip(1)
        total = linear_scan(later, grad.flip(1).contiguous(), th.zeros_like(first), keep).flip(1)  # of the states
        grad_first = decay[:, 0] * total[:, 0]
        if masks is not None:
            grad_first = th.where(masks[:, :1], grad_first, 0.0)
        grad_new = total * gate
        grad_projected = th.cat(
            [
                th.where(new > 0.5, grad_new, grad_new * new * (1 - new)),  # the slope of g is 1 for v > 0
                (new - previous).mul_(grad_new).mul_(decay),
            ],
            dim=-1,
        )
        return grad_projected, grad_first, None


_mingru_sequence: Callable[..., th.Tensor] = _MinGRUSequence.apply  # torch gives it no types


class MinGRU(SequenceModel):
    """
    A pre-norm residual minGRU layer: ``x + W_out h``, where ``h`` is the recurrence on linear functions of ``RMSNorm(x)``.

    The layer is that of https://github.com/lucidrains/minGRU-pytorch without its feed-forward part. As there, no product has a
    bias, and with ``expand=1`` there is no ``W_out``.

    State: ``h`` (B, expand * hidden_dim), positive, zeros at the start.

    :param hidden_dim: Features of input and output, >= 1.
    :param expand: Ratio of the features of the state to ``hidden_dim``, >= 1; the paper's expansion factor.
    :raises ValueError: for sizes below 1.
    """

    def __init__(self, hidden_dim: int, *, expand: int = 1) -> None:
        super().__init__()
        check_positive(hidden_dim=hidden_dim, expand=expand)
        self.input_dim = self.output_dim = hidden_dim
        self.size = expand * hidden_dim
        self.norm = RMSNorm(hidden_dim)
        self.in_proj = Linear(hidden_dim, 2 * self.size, bias=False)  # v, k
        self.out_proj = nn.Identity() if expand == 1 else Linear(self.size, hidden_dim, bias=False)
        self._packed = kernels.Packed(kernels.pack)

    def get_initial_state(self, batch_size: int, device: th.device | str | None = None) -> State:
        return {"h": self._zeros(batch_size, self.size, device=device)}

    def forward_step(self, x: th.Tensor, state: State, mask: th.Tensor | None = None) -> tuple[th.Tensor, State, Logs]:
        if mask is not None:
            state = self.reset_states(state, mask)
        gate, new = gate_and_candidate(self._project(x))
        h = th.lerp(state["h"], new, gate)
        return x + self.out_proj(h), {"h": h}, {}

    def forward_sequence(self, x: th.Tensor, state: State, masks: th.Tensor | None = None) -> tuple[th.Tensor, State, Logs]:
        states = _mingru_sequence(self._project(x), state["h"], masks)
        return x + self.out_proj(states), {"h": states[:, -1]}, {}

    def _project(self, x: th.Tensor) -> th.Tensor:
        """:return: ``v`` and ``k`` (..., 2 D) of inputs (..., hidden_dim)."""
        weight = self.in_proj.weight
        if kernels.usable_without_gradient(x, weight):
            normed = kernels.rms_norm(x, self.norm.eps).mul_(self.norm.weight)
            return kernels.affine(normed, self._packed(weight), len(weight), None)
        projected: th.Tensor = self.in_proj(self.norm(x))
        return projected


@ENCODERS.register("mingru")
@with_options_of(MinGRU)
class MinGRUCore(Serial):
    """
    Layers of :class:`MinGRU` in series.

    State: ``layer<i>.h`` for each layer, see :class:`MinGRU`.

    :param hidden_dim: Features of input and output, >= 1.
    :param num_layers: Number of layers, >= 1.
    :param options: Options of :class:`MinGRU`.
    :raises ValueError: for sizes below 1.
    """

    def __init__(self, hidden_dim: int, num_layers: int = 1, **options: Any) -> None:
        check_positive(hidden_dim=hidden_dim, num_layers=num_layers)
        super().__init__(residual=False, **{f"layer{index}": MinGRU(hidden_dim, **options) for index in range(num_layers)})
