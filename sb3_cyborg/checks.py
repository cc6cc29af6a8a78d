"""Validation of user input: every error is a ``ValueError`` with the given value and values that would work."""

import difflib
import math
import os
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:  # the environments check their arguments, too, and do without PyTorch
    import torch as th

MAX_LISTED_NAMES = 20
"""Largest number of known names that an error lists."""

MAX_FLOAT = float(np.finfo(np.float32).max)
"""The largest number of float32, the dtype of all weights."""

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
    more = len(options) - MAX_LISTED_NAMES
    listed = ", ".join(map(repr, options[:MAX_LISTED_NAMES])) or "none"
    return ValueError(f"Unknown {what} {name!r}.{hint} Known: {listed}{f' and {more} more' if more > 0 else ''}.")


def warn_caller(message: str) -> None:
    """
    Issue a ``UserWarning`` at the line of the user's code that called this package.

    :param message: Text of the warning.
    """
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and f"{frame.f_globals.get('__name__', '')}.".startswith(OWN_PACKAGES):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


class Rule(Protocol):
    """Type and range of an argument."""

    def problem(self, value: Any) -> str | None:
        """
        :param value: A value of the argument.
        :return: The rest of the sentence "`name` ..." that says which values work; ``None`` for a value that works.
        """


@dataclass(frozen=True)
class Number:
    """
    A finite real number that float32 can hold; NumPy's are accepted, bools and text are not.

    :param low: Lower bound.
    :param high: Upper bound.
    :param above: Whether the lower bound is exclusive.
    :param below: Whether the upper bound is exclusive.
    """

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    below: bool = False

    def problem(self, value: Any) -> str | None:
        number = _as_float(value)
        high_enough = self.low < number if self.above else self.low <= number
        low_enough = number < self.high if self.below else number <= self.high
        if high_enough and low_enough and abs(number) <= MAX_FLOAT:
            return None
        if MAX_FLOAT < abs(number) < math.inf:
            return f"must be a float32 number, at most {MAX_FLOAT:.3g} in size"
        if math.isfinite(self.high):
            first, last = "(" if self.above else "[", ")" if self.below else "]"
            return f"must be a number in {first}{self.low:g}, {self.high:g}{last}"
        if not math.isfinite(self.low):
            return "must be a finite number"
        return f"must be a finite number {'above' if self.above else 'of at least'} {self.low:g}"


def _as_float(value: Any) -> float:
    """:return: A real number as a float, inf if it is larger than any; NaN for all other values."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf


@dataclass(frozen=True)
class Whole:
    """
    An integer; NumPy's are accepted, bools are not.

    :param low: Lower bound, inclusive.
    :param high: Upper bound, inclusive; by default the largest size that PyTorch can express.
    """

    low: int
    high: int = sys.maxsize

    def problem(self, value: Any) -> str | None:
        if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < self.low:
            return f"must be a whole number of at least {self.low}"
        return None if int(value) <= self.high else f"must be at most {self.high}"


@dataclass(frozen=True)
class Flag:
    """``True`` or ``False``; NumPy's are accepted, other values are not, whatever their truth value."""

    def problem(self, value: Any) -> str | None:
        return None if isinstance(value, (bool, np.bool_)) else "must be True or False"


@dataclass(frozen=True)
class Instance:
    """
    An instance of a class.

    :param types: The class, or several classes.
    :param described: Noun phrase for the message, e.g. ``"a path"``.
    """

    types: type | tuple[type, ...]
    described: str

    def problem(self, value: Any) -> str | None:
        return None if isinstance(value, self.types) else f"must be {self.described}"


@dataclass(frozen=True)
class Subclass:
    """
    A subclass of a class.

    :param base: The class.
    """

    base: type

    def problem(self, value: Any) -> str | None:
        return (
            None if isinstance(value, type) and issubclass(value, self.base) else f"must be a subclass of {self.base.__name__}"
        )


