"""``MaskableMemoryPPO``: :class:`~sb3_cyborg.memory_ppo.memory_ppo.MemoryPPO` with action masks."""

from typing import Any, TypeVar

import numpy as np
import torch as th
from gymnasium import spaces
from sb3_contrib.common.maskable.utils import EXPECTED_METHOD_NAME, is_masking_supported
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.type_aliases import MaybeCallback
from stable_baselines3.common.vec_env import VecEnv

from sb3_cyborg.memory_ppo.action_masks import check_action_masks, component_sizes
from sb3_cyborg.memory_ppo.memory_ppo import MemoryPPO
from sb3_cyborg.memory_ppo.rollout_buffer_v7 import RolloutBufferV7

SelfMaskableMemoryPPO = TypeVar("SelfMaskableMemoryPPO", bound="MaskableMemoryPPO")

NO_MASKS = (
    "Environment does not support action masking. Consider using ActionMasker wrapper, or MemoryPPO, or `use_masking=False`."
)
"""Error message for environments without masks; its first two sentences are those of sb3-contrib."""


class MaskableMemoryPPO(MemoryPPO):
    """
    :class:`MemoryPPO` with invalid action masking: illegal actions have probability 0.

    It has the interface of sb3-contrib's ``MaskablePPO``. Environments have a method ``action_masks()``, or are wrapped in
    ``ActionMasker``, see :mod:`~sb3_cyborg.memory_ppo.action_masks` for its result. The masks are stored with the rollout, so
    that acting and training use the same ones. Probabilities, entropy, KL divergence and log barrier are those of the
    distribution over the legal actions. Invalid action masking: https://arxiv.org/abs/2006.14171.

    The parameters are those of :class:`MemoryPPO`, and so are the networks: a file of one class loads as the other one.

    :raises ValueError: for Box actions, and as :class:`MemoryPPO`.
    """

    _use_masking = True

    def _setup_model(self) -> None:
        if isinstance(self.action_space, spaces.Box):
            raise ValueError(
                f"MaskableMemoryPPO supports Discrete, MultiDiscrete and MultiBinary actions, got {self.action_space}; "
                "use MemoryPPO."
            )
        super()._setup_model()

    def _action_mask_dim(self) -> int:
        return sum(component_sizes(self.action_space))

    def _action_masks(self, env: VecEnv) -> th.Tensor | None:
        if not self._use_masking:
            return None
        masks = env.env_method(EXPECTED_METHOD_NAME)
        legal = check_action_masks(masks, env.num_envs, self.action_space, f"after {self.num_timesteps} steps")
        return th.as_tensor(legal, device=self.device)

    def collect_rollouts(  # type: ignore[override]  # see MemoryPPO
        self, env: VecEnv, callback: BaseCallback, rollout_buffer: RolloutBufferV7, n_rollout_steps: int
    ) -> bool:
        """
        Collect a rollout, with the masks of its steps.

        :param env: The training environments.
        :param callback: Callback, called at each step and at the start and end of the rollout.
        :param rollout_buffer: Buffer to fill.
        :param n_rollout_steps: Steps of each environment, equal to the size of the buffer.
        :return: False if the callback stopped training.
        :raises ValueError: for environments without masks, for a mask without a legal action, and as :class:`MemoryPPO`.
        """
        if self._use_masking and not is_masking_supported(env):
            raise ValueError(NO_MASKS)
        return super().collect_rollouts(env, callback, rollout_buffer, n_rollout_steps)

    def predict(
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        state: Any = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
        action_masks: np.ndarray | None = None,
    ) -> tuple[np.ndarray, Any]:
        """
        Choose actions, as in SB3; the returned state is the ``state`` of the next call.

        :param observation: One observation, or a batch of them (B, ...).
        :param state: State that the previous call returned; ``None`` is the initial state.
        :param episode_start: Whether an episode starts with the observation, (B,); ``None`` means that none does.
        :param deterministic: Return the mode instead of a sample.
        :param action_masks: Legal actions, true or 1, (B, M) or for one observation (M,); ``None`` if all are.
        :return: Actions, and the state after the step: a dictionary of arrays, every leaf ``(B, ...)``.
        :raises ValueError: for observations that are not finite, for a state or ``episode_start`` of another batch size, and
            for masks of another size or without a legal action.
        """
        return self.policy.predict(observation, state, episode_start, deterministic, action_masks)

    def learn(
        self: SelfMaskableMemoryPPO,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 1,
        tb_log_name: str = "MaskableMemoryPPO",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
        *,
        use_masking: bool = True,
    ) -> SelfMaskableMemoryPPO:
        """
        Train, as :meth:`MemoryPPO.learn`.

        :param total_timesteps: Number of environment steps, over all environments.
        :param callback: Callbacks, called at each step.
        :param log_interval: Number of rollouts between two logs.
        :param tb_log_name: Name of the run in TensorBoard.
        :param reset_num_timesteps: Whether to start counting steps at 0; ``False`` continues the count.
        :param progress_bar: Whether to show a progress bar.
        :param use_masking: Whether to ask the environments for masks; ``False`` takes every action as legal.
        :return: The model.
        :raises ValueError: for environments without masks, for a mask without a legal action, with its environment and step,
            and as :meth:`MemoryPPO.learn`.
        """
        self._use_masking = use_masking
        return super().learn(total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar)

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_use_masking"]
