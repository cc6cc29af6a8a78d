"""Mamba-2: the contract, the official parameters, and parity with an independent implementation."""

import importlib
import sys
from typing import Any

import pytest
import torch as th

from sb3_cyborg.encoders.encoder_v7 import ENCODERS
from sb3_cyborg.encoders.mamba import Mamba2, MambaCore, MambaLayer
from sb3_cyborg.ops.causal_conv import causal_conv
from sb3_cyborg.sequence_model import SequenceModel
from sb3_cyborg.testing import (
    assert_close,
    chunked,
    mask_patterns,
    outcome,
    random_chunks,
    run_full,
    run_stepped,
    verify_contract,
    verify_gradcheck,
    verify_isolation,
    warm_state,
)

TINY: dict[str, dict[str, Any]] = {
    "two heads a group": {"expand": 2, "headdim": 4, "ngroups": 2, "chunk_size": 4},
    "one group": {"expand": 2, "headdim": 4, "chunk_size": 4},
    "expand 1": {"expand": 1, "headdim": 4, "chunk_size": 5},
    "a head a group": {"expand": 1, "headdim": 4, "ngroups": 2, "chunk_size": 4},
    "one head": {"expand": 1, "headdim": 8, "chunk_size": 32},
    "chunks of one": {"expand": 1, "headdim": 4, "chunk_size": 1},
    "no convolution": {"expand": 1, "headdim": 4, "chunk_size": 4, "d_conv": 1},
    "wide convolution": {"expand": 1, "headdim": 4, "chunk_size": 4, "d_conv": 9},
}


@pytest.mark.parametrize("options", TINY.values(), ids=TINY.keys())
def test_contract(options: dict[str, Any]) -> None:
    th.manual_seed(0)
    verify_contract(Mamba2(8, d_state=6, **options))


def test_contract_of_layers() -> None:
    th.manual_seed(0)
    verify_contract(MambaCore(8, 2, d_state=4, headdim=4, chunk_size=4))


def test_contract_at_default_sizes_across_chunks() -> None:
    th.manual_seed(0)
    verify_contract(Mamba2(32), steps=37, batch_size=2)


@pytest.mark.parametrize(
    ("chunk_size", "steps", "dt"),
    [(8, 17, 1e-4), (8, 17, 1e3), (8, 16, 1.0), (8, 16, 30.0), (5, 14, 30.0)],  # one over, at, and short of an edge
)
def test_contract_across_chunk_edges_for_small_and_large_step_sizes(chunk_size: int, steps: int, dt: float) -> None:
    """
    A step size of 0.0001 keeps the state, one of 1000 erases it.

    In fp32 with large step sizes, step form and chunks each differ by up to 9e-6 from fp64, hence the tolerance of 2e-5.
    """
    th.manual_seed(0)
    model = Mamba2(8, d_state=6, expand=1, headdim=4, chunk_size=chunk_size)
    with th.no_grad():
        model.dt_bias.copy_(th.full((2,), dt, dtype=th.float64).expm1().log().clamp(max=dt))  # softplus, inverted
    for dtype, tolerance in ((th.float64, 1e-10), (th.float32, 2e-5)):
        model = model.to(dtype)
        generator = th.Generator().manual_seed(0)
        x = th.randn(2, steps, 8, dtype=dtype, generator=generator)
        state = warm_state(model, 2, dtype, generator)
        for name, masks in mask_patterns(2, steps, generator).items():
            want = outcome(model, run_stepped, x, state, masks, 0)
            for run in (run_full, chunked(random_chunks(steps, generator))):
                assert_close(outcome(model, run, x, state, masks, 0), want, tolerance, f"{dtype}, resets: {name}")
        verify_isolation(model, x, min(tolerance, 1e-5))


@pytest.mark.parametrize("d_conv", [1, 3])
def test_gradcheck(d_conv: int) -> None:
    th.manual_seed(0)
    verify_gradcheck(Mamba2(2, d_state=2, d_conv=d_conv, headdim=2, ngroups=2, chunk_size=3))


