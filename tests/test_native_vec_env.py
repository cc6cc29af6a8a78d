"""The native vectorized environments equal the single ones in a DummyVecEnv with Monitors, step for step."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3 import PPO
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecMonitor, VecNormalize

from sb3_cyborg.envs.memory_chain import MemoryChainEnv, MemoryChainVecEnv
from sb3_cyborg.envs.native_vec_env import NativeVecEnv
from sb3_cyborg.envs.t_maze import TMazeEnv, TMazeVecEnv

NATIVE: dict[type[gym.Env[Any, Any]], Callable[..., NativeVecEnv]] = {MemoryChainEnv: MemoryChainVecEnv, TMazeEnv: TMazeVecEnv}

chains = st.tuples(
    st.just(MemoryChainEnv), st.fixed_dictionaries({"memory_length": st.integers(1, 12), "num_bits": st.integers(1, 4)})
)
mazes = st.tuples(
    st.just(TMazeEnv),
    st.fixed_dictionaries({"active": st.booleans(), "corridor_length": st.integers(1, 10)})
    .flatmap(
        lambda kwargs: st.sampled_from(
            [
                kwargs,
                kwargs | {"penalty": 0.0},
                kwargs | {"ambiguous_position": False},
                kwargs | {"ambiguous_position": False, "expose_goal": True},
            ]
        )
    ),
)  # fmt: skip
both = pytest.mark.parametrize("env_class", list(NATIVE))


def dummy(env_class: Callable[..., gym.Env[Any, Any]], num_envs: int, **kwargs: Any) -> DummyVecEnv:
    """:return: The environments as SB3 creates them: one object per environment, each in a Monitor."""
    return DummyVecEnv([lambda: Monitor(env_class(**kwargs)) for _ in range(num_envs)])


def random_actions(rng: np.random.Generator, env: VecEnv) -> np.ndarray:
    """:return: Random actions, mostly to the right, so that episodes of mazes reach the end of the corridor."""
    assert isinstance(env.action_space, gym.spaces.Discrete)
    actions = rng.integers(env.action_space.n, size=env.num_envs)
    return np.where(rng.random(env.num_envs) < 0.5, 0, actions)


def assert_same_info(native: dict[str, Any], single: dict[str, Any]) -> None:
    assert native.keys() == single.keys()
    for key, value in single.items():
        if key == "episode":
            assert native[key].keys() == value.keys()
            assert (native[key]["r"], native[key]["l"]) == (value["r"], value["l"])
            assert native[key]["t"] >= 0
        else:
            np.testing.assert_array_equal(native[key], value)
            assert type(native[key]) is type(value)
            assert getattr(native[key], "dtype", None) == getattr(value, "dtype", None)


def assert_same_steps(native: VecEnv, single: VecEnv, steps: int, rng: np.random.Generator) -> int:
    """:return: The number of finished episodes."""
    episodes = 0
    for _ in range(steps):
        actions = random_actions(rng, native)
        ours, theirs = native.step(actions), single.step(actions)
        for array, expected in zip(ours[:3], theirs[:3], strict=True):
            assert isinstance(array, np.ndarray)
            assert isinstance(expected, np.ndarray)
            assert array.dtype == expected.dtype
            np.testing.assert_array_equal(array, expected)
        for info, expected_info in zip(ours[3], theirs[3], strict=True):
            assert_same_info(info, expected_info)
        assert native.reset_infos == single.reset_infos
        episodes += int(ours[2].sum())
    return episodes


# --- equality with single environments ----------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(case=chains | mazes, num_envs=st.integers(1, 5), seed=st.integers(0, 2**31), early=st.integers(0, 20))
def test_native_is_dummy_vec_env(case: Any, num_envs: int, seed: int, early: int) -> None:
    env_class, kwargs = case
    native, single = NATIVE[env_class](num_envs, seed=seed, **kwargs), dummy(env_class, num_envs, **kwargs)
    single.seed(seed)
    rng = np.random.default_rng(seed)
    np.testing.assert_array_equal(native.reset(), single.reset())
    assert_same_steps(native, single, early, rng)
    # A reset in the middle of an episode continues the random stream.
    np.testing.assert_array_equal(native.reset(), single.reset())
    assert_same_steps(native, single, 60, rng)
    # A new seed has an effect at the next reset.
    assert list(native.seed(seed + 1)) == list(single.seed(seed + 1))
    assert_same_steps(native, single, 5, rng)
    np.testing.assert_array_equal(native.reset(), single.reset())
    assert_same_steps(native, single, 30, rng)


@pytest.mark.parametrize(
    ("env_class", "kwargs"),
    [
        (MemoryChainEnv, {"memory_length": 10, "num_bits": 3}),
        (TMazeEnv, {"corridor_length": 10}),
        (TMazeEnv, {"corridor_length": 7, "active": True}),
    ],
)
def test_thousands_of_steps(env_class: type[gym.Env[Any, Any]], kwargs: dict[str, Any]) -> None:
    native, single = NATIVE[env_class](8, seed=3, **kwargs), dummy(env_class, 8, **kwargs)
    single.seed(3)
    np.testing.assert_array_equal(native.reset(), single.reset())
    assert assert_same_steps(native, single, 3000, np.random.default_rng(0)) > 2000


@both
def test_environment_i_is_the_single_one_under_seed_plus_i(env_class: type[gym.Env[Any, Any]]) -> None:
    native = NATIVE[env_class](4, seed=10)
    seen: list[list[np.ndarray]] = [[] for _ in range(4)]
    obs = native.reset()
    for _ in range(200):
        for i, row in enumerate(np.asarray(obs)):
            seen[i].append(row)
        obs, _, _, _ = native.step(np.zeros(4, dtype=np.int64))
    env = env_class()
    row, _ = env.reset(seed=12)
    for expected in seen[2]:
        np.testing.assert_array_equal(expected, row)
        row, _, terminated, _, _ = env.step(0)
        if terminated:
            row, _ = env.reset()
    assert not np.array_equal(seen[2], seen[1])


@both
def test_without_a_seed_every_environment_is_random(env_class: type[gym.Env[Any, Any]]) -> None:
    def first_observations() -> np.ndarray:
        return np.asarray(NATIVE[env_class](64, **({"num_bits": 8} if env_class is MemoryChainEnv else {})).reset())

    assert not np.array_equal(first_observations(), first_observations())
    assert len(np.unique(first_observations(), axis=0)) > 1


# --- infos and arrays belong to the caller ------------------------------------------------------------------------------


@both
def test_callers_may_write_to_what_a_step_returns(env_class: type[gym.Env[Any, Any]]) -> None:
    """Callbacks, VecNormalize and VecMonitor write to infos, and buffers keep them."""
    clean, written = NATIVE[env_class](3, seed=0), NATIVE[env_class](3, seed=0)
    clean.reset(), written.reset()
    for _ in range(40):
        expected = clean.step(np.zeros(3, dtype=np.int64))
        obs, rewards, dones, infos = written.step(np.zeros(3, dtype=np.int64))
        np.testing.assert_array_equal(expected[0], obs)
        np.testing.assert_array_equal(expected[1], rewards)
        np.testing.assert_array_equal(expected[2], dones)
        for info, expected_info in zip(infos, expected[3], strict=True):
            assert_same_info(info, expected_info)
        assert len({id(info) for info in infos}) == 3
        if dones[0]:
            infos[0]["terminal_observation"][:] = 7
            assert 7 not in infos[1]["terminal_observation"]
            assert 7 not in np.asarray(obs)
        for array in (obs, rewards, dones):
            assert isinstance(array, np.ndarray)
            array[...] = 1
        for info in infos[:2]:
            info["mine"] = True
        written.reset_infos[0]["mine"] = True
        assert "mine" not in infos[2]
        assert "mine" not in written.reset_infos[1]


@both
def test_vec_normalize_and_ppo_take_it(env_class: type[gym.Env[Any, Any]]) -> None:
    env = VecNormalize(NATIVE[env_class](4))
    model = PPO("MlpPolicy", env, n_steps=32, batch_size=32, n_epochs=1, seed=1, device="cpu").learn(256)
    assert model.ep_info_buffer is not None
    assert len(model.ep_info_buffer) > 0
    assert model.ep_success_buffer is not None
    assert len(model.ep_success_buffer) > 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # e.g. that there is no Monitor
        returns, lengths = evaluate_policy(model, NATIVE[env_class](2, seed=0), n_eval_episodes=4, return_episode_rewards=True)
    assert lengths == [11] * 4
    assert len(returns) == 4  # type: ignore[arg-type]  # SB3's type does not follow return_episode_rewards


@both
def test_same_seed_same_training(env_class: type[gym.Env[Any, Any]]) -> None:
    def trained(env: VecEnv) -> np.ndarray:
        model = PPO("MlpPolicy", env, n_steps=24, batch_size=24, n_epochs=1, seed=5, device="cpu").learn(96)
        return np.concatenate([p.detach().numpy().ravel() for p in model.policy.parameters()])

    np.testing.assert_array_equal(trained(NATIVE[env_class](2)), trained(dummy(env_class, 2)))


# --- the rest of SB3's interface ----------------------------------------------------------------------------------------


def test_attributes_and_methods_read_each_environment() -> None:
    native, single = (
        TMazeVecEnv(3, seed=1, active=True, corridor_length=2, render_mode="rgb_array"),
        dummy(TMazeEnv, 3, active=True, corridor_length=2, render_mode="rgb_array"),
    )
    single.seed(1)
    assert native.get_attr("corridor_length", [0, 2]) == [2, 2]
    assert native.render_mode == single.render_mode == "rgb_array"
    assert native.metadata == single.metadata
    native.reset(), single.reset()
    rng = np.random.default_rng(0)
    for _ in range(12):
        actions = random_actions(rng, native)
        native.step(actions), single.step(actions)
        for name in ("x", "y", "goal", "oracle_visited", "timestep", "corridor_length"):
            assert native.get_attr(name) == single.get_attr(name)
            assert native.get_attr(name, 1) == single.get_attr(name, 1)
        np.testing.assert_array_equal(np.stack(native.env_method("render")), np.stack(single.env_method("render")))
        np.testing.assert_array_equal(native.render(), single.render())
        assert native.env_method("get_wrapper_attr", "x", indices=[2]) == single.get_attr("x", [2])
    assert native.has_attr("goal")
    assert not native.has_attr("gaol")
    native.close()


def test_reading_changes_nothing() -> None:
    read, unread = (MemoryChainVecEnv(3, seed=1, num_bits=2, memory_length=3) for _ in range(2))
    np.testing.assert_array_equal(read.reset(), unread.reset())
    for _ in range(12):
        contexts = read.get_attr("context")
        contexts[0][:] = 7
        assert read.get_attr("np_random", 1)[0] is not read.get_attr("np_random", 2)[0]
        np.testing.assert_array_equal(read.step(np.ones(3, dtype=np.int64))[0], unread.step(np.ones(3, dtype=np.int64))[0])


@both
def test_a_copy_goes_on_alike(env_class: type[gym.Env[Any, Any]]) -> None:
    env = NATIVE[env_class](3, seed=4)
    env.reset()
    env.step(np.zeros(3, dtype=np.int64))
    twin = copy.deepcopy(env)
    for _ in range(30):
        np.testing.assert_array_equal(env.step(np.zeros(3, dtype=np.int64))[0], twin.step(np.zeros(3, dtype=np.int64))[0])


@both
def test_it_counts_as_monitored(env_class: type[gym.Env[Any, Any]]) -> None:
    env = NATIVE[env_class](2)
    assert env.env_is_wrapped(Monitor) == [True, True]
    assert env.env_is_wrapped(gym.wrappers.TimeLimit, indices=1) == [False]
    with pytest.warns(UserWarning, match="already wrapped with a `Monitor`"):
        VecMonitor(env)


@both
def test_options_are_used_up(env_class: type[gym.Env[Any, Any]]) -> None:
    env = NATIVE[env_class](2)
    env.set_options({"any": 1})
    env.reset()
    assert env._options == [{}, {}]
    assert env._seeds == [None, None]


@both
def test_images_need_a_render_mode(env_class: type[gym.Env[Any, Any]]) -> None:
    env = NATIVE[env_class](2)
    env.reset()
    with pytest.warns(UserWarning, match="rgb_array"):
        assert env.get_images() == [None, None]


# --- errors -------------------------------------------------------------------------------------------------------------


@both
def test_bad_input(env_class: type[gym.Env[Any, Any]]) -> None:
    native = NATIVE[env_class]
    for num_envs in (0, -1, 2.0, "2", True):
        with pytest.raises(ValueError, match=f"`num_envs` must be a whole number of at least 1, got {num_envs!r}"):
            native(num_envs)
    for seed in (-1, 0.5):
        with pytest.raises(ValueError, match=f"`seed` must be a whole number of at least 0, got {seed}"):
            native(2, seed=seed)
    native(np.int64(2), seed=np.int64(3)).reset()
    env = native(3)
    with pytest.raises(gym.error.ResetNeeded, match="reset"):
        env.step(np.zeros(3, dtype=np.int64))
    env.reset()
    for actions in (np.zeros(2, dtype=np.int64), np.zeros((3, 1), dtype=np.int64), np.zeros(3), np.zeros(3, dtype=bool)):
        with pytest.raises(ValueError, match=r"Actions must be integers of shape \(3,\), got"):
            env.step(actions)
    for action in (-1, 4):
        with pytest.raises(ValueError, match=rf"Action of environment 1 must be in 0\.\.\d, got {action}"):
            env.step(np.array([0, action, 5]))
    with pytest.raises(NotImplementedError, match="DummyVecEnv"):
        env.set_attr("corridor_length", 3)
    for method in ("reset", "step", "close"):
        with pytest.raises(NotImplementedError, match="DummyVecEnv"):
            env.env_method(method)
    with pytest.raises(AttributeError):
        env.get_attr("gaol")
    with pytest.raises(IndexError):
        env.get_attr("timestep", 3)


@pytest.mark.parametrize(
    ("env", "actions"),
    [(MemoryChainEnv(memory_length=1), "0 or 1"), (TMazeEnv(corridor_length=1), "0, 1, 2 or 3")],
    ids=["chain", "maze"],
)
def test_single_steps_outside_an_episode_or_the_action_space(env: gym.Env[Any, Any], actions: str) -> None:
    with pytest.raises(gym.error.ResetNeeded):
        env.step(0)
    env.reset()
    assert isinstance(env.action_space, gym.spaces.Discrete)
    for action in (env.action_space.n, -1, 0.0, None):
        with pytest.raises(ValueError, match=f"Action must be {actions}"):
            env.step(action)
    env.step(np.int64(1))
    assert env.step(0)[2]
    with pytest.raises(gym.error.ResetNeeded):
        env.step(0)
