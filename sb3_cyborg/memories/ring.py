"""The ring memory: the last inputs, addressed by content and by relative age."""

import math

import torch as th
from torch import nn

from sb3_cyborg.checks import check_whole
from sb3_cyborg.kernels import primitives as kernels
from sb3_cyborg.memories.attention import AttentionMemory
from sb3_cyborg.memories.trace import tracing
from sb3_cyborg.ops.episodes import steps_since_start, zero_expired
from sb3_cyborg.ops.linear import Linear, linear
from sb3_cyborg.ops.window_attention import ExtraEntries, block_starts, window_attention
from sb3_cyborg.registry import MEMORIES
from sb3_cyborg.sequence_model import Logs, State


@MEMORIES.register("ring")
class RingMemory(AttentionMemory):
    """
    Ring memory: it stores the last ``num_slots`` inputs, addressed by content and by relative age (*k steps ago*).

    Relative ages follow Shaw et al. 2018 (https://arxiv.org/abs/1803.02155), with one learned key and one learned bias for
    each age and head. The inputs are stored without projection, so that gradients train the keys and values of all of them.

    The first ``num_first`` inputs of an episode are kept after they have left the window, addressed by content and by their
    position in the episode. (StreamingLLM also keeps the first tokens: Xiao et al. 2023, https://arxiv.org/abs/2309.17453.)

    State: ``entries`` (B, S, input_dim), oldest first; ``first`` (B, num_first, input_dim); ``count`` (B,), steps since the
    start of the episode.

    :param input_dim: Features of the input, >= 1.
    :param memory_dim: Features of the read, >= 1.
    :param num_slots: Window size S: the number of last inputs, >= 1.
    :param num_heads: Number of heads; divides ``memory_dim``.
    :param num_first: Number of first inputs of the episode that are kept in addition, >= 0.
    :raises ValueError: for sizes out of these ranges, and for heads that do not divide ``memory_dim``.
    """

    counters = frozenset({"count"})

    def __init__(
        self, input_dim: int, memory_dim: int = 128, num_slots: int = 64, num_heads: int = 4, num_first: int = 4
    ) -> None:
        super().__init__(input_dim, memory_dim, num_slots, num_heads)
        check_whole(0, num_first=num_first)
        self.num_first = num_first
        self.key = Linear(input_dim, memory_dim, bias=False)
        self.value = Linear(input_dim, memory_dim, bias=False)
        nn.init.orthogonal_(self.key.weight)
        nn.init.orthogonal_(self.value.weight)
        # Unit variance gives age scores the size of content scores. With smaller ones, learning an age takes twice as long.
        self.age_key = nn.Parameter(th.randn(num_heads, num_slots, self.head_dim))  # age 1 first
        self.age_bias = nn.Parameter(_partition_bias(num_heads, num_slots))
        self.first_key = nn.Parameter(th.randn(num_first, num_heads, self.head_dim))  # by position in the episode
        self.first_bias = nn.Parameter(_partition_bias(num_heads, num_first))
        self._packed_age_key = kernels.Packed(kernels.pack_ages)
        self._packed_age_bias = kernels.Packed(kernels.oldest_first)

    def get_initial_state(self, batch_size: int, device: th.device | str | None = None) -> State:
        return {
            "entries": self._zeros(batch_size, self.num_slots, self.input_dim, device=device),
            "first": self._zeros(batch_size, self.num_first, self.input_dim, device=device),
            "count": self._zeros(batch_size, device=device),
        }

    def age_logits(self, query: th.Tensor) -> th.Tensor:
        """
        :param query: (..., H, d).
        :return: Scores by age, age 1 first, (..., H, S).
        """
        by_head = query.flatten(0, -3).transpose(0, 1) @ self.age_key.transpose(-1, -2)  # (H, ..., S), one matmul per head
        scores: th.Tensor = by_head.transpose(0, 1).view(*query.shape[:-1], -1)
        return scores / math.sqrt(self.head_dim) + self.age_bias

    def forward_step(self, x: th.Tensor, state: State, mask: th.Tensor | None = None) -> tuple[th.Tensor, State, Logs]:
        entries, first, count = state["entries"], state["first"], state["count"]
        if kernels.usable_without_gradient(x, entries, self.key.weight):
            if mask is not None:  # entries that are not counted are not read, so they need not be zeros
                first, count = th.where(mask[:, None, None], first, 0.0), th.where(mask, count, 0.0)
            new_entries = kernels.shift(entries, x, mask)
        else:
            if mask is not None:
                state = self.reset_states(state, mask)
                entries, first, count = state["entries"], state["first"], state["count"]
            new_entries = th.cat([entries[:, 1:], x.unsqueeze(1)], dim=1)
        context, weights, null = self._read_step(self.queries(x), entries, first, count)
        self.record_window(weights, null, count)
        place = th.arange(self.num_first, device=x.device)
        new_state = {
            "entries": new_entries,
            "first": th.where((place == count.unsqueeze(-1)).unsqueeze(-1), x.unsqueeze(1), first),
            "count": count + 1,
        }
        logs = self.read_logs(weights, null, count.clamp(max=self.num_slots))
        return self.out(context.flatten(-2)), new_state, logs

    def _read_step(
        self, query: th.Tensor, entries: th.Tensor, first: th.Tensor, count: th.Tensor
    ) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """
        :param query: (B, H, d).
        :param entries: The last inputs, oldest first, (B, S, D).
        :param first: The first inputs of the episode, (B, F, D).
        :param count: Steps since the start of the episode, (B,).
        :return: Weighted values, the null entry's included (B, H, d), weights of first inputs and window (B, H, F + S),
            weights of the null entry (B, H).
        """
        if kernels.usable_without_gradient(query, entries, self.key.weight):
            ages = self._packed_age_key(self.age_key), self._packed_age_bias(self.age_bias)
            firsts = self.first_key, self.first_bias
            null_entry = self.null_key, self.null_value
            weights = self._packed_key(self.key.weight), self._packed_value(self.value.weight)
            return kernels.ring_step(query, first, entries, count, *weights, *ages, *firsts, *null_entry)
        place = th.arange(self.num_first, device=query.device)
        ages_of = th.arange(self.num_slots, 0, -1, device=query.device)
        since = count.unsqueeze(-1)
        visible, scores, seen = ages_of <= since, self.age_logits(query).flip(-1), entries
        if self.num_first:
            by_place = (query.unsqueeze(1) * self.first_key).sum(-1).transpose(1, 2)
            by_place = by_place / math.sqrt(self.head_dim) + self.first_bias
            visible, scores = th.cat([since - place > self.num_slots, visible], -1), th.cat([by_place, scores], -1)
            seen = th.cat([first, entries], dim=1)
        context, attention, null = self.attend_projected(query, seen, self.key, self.value, visible, scores)
        return context + null.unsqueeze(-1) * self.null_value, attention, null

    def forward_sequence(self, x: th.Tensor, state: State, masks: th.Tensor | None = None) -> tuple[th.Tensor, State, Logs]:
        steps = x.shape[1]
        since = steps_since_start(state["count"], masks, steps)
        entries = th.cat([state["entries"], x], dim=1)
        blocks = th.tensor(block_starts(steps, self.num_slots), device=x.device)
        firsts = self._firsts(x, state["first"], since[:, blocks], blocks)  # (B, n, F, D)
        weight = th.cat([self.key.weight, self.value.weight])
        stored = linear(state["entries"], weight, None)  # in a product of their own: in training they need no gradient
        projected = linear(th.cat([x, firsts.flatten(1, 2)], dim=1), weight, None)
        halves = 2, self.num_heads, self.head_dim
        keys, values = th.cat([stored, projected[:, :steps]], dim=1).unflatten(-1, halves).unbind(2)
        extra = None
        if self.num_first:
            first_keys, first_values = projected[:, steps:].unflatten(1, firsts.shape[1:3]).unflatten(-1, halves).unbind(3)
            extra = ExtraEntries(first_keys + self.first_key, first_values, self.first_bias, self._visible_firsts(since))
        ages = self.age_key, self.age_bias
        read = window_attention(self.queries(x), keys, values, since, self.null_key, self.null_value, *ages, extra)
        if tracing():
            self.record_window(th.cat([read.extra(), read.weights()], dim=-1), read.null(), since)
        count = since[:, -1] + 1
        new_state = {
            "entries": zero_expired(entries[:, steps:], count, masks),
            "first": self._last_firsts(x, state["first"], count, masks),
            "count": count,
        }
        return self.out(read.context.flatten(-2)), new_state, self.window_logs(read, since.clamp(max=self.num_slots))

    def _firsts(self, x: th.Tensor, stored: th.Tensor, since: th.Tensor, at: th.Tensor) -> th.Tensor:
        """
        Gather the first inputs of the episodes of some steps.

        :param x: Inputs of the sequence, (B, T, D).
        :param stored: First inputs of the episode at the start of the sequence, (B, F, D).
        :param since: Steps since the start of the episode at each of the n steps, (B, n).
        :param at: Indices of the n steps, in [0, T], (n,).
        :return: First inputs of the episode of each step, (B, n, F, D); arbitrary inputs where the episode has fewer before
            the step.
        """
        place = th.arange(self.num_first, device=x.device)
        position = (at - since.long()).unsqueeze(-1) + place  # index in the sequence, (B, n, F); negative for stored ones
        index = th.where(position < 0, place, position.clamp(max=x.shape[1] - 1) + self.num_first)
        rows = th.arange(len(x), device=x.device)[:, None, None]
        return th.cat([stored, x], dim=1)[rows, index]

    def _visible_firsts(self, since: th.Tensor) -> th.Tensor:
        """
        :param since: Steps since the start of the episode at each step, (B, T).
        :return: Whether a step may read each first input of the episode at the start of its block, bool, (B, T, F): those of
            its own episode that have left the window. An episode that starts within a block does not exceed the window in it.
        """
        steps = since.shape[1]
        time, place = th.arange(steps, device=since.device), th.arange(self.num_first, device=since.device)
        same = since >= time % min(steps, self.num_slots)
        return same.unsqueeze(-1) & (since.unsqueeze(-1) - place > self.num_slots)

    def _last_firsts(self, x: th.Tensor, stored: th.Tensor, count: th.Tensor, masks: th.Tensor | None) -> th.Tensor:
        """:return: First inputs (B, F, D) of the episode at the end of the sequence, which has ``count`` (B,) steps."""
        end = th.tensor([x.shape[1]], device=x.device)
        firsts = self._firsts(x, stored, count.unsqueeze(1), end)[:, 0]
        missing = (th.arange(self.num_first, device=x.device) >= count.unsqueeze(-1)).unsqueeze(-1)
        # Missing inputs keep the stored values, or are zeros if the episode started in the sequence.
        before = stored if masks is None else th.where(masks.all(1)[:, None, None], stored, 0.0)
        return th.where(missing, before, firsts)


def _partition_bias(num_heads: int, size: int) -> th.Tensor:
    """
    :return: Initial biases (H, size) that assign each age, or position, to one head, evenly. With random biases, some ages
        would begin with almost no weight in any head, and would be learned late or never.
    """
    return 3.0 * (th.arange(size) % num_heads == th.arange(num_heads).unsqueeze(1))
