"""
The contract of every model with a state: ``State`` in, ``State`` out.

A :class:`SequenceModel` can be stepped (acting) or run over a whole sequence (training); both give the same outputs,
final states and gradients. :func:`sb3_cyborg.testing.verify_contract` verifies it.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch as th
from torch import nn

State = dict[str, th.Tensor]
"""A flat dictionary; every leaf is ``(B, ...)``, so that to reset, slice or store a state is one line."""

Logs = dict[str, th.Tensor]
"""Detached 0-d tensors, but for ``aux_loss``, which stays attached: the algorithm adds it to its loss."""

AUX_LOSS = "aux_loss"

_select_only: ContextVar[bool] = ContextVar("select_only", default=False)


def may_branch(device: th.device) -> bool:
    """
    Say whether code may branch on the values of tensors, which on a CPU saves work.

    On another device the branch would wait for the device, and a graph that is exported or compiled holds one branch alone:
    there, resets select rows with ``torch.where`` and nothing is looked at.

    :param device: Where the tensors are.
    :return: Whether a branch on their values is allowed.
    """
    return device.type == "cpu" and not th.compiler.is_compiling() and not _select_only.get()


@contextmanager
def select_only() -> Iterator[None]:
    """:return: A context in which :func:`may_branch` is false on every device, to test or time that form on a CPU."""
    token = _select_only.set(True)
    try:
        yield
    finally:
        _select_only.reset(token)


def keep_mask(episode_starts: th.Tensor) -> th.Tensor:
    """
    Convert episode starts to the mask that sequence models take; no other place converts.

    :param episode_starts: Non-zero, or true, where an episode starts, any shape.
    :return: The keep-mask of the same shape, bool: true carries the state on, false resets it.
    """
    return episode_starts == 0


def select_state(mask: th.Tensor, kept: State, other: State) -> State:
    """
    Choose rows of two states. It selects and never multiplies, so a NaN of the row that is not chosen is gone.

    :param mask: Bool, (B,); true takes the row of ``kept``.
    :param kept: A state.
    :param other: Another one of the same structure; its leaves may have one row, which then stands for all.
    :return: The chosen rows.
    """
    return {
        name: th.where(mask.view(-1, *[1] * (leaf.dim() - 1)), leaf, other[name].to(leaf.dtype)) for name, leaf in kept.items()
    }


def index_state(state: State, rows: th.Tensor) -> State:
    """:return: The given rows of a state; ``rows`` is a (R,) int64 tensor."""
    return {name: leaf[rows] for name, leaf in state.items()}


def full_precision(device: th.device) -> AbstractContextManager[Any]:
    """:return: A context in which nothing is autocast on ``device``: what states go through keeps their precision."""
    if th.is_autocast_enabled(device.type):
        return th.autocast(device.type, enabled=False)
    return nullcontext()  # at each step of acting, an autocast that changes nothing would still take as long as a small layer


def average_logs(logs: Sequence[Logs]) -> Logs:
    """:return: The mean of each entry over the dictionaries, e.g. over the steps of a sequence."""
    return {name: th.stack([entry[name] for entry in logs]).mean() for name in logs[0]} if logs else {}


class SequenceModel(nn.Module, ABC):
    """
    A module with an explicit state.

    A state is passed and returned; it is never kept on the module, changed in place, or ``None``.
    ``mask`` is the keep-mask, a bool: true carries the state on, false means that an episode starts here, and the row
    becomes the initial state *before* ``x`` is read.
    """

    input_dim: int
    output_dim: int
    counters: frozenset[str] = frozenset()
    """Names of state leaves that count (ages, fills): piecewise constant, so no gradient flows through them."""

    @abstractmethod
    def get_initial_state(self, batch_size: int, device: th.device | str | None = None) -> State:
        """
        :param batch_size: Number of rows B.
        :param device: Where to create it; by default, where the parameters are.
        :return: The state that an episode starts with, every leaf ``(B, ...)``.
        """

    @abstractmethod
    def forward_step(self, x: th.Tensor, state: State, mask: th.Tensor | None = None) -> tuple[th.Tensor, State, Logs]:
        """
        Read one step.

        :param x: Input, (B, input_dim).
        :param state: The state before the step.
        :param mask: Keep-mask, bool, (B,); ``None`` keeps every row.
        :return: Output (B, output_dim), the state after the step, diagnostics.
        """

    def forward_sequence(self, x: th.Tensor, state: State, masks: th.Tensor | None = None) -> tuple[th.Tensor, State, Logs]:
        """
        Read a sequence. This loop is the reference; a parallel override must equal it in outputs, final state and gradients.

        :param x: Inputs, (B, T, input_dim) with T >= 1.
        :param state: The state before the first step.
        :param masks: Keep-masks, bool, (B, T); ``None`` keeps every row.
        :return: Outputs (B, T, output_dim), the state after the last step, diagnostics averaged over the steps.
        """
        outputs, logs = [], []
        for t in range(x.shape[1]):
            output, state, step_logs = self.forward_step(x[:, t], state, None if masks is None else masks[:, t])
            outputs.append(output)
            logs.append(step_logs)
        return th.stack(outputs, dim=1), state, average_logs(logs)

    def reset_states(self, state: State, mask: th.Tensor) -> State:
        """
        :param state: A state.
        :param mask: Keep-mask, bool, (B,).
        :return: The state with the rows whose mask is false replaced by the initial state.
        """
        if not state:
            return state
        mask = mask.bool()
        if not may_branch(mask.device):
            return select_state(mask, state, self.get_initial_state(1, mask.device))
        rows = (~mask).nonzero().squeeze(1)
        if len(rows) == 0:
            return state
        initial = self.get_initial_state(len(rows), mask.device)  # to copy and write a few rows is faster than to select
        return {name: leaf.index_copy(0, rows, initial[name].to(leaf.dtype)) for name, leaf in state.items()}

    def detach_states(self, state: State) -> State:
        """:return: The state, cut from the graph that made it."""
        return {name: leaf.detach() for name, leaf in state.items()}

    @property
    def dtype(self) -> th.dtype:
        """Precision of the parameters, and so of the state."""
        return next(self.parameters()).dtype

    def _zeros(self, *shape: int, device: th.device | str | None = None) -> th.Tensor:
        """A state leaf of zeros in the precision of the parameters."""
        reference = next(self.parameters())
        return reference.new_zeros(shape, device=reference.device if device is None else device)


class Composite(SequenceModel):
    """
    Several named sequence models as one; their states and logs share a flat dictionary under ``<name>.<key>``.

    :param parts: The models, by name.
    """

    def __init__(self, **parts: SequenceModel) -> None:
        super().__init__()
        self.parts: dict[str, SequenceModel] = parts
        for name, part in parts.items():
            self.add_module(name, part)

    def get_initial_state(self, batch_size: int, device: th.device | str | None = None) -> State:
        return {
            f"{name}.{key}": leaf
            for name, part in self.parts.items()
            for key, leaf in part.get_initial_state(batch_size, device).items()
        }

    @abstractmethod
    def combine(self, x: th.Tensor, outputs: list[th.Tensor]) -> th.Tensor:
        """:return: The output of the whole from its input and the outputs of its parts."""

    def next_input(self, x: th.Tensor, output: th.Tensor) -> th.Tensor:
        """:return: What the next part reads: the output of the one before it, unless a subclass says otherwise."""
        return output

    def _run(self, method: str, x: th.Tensor, state: State, mask: th.Tensor | None) -> tuple[th.Tensor, State, Logs]:
        outputs: list[th.Tensor] = []
        new_state: State = {}
        logs: Logs = {}
        for name, part in self.parts.items():
            prefix = f"{name}."
            part_input = self.next_input(x, outputs[-1]) if outputs else x
            part_state = {key[len(prefix) :]: leaf for key, leaf in state.items() if key.startswith(prefix)}
            output, part_state, part_logs = getattr(part, method)(part_input, part_state, mask)
            new_state |= {prefix + key: leaf for key, leaf in part_state.items()}
            logs |= {prefix + key: value for key, value in part_logs.items() if key != AUX_LOSS}
            if AUX_LOSS in part_logs:
                logs[AUX_LOSS] = logs.get(AUX_LOSS, 0.0) + part_logs[AUX_LOSS]
            outputs.append(output)
        return self.combine(x, outputs), new_state, logs

    def forward_step(self, x: th.Tensor, state: State, mask: th.Tensor | None = None) -> tuple[th.Tensor, State, Logs]:
        return self._run("forward_step", x, state, mask)

    def forward_sequence(self, x: th.Tensor, state: State, masks: th.Tensor | None = None) -> tuple[th.Tensor, State, Logs]:
        return self._run("forward_sequence", x, state, masks)


class Serial(Composite):
    """
    One after the other: the output is the last part's.

    :param residual: Add the input of the whole to the output; input and output must have one width.
    :param parts: The models, by name, in order.
    """

    def __init__(self, *, residual: bool = False, **parts: SequenceModel) -> None:
        super().__init__(**parts)
        models = list(parts.values())
        self.input_dim, self.output_dim = models[0].input_dim, models[-1].output_dim
        assert not residual or self.input_dim == self.output_dim, (self.input_dim, self.output_dim)
        self.residual = residual

    def combine(self, x: th.Tensor, outputs: list[th.Tensor]) -> th.Tensor:
        return x + outputs[-1] if self.residual else outputs[-1]


class Parallel(Composite):
    """
    All read the same input; their outputs are concatenated.

    :param parts: The models, by name; all of one ``input_dim``.
    """

    def __init__(self, **parts: SequenceModel) -> None:
        super().__init__(**parts)
        self.input_dim = next(iter(parts.values())).input_dim
        self.output_dim = sum(part.output_dim for part in parts.values())

    def combine(self, x: th.Tensor, outputs: list[th.Tensor]) -> th.Tensor:
        return th.cat(outputs, dim=-1)

    def next_input(self, x: th.Tensor, output: th.Tensor) -> th.Tensor:
        return x


class Stack(Composite):
    """
    An encoder with a memory behind it: the memory reads ``[latent, input]``, the output is ``[latent, read, input]``.

    What a memory keeps of the input itself stays what it is while the encoder learns. Latents of before the sequence have no
    gradient that would keep the encoder from changing what they are about.

    :param encoder: Reads the input.
    :param memory: Reads the encoder's output and the input.
    """

    def __init__(self, encoder: SequenceModel, memory: SequenceModel) -> None:
        super().__init__(encoder=encoder, memory=memory)
        self.input_dim = encoder.input_dim
        wanted = encoder.output_dim + encoder.input_dim
        assert memory.input_dim == wanted, (memory.input_dim, wanted)
        self.output_dim = encoder.output_dim + memory.output_dim + encoder.input_dim

    def next_input(self, x: th.Tensor, output: th.Tensor) -> th.Tensor:
        return th.cat([output, x], dim=-1)

    def combine(self, x: th.Tensor, outputs: list[th.Tensor]) -> th.Tensor:
        return th.cat([*outputs, x], dim=-1)
