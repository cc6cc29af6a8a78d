"""
A GRU layer whose sequence form supports resets within a sequence at no cost.

Gated recurrent unit: Cho et al. 2014, https://arxiv.org/abs/1406.1078, in PyTorch's variant and parameter layout.
"""

from collections.abc import Callable
from typing import Any

import torch as th
from torch.autograd.function import once_differentiable

from sb3_cyborg.encoders.recurrent_layer import RecurrentLayer, Resets, find_resets, stack_layers
from sb3_cyborg.kernels import primitives as kernels
from sb3_cyborg.ops.linear import matmul_t
from sb3_cyborg.registry import ENCODERS
from sb3_cyborg.sequence_model import Logs, Serial, State


class _GRUSequence(th.autograd.Function):
    """
    A GRU layer over a sequence as one autograd node.

    The loops contain only operations that depend on the previous step. All others, and all weight gradients, are computed for
    the whole sequence at once. Tensors are time-major, so that a step is a contiguous slice.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: th.Tensor,
        h: th.Tensor,
        weight_ih: th.Tensor,
        weight_hh: th.Tensor,
        bias_ih: th.Tensor,
        bias_hh: th.Tensor,
        resets: Resets,
    ) -> th.Tensor:
        """
        :param x: Inputs, (T, B, D).
        :param h: State before the first step, (B, H).
        :param weight_ih: Input weights, (3 H, D); gates in the order reset, update, new.
        :param weight_hh: Recurrent weights, (3 H, H).
        :param bias_ih: (3 H,).
        :param bias_hh: (3 H,).
        :param resets: Steps and rows at which an episode starts.
        :return: Hidden states, (T, B, H).
        """
        (steps, batch_size, _), size = x.shape, h.shape[1]
        two = 2 * size
        bias = th.cat([bias_ih[:two] + bias_hh[:two], bias_ih[two:]])
        gates = matmul_t(x.flatten(0, 1), weight_ih, bias).view(steps, batch_size, -1)  # activated in place in the loop
        new_h = h.new_empty(steps, batch_size, size)  # recurrent part of `new`, before the reset gate
        states = h.new_empty(steps + 1, batch_size, size)
        states[0] = h
        weight_new, bias_new, weight_ru = weight_hh[two:].t(), bias_hh[two:], weight_hh[:two].t()
        all_ru, all_new = gates[..., :two].unbind(), gates[..., two:].unbind()
        all_reset, all_update = gates[..., :size].unbind(), gates[..., size:two].unbind()
        all_states, all_new_h = states.unbind(), new_h.unbind()
        for t in range(steps):
            previous = resets.apply(t, all_states[t])
            all_ru[t].addmm_(previous, weight_ru).sigmoid_()
            th.addmm(bias_new, previous, weight_new, out=all_new_h[t])
            new = all_new[t].addcmul_(all_reset[t], all_new_h[t]).tanh_()
            th.lerp(new, previous, all_update[t], out=all_states[t + 1])
        ctx.save_for_backward(x, gates, new_h, states, weight_ih, weight_hh)
        ctx.resets = resets
        return states[1:]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_outputs: th.Tensor) -> tuple[th.Tensor | None, ...]:
        x, gates, new_h, states, weight_ih, weight_hh = ctx.saved_tensors
        resets: Resets = ctx.resets
        steps, batch_size, size = new_h.shape
        previous = resets.apply_all(states[:-1])
        reset, update, new = gates.split(size, dim=-1)
        # d(pre-activation) = factor * d(h); the factors do not depend on the loop.
        factors = gates.new_empty(steps, batch_size, 3, size)
        factor_new = (1 - update) * (1 - new * new)
        th.mul(factor_new, reset, out=factors[:, :, 2])  # for the recurrent part of `new`
        th.mul(factors[:, :, 2], new_h, out=factors[:, :, 0]).mul_(1 - reset)
        th.mul(previous - new, update, out=factors[:, :, 1]).mul_(1 - update)
        grad_h = th.cat([grad_outputs.new_zeros(1, batch_size, size), grad_outputs])  # of all states, the first included
        grad_gates = gates.new_empty(steps, batch_size, 3 * size)
        all_grad_h, all_grad_gates, all_update = grad_h.unbind(), grad_gates.unbind(), update.unbind()
        all_columns, all_factors = grad_h.unsqueeze(2).unbind(), factors.unbind()
        by_gate = grad_gates.view(factors.shape).unbind()
        for t in range(steps - 1, -1, -1):
            th.mul(all_factors[t], all_columns[t + 1], out=by_gate[t])
            if t in resets.steps:
                carried = th.addmm(all_grad_h[t + 1] * all_update[t], all_grad_gates[t], weight_hh)
                all_grad_h[t].add_(resets.apply(t, carried))
            else:
                all_grad_h[t].addcmul_(all_grad_h[t + 1], all_update[t]).addmm_(all_grad_gates[t], weight_hh)
        flat = grad_gates.view(-1, 3 * size)
        grad_weight_hh, grad_bias_hh = matmul_t(flat.t(), previous.flatten(0, 1).t()), flat.sum(0)
        th.mul(factor_new, grad_h[1:], out=grad_gates[..., 2 * size :])  # from here on, of the input part of `new`
        grad_x = matmul_t(flat, weight_ih.t()).view(x.shape) if ctx.needs_input_grad[0] else None
        grad_weight_ih = matmul_t(flat.t(), x.flatten(0, 1).t())
        return grad_x, grad_h[0], grad_weight_ih, grad_weight_hh, flat.sum(0), grad_bias_hh, None


_gru_sequence: Callable[..., th.Tensor] = _GRUSequence.apply  # torch gives it no types


class _GRUKernel(th.autograd.Function):
    """:class:`_GRUSequence` whose loops over the steps are compiled kernels."""

    @staticmethod
    def forward(
        ctx: Any,
        x: th.Tensor,
        h: th.Tensor,
        weight_ih: th.Tensor,
        weight_hh: th.Tensor,
        bias_ih: th.Tensor,
        bias_hh: th.Tensor,
        keep: th.Tensor | None,
    ) -> th.Tensor:
        """
        Parameters and result are those of :class:`_GRUSequence`.

        :param keep: Keep-masks, bool, (T, B), contiguous, or ``None``.
        """
        steps, batch_size, _ = x.shape
        gates = matmul_t(x.flatten(0, 1), weight_ih, bias_ih).view(steps, batch_size, -1)
        states, new_h = kernels.gru_forward(gates, h, kernels.pack_gates(weight_hh, 3), bias_hh, keep)
        ctx.save_for_backward(x, gates, new_h, states, weight_ih, weight_hh, keep)
        return states[1:]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_outputs: th.Tensor) -> tuple[th.Tensor | None, ...]:
        x, gates, new_h, states, weight_ih, weight_hh, keep = ctx.saved_tensors
        size = new_h.shape[2]
        grad_h, grad_gates, grad_new = kernels.gru_backward(
            gates, states, new_h, kernels.pack(weight_hh.t()), grad_outputs, keep
        )
        previous = states[:-1] if keep is None else th.where(keep.unsqueeze(-1), states[:-1], 0.0)
        flat = grad_gates.view(-1, 3 * size)
        grad_weight_hh, grad_bias_hh = matmul_t(flat.t(), previous.flatten(0, 1).t()), flat.sum(0)
        grad_gates[..., 2 * size :] = grad_new  # from here on, of the input part of `new`
        grad_x = matmul_t(flat, weight_ih.t()).view(x.shape) if ctx.needs_input_grad[0] else None
        grad_weight_ih = matmul_t(flat.t(), x.flatten(0, 1).t())
        return grad_x, grad_h, grad_weight_ih, grad_weight_hh, flat.sum(0), grad_bias_hh, None


_gru_kernel: Callable[..., th.Tensor] = _GRUKernel.apply


class GRU(RecurrentLayer):
    """
    One GRU layer. Its parameters have the names (without the suffix ``_l0``), shapes and meaning of ``torch.nn.GRU``'s.

    State: ``h`` (B, hidden_dim).

    :param input_dim: Features of the input, >= 1.
    :param hidden_dim: Features of state and output, >= 1.
    :raises ValueError: for sizes below 1.
    """

    num_gates = 3
    leaves = ("h",)

    def forward_step(self, x: th.Tensor, state: State, mask: th.Tensor | None = None) -> tuple[th.Tensor, State, Logs]:
        if kernels.usable_without_gradient(x, state["h"], self.weight_hh):
            gates = kernels.affine(x, self._packed_ih(self.weight_ih), 3 * self.output_dim, self.bias_ih)
            keep, packed = None if mask is None else mask.unsqueeze(0), self._packed_hh(self.weight_hh)
            states, _ = kernels.gru_forward(gates.unsqueeze(0), state["h"], packed, self.bias_hh, keep)
            return states[1], {"h": states[1]}, {}
        if mask is not None:
            state = self.reset_states(state, mask)
        h = th.gru_cell(x, state["h"], self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)
        return h, {"h": h}, {}

    def forward_sequence(self, x: th.Tensor, state: State, masks: th.Tensor | None = None) -> tuple[th.Tensor, State, Logs]:
        weights = (self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)
        by_step = x.transpose(0, 1).contiguous()
        if kernels.usable(x, state["h"], self.weight_hh):
            outputs = _gru_kernel(by_step, state["h"], *weights, None if masks is None else masks.t().contiguous())
        else:
            outputs = _gru_sequence(by_step, state["h"], *weights, find_resets(masks))
        return outputs.transpose(0, 1), {"h": outputs[-1]}, {}


@ENCODERS.register("gru")
class GRUCore(Serial):
    """
    Layers of :class:`GRU` in series.

    :param hidden_dim: Features of input and output, >= 1.
    :param num_layers: Number of layers, >= 1.
    :raises ValueError: for sizes below 1.
    """

    def __init__(self, hidden_dim: int, num_layers: int = 1) -> None:
        super().__init__(residual=False, **stack_layers(GRU, hidden_dim, num_layers))
