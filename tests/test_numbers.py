"""Huge numbers, diverged updates, and values of a wrong shape or dtype from environments."""

import copy
import pickle
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvStepReturn

from sb3_cyborg import MemoryPPO
from sb3_cyborg.memory_ppo.normalization import ObservationNormalizer
from sb3_cyborg.memory_ppo.objective import measure
from sb3_cyborg.sequence_model import select_only
from tests.helpers import (
    ACTION_SPACES,
    OBSERVATION_SPACES,
    VECTOR,
    ToyEnv,
    assert_exact_ratios,
    predict,
    record_updates,
    rollout,
    same,
    toy_model,
    toy_vec_env,
    weights,
)

WIDE = spaces.Box(-3e38, 3e38, (3,))


def all_finite(model: MemoryPPO) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in weights(model.policy).values())


class HugeEnv(ToyEnv):
    """Normal observations and rewards times a factor, from the first step on or at one step."""

    def __init__(self, obs: float = 1.0, reward: float = 1.0, at: int | None = None, space: spaces.Space[Any] = WIDE) -> None:
        super().__init__(space)
        self.factors, self.at, self.steps = (obs, reward), at, 0

    def observation(self) -> np.ndarray:
        factor = self.factors[0] if self.at in (None, self.steps) else 1.0
        return (self.np_random.normal(size=3) * factor).clip(-3e38, 3e38).astype(np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return self.observation(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        _, reward, *ends = super().step(action)
        self.steps += 1
        return self.observation(), reward * self.factors[1], *ends  # type: ignore[return-value]  # mypy loses their types


# --- huge numbers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("at", [None, 20])
@pytest.mark.parametrize("obs", [1e10, 1e19, 1e30, 3e37])
def test_huge_observations_are_survived(obs: float, at: int | None, normalize: bool) -> None:
    env = toy_vec_env(3, lambda: HugeEnv(obs=obs, at=at))
    model = toy_model(env, policy_kwargs={"normalize_observations": normalize})
    updates = record_updates(model)
    model.learn(5 * 36)
    assert_exact_ratios(updates, 5)
    assert all_finite(model)


def test_a_box_of_the_largest_numbers_is_survived() -> None:
    model = toy_model(toy_vec_env(3, lambda: ToyEnv(WIDE))).learn(5 * 36)
    assert all_finite(model)


@pytest.mark.parametrize("normalize_value", [True, False])
@pytest.mark.parametrize("reward", [1e10, 1e17, 1e18])
def test_huge_rewards_are_survived(reward: float, normalize_value: bool) -> None:
    model = toy_model(toy_vec_env(3, lambda: HugeEnv(reward=reward)), normalize_value=normalize_value)
    updates = record_updates(model)
    model.learn(5 * 36)
    assert all_finite(model)
    assert all(np.isfinite(update["train/loss"]) for update in updates)


@pytest.mark.parametrize("reward", [1e25, 1e30])
def test_rewards_whose_square_overflows_are_survived_with_normalized_values(reward: float) -> None:
    model = toy_model(toy_vec_env(3, lambda: HugeEnv(reward=reward))).learn(5 * 36)
    assert all_finite(model)


@pytest.mark.parametrize("reward", [3e37, 1e38])
def test_rewards_that_overflow_are_an_error_and_change_no_weights(reward: float) -> None:
    model = toy_model(toy_vec_env(3, HugeEnv)).learn(36)
    model.set_env(toy_vec_env(3, lambda: HugeEnv(reward=reward)))
    with pytest.raises(ValueError, match=r"overflow float32|not finite"):
        model.learn(20 * 36, reset_num_timesteps=False)
    assert all_finite(model)


def moments(*samples: th.Tensor) -> ObservationNormalizer:
    """:return: A normalizer after rollouts of these observations, (n, D)."""
    normalizer = ObservationNormalizer(samples[0].shape[1])
    for sample in samples:
        clipped = ObservationNormalizer.without_outliers(sample)
        normalizer.update(measure({"x": clipped})["x"])
    return normalizer


@pytest.mark.parametrize("outlier", [1e4, 1e10, 1e30])
@pytest.mark.parametrize("first", [True, False])
def test_normalization_recovers_from_an_outlier(outlier: float, first: bool) -> None:
    """SB3's running moments, those of ``VecNormalize``, map all usual observations to 0 for the rest of training."""
    th.manual_seed(0)
    rollouts = [th.randn(2048, 3) for _ in range(4)]
    clean = moments(*rollouts)
    rollouts[0 if first else -1][7] = outlier
    robust = moments(*rollouts)
    usual = th.randn(100, 3)
    assert robust(usual).std() / clean(usual).std() > 0.4
    later = [th.randn(2048, 3) for _ in range(40)]
    assert moments(*rollouts, *later)(usual).std() / clean(usual).std() > 0.85
    assert robust(th.full((1, 3), outlier)).tolist() == [[10.0] * 3]
    theirs = RunningMeanStd(shape=(3,))
    for part in rollouts:
        theirs.update(part.numpy().astype(np.float64))
    if outlier > 1e4:
        assert np.abs(usual.numpy() / np.sqrt(theirs.var)).max() < 1e-3


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e6, 1e30, 3e37])
def test_features_of_any_scale_are_normalized(scale: float) -> None:
    th.manual_seed(0)
    sample = th.randn(2048, 3) * scale
    normalized = moments(sample)(sample)
    assert normalized.isfinite().all()
    if scale >= 1:
        assert normalized.std().item() == pytest.approx(1, abs=0.05)


