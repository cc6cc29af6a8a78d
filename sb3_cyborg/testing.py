"""
Tests of the :class:`~sb3_cyborg.sequence_model.SequenceModel` contract, for the models of this package and for your own.

To verify a memory (or an encoder) of your own::

    from sb3_cyborg.testing import verify_contract, verify_gradcheck
    verify_contract(MyMemory(input_dim=6))
    verify_gradcheck(MyMemory(input_dim=2))  # of tiny size: every element is perturbed

The first raises an ``AssertionError`` that names the run and the tensor that differ, the second PyTorch's ``GradcheckError``.
"""

import copy
from collections.abc import Callable

import torch as th

from sb3_cyborg.sequence_model import AUX_LOSS, Logs, SequenceModel, State

__all__ = ["verify_contract", "verify_gradcheck"]

Model = SequenceModel
Run = Callable[[Model, th.Tensor, State, th.Tensor | None], tuple[th.Tensor, State]]


def run_full(model: Model, x: th.Tensor, state: State, masks: th.Tensor | None) -> tuple[th.Tensor, State]:
    """:return: Outputs and final state of the sequence form."""
    output, state, _ = model.forward_sequence(x, state, masks)
    return output, state


def run_stepped(model: Model, x: th.Tensor, state: State, masks: th.Tensor | None) -> tuple[th.Tensor, State]:
    """:return: Outputs and final state of the step form, the reference."""
    output, state, _ = SequenceModel.forward_sequence(model, x, state, masks)
    return output, state


def chunked(lengths: list[int]) -> Run:
    """:return: A run of the sequence form over consecutive chunks of the given lengths, which sum to T."""

    def run(model: Model, x: th.Tensor, state: State, masks: th.Tensor | None) -> tuple[th.Tensor, State]:
        outputs, start = [], 0
        for length in lengths:
            part = slice(start, start + length)
            output, state, _ = model.forward_sequence(x[:, part], state, None if masks is None else masks[:, part])
            outputs.append(output)
            start += length
        assert start == x.shape[1]
        return th.cat(outputs, dim=1), state

    return run


def mask_patterns(batch_size: int, steps: int, generator: th.Generator) -> dict[str, th.Tensor | None]:
    """:return: Keep-masks (B, T) by name: no resets, resets at the first, last, every and random steps; rows differ."""
    none = th.ones(batch_size, steps, dtype=th.bool)
    first, last, all_but_one = none.clone(), none.clone(), th.zeros_like(none)
    first[::2, 0] = False
    last[:, -1] = False
    all_but_one[0] = True
    random = th.rand(batch_size, steps, generator=generator) > 0.15
    random[0, 0] = False
    return {"no mask": None, "first": first, "last": last, "every step": all_but_one, "random": random}


