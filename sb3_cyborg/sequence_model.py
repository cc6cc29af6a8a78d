"""
The contract of recurrent models: the state is an explicit argument and an explicit result.

A :class:`SequenceModel` has a step form (acting) and a sequence form (training). Both give the same outputs, final states and
gradients; :func:`sb3_cyborg.testing.verify_contract` verifies it.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch as th
from torch import nn

State = dict[str, th.Tensor]
"""A flat dictionary of tensors. Every leaf is ``(B, ...)``, so that resetting, slicing and storing a state takes one line."""

Logs = dict[str, th.Tensor]
"""Diagnostics: detached 0-d tensors. Only ``aux_loss`` stays attached; the algorithm adds it to its loss."""

AUX_LOSS = "aux_loss"

_select_only: ContextVar[bool] = ContextVar("select_only", default=False)


def may_branch(device: th.device) -> bool:
    """
    Test whether code may branch on the values of tensors.

    On a CPU such a branch can save work. On other devices it would synchronize with the device, and an exported or compiled
    graph contains only one of the branches. There, the select-only form is used: ``torch.where`` instead of a branch.

    :param device: Device of the tensors.
    :return: True on a CPU, outside of compilation, export and :func:`select_only`.
    """
    return device.type == "cpu" and not th.compiler.is_compiling() and not _select_only.get()


@contextmanager
def select_only() -> Iterator[None]:
    """:return: A context in which :func:`may_branch` is false on every device, to test the select-only form on a CPU."""
    token = _select_only.set(True)
    try:
        yield
    finally:
        _select_only.reset(token)


_without_diagnostics: ContextVar[bool] = ContextVar("without_diagnostics", default=False)


@contextmanager
def without_diagnostics() -> Iterator[None]:
    """:return: A context in which models compute no diagnostics: their ``Logs`` hold at most the auxiliary loss."""
    token = _without_diagnostics.set(True)
    try:
        yield
    finally:
        _without_diagnostics.reset(token)


def wants_diagnostics(model: nn.Module) -> bool:
    """
    :param model: A model.
    :return: Whether it computes diagnostics: in training mode, outside of :func:`without_diagnostics`.
    """
    return model.training and not _without_diagnostics.get()


def keep_mask(episode_starts: th.Tensor) -> th.Tensor:
    """
    Convert episode starts to the keep-mask of sequence models. This is the only function that converts them.

    :param episode_starts: Non-zero or true where an episode starts, any shape.
    :return: The keep-mask, bool, same shape: true keeps the state, false resets it.
    """
    return episode_starts == 0


def select_state(mask: th.Tensor, kept: State, other: State) -> State:
    """
    Select each row from one of two states.

    Rows are selected with ``torch.where`` and never multiplied, so a NaN in a row that is not selected has no effect.

    :param mask: Bool, (B,); true selects the row of ``kept``.
    :param kept: A state of B rows.
    :param other: A state of the same structure with B rows, or with one row that is broadcast.
    :return: The selected rows.
    """
    return {
        name: th.where(mask.view(-1, *[1] * (leaf.dim() - 1)), leaf, other[name].to(leaf.dtype)) for name, leaf in kept.items()
    }


def index_state(state: State, rows: th.Tensor) -> State:
    """
    :param state: A state of B rows.
    :param rows: Indices in [0, B), int64, (R,).
    :return: The indexed rows, every leaf (R, ...).
    """
    return {name: leaf[rows] for name, leaf in state.items()}


def full_precision(device: th.device) -> AbstractContextManager[Any]:
    """
    :param device: Device of the tensors.
    :return: A context without autocast on ``device``, so that operations on the state keep its precision.
    """
    if th.is_autocast_enabled(device.type):
        return th.autocast(device.type, enabled=False)
    return nullcontext()  # entering a disabled autocast costs as much as a small layer, at each step of acting


def average_logs(logs: Sequence[Logs]) -> Logs:
    """
    :param logs: Logs with the same keys, e.g. one for each step of a sequence.
    :return: The mean of each entry; empty if ``logs`` is.
    """
    return {name: th.stack([entry[name] for entry in logs]).mean() for name in logs[0]} if logs else {}


class SequenceModel(nn.Module, ABC):
    """
    Base class of recurrent models with an explicit state.

    The state is an argument and a result. It is never stored on the module, changed in place, or ``None``.

    Mask convention: masks are bool keep-masks. True keeps the state of the row. False means that an episode starts at this
    step: the row is set to the initial state *before* ``x`` is read.
    """

    input_dim: int
    """Features of the input."""
    output_dim: int
    """Features of the output."""
    counters: frozenset[str] = frozenset()
    """Names of state leaves that hold counts (ages, fill levels). They are piecewise constant and carry no gradient."""

    @abstractmethod
    def get_initial_state(self, batch_size: int, device: th.device | str | None = None) -> State:
        """
        :param batch_size: Number of rows B, >= 1.
        :param device: Device of the state; ``None`` is the device of the parameters.
        :return: The state at the start of an episode, every leaf ``(B, ...)``.
        """

    @abstractmethod
    def forward_step(self, x: th.Tensor, state: State, mask: th.Tensor | None = None) -> tuple[th.Tensor, State, Logs]:
        """
        Process one step.

        :param x: Input, (B, input_dim).
        :param state: State before the step, every leaf (B, ...).
        :param mask: Keep-mask, bool, (B,); ``None`` keeps every row.
        :return: Output (B, output_dim), state after the step, diagnostics.
        """

    def forward_sequence(self, x: th.Tensor, state: State, masks: th.Tensor | None = None) -> tuple[th.Tensor, State, Logs]:
        """
        Process a sequence.

        This loop is the reference. An override must equal it in outputs, final state and gradients.

        :param x: Inputs, (B, T, input_dim) with T >= 1.
        :param state: State before the first step, every leaf (B, ...).
        :param masks: Keep-masks, bool, (B, T); ``None`` keeps every row.
        :return: Outputs (B, T, output_dim), state after the last step, diagnostics averaged over the steps.
        """
        outputs, logs = [], []
        for t in range(x.shape[1]):
            output, state, step_logs = self.forward_step(x[:, t], state, None if masks is None else masks[:, t])
            outputs.append(output)
            logs.append(step_logs)
        return th.stack(outputs, dim=1), state, average_logs(logs)

    def reset_states(self, state: State, mask: th.Tensor) -> State:
        """
        :param state: A state, every leaf (B, ...).
        :param mask: Keep-mask, bool, (B,).
        :return: The state; rows whose mask is false are replaced by the initial state.
        """
        if not state:
            return state
        mask = mask.bool()
        if not may_branch(mask.device):
            return select_state(mask, state, self.get_initial_state(1, mask.device))
        rows = (~mask).nonzero().squeeze(1)
        if len(rows) == 0:
            return state
        initial = self.get_initial_state(len(rows), mask.device)  # writing a few rows is faster than selecting all of them
        return {name: leaf.index_copy(0, rows, initial[name].to(leaf.dtype)) for name, leaf in state.items()}

    def detach_states(self, state: State) -> State:
        """
        :param state: A state.
        :return: The state, detached from the graph.
        """
        return {name: leaf.detach() for name, leaf in state.items()}

    @property
    def dtype(self) -> th.dtype:
        """Dtype of the parameters, and therefore of the state."""
        return next(self.parameters()).dtype

    def _zeros(self, *shape: int, device: th.device | str | None = None) -> th.Tensor:
        """:return: A state leaf of zeros in the dtype of the parameters."""
        reference = next(self.parameters())
        return reference.new_zeros(shape, device=reference.device if device is None else device)


class Composite(SequenceModel):
    """
    Base class of models that consist of named sequence models. States and logs are flat, with keys ``<name>.<key>``.

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
        """
        :param x: Input of the composite, (..., input_dim).
        :param outputs: Outputs of the parts, in order, (..., part.output_dim) each.
        :return: Output of the composite, (..., output_dim).
        """

    def next_input(self, x: th.Tensor, output: th.Tensor) -> th.Tensor:
        """
        :param x: Input of the composite, (..., input_dim).
        :param output: Output of the previous part.
        :return: Input of the next part; by default, the output of the previous one.
        """
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
    Models in series: each part reads the output of the previous one, and the last part's output is returned.

    :param residual: Add the input of the series to its output; both must have the same number of features.
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
    Models in parallel: all parts read the same input, and their outputs are concatenated.

    :param parts: The models, by name; all with the same ``input_dim``.
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
    An encoder followed by a memory: the memory reads ``[latent, input]``, the output is ``[latent, read, input]``.

    The memory also reads the input because its meaning does not change while the encoder is trained. Latents that were stored
    before the current sequence have no gradient, so nothing keeps the encoder from changing their meaning.

    :param encoder: Encoder of the input.
    :param memory: Memory with ``input_dim = encoder.output_dim + encoder.input_dim``.
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
