"""The persistent multi-head memory (PMM): slots with learned writes and least-used eviction."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch as th
from torch import nn
from torch.autograd.function import once_differentiable

from sb3_cyborg.checks import Number, OrNone, Rule, check_values
from sb3_cyborg.kernels import primitives as kernels
from sb3_cyborg.memories.attention import AttentionMemory
from sb3_cyborg.memories.trace import record, tracing
from sb3_cyborg.ops.linear import Linear
from sb3_cyborg.ops.masking import finite, masked_softmax
from sb3_cyborg.registry import MEMORIES
from sb3_cyborg.sequence_model import AUX_LOSS, Logs, State, may_branch, wants_diagnostics

CHUNK = 64
"""Steps in a chunk. The number of pairwise scores grows with its square."""

MIN_GATE = 1e-6
"""Lower bound of the write gate, whose logarithm is added to scores."""


class Slots(NamedTuple):
    """
    The part of the state that eviction depends on, as tensors; updates do not branch on values.

    :param item: Index of the item in each slot, int64, (B, S).
    :param occupied: Whether the slot holds an item, bool, (B, S).
    :param usage: Usage of the item, >= 0, (B, S).
    :param age: Steps since the item was written, >= 0, (B, S).
    """

    item: th.Tensor
    occupied: th.Tensor
    usage: th.Tensor
    age: th.Tensor

    @classmethod
    def of(cls, state: State) -> "Slots":
        """
        :param state: State of the memory.
        :return: Its slots; slot s holds item s.
        """
        usage = state["usage"].detach()
        item = th.arange(usage.shape[1], device=usage.device).expand(usage.shape)
        return cls(item, state["strength"].detach() > 0, usage, state["age"].detach())

    def reset(self, keep: th.Tensor) -> "Slots":
        """
        :param keep: Keep-mask, bool, (B,).
        :return: The slots, empty in rows whose mask is false.
        """
        keep = keep.unsqueeze(1)
        return self._replace(
            occupied=self.occupied & keep, usage=th.where(keep, self.usage, 0.0), age=th.where(keep, self.age, 0.0)
        )

    def update(self, dominant: th.Tensor, open_gate: th.Tensor, new_index: int, usage_decay: float) -> "Slots":
        """
        Update the slots after the read of one step: usage, eviction, age.

        :param dominant: Whether a head gave the slot more than half of its attention, bool, (B, S).
        :param open_gate: Whether the write gate is open (> 1/2), bool, (B,).
        :param new_index: Index of the step's item.
        :param usage_decay: Factor on all usage, in (0, 1].
        :return: The slots after the step.
        """
        usage = self.usage * usage_decay + dominant
        rank = th.where(self.occupied, usage, -1.0)  # empty slots are written first
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
    :class:`Slots` in NumPy, for a CPU: a NumPy call takes a third of the time of PyTorch's.

    :param state: State of the memory; it is copied.
    :param usage_decay: Factor on all usage at each step, in (0, 1].
    """

    def __init__(self, state: State, usage_decay: float) -> None:
        self.usage_decay = usage_decay
        self.occupied = _to_numpy(state["strength"]) > 0  # (B, S)
        self.usage, self.age = _to_numpy(state["usage"]).copy(), _to_numpy(state["age"]).copy()  # (B, S)
        # Items 0 to S - 1 are those of the state, item S + t is that of step t.
        self.item = np.tile(np.arange(self.age.shape[1]), (len(self.age), 1))

    def reset(self, rows: np.ndarray) -> None:
        """
        Empty the slots of rows.

        :param rows: Whether an episode starts, bool, (B,).
        """
        self.occupied[rows], self.usage[rows], self.age[rows] = False, 0.0, 0.0

    def update(self, dominant: np.ndarray, open_gate: np.ndarray, new_index: int) -> None:
        """
        Update the slots after the read of one step, see :meth:`Slots.update`.

        :param dominant: Whether a head gave the slot more than half of its attention, bool, (B, S).
        :param open_gate: Whether the write gate is open (> 1/2), bool, (B,).
        :param new_index: Index of the step's item.
        """
        self.usage *= self.usage_decay
        self.usage += dominant
        rank = np.where(self.occupied, self.usage, -1.0)  # empty slots are written first
        least = rank.min(axis=1, keepdims=True)
        victim = np.where(rank == least, self.age, -1.0).argmax(axis=1)
        rows = np.flatnonzero(open_gate | (least[:, 0] <= 0))
        self.age += 1
        self.age *= self.occupied
        written = rows, victim[rows]
        self.item[written], self.occupied[written] = new_index, True
        self.usage[written], self.age[written] = open_gate[rows], 0.0

    def slots(self) -> Slots:
        """:return: The slots as tensors that share the memory of these arrays."""
        return Slots(*map(th.from_numpy, (self.item, self.occupied, self.usage, self.age)))


