"""Tier two: MineRL's real ``_SingleAgentEnv`` and launcher with a test double of Minecraft at the network level."""

import random
import time
from typing import Any

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env as gymnasium_check_env
from stable_baselines3.common.env_checker import check_env as sb3_check_env

from sb3_cyborg.envs import make_memory_vec_env
from sb3_cyborg.envs.minerl import MineRLEnv
from tests.minerl.conftest import Minecraft
from tests.minerl.malmo_double import image

IDLE = {"attack": 0, "back": 0, "forward": 0, "jump": 0, "left": 0, "right": 0, "sneak": 0, "sprint": 0, "camera": "0.0 0.0"}


def told(command: str) -> dict[str, str]:
    """:return: A command of MineRL as a dictionary, without idle keys."""
    lines = [line.split(" ", 1) for line in command.split("\n")]
    return {key: value for key, value in lines if value != str(IDLE.get(key, "none"))}


def test_minerls_own_environment_sends_the_exact_command(minecraft: Minecraft) -> None:
    env = minecraft.env()
    env.reset(seed=1)
    assert env._simulator is not None
    inner = env._simulator._env.unwrapped
    assert type(inner).__module__ == "minerl.env._singleagent"
    inner.step({"attack": 1, "camera": np.array([0, 90], dtype=np.float32)})
    inner.step({"forward": 1, "jump": 1})
    for command in minecraft.commands():
        print(repr(command))
    assert minecraft.commands() == ["attack 1\ncamera 0.0 90.0", "forward 1\njump 1"]


def test_the_order_of_messages(minecraft: Minecraft) -> None:
    env = minecraft.env(frame_skip=2)
    env.reset(seed=123)
    env.step(0)
    env.reset()
    env.close()
    log = minecraft.transcript()
    messages: dict[int, list[str]] = {0: [], 1: []}
    for entry in log:
        messages[entry["connection"]].append(entry.get("message") or entry.get("hello") or "step")
    start = ["<MalmoEnv0.37.0/>", "<Quit/>", "<MissionInit", "<Peek/>"]
    assert messages == {0: [*start, *["step", "<StepServer></StepServer>"] * 2], 1: start}
    assert all(entry["nodelay"] for entry in log if "hello" in entry)
    assert all("MineRLTreechop-v0" in entry["xml"] for entry in log if "xml" in entry)
    print(minecraft.tokens()[0])
    assert [token.split(":")[1:5] for token in minecraft.tokens()] == [["0", "0", "1", "true"]] * 2
    assert minecraft.launches == 1


def test_every_macro_action_on_the_wire(minecraft: Minecraft) -> None:
    env = minecraft.env(frame_skip=1)
    env.reset()
    for action in range(env.action_space.n):
        env.step(action)
    commands = minecraft.commands()
    for name, command in zip(env.action_names, commands, strict=True):
        print(f"{name:20} {command!r}")
    assert {name: told(command) for name, command in zip(env.action_names, commands, strict=True)} == {
        "noop": {},
        "forward": {"forward": "1"},
        "forward+jump": {"forward": "1", "jump": "1"},
        "attack": {"attack": "1"},
        "forward+attack": {"forward": "1", "attack": "1"},
        "turn left": {"camera": "0.0 -10.0"},
        "turn right": {"camera": "0.0 10.0"},
        "look up": {"camera": "-10.0 0.0"},
        "look down": {"camera": "10.0 0.0"},
        "back": {"back": "1"},
        "left": {"left": "1"},
        "right": {"right": "1"},
        "jump": {"jump": "1"},
        "forward+sprint": {"forward": "1", "sprint": "1"},
        "forward+jump+sprint": {"forward": "1", "jump": "1", "sprint": "1"},
        "forward+jump+attack": {"forward": "1", "jump": "1", "attack": "1"},
        "attack+turn left": {"attack": "1", "camera": "0.0 -10.0"},
        "attack+turn right": {"attack": "1", "camera": "0.0 10.0"},
    }
    assert {key for command in commands for key in dict(line.split(" ", 1) for line in command.split("\n"))} == set(IDLE)


def picture(seed: int, tick: int) -> np.ndarray:
    """:return: The image of the agent at a tick. Minecraft sends the bottom row first."""
    return np.frombuffer(image(seed, tick, 64, 64), np.uint8).reshape(64, 64, 3)[::-1]


def test_the_image_is_the_one_that_was_sent(minecraft: Minecraft) -> None:
    env = minecraft.env(frame_skip=3, render_mode="rgb_array")
    obs, info = env.reset(seed=5)
    assert info == {"world_seed": 5, "launches": 1}
    np.testing.assert_array_equal(obs, picture(5, 0))
    for tick in (3, 6):
        obs, _, _, _, info = env.step(0)
        np.testing.assert_array_equal(obs, picture(5, tick))
        np.testing.assert_array_equal(env.render(), picture(5, tick))
        assert info["ticks"] == tick
        assert isinstance(obs, np.ndarray)
        assert obs.flags.c_contiguous


