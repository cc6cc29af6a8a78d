"""The base class of environments that compute all of their copies as NumPy arrays."""

import time
import warnings
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, NoReturn

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.utils import seeding
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvObs, VecEnvStepReturn

from sb3_cyborg.checks import check_positive, check_whole


class NativeVecEnv(VecEnv):
    """
    Steps ``num_envs`` copies of one environment together, as arrays.

    All episodes must have the same length and draw all of their random numbers at their start. The copies therefore start and
    end their episodes together. The results equal those of a ``DummyVecEnv`` of the single environment in a ``Monitor``:
    observations, rewards, dones, ``terminal_observation``, ``TimeLimit.truncated`` and ``episode`` (``r``, ``l``, ``t``). Copy
    ``i`` has the random stream of the single environment with ``seed + i``.

    The infos of a step are new dicts, so callbacks and wrappers may write to them.

    :param env: The single environment, which provides spaces and attributes. Its ``reset`` must draw ``num_draws`` doubles
        with one call of ``np_random.random(num_draws)``, and no other random numbers.
    :param num_envs: Number of copies, at least 1.
    :param num_draws: Number of doubles that an episode draws.
    :param seed: Copy ``i`` gets ``seed + i`` at the first ``reset()``; ``None`` draws random seeds.
    :raises ValueError: for a ``num_envs`` below 1 and a negative ``seed``.
    """

    def __init__(self, env: gym.Env[Any, Any], num_envs: int, num_draws: int, seed: int | None = None):
        check_positive(num_envs=num_envs)
        assert isinstance(env.action_space, spaces.Discrete)
        self._env = env
        self._num_actions = int(env.action_space.n)
        self._num_draws = num_draws
        self._random_streams: list[np.random.Generator | None] = [None] * num_envs
        self._actions: np.ndarray | None = None
        self._returns = np.zeros(num_envs)
        self._start_time = time.time()
        self.timestep = 0  # of the episode, the same in all copies
        super().__init__(num_envs, env.observation_space, env.action_space)
        self.metadata = env.metadata
        if seed is not None:
            check_whole(0, seed=seed)
            self.seed(int(seed))

    @abstractmethod
    def _begin(self, draws: np.ndarray) -> None:
        """
        Starts an episode in every copy.

        :param draws: Uniform random numbers in [0, 1), (num_envs, num_draws).
        """

    @abstractmethod
    def _advance(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """
        Takes a step, which ``self.timestep`` already counts.

        :param actions: Valid actions, (num_envs,).
        :return: Rewards, float64 (num_envs,). Whether each copy succeeded (num_envs,) at the end of the episodes, ``None``
            before it.
        """

    @abstractmethod
    def _observe(self) -> np.ndarray:
        """:return: The observations, (num_envs, ...), in a new array."""

    @abstractmethod
    def _copy_state(self, index: int) -> None:
        """Copies the state of copy ``index`` into the single environment, ``self._env``."""

    def reset(self) -> VecEnvObs:
        for index, seed in enumerate(self._seeds):
            if seed is not None or self._random_streams[index] is None:
                self._random_streams[index], _ = seeding.np_random(seed)
        self._reset_seeds()
        self._reset_options()
        return self._begin_episodes()

    def _begin_episodes(self) -> np.ndarray:
        draws = np.empty((self.num_envs, self._num_draws))
        for stream, row in zip(self._random_streams, draws, strict=True):
            assert stream is not None
            stream.random(out=row)
        self.timestep = 0
        self._returns = np.zeros(self.num_envs)
        self.reset_infos = [{} for _ in range(self.num_envs)]
        self._begin(draws)
        return self._observe()

    def step_async(self, actions: np.ndarray) -> None:
        if self._random_streams[0] is None:
            raise gym.error.ResetNeeded("Call `reset()` before the first step.")
        actions = np.asarray(actions)
        if actions.shape != (self.num_envs,) or not np.issubdtype(actions.dtype, np.integer):
            raise ValueError(
                f"Actions must be integers of shape ({self.num_envs},), got {actions.dtype} of shape {actions.shape}."
            )
        if actions.min() < 0 or actions.max() >= self._num_actions:
            index = int(np.flatnonzero((actions < 0) | (actions >= self._num_actions))[0])
            raise ValueError(f"Action of environment {index} must be in 0..{self._num_actions - 1}, got {actions[index]}.")
        self._actions = actions

    def step_wait(self) -> VecEnvStepReturn:
        actions, self._actions = self._actions, None
        assert actions is not None, "step_async() comes before step_wait()"
        self.timestep += 1
        rewards, successes = self._advance(actions)
        self._returns += rewards
        obs = self._observe()
        if successes is None:
            infos: list[dict[str, Any]] = [{"TimeLimit.truncated": False} for _ in range(self.num_envs)]
        else:
            infos = self._final_infos(obs, successes)
            obs = self._begin_episodes()
        return obs, rewards.astype(np.float32), np.full(self.num_envs, successes is not None), infos

    def _final_infos(self, obs: np.ndarray, successes: np.ndarray) -> list[dict[str, Any]]:
        """:return: The infos of ``Monitor`` and ``DummyVecEnv`` for the last step of an episode."""
        seconds = round(time.time() - self._start_time, 6)
        return [
            {
                "is_success": success,
                "episode": {"r": round(episode_return, 6), "l": self.timestep, "t": seconds},
                "TimeLimit.truncated": False,
                "terminal_observation": terminal_obs,
            }
            for success, episode_return, terminal_obs in zip(successes.tolist(), self._returns.tolist(), obs, strict=True)
        ]

    def close(self) -> None:
        self._env.close()

    def _single(self, index: int) -> gym.Env[Any, Any]:
        """:return: The single environment in the state of copy ``index``. Changes to it do not affect the copy."""
        stream = self._random_streams[index]
        if stream is not None:
            self._env.np_random = stream
            self._copy_state(index)
        return self._env

    def get_images(self) -> Sequence[np.ndarray | None]:
        if self.render_mode != "rgb_array":
            warnings.warn(f"Images need render_mode='rgb_array', this environment has {self.render_mode!r}.", stacklevel=2)
            return [None] * self.num_envs
        return self.env_method("render")

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        return [getattr(self._single(index), attr_name) for index in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> NoReturn:
        """:raises NotImplementedError: always. The copies share their attributes, which are fixed at construction."""
        raise NotImplementedError(
            f"{type(self).__name__} cannot set {attr_name!r}: its copies share their attributes. "
            f"Make a new one, or use a DummyVecEnv of {type(self._env).__name__}."
        )

    def env_method(self, method_name: str, *args: Any, indices: VecEnvIndices = None, **kwargs: Any) -> list[Any]:
        """
        Calls a method that only reads the environment, such as ``render``.

        :raises NotImplementedError: for ``reset``, ``step`` and ``close``, which act on all copies together.
        """
        if method_name in ("reset", "step", "close"):
            raise NotImplementedError(
                f"{type(self).__name__} can {method_name} its copies only together: call its own `{method_name}()`, "
                f"or use a DummyVecEnv of {type(self._env).__name__}."
            )
        # One call per copy, because the single environment holds the state of one copy at a time.
        return [getattr(self._single(index), method_name)(*args, **kwargs) for index in self._get_indices(indices)]

    def env_is_wrapped(
        self, wrapper_class: type[gym.Wrapper[Any, Any, Any, Any]], indices: VecEnvIndices = None
    ) -> list[bool]:
        """:return: True for ``Monitor``, because the infos contain its episode statistics, which SB3 checks for."""
        return [issubclass(Monitor, wrapper_class) for _ in self._get_indices(indices)]
