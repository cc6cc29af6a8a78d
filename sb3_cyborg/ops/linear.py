"""
Matrix products by MKL or oneDNN, whichever is faster.

PyTorch computes fp32 products on a CPU with MKL, which on AMD processors with AVX-512 is half as fast as oneDNN (110 against
230 GFLOP/s on one core of a Zen 5). oneDNN is part of the same build, as a separate operator. It is used there for large fp32
products, if the operator exists and its results are correct. Without AVX-512, MKL makes a minibatch 1.10 to 1.18 times faster.
All other products use ``torch.nn.functional.linear``.
"""

import functools
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch as th
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from sb3_cyborg.kernels import primitives as kernels

MIN_PRODUCTS = 3 * 2**19
"""Smallest number of multiplications for oneDNN; below it, the longer call of its operator outweighs the faster product."""

CHECK_SIZE = 256
"""Width of the square matrices whose product is compared with PyTorch's before oneDNN is used."""


class Activation(NamedTuple):
    """An activation that oneDNN can fuse with a matrix product."""

    name: str
    """Name of the activation in oneDNN."""
    kernel: int
    """Code of the activation in the compiled kernels."""
    function: Callable[[th.Tensor], th.Tensor]
    """The activation in PyTorch."""
    backward: Callable[[th.Tensor, th.Tensor], th.Tensor]
    """Gradient of the input, as a function of the gradient of the output and the output."""


ACTIVATIONS: dict[type[nn.Module], Activation] = {
    nn.Tanh: Activation("tanh", kernels.TANH, th.tanh, th.ops.aten.tanh_backward),
    nn.ReLU: Activation("relu", kernels.RELU, th.relu, lambda grad, y: th.ops.aten.threshold_backward(grad, y, 0)),
}


def matmul_t(a: th.Tensor, b: th.Tensor, bias: th.Tensor | None = None) -> th.Tensor:
    """
    Matrix product with a transposed matrix, without gradient.

    :param a: (M, K), any strides.
    :param b: (N, K), any strides.
    :param bias: Added to each row, (N,), or ``None``.
    :return: ``a @ b.T + bias``, (M, N).
    """
    return _onednn(a, b, bias) if _takes_onednn(a, b) else F.linear(a, b, bias)


class _Linear(th.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: th.Tensor, weight: th.Tensor, bias: th.Tensor | None, activation: Activation | None) -> th.Tensor:
        y = _onednn(x, weight, bias, "none" if activation is None else activation.name)
        ctx.save_for_backward(x, weight, y if activation is not None else None)
        ctx.activation = activation
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: th.Tensor) -> tuple[th.Tensor | None, ...]:
        x, weight, y = ctx.saved_tensors
        if ctx.activation is not None:
            grad = ctx.activation.backward(grad, y)
        need_x, need_weight, need_bias, _ = ctx.needs_input_grad
        return (
            matmul_t(grad, weight.t()) if need_x else None,
            matmul_t(grad.t(), x.t()) if need_weight else None,
            grad.sum(0) if need_bias else None,
            None,
        )


_linear: Callable[..., th.Tensor] = _Linear.apply  # torch gives it no types


class _ActivatedKernel(_Linear):
    """A linear layer with an activation, whose forward is a compiled kernel; the activation alone would take as long as it."""

    @staticmethod
    def forward(ctx: Any, x: th.Tensor, weight: th.Tensor, bias: th.Tensor | None, activation: Activation) -> th.Tensor:  # type: ignore[override]  # always with one
        y = kernels.affine(x, kernels.pack(weight), len(weight), bias, activation.kernel)
        ctx.save_for_backward(x, weight, y)
        ctx.activation = activation
        return y


_activated_kernel: Callable[..., th.Tensor] = _ActivatedKernel.apply


def linear(x: th.Tensor, weight: th.Tensor, bias: th.Tensor | None, activation: Activation | None = None) -> th.Tensor:
    """
    ``torch.nn.functional.linear`` with the faster library and an optional activation; once differentiable.

    :param x: Inputs, (..., K).
    :param weight: (N, K).
    :param bias: (N,), or ``None``.
    :param activation: Activation of the result, or ``None``.
    :return: Outputs, (..., N).
    """
    if not _takes_onednn(x, weight) or th.is_autocast_enabled("cpu"):
        if activation is not None and kernels.usable(x, weight):
            return _activated_kernel(x.reshape(-1, x.shape[-1]), weight, bias, activation).view(*x.shape[:-1], -1)
        y = F.linear(x, weight, bias)
        return y if activation is None else activation.function(y)
    return _linear(x.reshape(-1, x.shape[-1]), weight, bias, activation).view(*x.shape[:-1], -1)


