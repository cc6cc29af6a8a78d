"""The fusion encoder: Mamba and GRU side by side."""

from typing import Any

from sb3_cyborg.encoders.gru import GRUCore
from sb3_cyborg.encoders.mamba import MambaCore
from sb3_cyborg.registry import ENCODERS, with_options_of
from sb3_cyborg.sequence_model import Parallel


@ENCODERS.register("fusion")
@with_options_of(MambaCore)
class FusionCore(Parallel):
    """
    Layers of Mamba and layers of GRU read the same input; their outputs are concatenated.

    :param hidden_dim: Features in, and out of each of the two, >= 1.
    :param num_layers: Layers of each of the two, >= 1.
    :param options: Options of :class:`MambaCore`.
    :raises ValueError: for sizes that do not fit.
    """

    def __init__(self, hidden_dim: int, num_layers: int = 1, **options: Any) -> None:
        super().__init__(mamba=MambaCore(hidden_dim, num_layers, **options), gru=GRUCore(hidden_dim, num_layers))
