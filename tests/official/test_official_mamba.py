"""
The official implementation of Mamba-2 as reference, on a CPU: its Triton kernels in Triton's interpreter, called by the same
code as on a GPU, and its ``Mamba2`` module. Only ``make test-official`` runs these tests.
"""

import sys
from typing import Any

import pytest
import torch as th

from benchmarks.mamba_accuracy import error_table
from sb3_cyborg.encoders.encoder_v7 import EncoderV7
from sb3_cyborg.encoders.mamba import Mamba2
from sb3_cyborg.ops import ssd_official
from sb3_cyborg.ops.ssd_official import choose_ssd, import_without_package, load_kernels
from sb3_cyborg.sequence_model import State
from sb3_cyborg.testing import outcome, run_full, run_stepped, verify_isolation, verify_state, warm_state
from tests.helpers import assert_exact_ratios, record_updates, toy_model
from tests.test_ssd import NAMES, Case, Run, make_case, ssd_chunked, ssd_reference

OUTPUT_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 2e-5

run_official: Run = ssd_official.ssd_official


def report(title: str, errors: dict[str, float]) -> None:
    print(f"\n{title}: " + ", ".join(f"{name} {error:.3g}" for name, error in errors.items()))


def distances(got: dict[str, th.Tensor], want: dict[str, th.Tensor]) -> dict[str, float]:
    """:return: Largest difference of each, relative to the largest value where that is above one."""
    assert got.keys() == want.keys()
    for name in want:
        assert got[name].shape == want[name].shape, name
        assert want[name].isfinite().all(), name
    return {name: ((got[name] - want[name]).abs().max() / want[name].abs().max().clamp(min=1)).item() for name in want}


def assert_near(title: str, got: dict[str, th.Tensor], want: dict[str, th.Tensor]) -> None:
    worst = {"outputs": 0.0, "gradients": 0.0}
    for name, error in distances(got, want).items():
        kind = "outputs" if name in ("output", "state") or name.startswith("final state") else "gradients"
        worst[kind] = max(worst[kind], error)
    report(title, worst)
    assert worst["outputs"] <= OUTPUT_TOLERANCE
    assert worst["gradients"] <= GRADIENT_TOLERANCE


