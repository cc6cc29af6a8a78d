"""The lock of a run: one process at a time writes into the folder of a run."""

import datetime
import os
import socket
import sys
from pathlib import Path
from types import TracebackType
from typing import IO

from sb3_cyborg.checks import warn_caller

LOCK_FILE = "run.lock"

if sys.platform == "win32":
    import msvcrt

    LOCKED_BYTE = 2**30
    """Position of the byte that is locked. It is behind the text, which other processes could not read otherwise."""

    def _try_lock(file: IO[str]) -> None:
        os.lseek(file.fileno(), LOCKED_BYTE, os.SEEK_SET)
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except PermissionError as error:
            raise BlockingIOError from error

else:
    import fcntl

    def _try_lock(file: IO[str]) -> None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


class RunInUseError(RuntimeError):
    """Another trainer writes into the folder of the run."""


class RunLock:
    """
    A lock of the operating system on the file ``run.lock`` of a run. The system releases it when the process ends in any way,
    ``SIGKILL`` included, so no lock is ever left over. The file stays, and names the last process that held it.

    Where the file system has no locks (some network folders), the lock is a warning.

    :param run: Folder of the run, which must exist.
    """

    def __init__(self, run: Path) -> None:
        self.run = run
        self._file: IO[str] | None = None

    @property
    def held(self) -> bool:
        """Whether this object holds the lock."""
        return self._file is not None

    def acquire(self) -> None:
        """
        Take the lock. Nothing happens if this object holds it already.

        :raises RunInUseError: if another trainer holds it, in this process or in another one, with its number and its start.
        :raises OSError: if the folder cannot be written.
        """
        if self._file is not None:
            return
        file = open(self.run / LOCK_FILE, "a+", encoding="utf-8", errors="replace")  # noqa: SIM115  # open while it is held
        try:
            _try_lock(file)
        except BlockingIOError:
            with file:
                raise RunInUseError(f"The run {str(self.run)!r} is in use by {_holder(file)}: wait for its end.") from None
        except OSError as error:
            warn_caller(f"The run {str(self.run)!r} cannot be locked ({error}): start no second process for it.")
        except BaseException:
            file.close()
            raise
        self._file = file
        try:
            since = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()} since {since}\n")
            file.flush()
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Give the lock back, if this object holds it."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> "RunLock":
        self.acquire()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.release()


def _holder(file: IO[str]) -> str:
    """:return: The process that holds a lock, from the file. It may have written nothing yet."""
    file.seek(0)
    return file.readline(200).strip() or "another process"
