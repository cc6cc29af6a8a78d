"""The hybrid encoder: Mamba, then GRU, with a residual connection around both."""

from typing import Any

from sb3_cyborg.encoders.gru import GRUCore
from sb3_cyborg.encoders.mamba import MambaCore
from sb3_cyborg.registry import ENCODERS, with_options_of
from sb3_cyborg.sequence_model import Serial


@ENCODERS.register("hybrid")
@with_options_of(MambaCore)
class HybridCore(Serial):
    """
    Mamba layers, then GRU layers, with a residual connection: ``x + GRU(Mamba(x))``.

    :param hidden_dim: Features of input and output, >= 1.
    :param num_layers: Layers of each of the two, >= 1.
    :param options: Options of :class:`MambaCore`.
    :raises ValueError: for sizes below 1 or not divisible as required, see :class:`Mamba2`.
    """

    def __init__(self, hidden_dim: int, num_layers: int = 1, **options: Any) -> None:
        super().__init__(
            residual=True, mamba=MambaCore(hidden_dim, num_layers, **options), gru=GRUCore(hidden_dim, num_layers)
        )
