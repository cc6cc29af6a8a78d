"""The recording of functions of tensors: every operation equals PyTorch's, and what cannot be recorded is told."""

import copy
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch as th
from hypothesis import given, settings
from hypothesis import strategies as st

from sb3_cyborg import kernels
from sb3_cyborg.kernels import primitives
from sb3_cyborg.kernels.recording import MAX_PROGRAMS, Recorded, Tensors

pytestmark = pytest.mark.skipif(kernels.status().isa is None, reason="needs compiled kernels")

Function = Callable[..., th.Tensor]


def record(function: Function, *parameters: th.Tensor) -> Recorded:
    """:return: A function of tensors in the order of their names, recorded."""
    return Recorded(lambda inputs: {"out": function(*inputs.values())}, lambda: parameters)


def named(*inputs: th.Tensor) -> Tensors:
    return {f"x{index}": tensor for index, tensor in enumerate(inputs)}


def replayed(recorded: Recorded, *inputs: th.Tensor) -> th.Tensor:
    """:return: The output of a replay, after the function has been recorded with other values."""
    with th.no_grad():
        first = recorded(named(*map(th.zeros_like, inputs)))
        assert first is not None, recorded.reason
        outputs = recorded(named(*inputs))
        assert outputs is not None
    return outputs["out"]


def assert_same(function: Function, *inputs: th.Tensor, tolerance: float = 2e-6) -> None:
    """Require that a replay equals the function, in values, shape and dtype."""
    wanted = function(*inputs)
    got = replayed(record(function), *inputs)
    assert got.shape == wanted.shape
    assert got.dtype == wanted.dtype
    th.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance, equal_nan=True)


def refused(function: Function, *inputs: th.Tensor) -> str:
    """:return: Why a function is not recorded."""
    recorded = record(function)
    with th.no_grad():
        assert recorded(named(*inputs)) is None
    return recorded.reason


SPECIAL = th.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-30, 88.0, -88.0, 100.0, -100.0, 1.5, -0.3, 20.0, 21.0, 3e38])

UNARY: dict[str, Function] = {
    "neg": th.neg,
    "exp": th.exp,
    "log": th.log,
    "log1p": th.log1p,
    "sqrt": th.sqrt,
    "rsqrt": th.rsqrt,
    "reciprocal": th.reciprocal,
    "sin": lambda x: th.sin(x.clamp(-1e3, 1e3)),
    "cos": lambda x: th.cos(x.clamp(-1e3, 1e3)),
    "tanh": th.tanh,
    "sigmoid": th.sigmoid,
    "silu": th.nn.functional.silu,
    "softplus": th.nn.functional.softplus,
    "relu": th.relu,
    "abs": th.abs,
    "square": th.square,
    "pow 2": lambda x: x**2,
    "pow -0.5": lambda x: x**-0.5,
    "clamp": lambda x: x.clamp(-1, 2),
    "clamp min": lambda x: x.clamp(min=0.5),
    "1 - x": lambda x: 1 - x,
    "x + 2": lambda x: x + 2,
    "x / 3": lambda x: x / 3,
    "x == 0": lambda x: x == 0,
    "x > 0": lambda x: x > 0,
    "not": lambda x: ~(x <= 1),
    "and": lambda x: (x > 0) & (x < 2),
    "or": lambda x: (x < 0) | (x >= 2),
    "to int64": lambda x: th.where(x.abs() < 1e6, x, 0.0).long(),
    "in place": lambda x: x.clone().mul_(2).add_(1).sigmoid_(),
    "zeros": lambda x: th.cat([x.new_zeros(x.shape).flatten(), x.flatten()]),
    "scalar where": lambda x: th.where(x > 0, x, -1.0),
}


@pytest.mark.parametrize("name", UNARY)
def test_operations_by_element(name: str) -> None:
    for x in (SPECIAL, th.randn(3, 5, 37) * 3, th.randn(40, 7).t(), th.randn(4, 9, 2).transpose(0, 2), th.randn(())):
        assert_same(UNARY[name], x)


