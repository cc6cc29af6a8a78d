"""``predict`` of ``MemoryPPO``, and states given to it."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th

from sb3_cyborg.memory_ppo.episode_time import TIME_WAVES, encode_time
from tests.helpers import (
    ACTION_SPACES,
    ToyEnv,
    predict,
    rollout,
    toy_model,
    toy_vec_env,
)


def test_predict_without_a_state_uses_the_initial_state() -> None:
    model = toy_model(policy_kwargs={"memory": "ring"})
    obs = np.random.default_rng(0).normal(size=(2, 3, 3)).astype(np.float32)
    _, fresh = predict(model, obs[0])
    _, warm = predict(model, obs[1], fresh)
    _, other = predict(model, obs[1])
    _, reset = predict(model, obs[1], fresh, episode_start=np.array([True, False, True]))
    for name in fresh:
        assert isinstance(fresh[name], np.ndarray)
        assert fresh[name].shape[0] == 3
        np.testing.assert_array_equal(reset[name][[0, 2]], other[name][[0, 2]])
        np.testing.assert_array_equal(reset[name][1], warm[name][1])
    assert any((warm[name][0] != other[name][0]).any() for name in warm)


def test_predict_does_not_change_its_state_argument() -> None:
    model = toy_model(use_last_action=True, policy_kwargs={"memory": "pmm", "use_time": True})
    _, state = predict(model, np.ones((2, 3), np.float32))
    before = {name: leaf.copy() for name, leaf in state.items()}
    predict(model, np.zeros((2, 3), np.float32), state, episode_start=np.array([True, False]))
    assert all((state[name] == before[name]).all() for name in state)


def test_time_counts_steps_since_the_episode_start() -> None:
    """The count in acting and in sequences starts with the episode, not with the rollout."""
    model = toy_model(burn_in=2, policy_kwargs={"use_time": True})
    for _ in range(2):  # the second begins within an episode
        age = np.zeros(3) if model._last_episode_starts is None else model._last_state["time"].numpy().copy()
        buffer = rollout(model).rollout_buffer
        starts, anchors = buffer.episode_starts.numpy(), iter(buffer.states["time"].numpy())
        for t in range(buffer.n_steps):
            if t in buffer._anchors:
                np.testing.assert_array_equal(next(anchors), age)  # stored before the reset
            age = np.where(starts[t] > 0.5, 0, age) + 1
        np.testing.assert_array_equal(model._last_state["time"].numpy(), age)


def test_time_encodings_differ() -> None:
    waves = encode_time(th.arange(1000.0))
    assert waves.shape == (1000, 2 * TIME_WAVES)
    assert waves.abs().max() <= 1
    assert th.pdist(waves).min() > 0.5
    th.testing.assert_close(encode_time(th.tensor([[0.0]])), th.tensor([[[0.0] * TIME_WAVES + [1.0] * TIME_WAVES]]))


def test_predict_of_one_observation_equals_a_row_of_a_batch() -> None:
    model = toy_model(toy_vec_env(make=lambda: ToyEnv(action_space=ACTION_SPACES["box_2x3"])))
    obs = np.random.default_rng(0).normal(size=(2, 3)).astype(np.float32)
    many, states = predict(model, obs, deterministic=True)
    one, state = predict(model, obs[1], deterministic=True)
    assert many.shape == (2, 2, 3)
    assert one.shape == (2, 3)
    np.testing.assert_allclose(one, many[1], atol=1e-6)
    for name in state:
        np.testing.assert_allclose(state[name][0], states[name][1], atol=1e-6)
    _, again = predict(model, obs[1], state, episode_start=np.array([True]))
    assert all((again[name] == state[name]).all() for name in state)


def test_deterministic_predictions_equal_the_mode() -> None:
    model = toy_model()
    obs = np.zeros((200, 3), np.float32)
    actions, _ = predict(model, obs, deterministic=True)
    assert len(set(actions.tolist())) == 1
    samples, _ = predict(model, obs)
    assert len(set(samples.tolist())) > 1


@pytest.mark.parametrize("memory", ["ring", "slot", "pmm"])
def test_states_of_predict_equal_those_of_the_rollout(memory: str) -> None:
    model = rollout(toy_model(policy_kwargs={"memory": memory}, burn_in=2))
    buffer = model.rollout_buffer
    assert isinstance(buffer.observations, th.Tensor)
    anchors = {0: 0, 2: 1, 6: 2}
    state: dict[str, np.ndarray] | None = None
    for t in range(buffer.n_steps):
        if t in anchors and state is not None:
            for name, leaf in buffer.states.items():
                np.testing.assert_array_equal(leaf[anchors[t]].numpy(), state[name])
        _, state = predict(model, buffer.observations[t].numpy(), state, buffer.episode_starts[t].numpy())
    assert state is not None
    for name, leaf in model._last_state.items():
        np.testing.assert_array_equal(leaf.numpy(), state[name])
    assert buffer.episode_starts[1:].sum() > 0, "no episode ended: the test shows less than it should"


# --- invalid states ---------------------------------------------------------------------------------------------------


def lstm_states() -> Any:
    """:return: The pair of states that RecurrentPPO's policy takes."""
    return (np.zeros((1, 3, 8), np.float32), np.zeros((1, 3, 8), np.float32))


@pytest.mark.parametrize("method", ["get_distribution", "predict_values", "forward"])
def test_a_pair_of_lstm_states_is_refused_with_a_description_of_the_state(method: str) -> None:
    policy = toy_model().policy
    with pytest.raises(ValueError, match=r"`state` must be a dictionary of tensors as `policy.get_initial_state.*got a tuple"):
        getattr(policy, method)(th.zeros(3, 3), lstm_states(), th.zeros(3))


def test_predict_refuses_a_pair_of_lstm_states() -> None:
    with pytest.raises(
        ValueError, match=r"`state` must be the one that the last `predict` of this policy returned.*got tuple"
    ):
        toy_model().predict(np.zeros((3, 3), np.float32), lstm_states(), np.zeros(3))


def test_predict_without_a_state_within_an_episode_warns_once_at_the_line_of_the_caller() -> None:
    model, obs = toy_model(), np.zeros((3, 3), np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, state = predict(model, obs)
        predict(model, obs, None, np.ones(3, dtype=bool))
        predict(model, obs, state, np.array([True, False, True]))
    with pytest.warns(UserWarning, match="each such call resets the memory") as caught:
        predict(model, obs, None, np.array([True, False, True]))
    assert len(caught) == 1
    assert Path(caught[0].filename).name == "helpers.py"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        predict(model, obs, None, np.zeros(3))
