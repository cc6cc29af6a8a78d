"""A supervised task for each kind of memory, and the eviction rules of the persistent memory."""

from collections.abc import Callable, Sequence

import pytest
import torch as th
from torch import nn
from torch.nn import functional as F

from sb3_cyborg.encoders.gru import GRU
from sb3_cyborg.memories.memory_v7 import MEMORIES, MemoryV7, register_memory
from sb3_cyborg.memories.none import NoMemory
from sb3_cyborg.memories.pmm import PersistentMemory
from sb3_cyborg.memories.slot import SlotMemory
from sb3_cyborg.sequence_model import AUX_LOSS, SequenceModel, State
from sb3_cyborg.testing import verify_contract

Task = Callable[[th.Generator], tuple[th.Tensor, th.Tensor, th.Tensor]]
"""Samples inputs (B, T, D), targets (B, T), and the steps with a target, bool, (B, T)."""

ROWS, STEPS, SYMBOLS = 32, 48, 4


def _symbols(generator: th.Generator) -> th.Tensor:
    return th.randint(SYMBOLS, (ROWS, STEPS), generator=generator)


def copy_the_symbol_of_20_steps_ago(generator: th.Generator) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
    symbols = _symbols(generator)
    asked = th.arange(STEPS).expand(ROWS, -1) >= 20
    return F.one_hot(symbols, SYMBOLS).float(), symbols.roll(20, dims=1), asked


def recall_the_value_of_a_key(generator: th.Generator) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
    """Each of 8 keys is shown once, its value one step later; then keys are shown, and the targets are their values."""
    keys = 8
    values = th.randint(keys, (ROWS, keys), generator=generator)
    order = th.rand(ROWS, keys, generator=generator).argsort(dim=1)
    questions = th.randint(keys, (ROWS, STEPS - 2 * keys), generator=generator)
    x = th.zeros(ROWS, STEPS, 2 * keys + 1)
    x[:, 0 : 2 * keys : 2, :keys] = F.one_hot(order, keys).float()
    x[:, 1 : 2 * keys : 2, keys : 2 * keys] = F.one_hot(values.gather(1, order), keys).float()
    x[:, 2 * keys :, :keys] = F.one_hot(questions, keys).float()
    x[:, 2 * keys :, -1] = 1
    answers = th.cat([th.zeros(ROWS, 2 * keys, dtype=th.int64), values.gather(1, questions)], dim=1)
    return x, answers, x[..., -1] > 0


def recall_the_first_symbol(generator: th.Generator) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
    symbols = _symbols(generator)
    first = (th.arange(STEPS) == 0).float().expand(ROWS, -1)
    x = th.cat([F.one_hot(symbols, SYMBOLS).float(), first.unsqueeze(-1)], dim=-1)
    return x, symbols[:, :1].expand(-1, STEPS), first == 0


def recall_the_flagged_symbols(generator: th.Generator) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
    """Two of many symbols have a flag; later a flag is shown, and the target is its symbol."""
    symbols, flags, half = _symbols(generator), 2, STEPS // 2
    when = th.rand(ROWS, half, generator=generator).argsort(dim=1)[:, :flags]
    marks = F.one_hot(when, STEPS).transpose(1, 2).float()  # (B, T, flags)
    questions = th.randint(flags, (ROWS, STEPS), generator=generator)
    asked = th.arange(STEPS).expand(ROWS, -1) >= half
    asks = F.one_hot(questions, flags).float() * asked.unsqueeze(-1)
    x = th.cat([F.one_hot(symbols, SYMBOLS).float(), marks, asks], dim=-1)
    return x, symbols.gather(1, when).gather(1, questions), asked


def accuracy(model: SequenceModel, task: Task, updates: int = 250, learning_rate: float = 1e-2) -> float:
    """:return: Accuracy of a memory with a linear read-out on the last 20 training batches."""
    generator = th.Generator().manual_seed(0)
    head = nn.Linear(model.input_dim + model.output_dim, 8)
    optimizer = th.optim.Adam([*model.parameters(), *head.parameters()], lr=learning_rate)
    right: list[float] = []
    for _ in range(updates):
        x, answers, asked = task(generator)
        read, _, _ = model.forward_sequence(x, model.get_initial_state(len(x)))
        logits = head(th.cat([x, read], dim=-1))[asked]
        loss = F.cross_entropy(logits, answers[asked])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        right.append((logits.argmax(-1) == answers[asked]).float().mean().item())
        if len(right) > 5 and min(right[-5:]) > 0.99:
            return min(right[-5:])
    return sum(right[-20:]) / 20


