"""Schedules of hyperparameters over the progress of training, given as numbers, text or functions."""

import math
from dataclasses import dataclass

from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.common.utils import FloatSchedule, LinearSchedule

AUTO = "auto"
"""Name of the default learning rate."""

AUTO_LEARNING_RATE = "lin_7e-4_7e-5"
"""The default learning rate: it decreases linearly from 7e-4 to 7e-5."""

MIN_PROGRESS = 0.5
"""Progress remaining below which the default learning rate is constant, in calls of ``learn`` that continue training."""


@dataclass(frozen=True)
class FlooredSchedule:
    """
    A schedule that is constant while the progress remaining is below a threshold.

    :param schedule: The underlying schedule.
    :param least_progress: The threshold, in [0, 1].
    """

    schedule: Schedule
    least_progress: float

    def __call__(self, progress_remaining: float) -> float:
        """
        :param progress_remaining: From 1 (start of training) to 0 (end).
        :return: Value of the schedule.
        """
        return self.schedule(max(progress_remaining, self.least_progress))


def parse_schedule(text: str) -> tuple[float, float]:
    """
    Parse a linear schedule in RL Zoo's notation.

    :param text: ``"lin_<start>_<end>"``, or ``"lin_<start>"``, which ends at 0.
    :return: Start (> 0) and end (>= 0), both finite.
    :raises ValueError: for other text, and for values out of these ranges.
    """
    prefix, _, rest = text.partition("_")
    parts = rest.split("_")
    try:
        start, end = (float(part) for part in (parts if len(parts) == 2 else [*parts, "0"]))
        valid = prefix == "lin" and 0 < start < math.inf and 0 <= end < math.inf
    except ValueError:
        valid = False
    if not valid:
        raise ValueError(
            f"{text!r} is not a schedule: 'lin_3e-4' falls linearly from 3e-4 to 0, 'lin_3e-4_1e-5' from 3e-4 to 1e-5."
        )
    return start, end


def as_schedule(value: float | str | Schedule) -> FloatSchedule:
    """
    Convert a value to a schedule.

    :param value: A number (constant), text in the notation of :func:`parse_schedule`, or a function of the progress remaining,
        which decreases from 1 to 0.
    :return: The schedule.
    :raises ValueError: for text that is not a schedule.
    """
    return FloatSchedule(LinearSchedule(*parse_schedule(value), 1.0) if isinstance(value, str) else value)


def learning_rate_schedule(value: float | str | Schedule, continued: bool = False) -> FloatSchedule:
    """
    Convert a learning rate to a schedule.

    :param value: A value of :func:`as_schedule`, or ``"auto"``.
    :param continued: Whether the call of ``learn`` continues training (``reset_num_timesteps=False``). Each of many short
        calls would end at the lowest rate, so ``"auto"`` then does not fall below the middle of its range.
    :return: The schedule.
    :raises ValueError: for text that is not a schedule.
    """
    if not (isinstance(value, str) and value == AUTO):
        return as_schedule(value)
    schedule = as_schedule(AUTO_LEARNING_RATE)
    return FloatSchedule(FlooredSchedule(schedule, MIN_PROGRESS)) if continued else schedule
