"""
Compiled kernels for the CPU, loaded with ctypes: no header of PyTorch or Python, one library for all of their versions.

Pointers come from ``tensor.data_ptr()``. Where the library is missing or not in use, PyTorch's operations run instead.
"""

from sb3_cyborg.kernels.library import KernelStatus, get, status

__all__ = ["KernelStatus", "describe", "get", "status"]


def describe() -> str:
    """
    :return: One line for a log: the instruction set of the kernels in use, or why none are in use and what to do.
    :raises ValueError: if ``SB3_CYBORG_KERNELS`` is unknown or not supported.
    """
    now = status()
    if now.isa is not None:
        return f"Compiled CPU kernels: {now.isa}"
    return f"Compiled CPU kernels: not in use, PyTorch's operations run instead ({now.reason}). To use them: {now.remedy}"
