"""The last action as an input, and mixed precision of ``MemoryPPO`` as a drop-in."""

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces

from sb3_cyborg import MemoryPPO
from sb3_cyborg.encoders.encoder_v7 import ENCODERS
from sb3_cyborg.memories.memory_v7 import MEMORIES
from tests.helpers import (
    ACTION_SPACES,
    ToyEnv,
    assert_honest,
    predict,
    record_updates,
    small,
    toy_model,
    toy_vec_env,
)


@pytest.mark.parametrize("through", ["argument", "policy_kwargs"])
def test_use_last_action_can_be_set_in_two_places(through: str) -> None:
    kwargs: dict[str, Any] = {"use_last_action": True}
    model = toy_model(**kwargs) if through == "argument" else toy_model(policy_kwargs=kwargs)
    assert model.policy.use_last_action
    assert model.policy_kwargs["use_last_action"] is True
    assert not toy_model().policy.use_last_action


@pytest.mark.parametrize("actions", ACTION_SPACES)
def test_the_last_action_is_read_and_forgotten_at_an_episode_start(actions: str) -> None:
    space = ACTION_SPACES[actions]
    model = toy_model(toy_vec_env(1, lambda: ToyEnv(action_space=space)), use_last_action=True)
    obs = np.zeros((1, 3), np.float32)
    action, state = predict(model, obs)
    width = {"discrete": 3, "box": 2, "box_2x3": 6, "multi_discrete": 5, "multi_binary": 3}[actions]
    assert state["last_action"].shape == (1, width)
    if isinstance(space, spaces.Box):  # scaled to [-1, 1], and flat
        np.testing.assert_allclose(state["last_action"], action.reshape(1, -1) / 0.5, atol=1e-6)
    elif isinstance(space, spaces.Discrete):
        np.testing.assert_array_equal(state["last_action"], np.eye(3)[action])
    elif isinstance(space, spaces.MultiDiscrete):
        one_hot = np.concatenate([np.eye(2)[action[0, 0]], np.eye(3)[action[0, 1]]])
        np.testing.assert_array_equal(state["last_action"][0], one_hot)
    else:
        np.testing.assert_array_equal(state["last_action"], action)

    def encoder_state(last_action: np.ndarray, start: bool) -> np.ndarray:
        _, after = predict(model, obs, state | {"last_action": last_action}, np.array([start]))
        return after["encoder.layer0.h"]

    ones, zeros = (np.full((1, width), value, dtype=np.float32) for value in (1, 0))
    assert (encoder_state(ones, False) != encoder_state(zeros, False)).any()
    assert (encoder_state(ones, True) == encoder_state(zeros, True)).all()


def test_an_environment_that_is_not_vectorized() -> None:
    model = MemoryPPO("MlpPolicy", gym.make("Pendulum-v1"), n_steps=16, n_epochs=1, policy_kwargs=small(), device="cpu")
    updates = record_updates(model)
    model.learn(16)
    assert_honest(updates)


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("memory", MEMORIES)
def test_amp_keeps_states_and_gradients_in_fp32(encoder: str, memory: str) -> None:
    model = toy_model(amp=True, policy_kwargs={"encoder": encoder, "memory": memory})
    model.learn(2 * 36)
    assert all(leaf.dtype == th.float32 for leaf in model._last_state.values())
    assert all(leaf.dtype == th.float32 for leaf in model.rollout_buffer.states.values())
    assert all(parameter.dtype == th.float32 for parameter in model.policy.parameters())
    assert all(th.isfinite(parameter).all() for parameter in model.policy.parameters())


def test_amp_computes_the_features_in_bf16_and_survives_saving(tmp_path: Path) -> None:
    seen: list[th.dtype] = []
    model = toy_model(amp=True)
    first = model.policy.get_submodule("core.encoder.input_projection.0")
    first.register_forward_hook(lambda _module, _inputs, output: seen.append(output.dtype))
    model.learn(36)
    assert set(seen) == {th.bfloat16}
    model.save(tmp_path / "model")
    assert MemoryPPO.load(tmp_path / "model").policy.amp
