"""
Cases of data-parallel training for the tests: ranks, or one process with the environments and minibatches of all of them.

As a script, this is one rank: ``python -m tests.rank_cases <folder> <rank> <size> <case>...`` trains each case and writes the
results into ``<folder>/<rank>.pt``. The ranks find each other by a file in the folder.
"""

import datetime
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch as th

from sb3_cyborg import MemoryPPO
from sb3_cyborg.memory_ppo.ranks import Ranks, in_one_process
from sb3_cyborg.memory_ppo.rollout_buffer_v7 import RolloutBufferV7
from tests.helpers import record_updates, small, toy_vec_env, weights

UPDATES, N_STEPS, N_ENVS, SEQ_LEN, ROWS = 3, 24, 2, 6, 2
"""Per rank: environments, and sequences of a minibatch."""
TIMEOUT = 600.0
"""Seconds after which the ranks of a test are ended."""

STACKS: dict[str, dict[str, Any]] = {
    "gru-ring": {"encoder": "gru", "memory": "ring"},
    "lstm-pmm": {"encoder": "lstm", "memory": "pmm"},
    "mamba-slot": {
        "encoder": "mamba",
        "memory": "slot",
        "encoder_kwargs": {"headdim": 8, "d_state": 4, "chunk_size": 4},
    },
}


FP64 = " in fp64"
"""End of the name of a case in double precision."""


class Result(NamedTuple):
    """
    A training of one rank.

    :param weights: Parameters and buffers of the policy.
    :param steps: Optimizer steps of each update.
    :param ratio_errors: The largest |ratio - 1| of each update.
    :param num_timesteps: Environment steps of all ranks.
    """

    weights: dict[str, th.Tensor]
    steps: list[int]
    ratio_errors: list[float]
    num_timesteps: int


