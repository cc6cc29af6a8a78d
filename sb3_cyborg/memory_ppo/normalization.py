"""Running moments for the normalization of observations, returns and advantages."""

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
    Running mean and mean square over rollouts.

    They are the arithmetic average over the first ``horizon`` rollouts, then the exponential average with weight
    ``1 / horizon``.

    :param horizon: Number of rollouts that are averaged, >= 1.
    :param count: Number of rollouts so far, at most ``horizon``.
    :param mean: Average of the rollouts' means.
    :param square: Average of the rollouts' mean squares.
    """

    horizon: int
    count: int = 0
    mean: float = 0.0
    square: float = 0.0

    @property
    def std(self) -> float:
        """Standard deviation of the averaged moments."""
        return math.sqrt(max(self.square - self.mean**2, 0.0))

    def update(self, rollout: Moments) -> None:
        """
        Update the averages with the moments of one rollout.

        :param rollout: Moments of one feature.
        """
        self.count = min(self.count + 1, self.horizon)
        self.mean += (rollout.mean.item() - self.mean) / self.count
        self.square += (rollout.square.item() - self.square) / self.count


class ValueHead(nn.Linear):
    """
    Linear value head with normalized targets: PopArt (van Hasselt et al. 2016, https://arxiv.org/abs/1602.07714).

    Its output is ``mean + scale * (W x + b)``. :meth:`rescale` sets the buffers ``mean`` and ``scale`` to those of the returns
    and changes ``W`` and ``b`` so that all outputs are preserved. The value loss, divided by ``scale ** 2``, then does not
    depend on the scale of the rewards, which balances it with the policy loss in a shared core.

    :param layer: A linear layer with one output; its parameters are used.
    """

    LEAST_SCALE: ClassVar[float] = 1.0
    """Lower bound of the scale: returns with a smaller standard deviation are mostly noise, which would be amplified."""

    mean: th.Tensor
    scale: th.Tensor

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, 1, device=layer.weight.device, dtype=layer.weight.dtype)
        self.weight, self.bias = layer.weight, layer.bias
        self.register_buffer("mean", self.weight.new_zeros(1))
        self.register_buffer("scale", self.weight.new_ones(1))

    def forward(self, x: th.Tensor) -> th.Tensor:
        """
        :param x: Features, (..., D).
        :return: Values in units of the return, (..., 1).
        """
        return th.addcmul(self.mean, super().forward(x), self.scale)

    @th.no_grad()
    def rescale(self, returns: RunningMoments) -> None:
        """
        Set mean and scale to those of the returns, and preserve the outputs.

        :param returns: Running moments of the returns.
        """
        mean, scale = returns.mean, max(returns.std, self.LEAST_SCALE)
        self.bias.mul_(self.scale).add_(self.mean - mean).div_(scale)
        self.weight.mul_(self.scale / scale)
        self.mean.fill_(mean)
        self.scale.fill_(scale)


class ObservationNormalizer(nn.Module):
    """
    Observation normalization as in SB3's ``VecNormalize``, as a module of the policy.

    It amplifies features that are rarely non-zero, such as a cue at the start of an episode. The moments are those of all
    rollouts so far. They are updated between rollouts only, so that acting and training read the same inputs. In the first
    rollout and its update, observations are not normalized.

    The effect of an outlier on the moments is bounded, see :meth:`without_outliers`. The variance is float64: observations of
    1e30 have one of 1e60, which float32 cannot hold.

    :param size: Number of features D of an observation, >= 1.
    """

    CLIP: ClassVar[float] = 10.0
    """Normalized observations are clipped to [-CLIP, CLIP], as by ``clip_obs`` of ``VecNormalize``."""

    USUAL_SHARE: ClassVar[float] = 0.9
    """Share of the values of a rollout that count as usual: the smaller ones, by absolute value."""
    OUTLIER: ClassVar[float] = 100.0
    """Multiple of the largest usual value, or of 1 if that is smaller, at which values are clipped for the moments."""

    mean: th.Tensor
    var: th.Tensor
    scale: th.Tensor
    count: th.Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("mean", th.zeros(size))
        self.register_buffer("var", th.ones(size, dtype=th.float64))
        self.register_buffer("scale", th.ones(size))  # 1 / std, stored because every step of acting uses it
        self.register_buffer("count", th.zeros(()))

    def forward(self, x: th.Tensor) -> th.Tensor:
        """
        :param x: Observations with D elements each, (B, ...).
        :return: Normalized and clipped observations, same shape.
        """
        flat = (x.flatten(1) - self.mean) * self.scale
        return flat.clamp(-self.CLIP, self.CLIP).view_as(x)

    @classmethod
    def without_outliers(cls, observations: th.Tensor) -> th.Tensor:
        """
        Clip outliers of a rollout, for its moments: with the square of one observation of 1e30 among thousands around 1, all
        others would be normalized to 0 for the rest of training.

        Each feature is clipped to 100 times the larger of 1 and the 90% quantile of its absolute values. Features between -100
        and 100 are therefore never changed, and neither are large ones unless more than 9 of 10 values are 100 times smaller.

        :param observations: Observations of a rollout, (n, ...).
        :return: The clipped observations, (n, D), float64.
        """
        flat = observations.flatten(1).double()
        usual = max(1, int(cls.USUAL_SHARE * len(flat)))
        bound = cls.OUTLIER * flat.abs().kthvalue(usual, dim=0).values.clamp(min=1.0)
        return flat.clamp(-bound, bound)

    @th.no_grad()
    def update(self, rollout: Moments) -> None:
        """
        Merge the moments of a rollout into the running moments (parallel algorithm, Chan et al. 1979).

        :param rollout: Moments of the observations, (D,).
        """
        share = (rollout.count / (self.count + rollout.count)).to(self.var.dtype)
        apart = rollout.mean - self.mean
        self.var += share * (rollout.var - self.var + (1 - share) * apart.square())
        self.mean += (share * apart).to(self.mean.dtype)
        self.count += rollout.count.squeeze()
        self.scale.copy_((self.var + 1e-8).rsqrt())
