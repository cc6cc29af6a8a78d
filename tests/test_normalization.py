"""Normalization of observations, returns and advantages."""

import math
from pathlib import Path

import pytest
import torch as th
from gymnasium.wrappers import TransformReward
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sb3_cyborg import MemoryPPO
from sb3_cyborg.memory_ppo import losses
from sb3_cyborg.memory_ppo.normalization import Moments, ObservationNormalizer, RunningMoments, ValueHead
from sb3_cyborg.memory_ppo.objective import measure
from tests.helpers import (
    OBSERVATION_SPACES,
    ToyEnv,
    assert_exact_ratios,
    record_updates,
    rollout,
    same,
    toy_model,
    toy_vec_env,
    weights,
)

NUMBERS = st.floats(-1e4, 1e4).map(lambda x: round(x, 3))


def measured(samples: th.Tensor) -> Moments:
    """:return: The moments of samples (n, ...), as an update measures them."""
    return measure({"samples": samples.view(len(samples), -1)})["samples"]


def test_moments_average_all_rollouts() -> None:
    moments, rollouts = RunningMoments(horizon=8), th.randn(5, 40).double() * 3 + 7
    for part in rollouts:
        moments.update(measured(part))
    assert moments.mean == pytest.approx(rollouts.mean().item())
    assert moments.std == pytest.approx(rollouts.std(correction=0).item())


def test_moments_are_exponential_beyond_the_horizon() -> None:
    moments = RunningMoments(horizon=8)
    for _ in range(20):
        moments.update(measured(th.tensor([100.0, 200.0])))
    for _ in range(100):
        moments.update(measured(th.tensor([-1.0, 1.0])))
    assert moments.mean == pytest.approx(0.0, abs=0.1)
    assert moments.std < 10


@settings(max_examples=50, deadline=None)
@given(means=st.lists(NUMBERS, min_size=1, max_size=5), scale=st.floats(0.0, 1e3))
def test_rescaling_preserves_values(means: list[float], scale: float) -> None:
    layer = nn.Linear(6, 1).double()
    head = ValueHead(layer)
    x = th.randn(9, 6, dtype=th.float64)
    before = head(x)
    th.testing.assert_close(before, layer(x))
    for mean in means:
        returns = RunningMoments(8, 1, mean, mean**2 + scale**2)
        head.rescale(returns)
        th.testing.assert_close(head(x), before, rtol=1e-9, atol=1e-6)
        assert head.mean.item() == pytest.approx(mean)
        assert head.scale.item() == pytest.approx(max(returns.std, ValueHead.LEAST_SCALE))


def test_least_std_bounds_the_amplification_of_advantages() -> None:
    advantages = th.tensor([1.0, -1.0, 3.0, 1.0]) * 1e-3
    assert losses.normalize_advantages(advantages).std() == pytest.approx(1, rel=1e-3)
    assert losses.normalize_advantages(advantages, least_std=1.0).std() == pytest.approx(advantages.std().item())
    assert losses.normalize_advantages(advantages * 1e6, least_std=1.0).std() == pytest.approx(1)


def test_a_rollout_with_small_advantages_hardly_changes_the_policy() -> None:
    """With rare rewards, normalization per rollout would amplify the noise of rollouts without a reward."""

    def distance(usual_std: float) -> float:
        # With SGD and a constant learning rate, the step size is proportional to the normalized advantages.
        model = toy_model(seed=0, scale_lr_by_advantage=False, policy_kwargs={"optimizer_class": th.optim.SGD})
        model.learn(36)
        model._scales.advantages = RunningMoments(128, 128, 0.0, usual_std**2)
        model.rollout_buffer.advantages.normal_(std=1e-3)
        before = [parameter.detach().clone() for parameter in model.policy.action_net.parameters()]
        model.train()
        after = model.policy.action_net.parameters()
        return math.sqrt(sum((a - b).square().sum().item() for a, b in zip(after, before, strict=True)))

    assert 0 < distance(usual_std=10.0) < 0.01 * distance(usual_std=1e-3)


@pytest.mark.parametrize(("std", "scale"), [(0.0, 0.0), (0.01, 0.02), (0.25, 0.5), (0.5, 1.0), (4.0, 1.0)])
def test_the_learning_rate_is_scaled_by_the_advantages(std: float, scale: float) -> None:
    model = toy_model(seed=0, learning_rate=1e-3)
    model.learn(36)
    model._scales.advantages = RunningMoments(10**6, 10**6, 0.0, 1.0)  # another rollout changes them by less than 1e-5
    advantages = model.rollout_buffer.advantages
    advantages.copy_(std * (1 - 2 * (th.arange(advantages.numel()) % 2)).view_as(advantages))
    for _ in range(2):  # each update scales the rate of the schedule
        model.train()
        assert model.logger.name_to_value["train/lr_scale"] == pytest.approx(scale, rel=1e-4)
        assert model.policy.optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 * scale, rel=1e-4)
        assert model.logger.name_to_value["train/learning_rate"] == pytest.approx(1e-3)


def test_scale_lr_by_advantage_can_be_disabled() -> None:
    model = toy_model(seed=0, learning_rate=1e-3, scale_lr_by_advantage=False)
    model.learn(36)
    model._scales.advantages = RunningMoments(10**6, 10**6, 0.0, 1e12)
    model.train()
    assert model.policy.optimizer.param_groups[0]["lr"] == pytest.approx(1e-3)
    assert "train/lr_scale" not in model.logger.name_to_value


