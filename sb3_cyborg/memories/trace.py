"""Looking inside a memory: what it read and wrote at each step, recorded only while somebody looks."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch as th

from sb3_cyborg.checks import check_options

Record = dict[str, th.Tensor]

QUANTITIES: dict[str, str] = {
    "read": "(B, H, S): share of each head's read that comes from each stored entry, in [0, 1]",
    "null": "(B, H): share of a read that comes from the null vector, in [0, 1]; with `read` it sums to 1",
    "age": "(B, S): how many steps ago an entry was seen, 1 for the step before; 0 for an empty one",
    "gate": "(B, G): write gates, in [0, 1]",
    "write": "(B, H, S): share of each slot that the step's item replaces, in [0, 1]",
    "unwritten": "(B, H, S): share of each slot that is still the null vector, in [0, 1]",
    "strength": "(B, S): write gate that each stored item entered with, 0 for an empty slot",
    "usage": "(B, S): how much use each stored item was of, at least 0",
}
"""
What a memory can record, all as it was when the step read; a sequence form records (B, T, ...).

``B`` rows, ``H`` heads, ``S`` slots, ``G`` gates.
"""

_records: ContextVar[list[Record] | None] = ContextVar("records", default=None)


def tracing() -> bool:
    """:return: Whether anybody looks; a memory asks before it computes what only :func:`record` needs."""
    return not th.compiler.is_compiling() and _records.get() is not None


def record(**quantities: th.Tensor) -> None:
    """
    Show a step, or a sequence; without :func:`trace` around it nothing is kept.

    A memory of your own calls it once in its ``forward_step`` with what it has, at least ``read`` and ``null``.

    :param quantities: Some of :data:`QUANTITIES`, by name.
    :raises ValueError: for a name that is not among them.
    """
    records = _records.get()
    if records is not None:
        check_options("a trace", quantities, QUANTITIES)
        records.append({name: tensor.detach() for name, tensor in quantities.items()})


@contextmanager
def trace() -> Iterator[list[Record]]:
    """:return: A context whose list gains one record for each step, or sequence, that a memory runs inside of it."""
    records: list[Record] = []
    token = _records.set(records)
    try:
        yield records
    finally:
        _records.reset(token)
