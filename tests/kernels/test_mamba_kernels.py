"""Kernels of Mamba-2, pmm and heads against PyTorch's form in fp64: any size, resets, values that are not finite."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch as th
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sb3_cyborg.encoders.mamba import GatedRMSNorm, Mamba2
from sb3_cyborg.kernels import primitives, status
from sb3_cyborg.memories.pmm import PersistentMemory
from sb3_cyborg.ops import causal_conv as conv_module
from sb3_cyborg.ops import ssd_compiled as compiled_module
from sb3_cyborg.ops.linear import FusedSequential
from sb3_cyborg.ops.rms_norm import RMSNorm
from sb3_cyborg.sequence_model import SequenceModel
from sb3_cyborg.testing import run_full, run_stepped, warm_state
from tests.kernels.test_kernels import gradients, relative_error
from tests.test_ssd import Run, make_case, ssd_reference

ssd_compiled: Run = compiled_module.ssd_compiled
causal_conv: Run = conv_module.causal_conv

few = settings(max_examples=40, deadline=None)


@pytest.fixture(autouse=True)
def in_use(library: Path) -> None:
    """Without kernels the tests would compare PyTorch with itself."""
    assert status().isa is not None


def results(function: Callable[..., Any], leaves: list[th.Tensor], *arguments: Any) -> list[th.Tensor]:
    """:return: Results of a function of tensors, and the gradients of a fixed functional of them."""
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    found = function(*leaves, *arguments)
    outputs = found if isinstance(found, tuple) else (found,)
    generator = th.Generator().manual_seed(1)
    weights = [th.randn(output.shape, generator=generator, dtype=th.float64).to(output.dtype) for output in outputs]
    return [*[output.detach() for output in outputs], *th.autograd.grad(outputs, leaves, weights)]


def assert_equal_to_double(function: Callable[..., Any], leaves: list[th.Tensor], *arguments: Any, exact: Any = None) -> None:
    """Require the results of a function in fp32 to be those of the same function, or of ``exact``, in fp64."""
    want = results(exact or function, leaves, *arguments)
    got = results(function, [leaf.float() for leaf in leaves], *arguments)
    for one, other in zip(got, want, strict=True):
        assert one.shape == other.shape
        assert relative_error(one.double(), other) < 2e-5


@few
@given(
    steps=st.sampled_from([1, 2, 15, 16, 17, 33, 50]),
    rows=st.integers(1, 3),
    groups=st.integers(1, 3),
    heads=st.integers(1, 3),
    width=st.sampled_from([1, 3, 8, 9, 16, 31, 32, 40, 70]),
    size=st.integers(1, 17),
    resets=st.sampled_from([0.0, 0.1, 1.0]),
    seed=st.integers(0, 10**6),
)
def test_recurrence_of_any_size(
    steps: int, rows: int, groups: int, heads: int, width: int, size: int, resets: float, seed: int
) -> None:
    shape = {"rows": rows, "heads": groups * heads, "width": width, "size": size, "groups": groups}
    case = make_case(steps, resets=resets, seed=seed, **shape)
    assert_equal_to_double(ssd_compiled, case.tensors(), case.masks, exact=ssd_reference)


@pytest.mark.parametrize("dt_scale", [1e-3, 0.1, 5.0])
def test_the_error_of_the_recurrence_does_not_grow(dt_scale: float) -> None:
    case = make_case(512, rows=2, heads=2, width=16, size=16, groups=1, resets=0.02, dt_scale=dt_scale)
    leaves = [leaf.float() for leaf in case.tensors()]
    want = results(ssd_reference, [leaf.double() for leaf in leaves], case.masks)
    for one, other in zip(results(ssd_compiled, leaves, case.masks), want, strict=True):
        assert relative_error(one.double(), other) < 2e-6


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e6, 3e38])
@pytest.mark.parametrize("leaf", ["x", "dt", "b", "c", "state"])
def test_a_reset_blocks_values_and_gradients_exactly(leaf: str, poison: float) -> None:
    """What follows a reset in the middle of a segment of saved states is independent of all before it, to the last bit."""
    reset_at, steps = 19, 37
    clean = make_case(steps, resets=0.0, width=9).to(th.float32)
    dirty = {name: getattr(clean, name).clone() for name in ("x", "dt", "b", "c", "state")}
    dirty[leaf][:, : None if leaf == "state" else reset_at] = poison
    masks = th.ones(3, steps, dtype=th.bool)
    masks[:, reset_at] = False

    def after(case: Any) -> list[th.Tensor]:
        leaves = [tensor.clone().requires_grad_() for tensor in case.tensors()]
        y, state = ssd_compiled(*leaves, masks)
        y = y[:, reset_at:]
        x, dt, a, b, c, d, first = th.autograd.grad((y.sum(), state.sum()), leaves)
        return [y, state, *[gradient[:, reset_at:] for gradient in (x, dt, b, c)], a, d, first]

    for got, want in zip(after(clean._replace(**dirty)), after(clean), strict=True):
        assert want.isfinite().all()
        assert th.equal(got, want)


def test_a_nan_stays_in_its_own_episode() -> None:
    """Row 0 has resets at 5 and 11 and a NaN at 7; row 1 has none."""
    for leaf in ("x", "dt", "b", "c"):
        case = make_case(16, rows=2, resets=0.0)
        masks = th.ones(2, 16, dtype=th.bool)
        masks[:, 5] = masks[:, 11] = False
        getattr(case, leaf)[0, 7] = float("nan")
        y, state = ssd_compiled(*case.to(th.float32).tensors(), masks)
        bad = ~y.flatten(2).isfinite().all(-1)
        assert bad[0].nonzero().flatten().tolist() == ([7] if leaf == "c" else [7, 8, 9, 10])
        assert not bad[1].any()
        assert state.isfinite().all()


@few
@given(
    rows=st.integers(1, 3),
    steps=st.integers(1, 9),
    channels=st.integers(1, 40),
    taps=st.integers(1, 9),
    resets=st.booleans(),
    silu=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_convolution_of_any_size(rows: int, steps: int, channels: int, taps: int, resets: bool, silu: bool, seed: int) -> None:
    generator = th.Generator().manual_seed(seed)
    shapes = [(rows, steps, channels), (rows, channels, taps - 1), (channels, taps), (channels,)]
    leaves = [th.randn(shape, generator=generator, dtype=th.float64) for shape in shapes]
    masks = th.rand(rows, steps, generator=generator) > 0.3 if resets else None
    assert_equal_to_double(causal_conv, leaves, masks, silu)


def test_no_gradient_passes_a_reset_of_the_convolution_even_if_it_is_nan() -> None:
    x = th.randn(1, 9, 5)
    x[:, :4] = float("nan")
    leaves = [x.requires_grad_(), th.zeros(1, 5, 3), th.randn(5, 4).requires_grad_(), th.zeros(5).requires_grad_()]
    masks = th.ones(1, 9, dtype=th.bool)
    masks[0, 4] = False
    y, _ = causal_conv(*leaves, masks, True)
    y[:, 4:].sum().backward()
    assert all(leaf.grad is None or leaf.grad.isfinite().all() for leaf in leaves)


@few
@given(
    rows=st.integers(1, 9), size=st.integers(1, 40), groups=st.integers(1, 3), gated=st.booleans(), seed=st.integers(0, 10**6)
)
def test_norm_of_any_size(rows: int, size: int, groups: int, gated: bool, seed: int) -> None:
    generator = th.Generator().manual_seed(seed)
    norm = (GatedRMSNorm if gated else RMSNorm)(groups * size, groups)
    nn.init.normal_(norm.weight, generator=generator)
    # Not close to zero, where the factor of a group, and so the rounding of its gradient, is large.
    leaves = [th.randn(rows, groups * size, generator=generator, dtype=th.float64) for _ in range(1 + gated)]
    leaves[0] += th.where(leaves[0] < 0, -1.0, 1.0)
    assert_module_equals_double(norm, leaves)


@few
@given(
    rows=st.integers(1, 3),
    steps=st.integers(1, 20),
    slots=st.integers(1, 9),
    heads=st.integers(1, 3),
    size=st.sampled_from([1, 3, 8, 17, 32]),
    resets=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_pmm_of_any_size(rows: int, steps: int, slots: int, heads: int, size: int, resets: bool, seed: int) -> None:
    th.manual_seed(seed)
    model = PersistentMemory(5, heads * size, slots, heads)
    nn.init.normal_(model.query.weight, std=2.0)  # sharp attention, so that heads give slots more than half of it
    assert_sequence_equals_steps(model, rows, steps, resets, seed)


@pytest.mark.parametrize("resets", [False, True])
def test_pmm_with_a_null_entry_that_is_read(resets: bool) -> None:
    """The value of the null entry is zero at the start, and its weight has no gradient then."""
    th.manual_seed(0)
    model = PersistentMemory(5, 16, 4, 2)
    nn.init.normal_(model.null_value)
    assert_sequence_equals_steps(model, 3, 12, resets, 0)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("resets", [False, True])
def test_mamba(groups: int, resets: bool) -> None:
    th.manual_seed(0)
    assert_sequence_equals_steps(Mamba2(12, d_state=5, headdim=3, ngroups=groups), 3, 21, resets, 0)


def assert_sequence_equals_steps(model: SequenceModel, rows: int, steps: int, resets: bool, seed: int) -> None:
    """Require a sequence in fp32, by the kernels, to equal PyTorch's steps in fp64."""
    generator = th.Generator().manual_seed(seed)
    exact = copy.deepcopy(model).double()
    x = th.randn(rows, steps, model.input_dim, generator=generator)
    masks = th.rand(rows, steps, generator=generator) > 0.2 if resets else None
    state = warm_state(model, rows, th.float32, generator, reset_row=rows > 1)
    assert primitives.usable(x)
    want = gradients(exact, run_stepped, x.double(), {name: leaf.double() for name, leaf in state.items()}, masks)
    got = gradients(model, run_full, x, state, masks)
    for name, tensor in want.items():
        assert relative_error(got[name].double(), tensor) < 2e-5, name


@few
@given(
    rows=st.integers(1, 20), depth=st.integers(1, 40), width=st.integers(1, 40), relu=st.booleans(), seed=st.integers(0, 10**6)
)
def test_activated_layers_of_any_size(rows: int, depth: int, width: int, relu: bool, seed: int) -> None:
    th.manual_seed(seed)
    layers = FusedSequential(nn.Linear(depth, width), nn.ReLU() if relu else nn.Tanh())
    assert_module_equals_double(layers, [th.randn(rows, depth, dtype=th.float64)])


def assert_module_equals_double(module: nn.Module, leaves: list[th.Tensor]) -> None:
    """:func:`assert_equal_to_double` for a module, with the gradients of its parameters."""
    exact = copy.deepcopy(module).double()
    assert_equal_to_double(module, leaves, exact=exact)
    module(*[leaf.float() for leaf in leaves]).square().sum().backward()
    exact(*leaves).square().sum().backward()
    for ours, other in zip(module.parameters(), exact.parameters(), strict=True):
        assert ours.grad is not None
        assert other.grad is not None
        assert relative_error(ours.grad.double(), other.grad) < 2e-5
