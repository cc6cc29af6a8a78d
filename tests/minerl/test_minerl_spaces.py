"""Tier one: the real spaces of MineRL 0.4.4, and spaces in the form of MineRL 1.0."""

from typing import Any

import numpy as np
import pytest
from minerl.herobraine import envs
from minerl.herobraine.hero import spaces as hero
from stable_baselines3.common.preprocessing import is_image_space, is_image_space_channels_first

from sb3_cyborg.envs.minerl.actions import MOVES, enum_values, macro_actions
from sb3_cyborg.envs.minerl.observations import ObservationEncoder
from sb3_cyborg.envs.registration import FAMILIES

MOVE_NAMES = [move.name for move in MOVES]
OBTAIN = [
    *(f"craft {item}" for item in ("crafting_table", "planks", "stick", "torch")),
    *(
        f"equip {item}"
        for item in ("air", "iron_axe", "iron_pickaxe", "stone_axe", "stone_pickaxe", "wooden_axe", "wooden_pickaxe")
    ),
    *(f"nearbyCraft {item}" for item in ("furnace", "iron_axe", "iron_pickaxe", "stone_axe", "stone_pickaxe")),
    *(f"nearbyCraft {item}" for item in ("wooden_axe", "wooden_pickaxe")),
    *(f"nearbySmelt {item}" for item in ("coal", "iron_ingot")),
    *(f"place {item}" for item in ("cobblestone", "crafting_table", "dirt", "furnace", "stone", "torch")),
]


def extra_actions(name: str) -> list[str]:
    if "Treechop" in name:
        return []
    return ["place dirt"] if "Navigate" in name else OBTAIN


def test_every_id_stands_for_a_task_of_minerl() -> None:
    assert {kwargs["env_id"] for kwargs in FAMILIES["MineRL"].kwargs.values()} <= {spec.name for spec in envs.BASIC_ENV_SPECS}


@pytest.mark.parametrize("spec", envs.BASIC_ENV_SPECS, ids=lambda spec: spec.name)
def test_actions(spec: Any) -> None:
    table = macro_actions(spec.action_space)
    print(spec.name, len(table), [action.name for action in table][len(MOVES) :])
    assert [action.name for action in table] == MOVE_NAMES + extra_actions(spec.name)
    for action in table:
        for first in (True, False):
            command = action.to_minerl(spec.action_space, first)
            assert command.keys() == spec.action_space.spaces.keys()
            for key, space in spec.action_space.spaces.items():
                assert command[key] in space
                # MineRL sends values unchecked: a number instead of a name is a TypeError, which it reports as a time-out.
                assert isinstance(command[key], str) == (enum_values(space) is not None)
            idle = spec.action_space.no_op()
            changed = {key for key in command if not np.array_equal(command[key], idle[key])}
            turned = {"camera"} if action.camera else set()
            assert changed == {*action.keys, *(turned | action.choices.keys() if first else ())}


@pytest.mark.parametrize("frame_stack", [1, 4])
@pytest.mark.parametrize("spec", envs.BASIC_ENV_SPECS, ids=lambda spec: spec.name)
def test_observations(spec: Any, frame_stack: int) -> None:
    encoder = ObservationEncoder(spec.observation_space)
    space: Any = encoder.space(frame_stack)
    pov = space["pov"] if "Treechop" not in spec.name else space
    assert pov.shape == (64, 64, 3 * frame_stack)
    assert is_image_space(pov)
    assert not is_image_space_channels_first(pov)
    if "Treechop" not in spec.name:
        entries = 3 if "Navigate" in spec.name else 18 + 9 + 1
        assert len(encoder.vector_names) == entries
        assert space["vector"].shape == (entries * frame_stack,)
    spec.observation_space.seed(0)
    for _ in range(20):
        frame = encoder.encode(spec.observation_space.sample())
        assert encoder.space().contains(frame)


def test_a_basalt_task_works_alike() -> None:
    spec = envs.MINERL_BASALT_FIND_CAVES_ENV_SPEC
    names = [action.name for action in macro_actions(spec.action_space)]
    assert names[: len(MOVES) + 1] == [*MOVE_NAMES, "use"]
    assert "equip water_bucket" in names
    assert not any(name.endswith(("none", "other")) for name in names)
    encoder = ObservationEncoder(spec.observation_space)
    assert encoder.space().contains(encoder.encode(spec.observation_space.sample()))


def test_the_shape_of_1_0() -> None:
    """BASALT of MineRL 1.0: 24 keys and a larger image. Built from 0.4.4's classes, because 1.0 is on no package index."""
    keys = ["attack", "back", "forward", "jump", "left", "right", "sneak", "sprint", "use"]
    keys += ["ESC", "drop", "inventory", "pickItem", "swapHands", *(f"hotbar.{number}" for number in range(1, 10))]
    actions = {key: hero.Discrete(2) for key in keys}
    action_space = hero.Dict({**actions, "camera": hero.Box(-180, 180, (2,), dtype=np.float32)})
    assert len(action_space.spaces) == 24
    table = macro_actions(action_space)
    assert [action.name for action in table] == [*MOVE_NAMES, "use"]
    assert table[-1].to_minerl(action_space)["use"] == 1
    encoder = ObservationEncoder(hero.Dict({"pov": hero.Box(0, 255, (360, 640, 3), dtype=np.uint8)}))
    assert encoder.space().shape == (360, 640, 3)


def test_an_obfuscated_task_is_refused() -> None:
    with pytest.raises(ValueError, match=r"No macro action fits.*'vector'"):
        macro_actions(envs.MINERL_TREECHOP_OBF_V0.action_space)
