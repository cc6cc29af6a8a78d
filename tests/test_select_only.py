"""The select-only form: it equals the branching form, can be exported, and does not synchronize with the device."""

from collections import defaultdict
from typing import Any

import gymnasium as gym
import pytest
import torch as th
from hypothesis import given, settings
from hypothesis import strategies as st

from sb3_cyborg import MemoryPPO
from sb3_cyborg.encoders.encoder_v7 import ENCODERS
from sb3_cyborg.memories.memory_v7 import MEMORIES
from sb3_cyborg.memories.pmm import PersistentMemory, Slots, SlotTable
from sb3_cyborg.sequence_model import SequenceModel, Stack, State, may_branch, select_only
from sb3_cyborg.testing import verify_contract
from tests.device_waits import DeviceWaits
from tests.helpers import (
    ACTION_SPACES,
    RATIO_TOLERANCE,
    VECTOR,
    ToyEnv,
    record_updates,
    rollout,
    stacks,
    toy_model,
    toy_vec_env,
)
from tests.test_contract import STEPS, make_encoder, make_memory


def make_stack(mode: str, kind: str) -> Stack:
    encoder = make_encoder(mode)
    return Stack(encoder, make_memory(kind, encoder.output_dim + encoder.input_dim))


# --- the contract -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ENCODERS)
def test_encoders_keep_the_contract(mode: str) -> None:
    with select_only():
        verify_contract(make_encoder(mode), steps=STEPS)


@pytest.mark.parametrize("kind", MEMORIES)
def test_memories_keep_the_contract(kind: str) -> None:
    with select_only():
        verify_contract(make_memory(kind, 3), steps=STEPS)


@stacks("mode", "kind")
def test_select_only_and_branching_forms_agree(mode: str, kind: str) -> None:
    model = make_stack(mode, kind)
    x, masks = th.randn(4, STEPS, 3), th.rand(4, STEPS) > 0.2
    first = model.get_initial_state(4)
    usual = model.forward_sequence(x, first, masks)
    with select_only():
        assert not may_branch(x.device)
        output, state, _ = model.forward_sequence(x, first, masks)
    th.testing.assert_close(output, usual[0], rtol=0, atol=1e-5)
    for name, leaf in state.items():
        th.testing.assert_close(leaf, usual[1][name], rtol=0, atol=1e-5)


# --- the eviction of pmm ------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 4), slots=st.integers(1, 6), steps=st.integers(1, 20), seed=st.integers(0, 10**6))
def test_tensor_and_numpy_evictions_agree(rows: int, slots: int, steps: int, seed: int) -> None:
    generator = th.Generator().manual_seed(seed)
    shape = (rows, slots)
    occupied = th.rand(shape, generator=generator) > 0.5
    state = {
        "strength": occupied.float(),
        "usage": occupied * th.randint(0, 3, shape, generator=generator).float(),
        "age": occupied * th.randint(0, 9, shape, generator=generator).float(),
    }
    table, tensors = SlotTable(state, 0.9), Slots.of(state)
    for step in range(steps):
        keep = th.rand(rows, generator=generator) > 0.2
        dominant = th.rand(shape, generator=generator) > 0.7
        open_gate = th.rand(rows, generator=generator) > 0.5
        table.reset((~keep).numpy())
        table.update(dominant.numpy(), open_gate.numpy(), slots + step)
        tensors = tensors.reset(keep).update(dominant, open_gate, slots + step, 0.9)
        expected = table.slots()
        assert th.equal(tensors.occupied, expected.occupied)
        assert th.equal(tensors.item[tensors.occupied], expected.item[expected.occupied])
        th.testing.assert_close(tensors.usage, expected.usage)
        th.testing.assert_close(tensors.age, expected.age)


def test_tensor_and_numpy_evictions_agree_on_a_long_sequence() -> None:
    th.manual_seed(0)
    memory = PersistentMemory(3, memory_dim=8, num_slots=5, num_heads=2).eval()
    x, masks, first = th.randn(3, 150, 3) * 3, th.rand(3, 150) > 0.03, memory.get_initial_state(3)
    usual = memory.forward_sequence(x, first, masks)[1]
    with select_only():
        state = memory.forward_sequence(x, first, masks)[1]
    assert (state["usage"] > 0).any()
    for name in ("usage", "age"):
        assert th.equal(state[name], usual[name]), name


# --- export -------------------------------------------------------------------------------------------------------------


class Step(th.nn.Module):
    """The step form of a model as ``forward``, without diagnostics."""

    def __init__(self, model: SequenceModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: th.Tensor, state: State, mask: th.Tensor) -> tuple[th.Tensor, State]:
        output, state, _ = self.model.forward_step(x, state, mask)
        return output, state


