"""
POPGym's environments for Stable-Baselines3 (Morad et al., 2023, https://arxiv.org/abs/2303.01859).

POPGym is imported when the first environment is made.
"""

import random
from copy import deepcopy
from importlib import import_module
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.utils import RecordConstructorArgs

from sb3_cyborg.checks import unknown_name
from sb3_cyborg.envs.one_hot import OneHotObservation

POPGYM_LEVELS = ("Easy", "Medium", "Hard")

POPGYM_TIME_LIMITS: dict[str, str | None] = {
    "Autoencode": None,
    "Battleship": "max_episode_length",
    "Concentration": "episode_length",
    "CountRecall": None,
    "HigherLower": None,
    "MineSweeper": "max_episode_length",
    "MultiarmedBandit": "max_episode_length",
    "NoisyPositionOnlyCartPole": "max_episode_length",
    "NoisyPositionOnlyPendulum": "max_episode_length",
    "PositionOnlyCartPole": "max_episode_length",
    "PositionOnlyPendulum": "max_episode_length",
    "RepeatFirst": None,
    "RepeatPrevious": None,
    "VelocityOnlyCartpole": "max_episode_length",
    "LabyrinthEscape": "max_episode_length",
    "LabyrinthExplore": "max_episode_length",
}
"""
POPGym's tasks, each with the attribute that holds its time limit, at which POPGym reports ``truncated``. ``None`` marks tasks
without a limit: their episodes end with the last card, and POPGym reports ``terminated``.
"""

POPGYM_MAZES = ("LabyrinthEscape", "LabyrinthExplore")
"""Tasks of POPGym that need the package mazelib."""

POPGYM_NAMES = tuple(task + level for task in POPGYM_TIME_LIMITS for level in POPGYM_LEVELS)
"""Names of all environments that POPGym registers, mazes included, as in ``popgym-<name>-v0``."""


def make_popgym(
    name: str, *, time_limit_is_terminal: bool = False, render_mode: str | None = None, **env_kwargs: Any
) -> gym.Env[np.ndarray, Any]:
    """
    Makes an environment of POPGym, with observations as one flat float32 vector (layout: :class:`OneHotObservation`).

    The action spaces are POPGym's: Discrete, MultiDiscrete (Battleship, MineSweeper) or Box (the pendulums). SB3's PPO
    supports all of them. Some tasks need the previous action, as ``env.unwrapped.obs_requires_prev_action`` shows. With
    ``MemoryPPO(..., use_last_action=True)`` the policy reads it.

    :param name: POPGym's id without ``popgym-`` and ``-v0``, e.g. ``"RepeatPreviousEasy"``. Without a level, e.g.
        ``"RepeatPrevious"``, ``env_kwargs`` set the sizes of the task.
    :param time_limit_is_terminal: Whether the time limit is reported as ``terminated`` rather than ``truncated``, so that no
        value is bootstrapped there. The observation then ends with the elapsed fraction of the limit, in [0, 1]. This changes
        the tasks with a time limit: Battleship, Concentration, MineSweeper, MultiarmedBandit, the CartPoles, the Pendulums and
        the Labyrinths. It does not change Autoencode, CountRecall, HigherLower, RepeatFirst and RepeatPrevious, which end with
        their last card and report ``terminated``.
    :param render_mode: ``"human"`` or ``"rgb_array"`` for CartPoles and Pendulums, ``"human"`` or ``"ansi"`` for the others.
    :param env_kwargs: Keyword arguments of POPGym's class, for a name without a level, e.g. ``num_decks`` and ``k``.
    :return: The environment.
    :raises ImportError: if POPGym is not installed, or mazelib for a Labyrinth.
    :raises TypeError: for a ``render_mode`` that the environment does not have. SB3's ``make_vec_env`` requests ``rgb_array``
        from every environment, and on this error makes it without rendering.
    :raises ValueError: for an unknown name, and for ``env_kwargs`` that POPGym's class refuses.
    """
    task = next((task for task in POPGYM_TIME_LIMITS if name in (task, *(task + level for level in POPGYM_LEVELS))), None)
    if task is None:
        raise unknown_name("POPGym environment", name, (*POPGYM_TIME_LIMITS, *POPGYM_NAMES))
    if name != task and env_kwargs:
        raise ValueError(
            f"POPGym's {name} has fixed sizes and takes no {', '.join(map(repr, env_kwargs))}. Name the task without "
            f"its level to set them: {task!r}."
        )
    env_class = _load(name, task)
    try:
        env: gym.Env[Any, Any] = env_class(**env_kwargs)
    except (AssertionError, NotImplementedError, TypeError, ValueError) as error:
        raise ValueError(f"POPGym's {name} cannot be made with {env_kwargs}: {error}.") from error
    # The classes of the levels have no argument render_mode, but the gymnasium environments that they wrap read this
    # attribute.
    env.render_mode = render_mode
    env = POPGymAdapter(env)
    if render_mode is not None and render_mode not in env.metadata["render_modes"]:
        raise TypeError(
            f"make_popgym() got an unexpected keyword argument 'render_mode'={render_mode!r}: {name} has "
            f"{', '.join(map(repr, env.metadata['render_modes']))}."
        )
    if task in POPGYM_MAZES:
        env = OwnRandomness(env)
    env = OneHotObservation(env)
    limit = POPGYM_TIME_LIMITS[task]
    if time_limit_is_terminal and limit is not None:
        # A Labyrinth counts its first observation as a step, so its limit is one step lower.
        env = TerminalTimeLimit(env, getattr(env.unwrapped, limit) - (task in POPGYM_MAZES))
    return env


