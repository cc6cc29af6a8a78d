"""Softmax over some entries of many, and the removal of what is not finite before a matrix product."""

from collections.abc import Callable
from typing import Any

import torch as th
from torch.autograd.function import once_differentiable


def masked_softmax(logits: th.Tensor, visible: th.Tensor, null_logits: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
    """
    Softmax over the visible entries and one null entry, which is always visible.

    :param logits: (..., S); what stands at an invisible entry, NaN included, has no effect.
    :param visible: Boolean, broadcastable to ``logits``.
    :param null_logits: (...,).
    :return: Weights of the entries (..., S) and of the null entry (...,).
    """
    return _masked_softmax(logits, visible, null_logits)


class _MaskedSoftmax(th.autograd.Function):
    """:func:`masked_softmax`; of its own, because the backward passes of ``cat``, ``where`` and slices fill much memory."""

    @staticmethod
    def forward(ctx: Any, logits: th.Tensor, visible: th.Tensor, null_logits: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        logits = th.where(visible, logits, float("-inf"))
        weights = th.softmax(th.cat([logits, null_logits.unsqueeze(-1)], dim=-1), dim=-1)
        weights, null = weights[..., :-1].contiguous(), weights[..., -1].contiguous()
        ctx.save_for_backward(weights, null)
        return weights, null

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: th.Tensor, grad_null: th.Tensor) -> tuple[th.Tensor | None, ...]:
        weights, null = ctx.saved_tensors
        mean = (grad * weights).sum(-1).addcmul_(grad_null, null)
        return (grad - mean.unsqueeze(-1)).mul_(weights), None, (grad_null - mean).mul_(null)


_masked_softmax: Callable[..., tuple[th.Tensor, th.Tensor]] = _MaskedSoftmax.apply  # torch gives it no types


def finite(values: th.Tensor) -> th.Tensor:
    """
    :return: ``values`` with zeros for what is not finite: in a matmul, a weight of zero cannot silence a NaN. A NaN that
        may be seen still shows, because it stands in the logits, too.
    """
    return th.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
