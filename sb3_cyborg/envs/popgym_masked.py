"""POPGym's games with action masks: Concentration, Battleship and MineSweeper, without moves that cannot change anything."""

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.utils import RecordConstructorArgs

from sb3_cyborg.checks import unknown_name
from sb3_cyborg.envs.popgym import POPGYM_LEVELS, make_popgym

MASKED_TASKS = ("Concentration", "Battleship", "MineSweeper")
"""Tasks of POPGym with illegal moves."""

POPGYM_MASKED_NAMES = {f"{task}Masked{level}": f"{task}{level}" for task in MASKED_TASKS for level in POPGYM_LEVELS}
"""Names of the environments with masks, as in ``sb3_cyborg/<name>-v0``, with POPGym's names."""

VIEWED = 2
"""Value of MineSweeper's grid for a tile that has been opened."""


def make_masked_popgym(name: str, **options: Any) -> gym.Env[np.ndarray, Any]:
    """
    Makes a game of POPGym with action masks, see :class:`LegalMoves`.

    :param name: POPGym's name of the game, e.g. ``"ConcentrationEasy"``; without a level, ``options`` set its sizes.
    :param options: Options of :func:`~sb3_cyborg.envs.popgym.make_popgym`.
    :return: The environment.
    :raises ImportError: if POPGym is not installed.
    :raises ValueError: for any other name.
    """
    known = [task + level for task in MASKED_TASKS for level in ("", *POPGYM_LEVELS)]
    if name not in known:
        raise unknown_name("POPGym environment with masks", name, known)
    return LegalMoves(make_popgym(name, **options))


class LegalMoves(gym.Wrapper[np.ndarray, Any, np.ndarray, Any], RecordConstructorArgs):
    """
    Adds :meth:`action_masks` to a game of POPGym. Observations, rewards and ends of episodes are POPGym's.

    - Concentration: a card that lies face up cannot be turned, neither one of a pair nor the first card of a turn.
    - Battleship: a field cannot be shot at twice.
    - MineSweeper: a tile cannot be opened twice.

    Fields and tiles are numbered row by row: actions are Discrete, because a mask for each coordinate cannot forbid a field.

    :param env: An environment of :func:`~sb3_cyborg.envs.popgym.make_popgym`.
    """

    def __init__(self, env: gym.Env[np.ndarray, Any]) -> None:
        RecordConstructorArgs.__init__(self)
        super().__init__(env)
        space = env.action_space
        self._board = tuple(int(size) for size in space.nvec) if isinstance(space, spaces.MultiDiscrete) else None
        if self._board is not None:
            self.action_space = spaces.Discrete(int(np.prod(self._board)))

    def step(self, action: Any) -> tuple[np.ndarray, Any, bool, bool, dict[str, Any]]:
        """
        :param action: Number of the card, field or tile.
        :return: The step of the environment.
        """
        return self.env.step(action if self._board is None else np.array(np.unravel_index(int(action), self._board)))

    def action_masks(self) -> np.ndarray:
        """:return: Whether each action is legal, bool, (n,)."""
        game: Any = self.env.unwrapped
        if hasattr(game, "guesses"):
            return np.asarray(game.guesses == 0).ravel()
        if hasattr(game, "hidden_grid"):
            return np.asarray(game.hidden_grid != VIEWED).ravel()
        face_down = np.ones(len(game.deck), dtype=bool)
        face_down[game.deck["face_up_idx"] + game.deck["in_play_idx"]] = False
        return face_down
