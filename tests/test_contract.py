"""The contract of every registered encoder and memory, and of their stacks."""

import pytest
import torch as th

from sb3_cyborg.encoders.encoder_v7 import ENCODERS, EncoderV7
from sb3_cyborg.memories.memory_v7 import MEMORIES, MemoryV7
from sb3_cyborg.sequence_model import Logs, SequenceModel, Stack, State
from sb3_cyborg.testing import verify_contract, verify_gradcheck
from tests.helpers import encoder_options, stacks

STEPS = 13  # crosses chunks of 4, windows of 5


def make_encoder(mode: str, size: int = 8, num_layers: int = 1) -> EncoderV7:
    """With fewer features, LayerNorm divides by small standard deviations and amplifies rounding errors."""
    options = encoder_options(mode, d_state=3, headdim=2, expand=2)
    th.manual_seed(0)
    return EncoderV7(3, hidden_dim=size, latent_dim=size + 1, mode=mode, num_layers=num_layers, **options)


def make_memory(kind: str, input_dim: int, size: int = 8) -> MemoryV7:
    sizes = {"memory_dim": 2 * size, "num_slots": size // 2 + 1, "num_heads": 2}
    th.manual_seed(1)
    return MemoryV7(input_dim, kind, **{name: sizes[name] for name in MEMORIES.options(kind).keys() & sizes.keys()})


@pytest.mark.parametrize("mode", ENCODERS)
def test_encoder(mode: str) -> None:
    verify_contract(make_encoder(mode, num_layers=2), steps=STEPS)


@pytest.mark.parametrize("kind", MEMORIES)
def test_memory(kind: str) -> None:
    verify_contract(make_memory(kind, 3), steps=STEPS)


@stacks("mode", "kind")
def test_stack(mode: str, kind: str) -> None:
    encoder = make_encoder(mode)
    verify_contract(Stack(encoder, make_memory(kind, encoder.output_dim + encoder.input_dim)), steps=STEPS)


@pytest.mark.parametrize("mode", ENCODERS)
def test_encoder_gradients(mode: str) -> None:
    encoder = make_encoder(mode, size=2)
    with th.no_grad():
        for parameter in encoder.parameters():  # those that begin with zeros can put a ReLU at its kink
            parameter.add_(0.1 * th.randn(parameter.shape))
    verify_gradcheck(encoder)


@pytest.mark.parametrize("kind", MEMORIES)
def test_memory_gradients(kind: str) -> None:
    verify_gradcheck(make_memory(kind, 2, size=2))


@pytest.mark.parametrize("kind", ["pmm", "ring"])
def test_long_sequences(kind: str) -> None:
    """150 steps, more than the default chunk (64) and the window (40)."""
    memory = MemoryV7(3, kind, memory_dim=4, num_slots=40, num_heads=1)
    verify_contract(memory, steps=150, batch_size=2)


class _Leaky(SequenceModel):
    """A running sum with a selectable fault, which the contract must detect."""

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.input_dim = self.output_dim = 3
        self.fault = fault
        self.gain = th.nn.Parameter(th.ones(3))

    def get_initial_state(self, batch_size: int, device: th.device | str | None = None) -> State:
        return {"sum": self._zeros(batch_size, 3, device=device)}

    def forward_step(self, x: th.Tensor, state: State, mask: th.Tensor | None = None) -> tuple[th.Tensor, State, Logs]:
        if mask is not None:
            keep = mask.to(x.dtype).unsqueeze(-1)
            state = {"sum": keep * state["sum"]} if self.fault == "multiplies" else self.reset_states(state, mask)
        total = state["sum"] + self.gain * x
        if self.fault == "mixes rows":
            total = total + 0 * total.sum(0)
        if self.fault == "in place":
            state["sum"].detach().add_(1e-3)
        return total, {"sum": total}, {}

    def forward_sequence(self, x: th.Tensor, state: State, masks: th.Tensor | None = None) -> tuple[th.Tensor, State, Logs]:
        if self.fault == "reset one step late" and masks is not None:
            masks = th.cat([th.ones_like(masks[:, :1]), masks[:, :-1]], dim=1)
        outputs, state, logs = super().forward_sequence(x, state, masks)
        if self.fault == "cuts the gradient":
            outputs = outputs + 0 * self.gain - (self.gain - self.gain.detach())
        if self.fault == "changes dtype":
            state = {"sum": state["sum"].half()}
        return outputs, state, logs


def test_a_correct_model_passes() -> None:
    verify_contract(_Leaky("none"))
    verify_gradcheck(_Leaky("none"))


@pytest.mark.parametrize(
    "fault", ["multiplies", "mixes rows", "in place", "reset one step late", "cuts the gradient", "changes dtype"]
)
def test_the_contract_detects_the_fault(fault: str) -> None:
    with pytest.raises(AssertionError):
        verify_contract(_Leaky(fault))
