"""MineRL's adapter without MineRL: its errors, and the parts that do not need MineRL. Other tests are in tests/minerl."""

import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from hypothesis import given
from hypothesis import strategies as st

from sb3_cyborg.envs import make_memory_vec_env
from sb3_cyborg.envs.minerl import MineRLEnv
from sb3_cyborg.envs.minerl.actions import MOVES, macro_actions
from sb3_cyborg.envs.minerl.observations import FrameStack, ObservationEncoder
from sb3_cyborg.envs.minerl.process import describe, find_simulator
from sb3_cyborg.envs.registration import FAMILIES

IDS = FAMILIES["MineRL"].kwargs


@pytest.fixture
def no_minerl(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hides MineRL if it is installed."""
    monkeypatch.setitem(sys.modules, "minerl", None)


def test_nothing_of_minerl_is_imported_before_an_environment_is_made() -> None:
    heavy = ["minerl", "gym", "Pyro4"]
    code = (
        f"import sb3_cyborg.envs.minerl, sys; print([name for name in {heavy} if name in sys.modules and sys.modules[name]])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip() in ("[]", "['gym']")  # Stable-Baselines3 imports an old gym if it is installed


@pytest.mark.usefixtures("no_minerl")
@pytest.mark.parametrize("env_id", IDS)
def test_without_minerl_the_error_says_what_to_install(env_id: str) -> None:
    with pytest.raises(ImportError, match=r"`pip install --no-deps minerl==0.4.4 gym==0.17.3`.*docs/minerl.md"):
        gym.make(env_id)


@pytest.mark.usefixtures("no_minerl")
@pytest.mark.parametrize("vec_env", ["dummy", "subproc"])
def test_without_minerl_vectorised_environments_say_so_too(vec_env: str) -> None:
    """MineRL cannot be hidden in a subprocess, but it is not installed where this test runs."""
    with pytest.raises((ImportError, RuntimeError), match=r"docs/minerl\.md"):
        make_memory_vec_env("minerl_treechop", 2, vec_env=vec_env)


def test_a_minerl_that_does_not_work_with_its_gym(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "gym.py").write_text('__version__ = "0.26.2"')
    (tmp_path / "minerl.py").write_text("raise AttributeError(\"property 'shape' of 'Enum' object has no setter\")")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("gym", "minerl"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(ImportError, match=r"beside gym 0.26.2 .*no setter.*gym==0.17.3.*docs/minerl.md"):
        MineRLEnv()
    for name in ("gym", "minerl"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def test_without_the_simulator_the_error_says_what_to_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    malmo = ModuleType("minerl.env.malmo")
    malmo.__dict__["InstanceManager"] = SimpleNamespace(MINECRAFT_DIR=str(tmp_path))
    for name, module in [
        ("minerl", ModuleType("minerl")),
        ("minerl.env", ModuleType("minerl.env")),
        ("minerl.env.malmo", malmo),
    ]:
        monkeypatch.setitem(sys.modules, name, module)
    libs = tmp_path / "build" / "libs"
    libs.mkdir(parents=True)
    (libs / "something-else.jar").touch()
    with pytest.raises(FileNotFoundError, match=r"not its simulator.*MalmoMod-0.37.0-fat.jar.*docs/minerl.md"):
        find_simulator()
    (libs / "MalmoMod-0.37.0-fat.jar").touch()
    assert find_simulator() == libs / "MalmoMod-0.37.0-fat.jar"


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"frame_skip": 0}, "`frame_skip` must be a whole number of at least 1, got 0"),
        ({"frame_stack": 1.5}, "`frame_stack` must be a whole number of at least 1, got 1.5"),
        ({"retries": -1}, "`retries` must be a whole number of at least 0, got -1"),
        ({"restart_every": 0}, "`restart_every` must be a whole number of at least 1, got 0"),
        ({"launch_timeout": 0}, "`launch_timeout` must be a number of seconds above 0, got 0"),
        ({"reset_timeout": float("inf")}, "`reset_timeout` must be a number of seconds above 0, got inf"),
        ({"step_timeout": float("nan")}, "`step_timeout` must be a number of seconds above 0, got nan"),
        ({"step_timeout": "60"}, "`step_timeout` must be a number of seconds above 0, got '60'"),
        ({"render_mode": "human"}, "Unknown render mode 'human'.*Known: 'rgb_array'"),
    ],
)
def test_bad_input_is_told_before_minerl_is_looked_for(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MineRLEnv(**kwargs)


# --- parts without MineRL -----------------------------------------------------------------------------------------------


class Named(spaces.Discrete):
    """The used part of a MineRL Enum."""

    def __init__(self, *values: str) -> None:
        super().__init__(len(values))
        self.values = np.array(values)


class Keys(spaces.Dict):
    """The used part of a MineRL action space."""

    def no_op(self) -> dict[str, Any]:
        idle = {"camera": np.zeros(2, np.float32)}
        return {key: idle.get(key, "none" if isinstance(space, Named) else 0) for key, space in self.spaces.items()}


def keys(*names: str, **choices: spaces.Space[Any]) -> Keys:
    camera = {"camera": spaces.Box(-180, 180, (2,))} if "camera" in names else {}
    return Keys({**{name: spaces.Discrete(2) for name in names if name != "camera"}, **camera, **choices})


TREECHOP = ["attack", "back", "camera", "forward", "jump", "left", "right", "sneak", "sprint"]


def test_the_table_has_eighteen_actions_and_its_order_stays() -> None:
    """Saved models depend on the indices of actions, so new actions come last."""
    assert [action.name for action in macro_actions(keys(*TREECHOP))] == [
        *("noop", "forward", "forward+jump", "attack", "forward+attack"),
        *("turn left", "turn right", "look up", "look down"),
        *("back", "left", "right", "jump", "forward+sprint", "forward+jump+sprint", "forward+jump+attack"),
        *("attack+turn left", "attack+turn right"),
    ]


def test_only_actions_whose_keys_exist() -> None:
    names = [action.name for action in macro_actions(keys("forward", "camera", craft=Named("none", "planks", "other")))]
    assert names == ["noop", "forward", "turn left", "turn right", "look up", "look down", "craft planks"]
    with pytest.raises(ValueError, match=r"No macro action fits an action space with the keys \['vector'\]"):
        macro_actions(Keys({"vector": spaces.Box(-1, 1, (64,))}))


def test_a_macro_action_in_minerls_form() -> None:
    space = keys(*TREECHOP, place=Named("dirt", "none"))
    table = {action.name: action for action in macro_actions(space)}
    assert len(table) == len(MOVES) + 1
    first = table["attack+turn left"].to_minerl(space)
    assert first.pop("camera").tolist() == [0.0, -10.0]
    assert {key for key, value in first.items() if value == 1} == {"attack"}
    held = table["attack+turn left"].to_minerl(space, first=False)
    assert held.pop("camera").tolist() == [0.0, 0.0]
    assert held == first
    assert table["place dirt"].to_minerl(space)["place"] == "dirt"
    assert table["place dirt"].to_minerl(space, first=False)["place"] == "none"


def observation_space(**parts: Any) -> spaces.Dict:
    return spaces.Dict({"pov": spaces.Box(0, 255, (64, 64, 3), np.uint8), **parts})


def scalar(low: float, high: float) -> spaces.Box:
    return spaces.Box(low, high, ())


NAVIGATE = observation_space(
    compass=spaces.Dict({"angle": scalar(-180, 180)}), inventory=spaces.Dict({"log": scalar(0, 2304), "dirt": scalar(0, 2304)})
)
ITEM = spaces.Dict(
    {"damage": scalar(-1, 1562), "maxDamage": scalar(-1, 1562), "type": Named("air", "iron_axe", "none", "other")}
)
OBTAIN = observation_space(inventory=spaces.Dict({"log": scalar(0, 2304)}), equipped_items=spaces.Dict({"mainhand": ITEM}))
POV = np.arange(64 * 64 * 3).reshape(64, 64, 3).astype(np.uint8)


def test_the_image_alone_is_a_box_and_contiguous() -> None:
    encoder = ObservationEncoder(observation_space())
    frame = encoder.encode({"pov": POV[::-1]})
    assert isinstance(frame, np.ndarray)
    assert frame.flags.c_contiguous
    np.testing.assert_array_equal(frame, POV[::-1])
    assert encoder.space() == spaces.Box(0, 255, (64, 64, 3), np.uint8)
    with pytest.raises(ValueError, match="without 'pov'"):
        ObservationEncoder(spaces.Dict({"vector": spaces.Box(-1, 1, (64,))}))


@given(angle=st.floats(-180, 180), dirt=st.integers(0, 2304), log=st.integers(0, 2304))
def test_the_vector_of_navigate(angle: float, dirt: int, log: int) -> None:
    encoder = ObservationEncoder(NAVIGATE)
    counts = {"dirt": np.array(dirt), "log": np.array(log)}
    frame = encoder.encode({"pov": POV, "compass": {"angle": np.array(angle)}, "inventory": counts})
    assert isinstance(frame, dict)
    assert encoder.vector_names == ["compass sin", "compass cos", "inventory dirt", "inventory log"]
    wanted = [math.sin(math.radians(angle)), math.cos(math.radians(angle)), dirt / 64, log / 64]
    np.testing.assert_allclose(frame["vector"], wanted, atol=1e-6)
    assert encoder.space().contains(frame)


@given(held=st.sampled_from(["air", "iron_axe", "none", "other"]), damage=st.integers(-1, 1562), most=st.integers(-1, 1562))
def test_the_vector_of_obtain(held: str, damage: int, most: int) -> None:
    encoder = ObservationEncoder(OBTAIN)
    item = {"type": held, "damage": np.array(damage), "maxDamage": np.array(most)}
    frame = encoder.encode({"pov": POV, "inventory": {"log": np.array(3)}, "equipped_items": {"mainhand": item}})
    assert isinstance(frame, dict)
    shown = dict(zip(encoder.vector_names, frame["vector"].tolist(), strict=True))
    assert shown.pop("inventory log") == 3 / 64
    assert shown.pop("mainhand worn") == pytest.approx(min(max(damage / most, 0), 1) if most > 0 else 0)
    assert [name for name, value in shown.items() if value == 1] == [f"mainhand {held}"]
    assert encoder.space().contains(frame)


@given(size=st.integers(1, 5), steps=st.integers(0, 8))
def test_a_frame_stack(size: int, steps: int) -> None:
    encoder, stack = ObservationEncoder(NAVIGATE), FrameStack(size)

    def frame(step: int) -> dict[str, np.ndarray]:
        return {"pov": np.full((64, 64, 3), step, np.uint8), "vector": np.full(4, step / 10, np.float32)}

    stack.reset(frame(99))
    stacked = stack.reset(frame(0))
    for step in range(1, steps + 1):
        stacked = stack.push(frame(step))
    assert isinstance(stacked, dict)
    wanted = [max(step, 0) for step in range(steps - size + 1, steps + 1)]
    assert stacked["pov"][0, 0].tolist() == [step for step in wanted for _ in range(3)]
    np.testing.assert_allclose(stacked["vector"], [step / 10 for step in wanted for _ in range(4)], rtol=1e-6)
    assert encoder.space(size).contains(stacked)


def test_a_long_error_is_one_line_with_its_end() -> None:
    assert describe(ValueError("two\n lines")) == "ValueError: two lines"
    line = describe(EOFError("a line of a log\n" * 1000 + "what it was"))
    assert line.endswith("what it was")
    assert len(line) < 330
