"""Memory Chain: bsuite's rules, and the returns of a perfect and a guessing policy."""

import re
from typing import Any

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env as check_gymnasium
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3.common.env_checker import check_env as check_sb3

from sb3_cyborg.envs.memory_chain import MemoryChainEnv, MemoryChainVecEnv


def episode_by_bsuite(
    memory_length: int, bits: list[int], query: int, actions: list[int]
) -> list[tuple[list[float], float, bool]]:
    """
    :return: (observation, reward, last step) of every step by the rules of bsuite: ``reset()`` observes clock 0, step k
        observes clock k - 1, and the step that observes clock ``memory_length`` is the last.
    """

    def observation(clock: int) -> list[float]:
        context = [2.0 * bit - 1.0 for bit in bits] if clock == 0 else [0.0] * len(bits)
        return [1 - clock / memory_length, float(query if clock == memory_length - 1 else 0), *context]

    steps: list[tuple[list[float], float, bool]] = [(observation(0), 0.0, False)]
    for clock, action in enumerate(actions[: memory_length + 1]):
        last = clock == memory_length
        steps.append((observation(clock), (1.0 if action == bits[query] else -1.0) if last else 0.0, last))
    return steps


@settings(deadline=None, max_examples=100)
@given(
    memory_length=st.integers(1, 15),
    num_bits=st.integers(1, 5),
    seed=st.integers(0, 2**32),
    actions=st.lists(st.integers(0, 1), min_size=16, max_size=16),
)
def test_rules_of_bsuite(memory_length: int, num_bits: int, seed: int, actions: list[int]) -> None:
    env = MemoryChainEnv(memory_length, num_bits)
    for start in (seed, None):
        obs, info = env.reset(seed=start)
        assert info == {}
        expected = episode_by_bsuite(memory_length, env.context.tolist(), env.query, actions)
        np.testing.assert_array_equal(obs, np.array(expected[0][0], dtype=np.float32))
        for action, (expected_obs, expected_reward, last) in zip(actions, expected[1:], strict=False):
            obs, reward, terminated, truncated, info = env.step(action)
            assert obs in env.observation_space
            np.testing.assert_array_equal(obs, np.array(expected_obs, dtype=np.float32))
            assert (reward, terminated, truncated) == (expected_reward, last, False)
            assert info == ({"is_success": reward == 1} if last else {})
        assert terminated


def test_an_episode_in_full() -> None:
    """Written by hand, for a memory length of 3 and a query of the second of the bits 1 and 0."""
    env = MemoryChainEnv(memory_length=3, num_bits=2)
    env.reset(seed=0)
    env.context, env.query = np.array([1, 0]), 1
    steps = [env.step(action) for action in (1, 1, 1, 0)]
    np.testing.assert_array_equal(
        [step[0] for step in steps],
        np.array([[1, 0, 1, -1], [1 - 1 / 3, 0, 0, 0], [1 - 2 / 3, 1, 0, 0], [0, 0, 0, 0]], dtype=np.float32),
    )
    assert [step[1] for step in steps] == [0, 0, 0, 1]
    assert [step[2] for step in steps] == [False, False, False, True]


def test_context_and_query_are_uniform() -> None:
    env = MemoryChainVecEnv(4000, seed=0, memory_length=1, num_bits=3)
    env.reset()
    contexts, queries = np.array(env.get_attr("context")), np.array(env.get_attr("query"))
    assert np.abs(contexts.mean(axis=0) - 0.5).max() < 0.03  # four standard errors
    assert np.abs(np.corrcoef(contexts.T) - np.eye(3)).max() < 0.07
    np.testing.assert_allclose(np.bincount(queries) / 4000, 1 / 3, atol=0.03)


@pytest.mark.parametrize(("memory_length", "num_bits"), [(2, 1), (10, 1), (10, 3), (100, 2)])
def test_a_perfect_memory_earns_one(memory_length: int, num_bits: int) -> None:
    env = MemoryChainVecEnv(50, seed=0, memory_length=memory_length, num_bits=num_bits)
    obs = np.asarray(env.reset())
    remembered = np.zeros((50, num_bits))
    returns = []
    for _ in range(10 * (memory_length + 1)):
        remembered = np.where(obs[:, :1] == 1, obs[:, 2:], remembered)
        bit = remembered[np.arange(50), obs[:, 1].astype(int)]
        new_obs, _, _, infos = env.step((bit > 0).astype(np.int64))
        obs = np.asarray(new_obs)
        returns += [info["episode"]["r"] for info in infos if "episode" in info]
    assert len(returns) == 500
    assert set(returns) == {1.0}


def test_guesses_earn_nothing() -> None:
    env = MemoryChainVecEnv(2000, seed=0, memory_length=3)
    env.reset()
    rng = np.random.default_rng(0)
    successes = [
        info["is_success"] for _ in range(8) for info in env.step(rng.integers(2, size=2000))[3] if "is_success" in info
    ]
    assert len(successes) == 4000
    assert abs(np.mean(successes) - 0.5) < 0.03  # four standard errors


@pytest.mark.parametrize(("memory_length", "num_bits"), [(1, 1), (2, 3), (10, 1), (30, 2)])
@pytest.mark.filterwarnings("error")
def test_check_env(memory_length: int, num_bits: int) -> None:
    # The checker tests other render modes only for environments with a spec.
    check_gymnasium(MemoryChainEnv(memory_length, num_bits), skip_render_check=True)
    check_sb3(MemoryChainEnv(memory_length, num_bits))


def test_render() -> None:
    env = MemoryChainEnv(memory_length=4, num_bits=2, render_mode="rgb_array")
    env.reset(seed=0)
    env.context = np.array([1, 0])
    image = env.render()
    assert image is not None
    assert image.dtype == np.uint8
    assert image.shape == (32, 128, 3)
    assert image[0, ::32].tolist() == [[255, 255, 255], [0, 0, 0], [255, 0, 0], [0, 0, 255]]
    assert MemoryChainEnv().render() is None


@pytest.mark.parametrize("name", ["memory_length", "num_bits"])
@pytest.mark.parametrize("size", [0, -1, 1.0, 2.5, "3", None, True, float("nan")])
@pytest.mark.parametrize("make", [MemoryChainEnv, lambda **kwargs: MemoryChainVecEnv(2, **kwargs)])
def test_bad_sizes(name: str, size: Any, make: Any) -> None:
    with pytest.raises(ValueError, match=f"`{name}` must be a whole number of at least 1, got {re.escape(repr(size))}"):
        make(**{name: size})


@pytest.mark.parametrize("make", [MemoryChainEnv, lambda **kwargs: MemoryChainVecEnv(2, **kwargs)])
def test_unknown_names(make: Any) -> None:
    with pytest.raises(ValueError, match=r"'memory_lenght'. Did you mean 'memory_length'\?"):
        make(memory_lenght=3)
    with pytest.raises(ValueError, match=r"Unknown render mode 'human'. Known: 'rgb_array'"):
        make(render_mode="human")
