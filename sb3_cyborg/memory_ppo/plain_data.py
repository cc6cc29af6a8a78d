"""
Objects as plain data: values that JSON can hold, from which they are built again without running code of a file.

Numbers, text, lists and dictionaries stand for themselves. Every other object is a dictionary of its parts, with its kind
under ``":type:"``: see ``KINDS``. A class is its registered name or its import path.
"""

import base64
import sys
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.utils import ConstantSchedule, FloatSchedule, LinearSchedule
from torch import nn

from sb3_cyborg.memory_ppo.normalization import RunningMoments
from sb3_cyborg.memory_ppo.objective import UpdateScales
from sb3_cyborg.memory_ppo.ranks import Ranks, in_one_process
from sb3_cyborg.memory_ppo.schedules import FlooredSchedule

TYPE = ":type:"
"""Key of the kind of an object."""

CLASS, DICT = "class", "dict"

KNOWN_PACKAGES = ("torch", "stable_baselines3", "sb3_contrib", "gymnasium", "sb3_cyborg")
"""Packages whose modules a file may import."""

BASES: dict[str, type] = {
    "policy_class": BasePolicy,
    "features_extractor_class": BaseFeaturesExtractor,
    "optimizer_class": th.optim.Optimizer,
}
"""Required base of a class, by the key that it is stored under; the base under every other key is ``nn.Module``."""

SCHEDULES = (FloatSchedule, ConstantSchedule, LinearSchedule, FlooredSchedule)


class NotPlainError(TypeError):
    """Raised for an object that has no form as plain data."""


@dataclass(frozen=True)
class Classes:
    """
    Names of classes in a file.

    :param registered: Classes by registered name.
    :param given: Objects by import path, which replace those that the paths lead to.
    :param trust: Whether any module may be imported.
    """

    registered: Mapping[str, type] = field(default_factory=dict)
    given: Mapping[str, Any] = field(default_factory=dict)
    trust: bool = False

    def name_of(self, wanted: type, key: str) -> str:
        """
        :param wanted: A class.
        :param key: The key that it is stored under.
        :return: Its registered name, or its import path.
        :raises NotPlainError: for a class that :meth:`find` would not find or would refuse: one that is nested in a class or a
            function, or that lacks the base of its key.
        """
        for name, known in self.registered.items():
            if known is wanted:
                return name
        module, name = wanted.__module__, wanted.__qualname__
        if not issubclass(wanted, _base(key)):
            raise NotPlainError(f"the class {name} is no subclass of {_base(key).__name__}")
        if _attribute(module, name) is not wanted:
            raise NotPlainError(f"the class {name} is not at the top level of a module")
        return f"{module}.{name}"

    def find(self, name: str, key: str) -> type:
        """
        :param name: A registered name or an import path.
        :param key: The key that the class is stored under.
        :return: The class.
        :raises ValueError: for a module that is not imported and may not be, and for anything but a subclass of the base that
            the key requires.
        """
        found = self.registered[name] if name in self.registered else self._imported(name, key)
        if not (isinstance(found, type) and issubclass(found, _base(key))):
            raise ValueError(f"`{key}` is {name!r}, which is no subclass of {_base(key).__name__}.")
        return found

    def _imported(self, path: str, key: str) -> Any:
        if path in self.given:
            return self.given[path]
        module, _, name = path.rpartition(".")
        may_import = self.trust or module.partition(".")[0] in KNOWN_PACKAGES
        if may_import and module not in sys.modules:
            try:
                import_module(module)
            except ImportError as error:
                raise ValueError(f"`{key}` is {path!r}, but its module cannot be imported: {error}.") from error
        if module not in sys.modules:
            raise ValueError(
                f"`{key}` is {path!r}, whose module is not imported. Import it before, or pass "
                f"`custom_objects={{{path!r}: ...}}`, or `trust=True` (`--trust`) to let the file import it."
            )
        if (found := _attribute(module, name)) is None:
            raise ValueError(
                f"`{key}` is {path!r}, but the module {module!r} has no {name!r}: define it there, or pass "
                f"`custom_objects={{{path!r}: ...}}`."
            )
        return found


def _base(key: str) -> type:
    return BASES.get(key, nn.Module)


def _attribute(module: str, name: str) -> Any:
    """:return: An attribute of an imported module, or ``None``. A module's ``__getattr__``, which may import, is not used."""
    loaded = sys.modules.get(module)
    return vars(loaded).get(name) if isinstance(loaded, ModuleType) else None


# --- kinds of objects -----------------------------------------------------------------------------------------------------


