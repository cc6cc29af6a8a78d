"""
An LSTM layer whose sequence form resets in mid-sequence at no cost.

Long short-term memory: Hochreiter & Schmidhuber 1997, with forget gate (Gers et al. 2000), in PyTorch's variant and
parameter layout.
"""

from collections.abc import Callable
from typing import Any

import torch as th
from torch import nn
from torch.autograd.function import once_differentiable

from sb3_cyborg.encoders.recurrent_layer import RecurrentLayer, time_major_keep
from sb3_cyborg.sequence_model import Logs, State


class _LSTMSequence(th.autograd.Function):
    """The recurrence alone, one autograd node for the whole sequence; see ``_GRUSequence`` for the plan."""

    @staticmethod
    def forward(
        ctx: Any, gates_x: th.Tensor, h: th.Tensor, c: th.Tensor, weight: th.Tensor, keep: th.Tensor | None
    ) -> tuple[th.Tensor, th.Tensor]:
        """
        :param gates_x: Input part of the gates (input, forget, cell, output) with both biases, (T, B, 4 H).
        :param h: First hidden state, (B, H).
        :param c: First cell state, (B, H).
        :param weight: Recurrent weights, (4 H, H).
        :param keep: Boolean keep-mask, (T, B, 1), or ``None``.
        :return: Hidden states (T, B, H) and the last cell state (B, H).
        """
        steps, batch_size, width = gates_x.shape
        size = width // 4
        outputs = gates_x.new_empty(steps, batch_size, size)
        previous_h, previous_c = th.empty_like(outputs), th.empty_like(outputs)
        tanh_c = th.empty_like(outputs)
        gates = gates_x.new_empty(steps, batch_size, width)
        weight_t = weight.t()
        zero = gates_x.new_zeros(())
        for t in range(steps):
            previous_h[t] = h if keep is None else th.where(keep[t], h, zero)
            previous_c[t] = c if keep is None else th.where(keep[t], c, zero)
            gate = th.addmm(gates_x[t], previous_h[t], weight_t, out=gates[t])
            gate[:, : 2 * size].sigmoid_()
            gate[:, 2 * size : 3 * size].tanh_()
            gate[:, 3 * size :].sigmoid_()
            write, forget, new, out = gate.split(size, dim=-1)
            c = th.addcmul(forget * previous_c[t], write, new)
            h = th.mul(out, th.tanh(c, out=tanh_c[t]), out=outputs[t])
        ctx.save_for_backward(gates, tanh_c, previous_h, previous_c, weight, keep)
        return outputs, c

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_outputs: th.Tensor, grad_c: th.Tensor) -> tuple[th.Tensor | None, ...]:
        gates, tanh_c, previous_h, previous_c, weight, keep = ctx.saved_tensors
        steps, batch_size, size = previous_h.shape
        write, forget, new, out = gates.split(size, dim=-1)
        # d(pre-activation) = factor * d(c) for the first three gates, factor * d(h) for the last
        factors = gates.new_empty(steps, batch_size, 3, size)
        factors[:, :, 0] = new * write * (1 - write)
        factors[:, :, 1] = previous_c * forget * (1 - forget)
        factors[:, :, 2] = write * (1 - new * new)
        factor_out = tanh_c * out * (1 - out)
        through_tanh = out * (1 - tanh_c * tanh_c)
        grad_gates = gates.new_empty(steps, batch_size, 4 * size)
        carried_h = gates.new_zeros(batch_size, size)
        carried_c = grad_c
        zero = gates.new_zeros(())
        for t in range(steps - 1, -1, -1):
            grad_h = grad_outputs[t] + carried_h
            step_c = th.addcmul(carried_c, grad_h, through_tanh[t])
            th.mul(factors[t], step_c.unsqueeze(1), out=grad_gates[t, :, : 3 * size].view(batch_size, 3, size))
            th.mul(factor_out[t], grad_h, out=grad_gates[t, :, 3 * size :])
            carried_h = grad_gates[t] @ weight
            carried_c = step_c * forget[t]
            if keep is not None:
                carried_h = th.where(keep[t], carried_h, zero)
                carried_c = th.where(keep[t], carried_c, zero)
        grad_weight = grad_gates.view(-1, 4 * size).t() @ previous_h.view(-1, size)
        return grad_gates, carried_h, carried_c, grad_weight, None


_lstm_sequence: Callable[..., tuple[th.Tensor, th.Tensor]] = _LSTMSequence.apply  # torch gives it no types


class LSTM(RecurrentLayer):
    """
    One LSTM layer. Its parameters have the names, shapes and meaning of ``torch.nn.LSTM``'s, without the ``_l0``.

    :param input_dim: Features in.
    :param hidden_dim: Features of either state and out.
    """

    num_gates = 4
    leaves = ("h", "c")

    def __init__(self, input_dim: int, hidden_dim: int) -> None:
        super().__init__(input_dim, hidden_dim)
        with th.no_grad():  # Jozefowicz et al. 2015: begin by remembering
            self.bias_ih[hidden_dim : 2 * hidden_dim] = 1.0

    def forward_step(self, x: th.Tensor, state: State, mask: th.Tensor | None = None) -> tuple[th.Tensor, State, Logs]:
        if mask is not None:
            state = self.reset_states(state, mask)
        states = (state["h"], state["c"])
        h, c = th.lstm_cell(x, states, self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)
        return h, {"h": h, "c": c}, {}

    def forward_sequence(self, x: th.Tensor, state: State, masks: th.Tensor | None = None) -> tuple[th.Tensor, State, Logs]:
        gates_x = nn.functional.linear(x.transpose(0, 1), self.weight_ih, self.bias_ih + self.bias_hh)
        outputs, c = _lstm_sequence(gates_x, state["h"], state["c"], self.weight_hh, time_major_keep(masks))
        return outputs.transpose(0, 1), {"h": outputs[-1], "c": c}, {}
