"""T-Maze: the rules of Ni et al., and the returns of perfect, forgetful and random policies."""

import re
from typing import Any

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env as check_gymnasium
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3.common.env_checker import check_env as check_sb3

from sb3_cyborg.envs.t_maze import TMazeEnv, TMazeVecEnv

RIGHT, UP, LEFT, DOWN = range(4)


def episode_by_the_paper(
    active: bool, corridor_length: int, goal: int, observes: str, actions: list[int]
) -> list[tuple[list[float], float, bool]]:
    """:return: (observation, reward, last step) of the reset and every step, on a drawn map: ``o`` oracle, ``j`` junction."""
    corridor = "o" + "." * (corridor_length - 1 + active) + "j"
    cells = {(x, 0): kind for x, kind in enumerate(corridor)} | {(len(corridor) - 1, y): "g" for y in (-1, 1)}
    oracle_steps = 1 if active else 0
    horizon = corridor_length + 1 + 2 * oracle_steps
    place = (oracle_steps, 0)
    path = [place]
    for action in actions[:horizon]:
        x, y = place
        target = {RIGHT: (x + 1, y), UP: (x, y + 1), LEFT: (x - 1, y), DOWN: (x, y - 1)}[action]
        place = target if target in cells else place
        path.append(place)
    steps = []
    for t, (x, y) in enumerate(path):
        kind = cells[x, y]
        first_visit = kind == "o" and all(cells[before] != "o" for before in path[:t])
        seen = any(cells[before] == "o" for before in path[: t + 1])
        told = goal if first_visit else 0
        obs = {
            "ambiguous": [1, y] if kind in "jg" else [0, told],
            "position": [x, y, told],
            "goal": [x, y, goal if seen else 0],
        }[observes]
        last = t == horizon
        late = x < t - oracle_steps
        reward = float(kind == "g" and y == goal) if last else (-1 / corridor_length if late and t else 0.0)
        steps.append(([float(value) for value in obs], reward, last))
    return steps


OBSERVES: dict[str, dict[str, Any]] = {
    "ambiguous": {},
    "position": {"ambiguous_position": False},
    "goal": {"ambiguous_position": False, "expose_goal": True},
}


@settings(deadline=None, max_examples=150)
@given(
    active=st.booleans(),
    corridor_length=st.integers(1, 8),
    observes=st.sampled_from(sorted(OBSERVES)),
    seed=st.integers(0, 2**32),
    data=st.data(),
)
def test_rules_of_the_paper(active: bool, corridor_length: int, observes: str, seed: int, data: st.DataObject) -> None:
    mostly_right = st.sampled_from([RIGHT] * 4 + [UP, LEFT, DOWN])
    actions = data.draw(st.lists(mostly_right, min_size=corridor_length + 3, max_size=corridor_length + 3))
    env = TMazeEnv(active, corridor_length, **OBSERVES[observes])
    for start in (seed, None):
        obs, info = env.reset(seed=start)
        assert info == {}
        expected = episode_by_the_paper(active, corridor_length, env.goal, observes, actions)
        np.testing.assert_array_equal(obs, expected[0][0])
        for action, (expected_obs, expected_reward, last) in zip(actions, expected[1:], strict=False):
            obs, reward, terminated, truncated, info = env.step(action)
            assert obs in env.observation_space
            assert obs.dtype == np.float32
            np.testing.assert_array_equal(obs, expected_obs)
            assert (reward, terminated, truncated) == (expected_reward, last, False)
            assert info == ({"is_success": reward == 1} if last else {})
        assert terminated


def test_an_active_episode_in_full() -> None:
    """Written by hand: a second visit of the oracle, a corridor of two cells, and an end before the goal."""
    env = TMazeEnv(active=True, corridor_length=2)
    obs, _ = env.reset(seed=0)
    env.goal = -1
    assert obs.tolist() == [0, 0]
    steps = [env.step(action) for action in (LEFT, LEFT, RIGHT, RIGHT, RIGHT)]
    assert [step[0].tolist() for step in steps] == [[0, -1], [0, 0], [0, 0], [0, 0], [1, 0]]
    assert [step[1] for step in steps] == [0, -0.5, -0.5, -0.5, 0]
    assert [step[2] for step in steps] == [False, False, False, False, True]
    assert steps[-1][4] == {"is_success": False}


def walk(env: TMazeVecEnv, episodes: int, remembers: bool, active: bool) -> tuple[np.ndarray, np.ndarray]:
    """:return: Successes and returns of a policy that walks straight and turns by memory or at random."""
    rng = np.random.default_rng(1)
    obs = np.asarray(env.reset())
    goal = np.zeros(env.num_envs)
    successes: list[bool] = []
    returns: list[float] = []
    while len(successes) < episodes:
        at_junction = obs[:, 0] == 1
        goal = np.where(~at_junction & (obs[:, 1] != 0), obs[:, 1], goal)
        turn = goal if remembers else rng.choice([-1, 1], size=env.num_envs)
        actions = np.where(at_junction, np.where(turn == 1, UP, DOWN), LEFT if active and env.timestep == 0 else RIGHT)
        new_obs, _, dones, infos = env.step(actions)
        obs = np.asarray(new_obs)
        successes += [info["is_success"] for info in infos if "is_success" in info]
        returns += [info["episode"]["r"] for info in infos if "episode" in info]
        goal = np.where(dones, 0, goal)
        goal = np.where(dones & (obs[:, 0] == 0), obs[:, 1], goal)
    return np.array(successes), np.array(returns)


