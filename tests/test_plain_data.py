"""Objects as plain data: what is written is what is read, and names lead to nothing but classes that their place allows."""

import json
import subprocess
import sys
from collections import deque
from pathlib import Path
from types import MethodType, ModuleType
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_np
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.torch_layers import NatureCNN
from stable_baselines3.common.utils import ConstantSchedule, FloatSchedule, LinearSchedule
from torch import nn

from sb3_cyborg.memory_ppo.model_file import from_entries, to_entries
from sb3_cyborg.memory_ppo.normalization import RunningMoments
from sb3_cyborg.memory_ppo.objective import UpdateScales
from sb3_cyborg.memory_ppo.plain_data import KINDS, TYPE, Classes, NotPlainError, from_plain, to_plain
from sb3_cyborg.memory_ppo.schedules import FlooredSchedule, as_schedule, learning_rate_schedule


def there_and_back(value: Any, key: str = "key") -> Any:
    """:return: The object that is read from the JSON that an object was written as."""
    return from_plain(json.loads(json.dumps(to_plain(value, Classes(), key))), Classes(), key)


def equal(first: Any, second: Any) -> bool:
    """:return: Whether two objects are equal, of the same types, NaN included."""
    if isinstance(first, dict) and isinstance(second, dict):
        first, second = dict(first), dict(second)  # an OrderedDict becomes a dict
    if type(first) is not type(second):
        return False
    if isinstance(first, dict):
        return list(first) == list(second) and all(equal(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple, deque)):
        maxlen = getattr(first, "maxlen", None) == getattr(second, "maxlen", None)
        return maxlen and len(first) == len(second) and all(map(equal, first, second))
    if isinstance(first, (np.ndarray, np.generic)):
        return bool(first.dtype == second.dtype) and np.array_equal(first, second, equal_nan=first.dtype.kind in "fc")
    if isinstance(first, th.Tensor):
        return first.dtype == second.dtype and equal(first.numpy(), second.numpy())
    if isinstance(first, MethodType):
        return first.__func__ is second.__func__ and equal(first.__self__, second.__self__)
    if isinstance(first, spaces.Dict):
        return equal(first.spaces, second.spaces)
    if isinstance(first, spaces.Space) or type(first).__module__.startswith(("sb3_cyborg", "stable_baselines3")):
        ours, theirs = dict(vars(first)), dict(vars(second))
        for state in (ours, theirs):  # the generator of random samples, and texts that are made when they are asked for
            for name in ("_np_random", "low_repr", "high_repr"):
                state.pop(name, None)
        return equal(ours, theirs)
    if isinstance(first, float) and first != first:
        return bool(second != second)
    return bool(first == second)


NUMBERS = st.one_of(st.integers(-(2**70), 2**70), st.floats(), st.booleans())
DTYPES = st.sampled_from([np.float32, np.float64, np.int8, np.uint8, np.int64, np.bool_, np.complex64])
ARRAYS = DTYPES.flatmap(lambda dtype: st_np.arrays(dtype, st_np.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3)))
KEYS = st.one_of(st.text(max_size=5), st.integers(), st.sampled_from([":type:", ":serialized:", "class"]))
LEAVES = st.one_of(
    st.none(),
    NUMBERS,
    st.text(max_size=5),
    ARRAYS,
    ARRAYS.map(lambda array: array.ravel()[0] if array.size else np.float32(0.5)),
    st.sampled_from([nn.ReLU, nn.Linear, NatureCNN, Path("a/b"), th.arange(3), th.zeros(0)]),
)
OBJECTS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.lists(inner, max_size=3).map(lambda items: deque(items, maxlen=5)),
        st.dictionaries(KEYS, inner, max_size=3),
    ),
    max_leaves=8,
)


@given(OBJECTS)
def test_objects(value: Any) -> None:
    assert equal(there_and_back(value), value)


@st.composite
def boxes(draw: st.DrawFn) -> spaces.Box:
    dtype: Any = draw(st.sampled_from([np.float32, np.float64, np.uint8, np.int16]))
    shape = draw(st_np.array_shapes(min_dims=0, max_dims=3, max_side=3))
    low = draw(st_np.arrays(dtype, shape, elements={"min_value": 0, "max_value": 5}))
    high = low + draw(st_np.arrays(dtype, shape, elements={"min_value": 0, "max_value": 5}))
    if np.dtype(dtype).kind in "fi" and draw(st.booleans()):
        return spaces.Box(-np.inf, high.max(initial=0), shape, dtype)
    return spaces.Box(low, high, dtype=dtype)


