"""The key-value memory: the last pairs of a key and a value, addressed by content."""

import torch as th
from torch import nn

from sb3_cyborg.kernels import primitives as kernels
from sb3_cyborg.memories.attention import AttentionMemory
from sb3_cyborg.memories.trace import tracing
from sb3_cyborg.ops.episodes import shift_steps, steps_since_start, zero_expired
from sb3_cyborg.ops.linear import Linear
from sb3_cyborg.ops.window_attention import window_attention
from sb3_cyborg.registry import MEMORIES
from sb3_cyborg.sequence_model import Logs, State


@MEMORIES.register("kv")
class KeyValueMemory(AttentionMemory):
    """
    Key-value memory: it stores the last ``num_slots`` pairs of a key and a value, addressed by content only.

    The value is a projection of the input, the key a projection of the input *and the previous input*. A query can therefore
    match the value's own step or the step before it (the shift of H3, Fu et al. 2022, https://arxiv.org/abs/2212.14052).

    State: ``keys`` and ``values`` (B, S, memory_dim), oldest first; ``previous`` (B, input_dim), the previous input;
    ``count`` (B,), steps since the start of the episode, at most S.

    :param input_dim: Features of the input, >= 1.
    :param memory_dim: Features of the read, >= 1.
    :param num_slots: Number of pairs S, >= 1.
    :param num_heads: Number of heads; divides ``memory_dim``.
    :raises ValueError: for sizes below 1, and for heads that do not divide ``memory_dim``.
    """

    counters = frozenset({"count"})

    def __init__(self, input_dim: int, memory_dim: int = 128, num_slots: int = 64, num_heads: int = 4) -> None:
        super().__init__(input_dim, memory_dim, num_slots, num_heads)
        self.key = Linear(2 * input_dim, memory_dim, bias=False)
        self.value = Linear(input_dim, memory_dim, bias=False)
        nn.init.orthogonal_(self.key.weight)
        nn.init.orthogonal_(self.value.weight)

    def get_initial_state(self, batch_size: int, device: th.device | str | None = None) -> State:
        return {
            "keys": self._zeros(batch_size, self.num_slots, self.output_dim, device=device),
            "values": self._zeros(batch_size, self.num_slots, self.output_dim, device=device),
            "previous": self._zeros(batch_size, self.input_dim, device=device),
            "count": self._zeros(batch_size, device=device),
        }

    def forward_step(self, x: th.Tensor, state: State, mask: th.Tensor | None = None) -> tuple[th.Tensor, State, Logs]:
        keys, values, previous, count = state["keys"], state["values"], state["previous"], state["count"]
        value = self.value(x)
        compiled = kernels.usable_without_gradient(x, keys, self.null_key)
        if mask is not None and compiled:  # entries that are not counted are not read, so they need not be zeros
            previous, count = th.where(mask.unsqueeze(-1), previous, 0.0), th.where(mask, count, 0.0)
        elif mask is not None:
            state = self.reset_states(state, mask)
            keys, values, previous, count = state["keys"], state["values"], state["previous"], state["count"]
        key = self.key(th.cat([x, previous], dim=-1))
        if compiled:
            new_keys, new_values = kernels.shift(keys, key, mask), kernels.shift(values, value, mask)
        else:
            new_keys = th.cat([keys[:, 1:], key.unsqueeze(1)], dim=1)
            new_values = th.cat([values[:, 1:], value.unsqueeze(1)], dim=1)
        context, weights, null = self._read_step(self.queries(x), self.heads(keys), self.heads(values), count)
        self.record_window(weights, null, count)
        new_state = {
            "keys": new_keys,
            "values": new_values,
            "previous": x,
            "count": (count + 1).clamp(max=self.num_slots),
        }
        return self.out(context.flatten(-2)), new_state, self.read_logs(weights, null, count)

    def _read_step(
        self, query: th.Tensor, keys: th.Tensor, values: th.Tensor, count: th.Tensor
    ) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """
        :param query: (B, H, d).
        :param keys: Oldest first, (B, S, H, d).
        :param values: (B, S, H, d).
        :param count: Number of entries in use, (B,).
        :return: Weighted values, the null entry's included (B, H, d), weights (B, H, S), weights of the null entry (B, H).
        """
        if kernels.usable_without_gradient(query, keys, self.null_key):
            return kernels.kv_step(query, keys, values, count, self.null_key, self.null_value)
        ages = th.arange(self.num_slots, 0, -1, device=query.device)
        context, weights, null = self.attend(query, keys, values, ages <= count.unsqueeze(-1))
        return context + null.unsqueeze(-1) * self.null_value, weights, null

    def forward_sequence(self, x: th.Tensor, state: State, masks: th.Tensor | None = None) -> tuple[th.Tensor, State, Logs]:
        steps = x.shape[1]
        reach = steps_since_start(state["count"], masks, steps).clamp(max=self.num_slots)
        key = self.key(th.cat([x, shift_steps(x, state["previous"], masks)], dim=-1))
        keys = th.cat([state["keys"], key], dim=1)
        values = th.cat([state["values"], self.value(x)], dim=1)
        read = window_attention(self.queries(x), self.heads(keys), self.heads(values), reach, self.null_key, self.null_value)
        if tracing():
            self.record_window(read.weights(), read.null(), reach)
        count = (reach[:, -1] + 1).clamp(max=self.num_slots)
        new_state = {
            "keys": zero_expired(keys[:, steps:], count, masks),
            "values": zero_expired(values[:, steps:], count, masks),
            "previous": x[:, -1],
            "count": count,
        }
        return self.out(read.context.flatten(-2)), new_state, self.window_logs(read, reach)
