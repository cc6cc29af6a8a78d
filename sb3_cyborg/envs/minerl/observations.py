"""MineRL's observations as an image, or as an image and a vector."""

import math
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from gymnasium import spaces

from sb3_cyborg.envs.minerl.actions import enum_values

STACK_SIZE = 64.0  # items of a full inventory slot

Observation = np.ndarray | dict[str, np.ndarray]


def _compass(angle: Any) -> list[float]:
    radians = math.radians(float(angle))
    return [math.sin(radians), math.cos(radians)]


def _mainhand(values: list[str]) -> Callable[[Any], list[float]]:
    def encode(item: Any) -> list[float]:
        damage, most = float(item["damage"]), float(item["maxDamage"])
        worn = min(max(damage / most, 0.0), 1.0) if most > 0 else 0.0  # items that do not wear have a maximum of 0
        return [*(float(str(item["type"]) == value) for value in values), worn]

    return encode


class ObservationEncoder:
    """
    Converts observations of MineRL to spaces that SB3 supports.

    ``pov`` alone becomes a ``Box`` (height, width, 3) of uint8. With further keys the observation is a ``Dict`` of ``pov`` and
    ``vector`` (float32): sine and cosine of the compass angle; the inventory's counts divided by 64; the item in the main hand
    as one-hot; and the wear of that item, from 0 (new) to 1 (broken). Other keys are left out.

    :param observation_space: MineRL's ``Dict``.
    """

    def __init__(self, observation_space: Any) -> None:
        known = observation_space.spaces
        if "pov" not in known:
            raise ValueError(f"An observation space without 'pov' is not MineRL's; its keys: {sorted(known)}.")
        self.vector_names: list[str] = []
        self._parts: list[tuple[tuple[str, ...], Callable[[Any], list[float]]]] = []
        high: list[float] = []
        if "compass" in known and "angle" in known["compass"].spaces:
            self._parts.append((("compass", "angle"), _compass))
            self.vector_names += ["compass sin", "compass cos"]
            high += [1.0, 1.0]
        for item, space in sorted(known["inventory"].spaces.items()) if "inventory" in known else []:
            self._parts.append((("inventory", item), lambda count: [float(count) / STACK_SIZE]))
            self.vector_names.append(f"inventory {item}")
            high.append(float(space.high) / STACK_SIZE)
        if "equipped_items" in known and "mainhand" in known["equipped_items"].spaces:
            values = enum_values(known["equipped_items"].spaces["mainhand"].spaces["type"]) or []
            self._parts.append((("equipped_items", "mainhand"), _mainhand(values)))
            self.vector_names += [*(f"mainhand {value}" for value in values), "mainhand worn"]
            high += [1.0] * (len(values) + 1)
        self._pov = spaces.Box(0, 255, tuple(known["pov"].shape), np.uint8)
        low = [-1.0 if name.startswith("compass") else 0.0 for name in self.vector_names]
        self._vector = spaces.Box(np.array(low, np.float32), np.array(high, np.float32)) if high else None

    def space(self, frame_stack: int = 1) -> spaces.Space[Any]:
        """
        :param frame_stack: Frames in an observation, the newest last.
        :return: The observation space. Images are stacked along the channels, vectors are concatenated.
        """
        pov = spaces.Box(0, 255, (*self._pov.shape[:2], self._pov.shape[2] * frame_stack), np.uint8)
        if self._vector is None:
            return pov
        low, high = (np.tile(bound, frame_stack) for bound in (self._vector.low, self._vector.high))
        return spaces.Dict({"pov": pov, "vector": spaces.Box(low, high)})

    def encode(self, observation: Mapping[str, Any]) -> Observation:
        """
        :param observation: An observation of MineRL; its ``pov`` has negative strides.
        :return: One frame.
        """
        pov = np.ascontiguousarray(observation["pov"], dtype=np.uint8)
        if self._vector is None:
            return pov
        numbers: list[float] = []
        for path, encode in self._parts:
            value: Any = observation
            for key in path:
                value = value[key]
            numbers += encode(value)
        return {"pov": pov, "vector": np.array(numbers, np.float32)}


class FrameStack:
    """
    The latest frames as one observation, the newest last.

    :param size: Number of frames, at least 1.
    """

    def __init__(self, size: int) -> None:
        self._frames: deque[Observation] = deque(maxlen=size)
        self._size = size

    def reset(self, frame: Observation) -> Observation:
        """:return: The first observation of an episode: its first frame, repeated ``size`` times."""
        self._frames.extend([frame] * self._size)
        return self.observation()

    def push(self, frame: Observation) -> Observation:
        """:return: The observation after this frame was added."""
        self._frames.append(frame)
        return self.observation()

    def observation(self) -> Observation:
        """:return: The stacked frames, in new arrays."""
        first = self._frames[0]
        if isinstance(first, dict):
            return {key: np.concatenate([frame[key] for frame in self._frames], axis=-1) for key in first}
        return np.concatenate(list(self._frames), axis=-1)
