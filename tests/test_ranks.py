"""Several ranks train as one process with the environments and the minibatches of all of them."""

import copy
import math
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CallbackList,
    CheckpointCallback,
    EvalCallback,
    EveryNTimesteps,
    ProgressBarCallback,
    StopTrainingOnMaxEpisodes,
)
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import VecNormalize

from sb3_cyborg.memory_ppo import ranks as ranks_module
from sb3_cyborg.memory_ppo.ranks import NormalizeMerger, Ranks, _new_sums, callbacks_of_rank, find_ranks, running_statistics
from sb3_cyborg.memory_ppo.rollout_buffer_v7 import plan_minibatches, plan_n_steps
from tests.helpers import RATIO_TOLERANCE, same, toy_model, toy_vec_env
from tests.rank_cases import FAULTS, FP64, STACKS, UPDATES, Result, train_in_one_process, train_in_ranks

TOLERANCE = 1e-6
"""Largest difference of a weight after three updates: rounding of float32."""


def difference(one: Result, other: Result) -> float:
    """:return: The largest difference of a weight or buffer of the policy."""
    return max((tensor - other.weights[name]).abs().max().item() for name, tensor in one.weights.items())


DOUBLE_TOLERANCE = 1e-10
"""The same in float64."""


def are_equal(of_ranks: list[Result], one: Result) -> bool:
    """:return: Whether the ranks are identical to each other, and equal one process up to rounding."""
    identical = all(same(of_ranks[0].weights, result.weights) for result in of_ranks)
    return identical and all(result.steps == one.steps for result in of_ranks) and difference(one, of_ranks[0]) <= TOLERANCE


def check(of_ranks: list[Result], one: Result, tolerance: float = TOLERANCE) -> None:
    """Assert that ranks equal one process, in three updates with burn-in of which at least one is stopped by its KL."""
    for result in of_ranks:
        assert same(of_ranks[0].weights, result.weights), "the ranks differ"
        assert result.steps == one.steps
        assert result.num_timesteps == one.num_timesteps
        assert max(result.ratio_errors) <= RATIO_TOLERANCE
    assert len(one.steps) == UPDATES
    assert difference(one, of_ranks[0]) <= tolerance


def test_two_ranks_equal_one_process(tmp_path: Path) -> None:
    results = train_in_ranks(2, ["gru-ring"], tmp_path)
    one = train_in_one_process(2, "gru-ring")
    check([of_rank["gru-ring"] for of_rank in results], one)
    assert 0 < min(one.steps) < max(one.steps), "the KL divergence stops an update"


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_equal_one_process(size: int, tmp_path: Path) -> None:
    cases = [*STACKS, *(stack + FP64 for stack in STACKS)]
    results = train_in_ranks(size, cases, tmp_path)
    steps = set()
    for case in cases:
        one = train_in_one_process(size, case)
        check([of_rank[case] for of_rank in results], one, DOUBLE_TOLERANCE if case.endswith(FP64) else TOLERANCE)
        steps |= set(one.steps)
    assert len(steps) > 1, "the KL divergence stops some updates"


@pytest.mark.slow
def test_planted_faults_are_found(tmp_path: Path) -> None:
    cases = [f"gru-ring:{fault}" for fault in FAULTS if fault not in ("", "KL of a rank")]
    results = train_in_ranks(2, cases, tmp_path)
    one = train_in_one_process(2, "gru-ring")
    for case in cases:
        assert not are_equal([of_rank[case] for of_rank in results], one), case


@pytest.mark.slow
def test_ranks_that_stop_at_their_own_kl_are_found(tmp_path: Path) -> None:
    """
    One rank ends its update earlier than the other, whose next collective then meets another one, or none. Two that do not
    match may wait for each other for ever. One case takes a few seconds.
    """
    one = train_in_one_process(2, "gru-ring")
    try:
        results = train_in_ranks(2, ["gru-ring:KL of a rank"], tmp_path, limit=90)
    except (AssertionError, subprocess.TimeoutExpired):
        return
    assert not are_equal([of_rank["gru-ring:KL of a rank"] for of_rank in results], one)


# --- ranks without processes ----------------------------------------------------------------------------------------------


def normalized(seed: int) -> VecNormalize:
    return VecNormalize(toy_vec_env(2, seed=seed))