def test_ordinary_and_rare_observations_are_not_clipped_for_the_moments() -> None:
    rare = th.zeros(2048, 2)
    rare[5] = th.tensor([1.0, -99.0])
    for sample in (rare, th.randn(2048, 2) * 1e5, th.rand(36, 2) * 90, th.full((3, 2), 1e20)):
        th.testing.assert_close(ObservationNormalizer.without_outliers(sample), sample.double(), rtol=0, atol=0)


# --- updates that diverge -----------------------------------------------------------------------------------------------


def broken_loss(model: MemoryPPO, value: float, call: int) -> None:
    """Make the loss of one minibatch an inf or NaN."""
    real, calls = model._minibatch_loss, [0]

    def faulty(*args: Any) -> th.Tensor:
        calls[0] += 1
        return real(*args) * (value if calls[0] == call else 1.0)

    setattr(model, "_minibatch_loss", faulty)  # noqa: B010


@pytest.mark.parametrize("branching", [True, False])
@pytest.mark.parametrize("call", [1, 3, 6])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_update_that_diverges_is_undone(value: float, call: int, branching: bool) -> None:
    """In the select-only form, which a GPU uses, nothing looks at values before the end of the update."""
    model = rollout(toy_model().learn(2 * 36))
    before = weights(model.policy)
    optimizer, scales = copy.deepcopy((model.policy.optimizer.state_dict(), vars(model._scales)))
    broken_loss(model, value, call)
    message = r"(Gradients|Weights) are not finite: training has diverged. The update is undone"
    with pytest.raises(ValueError, match=message), nullcontext() if branching else select_only():
        model.train()
    assert same(before, weights(model.policy))
    for index, entries in optimizer["state"].items():
        assert same(entries, model.policy.optimizer.state_dict()["state"][index])
    assert scales["advantages"] == model._scales.advantages
    model.train()  # the next update is none of those that were broken
    assert all_finite(model)
    assert not same(before, weights(model.policy))


@pytest.mark.parametrize("actions", ["discrete", "box"])
def test_learn_never_returns_weights_that_are_not_finite(actions: str) -> None:
    """A learning rate of 1e38 makes weights of 1e38, whose products overflow."""
    model = toy_model(toy_vec_env(3, lambda: ToyEnv(action_space=ACTION_SPACES[actions])), learning_rate=1e38)
    with pytest.raises(ValueError, match="training has diverged"):
        model.learn(10 * 36)
    assert all_finite(model)


