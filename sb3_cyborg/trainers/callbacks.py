"""
Callbacks of the trainer: evaluation, checkpoints, histograms and progress.

Evaluations and checkpoints happen at the start of a rollout, when the update before it is complete.
"""

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.utils import safe_mean

from sb3_cyborg.memory_ppo.memory_ppo import MemoryPPO
from sb3_cyborg.trainers.checkpoints import UNREADABLE_FILE_ERRORS, write_atomically
from sb3_cyborg.trainers.side_files import move_aside
from sb3_cyborg.trainers.write_gates import write_gates

EVALUATIONS = "evaluations.npz"
SECONDS_BETWEEN_LINES = 30.0
SECONDS_BETWEEN_FRAMES = 0.2

Evaluate = Callable[[], tuple[list[float], list[int]]]
"""Returns the returns and lengths of the episodes of one evaluation."""


class RolloutMark(BaseCallback):
    """
    Count the steps of complete rollouts, and end training when ``stop`` is set.

    An interrupted rollout is discarded: its steps do not count.
    """

    def __init__(self) -> None:
        super().__init__()
        self.num_timesteps_kept = 0
        self.stop = False

    def _on_training_start(self) -> None:
        self.num_timesteps_kept = self.num_timesteps

    def _on_step(self) -> bool:
        return not self.stop

    def _on_rollout_end(self) -> None:
        self.num_timesteps_kept = self.num_timesteps


