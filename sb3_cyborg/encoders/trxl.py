"""
Transformer-XL (Dai et al. 2019, https://arxiv.org/abs/1901.02860) with the layers of GTrXL (Parisotto et al. 2019,
"Stabilizing Transformers for Reinforcement Learning", https://arxiv.org/abs/1910.06764): normalization in front of each part
of a layer, and gates instead of residual connections.
"""

from typing import Any

import torch as th
from torch import nn
from torch.nn import functional as F

from sb3_cyborg.checks import check_divides, check_positive
from sb3_cyborg.encoders.gru import GRU
from sb3_cyborg.memories.ring import RingMemory
from sb3_cyborg.ops.linear import FusedSequential, Linear
from sb3_cyborg.registry import ENCODERS, with_options_of
from sb3_cyborg.sequence_model import Logs, SequenceModel, Serial, State

GATE_BIAS = 2.0
"""Initial bias of the gates, the paper's: a layer then keeps 0.88 of its input, so that the agent begins without attention."""


class Gate(GRU):
    """
    A gate of GTrXL: a GRU cell in which the input of a part of a layer is the state, and the part's result is the input.

    The cell is PyTorch's, which applies the reset gate after the product; the paper's applies it before.

    :param features: Features of both, >= 1.
    """

    def __init__(self, features: int) -> None:
        super().__init__(features, features)
        with th.no_grad():
            self.bias_ih[features : 2 * features] = GATE_BIAS  # of the update gate, which keeps the state

    def forward(self, x: th.Tensor, result: th.Tensor) -> th.Tensor:
        """
        :param x: Input of the part, of a step (B, features) or a sequence (B, T, features).
        :param result: Result of the part, of the same shape.
        :return: The gated sum of both, of the same shape.
        """
        if x.dim() == 2:
            gated, _, _ = self.forward_step(result, {"h": x})
            return gated
        # Each step of the sequence is a row of its own, with a sequence of one step.
        gated, _, _ = self.forward_sequence(result.reshape(-1, 1, self.input_dim), {"h": x.reshape(-1, self.input_dim)})
        return gated.reshape(x.shape)


class TrXLLayer(SequenceModel):
    """
    One layer: attention to earlier inputs, then a feed-forward network, each between a normalization and a gate.

    The attention is that of the memory ``ring``, over the last ``window`` inputs of the layer. Keys and values are functions
    of the normalized inputs, and positions are relative. A step reads the steps *before* it; its own input reaches the gate.

    State: that of :class:`~sb3_cyborg.memories.ring.RingMemory`, with the normalized inputs as ``entries``. The normalization
    has no weights. The keys and values of stored inputs are therefore always made with the current weights.

    :param hidden_dim: Features of input and output, >= 1.
    :param window: Number of earlier inputs that a step can read, >= 1.
    :param num_heads: Number of attention heads; divides ``hidden_dim``.
    :param expand: Ratio of the features inside the feed-forward network to ``hidden_dim``, >= 1.
    :raises ValueError: for sizes below 1, and for heads that do not divide ``hidden_dim``.
    """

    def __init__(self, hidden_dim: int, *, window: int = 64, num_heads: int = 4, expand: int = 1) -> None:
        super().__init__()
        check_positive(hidden_dim=hidden_dim, window=window, num_heads=num_heads, expand=expand)
        check_divides("num_heads", num_heads, "hidden_dim", hidden_dim)
        self.input_dim = self.output_dim = hidden_dim
        self.attention = RingMemory(hidden_dim, hidden_dim, num_slots=window, num_heads=num_heads, num_first=0)
        self.attention_gate = Gate(hidden_dim)
        inner = expand * hidden_dim
        self.feed_forward = FusedSequential(Linear(hidden_dim, inner), nn.ReLU(), Linear(inner, hidden_dim), nn.ReLU())
        self.feed_forward_gate = Gate(hidden_dim)

    def get_initial_state(self, batch_size: int, device: th.device | str | None = None) -> State:
        return self.attention.get_initial_state(batch_size, device)

    def forward_step(self, x: th.Tensor, state: State, mask: th.Tensor | None = None) -> tuple[th.Tensor, State, Logs]:
        read, state, logs = self.attention.forward_step(self._normalize(x), state, mask)
        return self._finish(x, read), state, logs

    def forward_sequence(self, x: th.Tensor, state: State, masks: th.Tensor | None = None) -> tuple[th.Tensor, State, Logs]:
        read, state, logs = self.attention.forward_sequence(self._normalize(x), state, masks)
        return self._finish(x, read), state, logs

    def _normalize(self, x: th.Tensor) -> th.Tensor:
        return F.layer_norm(x, (self.input_dim,))

    def _finish(self, x: th.Tensor, read: th.Tensor) -> th.Tensor:
        """:return: Output of the layer for its input and the result of the attention, all (..., hidden_dim)."""
        x = self.attention_gate(x, read.relu())
        result: th.Tensor = self.feed_forward_gate(x, self.feed_forward(self._normalize(x)))
        return result


@ENCODERS.register("trxl")
@with_options_of(TrXLLayer)
class TrXLCore(Serial):
    """
    Layers of :class:`TrXLLayer` in series.

    State: ``layer<i>.entries`` (B, window, hidden_dim), ``layer<i>.first`` (B, 0, hidden_dim) and ``layer<i>.count`` (B,).

    :param hidden_dim: Features of input and output, >= 1.
    :param num_layers: Number of layers, >= 1.
    :param options: Options of :class:`TrXLLayer`.
    :raises ValueError: for sizes below 1, and for heads that do not divide ``hidden_dim``.
    """

    def __init__(self, hidden_dim: int, num_layers: int = 1, **options: Any) -> None:
        check_positive(hidden_dim=hidden_dim, num_layers=num_layers)
        super().__init__(residual=False, **{f"layer{index}": TrXLLayer(hidden_dim, **options) for index in range(num_layers)})
