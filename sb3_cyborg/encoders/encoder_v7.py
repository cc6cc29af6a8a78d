"""``EncoderV7``: a recurrent core between an input and an output projection."""

import inspect
from collections.abc import Callable
from typing import Any

import torch as th

from sb3_cyborg.checks import check_positive
from sb3_cyborg.encoders import fusion, gru, hybrid, lstm, mamba, mingru, trxl  # noqa: F401  # each registers itself
from sb3_cyborg.ops.linear import Projection
from sb3_cyborg.registry import ENCODERS as ENCODERS
from sb3_cyborg.sequence_model import Logs, SequenceModel, State, full_precision


def register_encoder(mode: str, encoder_class: Callable[..., SequenceModel]) -> None:
    """
    Register a recurrent core as an encoder mode, for ``policy_kwargs={"encoder": mode}``.

    :param mode: Name of the mode; an existing mode of that name is replaced.
    :param encoder_class: A :class:`SequenceModel` whose constructor takes ``hidden_dim``, ``num_layers`` and named options.
        Its input must have ``hidden_dim`` features. Test it with :func:`~sb3_cyborg.testing.verify_contract`.
    :raises ValueError: for a signature that lacks these arguments, has ``*args`` or ``**kwargs``, or has an option with a
        reserved name.
    """
    reserved = set(inspect.signature(EncoderV7).parameters) - {*ENCODERS.arguments, "options"}
    ENCODERS.add(mode, encoder_class, reserved=reserved)


class EncoderV7(SequenceModel):
    """
    Recurrent encoder: input projection (Linear, LayerNorm, SiLU) → recurrent core → output projection (Linear, LayerNorm).

    Masks are keep-masks: true keeps the state, false resets it before the step. They are bool; numbers are accepted as well,
    where non-zero keeps the state.

    :param input_dim: Features of the input, >= 1.
    :param hidden_dim: Features of the core, >= 1.
    :param latent_dim: Features of the output, >= 1; ``None`` is ``hidden_dim``.
    :param mode: One of :data:`~sb3_cyborg.registry.ENCODERS`: ``"gru"``, ``"lstm"``, ``"mamba"``, ``"mingru"``, ``"trxl"``,
        ``"hybrid"`` (mamba → gru, with a residual connection around both), ``"fusion"`` (mamba ∥ gru, concatenated), or a
        registered one.
    :param num_layers: Layers of the core, >= 1; in ``hybrid`` and ``fusion``, of each of the two.
    :param options: Options of the mode, e.g. ``d_state`` for modes with Mamba.
    :raises ValueError: for sizes below 1, and for an unknown mode or option.
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
        self.input_projection = Projection(input_dim, hidden_dim, silu=True)
        self.core = ENCODERS.build(mode, hidden_dim, num_layers, **options)
        self.output_projection = Projection(self.core.output_dim, latent_dim)

    def get_initial_state(self, batch_size: int, device: th.device | str | None = None) -> State:
        return self.core.get_initial_state(batch_size, device)

    def forward_step(self, x: th.Tensor, state: State, mask: th.Tensor | None = None) -> tuple[th.Tensor, State, Logs]:
        return self._run("forward_step", x, state, mask)

    def forward_sequence(self, x: th.Tensor, state: State, masks: th.Tensor | None = None) -> tuple[th.Tensor, State, Logs]:
        return self._run("forward_sequence", x, state, masks)

    def _run(self, method: str, x: th.Tensor, state: State, mask: th.Tensor | None) -> tuple[th.Tensor, State, Logs]:
        dtype = self.input_projection.dtype  # `self.dtype` iterates over all modules, which is slow in a step of acting
        hidden = self.input_projection(x)
        keep = None if mask is None else mask.bool()  # numbers are accepted here; cores expect bool masks
        with full_precision(x.device):  # autocast applies to the projections, not to the recurrence and its state
            hidden, state, logs = getattr(self.core, method)(hidden.to(dtype), state, keep)
        latent: th.Tensor = self.output_projection(hidden)
        return latent.to(dtype), state, logs
