"""``CrafterWood`` with the real game."""

import copy
import hashlib
import os
import pickle
import subprocess
import sys
import warnings
from typing import Any

import crafter
import gymnasium as gym
import numpy as np
import pytest
from crafter.objects import Arrow, Cow, Object, Player, Skeleton, Zombie
from gymnasium.error import ResetNeeded
from gymnasium.utils.env_checker import check_env
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3.common.env_checker import check_env as sb3_check_env

from sb3_cyborg import MemoryPPO
from sb3_cyborg.envs import make_memory_vec_env
from sb3_cyborg.envs.crafter import CrafterWoodEnv

ENV_ID = "sb3_cyborg/CrafterWood-v0"
NOOP, LEFT, RIGHT, UP, DOWN, DO = range(6)
MONSTERS = (Zombie, Skeleton, Arrow)


def made(seed: int = 0, **kwargs: Any) -> CrafterWoodEnv:
    env = CrafterWoodEnv(**kwargs)
    env.reset(seed=seed)
    return env


def things(env: CrafterWoodEnv, *kinds: type[Object]) -> list[Object]:
    return [thing for thing in env.game.world.objects if isinstance(thing, kinds)]


def before_the_player(env: CrafterWoodEnv, material: str) -> None:
    """Puts a material in front of the player, and removes objects there."""
    for thing in things(env, Cow, *MONSTERS):
        env.game.world.remove(thing)
    env.game.world[env.game.player.pos + env.game.player.facing] = material


def course(env: CrafterWoodEnv, steps: int, seed: int = 0, render_every: int = 0) -> str:
    """:return: Hash of all observations, rewards and infos of several episodes with random actions."""
    digest, actions = hashlib.sha256(), np.random.default_rng(seed).integers(6, size=steps)
    digest.update(env.reset(seed=seed)[0].tobytes())
    for step, action in enumerate(actions.tolist()):
        obs, reward, terminated, truncated, info = env.step(action)
        positions = [(type(thing).__name__, *thing.pos.tolist()) for thing in env.game.world.objects]
        digest.update(obs.tobytes() + repr((reward, terminated, truncated, info, positions)).encode())
        if render_every and step % render_every == 0:
            env.render()
        if terminated or truncated:
            digest.update(env.reset()[0].tobytes())
    return digest.hexdigest()