@contextlib.contextmanager
def stop_on_signals(mark: RolloutMark) -> Iterator[None]:
    """
    End training after the present step on the first Ctrl-C or SIGTERM, and at once on the second.

    :param mark: The callback whose ``stop`` is set.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, _: Any) -> None:
        if mark.stop:
            raise KeyboardInterrupt
        mark.stop = True
        name = signal.Signals(number).name
        print(f"{name}: stopping after this step, or update; press Ctrl-C to stop at once.", file=sys.stderr)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Evaluation(BaseCallback):
    """
    Evaluate regularly, write the results in the format of SB3's ``EvalCallback``, and save the best model.

    :param run: Folder of the run.
    :param interval: Environment steps between two evaluations.
    :param n_episodes: Episodes of one evaluation.
    :param evaluate: Plays these episodes.
    :param save_best: Saves a model that is better than all before, given its mean return.
    :param best: Mean return of the best model so far.
    """

    def __init__(
        self,
        run: Path,
        interval: int,
        n_episodes: int,
        evaluate: Evaluate,
        save_best: Callable[[float], None],
        best: float = -np.inf,
    ) -> None:
        super().__init__()
        self.run, self.interval, self.n_episodes = run, interval, n_episodes
        self.evaluate, self.save_best, self.best = evaluate, save_best, best

    def _on_training_start(self) -> None:
        self.rows = read_evaluations(self.run / EVALUATIONS, self.num_timesteps, self.n_episodes)
        self.last = self.num_timesteps

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        if self.num_timesteps // self.interval > self.last // self.interval:
            self.run_now()

    def run_now(self) -> None:
        """Evaluate, unless the last evaluation was at this step."""
        if self.num_timesteps == self.last:
            return
        self.last = self.num_timesteps
        returns, lengths = self.evaluate()
        self.rows.append((self.num_timesteps, returns, lengths))
        timesteps, results, ep_lengths = (np.array(column) for column in zip(*self.rows, strict=True))
        write_atomically(
            self.run / EVALUATIONS, lambda file: np.savez(file, timesteps=timesteps, results=results, ep_lengths=ep_lengths)
        )
        mean = float(np.mean(returns))
        self.logger.record("eval/mean_reward", mean)
        self.logger.record("eval/mean_ep_length", float(np.mean(lengths)))
        self.logger.record("time/total_timesteps", self.num_timesteps, exclude="tensorboard")
        self.logger.dump(self.num_timesteps)
        if mean > self.best:
            self.best = mean
            self.save_best(mean)


def read_evaluations(path: Path, num_timesteps: int, n_episodes: int) -> list[tuple[int, list[float], list[int]]]:
    """
    :param path: A file of :class:`Evaluation`; it may be missing. If it is damaged, it is moved aside.
    :param num_timesteps: The last step of interest.
    :param n_episodes: Episodes of one evaluation.
    :return: Step, returns and lengths of each evaluation up to that step.
    """
    if not path.exists():
        return []
    try:
        with open(path, "rb") as file:
            archive = np.load(file)
            timesteps, results, ep_lengths = (archive[name] for name in ("timesteps", "results", "ep_lengths"))
        if not results.shape == ep_lengths.shape == (*timesteps.shape, n_episodes):
            raise ValueError(f"the shapes are {timesteps.shape}, {results.shape} and {ep_lengths.shape}")
        if any(array.dtype.kind not in "iuf" for array in (timesteps, results, ep_lengths)):
            raise ValueError("it does not hold numbers")
    except UNREADABLE_FILE_ERRORS as error:
        move_aside(path, error, "The list of evaluations begins anew.")
        return []
    columns = (array.tolist() for array in (timesteps, results, ep_lengths))
    return [row for row in zip(*columns, strict=True) if row[0] <= num_timesteps]


class Checkpoints(BaseCallback):
    """
    Save the run regularly.

    A checkpoint is saved before the rollout that would make the steps since the last one more than ``interval``. So a run that
    is killed loses at most ``interval`` steps, or one rollout if that is longer.

    :param interval: Environment steps.
    :param save: Saves a checkpoint.
    """

    def __init__(self, interval: int, save: Callable[[], object]) -> None:
        super().__init__()
        self.interval, self.save = interval, save

    def _on_training_start(self) -> None:
        self.last = self.num_timesteps

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        model = self.model
        assert isinstance(model, MemoryPPO)
        rollout = model.n_steps * model.total_envs
        if self.num_timesteps > self.last and self.num_timesteps + rollout - self.last > self.interval:
            self.save()
            self.last = self.num_timesteps


class WriteGates(BaseCallback):
    """Log a histogram of the write gates of each rollout, if the memory has write gates."""

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        assert isinstance(self.model, MemoryPPO)
        gates = write_gates(self.model)
        if gates is not None:
            self.logger.record("memory/write_gates", gates, exclude=("stdout", "log", "json", "csv"))


class ProgressDisplay(BaseCallback):
    """
    Show steps, steps per second, mean return and remaining time: as a bar in a terminal, else as a line every 30 seconds.

    :param console: Where it is shown; ``None`` takes the standard error, so that the standard output holds results only.
    """

    def __init__(self, console: Console | None = None) -> None:
        super().__init__()
        self.console = console or Console(stderr=True)
        self.bar: Progress | None = None

    def _on_training_start(self) -> None:
        self.total = self.model._total_timesteps
        self.began, self.first, self.shown = time.perf_counter(), self.num_timesteps, time.perf_counter()
        if self.console.is_terminal:
            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
            self.bar = Progress(*columns, console=self.console, transient=False)
            self.bar.start()
            self.task = self.bar.add_task("", total=self.total, completed=self.num_timesteps)

    def _on_step(self) -> bool:
        now = time.perf_counter()
        if now - self.shown >= (SECONDS_BETWEEN_LINES if self.bar is None else SECONDS_BETWEEN_FRAMES):
            self.shown = now
            self._show()
        return True

    def _on_training_end(self) -> None:
        self._show()

    def _show(self) -> None:
        if self.bar is not None:
            self.bar.update(self.task, completed=self.num_timesteps, description=self.describe())
        else:
            line = f"{self.num_timesteps:,}/{self.total:,} steps, {self.describe()}"
            self.console.print(line, highlight=False, soft_wrap=True)

    def describe(self) -> str:
        """:return: Speed since training began or was resumed, mean return of the last episodes, remaining time."""
        speed = (self.num_timesteps - self.first) / max(time.perf_counter() - self.began, 1e-9)
        episodes = self.model.ep_info_buffer or ()
        mean = f"{safe_mean([episode['r'] for episode in episodes]):.2f}" if episodes else "-"
        left = clock((self.total - self.num_timesteps) / speed) if speed > 0 else "-"
        return f"{speed:,.0f} steps/s, return {mean}, {left} left"

    def close(self) -> None:
        """Stop the bar."""
        if self.bar is not None:
            self.bar.stop()


def clock(seconds: float) -> str:
    """:return: Seconds as h:mm:ss."""
    whole = max(0, round(seconds))
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
