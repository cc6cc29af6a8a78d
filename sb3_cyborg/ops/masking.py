"""Masked softmax, and the replacement of non-finite values before a matrix product."""

from collections.abc import Callable
from typing import Any

import torch as th
from torch.autograd.function import once_differentiable


def masked_softmax(logits: th.Tensor, visible: th.Tensor, null_logits: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
    """
    Softmax over the visible entries and one null entry, which is always visible; once differentiable.

    :param logits: Scores of the entries, (..., S); those of invisible entries have no effect, even if they are NaN.
    :param visible: Bool, broadcastable to ``logits``.
    :param null_logits: Scores of the null entry, (...,).
    :return: Weights of the entries (..., S) and of the null entry (...,).
    """
    return _masked_softmax(logits, visible, null_logits)


class _MaskedSoftmax(th.autograd.Function):
    """:func:`masked_softmax` as one autograd node: the backward of ``cat``, ``where`` and slices needs much more memory."""

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
    Replace non-finite values by zeros, because in a matmul a weight of zero times NaN is NaN.

    A NaN in a visible entry still reaches the output, because the logits contain it as well.

    :param values: Any shape.
    :return: The values, with zeros for NaN and infinities.
    """
    return th.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
