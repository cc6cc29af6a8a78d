"""Random environments, small models and assertions that tests of the algorithm share."""

import copy
from collections.abc import Callable
from typing import Any, cast

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv
from torch import nn

from sb3_cyborg import MemoryPPO
from sb3_cyborg.encoders.encoder_v7 import ENCODERS
from sb3_cyborg.memories.memory_v7 import MEMORIES
from sb3_cyborg.memory_ppo.policies import NumpyState

RATIO_TOLERANCE = 1e-5
VECTOR = spaces.Box(-1, 1, (3,))
IMAGE = spaces.Box(0, 255, (36, 36, 1), dtype=np.uint8)

OBSERVATION_SPACES: dict[str, spaces.Space[Any]] = {
    "box": VECTOR,
    "matrix": spaces.Box(-1, 1, (2, 3)),
    "image": IMAGE,
    "discrete": spaces.Discrete(5),
    "multi_discrete": spaces.MultiDiscrete([3, 4]),
    "multi_binary": spaces.MultiBinary(3),
    "dict": spaces.Dict({"vector": VECTOR, "image": IMAGE, "number": spaces.Discrete(4)}),
}
ACTION_SPACES: dict[str, spaces.Space[Any]] = {
    "discrete": spaces.Discrete(3),
    "box": spaces.Box(-0.5, 0.5, (2,)),
    "box_2x3": spaces.Box(-0.5, 0.5, (2, 3)),
    "multi_discrete": spaces.MultiDiscrete([2, 3]),
    "multi_binary": spaces.MultiBinary(3),
}


class ToyEnv(gym.Env[Any, Any]):
    """
    Random observations and rewards from any space; episodes of random length end at random by termination or truncation.

    It asserts that actions are in its space, and records them in ``actions``.
    """

    def __init__(
        self,
        observation_space: spaces.Space[Any] = VECTOR,
        action_space: spaces.Space[Any] = ACTION_SPACES["discrete"],
        mean_length: int = 6,
    ) -> None:
        self.observation_space = copy.deepcopy(observation_space)
        self.action_space = copy.deepcopy(action_space)
        self.mean_length = mean_length
        self.actions: list[Any] = []

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(action), f"{action!r} is not in {self.action_space}"
        self.actions.append(copy.copy(action))
        ended = bool(self.np_random.random() < 1 / self.mean_length)
        truncated = ended and bool(self.np_random.random() < 0.5)
        return self.observation_space.sample(), float(self.np_random.normal()), ended and not truncated, truncated, {}


class ModeRecorder(BaseFeaturesExtractor):
    """
    Features extractor that computes the same in both modes.

    ``modes`` records the mode of each call, and the buffer ``updates`` counts the calls in training mode.
    """

    updates: th.Tensor

    def __init__(self, observation_space: spaces.Space[Any], scale: float = 1.0) -> None:
        super().__init__(observation_space, 5)
        assert observation_space.shape is not None
        self.linear = nn.Linear(observation_space.shape[0], 5)
        self.register_buffer("updates", th.zeros(()))
        self.scale = scale
        self.modes: list[bool] = []

    def forward(self, observations: th.Tensor) -> th.Tensor:
        self.modes.append(self.training)
        self.updates += self.training
        result: th.Tensor = self.linear(observations) * self.scale
        return result


class DropoutBatchNorm(BaseFeaturesExtractor):
    """Features extractor of SB3's test of training and evaluation mode, with the layers that differ between them."""

    def __init__(self, observation_space: spaces.Space[Any], dropout: float = 0.5, batch_norm: bool = True) -> None:
        super().__init__(observation_space, 5)
        assert observation_space.shape is not None
        self.batch_norm = nn.BatchNorm1d(observation_space.shape[0]) if batch_norm else nn.Identity()
        self.linear = nn.Linear(observation_space.shape[0], 5)
        self.dropout = nn.Dropout(dropout)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        result: th.Tensor = self.dropout(self.linear(self.batch_norm(observations)))
        return result


