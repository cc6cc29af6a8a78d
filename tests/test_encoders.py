"""GRU and LSTM against PyTorch's, and the composition of ``EncoderV7``."""

import pytest
import torch as th
from torch import nn

from sb3_cyborg.encoders.encoder_v7 import ENCODERS, EncoderV7, register_encoder
from sb3_cyborg.encoders.gru import GRU
from sb3_cyborg.encoders.lstm import LSTM
from sb3_cyborg.sequence_model import SequenceModel
from sb3_cyborg.testing import verify_contract


@pytest.mark.parametrize(("ours", "theirs"), [(GRU, nn.GRU), (LSTM, nn.LSTM)])
def test_layers_equal_pytorch(ours: type[GRU] | type[LSTM], theirs: type[nn.GRU] | type[nn.LSTM]) -> None:
    """With the same parameters and first state, outputs and gradients are equal."""
    th.manual_seed(0)
    model, oracle = ours(3, 5).double(), theirs(3, 5, batch_first=True).double()
    with th.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(th.randn_like(parameter))
            getattr(oracle, f"{name}_l0").copy_(parameter)
    x = th.randn(4, 11, 3, dtype=th.float64, requires_grad=True)
    state = {name: th.randn(4, 5, dtype=th.float64) for name in model.get_initial_state(4)}
    first = tuple(leaf.unsqueeze(0) for leaf in state.values())
    got, _, _ = model.forward_sequence(x, state)
    want, _ = oracle(x, first if len(first) > 1 else first[0])
    th.testing.assert_close(got, want, rtol=0, atol=1e-12)
    upstream = th.randn_like(got)
    parameters = [getattr(oracle, f"{name}_l0") for name, _ in model.named_parameters()]
    for a, b in zip(
        th.autograd.grad(got, [x, *model.parameters()], upstream),
        th.autograd.grad(want, [x, *parameters], upstream),
        strict=True,
    ):
        th.testing.assert_close(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize("mode", ENCODERS)
def test_each_mode_has_the_cores_of_its_name(mode: str) -> None:
    """The set of cores of each mode is that of its name."""
    cores = {"GRU", "LSTM", "Mamba2", "MinGRU", "TrXLLayer"}
    types = {type(module).__name__ for module in EncoderV7(3, 16, mode=mode).modules()} & cores
    assert (
        types
        == {
            "gru": {"GRU"},
            "lstm": {"LSTM"},
            "mamba": {"Mamba2"},
            "mingru": {"MinGRU"},
            "trxl": {"TrXLLayer"},
            "hybrid": {"Mamba2", "GRU"},
            "fusion": {"Mamba2", "GRU"},
        }[mode]
    )


def test_hybrid_is_serial_with_a_residual_and_fusion_parallel() -> None:
    th.manual_seed(0)
    x, masks = th.randn(2, 6, 16), th.ones(2, 6, dtype=th.bool)
    hybrid = EncoderV7(3, 16, mode="hybrid").core
    mamba, gru = hybrid.get_submodule("mamba"), hybrid.get_submodule("gru")
    assert isinstance(mamba, SequenceModel)
    assert isinstance(gru, SequenceModel)
    inner, _, _ = mamba.forward_sequence(x, mamba.get_initial_state(2), masks)
    outer, _, _ = gru.forward_sequence(inner, gru.get_initial_state(2), masks)
    th.testing.assert_close(hybrid.forward_sequence(x, hybrid.get_initial_state(2), masks)[0], x + outer)
    fusion = EncoderV7(3, 16, mode="fusion").core
    assert fusion.output_dim == 32
    mamba, gru = fusion.get_submodule("mamba"), fusion.get_submodule("gru")
    assert isinstance(mamba, SequenceModel)
    assert isinstance(gru, SequenceModel)
    both = [part.forward_sequence(x, part.get_initial_state(2), masks)[0] for part in (mamba, gru)]
    th.testing.assert_close(fusion.forward_sequence(x, fusion.get_initial_state(2), masks)[0], th.cat(both, dim=-1))


@pytest.mark.parametrize("mode", ENCODERS)
def test_number_of_layers_and_features(mode: str) -> None:
    one, two = EncoderV7(3, 16, mode=mode), EncoderV7(3, 16, latent_dim=7, mode=mode, num_layers=2)
    assert len(two.get_initial_state(1)) == 2 * len(one.get_initial_state(1))
    output, _, _ = two.forward_sequence(th.randn(2, 4, 3), two.get_initial_state(2))
    assert output.shape == (2, 4, 7)


def test_registered_encoder() -> None:
    register_encoder("tall", lambda hidden_dim, num_layers, *, gain=1.0: GRU(hidden_dim, int(gain * hidden_dim)))
    try:
        encoder = EncoderV7(3, 4, mode="tall", gain=2.0)
        assert encoder.core.output_dim == 8
        verify_contract(encoder)
        with pytest.raises(ValueError, match="gain"):
            EncoderV7(3, 4, mode="tall", gian=2.0)
    finally:
        del ENCODERS["tall"]
