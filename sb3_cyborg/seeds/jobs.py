"""Runs the seeds of a group as jobs, several at a time."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

from sb3_cyborg.seeds.seed_runs import SeedRun

ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
"""Environment of a job: threads of several jobs would compete for the cores."""

PR_SET_PDEATHSIG = 1
"""A constant of ``prctl(2)`` of Linux."""

POLL_SECONDS = 0.2
"""Interval at which jobs are checked."""

INTERRUPTED = 130
"""Exit code of a run that a signal has stopped."""

FINISHED, FAILED, STOPPED, WAITING = "finished", "failed", "stopped", "not started"
"""States of a run at the end of a call."""


class Job(Protocol):
    """The process of a run."""

    def poll(self) -> int | None:
        """:return: The exit code, negative for the number of a signal; ``None`` while it runs."""

    def stop(self, at_once: bool) -> None:
        """
        Ask the process to save a checkpoint and to end.

        :param at_once: End it without saving.
        """


Start = Callable[[SeedRun], Job]
"""Starts the job of a run."""


class LocalJob:
    """
    A process on this machine, in a session of its own: it gets the signals that :meth:`stop` sends, not those of the terminal.
    On Linux it is stopped if its parent dies.

    :param run: The run.
    """

    def __init__(self, run: SeedRun) -> None:
        with open(run.log, "ab") as log:
            self.process = subprocess.Popen(
                run.command(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **ONE_THREAD},
                start_new_session=True,
                preexec_fn=_prepare_signals if sys.platform == "linux" else None,
            )

    def poll(self) -> int | None:
        """:return: The exit code, negative for the number of a signal; ``None`` while it runs."""
        return self.process.poll()

    def stop(self, at_once: bool) -> None:
        """
        Send ``SIGTERM``, at which the run saves a checkpoint.

        :param at_once: Send ``SIGKILL`` to the process and its workers.
        """
        if self.process.poll() is None:
            if at_once and os.name == "posix":
                os.killpg(self.process.pid, signal.SIGKILL)
            else:
                self.process.terminate()


def _prepare_signals() -> None:
    """
    Let the kernel send ``SIGTERM`` to this process when its parent dies. Ignore ``SIGUSR2``, which a cluster sends to all
    processes of a job before it preempts the job: the parent handles it.
    """
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


class Outcome(NamedTuple):
    """
    The end of a run in this call.

    :param run: The run.
    :param state: :data:`FINISHED`, :data:`FAILED`, :data:`STOPPED` by a signal, or :data:`WAITING`.
    :param reason: Why it has failed, in one line.
    """

    run: SeedRun
    state: str
    reason: str = ""


@contextlib.contextmanager
def _recorded_signals() -> Iterator[list[int]]:
    """:return: A list that grows with each Ctrl-C, ``SIGTERM`` and ``SIGHUP``; a ``SIGHUP`` that was ignored stays ignored."""
    received: list[int] = []
    numbers = [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    hung_up = [number for number in numbers[2:] if signal.getsignal(number) is signal.SIG_IGN]
    before = {
        number: signal.signal(number, lambda number, _: received.append(number)) for number in numbers if number not in hung_up
    }
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_jobs(runs: Sequence[SeedRun], jobs: int, start: Start, tell: Callable[[str], None]) -> list[Outcome]:
    """
    Run the seeds of a group, several at a time. Those that are finished are left out, and those that have begun are resumed. A
    run that fails does not end the others.

    The first Ctrl-C, ``SIGTERM`` or ``SIGHUP`` starts no further run and lets each running one save a checkpoint and end. The
    second ends them at once with a checkpoint, the third without.

    :param runs: The runs.
    :param jobs: Number of jobs at a time.
    :param start: Starts a job.
    :param tell: Gets a line at the start and at the end of each run.
    :return: The end of each run, in the order of ``runs``.
    """
    ended: dict[SeedRun, Outcome] = {}
    waiting, running, sizes, handled = list(runs), dict[SeedRun, Job](), dict[SeedRun, int](), 0
    with _recorded_signals() as received:
        try:
            while running or (waiting and not received):
                while waiting and len(running) < jobs and not received:
                    run = waiting.pop(0)
                    if run.is_finished:
                        ended[run] = Outcome(run, FINISHED)
                        tell(f"seed {run.seed}: finished before, in {run.folder}")
                        continue
                    sizes[run] = run.log.stat().st_size if run.log.exists() else 0
                    running[run] = start(run)
                    tell(f"seed {run.seed}: started; its output is in {run.log}")
                if len(received) > handled:
                    handled = len(received)
                    tell(f"{signal.Signals(received[-1]).name}: stopping {len(running)} jobs; again to stop at once.")
                    for job in running.values():
                        job.stop(at_once=handled > 2)
                for run, job in list(running.items()):
                    if (code := job.poll()) is not None:
                        del running[run]
                        ended[run] = _outcome(run, code, sizes[run], bool(received))
                        tell(f"seed {run.seed}: {': '.join(filter(None, ended[run][1:]))}")
                time.sleep(POLL_SECONDS)
        except BaseException:
            for job in running.values():
                job.stop(at_once=False)
            raise
    return [ended.get(run, Outcome(run, WAITING)) for run in runs]


def _outcome(run: SeedRun, code: int, size: int, stopped: bool) -> Outcome:
    """
    :param run: A run whose job has ended.
    :param code: Its exit code.
    :param size: Size of its log when it was started.
    :param stopped: Whether this process has stopped it.
    """
    if code == 0:
        return Outcome(run, FINISHED)
    if stopped:
        return Outcome(run, STOPPED)
    if code == INTERRUPTED:
        return Outcome(run, FAILED, "a signal from elsewhere has stopped it")
    if code < 0:
        return Outcome(run, FAILED, f"its process was ended by {signal.Signals(-code).name}")
    with contextlib.suppress(OSError), open(run.log, "rb") as file:
        file.seek(size)
        for line in reversed(file.read().decode(errors="replace").splitlines()):
            if line.startswith("sb3-cyborg: error: "):
                return Outcome(run, FAILED, line.removeprefix("sb3-cyborg: error: "))
    return Outcome(run, FAILED, f"exit code {code}, see {run.log}")
