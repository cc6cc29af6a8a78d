"""The game of the ``crafter`` package with what :mod:`sb3_cyborg.envs.crafter` needs of it; it imports that package."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from crafter import Env
from crafter.engine import World
from crafter.objects import Object, Player, Skeleton, Zombie


class CrafterGame(Env):  # type: ignore[misc]  # crafter has no types
    """
    ``crafter.Env``, except that a seed can be given to :meth:`reset`, that the same seed gives the same course in every
    process, that rendering leaves the course alone, and that it can be peaceful.

    :param area: Width and height of the world in tiles.
    :param length: Steps of an episode.
    :param peaceful: Without zombies and skeletons, and the player's food, drink and energy do not fall.
    """

    def __init__(self, area: tuple[int, int], length: int, peaceful: bool) -> None:
        super().__init__(area=area, length=length, reward=False, seed=0)  # `None` would draw from numpy's global numbers
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
        :param seed: Start the series of worlds that ``crafter.Env(seed=seed)`` makes; ``None`` goes on to its next one.
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
        if self._peaceful:  # when one of them gets large, food, drink or energy falls by one
            self._player._hunger = self._player._thirst = self._player._fatigue = 0
        return super().step(action)  # type: ignore[no-any-return]

    def picture(self, size: int) -> np.ndarray:
        """
        Draw the view of the moment. At night the view is noisy, and the noise comes from the world's own random numbers: they
        are put back, so that looking does not change what happens next.

        :param size: Pixels of each side.
        :return: The picture, (size, size, 3).
        """
        before = self._world.random.get_state()
        picture: np.ndarray = self.render((size, size))
        self._world.random.set_state(before)
        return picture

    def _balance_object(self, chunk: Any, objs: Iterable[Object], cls: type[Object], *args: Any) -> None:
        if self._peaceful and cls in (Zombie, Skeleton):
            return
        # They come as a set, in the order of their addresses in memory, and one of them is drawn by its place in that order.
        super()._balance_object(chunk, sorted(objs, key=lambda thing: tuple(thing.pos)), cls, *args)
