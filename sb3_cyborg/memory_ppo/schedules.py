"""Schedules: numbers that change with the progress of training, as text, numbers or functions."""

import math
from dataclasses import dataclass

from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.common.utils import FloatSchedule, LinearSchedule

AUTO = "auto"
"""Name of the default learning rate."""

AUTO_LEARNING_RATE = "lin_7e-4_7e-5"
"""The default learning rate: it falls linearly from 7e-4 to 7e-5."""

LEAST_PROGRESS = 0.5
"""Progress remaining from which on the default learning rate stays, where training goes on in several calls of ``learn``."""


@dataclass(frozen=True)
class FlooredSchedule:
    """
    A schedule that stays where it is once the progress remaining is below a threshold.

    :param schedule: The schedule.
    :param least_progress: The threshold, in [0, 1].
    """

    schedule: Schedule
    least_progress: float

    def __call__(self, progress_remaining: float) -> float:
        """:return: The value at a progress remaining from 1 (start) to 0 (end)."""
        return self.schedule(max(progress_remaining, self.least_progress))


def parse_schedule(text: str) -> tuple[float, float]:
    """
    Parse RL Zoo's notation of linear schedules.

    :param text: ``"lin_<start>"``, which ends at 0, or ``"lin_<start>_<end>"``.
    :return: Start and end.
    :raises ValueError: for other text, a start that is not positive and finite, or an end that is negative or not finite.
    """
    prefix, _, rest = text.partition("_")
    parts = rest.split("_")
    try:
        start, end = (float(part) for part in (parts if len(parts) == 2 else [*parts, "0"]))
        sound = prefix == "lin" and 0 < start < math.inf and 0 <= end < math.inf
    except ValueError:
        sound = False
    if not sound:
        raise ValueError(
            f"{text!r} is not a schedule: 'lin_3e-4' falls linearly from 3e-4 to 0, 'lin_3e-4_1e-5' from 3e-4 to 1e-5."
        )
    return start, end


def as_schedule(value: float | str | Schedule) -> FloatSchedule:
    """
    :param value: A number, which stays constant, text as :func:`parse_schedule` takes it, or a function of the progress
        remaining, from 1 to 0.
    :return: The schedule.
    :raises ValueError: for text that is not a schedule.
    """
    return FloatSchedule(LinearSchedule(*parse_schedule(value), 1.0) if isinstance(value, str) else value)


def learning_rate_schedule(value: float | str | Schedule, continued: bool = False) -> FloatSchedule:
    """
    :param value: As for :func:`as_schedule`, or ``"auto"``.
    :param continued: Whether ``learn`` was told to go on (``reset_num_timesteps=False``). Each of many short calls would end
        at the lowest rate, so ``"auto"`` then stays at the middle.
    :return: The schedule.
    :raises ValueError: for text that is not a schedule.
    """
    if not (isinstance(value, str) and value == AUTO):
        return as_schedule(value)
    schedule = as_schedule(AUTO_LEARNING_RATE)
    return FloatSchedule(FlooredSchedule(schedule, LEAST_PROGRESS)) if continued else schedule