@dataclass(frozen=True)
class Options:
    """A dictionary whose keys are names."""

    def problem(self, value: Any) -> str | None:
        named = isinstance(value, Mapping) and all(isinstance(key, str) for key in value)
        return None if named else "must be a dictionary of options by name"


@dataclass(frozen=True)
class OrNone:
    """
    ``None``, or a value of another rule.

    :param rule: The other rule.
    :param meaning: Effect of ``None``, for the message.
    """

    rule: Rule
    meaning: str = ""

    def problem(self, value: Any) -> str | None:
        problem = None if value is None else self.rule.problem(value)
        return problem and f"{problem}, or None{self.meaning}"


def check_values(rules: Mapping[str, Rule], values: Mapping[str, Any]) -> None:
    """
    Require values that keep their rules.

    :param rules: Rules by name.
    :param values: Values by name; names without a rule are skipped.
    :raises ValueError: for the first value that breaks its rule, with the value and what would work.
    """
    for name, rule in rules.items():
        if name in values and (problem := rule.problem(values[name])) is not None:
            raise ValueError(f"`{name}` {problem}, got {values[name]!r}.")


def plain(value: Any) -> Any:
    """
    :param value: Any value.
    :return: A Python number or bool for a NumPy scalar; any other value unchanged.
    """
    return value.item() if isinstance(value, np.generic) else value


def available_memory(device: "th.device | str" = "cpu") -> int:
    """
    :param device: A device of PyTorch.
    :return: Bytes that can still be allocated on it. On Linux, swap is not counted, and the limit of a container is; where the
        system cannot tell, it is the address space of a process, 128 TiB.
    """
    import torch as th

    device = th.device(device)
    if device.type == "cuda":
        return int(th.cuda.mem_get_info(device)[0])
    limits = [2**47]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        limits += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
        group = Path("/sys/fs/cgroup")
        used = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())["anon"]
        limits.append(int((group / "memory.max").read_text()) - int(used))
    except (OSError, ValueError, KeyError):  # another system, or no limit of a container
        if hasattr(os, "sysconf") and {"SC_PHYS_PAGES", "SC_PAGE_SIZE"} <= os.sysconf_names.keys():
            limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return max(0, min(limits))


def readable_bytes(size: float) -> str:
    """
    :param size: A number of bytes.
    :return: The number with a unit, e.g. ``"1.5 GiB"``.
    """
    for unit in ("bytes", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} PiB"


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
    check_values(dict.fromkeys(sizes, Whole(at_least)), sizes)


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
    :return: All its divisors, in ascending order. Only 1 and the size itself above 2**44: the search would take seconds, and
        no memory holds such sizes.
    """
    if size > 2**44:
        return [1, size]
    small = [candidate for candidate in range(1, math.isqrt(size) + 1) if size % candidate == 0]
    return sorted({*small, *(size // divisor for divisor in small)})


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
    obs: "np.ndarray | th.Tensor | Mapping[str, np.ndarray | th.Tensor]", when: str, envs: Sequence[int] | None = None
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
            import torch as th

            tensor = th.as_tensor(value)
            place = tuple((~tensor.isfinite()).nonzero()[0].tolist())
            env = place[0] if envs is None else envs[place[0]]
            name = f" {key!r}" if key else ""
            raise ValueError(f"Observation{name} of environment {env} {when} is not finite: it holds {tensor[place].item()}.")


def all_finite(tensors: "Iterable[th.Tensor]") -> bool:
    """
    :param tensors: Tensors of numbers on one device.
    :return: Whether all numbers are finite; the device is waited for once.
    """
    import torch as th

    return bool(th.stack([tensor.isfinite().all() for tensor in tensors]).all())


def _is_finite(values: "np.ndarray | th.Tensor") -> bool:
    if isinstance(values, np.ndarray):  # runs at each step of acting: a NumPy call takes a third of the time of PyTorch's
        return values.dtype.kind != "f" or bool(np.isfinite(values).all())
    return not values.is_floating_point() or bool(values.isfinite().all())
