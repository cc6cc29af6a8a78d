"""Matrix products by MKL and by oneDNN have the same results and gradients."""

from typing import Any

import pytest
import torch as th
from torch import nn
from torch.nn import functional as F

from sb3_cyborg.ops import linear as module
from sb3_cyborg.ops.linear import ACTIVATIONS, Activation, FusedSequential, Linear, linear, matmul_t

LARGE = (512, 64, 96)  # rows, features in, features out: enough of them for oneDNN


@pytest.fixture(params=[True, False], ids=["onednn", "usual"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if request.param and not (th.backends.mkldnn.is_available() and hasattr(th.ops.mkldnn, "_linear_pointwise")):
        pytest.skip("This PyTorch has no oneDNN.")
    monkeypatch.setattr(module, "_prefers_onednn", lambda: request.param)
    return bool(request.param)


def gradients(y: th.Tensor, *leaves: th.Tensor) -> tuple[th.Tensor, ...]:
    return th.autograd.grad(y.square().sum(), leaves)


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS.values()], ids=lambda a: "none" if a is None else a.name)
@pytest.mark.parametrize("with_bias", [True, False])
def test_linear_equals_torch(library: bool, activation: Activation | None, with_bias: bool) -> None:
    rows, features, out = LARGE
    x = th.randn(8, rows // 8, features, requires_grad=True)
    weight = (th.randn(out, features) / 8).requires_grad_()
    bias = th.randn(out, requires_grad=True) if with_bias else None
    leaves = (x, weight) if bias is None else (x, weight, bias)
    expected = F.linear(x, weight, bias)
    expected = expected if activation is None else activation.function(expected)
    y = linear(x, weight, bias, activation)
    if library:
        assert "Linear" in type(y.grad_fn.next_functions[0][0]).__name__  # type: ignore[union-attr]  # it has one
    th.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(gradients(y, *leaves), gradients(expected, *leaves), strict=True):
        th.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-4)


def test_products_of_strided_views_are_equal(library: bool) -> None:
    a, b = th.randn(LARGE[1], LARGE[0]).t(), th.randn(LARGE[1], LARGE[2]).t()
    th.testing.assert_close(matmul_t(a, b), a @ b.t(), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("dtype", [th.float64, th.bfloat16])
def test_other_dtypes_use_torch_linear(library: bool, dtype: th.dtype) -> None:
    layer = Linear(LARGE[1], LARGE[2]).to(dtype)
    x = th.randn(LARGE[0], LARGE[1], dtype=dtype)
    assert th.equal(layer(x), F.linear(x, layer.weight, layer.bias))


def test_autocast_applies_to_linear(library: bool) -> None:
    layer = Linear(LARGE[1], LARGE[2])
    with th.autocast("cpu", th.bfloat16):
        assert layer(th.randn(LARGE[0], LARGE[1])).dtype == th.bfloat16


@pytest.mark.parametrize("rows", [4, LARGE[0]], ids=["few rows", "many rows"])
def test_fused_layers_equal_a_sequential(library: bool, rows: int) -> None:
    parts = [nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 64), nn.SiLU(), nn.LayerNorm(64)]
    usual, ours = nn.Sequential(*parts), FusedSequential(*parts)
    assert usual.state_dict().keys() == ours.state_dict().keys()
    x = th.randn(rows, 64)
    th.testing.assert_close(ours(x), usual(x), atol=1e-5, rtol=1e-5)
    assert th.equal(FusedSequential()(x), x)


@pytest.mark.parametrize("layers", [Linear(LARGE[1], LARGE[2]), FusedSequential(nn.Linear(LARGE[1], LARGE[2]), nn.Tanh())])
def test_compilation_does_not_use_onednn(library: bool, layers: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """TorchInductor does not support oneDNN's operator for weights that are not constant."""

    def refused(*args: Any) -> th.Tensor:
        raise AssertionError("This would not compile.")

    x = th.randn(LARGE[0], LARGE[1], requires_grad=True)
    expected = layers(x)
    wanted = gradients(expected, x, *layers.parameters())
    monkeypatch.setattr(module, "_onednn", refused)
    y = th.compile(layers, backend="aot_eager", fullgraph=True)(x)
    th.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
    for ours, eager in zip(gradients(y, x, *layers.parameters()), wanted, strict=True):
        th.testing.assert_close(ours, eager, atol=1e-3, rtol=1e-4)


def test_onednn_is_used_only_if_present_and_correct(monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN is not chosen if the operator is missing or its results are wrong."""
    module._prefers_onednn.cache_clear()
    monkeypatch.setattr(module, "_onednn", lambda a, b, bias: a @ b.t() + 1)
    assert not module._prefers_onednn()
    module._prefers_onednn.cache_clear()

    def missing(a: th.Tensor, b: th.Tensor, bias: th.Tensor | None) -> th.Tensor:
        raise AttributeError("no such operator")

    monkeypatch.setattr(module, "_onednn", missing)
    assert not module._prefers_onednn()
    module._prefers_onednn.cache_clear()
