"""The last action as an input of ``MemoryPPO``'s policy."""

from typing import Any

import numpy as np
import pytest
from gymnasium import spaces

from tests.helpers import ACTION_SPACES, ToyEnv, predict, toy_model, toy_vec_env


@pytest.mark.parametrize("through", ["argument", "policy_kwargs"])
def test_use_last_action_can_be_set_in_two_places(through: str) -> None:
    kwargs: dict[str, Any] = {"use_last_action": True}
    model = toy_model(**kwargs) if through == "argument" else toy_model(policy_kwargs=kwargs)
    assert model.policy.use_last_action
    assert model.policy_kwargs["use_last_action"] is True
    assert not toy_model().policy.use_last_action


@pytest.mark.parametrize("actions", ACTION_SPACES)
def test_the_last_action_is_an_input_and_reset_at_an_episode_start(actions: str) -> None:
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
