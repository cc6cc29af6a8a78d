"""
Mamba-2 with an explicit state (Dao & Gu 2024, https://arxiv.org/abs/2405.21060).

Parameters have the names, shapes and meaning of ``mamba_ssm.Mamba2``'s, so state dicts can be loaded in both directions. In
addition, a sequence starts from a given state, supports resets at any step, and returns the same state as stepping.
"""

import math
from typing import Any

import torch as th
from torch import nn
from torch.nn import functional as F

from sb3_cyborg.checks import check_divides, check_positive, nearest_divisors
from sb3_cyborg.kernels import primitives as kernels
from sb3_cyborg.ops.causal_conv import causal_conv
from sb3_cyborg.ops.linear import Linear
from sb3_cyborg.ops.rms_norm import RMSNorm
from sb3_cyborg.ops.ssd import CHUNK, ssd_chunked, ssd_step
from sb3_cyborg.ops.ssd_compiled import ssd_compiled
from sb3_cyborg.ops.ssd_official import check_backend, choose_ssd
from sb3_cyborg.registry import ENCODERS, with_options_of
from sb3_cyborg.sequence_model import Logs, SequenceModel, Serial, State, full_precision

MAX_DEFAULT_HEADDIM = 32
"""Largest default number of inner features of a head."""

DT_RANGE = (0.001, 0.1)
"""Range of the log-uniform step sizes at initialisation."""

A_RANGE = (1.0, 16.0)
"""Range of the uniform decay rates at initialisation."""