def test_zero_advantages_do_not_scale_the_learning_rate() -> None:
    """The running standard deviation is 0, so there is no scale to compare with."""
    model = toy_model(seed=0, learning_rate=1e-3)
    model.learn(36)
    model._scales.advantages = RunningMoments(128)
    model.rollout_buffer.advantages.zero_()
    model.train()
    assert model.policy.optimizer.param_groups[0]["lr"] == pytest.approx(1e-3)


@pytest.mark.parametrize("reward_scale", [1e-3, 1.0, 1e3])
def test_the_value_loss_does_not_depend_on_the_reward_scale(reward_scale: float) -> None:
    env = toy_vec_env(make=lambda: TransformReward(ToyEnv(), lambda reward: reward_scale * float(reward)))
    model = toy_model(env, seed=0)
    model.learn(36 * 4)
    assert 0 < model.logger.name_to_value["train/value_loss"] < 10
    if reward_scale >= 1:
        assert model.policy.value_net.scale.item() == pytest.approx(model._scales.returns.std)


def test_without_normalize_value_the_scale_is_one() -> None:
    model = toy_model(seed=0, normalize_value=False)
    model.learn(72)
    assert model.policy.value_net.scale.item() == 1
    assert model.policy.value_net.mean.item() == 0


# --- observations -----------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(1, 20), min_size=1, max_size=5), scale=st.floats(0.1, 100), mean=st.floats(-100, 100))
def test_observations_are_normalized_by_the_moments_of_all_rollouts(sizes: list[int], scale: float, mean: float) -> None:
    normalizer = ObservationNormalizer(6).double()
    parts = [th.randn(size, 2, 3, dtype=th.float64) * scale + mean for size in sizes]
    for part in parts:
        normalizer.update(measured(part))
    seen = th.cat(parts)
    expected = (seen - seen.mean(0)) / (seen.var(0, correction=0) + 1e-8).sqrt()
    th.testing.assert_close(normalizer(seen), expected.clamp(-10, 10), rtol=1e-6, atol=1e-6)


def test_constant_features_are_clipped_at_ten() -> None:
    normalizer = ObservationNormalizer(2)
    th.testing.assert_close(normalizer(th.tensor([[0.3, -20.0]])), th.tensor([[0.3, -10.0]]))  # no rollout yet
    normalizer.update(measured(th.zeros(500, 2)))
    assert normalizer(th.tensor([[0.0, 0.0], [1.0, -1.0]])).tolist() == [[0, 0], [10, -10]]


@pytest.mark.parametrize("name", OBSERVATION_SPACES)
def test_all_observations_but_images_are_normalized(name: str) -> None:
    policy = "MultiInputPolicy" if name == "dict" else "MlpPolicy"
    env = toy_vec_env(make=lambda: ToyEnv(OBSERVATION_SPACES[name]))
    model = toy_model(env, policy)
    updates = record_updates(model)
    model.learn(4 * 36)
    assert_exact_ratios(updates, at_least=4)
    normalizers = model.policy.inputs.normalizers
    assert list(normalizers) == {"dict": ["number", "vector"], "image": []}.get(name, ["observation"])
    for part, normalizer in normalizers.items():
        assert isinstance(normalizer, ObservationNormalizer)
        assert normalizer.count == 4 * 36
        stored = model.rollout_buffer.observations
        last = stored[part] if isinstance(stored, dict) else stored
        if last.dtype == th.float32:  # uniform between -1 and 1
            th.testing.assert_close(normalizer.mean, th.zeros_like(normalizer.mean), atol=0.3, rtol=0)
            th.testing.assert_close(normalizer.var, th.full_like(normalizer.var, 1 / 3), atol=0.15, rtol=0)


def test_moments_change_only_between_rollouts() -> None:
    model = toy_model().learn(36)
    before = weights(model.policy.inputs.normalizers)
    rollout(model)
    assert same(before, weights(model.policy.inputs.normalizers))
    model.train()
    assert not same(before, weights(model.policy.inputs.normalizers))


def test_a_loaded_model_normalizes_as_the_saved_one(tmp_path: Path) -> None:
    model = toy_model().learn(72)
    model.save(tmp_path / "model")
    loaded = MemoryPPO.load(tmp_path / "model", device="cpu")
    assert same(weights(model.policy.inputs.normalizers), weights(loaded.policy.inputs.normalizers))


def test_normalization_can_be_disabled() -> None:
    model = toy_model(policy_kwargs={"normalize_observations": False}).learn(36)
    assert not model.policy.inputs.normalizers
    obs = th.tensor([[0.5, -0.25, 1.0]])
    th.testing.assert_close(model.policy.extract_features(obs), obs)


def test_the_heads_read_the_features_directly() -> None:
    policy = toy_model(use_last_action=True, policy_kwargs={"normalize_observations": False}).policy
    obs, state = th.tensor([[0.5, -0.25, 1.0]]), policy.get_initial_state(1)
    state["last_action"][0, 1] = 1.0
    latent, _ = policy._core_step(obs, state, th.zeros(1))
    assert latent[0, -6:].tolist() == [0.5, -0.25, 1.0, 0.0, 1.0, 0.0]
    assert latent.shape[1] == policy.core.output_dim == policy.lstm_output_dim
