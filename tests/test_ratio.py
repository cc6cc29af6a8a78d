"""
The probability ratio in the first minibatch of an update is 1: training starts from the states stored during the rollout.

The third update is tested, with several environments and random episode ends. On the first rollout, or with one environment,
faults of the stored state have no effect (cf. sb3-contrib #290).
"""

from collections.abc import Callable, Iterator
from typing import Any

import gymnasium as gym
import pytest
import torch as th

from sb3_cyborg import MemoryPPO
from sb3_cyborg.encoders.encoder_v7 import ENCODERS
from sb3_cyborg.memory_ppo.rollout_buffer_v7 import RolloutBufferV7, TrainingBatch
from sb3_cyborg.sequence_model import State
from tests.helpers import ACTION_SPACES, RATIO_TOLERANCE, VECTOR, ToyEnv, encoder_options, record_updates, stacks, toy_vec_env

UPDATES = 3


def ratio_errors(
    encoder: str, memory: str, burn_in: int, action_space: str, use_time: bool = False, **kwargs: Any
) -> list[float]:
    """:return: The largest |ratio - 1| of the first minibatch of each update; the minibatch is the whole rollout."""

    def make() -> gym.Env[Any, Any]:
        return ToyEnv(VECTOR, ACTION_SPACES[action_space], mean_length=9)

    memory_kwargs = {} if memory == "none" else {"num_slots": 5, "num_heads": 2}
    n_steps, n_envs = 24, 4
    model = MemoryPPO(
        "MlpPolicy",
        toy_vec_env(n_envs, make),
        n_steps=n_steps,
        batch_size=n_steps * n_envs,
        seq_len=6,
        burn_in=burn_in,
        n_epochs=2,
        learning_rate=3e-3,
        seed=0,
        device="cpu",
        policy_kwargs={
            "encoder": encoder,
            "memory": memory,
            "hidden_dim": 8,
            "net_arch": [8],
            "encoder_kwargs": encoder_options(encoder),
            "memory_kwargs": memory_kwargs,
            "use_time": use_time,
        },
        **kwargs,
    )
    updates = record_updates(model)
    model.learn(UPDATES * n_steps * n_envs, log_interval=100)
    assert len(updates) == UPDATES
    return [float(update["train/ratio_error"]) for update in updates]


@pytest.mark.parametrize("action_space", ["discrete", "box"])
@pytest.mark.parametrize("burn_in", [0, 9])  # 9 is more than a sequence, and no multiple of one
@stacks()
def test_ratio_is_one(encoder: str, memory: str, burn_in: int, action_space: str) -> None:
    errors = ratio_errors(encoder, memory, burn_in, action_space)
    assert errors[-1] <= RATIO_TOLERANCE, errors


@pytest.mark.parametrize("burn_in", [0, 9])
@pytest.mark.parametrize("action_space", ACTION_SPACES)
def test_ratio_is_one_with_the_last_action(action_space: str, burn_in: int) -> None:
    errors = ratio_errors("gru", "ring", burn_in, action_space, use_last_action=True)
    assert max(errors) <= RATIO_TOLERANCE, errors


@pytest.mark.parametrize("burn_in", [0, 9])
@pytest.mark.parametrize("memory", ["none", "ring"])
def test_ratio_is_one_with_use_time(memory: str, burn_in: int) -> None:
    errors = ratio_errors("gru", memory, burn_in, "discrete", use_time=True, use_last_action=True)
    assert max(errors) <= RATIO_TOLERANCE, errors


@pytest.mark.parametrize("burn_in", [0, 9])
def test_ratio_is_one_with_gsde(burn_in: int) -> None:
    errors = ratio_errors("gru", "kv", burn_in, "box", use_sde=True, sde_sample_freq=4)
    assert max(errors) <= RATIO_TOLERANCE, errors


@pytest.mark.parametrize("burn_in", [0, 9])
@pytest.mark.parametrize("encoder", ENCODERS)
def test_ratio_stays_near_one_with_amp(encoder: str, burn_in: int) -> None:
    """bf16 has three digits, and rounding differs between step and sequence form."""
    errors = ratio_errors(encoder, "ring", burn_in, "discrete", amp=True)
    assert errors[-1] <= 0.05, errors


def _zero_states(batch: TrainingBatch) -> None:
    batch["state"] = {name: th.zeros_like(leaf) for name, leaf in batch["state"].items()}


def _swap_environments(batch: TrainingBatch) -> None:
    batch["state"] = {name: leaf.roll(1, dims=0) for name, leaf in batch["state"].items()}


def _reset_one_step_late(batch: TrainingBatch) -> None:
    masks = batch["masks"]
    batch["masks"] = th.cat([th.ones_like(masks[:, :1]), masks[:, :-1]], dim=1)


def _never_reset(batch: TrainingBatch) -> None:
    batch["masks"] = th.ones_like(batch["masks"])


@pytest.mark.parametrize("burn_in", [0, 9])
@pytest.mark.parametrize(
    ("encoder", "memory"),
    [("gru", "none"), ("lstm", "ring"), ("mamba", "slot"), ("gru", "pmm"), ("mingru", "none"), ("trxl", "none")],
)
@pytest.mark.parametrize("fault", [_zero_states, _swap_environments, _reset_one_step_late, _never_reset])
def test_a_planted_fault_changes_the_ratio(
    monkeypatch: pytest.MonkeyPatch, fault: Callable[[TrainingBatch], None], encoder: str, memory: str, burn_in: int
) -> None:
    minibatches = RolloutBufferV7.minibatches

    def faulty(self: RolloutBufferV7, batch_size: int | None = None) -> Iterator[TrainingBatch]:
        for batch in minibatches(self, batch_size):
            fault(batch)
            yield batch

    monkeypatch.setattr(RolloutBufferV7, "minibatches", faulty)
    errors = ratio_errors(encoder, memory, burn_in, "discrete")
    assert errors[-1] > 10 * RATIO_TOLERANCE, errors


def test_a_state_stored_one_step_late_changes_the_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    """The buffer stores the state after the step instead of the one before it."""
    add: Callable[..., None] = RolloutBufferV7.add
    states: list[State] = []

    def late(self: RolloutBufferV7, *args: Any, **options: Any) -> None:
        states.append(args[-1])
        add(self, *args[:-1], states[-2] if len(states) > 1 else states[-1], **options)

    monkeypatch.setattr(RolloutBufferV7, "add", late)
    assert ratio_errors("gru", "none", 0, "discrete")[-1] > 10 * RATIO_TOLERANCE
