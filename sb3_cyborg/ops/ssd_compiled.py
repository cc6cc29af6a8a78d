"""The recurrence of Mamba-2 by compiled kernels, on a CPU: step by step, with the states of a head in the cache."""

from collections.abc import Callable
from typing import Any

import torch as th
from torch.autograd.function import once_differentiable

from sb3_cyborg.kernels import primitives as kernels
from sb3_cyborg.ops.ssd import CHUNK


def ssd_compiled(
    x: th.Tensor,
    dt: th.Tensor,
    a: th.Tensor,
    b: th.Tensor,
    c: th.Tensor,
    d: th.Tensor,
    state: th.Tensor,
    masks: th.Tensor | None = None,
    chunk_size: int = CHUNK,
) -> tuple[th.Tensor, th.Tensor]:
    """
    Process a sequence in fp32; :func:`~sb3_cyborg.kernels.primitives.usable` must be true for the tensors.

    Parameters and results are those of :func:`~sb3_cyborg.ops.ssd.ssd_chunked`, but ``chunk_size`` has no effect, there is no
    ``MAX_MAGNITUDE`` (a value that is not finite spreads as in :func:`~sb3_cyborg.ops.ssd.ssd_reference`), and the gradient of
    ``dt`` is exact for all values.
    """
    return _ssd(x, dt, a, b, c, d, state, masks)


class _SSD(th.autograd.Function):
    """:func:`ssd_compiled` as one autograd node."""

    @staticmethod
    def forward(
        ctx: Any,
        x: th.Tensor,
        dt: th.Tensor,
        a: th.Tensor,
        b: th.Tensor,
        c: th.Tensor,
        d: th.Tensor,
        state: th.Tensor,
        masks: th.Tensor | None,
    ) -> tuple[th.Tensor, th.Tensor]:
        y, last, saved = kernels.ssd_forward(x, dt, a, b, c, d, state, masks)
        ctx.save_for_backward(x, dt, a, b, c, d, masks, saved)
        return y, last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: th.Tensor, grad_state: th.Tensor) -> tuple[th.Tensor | None, ...]:
        x, dt, a, b, c, d, masks, saved = ctx.saved_tensors
        return *kernels.ssd_backward(x, dt, a, b, c, d, masks, saved, grad, grad_state), None


_ssd: Callable[..., tuple[th.Tensor, th.Tensor]] = _SSD.apply  # torch gives it no types
