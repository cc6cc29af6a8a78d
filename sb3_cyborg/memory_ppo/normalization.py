"""Scales of observations, returns and advantages that are remembered from rollout to rollout."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch as th
from torch import nn


@dataclass(frozen=True)
class Moments:
    """Moments of the samples of one rollout, by feature, in float64."""

    count: th.Tensor
    """Number of samples, (1,)."""
    mean: th.Tensor
    """(D,)."""
    square: th.Tensor
    """Mean square, (D,)."""

    @property
    def var(self) -> th.Tensor:
        """Variance, (D,)."""
        return (self.square - self.mean.square()).clamp(min=0.0)

    @property
    def std(self) -> th.Tensor:
        """Standard deviation, (D,)."""
        return self.var.sqrt()


@dataclass
class RunningMoments:
    """
    Mean and mean square over rollouts: the plain average over the first ``horizon`` rollouts, then an exponential one.

    :param horizon: Rollouts that count.
    :param count: Rollouts so far, at most ``horizon``.
    :param mean: Average of the rollouts' means.
    :param square: Average of the rollouts' mean squares.
    """

    horizon: int
    count: int = 0
    mean: float = 0.0
    square: float = 0.0

    @property
    def std(self) -> float:
        """Standard deviation over all rollouts together."""
        return math.sqrt(max(self.square - self.mean**2, 0.0))

    def update(self, rollout: Moments) -> None:
        """
        :param rollout: Moments of one rollout, of one feature.
        """
        self.count = min(self.count + 1, self.horizon)
        self.mean += (rollout.mean.item() - self.mean) / self.count
        self.square += (rollout.square.item() - self.square) / self.count


class ValueHead(nn.Linear):
    """
    A linear layer that works in units of the return: PopArt (van Hasselt et al. 2016, https://arxiv.org/abs/1602.07714).

    Its output is ``mean + scale * (W x + b)``. :meth:`rescale` sets the buffers ``mean`` and ``scale`` to those of the returns
    and changes ``W`` and ``b`` so that every output stays the same. The value loss, divided by ``scale ** 2``, then has the
    same size for rewards of any scale, which balances it with the policy loss in a shared core.

    :param layer: A linear layer with one output, whose parameters become those of this one.
    """

    LEAST_SCALE: ClassVar[float] = 1.0
    """Smallest scale: returns with a smaller standard deviation are mostly noise, which would be amplified."""

    mean: th.Tensor
    scale: th.Tensor

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, 1, device=layer.weight.device, dtype=layer.weight.dtype)
        self.weight, self.bias = layer.weight, layer.bias
        self.register_buffer("mean", self.weight.new_zeros(1))
        self.register_buffer("scale", self.weight.new_ones(1))

    def forward(self, x: th.Tensor) -> th.Tensor:
        """:return: Values (..., 1) of features (..., D)."""
        return th.addcmul(self.mean, super().forward(x), self.scale)

    @th.no_grad()
    def rescale(self, returns: RunningMoments) -> None:
        """
        Set mean and scale to those of the returns; the outputs stay the same.

        :param returns: Their moments.
        """
        mean, scale = returns.mean, max(returns.std, self.LEAST_SCALE)
        self.bias.mul_(self.scale).add_(self.mean - mean).div_(scale)
        self.weight.mul_(self.scale / scale)
        self.mean.fill_(mean)
        self.scale.fill_(scale)


class ObservationNormalizer(nn.Module):
    """
    Observation normalization as in SB3's ``VecNormalize``, but as a part of the policy.

    Normalization amplifies features that are rarely anything but zero, such as a cue at the start of an episode. The moments
    are those of all rollouts so far. They change between rollouts only, as the weights do, so that acting and training see the
    same inputs. Before the end of the first rollout, observations are not normalized.

    :param size: Features of an observation, D.
    """

    CLIP: ClassVar[float] = 10.0
    """``VecNormalize``'s ``clip_obs``."""

    mean: th.Tensor
    var: th.Tensor
    scale: th.Tensor
    count: th.Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("mean", th.zeros(size))
        self.register_buffer("var", th.ones(size))
        self.register_buffer("scale", th.ones(size))  # of the variance; kept, for acting reads it at every step
        self.register_buffer("count", th.zeros(()))

    def forward(self, x: th.Tensor) -> th.Tensor:
        """:return: Normalized observations (B, ...) of observations (B, ...) with D elements each."""
        flat = (x.flatten(1) - self.mean) * self.scale
        return flat.clamp(-self.CLIP, self.CLIP).view_as(x)

    @th.no_grad()
    def update(self, rollout: Moments) -> None:
        """
        Merge the moments of a rollout (Chan et al. 1979, the parallel algorithm).

        :param rollout: Moments of its observations, (D,).
        """
        share = (rollout.count / (self.count + rollout.count)).to(self.var.dtype)
        mean, var = rollout.mean.to(self.mean.dtype), rollout.var.to(self.var.dtype)
        apart = mean - self.mean
        self.var += share * (var - self.var + (1 - share) * apart.square())
        self.mean += share * apart
        self.count += rollout.count.squeeze()
        self.scale.copy_((self.var + 1e-8).rsqrt())