def test_a_frame_skip_holds_keys_turns_once_and_adds_rewards(minecraft: Minecraft) -> None:
    env = minecraft.env(frame_skip=3)
    env.reset()
    _, reward, *_ = env.step(env.action_names.index("attack+turn left"))
    assert reward == 3.0
    turned = {"attack": "1", "camera": "0.0 -10.0"}
    assert [told(command) for command in minecraft.commands()] == [turned, {"attack": "1"}, {"attack": "1"}]


def test_a_frame_stack_has_the_newest_frame_last(minecraft: Minecraft) -> None:
    env = minecraft.env(frame_skip=1, frame_stack=3)
    obs, _ = env.reset(seed=9)
    np.testing.assert_array_equal(obs, np.concatenate([picture(9, 0)] * 3, axis=-1))
    env.step(0)
    obs, *_ = env.step(0)
    np.testing.assert_array_equal(obs, np.concatenate([picture(9, tick) for tick in (0, 1, 2)], axis=-1))
    assert env.observation_space.contains(obs)


def test_navigate_sees_its_compass_and_places_dirt(minecraft: Minecraft) -> None:
    dirt = {"type": "dirt", "metadata": 0, "quantity": 32}
    minecraft.plan(default={"world": {"compassAngle": -90.0, "inventory": [dirt]}})
    env = minecraft.env("minerl_navigate", frame_skip=2)
    obs, _ = env.reset()
    assert isinstance(obs, dict)
    assert env.vector_names == ("compass sin", "compass cos", "inventory dirt")
    np.testing.assert_allclose(obs["vector"], [-1.0, 0.0, 0.5], atol=1e-6)
    env.step(env.action_names.index("place dirt"))
    assert [told(command) for command in minecraft.commands()] == [{"place": "dirt"}, {}]
    assert env.observation_space.contains(obs)


def test_obtain_diamond_crafts_with_strings(minecraft: Minecraft) -> None:
    held = {"type": "stone_axe", "metadata": 0, "damage": 33, "maxDamage": 132}
    world = {"inventory": [{"type": "log", "metadata": 0, "quantity": 64}], "equipped_items": {"mainhand": held}}
    minecraft.plan(default={"world": world})
    env = minecraft.env("minerl_obtain_diamond", frame_skip=1)
    obs, _ = env.reset()
    assert isinstance(obs, dict)
    seen = {name: value for name, value in zip(env.vector_names, obs["vector"].tolist(), strict=True) if value}
    assert seen == {"inventory log": 1.0, "mainhand stone_axe": 1.0, "mainhand worn": 0.25}
    assert env.observation_space.contains(obs)
    # MineRL's names of the keys, with Malmo's names of the commands.
    verbs = {"craft": "craft", "equip": "equip", "nearbyCraft": "craftNearby", "nearbySmelt": "smeltNearby", "place": "place"}
    chosen = [name for name in env.action_names if name.split()[0] in verbs]
    for name in chosen:
        env.step(env.action_names.index(name))
    sent = [told(command) for command in minecraft.commands()]
    for name, command in zip(chosen, sent, strict=True):
        print(f"{name:26} {command}")
    assert sent == [{verbs[key]: item} for key, item in (name.split() for name in chosen)]
    assert len(chosen) == 26


@pytest.mark.filterwarnings("ignore:.*It seems a Box observation space is an image")
@pytest.mark.parametrize("env_id", ["minerl_treechop", "MineRLNavigateDense-v0", "MineRLObtainIronPickaxe-v0"])
def test_both_checkers_find_no_fault(minecraft: Minecraft, env_id: str) -> None:
    minecraft.plan(default={"world": {"compassAngle": 45.0, "inventory": [], "equipped_items": {}}})
    env = minecraft.env(env_id)
    gymnasium_check_env(env, skip_render_check=True)
    sb3_check_env(env)
    rng = random.Random(0)
    env.reset(seed=0)
    for _ in range(1000):
        obs, _, terminated, truncated, _ = env.step(rng.randrange(int(env.action_space.n)))
        assert env.observation_space.contains(obs)
        if terminated or truncated:
            env.reset()
    assert env.faults == 0


ATTACK = 3


