"""
The recurrence of Mamba-2 by its authors' Triton kernels (package ``mamba_ssm``), the fastest form on a GPU.

:func:`ssd_official` has the parameters, results and guarantees of :func:`~sb3_cyborg.ops.ssd.ssd_chunked`, with one exception.
The kernels sum ``dt A`` in fp32, and continue the sum through a reset within a chunk. The steps after the reset therefore have
an error of up to ``1e-7`` times the sum before it, where :func:`ssd_chunked` is exact. The kernels also multiply masked values
by zero, so non-finite values are replaced before the call, and the outputs that depend on them are NaN.

None of the kernels of ``mamba_ssm`` that nvcc compiles is needed.
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
"""``torch`` runs everywhere; ``official`` needs a GPU and ``mamba_ssm``; ``auto`` is ``official`` where available."""

INSTALL = 'pip install --no-build-isolation "sb3-cyborg[mamba-cuda]"'
"""Command that installs the kernels; it needs a PyTorch with CUDA."""

MAX_MAGNITUDE = 1e8
"""Larger values count as infinite: the kernels multiply four such values before they mask other episodes."""

Ssd = Callable[..., tuple[th.Tensor, th.Tensor]]

logger = logging.getLogger(__name__)


def check_backend(backend: str) -> None:
    """
    Require a known and available backend.

    :param backend: Name of the backend.
    :raises ValueError: for a name that is not in ``BACKENDS``.
    :raises ImportError: for ``official`` where the kernels cannot be imported.
    """
    if backend not in BACKENDS:
        raise unknown_name("mamba_backend", backend, BACKENDS)
    if backend == "official":
        load_kernels()


def choose_ssd(backend: str, x: th.Tensor) -> Ssd:
    """
    Choose the implementation of the recurrence.

    :param backend: One of ``BACKENDS``; ``auto`` logs its choice, once.
    :param x: Input of the recurrence; its device and dtype determine the choice.
    :return: :func:`ssd_official` or :func:`~sb3_cyborg.ops.ssd.ssd_chunked`.
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
    """
    Process a sequence with the official kernels, in fp32; see the module for the accuracy.

    Parameters and results are those of :func:`~sb3_cyborg.ops.ssd.ssd_chunked`.
    """
    starts = th.zeros(x.shape[:2], dtype=th.bool, device=x.device) if masks is None else ~masks
    with th.no_grad():
        bad_x, bad_dt, bad_b, bad_c = map(_overflows, (x, dt, b, c))
        bad_state = _overflows(state.unsqueeze(1)).squeeze(1)
        lost = _in_same_episode(bad_x | bad_dt | bad_b, bad_state, starts)
    # `dt` is passed after bias and softplus. The softplus of the kernels is log(exp(dt) + 1), whose relative error is up to
    # 6e-5 at a step size of 0.001.
    y, state = load_kernels()(
        _without(x, bad_x),
        _without(dt, bad_dt),
        a,
        _without(b, bad_b),
        _without(c, bad_c),
        chunk_size,
        D=d,
        initial_states=_without(state, bad_state),
        seq_idx=None if masks is None else starts.cumsum(1, dtype=th.int32),  # `initial_states` belong to index 0
        return_final_states=True,
    )
    return _without(y, lost | bad_c, float("nan")), _without(state, lost[:, -1], float("nan"))


@functools.cache
def load_kernels() -> Ssd:
    """
    Import the official kernels and set their precision.

    :return: ``mamba_chunk_scan_combined``.
    :raises ImportError: if they cannot be imported, with the command that installs them.
    """
    try:
        module = import_without_package("mamba_ssm.ops.triton.ssd_combined")
    except ImportError as error:
        raise ImportError(
            f"The official kernels of Mamba-2 cannot be imported ({error}). Install a PyTorch with CUDA, then: {INSTALL}"
        ) from error
    # Triton reads the precision when it compiles a kernel. TF32, its default, has errors of 5e-4, so it is used only if
    # PyTorch's matmuls may use it, too. A value that the user has set is kept.
    precision = "ieee" if th.get_float32_matmul_precision() == "highest" else "tf32"
    os.environ.setdefault("TRITON_F32_DEFAULT", precision)
    kernels: Ssd = module.mamba_chunk_scan_combined
    return kernels


def import_without_package(name: str) -> Any:
    """
    Import a submodule without running the ``__init__`` of its package.

    The ``__init__`` of ``mamba_ssm`` imports ``transformers`` and ``selective_scan_cuda``, which nvcc has to compile. Neither
    is needed here. The package itself can still be imported afterwards.

    :param name: Full name of the submodule.
    :return: The submodule.
    :raises ModuleNotFoundError: for a package that is not installed.
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
    """:return: Whether Triton runs in interpreter mode, i.e. on a CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _log_once(level: int, message: str) -> None:
    logger.log(level, message)


def _overflows(tensor: th.Tensor) -> th.Tensor:
    """:return: Whether a step of the tensor (B, T, ...) is NaN, infinite or too large, (B, T)."""
    norms: th.Tensor = th.linalg.vector_norm(tensor.flatten(2), dim=-1)
    return ~(norms <= MAX_MAGNITUDE)


def _in_same_episode(bad: th.Tensor, bad_state: th.Tensor, starts: th.Tensor) -> th.Tensor:
    """:return: Whether the episode of a step has a bad step up to it, or begins with the bad first state (B,); (B, T)."""
    count = bad.cumsum(1) + bad_state.unsqueeze(1)
    before = th.where(starts, count - bad.long(), 0).cummax(1).values  # count in earlier episodes
    return count > before


def _without(tensor: th.Tensor, where: th.Tensor, value: float = 0.0) -> th.Tensor:
    return tensor.masked_fill(where.view(*where.shape, *[1] * (tensor.dim() - where.dim())), value)
