"""The state-space recurrence: chunks against the step-by-step reference, and isolation of episodes."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch as th
from hypothesis import given, settings
from hypothesis import strategies as st

from sb3_cyborg.ops import ssd
from sb3_cyborg.ops.ssd import ssd_step

Run = Callable[..., tuple[th.Tensor, th.Tensor]]
# Wrappers without type checks, for calls with lists of tensors.
ssd_chunked: Run = ssd.ssd_chunked
ssd_reference: Run = ssd.ssd_reference

NAMES = ("output", "state", "x", "dt", "a", "b", "c", "d", "first state")


class Case(NamedTuple):
    """Arguments of :func:`~sb3_cyborg.ops.ssd.ssd_chunked`."""

    x: th.Tensor
    dt: th.Tensor
    a: th.Tensor
    b: th.Tensor
    c: th.Tensor
    d: th.Tensor
    state: th.Tensor
    masks: th.Tensor | None

    def tensors(self) -> list[th.Tensor]:
        return [self.x, self.dt, self.a, self.b, self.c, self.d, self.state]

    def to(self, dtype: th.dtype) -> "Case":
        return Case._make([*[tensor.to(dtype) for tensor in self.tensors()], self.masks])


def make_case(
    steps: int,
    *,
    rows: int = 3,
    heads: int = 4,
    width: int = 3,
    size: int = 5,
    groups: int = 2,
    resets: float = 0.2,
    dt_scale: float = 0.1,
    seed: int = 0,
) -> Case:
    """
    :param resets: Probability that an episode starts; 0 gives no masks at all.
    :param dt_scale: Median of the step sizes; they spread by two orders of magnitude.
    """
    generator = th.Generator().manual_seed(seed)

    def randn(*shape: int) -> th.Tensor:
        return th.randn(shape, generator=generator, dtype=th.float64)

    a = -(1 + 15 * th.rand(heads, generator=generator, dtype=th.float64))
    masks = th.rand(rows, steps, generator=generator) >= resets if resets else None
    return Case(
        x=randn(rows, steps, heads, width),
        dt=dt_scale * th.exp(randn(rows, steps, heads)),
        a=a,
        b=randn(rows, steps, groups, size),
        c=randn(rows, steps, groups, size),
        d=randn(heads),
        state=randn(rows, heads, width, size),
        masks=masks,
    )


def run(case: Case, chunk_size: int | None) -> dict[str, th.Tensor]:
    """:return: Results and all gradients of a fixed functional of both results; chunk size ``None`` is the reference."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in case.tensors()]
    results = ssd_reference(*leaves, case.masks) if chunk_size is None else ssd_chunked(*leaves, case.masks, chunk_size)
    generator = th.Generator().manual_seed(1)
    weights = [th.randn(result.shape, generator=generator, dtype=th.float64).to(result.dtype) for result in results]
    gradients = th.autograd.grad(results, leaves, weights)
    return dict(zip(NAMES, [*[result.detach() for result in results], *gradients], strict=True))


def errors(got: dict[str, th.Tensor], want: dict[str, th.Tensor]) -> dict[str, float]:
    """:return: Largest difference of each, relative to the largest value where that is above one."""
    for name in want:
        assert got[name].shape == want[name].shape, name
        assert want[name].isfinite().all(), name
    return {name: ((got[name] - want[name]).abs().max() / want[name].abs().max().clamp(min=1)).item() for name in want}


def assert_near(got: dict[str, th.Tensor], want: dict[str, th.Tensor], tolerance: float) -> None:
    found = errors(got, want)
    assert all(error <= tolerance for error in found.values()), found


