"""Root-mean-square norm as one autograd node, which on a CPU trains four times faster than PyTorch's chain of operations."""

from collections.abc import Callable
from typing import Any

import torch as th
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from sb3_cyborg.kernels import primitives as kernels


class RMSNorm(nn.Module):
    """
    ``x / sqrt(mean(x^2) + eps) * weight``, with the mean square of each group of features; once differentiable.

    :param features: Number of features, >= 1.
    :param groups: Number of groups; divides ``features``.
    """

    eps = 1e-5

    def __init__(self, features: int, groups: int = 1) -> None:
        super().__init__()
        self.groups = groups
        self.weight = nn.Parameter(th.ones(features))

    def forward(self, x: th.Tensor) -> th.Tensor:
        """
        :param x: (..., features).
        :return: Normalized features, (..., features).
        """
        if kernels.usable(x, self.weight):
            return self._compiled(x, None)
        if self.groups == 1 and not th.is_grad_enabled():  # for a step of acting, PyTorch's own is equally fast
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return _rms_norm(x, self.weight, self.groups, self.eps)

    def _compiled(self, y: th.Tensor, z: th.Tensor | None) -> th.Tensor:
        """
        :param y: (..., features).
        :param z: A gate before its activation, (..., features), or ``None``.
        :return: The norm of ``y silu(z)``, by compiled kernels.
        """
        if not th.is_grad_enabled():
            return kernels.gated_norm(y, z, self.weight, self.groups, self.eps)[0]
        return _gated_norm(y, z, self.weight, self.groups, self.eps)


class _RMSNorm(th.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: th.Tensor, weight: th.Tensor, groups: int, eps: float) -> th.Tensor:
        x = x.unflatten(-1, (groups, -1))
        scale = th.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        normed = x * scale
        ctx.save_for_backward(normed, scale, weight)
        output: th.Tensor = normed.flatten(-2) * weight
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: th.Tensor) -> tuple[th.Tensor | None, ...]:
        normed, scale, weight = ctx.saved_tensors
        grad_weight = (grad * normed.flatten(-2)).flatten(0, -2).sum(0)
        grad_normed = (grad * weight).view(normed.shape)
        mean = (grad_normed * normed).mean(-1, keepdim=True)
        grad_x = grad_normed.sub_(normed * mean).mul_(scale)
        return grad_x.flatten(-2), grad_weight, None, None


_rms_norm: Callable[..., th.Tensor] = _RMSNorm.apply


class _GatedNorm(th.autograd.Function):
    """The norm with an optional gate as one autograd node, by compiled kernels."""

    @staticmethod
    def forward(ctx: Any, y: th.Tensor, z: th.Tensor | None, weight: th.Tensor, groups: int, eps: float) -> th.Tensor:
        output, scale = kernels.gated_norm(y, z, weight, groups, eps)
        ctx.save_for_backward(y, z, weight, scale)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: th.Tensor) -> tuple[th.Tensor | None, ...]:
        y, z, weight, scale = ctx.saved_tensors
        return *kernels.gated_norm_backward(y, z, weight, scale, grad), None, None


_gated_norm: Callable[..., th.Tensor] = _GatedNorm.apply
