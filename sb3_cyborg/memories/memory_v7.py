"""``MemoryV7``: one external memory, several kinds; a kind is a class in a registry."""

import inspect
from typing import Any

import torch as th

from sb3_cyborg.checks import check_options, check_positive, unknown_name
from sb3_cyborg.memories.kv import KeyValueMemory
from sb3_cyborg.memories.pmm import PersistentMemory
from sb3_cyborg.memories.ring import RingMemory
from sb3_cyborg.memories.slot import SlotMemory
from sb3_cyborg.sequence_model import Logs, SequenceModel, State, full_precision


class NoMemory(SequenceModel):
    """
    Remembers nothing and reads nothing: the control in every comparison.

    :param input_dim: Features of the input.
    """

    def __init__(self, input_dim: int) -> None:
        super().__init__()
        check_positive(input_dim=input_dim)
        self.input_dim, self.output_dim = input_dim, 0

    def get_initial_state(self, batch_size: int, device: th.device | str | None = None) -> State:
        return {}

    def forward_step(self, x: th.Tensor, state: State, mask: th.Tensor | None = None) -> tuple[th.Tensor, State, Logs]:
        return x[..., :0], {}, {}

    def forward_sequence(self, x: th.Tensor, state: State, masks: th.Tensor | None = None) -> tuple[th.Tensor, State, Logs]:
        return x[..., :0], {}, {}


MEMORIES: dict[str, type[SequenceModel]] = {
    "pmm": PersistentMemory,
    "slot": SlotMemory,
    "kv": KeyValueMemory,
    "ring": RingMemory,
    "none": NoMemory,
}
"""All kinds of memory by name; add to it with :func:`register_memory`."""


def register_memory(kind: str, memory_class: type[SequenceModel]) -> None:
    """
    Make a memory of your own available as ``policy_kwargs={"memory": kind}``.

    :param kind: Its name; one that is taken is replaced.
    :param memory_class: A :class:`SequenceModel` whose constructor takes ``input_dim`` and any options by name, and that
        keeps the contract (``sb3_cyborg.testing.verify_contract``).
    :raises ValueError: for an option named ``kind``, which is :class:`MemoryV7`'s own.
    """
    if "kind" in inspect.signature(memory_class).parameters:
        raise ValueError(f"{memory_class.__name__} takes an option `kind`, which MemoryV7 takes itself; rename it.")
    MEMORIES[kind] = memory_class


def memory_options(kind: str) -> set[str]:
    """
    :param kind: A kind of memory.
    :return: Names of the options that it takes.
    :raises ValueError: for an unknown kind.
    """
    if kind not in MEMORIES:
        raise unknown_name("memory", kind, MEMORIES)
    return set(inspect.signature(MEMORIES[kind]).parameters) - {"input_dim"}


class MemoryV7(SequenceModel):
    """
    An external memory. Each step reads, then writes.

    :param input_dim: Features of the input (the encoder's latent).
    :param kind: ``"pmm"``, ``"slot"``, ``"kv"``, ``"ring"``, ``"none"``, or one that was registered.
    :param options: Options of the kind: ``memory_dim`` (features of the read), ``num_slots``, ``num_heads`` and, for
        ``pmm``, ``usage_decay`` and ``write_rate``. What is not given takes the kind's default.
    :raises ValueError: for an unknown kind or option, and for sizes that cannot be.
    """

    def __init__(self, input_dim: int, kind: str = "ring", **options: Any) -> None:
        super().__init__()
        check_options(f"memory {kind!r}", options, memory_options(kind))
        self.kind = kind
        self.memory = MEMORIES[kind](input_dim, **options)
        self.input_dim, self.output_dim = input_dim, self.memory.output_dim

    def get_initial_state(self, batch_size: int, device: th.device | str | None = None) -> State:
        return self.memory.get_initial_state(batch_size, device)

    def forward_step(self, x: th.Tensor, state: State, mask: th.Tensor | None = None) -> tuple[th.Tensor, State, Logs]:
        return self._run("forward_step", x, state, mask)

    def forward_sequence(self, x: th.Tensor, state: State, masks: th.Tensor | None = None) -> tuple[th.Tensor, State, Logs]:
        return self._run("forward_sequence", x, state, masks)

    def _run(self, method: str, x: th.Tensor, state: State, mask: th.Tensor | None) -> tuple[th.Tensor, State, Logs]:
        keep = None if mask is None else mask.bool()  # numbers are welcome here; inside, masks are bool
        with full_precision(x.device):
            read: tuple[th.Tensor, State, Logs] = getattr(self.memory, method)(x, state, keep)
        return read
