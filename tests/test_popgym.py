"""POPGym's environments: the checkers of gymnasium and SB3, and comparison with POPGym itself."""

import random
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from gymnasium.spaces.utils import unflatten
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3.common.env_util import make_vec_env

from sb3_cyborg import MemoryPPO
from sb3_cyborg.envs.one_hot import OneHotObservation
from sb3_cyborg.envs.popgym import POPGYM_LEVELS, POPGYM_MAZES, POPGYM_NAMES, POPGYM_TIME_LIMITS, make_popgym
from tests.env_helpers import checker_warnings

popgym_envs = pytest.importorskip("popgym.envs")

HAS_MAZES = find_spec("mazelib") is not None
NEEDS_MAZELIB = pytest.mark.skipif(not HAS_MAZES, reason="POPGym's mazes need mazelib: pip install 'popgym[navigation]'")
MAZE_NAMES = tuple(task + level for task in POPGYM_MAZES for level in POPGYM_LEVELS)
TIME_LIMITED = tuple(task for task, limit in POPGYM_TIME_LIMITS.items() if limit is not None)
# Warnings about POPGym itself: unbounded velocities, torques of ±2, and mazes that need no memory.
EXPECTED_WARNINGS = (
    "different from the unwrapped version",
    "Box observation space maximum value is infinity",
    "Box observation space minimum value is -infinity",
    "symmetric and normalized",
    "Maze environments have been shown to be solvable",
)


def marked(names: tuple[str, ...]) -> list[Any]:
    return [pytest.param(name, marks=NEEDS_MAZELIB) if name.startswith("Labyrinth") else name for name in names]


def spec_of(name: str, **kwargs: Any) -> EnvSpec:
    return EnvSpec(
        f"sb3_cyborg/popgym-{name}-v0", entry_point="sb3_cyborg.envs.popgym:make_popgym", kwargs={"name": name, **kwargs}
    )


def raw_popgym(name: str) -> gym.Env[Any, Any]:
    """:return: POPGym's own environment, by its own id."""
    return gym.make(f"popgym-{name}-v0", disable_env_checker=True).unwrapped


@pytest.fixture
def registered_id() -> Iterator[str]:
    gym.register(
        "test_popgym/RepeatPreviousEasy-v0",
        entry_point="sb3_cyborg.envs.popgym:make_popgym",
        kwargs={"name": "RepeatPreviousEasy"},
    )
    yield "test_popgym/RepeatPreviousEasy-v0"
    del gym.registry["test_popgym/RepeatPreviousEasy-v0"]


def test_names_are_those_that_popgym_registers() -> None:
    registered = {env_id[len("popgym-") : -len("-v0")] for env_id in gym.registry if env_id.startswith("popgym-")}
    assert registered == set(POPGYM_NAMES) - (set() if HAS_MAZES else set(MAZE_NAMES))
    assert len(POPGYM_NAMES) == len(set(POPGYM_NAMES)) == 48