def random_chunks(steps: int, generator: th.Generator) -> list[int]:
    """:return: Random chunk lengths, each >= 1, that sum to ``steps``."""
    lengths: list[int] = []
    while sum(lengths) < steps:
        lengths.append(int(th.randint(1, max(2, steps // 2), (), generator=generator)))
    lengths[-1] -= sum(lengths) - steps
    return lengths


def warm_state(model: Model, batch_size: int, dtype: th.dtype, generator: th.Generator, reset_row: bool = True) -> State:
    """:return: The state after seven random steps, as graph leaves; row 1 is the initial state if ``reset_row``."""
    steps = 7
    x = th.randn(batch_size, steps, model.input_dim, dtype=dtype, generator=generator)
    with th.no_grad():
        _, state = run_stepped(model, x, model.get_initial_state(batch_size), None)
        if reset_row:
            keep = th.ones(batch_size, dtype=th.bool)
            keep[1] = False
            state = model.reset_states(state, keep)
    return {name: leaf.clone().requires_grad_() for name, leaf in state.items()}


def outcome(model: Model, run: Run, x: th.Tensor, state: State, masks: th.Tensor | None, seed: int) -> dict[str, th.Tensor]:
    """
    :return: Outputs, final state, and the gradients of a random linear function of both with respect to parameters, input and
        first state.
    """
    generator = th.Generator().manual_seed(seed)
    model.zero_grad()
    x = x.clone().requires_grad_()
    state = {name: leaf.detach().clone().requires_grad_() for name, leaf in state.items()}
    output, final = run(model, x, state, masks)
    results = {"output": output} | {f"final state {name}": leaf for name, leaf in final.items()}
    loss = th.zeros((), dtype=x.dtype)
    for result in results.values():
        if result.requires_grad:
            loss = loss + (result * th.randn(result.shape, dtype=result.dtype, generator=generator)).sum()
    if loss.requires_grad:
        loss.backward()
    for name, leaf in state.items():
        results[f"gradient of the first state {name}"] = leaf.grad if leaf.grad is not None else th.zeros_like(leaf)
    for name, parameter in model.named_parameters():
        results[f"gradient of {name}"] = parameter.grad if parameter.grad is not None else th.zeros_like(parameter)
    results["gradient of the input"] = x.grad if x.grad is not None else th.zeros_like(x)
    return {name: result.detach().clone() for name, result in results.items()}


def assert_close(got: dict[str, th.Tensor], want: dict[str, th.Tensor], tolerance: float, what: str) -> None:
    """
    Compare tensors by name.

    :param got: The tensors to test.
    :param want: The expected tensors.
    :param tolerance: Largest absolute error, relative to the largest absolute expected value if that is above 1.
    :param what: Name of the comparison, for messages.
    :raises AssertionError: for different names, shapes, dtypes or values.
    """
    assert got.keys() == want.keys(), what
    for name in want:
        assert got[name].shape == want[name].shape, f"{what}: {name} has shape {got[name].shape}, not {want[name].shape}"
        assert got[name].dtype == want[name].dtype, f"{what}: {name} has dtype {got[name].dtype}, not {want[name].dtype}"
        scale = max(1.0, want[name].abs().max().item()) if want[name].numel() else 1.0
        error = (got[name] - want[name]).abs().max().item() / scale if want[name].numel() else 0.0
        assert error <= tolerance, f"{what}: {name} differs by {error:.2e} > {tolerance:.0e}"


def verify_state(model: Model, x: th.Tensor) -> None:
    """
    Test the state: leaves are (B, ...), names, shapes and dtypes are constant, and nothing is changed in place.

    It also tests that a reset row equals the initial state and that diagnostics are detached 0-d tensors.
    """
    batch_size = x.shape[0]
    initial = model.get_initial_state(batch_size, x.device)
    assert all(leaf.shape[0] == batch_size for leaf in initial.values())
    assert not any(leaf.requires_grad for leaf in initial.values())
    x_before, before = x.clone(), {name: leaf.clone() for name, leaf in initial.items()}
    _, stepped, step_logs = model.forward_step(x[:, 0], initial, th.ones(batch_size, dtype=th.bool))
    _, final, logs = model.forward_sequence(x, initial, th.ones(x.shape[:2], dtype=th.bool))
    for state in (stepped, final, model.reset_states(final, th.zeros(batch_size, dtype=th.bool)), model.detach_states(final)):
        assert {name: (leaf.shape, leaf.dtype) for name, leaf in state.items()} == {
            name: (leaf.shape, leaf.dtype) for name, leaf in initial.items()
        }
    assert th.equal(x, x_before)
    assert all(th.equal(initial[name], before[name]) for name in initial)
    assert not any(leaf.requires_grad for leaf in model.detach_states(final).values())
    reset = model.reset_states(final, th.zeros(batch_size, dtype=th.bool))
    assert all(th.equal(reset[name], initial[name]) for name in initial), "a reset row is not the initial state"
    for name, value in (step_logs | logs).items():
        assert value.dim() == 0, name
        assert name == AUX_LOSS or not value.requires_grad, name
    assert step_logs.keys() == logs.keys()


def verify_isolation(model: Model, x: th.Tensor, tolerance: float) -> None:
    """Test that an episode does not affect the next one and that batch rows do not affect each other, even by NaN or inf."""
    batch_size, steps = x.shape[:2]
    reset_at = steps // 2
    masks = th.ones(batch_size, steps, dtype=th.bool)
    masks[:, reset_at] = False
    with th.no_grad():
        state = model.get_initial_state(batch_size)
        for run in (run_full, run_stepped):
            clean, clean_state = run(model, x, state, masks)
            for poison in (float("nan"), float("inf"), 1e6):
                dirty_x = x.clone()
                dirty_x[:, :reset_at] = dirty_x[:, :reset_at] * poison if poison == 1e6 else poison
                dirty, dirty_state = run(model, dirty_x, state, masks)
                what = f"{run.__name__}, {poison} before a reset"
                assert_close({"output": dirty[:, reset_at:]}, {"output": clean[:, reset_at:]}, tolerance, what)
                assert_close(dirty_state, clean_state, tolerance, what)
            poisoned = {name: th.full_like(leaf, float("nan")) for name, leaf in state.items()}
            first = th.ones_like(masks)
            first[:, 0] = False
            after_nan, _ = run(model, x, poisoned, first)
            from_clean, _ = run(model, x, state, first)
            assert_close({"output": after_nan}, {"output": from_clean}, tolerance, "NaN state before a reset")
            # A NaN in the last row must not change the other rows.
            dirty_x = x.clone()
            dirty_x[-1] = float("nan")
            dirty, dirty_state = run(model, dirty_x, state, masks)
            assert_close({"output": dirty[:-1]}, {"output": clean[:-1]}, tolerance, "a NaN row beside")
            assert_close(
                {name: leaf[:-1] for name, leaf in dirty_state.items()},
                {name: leaf[:-1] for name, leaf in clean_state.items()},
                tolerance,
                "a NaN row beside",
            )


def verify_contract(model: Model, *, steps: int = 13, batch_size: int = 4, seed: int = 0) -> None:
    """
    Verify the contract of a sequence model, in fp64 (to 1e-10) and fp32 (to 1e-5).

    The sequence form, the step form and random chunks must agree in outputs, final state and gradients, with resets at the
    first, last, every and random steps. An episode must not affect the next one, and batch rows must not affect each other.

    :param model: The model; a copy of it is tested.
    :param steps: Steps T of the sequences, >= 1; T = 1 is always tested, too. Choose it larger than the model's chunks or
        windows.
    :param batch_size: Rows B, >= 2.
    :param seed: Seed of inputs, masks and chunk lengths.
    :raises AssertionError: if the model breaks the contract, with the run and the tensor that differ.
    """
    for dtype, tolerance in ((th.float64, 1e-10), (th.float32, 1e-5)):
        candidate = copy.deepcopy(model).to(dtype)
        generator = th.Generator().manual_seed(seed)
        for length in (steps, 1):
            x = th.randn(batch_size, length, model.input_dim, dtype=dtype, generator=generator)
            verify_state(candidate, x)
            state = warm_state(candidate, batch_size, dtype, generator)
            for name, masks in mask_patterns(batch_size, length, generator).items():
                want = outcome(candidate, run_stepped, x, state, masks, seed)
                what = f"{dtype}, T={length}, resets: {name}"
                assert_close(outcome(candidate, run_full, x, state, masks, seed), want, tolerance, f"{what}, full")
                lengths = random_chunks(length, generator)
                assert_close(
                    outcome(candidate, chunked(lengths), x, state, masks, seed), want, tolerance, f"{what}, chunks {lengths}"
                )
            if length > 1:
                verify_isolation(candidate, x, tolerance)


def verify_gradcheck(model: Model, *, steps: int = 4, seed: int = 0) -> None:
    """
    Verify the gradients of the sequence form against finite differences (``torch.autograd.gradcheck``), in fp64.

    :param model: A tiny model, since every element is perturbed; a copy of it is tested.
    :param steps: Steps T of the sequence, >= 1.
    :param seed: Seed of inputs and state.
    :raises torch.autograd.gradcheck.GradcheckError: if a gradient with respect to inputs, first state or parameters is wrong.
    """
    candidate = copy.deepcopy(model).double()
    generator = th.Generator().manual_seed(seed)
    x = th.randn(2, steps, model.input_dim, dtype=th.float64, generator=generator, requires_grad=True)
    masks = th.ones(2, steps, dtype=th.bool)
    masks[0, steps // 2] = False
    state = warm_state(candidate, 2, th.float64, generator, reset_row=False)
    names = [name for name, _ in candidate.named_parameters()]

    # Counters (ages, fill levels) are piecewise constant: finite differences do not apply, so they are held fixed.
    smooth = {name: leaf for name, leaf in state.items() if name.rsplit(".")[-1] not in model_counters(candidate)}
    fixed = {name: leaf.detach() for name, leaf in state.items() if name not in smooth}

    def function(x: th.Tensor, *values: th.Tensor) -> tuple[th.Tensor, ...]:
        first = dict(zip(smooth, values[: len(smooth)], strict=True)) | fixed
        parameters = dict(zip(names, values[len(smooth) :], strict=True))
        named = {f"model.{name}": value for name, value in parameters.items()}
        output, final, _ = th.func.functional_call(_Caller(candidate), named, (x, first, masks))
        return (output, *[leaf for leaf in final.values() if leaf.requires_grad])

    inputs = (x, *smooth.values(), *[p.detach().clone().requires_grad_() for p in candidate.parameters()])
    assert th.autograd.gradcheck(function, inputs, atol=1e-6, rtol=1e-4)


def model_counters(model: Model) -> set[str]:
    """:return: Names of state leaves that hold counts, see ``SequenceModel.counters``."""
    return {name for module in model.modules() if isinstance(module, SequenceModel) for name in module.counters}


class _Caller(th.nn.Module):
    """A module whose ``forward``, which ``functional_call`` runs, is the model's sequence form."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: th.Tensor, state: State, masks: th.Tensor) -> tuple[th.Tensor, State, Logs]:
        return self.model.forward_sequence(x, state, masks)
