"""
Classic control without velocities, which the agent must infer from past observations.

Source: RL Zoo (https://github.com/DLR-RM/rl-baselines3-zoo), ``MaskVelocityWrapper`` in ``rl_zoo3/wrappers.py`` and the ids
that ``rl_zoo3/import_envs.py`` registers with it (``CartPoleNoVel-v1``...).
"""

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from sb3_cyborg.checks import unknown_name

# The indices of RL Zoo's wrapper.
VELOCITY_INDICES = {
    "CartPole-v1": [1, 3],
    "MountainCar-v0": [1],
    "MountainCarContinuous-v0": [1],
    "Pendulum-v1": [2],
    "LunarLander-v3": [2, 3, 5],
    "LunarLanderContinuous-v3": [2, 3, 5],
}


class MaskVelocityWrapper(gym.ObservationWrapper[np.ndarray, Any, np.ndarray], gym.utils.RecordConstructorArgs):
    """
    Sets entries of the observation to 0. The observation space stays the same, as in RL Zoo.

    :param env: An environment whose observations are vectors.
    :param indices: Indices of the entries.
    """

    def __init__(self, env: gym.Env[np.ndarray, Any], indices: list[int]):
        gym.utils.RecordConstructorArgs.__init__(self, indices=indices)
        super().__init__(env)
        assert isinstance(env.observation_space, spaces.Box)
        self.mask = np.ones(env.observation_space.shape, dtype=env.observation_space.dtype)
        self.mask[indices] = 0

    def observation(self, observation: np.ndarray) -> np.ndarray:
        return observation * self.mask


def make_no_velocity(env_id: str, **kwargs: Any) -> gym.Env[np.ndarray, Any]:
    """
    Makes an environment of gymnasium and sets the velocities in its observations to 0.

    Spaces, rewards and time limit are those of ``env_id``, as in RL Zoo.

    :param env_id: One of gymnasium's ids in ``VELOCITY_INDICES``, e.g. ``"CartPole-v1"``.
    :param kwargs: Keyword arguments of ``gymnasium.make``, e.g. ``render_mode``.
    :return: The environment.
    :raises ValueError: for an id that is not in ``VELOCITY_INDICES``.
    """
    if env_id not in VELOCITY_INDICES:
        raise unknown_name("environment to hide the velocities of", env_id, VELOCITY_INDICES)
    return MaskVelocityWrapper(gym.make(env_id, **kwargs), VELOCITY_INDICES[env_id])