# --- interface ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("peaceful", [False, True])
def test_checkers_have_nothing_to_say(peaceful: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(gym.make(ENV_ID, peaceful=peaceful, area=(16, 16), render_mode="rgb_array").unwrapped)
        sb3_check_env(gym.make(ENV_ID, peaceful=peaceful, render_mode="rgb_array").unwrapped)


def test_spaces() -> None:
    env = gym.make(ENV_ID)
    assert env.observation_space == gym.spaces.Box(0, 255, (64, 64, 3), np.uint8)
    assert env.action_space == gym.spaces.Discrete(6)
    game = made().game
    assert [game.action_names[action] for action in made()._actions] == list(CrafterWoodEnv.action_names)


@pytest.mark.parametrize("peaceful", [False, True])
def test_a_thousand_random_steps(peaceful: bool) -> None:
    env = gym.make(ENV_ID, peaceful=peaceful)
    env.action_space.seed(0)
    env.reset(seed=0)
    wood, episodes, total = 0.0, 0, 0.0
    for _ in range(1000):
        obs, reward, terminated, truncated, info = env.step(env.action_space.sample())
        assert env.observation_space.contains(obs)
        wood += float(reward)
        total += float(reward)
        assert info["wood"] == wood
        if terminated or truncated:
            episodes, wood = episodes + 1, 0.0
            assert env.reset()[1]["wood"] == 0
    assert episodes >= 2
    assert total > 0


@settings(max_examples=20, deadline=None)
@given(
    area=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    peaceful=st.booleans(),
    seed=st.integers(0, 2**40),
    actions=st.lists(st.integers(0, 5), min_size=1, max_size=60),
)
def test_any_world_any_actions(area: tuple[int, int], peaceful: bool, seed: int, actions: list[int]) -> None:
    env = made(seed, area=area, peaceful=peaceful, length=len(actions))
    wood = 0.0
    for step, action in enumerate(actions, 1):
        obs, reward, terminated, truncated, info = env.step(action)
        wood += reward
        assert env.observation_space.contains(obs)
        assert info["wood"] == wood == info["achievements"]["collect_wood"]
        assert truncated == (step == len(actions) and not terminated)
        if terminated:
            break


def test_memory_ppo_learns_from_its_pictures() -> None:
    envs = make_memory_vec_env(
        ENV_ID, 2, seed=0, env_kwargs={"peaceful": True, "length": 12, "area": (16, 16)}, vec_env="dummy"
    )
    model = MemoryPPO("CnnPolicy", envs, n_steps=16, batch_size=16, n_epochs=1, seq_len=8, seed=0)
    model.learn(64)
    assert model.num_timesteps == 64
    assert len(model.ep_info_buffer or []) == 4
    assert model.logger.name_to_value["train/ratio_error"] <= 1e-5


# --- reward -------------------------------------------------------------------------------------------------------------


def test_each_piece_of_wood_is_a_point() -> None:
    """The reward does not depend on the inventory, which is full with nine pieces."""
    env = made(peaceful=True)
    for count in range(1, 16):
        before_the_player(env, "tree")
        _, reward, terminated, truncated, info = env.step(DO)
        assert (reward, terminated, truncated) == (1.0, False, False)
        assert (info["wood"], info["inventory"]["wood"]) == (count, min(count, 9))
        assert env.step(DO)[1] == 0.0  # the tree has disappeared
    assert env.reset()[1]["wood"] == 0
    assert env.step(NOOP)[1] == 0.0  # not -15


@pytest.mark.parametrize("material", ["grass", "water", "stone", "sand", "path", "iron", "table"])
def test_nothing_else_is_a_point(material: str) -> None:
    env = made(peaceful=True)
    for _ in range(30):  # grass sometimes gives a sapling
        before_the_player(env, material)
        assert env.step(DO)[1] == 0.0


def test_a_tree_is_cut_by_do_alone() -> None:
    env = made(peaceful=True)
    before_the_player(env, "tree")
    x, y = env.game.player.pos
    for action in (NOOP, DOWN):  # the player turns down, and the tree blocks the way
        _, reward, *_, info = env.step(action)
        assert (reward, info["player_pos"]) == (0.0, (x, y))
    assert env.step(DO)[1] == 1.0


def test_moves() -> None:
    env = made(peaceful=True)
    x, y = env.game.player.pos  # the middle of a meadow
    for action, place in [(LEFT, (x - 1, y)), (RIGHT, (x, y)), (UP, (x, y - 1)), (DOWN, (x, y))]:
        assert env.step(action)[4]["player_pos"] == place


# --- natural and peaceful -----------------------------------------------------------------------------------------------


def met(env: CrafterWoodEnv) -> int:
    """:return: Number of monsters, summed over the steps of two days and nights in which the player cannot die."""
    count = len(things(env, *MONSTERS))
    for _ in range(600):
        env.game.player.health = 9
        env.step(NOOP)
        count += len(things(env, *MONSTERS))
    return count


def test_peaceful_worlds_have_no_monsters() -> None:
    natural, peaceful = made(1, length=1000), made(1, length=1000, peaceful=True)
    assert things(natural, Zombie)
    assert things(natural, Skeleton)
    assert met(natural) > 600
    assert met(peaceful) == 0
    assert things(peaceful, Cow)


def test_nobody_starves_in_a_peaceful_world() -> None:
    env = made(peaceful=True, length=1000)
    env.game.player.health = 5
    for _ in range(900):
        _, _, terminated, truncated, info = env.step(NOOP)
        assert (terminated, truncated) == (False, False)
        assert {info["inventory"][need] for need in ("food", "drink", "energy")} == {9}
    assert info["inventory"]["health"] == 9  # health recovers


def test_the_natural_world_is_crafters() -> None:
    """Food, drink and energy fall as in Crafter; without sleep an episode ends after at most 440 steps."""
    env = made(length=1000, area=(12, 12))
    for step in range(1, 441):
        before_the_player(env, "grass")  # no monsters
        env.game.player.inventory.update(food=9, drink=9)
        _, _, terminated, truncated, info = env.step(NOOP)
        assert (terminated, truncated) == (step == 440, False)
    assert info["inventory"]["energy"] == info["inventory"]["health"] == 0


def test_the_first_worlds_are_those_of_the_package() -> None:
    original = crafter.Env(area=(20, 20), seed=7)
    env = CrafterWoodEnv(area=(20, 20))
    for seed in (7, None, None):
        np.testing.assert_array_equal(env.reset(seed=seed)[0], original.reset())
        np.testing.assert_array_equal(env.game.world._mat_map, original._world._mat_map)
        for action in (LEFT, DO, UP, DO, NOOP):  # Crafter adds and removes creatures at step 10
            np.testing.assert_array_equal(env.step(action)[0], original.step(action)[0])


# --- ends ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("peaceful", [False, True])
def test_the_time_limit_truncates(peaceful: bool) -> None:
    env = made(length=5, peaceful=peaceful)
    assert [env.step(NOOP)[2:4] for _ in range(5)] == [(False, False)] * 4 + [(False, True)]
    env.reset()
    assert env.step(NOOP)[2:4] == (False, False)


@pytest.mark.parametrize("length", [1, 500])
def test_death_terminates(length: int) -> None:
    """The player dies in lava, also in the peaceful world and in the last step."""
    env = made(length=length, peaceful=True)
    before_the_player(env, "lava")
    _, reward, terminated, truncated, info = env.step(DOWN)
    assert (reward, terminated, truncated, info["inventory"]["health"]) == (0.0, True, False, 0)


def test_sb3_bootstraps_at_the_time_limit_alone() -> None:
    envs = make_memory_vec_env(ENV_ID, 1, seed=0, env_kwargs={"peaceful": True, "length": 3}, vec_env="dummy")
    envs.reset()
    infos = [envs.step(np.array([NOOP]))[3][0] for _ in range(3)]
    assert [info["TimeLimit.truncated"] for info in infos] == [False, False, True]
    assert infos[-1]["episode"]["l"] == 3
    before_the_player(envs.get_attr("unwrapped")[0], "lava")
    _, _, dones, (info,) = envs.step(np.array([DOWN]))
    assert dones[0]
    assert not info["TimeLimit.truncated"]


# --- determinism --------------------------------------------------------------------------------------------------------

SCRIPT = """
import sys
from tests.test_crafter import courses
heap = [object() for _ in range(int(sys.argv[1]))]  # changes memory addresses
print(*courses())
"""


def courses() -> list[str]:
    return [course(CrafterWoodEnv(peaceful, area=(24, 24)), 300) for peaceful in (False, True)]


def test_the_same_course_in_every_process() -> None:
    def run(hash_seed: str, junk: int) -> str:
        environ = {**os.environ, "PYTHONHASHSEED": hash_seed}
        command = [sys.executable, "-c", SCRIPT, str(junk)]
        return subprocess.run(command, env=environ, check=True, capture_output=True, text=True, timeout=200).stdout

    here = " ".join(courses())
    assert {run("0", 0).strip(), run("1", 12_345).strip()} == {here}


def test_creatures_are_drawn_by_their_place() -> None:
    """The package keeps objects in sets, whose order depends on memory addresses."""

    def left(order: int) -> list[Any]:
        env = made(peaceful=True)
        game = env.game
        for thing in things(env, Cow):
            game.world.remove(thing)
        game.player.pos = np.array([31, 31])
        cows = [Cow(game.world, (x, 5)) for x in range(8)]
        for cow in cows:
            if game.world[cow.pos][1] is None:
                game.world.add(cow)
        for _ in range(100):
            there = sorted(things(env, Cow), key=lambda cow: tuple(cow.pos))[::order]
            game._balance_chunk((0, 12, 0, 12), there)
        return [tuple(cow.pos) for cow in things(env, Cow)]

    assert 0 < len(left(1)) < 8
    assert left(1) == left(-1)


@pytest.mark.parametrize("peaceful", [False, True])
def test_looking_changes_nothing(peaceful: bool) -> None:
    """The images at night contain noise from the world's random generator."""
    kwargs: dict[str, Any] = {"peaceful": peaceful, "area": (20, 20), "render_mode": "rgb_array", "render_size": 90}
    assert course(CrafterWoodEnv(**kwargs), 250) == course(CrafterWoodEnv(**kwargs), 250, render_every=3)


def test_pictures() -> None:
    env = made(render_mode="rgb_array", render_size=64, peaceful=True)
    obs, _ = env.reset(seed=3)
    picture = env.render()
    assert picture is not None
    np.testing.assert_array_equal(picture, obs)  # by day there is no noise
    env.game.world.daylight = 0.1
    night = env.render()
    assert night is not None
    np.testing.assert_array_equal(env.render(), night)
    assert not np.array_equal(night, picture)
    large = gym.make(ENV_ID, render_mode="rgb_array")
    large.reset(seed=3)
    picture = np.asarray(large.render())
    assert picture.shape == (576, 576, 3)
    assert picture.dtype == np.uint8
    with pytest.warns(UserWarning, match="without a render mode"):
        assert made().render() is None


def test_numpys_global_numbers_are_left_alone() -> None:
    np.random.seed(0)  # noqa: NPY002  # these are what it is about
    before = np.random.get_state()[1].tolist()  # type: ignore[index]  # noqa: NPY002
    env = CrafterWoodEnv()
    env.reset()
    env.step(DO)
    assert np.random.get_state()[1].tolist() == before  # type: ignore[index]  # noqa: NPY002


def test_seeds_and_episodes_differ() -> None:
    def maps(env: CrafterWoodEnv, seed: int | None) -> list[bytes]:
        env.reset(seed=seed)
        first = env.game.world._mat_map.tobytes()
        env.reset()
        return [first, env.game.world._mat_map.tobytes()]

    def fresh() -> CrafterWoodEnv:
        return CrafterWoodEnv(area=(16, 16))

    env = fresh()
    series = maps(env, 0)
    assert len({*series, *maps(env, 1), *maps(env, None), *maps(fresh(), None), *maps(fresh(), None)}) == 10
    assert maps(env, 0) == series == maps(fresh(), 0)


def test_copies_go_on_alike() -> None:
    env = made(2)
    for other in (copy.deepcopy(env), pickle.loads(pickle.dumps(env))):
        assert isinstance(other.game.player, Player)
        assert course(other, 50) == course(copy.deepcopy(env), 50)


# --- errors -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"area": 32}, "`area` must be a width and a height, e.g. \\(32, 32\\), got 32"),
        ({"area": (32,)}, "`area` must be a width and a height"),
        ({"area": (32, 0)}, "`area\\[1\\]` must be a whole number of at least 1, got 0"),
        ({"length": 0}, "`length` must be a whole number of at least 1, got 0"),
        ({"length": None}, "`length` must be a whole number of at least 1, got None"),
        ({"render_size": 17}, "`render_size` must be a whole number of at least 18, got 17"),
        ({"render_mode": "rgb_aray"}, "Unknown render mode 'rgb_aray'. Did you mean 'rgb_array'"),
    ],
)
def test_bad_input_is_told(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CrafterWoodEnv(**kwargs)


@pytest.mark.parametrize("action", [-1, 6, 1.5, "do"])
def test_unknown_actions_are_told(action: Any) -> None:
    with pytest.raises(ValueError, match="`action` must be a whole number from 0 to 5"):
        made().step(action)


def test_the_least_that_works() -> None:
    env = made(area=[1, 1], length=1, render_mode="rgb_array", render_size=18)  # YAML files contain lists
    picture = env.render()
    assert picture is not None
    assert picture.shape == (18, 18, 3)
    assert env.step(np.int64(DO))[3]


def test_reset_comes_first() -> None:
    env = CrafterWoodEnv(render_mode="rgb_array")
    with pytest.raises(ResetNeeded, match="before `step`"):
        env.step(NOOP)
    with pytest.raises(ResetNeeded, match="before `render`"):
        env.render()


def test_a_missing_package_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "crafter", None)
    monkeypatch.delitem(sys.modules, "sb3_cyborg.envs.crafter_game", raising=False)
    with pytest.raises(ImportError, match=r'pip install "sb3-cyborg\[crafter\]"'):
        gym.make(ENV_ID)
