"""The persistent multi-head memory (PMM): items stay until something that matters more needs their slot."""

import math
from typing import NamedTuple

import numpy as np
import torch as th
from torch import nn

from sb3_cyborg.memories.attention import AttentionMemory
from sb3_cyborg.memories.trace import record, tracing
from sb3_cyborg.ops.linear import Linear
from sb3_cyborg.ops.masking import finite, masked_softmax
from sb3_cyborg.registry import MEMORIES
from sb3_cyborg.sequence_model import AUX_LOSS, Logs, State, may_branch

CHUNK = 64
"""Steps that are handled at once: pairwise scores grow with its square."""

MIN_GATE = 1e-6
"""Smallest write gate; its logarithm is added to scores."""


class Slots(NamedTuple):
    """
    The state that eviction depends on, as tensors, without a branch on their values.

    :param item: Index of the item that each slot holds, (B, S).
    :param occupied: Whether it holds one, bool, (B, S).
    :param usage: (B, S).
    :param age: (B, S).
    """

    item: th.Tensor
    occupied: th.Tensor
    usage: th.Tensor
    age: th.Tensor

    @classmethod
    def of(cls, state: State) -> "Slots":
        """:return: The slots of a memory's state; slot s holds item s."""
        usage = state["usage"].detach()
        item = th.arange(usage.shape[1], device=usage.device).expand(usage.shape)
        return cls(item, state["strength"].detach() > 0, usage, state["age"].detach())

    def reset(self, keep: th.Tensor) -> "Slots":
        """:return: The slots, empty in the rows whose keep-mask (B,) is false."""
        keep = keep.unsqueeze(1)
        return self._replace(
            occupied=self.occupied & keep, usage=th.where(keep, self.usage, 0.0), age=th.where(keep, self.age, 0.0)
        )

    def offer(self, dominant: th.Tensor, open_gate: th.Tensor, new_index: int, usage_decay: float) -> "Slots":
        """
        The bookkeeping of one step, after its read.

        :param dominant: Slots that a head gave more than half of its attention, bool, (B, S).
        :param open_gate: Whether the write gate is open, bool, (B,).
        :param new_index: Index of the item that the step offers.
        :param usage_decay: Factor on all usage.
        :return: The slots after the step.
        """
        usage = self.usage * usage_decay + dominant
        rank = th.where(self.occupied, usage, -1.0)  # an empty slot is taken first
        least = rank.amin(1, keepdim=True)
        victim = th.where(rank == least, self.age, -1.0).argmax(1, keepdim=True)
        place = th.arange(usage.shape[1], device=usage.device)
        written = (place == victim) & (open_gate.unsqueeze(1) | (least <= 0))
        return Slots(
            th.where(written, new_index, self.item),
            self.occupied | written,
            th.where(written, open_gate.unsqueeze(1).to(usage.dtype), usage),
            th.where(self.occupied & ~written, self.age + 1, 0.0),
        )


class SlotTable:
    """
    :class:`Slots` in NumPy, whose calls take a third of PyTorch's; for a CPU.

    :param state: The memory's state; it is copied.
    :param usage_decay: Factor on all usage at each step.
    """

    def __init__(self, state: State, usage_decay: float) -> None:
        self.usage_decay = usage_decay
        self.occupied = _to_numpy(state["strength"]) > 0  # (B, S)
        self.usage, self.age = _to_numpy(state["usage"]).copy(), _to_numpy(state["age"]).copy()  # (B, S)
        # Slot s held item index < S at the start, step index - S since.
        self.item = np.tile(np.arange(self.age.shape[1]), (len(self.age), 1))

    def reset(self, rows: np.ndarray) -> None:
        """:param rows: Where an episode starts, boolean, (B,)."""
        self.occupied[rows], self.usage[rows], self.age[rows] = False, 0.0, 0.0

    def offer(self, dominant: np.ndarray, open_gate: np.ndarray, new_index: int) -> None:
        """
        The bookkeeping of one step, after its read.

        :param dominant: Slots that a head gave more than half of its attention, (B, S).
        :param open_gate: Whether the write gate is open, (B,).
        :param new_index: Index of the item that the step offers.
        """
        self.usage *= self.usage_decay
        self.usage += dominant
        rank = np.where(self.occupied, self.usage, -1.0)  # an empty slot is taken first
        least = rank.min(axis=1, keepdims=True)
        victim = np.where(rank == least, self.age, -1.0).argmax(axis=1)
        rows = np.flatnonzero(open_gate | (least[:, 0] <= 0))
        self.age += 1
        self.age *= self.occupied
        written = rows, victim[rows]
        self.item[written], self.occupied[written] = new_index, True
        self.usage[written], self.age[written] = open_gate[rows], 0.0

    def slots(self) -> Slots:
        """:return: The same as tensors, which share the memory of these arrays."""
        return Slots(*map(th.from_numpy, (self.item, self.occupied, self.usage, self.age)))


