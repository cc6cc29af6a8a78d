"""``crafter.Env`` with the changes that :mod:`sb3_cyborg.envs.crafter` needs. Importing this module imports ``crafter``."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from crafter import Env
from crafter.engine import World
from crafter.objects import Object, Player, Skeleton, Zombie


class CrafterGame(Env):  # type: ignore[misc]  # crafter has no types
    """
    ``crafter.Env`` with four changes: :meth:`reset` takes a seed; a seed gives the same episode in every process; rendering
    does not change the episode; the world can be peaceful.

    :param area: Width and height of the world in tiles.
    :param length: Steps per episode.
    :param peaceful: Whether there are no zombies and skeletons, and food, drink and energy do not fall.
    """

    def __init__(self, area: tuple[int, int], length: int, peaceful: bool) -> None:
        super().__init__(area=area, length=length, reward=False, seed=0)  # `None` would draw from NumPy's global generator
        self._peaceful = peaceful

    @property
    def world(self) -> World:
        """:return: The world: ``world[x, y]`` is (material, object), ``world[x, y] = "tree"`` sets the material."""
        return self._world

    @property
    def player(self) -> Player:
        """:return: The player, with ``pos``, ``inventory`` and ``achievements``."""
        return self._player

    def reset(self, seed: int | None = None) -> np.ndarray:
        """
        :param seed: Starts the sequence of worlds of ``crafter.Env(seed=seed)``; ``None`` moves on to its next world.
        :return: The observation, (64, 64, 3).
        """
        if seed is not None:
            self._seed, self._episode = seed, 0
        obs: np.ndarray = super().reset()
        if self._peaceful:
            for monster in [thing for thing in self._world.objects if isinstance(thing, (Zombie, Skeleton))]:
                self._world.remove(monster)
            obs = self._obs()
        return obs

    def step(self, action: int) -> tuple[np.ndarray, float, bool, dict[str, Any]]:
        """
        :param action: Index into ``action_names``.
        :return: Observation, zero, whether the episode is over, and Crafter's own info.
        """
        if self._peaceful:  # food, drink and energy fall by one when their counter exceeds a threshold
            self._player._hunger = self._player._thirst = self._player._fatigue = 0
        return super().step(action)  # type: ignore[no-any-return]

    def picture(self, size: int) -> np.ndarray:
        """
        Draws the current view. At night the view contains noise from the world's random generator. The generator's state is
        restored, so that rendering does not change the episode.

        :param size: Pixels per side.
        :return: The image, (size, size, 3).
        """
        before = self._world.random.get_state()
        picture: np.ndarray = self.render((size, size))
        self._world.random.set_state(before)
        return picture

    def _balance_object(self, chunk: Any, objs: Iterable[Object], cls: type[Object], *args: Any) -> None:
        if self._peaceful and cls in (Zombie, Skeleton):
            return
        # The objects are a set, whose order depends on memory addresses, and Crafter draws one of them by its index.
        super()._balance_object(chunk, sorted(objs, key=lambda thing: tuple(thing.pos)), cls, *args)
