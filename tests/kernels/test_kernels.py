"""The kernels against PyTorch: the same results and gradients for all sizes, and no mixture of rows."""

import copy
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch as th
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from sb3_cyborg import MemoryPPO
from sb3_cyborg.encoders.encoder_v7 import ENCODERS
from sb3_cyborg.encoders.gru import GRU
from sb3_cyborg.encoders.lstm import LSTM
from sb3_cyborg.kernels import primitives as kernels
from sb3_cyborg.kernels import status
from sb3_cyborg.memories.memory_v7 import MEMORIES
from sb3_cyborg.ops.linear import FusedSequential, Projection
from sb3_cyborg.ops.window_attention import ExtraEntries, StepRead, block_starts, window_attention, window_attention_reference
from sb3_cyborg.sequence_model import SequenceModel, select_only
from sb3_cyborg.testing import outcome, run_full, run_stepped, warm_state
from tests.helpers import toy_model
from tests.test_select_only import make_stack

few = settings(max_examples=40, deadline=None)


@pytest.fixture(autouse=True)
def in_use(library: Path) -> None:
    """Without kernels the tests would compare PyTorch with itself."""
    assert status().isa is not None


def relative_error(got: th.Tensor, want: th.Tensor) -> float:
    scale = max(1.0, want.abs().max().item()) if want.numel() else 1.0
    return (got - want).abs().max().item() / scale if want.numel() else 0.0


# --- acting -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MEMORIES)
@pytest.mark.parametrize("mode", ENCODERS)
def test_acting_equals_the_form_of_pytorch(mode: str, kind: str) -> None:
    model, state = make_stack(mode, kind).eval(), make_stack(mode, kind).get_initial_state(5)
    other = dict(state)
    generator = th.Generator().manual_seed(0)
    with th.no_grad():
        for _ in range(30):
            x = th.randn(5, model.input_dim, generator=generator)
            mask = (th.rand(5, 3, generator=generator) > 0.15)[:, 1]  # a column, as sequences of masks have them
            got, state, _ = model.forward_step(x, state, mask)
            with select_only():
                want, other, _ = model.forward_step(x, other, mask)
            assert relative_error(got, want) < 1e-5
            for name, leaf in state.items():
                assert relative_error(leaf, other[name]) < 1e-5, name


@pytest.mark.parametrize("rows", [1, 2, 13])
@pytest.mark.parametrize("cell", [GRU, LSTM])
def test_a_nan_stays_in_its_row_and_a_reset_ends_it(cell: type[GRU] | type[LSTM], rows: int) -> None:
    model = cell(5, 7)
    x, state = th.randn(rows, 5), model.get_initial_state(rows)
    dirty = {name: leaf.index_fill(0, th.tensor([0]), float("nan")) for name, leaf in state.items()}
    with th.no_grad():
        clean, _, _ = model.forward_step(x, state, None)
        got, _, _ = model.forward_step(x, dirty, None)
        reset, _, _ = model.forward_step(x, dirty, th.arange(rows) > 0)
    assert got[0].isnan().all()
    assert th.equal(got[1:], clean[1:])
    assert th.equal(reset, clean)


@few
@given(rows=st.integers(1, 20), depth=st.integers(1, 70), width=st.integers(1, 70), silu=st.booleans())
def test_projections_of_any_size(rows: int, depth: int, width: int, silu: bool) -> None:
    projection, heads = Projection(depth, width, silu), FusedSequential(nn.Linear(depth, width), nn.ReLU())
    x = th.randn(rows, depth)
    for module in (projection, heads):
        want = module(x)
        with th.no_grad():
            assert relative_error(module(x), want) < 2e-5


@pytest.mark.parametrize("size", [1, 3, 16, 33, 128])
def test_activations_of_any_value(size: int) -> None:
    values = th.cat([th.linspace(-120, 120, 4 * size), th.tensor([float("nan"), float("inf"), -float("inf"), 0.0, 1e-30])])
    for module, function in ((nn.Tanh(), th.tanh), (nn.ReLU(), th.relu)):
        layer = nn.Linear(1, 1)
        with th.no_grad():
            layer.weight.fill_(1.0)
            layer.bias.zero_()
            got = FusedSequential(layer, module)(values.unsqueeze(1)).squeeze(1)
        th.testing.assert_close(got, function(values), rtol=1e-6, atol=1e-7, equal_nan=True)


# --- training -----------------------------------------------------------------------------------------------------------


