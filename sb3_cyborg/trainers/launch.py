"""Starts the processes of data-parallel training on this machine, with the launcher of PyTorch that ``torchrun`` uses."""

import json
import logging
import os
import sys
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
"""Environment variable with the file that the launcher reads the error of a process from."""
RESTART_COUNT = "TORCHELASTIC_RESTART_COUNT"
"""Environment variable with the number of times that the launcher has started the processes again."""

CONSEQUENCE = "consequence"
"""Key in the file of an error: whether it is the consequence of an error of another process."""


class WorkerError(RuntimeError):
    """
    A process of data-parallel training has failed, and all of them have ended.

    :param message: The error, with the number of the process.
    :param exit_code: Its exit code, above 0; 1 if a signal has ended it.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def launch(arguments: Sequence[str], workers: int, max_restarts: int = 0) -> None:
    """
    Run ``sb3-cyborg train`` in several processes that train together, and wait for their end.

    :param arguments: Arguments of the command.
    :param workers: Number of processes, >= 1.
    :param max_restarts: How often all processes are started again after one of them has failed.
    :raises WorkerError: if a process fails, or is ended by a signal. All others have ended, too.
    :raises KeyboardInterrupt: on Ctrl-C and SIGTERM, when all processes have ended.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # Errors are raised from here; the launcher would print a report of several lines as well.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=workers,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=max_restarts,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "sb3_cyborg.cli", "train", *arguments)
    except SignalException as error:
        raise KeyboardInterrupt from error
    except ChildFailedError as error:
        raise _root_cause(error.failures) from None


def _root_cause(failures: dict[int, "ProcessFailure"]) -> WorkerError:
    """:return: The error of the process that failed first; those that lost their connection to it fail in consequence."""

    def order(rank: int) -> tuple[bool, bool, int]:
        failure = failures[rank]
        return bool(failure.error_file_data.get(CONSEQUENCE)), failure.exitcode >= 0, failure.timestamp

    rank = min(failures, key=order)
    failure = failures[rank]
    if failure.exitcode < 0:
        return WorkerError(f"Rank {rank} was ended by {failure.signal_name()} (process {failure.pid}).", 1)
    known = CONSEQUENCE in failure.error_file_data
    return WorkerError(
        failure.message if known else f"Rank {rank} has failed with exit code {failure.exitcode}.", failure.exitcode
    )


def report_error(message: str, is_consequence: bool) -> bool:
    """
    Write an error of this process for the launcher, if one has started it.

    :param message: The error, one line.
    :param is_consequence: Whether another process has failed before.
    :return: Whether the launcher will show it.
    """
    if not (path := os.environ.get(ERROR_FILE)):
        return False
    text = message if is_consequence else f"Rank {os.environ.get('RANK', '0')}: {message}"
    Path(path).write_text(json.dumps({"message": text, "timestamp": int(time.time()), CONSEQUENCE: is_consequence}))
    return True


def is_worker() -> bool:
    """:return: Whether a launcher has started this process, as one of several or alone."""
    return ERROR_FILE in os.environ


def is_restarted() -> bool:
    """:return: Whether the launcher has started the processes again after a failure."""
    return int(os.environ.get(RESTART_COUNT, "0")) > 0
