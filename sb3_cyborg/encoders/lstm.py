"""
An LSTM layer whose sequence form supports resets within a sequence at almost no cost.

Long short-term memory: Hochreiter & Schmidhuber 1997, with forget gate (Gers et al. 2000), in PyTorch's variant and
parameter layout.
"""

from collections.abc import Callable
from typing import Any

import torch as th
from torch.autograd.function import once_differentiable

from sb3_cyborg.encoders.recurrent_layer import RecurrentLayer, stack_layers
from sb3_cyborg.kernels import primitives as kernels
from sb3_cyborg.ops.linear import matmul_t
from sb3_cyborg.registry import ENCODERS
from sb3_cyborg.sequence_model import Logs, SequenceModel, Serial, State, may_branch

CLOSED_GATE_LOGIT = -1e4
"""Pre-activation of a closed gate: its sigmoid is 0. With ``-CLOSED_GATE_LOGIT`` the gate is open: its sigmoid is 1."""


class _LSTMKernel(th.autograd.Function):
    """The layer over a sequence, as one autograd node; its loops over the steps are compiled kernels."""

    @staticmethod
    def forward(
        ctx: Any,
        x: th.Tensor,
        h: th.Tensor,
        c: th.Tensor,
        weight_ih: th.Tensor,
        weight_hh: th.Tensor,
        bias_ih: th.Tensor,
        bias_hh: th.Tensor,
        keep: th.Tensor | None,
    ) -> tuple[th.Tensor, th.Tensor]:
        """
        :param x: Inputs, (T, B, D), contiguous.
        :param h: First hidden state, (B, H).
        :param c: First cell state, (B, H).
        :param weight_ih: Input weights, (4 H, D); gates in the order input, forget, cell, output.
        :param weight_hh: Recurrent weights, (4 H, H).
        :param bias_ih: (4 H,).
        :param bias_hh: (4 H,).
        :param keep: Keep-masks, bool, (T, B), contiguous, or ``None``.
        :return: Hidden states (T, B, H) and the last cell state (B, H).
        """
        gates = matmul_t(x.flatten(0, 1), weight_ih, bias_ih).view(*x.shape[:2], -1)
        states, cells = kernels.lstm_forward(gates, h, c, kernels.pack_gates(weight_hh, 4), bias_hh, keep)
        ctx.save_for_backward(x, gates, states, cells, weight_ih, weight_hh, keep)
        ctx.set_materialize_grads(False)
        return states[1:], cells[-1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: th.Tensor | None, grad_cell: th.Tensor | None) -> tuple[th.Tensor | None, ...]:
        x, gates, states, cells, weight_ih, weight_hh, keep = ctx.saved_tensors
        grad = th.zeros_like(states[1:]) if grad is None else grad
        grad_cell = th.zeros_like(cells[0]) if grad_cell is None else grad_cell
        grad_h, grad_c, grad_gates = kernels.lstm_backward(gates, cells, kernels.pack(weight_hh.t()), grad, grad_cell, keep)
        previous = states[:-1] if keep is None else th.where(keep.unsqueeze(-1), states[:-1], 0.0)
        flat = grad_gates.view(-1, gates.shape[-1])
        grad_weight_hh, grad_bias = matmul_t(flat.t(), previous.flatten(0, 1).t()), flat.sum(0)
        grad_x = matmul_t(flat, weight_ih.t()).view(x.shape) if ctx.needs_input_grad[0] else None
        grad_weight_ih = matmul_t(flat.t(), x.flatten(0, 1).t())
        return grad_x, grad_h, grad_c, grad_weight_ih, grad_weight_hh, grad_bias, grad_bias, None


_lstm_kernel: Callable[..., tuple[th.Tensor, th.Tensor]] = _LSTMKernel.apply  # torch gives it no types


