"""The slot memory: vectors that are written by gated convex combination."""

import torch as th
from torch import nn

from sb3_cyborg.checks import check_divides, check_positive
from sb3_cyborg.memories.trace import record, tracing
from sb3_cyborg.ops.linear import Linear, linear
from sb3_cyborg.ops.linear_scan import MAX_WRITE, slot_scan
from sb3_cyborg.registry import MEMORIES
from sb3_cyborg.sequence_model import Logs, SequenceModel, State, wants_diagnostics


@MEMORIES.register("slot")
class SlotMemory(SequenceModel):
    """
    Slot memory: ``num_slots`` vectors per head, written by gated convex combination.

    The write is ``M <- (1 - a g) M + a g w``, with a soft address ``a`` over the slots, a gate ``g`` and an item ``w``, all
    functions of the input; ``a g`` is at most ``MAX_WRITE``. The read is ``sum_s p_s M_s`` with a soft address ``p``. Slots
    are bounded, and constant while the gate is closed (gated slot attention, Zhang et al. 2024,
    https://arxiv.org/abs/2409.07146; the write is that of gated linear attention). Initially, a slot is a learned null vector,
    whose remaining share is stored as ``unwritten``.

    State: ``slots`` (B, H, S, d); ``unwritten`` (B, H, S), the share of the null vector in each slot, 1 at the start.

    :param input_dim: Features of the input, >= 1.
    :param memory_dim: Features of the read, >= 1.
    :param num_slots: Number of slots of each head S, >= 1.
    :param num_heads: Number of heads; divides ``memory_dim``.
    :raises ValueError: for sizes below 1, and for heads that do not divide ``memory_dim``.
    """

    def __init__(self, input_dim: int, memory_dim: int = 128, num_slots: int = 16, num_heads: int = 4) -> None:
        super().__init__()
        check_positive(input_dim=input_dim, memory_dim=memory_dim, num_slots=num_slots, num_heads=num_heads)
        check_divides("num_heads", num_heads, "memory_dim", memory_dim)
        self.input_dim, self.output_dim = input_dim, memory_dim
        self.num_slots, self.num_heads, self.head_dim = num_slots, num_heads, memory_dim // num_heads
        self.read_address = Linear(input_dim, num_heads * num_slots)
        self.write_address = Linear(input_dim, num_heads * num_slots)
        self.write_gate = nn.Linear(input_dim, num_heads)
        self.item = Linear(input_dim, memory_dim)
        self.null = nn.Parameter(th.zeros(num_heads, self.head_dim))
        self.out = Linear(memory_dim, memory_dim)
        for layer in (self.item, self.out):
            nn.init.orthogonal_(layer.weight)
            nn.init.zeros_(layer.bias)

    def get_initial_state(self, batch_size: int, device: th.device | str | None = None) -> State:
        shape = (batch_size, self.num_heads, self.num_slots)
        return {
            "slots": self._zeros(*shape, self.head_dim, device=device),
            "unwritten": self._zeros(*shape, device=device) + 1,
        }

    def _plan(self, x: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """:return: Read weights and write strengths (..., H, S), items (..., H, d) for inputs (..., input_dim)."""
        layers = (self.read_address, self.write_address, self.item, self.write_gate)
        if x.dim() == 2:
            read, address, item, gate = (layer(x) for layer in layers)
        else:  # for many steps, one product is faster than four; for one step, concatenating the weights costs more
            planned = linear(x, th.cat([layer.weight for layer in layers]), th.cat([layer.bias for layer in layers]))
            read, address, item, gate = planned.split([layer.out_features for layer in layers], dim=-1)
        heads = (self.num_heads, -1)
        read, address = (th.softmax(scores.unflatten(-1, heads), dim=-1) for scores in (read, address))
        return read, MAX_WRITE * th.sigmoid(gate).unsqueeze(-1) * address, item.unflatten(-1, heads)

    def _finish(self, context: th.Tensor, null_weights: th.Tensor) -> th.Tensor:
        """:return: The output (..., memory_dim) from the read of the slots (..., H, d) and the null share (..., H, 1)."""
        result: th.Tensor = self.out((context + null_weights * self.null).flatten(-2))
        return result

    def forward_step(self, x: th.Tensor, state: State, mask: th.Tensor | None = None) -> tuple[th.Tensor, State, Logs]:
        if mask is not None:
            state = self.reset_states(state, mask)
        slots, unwritten = state["slots"], state["unwritten"]
        read, write, items = self._plan(x)
        context = (read.unsqueeze(2) @ slots).squeeze(2)
        null_weights = (read * unwritten).sum(-1, keepdim=True)
        self._record(read, write, unwritten)
        strength = write.unsqueeze(-1)
        new_state = {
            "slots": (1 - strength) * slots + strength * items.unsqueeze(2),
            "unwritten": (1 - write) * unwritten,
        }
        logs = self._logs(read, write, null_weights, new_state["unwritten"])
        return self._finish(context, null_weights), new_state, logs

    def forward_sequence(self, x: th.Tensor, state: State, masks: th.Tensor | None = None) -> tuple[th.Tensor, State, Logs]:
        read, write, items = self._plan(x)
        # The written share, 1 - unwritten, is an additional feature of each slot, with items of 1.
        items = th.cat([items, th.ones_like(items[..., :1])], dim=-1)
        slots = th.cat([state["slots"], 1 - state["unwritten"].unsqueeze(-1)], dim=-1)
        context, slots = slot_scan(read, write, items, slots, masks)
        context, null_weights = context[..., :-1], 1 - context[..., -1:]
        last = 1 - slots[..., -1]
        if tracing():
            self._record(read, write, self._unwritten(write, state["unwritten"], masks))
        output = self._finish(context, null_weights)
        return output, {"slots": slots[..., :-1], "unwritten": last}, self._logs(read, write, null_weights, last)

    @staticmethod
    def _unwritten(write: th.Tensor, first: th.Tensor, masks: th.Tensor | None) -> th.Tensor:
        """:return: The null vector's share before each step, (B, T, H, S); ``first`` is that before the first, (B, H, S)."""
        shares = []
        for t in range(write.shape[1]):
            if masks is not None:
                first = th.where(masks[:, t, None, None], first, 1.0)
            shares.append(first)
            first = (1 - write[:, t]) * first
        return th.stack(shares, dim=1)

    @staticmethod
    def _record(read: th.Tensor, write: th.Tensor, unwritten: th.Tensor) -> None:
        if tracing():
            record(
                read=read * (1 - unwritten),
                null=(read * unwritten).sum(-1),
                write=write,
                gate=write.sum(-1),
                unwritten=unwritten,
            )

    def _logs(self, read: th.Tensor, write: th.Tensor, null_weights: th.Tensor, unwritten: th.Tensor) -> Logs:
        """
        :param read: Read weights, (..., H, S).
        :param write: Write strengths, (..., H, S).
        :param null_weights: The null vector's share of each read, any shape.
        :param unwritten: The null vector's share of each slot after the last step, (B, H, S).
        :return: ``write_strength`` summed over slots, ``read_entropy`` in nats, ``usage`` (share of the read that is not the
            null vector) and ``fill`` (written share of the slots), in [0, 1].
        """
        if not wants_diagnostics(self):
            return {}
        with th.no_grad():
            return {
                "write_strength": write.sum(-1).mean(),
                "read_entropy": th.special.entr(read).sum(-1).mean(),
                "usage": 1 - null_weights.mean(),
                "fill": 1 - unwritten.mean(),
            }
