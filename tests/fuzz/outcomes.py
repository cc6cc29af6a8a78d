"""Time limits, values of all kinds and numbers of cases, for the fuzz tests."""

import contextlib
import math
import signal
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st


class Hang(BaseException):
    """A case did not end in time. It is no ``Exception``, so that nothing under test takes it for an error of its own."""


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """
    Fail if the code takes longer, where the system has timers and in the main thread.

    :param seconds: The limit.
    """
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        raise Hang(f"no end after {seconds} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def cases(fast: int, slow: int) -> pytest.MarkDecorator:
    """
    :param fast: Number of cases in ``make test``.
    :param slow: Number of cases in ``make test-slow``.
    :return: A mark that gives a test its number of cases, ``count``.
    """
    marks = [pytest.mark.slow, pytest.mark.timeout(7200)]
    return pytest.mark.parametrize("count", [fast, pytest.param(slow, marks=marks)])


def some(count: int) -> settings:
    """:return: Settings of hypothesis for a number of cases, whose time is limited by :func:`within` alone."""
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    return settings(max_examples=count, deadline=None, suppress_health_check=checks)


def check_message(error: BaseException, settings_given: int = 1) -> None:
    """The message of an error has a line for each setting, says something, and can be read."""
    message = str(error)
    assert 1 <= len(message.splitlines()) <= max(1, settings_given), message
    assert len(message) > 10
    assert "pydantic" not in message
    assert "Traceback" not in message


NUMBERS: st.SearchStrategy[Any] = st.one_of(
    st.integers(-3, 300),
    st.sampled_from([2**31, 2**32, 2**63, 2**64, 10**18, 10**30, 10**400, -(2**63)]),
    st.floats(),
    st.sampled_from([0.0, -0.0, 0.5, 1.0, 1e6, 1e15, 1e300, math.nan, math.inf, -math.inf]),
    st.sampled_from([np.int64(3), np.float32(0.5), np.float64("nan"), np.bool_(True), np.uint8(255)]),
)
WORDS: st.SearchStrategy[Any] = st.one_of(
    st.text(max_size=20),
    st.sampled_from(["", "auto", "lin_3e-4", "lin_1_2_3", "1e6", "1:30", "cpu", "no", "None", "../x"]),
    st.sampled_from(["a\nb", "\x00", "\ud800"]),
)
ITEMS: st.SearchStrategy[Any] = st.one_of(st.none(), st.booleans(), NUMBERS, WORDS)
VALUES: st.SearchStrategy[Any] = st.recursive(
    ITEMS,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(WORDS, inner, max_size=4), st.tuples(inner)),
    max_leaves=8,
)
"""Values that a setting may be given, of every type that Python or YAML has for them."""