class LSTM(RecurrentLayer):
    """
    One LSTM layer. Its parameters have the names (without the suffix ``_l0``), shapes and meaning of ``torch.nn.LSTM``'s.

    A sequence is computed by PyTorch's kernel (oneDNN on a CPU, cuDNN on a GPU), which does not support resets. A reset is
    therefore an inserted step: two additional inputs, *forget* and *hold*, control the gates, and a *forget* step sets the
    state to zeros. Rows with fewer resets than others end with *hold* steps, which keep the cell state.

    State: ``h`` and ``c`` (B, hidden_dim).

    :param input_dim: Features of the input, >= 1.
    :param hidden_dim: Features of each state and of the output, >= 1.
    :raises ValueError: for sizes below 1.
    """

    num_gates = 4
    leaves = ("h", "c")

    def __init__(self, input_dim: int, hidden_dim: int) -> None:
        super().__init__(input_dim, hidden_dim)
        with th.no_grad():  # forget gate bias of 1 (Jozefowicz et al. 2015)
            self.bias_ih[hidden_dim : 2 * hidden_dim] = 1.0

    def forward_step(self, x: th.Tensor, state: State, mask: th.Tensor | None = None) -> tuple[th.Tensor, State, Logs]:
        if kernels.usable_without_gradient(x, state["h"], self.weight_hh):
            gates = kernels.affine(x, self._packed_ih(self.weight_ih), 4 * self.output_dim, self.bias_ih)
            keep = None if mask is None else mask.unsqueeze(0)
            recurrent = self._packed_hh(self.weight_hh), self.bias_hh
            h_states, c_states = kernels.lstm_forward(gates.unsqueeze(0), state["h"], state["c"], *recurrent, keep)
            return h_states[1], {"h": h_states[1], "c": c_states[1]}, {}
        if mask is not None:
            state = self.reset_states(state, mask)
        states = (state["h"], state["c"])
        h, c = th.lstm_cell(x, states, self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)
        return h, {"h": h, "c": c}, {}

    def forward_sequence(self, x: th.Tensor, state: State, masks: th.Tensor | None = None) -> tuple[th.Tensor, State, Logs]:
        if kernels.usable(x, state["h"], self.weight_hh):
            keep = None if masks is None else masks.t().contiguous()
            weights = (self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)
            outputs, c = _lstm_kernel(x.transpose(0, 1).contiguous(), state["h"], state["c"], *weights, keep)
            return outputs.transpose(0, 1), {"h": outputs[-1], "c": c}, {}
        if masks is not None and not may_branch(x.device):
            return SequenceModel.forward_sequence(self, x, state, masks)
        first = state if masks is None else self.reset_states(state, masks[:, 0])
        resets = None if masks is None else ~masks[:, 1:].t()  # after the first step, (T - 1, B)
        if resets is None or not bool(resets.any()):
            outputs, c = self._run(x.transpose(0, 1), first, self.weight_ih)
            return outputs.transpose(0, 1), {"h": outputs[-1], "c": c}, {}
        outputs, c = self._run_with_resets(x.transpose(0, 1), first, resets)
        if not bool(outputs.sum().isfinite()):  # a closed gate multiplies by 0, and 0 * NaN is NaN
            return SequenceModel.forward_sequence(self, x, state, masks)
        return outputs.transpose(0, 1), {"h": outputs[-1], "c": c}, {}

    def _run(self, x: th.Tensor, first: State, weight_ih: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """:return: Hidden states (T, B, H) and the last cell state (B, H) for inputs (T, B, D)."""
        states = [first[name].unsqueeze(0) for name in self.leaves]
        weights = [weight_ih, self.weight_hh, self.bias_ih, self.bias_hh]
        outputs, _, c = th.lstm(x, states, weights, True, 1, 0.0, self.training, False, False)
        return outputs, c[0]

    def _run_with_resets(self, x: th.Tensor, first: State, resets: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """:meth:`_run` with a *forget* step inserted before each reset; ``resets`` (T - 1, B) begins at the second step."""
        steps, batch_size, size = x.shape
        shift = th.cat([resets.new_zeros(1, batch_size, dtype=th.int64), resets.cumsum(0)])
        longer = steps + int(shift[-1].max())
        rows = th.arange(batch_size, device=x.device)
        time = th.arange(steps, device=x.device).unsqueeze(1)
        place = ((time + shift) * batch_size + rows).flatten()  # position of each input in the longer sequence
        forget = ((time[1:] + shift[1:] - 1) * batch_size + rows)[resets]  # position of each inserted step
        controls = x.new_zeros(longer * batch_size, 2)  # forget, hold
        controls[:, 1] = 1.0
        controls[place] = 0.0
        controls[forget] = x.new_tensor([1.0, 0.0])
        inputs = x.new_zeros(longer * batch_size, size).index_copy(0, place, x.reshape(-1, size))
        weight_ih = th.cat([self.weight_ih, self._control_weights()], dim=1)
        outputs, c = self._run(th.cat([inputs, controls], 1).view(longer, batch_size, -1), first, weight_ih)
        return outputs.flatten(0, 1).index_select(0, place).view(steps, batch_size, -1), c

    def _control_weights(self) -> th.Tensor:
        """:return: Weights from the controls (forget, hold) to the gates, (4 H, 2)."""
        write, forget, out = 0, 1, 3
        weights = self.weight_ih.new_zeros(4, self.output_dim, 2)
        weights[[write, forget, out], :, 0] = CLOSED_GATE_LOGIT
        weights[write, :, 1] = CLOSED_GATE_LOGIT
        weights[forget, :, 1] = -CLOSED_GATE_LOGIT
        return weights.flatten(0, 1)


@ENCODERS.register("lstm")
class LSTMCore(Serial):
    """
    Layers of :class:`LSTM` in series.

    :param hidden_dim: Features of input and output, >= 1.
    :param num_layers: Number of layers, >= 1.
    :raises ValueError: for sizes below 1.
    """

    def __init__(self, hidden_dim: int, num_layers: int = 1) -> None:
        super().__init__(residual=False, **stack_layers(LSTM, hidden_dim, num_layers))
