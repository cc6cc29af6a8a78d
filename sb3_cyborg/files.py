"""Atomic writing of files."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import IO

TEMPORARY = ".writing"
"""Suffix of files that are being written. A process that is killed leaves such a file behind."""


def write_atomically(path: str | Path, write: Callable[[IO[bytes]], object]) -> None:
    """
    Write a file so that at any moment the path holds either the complete old content or the complete new one.

    :param path: The file; its folder is created if it is missing. A link stays, and the file that it points to is replaced.
    :param write: Writes the content into an open file.
    """
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")
    try:
        with open(temporary, "w+b") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Flush the new name to the disk, where the system can open folders (not on Windows)."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_text(path: str | Path, text: str) -> None:
    """
    :func:`write_atomically` for text.

    :param path: The file; its folder is created if it is missing.
    :param text: The content.
    """
    write_atomically(path, lambda file: file.write(text.encode()))
