"""Macro actions: a ``Discrete`` space over MineRL's dictionary of keys, camera and choices."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

CAMERA_DEGREES = 10.0


@dataclass(frozen=True)
class MacroAction:
    """
    What one number of the ``Discrete`` action space stands for.

    :param name: What it is called in the docs and in ``MineRLEnv.action_names``.
    :param keys: Keys that are held down, for every tick of a frame skip.
    :param camera: Turn in degrees, (pitch, yaw): positive is down, and right. On the first tick of a frame skip only, so that
        the turn is the same for every ``frame_skip``.
    :param choices: Values of MineRL's Enum actions (``craft``, ``place``...), on the first tick only: one action crafts once.
    """

    name: str
    keys: tuple[str, ...] = ()
    camera: tuple[float, float] | None = None
    choices: Mapping[str, str] = field(default_factory=dict)

    def exists_in(self, action_space: Any) -> bool:
        """:return: Whether MineRL's action space has every key that this needs."""
        needs = {*self.keys, *self.choices, *(("camera",) if self.camera else ())}
        return needs <= set(action_space.spaces)

    def to_minerl(self, action_space: Any, first: bool = True) -> dict[str, Any]:
        """
        :param action_space: MineRL's action space, whose ``no_op()`` is what everything else stays at.
        :param first: Whether this is the first tick of a frame skip.
        :return: The action in MineRL's form; choices stay strings.
        """
        action = dict(action_space.no_op())
        action.update(dict.fromkeys(self.keys, 1))
        if first and self.camera:
            action["camera"] = np.array(self.camera, dtype=np.float32)
        if first:
            action.update(self.choices)
        return action


def enum_values(space: Any) -> list[str] | None:
    """:return: The values of one of MineRL's Enum spaces in their order, None for any other space."""
    values = getattr(space, "values", None)
    return None if values is None or callable(values) else [str(value) for value in values]


# What Treechop, Navigate and Obtain have in common, in this order: numbers are part of what a saved model knows.
MOVES = (
    MacroAction("noop"),
    MacroAction("forward", ("forward",)),
    MacroAction("forward+jump", ("forward", "jump")),
    MacroAction("attack", ("attack",)),
    MacroAction("forward+attack", ("forward", "attack")),
    MacroAction("turn left", camera=(0.0, -CAMERA_DEGREES)),
    MacroAction("turn right", camera=(0.0, CAMERA_DEGREES)),
    MacroAction("look up", camera=(-CAMERA_DEGREES, 0.0)),
    MacroAction("look down", camera=(CAMERA_DEGREES, 0.0)),
    MacroAction("back", ("back",)),
    MacroAction("left", ("left",)),
    MacroAction("right", ("right",)),
    MacroAction("jump", ("jump",)),
    MacroAction("forward+sprint", ("forward", "sprint")),
    MacroAction("forward+jump+sprint", ("forward", "jump", "sprint")),
    MacroAction("forward+jump+attack", ("forward", "jump", "attack")),
    MacroAction("attack+turn left", ("attack",), (0.0, -CAMERA_DEGREES)),
    MacroAction("attack+turn right", ("attack",), (0.0, CAMERA_DEGREES)),
)


def macro_actions(action_space: Any) -> tuple[MacroAction, ...]:
    """
    Build the table of actions from whichever keys MineRL's action space has.

    :param action_space: MineRL's ``Dict`` of ``Discrete(2)`` keys, a ``camera`` and Enums.
    :return: The moves that the space allows, then the key ``use`` where there is one, then one action for each value of each
        Enum but its default and ``other``, keys and values in alphabetical order.
    :raises ValueError: for a space in which nothing can be done, such as that of MineRL's obfuscated tasks.
    """
    table = [move for move in (*MOVES, MacroAction("use", ("use",))) if move.exists_in(action_space)]
    for key, space in sorted(action_space.spaces.items()):
        values = enum_values(space)
        if values is not None:
            idle = {action_space.no_op()[key], "other"}  # "other" stands for what has no name, and cannot be asked for
            table += [MacroAction(f"{key} {value}", choices={key: value}) for value in sorted(set(values) - idle)]
    if len(table) < 2:
        raise ValueError(
            f"No macro action fits an action space with the keys {sorted(action_space.spaces)}: it takes keys such as "
            "'forward', 'attack' and 'camera'. MineRL's obfuscated tasks (...VectorObf-v0) have none of them."
        )
    return tuple(table)