SIMPLE_SPACES = st.one_of(
    boxes(),
    st.builds(lambda n, start: spaces.Discrete(n, start=start), st.integers(1, 100), st.integers(-5, 5)),
    st.lists(st.integers(1, 9), min_size=1, max_size=4).map(spaces.MultiDiscrete),
    st.just(spaces.MultiDiscrete(np.array([[2, 3], [4, 5]]), dtype=np.int32)),
    st.one_of(st.integers(1, 9), st.lists(st.integers(1, 3), min_size=1, max_size=3)).map(spaces.MultiBinary),
)
SPACES = st.one_of(
    SIMPLE_SPACES, st.lists(st.tuples(st.text(min_size=1), SIMPLE_SPACES), unique_by=lambda item: item[0]).map(spaces.Dict)
)


@given(SPACES)
def test_spaces(space: spaces.Space[Any]) -> None:
    read = there_and_back(space)
    assert equal(read, space)
    assert read == space
    assert space.contains(read.sample())


POSITIVE = st.floats(0, 1e3, exclude_min=True)
SCHEDULES = st.one_of(
    st.builds(as_schedule, POSITIVE),
    st.builds(lambda start, end: as_schedule(f"lin_{start}_{end}"), POSITIVE, POSITIVE),
    st.builds(ConstantSchedule, POSITIVE),
    st.builds(LinearSchedule, POSITIVE, POSITIVE, st.floats(0.01, 1)),
    st.booleans().map(lambda continued: learning_rate_schedule("auto", continued)),
    st.builds(FlooredSchedule, st.builds(FloatSchedule, POSITIVE), st.floats(0, 1)),
)


@given(SCHEDULES, st.floats(0, 1))
def test_schedules(schedule: Any, progress: float) -> None:
    read = there_and_back(schedule)
    assert equal(read, schedule)
    assert read(progress) == schedule(progress)


@given(st.floats(), st.floats(), st.integers(0, 128))
def test_scales(mean: float, square: float, count: int) -> None:
    scales = UpdateScales()
    scales.returns = RunningMoments(32, count, mean, square)
    scales.lr_scale = 0.25
    assert equal(there_and_back(scales), scales)


def test_statistics() -> None:
    statistics = RunningMeanStd(shape=(2,))
    statistics.update(np.random.default_rng(0).normal(size=(5, 2)))
    assert equal(there_and_back(statistics), statistics)


@pytest.mark.parametrize(
    ("key", "cls"),
    [("activation_fn", nn.GELU), ("optimizer_class", th.optim.RMSprop), ("features_extractor_class", NatureCNN)],
)
def test_classes(key: str, cls: type) -> None:
    assert there_and_back({key: cls})[key] is cls


class AtTop(nn.ReLU):
    """A class at the top level of a module that no package of ours has."""

    class Nested(nn.ReLU):
        """A class that has no import path of its own."""


def test_classes_of_modules_that_are_imported() -> None:
    assert there_and_back({"activation_fn": AtTop}) == {"activation_fn": AtTop}


@pytest.mark.parametrize(
    "value",
    [
        lambda progress: progress,
        AtTop.Nested,
        dict,  # no module of PyTorch
        object(),
        {1, 2},
        np.array([object()]),
        th.ones(2, dtype=th.bfloat16),
        th.ones(2, requires_grad=True),
        FloatSchedule(lambda _: 0.1),
        spaces.Text(5),
        spaces.Dict({"text": spaces.Text(5)}),
        UpdateScales(lambda sums: sums),
    ],
    ids=lambda value: type(value).__name__,  # the same in each process of pytest-xdist, as addresses are not
)
def test_objects_without_a_plain_form(value: Any) -> None:
    with pytest.raises(NotPlainError):
        to_plain({"policy_kwargs": [value]}, Classes())


def test_a_class_must_have_the_base_of_its_key() -> None:
    with pytest.raises(NotPlainError, match=r"ReLU is no subclass of Optimizer"):
        to_plain({"optimizer_class": nn.ReLU}, Classes())


@pytest.mark.parametrize("key", ["activation_fn", "optimizer_class", "features_extractor_class", "policy_class", "anything"])
@pytest.mark.parametrize(
    "name",
    [
        "os.system",
        "subprocess.Popen",
        "builtins.eval",
        "torch.load",
        "torch.nn.functional.relu",
        "sb3_cyborg.memory_ppo.plain_data.import_module",
    ],
)
@pytest.mark.parametrize("trust", [False, True])
def test_names_lead_to_no_other_callable(key: str, name: str, trust: bool) -> None:
    assert isinstance(sys.modules["subprocess"], ModuleType)
    with pytest.raises(ValueError, match=rf"`{key}` is '{name}', which is no subclass of \w+\.$"):
        from_plain({key: {TYPE: "class", "name": name}}, Classes(trust=trust))


