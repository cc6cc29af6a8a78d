"""Environments and models with action masks, for the tests of masks."""

from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecEnv

from sb3_cyborg import MaskableMemoryPPO
from sb3_cyborg.memory_ppo.action_masks import component_sizes
from tests.helpers import ACTION_SPACES, VECTOR, ToyEnv, small, toy_vec_env

MASKABLE_SPACES: dict[str, spaces.Space[Any]] = {
    "discrete": spaces.Discrete(5),
    "multi_discrete": ACTION_SPACES["multi_discrete"],
    "multi_binary": ACTION_SPACES["multi_binary"],
}


class MaskedToyEnv(ToyEnv):
    """:class:`ToyEnv` with a random mask at each step; it asserts that actions are legal, and records its masks."""

    def __init__(
        self,
        observation_space: spaces.Space[Any] = VECTOR,
        action_space: spaces.Space[Any] = MASKABLE_SPACES["discrete"],
        mean_length: int = 6,
    ) -> None:
        super().__init__(observation_space, action_space, mean_length)
        self.sizes = component_sizes(action_space)
        self.mask = np.ones(sum(self.sizes), dtype=bool)
        self.masks: list[np.ndarray] = []

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        result = super().reset(seed=seed, options=options)
        self._draw()
        return result

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        starts = np.cumsum([0, *self.sizes[:-1]])
        assert self.mask[starts + np.asarray(action).reshape(-1).astype(int)].all(), f"illegal action {action!r}"
        self.masks.append(self.mask)
        result = super().step(action)
        self._draw()
        return result

    def action_masks(self) -> np.ndarray:
        """:return: The present mask, in which each component has a legal choice."""
        return self.mask

    def _draw(self) -> None:
        parts = [self.np_random.random(size) < 0.5 for size in self.sizes]
        for part in parts:
            part[self.np_random.integers(len(part))] = True
        self.mask = np.concatenate(parts)


def masked_vec_env(n_envs: int = 3, **settings: Any) -> VecEnv:
    """:return: Seeded toy environments with masks."""
    return toy_vec_env(n_envs, lambda: MaskedToyEnv(**settings))


def masked_model(env: VecEnv | None = None, policy: str | type = "MlpPolicy", **kwargs: Any) -> MaskableMemoryPPO:
    """:return: A tiny model on toy environments with masks; ``policy_kwargs`` add to those of :func:`small`."""
    settings: dict[str, Any] = {"n_steps": 12, "batch_size": 12, "seq_len": 4, "n_epochs": 2, "seed": 0, "device": "cpu"}
    policy_kwargs = small(**kwargs.pop("policy_kwargs", {}))
    return MaskableMemoryPPO(
        policy, masked_vec_env() if env is None else env, policy_kwargs=policy_kwargs, **(settings | kwargs)
    )