class Mamba2(SequenceModel):
    """
    One Mamba-2 block: projection, short causal convolution, state-space recurrence, gated RMS norm, projection.

    State: ``conv`` (B, C, d_conv - 1), the last inputs of the convolution, newest last, with C = expand * d_model +
    2 * ngroups * d_state; ``ssm`` (B, heads, headdim, d_state). With ``d_conv=1``, ``conv`` is empty.

    :param d_model: Features of input and output, >= 1.
    :param d_state: State size N of each of the expand * d_model inner features, >= 1.
    :param d_conv: Kernel size of the convolution, >= 1.
    :param expand: Ratio of inner features to ``d_model``, >= 1.
    :param headdim: Inner features of a head; divides expand * d_model. ``None`` is its largest divisor up to 32.
    :param ngroups: Groups of heads; the heads of a group share B and C. Divides the number of heads.
    :param chunk_size: Steps in a chunk of the sequence form, >= 1. It affects speed, not results.
    :param mamba_backend: Implementation of the recurrence in the sequence form: ``"torch"`` (in fp32 on a CPU the compiled
        kernels, where they are in use), ``"official"`` (the kernels of
        ``mamba_ssm``, on a GPU), or ``"auto"``, which is ``"official"`` where available. The step form always uses PyTorch.
    :raises ValueError: for a size below 1, a size that does not divide as required, or an unknown backend.
    :raises ImportError: for ``"official"`` without ``mamba_ssm``.
    """

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        headdim: int | None = None,
        ngroups: int = 1,
        chunk_size: int = CHUNK,
        mamba_backend: str = "auto",
    ) -> None:
        super().__init__()
        check_positive(d_model=d_model, d_state=d_state, d_conv=d_conv, expand=expand)
        d_inner = expand * d_model
        headdim = nearest_divisors(d_inner, MAX_DEFAULT_HEADDIM)[0] if headdim is None else headdim
        check_positive(headdim=headdim, ngroups=ngroups, chunk_size=chunk_size)
        check_divides("headdim", headdim, "expand * d_model", d_inner)
        check_divides("ngroups", ngroups, "expand * d_model / headdim", d_inner // headdim)
        check_backend(mamba_backend)
        self.input_dim = self.output_dim = d_model
        self.d_inner, self.d_state, self.d_conv = d_inner, d_state, d_conv
        self.nheads, self.headdim, self.ngroups = d_inner // headdim, headdim, ngroups
        self.chunk_size, self.mamba_backend = chunk_size, mamba_backend
        self.conv_dim = d_inner + 2 * ngroups * d_state
        self.in_proj = Linear(d_model, d_inner + self.conv_dim + self.nheads, bias=False)  # z, [x, B, C], dt
        self.conv1d = nn.Conv1d(self.conv_dim, self.conv_dim, d_conv, groups=self.conv_dim)
        self.dt_bias = nn.Parameter(_initial_dt_bias(self.nheads))
        self.A_log = nn.Parameter(th.empty(self.nheads).uniform_(*A_RANGE).log())
        self.D = nn.Parameter(th.ones(self.nheads))
        self.norm = GatedRMSNorm(d_inner, ngroups)
        self.out_proj = Linear(d_inner, d_model, bias=False)

    def get_initial_state(self, batch_size: int, device: th.device | str | None = None) -> State:
        return {
            "conv": self._zeros(batch_size, self.conv_dim, self.d_conv - 1, device=device),
            "ssm": self._zeros(batch_size, self.nheads, self.headdim, self.d_state, device=device),
        }

    def forward_step(self, x: th.Tensor, state: State, mask: th.Tensor | None = None) -> tuple[th.Tensor, State, Logs]:
        if mask is not None:
            state = self.reset_states(state, mask)
        z, features, dt = self._project(x)
        with full_precision(x.device):
            # Steps before channels, also in the memory layout of the state: sums over a short last axis are slow.
            window = th.cat([state["conv"].transpose(1, 2), features.unsqueeze(1)], dim=1)  # (B, d_conv, C)
            weight = self.conv1d.weight.squeeze(1).t().contiguous()
            features = F.silu((window * weight).sum(1) + self._conv_bias)
            heads, b, c = self._split(features)
            y, ssm = ssd_step(heads, F.softplus(dt + self.dt_bias), -self.A_log.exp(), b, c, self.D, state["ssm"])
            gated = self.norm(y.flatten(-2), z)
        return self.out_proj(gated), {"conv": window[:, 1:].transpose(1, 2), "ssm": ssm}, {}

    def forward_sequence(self, x: th.Tensor, state: State, masks: th.Tensor | None = None) -> tuple[th.Tensor, State, Logs]:
        z, features, dt = self._project(x)
        with full_precision(x.device):
            weight = self.conv1d.weight.squeeze(1)
            features, conv = causal_conv(features, state["conv"], weight, self._conv_bias, masks, silu=True)
            heads, b, c = self._split(features)
            y, ssm = self._scan(heads, dt, b, c, state["ssm"], masks)
            gated = self.norm(y.flatten(-2), z)
        return self.out_proj(gated), {"conv": conv, "ssm": ssm}, {}

    @property
    def _conv_bias(self) -> th.Tensor:
        bias = self.conv1d.bias
        assert bias is not None
        return bias

    def _project(self, x: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """:return: Gate ``z``, input of the convolution, raw ``dt``; in the dtype of the state, also with autocast."""
        projected = self.in_proj(x).to(self.D.dtype)
        z, features, dt = th.split(projected, [self.d_inner, self.conv_dim, self.nheads], dim=-1)
        return z, features, dt

    def _split(self, features: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """:return: ``x`` (..., heads, headdim), ``B`` and ``C`` (..., ngroups, d_state) from features (..., C)."""
        group_size = self.ngroups * self.d_state
        x, b, c = th.split(features, [self.d_inner, group_size, group_size], dim=-1)
        shape = features.shape[:-1]
        groups = (*shape, self.ngroups, self.d_state)
        return x.view(*shape, self.nheads, self.headdim), b.view(groups), c.view(groups)

    def _scan(
        self, x: th.Tensor, dt: th.Tensor, b: th.Tensor, c: th.Tensor, ssm: th.Tensor, masks: th.Tensor | None
    ) -> tuple[th.Tensor, th.Tensor]:
        """
        Compute the recurrence of a sequence with the chosen backend.

        :param x: (B, T, heads, headdim).
        :param dt: Projected step sizes, before bias and softplus, (B, T, heads).
        :param b: (B, T, ngroups, d_state).
        :param c: (B, T, ngroups, d_state).
        :param ssm: State before the first step, (B, heads, headdim, d_state).
        :param masks: Keep-masks, bool, (B, T), or ``None``.
        :return: Outputs (B, T, heads, headdim) and the state after the last step.
        """
        ssd = choose_ssd(self.mamba_backend, x)
        if ssd is ssd_chunked and kernels.usable(x, dt, ssm, self.D):
            ssd = ssd_compiled
        return ssd(x, F.softplus(dt + self.dt_bias), -self.A_log.exp(), b, c, self.D, ssm, masks, self.chunk_size)


class GatedRMSNorm(RMSNorm):
    """Gated RMS norm: ``RMSNorm(y * silu(z)) * weight``, with the mean square of each group of features."""

    def forward(self, y: th.Tensor, z: th.Tensor) -> th.Tensor:  # type: ignore[override]  # the gate is an input, too
        """
        :param y: (..., features).
        :param z: Gate before its activation, (..., features).
        :return: Normalized features, (..., features).
        """
        if kernels.usable(y, z, self.weight):
            return self._compiled(y, z)
        return super().forward(y * F.silu(z))


class MambaLayer(SequenceModel):
    """
    A pre-norm residual Mamba-2 block: ``x + Mamba2(RMSNorm(x))``.

    :param hidden_dim: Features of input and output, >= 1.
    :param options: Options of :class:`Mamba2`.
    :raises ValueError: see :class:`Mamba2`.
    """

    def __init__(self, hidden_dim: int, **options: Any) -> None:
        super().__init__()
        self.mixer = Mamba2(hidden_dim, **options)
        self.norm = RMSNorm(hidden_dim)
        self.input_dim = self.output_dim = hidden_dim

    def get_initial_state(self, batch_size: int, device: th.device | str | None = None) -> State:
        return self.mixer.get_initial_state(batch_size, device)

    def forward_step(self, x: th.Tensor, state: State, mask: th.Tensor | None = None) -> tuple[th.Tensor, State, Logs]:
        output, state, logs = self.mixer.forward_step(self.norm(x), state, mask)
        return x + output, state, logs

    def forward_sequence(self, x: th.Tensor, state: State, masks: th.Tensor | None = None) -> tuple[th.Tensor, State, Logs]:
        output, state, logs = self.mixer.forward_sequence(self.norm(x), state, masks)
        return x + output, state, logs


@ENCODERS.register("mamba")
@with_options_of(Mamba2)
class MambaCore(Serial):
    """
    Layers of Mamba-2 in series, see :class:`MambaLayer`.

    The default of ``expand`` is 1 here and 2 in :class:`Mamba2`: policies of this size learn equally fast with 1, at half the
    cost (docs/mamba.md).

    State: ``layer<i>.conv`` and ``layer<i>.ssm`` for each layer, see :class:`Mamba2`.

    :param hidden_dim: Features of input and output, >= 1.
    :param num_layers: Number of layers, >= 1.
    :param expand: Ratio of inner features to ``hidden_dim``, >= 1.
    :param options: Other options of :class:`Mamba2`.
    :raises ValueError: for sizes below 1 or not divisible as required, see :class:`Mamba2`.
    """

    def __init__(self, hidden_dim: int, num_layers: int = 1, *, expand: int = 1, **options: Any) -> None:
        check_positive(hidden_dim=hidden_dim, num_layers=num_layers)
        layers = {f"layer{index}": MambaLayer(hidden_dim, expand=expand, **options) for index in range(num_layers)}
        super().__init__(residual=False, **layers)


def _initial_dt_bias(heads: int) -> th.Tensor:
    """:return: Biases whose softplus is log-uniform in ``DT_RANGE``, (heads,)."""
    low, high = map(math.log, DT_RANGE)
    dt = th.empty(heads).uniform_(low, high).exp()
    return dt + th.log(-th.expm1(-dt))  # the inverse of softplus
