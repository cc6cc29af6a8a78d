"""Every id except MineRL's: the checkers of gymnasium and SB3, and a random rollout."""

import math
import warnings

import pytest
from gymnasium.utils.env_checker import check_env as check_gymnasium_env
from stable_baselines3.common.env_checker import check_env as check_sb3_env

from sb3_cyborg.envs import FAMILIES
from sb3_cyborg.envs.vec_env import make_env_by_id

IDS = [env_id for name, family in FAMILIES.items() if name != "MineRL" for env_id in family.kwargs]
"""MineRL needs a separate virtual environment, see ``make test-minerl``."""

STEPS = 1_000


@pytest.mark.parametrize("env_id", IDS)
def test_both_checkers(env_id: str) -> None:
    env = make_env_by_id(env_id)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # Unbounded boxes, actions beyond [-1, 1] and POPGym's warning about its mazes come from the wrapped environments.
        for harmless in (
            ".*Box observation space (minimum|maximum) value is.*infinity",
            ".*recommend.*symmetric.*",
            ".*is different from the unwrapped version",
            "Maze environments have been shown to be solvable without",
        ):
            warnings.filterwarnings("ignore", harmless)
        check_gymnasium_env(env, skip_render_check=True)
        check_sb3_env(env, warn=True, skip_render_check=False)


@pytest.mark.parametrize("env_id", IDS)
def test_random_rollout(env_id: str) -> None:
    env = make_env_by_id(env_id)
    env.action_space.seed(0)
    obs, _ = env.reset(seed=0)
    for _ in range(STEPS):
        assert env.observation_space.contains(obs)
        obs, reward, terminated, truncated, _ = env.step(env.action_space.sample())
        assert math.isfinite(reward)
        if terminated or truncated:
            assert env.observation_space.contains(obs)
            obs, _ = env.reset()
    env.close()
