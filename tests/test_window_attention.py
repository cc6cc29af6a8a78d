"""Sliding-window attention against the reference loop, and visibility of entries."""

import torch as th
from hypothesis import given, settings
from hypothesis import strategies as st

from sb3_cyborg.ops.episodes import steps_since_start
from sb3_cyborg.ops.masking import masked_softmax
from sb3_cyborg.ops.window_attention import ExtraEntries, block_starts, window_attention, window_attention_reference


@settings(max_examples=60, deadline=None)
@given(
    steps=st.integers(1, 20),
    window=st.integers(1, 9),
    heads=st.integers(1, 3),
    ages=st.booleans(),
    extras=st.integers(0, 3),
    seed=st.integers(0, 10**6),
)
def test_equals_the_reference_loop(steps: int, window: int, heads: int, ages: bool, extras: int, seed: int) -> None:
    generator = th.Generator().manual_seed(seed)

    def random(*shape: int) -> th.Tensor:
        return th.randn(shape, dtype=th.float64, generator=generator, requires_grad=True)

    query, keys, values = (random(2, length, heads, 4) for length in (steps, window + steps, window + steps))
    nulls = [random(heads, 4), random(heads, 4)]
    by_age = [random(heads, window, 4), random(heads, window)] if ages else []
    reach = th.randint(0, window + 1, (2, steps), generator=generator).double()
    extra = None
    others: tuple[th.Tensor, ...] = ()
    if extras:
        blocks = len(block_starts(steps, window))
        others = random(2, blocks, extras, heads, 4), random(2, blocks, extras, heads, 4), random(heads, extras)
        visible = th.rand(2, steps, extras, generator=generator) < 0.5
        extra = ExtraEntries(others[0], others[1], others[2], visible)
    arguments = (query, keys, values, reach, *nulls, *(by_age or (None, None)), extra)
    read = window_attention(*arguments)
    context, weights, null = window_attention_reference(*arguments)
    seen = th.cat([read.extra(), read.weights()], dim=-1)
    for got, want in ((read.context, context), (seen, weights), (read.null(), null)):
        th.testing.assert_close(got, want, rtol=0, atol=1e-12)
    entropy = th.special.entr(weights).sum(-1) + th.special.entr(null)
    th.testing.assert_close(read.entropy(), entropy.mean(), rtol=0, atol=1e-12)
    upstream = th.randn(context.shape, dtype=context.dtype, generator=generator)
    gradients = [
        th.autograd.grad((out * upstream).sum(), [query, keys, values, *nulls, *by_age, *others])
        for out in (read.context, context)
    ]
    for a, b in zip(*gradients, strict=True):
        th.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_entries_beyond_reach_have_no_effect() -> None:
    steps, window = 6, 4
    query, keys = th.randn(1, steps, 1, 2), th.randn(1, window + steps, 1, 2)
    reach = th.tensor([[0.0, 1, 2, 0, 1, 2]])
    read = window_attention(query, keys, keys, reach, th.zeros(1, 2), th.zeros(1, 2))
    weights, null = read.weights(), read.null()
    assert th.equal((weights[0, :, 0] > 0).sum(-1).float(), reach[0]), "the number of entries with weight is not the reach"
    assert th.equal(null[0, :, 0] == 1, reach[0] == 0), "an empty past reads the null entry alone"
    th.testing.assert_close(weights.sum(-1) + null, th.ones(1, steps, 1))


def test_only_a_visible_nan_reaches_the_output() -> None:
    steps, window = 5, 3
    query, keys = th.randn(1, steps, 1, 2), th.randn(1, window + steps, 1, 2)
    keys[:, window] = float("nan")  # the entry of step 0, visible to step t if its reach is at least t
    reach = th.tensor([[3.0, 0, 1, 3, 3]])
    context, *_ = window_attention(query, keys, keys, reach, th.zeros(1, 2), th.zeros(1, 2))
    assert context[0, [0, 1, 2, 4]].isfinite().all()
    assert not context[0, 3].isfinite().any()


def test_steps_since_start() -> None:
    count = th.tensor([5.0, 0.0])
    masks = th.tensor([[1, 1, 0, 1, 0], [0, 1, 1, 1, 1]]) == 1
    assert steps_since_start(count, masks, 5).tolist() == [[5, 6, 0, 1, 0], [0, 1, 2, 3, 4]]
    assert steps_since_start(count, None, 2).tolist() == [[5, 6], [0, 1]]


def test_masked_softmax_without_visible_entries_is_the_null_entry() -> None:
    weights, null = masked_softmax(th.full((2, 3), float("nan")), th.zeros(2, 3, dtype=th.bool), th.zeros(2))
    assert weights.tolist() == [[0, 0, 0]] * 2
    assert null.tolist() == [1, 1]
