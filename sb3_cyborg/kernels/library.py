"""
The library of compiled kernels: found, checked and loaded when it is first used.

``SB3_CYBORG_KERNELS`` chooses an instruction set (``avx512``, ``avx2``, ``neon`` or ``base``) instead of the best one, or
``off``. It is read once, at the first use.
"""

import ctypes
import functools
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sb3_cyborg.kernels.build import FOLDER, LIBRARY, is_current

VARIABLE = "SB3_CYBORG_KERNELS"
OFF = "off"
SUPPORTED = {"avx512": ("avx512", "avx2", "base"), "avx2": ("avx2", "base"), "neon": ("neon",), "base": ("base",)}
"""The instruction sets that a processor can run, by its best one."""
REBUILD = (
    "Linux or macOS (on Windows: WSL)"
    if sys.platform == "win32"
    else "install a C++ compiler (g++ or clang++), then run `python -m sb3_cyborg.kernels`"
)


@dataclass(frozen=True)
class KernelStatus:
    """
    Whether compiled kernels are in use.

    :param isa: The instruction set of the kernels in use, a key of ``SUPPORTED``; ``None`` if none are in use.
    :param path: The file of the library, which may be missing.
    :param reason: Why none are in use; empty otherwise.
    :param remedy: What brings them into use; empty otherwise.
    """

    isa: str | None
    path: Path
    reason: str = ""
    remedy: str = ""


def load(path: Path, wanted: str = "") -> tuple[KernelStatus, ctypes.CDLL | None]:
    """
    :param path: The file of a library.
    :param wanted: An instruction set, ``off``, or an empty string for the best instruction set.
    :return: The status, and the library if its kernels can be used.
    :raises ValueError: for an unknown instruction set, and for one that this processor or this library does not have.
    """
    if wanted not in ("", OFF, *SUPPORTED):
        raise ValueError(f"{VARIABLE}={wanted!r} is unknown; {_choices(path)}")
    if wanted == OFF:
        return KernelStatus(None, path, f"{VARIABLE} is {OFF}", f"unset {VARIABLE}"), None
    try:
        library = _open(path)
    except OSError as error:
        if wanted:
            raise ValueError(f"{VARIABLE}={wanted!r} needs compiled kernels, but {error}; {REBUILD}") from error
        return KernelStatus(None, path, str(error), REBUILD), None
    best = _best_isa(library)
    if wanted and wanted not in SUPPORTED[best]:
        raise ValueError(f"{VARIABLE}={wanted!r} is not supported by this processor; {_choices(path)}")
    return KernelStatus(wanted or best, path), library


def status() -> KernelStatus:
    """
    :return: Whether compiled kernels are in use in this process.
    :raises ValueError: if ``SB3_CYBORG_KERNELS`` is unknown or not supported.
    """
    return _loaded()[0]


def get(name: str, argtypes: Sequence[type], restype: type | None = None) -> Callable[..., Any]:
    """
    :param name: A kernel, without the suffix of its instruction set.
    :param argtypes: The ctypes types of its arguments, in order. Memory that a pointer names must outlive the call.
    :param restype: The ctypes type of its result; ``None`` for void.
    :return: The kernel for the instruction set in use. It releases Python's global lock while it runs.
    :raises RuntimeError: if no compiled kernels are in use: check ``status`` first.
    :raises ValueError: if ``SB3_CYBORG_KERNELS`` is unknown or not supported.
    :raises AttributeError: if the library has no kernel of that name.
    """
    now, library = _loaded()
    if library is None:
        raise RuntimeError(f"{name!r}: no compiled kernels are in use: {now.reason}; {now.remedy}")
    kernel = library[f"{name}_{now.isa}"]
    kernel.argtypes = argtypes
    kernel.restype = restype
    return kernel


@functools.cache
def _loaded() -> tuple[KernelStatus, ctypes.CDLL | None]:
    return load(LIBRARY, os.environ.get(VARIABLE, ""))


def _open(path: Path) -> ctypes.CDLL:
    """:raises OSError: with the reason, if there is no library, it does not load, or it was built from other sources."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: it could not be built when the package was installed")
    if not is_current(path):
        raise OSError(f"{path} was built from other sources than {FOLDER / 'src'}")
    return ctypes.CDLL(str(path))


def _best_isa(library: ctypes.CDLL) -> str:
    best_isa = library["sb3_cyborg_best_isa"]
    best_isa.restype = ctypes.c_char_p
    name: bytes = best_isa()
    return name.decode()


def _choices(path: Path) -> str:
    try:
        isas = ", ".join(SUPPORTED[_best_isa(_open(path))])
    except OSError as error:
        return f"`{OFF}` or unset works: {error}"
    return f"this processor has: {isas}; `{OFF}` uses none"
