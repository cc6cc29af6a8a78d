"""Base class of GRU and LSTM layers, and their resets within a sequence."""

import functools
from collections.abc import Collection
from typing import ClassVar, NamedTuple

import torch as th
from torch import nn

from sb3_cyborg.checks import check_positive
from sb3_cyborg.kernels import primitives as kernels
from sb3_cyborg.sequence_model import SequenceModel, State, may_branch


class RecurrentLayer(SequenceModel):
    """
    Base class of gated recurrent layers, with parameters in PyTorch's layout.

    The weights of each gate are initialized orthogonally, biases with zeros.

    :param input_dim: Features of the input, >= 1.
    :param hidden_dim: Features of each state leaf and of the output, >= 1.
    :raises ValueError: for sizes below 1.
    """

    num_gates: ClassVar[int]
    """Number of gates, whose weights are stacked."""
    leaves: ClassVar[tuple[str, ...]]
    """Names of the state leaves, (B, hidden_dim) each."""

    def __init__(self, input_dim: int, hidden_dim: int) -> None:
        super().__init__()
        check_positive(input_dim=input_dim, hidden_dim=hidden_dim)
        self.input_dim, self.output_dim = input_dim, hidden_dim
        self.weight_ih = nn.Parameter(th.empty(self.num_gates * hidden_dim, input_dim))
        self.weight_hh = nn.Parameter(th.empty(self.num_gates * hidden_dim, hidden_dim))
        self.bias_ih = nn.Parameter(th.zeros(self.num_gates * hidden_dim))
        self.bias_hh = nn.Parameter(th.zeros(self.num_gates * hidden_dim))
        self._packed_ih = kernels.Packed(kernels.pack)
        self._packed_hh = kernels.Packed(functools.partial(kernels.pack_gates, num_gates=self.num_gates))
        with th.no_grad():
            for weight in (self.weight_ih, self.weight_hh):
                for gate in weight.chunk(self.num_gates):
                    nn.init.orthogonal_(gate)

    def get_initial_state(self, batch_size: int, device: th.device | str | None = None) -> State:
        return {name: self._zeros(batch_size, self.output_dim, device=device) for name in self.leaves}


def stack_layers(layer: type[RecurrentLayer], hidden_dim: int, num_layers: int) -> dict[str, SequenceModel]:
    """
    :param layer: Class of the layers.
    :param hidden_dim: Features of input and output of each layer, >= 1.
    :param num_layers: Number of layers, >= 1.
    :return: The layers by name: ``layer0``, ``layer1``, ...
    :raises ValueError: for sizes below 1.
    """
    check_positive(hidden_dim=hidden_dim, num_layers=num_layers)
    return {f"layer{index}": layer(hidden_dim, hidden_dim) for index in range(num_layers)}


class Resets(NamedTuple):
    """Resets of a time-major sequence."""

    steps: Collection[int]
    """Steps at which a row may be reset; at all other steps none is."""
    keep: th.Tensor | None = None
    """Keep-mask, bool, (T, B, 1); ``None`` if there is no reset."""

    def apply(self, step: int, state: th.Tensor) -> th.Tensor:
        """
        :param step: Index of the step, in [0, T).
        :param state: State before the step, (B, H).
        :return: The state, zeros in rows that are reset at the step.
        """
        if step not in self.steps:
            return state
        assert self.keep is not None
        return th.where(self.keep[step], state, 0.0)

    def apply_all(self, states: th.Tensor) -> th.Tensor:
        """
        :param states: States before each step, (T, B, H).
        :return: The states, zeros where a row is reset.
        """
        return states if self.keep is None else th.where(self.keep, states, 0.0)


def find_resets(masks: th.Tensor | None) -> Resets:
    """
    :param masks: Keep-masks, bool, (B, T), or ``None``.
    :return: The resets, where the masks are false.
    """
    if masks is None:
        return Resets(())
    keep = masks.t().unsqueeze(-1)
    if not may_branch(keep.device):
        return Resets(range(len(keep)), keep)
    steps = frozenset((~keep).flatten(1).any(1).nonzero().flatten().tolist())
    return Resets(steps, keep if steps else None)
