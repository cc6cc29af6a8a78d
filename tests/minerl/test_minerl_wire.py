"""Tier two: MineRL's genuine ``_SingleAgentEnv`` and launcher against a double of Minecraft at the wire."""

import random
import struct
import time
from typing import Any

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env as gymnasium_check_env
from stable_baselines3.common.env_checker import check_env as sb3_check_env

from sb3_cyborg.envs.minerl import MineRLEnv
from tests.minerl.conftest import Minecraft
from tests.minerl.malmo_double import image

IDLE = {"attack": 0, "back": 0, "forward": 0, "jump": 0, "left": 0, "right": 0, "sneak": 0, "sprint": 0, "camera": "0.0 0.0"}


def told(command: str) -> dict[str, str]:
    """:return: A command of MineRL as a dictionary of what is not idle."""
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
    log = minecraft.transcript()
    assert [entry.get("message", "step" if "command" in entry else entry.get("hello")) for entry in log] == [
        "<MalmoEnv0.37.0/>",
        "<Quit/>",
        "<MissionInit",
        "<Peek/>",
        "step",
        "<StepServer></StepServer>",
        "step",
        "<StepServer></StepServer>",
        "<MalmoEnv0.37.0/>",
        "<Quit/>",
        "<MissionInit",
        "<Peek/>",
    ]
    assert log[0]["nodelay"]
    assert "<Name>MineRLTreechop-v0</Name>" in log[2]["xml"] or "MineRLTreechop" in log[2]["xml"]
    first, second = minecraft.tokens()
    print(first)
    assert first.split(":")[1:] == ["0", "0", "1", "true", "123"]
    assert second.split(":")[1:5] == ["0", "0", "1", "true"]
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