def check_export(model: SequenceModel, strict: bool) -> None:
    """Assert that the exported step equals the model's, for any number of rows, with random resets."""
    model = model.eval()
    example = th.randn(4, model.input_dim), model.get_initial_state(4), th.tensor([True, False, True, True])
    rows = {0: th.export.Dim("rows", min=1, max=4096)}
    shapes = (rows, dict.fromkeys(example[1], rows), rows)
    with th.no_grad():
        exported = th.export.export(Step(model), example, dynamic_shapes=shapes, strict=strict).module()
        for count in (1, 4, 7):
            state = model.get_initial_state(count)
            for _ in range(12):
                x, mask = th.randn(count, model.input_dim), th.rand(count) > 0.3
                got, got_state = exported(x, state, mask)
                want, state, _ = model.forward_step(x, state, mask)
                th.testing.assert_close(got, want, rtol=0, atol=1e-5)
                assert got_state.keys() == state.keys()
                for name, leaf in state.items():
                    th.testing.assert_close(got_state[name], leaf, rtol=0, atol=1e-5)


@stacks("mode", "kind")
def test_the_step_of_every_stack_exports(mode: str, kind: str) -> None:
    check_export(make_stack(mode, kind), strict=False)


@pytest.mark.slow
@stacks("mode", "kind")
def test_the_step_of_every_stack_exports_in_strict_mode(mode: str, kind: str) -> None:
    check_export(make_stack(mode, kind), strict=True)


# --- synchronization with a GPU ---------------------------------------------------------------------------------------


def waiting_model(mode: str, kind: str, action_space: str, **settings: Any) -> MemoryPPO:
    def make() -> gym.Env[Any, Any]:
        return ToyEnv(VECTOR, ACTION_SPACES[action_space], mean_length=3)

    return toy_model(
        toy_vec_env(3, make),
        burn_in=3,
        use_last_action=True,
        log_barrier_coef=0.0 if action_space == "box" else 0.01,
        policy_kwargs={"encoder": mode, "memory": kind, "use_time": True},
        **settings,
    )


def update_waits(model: MemoryPPO) -> DeviceWaits:
    """:return: Operations that wait for the device in the minibatches of an update, including their sampling."""
    model = rollout(model)
    model.policy.set_training_mode(True)
    batches = model.rollout_buffer.minibatches(model.batch_size)
    terms = model._loss_terms(0.2, 0.2)
    stats: dict[str, list[th.Tensor]] = defaultdict(list)
    with DeviceWaits() as waits:
        for batch in batches:
            model._step(model._minibatch_loss(batch, terms, 0.2, stats), list(model.policy.parameters()))
    return waits


@pytest.mark.parametrize("action_space", ["discrete", "box"])
@stacks("mode", "kind")
def test_minibatches_do_not_wait_for_the_device(mode: str, kind: str, action_space: str) -> None:
    with select_only():
        assert not update_waits(waiting_model(mode, kind, action_space)).found


def acting_waits(model: MemoryPPO) -> DeviceWaits:
    """:return: Operations that wait for the device in a rollout, without its setup."""
    _, callback = model._setup_learn(model.n_steps * model.n_envs, None)
    assert model.env is not None
    with DeviceWaits() as waits:
        assert model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)
    return waits


@pytest.mark.parametrize("action_space", ["discrete", "box", "multi_discrete", "multi_binary"])
@pytest.mark.parametrize(("mode", "kind"), [("gru", "ring"), ("lstm", "pmm"), ("mamba", "slot"), ("fusion", "kv")])
def test_a_step_of_acting_waits_only_for_its_actions(mode: str, kind: str, action_space: str) -> None:
    """Episodes terminate and are truncated. One check of all log-probabilities at the end of a rollout does not count."""
    found = []
    with select_only():
        for n_steps in (12, 24):
            found.append(acting_waits(waiting_model(mode, kind, action_space, n_steps=n_steps)).found)
    assert found[1] - found[0] == {"cpu": 12, "numpy": 12}, found


def test_ratios_are_one_in_the_select_only_form() -> None:
    with select_only():
        for mode, kind in (("gru", "ring"), ("lstm", "pmm"), ("hybrid", "slot"), ("fusion", "kv")):
            model = waiting_model(mode, kind, "discrete")
            updates = record_updates(model)
            model.learn(3 * 36)
            assert all(update["train/ratio_error"] <= RATIO_TOLERANCE for update in updates), (mode, kind)


# --- the counter itself -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.any()),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.numpy(),
        lambda x: x.tolist(),
        lambda x: x.masked_select(x > 0),
        lambda x: x.double().to("cpu", th.float32),
    ],
)
def test_the_counter_detects_the_wait(wait: Any) -> None:
    with DeviceWaits() as waits:
        wait(th.randn(5))
    assert waits.found


@pytest.mark.parametrize(("mode", "kind"), [("gru", "none"), ("lstm", "none"), ("mamba", "none"), ("gru", "pmm")])
def test_the_counter_detects_branches_on_a_cpu(mode: str, kind: str) -> None:
    assert update_waits(waiting_model(mode, kind, "discrete")).found
    assert acting_waits(waiting_model(mode, kind, "discrete")).found["_local_scalar_dense"] > 1
