"""Base of GRU and LSTM layers: parameters in PyTorch's layout, a state of vectors, resets as booleans."""

from collections.abc import Collection
from typing import ClassVar, NamedTuple

import torch as th
from torch import nn

from sb3_cyborg.checks import check_positive
from sb3_cyborg.sequence_model import SequenceModel, State, may_branch


class RecurrentLayer(SequenceModel):
    """
    Base of a layer of gates; each gate's weights start orthogonal of their own, biases at zero.

    :param input_dim: Features in.
    :param hidden_dim: Features of each leaf of the state and out.
    """

    num_gates: ClassVar[int]
    leaves: ClassVar[tuple[str, ...]]

    def __init__(self, input_dim: int, hidden_dim: int) -> None:
        super().__init__()
        check_positive(input_dim=input_dim, hidden_dim=hidden_dim)
        self.input_dim, self.output_dim = input_dim, hidden_dim
        self.weight_ih = nn.Parameter(th.empty(self.num_gates * hidden_dim, input_dim))
        self.weight_hh = nn.Parameter(th.empty(self.num_gates * hidden_dim, hidden_dim))
        self.bias_ih = nn.Parameter(th.zeros(self.num_gates * hidden_dim))
        self.bias_hh = nn.Parameter(th.zeros(self.num_gates * hidden_dim))
        with th.no_grad():
            for weight in (self.weight_ih, self.weight_hh):
                for gate in weight.chunk(self.num_gates):
                    nn.init.orthogonal_(gate)

    def get_initial_state(self, batch_size: int, device: th.device | str | None = None) -> State:
        return {name: self._zeros(batch_size, self.output_dim, device=device) for name in self.leaves}


def stack_layers(layer: type[RecurrentLayer], hidden_dim: int, num_layers: int) -> dict[str, SequenceModel]:
    """:return: Layers of one width, by the names that a stack of them has: ``layer0``, ``layer1``, ..."""
    check_positive(hidden_dim=hidden_dim, num_layers=num_layers)
    return {f"layer{index}": layer(hidden_dim, hidden_dim) for index in range(num_layers)}


class Resets(NamedTuple):
    """Where in a time-major sequence states start anew."""

    steps: Collection[int]
    """Steps in which some row does; all others need no select."""
    keep: th.Tensor | None = None
    """False where a row starts anew, (T, B, 1); ``None`` if none ever does."""

    def apply(self, step: int, state: th.Tensor) -> th.Tensor:
        """:return: The state (B, H) that a step really continues from: zeros where a row starts anew."""
        if step not in self.steps:
            return state
        assert self.keep is not None
        return th.where(self.keep[step], state, 0.0)

    def apply_all(self, states: th.Tensor) -> th.Tensor:
        """:return: The same for all steps, (T, B, H)."""
        return states if self.keep is None else th.where(self.keep, states, 0.0)


def find_resets(masks: th.Tensor | None) -> Resets:
    """:return: Where keep-masks (B, T) are false."""
    if masks is None:
        return Resets(())
    keep = masks.t().unsqueeze(-1)
    if not may_branch(keep.device):
        return Resets(range(len(keep)), keep)
    steps = frozenset((~keep).flatten(1).any(1).nonzero().flatten().tolist())
    return Resets(steps, keep if steps else None)
