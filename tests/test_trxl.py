"""The encoder ``trxl``: a plain reference, its start as a pass-through, and planted faults."""

from typing import Any

import pytest
import torch as th
from torch import nn
from torch.nn import functional as F

from sb3_cyborg.encoders.encoder_v7 import EncoderV7
from sb3_cyborg.encoders.trxl import TrXLCore, TrXLLayer
from sb3_cyborg.sequence_model import Logs, State
from sb3_cyborg.testing import verify_contract, verify_gradcheck

WINDOW, HEADS, FEATURES = 5, 2, 8


def make_layer() -> TrXLLayer:
    """:return: A layer with random parameters, because those that are initialized to zero would hide faults."""
    th.manual_seed(0)
    layer = TrXLLayer(FEATURES, window=WINDOW, num_heads=HEADS, expand=2).double()
    with th.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(0.7 * th.randn_like(parameter))
    return layer


def reference(layer: Any, x: th.Tensor, masks: th.Tensor) -> th.Tensor:
    """:return: Outputs (B, T, D) of a layer for sequences from their start, computed step by step and head by head."""
    attention = layer.attention
    outputs = th.zeros_like(x)
    size = FEATURES // HEADS
    for row in range(len(x)):
        past: list[th.Tensor] = []
        for t in range(x.shape[1]):
            past = past[-WINDOW:] if masks[row, t] else []
            here = F.layer_norm(x[row, t], (FEATURES,))
            query = F.rms_norm(attention.query(here).view(HEADS, size), (size,), eps=1e-6)
            parts = []
            for head in range(HEADS):
                rows = slice(head * size, (head + 1) * size)
                scores = [query[head] @ attention.null_key[head] / size**0.5]
                values = [attention.null_value[head]]
                for age, entry in enumerate(reversed(past)):
                    key = attention.key.weight[rows] @ entry + attention.age_key[head, age]
                    scores.append(query[head] @ key / size**0.5 + attention.age_bias[head, age])
                    values.append(attention.value.weight[rows] @ entry)
                parts.append(th.stack(scores).softmax(0) @ th.stack(values))
            read = attention.out(th.cat(parts)).relu()
            between = gate(layer.attention_gate, x[row, t], read)
            inner = layer.feed_forward(F.layer_norm(between, (FEATURES,)))
            outputs[row, t] = gate(layer.feed_forward_gate, between, inner)
            past.append(here)
    return outputs


def gate(cell: Any, x: th.Tensor, result: th.Tensor) -> th.Tensor:
    reset, update, new = (cell.weight_ih @ result + cell.bias_ih).chunk(3)
    reset_x, update_x, new_x = (cell.weight_hh @ x + cell.bias_hh).chunk(3)
    keep = th.sigmoid(update + update_x)
    return keep * x + (1 - keep) * th.tanh(new + th.sigmoid(reset + reset_x) * new_x)


def test_the_sequence_form_equals_the_equations() -> None:
    layer = make_layer()
    x, masks = th.randn(3, 12, FEATURES, dtype=th.float64), th.rand(3, 12) > 0.15
    with th.no_grad():
        got, _, _ = layer.forward_sequence(x, layer.get_initial_state(3), masks)
        th.testing.assert_close(got, reference(layer, x, masks), rtol=0, atol=1e-12)


def test_gradients_of_a_layer() -> None:
    th.manual_seed(0)
    layer = TrXLLayer(3, window=2, num_heads=1)
    with th.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.1 * th.randn_like(parameter))
    verify_gradcheck(layer)


def test_a_new_layer_passes_its_input_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the paper's bias most of the input is kept; with a large one, all of it."""
    th.manual_seed(0)
    x = th.randn(16, 20, 64)
    core = TrXLCore(64)
    output, _, _ = core.forward_sequence(x, core.get_initial_state(16))
    assert F.cosine_similarity(output, x, dim=-1).min() > 0.7
    monkeypatch.setattr("sb3_cyborg.encoders.trxl.GATE_BIAS", 60.0)
    core = TrXLCore(64, 2)
    output, _, _ = core.forward_sequence(x, core.get_initial_state(16))
    th.testing.assert_close(output, x, rtol=0, atol=1e-5)


def test_stored_inputs_are_exact_and_get_no_gradient_from_a_rollout() -> None:
    """The state holds the last inputs of the layer, bit by bit; it carries no graph where the state before it has none."""
    layer = make_layer()
    x, state = th.randn(2, 9, FEATURES, dtype=th.float64), layer.get_initial_state(2)
    with th.no_grad():
        for t in range(9):
            _, state, _ = layer.forward_step(x[:, t], state)
    assert th.equal(state["entries"], F.layer_norm(x[:, -WINDOW:], (FEATURES,)))
    new = th.randn(2, 4, FEATURES, dtype=th.float64, requires_grad=True)
    output, last, _ = layer.forward_sequence(new, state)
    output[:, -1].sum().backward()
    assert new.grad is not None
    assert new.grad[:, 0].abs().min() > 0, "through the sequence"
    assert not any(leaf.requires_grad for leaf in state.values()), "not into what was stored"
    assert last["entries"].requires_grad


class _Faulty(TrXLLayer):
    """A layer whose sequence form has a fault."""

    def __init__(self, fault: str) -> None:
        super().__init__(FEATURES, window=WINDOW, num_heads=HEADS)
        self.fault = fault

    def forward_sequence(self, x: th.Tensor, state: State, masks: th.Tensor | None = None) -> tuple[th.Tensor, State, Logs]:
        if self.fault == "memory not reset":
            masks = None
        age_key = self.attention.age_key
        if self.fault == "position off by one":
            self.attention.age_key = nn.Parameter(age_key.roll(1, dims=1))
        read, state, logs = self.attention.forward_sequence(self._normalize(x), state, masks)
        self.attention.age_key = age_key
        if self.fault == "gate ignored":
            x = x + read.relu()
            return self.feed_forward_gate(x, self.feed_forward(self._normalize(x))), state, logs
        return self._finish(x, read), state, logs


def test_a_layer_without_a_fault_keeps_the_contract() -> None:
    verify_contract(_Faulty("none"))


@pytest.mark.parametrize("fault", ["position off by one", "memory not reset", "gate ignored"])
def test_the_contract_detects_the_fault(fault: str) -> None:
    with pytest.raises(AssertionError, match="output differs"):
        verify_contract(_Faulty(fault))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "`window` must be a whole number of at least 1, got 0"),
        ({"num_heads": 3}, "`num_heads`=3 does not divide `hidden_dim`=8; the nearest that do: 2 and 4"),
        ({"expand": 0}, "`expand` must be a whole number of at least 1, got 0"),
        ({"num_slots": 8}, "Unknown option for encoder 'trxl' 'num_slots'"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EncoderV7(3, 8, mode="trxl", **options)
