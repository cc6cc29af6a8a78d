"""Helpers that tests of environments share."""

import warnings
from collections.abc import Sequence

import gymnasium as gym
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils.env_checker import check_env as check_env_for_gymnasium
from stable_baselines3.common.env_checker import check_env as check_env_for_sb3


def checker_warnings(spec: EnvSpec, expected: Sequence[str]) -> list[str]:
    """
    Runs the environment checkers of gymnasium and of SB3; an error of theirs is raised.

    :param spec: Makes the environment.
    :param expected: Parts of the warnings that are left out.
    :return: The other warnings.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        env = gym.make(spec, disable_env_checker=True)
        check_env_for_gymnasium(env)
        check_env_for_sb3(env)
    messages = [str(warning.message) for warning in caught]
    return [message for message in messages if not any(part in message for part in expected)]
