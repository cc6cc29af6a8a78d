"""
What happens beside training: evaluation, checkpoints, logs, the progress that is shown.

All that needs a whole model happens where a rollout begins: the update before it is complete, and nothing that was collected
waits for one.
"""

import contextlib
import csv
import json
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import HumanOutputFormat, KVWriter, Logger, TensorBoardOutputFormat
from stable_baselines3.common.monitor import ResultsWriter
from stable_baselines3.common.utils import safe_mean

from sb3_cyborg.memory_ppo.memory_ppo import MemoryPPO
from sb3_cyborg.trainers.checkpoints import write_atomically, write_text

MONITOR_FILE, EVALUATIONS = "monitor.csv", "evaluations.npz"
STEPS_COLUMN = "timesteps"
SECONDS_BETWEEN_LINES = 30.0
SECONDS_BETWEEN_FRAMES = 0.2

Evaluate = Callable[[], tuple[list[float], list[int]]]
"""Gives returns and lengths of the episodes of one evaluation."""


class RolloutMark(BaseCallback):
    """
    Remember how many steps the weights have learned from, or will with the next update, and end training when asked to.

    Of a rollout that breaks off nothing is learned: its steps do not count.
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
    """Let Ctrl-C and SIGTERM end training after the step that is being made; the second one does at once."""
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


class MonitorLog(BaseCallback):
    """
    Write SB3's ``monitor.csv``: a row for each training episode, with the steps after which it ended in a column more.

    A resumed run adds to it. Episodes after the checkpoint are cut off: their steps are made again.

    :param run: Folder of the run.
    :param env_id: Name of the environment, for the header.
    """

    def __init__(self, run: Path, env_id: str) -> None:
        super().__init__()
        self.run, self.env_id = run, env_id

    def _on_training_start(self) -> None:
        path = self.run / MONITOR_FILE
        started = cut_monitor(path, self.num_timesteps)
        self._started = time.time() if started is None else started
        self._writer = ResultsWriter(
            str(self.run),
            header={"t_start": self._started, "env_id": self.env_id},
            extra_keys=(STEPS_COLUMN,),
            override_existing=started is None,
        )

    def _on_step(self) -> bool:
        for info in self.locals["infos"]:
            if episode := info.get("episode"):
                row = {"r": episode["r"], "l": episode["l"], "t": round(time.time() - self._started, 6)}
                self._writer.write_row(row | {STEPS_COLUMN: self.num_timesteps})
        return True

    def close(self) -> None:
        """Close the file."""
        if hasattr(self, "_writer"):
            self._writer.close()


def cut_monitor(path: Path, num_timesteps: int) -> float | None:
    """
    Cut off the episodes that ended later, and a line that was left unfinished.

    :param path: A ``monitor.csv``.
    :param num_timesteps: Steps of the checkpoint.
    :return: When the file was begun, or ``None`` if it is missing or has no header.
    """
    if not path.is_file():
        return None
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    try:
        started = float(json.loads(lines[0].removeprefix("#"))["t_start"])
        column = next(csv.reader([lines[1]])).index(STEPS_COLUMN)
    except (IndexError, ValueError, KeyError):
        return None

    def kept(line: str) -> bool:
        cells = line.rstrip("\n").split(",")
        return line.endswith("\n") and len(cells) > column and int(cells[column]) <= num_timesteps

    write_text(path, "".join([*lines[:2], *(line for line in lines[2:] if kept(line))]))
    return started


class Evaluation(BaseCallback):
    """
    Evaluate now and then, keep the results as SB3's ``EvalCallback`` does, and save the best model.

    :param run: Folder of the run.
    :param interval: Environment steps between two evaluations.
    :param evaluate: Plays the episodes.
    :param save_best: Saves a model that is better than all before, given its mean return.
    :param best: Mean return of the best model so far.
    """

    def __init__(
        self, run: Path, interval: int, evaluate: Evaluate, save_best: Callable[[float], None], best: float = -np.inf
    ) -> None:
        super().__init__()
        self.run, self.interval, self.evaluate, self.save_best, self.best = run, interval, evaluate, save_best, best

    def _on_training_start(self) -> None:
        self.rows = read_evaluations(self.run / EVALUATIONS, self.num_timesteps)
        self.last = self.num_timesteps

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        if self.num_timesteps // self.interval > self.last // self.interval:
            self.run_now()

    def run_now(self) -> None:
        """Evaluate, unless that has just been done."""
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


def read_evaluations(path: Path, num_timesteps: int) -> list[tuple[int, list[float], list[int]]]:
    """:return: Steps, returns and lengths of the evaluations up to ``num_timesteps``."""
    if not path.is_file():
        return []
    with np.load(path) as file:
        columns = (file[name].tolist() for name in ("timesteps", "results", "ep_lengths"))
        return [row for row in zip(*columns, strict=True) if row[0] <= num_timesteps]


class Checkpoints(BaseCallback):
    """
    Save the run now and then.

    A checkpoint is saved before the rollout that would make the steps since the last one more than ``interval``, so that a run
    that is killed loses at most that many, or one rollout if that is longer.

    :param interval: Environment steps.
    :param save: Saves one.
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
        rollout = model.n_steps * model.n_envs
        if self.num_timesteps > self.last and self.num_timesteps + rollout - self.last > self.interval:
            self.save()
            self.last = self.num_timesteps


