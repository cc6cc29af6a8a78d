"""The encoder ``mingru``: the paper's formula, long and extreme sequences, the chunked scan, and planted faults."""

from typing import Any

import pytest
import torch as th
from torch.nn import functional as F

from sb3_cyborg.encoders.encoder_v7 import EncoderV7
from sb3_cyborg.encoders.mingru import MinGRU, linear_scan
from sb3_cyborg.sequence_model import Logs, State, select_only
from sb3_cyborg.testing import verify_contract


def paper(layer: MinGRU, x: th.Tensor, first: th.Tensor) -> th.Tensor:
    """:return: The states (B, T, D) by the paper's scan of logarithms (its appendix B), for a positive first state (B, D)."""
    v, k = layer.in_proj(layer.norm(x)).chunk(2, dim=-1)
    log_candidate = th.where(v >= 0, (F.relu(v) + 0.5).log(), -F.softplus(-v))
    log_values = th.cat([first.log().unsqueeze(1), log_candidate - F.softplus(-k)], dim=1)
    log_share = F.pad(-F.softplus(k).cumsum(1), (0, 0, 1, 0))
    return (log_share + (log_values - log_share).logcumsumexp(1)).exp()[:, 1:]


@pytest.mark.parametrize("expand", [1, 3])
def test_the_layer_equals_the_formula_of_the_paper(expand: int) -> None:
    th.manual_seed(0)
    layer = MinGRU(6, expand=expand).double()
    x, first = 3 * th.randn(4, 30, 6, dtype=th.float64), th.rand(4, 6 * expand, dtype=th.float64)
    with th.no_grad():
        want = paper(layer, x, first)
        got, state, _ = layer.forward_sequence(x, {"h": first})
        th.testing.assert_close(state["h"], want[:, -1], rtol=0, atol=1e-12)
        th.testing.assert_close(got, x + layer.out_proj(want), rtol=0, atol=1e-12)


@pytest.mark.parametrize("steps", [1, 2, 13, 24, 60, 127, 128])
@pytest.mark.parametrize("resets", [False, True])
def test_chunks_equal_the_loop(steps: int, resets: bool) -> None:
    th.manual_seed(steps)
    decay, added, first = th.rand(3, steps, 5), th.randn(3, steps, 5), th.randn(3, 5)
    masks = th.rand(3, steps) > 0.1 if resets else None
    want = linear_scan(decay, added, first, masks)
    with select_only():
        th.testing.assert_close(linear_scan(decay, added, first, masks), want, rtol=0, atol=1e-5)
    if resets:  # an episode that ended leaves nothing behind, in either form
        assert masks is not None
        masks[:, steps // 2] = False
        clean = linear_scan(decay, added, first, masks)[:, steps // 2 :]
        for tensor in (decay, added):
            tensor[:, : steps // 2] = float("nan")
        first[:] = float("inf")
        for branches in (True, False):
            if branches:
                got = linear_scan(decay, added, first, masks)
            else:
                with select_only():
                    got = linear_scan(decay, added, first, masks)
            th.testing.assert_close(got[:, steps // 2 :], clean, rtol=0, atol=1e-5)


@pytest.mark.parametrize("branches", [True, False])
def test_long_sequences_with_closed_and_open_gates(branches: bool) -> None:
    """Over 2,000 steps the product of the factors underflows, which the textbook form of the scan divides by."""
    th.manual_seed(0)
    decay = th.sigmoid(40 * th.randn(2, 2000, 8))
    added, first = (1 - decay) * 3 * th.rand(2, 2000, 8), th.rand(2, 8)
    want = linear_scan(decay.double(), added.double(), first.double(), None)
    if branches:
        got = linear_scan(decay, added, first, None)
    else:
        with select_only():
            got = linear_scan(decay, added, first, None)
    assert got.isfinite().all()
    th.testing.assert_close(got.double(), want, rtol=0, atol=2e-5)


class _Faulty(MinGRU):
    """A layer whose sequence form has a fault."""

    def __init__(self, fault: str) -> None:
        super().__init__(8)
        self.fault = fault

    def forward_sequence(self, x: th.Tensor, state: State, masks: th.Tensor | None = None) -> tuple[th.Tensor, State, Logs]:
        if self.fault == "state not reset":
            masks = None
        if self.fault == "one step late":
            x = x.roll(1, dims=1)
        return super().forward_sequence(x, state, masks)

    def _project(self, x: th.Tensor) -> th.Tensor:
        projected = super()._project(x)
        if self.fault == "gate ignored" and x.dim() == 3:
            projected[..., self.size :] = 0.0
        return projected


@pytest.mark.parametrize("fault", ["state not reset", "gate ignored", "one step late"])
def test_the_contract_detects_the_fault(fault: str) -> None:
    with pytest.raises(AssertionError, match="differs"):
        verify_contract(_Faulty(fault))


@pytest.mark.parametrize("form", ["branching", "select_only"])
def test_contract_of_sequences_with_several_chunks(form: str) -> None:
    if form == "branching":
        verify_contract(MinGRU(8, expand=2), steps=36)
    else:
        with select_only():
            verify_contract(MinGRU(8, expand=2), steps=36)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"expand": 0}, "`expand` must be a whole number of at least 1, got 0"),
        ({"expand": 1.5}, "`expand` must be a whole number of at least 1, got 1.5"),
        ({"window": 8}, "Unknown option for encoder 'mingru' 'window'"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EncoderV7(3, 8, mode="mingru", **options)
