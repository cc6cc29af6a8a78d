"""
Evaluation with action masks, and sb3-contrib's functions for them.

``evaluate_policy`` and ``MaskableEvalCallback`` replace those of sb3-contrib, which drop the state between two steps, so that
an agent with a memory acts from an empty one. ``ActionMasker``, ``get_action_masks`` and ``is_masking_supported`` are
sb3-contrib's own.
"""

from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
from sb3_contrib import MaskablePPO
from sb3_contrib.common.maskable.utils import get_action_masks, is_masking_supported
from sb3_contrib.common.wrappers import ActionMasker
from stable_baselines3.common import evaluation
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from sb3_cyborg.memory_ppo.maskable import NO_MASKS, MaskableMemoryPPO
from sb3_cyborg.memory_ppo.memory_ppo import MemoryPPO

__all__ = [
    "ActionMasker",
    "MaskableEvalCallback",
    "WithActionMasks",
    "evaluate_policy",
    "get_action_masks",
    "is_masking_supported",
]


class WithActionMasks:
    """
    An agent that reads the masks from its environments: ``predict`` has no argument for them.

    It is for code that calls ``predict`` as SB3 does. All other attributes are the agent's.

    :param model: The agent, a ``MaskableMemoryPPO`` or a ``MaskablePPO``.
    :param env: The environments that it acts in, from which each :meth:`predict` reads the present masks.
    :raises ValueError: if the environments have no masks.
    """

    def __init__(self, model: MemoryPPO | MaskablePPO, env: VecEnv) -> None:
        if not is_masking_supported(env):
            raise ValueError(NO_MASKS)
        self.model, self.env = model, env

    def predict(
        self, observation: Any, state: Any = None, episode_start: np.ndarray | None = None, deterministic: bool = False
    ) -> tuple[np.ndarray, Any]:
        """
        Choose legal actions, see :meth:`MaskableMemoryPPO.predict`.

        :param observation: The present observations of the environments, (N, ...).
        :param state: State that the previous call returned; ``None`` is the initial state.
        :param episode_start: Whether an episode starts with the observation, (N,).
        :param deterministic: Return the mode instead of a sample.
        :return: Actions, and the state after the step.
        """
        model: Any = self.model  # the states of the two classes differ
        masks = get_action_masks(self.env)
        actions, new_state = model.predict(observation, state, episode_start, deterministic, action_masks=masks)
        return actions, new_state

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)


def evaluate_policy(
    model: MaskableMemoryPPO | MaskablePPO,
    env: gym.Env[Any, Any] | VecEnv,
    n_eval_episodes: int = 10,
    deterministic: bool = True,
    render: bool = False,
    callback: Callable[[dict[str, Any], dict[str, Any]], None] | None = None,
    reward_threshold: float | None = None,
    return_episode_rewards: bool = False,
    warn: bool = True,
    use_masking: bool = True,
) -> tuple[float, float] | tuple[list[float], list[int]]:
    """
    Evaluate an agent, as SB3's function of this name, with action masks.

    :param model: The agent, a ``MaskableMemoryPPO`` or a ``MaskablePPO``.
    :param env: Environments to evaluate in.
    :param n_eval_episodes: Number of episodes, divided evenly among the environments.
    :param deterministic: Take the mode of the policy instead of a sample.
    :param render: Whether to render the environments.
    :param callback: Function of the local and global variables, called after each step.
    :param reward_threshold: Least mean return; a lower one is an ``AssertionError``.
    :param return_episode_rewards: Whether to return the returns and lengths of the episodes instead of mean and deviation.
    :param warn: Whether to warn of an environment without a ``Monitor``.
    :param use_masking: Whether to ask the environments for masks; ``False`` takes every action as legal.
    :return: Mean and standard deviation of the returns, or the returns and lengths of the episodes.
    :raises ValueError: if the environments have no masks, and for a mask without a legal action.
    """
    envs: VecEnv = env if isinstance(env, VecEnv) else DummyVecEnv([lambda: env])
    agent: Any = WithActionMasks(model, envs) if use_masking else model
    return evaluation.evaluate_policy(
        agent, envs, n_eval_episodes, deterministic, render, callback, reward_threshold, return_episode_rewards, warn
    )


class MaskableEvalCallback(EvalCallback):
    """
    SB3's ``EvalCallback`` with action masks.

    :param args: Arguments of ``EvalCallback``.
    :param use_masking: Whether to ask the environments for masks; ``False`` takes every action as legal.
    :param kwargs: Keyword arguments of ``EvalCallback``.
    :raises ValueError: when training begins, if the evaluation environments have no masks.
    """

    model: MaskableMemoryPPO

    def __init__(self, *args: Any, use_masking: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.use_masking = use_masking

    def _init_callback(self) -> None:
        super()._init_callback()
        self._evaluated: Any = WithActionMasks(self.model, self.eval_env) if self.use_masking else self.model

    def _on_step(self) -> bool:
        model, self.model = self.model, self._evaluated  # SB3 evaluates, and saves, `self.model`
        try:
            return super()._on_step()
        finally:
            self.model = model