def _to_numpy(tensor: th.Tensor) -> np.ndarray:
    array: np.ndarray = tensor.detach().cpu().numpy()
    return array


@MEMORIES.register("pmm")
class PersistentMemory(AttentionMemory):
    """
    ``num_slots`` items, read by multi-head attention; a new item takes the slot of the least-used one.

    Every step offers one item with a *write gate* in (0, 1). The gate's logarithm is added to the item's scores
    whenever it is read, which is how the gate learns. An item whose gate is open (> 1/2) enters with usage 1, any
    other with usage 0. A slot's usage decays every step and grows by 1 when a head gives it more than half of its
    attention. A new item evicts the slot with the least usage, the oldest among equals; but one whose gate is shut
    never displaces an item with any usage. So flagged items outlive any number of steps that do not matter.

    Usage is made of whole events, not of weights, for honesty's sake: acting and training round differently, and an
    eviction that hangs on the seventh digit of an attention weight would not be replayed (usage after the
    differentiable neural computer, Graves et al. 2016, https://doi.org/10.1038/nature20101).

    State: ``items`` (B, S, memory_dim); ``strength`` (B, S), their gates, 0 for an empty slot; ``usage`` and ``age``
    (B, S).

    :param input_dim: Features of the input.
    :param memory_dim: Features of the read.
    :param num_slots: S.
    :param num_heads: Heads; divides ``memory_dim``.
    :param usage_decay: Factor on all usage at each step, in (0, 1].
    :param write_rate: Wanted mean of the write gate, in (0, 1); the squared distance from it is returned as
        ``aux_loss``. ``None`` leaves the gate alone.
    """

    counters = frozenset({"usage", "age"})

    def __init__(
        self,
        input_dim: int,
        memory_dim: int = 128,
        num_slots: int = 16,
        num_heads: int = 4,
        usage_decay: float = 0.99,
        write_rate: float | None = None,
    ) -> None:
        super().__init__(input_dim, memory_dim, num_slots, num_heads)
        if not 0 < usage_decay <= 1:
            raise ValueError(f"`usage_decay` must be in (0, 1], got {usage_decay!r}.")
        if write_rate is not None and not 0 < write_rate < 1:
            raise ValueError(f"`write_rate` must be in (0, 1) or None, got {write_rate!r}.")
        self.usage_decay, self.write_rate = usage_decay, write_rate
        self.item = Linear(input_dim, memory_dim)
        self.key = Linear(memory_dim, memory_dim, bias=False)
        self.value = Linear(memory_dim, memory_dim, bias=False)
        self.write_gate = nn.Linear(input_dim, 1)
        for layer in (self.item, self.key, self.value):
            nn.init.orthogonal_(layer.weight)
        nn.init.zeros_(self.item.bias)

    def get_initial_state(self, batch_size: int, device: th.device | str | None = None) -> State:
        state = {name: self._zeros(batch_size, self.num_slots, device=device) for name in ("strength", "usage", "age")}
        return {"items": self._zeros(batch_size, self.num_slots, self.output_dim, device=device)} | state

    def _gate(self, x: th.Tensor) -> th.Tensor:
        """:return: Write gates (...,) of inputs (..., input_dim)."""
        return th.sigmoid(self.write_gate(x)).squeeze(-1).clamp(min=MIN_GATE)

    def forward_step(self, x: th.Tensor, state: State, mask: th.Tensor | None = None) -> tuple[th.Tensor, State, Logs]:
        if mask is not None:
            state = self.reset_states(state, mask)
        items, strength = state["items"], state["strength"]
        occupied = strength > 0
        bias = th.where(occupied, strength, 1.0).log().unsqueeze(1)
        context, weights, null = self.attend_projected(self.queries(x), items, self.key, self.value, occupied, bias)
        gate = self._gate(x)
        if tracing():
            age = th.where(occupied, state["age"] + 1, 0)
            record(read=weights, null=null, age=age, gate=gate.unsqueeze(-1), strength=strength, usage=state["usage"])
        slots = self._offer(state, (weights > 0.5).any(dim=1), gate > 0.5)
        written = slots.item == self.num_slots
        new_state = {
            "items": th.where(written.unsqueeze(-1), self.item(x).unsqueeze(1), items),
            "strength": th.where(written, gate.unsqueeze(1), strength),
            "usage": slots.usage,
            "age": slots.age,
        }
        return self.finish(context, null), new_state, self._logs(weights, null, occupied, gate)

    def _offer(self, state: State, dominant: th.Tensor, open_gate: th.Tensor) -> Slots:
        """:return: The slots after a step whose item has index ``num_slots``; see :meth:`Slots.offer`."""
        if not may_branch(dominant.device):
            return Slots.of(state).offer(dominant, open_gate, self.num_slots, self.usage_decay)
        table = SlotTable(state, self.usage_decay)
        table.offer(_to_numpy(dominant), _to_numpy(open_gate), self.num_slots)
        return table.slots()

    def forward_sequence(self, x: th.Tensor, state: State, masks: th.Tensor | None = None) -> tuple[th.Tensor, State, Logs]:
        reads, parts = [], []
        for start in range(0, x.shape[1], CHUNK):
            part = slice(start, start + CHUNK)
            read, state, *rest = self._chunk(x[:, part], state, None if masks is None else masks[:, part])
            reads.append(read)
            parts.append(rest)
        weights, null, occupied, gate = (th.cat(tensors, dim=1) for tensors in zip(*parts, strict=True))
        if tracing():
            record(read=weights, null=null, gate=gate.unsqueeze(-1))
        return th.cat(reads, dim=1), state, self._logs(weights, null, occupied, gate)

    def _chunk(
        self, x: th.Tensor, state: State, masks: th.Tensor | None
    ) -> tuple[th.Tensor, State, th.Tensor, th.Tensor, th.Tensor, th.Tensor]:
        """
        :return: The read (B, T, memory_dim), the state after it; weights (B, T, H, S), null weights (B, T, H),
            occupied slots (B, T, S) and gates (B, T).
        """
        gate = self._gate(x)
        items = th.cat([state["items"], self.item(x)], dim=1)  # (B, S + T, m)
        strength = th.cat([state["strength"], gate], dim=1)
        bias = th.where(strength > 0, strength, 1.0).log()
        query = self.queries(x)
        keys, values = self.heads(self.key(items)), self.heads(self.value(items))
        # Scores of every step with every item there is or will be: one matmul; the slots then only choose among them.
        scores = query.transpose(1, 2) @ keys.permute(0, 2, 3, 1) / math.sqrt(self.head_dim) + bias[:, None, None]
        null_logits = self.null_logits(query)
        replay = self._replay_table if may_branch(x.device) else self._replay
        indices, occupied, last = replay(state, scores.detach(), null_logits.detach(), gate.detach() > 0.5, masks)
        chosen = indices.unsqueeze(1).expand(-1, self.num_heads, -1, -1)  # (B, H, T, S)
        visible = occupied.unsqueeze(1)
        weights, null = masked_softmax(scores.gather(3, chosen), visible, null_logits.transpose(1, 2))
        spread = th.zeros_like(scores).scatter(3, chosen, weights)
        context = (spread @ finite(values).transpose(1, 2)).transpose(1, 2)  # (B, T, H, d)
        null = null.transpose(1, 2)
        last_items = items.gather(1, last.item.unsqueeze(-1).expand(-1, -1, items.shape[-1]))
        last_strength = strength.gather(1, last.item)
        if masks is not None:  # an empty slot holds what it held at the start, unless a reset has cleared it
            held = last.occupied | masks.all(dim=1, keepdim=True)
            last_items = th.where(held.unsqueeze(-1), last_items, 0.0)
            last_strength = th.where(held, last_strength, 0.0)
        new_state = {
            "items": last_items,
            "strength": last_strength,
            "usage": last.usage,
            "age": last.age,
        }
        return self.finish(context, null), new_state, weights.transpose(1, 2), null, occupied, gate

    def _replay(
        self, state: State, scores: th.Tensor, null_logits: th.Tensor, open_gate: th.Tensor, masks: th.Tensor | None
    ) -> tuple[th.Tensor, th.Tensor, Slots]:
        """
        Replay which item each slot holds, step by step, without gradient and without a branch on values.

        :param state: The memory's state before the first step.
        :param scores: Scores of every step with every item, (B, H, T, S + T).
        :param null_logits: (B, T, H).
        :param open_gate: Whether the write gate is open, bool, (B, T).
        :param masks: Keep-masks, bool, (B, T), or ``None``.
        :return: At each step's read, the item of each slot and whether it is occupied, (B, T, S); the slots at the end.
        """
        slots, read = Slots.of(state), []
        for t in range(scores.shape[2]):
            slots = slots if masks is None else slots.reset(masks[:, t])
            read.append(slots)
            logits = scores[:, :, t].gather(2, slots.item.unsqueeze(1).expand(-1, self.num_heads, -1))
            logits = th.where(slots.occupied.unsqueeze(1), logits, -math.inf)
            weights = th.softmax(th.cat([logits, null_logits[:, t].unsqueeze(-1)], dim=-1), dim=-1)[..., :-1]
            dominant = (weights > 0.5).any(dim=1)  # a NaN of the inputs dominates nothing
            slots = slots.offer(dominant, open_gate[:, t], self.num_slots + t, self.usage_decay)
        return th.stack([each.item for each in read], 1), th.stack([each.occupied for each in read], 1), slots

    def _replay_table(
        self, state: State, scores: th.Tensor, null_logits: th.Tensor, open_gate: th.Tensor, masks: th.Tensor | None
    ) -> tuple[th.Tensor, th.Tensor, Slots]:
        """:meth:`_replay` on small NumPy arrays."""
        table = SlotTable(state, self.usage_decay)
        by_step = _to_numpy(scores.transpose(1, 2))  # (B, T, H, S + T)
        null_by_step, open_gates = _to_numpy(null_logits.unsqueeze(-1)), _to_numpy(open_gate)
        starts = None if masks is None else _to_numpy(~masks)
        indices = np.empty((*open_gates.shape, self.num_slots), dtype=np.int64)
        occupied = np.empty(indices.shape, dtype=bool)
        rows, heads = np.arange(len(indices))[:, None, None], np.arange(self.num_heads)[:, None]
        with np.errstate(invalid="ignore"):  # a NaN of the inputs dominates nothing
            for t in range(indices.shape[1]):
                if starts is not None and starts[:, t].any():
                    table.reset(starts[:, t])
                indices[:, t], occupied[:, t] = table.item, table.occupied
                logits = by_step[rows, t, heads, table.item[:, None]]  # (B, H, S)
                logits[~np.broadcast_to(table.occupied[:, None], logits.shape)] = -np.inf
                null = null_by_step[:, t]
                largest = np.maximum(logits.max(axis=2, keepdims=True), null)
                weights = np.exp(logits - largest)
                dominant = weights > 0.5 * (weights.sum(axis=2, keepdims=True) + np.exp(null - largest))
                table.offer(dominant.any(axis=1), open_gates[:, t], self.num_slots + t)
        return th.from_numpy(indices), th.from_numpy(occupied), table.slots()

    def _logs(self, weights: th.Tensor, null: th.Tensor, occupied: th.Tensor, gate: th.Tensor) -> Logs:
        logs = self.read_logs(weights, null, occupied.sum(-1).to(gate.dtype))
        if self.training:
            logs["write_strength"] = gate.detach().mean()
        if self.write_rate is not None:
            logs[AUX_LOSS] = (gate.mean() - self.write_rate) ** 2
        return logs
