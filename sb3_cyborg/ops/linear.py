"""
Matrix products by the fastest library that PyTorch has.

PyTorch hands fp32 products on a CPU to MKL, which on AMD processors reaches half of what oneDNN does (110 against 230
GFLOP/s on one core of a Zen 5). oneDNN is in the same build, behind an operator of its own. On other processors, where the
operator is missing, or where something else than fp32 on a CPU is multiplied, all goes the usual way.
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
"""Multiplications from which on it pays: oneDNN's operator takes longer to call."""

SIZE = 256
"""Of the square matrices that are multiplied to see that it is right."""


class Activation(NamedTuple):
    """An activation that oneDNN applies along with a product."""

    name: str
    """oneDNN's."""
    function: Callable[[th.Tensor], th.Tensor]
    backward: Callable[[th.Tensor, th.Tensor], th.Tensor]
    """Gradient of the input, from that of the output and the output."""


ACTIVATIONS: dict[type[nn.Module], Activation] = {
    nn.Tanh: Activation("tanh", th.tanh, th.ops.aten.tanh_backward),
    nn.ReLU: Activation("relu", th.relu, lambda grad, y: th.ops.aten.threshold_backward(grad, y, 0)),
}


def matmul_t(a: th.Tensor, b: th.Tensor, bias: th.Tensor | None = None) -> th.Tensor:
    """
    Multiply with a transposed matrix, without a gradient.

    :param a: (M, K); like ``b`` it may be a view of any strides.
    :param b: (N, K).
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
    ``torch.nn.functional.linear`` by the faster library; it has no second derivative.

    :param x: (..., K).
    :param weight: (N, K).
    :param bias: (N,), or ``None``.
    :param activation: What to apply to the result, or ``None``.
    :return: (..., N).
    """
    if not _takes_onednn(x, weight) or th.is_autocast_enabled("cpu"):
        y = F.linear(x, weight, bias)
        return y if activation is None else activation.function(y)
    return _linear(x.reshape(-1, x.shape[-1]), weight, bias, activation).view(*x.shape[:-1], -1)


class Linear(nn.Linear):
    """``torch.nn.Linear`` by :func:`linear`."""

    def forward(self, input: th.Tensor) -> th.Tensor:
        return linear(input, self.weight, self.bias)


class FusedSequential(nn.Sequential):
    """``torch.nn.Sequential`` of linear layers and activations, of which those in ``ACTIVATIONS`` go along with a product."""

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
    if th.compiler.is_compiling():  # TorchInductor takes the operator only with weights that are constants
        return False
    large = a.numel() * b.shape[0] >= MIN_PRODUCTS
    return large and a.device.type == "cpu" and a.dtype == th.float32 and _prefers_onednn()


def _onednn(a: th.Tensor, b: th.Tensor, bias: th.Tensor | None, activation: str = "none") -> th.Tensor:
    product: th.Tensor = th.ops.mkldnn._linear_pointwise(a, b, bias, activation, [], "")
    return product


@functools.cache
def _prefers_onednn() -> bool:
    """
    Decided by what machine this is and not by a timing, which would make the last digits of a run depend on chance.

    :return: Whether PyTorch's products are MKL's, on an AMD processor, and oneDNN's operator is there and right.
    """
    if not (th.backends.mkl.is_available() and th.backends.mkldnn.is_available() and "AuthenticAMD" in _processor()):
        return False
    a, b = th.linspace(-1, 1, 2 * SIZE * SIZE).view(2, SIZE, SIZE).unbind()
    with th.no_grad():
        try:
            return th.allclose(_onednn(a, b, None), F.linear(a, b), atol=1e-3)
        except (AttributeError, RuntimeError):  # another build, or another version's signature
            return False


def _processor() -> str:
    """:return: What the system says of its processor, the vendor's name among it."""
    cpu_info = Path("/proc/cpuinfo")
    return cpu_info.read_text(encoding="utf-8") if cpu_info.is_file() else platform.processor()
