"""``EncoderV7``: one encoder, several recurrent cores; a mode is a composition in a registry."""

import inspect
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import torch as th
from torch import nn

from sb3_cyborg.checks import check_options, check_positive, unknown_name
from sb3_cyborg.encoders.gru import GRU
from sb3_cyborg.encoders.lstm import LSTM
from sb3_cyborg.encoders.mamba import MAMBA_OPTIONS, make_mamba_core
from sb3_cyborg.ops.linear import Linear
from sb3_cyborg.sequence_model import Logs, Parallel, SequenceModel, Serial, State, full_precision


class EncoderMode(NamedTuple):
    """
    How to build the core of a mode.

    :param build: ``build(hidden_dim, num_layers, **options)`` gives a model that reads ``hidden_dim`` features.
    :param options: Names of the keyword options that ``build`` takes.
    """

    build: Callable[..., SequenceModel]
    options: frozenset[str] = frozenset()


def _layers(cell: type[GRU] | type[LSTM], hidden_dim: int, num_layers: int) -> SequenceModel:
    layers: dict[str, SequenceModel] = {f"layer{index}": cell(hidden_dim, hidden_dim) for index in range(num_layers)}
    return Serial(residual=False, **layers)


def _gru(hidden_dim: int, num_layers: int) -> SequenceModel:
    return _layers(GRU, hidden_dim, num_layers)


def _lstm(hidden_dim: int, num_layers: int) -> SequenceModel:
    return _layers(LSTM, hidden_dim, num_layers)


def _hybrid(hidden_dim: int, num_layers: int, **options: Any) -> SequenceModel:
    mamba = make_mamba_core(hidden_dim, num_layers, **options)
    return Serial(residual=True, mamba=mamba, gru=_gru(hidden_dim, num_layers))


def _fusion(hidden_dim: int, num_layers: int, **options: Any) -> SequenceModel:
    return Parallel(mamba=make_mamba_core(hidden_dim, num_layers, **options), gru=_gru(hidden_dim, num_layers))


ENCODERS: dict[str, EncoderMode] = {
    "gru": EncoderMode(_gru),
    "lstm": EncoderMode(_lstm),
    "mamba": EncoderMode(make_mamba_core, MAMBA_OPTIONS),
    "hybrid": EncoderMode(_hybrid, MAMBA_OPTIONS),
    "fusion": EncoderMode(_fusion, MAMBA_OPTIONS),
}
"""All encoder modes by name; add to it with :func:`register_encoder`."""


def register_encoder(mode: str, build: Callable[..., SequenceModel], options: Collection[str] = ()) -> None:
    """
    Make a recurrent core of your own available as ``policy_kwargs={"encoder": mode}``.

    :param mode: Its name; one that is taken is replaced.
    :param build: ``build(hidden_dim, num_layers, **options)`` returns a :class:`SequenceModel` with
        ``input_dim == hidden_dim`` that keeps the contract (``sb3_cyborg.testing.verify_contract``).
    :param options: Names of the options that ``encoder_kwargs`` may hold for it.
    :raises ValueError: for an option that :class:`EncoderV7` takes itself.
    """
    taken = set(options) & inspect.signature(EncoderV7).parameters.keys()
    if taken:
        raise ValueError(f"Encoder {mode!r} has options that EncoderV7 takes itself: {', '.join(sorted(taken))}; rename them.")
    ENCODERS[mode] = EncoderMode(build, frozenset(options))


class EncoderV7(SequenceModel):
    """
    Input projection (Linear, LayerNorm, SiLU) → recurrent core → output projection (Linear, LayerNorm).

    :param input_dim: Features in.
    :param hidden_dim: Width of the core.
    :param latent_dim: Features out; ``None`` takes ``hidden_dim``.
    :param mode: ``"gru"``, ``"lstm"``, ``"mamba"``, ``"hybrid"`` (mamba → gru, residual around both), ``"fusion"``
        (mamba ∥ gru, concatenated), or one that was registered.
    :param num_layers: Layers of the core (in ``hybrid`` and ``fusion``: of each of the two).
    :param options: Options of the mode, e.g. ``d_state`` for the ones with Mamba.
    :raises ValueError: for sizes below one, an unknown mode or option.
    """

    def __init__(
        self,
        input_dim: int,
        hidden_dim: int = 128,
        latent_dim: int | None = None,
        mode: str = "gru",
        num_layers: int = 1,
        **options: Any,
    ) -> None:
        super().__init__()
        latent_dim = hidden_dim if latent_dim is None else latent_dim
        check_positive(input_dim=input_dim, hidden_dim=hidden_dim, latent_dim=latent_dim, num_layers=num_layers)
        if mode not in ENCODERS:
            raise unknown_name("encoder", mode, ENCODERS)
        check_options(f"encoder {mode!r}", options, ENCODERS[mode].options)
        self.mode = mode
        self.input_dim, self.output_dim = input_dim, latent_dim
        self.input_projection = nn.Sequential(Linear(input_dim, hidden_dim), nn.LayerNorm(hidden_dim), nn.SiLU())
        self.core = ENCODERS[mode].build(hidden_dim, num_layers, **options)
        self.output_projection = nn.Sequential(Linear(self.core.output_dim, latent_dim), nn.LayerNorm(latent_dim))

    def get_initial_state(self, batch_size: int, device: th.device | str | None = None) -> State:
        return self.core.get_initial_state(batch_size, device)

    def forward_step(self, x: th.Tensor, state: State, mask: th.Tensor | None = None) -> tuple[th.Tensor, State, Logs]:
        return self._run("forward_step", x, state, mask)

    def forward_sequence(self, x: th.Tensor, state: State, masks: th.Tensor | None = None) -> tuple[th.Tensor, State, Logs]:
        return self._run("forward_sequence", x, state, masks)

    def _run(self, method: str, x: th.Tensor, state: State, mask: th.Tensor | None) -> tuple[th.Tensor, State, Logs]:
        first = self.input_projection[0]
        assert isinstance(first, Linear)
        dtype = first.weight.dtype  # `self.dtype` searches through all modules, which shows in a step of acting
        hidden = self.input_projection(x)
        keep = None if mask is None else mask.bool()  # numbers are welcome here; inside, masks are bool
        with full_precision(x.device):  # the projections may be autocast, the recurrence and its state are not
            hidden, state, logs = getattr(self.core, method)(hidden.to(dtype), state, keep)
        latent: th.Tensor = self.output_projection(hidden)
        return latent.to(dtype), state, logs