class Linear(nn.Linear):
    """``torch.nn.Linear``, computed by :func:`linear`."""

    def forward(self, input: th.Tensor) -> th.Tensor:
        return linear(input, self.weight, self.bias)


class FusedSequential(nn.Sequential):
    """``torch.nn.Sequential`` that fuses linear layers with a following activation of ``ACTIVATIONS``."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self._packed = [kernels.Packed(kernels.pack) for _ in layers]

    def forward(self, input: th.Tensor) -> th.Tensor:
        layers = list(self)
        index = 0
        while index < len(layers):
            layer = layers[index]
            if isinstance(layer, nn.Linear):
                activation = ACTIVATIONS.get(type(layers[index + 1])) if index + 1 < len(layers) else None
                if activation is not None and kernels.usable_without_gradient(input, layer.weight):
                    weight = self._packed[index](layer.weight)
                    input = kernels.affine(input, weight, layer.out_features, layer.bias, activation.kernel)
                else:
                    input = linear(input, layer.weight, layer.bias, activation)
                index += activation is not None
            else:
                input = layer(input)
            index += 1
        return input


class Projection(nn.Sequential):
    """
    A linear layer and layer normalization, and SiLU if wanted.

    :param input_dim: Features of the input.
    :param output_dim: Features of the output.
    :param silu: Whether SiLU follows.
    """

    def __init__(self, input_dim: int, output_dim: int, silu: bool = False) -> None:
        super().__init__(Linear(input_dim, output_dim), nn.LayerNorm(output_dim), *([nn.SiLU()] if silu else []))
        self.silu = silu
        self._packed = kernels.Packed(kernels.pack)

    @property
    def dtype(self) -> th.dtype:
        """Precision of the parameters."""
        return self._parts()[0].weight.dtype

    def _parts(self) -> tuple[Linear, nn.LayerNorm]:
        """:return: The two layers; to index ``nn.Sequential`` would take as long as a small product."""
        layer, norm = self._modules["0"], self._modules["1"]
        assert isinstance(layer, Linear)
        assert isinstance(norm, nn.LayerNorm)
        return layer, norm

    def forward(self, input: th.Tensor) -> th.Tensor:
        layer, norm = self._parts()
        if not kernels.usable_without_gradient(input, layer.weight):
            normalized: th.Tensor = super().forward(input)  # type: ignore[no-untyped-call]
            return normalized
        projected = kernels.affine(input, self._packed(layer.weight), layer.out_features, layer.bias)
        return kernels.layer_norm(projected, norm.weight, norm.bias, norm.eps, self.silu)


def _takes_onednn(a: th.Tensor, b: th.Tensor) -> bool:
    if th.compiler.is_compiling():  # TorchInductor supports the operator only for constant weights
        return False
    large = a.numel() * b.shape[0] >= MIN_PRODUCTS
    return large and a.device.type == "cpu" and a.dtype == th.float32 and _prefers_onednn()


def _onednn(a: th.Tensor, b: th.Tensor, bias: th.Tensor | None, activation: str = "none") -> th.Tensor:
    product: th.Tensor = th.ops.mkldnn._linear_pointwise(a, b, bias, activation, [], "")
    return product


@functools.cache
def _prefers_onednn() -> bool:
    """
    Decide by the processor, not by a timing: with a timing, the rounding of a run would depend on chance.

    :return: Whether PyTorch uses MKL on an AMD processor with AVX-512, and oneDNN's operator exists and gives correct results.
    """
    libraries = th.backends.mkl.is_available() and th.backends.mkldnn.is_available()
    if not (libraries and {"AuthenticAMD", "avx512f"} <= set(_processor().split())):
        return False
    a, b = th.linspace(-1, 1, 2 * CHECK_SIZE * CHECK_SIZE).view(2, CHECK_SIZE, CHECK_SIZE).unbind()
    with th.no_grad():
        try:
            return th.allclose(_onednn(a, b, None), F.linear(a, b), atol=1e-3)
        except (AttributeError, RuntimeError):  # a build without the operator, or a version with another signature
            return False


def _processor() -> str:
    """:return: The system's description of the processor, which contains the vendor's name."""
    cpu_info = Path("/proc/cpuinfo")
    return cpu_info.read_text(encoding="utf-8") if cpu_info.is_file() else platform.processor()
