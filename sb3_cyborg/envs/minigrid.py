"""
MiniGrid's Memory environments for Stable-Baselines3 (Chevalier-Boisvert et al., Minigrid & Miniworld, 2023,
https://arxiv.org/abs/2306.13831).

MiniGrid is imported when the first environment is made.
"""

from importlib import import_module
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.utils import RecordConstructorArgs

from sb3_cyborg.checks import check_positive, unknown_name
from sb3_cyborg.envs.one_hot import OneHotObservation
from sb3_cyborg.envs.render_mode import check_render_mode

MINIGRID_MEMORY_IDS = tuple(f"MiniGrid-Memory{size}-v0" for size in ("S7", "S9", "S11", "S13", "S13Random", "S17Random"))
"""Ids of all Memory environments that MiniGrid registers."""

OBSERVATIONS = ("onehot", "image")
ACTIONS = ("all", "move")
RENDER_MODES = ("human", "rgb_array")


def make_minigrid(
    env_id: str,
    *,
    observation: str = "onehot",
    actions: str = "all",
    tile_size: int = 8,
    render_mode: str | None = None,
    **env_kwargs: Any,
) -> gym.Env[np.ndarray, Any]:
    """
    Makes a Memory environment of MiniGrid, with the agent's own view as observation.

    The observation leaves out the mission, which is always the same, and the compass direction, because the view is relative
    to the agent. The last ``info`` of an episode contains ``is_success``.

    :param env_id: One of ``MINIGRID_MEMORY_IDS``, e.g. ``"MiniGrid-MemoryS9-v0"``.
    :param observation: ``"onehot"`` is a float32 vector (980,) for ``MlpPolicy``: object (11), colour (6) and state (3) of
        each of the 7x7 visible cells, one-hot as in MiniGrid's ``OneHotPartialObsWrapper``. ``"image"`` is the view in uint8
        RGB, (56, 56, 3), for ``CnnPolicy``.
    :param actions: ``"all"`` seven actions of MiniGrid, or ``"move"``: left, right and forward. The task needs no others, and
        some published results use these (``recurrent-ppo-truncated-bptt``, with ``agent_view_size=3`` and images of 84x84).
    :param tile_size: Pixels per side of a cell in images, at least 1. SB3's ``NatureCNN`` needs 36 pixels per side of the
        view.
    :param render_mode: ``"human"`` or ``"rgb_array"``.
    :param env_kwargs: Keyword arguments of MiniGrid's ``MemoryEnv``, e.g. ``agent_view_size`` (odd, at least 3), ``max_steps``
        or ``size``.
    :return: The environment.
    :raises ImportError: if MiniGrid is not installed.
    :raises ValueError: for an unknown name, and for values that ``MemoryEnv`` refuses.
    """
    for what, value, known in (
        ("MiniGrid Memory environment", env_id, MINIGRID_MEMORY_IDS),
        ("observation", observation, OBSERVATIONS),
        ("actions", actions, ACTIONS),
    ):
        if value not in known:
            raise unknown_name(what, value, known)
    check_render_mode(render_mode, RENDER_MODES)
    check_positive(tile_size=tile_size)
    try:
        envs, wrappers, constants = (import_module(f"minigrid.{part}") for part in ("envs", "wrappers", "core.constants"))
    except ImportError as error:
        raise ImportError(f'MiniGrid cannot be imported ({error}): pip install "sb3-cyborg[minigrid]"') from error
    env_kwargs = {**gym.spec(env_id).kwargs, **env_kwargs}
    try:
        env: gym.Env[Any, Any] = envs.MemoryEnv(render_mode=render_mode, **env_kwargs)
    except (AssertionError, TypeError) as error:
        raise ValueError(f"MiniGrid's MemoryEnv cannot be made with {env_kwargs}: {error}.") from error
    if actions == "move":
        env.action_space = spaces.Discrete(3)  # left, right and forward come first
    env = MemorySuccess(env)
    if observation == "image":
        env = wrappers.RGBImgPartialObsWrapper(env, tile_size)
    env = wrappers.ImgObsWrapper(env)
    if observation == "image":
        return env
    kinds = np.array([len(constants.OBJECT_TO_IDX), len(constants.COLOR_TO_IDX), len(constants.STATE_TO_IDX)])
    # MiniGrid declares its cells as a Box of bytes, which SB3 would treat as an image. The cells hold categories.
    rows, columns, _ = env.observation_space.shape or ()
    env.observation_space = spaces.MultiDiscrete(np.tile(kinds, (rows, columns, 1)))
    return OneHotObservation(env)


class MemorySuccess(gym.Wrapper[Any, Any, Any, Any], RecordConstructorArgs):
    """
    Sets ``info["is_success"]`` in the last step of an episode, which SB3's callbacks and RL Zoo read.

    :param env: A ``MemoryEnv`` of MiniGrid.
    """

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        RecordConstructorArgs.__init__(self)
        super().__init__(env)

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """:return: The step of the environment, with ``is_success`` in the info of the last step."""
        obs, reward, terminated, truncated, info = self.env.step(action)
        if terminated or truncated:
            world: Any = self.unwrapped
            info["is_success"] = tuple(world.agent_pos) == world.success_pos
        return obs, reward, terminated, truncated, info
