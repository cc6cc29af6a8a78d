"""No memory, for comparisons."""

import torch as th

from sb3_cyborg.checks import check_positive
from sb3_cyborg.registry import MEMORIES
from sb3_cyborg.sequence_model import Logs, SequenceModel, State


@MEMORIES.register("none")
class NoMemory(SequenceModel):
    """
    A memory without state and output: ``output_dim`` is 0.

    :param input_dim: Features of the input, >= 1.
    :raises ValueError: for a size below 1.
    """

    def __init__(self, input_dim: int) -> None:
        super().__init__()
        check_positive(input_dim=input_dim)
        self.input_dim, self.output_dim = input_dim, 0

    def get_initial_state(self, batch_size: int, device: th.device | str | None = None) -> State:
        return {}

    def forward_step(self, x: th.Tensor, state: State, mask: th.Tensor | None = None) -> tuple[th.Tensor, State, Logs]:
        return x[..., :0], {}, {}

    def forward_sequence(self, x: th.Tensor, state: State, masks: th.Tensor | None = None) -> tuple[th.Tensor, State, Logs]:
        return x[..., :0], {}, {}