def test_gradcheck_of_layers() -> None:
    th.manual_seed(0)
    verify_gradcheck(MambaCore(2, 1, d_state=2, d_conv=2, expand=1, headdim=1, chunk_size=3))


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"d_model": 0}, "d_model"),
        ({"d_model": 8, "d_state": 0}, "d_state"),
        ({"d_model": 8, "d_conv": 0}, "d_conv"),
        ({"d_model": 8, "expand": 1.5}, "expand"),
        ({"d_model": 8, "headdim": -1}, "headdim"),
        ({"d_model": 8, "ngroups": 0}, "ngroups"),
        ({"d_model": 8, "chunk_size": 0}, "chunk_size"),
        ({"d_model": 50, "headdim": 32}, r"`headdim`=32 does not divide `expand \* d_model`=100.* 25 and 50"),
        ({"d_model": 64, "headdim": 32, "ngroups": 3}, r"`ngroups`=3 does not divide .*=4.* 2 and 4"),
    ],
)
def test_invalid_sizes_are_refused(options: dict[str, Any], names: str) -> None:
    with pytest.raises(ValueError, match=names):
        Mamba2(**options)


@pytest.mark.parametrize(("hidden_dim", "num_layers"), [(0, 1), (32, 0)])
def test_invalid_layer_sizes_are_refused(hidden_dim: int, num_layers: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        MambaCore(hidden_dim, num_layers)


def test_core_options_equal_those_of_the_block() -> None:
    sizes = {"d_state": 8, "d_conv": 2, "expand": 1, "headdim": 8, "ngroups": 2, "chunk_size": 8}
    assert sizes.keys() | {"mamba_backend"} == ENCODERS.options("mamba").keys()
    state = MambaCore(16, 2, **sizes).get_initial_state(3)
    assert {name: tuple(leaf.shape) for name, leaf in state.items()} == {
        "layer0.conv": (3, 48, 1),
        "layer0.ssm": (3, 2, 8, 8),
        "layer1.conv": (3, 48, 1),
        "layer1.ssm": (3, 2, 8, 8),
    }


OFFICIAL_LAYOUTS: list[tuple[dict[str, Any], dict[str, tuple[int, ...]]]] = [
    (
        {"d_model": 128, "d_state": 32},
        {
            "dt_bias": (8,),
            "A_log": (8,),
            "D": (8,),
            "in_proj.weight": (584, 128),  # 256 z + 256 x + 32 B + 32 C + 8 dt
            "conv1d.weight": (320, 1, 4),
            "conv1d.bias": (320,),
            "norm.weight": (256,),
            "out_proj.weight": (128, 256),
        },
    ),
    (
        {"d_model": 64, "d_state": 16, "d_conv": 3, "expand": 1, "headdim": 16, "ngroups": 2},
        {
            "dt_bias": (4,),
            "A_log": (4,),
            "D": (4,),
            "in_proj.weight": (196, 64),  # 64 z + 64 x + 2 * 16 B + 2 * 16 C + 4 dt
            "conv1d.weight": (128, 1, 3),
            "conv1d.bias": (128,),
            "norm.weight": (64,),
            "out_proj.weight": (64, 64),
        },
    ),
    (
        {"d_model": 256, "d_state": 128, "headdim": 64},
        {
            "dt_bias": (8,),
            "A_log": (8,),
            "D": (8,),
            "in_proj.weight": (1288, 256),  # 512 z + 512 x + 128 B + 128 C + 8 dt
            "conv1d.weight": (768, 1, 4),
            "conv1d.bias": (768,),
            "norm.weight": (512,),
            "out_proj.weight": (256, 512),
        },
    ),
    (
        {"d_model": 96, "d_state": 64, "expand": 3, "headdim": 48, "ngroups": 3, "d_conv": 2},
        {
            "dt_bias": (6,),
            "A_log": (6,),
            "D": (6,),
            "in_proj.weight": (966, 96),  # 288 z + 288 x + 3 * 64 B + 3 * 64 C + 6 dt
            "conv1d.weight": (672, 1, 2),
            "conv1d.bias": (672,),
            "norm.weight": (288,),
            "out_proj.weight": (96, 288),
        },
    ),
    (
        {"d_model": 32, "d_state": 16, "headdim": 8, "ngroups": 4},
        {
            "dt_bias": (8,),
            "A_log": (8,),
            "D": (8,),
            "in_proj.weight": (264, 32),  # 64 z + 64 x + 4 * 16 B + 4 * 16 C + 8 dt
            "conv1d.weight": (192, 1, 4),
            "conv1d.bias": (192,),
            "norm.weight": (64,),
            "out_proj.weight": (32, 64),
        },
    ),
]


@pytest.mark.parametrize(("sizes", "layout"), OFFICIAL_LAYOUTS)
def test_state_dict_is_that_of_mamba_ssm(sizes: dict[str, Any], layout: dict[str, tuple[int, ...]]) -> None:
    assert {name: tuple(value.shape) for name, value in Mamba2(**sizes).state_dict().items()} == layout


@pytest.mark.parametrize(("sizes", "layout"), OFFICIAL_LAYOUTS)
def test_official_weights_load_and_save_exactly(sizes: dict[str, Any], layout: dict[str, tuple[int, ...]]) -> None:
    """Weights are loaded strictly and bit-exact, in the official order. ``make test-official`` uses the official class."""
    generator = th.Generator().manual_seed(0)
    theirs = {name: th.randn(shape, generator=generator) for name, shape in layout.items()}
    ours = Mamba2(**sizes)
    ours.load_state_dict(theirs, strict=True)
    assert list(ours.state_dict()) == list(theirs)
    assert all(th.equal(value, theirs[name]) for name, value in ours.state_dict().items())
    with pytest.raises(RuntimeError, match="size mismatch"):
        Mamba2(**sizes | {"d_state": 8}).load_state_dict(theirs, strict=True)


def test_initialisation_equals_the_official_one() -> None:
    th.manual_seed(0)
    block = Mamba2(1024, headdim=1)  # 2048 heads
    dt, a = th.nn.functional.softplus(block.dt_bias), block.A_log.exp()
    assert 0.000999 <= dt.min() < 0.0011
    assert 0.09 < dt.max() <= 0.1001
    assert dt.log10().mean().item() == pytest.approx(-2, abs=0.05)  # log-uniform
    assert 1 <= a.min() < 1.1
    assert 15.9 < a.max() <= 16.001
    assert a.mean().item() == pytest.approx(8.5, abs=0.3)
    assert th.equal(block.D, th.ones(2048))
    assert th.equal(block.norm.weight, th.ones(2048))


def test_the_norm_is_over_groups() -> None:
    """As in mamba_ssm, each group of features has a mean square of 1, independent of the other group."""
    norm = Mamba2(8, headdim=4, ngroups=2).norm
    y = th.randn(5, 16) * th.tensor([1.0] * 8 + [100.0] * 8)
    mean_squares = norm(y, th.ones(5, 16)).view(5, 2, 8).square().mean(-1)
    assert th.allclose(mean_squares, th.ones(5, 2), atol=1e-3)


def test_convolution_equals_torch() -> None:
    conv = Mamba2(8, d_state=4, headdim=4, d_conv=4).conv1d
    x = th.randn(2, 9, conv.in_channels)
    assert conv.bias is not None
    got, state = causal_conv(x, th.zeros(2, conv.in_channels, 3), conv.weight.squeeze(1), conv.bias)
    want = conv(th.nn.functional.pad(x.transpose(1, 2), (3, 0))).transpose(1, 2)
    assert th.allclose(got, want, atol=1e-6)
    assert th.equal(state, x[:, -3:].transpose(1, 2))


def test_a_nan_reaches_only_the_convolution_windows_that_contain_it() -> None:
    """The kernel size is 4, with NaN at steps 2 and 8 and a reset at step 4."""
    x, masks = th.ones(1, 13, 2), th.ones(1, 13, dtype=th.bool)
    x[0, [2, 8], 0] = float("nan")
    masks[0, 4] = 0
    got, _ = causal_conv(x, th.zeros(1, 2, 3), th.ones(2, 4), th.zeros(2), masks)
    assert (~got[0].isfinite().all(-1)).nonzero().flatten().tolist() == [2, 3, 8, 9, 10, 11]


def test_an_episode_after_a_reset_equals_a_new_sequence() -> None:
    """Outputs, state and parameter gradients are bit-exact those of a sequence without a past."""
    th.manual_seed(0)
    model = MambaCore(32, 2, chunk_size=8)
    x, past = th.randn(2, 16, 32), th.randn(2, 16, 32)
    masks = th.ones(2, 32, dtype=th.bool)
    masks[:, 16] = 0
    initial = model.get_initial_state(2)

    def gradients(output: th.Tensor) -> list[th.Tensor]:
        return list(th.autograd.grad(output.square().sum(), list(model.parameters())))

    results = []
    for scale in (0.0, 1.0, 1e6):
        output, state, _ = model.forward_sequence(th.cat([scale * past, x], dim=1), initial, masks)
        results.append([output[:, 16:].detach(), *state.values(), *gradients(output[:, 16:])])
    alone, alone_state, _ = model.forward_sequence(x, initial)
    for result in results[1:]:
        assert all(th.equal(got, want) for got, want in zip(result, results[0], strict=True))
    for got, want in zip(results[0], [alone.detach(), *alone_state.values(), *gradients(alone)], strict=True):
        assert th.allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model", [Mamba2(32), MambaLayer(32)], ids=["block", "layer"])
def test_autocast_keeps_the_state_in_fp32(model: SequenceModel) -> None:
    x, state = th.randn(2, 5, 32), model.get_initial_state(2)
    with th.autocast("cpu", dtype=th.bfloat16):
        output, final, _ = model.forward_sequence(x, state, th.ones(2, 5, dtype=th.bool))
        _, stepped, _ = model.forward_step(x[:, 0], state, th.ones(2, dtype=th.bool))
    assert all(leaf.dtype == th.float32 for leaf in (*final.values(), *stepped.values()))
    want, want_final, _ = model.forward_sequence(x, state)
    assert th.allclose(output.float(), want, atol=0.1)
    assert th.allclose(final["ssm"], want_final["ssm"], atol=0.05)
    assert all(gradient.isfinite().all() for gradient in th.autograd.grad(output.float().sum(), list(model.parameters())))


PEERS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "expand 1": {"expand": 1, "headdim": 16},
    "groups": {"ngroups": 2, "d_state": 16},
    "short convolution": {"d_conv": 2, "chunk_size": 8},
}


