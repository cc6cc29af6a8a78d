"""Scales of observations, returns and advantages that are remembered from rollout to rollout."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch as th
from torch import nn


@dataclass
class RunningMoments:
    """
    Mean and square of what rollouts hold: the plain average over the first ``horizon`` rollouts, then an exponential one.

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

    def update(self, values: th.Tensor) -> None:
        """
        :param values: Of one rollout, any shape.
        """
        self.count = min(self.count + 1, self.horizon)
        mean, square = th.stack([values.mean(), values.square().mean()]).tolist()
        self.mean += (mean - self.mean) / self.count
        self.square += (square - self.square) / self.count


class ValueHead(nn.Linear):
    """
    A linear layer that works in units of the return: PopArt (van Hasselt et al. 2016, https://arxiv.org/abs/1602.07714).

    What it is multiplied with and moved by are buffers, which follow the returns' scale; weights and bias change against
    them, so that every output stays as it was (``Pop``) while the loss, divided by ``scale ** 2``, is of the same size for
    rewards of any (``Art``). A shared core then hears actor and critic equally loud.

    :param layer: A linear layer with one output, whose parameters become those of this one.
    """

    LEAST_SCALE: ClassVar[float] = 1.0
    """Returns that differ by less are not blown up: much of it is noise, and the core would learn that first."""

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
        Take on the scale of the returns; the values stay what they are.

        :param returns: Their moments.
        """
        mean, scale = returns.mean, max(returns.std, self.LEAST_SCALE)
        self.bias.mul_(self.scale).add_(self.mean - mean).div_(scale)
        self.weight.mul_(self.scale / scale)
        self.mean.fill_(mean)
        self.scale.fill_(scale)


class ObservationNormalizer(nn.Module):
    """
    Observations in units of their standard deviation, as in SB3's ``VecNormalize``, but inside of the policy.

    A feature that is rarely anything but zero, as the sign that is to be remembered, or the junction at the end of a
    corridor, then is as loud as it is rare. The moments are of all rollouts so far, and move between rollouts alone, like
    the weights: what was acted with is what is trained with. Until the first rollout is over observations stay as they are.

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
    def update(self, x: th.Tensor) -> None:
        """
        Take observations into the moments (Chan et al. 1979, the parallel algorithm).

        :param x: (B, ...), with D elements each.
        """
        x = x.flatten(1)
        mean, var = x.mean(0), x.var(0, correction=0)
        share = len(x) / (self.count + len(x))
        apart = mean - self.mean
        self.var += share * (var - self.var + (1 - share) * apart.square())
        self.mean += share * apart
        self.count += len(x)
        self.scale.copy_((self.var + 1e-8).rsqrt())