def toy_vec_env(n_envs: int = 3, make: Callable[[], gym.Env[Any, Any]] = ToyEnv, seed: int = 0) -> VecEnv:
    """:return: Seeded toy environments."""
    env = DummyVecEnv([make] * n_envs)
    env.seed(seed)
    return env


SLOW_STACKS = {(encoder, memory) for encoder in ("hybrid", "fusion", "mingru", "trxl") for memory in ("kv", "slot", "pmm")}
"""Stacks whose parts are tested with other partners as well."""


def stacks(encoder: str = "encoder", memory: str = "memory") -> pytest.MarkDecorator:
    """
    :param encoder: Name of the test's parameter for the encoder.
    :param memory: Name of its parameter for the memory.
    :return: A decorator that runs a test with every encoder and every memory; some pairs are slow tests.
    """
    pairs = [(one, other) for one in ENCODERS for other in MEMORIES]
    marks = {True: (pytest.mark.slow,), False: ()}
    return pytest.mark.parametrize(
        (encoder, memory), [pytest.param(*pair, marks=marks[pair in SLOW_STACKS]) for pair in pairs]
    )


def encoder_options(mode: str, **more: Any) -> dict[str, Any]:
    """:return: Those options of small sizes, or of ``more``, that an encoder has."""
    sizes = {"headdim": 8, "d_state": 4, "chunk_size": 4, "window": 5, "num_heads": 2, **more}
    return {name: sizes[name] for name in ENCODERS.options(mode).keys() & sizes.keys()}


def small(**settings: Any) -> dict[str, Any]:
    """:return: ``policy_kwargs`` of a tiny network."""
    memory_kwargs = {} if settings.get("memory") == "none" else {"num_slots": 4}
    return {"hidden_dim": 8, "net_arch": [8], "memory": "slot", "memory_kwargs": memory_kwargs} | settings


def toy_model(env: VecEnv | gym.Env[Any, Any] | None = None, policy: str | type = "MlpPolicy", **kwargs: Any) -> MemoryPPO:
    """:return: A tiny model on toy environments; ``policy_kwargs`` add to those of :func:`small`."""
    settings: dict[str, Any] = {"n_steps": 12, "batch_size": 12, "seq_len": 4, "n_epochs": 2, "seed": 0, "device": "cpu"}
    policy_kwargs = small(**kwargs.pop("policy_kwargs", {}))
    return MemoryPPO(policy, toy_vec_env() if env is None else env, policy_kwargs=policy_kwargs, **(settings | kwargs))


def rollout(model: MemoryPPO) -> MemoryPPO:
    """Collect one rollout without an update. :return: The model."""
    _, callback = model._setup_learn(model.n_steps * model.n_envs, None)
    assert model.env is not None
    assert model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)
    return model


def predict(model: MemoryPPO, *args: Any, **kwargs: Any) -> tuple[np.ndarray, NumpyState]:
    """``model.predict`` with the right type of the state, which SB3 types as a tuple."""
    result: Any = model.predict(*args, **kwargs)
    return cast(tuple[np.ndarray, NumpyState], result)


def record_updates(model: MemoryPPO) -> list[dict[str, Any]]:
    """:return: A list to which each following update appends the values that it logged."""
    rows: list[dict[str, Any]] = []
    train = model.train

    def recorded() -> None:
        train()
        rows.append(dict(model.logger.name_to_value))

    setattr(model, "train", recorded)  # noqa: B010  # mypy takes no assignment to a method
    return rows


def weights(module: th.nn.Module) -> dict[str, th.Tensor]:
    """:return: A copy of all parameters and buffers."""
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def assert_exact_ratios(updates: list[dict[str, Any]], at_least: int = 1) -> None:
    """Assert that every update logged a ratio of 1 in its first minibatch, and a finite loss."""
    assert len(updates) >= at_least
    for update in updates:
        assert update["train/ratio_error"] <= RATIO_TOLERANCE
        assert np.isfinite(update["train/loss"])


def same(first: dict[str, th.Tensor], second: dict[str, th.Tensor]) -> bool:
    """:return: Whether two dictionaries of tensors are equal, bit by bit."""
    return first.keys() == second.keys() and all(th.equal(first[name], second[name]) for name in first)
