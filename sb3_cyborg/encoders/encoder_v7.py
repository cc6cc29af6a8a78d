"""``EncoderV7``: projections around a recurrent core of one of several modes."""

import inspect
from collections.abc import Callable
from typing import Any

import torch as th
from torch import nn

from sb3_cyborg.checks import check_positive
from sb3_cyborg.encoders import fusion, gru, hybrid, lstm, mamba  # noqa: F401  # each registers itself
from sb3_cyborg.ops.linear import Linear
from sb3_cyborg.registry import ENCODERS as ENCODERS
from sb3_cyborg.sequence_model import Logs, SequenceModel, State, full_precision


def register_encoder(mode: str, encoder_class: Callable[..., SequenceModel]) -> None:
    """
    Make a recurrent core of your own available as ``policy_kwargs={"encoder": mode}``.

    :param mode: Its name; one that is taken is replaced.
    :param encoder_class: A :class:`SequenceModel` whose constructor takes ``hidden_dim``, ``num_layers`` and its options by
        name, that reads ``hidden_dim`` features, and that keeps the contract: see
        :func:`~sb3_cyborg.testing.verify_contract`.
    :raises ValueError: for a signature that its options cannot be read from, and for an option of a reserved name.
    """
    reserved = set(inspect.signature(EncoderV7).parameters) - {*ENCODERS.arguments, "options"}
    ENCODERS.add(mode, encoder_class, reserved=reserved)


class EncoderV7(SequenceModel):
    """
    Input projection (Linear, LayerNorm, SiLU) → recurrent core → output projection (Linear, LayerNorm).

    :param input_dim: Features in.
    :param hidden_dim: Width of the core.
    :param latent_dim: Features out; ``None`` takes ``hidden_dim``.
    :param mode: One of :data:`~sb3_cyborg.registry.ENCODERS`: ``"gru"``, ``"lstm"``, ``"mamba"``, ``"hybrid"`` (mamba → gru,
        residual around both), ``"fusion"`` (mamba ∥ gru, concatenated), or one that was registered.
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
        self.mode = mode
        self.input_dim, self.output_dim = input_dim, latent_dim
        self.input_projection = nn.Sequential(Linear(input_dim, hidden_dim), nn.LayerNorm(hidden_dim), nn.SiLU())
        self.core = ENCODERS.build(mode, hidden_dim, num_layers, **options)
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
