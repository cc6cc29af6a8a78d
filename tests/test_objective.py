"""The objective: loss terms are weighted and named; moments of a rollout are computed by one reduction."""

import math

import pytest
import torch as th
from stable_baselines3.common.distributions import CategoricalDistribution

from sb3_cyborg.memory_ppo import losses
from sb3_cyborg.memory_ppo.objective import LossTerm, Minibatch, UpdateScales, measure, ppo_terms, weighted_sum


def make_minibatch(aux_loss: th.Tensor | None = None) -> Minibatch:
    generator = th.Generator().manual_seed(0)
    numbers = th.randn(7, 2, 5, generator=generator)
    logits = th.randn(10, 3, generator=generator)
    return Minibatch(
        values=numbers[0],
        log_prob=numbers[1],
        entropy=numbers[2].exp(),
        ratio=numbers[3].exp(),
        old_values=numbers[4],
        returns=numbers[5],
        advantages=numbers[6],
        value_scale=th.tensor([2.0]),
        distribution=lambda: CategoricalDistribution(3).proba_distribution(logits),
        aux_loss=aux_loss,
    )


def test_terms_equal_those_of_the_paper() -> None:
    m = make_minibatch(th.tensor(0.25))
    loss, parts = weighted_sum(ppo_terms(0.2, 0.3, 0.01, 0.5, 2.0, 0.03), m)
    want = {
        "policy_gradient_loss": losses.clipped_policy_loss(m.ratio, m.advantages, 0.2),
        "entropy_loss": losses.entropy_loss(m.entropy, m.log_prob),
        "value_loss": losses.value_loss(m.values, m.old_values, m.returns, 0.3) / 4,
        "memory_loss": th.tensor(0.25),
        "log_barrier_loss": losses.log_barrier_loss(m.distribution()),
    }
    assert parts.keys() == want.keys()
    for name, part in parts.items():
        th.testing.assert_close(part, want[name])
    weights = {
        "policy_gradient_loss": 1.0,
        "entropy_loss": 0.01,
        "value_loss": 0.5,
        "memory_loss": 2.0,
        "log_barrier_loss": 0.03,
    }
    th.testing.assert_close(loss, sum(weights[name] * part for name, part in want.items()))


def test_terms_that_do_not_apply_are_omitted() -> None:
    _, parts = weighted_sum(ppo_terms(0.2, None, 0.0, 0.5, 1.0, 0.0), make_minibatch())
    assert parts.keys() == {"policy_gradient_loss", "entropy_loss", "value_loss"}


def test_a_custom_term_is_added() -> None:
    m = make_minibatch()
    terms = ppo_terms(0.2, None, 0.0, 0.5, 1.0, 0.0)
    before, _ = weighted_sum(terms, m)
    loss, parts = weighted_sum([*terms, LossTerm("mean_value", 3.0, lambda m: m.values.mean())], m)
    th.testing.assert_close(loss, before + 3 * m.values.mean())
    th.testing.assert_close(parts["mean_value"], m.values.mean())


# --- scales -------------------------------------------------------------------------------------------------------------


def test_moments_of_two_processes_equal_those_of_all_samples() -> None:
    """The summed moments of two processes equal those of one process with all samples."""
    generator = th.Generator().manual_seed(0)
    halves = [
        (
            th.randn(6, 4, generator=generator) + rank,
            3 * th.randn(6, 4, generator=generator),
            {"observation": 100 + th.randn(24, 2, 3, generator=generator), "other": th.rand(24, 1, generator=generator)},
        )
        for rank in range(2)
    ]
    sent: list[list[th.Tensor]] = [[], []]
    for sums, half in zip(sent, halves, strict=True):

        def record(vector: th.Tensor, sums: list[th.Tensor] = sums) -> th.Tensor:
            sums.append(vector)
            return vector

        UpdateScales(reduce=record).update(*half)
    assert [len(sums) for sums in sent] == [1, 1], "one reduction an update"
    added = sent[0][0] + sent[1][0]
    ranks = [UpdateScales(reduce=lambda _: added) for _ in halves]
    observed = [scales.update(*half) for scales, half in zip(ranks, halves, strict=True)]
    one = UpdateScales()
    want = one.update(
        th.cat([half[0] for half in halves], 1),
        th.cat([half[1] for half in halves], 1),
        {name: th.cat([half[2][name] for half in halves]) for name in ("observation", "other")},
    )
    for scales, seen in zip(ranks, observed, strict=True):
        assert scales.lr_scale == pytest.approx(one.lr_scale, abs=1e-12)
        assert scales.advantages.std == pytest.approx(one.advantages.std, abs=1e-12)
        assert scales.returns.mean == pytest.approx(one.returns.mean, abs=1e-12)
        assert seen.keys() == want.keys()
        for name, moments in seen.items():
            th.testing.assert_close(moments.mean, want[name].mean, rtol=0, atol=1e-9)
            th.testing.assert_close(moments.var, want[name].var, rtol=0, atol=1e-9)


def test_moments_are_those_of_the_samples() -> None:
    samples = th.randn(1000, 3) * th.tensor([1e-3, 1.0, 1e3]) + th.tensor([0.0, 50.0, -1e4])
    measured = measure({"samples": samples})["samples"]
    exact = samples.double()
    th.testing.assert_close(measured.mean, exact.mean(0), rtol=1e-9, atol=1e-12)
    th.testing.assert_close(measured.std, exact.std(0, correction=0), rtol=1e-6, atol=1e-12)
    assert measured.count.item() == 1000


def test_the_learning_rate_scale_uses_the_running_std() -> None:
    scales, returns = UpdateScales(), th.zeros(4, 2)
    base = th.tensor([[1.0, -1.0]] * 4)
    scales.update(base, returns, {})
    assert scales.lr_scale == 1.0
    scales.update(0.1 * base, returns, {})
    usual = math.sqrt((1 + 0.01) / 2)
    assert scales.lr_scale == pytest.approx(2 * 0.1 / usual)