def test_nothing_heavy_is_imported_before_an_environment_is_made() -> None:
    code = (
        "import sys; from sb3_cyborg.envs import minigrid, popgym; "
        "assert not {'minigrid', 'popgym', 'pygame'} & set(sys.modules); "
        "popgym.make_popgym('RepeatFirstEasy'); assert 'popgym' in sys.modules; "
        "minigrid.make_minigrid('MiniGrid-MemoryS7-v0'); assert 'minigrid' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize("timer", [False, True])
@pytest.mark.parametrize("name", marked(POPGYM_NAMES))
def test_checkers_find_nothing(name: str, timer: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    assert checker_warnings(spec_of(name, time_limit_is_terminal=timer), EXPECTED_WARNINGS) == []


@pytest.mark.parametrize("name", marked(POPGYM_NAMES))
def test_a_thousand_random_steps_are_popgyms_own(name: str) -> None:
    """With equal seeds and actions, decoded observations equal POPGym's, and two wrapped environments equal each other."""
    envs = [make_popgym(name), make_popgym(name)]
    raw = raw_popgym(name)
    space = envs[0].observation_space
    assert isinstance(space, spaces.Box)
    assert space.dtype == np.float32
    assert len(space.shape) == 1
    assert isinstance(raw.action_space, spaces.Discrete | spaces.MultiDiscrete | spaces.Box)  # SB3's PPO supports these
    assert envs[0].action_space == raw.action_space
    raw.action_space.seed(0)

    seed: int | None = 3
    done = True
    for step in range(1_000):
        if done:
            # The raw maze draws from the global generators, which must not affect the wrapped ones.
            raw_obs, _ = raw.reset(seed=None if name in MAZE_NAMES else seed)
            both = [env.reset(seed=seed)[0] for env in envs]
            seed = None
        else:
            action = raw.action_space.sample()
            raw_obs, raw_reward, *raw_ends, _ = raw.step(action)
            results = [env.step(action) for env in envs]
            both = [result[0] for result in results]
            if name not in MAZE_NAMES:
                assert [results[0][1], *results[0][2:4]] == [raw_reward, *raw_ends]
            assert results[0][1:4] == results[1][1:4]
        for obs in both:
            assert space.contains(obs), (step, obs)
        np.testing.assert_array_equal(both[0], both[1])
        if name not in MAZE_NAMES:
            assert_same(unflatten(raw.observation_space, both[0]), raw_obs)
        done = not done and (results[0][2] or results[0][3])


def assert_same(left: Any, right: Any) -> None:
    if isinstance(right, tuple):
        for one, other in zip(left, right, strict=True):
            assert_same(one, other)
    else:
        np.testing.assert_allclose(left, right, rtol=1e-6)


@NEEDS_MAZELIB
def test_mazes_have_generators_of_their_own() -> None:
    env = make_popgym("LabyrinthEscapeEasy")
    draws = []
    for resets in (0, 2):
        random.seed(1)
        np.random.seed(1)  # noqa: NPY002
        for _ in range(resets):
            env.reset(seed=0)
        draws.append((random.random(), np.random.random()))  # noqa: NPY002
    assert draws[0] == draws[1]
    twins = [make_popgym("LabyrinthEscapeEasy") for _ in range(2)]
    for seed in (0, None, None):
        one, other = (twin.reset(seed=seed)[1]["maze"] for twin in twins)
        assert one == other, "the mazes that follow a seed are seeded"
    mazes = {make_popgym("LabyrinthEscapeEasy").reset()[1]["maze"] for _ in range(3)}
    assert len(mazes) == 3, "unseeded environments must differ"


@NEEDS_MAZELIB
def test_a_seeded_maze_is_popgyms() -> None:
    assert make_popgym("LabyrinthExploreEasy").reset(seed=5)[1] == raw_popgym("LabyrinthExploreEasy").reset(seed=5)[1]


def one_hot(space: spaces.Space[Any], value: Any) -> list[float]:
    """The documented layout, implemented independently."""
    if isinstance(space, spaces.Discrete):
        return [float(value == space.start + digit) for digit in range(int(space.n))]
    if isinstance(space, spaces.MultiDiscrete):
        parts = zip(space.nvec.ravel(), np.asarray(value).ravel(), space.start.ravel(), strict=True)
        return [float(item == start + digit) for n, item, start in parts for digit in range(n)]
    if isinstance(space, spaces.Tuple):
        return [number for part, item in zip(space.spaces, value, strict=True) for number in one_hot(part, item)]
    if isinstance(space, spaces.Dict):
        return [number for key in sorted(space.keys()) for number in one_hot(space[key], value[key])]
    return [float(number) for number in np.asarray(value).ravel()]


leaf_spaces = st.one_of(
    st.builds(lambda n, start: spaces.Discrete(n, start=start), st.integers(1, 6), st.integers(-3, 3)),
    st.builds(
        lambda nvec, start: spaces.MultiDiscrete(nvec, start=[start] * len(nvec)),
        st.lists(st.integers(1, 5), min_size=1, max_size=4),
        st.integers(-3, 3),
    ),
    st.builds(lambda rows: spaces.MultiDiscrete(np.full((rows, 2), 3)), st.integers(1, 3)),
    st.builds(lambda n: spaces.MultiBinary(n), st.integers(1, 4)),
    st.builds(
        lambda shape, dtype: spaces.Box(-2, 3, tuple(shape), dtype),
        st.lists(st.integers(1, 3), max_size=3),
        st.sampled_from([np.float32, np.float64, np.int8]),
    ),
)
nested_spaces = st.recursive(
    leaf_spaces,
    lambda inner: (
        st.lists(inner, min_size=1, max_size=3).map(spaces.Tuple)
        | st.dictionaries(st.sampled_from("dcba"), inner, min_size=1, max_size=3).map(spaces.Dict)
    ),
    max_leaves=6,
)


class Samples(gym.Env[Any, Any]):
    """An environment with random observations from a space."""

    action_space = spaces.Discrete(2)

    def __init__(self, space: spaces.Space[Any]) -> None:
        self.observation_space = space
        self.last: Any = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        self.last = self.observation_space.sample()
        return self.last, {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.last = self.observation_space.sample()
        return self.last, 0.0, False, False, {}


@given(space=nested_spaces, seed=st.integers(0, 1_000))
@settings(max_examples=100, deadline=None)
def test_any_nest_of_spaces_is_one_hot(space: spaces.Space[Any], seed: int) -> None:
    space.seed(seed)
    raw = Samples(space)
    env = OneHotObservation(raw)
    for sampled in (env.reset, lambda: env.step(0)):
        obs = sampled()[0]
        assert obs.dtype == np.float32
        assert env.observation_space.contains(obs)
        np.testing.assert_allclose(obs, one_hot(space, raw.last), rtol=1e-6)


def test_a_space_without_a_one_hot_vector_is_refused() -> None:
    with pytest.raises(ValueError, match="Text"):
        OneHotObservation(Samples(spaces.Dict({"mission": spaces.Text(5), "cell": spaces.Discrete(3)})))


def play_to_the_end(env: gym.Env[Any, Any], task: str) -> tuple[list[Any], bool, bool]:
    """:return: Observations of an episode up to its time limit, and whether it was terminated and truncated."""
    observations = [env.reset(seed=1)[0]]
    raw: Any = env.unwrapped
    env.action_space.seed(0)
    action = np.argwhere(raw.hidden_grid == 0)[0] if task == "MineSweeper" else env.action_space.sample()
    terminated = truncated = False
    while not (terminated or truncated):
        if task.endswith(("CartPole", "Cartpole")):
            raw.state = np.zeros(4)
        obs, _, terminated, truncated, _ = env.step(action)
        observations.append(obs)
    return observations, terminated, truncated


@pytest.mark.parametrize("level", POPGYM_LEVELS)
@pytest.mark.parametrize("task", marked(TIME_LIMITED))
def test_time_limit_as_termination(task: str, level: str) -> None:
    plain, terminated, truncated = play_to_the_end(make_popgym(task + level), task)
    assert (terminated, truncated) == (False, True), "POPGym reports it as truncated"
    env = make_popgym(task + level, time_limit_is_terminal=True)
    for _ in range(2):  # the timer starts at 0 in each episode
        timed, terminated, truncated = play_to_the_end(env, task)
        assert (terminated, truncated) == (True, False)
        assert all(env.observation_space.contains(obs) for obs in timed)
        np.testing.assert_array_equal(np.stack(timed)[:, :-1], np.stack(plain))
        np.testing.assert_allclose(np.stack(timed)[:, -1], np.linspace(0, 1, len(plain)), atol=1e-6)


@pytest.mark.parametrize("level", POPGYM_LEVELS)
@pytest.mark.parametrize("task", [task for task, limit in POPGYM_TIME_LIMITS.items() if limit is None])
def test_tasks_that_end_with_their_cards_have_no_time_limit(task: str, level: str) -> None:
    env = make_popgym(task + level, time_limit_is_terminal=True)
    assert env.observation_space == make_popgym(task + level).observation_space
    _, terminated, truncated = play_to_the_end(env, task)
    assert (terminated, truncated) == (True, False)


def test_sizes_are_set_on_a_task_without_its_level() -> None:
    raw: Any = make_popgym("RepeatPrevious", num_decks=1, k=2).unwrapped
    assert raw.k == 2
    raw = make_popgym("NoisyPositionOnlyCartPole", noise_sigma=0.5, max_episode_length=7).unwrapped
    assert raw.max_episode_length == 7
    with pytest.raises(ValueError, match=r"fixed sizes.*'num_decks'.*'RepeatPrevious'"):
        make_popgym("RepeatPreviousEasy", num_decks=2)
    with pytest.raises(ValueError, match=r"CartPole cannot be made.*length"):
        make_popgym("PositionOnlyCartPole", length=2)
    with pytest.raises(ValueError, match=r"RepeatPrevious cannot be made.*'k': 60"):
        make_popgym("RepeatPrevious", k=60)


def test_an_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"'RepeatPreviousEsay'.*Did you mean 'RepeatPreviousEasy'"):
        make_popgym("RepeatPreviousEsay")
    with pytest.raises(
        ValueError, match="Did you mean 'VelocityOnlyCartpoleEasy'"
    ):  # POPGym's id differs from the name of the class
        make_popgym("VelocityOnlyCartPoleEasy")


def test_a_missing_package_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "popgym.envs", None)
    with pytest.raises(ImportError, match=r'pip install "sb3-cyborg\[popgym\]"'):
        make_popgym("RepeatPreviousEasy")


@pytest.mark.skipif(HAS_MAZES, reason="mazelib is installed")
def test_missing_mazelib_is_named() -> None:
    with pytest.raises(ImportError, match=r'LabyrinthEscapeHard.*pip install "popgym\[navigation\]"'):
        make_popgym("LabyrinthEscapeHard")


def test_info_of_a_step_is_not_changed_by_the_next() -> None:
    env = make_popgym("CountRecallEasy")
    _, info = env.reset(seed=0)
    kept = info["counts"].copy()
    env.step(0)
    np.testing.assert_array_equal(info["counts"], kept)


def test_rendering(capsys: pytest.CaptureFixture[str]) -> None:
    env = make_popgym("AutoencodeEasy", render_mode="ansi")
    env.reset(seed=0)
    assert str(env.render()).startswith("reset, observation (1, ")
    env.step(2)
    assert str(env.render()).startswith("step 1: action 2, reward +0.0000, observation (1, ")
    assert capsys.readouterr().out == ""
    env = make_popgym("AutoencodeEasy", render_mode="human")
    env.reset(seed=0)
    assert env.render() is None
    assert capsys.readouterr().out.startswith("reset, observation (1, ")
    cart = make_popgym("NoisyPositionOnlyCartPoleHard", render_mode="rgb_array")
    cart.reset(seed=0)
    assert np.asarray(cart.render()).shape == (400, 600, 3)
    with pytest.raises(
        TypeError, match="unexpected keyword argument 'render_mode'='rgb_array': AutoencodeEasy has 'human', 'ansi'"
    ):
        make_popgym("AutoencodeEasy", render_mode="rgb_array")


def test_make_vec_env_and_env_kwargs(registered_id: str) -> None:
    """SB3 requests ``rgb_array`` and falls back to no rendering; RL Zoo passes ``env_kwargs`` of a YAML file to the spec."""
    venv = make_vec_env(registered_id, n_envs=2, seed=0)
    assert np.asarray(venv.reset()).shape == (2, 4)
    spec = gym.spec(registered_id)
    venv = make_vec_env(spec.make, n_envs=1, env_kwargs={"name": "MineSweeperHard", "time_limit_is_terminal": True})
    assert np.asarray(venv.reset()).shape == (1, 11)


@pytest.mark.parametrize(
    "name",
    [
        "RepeatPreviousEasy",  # Discrete
        "AutoencodeEasy",  # Tuple
        "ConcentrationEasy",  # MultiDiscrete
        "MineSweeperEasy",  # MultiDiscrete actions
        "NoisyPositionOnlyPendulumEasy",  # Box, Box actions
        "VelocityOnlyCartpoleEasy",  # an unbounded Box
    ],
)
def test_memory_ppo_learns(name: str) -> None:
    venv = make_vec_env(lambda **kwargs: make_popgym(name, **kwargs), n_envs=2, env_kwargs={"time_limit_is_terminal": True})
    policy_kwargs = {"hidden_dim": 8, "memory_kwargs": {"num_slots": 4}}
    model = MemoryPPO("MlpPolicy", venv, n_steps=16, batch_size=32, n_epochs=1, seed=0, policy_kwargs=policy_kwargs)
    before = [parameter.detach().clone() for parameter in model.policy.parameters()]
    model.learn(64)
    assert any((one != other).any() for one, other in zip(before, model.policy.parameters(), strict=True))
    assert all(parameter.isfinite().all() for parameter in model.policy.parameters())