def _to_numpy(tensor: th.Tensor) -> np.ndarray:
    array: np.ndarray = tensor.detach().cpu().numpy()
    return array


class _PmmKernel(th.autograd.Function):
    """Reads and evictions over a sequence as one autograd node, by compiled kernels."""

    @staticmethod
    def forward(
        ctx: Any,
        query: th.Tensor,
        keys: th.Tensor,
        values: th.Tensor,
        bias: th.Tensor,
        null_logits: th.Tensor,
        open_gate: th.Tensor,
        masks: th.Tensor | None,
        slots: Slots,
        usage_decay: float,
    ) -> tuple[th.Tensor, ...]:
        """
        Parameters are those of :func:`~sb3_cyborg.kernels.primitives.pmm_forward`; ``slots`` is overwritten.

        :return: Context (B, T, H, d) and null weights (B, T, H); without gradient, weights (B, T, H, S) and occupied slots
            (B, T, S).
        """
        read = kernels.pmm_forward(query, keys, values, bias, null_logits, open_gate, masks, slots, usage_decay)
        ctx.save_for_backward(query, keys, values, *read)
        ctx.mark_non_differentiable(read.weights, read.seen)
        return read.context, read.null_weights, read.weights, read.seen

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: th.Tensor, grad_null: th.Tensor, *_: Any) -> tuple[th.Tensor | None, ...]:
        query, keys, values, *read = ctx.saved_tensors
        grads = kernels.pmm_backward(query, keys, values, kernels.PmmRead(*read), grad, grad_null)
        return *grads, None, None, None, None


_pmm_kernel: Callable[..., tuple[th.Tensor, th.Tensor, th.Tensor, th.Tensor]] = _PmmKernel.apply  # torch gives it no types


