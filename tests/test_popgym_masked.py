"""POPGym's games with action masks: illegal moves are exactly those that cannot change anything, and all else is POPGym's."""

from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from sb3_cyborg.envs.popgym_masked import MASKED_TASKS, POPGYM_MASKED_NAMES, make_masked_popgym
from sb3_cyborg.maskable import is_masking_supported

pytest.importorskip("popgym")


def play(name: str, seed: int = 0) -> Any:
    """:return: The steps of a game with random legal moves: mask, action, observation, reward."""
    env: Any = gym.make(f"sb3_cyborg/{name}-v0")
    obs, _ = env.reset(seed=seed)
    rng, over = np.random.default_rng(seed), False
    while not over:
        mask = env.get_wrapper_attr("action_masks")()
        action = int(rng.choice(np.flatnonzero(mask)))
        before = obs
        obs, reward, terminated, truncated, _ = env.step(action)
        over = terminated or truncated
        yield mask, action, before, obs, reward


@pytest.mark.parametrize("name", POPGYM_MASKED_NAMES)
def test_masks_have_an_entry_for_each_action(name: str) -> None:
    env: Any = gym.make(f"sb3_cyborg/{name}-v0")
    env.reset(seed=0)
    assert is_masking_supported(env)
    mask = env.get_wrapper_attr("action_masks")()
    assert mask.dtype == bool
    assert mask.shape == (env.action_space.n,)
    assert mask.all()  # at the start all is hidden


@pytest.mark.parametrize("name", ["BattleshipMaskedEasy", "MineSweeperMaskedMedium"])
@pytest.mark.parametrize("seed", range(5))
def test_tiles_and_fields_are_legal_once(name: str, seed: int) -> None:
    tried: set[int] = set()
    for mask, action, *_ in play(name, seed):
        assert set(np.flatnonzero(~mask).tolist()) == tried
        tried.add(action)


@pytest.mark.parametrize("seed", range(5))
def test_cards_face_up_are_illegal(seed: int) -> None:
    """The observation shows a card that was turned; at the end of a turn that failed, both cards are face down again."""
    cards_of_turn: list[int] = []
    paired: set[int] = set()
    for mask, action, _, _, reward in play("ConcentrationMaskedEasy", seed):
        assert set(np.flatnonzero(~mask).tolist()) == paired | set(cards_of_turn)
        cards_of_turn.append(action)
        if len(cards_of_turn) == 2:
            if reward > 0:
                paired |= set(cards_of_turn)
            cards_of_turn = []


@pytest.mark.parametrize("task", MASKED_TASKS)
def test_a_game_equals_that_of_popgym(task: str) -> None:
    env: Any = gym.make(f"sb3_cyborg/{task}MaskedEasy-v0")
    original: Any = gym.make(f"sb3_cyborg/popgym-{task}Easy-v0")
    assert np.array_equal(env.reset(seed=3)[0], original.reset(seed=3)[0])
    env.action_space.seed(0)
    for _ in range(4):
        action = env.action_space.sample()
        theirs = action if task == "Concentration" else np.array(np.unravel_index(action, original.action_space.nvec))
        ours, expected = env.step(action), original.step(theirs)
        assert np.array_equal(ours[0], expected[0])
        assert ours[1:] == expected[1:]


def test_options_are_those_of_popgym() -> None:
    env: Any = make_masked_popgym("Battleship", board_size=5, ship_sizes=[2], time_limit_is_terminal=True)
    assert env.action_space.n == 25
    assert env.observation_space.shape == (3,)


def test_games_without_masks_are_refused() -> None:
    with pytest.raises(ValueError, match="Unknown POPGym environment with masks 'RepeatFirstEasy'"):
        make_masked_popgym("RepeatFirstEasy")
