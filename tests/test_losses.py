"""Losses on numbers computed by hand."""

import math

import pytest
import torch as th
from hypothesis import given
from hypothesis import strategies as st

from sb3_cyborg.memory_ppo import losses

finite = st.floats(-5, 5, width=32)


def test_normalized_advantages_by_hand() -> None:
    got = losses.normalize_advantages(th.tensor([[1.0, 2.0], [3.0, 4.0]]))
    std = math.sqrt(5 / 3)  # with n - 1, as in SB3
    assert got.tolist() == [pytest.approx([-1.5 / std, -0.5 / std]), pytest.approx([0.5 / std, 1.5 / std])]


def test_normalization_needs_two_samples() -> None:
    assert losses.normalize_advantages(th.tensor([5.0, 9.0])).tolist() == pytest.approx([-math.sqrt(0.5), math.sqrt(0.5)])
    with pytest.warns(UserWarning, match="degrees of freedom"):
        alone = losses.normalize_advantages(th.tensor([5.0]))
    assert alone.isnan().all()  # why MemoryPPO refuses minibatches of one


def test_equal_advantages_normalize_to_zero() -> None:
    assert losses.normalize_advantages(th.full((4,), 3.0)).tolist() == [0.0] * 4


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.0, 2.0, -2.0, -2.0),
        (1.1, 2.0, -2.2, -2.0),
        (1.5, 2.0, -2.4, 0.0),  # clipped: a good action is likely enough
        (0.5, 2.0, -1.0, -2.0),  # a good action became less likely: full gradient
        (0.5, -2.0, 1.6, 0.0),  # clipped: a bad action is unlikely enough
        (1.5, -2.0, 3.0, 2.0),  # a bad action became more likely: full gradient
        (1.5, 0.0, 0.0, 0.0),
    ],
)
def test_clipped_policy_loss_by_hand(ratio: float, advantage: float, loss: float, gradient: float) -> None:
    ratios = th.tensor([ratio], requires_grad=True)
    got = losses.clipped_policy_loss(ratios, th.tensor([advantage]), 0.2)
    assert got.item() == pytest.approx(loss)
    assert th.autograd.grad(got, ratios)[0].item() == pytest.approx(gradient)


def test_clipped_policy_loss_is_the_mean() -> None:
    ratio, advantages = th.tensor([[1.5, 0.5], [1.5, 1.0]]), th.tensor([[2.0, 2.0], [-2.0, 1.0]])
    assert losses.clipped_policy_loss(ratio, advantages, 0.2).item() == pytest.approx((-2.4 - 1 + 3 - 1) / 4)


@pytest.mark.parametrize(
    ("value", "old", "target", "clip", "loss", "gradient"),
    [
        (3.0, 0.0, 1.0, None, 4.0, 4.0),
        (0.5, 0.0, 2.0, 1.0, 2.25, -3.0),  # within the range nothing is clipped
        (3.0, 0.0, 5.0, 1.0, 16.0, 0.0),  # moved far enough towards the target
        (-3.0, 0.0, -5.0, 1.0, 16.0, 0.0),
        (3.0, 0.0, 1.0, 1.0, 4.0, 4.0),  # moved past the target: the unclipped loss is larger and pulls back
        (-3.0, 0.0, 1.0, 1.0, 16.0, -8.0),  # moved away from the target
        (10.0, 9.0, 8.0, 0.5, 4.0, 4.0),
    ],
)
def test_value_loss_by_hand(value: float, old: float, target: float, clip: float | None, loss: float, gradient: float) -> None:
    values = th.tensor([value], requires_grad=True)
    got = losses.value_loss(values, th.tensor([old]), th.tensor([target]), clip)
    assert got.item() == pytest.approx(loss)
    assert th.autograd.grad(got, values)[0].item() == pytest.approx(gradient)


@given(st.lists(st.tuples(finite, finite, finite), min_size=1, max_size=6), st.floats(0.0625, 2, width=32))
def test_clipping_never_lowers_the_value_loss(rows: list[tuple[float, float, float]], clip: float) -> None:
    values, old, returns = th.tensor(rows).unbind(1)
    clipped = old + (values - old).clamp(-clip, clip)
    want = sum(max((v - r) ** 2, (c - r) ** 2) for v, c, r in zip(values, clipped, returns, strict=True)) / len(rows)
    got = losses.value_loss(values, old, returns, clip)
    assert got.item() == pytest.approx(float(want), rel=1e-5)
    assert got >= losses.value_loss(values, old, returns)


def test_entropy_loss_by_hand() -> None:
    log_prob = th.tensor([-1.0, -3.0])
    assert losses.entropy_loss(th.tensor([0.5, 1.0]), log_prob).item() == -0.75
    assert losses.entropy_loss(None, log_prob).item() == -2.0  # -log p estimates the entropy


def test_approximate_kl_is_exact_for_an_exact_sample() -> None:
    old, new = [0.5, 0.25, 0.25], [0.2, 0.2, 0.6]
    sample = th.tensor([0, 0, 1, 2])  # with the frequencies of `old`
    log_ratio = (th.tensor(new) / th.tensor(old)).log()[sample]
    kl = sum(p * math.log(p / q) for p, q in zip(old, new, strict=True))
    assert losses.approximate_kl(log_ratio).item() == pytest.approx(kl, rel=1e-5)
    assert losses.approximate_kl(th.tensor([math.log(2.0)])).item() == pytest.approx(1 - math.log(2.0))
    assert losses.approximate_kl(th.zeros(3)).item() == 0


@given(st.lists(finite, min_size=1, max_size=5))
def test_approximate_kl_is_never_negative(log_ratio: list[float]) -> None:
    assert losses.approximate_kl(th.tensor(log_ratio, dtype=th.float64)).item() >= -1e-12