@pytest.mark.parametrize("resets", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("chunk_size", [1, 3, 4, 32])
@pytest.mark.parametrize("steps", [1, 4, 13])
def test_chunks_equal_steps(steps: int, chunk_size: int, resets: float) -> None:
    case = make_case(steps, resets=resets)
    assert_near(run(case, chunk_size), run(case, None), 1e-10)
    assert_near(run(case.to(th.float32), chunk_size), run(case.to(th.float32), None), 1e-5)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    steps=st.integers(1, 40),
    chunk_size=st.integers(1, 20),
    heads=st.integers(1, 3),
    groups=st.integers(1, 2),
    rows=st.integers(1, 3),
    resets=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    dt_scale=st.sampled_from([1e-6, 1e-2, 1.0, 1e3]),
    seed=st.integers(0, 2**16),
)
def test_chunks_equal_steps_for_any_shape(
    steps: int, chunk_size: int, heads: int, groups: int, rows: int, resets: float, dt_scale: float, seed: int
) -> None:
    case = make_case(
        steps, rows=rows, heads=heads * groups, width=2, size=3, groups=groups, resets=resets, dt_scale=dt_scale, seed=seed
    )
    assert_near(run(case, chunk_size), run(case, None), 1e-10)


def test_one_step_equals_the_hand_computed_values() -> None:
    """h = exp(2 * -0.5) * 3 + 2 * 5 * 7, y = 11 h + 13 * 5."""
    one = th.ones(1, dtype=th.float64)
    y, state = ssd_step(
        5 * one.view(1, 1, 1), 2 * one.view(1, 1), -0.5 * one, 7 * one.view(1, 1, 1), 11 * one.view(1, 1, 1), 13 * one,
        3 * one.view(1, 1, 1, 1),
    )  # fmt: skip
    want = 3 * th.exp(-one) + 70
    assert th.allclose(state.flatten(), want, rtol=1e-15)
    assert th.allclose(y.flatten(), 11 * want + 65, rtol=1e-15)


@pytest.mark.parametrize("dt_scale", [1e-3, 0.1, 5.0])
@pytest.mark.parametrize("steps", [64, 512])
def test_fp32_error_does_not_grow(steps: int, dt_scale: float) -> None:
    """Compared with fp64, chunks are as precise as the reference, for long sequences and any decay."""
    case = make_case(steps, rows=2, heads=2, width=16, size=16, groups=1, resets=0.02, dt_scale=dt_scale).to(th.float32)
    assert_near({name: value.double() for name, value in run(case, 32).items()}, run(case.to(th.float64), 32), 2e-6)


def test_dt_of_zero_keeps_the_state() -> None:
    case = make_case(9, resets=0.0)
    case = case._replace(dt=th.zeros_like(case.dt))
    y, state = ssd_chunked(*case, chunk_size=4)
    assert th.equal(state, case.state)
    assert th.allclose(y, ssd_reference(*case)[0], atol=1e-14)


@pytest.mark.parametrize("dtype", [th.float32, th.float64])
@pytest.mark.parametrize("chunk_size", [4, 32])
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf"), 1e6, 3e38])  # the last overflows in fp32
@pytest.mark.parametrize("leaf", ["x", "dt", "b", "c", "state"])
def test_a_reset_blocks_values_and_gradients_exactly(leaf: str, poison: float, chunk_size: int, dtype: th.dtype) -> None:
    """Outputs and gradients after a reset are bit-exact independent of the values before it."""
    reset_at = 6
    case = make_case(13, resets=0.0).to(dtype)
    masks = th.ones(3, 13, dtype=th.bool)
    masks[:, reset_at] = 0
    case = case._replace(masks=masks)
    dirty = getattr(case, leaf).clone()
    if leaf == "state":
        dirty[:] = poison
    elif leaf == "dt":
        dirty[:, :reset_at] = abs(poison)  # step sizes are positive
    else:
        dirty[:, :reset_at] = poison

    def after(case: Case) -> list[th.Tensor]:
        leaves = [tensor.clone().requires_grad_() for tensor in case.tensors()]
        y, state = ssd_chunked(*leaves, masks, chunk_size)
        y = y[:, reset_at:]
        gradients = th.autograd.grad((y.sum(), state.sum()), leaves)
        sequences = [gradient[:, reset_at:] for gradient in (*gradients[:2], *gradients[3:5])]
        return [y, state, *sequences, gradients[2], gradients[5], gradients[6]]

    for got, want in zip(after(case._replace(**{leaf: dirty})), after(case), strict=True):
        assert want.isfinite().all()
        assert th.equal(got, want)


