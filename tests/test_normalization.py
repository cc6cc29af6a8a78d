"""Scales of returns and advantages."""

import math

import pytest
import torch as th
from gymnasium.wrappers import TransformReward
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sb3_cyborg.memory_ppo import losses
from sb3_cyborg.memory_ppo.normalization import RunningMoments, ValueHead
from tests.toys import ToyEnv, toy_model, toy_vec_env

NUMBERS = st.floats(-1e4, 1e4).map(lambda x: round(x, 3))


def test_moments_are_those_of_all_rollouts() -> None:
    moments, rollouts = RunningMoments(horizon=8), th.randn(5, 40).double() * 3 + 7
    for rollout in rollouts:
        moments.update(rollout)
    assert moments.mean == pytest.approx(rollouts.mean().item())
    assert moments.std == pytest.approx(rollouts.std(correction=0).item())


def test_moments_forget() -> None:
    moments = RunningMoments(horizon=8)
    for _ in range(20):
        moments.update(th.tensor([100.0, 200.0]))
    for _ in range(100):
        moments.update(th.tensor([-1.0, 1.0]))
    assert moments.mean == pytest.approx(0.0, abs=0.1)
    assert moments.std < 10


@settings(max_examples=50, deadline=None)
@given(means=st.lists(NUMBERS, min_size=1, max_size=5), scale=st.floats(0.0, 1e3))
def test_values_stay_what_they_are_while_the_scale_moves(means: list[float], scale: float) -> None:
    layer = nn.Linear(6, 1).double()
    head = ValueHead(layer)
    x = th.randn(9, 6, dtype=th.float64)
    before = head(x)
    th.testing.assert_close(before, layer(x))
    for mean in means:
        returns = RunningMoments(8, 1, mean, mean**2 + scale**2)
        head.follow(returns)
        th.testing.assert_close(head(x), before, rtol=1e-9, atol=1e-6)
        assert head.mean.item() == pytest.approx(mean)
        assert head.scale.item() == pytest.approx(max(returns.std, ValueHead.LEAST_SCALE))


def test_what_is_smaller_than_usual_stays_smaller() -> None:
    advantages = th.tensor([1.0, -1.0, 3.0, 1.0]) * 1e-3
    assert losses.normalize_advantages(advantages).std() == pytest.approx(1, rel=1e-3)
    assert losses.normalize_advantages(advantages, least_std=1.0).std() == pytest.approx(advantages.std().item())
    assert losses.normalize_advantages(advantages * 1e6, least_std=1.0).std() == pytest.approx(1)


def test_after_a_rollout_of_noise_the_policy_is_what_it_was() -> None:
    """Rewards that come in some rollouts only: without the memory of the scale, the others would undo what was learned."""

    def distance(usual_std: float) -> float:
        model = toy_model(seed=0, policy_kwargs={"optimizer_class": th.optim.SGD})  # whose steps are as large as the gradient
        model.learn(36)
        model._advantage_moments = RunningMoments(128, 128, 0.0, usual_std**2)
        model.rollout_buffer.advantages.normal_(std=1e-3)
        before = [parameter.detach().clone() for parameter in model.policy.action_net.parameters()]
        model.train()
        after = model.policy.action_net.parameters()
        return math.sqrt(sum((a - b).square().sum().item() for a, b in zip(after, before, strict=True)))

    assert 0 < distance(usual_std=10.0) < 0.01 * distance(usual_std=1e-3)


@pytest.mark.parametrize("reward_scale", [1e-3, 1.0, 1e3])
def test_the_value_loss_is_of_one_size(reward_scale: float) -> None:
    env = toy_vec_env(make=lambda: TransformReward(ToyEnv(), lambda reward: reward_scale * float(reward)))
    model = toy_model(env, seed=0)
    model.learn(36 * 4)
    assert 0 < model.logger.name_to_value["train/value_loss"] < 10
    if reward_scale >= 1:
        assert model.policy.value_net.scale.item() == pytest.approx(model._return_moments.std)


def test_without_it_the_scale_stays_one() -> None:
    model = toy_model(seed=0, normalize_value=False)
    model.learn(72)
    assert model.policy.value_net.scale.item() == 1
    assert model.policy.value_net.mean.item() == 0
