"""
The core of Mamba-2 by its authors' Triton kernels (package ``mamba_ssm``): the fast way on a GPU.

:func:`ssd_official` takes and returns what :func:`~sb3_cyborg.ops.ssd.ssd_chunked` does, and keeps the same promises but
one. The kernels multiply by zero what they do not use, so what is not finite is taken out before and its NaN put back
after them. But they sum ``dt A`` in fp32, on through a reset in mid-chunk: what follows one is off by up to ``1e-7`` times
the sum that the chunk had before it, where :func:`ssd_chunked` is exact.

No kernel of ``mamba_ssm`` that has to be compiled by nvcc is needed.
"""

import functools
import importlib
import importlib.util
import logging
import os
import sys
from collections.abc import Callable
from typing import Any

import torch as th

from sb3_cyborg.checks import unknown_name
from sb3_cyborg.ops.ssd import CHUNK, ssd_chunked

BACKENDS = ("auto", "torch", "official")
"""``torch`` runs everywhere; ``official`` needs a GPU and ``mamba_ssm``; ``auto`` takes ``official`` where it can."""

INSTALL = 'pip install --no-build-isolation "sb3-cyborg[mamba-cuda]"'
"""How to get the kernels, after a PyTorch with CUDA."""

LARGEST = 1e8
"""What is larger counts as infinite: the kernels multiply four such numbers before they drop what is of another episode."""

Ssd = Callable[..., tuple[th.Tensor, th.Tensor]]

logger = logging.getLogger(__name__)


def check_backend(backend: str) -> None:
    """
    :raises ValueError: for a name that is none of ``BACKENDS``.
    :raises ImportError: for ``official`` where the kernels cannot be imported.
    """
    if backend not in BACKENDS:
        raise unknown_name("mamba_backend", backend, BACKENDS)
    if backend == "official":
        load_kernels()


def choose_ssd(backend: str, x: th.Tensor) -> Ssd:
    """
    :param backend: One of ``BACKENDS``; ``auto`` logs its choice, once.
    :param x: The input of the core; its device and precision decide.
    :return: The function that computes the core.
    :raises ValueError: for ``official`` with a tensor that is not fp32 or not on a GPU.
    :raises ImportError: for ``official`` where the kernels cannot be imported.
    """
    if backend == "official":
        if x.dtype != th.float32 or not (x.is_cuda or _interpreted()):
            raise ValueError(
                f"`mamba_backend='official'` needs fp32 tensors on a CUDA device, got {x.dtype} on {x.device}. Use 'auto' or "
                f"'torch' here; for the official kernels, install a PyTorch with CUDA, then: {INSTALL}"
            )
        load_kernels()
        return ssd_official
    if backend == "auto" and x.is_cuda and x.dtype == th.float32:
        try:
            load_kernels()
        except ImportError as error:
            _log_once(logging.WARNING, f"mamba_backend='auto' takes 'torch' on {x.device.type}. {error}")
        else:
            precision = os.environ["TRITON_F32_DEFAULT"]
            _log_once(logging.INFO, f"mamba_backend='auto' takes 'official' on {x.device.type}, products in {precision}.")
            return ssd_official
    elif backend == "auto":
        _log_once(logging.INFO, f"mamba_backend='auto' takes 'torch' for {x.dtype} on {x.device.type}.")
    return ssd_chunked


def ssd_official(
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
    """Arguments and results as those of :func:`~sb3_cyborg.ops.ssd.ssd_chunked`, in fp32; see the top of the module."""
    starts = th.zeros(x.shape[:2], dtype=th.bool, device=x.device) if masks is None else ~masks
    with th.no_grad():
        bad_x, bad_dt, bad_b, bad_c = map(_bad, (x, dt, b, c))
        bad_state = _bad(state.unsqueeze(1)).squeeze(1)
        lost = _in_same_episode(bad_x | bad_dt | bad_b, bad_state, starts)
    # `dt` is handed over as it is, not before bias and softplus, as the kernels would have it: their softplus is
    # log(exp(dt) + 1), which is off by up to 6e-5 of a step size of 0.001.
    y, state = load_kernels()(
        _without(x, bad_x),
        _without(dt, bad_dt),
        a,
        _without(b, bad_b),
        _without(c, bad_c),
        chunk_size,
        D=d,
        initial_states=_without(state, bad_state),
        seq_idx=None if masks is None else starts.cumsum(1, dtype=th.int32),  # the first state reaches where it is 0
        return_final_states=True,
    )
    return _without(y, lost | bad_c, float("nan")), _without(state, lost[:, -1], float("nan"))


@functools.cache
def load_kernels() -> Ssd:
    """
    :return: ``mamba_chunk_scan_combined``.
    :raises ImportError: with the command that installs it.
    """
    try:
        module = import_without_package("mamba_ssm.ops.triton.ssd_combined")
    except ImportError as error:
        raise ImportError(
            f"The official kernels of Mamba-2 cannot be imported ({error}). Install a PyTorch with CUDA, then: {INSTALL}"
        ) from error
    # Before a kernel is compiled, once for the whole process: TF32, the default of Triton, has errors of 5e-4. Who allows
    # it for PyTorch's own matmuls gets it here, too; and what the user has set stays.
    precision = "ieee" if th.get_float32_matmul_precision() == "highest" else "tf32"
    os.environ.setdefault("TRITON_F32_DEFAULT", precision)
    kernels: Ssd = module.mamba_chunk_scan_combined
    return kernels


def import_without_package(name: str) -> Any:
    """
    Import a submodule without running the ``__init__`` of its package: that of ``mamba_ssm`` needs ``transformers`` and
    ``selective_scan_cuda``, which nvcc has to compile, and none of it is needed here.

    :param name: Full name of the submodule.
    :return: It. The package itself is left as it was, for others to import.
    """
    package = name.partition(".")[0]
    if package in sys.modules:
        return importlib.import_module(name)
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)
    sys.modules[package] = importlib.util.module_from_spec(spec)
    try:
        return importlib.import_module(name)
    finally:
        del sys.modules[package]


def _interpreted() -> bool:
    """:return: Whether Triton interprets kernels, which it does on a CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _log_once(level: int, message: str) -> None:
    logger.log(level, message)


def _bad(tensor: th.Tensor) -> th.Tensor:
    """:return: Which steps of the tensor (B, T, ...) hold what is not finite or too large, (B, T)."""
    norms: th.Tensor = th.linalg.vector_norm(tensor.flatten(2), dim=-1)
    return ~(norms <= LARGEST)


def _in_same_episode(bad: th.Tensor, bad_state: th.Tensor, starts: th.Tensor) -> th.Tensor:
    """:return: Which steps have a bad one, or the bad first state (B,), in their episode up to themselves, (B, T)."""
    count = bad.cumsum(1) + bad_state.unsqueeze(1)
    before = th.where(starts, count - bad.long(), 0).cummax(1).values  # of earlier episodes
    return count > before


def _without(tensor: th.Tensor, where: th.Tensor, value: float = 0.0) -> th.Tensor:
    return tensor.masked_fill(where.view(*where.shape, *[1] * (tensor.dim() - where.dim())), value)
