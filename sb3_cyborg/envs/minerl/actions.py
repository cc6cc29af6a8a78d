"""Macro actions: a ``Discrete`` space over MineRL's dictionary of keys, camera and choices."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

CAMERA_DEGREES = 10.0


@dataclass(frozen=True)
class MacroAction:
    """
    One action of the ``Discrete`` action space.

    :param name: Name in the documentation and in ``MineRLEnv.action_names``.
    :param keys: Keys that are held down in every tick of a frame skip.
    :param camera: Turn in degrees, (pitch, yaw); positive is down and right. It acts in the first tick of a frame skip only,
        so that the turn does not depend on ``frame_skip``.
    :param choices: Values of MineRL's Enum actions (``craft``, ``place``...). They act in the first tick only, so that one
        action crafts once.
    """

    name: str
    keys: tuple[str, ...] = ()
    camera: tuple[float, float] | None = None
    choices: Mapping[str, str] = field(default_factory=dict)

    def exists_in(self, action_space: Any) -> bool:
        """:return: Whether MineRL's action space has every key of this action."""
        needs = {*self.keys, *self.choices, *(("camera",) if self.camera else ())}
        return needs <= set(action_space.spaces)

    def to_minerl(self, action_space: Any, first: bool = True) -> dict[str, Any]:
        """
        :param action_space: MineRL's action space. All other keys keep the values of its ``no_op()``.
        :param first: Whether this is the first tick of a frame skip.
        :return: The action in MineRL's form, with choices as strings.
        """
        action = dict(action_space.no_op())
        action.update(dict.fromkeys(self.keys, 1))
        if first and self.camera:
            action["camera"] = np.array(self.camera, dtype=np.float32)
        if first:
            action.update(self.choices)
        return action


def enum_values(space: Any) -> list[str] | None:
    """:return: The values of one of MineRL's Enum spaces in their order; ``None`` for any other space."""
    values = getattr(space, "values", None)
    return None if values is None or callable(values) else [str(value) for value in values]


# The actions that Treechop, Navigate and Obtain share. The order must not change: saved models depend on the indices.
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
    Builds the table of actions from the keys of MineRL's action space.

    :param action_space: MineRL's ``Dict`` of ``Discrete(2)`` keys, a ``camera`` and Enums.
    :return: The moves that the space allows; then ``use`` if the space has this key; then one action for each value of each
        Enum except its default and ``other``, with keys and values in alphabetical order.
    :raises ValueError: for a space without these keys, such as that of MineRL's obfuscated tasks.
    """
    table = [move for move in (*MOVES, MacroAction("use", ("use",))) if move.exists_in(action_space)]
    for key, space in sorted(action_space.spaces.items()):
        values = enum_values(space)
        if values is not None:
            idle = {action_space.no_op()[key], "other"}  # "other" covers unnamed items and is not accepted as an action
            table += [MacroAction(f"{key} {value}", choices={key: value}) for value in sorted(set(values) - idle)]
    if len(table) < 2:
        raise ValueError(
            f"No macro action fits an action space with the keys {sorted(action_space.spaces)}: it takes keys such as "
            "'forward', 'attack' and 'camera'. MineRL's obfuscated tasks (...VectorObf-v0) have none of them."
        )
    return tuple(table)
