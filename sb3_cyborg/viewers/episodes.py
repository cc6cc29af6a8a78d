"""Reads the training episodes of runs from the files that SB3's ``Monitor`` writes."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sb3_cyborg.trainers.monitor import read_header


@dataclass(frozen=True)
class Episodes:
    """
    The E finished episodes of a run, in order of their end.

    :param run: Folder of the run.
    :param env_id: Id of the environment, or an empty string.
    :param columns: ``r`` (return), ``l`` (steps), ``t`` (seconds since the start of the first file), and further columns of
        the Monitor files; (E,) each.
    """

    run: Path
    env_id: str
    columns: dict[str, np.ndarray]

    def axis(self, name: str) -> np.ndarray:
        """
        :param name: ``"steps"`` (of all environments together), ``"episodes"`` or ``"time"`` (hours).
        :return: The end of each episode on this axis, (E,).
        """
        if name == "steps":
            return np.asarray(self.columns["l"].cumsum())
        return np.arange(1, len(self.columns["l"]) + 1) if name == "episodes" else self.columns["t"] / 3600


def monitor_files(folder: Path) -> list[Path]:
    """:return: The Monitor files of a run, in its folder (as in RL Zoo) or below ``monitor`` in it."""
    return sorted([*folder.glob("*monitor.csv"), *(folder / "monitor").rglob("*monitor.csv")])


def find_runs(paths: Sequence[Path | str]) -> list[Path]:
    """
    :param paths: Folders of runs, or folders of these, as RL Zoo's ``logs/memory_ppo``.
    :return: The folders of runs, each once.
    :raises ValueError: for no paths, and for a path that is neither.
    """
    if not paths:
        raise ValueError("No run to plot: give the folder of at least one.")
    runs: dict[Path, None] = {}
    for path in map(Path, paths):
        if not path.is_dir():
            raise ValueError(f"{path} {'is a file' if path.exists() else 'does not exist'}; give the folder of a run.")
        inside = [path] if monitor_files(path) else [folder for folder in sorted(path.iterdir()) if monitor_files(folder)]
        if not inside:
            raise ValueError(f"{path} is not the folder of a run: no *monitor.csv in it, in `monitor` or in a folder below.")
        runs |= dict.fromkeys(inside)
    return list(runs)


def read_episodes(run: Path) -> Episodes:
    """
    Read the Monitor files of a run. An incomplete last line, which a killed run may leave, is skipped.

    :param run: Folder of the run.
    :return: Its episodes.
    :raises ValueError: for files that Monitor did not write, and if no episode has finished.
    """
    files = [_read_monitor(path) for path in monitor_files(run)]
    rows = [row for _, part in files for row in part]
    if not rows:
        raise ValueError(f"No episode of {run} has finished yet: there is nothing to plot.")
    shared = set.intersection(*(set(row) for row in rows))
    rows.sort(key=lambda row: row["t"])
    columns = {name: np.array([row[name] for row in rows]) for name in sorted(shared)}
    columns["t"] -= min(header["t_start"] for header, _ in files)
    env_id = str(files[0][0].get("env_id") or "")
    return Episodes(run, "" if env_id == "None" else env_id, columns)  # Monitor writes None for an environment without an id


def _read_monitor(path: Path) -> tuple[dict[str, Any], list[dict[str, float]]]:
    """:return: The header of a Monitor file, and its rows with ``t`` in seconds since the epoch."""
    *lines, _ = path.read_text(errors="replace").split("\n")  # text after the last line break is an incomplete line
    try:
        header, names = read_header(lines)
    except ValueError as error:
        raise ValueError(f"{path} is not a file that SB3's Monitor wrote: {error}.") from error
    rows: list[dict[str, float]] = []
    began = header["t_start"]
    for number, line in enumerate(lines[2:], start=3):
        try:
            values = next(csv.reader([line]))
            row = {name: _number(value) for name, value in zip(names, values, strict=True)}
        except (ValueError, csv.Error) as error:
            raise ValueError(f"{path}, line {number}, does not fit its columns {', '.join(names)}: {line[:200]!r}") from error
        if rows and row["t"] + began < rows[-1]["t"]:  # a resumed run appends, and its clock restarts
            began = rows[-1]["t"]
        rows.append(row | {"t": row["t"] + began})
    return header, rows


def _number(value: str) -> float:
    return {"True": 1.0, "False": 0.0}[value] if value in ("True", "False") else float(value)