def rank_order(rank: int, epoch: int) -> th.Tensor:
    """:return: The order of the sequences of a rank in an epoch."""
    return th.randperm(N_STEPS // SEQ_LEN * N_ENVS, generator=th.Generator().manual_seed(100 * rank + epoch))


def joint_order(size: int, epoch: int) -> th.Tensor:
    """:return: The order of the sequences of one process whose minibatches are those of the ranks together."""
    minibatches = []
    for rank in range(size):
        own = rank_order(rank, epoch)
        chunk, env = own // N_ENVS, own % N_ENVS
        minibatches.append((chunk * size * N_ENVS + rank * N_ENVS + env).split(ROWS))
    return th.cat([part for parts in zip(*minibatches, strict=True) for part in parts])


def train(case: str, ranks: Ranks, size: int, patch: pytest.MonkeyPatch) -> Result:
    """
    Train a case, as one rank or as one process with the environments of ``size`` ranks.

    A case is ``<stack>`` or ``<stack>:<fault>``, in double precision with the suffix :data:`FP64`.

    Actions are the most probable ones: sampled ones would come from other random numbers in one process.
    """
    stack, _, fault = case.removesuffix(FP64).partition(":")
    alone = ranks.size == 1
    epochs = iter(range(10**6))
    order = partial(joint_order, size) if alone else partial(rank_order, ranks.rank)
    patch.setattr(RolloutBufferV7, "_order", lambda *_: order(next(epochs)))
    FAULTS[fault](patch, ranks)
    model = MemoryPPO(
        "MlpPolicy",
        toy_vec_env(N_ENVS * (size if alone else 1)),
        n_steps=N_STEPS,
        batch_size=SEQ_LEN * ROWS * size,
        seq_len=SEQ_LEN,
        burn_in=9,
        n_epochs=4,
        learning_rate=1e-3,
        target_kl=3e-4,
        seed=7,
        device="cpu",
        policy_kwargs=small(**STACKS[stack]),
    )
    assert model.ranks == ranks
    patch.setattr(model.policy, "forward", partial(model.policy.forward, deterministic=True))
    if case.endswith(FP64):
        use_float64(model, patch)
    if fault == "moments of a rank":
        model._scales.reduce = in_one_process
    if fault == "advantages of a rank":
        model.rollout_buffer.reduce = None
    steps: list[int] = []
    updates = record_updates(model)
    optimizer_step = model.policy.optimizer.step

    def counted(*args: Any) -> Any:
        steps[-1] += 1
        return optimizer_step(*args)

    collect = model.collect_rollouts

    def collected(*args: Any, **options: Any) -> bool:
        steps.append(0)
        return collect(*args, **options)

    patch.setattr(model.policy.optimizer, "step", counted)
    patch.setattr(model, "collect_rollouts", collected)
    model.learn(UPDATES * N_STEPS * N_ENVS * size, log_interval=100)
    errors = [float(update["train/ratio_error"]) for update in updates]
    return Result(weights(model.policy), steps, errors, model.num_timesteps)


def use_float64(model: MemoryPPO, patch: pytest.MonkeyPatch) -> None:
    """Let a new model act and train in double precision: weights, states, and what the buffer stores of them."""
    model.policy.double()
    model._last_state = {name: _as_double(leaf) for name, leaf in model._last_state.items()}
    buffer = model.rollout_buffer
    buffer.states = {name: _as_double(leaf) for name, leaf in buffer.states.items()}
    for name in ("rewards", "values", "log_probs", "advantages", "returns"):
        patch.setattr(buffer, name, getattr(buffer, name).double())
    bootstrap = model._add_truncation_bootstrap
    patch.setattr(model, "_add_truncation_bootstrap", lambda rewards, *args: bootstrap(rewards.double(), *args))


def _as_double(tensor: th.Tensor) -> th.Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


# --- planted faults -------------------------------------------------------------------------------------------------------


def _none(patch: pytest.MonkeyPatch, ranks: Ranks) -> None:
    pass


def _local_kl(patch: pytest.MonkeyPatch, ranks: Ranks) -> None:
    patch.setattr(Ranks, "mean", lambda self, tensor: tensor if tensor.dim() == 0 else self.sum(tensor) / self.size)


def _clip_first(patch: pytest.MonkeyPatch, ranks: Ranks) -> None:
    average = Ranks.average_gradients

    def clipped(self: Ranks, parameters: Any) -> None:
        given = list(parameters)
        th.nn.utils.clip_grad_norm_(given, 0.5)
        average(self, given)

    patch.setattr(Ranks, "average_gradients", clipped)


def _other_order(patch: pytest.MonkeyPatch, ranks: Ranks) -> None:
    if ranks.rank == 1:
        epochs = iter(range(1000, 10**6))
        patch.setattr(RolloutBufferV7, "_order", lambda *_: rank_order(1, next(epochs)))


def _same_seeds(patch: pytest.MonkeyPatch, ranks: Ranks) -> None:
    patch.setattr(MemoryPPO, "set_random_seed", super(MemoryPPO, MemoryPPO).set_random_seed)


FAULTS: dict[str, Callable[[pytest.MonkeyPatch, Ranks], None]] = {
    "": _none,
    "moments of a rank": _none,
    "advantages of a rank": _none,
    "KL of a rank": _local_kl,
    "clipped before the sum": _clip_first,
    "another order": _other_order,
    "the same seeds": _same_seeds,
}
"""Faults by name: functions that plant them in a rank, before the model is made."""


# --- processes ------------------------------------------------------------------------------------------------------------


@contextmanager
def rank_processes(size: int, arguments: Callable[[int], list[str]]) -> Iterator[list[subprocess.Popen[str]]]:
    """:return: Processes with one thread each. They are killed at the end."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    processes = [
        subprocess.Popen(
            [sys.executable, *arguments(rank)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for rank in range(size)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def train_in_ranks(size: int, cases: list[str], folder: Path, limit: float = TIMEOUT) -> list[dict[str, Result]]:
    """
    :param size: Number of ranks.
    :param cases: Names of the cases.
    :param folder: Folder for the results.
    :param limit: Seconds after which the ranks are ended, with a ``TimeoutExpired``.
    :return: The results of each rank, by case.
    """
    with rank_processes(size, lambda rank: ["-m", "tests.rank_cases", str(folder), str(rank), str(size), *cases]) as processes:
        for process in processes:
            _, errors = process.communicate(timeout=limit)
            assert process.returncode == 0, errors
    return [{case: Result(*result) for case, result in th.load(folder / f"{rank}.pt").items()} for rank in range(size)]


def train_in_one_process(size: int, case: str) -> Result:
    """:return: The result of one process with the environments and the minibatches of ``size`` ranks."""
    with pytest.MonkeyPatch.context() as patch:
        return train(case, Ranks(), size, patch)


def main(folder: str, rank: str, size: str, *cases: str) -> None:
    th.set_num_threads(1)
    ranks = Ranks(int(rank), int(size))
    th.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=ranks.rank,
        world_size=ranks.size,
        timeout=datetime.timedelta(seconds=TIMEOUT / 10),
    )
    results = {}
    for case in cases:
        with pytest.MonkeyPatch.context() as patch:
            results[case] = tuple(train(case, ranks, ranks.size, patch))
    th.save(results, f"{folder}/{rank}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
