"""
T-Maze: a sign at one end of a corridor shows which way to turn at the other end.

Source: the task is that of Bakker, "Reinforcement Learning with Long Short-Term Memory", NeurIPS 2001. The rules are those of
Ni et al., "When Do Transformers Shine in RL? Decoupling Memory from Credit Assignment", NeurIPS 2023
(https://arxiv.org/abs/2307.03864), and their code, ``envs/tmaze.py`` and ``configs/envs/tmaze_*.py`` of
https://github.com/twni2016/Memory-RL.
"""

import math
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from sb3_cyborg.checks import check_options, check_positive
from sb3_cyborg.envs.native_vec_env import NativeVecEnv
from sb3_cyborg.envs.render_mode import check_render_mode

MOVES = np.array([[1, 0], [0, 1], [-1, 0], [0, -1]])  # x, y of the actions right, up, left, down
OPTIONS = ("active", "corridor_length", "penalty", "ambiguous_position", "expose_goal", "render_mode")


class TMazeEnv(gym.Env[np.ndarray, np.int64]):
    """
    The agent sees the goal at the oracle, walks through the corridor and turns towards the goal.

    ::

                                 goal, y = 1
        oracle  start ........ junction
                                 goal, y = -1

    The oracle is at x = 0, and the junction is ``corridor_length`` cells to the right of the start. In the passive form the
    start is the oracle, so the first observation shows the goal. In the active form the start is one cell to the right of the
    oracle, and the agent must step back to see the goal. The oracle shows the goal (-1 or 1) on the first visit only.

    An episode has exactly the steps that the best policy needs, ``corridor_length + 1`` (passive) or ``corridor_length + 3``
    (active). The reward of the last step is 1 if it ends in the goal, else 0. The reward of each earlier step is ``penalty``
    if the agent is behind the best policy (``x < t - oracle_length``), else 0. Actions 0 to 3 move right, up, left and down; a
    move into a wall has no effect.

    The observation is float32. With ``ambiguous_position`` it is (2,): ``[0, goal]`` at the oracle (0 on later visits),
    ``[0, 0]`` in the corridor, ``[1, y]`` at the junction and beyond. Otherwise it is (3,): ``[x, y, goal]``.

    ``info["is_success"]`` of the last step is whether it ended in the goal.

    :param active: Whether the agent must go to the oracle first.
    :param corridor_length: Cells from the start to the junction, at least 1.
    :param penalty: Reward of a step behind the best policy, at most 0. ``None`` is the paper's ``-1 / corridor_length``. With
        0 a long corridor is very hard to explore.
    :param ambiguous_position: Whether all corridor cells look the same, as in the paper; otherwise x and y are observed.
    :param expose_goal: Whether the observation shows the goal after the visit of the oracle, too. The task then needs no
        memory. Requires ``ambiguous_position=False``.
    :param render_mode: ``"rgb_array"`` draws the maze; ``None`` draws nothing.
    :param unknown: Any other keyword is an error, which names the nearest known keyword.
    :raises ValueError: for a length that is not a whole number of at least 1, a positive penalty, an unknown render mode and
        unknown keywords.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 4}  # noqa: RUF012 gymnasium's convention

    def __init__(
        self,
        active: bool = False,
        corridor_length: int = 10,
        penalty: float | None = None,
        ambiguous_position: bool = True,
        expose_goal: bool = False,
        render_mode: str | None = None,
        **unknown: Any,
    ):
        check_options("TMazeEnv", unknown, OPTIONS)
        check_positive(corridor_length=corridor_length)
        for name, value in (("active", active), ("ambiguous_position", ambiguous_position), ("expose_goal", expose_goal)):
            if not isinstance(value, (bool, np.bool_)):
                raise ValueError(f"`{name}` must be True or False, got {value!r}.")
        if penalty is None:
            penalty = -1 / corridor_length
        if not (isinstance(penalty, (int, float, np.number)) and -math.inf < penalty <= 0):
            raise ValueError(
                f"`penalty` must be a finite number of at most 0, or None for -1 / corridor_length, got {penalty!r}."
            )
        if expose_goal and ambiguous_position:
            raise ValueError("`expose_goal`=True needs `ambiguous_position`=False.")
        check_render_mode(render_mode, self.metadata["render_modes"])
        self.active = bool(active)
        self.corridor_length = int(corridor_length)
        self.penalty = float(penalty)
        self.ambiguous_position = bool(ambiguous_position)
        self.expose_goal = bool(expose_goal)
        self.render_mode = render_mode
        self.oracle_length = 1 if active else 0  # from the oracle to the start
        self.junction = self.oracle_length + self.corridor_length
        self.episode_length = self.corridor_length + 2 * self.oracle_length + 1
        low, high = ([0, -1], [1, 1]) if ambiguous_position else ([0, -1, -1], [self.junction, 1, 1])
        self.observation_space = spaces.Box(np.array(low, dtype=np.float32), np.array(high, dtype=np.float32))
        self.action_space = spaces.Discrete(len(MOVES))
        self.timestep = self.episode_length  # the value at the end of an episode, so that a step before reset() is an error
        self.x, self.y, self.goal = self.oracle_length, 0, 1
        self.oracle_visited = False

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        # A double rather than an integer, as in the native form, which draws the same numbers from the same stream.
        self.goal = 1 if self.np_random.random(1)[0] >= 0.5 else -1
        self.x, self.y = self.oracle_length, 0
        self.oracle_visited = False
        self.timestep = 0
        return self._observe(), {}

    def step(self, action: int | np.int64) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        if self.timestep >= self.episode_length:
            raise gym.error.ResetNeeded("The episode is over: call `reset()` before the next step.")
        if not self.action_space.contains(action):
            raise ValueError(f"Action must be 0, 1, 2 or 3, got {action!r}.")
        self.timestep += 1
        x, y = self.x + int(MOVES[action, 0]), self.y + int(MOVES[action, 1])
        if (0 <= x <= self.junction and y == 0) or (x == self.junction and abs(y) == 1):
            self.x, self.y = x, y
        obs = self._observe()
        if self.timestep < self.episode_length:
            behind = self.x < self.timestep - self.oracle_length
            return obs, self.penalty if behind else 0.0, False, False, {}
        success = self.y == self.goal
        return obs, float(success), True, False, {"is_success": success}

    def _observe(self) -> np.ndarray:
        at_oracle = self.x == 0
        goal = self.goal if at_oracle and not self.oracle_visited else 0
        self.oracle_visited = self.oracle_visited or at_oracle
        if self.ambiguous_position:
            return np.array([self.x == self.junction, goal + self.y], dtype=np.float32)  # y is 0 at the oracle
        if self.expose_goal:
            goal = self.goal if self.oracle_visited else 0
        return np.array([self.x, self.y, goal], dtype=np.float32)

    def render(self) -> np.ndarray | None:
        """:return: The maze, (48, 16 * (junction + 1), 3) of uint8: goal green, oracle blue, agent red, floor white."""
        if self.render_mode is None:
            return None
        cells = np.zeros((3, self.junction + 1, 3))
        cells[1, :] = cells[:, -1] = (1, 1, 1)
        cells[1, 0] = (0, 0, 1)
        cells[1 - self.goal, -1] = (0, 1, 0)
        cells[1 - self.y, self.x] = (1, 0, 0)
        return np.kron(255 * cells, np.ones((16, 16, 1))).astype(np.uint8)


class TMazeVecEnv(NativeVecEnv):
    """
    Several :class:`TMazeEnv` stepped as arrays. Equal to a ``DummyVecEnv`` of them, each in a ``Monitor``.

    :param num_envs: Number of environments, at least 1.
    :param seed: Environment ``i`` gets ``seed + i`` at the first ``reset()``; ``None`` draws random seeds.
    :param env_kwargs: Keyword arguments of :class:`TMazeEnv`, e.g. ``active`` or ``corridor_length``.
    :raises ValueError: for values that :class:`TMazeEnv` refuses, and for a ``num_envs`` below 1.
    """

    def __init__(self, num_envs: int, *, seed: int | None = None, **env_kwargs: Any):
        self._maze = TMazeEnv(**env_kwargs)
        super().__init__(self._maze, num_envs, num_draws=1, seed=seed)

    def _begin(self, draws: np.ndarray) -> None:
        self.goal = np.where(draws[:, 0] >= 0.5, 1, -1)
        self.x = np.full(self.num_envs, self._maze.oracle_length)
        self.y = np.zeros(self.num_envs, dtype=np.int64)
        self.oracle_visited = np.zeros(self.num_envs, dtype=bool)

    def _advance(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        maze = self._maze
        x, y = self.x + MOVES[actions, 0], self.y + MOVES[actions, 1]
        in_corridor = (y == 0) & (x >= 0) & (x <= maze.junction)
        free = in_corridor | ((x == maze.junction) & (np.abs(y) == 1))
        self.x, self.y = np.where(free, x, self.x), np.where(free, y, self.y)
        if self.timestep < maze.episode_length:
            return np.where(self.x < self.timestep - maze.oracle_length, maze.penalty, 0.0), None
        successes = self.y == self.goal
        return successes.astype(np.float64), successes

    def _observe(self) -> np.ndarray:
        maze = self._maze
        at_oracle = self.x == 0
        goal = np.where(at_oracle & ~self.oracle_visited, self.goal, 0)
        self.oracle_visited = self.oracle_visited | at_oracle
        if maze.ambiguous_position:
            columns = [self.x == maze.junction, goal + self.y]
        else:
            columns = [self.x, self.y, np.where(self.oracle_visited, self.goal, 0) if maze.expose_goal else goal]
        obs = np.empty((self.num_envs, len(columns)), dtype=np.float32)
        for i, column in enumerate(columns):
            obs[:, i] = column
        return obs

    def _copy_state(self, index: int) -> None:
        maze = self._maze
        maze.timestep, maze.oracle_visited = self.timestep, bool(self.oracle_visited[index])
        maze.x, maze.y, maze.goal = int(self.x[index]), int(self.y[index]), int(self.goal[index])
