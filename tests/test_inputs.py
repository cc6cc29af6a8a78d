"""``Inputs``: the contract, and the equality of its step and sequence forms."""

from typing import Any

import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.torch_layers import FlattenExtractor

from sb3_cyborg.memory_ppo.actions import encode_actions
from sb3_cyborg.memory_ppo.inputs import Inputs
from sb3_cyborg.sequence_model import select_only
from sb3_cyborg.testing import verify_contract, verify_gradcheck
from tests.helpers import ACTION_SPACES, VECTOR


def make_inputs(action_space: spaces.Space[Any], use_last_action: bool, use_time: bool) -> Inputs:
    extractor = FlattenExtractor(VECTOR)
    return Inputs(VECTOR, action_space, extractor, use_last_action=use_last_action, use_time=use_time)


@pytest.mark.parametrize("use_time", [False, True])
@pytest.mark.parametrize("use_last_action", [False, True])
@pytest.mark.parametrize("action_space", ["discrete", "box_2x3"])
def test_contract(action_space: str, use_last_action: bool, use_time: bool) -> None:
    inputs = make_inputs(ACTION_SPACES[action_space], use_last_action, use_time)
    assert inputs.leaves == inputs.get_initial_state(1).keys()
    verify_contract(inputs)
    with select_only():
        verify_contract(inputs)


def test_gradients() -> None:
    verify_gradcheck(make_inputs(ACTION_SPACES["box"], True, True))


@pytest.mark.parametrize("action_space", ACTION_SPACES)
def test_steps_equal_a_sequence(action_space: str) -> None:
    """``read`` and ``remember`` step by step equal ``read_sequence``."""
    space = ACTION_SPACES[action_space]
    space.seed(0)
    inputs = make_inputs(space, True, True)
    features, masks = th.randn(3, 9, 3), th.rand(3, 9) > 0.3
    actions = th.stack([th.as_tensor(space.sample()).reshape(-1) for _ in range(27)]).view(3, 9, -1)
    state = first = inputs.get_initial_state(3)
    outputs = []
    for t in range(9):
        output, state = inputs.read(features[:, t], state, masks[:, t])
        state = inputs.remember(state, actions[:, t])
        outputs.append(output)
    got, final = inputs.read_sequence(features, actions, first, masks)
    assert th.equal(got, th.stack(outputs, dim=1))
    assert final.keys() == state.keys()
    assert all(th.equal(final[name], state[name]) for name in state)
    width = encode_actions(actions[:, 0], space).shape[1]
    last = got[:, 1:, 3 : 3 + width]
    assert th.equal(last[masks[:, 1:]], encode_actions(actions[:, :-1].flatten(0, 1), space).view(3, 8, -1)[masks[:, 1:]])
    assert not last[~masks[:, 1:]].any()


def test_without_options_the_state_is_empty() -> None:
    inputs = make_inputs(ACTION_SPACES["discrete"], False, False)
    features = th.randn(2, 3)
    output, state = inputs.read(features, {})
    assert output is features
    assert inputs.remember(state, th.zeros(2, dtype=th.int64)) == {}