def _load(name: str, task: str) -> Any:
    """:return: POPGym's class for an id. The name in the id is not always the name of the class."""
    try:
        popgym_envs = import_module("popgym.envs")
    except ImportError as error:
        raise ImportError(f'POPGym cannot be imported ({error}): pip install "sb3-cyborg[popgym]"') from error
    classes = {**popgym_envs.ALL_BASE, **popgym_envs.ALL}
    for env_class, spec in classes.items():
        if spec["id"] == f"popgym-{name}-v0":
            return env_class
    if task in POPGYM_MAZES:
        raise ImportError(f'{name} needs mazelib, which is not installed: pip install "popgym[navigation]"')
    raise ImportError(f'The installed POPGym has no {name}: pip install --upgrade "sb3-cyborg[popgym]"')


class TerminalTimeLimit(gym.Wrapper[np.ndarray, Any, np.ndarray, Any], RecordConstructorArgs):
    """
    Makes the time limit of an environment part of its task: truncation becomes termination, and the observation gets a timer.

    The timer distinguishes a state near the limit from the same state far from it, whose value differs (Pardo et al., Time
    Limits in Reinforcement Learning, https://arxiv.org/abs/1712.00378).

    :param env: An environment with flat float32 observations (D,), which truncates after ``limit`` steps.
    :param limit: The time limit, in steps.
    """

    def __init__(self, env: gym.Env[np.ndarray, Any], limit: int) -> None:
        RecordConstructorArgs.__init__(self, limit=limit)
        super().__init__(env)
        space = env.observation_space
        assert isinstance(space, spaces.Box)
        self.observation_space = spaces.Box(
            np.append(space.low, np.float32(0.0)), np.append(space.high, np.float32(1.0)), dtype=np.float32
        )
        self._limit = limit
        self._steps = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        """:return: The first observation, with the timer at 0, and the info."""
        obs, info = self.env.reset(seed=seed, options=options)
        self._steps = 0
        return self._with_timer(obs), info

    def step(self, action: Any) -> tuple[np.ndarray, Any, bool, bool, dict[str, Any]]:
        """:return: The step of the environment, with truncation reported as termination."""
        obs, reward, terminated, truncated, info = self.env.step(action)
        self._steps += 1
        return self._with_timer(obs), reward, terminated or truncated, False, info

    def _with_timer(self, obs: np.ndarray) -> np.ndarray:
        return np.append(obs, np.float32(min(self._steps / self._limit, 1.0)))


class OwnRandomness(gym.Wrapper[Any, Any, Any, Any], RecordConstructorArgs):
    """
    Gives an environment its own random generators if its ``reset`` draws from the global ones of Python and NumPy.

    POPGym's mazes do so. Without this wrapper, seeded environments of one process change each other's random numbers, and they
    seed the global generators of the whole process.

    :param env: An environment that uses the global generators in ``reset`` only.
    """

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        RecordConstructorArgs.__init__(self)
        super().__init__(env)
        self._own: tuple[Any, Any] | None = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """:return: The first observation and info. The global generators are unchanged afterwards."""
        global_states = random.getstate(), np.random.get_state()  # noqa: NPY002
        try:
            if self._own is None:
                _set_global_randomness(random.Random().getstate(), np.random.RandomState().get_state())
            else:
                _set_global_randomness(*self._own)
            result = self.env.reset(seed=seed, options=options)
            self._own = random.getstate(), np.random.get_state()  # noqa: NPY002
            return result
        finally:
            _set_global_randomness(*global_states)


def _set_global_randomness(python_state: Any, numpy_state: Any) -> None:
    random.setstate(python_state)
    np.random.set_state(numpy_state)  # noqa: NPY002


class POPGymAdapter(gym.Wrapper[Any, Any, Any, Any], RecordConstructorArgs):
    """
    Adds two requirements of gymnasium that POPGym lacks: an ``info`` that later steps do not change, and rendering.

    For tasks without render modes, the rendering is a line of text with step, action, reward and observation before any
    encoding. ``"human"`` prints it at each ``reset`` and ``step``; ``"ansi"`` returns it from ``render``. A few tasks can
    print their hidden state with ``env.unwrapped.render()``.

    :param env: An environment of POPGym, whose ``render_mode`` is set.
    """

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        RecordConstructorArgs.__init__(self)
        super().__init__(env)
        self._writes = not env.metadata["render_modes"]
        if self._writes:
            self.metadata = {"render_modes": ["human", "ansi"], "render_fps": 4}
        self._steps = 0
        self._text = ""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """:return: The first observation and info of the environment."""
        obs, info = self.env.reset(seed=seed, options=options)
        self._steps = 0
        self._write("reset", obs)
        return obs, deepcopy(info)

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """:return: The step of the environment."""
        obs, reward, terminated, truncated, info = self.env.step(action)
        self._steps += 1
        if self._writes and self.render_mode is not None:
            self._write(f"step {self._steps}: action {action}, reward {reward:+.4f}", obs)
        return obs, reward, terminated, truncated, deepcopy(info)

    def render(self) -> Any:
        """:return: The environment's own rendering if it has one; else the text (``"ansi"``), or ``None`` (``"human"``)."""
        if not self._writes:
            return self.env.render()
        return self._text if self.render_mode == "ansi" else None

    def _write(self, event: str, obs: Any) -> None:
        self._text = f"{event}, observation {obs}"
        if self._writes and self.render_mode == "human":
            print(self._text)
