"""The environment ``sb3_cyborg/CrafterWood-v0``: collecting wood in Crafter, a 2D world modelled on Minecraft."""

from collections.abc import Sequence
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.error import ResetNeeded

from sb3_cyborg.checks import check_positive, check_whole
from sb3_cyborg.envs.render_mode import check_render_mode

VIEW = 9
"""Tiles per row and column of the image: seven rows show the world, two the inventory."""


class CrafterWoodEnv(gym.Env[np.ndarray, np.int64]):
    """
    The agent finds trees and cuts them, for a reward of 1 per piece of wood.

    The world is that of the ``crafter`` package (Hafner 2021, *Benchmarking the Spectrum of Agent Capabilities*,
    https://arxiv.org/abs/2109.06780). It is larger than the 9 x 7 tiles that the player sees. A tree gives one piece of wood
    and disappears. A seed and the actions determine the episode in every process: ``reset(seed=s)`` starts the sequence of
    worlds of ``crafter.Env(seed=s)``, and each later ``reset()`` moves on to its next world.

    - Observation: the image, (64, 64, 3), uint8. It shows the view, and below it the inventory with amounts of up to 9.
    - Actions: ``noop``, ``move_left``, ``move_right``, ``move_up``, ``move_down``, ``do`` (cut, eat, drink or hit what the
      player faces). A move turns the player even if the way is blocked.
    - Reward: pieces of wood collected in this step, 0 or 1. It is also given while the inventory is full (9 pieces).
    - Terminated when the player dies, truncated after ``length`` steps.
    - ``info``: ``wood`` (collected in this episode), ``inventory`` (health, food, drink, energy, wood and the rest, 0 to 9),
      ``achievements`` (how often each was done in this episode) and ``player_pos`` (x, y).

    In the natural world the player dies of zombies, arrows, lava, hunger, thirst or tiredness. Cows and water reduce hunger
    and thirst. Nothing reduces tiredness, because sleep is not an action, so no player lives for more than 440 steps. The
    peaceful world has no zombies and no skeletons, and food, drink and energy never fall: only lava kills.

    :param peaceful: Whether the world is the peaceful one.
    :param area: Width and height of the world in tiles, each at least 1.
    :param length: Steps until an episode is truncated, at least 1.
    :param render_mode: ``"rgb_array"``, or ``None``.
    :param render_size: Pixels per side of the image that ``render()`` returns, at least 18.
    :raises ImportError: if the package ``crafter`` is missing.
    :raises ValueError: for sizes below the least and for an unknown render mode.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"], "render_fps": 10}  # type: ignore[misc]  # gymnasium's is no ClassVar
    action_names = ("noop", "move_left", "move_right", "move_up", "move_down", "do")

    def __init__(
        self,
        peaceful: bool = False,
        area: tuple[int, int] = (32, 32),
        length: int = 500,
        render_mode: str | None = None,
        render_size: int = 64 * VIEW,
    ) -> None:
        try:
            from sb3_cyborg.envs.crafter_game import CrafterGame
        except ImportError as error:
            raise ImportError(f'CrafterWood needs crafter ({error}): pip install "sb3-cyborg[crafter]"') from error

        if not isinstance(area, Sequence) or len(area) != 2:
            raise ValueError(f"`area` must be a width and a height, e.g. (32, 32), got {area!r}.")
        check_positive(length=length, **{"area[0]": area[0], "area[1]": area[1]})
        check_whole(2 * VIEW, render_size=render_size)  # two pixels per tile draw the amounts of the inventory
        check_render_mode(render_mode, self.metadata["render_modes"])
        self.render_mode = render_mode
        self.render_size = int(render_size)
        self.observation_space = spaces.Box(0, 255, (64, 64, 3), np.uint8)
        self.action_space = spaces.Discrete(len(self.action_names))
        self.game = CrafterGame((int(area[0]), int(area[1])), int(length), bool(peaceful))
        self._actions = [self.game.action_names.index(name) for name in self.action_names]
        self._wood = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        """
        :param seed: Starts the sequence of worlds of this seed; ``None`` moves on to the next world of the sequence.
        :param options: Ignored.
        :return: Observation and info.
        """
        super().reset(seed=seed)
        if seed is None and self.game.player is None:
            seed = int(self.np_random.integers(2**31))
        obs = self.game.reset(seed)
        self._wood = 0
        return np.ascontiguousarray(obs), self._info()

    def step(self, action: np.int64 | int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """
        :param action: Index into ``action_names``.
        :return: Observation, wood collected in this step, whether the player died, whether the time limit is reached, and
            info.
        """
        if self.game.player is None:
            raise ResetNeeded("Call `reset` before `step`.")
        if not self.action_space.contains(action):
            raise ValueError(f"`action` must be a whole number from 0 to {len(self.action_names) - 1}, got {action!r}.")
        obs, _, over, _ = self.game.step(self._actions[int(action)])
        info = self._info()
        reward, self._wood = float(info["wood"] - self._wood), info["wood"]
        dead = info["inventory"]["health"] <= 0
        return np.ascontiguousarray(obs), reward, dead, over and not dead, info

    def render(self) -> np.ndarray | None:
        """:return: The current view, (render_size, render_size, 3), uint8; ``None`` without a render mode."""
        if self.render_mode is None:
            gym.logger.warn('render() without a render mode: make the env with `render_mode="rgb_array"`.')
            return None
        if self.game.player is None:
            raise ResetNeeded("Call `reset` before `render`.")
        return np.ascontiguousarray(self.game.picture(self.render_size))

    def _info(self) -> dict[str, Any]:
        player = self.game.player
        return {
            "wood": player.achievements["collect_wood"],
            "inventory": dict(player.inventory),
            "achievements": dict(player.achievements),
            "player_pos": tuple(player.pos.tolist()),
        }