BINARY: dict[str, Function] = {
    "add": th.add,
    "sub": th.sub,
    "mul": th.mul,
    "div": th.div,
    "maximum": th.maximum,
    "minimum": th.minimum,
    "eq": th.eq,
    "lt": th.lt,
    "ge": th.ge,
    "where": lambda a, b: th.where(a > b, a, b),
    "lerp": lambda a, b: th.lerp(a, b, th.sigmoid(a + b)),
    "addcmul": lambda a, b: th.addcmul(a, b, a),
}


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(sorted(BINARY)),
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    data=st.data(),
)
def test_operations_broadcast(name: str, shape: list[int], data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(len(shape))))
    ones = data.draw(st.lists(st.booleans(), min_size=len(shape), max_size=len(shape)))
    generator = th.Generator().manual_seed(data.draw(st.integers(0, 100)))
    a = th.randn([shape[d] for d in np.argsort(order)], generator=generator).permute(order)
    b = th.randn([1 if one else size for one, size in zip(ones, shape, strict=True)], generator=generator)
    assert_same(BINARY[name], a, b)
    assert_same(BINARY[name], b, a)


def test_operations_of_other_types() -> None:
    whole, flags = th.arange(12).view(3, 4), th.arange(12).view(3, 4) % 3 == 0
    assert_same(lambda x: (x + 1).float() / 2, whole)
    assert_same(lambda x: th.where(x, 1.0, 0.0), flags)
    assert_same(lambda x: x.float(), th.rand(3, 4, dtype=th.float64))
    assert_same(lambda x: x.float() / 255, th.arange(6, dtype=th.uint8))
    assert_same(lambda x: (x.unsqueeze(-1) == th.arange(12)).float(), whole)


REDUCTIONS: dict[str, Function] = {
    "sum": lambda x: x.sum(-1),
    "sum of the middle": lambda x: x.sum(1),
    "sum of two": lambda x: x.sum((0, 2)),
    "sum of all": lambda x: x.sum(),
    "mean": lambda x: x.mean(-1, keepdim=True),
    "mean of the middle": lambda x: x.mean(1),
    "amax": lambda x: x.amax(1),
    "amin": lambda x: x.amin(-1, keepdim=True),
    "argmax": lambda x: x.argmax(-1),
    "argmax of the middle": lambda x: x.argmax(1, keepdim=True),
    "any": lambda x: (x > 1).any(1),
    "all": lambda x: (x > -1).all(dim=2),
    "count": lambda x: (x > 0).sum(-1),
    "softmax": lambda x: th.softmax(x, -1),
    "log_softmax": lambda x: th.log_softmax(x, -1),
    "softmax of rows that are not contiguous": lambda x: th.softmax(x.transpose(1, 2), -1),
    "layer_norm": lambda x: th.nn.functional.layer_norm(x, x.shape[-1:], th.ones(x.shape[-1]), th.zeros(x.shape[-1])),
    "layer_norm without weights": lambda x: th.nn.functional.layer_norm(x, x.shape[-1:]),
    "rms_norm": lambda x: th.nn.functional.rms_norm(x, x.shape[-1:], eps=1e-6),
    "gather": lambda x: x.gather(-1, x.argmax(-1, keepdim=True)),
    "cat": lambda x: th.cat([x[:, 1:], x[:, :1], x], dim=1),
    "stack": lambda x: th.stack([x, x * 2], dim=1),
    "flip": lambda x: x.flip(1),
    "a view": lambda x: (x * 2)[:, 1:].transpose(0, 2),
    "split": lambda x: x.split([1, x.shape[-1] - 1], dim=-1)[1] * 2,
}


@pytest.mark.parametrize("name", REDUCTIONS)
def test_operations_over_dimensions(name: str) -> None:
    for shape in ((2, 3, 8), (3, 2, 37), (1, 5, 2)):
        assert_same(REDUCTIONS[name], th.randn(shape), tolerance=1e-5)


