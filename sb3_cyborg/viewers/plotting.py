"""Learning curves of one or several runs, from the files that SB3's ``Monitor`` writes."""

import csv
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sb3_cyborg.checks import check_positive, unknown_name
from sb3_cyborg.trainers.checkpoints import CONFIG_FILE
from sb3_cyborg.trainers.config import RESUME_KEYS
from sb3_cyborg.trainers.config_file import read_yaml
from sb3_cyborg.viewers.figures import check_picture, new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

X_AXES = {"steps": "environment steps", "episodes": "episodes", "time": "hours since the run began"}
Y_AXES = {"r": "return of an episode", "l": "length of an episode (steps)", "is_success": "successful episodes (share)"}
Y_COLUMNS = {"return": "r", "length": "l", "success": "is_success"}
"""What the columns of a Monitor file are called here; any other column goes by its own name."""

POINTS = 500
"""A curve has at most this many points."""
LONGEST_WINDOW = 100
RESAMPLES = 2000
"""Of the bootstrap."""


@dataclass(frozen=True)
class Episodes:
    """
    The finished episodes of a run, in order of their end.

    :param run: Its folder.
    :param env_id: Name of the environment, or an empty string.
    :param columns: ``r`` (return), ``l`` (steps), ``t`` (seconds since the first file was begun), and more that Monitor
        was asked for; (E,) each.
    """

    run: Path
    env_id: str
    columns: dict[str, np.ndarray]

    def axis(self, name: str) -> np.ndarray:
        """:return: Where each episode ended, (E,): in environment steps of all environments, episodes, or hours."""
        if name == "steps":
            return np.asarray(self.columns["l"].cumsum())
        return np.arange(1, len(self.columns["l"]) + 1) if name == "episodes" else self.columns["t"] / 3600


@dataclass(frozen=True)
class Curve:
    """
    A line with a band around it.

    :param label: Its name.
    :param x: (P,).
    :param mean: (P,).
    :param low: Lower edge of the band, (P,).
    :param high: Upper edge, (P,).
    :param runs: How many runs the mean is over.
    :param window: Over how many episodes each run was averaged first.
    :param env_id: Name of the environment, or an empty string.
    """

    label: str
    x: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    runs: int
    window: int
    env_id: str = ""


def monitor_files(folder: Path) -> list[Path]:
    """:return: The Monitor files of a run: in its folder, where RL Zoo has them, or below ``monitor`` in it."""
    return sorted([*folder.glob("*monitor.csv"), *(folder / "monitor").rglob("*monitor.csv")])


def find_runs(paths: Sequence[Path | str]) -> list[Path]:
    """
    :param paths: Folders of runs, or folders that hold such, as RL Zoo's ``logs/memory_ppo`` does.
    :return: The folders of runs, each once.
    :raises ValueError: for none, and for a path that is neither.
    """
    if not paths:
        raise ValueError("No run to plot: give the folder of at least one.")
    runs: dict[Path, None] = {}
    for path in map(Path, paths):
        if not path.is_dir():
            raise ValueError(f"{path} is {'a file' if path.exists() else 'not there'}; give the folder of a run.")
        inside = [path] if monitor_files(path) else [folder for folder in sorted(path.iterdir()) if monitor_files(folder)]
        if not inside:
            raise ValueError(f"{path} is not the folder of a run: no *monitor.csv in it, in `monitor` or in a folder below.")
        runs |= dict.fromkeys(inside)
    return list(runs)


