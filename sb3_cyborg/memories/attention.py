"""Base class of memories that are read by multi-head attention."""

import functools
import math

import torch as th
from torch import nn
from torch.nn import functional as F

from sb3_cyborg.checks import check_divides, check_positive
from sb3_cyborg.kernels import primitives as kernels
from sb3_cyborg.memories.trace import record, tracing
from sb3_cyborg.ops.linear import Linear
from sb3_cyborg.ops.masking import masked_softmax
from sb3_cyborg.ops.window_attention import Read
from sb3_cyborg.sequence_model import Logs, SequenceModel, wants_diagnostics

QUERY_EPS = 1e-6
"""Added to the mean square of a query before it is normalized."""


class AttentionMemory(SequenceModel):
    """
    Base class of memories that are read by multi-head attention (Vaswani et al. 2017, https://arxiv.org/abs/1706.03762).

    Each head also attends to a learned null entry, so that it can ignore all stored entries. An empty memory reads only the
    null entry.

    :param input_dim: Features of the input, >= 1.
    :param memory_dim: Features of the read, over all heads, >= 1.
    :param num_slots: Number of stored entries, >= 1.
    :param num_heads: Number of heads; divides ``memory_dim``.
    :raises ValueError: for sizes below 1, and for heads that do not divide ``memory_dim``.
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
        pack = functools.partial(kernels.pack_heads, num_heads=num_heads)
        self._packed_key = kernels.Packed(functools.partial(pack, transposed=True))
        self._packed_value = kernels.Packed(functools.partial(pack, transposed=False))
        for layer in (self.query, self.out):
            nn.init.orthogonal_(layer.weight)
            nn.init.zeros_(layer.bias)

    def heads(self, x: th.Tensor) -> th.Tensor:
        """
        :param x: (..., memory_dim).
        :return: The features of each head, (..., H, d).
        """
        return x.view(*x.shape[:-1], self.num_heads, self.head_dim)

    def queries(self, x: th.Tensor) -> th.Tensor:
        """
        Normalized queries (Henry et al. 2020, https://arxiv.org/abs/2010.04245).

        Normalization bounds the scores. Their rounding errors stay small, so that acting and training agree to the sixth
        digit, and training is faster and more stable.

        :param x: Inputs, (..., input_dim).
        :return: Queries with root mean square 1, (..., H, d).
        """
        query = self.heads(self.query(x))
        if kernels.usable_without_gradient(query):
            return kernels.rms_norm(query, QUERY_EPS)
        return F.rms_norm(query, (self.head_dim,), eps=QUERY_EPS)

    def null_logits(self, query: th.Tensor) -> th.Tensor:
        """
        :param query: (..., H, d).
        :return: Score of the null entry, (..., H).
        """
        return (query * self.null_key).sum(-1) / math.sqrt(self.head_dim)

    def finish(self, context: th.Tensor, null_weights: th.Tensor) -> th.Tensor:
        """
        :param context: Weighted sum of the values, (..., H, d).
        :param null_weights: Attention weight of the null entry, (..., H).
        :return: The read, (..., memory_dim).
        """
        context = context + null_weights.unsqueeze(-1) * self.null_value
        read: th.Tensor = self.out(context.flatten(-2))
        return read

    def attend(
        self, query: th.Tensor, keys: th.Tensor, values: th.Tensor, visible: th.Tensor
    ) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """
        Attention of one step to the stored entries.

        Invisible entries must be finite; the zeros after a reset are.

        :param query: (B, H, d).
        :param keys: (B, S, H, d).
        :param values: (B, S, H, d).
        :param visible: Bool, (B, S).
        :return: Weighted sum of the values (B, H, d), weights (B, H, S), weight of the null entry (B, H).
        """
        logits = (keys * query.unsqueeze(1)).sum(-1).transpose(1, 2) / math.sqrt(self.head_dim)  # a matmul this thin is slower
        weights, null = masked_softmax(logits, visible.unsqueeze(1), self.null_logits(query))
        context = (weights.unsqueeze(2) @ values.transpose(1, 2)).squeeze(2)
        return context, weights, null

    def attend_projected(
        self, query: th.Tensor, entries: th.Tensor, key: nn.Linear, value: nn.Linear, visible: th.Tensor, bias: th.Tensor
    ) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """
        :meth:`attend` with keys and values that are linear projections of the entries.

        ``(W_k e) . q = e . (W_k' q)``: projecting one query is S times cheaper than projecting S entries.

        :param query: (B, H, d).
        :param entries: (B, S, E).
        :param key: Projection to keys, from E to ``memory_dim``, without bias.
        :param value: Projection to values, from E to ``memory_dim``, without bias.
        :param visible: Bool, (B, S).
        :param bias: Added to the scores, broadcastable to (B, H, S).
        :return: The results of :meth:`attend`.
        """
        if kernels.usable_without_gradient(query, entries, key.weight):
            bias = bias.expand(len(query), self.num_heads, entries.shape[1])
            packed = self._packed_key(key.weight), self._packed_value(value.weight)
            return kernels.attend_projected(query, None, entries, *packed, visible, bias, self.null_logits(query))
        key_weight, value_weight = (layer.weight.unflatten(0, (self.num_heads, self.head_dim)) for layer in (key, value))
        projected = (query.transpose(0, 1) @ key_weight).transpose(0, 1)  # (B, H, E)
        logits = projected @ entries.transpose(1, 2) / math.sqrt(self.head_dim) + bias
        weights, null = masked_softmax(logits, visible.unsqueeze(1), self.null_logits(query))
        context = ((weights @ entries).transpose(0, 1) @ value_weight.mT).transpose(0, 1)
        return context, weights, null

    def record_window(self, weights: th.Tensor, null_weights: th.Tensor, reach: th.Tensor) -> None:
        """
        Record the read of a memory whose entries are ordered by time, see :func:`~sb3_cyborg.memories.trace.record`.

        :param weights: Weights of the first F steps of the episode, then of the last S, oldest first, (..., H, F + S).
        :param null_weights: (..., H).
        :param reach: Steps since the start of the episode, (...,).
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
        Diagnostics of a read; empty in evaluation mode, where they are not logged.

        :param weights: Attention weights, (..., S).
        :param null_weights: Weights of the null entry, (...,).
        :param fill: Number of entries in use, any shape, in [0, num_slots].
        :return: ``read_entropy`` in nats, ``usage`` (total weight of all entries but the null entry) and ``fill``, in [0, 1].
        """
        if not wants_diagnostics(self):
            return {}
        with th.no_grad():
            entropy = th.special.entr(weights).sum(-1) + th.special.entr(null_weights)
            return self._logs_of(entropy.mean(), null_weights, fill)

    def window_logs(self, read: Read, reach: th.Tensor) -> Logs:
        """
        Diagnostics of the read of a sequence, see :meth:`read_logs`.

        :param read: Result of the attention.
        :param reach: Number of entries in use, (B, T), in [0, num_slots].
        :return: The diagnostics.
        """
        if not wants_diagnostics(self):
            return {}
        with th.no_grad():
            return self._logs_of(read.entropy(), read.null(), reach)

    def _logs_of(self, entropy: th.Tensor, null_weights: th.Tensor, fill: th.Tensor) -> Logs:
        return {"read_entropy": entropy, "usage": 1 - null_weights.mean(), "fill": fill.mean() / self.num_slots}