def test_nan_and_inf_as_in_pytorch() -> None:
    rows = th.tensor([[1.0, math.nan, 3.0], [1.0, math.inf, 3.0], [-math.inf] * 3, [math.nan, 1.0, math.nan]])
    for name in ("sum", "argmax"):
        assert_same(REDUCTIONS[name], rows)
    for function in (lambda x: th.softmax(x, -1), lambda x: x.amax(1), lambda x: x.amin(1), lambda x: x.mean(-1)):
        assert_same(function, rows)


@pytest.mark.parametrize("shape", [(1, 1, 1), (16, 5, 128), (7, 33, 13), (3, 128, 1)])
def test_products(shape: tuple[int, int, int]) -> None:
    rows, depth, columns = shape
    x, weight, bias = th.randn(rows, depth), th.randn(columns, depth), th.randn(columns)
    a, b = th.randn(4, rows, depth), th.randn(4, depth, columns)
    for recorded, wanted in (
        (record(lambda x: th.nn.functional.linear(x, weight, bias), weight, bias), x @ weight.t() + bias),
        (record(lambda x: x @ weight.t(), weight), x @ weight.t()),
    ):
        th.testing.assert_close(replayed(recorded, x), wanted, rtol=1e-5, atol=1e-5)
    assert_same(lambda a, b: a @ b, a, b, tolerance=2e-5)
    assert_same(lambda a, b: a @ b.transpose(1, 2), a, b.transpose(1, 2).contiguous(), tolerance=2e-5)
    assert_same(lambda a, b: a.transpose(1, 2).contiguous().transpose(1, 2) @ b, a, b, tolerance=2e-5)


def test_a_change_of_a_parameter_is_seen() -> None:
    layer = th.nn.Linear(6, 5)
    optimizer = th.optim.Adam(layer.parameters(), lr=0.1, fused=True)
    recorded = record(layer, *layer.parameters())
    x = th.randn(3, 6)

    def assert_current() -> None:
        with th.no_grad():
            th.testing.assert_close(replayed(recorded, x), layer(x))

    assert_current()
    layer(x).sum().backward()
    optimizer.step()  # a fused optimizer changes no version
    assert_current()
    layer.load_state_dict(th.nn.Linear(6, 5).state_dict())
    assert_current()
    with th.no_grad():
        layer.bias.add_(1)
    assert_current()


def test_a_parameter_with_other_memory_is_recorded_again() -> None:
    layer = th.nn.Linear(6, 5)
    recorded = Recorded(lambda inputs: {"out": layer(inputs["x0"])}, lambda: list(layer.parameters()))
    x = th.randn(3, 6)
    replayed(recorded, x)
    layer.weight = th.nn.Parameter(th.randn(5, 6))
    th.testing.assert_close(replayed(recorded, x), layer(x))
    layer.weight.data = th.randn(5, 6)
    th.testing.assert_close(replayed(recorded, x), layer(x))


def test_outputs_are_new_tensors() -> None:
    recorded = record(lambda x: x + 1)
    x = th.randn(4)
    first = replayed(recorded, x)
    kept = first.clone()
    replayed(recorded, x * 5)
    assert th.equal(first, kept)


def test_an_input_that_is_returned_is_copied() -> None:
    recorded = record(lambda x: x)
    x = th.randn(4)
    out = replayed(recorded, x)
    assert th.equal(out, x)
    assert out.data_ptr() != x.data_ptr()


def test_inputs_of_other_strides_and_shapes() -> None:
    recorded = record(lambda x: x * 2 + x.sum(-1, keepdim=True))
    for x in (th.randn(4, 6), th.randn(6, 4).t(), th.randn(5, 6), th.randn(4, 12)[:, ::2]):
        th.testing.assert_close(replayed(recorded, x), x * 2 + x.sum(-1, keepdim=True))