def read_episodes(run: Path) -> Episodes:
    """
    Read a run's Monitor files; a last line that a killed run left unfinished is left out.

    :param run: The run's folder.
    :return: Its episodes.
    :raises ValueError: for files that are not Monitor's, and if no episode has finished.
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
    return Episodes(run, "" if env_id == "None" else env_id, columns)  # Monitor's word for one that was not made by its id


def _read_monitor(path: Path) -> tuple[dict[str, Any], list[dict[str, float]]]:
    """:return: The header of a Monitor file and its rows, ``t`` in seconds since the epoch."""
    *lines, _ = path.read_text().split("\n")  # what comes after the last line's end is not whole
    try:
        header = json.loads(lines[0].removeprefix("#"))
        names = next(csv.reader(lines[1:2]))
        header["t_start"] = float(header["t_start"])
        if not {"r", "l", "t"} <= set(names):
            raise ValueError(f"columns {names}")
    except (IndexError, KeyError, StopIteration, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a file that SB3's Monitor wrote: {error}") from error
    rows: list[dict[str, float]] = []
    began = header["t_start"]
    for number, values in enumerate(csv.reader(lines[2:]), start=3):
        try:
            row = {name: _number(value) for name, value in zip(names, values, strict=True)}
        except ValueError as error:
            raise ValueError(f"{path}, line {number}, does not fit its columns {', '.join(names)}: {values}") from error
        if rows and row["t"] + began < rows[-1]["t"]:  # a resumed run appends, and its clock begins anew
            began = rows[-1]["t"]
        rows.append(row | {"t": row["t"] + began})
    return header, rows


def _number(value: str) -> float:
    return {"True": 1.0, "False": 0.0}[value] if value in ("True", "False") else float(value)


def learning_curves(
    runs: Sequence[Path | str],
    *,
    x_axis: str = "steps",
    y_axis: str = "return",
    window: int | None = None,
    max_steps: int | None = None,
    group: bool = True,
    labels: Sequence[str] | None = None,
) -> list[Curve]:
    """
    Compute the curves that :func:`plot_learning_curves` draws; the arguments are its own.

    :return: One curve for each group of runs, in the order given.
    """
    if x_axis not in X_AXES:
        raise unknown_name("x axis", x_axis, X_AXES)
    if window is not None:
        check_positive(window=window)
    column = Y_COLUMNS.get(y_axis, y_axis)
    episodes = [_until(read_episodes(run), max_steps) for run in find_runs(runs)]
    for run in episodes:
        if column not in run.columns:
            names = {name: short for short, name in Y_COLUMNS.items()}
            raise unknown_name(f"column of {run.run}", y_axis, [names.get(name, name) for name in run.columns if name != "t"])
    groups = _grouped(episodes) if group else [[run] for run in episodes]
    if labels is None:
        labels = _labels(groups)
    elif len(labels) != len(groups):
        raise ValueError(f"There are {len(labels)} labels for {len(groups)} curves.")
    return [_curve(label, members, x_axis, column, window) for label, members in zip(labels, groups, strict=True)]


def _until(episodes: Episodes, max_steps: int | None) -> Episodes:
    if max_steps is None:
        return episodes
    check_positive(max_steps=max_steps)
    kept = episodes.axis("steps") <= max_steps
    if not kept.any():
        raise ValueError(f"No episode of {episodes.run} has finished within {max_steps} steps.")
    return Episodes(episodes.run, episodes.env_id, {name: values[kept] for name, values in episodes.columns.items()})


def _grouped(episodes: Sequence[Episodes]) -> list[list[Episodes]]:
    """:return: Runs of one configuration together; only their seeds may differ."""
    groups: dict[object, list[Episodes]] = {}
    for run in episodes:
        groups.setdefault((run.env_id, _configuration(run.run)), []).append(run)
    return list(groups.values())


def _configuration(run: Path) -> str:
    """:return: What runs have in common that differ in their seed alone: equal text for equal settings."""
    if (ours := run / CONFIG_FILE).is_file():
        carried_out = {"seed", "run_name", "log_dir", *RESUME_KEYS}  # the other keys say what is learned
        learned = {key: value for key, value in read_yaml(ours).items() if key not in carried_out}
        return json.dumps(learned, sort_keys=True, default=str)
    if zoos := sorted(run.glob("*/config.yml")):  # RL Zoo's, which the seed is not in, but some arguments are neither
        arguments = zoos[0].with_name("args.yml")
        text = arguments.read_text() if arguments.is_file() else ""
        further = re.findall(r"^[- ] - - (?:algo|env_kwargs)\n(?: {4}.*\n)*", text, re.MULTILINE)
        return "".join([zoos[0].parent.name, zoos[0].read_text(), *further])
    # Without a configuration, only a name that says so is a seed: `ring_16` and `ring_32` are two things.
    return str(_without_seed(run.resolve()))


def _without_seed(path: Path) -> Path:
    return path.with_name(re.sub(r"[-_.]?seed[-_=]?\d+$", "", path.name) or path.name)


def _labels(groups: Sequence[Sequence[Episodes]]) -> list[str]:
    """:return: The shortest end of each group's path that tells them apart; of several runs, what their names share."""
    paths = [_shared_path([run.run.resolve() for run in members]) for members in groups]
    if len(set(paths)) < len(paths):
        paths = [members[0].run.resolve() for members in groups]
    for parts in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-parts:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names


def _shared_path(paths: Sequence[Path]) -> Path:
    """:return: ``logs/Env`` for ``logs/Env_1`` and ``logs/Env_2``."""
    if len(paths) == 1:
        return paths[0]
    shared = os.path.commonprefix([_without_seed(path).name for path in paths])  # noqa: RUF071  # characters are meant
    return paths[0].with_name(re.sub(r"[-_.]\d*$", "", shared) or paths[0].name)