@pytest.mark.parametrize("active", [False, True])
@pytest.mark.parametrize("corridor_length", [1, 2, 10, 100])
def test_memory_succeeds_always_and_a_coin_half_the_time(active: bool, corridor_length: int) -> None:
    env = TMazeVecEnv(500, seed=0, active=active, corridor_length=corridor_length)
    successes, returns = walk(env, 1000, True, active)
    assert successes.all()
    assert set(returns) == {1.0}
    successes, returns = walk(env, 2000, False, active)
    assert abs(successes.mean() - 0.5) < 0.045  # four standard errors
    np.testing.assert_array_equal(returns, successes)


def test_random_actions() -> None:
    """In two steps through a corridor of one cell, success needs two correct actions: 1/4 times 1/4."""
    env = TMazeVecEnv(8000, seed=0, corridor_length=1)
    env.reset()
    rng = np.random.default_rng(0)
    env.step(rng.integers(4, size=8000))
    _, rewards, dones, infos = env.step(rng.integers(4, size=8000))
    assert dones.all()
    np.testing.assert_array_equal(rewards, [info["is_success"] for info in infos])
    assert abs(rewards.mean() - 1 / 16) < 0.011  # four standard errors


def test_goals_are_uniform() -> None:
    env = TMazeVecEnv(4000, seed=0)
    goals = np.asarray(env.reset())[:, 1]
    assert set(goals) == {-1, 1}
    assert abs(goals.mean()) < 0.065  # four standard errors


def test_penalty() -> None:
    """A policy that stays at the start is behind from the first step, and the paper's penalties sum to -1."""
    for penalty, expected in ((None, -1.0), (-0.25, -1.0), (-1, -4.0), (0, 0.0), (np.float32(-0.5), -2.0)):
        env = TMazeVecEnv(2, corridor_length=4, penalty=penalty)
        env.reset()
        infos = [env.step(np.full(2, LEFT))[3] for _ in range(5)][-1]
        assert [info["episode"]["r"] for info in infos] == [expected, expected]


@pytest.mark.parametrize("active", [False, True])
@pytest.mark.parametrize("corridor_length", [1, 10])
@pytest.mark.parametrize("observes", sorted(OBSERVES))
@pytest.mark.filterwarnings("error")
def test_check_env(active: bool, corridor_length: int, observes: str) -> None:
    # The checker tests other render modes only for environments with a spec.
    check_gymnasium(TMazeEnv(active, corridor_length, **OBSERVES[observes]), skip_render_check=True)
    check_sb3(TMazeEnv(active, corridor_length, **OBSERVES[observes]))


def test_render() -> None:
    env = TMazeEnv(active=True, corridor_length=2, render_mode="rgb_array")
    env.reset(seed=0)
    env.goal = -1
    image = env.render()
    assert image is not None
    assert image.dtype == np.uint8
    assert image.shape == (48, 64, 3)
    names = {(0, 0, 0): " ", (255, 255, 255): ".", (255, 0, 0): "a", (0, 255, 0): "g", (0, 0, 255): "o"}
    assert ["".join(names[tuple(cell)] for cell in row) for row in image[::16, ::16].tolist()] == ["   .", "oa..", "   g"]
    assert TMazeEnv().render() is None


@pytest.mark.parametrize("size", [0, -1, 1.0, 2.5, "3", None, True, float("nan")])
@pytest.mark.parametrize("make", [TMazeEnv, lambda **kwargs: TMazeVecEnv(2, **kwargs)])
def test_bad_sizes(size: Any, make: Any) -> None:
    with pytest.raises(
        ValueError, match=f"`corridor_length` must be a whole number of at least 1, got {re.escape(repr(size))}"
    ):
        make(corridor_length=size)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"corridor_lenght": 3}, r"'corridor_lenght'. Did you mean 'corridor_length'\?"),
        ({"render_mode": "human"}, "Unknown render mode 'human'. Known: 'rgb_array'"),
        ({"active": "yes"}, "`active` must be True or False, got 'yes'"),
        ({"ambiguous_position": 1}, "`ambiguous_position` must be True or False, got 1"),
        ({"expose_goal": True}, "`expose_goal`=True needs `ambiguous_position`=False"),
        ({"penalty": 0.5}, "`penalty` must be a finite number of at most 0, .* got 0.5"),
        ({"penalty": float("nan")}, "`penalty` must be a finite number of at most 0, .* got nan"),
        ({"penalty": -float("inf")}, "`penalty` must be a finite number of at most 0, .* got -inf"),
        ({"penalty": "-1"}, "`penalty` must be a finite number of at most 0, .* got '-1'"),
    ],
)
@pytest.mark.parametrize("make", [TMazeEnv, lambda **kwargs: TMazeVecEnv(2, **kwargs)])
def test_bad_options(kwargs: dict[str, Any], message: str, make: Any) -> None:
    with pytest.raises(ValueError, match=message):
        make(**kwargs)
