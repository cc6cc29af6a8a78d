"""Learning curves of one or several runs."""

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sb3_cyborg.checks import check_positive, unknown_name
from sb3_cyborg.trainers.checkpoints import CONFIG_FILE
from sb3_cyborg.trainers.config import RESUME_KEYS, TrainerConfig
from sb3_cyborg.trainers.config_file import read_yaml
from sb3_cyborg.trainers.vocabulary import canonical
from sb3_cyborg.viewers.episodes import Episodes, find_runs, read_episodes
from sb3_cyborg.viewers.figures import check_picture, new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

X_AXES = {"steps": "environment steps", "episodes": "episodes", "time": "hours since the run began"}
Y_AXES = {"r": "return of an episode", "l": "length of an episode (steps)", "is_success": "successful episodes (share)"}
Y_COLUMNS = {"return": "r", "length": "l", "success": "is_success"}
"""Columns of a Monitor file by the name of the axis; any other column has its own name."""

POINTS = 500
"""Number of points of a curve, at most."""
LONGEST_WINDOW = 100
"""Number of episodes that a point averages by default, at most."""
RESAMPLES = 2000
"""Number of resamples of the bootstrap."""


@dataclass(frozen=True)
class Curve:
    """
    A learning curve of P points, with a band.

    :param label: Name of the curve.
    :param x: (P,).
    :param mean: (P,).
    :param low: Lower edge of the band, (P,).
    :param high: Upper edge of the band, (P,).
    :param runs: Number of runs that the mean is taken over.
    :param window: Number of episodes that each point of a run averages.
    :param env_id: Id of the environment, or an empty string.
    """

    label: str
    x: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    runs: int
    window: int
    env_id: str = ""


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
    Compute the curves that :func:`plot_learning_curves` draws, from the same arguments.

    :return: One curve for each group of runs, in the given order.
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
    """:return: The runs, grouped by environment and configuration, the seed apart."""
    groups: dict[object, list[Episodes]] = {}
    for run in episodes:
        groups.setdefault((run.env_id, same_settings(run.run)), []).append(run)
    return list(groups.values())


def same_settings(run: Path) -> str:
    """
    :param run: Folder of a run.
    :return: A text that is equal for runs whose settings differ in the seed alone.
    """
    if (ours := run / CONFIG_FILE).is_file():
        return _learned_settings(ours)
    if zoos := sorted(run.glob("*/config.yml")):  # RL Zoo's file has no seed, but also lacks the two arguments below
        arguments = zoos[0].with_name("args.yml")
        text = arguments.read_text() if arguments.is_file() else ""
        further = re.findall(r"^[- ] - - (?:algo|env_kwargs)\n(?: {4}.*\n)*", text, re.MULTILINE)
        return "".join([zoos[0].parent.name, zoos[0].read_text(), *further])
    # Without a configuration only a suffix such as `_seed3` is a seed: `ring_16` and `ring_32` are different configurations.
    return str(_without_seed(run.resolve()))


def _learned_settings(path: Path) -> str:
    """:return: The settings of a ``config.yaml`` that decide what is learned, by their present keys, without defaults."""
    others = {"seed", "run_name", "log_dir", *RESUME_KEYS}
    fields = TrainerConfig.model_fields
    settings = {
        key: value
        for key, value in canonical(read_yaml(path)).items()
        if key not in others and not (key in fields and fields[key].default == value)
    }
    return json.dumps(settings, sort_keys=True, default=str)


def _without_seed(path: Path) -> Path:
    return path.with_name(re.sub(r"[-_.]?seed[-_=]?\d+$", "", path.name) or path.name)


def _labels(groups: Sequence[Sequence[Episodes]]) -> list[str]:
    """:return: For each group the end of its path (or of what its paths share), as short as labels stay distinct."""
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
    """:return: x, mean, 10th and 90th percentile of the last ``window`` episodes, at up to ``POINTS`` episodes."""
    windows = np.lib.stride_tricks.sliding_window_view(y, window)
    chosen = np.unique(np.linspace(0, len(windows) - 1, min(POINTS, len(windows))).round().astype(int))
    low, high = np.percentile(windows[chosen], [10, 90], axis=1)
    return x[window - 1 :][chosen], windows[chosen].mean(axis=1), low, high


def learning_figure(curves: Sequence[Curve], *, x_axis: str = "steps", y_axis: str = "return", title: str = "") -> "Figure":
    """
    Draw curves.

    :param curves: Result of :func:`learning_curves`.
    :param x_axis: The ``x_axis`` of that call.
    :param y_axis: The ``y_axis`` of that call.
    :param title: Title of the figure.
    :return: The figure.
    """
    figure = new_figure(8, 4.8)
    axes = figure.subplots()
    for index, curve in enumerate(curves):
        colour = f"C{index % 10}"
        band = "95% bootstrap interval" if curve.runs > 1 else "10th to 90th percentile"
        over = f"mean of {curve.runs} runs" if curve.runs > 1 else f"mean of {curve.window} episodes"
        axes.fill_between(curve.x, curve.low, curve.high, color=colour, alpha=0.2, linewidth=0)
        marker = "o" if len(curve.x) == 1 else None  # a line with one point is invisible
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
    Draw the learning curves of runs, with bands, into a file.

    Runs whose settings differ in the seed alone are one curve: the mean over the runs with its 95 % bootstrap interval, up to
    the end of the shortest run. A single run is drawn as the mean of its last episodes with their 10th to 90th percentile.

    :param runs: Folders of runs (of ``TrainerV7``, RL Zoo, or any with Monitor files), or folders of these.
    :param output: A PNG, PDF or SVG file.
    :param x_axis: ``"steps"`` (of all environments together), ``"episodes"`` or ``"time"``.
    :param y_axis: ``"return"``, ``"length"``, ``"success"``, or another column of the Monitor files.
    :param window: Episodes that each point averages, at least 1; ``None`` takes a twentieth of the run, at most 100.
    :param max_steps: Leave out episodes that ended later; ``None`` keeps all.
    :param group: Draw runs that differ in the seed alone as one curve.
    :param labels: Names of the curves; ``None`` takes those of the folders.
    :param title: Title; ``None`` takes the id of the environment, if all runs have the same.
    :return: The curves that were drawn.
    :raises ValueError: for no runs, folders without Monitor files, no finished episodes, and unknown names.
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