def _curve(label: str, runs: Sequence[Episodes], x_axis: str, column: str, window: int | None) -> Curve:
    fewest = min(len(run.columns["l"]) for run in runs)
    window = min(fewest, window or max(1, min(LONGEST_WINDOW, fewest // 20)))
    smoothed = [_smooth(run.axis(x_axis), run.columns[column], window) for run in runs]
    if len(runs) == 1:
        return Curve(label, *smoothed[0], runs=1, window=window, env_id=runs[0].env_id)
    first, last = max(x[0] for x, *_ in smoothed), min(x[-1] for x, *_ in smoothed)
    if first > last:
        raise ValueError(f"The runs of {label} have no {X_AXES[x_axis]} in common: draw each by itself (group=False).")
    x = np.linspace(first, last, POINTS)
    values = np.stack([np.interp(x, run_x, mean) for run_x, mean, _, _ in smoothed])
    resampled = np.random.default_rng(0).integers(len(runs), size=(RESAMPLES, len(runs)))
    counts = np.stack([(resampled == run).sum(axis=1) for run in range(len(runs))], axis=1)
    low, high = np.percentile(counts @ values / len(runs), [2.5, 97.5], axis=0)
    return Curve(label, x, values.mean(axis=0), low, high, runs=len(runs), window=window, env_id=runs[0].env_id)


def _smooth(x: np.ndarray, y: np.ndarray, window: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """:return: x, mean, 10th and 90th percentile of the last ``window`` episodes, at some of the points."""
    windows = np.lib.stride_tricks.sliding_window_view(y, window)
    chosen = np.unique(np.linspace(0, len(windows) - 1, min(POINTS, len(windows))).round().astype(int))
    low, high = np.percentile(windows[chosen], [10, 90], axis=1)
    return x[window - 1 :][chosen], windows[chosen].mean(axis=1), low, high


def learning_figure(curves: Sequence[Curve], *, x_axis: str = "steps", y_axis: str = "return", title: str = "") -> "Figure":
    """
    Draw curves.

    :param curves: What :func:`learning_curves` gave.
    :param x_axis: What it was told.
    :param y_axis: Likewise.
    :param title: Above them.
    :return: The figure.
    """
    figure = new_figure(8, 4.8)
    axes = figure.subplots()
    for index, curve in enumerate(curves):
        colour = f"C{index % 10}"
        band = "95% bootstrap interval" if curve.runs > 1 else "10th to 90th percentile"
        over = f"mean of {curve.runs} runs" if curve.runs > 1 else f"mean of {curve.window} episodes"
        axes.fill_between(curve.x, curve.low, curve.high, color=colour, alpha=0.2, linewidth=0)
        marker = "o" if len(curve.x) == 1 else None  # a line of one point cannot be seen
        axes.plot(curve.x, curve.mean, color=colour, linewidth=2, marker=marker, label=f"{curve.label}\n{over}, band: {band}")
    column = Y_COLUMNS.get(y_axis, y_axis)
    axes.set(xlabel=X_AXES[x_axis], ylabel=Y_AXES.get(column, column), title=title)
    if x_axis != "time":
        axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="best")
    return figure


def plot_learning_curves(
    runs: Sequence[Path | str],
    output: Path | str,
    *,
    x_axis: str = "steps",
    y_axis: str = "return",
    window: int | None = None,
    max_steps: int | None = None,
    group: bool = True,
    labels: Sequence[str] | None = None,
    title: str | None = None,
) -> list[Curve]:
    """
    Draw the learning curves of runs, with a band, into a file.

    Runs of one configuration whose seeds differ are one curve: the mean over them, and a 95 % bootstrap interval of that
    mean, as far as all of them have come. A run by itself is the mean of its last episodes and their 10th to 90th
    percentile.

    :param runs: Folders of runs (ours, RL Zoo's, or any with Monitor files), or folders of such.
    :param output: A PNG, PDF or SVG file.
    :param x_axis: ``"steps"`` (of all environments together), ``"episodes"`` or ``"time"``.
    :param y_axis: ``"return"``, ``"length"``, ``"success"``, or another column of the Monitor files.
    :param window: Episodes that each point averages; ``None`` takes a twentieth of a run, at most 100.
    :param max_steps: Leave out what came later.
    :param group: Whether seeds of one configuration are one curve.
    :param labels: Names of the curves; ``None`` takes those of the folders.
    :param title: ``None`` takes the name of the environment, where there is one for all.
    :return: The curves that were drawn.
    :raises ValueError: for no runs, folders that are none, no finished episodes, and unknown names.
    """
    path = check_picture(output)
    curves = learning_curves(
        runs, x_axis=x_axis, y_axis=y_axis, window=window, max_steps=max_steps, group=group, labels=labels
    )
    if title is None:
        names = {curve.env_id for curve in curves}
        title = f"Training on {names.pop()}" if len(names) == 1 and "" not in names else "Training"
    save_figure(learning_figure(curves, x_axis=x_axis, y_axis=y_axis, title=title), path)
    return curves