def test_gradients_whose_norm_overflows_are_no_divergence() -> None:
    """As in SB3, they are clipped to 0."""
    model = rollout(toy_model())
    parameter = next(model.policy.parameters())
    model._step((parameter * 1e30).sum(), list(model.policy.parameters()))
    assert all_finite(model)


# --- values of environments -----------------------------------------------------------------------------------------------


class WrongVecEnv(DummyVecEnv):
    """Vectorized environments that return other values in the sixth step."""

    def __init__(self, space: spaces.Space[Any], change: Callable[[Any], Any]) -> None:
        super().__init__([lambda: ToyEnv(space)] * 3)
        self.change, self.steps = change, 0

    def step_wait(self) -> VecEnvStepReturn:
        self.steps += 1
        result: Any = super().step_wait()
        return self.change(result) if self.steps == 6 else result  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda r: (r[0], r[1][:1], *r[2:]), "Rewards of the environments after 18 steps have shape (1,), but 3 environments"),
        (lambda r: (r[0], r[1][:, None], *r[2:]), "Rewards of the environments after 18 steps have shape (3, 1)"),
        (lambda r: (r[0], np.array([1, None, 2]), *r[2:]), "must be numbers, got None of environment 1"),
        (lambda r: (r[0], np.array(["1"] * 3), *r[2:]), "must be numbers"),
        (lambda r: (*r[:2], r[2][:2], r[3]), "Dones of the environments after 18 steps have shape (2,)"),
        (lambda r: (*r[:2], np.array(["no"] * 3), r[3]), "must be True or False, got"),
        (lambda r: (*r[:3], r[3][:2]), "must be 3 dictionaries, got 2"),
        (lambda r: (r[0][:2], *r[1:]), "has shape (2, 3), but 3 environments with Box"),
        (lambda r: (r[0][:, :2], *r[1:]), "has shape (3, 2), but 3 environments with Box"),
        (lambda r: (r[0].astype(object), *r[1:]), "has dtype object, but Box"),
        (lambda r: (r[0].tolist(), *r[1:]), "must be an array of shape (3, 3), got list"),
    ],
)
def test_values_of_a_wrong_form_name_the_environment(change: Callable[[Any], Any], said: str) -> None:
    model = toy_model(WrongVecEnv(VECTOR, change))
    before = weights(model.policy)
    with pytest.raises(ValueError, match="environment") as error:
        model.learn(36)
    assert said in str(error.value)
    assert same(before, weights(model.policy))


BYTES = spaces.Box(0, 255, (3,), np.uint8)


@pytest.mark.parametrize(("space", "value"), [(BYTES, 300.0), (BYTES, -1.0), (BYTES, 0.5), (spaces.Discrete(5), 5)])
def test_numbers_that_the_declared_dtype_cannot_hold_name_the_environment(space: spaces.Space[Any], value: float) -> None:
    def change(result: Any) -> Any:
        obs = result[0].astype(np.float64 if isinstance(space, spaces.Box) else np.int64)
        obs[1] = value
        return obs, *result[1:]

    with pytest.raises(ValueError, match=rf"Observation of environment 1 after 18 steps .*{value}"):
        toy_model(WrongVecEnv(space, change)).learn(36)


def test_whole_floats_for_a_declared_integer_are_accepted() -> None:
    model = toy_model(WrongVecEnv(BYTES, lambda r: (r[0].astype(np.float64), *r[1:])))
    assert all_finite(model.learn(36))


class WrongEnv(ToyEnv):
    """Returns other values in the third step."""

    def __init__(self, change: dict[str, Any], space: spaces.Space[Any] = VECTOR) -> None:
        super().__init__(space, mean_length=10**9)
        self.change, self.steps = change, 0

    def step(self, action: Any) -> Any:
        self.steps += 1
        names = ("obs", "reward", "terminated", "truncated", "info")
        values = dict(zip(names, super().step(action), strict=True))
        return tuple((values | self.change if self.steps == 3 else values).values())


