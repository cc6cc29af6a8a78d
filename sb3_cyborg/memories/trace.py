"""Records of the reads and writes of a memory, for inspection; nothing is recorded outside of :func:`trace`."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch as th

from sb3_cyborg.checks import check_options

Record = dict[str, th.Tensor]

QUANTITIES: dict[str, str] = {
    "read": "(B, H, S): weight of each stored entry in each head's read, in [0, 1]",
    "null": "(B, H): weight of the null vector in each head's read, in [0, 1]; with `read` it sums to 1",
    "age": "(B, S): age of each entry in steps, 1 for the previous step, 0 for an empty slot",
    "gate": "(B, G): write gates, in [0, 1]",
    "write": "(B, H, S): share of each slot that the step's item replaces, in [0, 1]",
    "unwritten": "(B, H, S): share of the null vector in each slot, in [0, 1]",
    "strength": "(B, S): write gate of each stored item, 0 for an empty slot",
    "usage": "(B, S): usage of each stored item, at least 0",
}
"""
Quantities that a memory can record, with the values at the read of the step. A sequence form records (B, T, ...).

``B`` rows, ``H`` heads, ``S`` slots, ``G`` gates.
"""

_records: ContextVar[list[Record] | None] = ContextVar("records", default=None)


def tracing() -> bool:
    """:return: Whether a :func:`trace` is active; if not, a memory need not compute the arguments of :func:`record`."""
    return not th.compiler.is_compiling() and _records.get() is not None


def record(**quantities: th.Tensor) -> None:
    """
    Record a step or a sequence in the active :func:`trace`; without one, do nothing.

    A memory of your own calls it once in its ``forward_step``, with at least ``read`` and ``null``.

    :param quantities: Tensors by name, see :data:`QUANTITIES` for names and shapes.
    :raises ValueError: for an unknown name, within a trace.
    """
    records = _records.get()
    if records is not None:
        check_options("a trace", quantities, QUANTITIES)
        records.append({name: tensor.detach() for name, tensor in quantities.items()})


@contextmanager
def trace() -> Iterator[list[Record]]:
    """:return: A context with a list; each step or sequence of a memory inside of it appends one record."""
    records: list[Record] = []
    token = _records.set(records)
    try:
        yield records
    finally:
        _records.reset(token)
