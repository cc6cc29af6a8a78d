"""The ring memory: the last inputs, addressed by content and by age."""

import math

import torch as th
from torch import nn

from sb3_cyborg.memories.attention import AttentionMemory
from sb3_cyborg.memories.trace import tracing
from sb3_cyborg.ops.linear import Linear, linear
from sb3_cyborg.ops.window_attention import steps_since_start, window_attention
from sb3_cyborg.sequence_model import Logs, State


class RingMemory(AttentionMemory):
    """
    Keeps the last ``num_slots`` inputs; a head can ask for what is *like* something and for what came *k steps ago*.

    Relative ages as in Shaw et al. 2018 (https://arxiv.org/abs/1803.02155), with one learned vector and one learned
    bias an age and head. The inputs are kept as they came, so that keys and values are learned for all of them.

    State: ``entries`` (B, S, input_dim), oldest first; ``count`` (B,), steps of the episode, at most S.

    :param input_dim: Features of the input.
    :param memory_dim: Features of the read.
    :param num_slots: S, the number of steps that are remembered.
    :param num_heads: Heads; divides ``memory_dim``.
    """

    counters = frozenset({"count"})

    def __init__(self, input_dim: int, memory_dim: int = 128, num_slots: int = 64, num_heads: int = 4) -> None:
        super().__init__(input_dim, memory_dim, num_slots, num_heads)
        self.key = Linear(input_dim, memory_dim, bias=False)
        self.value = Linear(input_dim, memory_dim, bias=False)
        nn.init.orthogonal_(self.key.weight)
        nn.init.orthogonal_(self.value.weight)
        # As large as content scores from the start: ages that look alike to a head take twice as long to tell apart.
        self.age_key = nn.Parameter(th.randn(num_heads, num_slots, self.head_dim))  # age 1 first
        self.age_bias = nn.Parameter(th.randn(num_heads, num_slots))

    def get_initial_state(self, batch_size: int, device: th.device | str | None = None) -> State:
        return {
            "entries": self._zeros(batch_size, self.num_slots, self.input_dim, device=device),
            "count": self._zeros(batch_size, device=device),
        }

    def age_logits(self, query: th.Tensor) -> th.Tensor:
        """:return: Scores by age, (..., H, S), age 1 first, of queries (..., H, d)."""
        by_head = query.flatten(0, -3).transpose(0, 1) @ self.age_key.transpose(-1, -2)  # (H, ..., S): one matmul a head
        scores: th.Tensor = by_head.transpose(0, 1).view(*query.shape[:-1], -1)
        return scores / math.sqrt(self.head_dim) + self.age_bias

    def forward_step(self, x: th.Tensor, state: State, mask: th.Tensor | None = None) -> tuple[th.Tensor, State, Logs]:
        if mask is not None:
            state = self.reset_states(state, mask)
        entries, count = state["entries"], state["count"]
        query = self.queries(x)
        ages = th.arange(self.num_slots, 0, -1, device=x.device)
        visible, by_age = ages <= count.unsqueeze(-1), self.age_logits(query).flip(-1)
        context, weights, null = self.attend_projected(query, entries, self.key, self.value, visible, by_age)
        self.record_window(weights, null, count)
        new_state = {
            "entries": th.cat([entries[:, 1:], x.unsqueeze(1)], dim=1),
            "count": (count + 1).clamp(max=self.num_slots),
        }
        return self.finish(context, null), new_state, self.read_logs(weights, null, count)

    def forward_sequence(self, x: th.Tensor, state: State, masks: th.Tensor | None = None) -> tuple[th.Tensor, State, Logs]:
        steps = x.shape[1]
        reach = steps_since_start(state["count"], masks, steps).clamp(max=self.num_slots)
        entries = th.cat([state["entries"], x], dim=1)
        projected = linear(entries, th.cat([self.key.weight, self.value.weight]), None)
        keys, values = projected.view(*entries.shape[:2], 2, self.num_heads, self.head_dim).unbind(2)
        ages = self.age_key, self.age_bias
        read = window_attention(self.queries(x), keys, values, reach, self.null_key, self.null_value, *ages)
        if tracing():
            self.record_window(read.weights(), read.null(), reach)
        count = (reach[:, -1] + 1).clamp(max=self.num_slots)
        new_state = {"entries": clear_dead(entries[:, steps:], count, masks), "count": count}
        return self.out(read.context.flatten(-2)), new_state, self.window_logs(read, reach)


def clear_dead(entries: th.Tensor, count: th.Tensor, masks: th.Tensor | None) -> th.Tensor:
    """
    :param entries: The newest S entries after a sequence, oldest first, (B, S, ...).
    :param count: Steps since the episode began, (B,).
    :param masks: Keep-masks of the sequence, (B, T), or ``None``.
    :return: The entries, zeros where a reset in the sequence has erased them.
    """
    if masks is None:
        return entries
    ages = th.arange(entries.shape[1], 0, -1, device=entries.device)
    was_reset = (masks <= 0.5).any(dim=1, keepdim=True)
    kept = (ages <= count.unsqueeze(-1)) | ~was_reset
    return th.where(kept.view(*kept.shape, *[1] * (entries.dim() - 2)), entries, 0.0)
