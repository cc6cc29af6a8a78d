"""The objective of an update: a weighted sum of loss terms, and the running scales that they are normalized by."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch as th
from stable_baselines3.common.distributions import Distribution

from sb3_cyborg.memory_ppo import losses
from sb3_cyborg.memory_ppo.normalization import Moments, RunningMoments


class Minibatch(NamedTuple):
    """What loss terms read of a minibatch of B sequences of L training steps; tensors are (B, L) unless noted."""

    values: th.Tensor
    log_prob: th.Tensor
    entropy: th.Tensor | None
    """``None`` where it has no closed form."""
    ratio: th.Tensor
    """New over old probability of the actions."""
    old_values: th.Tensor
    returns: th.Tensor
    advantages: th.Tensor
    """Normalized, if the algorithm normalizes them."""
    value_scale: th.Tensor
    """Unit of the value loss: standard deviation of the returns, or 1; (1,)."""
    distribution: Callable[[], Distribution]
    """Makes the distribution of the actions, of B * L rows."""
    aux_loss: th.Tensor | None
    """Auxiliary loss of the memory, 0-d."""


class LossTerm(NamedTuple):
    """
    One term of the objective.

    :param name: Its name; it is logged as ``train/<name>``.
    :param weight: Factor in the sum.
    :param function: The loss of a minibatch, 0-d; ``None`` where the minibatch has no such loss.
    """

    name: str
    weight: float
    function: Callable[[Minibatch], th.Tensor | None]


def ppo_terms(
    clip_range: float,
    clip_range_vf: float | None,
    ent_coef: float,
    vf_coef: float,
    memory_loss_coef: float,
    log_barrier_coef: float,
) -> list[LossTerm]:
    """
    Build the terms of PPO's objective with a memory; a new term is one line here.

    :param clip_range: Clipping of the ratio.
    :param clip_range_vf: Clipping of the value, or ``None``.
    :param ent_coef: Weight of the entropy.
    :param vf_coef: Weight of the value loss.
    :param memory_loss_coef: Weight of the memory's auxiliary loss.
    :param log_barrier_coef: Weight of the log barrier; 0 leaves the term out.
    :return: The terms, in the order of their sum.
    """
    terms = [
        LossTerm("policy_gradient_loss", 1.0, lambda m: losses.clipped_policy_loss(m.ratio, m.advantages, clip_range)),
        LossTerm("entropy_loss", ent_coef, lambda m: losses.entropy_loss(m.entropy, m.log_prob)),
        LossTerm(
            "value_loss",
            vf_coef,
            lambda m: losses.value_loss(m.values, m.old_values, m.returns, clip_range_vf) / m.value_scale.square().sum(),
        ),
        LossTerm("memory_loss", memory_loss_coef, lambda m: m.aux_loss),
    ]
    if log_barrier_coef:
        terms.append(LossTerm("log_barrier_loss", log_barrier_coef, lambda m: losses.log_barrier_loss(m.distribution())))
    return terms


def weighted_sum(terms: Sequence[LossTerm], minibatch: Minibatch) -> tuple[th.Tensor, dict[str, th.Tensor]]:
    """
    :param terms: Terms of the objective.
    :param minibatch: The minibatch.
    :return: The loss, 0-d with its graph, and the value of each term, detached, by name.
    """
    loss, parts = minibatch.values.new_zeros(()), {}
    for term in terms:
        value = term.function(minibatch)
        if value is not None:
            loss = loss + term.weight * value
            parts[term.name] = value.detach()
    return loss, parts


Reduce = Callable[[th.Tensor], th.Tensor]
"""Sums a float64 vector over all processes."""


def in_one_process(sums: th.Tensor) -> th.Tensor:
    """:return: The same vector: with one process there is nothing to add."""
    return sums


class UpdateScales:
    """
    The moments of what rollouts hold: advantages, returns and observations, each measured once an update.

    :param reduce: Sums a float64 vector over all processes; it is called once an update, with all sums in one vector.
    """

    def __init__(self, reduce: Reduce = in_one_process) -> None:
        self.reduce = reduce
        # Rewards may be rare, and what is solved stays so for long: advantages are averaged over many rollouts. Returns grow
        # with skill, so theirs are averaged over fewer.
        self.advantages, self.returns = RunningMoments(horizon=128), RunningMoments(horizon=32)
        self.lr_scale = 1.0
        """Factor on the learning rate by the size of the last rollout's advantages, see :meth:`update`."""

    def update(self, advantages: th.Tensor, returns: th.Tensor, observations: Mapping[str, th.Tensor]) -> dict[str, Moments]:
        """
        Measure a rollout and take it into the running moments.

        ``lr_scale`` becomes ``min(1, std(A) / (usual / 2))``, where ``usual`` is the standard deviation of the advantages of
        all rollouts that count: Adam divides by the size of the gradient, so rollouts with small advantages would otherwise
        move the policy as far as any other.

        :param advantages: (T, N).
        :param returns: (T, N).
        :param observations: By name, (T * N, ...).
        :return: Moments of each of the observations, for their normalizers.
        """
        own = {"advantages": advantages.reshape(-1, 1), "returns": returns.reshape(-1, 1)}
        measured = self._measure({**own, **observations})
        now = measured.pop("advantages")
        self.advantages.update(now)
        self.returns.update(measured.pop("returns"))
        usual = self.advantages.std
        self.lr_scale = min(1.0, 2 * now.std.item() / usual) if usual > 0 else 1.0
        return measured

    def _measure(self, samples: Mapping[str, th.Tensor]) -> dict[str, Moments]:
        """:return: Moments of samples (n, ...), over all processes, by name."""
        flat = {name: sample.flatten(1).double() for name, sample in samples.items()}
        sums = []
        for sample in flat.values():
            count = sample.new_full((1,), len(sample))
            sums += [count, sample.sum(0), sample.square().sum(0)]
        reduced = self.reduce(th.cat(sums)).split([part.numel() for part in sums])
        triples = zip(reduced[::3], reduced[1::3], reduced[2::3], strict=True)
        return {
            name: Moments(count, total / count, squares / count)
            for name, (count, total, squares) in zip(flat, triples, strict=True)
        }
