"""
An LSTM layer whose sequence form supports resets within a sequence at almost no cost.

Long short-term memory: Hochreiter & Schmidhuber 1997, with forget gate (Gers et al. 2000), in PyTorch's variant and
parameter layout.
"""

import torch as th

from sb3_cyborg.encoders.recurrent_layer import RecurrentLayer, stack_layers
from sb3_cyborg.registry import ENCODERS
from sb3_cyborg.sequence_model import Logs, SequenceModel, Serial, State, may_branch

CLOSED_GATE_LOGIT = -1e4
"""Pre-activation of a closed gate: its sigmoid is 0. With ``-CLOSED_GATE_LOGIT`` the gate is open: its sigmoid is 1."""


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
        if mask is not None:
            state = self.reset_states(state, mask)
        states = (state["h"], state["c"])
        h, c = th.lstm_cell(x, states, self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)
        return h, {"h": h, "c": c}, {}

    def forward_sequence(self, x: th.Tensor, state: State, masks: th.Tensor | None = None) -> tuple[th.Tensor, State, Logs]:
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
