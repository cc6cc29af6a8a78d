"""The persistent multi-head memory (PMM): items stay until something that matters more needs their slot."""

import math
from typing import NamedTuple

import torch as th
from torch import nn

from sb3_cyborg.memories.attention import AttentionMemory
from sb3_cyborg.memories.trace import record, tracing
from sb3_cyborg.ops.linear import Linear
from sb3_cyborg.ops.window_attention import finite, masked_softmax
from sb3_cyborg.sequence_model import AUX_LOSS, Logs, State

CHUNK = 64
"""Steps that are handled at once: pairwise scores grow with its square."""

MIN_GATE = 1e-6
"""Smallest write gate; its logarithm is added to scores."""


class _Table(NamedTuple):
    """Which item each slot holds: the small state that eviction runs on."""

    item: th.Tensor  # (B, S) int64: slot s held item index < S at the start, step index - S since
    occupied: th.Tensor  # (B, S) bool
    usage: th.Tensor  # (B, S)
    age: th.Tensor  # (B, S), steps since it was written


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

    def _evict(self, table: _Table, weights: th.Tensor, gate: th.Tensor, new_index: int) -> _Table:
        """
        The bookkeeping of one step, after its read.

        :param table: Before the step.
        :param weights: Attention of the step, (B, H, S).
        :param gate: Write gate of the step, (B,).
        :param new_index: Index of the item that the step offers.
        :return: After the step.
        """
        dominant = (weights > 0.5).any(dim=1)
        usage = self.usage_decay * table.usage + dominant.to(table.usage.dtype)
        rank = th.where(table.occupied, usage, -1.0)  # an empty slot is taken first
        least = rank.amin(dim=1, keepdim=True)
        victim = th.where(rank == least, table.age, -1.0).argmax(dim=1, keepdim=True)
        open_gate = gate.unsqueeze(1) > 0.5
        slots = th.arange(self.num_slots, device=gate.device)
        written = (slots == victim) & (open_gate | (least <= 0))
        return _Table(
            item=th.where(written, new_index, table.item),
            occupied=table.occupied | written,
            usage=th.where(written, open_gate.to(usage.dtype), th.where(table.occupied, usage, 0.0)),
            age=th.where(written | ~table.occupied, 0.0, table.age + 1),
        )

    def forward_step(self, x: th.Tensor, state: State, mask: th.Tensor | None = None) -> tuple[th.Tensor, State, Logs]:
        if mask is not None:
            state = self.reset_states(state, mask)
        items, strength = state["items"], state["strength"]
        occupied = strength > 0
        bias = th.where(occupied, strength, 1.0).log().unsqueeze(1)
        keys, values = self.heads(self.key(items)), self.heads(self.value(items))
        context, weights, null = self.attend(self.queries(x), keys, values, occupied, bias)
        gate = self._gate(x)
        if tracing():
            age = th.where(occupied, state["age"] + 1, 0)
            record(read=weights, null=null, age=age, gate=gate.unsqueeze(-1), strength=strength, usage=state["usage"])
        index = th.arange(self.num_slots, device=x.device).expand_as(occupied)
        with th.no_grad():
            table = self._evict(_Table(index, occupied, state["usage"], state["age"]), weights, gate, self.num_slots)
        written = table.item == self.num_slots
        new_state = {
            "items": th.where(written.unsqueeze(-1), self.item(x).unsqueeze(1), items),
            "strength": th.where(written, gate.unsqueeze(1), strength),
            "usage": table.usage,
            "age": table.age,
        }
        return self.finish(context, null), new_state, self._logs(weights, null, occupied, gate)

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
        with th.no_grad():
            indices, occupied, table = self._run_table(scores, null_logits, gate, state, masks)
        chosen = indices.unsqueeze(1).expand(-1, self.num_heads, -1, -1)  # (B, H, T, S)
        visible = occupied.unsqueeze(1)
        weights, null = masked_softmax(scores.gather(3, chosen), visible, null_logits.transpose(1, 2))
        spread = th.zeros_like(scores).scatter(3, chosen, weights)
        context = (spread @ finite(values).transpose(1, 2)).transpose(1, 2)  # (B, T, H, d)
        null = null.transpose(1, 2)
        last_items = items.gather(1, table.item.unsqueeze(-1).expand(-1, -1, items.shape[-1]))
        last_strength = strength.gather(1, table.item)
        if masks is not None:  # an empty slot holds what it held at the start, unless a reset has cleared it
            held = table.occupied | (masks > 0.5).all(dim=1, keepdim=True)
            last_items = th.where(held.unsqueeze(-1), last_items, 0.0)
            last_strength = th.where(held, last_strength, 0.0)
        new_state = {
            "items": last_items,
            "strength": last_strength,
            "usage": table.usage,
            "age": table.age,
        }
        return self.finish(context, null), new_state, weights.transpose(1, 2), null, occupied, gate

    def _run_table(
        self, scores: th.Tensor, null_logits: th.Tensor, gate: th.Tensor, state: State, masks: th.Tensor | None
    ) -> tuple[th.Tensor, th.Tensor, _Table]:
        """
        Replay which item each slot holds, step by step, on small tensors and without gradient.

        :return: Item of each slot and whether it is occupied at each step's read, (B, T, S); the table at the end.
        """
        table = _Table(
            th.arange(self.num_slots, device=gate.device).expand_as(state["usage"]),
            state["strength"] > 0,
            state["usage"],
            state["age"],
        )
        indices, occupied = [], []
        by_step, null_by_step = scores.transpose(1, 2), null_logits  # (B, T, H, S + T), (B, T, H)
        for t in range(gate.shape[1]):
            if masks is not None:
                keep = masks[:, t, None] > 0.5
                table = _Table(
                    table.item,
                    table.occupied & keep,
                    th.where(keep, table.usage, 0.0),
                    th.where(keep, table.age, 0.0),
                )
            indices.append(table.item)
            occupied.append(table.occupied)
            logits = by_step[:, t].gather(2, table.item.unsqueeze(1).expand(-1, self.num_heads, -1))
            weights, _ = masked_softmax(logits, table.occupied.unsqueeze(1), null_by_step[:, t])
            table = self._evict(table, weights, gate[:, t], self.num_slots + t)
        return th.stack(indices, dim=1), th.stack(occupied, dim=1), table

    def _logs(self, weights: th.Tensor, null: th.Tensor, occupied: th.Tensor, gate: th.Tensor) -> Logs:
        logs = self.read_logs(weights, null, occupied.sum(-1).to(gate.dtype))
        if self.training:
            logs["write_strength"] = gate.detach().mean()
        if self.write_rate is not None:
            logs[AUX_LOSS] = (gate.mean() - self.write_rate) ** 2
        return logs