@pytest.mark.parametrize(
    ("plan", "ticks", "episode_return", "terminated", "truncated"),
    [
        pytest.param({"done_at": 50, "attack_reward": 0.0}, 50, 0.0, True, False, id="died"),
        pytest.param({"attack_reward": 0.0}, 8000, 0.0, False, True, id="gym's time limit"),
        pytest.param({"done_at": 7990, "attack_reward": 0.0}, 7990, 0.0, False, True, id="Minecraft's time limit"),
        pytest.param({"done_at": 8000, "attack_reward": 0.0}, 8000, 0.0, False, True, id="both time limits"),
        pytest.param({"done_at": 8000, "attack_reward": 0.007}, 8000, 56.0, False, True, id="nearly solved in time"),
        pytest.param({"done_at": 8000, "attack_reward": 0.0078125}, 8000, 62.5, False, True, id="more nearly solved"),
        pytest.param(
            {"done_at": 7999, "attack_reward": 0.015625}, 7999, 124.984375, True, False, id="solved at the last moment"
        ),
        pytest.param({"done_at": 64}, 64, 64.0, True, False, id="solved"),
    ],
)
def test_how_an_episode_ends(
    minecraft: Minecraft, plan: dict[str, Any], ticks: int, episode_return: float, terminated: bool, truncated: bool
) -> None:
    minecraft.plan(default=plan)
    env = minecraft.env(frame_skip=100)
    env.reset()
    total, ended = 0.0, False
    while not ended:
        _, reward, *ends, info = env.step(ATTACK)
        total += float(reward)
        ended = any(ends)
    assert info["ticks"] == ticks
    assert total == pytest.approx(episode_return)
    assert ends == [terminated, truncated]
    assert "minerl_fault" not in info
    with pytest.raises(Exception, match="`reset` the environment"):
        env.step(0)


def test_worlds_follow_from_the_seed(minecraft: Minecraft) -> None:
    env = minecraft.env()
    seeds = []
    for seed in (7, None, None, 7, None):
        _, info = env.reset(seed=seed)
        seeds.append(info["world_seed"])
    assert [int(token.split(":")[5]) for token in minecraft.tokens()] == seeds
    assert seeds[0] == 7
    assert len(set(seeds[:3])) == 3
    assert seeds[3:] == seeds[:2]


def test_minecraft_is_replaced_every_so_many_episodes(minecraft: Minecraft) -> None:
    env = minecraft.env(restart_every=2)
    launches = []
    for _ in range(5):
        _, info = env.reset()
        launches.append(info["launches"])
    assert launches == [1, 1, 2, 2, 3]
    assert env.faults == 0
    assert env._simulator is not None
    assert len(env._simulator.processes()) == 2  # the launcher and the double of the last instance only


def test_by_its_id(minecraft: Minecraft) -> None:
    """The environment is made as in the trainer, the Zoo and the examples."""
    minecraft.plan(default={"done_at": 4})
    vec_env = make_memory_vec_env("minerl_treechop", 2, seed=3, env_kwargs={"frame_skip": 2}, vec_env="dummy")
    try:
        np.testing.assert_array_equal(vec_env.reset(), [picture(3, 0), picture(4, 0)])
        for tick in (2, 4):
            _, rewards, dones, infos = vec_env.step(np.array([ATTACK, 0]))
            assert rewards.tolist() == [2.0, 0.0]
            assert dones.tolist() == [tick == 4] * 2
        assert [info["episode"]["r"] for info in infos] == [4.0, 0.0]
        for info, seed in zip(infos, (3, 4), strict=True):
            assert not info["TimeLimit.truncated"]
            np.testing.assert_array_equal(info["terminal_observation"], picture(seed, 4))
    finally:
        vec_env.close()


def test_steps_per_second(minecraft: Minecraft) -> None:
    """Prints the speed without asserting it; without TCP_NODELAY in the double it is 22."""
    env = minecraft.env(frame_skip=1)
    env.reset()
    start = time.perf_counter()
    for _ in range(2000):
        env.step(ATTACK)
    print(f"{2000 / (time.perf_counter() - start):.0f} ticks per second through the wire")
    assert len(minecraft.commands()) == 2000


def test_mistakes_are_told(minecraft: Minecraft) -> None:
    with pytest.raises(ValueError, match="Did you mean 'MineRLTreechop-v0'"):
        MineRLEnv("MineRLTreechopp-v0")
    with pytest.raises(ValueError, match="Unknown task of MineRL 'CartPole-v1'"):
        MineRLEnv("CartPole-v1")
    with pytest.raises(ValueError, match="obfuscated tasks"):
        MineRLEnv("MineRLTreechopVectorObf-v0")
    env = minecraft.env()
    with pytest.raises(Exception, match="`reset` the environment"):
        env.step(0)
    env.reset()
    for action in (18, -1, 0.5):
        with pytest.raises(ValueError, match="whole number from 0 to 17"):
            env.step(action)  # type: ignore[arg-type]
