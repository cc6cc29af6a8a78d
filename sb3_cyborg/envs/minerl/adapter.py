"""MineRL's tasks as gymnasium environments that restart Minecraft after a fault."""

import logging
from typing import Any, SupportsFloat

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from sb3_cyborg.checks import check_positive, check_whole
from sb3_cyborg.envs.minerl.actions import macro_actions
from sb3_cyborg.envs.minerl.observations import FrameStack, Observation, ObservationEncoder
from sb3_cyborg.envs.minerl.process import PAGE, MineRLError, Simulator, describe, find_simulator, make_task
from sb3_cyborg.envs.registration import MINERL
from sb3_cyborg.envs.render_mode import check_render_mode

# Minecraft counts a mission's time in ticks of its world, which start shortly before the first step.
TIME_UP_SLACK = 40
# Steps without a fault after which the count of faults in a row is reset.
RECOVERED_AFTER = 100

logger = logging.getLogger(__name__)


class MineRLEnv(gym.Env[Observation, np.int64]):
    """
    A task of MineRL (Guss et al., 2019, https://arxiv.org/abs/1907.13440) with discrete actions, for SB3.

    The first ``reset`` starts Minecraft, and ``close`` ends it. If Minecraft hangs, dies or loses its connection, the step
    returns the last observation with ``terminated=False``, ``truncated=True`` and ``info["minerl_fault"]``, and the next
    ``reset`` starts a new Minecraft. See docs/minerl.md.

    :param env_id: The task, by MineRL's name (``"MineRLTreechop-v0"``) or its short name (``"minerl_treechop"``).
    :param frame_skip: Ticks of 50 ms for which each action is repeated, at least 1. Their rewards are added. Camera and
        choices (``craft``...) act in the first tick only.
    :param frame_stack: Frames in an observation, the newest last, at least 1.
    :param retries: Faults in a row, at least 0, after each of which Minecraft is restarted; the next fault raises a
        ``MineRLError``. The count starts again after 100 steps without a fault.
    :param restart_every: Episodes after which Minecraft is restarted, because it leaks memory; ``None`` disables it.
    :param launch_timeout: Time limit for the start of Minecraft, in seconds.
    :param reset_timeout: Time limit for the creation of a world, in seconds.
    :param step_timeout: Time limit for a tick, in seconds.
    :param render_mode: ``"rgb_array"``, or ``None``.
    :raises ImportError: if MineRL is not installed.
    :raises FileNotFoundError: if its simulator was not built.
    :raises ValueError: for an unknown task or render mode, and for numbers out of range.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}  # noqa: RUF012

    def __init__(
        self,
        env_id: str = "MineRLTreechop-v0",
        *,
        frame_skip: int = 4,
        frame_stack: int = 1,
        retries: int = 3,
        restart_every: int | None = 30,
        launch_timeout: float = 300.0,
        reset_timeout: float = 240.0,
        step_timeout: float = 60.0,
        render_mode: str | None = None,
    ) -> None:
        check_positive(frame_skip=frame_skip, frame_stack=frame_stack)
        check_whole(0, retries=retries)
        if restart_every is not None:
            check_positive(restart_every=restart_every)
        self._timeouts: dict[str, Any] = {
            "launch_timeout": launch_timeout,
            "reset_timeout": reset_timeout,
            "step_timeout": step_timeout,
        }
        for name, seconds in self._timeouts.items():
            if not isinstance(seconds, (int, float)) or not 0 < seconds < float("inf"):
                raise ValueError(f"`{name}` must be a number of seconds above 0, got {seconds!r}.")
        check_render_mode(render_mode, self.metadata["render_modes"])
        task = make_task(MINERL.get(env_id, env_id))
        find_simulator()
        self.env_id = task.spec.id
        self.render_mode = render_mode
        self.frame_skip, self.retries, self.restart_every = frame_skip, retries, restart_every
        self.max_ticks, self._solved_at = task.spec.max_episode_steps, task.spec.reward_threshold
        self._minerl_actions = task.action_space
        self._encoder = ObservationEncoder(task.observation_space)
        self._table = macro_actions(self._minerl_actions)
        self.action_names = tuple(action.name for action in self._table)
        self.vector_names = tuple(self._encoder.vector_names) * frame_stack
        self.action_space: spaces.Discrete = spaces.Discrete(len(self._table))
        self.observation_space = self._encoder.space(frame_stack)

        self.faults = 0  # in total
        self.launches = 0
        self._faults_in_a_row = 0
        self._last_error: Exception = RuntimeError("none so far")
        self._good_steps = 0
        self._simulator: Simulator | None = None
        self._frames = FrameStack(frame_stack)
        self._pov: np.ndarray | None = None
        self._running = False
        self._ticks, self._return = 0, 0.0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Observation, dict[str, Any]]:
        """
        Starts an episode in a new world, and Minecraft if it does not run.

        :param seed: Seed of the world, and of the random seeds of later worlds. ``None`` draws the next of these.
        :param options: Ignored.
        :return: The first observation, and an info with ``world_seed`` and ``launches``, the number of starts of Minecraft.
        :raises MineRLError: after more than ``retries`` faults in a row.
        """
        super().reset(seed=seed, options=options)
        world_seed = int(self.np_random.integers(2**31)) if seed is None else int(seed)
        self._running = False
        if self._simulator is not None and self._simulator.episodes == self.restart_every:
            self.close()
        raw = self._new_world(world_seed)
        self._running, self._ticks, self._return = True, 0, 0.0
        observation = self._frames.reset(self._see(raw))
        return observation, {"world_seed": world_seed, "launches": self.launches}

    def step(self, action: np.int64 | int) -> tuple[Observation, SupportsFloat, bool, bool, dict[str, Any]]:
        """
        Applies an action for ``frame_skip`` ticks, or until the episode ends.

        :param action: Index into ``action_names``.
        :return: Observation, sum of rewards, terminated, truncated, and MineRL's info with ``ticks``, the ticks of the episode
            so far, and after a fault ``minerl_fault``, its cause.
        """
        if not self.action_space.contains(action):
            raise ValueError(f"An action is a whole number from 0 to {len(self._table) - 1}, got {action!r}.")
        if self._simulator is None or not self._running:
            raise gym.error.ResetNeeded("`reset` the environment before its first step, and after the end of an episode.")
        reward, done, raw = 0.0, False, None
        info: dict[str, Any] = {}
        for tick in range(self.frame_skip):
            command = self._table[int(action)].to_minerl(self._minerl_actions, first=tick == 0)
            try:
                raw, gain, done, info = self._simulator.step(command)
            except Exception as error:
                self._fault(error)
                info = {"minerl_fault": describe(error)}
                break
            reward += gain
            self._ticks += 1
            if done:
                break
        # MineRL's observation after a fault is random, so the last observation of Minecraft replaces it.
        observation = self._frames.observation() if raw is None else self._frames.push(self._see(raw))
        lost = "minerl_fault" in info
        self._return += reward
        time_up = done and self._is_time_up()
        if not lost:
            self._good_steps += 1
            if self._good_steps >= RECOVERED_AFTER:
                self._faults_in_a_row = 0
        self._running = not (done or lost)
        return observation, reward, done and not time_up, lost or time_up, {**info, "ticks": self._ticks}

    def render(self) -> np.ndarray | None:
        """:return: The last image of the player's view, (height, width, 3), uint8; ``None`` without a render mode."""
        if self.render_mode is None or self._pov is None:
            return None
        return self._pov.copy()

    def close(self) -> None:
        """Ends Minecraft. A later ``reset`` starts it again."""
        self._running = False
        if self._simulator is not None:
            simulator, self._simulator = self._simulator, None
            simulator.close()

    def _see(self, raw: dict[str, Any]) -> Observation:
        frame = self._encoder.encode(raw)
        self._pov = frame["pov"] if isinstance(frame, dict) else frame
        return frame

    def _is_time_up(self) -> bool:
        """:return: Whether an episode that has ended did so because of its time limit."""
        solved = self._solved_at is not None and self._return >= self._solved_at
        return self.max_ticks is not None and self._ticks >= self.max_ticks - TIME_UP_SLACK and not solved

    def _new_world(self, seed: int) -> dict[str, Any]:
        while self._faults_in_a_row <= self.retries:
            try:
                if self._simulator is None:
                    self.launches += 1
                    self._simulator = Simulator(self.env_id, **self._timeouts)
                return self._simulator.reset(seed)
            except Exception as error:
                self._fault(error)
        raise MineRLError(
            f"{self.env_id} gives up after {self._faults_in_a_row} faults of Minecraft in a row (`retries`={self.retries}). "
            f"Minecraft was ended; {PAGE} lists causes. The last fault: {describe(self._last_error)}"
        ) from self._last_error

    def _fault(self, error: Exception) -> None:
        """Records a fault and ends Minecraft."""
        self.faults += 1
        self._faults_in_a_row += 1
        self._good_steps = 0
        self._last_error = error
        logger.warning("%s, fault %d in a row: %s", self.env_id, self._faults_in_a_row, describe(error))
        self.close()