@few
@given(
    cell=st.sampled_from([GRU, LSTM]),
    rows=st.integers(2, 18),
    steps=st.integers(1, 9),
    width=st.integers(1, 40),
    resets=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_recurrent_layers_of_any_size(
    cell: type[GRU] | type[LSTM], rows: int, steps: int, width: int, resets: bool, seed: int
) -> None:
    """Outputs, states and all gradients in fp32 against stepping in fp64, which is PyTorch's."""
    generator = th.Generator().manual_seed(seed)
    model = cell(3, width)
    exact = copy.deepcopy(model).double()
    x = th.randn(rows, steps, 3, generator=generator)
    masks = th.rand(rows, steps, generator=generator) > 0.3 if resets else None
    state = warm_state(model, rows, th.float32, generator)
    assert kernels.usable(x)
    got = outcome(model, run_full, x, state, masks, seed)
    # The functional is random in the precision of its numbers, so both runs get the one of fp64.
    want = gradients(exact, run_stepped, x.double(), {name: leaf.double() for name, leaf in state.items()}, masks)
    ours = gradients(model, run_full, x, state, masks)
    assert got.keys() >= set(want) - {"loss"}
    for name, tensor in want.items():
        assert relative_error(ours[name].double(), tensor) < 2e-5, name


def gradients(
    model: SequenceModel, run: Callable[..., Any], x: th.Tensor, state: dict[str, th.Tensor], masks: th.Tensor | None
) -> dict[str, th.Tensor]:
    """:return: Output, and the gradients of the sum of its squares, of parameters, input and first state."""
    x = x.detach().clone().requires_grad_()
    leaves = {name: leaf.detach().clone().requires_grad_() for name, leaf in state.items()}
    model.zero_grad()
    output, final = run(model, x, leaves, masks)
    (output.square().sum() + sum(leaf.sin().sum() for leaf in final.values())).backward()
    found = {f"gradient of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    found |= {f"gradient of the first state {name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    assert x.grad is not None
    return {"output": output.detach(), "gradient of the input": x.grad, **found}


@few
@given(
    rows=st.integers(1, 3),
    steps=st.integers(1, 20),
    window=st.integers(1, 20),
    heads=st.integers(1, 3),
    size=st.sampled_from([1, 2, 5, 16, 17, 31, 64, 128]),
    ages=st.booleans(),
    extras=st.integers(0, 3),
    seed=st.integers(0, 10**6),
)
def test_attention_of_any_size(
    rows: int, steps: int, window: int, heads: int, size: int, ages: bool, extras: int, seed: int
) -> None:
    generator = th.Generator().manual_seed(seed)

    def draw(*shape: int) -> th.Tensor:
        return th.randn(*shape, generator=generator, dtype=th.float64)

    blocks = len(block_starts(steps, window))
    tensors = {
        "query": draw(rows, steps, heads, size),
        "keys": draw(rows, steps + window, heads, size),
        "values": draw(rows, steps + window, heads, size),
        "null_key": draw(heads, size),
        "null_value": draw(heads, size),
    }
    if ages:
        tensors |= {"age_key": draw(heads, window, size), "age_bias": draw(heads, window)}
    if extras:
        tensors |= {
            "extra_keys": draw(rows, blocks, extras, heads, size),
            "extra_values": draw(rows, blocks, extras, heads, size),
        }
        tensors |= {"extra_bias": draw(heads, extras)}
    reach = th.randint(0, window + 3, (rows, steps), generator=generator).double()
    visible = th.rand(rows, steps, extras, generator=generator) > 0.4
    weight = draw(rows, steps, heads, size)

    def run(dtype: th.dtype, attention: Callable[..., Any]) -> tuple[th.Tensor, dict[str, th.Tensor], Any]:
        leaves = {name: tensor.to(dtype).requires_grad_() for name, tensor in tensors.items()}
        extra = None
        if extras:
            extra = ExtraEntries(leaves["extra_keys"], leaves["extra_values"], leaves["extra_bias"], visible)
        arguments = [leaves[name] for name in ("query", "keys", "values")]
        nulls = leaves["null_key"], leaves["null_value"]
        read = attention(*arguments, reach.to(dtype), *nulls, leaves.get("age_key"), leaves.get("age_bias"), extra)
        (read[0] * weight.to(dtype)).sum().backward()
        return read[0].detach(), {n: leaf.grad for n, leaf in leaves.items() if leaf.grad is not None}, read

    got, got_gradients, read = run(th.float32, window_attention)
    assert isinstance(read, StepRead)
    want, want_gradients, reference = run(th.float64, window_attention_reference)
    assert relative_error(got.double(), want) < 1e-5
    assert relative_error(read.null().double(), reference[2]) < 1e-5
    assert relative_error(th.cat([read.extra(), read.weights()], -1).double(), reference[1]) < 1e-5
    for name, gradient in want_gradients.items():
        assert relative_error(got_gradients[name].double(), gradient) < 2e-5, name


def test_no_gradient_passes_a_reset_even_if_it_is_nan() -> None:
    """An entry of a sound episode gets no NaN from the queries of one that is over."""
    query, keys, values = (th.randn(1, n, 2, 4) for n in (6, 9, 9))
    query[:, 3:] = float("nan")
    reach = th.tensor([[3.0, 3, 3, 0, 1, 2]])
    keys.requires_grad_()
    read = window_attention(query, keys, values, reach, th.zeros(2, 4), th.zeros(2, 4))
    read.context[:, :3].sum().backward()
    assert keys.grad is not None
    assert keys.grad[:, :6].isfinite().all()


# --- packed weights -----------------------------------------------------------------------------------------------------


def change_by(name: str, layer: nn.Module) -> Iterator[None]:
    """Yields after each of several changes of the weights."""
    parameters = list(layer.parameters())
    optimizers: dict[str, Callable[[], th.optim.Optimizer]] = {
        "fused": lambda: th.optim.Adam(parameters, lr=0.1, fused=True),
        "foreach": lambda: th.optim.Adam(parameters, lr=0.1, foreach=True),
        "sgd": lambda: th.optim.SGD(parameters, lr=0.1),
    }
    optimizer = optimizers[name]() if name in optimizers else None
    for _ in range(3):
        if optimizer is not None:
            for parameter in parameters:
                parameter.grad = th.randn_like(parameter)
            optimizer.step()
        elif name == "load_state_dict":
            layer.load_state_dict({key: th.randn_like(value) for key, value in layer.state_dict().items()})
        elif name == "vector":
            vector_to_parameters(th.randn_like(parameters_to_vector(parameters)), parameters)
        elif name == "data":
            for parameter in parameters:
                parameter.data = th.randn_like(parameter)
        else:
            for parameter in parameters:
                parameter.data.normal_()
            kernels.forget_packed()
        yield


@pytest.mark.parametrize("change", ["fused", "foreach", "sgd", "load_state_dict", "vector", "data", "in place"])
def test_changed_weights_are_packed_again(change: str) -> None:
    model, x = GRU(4, 6), th.randn(3, 4)
    state = {"h": th.randn(3, 6)}
    for _ in change_by(change, model):
        with th.no_grad():
            got, _, _ = model.forward_step(x, state)
            with select_only():
                want, _, _ = model.forward_step(x, state)
        assert relative_error(got, want) < 1e-5


def test_copies_of_a_model_have_packed_weights_of_their_own() -> None:
    model = toy_model()
    obs, starts = th.randn(3, 3), th.ones(3)
    state = model.policy.get_initial_state(3)
    with th.no_grad():
        before = model.policy.predict_values(obs, state, starts)
        other = copy.deepcopy(model.policy)
        for parameter in other.parameters():
            parameter.add_(0.1)
        assert not th.equal(other.predict_values(obs, state, starts), before)
        assert th.equal(model.policy.predict_values(obs, state, starts), before)


def test_saving_leaves_packed_weights_out(tmp_path: Path) -> None:
    model = toy_model().learn(36)
    model.save(tmp_path / "model")
    assert not any("pack" in name for name in model.policy.state_dict())
    loaded = MemoryPPO.load(tmp_path / "model", device="cpu")
    obs, state, starts = th.randn(3, 3), model.policy.get_initial_state(3), th.ones(3)
    with th.no_grad():
        assert th.equal(loaded.policy.predict_values(obs, state, starts), model.policy.predict_values(obs, state, starts))


def test_threads_share_the_kernels() -> None:
    """They release Python's global lock, and keep no state."""
    model, x = GRU(8, 32), th.randn(4, 40, 8)
    want, _, _ = model.forward_sequence(x, model.get_initial_state(4))
    results: list[th.Tensor] = []

    def work() -> None:
        for _ in range(20):
            results.append(model.forward_sequence(x, model.get_initial_state(4))[0].detach())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 80
    assert all(th.equal(result, want) for result in results)


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["avx2", "base", "off"])
def test_contract_and_ratio_hold_with_another_instruction_set(isa: str) -> None:
    """``off`` are the forms of PyTorch."""
    environment = {**os.environ, "SB3_CYBORG_KERNELS": isa}
    files = ["tests/test_contract.py", "tests/test_ratio.py", *([] if isa == "off" else ["tests/kernels/test_kernels.py"])]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-m",
        "not slow",
        "-k",
        "not long",
        "-p",
        "no:cacheprovider",
        *files,
    ]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1500, check=False)
    assert result.returncode == 0, result.stdout[-3000:]