class Kind(NamedTuple):
    """
    A kind of objects.

    :param cls: The class; objects of subclasses are of another kind.
    :param parts: Takes an object apart. The parts are written in the same way as the object.
    :param build: Makes an object from its parts, passed by name.
    """

    cls: type
    parts: Callable[[Any], dict[str, Any]]
    build: Callable[..., Any]


def _array_parts(array: np.ndarray) -> dict[str, Any]:
    if array.dtype.kind not in "biufc":
        raise NotPlainError(f"an array of {array.dtype}")
    content = base64.b64encode(array.tobytes()).decode()
    return {"dtype": array.dtype.str, "shape": list(array.shape), "base64": content}


def _build_array(dtype: str, shape: list[int], base64: str) -> np.ndarray:
    of = np.dtype(dtype)
    if of.kind not in "biufc":
        raise ValueError(f"An array of {of} is not plain.")
    return np.ndarray(shape, of, buffer=_decoded(base64)).copy()


def _decoded(text: str) -> bytes:
    return base64.b64decode(text, validate=True)


def _tensor_parts(tensor: th.Tensor) -> dict[str, Any]:
    if tensor.requires_grad or tensor.device.type != "cpu" or tensor.layout is not th.strided:
        raise NotPlainError("a tensor with a gradient, on another device, or sparse")
    try:
        return {"array": tensor.numpy()}
    except TypeError:
        raise NotPlainError(f"a tensor of {tensor.dtype}") from None


def _box_parts(space: spaces.Box) -> dict[str, Any]:
    # Integers have no infinity, so the bounds alone do not say which of them are infinite.
    return {
        "low": space.low,
        "high": space.high,
        "bounded_below": space.bounded_below,
        "bounded_above": space.bounded_above,
    }


def _build_box(low: np.ndarray, high: np.ndarray, bounded_below: np.ndarray, bounded_above: np.ndarray) -> spaces.Box:
    space = spaces.Box(low, high, low.shape, low.dtype.type)
    space.bounded_below, space.bounded_above = bounded_below, bounded_above
    return space


def _counts_parts(space: Any) -> dict[str, Any]:
    """:return: Parts of ``Discrete`` and ``MultiDiscrete``; old versions of gymnasium know neither ``dtype`` nor ``start``."""
    parts: dict[str, Any] = {"n": int(space.n)} if isinstance(space, spaces.Discrete) else {"nvec": space.nvec}
    start = np.asarray(getattr(space, "start", 0))
    if start.any():
        parts["start"] = int(start) if isinstance(space, spaces.Discrete) else start
    if space.dtype != np.int64:
        parts["dtype"] = str(space.dtype)
    return parts


def _scales_parts(scales: UpdateScales) -> dict[str, Any]:
    # The model sets that of its ranks.
    if scales.reduce is not in_one_process and getattr(scales.reduce, "__func__", None) is not Ranks.sum:
        raise NotPlainError("an UpdateScales with a `reduce` of its own")
    return {"advantages": scales.advantages, "returns": scales.returns, "lr_scale": scales.lr_scale}


def _build_scales(advantages: RunningMoments, returns: RunningMoments, lr_scale: float) -> UpdateScales:
    scales = UpdateScales()
    scales.advantages, scales.returns = _instance(advantages, RunningMoments), _instance(returns, RunningMoments)
    scales.lr_scale = _number(lr_scale)
    return scales


def _build_statistics(mean: np.ndarray, var: np.ndarray, count: float) -> RunningMeanStd:
    statistics = RunningMeanStd()
    arrays = (np.ndarray, np.generic)  # those of returns are 0-d
    statistics.mean, statistics.var = _instance(mean, arrays), _instance(var, arrays)
    statistics.count = _number(count)
    return statistics


def _instance(value: Any, kinds: type | tuple[type, ...]) -> Any:
    if not isinstance(value, kinds):
        raise TypeError(f"{value!r} is not of the type that its place requires")
    return value


def _number(value: Any) -> Any:
    return _instance(value, (int, float, np.number))


def _attributes(*names: str) -> Callable[[Any], dict[str, Any]]:
    """:return: A function that takes an object apart into these attributes."""
    return lambda value: {name: getattr(value, name) for name in names}


