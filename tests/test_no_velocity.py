"""Classic control without velocities: equal to RL Zoo's environments, without RL Zoo."""

import subprocess
import sys
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.envs.registration import register, registry
from stable_baselines3.common.env_checker import check_env

from sb3_cyborg.envs.no_velocity import VELOCITY_INDICES, make_no_velocity

# The base of each id, its velocities in gymnasium's documentation, and its time limit.
ENVS = {
    "CartPoleNoVel-v1": ("CartPole-v1", [1, 3], 500),
    "PendulumNoVel-v1": ("Pendulum-v1", [2], 200),
    "MountainCarContinuousNoVel-v0": ("MountainCarContinuous-v0", [1], 999),
}


@pytest.mark.parametrize("name", ENVS)
def test_only_velocities_are_hidden(name: str) -> None:
    env_id, velocities, limit = ENVS[name]
    env, base = make_no_velocity(env_id), gym.make(env_id)
    assert env.observation_space == base.observation_space
    assert env.action_space == base.action_space
    env.action_space.seed(0)
    seen, full = [env.reset(seed=1)[0]], [base.reset(seed=1)[0]]
    ends = 0
    for _ in range(1100):
        action = env.action_space.sample()
        obs, *rest = env.step(action)
        base_obs, *base_rest = base.step(action)
        assert rest == base_rest
        assert obs.dtype == base_obs.dtype
        seen.append(obs)
        full.append(base_obs)
        if rest[1] or rest[2]:
            ends += 1
            seen.append(env.reset()[0])
            full.append(base.reset()[0])
    assert ends > 0
    hidden, shown = np.array(seen), np.array(full)
    assert (hidden[:, velocities] == 0).all()
    assert (shown[:, velocities] != 0).any(axis=0).all()
    others = [i for i in range(shown.shape[1]) if i not in velocities]
    np.testing.assert_array_equal(hidden[:, others], shown[:, others])
    assert env.spec is not None
    assert env.spec.max_episode_steps == limit


def test_table_is_that_of_rl_zoo() -> None:
    wrappers = pytest.importorskip("rl_zoo3.wrappers")
    table = wrappers.MaskVelocityWrapper.velocity_indices
    assert {env_id: indices.tolist() for env_id, indices in table.items()} == VELOCITY_INDICES


@pytest.mark.parametrize("name", ENVS)
def test_same_as_rl_zoo(name: str) -> None:
    wrappers = pytest.importorskip("rl_zoo3.wrappers")
    env_id, _, _ = ENVS[name]
    ours, theirs = make_no_velocity(env_id), wrappers.MaskVelocityWrapper(gym.make(env_id))
    assert ours.observation_space == theirs.observation_space
    ours.action_space.seed(0)
    np.testing.assert_array_equal(ours.reset(seed=3)[0], theirs.reset(seed=3)[0])
    for _ in range(300):
        action = ours.action_space.sample()
        step, expected = ours.step(action), theirs.step(action)
        np.testing.assert_array_equal(step[0], expected[0])
        assert step[1:] == expected[1:]
        if step[2] or step[3]:
            np.testing.assert_array_equal(ours.reset()[0], theirs.reset()[0])


@pytest.mark.parametrize("name", ENVS)
def test_by_id(name: str) -> None:
    """The registered ids have no second time limit, and pass the render mode on."""
    env_id, _, limit = ENVS[name]
    test_id = f"sb3_cyborg_tests/{name}"
    register(test_id, entry_point="sb3_cyborg.envs.no_velocity:make_no_velocity", kwargs={"env_id": env_id})
    try:
        env = gym.make(test_id, render_mode="rgb_array")
        assert env.spec is not None
        assert env.spec.max_episode_steps == limit
        env.reset(seed=0)
        image: Any = env.render()
        assert image.ndim == 3
        check_env(env, warn=False, skip_render_check=True)  # no warnings about gymnasium's own action spaces
        env.close()
        again = gym.make(env.spec)
        assert (again.reset(seed=0)[0] == gym.make(test_id).reset(seed=0)[0]).all()
    finally:
        registry.pop(test_id)


def test_unknown_environment() -> None:
    with pytest.raises(ValueError, match=r"'CartPol-v1'. Did you mean 'CartPole-v1'\?"):
        make_no_velocity("CartPol-v1")


def test_needs_no_rl_zoo() -> None:
    code = (
        "import sys; sys.modules['rl_zoo3'] = None\n"
        "from sb3_cyborg.envs.no_velocity import make_no_velocity\n"
        "print(make_no_velocity('CartPole-v1').reset(seed=0)[0])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
