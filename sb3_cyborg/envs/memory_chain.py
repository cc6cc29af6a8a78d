"""
Memory Chain, the task of bsuite's "memory length" and "memory size" experiments.

Source: Osband et al., "Behaviour Suite for Reinforcement Learning", ICLR 2020 (https://arxiv.org/abs/1908.03568), and its
code, ``bsuite/environments/memory_chain.py`` of https://github.com/google-deepmind/bsuite.
"""

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from sb3_cyborg.checks import check_options, check_positive
from sb3_cyborg.envs.native_vec_env import NativeVecEnv
from sb3_cyborg.envs.render_mode import check_render_mode


class MemoryChainEnv(gym.Env[np.ndarray, np.int64]):
    """
    The agent sees some bits at the start of the episode and must name one of them at the end.

    The observation, (2 + num_bits,) of float32, is ``[time to live, query, context]``. The time falls from 1 to 0 by ``1 /
    memory_length`` per step. The context, -1 or 1 for each bit, is visible while the time is 1. The query is the index of the
    bit to name. It is visible in the observation before the last action. All other entries are 0. The last action, 0 or 1, has
    reward 1 if it equals that bit and -1 if it does not; all other actions have no effect and reward 0.

    The rules are those of bsuite, including its peculiarities. The first step does not advance the time, so ``reset()`` and
    the first step return the same observation. An episode has ``memory_length + 1`` steps. The last observation shows neither
    query nor context. A query of bit 0 cannot be told from no query. Only the shape differs: it is (1, 2 + num_bits) in
    bsuite.

    ``info["is_success"]`` of the last step is whether the answer was correct.

    :param memory_length: Steps for which the context must be remembered, at least 1.
    :param num_bits: Number of bits in the context, at least 1.
    :param render_mode: ``"rgb_array"`` draws the observation as a row of squares; ``None`` draws nothing.
    :param unknown: Any other keyword is an error, which names the nearest known keyword.
    :raises ValueError: for sizes that are not whole numbers of at least 1, an unknown render mode, and unknown keywords.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 4}  # noqa: RUF012 gymnasium's convention

    def __init__(self, memory_length: int = 10, num_bits: int = 1, render_mode: str | None = None, **unknown: Any):
        check_options("MemoryChainEnv", unknown, ("memory_length", "num_bits", "render_mode"))
        check_positive(memory_length=memory_length, num_bits=num_bits)
        check_render_mode(render_mode, self.metadata["render_modes"])
        self.memory_length = int(memory_length)
        self.num_bits = int(num_bits)
        self.render_mode = render_mode
        # With one bit the query is always 0, but gymnasium requires low < high.
        self.observation_space = spaces.Box(
            low=np.array([0, 0] + [-1] * num_bits, dtype=np.float32),
            high=np.array([1, max(1, num_bits - 1)] + [1] * num_bits, dtype=np.float32),
        )
        self.action_space = spaces.Discrete(2)
        self.timestep = self.memory_length + 1  # the value at the end of an episode, so that a step before reset() is an error
        self.context = np.zeros(num_bits, dtype=np.int64)
        self.query = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        # One draw of doubles, as in the native form, which draws the same numbers from the same stream.
        draws = self.np_random.random(self.num_bits + 1)
        self.context = (draws[:-1] >= 0.5).astype(np.int64)
        self.query = int(draws[-1] * self.num_bits)
        self.timestep = 0
        return self._observe(0), {}

    def step(self, action: int | np.int64) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        if self.timestep > self.memory_length:
            raise gym.error.ResetNeeded("The episode is over: call `reset()` before the next step.")
        if not self.action_space.contains(action):
            raise ValueError(f"Action must be 0 or 1, got {action!r}.")
        self.timestep += 1
        obs = self._observe(self.timestep - 1)
        if self.timestep <= self.memory_length:
            return obs, 0.0, False, False, {}
        correct = bool(action == self.context[self.query])
        return obs, 1.0 if correct else -1.0, True, False, {"is_success": correct}

    def _observe(self, time: int) -> np.ndarray:
        obs = np.zeros(2 + self.num_bits, dtype=np.float32)
        obs[0] = 1 - time / self.memory_length
        if time == self.memory_length - 1:
            obs[1] = self.query
        if time == 0:
            obs[2:] = 2 * self.context - 1
        return obs

    def render(self) -> np.ndarray | None:
        """:return: The last observation, (32, 32 * (2 + num_bits), 3) of uint8: time and query grey, bits blue and red."""
        if self.render_mode is None:
            return None
        obs = self._observe(max(0, self.timestep - 1))
        pixels = np.zeros((1, len(obs), 3))
        pixels[0, :2] = (obs[:2] / self.observation_space.high[:2])[:, None]  # type: ignore[attr-defined]  # it is a Box
        pixels[0, 2:, 0] = obs[2:] == 1
        pixels[0, 2:, 2] = obs[2:] == -1
        return np.kron(255 * pixels, np.ones((32, 32, 1))).astype(np.uint8)


class MemoryChainVecEnv(NativeVecEnv):
    """
    Several :class:`MemoryChainEnv` stepped as arrays. Equal to a ``DummyVecEnv`` of them, each in a ``Monitor``.

    :param num_envs: Number of environments, at least 1.
    :param seed: Environment ``i`` gets ``seed + i`` at the first ``reset()``; ``None`` draws random seeds.
    :param env_kwargs: Keyword arguments of :class:`MemoryChainEnv`: ``memory_length``, ``num_bits``, ``render_mode``.
    :raises ValueError: for values that :class:`MemoryChainEnv` refuses, and for a ``num_envs`` below 1.
    """

    def __init__(self, num_envs: int, *, seed: int | None = None, **env_kwargs: Any):
        self._chain = MemoryChainEnv(**env_kwargs)
        super().__init__(self._chain, num_envs, num_draws=self._chain.num_bits + 1, seed=seed)

    def _begin(self, draws: np.ndarray) -> None:
        self.context = (draws[:, :-1] >= 0.5).astype(np.int64)  # (N, num_bits)
        self.query = (draws[:, -1] * self._chain.num_bits).astype(np.int64)  # (N,)

    def _advance(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        if self.timestep <= self._chain.memory_length:
            return np.zeros(self.num_envs), None
        correct = actions == self.context[np.arange(self.num_envs), self.query]
        return np.where(correct, 1.0, -1.0), correct

    def _observe(self) -> np.ndarray:
        time = max(0, self.timestep - 1)  # the first step returns the observation of reset()
        obs = np.zeros((self.num_envs, 2 + self._chain.num_bits), dtype=np.float32)
        obs[:, 0] = 1 - time / self._chain.memory_length
        if time == self._chain.memory_length - 1:
            obs[:, 1] = self.query
        if time == 0:
            obs[:, 2:] = 2 * self.context - 1
        return obs

    def _copy_state(self, index: int) -> None:
        chain = self._chain
        chain.timestep, chain.context, chain.query = self.timestep, self.context[index].copy(), int(self.query[index])