def run(function: Run, case: Case, chunk_size: int) -> dict[str, th.Tensor]:
    """:return: Results and all gradients of a fixed functional of both results."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in case.tensors()]
    results = function(*leaves, case.masks, chunk_size)
    generator = th.Generator().manual_seed(1)
    weights = [th.randn(result.shape, generator=generator) for result in results]
    gradients = th.autograd.grad(results, leaves, weights)
    return dict(zip(NAMES, [*[result.detach() for result in results], *gradients], strict=True))


@pytest.mark.parametrize(
    ("steps", "chunk_size", "sizes"),
    [
        (70, 32, {"resets": 0.0}),
        (70, 32, {"resets": 0.1}),
        (64, 32, {"resets": 0.1, "groups": 2}),
        (13, 4, {"resets": 1.0}),
        (13, 5, {"resets": 0.2, "groups": 4}),
        (1, 32, {"resets": 0.2}),
        (40, 32, {"resets": 0.1, "width": 32, "size": 32, "groups": 1}),
        (70, 64, {"resets": 0.05, "dt_scale": 0.001}),
    ],
)
def test_core_equals_the_official_kernels(steps: int, chunk_size: int, sizes: dict[str, Any]) -> None:
    """Outputs, final state and all gradients, with first states, resets and lengths that are no multiple of a chunk."""
    case = make_case(steps, **({"width": 16, "size": 16} | sizes)).to(th.float32)
    assert choose_ssd("official", case.x) is run_official
    title = f"T={steps}, chunk {chunk_size}, {sizes}"
    assert_near(title, run(run_official, case, chunk_size), run(ssd_chunked, case, chunk_size))


def test_a_reset_at_the_start_cuts_the_gradient_of_the_first_state() -> None:
    case = make_case(9).to(th.float32)
    assert case.masks is not None
    case.masks[:, 0] = 0
    state = case.state.requires_grad_()
    y, _ = run_official(*case, chunk_size=4)
    assert not th.autograd.grad(y.sum(), state)[0].any()


def test_the_step_size_is_passed_after_the_softplus() -> None:
    """The softplus of the kernels loses precision at small step sizes."""
    case = make_case(64, width=16, size=16)
    bias, raw = th.linspace(-6.9, -2.3, 4).double(), 0.3 * th.randn(3, 64, 4, dtype=th.float64)
    case = case._replace(dt=th.nn.functional.softplus(raw + bias))
    assert case.masks is not None
    want, _ = ssd_chunked(*case)
    x, _, a, b, c, d, state = case.to(th.float32).tensors()
    dt = th.nn.functional.softplus((raw + bias).float())
    ours, _ = run_official(x, dt, a, b, c, d, state, case.masks)
    theirs: Any = load_kernels()(
        x, raw.float(), a, b, c, 32, D=d, dt_bias=bias.float(), dt_softplus=True, initial_states=state,
        seq_idx=(~case.masks).cumsum(1).int(),
    )  # fmt: skip
    errors = {name: ((y - want).abs().max() / want.abs().max()).item() for name, y in (("before", ours), ("inside", theirs))}
    report("softplus before or inside the kernels", errors)
    assert 3 * errors["before"] < errors["inside"] <= OUTPUT_TOLERANCE


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e9])
@pytest.mark.parametrize("leaf", ["x", "dt", "b", "c", "state"])
def test_a_nan_stays_in_its_own_episode(leaf: str, poison: float) -> None:
    """Outputs after the reset, the last state, and the gradients of both are bit-exact those without the NaN."""
    reset_at = 6
    case = make_case(13, resets=0.0).to(th.float32)
    masks = th.ones(3, 13, dtype=th.bool)
    masks[:, reset_at] = 0
    case = case._replace(masks=masks)
    dirty = getattr(case, leaf).clone()
    dirty[(slice(None),) if leaf == "state" else (slice(None), slice(0, reset_at))] = poison
    if leaf == "dt":  # zeros, as the replaced values: other step sizes would have other rounding errors
        case.dt[:, :reset_at] = 0

    def after(case: Case) -> list[th.Tensor]:
        leaves = [tensor.clone().requires_grad_() for tensor in case.tensors()]
        y, state = run_official(*leaves, masks, 32)
        assert y[:, reset_at:].isfinite().all()
        gradients = th.autograd.grad((y[:, reset_at:].sum(), state.sum()), leaves)
        sequences = [gradient[:, reset_at:] for gradient in (*gradients[:2], *gradients[3:5])]
        return [y[:, reset_at:], state, *sequences, gradients[2], gradients[5], gradients[6]]

    for got, want in zip(after(case._replace(**{leaf: dirty})), after(case), strict=True):
        assert th.equal(got, want)


SIZES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "expand 1": {"expand": 1, "headdim": 16, "d_state": 16},
    "groups": {"ngroups": 2, "headdim": 16, "d_state": 16, "chunk_size": 8},
    "heads of 8": {"headdim": 8, "ngroups": 4, "d_state": 64, "d_conv": 2},
    "one head": {"expand": 1, "headdim": 64, "d_conv": 3},
}


def official_block(ours: Mamba2) -> Any:
    """:return: ``mamba_ssm.Mamba2`` of the same sizes."""
    return import_without_package("mamba_ssm.modules.mamba2").Mamba2(
        ours.input_dim,
        d_state=ours.d_state,
        d_conv=ours.d_conv,
        expand=ours.d_inner // ours.input_dim,
        headdim=ours.headdim,
        ngroups=ours.ngroups,
        chunk_size=ours.chunk_size,
        use_mem_eff_path=False,  # the other path needs causal_conv1d
    )


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
@pytest.mark.parametrize("d_model", [64, 128])
def test_weights_load_and_save_exactly(d_model: int, sizes: dict[str, Any]) -> None:
    """Weights are loaded strictly and bit-exact in both directions."""
    th.manual_seed(0)
    ours, other = Mamba2(d_model, **sizes), Mamba2(d_model, **sizes)
    theirs = official_block(ours)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    other.load_state_dict(theirs.state_dict(), strict=True)
    assert list(other.state_dict()) == list(ours.state_dict())
    assert all(th.equal(other.state_dict()[name], value) for name, value in ours.state_dict().items())
    fresh = official_block(ours)
    other.load_state_dict(fresh.state_dict(), strict=True)
    assert all(th.equal(other.state_dict()[name], value) for name, value in fresh.state_dict().items())


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_block_equals_the_official_block(sizes: dict[str, Any]) -> None:
    """A sequence and its continuation by steps: ours in PyTorch, theirs in their kernels."""
    th.manual_seed(0)
    ours = Mamba2(64, mamba_backend="torch", **sizes)
    theirs = official_block(ours)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = th.randn(2, 41, 64)
    caches: list[th.Tensor] = list(theirs.allocate_inference_cache(2, 64))
    with th.no_grad():
        want = theirs(x)
        got, _, _ = ours.forward_sequence(x, ours.get_initial_state(2))
        errors = {"sequence": (got - want).abs().max().item()}
        state = ours.get_initial_state(2)
        for t in range(8):
            want, *caches = theirs.step(x[:, t : t + 1], *caches)
            got, state, _ = ours.forward_step(x[:, t], state)
            errors["steps"] = max(errors.get("steps", 0.0), (got - want[:, 0]).abs().max().item())
        conv, ssm = caches
        errors["conv state"] = (state["conv"] - conv[..., 1:]).abs().max().item()
        errors["ssm state"] = (state["ssm"] - ssm).abs().max().item()
    report(f"block {sizes}", errors)
    assert max(errors.values()) <= OUTPUT_TOLERANCE


def test_gradients_of_the_block() -> None:
    """Gradients of parameters, input and both first states, with resets, by the official backend of our block."""
    th.manual_seed(0)
    ours, official = Mamba2(64, mamba_backend="torch"), Mamba2(64, mamba_backend="official")
    official.load_state_dict(ours.state_dict())
    x = th.randn(3, 45, 64)
    masks = th.rand(3, 45) > 0.1
    state = warm_state(ours, 3, th.float32, th.Generator().manual_seed(0))
    results = [outcome(model, run_full, x, state, masks, 0) for model in (official, ours)]
    assert_near("gradients of the block", *results)


def encoder(mode: str = "mamba") -> EncoderV7:
    th.manual_seed(0)
    return EncoderV7(3, 16, mode=mode, d_state=16, headdim=8, chunk_size=4, mamba_backend="official")


@pytest.mark.parametrize("mode", ["mamba", "hybrid", "fusion"])
def test_contract(mode: str) -> None:
    """The contract in fp32: sequences in the official kernels against steps in PyTorch."""
    model = encoder(mode)
    generator = th.Generator().manual_seed(0)
    x = th.randn(3, 13, 3, generator=generator)
    verify_state(model, x)
    if mode == "mamba":
        verify_isolation(model, x, OUTPUT_TOLERANCE)
    state: State = warm_state(model, 3, th.float32, generator)
    masks = th.rand(3, 13, generator=generator) > 0.2
    for some_masks in (None, masks):
        got, want = (outcome(model, form, x, state, some_masks, 0) for form in (run_full, run_stepped))
        assert_near(f"contract of {mode}", got, want)


@pytest.mark.timeout(600)
def test_ratio_is_one() -> None:
    """Acting runs in PyTorch, training in the official kernels; the ratio in the first minibatch of an update is 1."""
    kwargs = {"d_state": 4, "headdim": 8, "chunk_size": 4, "mamba_backend": "official"}
    model = toy_model(
        n_steps=16,
        batch_size=48,
        n_epochs=1,
        seq_len=8,
        burn_in=3,
        policy_kwargs={"encoder": "mamba", "encoder_kwargs": kwargs},
    )
    updates = record_updates(model)
    model.learn(3 * 48)
    report("ratio_error", {str(index): update["train/ratio_error"] for index, update in enumerate(updates)})
    assert_exact_ratios(updates, 3)


def test_error_growth() -> None:
    """Errors against fp64 on the same numbers, the table of ``docs/mamba.md``."""
    functions = {"stepped": ssd_reference, "chunked": ssd_chunked, "official": run_official}
    rows = error_table(functions, steps=(64, 256), rows=1, heads=2)
    for row in rows:
        report("error growth", row)
        assert row["official output"] <= OUTPUT_TOLERANCE
        assert row["official gradient"] <= 1e-4


def test_the_package_can_be_imported_afterwards() -> None:
    """The import of the kernels leaves no replaced modules behind."""
    load_kernels()
    assert "mamba_ssm" not in sys.modules