@pytest.fixture(name="peer")
def fixture_peer(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``transformers.models.mamba2``, in plain PyTorch."""
    pytest.importorskip("transformers")
    # Where they are installed, it would call their kernels, which need a GPU.
    for name in ("mamba_ssm", "causal_conv1d"):
        monkeypatch.setitem(sys.modules, name, None)
    return importlib.import_module("transformers.models.mamba2")


@pytest.mark.parametrize("options", PEERS.values(), ids=PEERS.keys())
def test_parity_with_transformers(peer: Any, options: dict[str, Any]) -> None:
    """With the same parameters, a sequence and its continuation are equal, in sequence form and step form."""
    from transformers.cache_utils import DynamicCache

    th.manual_seed(0)
    d_model, batch_size = 64, 3
    ours = Mamba2(d_model, **options).eval()
    config = peer.Mamba2Config(
        hidden_size=d_model,
        num_heads=ours.nheads,
        head_dim=ours.headdim,
        state_size=ours.d_state,
        expand=ours.d_inner // d_model,
        conv_kernel=ours.d_conv,
        n_groups=ours.ngroups,
        chunk_size=16,
        num_hidden_layers=1,
        vocab_size=8,
    )
    theirs = peer.modeling_mamba2.Mamba2Mixer(config, layer_idx=0).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    cache: Any = DynamicCache(config=config)
    state = ours.get_initial_state(batch_size)
    with th.no_grad():
        for steps in (41, 11, 1, 1, 1):
            x = th.randn(batch_size, steps, d_model)
            want = theirs(x, cache_params=cache)
            if steps == 1:
                got, state, _ = ours.forward_step(x[:, 0], state)
                got = got.unsqueeze(1)
            else:
                got, state, _ = ours.forward_sequence(x, state)
            assert (got - want).abs().max().item() <= 5e-6, steps
            assert (state["ssm"] - cache.get_recurrent_state(0)).abs().max().item() <= 5e-6, steps
            assert (state["conv"] - cache.get_conv_state(0)[..., 1:]).abs().max().item() <= 5e-6, steps