def test_statistics_of_vec_normalize_are_those_of_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two merges of two ranks equal the statistics of all samples, in float64."""
    generator = np.random.default_rng(0)
    environments = [normalized(0), normalized(1)]
    mergers = [NormalizeMerger(env, Ranks()) for env in environments]
    want = copy.deepcopy(running_statistics(environments[0]))
    for rollout in range(2):
        for env in environments:
            for _ in range(5):
                samples = [1e3 + rollout + generator.normal(size=(4, 3)), generator.normal(size=4)]
                for statistics, wanted, values in zip(running_statistics(env), want, samples, strict=True):
                    statistics.update(values)
                    wanted.update(values)
        sums = [
            [part.ravel() for pair in zip(running_statistics(env), merger._common, strict=True) for part in _new_sums(*pair)]
            for env, merger in zip(environments, mergers, strict=True)
        ]
        total = sum(th.from_numpy(np.concatenate(parts)) for parts in sums)
        monkeypatch.setattr(Ranks, "sum", lambda _, own, total=total: total)
        for merger in mergers:
            merger.merge()
        for env in environments:
            for statistics, wanted in zip(running_statistics(env), want, strict=True):
                assert statistics.count == pytest.approx(wanted.count, rel=1e-12)
                np.testing.assert_allclose(statistics.mean, wanted.mean, rtol=1e-12)
                np.testing.assert_allclose(statistics.var, wanted.var, rtol=1e-9)


def test_statistics_that_are_not_updated_stay() -> None:
    env = normalized(0)
    env.obs_rms.update(np.ones((4, 3)) * [1, 2, 3])
    merger, before = NormalizeMerger(env, Ranks()), copy.deepcopy(running_statistics(env))
    merger.merge()
    for statistics, old in zip(running_statistics(env), before, strict=True):
        assert isinstance(statistics, RunningMeanStd)
        np.testing.assert_allclose(statistics.mean, old.mean)
        np.testing.assert_allclose(statistics.var, old.var)


def test_one_process_has_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ranks_module.LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert find_ranks(True) == Ranks(0, 1)
    assert toy_model().ranks == Ranks()


def test_the_ranks_of_a_launcher_are_found_and_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in zip(ranks_module.LAUNCHER_VARIABLES, ("1", "4", "localhost", "1"), strict=True):
        monkeypatch.setenv(name, value)
    assert find_ranks(True) == Ranks(1, 4)
    assert find_ranks(False) == Ranks()
    assert toy_model(distributed=False).ranks == Ranks()


def test_seeds_of_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Environments of two ranks have the seeds of one process with all of them; generators have the seed plus the rank."""
    for name, value in zip(ranks_module.LAUNCHER_VARIABLES, ("1", "2", "localhost", "1"), strict=True):
        monkeypatch.setenv(name, value)
    model = toy_model(toy_vec_env(3), n_steps=12, batch_size=24, seed=5)
    assert model.env is not None
    assert model.env._seeds == [8, 9, 10]
    model.set_random_seed(5)
    assert th.initial_seed() == 6
    unseeded = [toy_model(toy_vec_env(3), n_steps=12, batch_size=24, seed=None) for _ in range(2)]
    assert unseeded[0].env._seeds != unseeded[1].env._seeds  # type: ignore[union-attr]


def test_sizes_are_those_of_one_process_with_all_environments(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in zip(ranks_module.LAUNCHER_VARIABLES, ("0", "4", "localhost", "1"), strict=True):
        monkeypatch.setenv(name, value)
    model = toy_model(toy_vec_env(2), n_steps=None, batch_size=None, seq_len=None, verbose=1)
    assert model.n_steps == plan_n_steps(8, None)
    assert (model.seq_len, model.batch_size) == plan_minibatches(model.n_steps, 8, None, None, 4)
    assert (model.seq_len, model.batch_size) == plan_minibatches(model.n_steps, 8, None, None), "as one process has"
    assert "4 processes with n_envs=2 each, 8 environments in total" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("n_ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("batch_size", [None, 64, 1000])
@pytest.mark.parametrize("n_steps", [12, 128, 250])
def test_minibatches_are_divided_equally(n_steps: int, batch_size: int | None, n_ranks: int) -> None:
    seq_len, size = plan_minibatches(n_steps, 2 * n_ranks, None, batch_size, n_ranks)
    assert size % (seq_len * n_ranks) == 0
    assert n_steps % seq_len == 0
    assert size >= n_ranks * seq_len


def test_a_minibatch_that_cannot_be_divided_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`batch_size`=64 is not a multiple of `seq_len`=32 in each of 4 .*: 128 and 256"):
        plan_minibatches(64, 8, 32, 64, 4)


def test_parameters_without_a_gradient_take_part(monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = [th.nn.Parameter(th.zeros(2)), th.nn.Parameter(th.zeros(3)), th.nn.Parameter(th.ones(1), requires_grad=False)]
    parameters[0].grad = th.ones(2)
    monkeypatch.setattr(Ranks, "sum", lambda self, tensor: 2 * tensor + th.arange(5.0))
    Ranks(0, 2).average_gradients(parameters)
    gradients = [parameter.grad for parameter in parameters]
    assert gradients[0] is not None and gradients[0].tolist() == [1, 1.5]  # noqa: PT018
    assert gradients[1] is not None and gradients[1].tolist() == [1, 1.5, 2]  # noqa: PT018
    assert gradients[2] is None


def test_callbacks_that_write_run_on_rank_0() -> None:
    class Own(BaseCallback):
        def _on_step(self) -> bool:
            return True

    def all_kinds() -> list[BaseCallback]:
        evaluation = EvalCallback(toy_vec_env(1))
        every = EveryNTimesteps(10, CheckpointCallback(10, "x"))
        return [Own(), evaluation, ProgressBarCallback(), CallbackList([CheckpointCallback(10, "x"), Own()]), every]

    first = all_kinds()
    assert callbacks_of_rank(first, Ranks(0, 2)) is first
    kept: Any = callbacks_of_rank(all_kinds(), Ranks(1, 2))
    assert [type(callback) for callback in kept] == [Own, CallbackList, EveryNTimesteps]
    assert [type(callback) for callback in kept[1].callbacks] == [Own]
    assert kept[2].callback is None
    assert callbacks_of_rank(CheckpointCallback(10, "x"), Ranks(1, 2)) is None
    assert isinstance(callbacks_of_rank(StopTrainingOnMaxEpisodes(3), Ranks(1, 2)), StopTrainingOnMaxEpisodes)


def test_settings_that_differ_are_an_error_on_every_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ranks, "gather", lambda self, value: [value, {**value, "n_envs": 3}])
    with pytest.raises(ValueError, match=r"`n_envs` is 4 on rank 0 and 3 on rank 1"):
        Ranks(0, 2).check_equal({"n_envs": 4, "lr": math.pi})
