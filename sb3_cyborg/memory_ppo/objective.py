"""The objective of an update: a weighted sum of loss terms, and the running moments for their normalization."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch as th
from stable_baselines3.common.distributions import Distribution

from sb3_cyborg.memory_ppo import losses
from sb3_cyborg.memory_ppo.normalization import Moments, RunningMoments
from sb3_cyborg.memory_ppo.ranks import Reduce, in_one_process


class Minibatch(NamedTuple):
    """Inputs of the loss terms: B sequences of L training steps. Tensors are (B, L) unless noted."""

    values: th.Tensor
    log_prob: th.Tensor
    entropy: th.Tensor | None
    """``None`` if it has no closed form."""
    ratio: th.Tensor
    """New over old probability of the actions."""
    old_values: th.Tensor
    returns: th.Tensor
    advantages: th.Tensor
    """Normalized if ``normalize_advantage`` is set."""
    value_scale: th.Tensor
    """Unit of the value loss: standard deviation of the returns, or 1; (1,)."""
    distribution: Callable[[], Distribution]
    """Creates the distribution of the actions, with B * L rows."""
    aux_loss: th.Tensor | None
    """Auxiliary loss of the memory, 0-d; ``None`` if it has none."""
    action_masks: th.Tensor | None = None
    """Legal actions, bool, (B * L, M), for the rows of the distribution; ``None`` if all are."""


class LossTerm(NamedTuple):
    """
    A weighted term of the objective.

    :param name: Name of the term; its value is logged as ``train/<name>``.
    :param weight: Weight in the sum.
    :param function: The loss of a minibatch, 0-d; ``None`` if the minibatch has no such loss.
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
    Create the loss terms of PPO with a memory. This is the list to extend with a new term.

    :param clip_range: Clip range of the ratio.
    :param clip_range_vf: Clip range of the value, in units of the return, or ``None``.
    :param ent_coef: Weight of the entropy.
    :param vf_coef: Weight of the value loss.
    :param memory_loss_coef: Weight of the memory's auxiliary loss.
    :param log_barrier_coef: Weight of the log barrier; 0 omits the term.
    :return: The terms, in the order of summation.
    """

    def value_loss(m: Minibatch) -> th.Tensor:
        # In units of `value_scale` before they are squared: the square of a return of 1e20 is no float32 number.
        scale = m.value_scale
        clip = None if clip_range_vf is None else clip_range_vf / scale
        return losses.value_loss(m.values / scale, m.old_values / scale, m.returns / scale, clip)

    terms = [
        LossTerm("policy_gradient_loss", 1.0, lambda m: losses.clipped_policy_loss(m.ratio, m.advantages, clip_range)),
        LossTerm("entropy_loss", ent_coef, lambda m: losses.entropy_loss(m.entropy, m.log_prob)),
        LossTerm("value_loss", vf_coef, value_loss),
        LossTerm("memory_loss", memory_loss_coef, lambda m: m.aux_loss),
    ]
    if log_barrier_coef:
        terms.append(
            LossTerm("log_barrier_loss", log_barrier_coef, lambda m: losses.log_barrier_loss(m.distribution(), m.action_masks))
        )
    return terms


def weighted_sum(terms: Sequence[LossTerm], minibatch: Minibatch) -> tuple[th.Tensor, dict[str, th.Tensor]]:
    """
    Weighted sum of the loss terms of a minibatch.

    :param terms: The terms.
    :param minibatch: The minibatch.
    :return: The loss, 0-d, attached to the graph, and the unweighted, detached value of each term by name.
    """
    loss, parts = minibatch.values.new_zeros(()), {}
    for term in terms:
        value = term.function(minibatch)
        if value is not None:
            loss = loss + term.weight * value
            parts[term.name] = value.detach()
    return loss, parts


class UpdateScales:
    """
    Moments of the advantages, returns and observations of rollouts, computed once per update.

    :param reduce: Sums a float64 vector over all processes. It is called once per update, with all sums in one vector.
    """

    def __init__(self, reduce: Reduce = in_one_process) -> None:
        self.reduce = reduce
        # Rewards may be rare, so advantages are averaged over many rollouts. Returns change as the policy improves, so they
        # are averaged over fewer.
        self.advantages, self.returns = RunningMoments(horizon=128), RunningMoments(horizon=32)
        self.lr_scale = 1.0
        """Factor on the learning rate for the last rollout, in (0, 1], see :meth:`update`."""

    def update(self, advantages: th.Tensor, returns: th.Tensor, observations: Mapping[str, th.Tensor]) -> dict[str, Moments]:
        """
        Compute the moments of a rollout and update the running moments.

        ``lr_scale`` becomes ``min(1, 2 std(A) / s)``, where ``std(A)`` is the standard deviation of the rollout's advantages
        and ``s`` the running one. Adam divides by the size of the gradient, so without the factor a rollout with small
        advantages would change the policy as much as any other.

        :param advantages: A, (T, N).
        :param returns: (T, N).
        :param observations: Unnormalized observations by the name of their normalizer, (T * N, ...).
        :return: Moments of the observations by the name of their normalizer.
        """
        own = {"advantages": advantages.reshape(-1, 1), "returns": returns.reshape(-1, 1)}
        measured = measure({**own, **observations}, self.reduce)
        current = measured.pop("advantages")
        self.advantages.update(current)
        self.returns.update(measured.pop("returns"))
        running_std = self.advantages.std
        self.lr_scale = min(1.0, 2 * current.std.item() / running_std) if running_std > 0 else 1.0
        return measured


def measure(samples: Mapping[str, th.Tensor], reduce: Reduce = in_one_process) -> dict[str, Moments]:
    """
    Compute moments with one reduction.

    :param samples: Samples by name, (n, ...).
    :param reduce: Sums a float64 vector over all processes.
    :return: Moments of the samples of all processes, by name.
    """
    flat = {name: sample.flatten(1).double() for name, sample in samples.items()}
    sums = []
    for sample in flat.values():
        count = sample.new_full((1,), len(sample))
        sums += [count, sample.sum(0), sample.square().sum(0)]
    reduced = reduce(th.cat(sums)).split([part.numel() for part in sums])
    triples = zip(reduced[::3], reduced[1::3], reduced[2::3], strict=True)
    return {
        name: Moments(count, total / count, squares / count)
        for name, (count, total, squares) in zip(flat, triples, strict=True)
    }