CAPABILITIES: dict[str, tuple[Task, int]] = {
    "ring": (copy_the_symbol_of_20_steps_ago, 24),
    "kv": (recall_the_value_of_a_key, STEPS),
    "slot": (recall_the_first_symbol, 4),
    "pmm": (recall_the_flagged_symbols, 4),  # items persist through up to 47 others in 4 slots
}


@pytest.mark.parametrize("kind", CAPABILITIES)
def test_a_kind_learns_its_own_task(kind: str) -> None:
    th.manual_seed(0)
    task, num_slots = CAPABILITIES[kind]
    x, _, _ = task(th.Generator().manual_seed(1))
    memory = MemoryV7(x.shape[-1], kind, memory_dim=32, num_slots=num_slots, num_heads=4)
    assert accuracy(memory, task) > 0.98
    assert accuracy(MemoryV7(x.shape[-1], "none"), task, updates=100) < 0.6, "the task can be solved without a memory"


@pytest.mark.parametrize(("kind", "task"), [("kv", "ring"), ("slot", "ring"), ("ring", "kv"), ("ring", "slot"), ("kv", "pmm")])
def test_a_kind_does_not_learn_the_task_of_another(kind: str, task: str) -> None:
    """A memory of another kind and the same size does not reach the accuracy."""
    th.manual_seed(0)
    function, num_slots = CAPABILITIES[task]
    x, _, _ = function(th.Generator().manual_seed(1))
    options = {"num_first": 0} if kind == "ring" else {}  # only the window
    memory = MemoryV7(x.shape[-1], kind, memory_dim=32, num_slots=num_slots, num_heads=4, **options)
    assert accuracy(memory, function, updates=150) < 0.9


# --- eviction of the persistent memory --------------------------------------------------------------------------------


def gated(num_slots: int, **options: float) -> PersistentMemory:
    """A persistent memory whose gate is the sign of the first feature and whose item is the second feature."""
    memory = PersistentMemory(2, memory_dim=2, num_slots=num_slots, num_heads=1, **options)
    with th.no_grad():
        memory.write_gate.weight.copy_(th.tensor([[10.0, 0.0]]))
        memory.write_gate.bias.zero_()
        memory.item.weight.copy_(th.eye(2))
        memory.query.weight.zero_()
    return memory


def write_items(memory: PersistentMemory, gates: Sequence[float], state: State | None = None) -> State:
    """Process items 1, 2, 3... with gates of the given signs."""
    x = th.tensor([[[gate, index + 1.0] for index, gate in enumerate(gates)]])
    with th.no_grad():
        _, state, _ = memory.forward_sequence(x, memory.get_initial_state(1) if state is None else state)
    return state


def stored_items(state: State) -> set[int]:
    return {round(item) for item in state["items"][0, :, 1].tolist()} - {0}


def test_empty_slots_are_written_first_and_then_the_oldest_is_evicted() -> None:
    memory = gated(3)
    assert stored_items(write_items(memory, [-1])) == {1}
    assert stored_items(write_items(memory, [-1] * 3)) == {1, 2, 3}
    assert stored_items(write_items(memory, [-1] * 4)) == {2, 3, 4}
    assert stored_items(write_items(memory, [-1] * 7)) == {5, 6, 7}


def test_an_item_with_an_open_gate_persists() -> None:
    assert stored_items(write_items(gated(3), [-1, 1] + [-1] * 200)) == {2, 201, 202}


def test_a_closed_gate_evicts_no_used_item_and_an_open_one_the_least_used() -> None:
    memory = gated(2)
    full = write_items(memory, [1, 1])
    assert stored_items(write_items(memory, [-1], full)) == {1, 2}
    assert stored_items(write_items(memory, [1, 1, 1])) == {2, 3}