@pytest.mark.parametrize("vectorized", ["", "dummy", "monitor"])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"obs": np.zeros(1, np.float32)}, "an observation of shape (1,), but Box"),
        ({"obs": 0.0}, "an observation of shape (), but Box"),
        ({"obs": np.array(["a", "b", "c"])}, "has dtype <U1"),
        ({"reward": None}, "a number as reward, got None"),
        ({"reward": np.zeros(3)}, "a number as reward"),
        ({"terminated": "no"}, "True or False as terminated, got 'no'"),
        ({"truncated": None}, "True or False as truncated, got None"),
        ({"info": None}, "a dictionary as info, got None"),
        ({"more": 1}, "must return (observation, reward, terminated, truncated, info)"),
    ],
)
def test_each_environment_of_a_dummy_vec_env_is_checked(change: dict[str, Any], said: str, vectorized: str) -> None:
    """A ``DummyVecEnv`` broadcasts the observations of the first cases, and takes "no" for the end of an episode."""

    def make() -> gym.Env[Any, Any]:
        return Monitor(WrongEnv(change)) if vectorized == "monitor" else WrongEnv(change)

    makers: list[Callable[[], gym.Env[Any, Any]]] = [ToyEnv, make]
    env: Any = DummyVecEnv(makers) if vectorized else make()
    with pytest.raises(ValueError, match=f"`step` of environment {int(bool(vectorized))} ") as error:
        toy_model(env).learn(36)
    assert said in str(error.value)


def test_a_checked_environment_is_the_same_object_and_can_be_copied_and_used_again() -> None:
    env = DummyVecEnv([lambda: Monitor(ToyEnv())] * 2)
    first = env.envs[0]
    toy_model(env).learn(24)
    model = toy_model(env)
    assert env.envs[0] is first
    assert isinstance(first, Monitor)
    inner: Any = first.env
    other = copy.deepcopy(inner)
    other.step(0)
    assert len(other.actions) == len(inner.actions) + 1
    assert pickle.loads(pickle.dumps(inner)).actions == inner.actions
    assert not hasattr(inner.step.__func__.__closure__, "__wrapped__")
    model.learn(24)


def test_environments_in_processes_are_checked_where_their_values_arrive() -> None:
    env = SubprocVecEnv([lambda: WrongEnv({"reward": None})] * 2, start_method="fork")
    try:
        with pytest.raises(ValueError, match="Rewards of the environments after 6 steps must be numbers, got None"):
            toy_model(env).learn(24)
    finally:
        env.close()


@pytest.mark.parametrize(
    ("space", "obs", "said"),
    [
        ("box", np.array(["a"] * 3), "must hold numbers, got <U1"),
        ("box", np.zeros(3, object), "must hold numbers, got object"),
        ("box", np.zeros((0, 3)), r"got float64 of shape \(0, 3\)"),
        ("box", {"a": 1}, r"got a dictionary with \['a'\]"),
        ("discrete", 5, r"is not in Discrete\(5\)"),
        ("discrete", np.array([1, -1]), r"is not in Discrete\(5\)"),
        ("multi_discrete", np.array([3, 0]), "is not in MultiDiscrete"),
        ("dict", np.zeros(3), "must give a dictionary with"),
    ],
)
def test_observations_of_predict_are_checked(space: str, obs: Any, said: str) -> None:
    model = toy_model(ToyEnv(OBSERVATION_SPACES[space]), "MultiInputPolicy" if space == "dict" else "MlpPolicy")
    with pytest.raises(ValueError, match=said):
        predict(model, obs)


def test_huge_observations_raise_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        toy_model(toy_vec_env(3, lambda: HugeEnv(obs=1e30, reward=1e30))).learn(3 * 36)
