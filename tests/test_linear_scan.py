"""The chunked scan against the reference loop."""

import torch as th
from hypothesis import given, settings
from hypothesis import strategies as st

from sb3_cyborg.ops.linear_scan import CHUNK, MAX_WRITE, slot_scan, slot_scan_reference


@settings(max_examples=60, deadline=None)
@given(
    steps=st.integers(1, 3 * CHUNK),
    slots=st.integers(1, 4),
    chunk=st.integers(1, CHUNK),
    reset_rate=st.sampled_from([0.0, 0.2, 1.0]),
    strongest=st.sampled_from([0.0, 0.3, MAX_WRITE]),
    seed=st.integers(0, 10**6),
)
def test_equals_the_reference_loop(steps: int, slots: int, chunk: int, reset_rate: float, strongest: float, seed: int) -> None:
    generator = th.Generator().manual_seed(seed)
    read, write = (th.rand(2, steps, 3, slots, dtype=th.float64, generator=generator) for _ in range(2))
    write = write * strongest if strongest < MAX_WRITE else (write > 0.5).double() * strongest
    items = th.randn(2, steps, 3, 2, dtype=th.float64, generator=generator)
    state = th.randn(2, 3, slots, 2, dtype=th.float64, generator=generator)
    masks = th.rand(2, steps, generator=generator) >= reset_rate
    inputs = [tensor.requires_grad_() for tensor in (read, write, items, state)]
    got = slot_scan(read, write, items, state, masks, chunk)
    want = slot_scan_reference(read, write, items, state, masks)
    upstream = [th.randn(tensor.shape, dtype=th.float64, generator=generator) for tensor in want]
    for a, b in zip(got, want, strict=True):
        th.testing.assert_close(a, b, rtol=0, atol=1e-12)
    gradients = [th.autograd.grad((out[0] * upstream[0]).sum() + (out[1] * upstream[1]).sum(), inputs) for out in (got, want)]
    for a, b in zip(*gradients, strict=True):
        th.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


def test_the_largest_writes_neither_overflow_nor_lose_precision_in_fp32() -> None:
    """A chunk in which every write has the largest strength: the factors span 384 powers of ten."""
    generator = th.Generator().manual_seed(0)
    read = th.rand(1, 4 * CHUNK, 1, 3, generator=generator)
    write = th.full_like(read, MAX_WRITE)
    items = th.randn(1, 4 * CHUNK, 1, 2, generator=generator)
    slots = th.randn(1, 1, 3, 2, generator=generator)
    got = slot_scan(read, write.requires_grad_(), items, slots, None)
    want = slot_scan_reference(read.double(), write.double(), items.double(), slots.double(), None)
    for a, b in zip(got, want, strict=True):
        th.testing.assert_close(a.double(), b, rtol=0, atol=2e-6)
    (gradient,) = th.autograd.grad(got[0].sum(), write)
    assert gradient.isfinite().all()