KINDS: dict[str, Kind] = {
    "tuple": Kind(tuple, lambda value: {"items": list(value)}, lambda items: tuple(_instance(items, list))),
    "deque": Kind(
        deque,
        lambda value: {"items": list(value), "maxlen": value.maxlen},
        lambda items, maxlen: deque(_instance(items, list), maxlen),
    ),
    "path": Kind(type(Path()), lambda value: {"path": str(value)}, lambda path: Path(path)),
    "array": Kind(np.ndarray, _array_parts, _build_array),
    "number": Kind(
        np.generic, lambda value: {"array": np.asarray(value)}, lambda array: _instance(array, np.ndarray).reshape(())[()]
    ),
    "tensor": Kind(th.Tensor, _tensor_parts, lambda array: th.from_numpy(array)),
    "Box": Kind(spaces.Box, _box_parts, _build_box),
    "Discrete": Kind(spaces.Discrete, _counts_parts, lambda n, **options: spaces.Discrete(n, **options)),
    "MultiDiscrete": Kind(spaces.MultiDiscrete, _counts_parts, lambda nvec, **options: spaces.MultiDiscrete(nvec, **options)),
    "MultiBinary": Kind(spaces.MultiBinary, _attributes("n"), lambda n: spaces.MultiBinary(n)),
    "Dict": Kind(
        spaces.Dict,
        lambda value: {"entries": list(value.spaces.items())},
        lambda entries: spaces.Dict(entries),  # a list keeps the order
    ),
    "ConstantSchedule": Kind(ConstantSchedule, _attributes("val"), lambda val: ConstantSchedule(_number(val))),
    "LinearSchedule": Kind(
        LinearSchedule,
        _attributes("start", "end", "end_fraction"),
        lambda start, end, end_fraction: LinearSchedule(_number(start), _number(end), _number(end_fraction)),
    ),
    "FlooredSchedule": Kind(
        FlooredSchedule,
        _attributes("schedule", "least_progress"),
        lambda schedule, least_progress: FlooredSchedule(_instance(schedule, SCHEDULES), _number(least_progress)),
    ),
    "FloatSchedule": Kind(
        FloatSchedule,
        _attributes("value_schedule"),
        lambda value_schedule: FloatSchedule(_instance(value_schedule, SCHEDULES)),
    ),
    "RunningMoments": Kind(
        RunningMoments,
        _attributes("horizon", "count", "mean", "square"),
        lambda **parts: RunningMoments(**{name: _number(part) for name, part in parts.items()}),
    ),
    "UpdateScales": Kind(UpdateScales, _scales_parts, _build_scales),
    "RunningMeanStd": Kind(RunningMeanStd, _attributes("mean", "var", "count"), _build_statistics),
}
"""All kinds of objects by name."""

NAMES = {kind.cls: name for name, kind in KINDS.items()}


# --- writing and reading --------------------------------------------------------------------------------------------------


def to_plain(value: Any, classes: Classes, key: str = "") -> Any:
    """
    :param value: An object.
    :param classes: Names of classes.
    :param key: The key that it is stored under, which decides what base a class must have.
    :return: Its form as plain data.
    :raises NotPlainError: if it has none, e.g. a function.
    """
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, (bool, int, float)) and not isinstance(value, np.generic):
        return value
    if isinstance(value, list):
        return [to_plain(item, classes, key) for item in value]
    if isinstance(value, dict):
        if all(isinstance(name, str) and not name.startswith(":") for name in value):
            return {name: to_plain(item, classes, name) for name, item in value.items()}
        return {TYPE: DICT, "items": [[to_plain(part, classes, key) for part in item] for item in value.items()]}
    if isinstance(value, type):
        return {TYPE: CLASS, "name": classes.name_of(value, key)}
    name = _kind_of(value)
    return {TYPE: name} | {part: to_plain(item, classes, key) for part, item in KINDS[name].parts(value).items()}


def _kind_of(value: Any) -> str:
    if isinstance(value, tuple):
        return "tuple"
    if isinstance(value, np.generic):
        return "number"
    if type(value) not in NAMES:
        raise NotPlainError(f"an object of type {type(value).__name__}")
    return NAMES[type(value)]


def from_plain(plain: Any, classes: Classes, key: str = "") -> Any:
    """
    :param plain: Plain data.
    :param classes: Names of classes.
    :param key: The key that it is stored under.
    :return: The object.
    :raises ValueError: for a kind that is unknown, and for a class that may not be used: see :meth:`Classes.find`.
    :raises TypeError: for parts that are missing or of a wrong type.
    """
    if isinstance(plain, list):
        return [from_plain(item, classes, key) for item in plain]
    if not isinstance(plain, dict):
        return plain
    if TYPE not in plain:
        return {name: from_plain(item, classes, name) for name, item in plain.items()}
    parts, name = dict(plain), plain[TYPE]
    del parts[TYPE]
    if name == CLASS:
        return classes.find(_instance(parts["name"], str), key)
    built = {part: from_plain(item, classes, key) for part, item in parts.items()}
    if name == DICT:
        return dict(built["items"])
    if name not in KINDS:
        raise ValueError(f"`{key}` holds an object of the unknown kind {name!r}; was it written by a newer version?")
    return KINDS[name].build(**built)
