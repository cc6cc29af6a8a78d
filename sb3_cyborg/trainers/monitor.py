"""The file ``monitor.csv`` of SB3's ``Monitor``: written for a run, cut when the run is resumed, and its header read."""

import csv
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.monitor import ResultsWriter

from sb3_cyborg.trainers.checkpoints import write_text
from sb3_cyborg.trainers.side_files import move_aside

MONITOR_FILE = "monitor.csv"
STEPS_COLUMN = "timesteps"
"""A column of our own: environment steps at the end of the episode."""


def read_header(lines: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """
    :param lines: The first two lines of a Monitor file.
    :return: The header, with ``t_start`` (seconds since the epoch) as a float, and the names of the columns.
    :raises ValueError: if these are not the first lines of a Monitor file.
    """
    try:
        header = json.loads(lines[0].removeprefix("#"))
        header["t_start"] = float(header["t_start"])
        columns = next(csv.reader(lines[1:2]))
    except (IndexError, KeyError, StopIteration, TypeError, ValueError, csv.Error) as error:
        raise ValueError(f"it has no header of SB3's Monitor ({error})") from error
    if not {"r", "l", "t"} <= set(columns):
        raise ValueError(f"its columns are {columns}")
    return header, columns


class MonitorLog(BaseCallback):
    """
    Write ``monitor.csv`` in SB3's format: a row for each training episode, with a further column for the steps at its end.

    A resumed run appends to the file. Episodes after the checkpoint are cut off, as their steps are made again.

    :param run: Folder of the run.
    :param env_id: Id of the environment, for the header.
    """

    def __init__(self, run: Path, env_id: str) -> None:
        super().__init__()
        self.run, self.env_id = run, env_id

    def _on_training_start(self) -> None:
        started = cut_monitor(self.run / MONITOR_FILE, self.num_timesteps)
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
    Remove episodes that ended after a step, and an incomplete last line.

    If the file is damaged, it is moved aside, and its readable rows are written anew.

    :param path: A ``monitor.csv``.
    :param num_timesteps: Steps of the checkpoint.
    :return: ``t_start`` of the file, or ``None`` if it is missing or has no header of :class:`MonitorLog`.
    """
    if not path.exists():
        return None
    try:
        # Not `splitlines`, which also splits at control characters of damaged rows.
        lines = [f"{line}\n" for line in path.read_bytes().decode(errors="replace").split("\n")]
        lines[-1] = lines[-1][:-1]  # text after the last line break is an incomplete line
        header, columns = read_header(lines)
        if STEPS_COLUMN not in columns:
            raise ValueError(f"it has no column {STEPS_COLUMN}")
    except (OSError, ValueError) as error:
        move_aside(path, error, f"Its rows begin anew after {num_timesteps:,} steps.")
        return None
    rows = [line for line in lines[2:] if line.endswith("\n")]
    steps = _in_order([_steps_of(row, columns) for row in rows])
    if broken := steps.count(None):
        move_aside(path, f"{broken} of {len(rows)} rows cannot be read", "The other rows are kept.")
    kept = [row for row, end in zip(rows, steps, strict=True) if end is not None and end <= num_timesteps]
    write_text(path, "".join([*lines[:2], *kept]))
    return float(header["t_start"])


def _steps_of(row: str, columns: Sequence[str]) -> int | None:
    """:return: The steps at the end of an episode, or ``None`` for a row that is damaged."""
    cells = row.rstrip("\r\n").split(",")
    try:
        numbers = dict(zip(columns, map(float, cells), strict=True))
        return int(numbers[STEPS_COLUMN])
    except (OverflowError, ValueError):
        return None


def _in_order(steps: Sequence[int | None]) -> list[int | None]:
    """
    :param steps: The steps at the end of each episode; ``None`` for damaged rows.
    :return: The same in ascending order, with ``None`` for those that are out of order: a digit of them is damaged.
    """
    result, last = list[int | None](), 0
    for index, end in enumerate(steps):
        later = next((other for other in steps[index + 1 :] if other is not None), None)
        # A number that is larger than the next one is the wrong one of both, if the next one fits to those before.
        if end is None or end < last or (later is not None and last <= later < end):
            result.append(None)
        else:
            result.append(end)
            last = end
    return result
