"""``MemoryV7``: an external memory of one of several kinds."""

import inspect
from collections.abc import Callable
from typing import Any

import torch as th

from sb3_cyborg.memories import kv, none, pmm, ring, slot  # noqa: F401  # each registers itself
from sb3_cyborg.registry import MEMORIES as MEMORIES
from sb3_cyborg.sequence_model import Logs, SequenceModel, State, full_precision


def register_memory(kind: str, memory_class: Callable[..., SequenceModel]) -> None:
    """
    Register a memory class as a kind, for ``policy_kwargs={"memory": kind}``.

    :param kind: Name of the kind; an existing kind of that name is replaced.
    :param memory_class: A :class:`SequenceModel` whose constructor takes ``input_dim`` and named options. Test it with
        :func:`~sb3_cyborg.testing.verify_contract`.
    :raises ValueError: for a signature that lacks ``input_dim``, has ``*args`` or ``**kwargs``, or has an option with a
        reserved name.
    """
    MEMORIES.add(kind, memory_class, reserved=set(inspect.signature(MemoryV7).parameters) - {"input_dim", "options"})


class MemoryV7(SequenceModel):
    """
    External memory of a given kind. Each step reads, then writes.

    Masks are keep-masks: true keeps the state, false resets it before the step. They are bool; numbers are accepted as well,
    where non-zero keeps the state.

    :param input_dim: Features of the input, >= 1.
    :param kind: One of :data:`~sb3_cyborg.registry.MEMORIES`: ``"ring"``, ``"kv"``, ``"slot"``, ``"pmm"``, ``"none"``, or a
        registered one.
    :param options: Options of the kind, named as in the signature of its class, e.g. ``num_slots``.
    :raises ValueError: for an unknown kind or option, and for option values out of range.
    """

    def __init__(self, input_dim: int, kind: str = "ring", **options: Any) -> None:
        super().__init__()
        self.kind = kind
        self.memory = MEMORIES.build(kind, input_dim, **options)
        self.input_dim, self.output_dim = input_dim, self.memory.output_dim

    def get_initial_state(self, batch_size: int, device: th.device | str | None = None) -> State:
        return self.memory.get_initial_state(batch_size, device)

    def forward_step(self, x: th.Tensor, state: State, mask: th.Tensor | None = None) -> tuple[th.Tensor, State, Logs]:
        return self._run("forward_step", x, state, mask)

    def forward_sequence(self, x: th.Tensor, state: State, masks: th.Tensor | None = None) -> tuple[th.Tensor, State, Logs]:
        return self._run("forward_sequence", x, state, masks)

    def _run(self, method: str, x: th.Tensor, state: State, mask: th.Tensor | None) -> tuple[th.Tensor, State, Logs]:
        keep = None if mask is None else mask.bool()  # numbers are accepted here; memories expect bool masks
        with full_precision(x.device):
            read: tuple[th.Tensor, State, Logs] = getattr(self.memory, method)(x, state, keep)
        return read
