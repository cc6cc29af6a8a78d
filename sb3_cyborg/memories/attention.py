"""What the memories that are read by multi-head attention share: heads, the null entry, diagnostics."""

import math

import torch as th
from torch import nn
from torch.nn import functional as F

from sb3_cyborg.checks import check_divides, check_positive
from sb3_cyborg.memories.trace import record, tracing
from sb3_cyborg.ops.linear import Linear
from sb3_cyborg.ops.masking import masked_softmax
from sb3_cyborg.ops.window_attention import Read
from sb3_cyborg.sequence_model import Logs, SequenceModel


class AttentionMemory(SequenceModel):
    """
    Base of memories that are read by multi-head attention (Vaswani et al. 2017, https://arxiv.org/abs/1706.03762).

    Each head also sees a learned null entry, so that "nothing of this" is an answer; an empty memory reads nothing else.

    :param input_dim: Features of the input.
    :param memory_dim: Features of what is read, over all heads.
    :param num_slots: Entries that are kept.
    :param num_heads: Heads; divides ``memory_dim``.
    """

    def __init__(self, input_dim: int, memory_dim: int, num_slots: int, num_heads: int) -> None:
        super().__init__()
        check_positive(input_dim=input_dim, memory_dim=memory_dim, num_slots=num_slots, num_heads=num_heads)
        check_divides("num_heads", num_heads, "memory_dim", memory_dim)
        self.input_dim, self.output_dim = input_dim, memory_dim
        self.num_slots, self.num_heads, self.head_dim = num_slots, num_heads, memory_dim // num_heads
        self.query = Linear(input_dim, memory_dim)
        self.null_key = nn.Parameter(th.zeros(num_heads, self.head_dim))
        self.null_value = nn.Parameter(th.zeros(num_heads, self.head_dim))
        self.out = Linear(memory_dim, memory_dim)
        for layer in (self.query, self.out):
            nn.init.orthogonal_(layer.weight)
            nn.init.zeros_(layer.bias)

    def heads(self, x: th.Tensor) -> th.Tensor:
        """:return: (..., memory_dim) as (..., H, d)."""
        return x.view(*x.shape[:-1], self.num_heads, self.head_dim)

    def queries(self, x: th.Tensor) -> th.Tensor:
        """
        Queries of fixed length (Henry et al. 2020, https://arxiv.org/abs/2010.04245): scores stay of a size whose rounding
        does not show, so that acting and training agree to the sixth digit, and learning is faster and steadier.

        :param x: (..., input_dim).
        :return: (..., H, d), of root mean square 1.
        """
        return F.rms_norm(self.heads(self.query(x)), (self.head_dim,), eps=1e-6)

    def null_logits(self, query: th.Tensor) -> th.Tensor:
        """:return: Score of the null entry, (..., H), of queries (..., H, d)."""
        return (query * self.null_key).sum(-1) / math.sqrt(self.head_dim)

    def finish(self, context: th.Tensor, null_weights: th.Tensor) -> th.Tensor:
        """:return: The read (..., memory_dim), of weighted values (..., H, d) and the null entry's weights (..., H)."""
        context = context + null_weights.unsqueeze(-1) * self.null_value
        read: th.Tensor = self.out(context.flatten(-2))
        return read

    def attend(
        self, query: th.Tensor, keys: th.Tensor, values: th.Tensor, visible: th.Tensor
    ) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """
        One step's read of all stored entries. Those that are not visible have to be finite, as what a reset leaves is.

        :param query: (B, H, d).
        :param keys: (B, S, H, d).
        :param values: (B, S, H, d).
        :param visible: Boolean, (B, S).
        :return: Weighted values (B, H, d), weights (B, H, S), weight of the null entry (B, H).
        """
        logits = (keys * query.unsqueeze(1)).sum(-1).transpose(1, 2) / math.sqrt(self.head_dim)  # a matmul this thin is slower
        weights, null = masked_softmax(logits, visible.unsqueeze(1), self.null_logits(query))
        context = (weights.unsqueeze(2) @ values.transpose(1, 2)).squeeze(2)
        return context, weights, null

    def attend_projected(
        self, query: th.Tensor, entries: th.Tensor, key: nn.Linear, value: nn.Linear, visible: th.Tensor, bias: th.Tensor
    ) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """
        :func:`attend` to keys and values that two layers without bias make of the entries, without making them:
        ``(W_k e) . q = e . (W_k' q)``, and projecting one query is S times cheaper than projecting S entries.

        :param query: (B, H, d).
        :param entries: (B, S, E).
        :param key: From E to ``memory_dim``.
        :param value: Likewise.
        :param visible: Boolean, (B, S).
        :param bias: Added to the scores, broadcastable to (B, H, S).
        :return: As :func:`attend`.
        """
        key_weight, value_weight = (layer.weight.unflatten(0, (self.num_heads, self.head_dim)) for layer in (key, value))
        wanted = (query.transpose(0, 1) @ key_weight).transpose(0, 1)  # (B, H, E)
        logits = wanted @ entries.transpose(1, 2) / math.sqrt(self.head_dim) + bias
        weights, null = masked_softmax(logits, visible.unsqueeze(1), self.null_logits(query))
        context = ((weights @ entries).transpose(0, 1) @ value_weight.mT).transpose(0, 1)
        return context, weights, null

    def record_window(self, weights: th.Tensor, null_weights: th.Tensor, reach: th.Tensor) -> None:
        """
        Show the read of a memory that keeps the last steps in order of time.

        :param weights: (..., H, F + S): of the first F steps of the episode, then of the last S, oldest first.
        :param null_weights: (..., H).
        :param reach: Steps of the episode, (...,).
        """
        if tracing():
            ages = th.arange(self.num_slots, 0, -1, device=reach.device)
            place = th.arange(weights.shape[-1] - self.num_slots, device=reach.device)
            since = reach.unsqueeze(-1)
            age = th.where(ages <= since, ages, 0)
            first = th.where(since - place > self.num_slots, since - place, 0)
            record(read=weights, null=null_weights, age=th.cat([first, age], dim=-1))

    def read_logs(self, weights: th.Tensor, null_weights: th.Tensor, fill: th.Tensor) -> Logs:
        """
        Diagnostics of a read, in training mode only: while acting nobody looks at them.

        :param weights: (..., S).
        :param null_weights: (...,).
        :param fill: Entries in use, any shape, in [0, num_slots].
        :return: ``read_entropy`` in nats, ``usage`` (weight on anything but the null entry), ``fill`` in [0, 1].
        """
        if not self.training:
            return {}
        with th.no_grad():
            entropy = th.special.entr(weights).sum(-1) + th.special.entr(null_weights)
            return self._logs_of(entropy.mean(), null_weights, fill)

    def window_logs(self, read: Read, reach: th.Tensor) -> Logs:
        """:return: :func:`read_logs` of what a sequence read; ``reach`` is the number of entries in use, (B, T)."""
        if not self.training:
            return {}
        with th.no_grad():
            return self._logs_of(read.entropy(), read.null(), reach)

    def _logs_of(self, entropy: th.Tensor, null_weights: th.Tensor, fill: th.Tensor) -> Logs:
        return {"read_entropy": entropy, "usage": 1 - null_weights.mean(), "fill": fill.mean() / self.num_slots}
