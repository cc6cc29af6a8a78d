"""``MemoryPPO`` with all spaces, policies, encoders and memories."""

from typing import Any, ClassVar

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from sb3_contrib import RecurrentPPO
from stable_baselines3 import PPO
from stable_baselines3.common.torch_layers import NatureCNN
from torch import nn

from sb3_cyborg import MemoryActorCriticCnnPolicy, MemoryActorCriticPolicy, MemoryMultiInputActorCriticPolicy, MemoryPPO
from tests.helpers import (
    ACTION_SPACES,
    OBSERVATION_SPACES,
    ToyEnv,
    assert_exact_ratios,
    predict,
    record_updates,
    toy_model,
    toy_vec_env,
)


def policy_for(space: spaces.Space[Any]) -> str:
    if isinstance(space, spaces.Dict):
        return "MultiInputPolicy"
    return "CnnPolicy" if space.dtype == np.uint8 and len(space.shape or ()) == 3 else "MlpPolicy"


@pytest.mark.parametrize("actions", ACTION_SPACES)
@pytest.mark.parametrize("use_last_action", [False, True])
def test_all_action_spaces(actions: str, use_last_action: bool) -> None:
    model = toy_model(toy_vec_env(make=lambda: ToyEnv(action_space=ACTION_SPACES[actions])), use_last_action=use_last_action)
    updates = record_updates(model)
    model.learn(3 * 36)
    assert_exact_ratios(updates, 3)
    assert ("last_action" in model.rollout_buffer.states) == use_last_action
    obs, state = np.zeros((2, 3), np.float32), None
    for deterministic in (True, False):
        action, state = predict(model, obs, state, deterministic=deterministic)
        assert all(model.action_space.contains(row) for row in action)


@pytest.mark.parametrize("observations", OBSERVATION_SPACES)
def test_all_observation_spaces(observations: str) -> None:
    space = OBSERVATION_SPACES[observations]
    env = toy_vec_env(2, lambda: ToyEnv(space))
    model = toy_model(env, policy_for(space), burn_in=2, n_steps=8, batch_size=8)
    updates = record_updates(model)
    model.learn(2 * 16)
    assert_exact_ratios(updates, 2)
    many, _ = predict(model, env.reset(), deterministic=True)
    assert many.shape == (2,)
    space.seed(0)
    action, state = predict(model, space.sample())
    assert action.shape == ()
    assert all(leaf.shape[0] == 1 for leaf in state.values())


@pytest.mark.parametrize("alias", ["MlpPolicy", "MlpLstmPolicy", MemoryActorCriticPolicy])
def test_mlp_policies(alias: str | type) -> None:
    assert type(toy_model(policy=alias).policy) is MemoryActorCriticPolicy


@pytest.mark.parametrize("alias", ["CnnPolicy", "CnnLstmPolicy", MemoryActorCriticCnnPolicy])
def test_cnn_policies(alias: str | type) -> None:
    model = toy_model(ToyEnv(OBSERVATION_SPACES["image"]), policy=alias)
    assert type(model.policy) is MemoryActorCriticCnnPolicy


class OwnCnn(NatureCNN):
    """Flattens with ``view``, which needs a channels-first memory layout; ``layouts`` records the layouts."""

    layouts: ClassVar[list[bool]] = []

    def forward(self, observations: th.Tensor) -> th.Tensor:
        self.layouts.append(observations.is_contiguous())
        features: th.Tensor = self.linear(self.cnn[:-1](observations).view(len(observations), -1))
        return features


@pytest.mark.parametrize("burn_in", [0, 2])
def test_images_stay_channels_last_from_the_environment_to_the_convolutions(burn_in: int) -> None:
    space = spaces.Box(0, 255, (36, 37, 3), np.uint8)
    model = toy_model(toy_vec_env(2, lambda: ToyEnv(space)), policy="CnnPolicy", burn_in=burn_in)
    layouts: list[bool] = []

    def record(module: nn.Module, args: tuple[th.Tensor]) -> None:
        layouts.append(args[0].is_contiguous(memory_format=th.channels_last) and not args[0].is_contiguous())

    extractor = model.policy.features_extractor
    assert isinstance(extractor, NatureCNN)
    extractor.cnn.register_forward_pre_hook(record)
    updates = record_updates(model)
    model.learn(2 * 24)
    assert_exact_ratios(updates, 2)
    assert all(layouts)
    assert len(layouts) > model.n_steps  # includes those of updates


@pytest.mark.parametrize("burn_in", [0, 2])
def test_images_of_channels_first_environments_stay_channels_first(burn_in: int) -> None:
    space = spaces.Box(0, 255, (3, 36, 37), np.uint8)
    OwnCnn.layouts.clear()
    kwargs = {"features_extractor_class": OwnCnn}
    model = toy_model(toy_vec_env(2, lambda: ToyEnv(space)), policy="CnnPolicy", burn_in=burn_in, policy_kwargs=kwargs)
    model.learn(2 * 24)
    assert all(OwnCnn.layouts)
    assert len(OwnCnn.layouts) > model.n_steps


@pytest.mark.parametrize("policy", ["MlpPolicy", "CnnPolicy"])
def test_channels_last_is_used_for_convolutions_only(policy: str) -> None:
    model = toy_model(ToyEnv(spaces.Box(0, 255, (36, 37, 3), np.uint8)), policy=policy)
    observations = model.rollout_buffer.observations
    assert isinstance(observations, th.Tensor)
    assert observations.is_contiguous() == (policy == "MlpPolicy")


@pytest.mark.parametrize("alias", ["MultiInputPolicy", "MultiInputLstmPolicy", MemoryMultiInputActorCriticPolicy])
def test_multi_input_policies(alias: str | type) -> None:
    model = toy_model(ToyEnv(OBSERVATION_SPACES["dict"]), policy=alias)
    assert type(model.policy) is MemoryMultiInputActorCriticPolicy


def test_every_alias_of_ppo_and_recurrent_ppo_exists() -> None:
    assert MemoryPPO.policy_aliases.keys() == PPO.policy_aliases.keys() | RecurrentPPO.policy_aliases.keys()


@pytest.mark.parametrize("memory", ["ring", "slot", "pmm", "kv", "none"])
@pytest.mark.parametrize("encoder", ["gru", "lstm"])
def test_encoders_and_memories(encoder: str, memory: str) -> None:
    model = toy_model(policy_kwargs={"encoder": encoder, "memory": memory}, burn_in=3)
    updates = record_updates(model)
    model.learn(2 * 36)
    assert_exact_ratios(updates, 2)
    logged = {name for name in updates[-1] if name.startswith("memory/")}
    reads = {"memory/read_entropy", "memory/usage", "memory/fill"}
    assert logged == {"none": set(), "ring": reads, "kv": reads}.get(memory, reads | {"memory/write_strength"})
    assert all(np.isfinite(updates[-1][name]) for name in logged)


def test_the_fill_diagnostic_follows_the_ring() -> None:
    """In one long episode, the ring is half full on average over the first rollout, then full."""
    env = toy_vec_env(1, lambda: ToyEnv(mean_length=10**9))
    model = toy_model(env, n_steps=8, batch_size=8, policy_kwargs={"memory": "ring", "memory_kwargs": {"num_slots": 8}})
    updates = record_updates(model)
    model.learn(3 * 8)
    fills = [update["memory/fill"] for update in updates]
    assert fills == pytest.approx([sum(range(8)) / 64, 1, 1])
    assert all(0 < update["memory/read_entropy"] <= np.log(9) for update in updates)
    assert all(0 < update["memory/usage"] < 1 for update in updates)