def test_a_class_of_another_base_is_refused() -> None:
    for name in ("torch.nn.modules.activation.ReLU", "collections.OrderedDict"):
        with pytest.raises(ValueError, match="which is no subclass of Optimizer"):
            from_plain({"optimizer_class": {TYPE: "class", "name": name}}, Classes(trust=True))


def test_modules_of_other_packages_are_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a_stranger.py").write_text("from torch import nn\n\nclass Net(nn.ReLU):\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    plain = {"activation_fn": {TYPE: "class", "name": "a_stranger.Net"}}
    with pytest.raises(ValueError, match=r"'a_stranger.Net', whose module is not imported.*custom_objects.*trust=True"):
        from_plain(plain, Classes())
    assert "a_stranger" not in sys.modules
    assert from_plain(plain, Classes(given={"a_stranger.Net": AtTop})) == {"activation_fn": AtTop}
    assert from_plain(plain, Classes(trust=True))["activation_fn"].__name__ == "Net"
    assert from_plain(plain, Classes())["activation_fn"].__name__ == "Net", "imported by now"
    sys.modules.pop("a_stranger")


def test_what_replaces_a_class_needs_its_base() -> None:
    with pytest.raises(ValueError, match="no subclass of Module"):
        from_plain({"activation_fn": {TYPE: "class", "name": "a.Net"}}, Classes(given={"a.Net": subprocess.Popen}))


def test_modules_that_lack_the_class() -> None:
    for name in ("__main__.Net", "torch.nn.Rleu", "torch.no_such_module.Net", "torch.nn.Module.register_buffer"):
        with pytest.raises(ValueError, match=r"has no|cannot be imported"):
            from_plain({"activation_fn": {TYPE: "class", "name": name}}, Classes())


VALUES: list[Any] = [
    None,
    1,
    -1,
    2**70,
    float("inf"),
    "x",
    "f4",
    "O",
    "(",
    [1],
    [-1],
    [2**70],
    {},
    [[1, 2]],
    [["a", {}]],
    {TYPE: "class", "name": "torch.nn.ReLU"},
    {TYPE: "array", "dtype": "<f4", "shape": [1], "base64": "AAAAAA=="},
]
PARTS: dict[str, tuple[str, ...]] = {
    "array": ("dtype", "shape", "base64"),
    "tuple": ("items",),
    "deque": ("items", "maxlen"),
    "path": ("path",),
    "number": ("array",),
    "tensor": ("array",),
    "Box": ("low", "high", "bounded_below", "bounded_above"),
    "Discrete": ("n", "start", "dtype"),
    "MultiDiscrete": ("nvec", "start", "dtype"),
    "MultiBinary": ("n",),
    "Dict": ("entries",),
    "ConstantSchedule": ("val",),
    "LinearSchedule": ("start", "end", "end_fraction"),
    "FlooredSchedule": ("schedule", "least_progress"),
    "FloatSchedule": ("value_schedule",),
    "RunningMoments": ("horizon", "count", "mean", "square"),
    "UpdateScales": ("advantages", "returns", "lr_scale"),
    "RunningMeanStd": ("mean", "var", "count"),
    "class": ("name",),
    "dict": ("items",),
    "no such kind": ("anything",),
}


@given(st.data(), st.sampled_from(list(PARTS)))
def test_damaged_parts(data: st.DataObject, kind: str) -> None:
    """Parts of any other content make an object of this kind or a ``ValueError`` that names the file and the key."""
    assert set(KINDS) < set(PARTS)
    parts = data.draw(st.fixed_dictionaries({}, optional={part: st.sampled_from(VALUES) for part in PARTS[kind]}))
    try:
        read = from_entries({"the_key": {TYPE: kind, **parts}}, "the file")["the_key"]
    except ValueError as error:
        message = str(error)
    else:
        assert kind in ("class", "dict") or isinstance(read, KINDS[kind].cls)
        message = "the file: "
    assert message.startswith("the file: ")


def test_entries_of_functions_are_pickled_with_a_warning() -> None:
    with pytest.warns(
        UserWarning, match=r"Saved as a pickle: `clip_range` \(an object of type function\).*trust=True"
    ) as caught:
        entries = to_entries({"clip_range": lambda _: 0.125, "gamma": 0.5})
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert entries["gamma"] == 0.5
    with pytest.raises(
        ValueError, match=r"the file holds pickled objects \('clip_range'\), which can run any code.*trust=True"
    ):
        from_entries(entries, "the file")
    assert from_entries(entries, "the file", trust=True)["clip_range"](1) == 0.125
    assert from_entries(entries, "the file", custom_objects={"clip_range": 3}) == {"clip_range": 3, "gamma": 0.5}
