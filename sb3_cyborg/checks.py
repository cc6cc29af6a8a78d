"""Checks of what users pass: every failure is a ``ValueError`` that names the value and what would work."""

import difflib
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

import numpy as np
import torch as th

LONGEST_LIST = 20
"""Largest number of known names that an error lists if one of them is near."""

OWN_PACKAGES = ("sb3_cyborg.", "stable_baselines3.", "sb3_contrib.")
"""Modules that call each other; a warning for the user is shown at the line that called the outermost of them."""


def unknown_name(what: str, name: object, known: Iterable[str]) -> ValueError:
    """
    Build the error for a name that is in no registry, with the nearest name that is.

    :param what: What the name stands for, e.g. ``"encoder"``.
    :param name: The name that the user gave.
    :param known: The names that exist.
    :return: The error, for the caller to raise.
    """
    options = sorted(known)
    close = difflib.get_close_matches(str(name), options, n=1, cutoff=0.5)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    if close and len(options) > LONGEST_LIST:
        return ValueError(f"Unknown {what} {name!r}.{hint}")
    return ValueError(f"Unknown {what} {name!r}.{hint} Known: {', '.join(map(repr, options)) or 'none'}.")


def warn_caller(message: str) -> None:
    """
    Warn at the line of the user's code that called this package.

    :param message: The warning.
    """
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and f"{frame.f_globals.get('__name__', '')}.".startswith(OWN_PACKAGES):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def check_options(what: str, options: Mapping[str, Any], known: Iterable[str]) -> None:
    """
    Refuse options that nobody reads.

    :param what: What the options belong to, e.g. ``"memory 'ring'"``.
    :param options: The options that the user gave.
    :param known: The names that are understood.
    :raises ValueError: for the first unknown option, with the nearest known one.
    """
    known = set(known)
    for name in options:
        if name not in known:
            raise unknown_name(f"option for {what}", name, known)


def check_whole(at_least: int, /, **sizes: Any) -> None:
    """
    Require whole numbers, numpy's included.

    :param at_least: The smallest that will do.
    :param sizes: Named sizes.
    :raises ValueError: for the first that is none, or smaller.
    """
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, Integral) or int(size) < at_least:
            raise ValueError(f"`{name}` must be a whole number of at least {at_least}, got {size!r}.")


def check_positive(**sizes: Any) -> None:
    """
    Require whole numbers of at least one.

    :param sizes: Named sizes.
    :raises ValueError: for the first that is none.
    """
    check_whole(1, **sizes)


def check_divides(divisor_name: str, divisor: int, size_name: str, size: int) -> None:
    """
    Require that ``divisor`` divides ``size``.

    :raises ValueError: with the nearest divisors that work.
    """
    if size % divisor:
        nearest = " and ".join(map(str, sorted(set(nearest_divisors(size, divisor)))))
        raise ValueError(f"`{divisor_name}`={divisor} does not divide `{size_name}`={size}; the nearest that do: {nearest}.")


def divisors(size: int) -> list[int]:
    """:return: All divisors of ``size`` (>= 1), in ascending order."""
    return [candidate for candidate in range(1, size + 1) if size % candidate == 0]


def nearest_divisors(size: int, wanted: int) -> tuple[int, int]:
    """:return: The largest divisor of ``size`` up to ``wanted`` and the smallest from there on (``size`` if none)."""
    below = [candidate for candidate in divisors(size) if candidate <= wanted]
    above = [candidate for candidate in divisors(size) if candidate >= wanted]
    return (below[-1] if below else 1), (above[0] if above else size)


def check_finite_observations(
    obs: np.ndarray | th.Tensor | Mapping[str, np.ndarray | th.Tensor], when: str, envs: Sequence[int] | None = None
) -> None:
    """
    :param obs: Observations, (N, ...).
    :param when: Where they came from, for the message.
    :param envs: Environments that the rows are of; ``None`` for all of them in order.
    :raises ValueError: if any is NaN or infinite, with the environment's index.
    """
    for key, value in obs.items() if isinstance(obs, Mapping) else [("", obs)]:
        if not _is_finite(value):
            tensor = th.as_tensor(value)
            place = tuple((~tensor.isfinite()).nonzero()[0].tolist())
            env = place[0] if envs is None else envs[place[0]]
            name = f" {key!r}" if key else ""
            raise ValueError(f"Observation{name} of environment {env} {when} is not finite: it holds {tensor[place].item()}.")


def _is_finite(values: np.ndarray | th.Tensor) -> bool:
    if isinstance(values, np.ndarray):  # at each step of acting: NumPy's calls take a third of PyTorch's
        return values.dtype.kind != "f" or bool(np.isfinite(values).all())
    return not values.is_floating_point() or bool(values.isfinite().all())
