"""Environments in worker processes, with an error that names the environment whose process failed."""

import contextlib
import multiprocessing as mp
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import gymnasium as gym
from stable_baselines3.common.vec_env import CloudpickleWrapper, SubprocVecEnv, VecEnv
from stable_baselines3.common.vec_env.subproc_vec_env import _worker

POLL_SECONDS = 1.0
"""Interval at which a silent worker is checked. Its pipe may stay open after its death, because a sibling inherited it."""

STEP_SECONDS = 2.0
"""Time that all workers together have to finish a step when they are closed during it, as by a second Ctrl-C."""

CLOSE_SECONDS = 30.0
"""Time that all workers together have to close their environments, which may have programs of their own."""

TERMINATE_SECONDS = 2.0
"""Time that all workers together have to end after ``SIGTERM``, before they are killed."""


class WorkerError(RuntimeError):
    """An environment raised an error in its worker process, or the process died."""


class _Failure:
    """The answer of a worker whose environment raised an error: the error in one line, and the traceback."""

    def __init__(self, error: BaseException) -> None:
        self.summary = f"{type(error).__name__}: {error}"
        self.traceback = traceback.format_exc()


def _reporting_worker(remote: Connection, parent_remote: Connection, make_env: CloudpickleWrapper) -> None:
    try:
        _worker(remote, parent_remote, make_env)
    except Exception as error:
        with contextlib.suppress(OSError):  # the parent may be gone
            remote.send(_Failure(error))


class _Remote:
    """
    The parent's end of a pipe to a worker.

    :param connection: The pipe.
    :param process: The worker process.
    :param label: Name of the environment in errors.
    :param on_error: Function that is called before an error is raised.
    """

    def __init__(self, connection: Connection, process: BaseProcess, label: str, on_error: Callable[[], None]) -> None:
        self.connection, self.process, self.label, self.on_error = connection, process, label, on_error

    def send(self, message: Any) -> None:
        try:
            self.connection.send(message)
        except OSError:
            self.recv()  # raises the worker's own error if it has sent one
            raise self._death() from None

    def recv(self) -> Any:
        try:
            while not self.connection.poll(POLL_SECONDS):
                if not self.process.is_alive() and not self.connection.poll():
                    raise EOFError
            answer = self.connection.recv()
        except (EOFError, OSError):
            raise self._death() from None
        if isinstance(answer, _Failure):
            self.on_error()
            raise WorkerError(f"{self.label} failed in its worker process: {answer.summary}\n\n{answer.traceback}")
        return answer

    def _death(self) -> WorkerError:
        self.process.join(timeout=5)
        code = self.process.exitcode
        self.on_error()
        how = f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with exit code {code}"
        return WorkerError(f"The worker process of {self.label} {how}. Out of memory? See what it printed before.")

    def answers_before(self, deadline: float) -> bool:
        """:return: Whether the worker answers before a time of ``time.monotonic``. The answer is discarded."""
        if not self.connection.poll(max(0.0, deadline - time.monotonic())):
            return False
        self.recv()
        return True

    def close(self) -> None:
        self.connection.close()


class WorkerVecEnv(SubprocVecEnv):
    """
    SB3's ``SubprocVecEnv`` with errors of the workers. If an environment raises an error or its process dies, all workers are
    ended and a :class:`WorkerError` names the environment and the cause. SB3's own class raises an ``EOFError`` without a
    message, or waits forever.

    :param env_fns: Functions that make one environment each, picklable by cloudpickle.
    :param start_method: As in SB3: ``None`` is ``"forkserver"`` where the platform has it, else ``"spawn"``.
    :param name: Name of the environments in errors.
    """

    def __init__(
        self, env_fns: Sequence[Callable[[], gym.Env[Any, Any]]], start_method: str | None = None, name: str = "environment"
    ) -> None:
        self.waiting = False
        self.closed = False
        if start_method is None:
            start_method = "forkserver" if "forkserver" in mp.get_all_start_methods() else "spawn"
        context: Any = mp.get_context(start_method)
        self.processes = []
        self.remotes: tuple[_Remote, ...] = ()
        remotes: list[_Remote] = []
        try:
            for index, env_fn in enumerate(env_fns):
                remote, work_remote = context.Pipe()
                process = context.Process(
                    target=_reporting_worker, args=(work_remote, remote, CloudpickleWrapper(env_fn)), daemon=True
                )
                process.start()
                work_remote.close()
                self.processes.append(process)
                label = f"environment {index} of {len(env_fns)} ({name})"
                remotes.append(_Remote(remote, process, label, self._terminate))
                self.remotes = tuple(remotes)
            for remote in remotes:  # all of them, so that an environment that cannot be made raises its error here
                remote.send(("get_spaces", None))
            answers = [remote.recv() for remote in remotes]
        except BaseException:
            if not self.closed:
                self._terminate()
            raise
        VecEnv.__init__(self, len(env_fns), *answers[0])

    def close(self) -> None:
        """
        Ends the workers. They are terminated if a step does not end within :data:`STEP_SECONDS`, or if an environment does not
        close within :data:`CLOSE_SECONDS`.
        """
        if self.closed:
            return
        deadline = time.monotonic() + STEP_SECONDS
        try:
            if not self.waiting or all(remote.answers_before(deadline) for remote in self.remotes):
                for remote in self.remotes:
                    remote.send(("close", None))
                self._join(CLOSE_SECONDS)
        except WorkerError:  # the error has terminated all workers
            return
        finally:
            if not self.closed:
                self._terminate()

    def _join(self, seconds: float) -> None:
        """Wait for the end of all workers, for some seconds in total."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))

    def _terminate(self) -> None:
        for process in self.processes:
            process.terminate()
        self._join(TERMINATE_SECONDS)
        for process in self.processes:
            if process.is_alive():
                process.kill()
                process.join()
        for remote in self.remotes:
            remote.close()
        self.closed = True
