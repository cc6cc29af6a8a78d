"""One-hot encoding of discrete observations, also nested ones, as flat vectors."""

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.spaces.utils import flatten, flatten_space
from gymnasium.utils import RecordConstructorArgs

LEAVES = (spaces.Box, spaces.Discrete, spaces.MultiBinary, spaces.MultiDiscrete)


class OneHotObservation(gym.ObservationWrapper[np.ndarray, Any, Any], RecordConstructorArgs):
    """
    Encodes observations of Box, Discrete, MultiDiscrete, MultiBinary, Tuple and Dict spaces as one flat float32 vector.

    The layout is that of ``gymnasium.spaces.utils.flatten``: the parts follow each other, Tuples in order, Dicts by sorted
    key. A ``Discrete(n)`` becomes ``n`` numbers with a one at ``value - start``. A MultiDiscrete becomes one such block for
    each of its numbers. Box and MultiBinary keep their numbers in C order.

    SB3's policies accept a Discrete or MultiDiscrete space, but no nested spaces. Memories, frame stacking and normalization
    need vectors.

    :param env: The environment.
    :raises ValueError: for an observation space with other parts.
    """

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        RecordConstructorArgs.__init__(self)
        super().__init__(env)
        space = env.observation_space
        for leaf in _leaves(space):
            if not isinstance(leaf, LEAVES):
                names = ", ".join(kind.__name__ for kind in LEAVES)
                raise ValueError(f"No one-hot vector for the observation space {space}: {leaf} is none of {names}.")
        flat = flatten_space(space)
        assert isinstance(flat, spaces.Box)
        self.observation_space = spaces.Box(flat.low.astype(np.float32), flat.high.astype(np.float32), dtype=np.float32)

    def observation(self, observation: Any) -> np.ndarray:
        """
        :param observation: An observation of the environment.
        :return: Its flat vector, float32, (D,).
        """
        return np.asarray(flatten(self.env.observation_space, observation)).astype(np.float32)


def _leaves(space: spaces.Space[Any]) -> list[spaces.Space[Any]]:
    if isinstance(space, spaces.Dict):
        return [leaf for part in space.spaces.values() for leaf in _leaves(part)]
    if isinstance(space, spaces.Tuple):
        return [leaf for part in space.spaces for leaf in _leaves(part)]
    return [space]
