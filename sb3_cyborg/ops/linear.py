"""
Matrix products by MKL or oneDNN, whichever is faster.

PyTorch computes fp32 products on a CPU with MKL, which on AMD processors is half as fast as oneDNN (110 against 230 GFLOP/s on
one core of a Zen 5). oneDNN is part of the same build, as a separate operator. It is used for large fp32 products on AMD
processors if the operator exists and its results are correct; all other products use ``torch.nn.functional.linear``.
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

MIN_PRODUCTS = 3 * 2**19
"""Smallest number of multiplications for oneDNN; below it, the longer call of its operator outweighs the faster product."""

CHECK_SIZE = 256
"""Width of the square matrices whose product is compared with PyTorch's before oneDNN is used."""


class Activation(NamedTuple):
    """An activation that oneDNN can fuse with a matrix product."""

    name: str
    """Name of the activation in oneDNN."""
    function: Callable[[th.Tensor], th.Tensor]
    """The activation in PyTorch."""
    backward: Callable[[th.Tensor, th.Tensor], th.Tensor]
    """Gradient of the input, as a function of the gradient of the output and the output."""


ACTIVATIONS: dict[type[nn.Module], Activation] = {
    nn.Tanh: Activation("tanh", th.tanh, th.ops.aten.tanh_backward),
    nn.ReLU: Activation("relu", th.relu, lambda grad, y: th.ops.aten.threshold_backward(grad, y, 0)),
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
        y = F.linear(x, weight, bias)
        return y if activation is None else activation.function(y)
    return _linear(x.reshape(-1, x.shape[-1]), weight, bias, activation).view(*x.shape[:-1], -1)


class Linear(nn.Linear):
    """``torch.nn.Linear``, computed by :func:`linear`."""

    def forward(self, input: th.Tensor) -> th.Tensor:
        return linear(input, self.weight, self.bias)


class FusedSequential(nn.Sequential):
    """``torch.nn.Sequential`` that fuses linear layers with a following activation of ``ACTIVATIONS``."""

    def forward(self, input: th.Tensor) -> th.Tensor:
        layers = iter([*self, None])
        layer = next(layers)
        while layer is not None:
            following = next(layers)
            if isinstance(layer, nn.Linear):
                activation = ACTIVATIONS.get(type(following))
                input = linear(input, layer.weight, layer.bias, activation)
                following = following if activation is None else next(layers)
            else:
                input = layer(input)
            layer = following
        return input


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

    :return: Whether PyTorch uses MKL on an AMD processor, and oneDNN's operator exists and gives correct results.
    """
    if not (th.backends.mkl.is_available() and th.backends.mkldnn.is_available() and "AuthenticAMD" in _processor()):
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
