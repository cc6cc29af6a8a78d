"""
A GRU layer whose sequence form resets in mid-sequence at no cost.

Gated recurrent unit: Cho et al. 2014, https://arxiv.org/abs/1406.1078, in PyTorch's variant and parameter layout.
"""

from collections.abc import Callable
from typing import Any

import torch as th
from torch import nn
from torch.autograd.function import once_differentiable

from sb3_cyborg.encoders.recurrent_layer import RecurrentLayer, time_major_keep
from sb3_cyborg.sequence_model import Logs, State


class _GRUSequence(th.autograd.Function):
    """
    The recurrence alone, one autograd node for the whole sequence.

    The loops hold only what depends on the step before; all else, and all weight gradients, is one operation over
    the whole sequence. Tensors are time-major, so that a step is a contiguous slice.
    """

    @staticmethod
    def forward(
        ctx: Any, gates_x: th.Tensor, h: th.Tensor, weight: th.Tensor, bias: th.Tensor, keep: th.Tensor | None
    ) -> th.Tensor:
        """
        :param gates_x: Input part of the gates (reset, update, new), (T, B, 3 H).
        :param h: First state, (B, H).
        :param weight: Recurrent weights, (3 H, H).
        :param bias: Recurrent bias, (3 H,).
        :param keep: Boolean keep-mask, (T, B, 1), or ``None``.
        :return: Hidden states, (T, B, H).
        """
        steps, batch_size, width = gates_x.shape
        size = width // 3
        outputs = gates_x.new_empty(steps, batch_size, size)
        previous = gates_x.new_empty(steps, batch_size, size)  # what each step really continued from
        gates = gates_x.new_empty(steps, batch_size, width)  # reset, update, new (activated)
        new_h = gates_x.new_empty(steps, batch_size, size)  # recurrent part of `new`, before the reset gate
        weight_t = weight.t()
        zero = gates_x.new_zeros(())
        for t in range(steps):
            previous[t] = h if keep is None else th.where(keep[t], h, zero)
            gates_h = th.addmm(bias, previous[t], weight_t)
            th.add(gates_x[t, :, : 2 * size], gates_h[:, : 2 * size], out=gates[t, :, : 2 * size]).sigmoid_()
            reset, update = gates[t, :, :size], gates[t, :, size : 2 * size]
            new_h[t] = gates_h[:, 2 * size :]
            new = th.addcmul(gates_x[t, :, 2 * size :], reset, new_h[t]).tanh_()
            gates[t, :, 2 * size :] = new
            h = th.lerp(new, previous[t], update, out=outputs[t])
        ctx.save_for_backward(gates, new_h, previous, weight, keep)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_outputs: th.Tensor) -> tuple[th.Tensor | None, ...]:
        gates, new_h, previous, weight, keep = ctx.saved_tensors
        steps, batch_size, size = previous.shape
        reset, update, new = gates.split(size, dim=-1)
        # d(pre-activation) = factor * d(h), the factors known before the loop
        factors = gates.new_empty(steps, batch_size, 3, size)
        factor_new = (1 - update) * (1 - new * new)
        factors[:, :, 0] = factor_new * new_h * reset * (1 - reset)
        factors[:, :, 1] = (previous - new) * update * (1 - update)
        factors[:, :, 2] = factor_new * reset  # of the recurrent part of `new`
        grad_h = gates.new_empty(steps, batch_size, size)
        grad_gates_h = gates.new_empty(steps, batch_size, 3 * size)
        carried = gates.new_zeros(batch_size, size)
        zero = gates.new_zeros(())
        for t in range(steps - 1, -1, -1):
            step_grad = th.add(grad_outputs[t], carried, out=grad_h[t])
            th.mul(factors[t], step_grad.unsqueeze(1), out=grad_gates_h[t].view(batch_size, 3, size))
            carried = th.addmm(step_grad * update[t], grad_gates_h[t], weight)
            if keep is not None:
                carried = th.where(keep[t], carried, zero)
        grad_gates_x = grad_gates_h.clone()
        th.mul(factor_new, grad_h, out=grad_gates_x[:, :, 2 * size :])
        flat = grad_gates_h.view(-1, 3 * size)
        grad_weight = flat.t() @ previous.view(-1, size)
        return grad_gates_x, carried, grad_weight, flat.sum(0), None


_gru_sequence: Callable[..., th.Tensor] = _GRUSequence.apply  # torch gives it no types


class GRU(RecurrentLayer):
    """
    One GRU layer. Its parameters have the names, shapes and meaning of ``torch.nn.GRU``'s, without the ``_l0``.

    :param input_dim: Features in.
    :param hidden_dim: Features of the state and out.
    """

    num_gates = 3
    leaves = ("h",)

    def forward_step(self, x: th.Tensor, state: State, mask: th.Tensor | None = None) -> tuple[th.Tensor, State, Logs]:
        if mask is not None:
            state = self.reset_states(state, mask)
        h = th.gru_cell(x, state["h"], self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)
        return h, {"h": h}, {}

    def forward_sequence(self, x: th.Tensor, state: State, masks: th.Tensor | None = None) -> tuple[th.Tensor, State, Logs]:
        gates_x = nn.functional.linear(x.transpose(0, 1), self.weight_ih, self.bias_ih)
        outputs = _gru_sequence(gates_x, state["h"], self.weight_hh, self.bias_hh, time_major_keep(masks))
        return outputs.transpose(0, 1), {"h": outputs[-1]}, {}