@pytest.mark.parametrize("chunk_size", [1, 4, 32])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("leaf", ["x", "dt", "b", "c"])
def test_a_nan_stays_in_its_own_episode(leaf: str, poison: float, chunk_size: int) -> None:
    """Row 0 has resets at 5 and 11 and a NaN at 7; row 1 has none."""
    case = make_case(16, rows=2, resets=0.0)
    masks = th.ones(2, 16, dtype=th.bool)
    masks[:, 5] = masks[:, 11] = 0
    dirty = getattr(case, leaf).clone()
    dirty[0, 7] = poison
    case = case._replace(masks=masks, **{leaf: dirty})
    y, state = ssd_chunked(*case, chunk_size=chunk_size)
    want, want_state = ssd_reference(*case)
    bad = ~y.flatten(2).isfinite().all(-1)
    assert bad[0].nonzero().flatten().tolist() == ([7] if leaf == "c" else [7, 8, 9, 10])
    assert not bad[1].any()
    assert th.equal(bad, ~want.flatten(2).isfinite().all(-1))
    assert th.allclose(y[~bad], want[~bad], atol=1e-12)
    assert th.allclose(state, want_state, atol=1e-12)


@pytest.mark.parametrize("chunk_size", [2, 4, 32])
def test_a_state_stays_nan_until_its_episode_ends(chunk_size: int) -> None:
    """Both for a first state that is NaN and for an input that is."""
    case = make_case(9, rows=3, resets=0.0)
    case.state[0, 0, 0, 0] = float("nan")
    case.x[1, 3, 0, 0] = float("inf")
    y, state = ssd_chunked(*case, chunk_size=chunk_size)
    bad = ~y.flatten(2).isfinite().all(-1)
    assert bad.int().tolist() == [[1] * 9, [0] * 3 + [1] * 6, [0] * 9]
    assert (~state.flatten(1).isfinite().all(-1)).tolist() == [True, True, False]


def test_gradients_through_first_and_final_state() -> None:
    """Two halves connected by their state have the gradients of the whole sequence; a reset at the start blocks them."""
    case = make_case(12)
    assert case.masks is not None
    leaf = case.state.clone().requires_grad_()

    def halves(state: th.Tensor) -> th.Tensor:
        outputs = []
        for part in (slice(0, 7), slice(7, 12)):
            assert case.masks is not None
            y, state = ssd_chunked(
                case.x[:, part], case.dt[:, part], case.a, case.b[:, part], case.c[:, part], case.d, state,
                case.masks[:, part], 4,
            )  # fmt: skip
            outputs.append(y)
        return th.cat(outputs, dim=1)

    weights = th.randn(case.x.shape, generator=th.Generator().manual_seed(2), dtype=th.float64)
    (split,) = th.autograd.grad(halves(leaf), leaf, weights)
    (whole,) = th.autograd.grad(ssd_reference(*case._replace(state=leaf))[0], leaf, weights)
    assert th.allclose(split, whole, atol=1e-12)
    masks = case.masks.clone()
    masks[:, 0] = 0
    (cut,) = th.autograd.grad(ssd_chunked(*case._replace(state=leaf, masks=masks), chunk_size=4)[0], leaf, weights)
    assert not cut.any()


def test_gradcheck() -> None:
    case = make_case(5, rows=2, heads=2, width=2, size=2, groups=1)
    leaves = tuple(tensor.requires_grad_() for tensor in case.tensors())

    def function(*leaves: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        return ssd_chunked(*leaves, case.masks, 2)

    assert th.autograd.gradcheck(function, leaves)


def test_arguments_are_not_changed_in_place() -> None:
    case = make_case(8)
    before = [tensor.clone() for tensor in case.tensors()]
    _, state = ssd_chunked(*case, chunk_size=4)
    assert all(th.equal(tensor, kept) for tensor, kept in zip(case.tensors(), before, strict=True))
    assert state.data_ptr() != case.state.data_ptr()
