"""The slot memory: a few vectors that are held until something else is written over them."""

import torch as th
from torch import nn

from sb3_cyborg.checks import check_divides, check_positive
from sb3_cyborg.memories.trace import record, tracing
from sb3_cyborg.ops.linear import Linear
from sb3_cyborg.ops.linear_scan import MAX_WRITE, slot_scan
from sb3_cyborg.ops.window_attention import steps_since_start
from sb3_cyborg.sequence_model import Logs, SequenceModel, State


class SlotMemory(SequenceModel):
    """
    ``num_slots`` vectors a head, each a convex combination of all that was written to it: it is bounded, and holds
    what it has for as long as the gate stays shut (gated slot attention, Zhang et al. 2024,
    https://arxiv.org/abs/2409.07146; the write is the one of gated linear attention).

    ``M <- (1 - a g) M + a g w`` with a soft address ``a`` over the slots, a gate ``g`` and an item ``w``, all of the
    input (no write erases all of a slot: ``a g`` is at most ``MAX_WRITE``); the read is ``sum_s p_s M_s`` with a soft
    address ``p``. Before its first write a slot holds a learned null vector; what is left of it is kept apart, as
    ``unwritten``.

    State: ``slots`` (B, H, S, d); ``unwritten`` (B, H, S), the null vector's share of each slot, 1 at the start.

    :param input_dim: Features of the input.
    :param memory_dim: Features of the read.
    :param num_slots: S, slots of each head.
    :param num_heads: Heads; divides ``memory_dim``.
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
        """:return: Read weights and write strengths (..., H, S), items (..., H, d) of inputs (..., input_dim)."""
        heads = (self.num_heads, -1)
        read = th.softmax(self.read_address(x).unflatten(-1, heads), dim=-1)
        address = th.softmax(self.write_address(x).unflatten(-1, heads), dim=-1)
        gate = th.sigmoid(self.write_gate(x)).unsqueeze(-1)
        return read, MAX_WRITE * gate * address, self.item(x).unflatten(-1, heads)

    def _finish(self, context: th.Tensor, read: th.Tensor, unwritten: th.Tensor) -> th.Tensor:
        null_weights = (read * unwritten).sum(-1, keepdim=True)
        result: th.Tensor = self.out((context + null_weights * self.null).flatten(-2))
        return result

    def forward_step(self, x: th.Tensor, state: State, mask: th.Tensor | None = None) -> tuple[th.Tensor, State, Logs]:
        if mask is not None:
            state = self.reset_states(state, mask)
        slots, unwritten = state["slots"], state["unwritten"]
        read, write, items = self._plan(x)
        context = (read.unsqueeze(2) @ slots).squeeze(2)
        self._record(read, write, unwritten)
        strength = write.unsqueeze(-1)
        new_state = {
            "slots": (1 - strength) * slots + strength * items.unsqueeze(2),
            "unwritten": (1 - write) * unwritten,
        }
        return self._finish(context, read, unwritten), new_state, self._logs(read, write, unwritten)

    def forward_sequence(self, x: th.Tensor, state: State, masks: th.Tensor | None = None) -> tuple[th.Tensor, State, Logs]:
        read, write, items = self._plan(x)
        context, slots = slot_scan(read, write, items, state["slots"], masks)
        unwritten, last = self._unwritten(write, state["unwritten"], masks)
        self._record(read, write, unwritten)
        logs = self._logs(read, write, unwritten)
        return self._finish(context, read, unwritten), {"slots": slots, "unwritten": last}, logs

    def _unwritten(self, write: th.Tensor, first: th.Tensor, masks: th.Tensor | None) -> tuple[th.Tensor, th.Tensor]:
        """:return: The null vector's share before each step, (B, T, H, S), and after the last one, (B, H, S)."""
        steps = write.shape[1]
        keeps = th.log1p(-th.nan_to_num(write).double()).cumsum(dim=1)  # fp64: the differences are small
        before = th.cat([th.zeros_like(keeps[:, :1]), keeps[:, :-1]], dim=1)
        # Where the episode began before the sequence, the sums run from its first step and go on from `first`.
        since = steps_since_start(first.new_full((len(first),), float(steps)), masks, steps).long()  # >= T: from before
        time = th.arange(steps, device=write.device)
        begun_here = (since < steps)[:, :, None, None]
        start = (time - since).clamp(min=0)[:, :, None, None].expand_as(before)
        fade = th.exp(before - th.where(begun_here, before.gather(1, start), 0.0)).to(write.dtype)
        unwritten = fade * th.where(begun_here, 1.0, first.unsqueeze(1))
        return unwritten, (1 - write[:, -1]) * unwritten[:, -1]

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

    def _logs(self, read: th.Tensor, write: th.Tensor, unwritten: th.Tensor) -> Logs:
        """``write_strength`` summed over slots, ``read_entropy`` in nats, ``usage`` (share not null), ``fill``."""
        if not self.training:
            return {}
        with th.no_grad():
            return {
                "write_strength": write.sum(-1).mean(),
                "read_entropy": th.special.entr(read).sum(-1).mean(),
                "usage": 1 - (read * unwritten).sum(-1).mean(),
                "fill": 1 - unwritten.mean(),
            }
