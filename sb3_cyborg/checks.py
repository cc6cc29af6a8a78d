"""Validation of user input: every error is a ``ValueError`` with the given value and values that would work."""

import difflib
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

import numpy as np
import torch as th

MAX_LISTED_NAMES = 20
"""Largest number of known names that an error lists if it suggests one of them."""

OWN_PACKAGES = ("sb3_cyborg.", "stable_baselines3.", "sb3_contrib.")
"""Packages whose frames are skipped: a warning is shown at the line that called the outermost of them."""


def unknown_name(what: str, name: object, known: Iterable[str]) -> ValueError:
    """
    Create the error for an unknown name, with the most similar known name.

    :param what: Noun for the name, e.g. ``"encoder"``.
    :param name: The name that the user gave.
    :param known: The known names.
    :return: The error, for the caller to raise.
    """
    options = sorted(known)
    close = difflib.get_close_matches(str(name), options, n=1, cutoff=0.5)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    if close and len(options) > MAX_LISTED_NAMES:
        return ValueError(f"Unknown {what} {name!r}.{hint}")
    return ValueError(f"Unknown {what} {name!r}.{hint} Known: {', '.join(map(repr, options)) or 'none'}.")


def warn_caller(message: str) -> None:
    """
    Issue a ``UserWarning`` at the line of the user's code that called this package.

    :param message: Text of the warning.
    """
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and f"{frame.f_globals.get('__name__', '')}.".startswith(OWN_PACKAGES):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def check_options(what: str, options: Mapping[str, Any], known: Iterable[str]) -> None:
    """
    Reject unknown options.

    :param what: Owner of the options, e.g. ``"memory 'ring'"``.
    :param options: The options that the user gave, by name.
    :param known: The known names.
    :raises ValueError: for the first unknown option, with the most similar known one.
    """
    known = set(known)
    for name in options:
        if name not in known:
            raise unknown_name(f"option for {what}", name, known)


def check_whole(at_least: int, /, **sizes: Any) -> None:
    """
    Require integers with a lower bound; NumPy's integers are accepted, bools are not.

    :param at_least: The lower bound, inclusive.
    :param sizes: Values by the names that messages use.
    :raises ValueError: for the first value that is not an integer or is below the bound.
    """
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, Integral) or int(size) < at_least:
            raise ValueError(f"`{name}` must be a whole number of at least {at_least}, got {size!r}.")


def check_positive(**sizes: Any) -> None:
    """
    Require integers of at least 1.

    :param sizes: Values by the names that messages use.
    :raises ValueError: for the first value that is not an integer or is below 1.
    """
    check_whole(1, **sizes)


def check_divides(divisor_name: str, divisor: int, size_name: str, size: int) -> None:
    """
    Require that ``divisor`` divides ``size``.

    :param divisor_name: Name of the divisor, for the message.
    :param divisor: The divisor, >= 1.
    :param size_name: Name of the size, for the message.
    :param size: The size, >= 1.
    :raises ValueError: if it does not divide, with the nearest divisors that do.
    """
    if size % divisor:
        nearest = " and ".join(map(str, sorted(set(nearest_divisors(size, divisor)))))
        raise ValueError(f"`{divisor_name}`={divisor} does not divide `{size_name}`={size}; the nearest that do: {nearest}.")


def divisors(size: int) -> list[int]:
    """
    :param size: A number, >= 1.
    :return: All its divisors, in ascending order.
    """
    return [candidate for candidate in range(1, size + 1) if size % candidate == 0]


def nearest_divisors(size: int, wanted: int) -> tuple[int, int]:
    """
    :param size: A number, >= 1.
    :param wanted: The divisor to approximate.
    :return: The largest divisor that is at most ``wanted`` (1 if none), the smallest that is at least ``wanted`` (``size`` if
        none).
    """
    below = [candidate for candidate in divisors(size) if candidate <= wanted]
    above = [candidate for candidate in divisors(size) if candidate >= wanted]
    return (below[-1] if below else 1), (above[0] if above else size)


def check_finite_observations(
    obs: np.ndarray | th.Tensor | Mapping[str, np.ndarray | th.Tensor], when: str, envs: Sequence[int] | None = None
) -> None:
    """
    Require finite observations.

    :param obs: Observations, (N, ...), or a dictionary of them.
    :param when: Time or origin of the observations, for the message.
    :param envs: Index of the environment of each row; ``None`` numbers them from 0.
    :raises ValueError: if a value is NaN or infinite, with the index of its environment.
    """
    for key, value in obs.items() if isinstance(obs, Mapping) else [("", obs)]:
        if not _is_finite(value):
            tensor = th.as_tensor(value)
            place = tuple((~tensor.isfinite()).nonzero()[0].tolist())
            env = place[0] if envs is None else envs[place[0]]
            name = f" {key!r}" if key else ""
            raise ValueError(f"Observation{name} of environment {env} {when} is not finite: it holds {tensor[place].item()}.")


def _is_finite(values: np.ndarray | th.Tensor) -> bool:
    if isinstance(values, np.ndarray):  # runs at each step of acting: a NumPy call takes a third of the time of PyTorch's
        return values.dtype.kind != "f" or bool(np.isfinite(values).all())
    return not values.is_floating_point() or bool(values.isfinite().all())
