"""The table of a group: the return of each seed, and their mean with an interval."""

import contextlib
from collections.abc import Sequence

import numpy as np

from sb3_cyborg.seeds.jobs import FINISHED, Outcome
from sb3_cyborg.trainers.callbacks import EVALUATIONS
from sb3_cyborg.trainers.checkpoints import UNREADABLE_FILE_ERRORS, newest_file
from sb3_cyborg.viewers.episodes import read_episodes

TRAINING_EPISODES = 100
"""Number of training episodes at the end of a run that its training return averages, at most."""
CONFIDENCE = 0.95
HEADER = (
    "seed",
    "state",
    "steps",
    "return in the last evaluation",
    f"return of the last {TRAINING_EPISODES} training episodes",
)


def t_interval(values: Sequence[float]) -> tuple[float, float]:
    """
    Compute the two-sided 95 % interval of a mean by Student's t distribution, which holds for few values if they are normal.

    :param values: At least two numbers.
    :return: Lower and upper end: the mean -/+ t(n - 1) * s / sqrt(n), with the standard deviation s of a sample.
    :raises ValueError: for fewer than two numbers.
    """
    if len(values) < 2:
        raise ValueError(f"An interval needs at least 2 values, got {len(values)}.")
    mean, deviation = np.mean(values), np.std(values, ddof=1)
    half = t_quantile(len(values) - 1) * deviation / np.sqrt(len(values))
    return float(mean - half), float(mean + half)


def t_quantile(degrees: int) -> float:
    """
    :param degrees: Degrees of freedom, at least 1.
    :return: The number t for which a value of Student's distribution is within [-t, t] with probability 0.95.
    """
    # With x = sqrt(degrees) * tan(angle) the density is cos(angle) ** (degrees - 1), on a finite interval.
    angles = np.linspace(0, np.pi / 2, 200_001)
    density = np.cos(angles) ** (degrees - 1)
    cumulative = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return float(np.sqrt(degrees) * np.tan(np.interp(CONFIDENCE, cumulative / cumulative[-1], angles)))


def returns_of(outcome: Outcome) -> tuple[float | None, float | None]:
    """
    :param outcome: A run.
    :return: Its mean return in the last evaluation, and over the last training episodes; ``None`` where there is none.
    """
    evaluation = training = None
    folder = outcome.run.folder
    with contextlib.suppress(*UNREADABLE_FILE_ERRORS), open(folder / EVALUATIONS, "rb") as file:
        evaluation = float(np.mean(np.load(file)["results"][-1]))
    with contextlib.suppress(*UNREADABLE_FILE_ERRORS):
        training = float(np.mean(read_episodes(folder).columns["r"][-TRAINING_EPISODES:]))
    return evaluation, training


def seeds_table(outcomes: Sequence[Outcome]) -> str:
    """
    :param outcomes: The runs.
    :return: A table in Markdown. Its mean and interval are over the n finished runs that have the number.
    """
    rows = [list(HEADER)]
    columns: tuple[list[float], list[float]] = ([], [])
    for outcome in outcomes:
        returns = returns_of(outcome)
        rows.append([str(outcome.run.seed), outcome.state, f"{newest_file(outcome.run.folder).num_timesteps:,}"])
        for value, column in zip(returns, columns, strict=True):
            rows[-1].append("-" if value is None else f"{value:.3f}")
            if value is not None and outcome.state == FINISHED:
                column.append(value)
    rows.append(["mean", "", "", *(f"{np.mean(column):.3f} (n = {len(column)})" if column else "-" for column in columns)])
    intervals = ["{:.3f} to {:.3f}".format(*t_interval(column)) if len(column) > 1 else "-" for column in columns]
    rows.append(["95 % t interval", "", "", *intervals])
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines) + "\n"