@MEMORIES.register("pmm")
class PersistentMemory(AttentionMemory):
    """
    Persistent multi-head memory: ``num_slots`` items, read by multi-head attention, with least-used eviction.

    Each step has one item and a *write gate* in (0, 1). The logarithm of the gate is added to the scores of the item at every
    later read, which trains the gate. An item whose gate is open (> 1/2) is written with usage 1, any other item with usage 0.
    The usage of a slot decays at every step, and increases by 1 when a head gives the slot more than half of its attention.
    The new item replaces that of the slot with the least usage, the oldest one among equals. An item whose gate is closed is
    not written if all slots have usage above 0. Items with an open gate therefore persist through any number of steps whose
    gate is closed.

    Usage counts events instead of summing attention weights (cf. the differentiable neural computer, Graves et al. 2016,
    https://doi.org/10.1038/nature20101). Acting and training round differently: an eviction that depended on the last digit of
    a weight could differ between them.

    State: ``items`` (B, S, memory_dim); ``strength`` (B, S), the gates of the items, 0 for an empty slot; ``usage`` and
    ``age`` (B, S).

    :param input_dim: Features of the input, >= 1.
    :param memory_dim: Features of the read, >= 1.
    :param num_slots: Number of slots S, >= 1.
    :param num_heads: Number of heads; divides ``memory_dim``.
    :param usage_decay: Factor on all usage at each step, in (0, 1].
    :param write_rate: Target of the mean write gate, in (0, 1); the squared difference is returned as ``aux_loss``. ``None``
        adds no loss.
    :raises ValueError: for values out of these ranges, and for heads that do not divide ``memory_dim``.
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
        rules: dict[str, Rule] = {
            "usage_decay": Number(0, 1, above=True),
            "write_rate": OrNone(Number(0, 1, above=True, below=True)),
        }
        check_values(rules, {"usage_decay": usage_decay, "write_rate": write_rate})
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
        """:return: Write gates, (...,), for inputs (..., input_dim)."""
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
        slots = self._update_slots(state, (weights > 0.5).any(dim=1), gate > 0.5)
        written = slots.item == self.num_slots
        new_state = {
            "items": th.where(written.unsqueeze(-1), self.item(x).unsqueeze(1), items),
            "strength": th.where(written, gate.unsqueeze(1), strength),
            "usage": slots.usage,
            "age": slots.age,
        }
        return self.finish(context, null), new_state, self._logs(weights, null, occupied, gate)

    def _update_slots(self, state: State, dominant: th.Tensor, open_gate: th.Tensor) -> Slots:
        """:return: The slots after a step whose item has index ``num_slots``, see :meth:`Slots.update`."""
        if not may_branch(dominant.device):
            return Slots.of(state).update(dominant, open_gate, self.num_slots, self.usage_decay)
        table = SlotTable(state, self.usage_decay)
        table.update(_to_numpy(dominant), _to_numpy(open_gate), self.num_slots)
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
        :return: The read (B, T, memory_dim), the state after the chunk, weights (B, T, H, S), null weights (B, T, H), occupied
            slots (B, T, S), gates (B, T).
        """
        gate = self._gate(x)
        items = th.cat([state["items"], self.item(x)], dim=1)  # (B, S + T, m)
        strength = th.cat([state["strength"], gate], dim=1)
        bias = th.where(strength > 0, strength, 1.0).log()
        query = self.queries(x)
        keys, values, null_logits = self.heads(self.key(items)), self.heads(self.value(items)), self.null_logits(query)
        read = self._read_kernel if kernels.usable(query, keys, state["usage"]) else self._read
        open_gate = gate.detach() > 0.5
        context, weights, null, occupied, last = read(query, keys, values, bias, null_logits, open_gate, state, masks)
        last_items = items.gather(1, last.item.unsqueeze(-1).expand(-1, -1, items.shape[-1]))
        last_strength = strength.gather(1, last.item)
        if masks is not None:  # after a reset, empty slots are zeros; without one, they keep their content
            kept = last.occupied | masks.all(dim=1, keepdim=True)
            last_items = th.where(kept.unsqueeze(-1), last_items, 0.0)
            last_strength = th.where(kept, last_strength, 0.0)
        new_state = {
            "items": last_items,
            "strength": last_strength,
            "usage": last.usage,
            "age": last.age,
        }
        return self.finish(context, null), new_state, weights, null, occupied, gate

    def _read(
        self,
        query: th.Tensor,
        keys: th.Tensor,
        values: th.Tensor,
        bias: th.Tensor,
        null_logits: th.Tensor,
        open_gate: th.Tensor,
        state: State,
        masks: th.Tensor | None,
    ) -> tuple[th.Tensor, th.Tensor, th.Tensor, th.Tensor, Slots]:
        """
        Read the memory at each step, and replay the evictions.

        :param query: (B, T, H, d).
        :param keys: Keys of the items of the state, then of the steps, (B, S + T, H, d).
        :param values: (B, S + T, H, d).
        :param bias: Added to the scores of the items, (B, S + T).
        :param null_logits: Scores of the null entry, (B, T, H).
        :param open_gate: Whether the write gate is open (> 1/2), bool, (B, T).
        :param state: State of the memory before the first step.
        :param masks: Keep-masks, bool, (B, T), or ``None``.
        :return: Context (B, T, H, d), weights (B, T, H, S), null weights (B, T, H), occupied slots (B, T, S), and the slots
            after the last step.
        """
        # Scores of every step with every stored and new item in one matmul; the slots then index into them.
        scores = query.transpose(1, 2) @ keys.permute(0, 2, 3, 1) / math.sqrt(self.head_dim) + bias[:, None, None]
        replay = self._replay_table if may_branch(query.device) else self._replay
        indices, occupied, last = replay(state, scores.detach(), null_logits.detach(), open_gate, masks)
        chosen = indices.unsqueeze(1).expand(-1, self.num_heads, -1, -1)  # (B, H, T, S)
        weights, null = masked_softmax(scores.gather(3, chosen), occupied.unsqueeze(1), null_logits.transpose(1, 2))
        spread = th.zeros_like(scores).scatter(3, chosen, weights)
        context = (spread @ finite(values).transpose(1, 2)).transpose(1, 2)  # (B, T, H, d)
        return context, weights.transpose(1, 2), null.transpose(1, 2), occupied, last

    def _read_kernel(
        self,
        query: th.Tensor,
        keys: th.Tensor,
        values: th.Tensor,
        bias: th.Tensor,
        null_logits: th.Tensor,
        open_gate: th.Tensor,
        state: State,
        masks: th.Tensor | None,
    ) -> tuple[th.Tensor, th.Tensor, th.Tensor, th.Tensor, Slots]:
        """:meth:`_read` by a compiled kernel; parameters and results are the same."""
        slots = Slots(*(leaf.clone(memory_format=th.contiguous_format) for leaf in Slots.of(state)))
        tensors = (tensor.contiguous() for tensor in (query, keys, values, bias))
        context, null, weights, occupied = _pmm_kernel(*tensors, null_logits, open_gate, masks, slots, self.usage_decay)
        return context, weights, null, occupied, slots

    def _replay(
        self, state: State, scores: th.Tensor, null_logits: th.Tensor, open_gate: th.Tensor, masks: th.Tensor | None
    ) -> tuple[th.Tensor, th.Tensor, Slots]:
        """
        Compute step by step which item each slot holds, without gradient and without a branch on values.

        :param state: State of the memory before the first step.
        :param scores: Scores of every step with every item, (B, H, T, S + T).
        :param null_logits: Scores of the null entry, (B, T, H).
        :param open_gate: Whether the write gate is open (> 1/2), bool, (B, T).
        :param masks: Keep-masks, bool, (B, T), or ``None``.
        :return: At the read of each step, the item of each slot and whether the slot is occupied, (B, T, S); the slots after
            the last step.
        """
        slots, read = Slots.of(state), []
        for t in range(scores.shape[2]):
            slots = slots if masks is None else slots.reset(masks[:, t])
            read.append(slots)
            logits = scores[:, :, t].gather(2, slots.item.unsqueeze(1).expand(-1, self.num_heads, -1))
            logits = th.where(slots.occupied.unsqueeze(1), logits, -math.inf)
            weights = th.softmax(th.cat([logits, null_logits[:, t].unsqueeze(-1)], dim=-1), dim=-1)[..., :-1]
            dominant = (weights > 0.5).any(dim=1)  # false for NaN
            slots = slots.update(dominant, open_gate[:, t], self.num_slots + t, self.usage_decay)
        return th.stack([each.item for each in read], 1), th.stack([each.occupied for each in read], 1), slots

    def _replay_table(
        self, state: State, scores: th.Tensor, null_logits: th.Tensor, open_gate: th.Tensor, masks: th.Tensor | None
    ) -> tuple[th.Tensor, th.Tensor, Slots]:
        """:meth:`_replay` in NumPy, for a CPU; parameters and results are the same."""
        table = SlotTable(state, self.usage_decay)
        by_step = _to_numpy(scores.transpose(1, 2))  # (B, T, H, S + T)
        null_by_step, open_gates = _to_numpy(null_logits.unsqueeze(-1)), _to_numpy(open_gate)
        starts = None if masks is None else _to_numpy(~masks)
        indices = np.empty((*open_gates.shape, self.num_slots), dtype=np.int64)
        occupied = np.empty(indices.shape, dtype=bool)
        rows, heads = np.arange(len(indices))[:, None, None], np.arange(self.num_heads)[:, None]
        with np.errstate(invalid="ignore"):  # comparisons with NaN are false
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
                table.update(dominant.any(axis=1), open_gates[:, t], self.num_slots + t)
        return th.from_numpy(indices), th.from_numpy(occupied), table.slots()

    def _logs(self, weights: th.Tensor, null: th.Tensor, occupied: th.Tensor, gate: th.Tensor) -> Logs:
        logs = self.read_logs(weights, null, occupied.sum(-1).to(gate.dtype))
        if wants_diagnostics(self):
            logs["write_strength"] = gate.detach().mean()
        if self.write_rate is not None:
            logs[AUX_LOSS] = (gate.mean() - self.write_rate) ** 2
        return logs