def test_reads_protect_an_item_from_eviction() -> None:
    """Attention above one half increases usage, and an item with more usage is not evicted."""
    memory = gated(2)
    with th.no_grad():
        memory.query.bias.copy_(th.tensor([0.0, 1.0]))
        memory.key.weight.copy_(th.tensor([[0.0, 0.0], [0.0, -40.0]]))  # attends to the smallest item
        memory.null_key.copy_(th.tensor([[0.0, -1000.0]]))  # and never to the null entry
    state = write_items(memory, [-1, -1, -1, -1, -1])
    assert 1 in stored_items(state), "read at every step"
    assert stored_items(write_items(gated(2), [-1] * 5)) == {4, 5}, "the same without reads"


def test_usage_decays_and_age_counts() -> None:
    state = write_items(gated(2, usage_decay=0.5), [1, -1, -1])
    by_item = {round(item): i for i, item in enumerate(state["items"][0, :, 1].tolist())}
    assert state["usage"][0, by_item[1]].item() == 0.25
    assert state["age"][0, by_item[1]].item() == 2
    assert state["age"][0, by_item[3]].item() == 0


def test_write_rate_returns_a_loss_that_trains_the_gate() -> None:
    memory = gated(2, write_rate=0.1)
    x = th.zeros(1, 4, 2)
    _, _, logs = memory.forward_sequence(x, memory.get_initial_state(1))
    assert logs[AUX_LOSS].item() == pytest.approx((0.5 - 0.1) ** 2)
    logs[AUX_LOSS].backward()
    gradient = memory.write_gate.bias.grad
    assert gradient is not None
    assert gradient.item() > 0, "a step against the gradient shuts the gate"


# --- all kinds --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sorted(MEMORIES.keys() - {"none", "slot"}))
def test_an_empty_memory_reads_the_null_vector(kind: str) -> None:
    memory = MEMORIES[kind](3, memory_dim=4, num_slots=3, num_heads=2)
    with th.no_grad():
        for parameter in memory.parameters():
            parameter.copy_(th.randn_like(parameter))
        reads = [memory.forward_step(th.randn(1, 3), memory.get_initial_state(1))[0] for _ in range(2)]
        out, null = memory.get_submodule("out"), memory.get_parameter("null_value")
    th.testing.assert_close(reads[0], reads[1])
    th.testing.assert_close(reads[0], out(null.flatten()).unsqueeze(0))


def test_an_empty_slot_memory_reads_the_null_vector() -> None:
    memory = SlotMemory(3, memory_dim=4, num_slots=3, num_heads=2)
    with th.no_grad():
        memory.null.normal_()
        read, _, _ = memory.forward_step(th.randn(1, 3), memory.get_initial_state(1))
        th.testing.assert_close(read, memory.out(memory.null.flatten()).unsqueeze(0))


def test_slots_are_bounded_by_the_written_items() -> None:
    memory = SlotMemory(3, memory_dim=4, num_slots=3, num_heads=2)
    x = th.randn(2, 200, 3)
    with th.no_grad():
        _, state, _ = memory.forward_sequence(x, memory.get_initial_state(2))
        assert state["slots"].abs().max() <= memory.item(x).abs().max() + 1e-6


@pytest.mark.parametrize("kind", MEMORIES)
def test_diagnostics_are_computed_in_training_mode_only(kind: str) -> None:
    memory = MemoryV7(8, kind)
    wanted = {"none": set(), "slot": {"write_strength"}, "pmm": {"write_strength"}}.get(kind, set())
    wanted |= set() if kind == "none" else {"read_entropy", "usage", "fill"}
    _, _, logs = memory.forward_sequence(th.randn(2, 5, 8), memory.get_initial_state(2))
    assert logs.keys() == wanted
    assert all(0 <= value.item() <= 1 for name, value in logs.items() if name != "read_entropy")
    memory.eval()
    assert memory.forward_sequence(th.randn(2, 5, 8), memory.get_initial_state(2))[2] == {}


def test_registered_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MEMORIES, "gru", NoMemory)  # so that the name is free again afterwards

    class GRUMemory(GRU):
        """A GRU as a memory."""

        def __init__(self, input_dim: int, width: int = 4) -> None:
            super().__init__(input_dim, width)

    register_memory("gru", GRUMemory)
    memory = MemoryV7(3, "gru", width=5)
    assert memory.output_dim == 5
    verify_contract(memory)