class WriteGates(BaseCallback):
    """Log a histogram of the memory's write gates in each rollout, if it has such gates."""

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        from sb3_cyborg.viewers.inspection import write_gates

        assert isinstance(self.model, MemoryPPO)
        gates = write_gates(self.model)
        if gates is not None:
            self.logger.record("memory/write_gates", gates, exclude=("stdout", "log", "json", "csv"))


class ProgressDisplay(BaseCallback):
    """
    Show steps, steps per second, the mean return and the time left: a bar in a terminal, a line now and then elsewhere.

    :param console: Where; ``None`` is the standard error, so that a command's output stays its own.
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
        """:return: Speed since the run began or went on, mean return of the last episodes, time left."""
        speed = (self.num_timesteps - self.first) / max(time.perf_counter() - self.began, 1e-9)
        episodes = self.model.ep_info_buffer or ()
        mean = f"{safe_mean([episode['r'] for episode in episodes]):.2f}" if episodes else "-"
        left = clock((self.total - self.num_timesteps) / speed) if speed > 0 else "-"
        return f"{speed:,.0f} steps/s, return {mean}, {left} left"

    def close(self) -> None:
        """Give the terminal back."""
        if self.bar is not None:
            self.bar.stop()


def clock(seconds: float) -> str:
    """:return: Seconds as h:mm:ss."""
    whole = max(0, round(seconds))
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


class WandbOutput(KVWriter):
    """
    Send what SB3 logs to a run of Weights & Biases. Steps are a metric, so that a resumed run may go back to its checkpoint.

    :param run: What ``wandb.init`` returned.
    """

    def __init__(self, run: Any) -> None:
        self.run = run
        run.define_metric("timesteps")
        run.define_metric("*", step_metric="timesteps")

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        import wandb

        values = {
            key: wandb.Histogram(value.tolist()) if isinstance(value, th.Tensor) else value
            for key, value in key_values.items()
            if isinstance(value, (int, float, np.number, th.Tensor))
        }
        self.run.log(values | {"timesteps": step})

    def close(self) -> None:
        self.run.finish()


def make_logger(folder: Path | None, verbose: int, num_timesteps: int, extra: KVWriter | None = None) -> Logger:
    """
    :param folder: TensorBoard's, or ``None``.
    :param verbose: Whether SB3's tables are printed, too.
    :param num_timesteps: Where the run goes on: what TensorBoard has from later steps is of a run that was killed.
    :param extra: Another output.
    :return: SB3's logger.
    """
    outputs: list[KVWriter] = [] if extra is None else [extra]
    if verbose:
        outputs.append(HumanOutputFormat(sys.stdout))
    if folder is not None:
        outputs.append(TensorBoardOutput(str(folder), num_timesteps))
    return Logger(None if folder is None else str(folder), outputs)


class TensorBoardOutput(TensorBoardOutputFormat):
    """SB3's, which on going on hides what was logged after ``num_timesteps``."""

    def __init__(self, folder: str, num_timesteps: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(folder, purge_step=num_timesteps + 1 if num_timesteps else None)
        self._is_closed = False


def start_wandb(run: Path, project: str, config: dict[str, Any]) -> WandbOutput:
    """
    :param run: Folder of the run, which keeps the id: a resumed run goes on there, too.
    :param project: Name of the project.
    :param config: Settings to show.
    :return: An output for SB3's logger.
    """
    import wandb

    id_file = run / "wandb_id"
    if not id_file.is_file():
        write_text(id_file, uuid.uuid4().hex[:8])
    settings: dict[str, Any] = {"project": project, "name": run.name, "config": config, "dir": str(run)}
    return WandbOutput(wandb.init(**settings, id=id_file.read_text(encoding="utf-8"), resume="allow"))