def test_the_number_of_recordings_is_bounded() -> None:
    recorded = record(lambda x: x + 1)
    for rows in range(1, MAX_PROGRAMS + 1):
        replayed(recorded, th.randn(rows))
    assert recorded(named(th.randn(MAX_PROGRAMS + 1))) is None
    assert recorded.reason == ""
    assert recorded(named(th.randn(1))) is not None


def test_random_numbers_are_those_of_pytorch() -> None:
    def noise(x: th.Tensor) -> th.Tensor:
        return x + th.empty_like(x).exponential_() + th.empty_like(x).normal_()

    recorded = record(noise)
    x = th.randn(5)
    th.manual_seed(0)
    got = [recorded(named(x)) for _ in range(3)]
    after = th.rand(1)
    th.manual_seed(0)
    wanted = [noise(x) for _ in range(3)]
    assert all(outputs is not None for outputs in got), recorded.reason
    th.testing.assert_close([outputs["out"] for outputs in got if outputs], wanted)
    assert th.equal(after, th.rand(1))


def test_a_refused_recording_draws_no_random_numbers() -> None:
    x = th.randn(5)
    th.manual_seed(0)
    assert "bernoulli" in refused(lambda x: th.bernoulli(x.sigmoid()) + th.empty_like(x).exponential_(), x)
    after = th.rand(1)
    th.manual_seed(0)
    assert th.equal(after, th.rand(1))


def test_reasons_of_refusals() -> None:
    outside = th.randn(3)
    assert "neither an input nor a parameter" in refused(lambda x: x + outside, th.randn(3))
    assert "gives a value to Python" in refused(lambda x: x * x.sum().item(), th.randn(3))
    assert "no compiled form" in refused(lambda x: x.erf(), th.randn(3))
    assert "in place" in refused(lambda x: x.add_(1), th.randn(3))
    assert "not computed in a replay" in refused(
        lambda x: th.native_layer_norm(x, [4], th.ones(4), th.zeros(4), 1e-5)[1] * 2, th.randn(3, 4)
    )
    assert "another factor" in refused(lambda x: th.add(x, x, alpha=2), th.randn(3))


def test_a_function_that_changes_between_calls_is_found() -> None:
    """A replay that differs from the first run is refused. Fault: the recorder takes an addition for a subtraction."""
    from sb3_cyborg.kernels import recording

    planted = recording._TRANSLATIONS | {"aten.add.Tensor": recording._by_element("sub")}
    original, recording._TRANSLATIONS = recording._TRANSLATIONS, planted
    try:
        assert "its replay has another 'out'" in refused(lambda x: x + x * 2, th.randn(3))
    finally:
        recording._TRANSLATIONS = original


def test_kernels_are_recorded() -> None:
    weight, bias = th.randn(9, 5), th.randn(9)
    packed = primitives.Packed(primitives.pack)

    def project(x: th.Tensor) -> th.Tensor:
        return primitives.affine(x, packed(weight), 9, bias, primitives.TANH)

    x = th.randn(3, 5)
    wanted = th.tanh(x @ weight.t() + bias)
    th.testing.assert_close(replayed(record(project, weight, bias), x), wanted, rtol=1e-5, atol=1e-5)


def test_recordings_are_not_copied() -> None:
    from gymnasium import spaces

    from sb3_cyborg.memory_ppo.policies import MemoryActorCriticPolicy

    policy = MemoryActorCriticPolicy(spaces.Box(-1, 1, (3,)), spaces.Discrete(2), lambda _: 1e-3)
    policy.set_training_mode(False)
    obs, state, starts = th.randn(2, 3), policy.get_initial_state(2), th.ones(2)
    with th.no_grad():
        policy(obs, state, starts, deterministic=True)
        twin = copy.deepcopy(policy)
        for parameter in twin.parameters():
            parameter.mul_(1.5)
        values = twin(obs, state, starts, deterministic=True)[1]
        assert not th.equal(values, policy(obs, state, starts, deterministic=True)[1])
    assert policy._recorded_step is not None
    assert policy._recorded_step.reason == ""
