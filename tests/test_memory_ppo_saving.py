"""Saving, loading, copying and continued training of ``MemoryPPO``."""

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th

from sb3_cyborg import MemoryActorCriticPolicy, MemoryPPO
from tests.helpers import (
    assert_exact_ratios,
    predict,
    record_updates,
    same,
    small,
    toy_model,
    toy_vec_env,
    weights,
)


def test_same_seed_same_result() -> None:
    first, second, other = (toy_model(seed=seed, burn_in=2).learn(2 * 36) for seed in (3, 3, 4))
    assert same(weights(first.policy), weights(second.policy))
    assert not same(weights(first.policy), weights(other.policy))


def test_learn_continues_the_step_count() -> None:
    model = toy_model()
    model.learn(36)
    updates = record_updates(model)
    model.learn(2 * 36, reset_num_timesteps=False)
    assert model.num_timesteps == 3 * 36
    assert model._n_updates == 3 * 2
    assert_exact_ratios(updates, 2)
    model.learn(36)
    assert model.num_timesteps == 36


def test_set_env() -> None:
    model = toy_model()
    model.learn(36)
    updates = record_updates(model)
    model.set_env(toy_vec_env(seed=9))
    model.learn(36, reset_num_timesteps=False)
    assert_exact_ratios(updates)
    assert (model.rollout_buffer.episode_starts[0] == 1).all()
    with pytest.raises(AssertionError, match="number of environments"):
        model.set_env(toy_vec_env(2))


def test_get_and_set_parameters() -> None:
    first, second = toy_model(seed=1).learn(36), toy_model(seed=2)
    assert not same(weights(first.policy), weights(second.policy))
    parameters: Any = first.get_parameters()  # SB3 types the result and the argument differently
    second.set_parameters(parameters)
    assert same(weights(first.policy), weights(second.policy))
    state, other = (model.policy.optimizer.state_dict()["state"][0]["exp_avg"] for model in (first, second))
    assert th.equal(state, other)


@pytest.mark.parametrize("as_file", [False, True])
def test_save_and_load(tmp_path: Path, as_file: bool) -> None:
    policy_kwargs = {"memory": "pmm", "encoder": "lstm", "use_time": True}
    model = toy_model(burn_in=2, use_last_action=True, clip_range_vf=0.5, policy_kwargs=policy_kwargs)
    model.learn(36)
    target: Any = io.BytesIO() if as_file else tmp_path / "model"
    model.save(target)
    loaded = MemoryPPO.load(io.BytesIO(target.getvalue()) if as_file else target, device="cpu")
    assert same(weights(model.policy), weights(loaded.policy))
    assert (loaded.seq_len, loaded.burn_in, loaded.batch_size, loaded.memory_loss_coef) == (4, 2, 12, 1)
    assert loaded.num_timesteps == 36
    obs = np.random.default_rng(0).normal(size=(5, 4, 3)).astype(np.float32)
    state = again = None
    for step in obs:
        action, state = predict(model, step, state, deterministic=True)
        other, again = predict(loaded, step, again, deterministic=True)
        assert (action == other).all()
        assert all((state[name] == again[name]).all() for name in state)


def test_saving_omits_states_and_rollout(tmp_path: Path) -> None:
    model = toy_model().learn(36)
    assert {"_last_state", "rollout_buffer", "policy"} <= set(model._excluded_save_params())
    model.save(tmp_path / "model")
    loaded = MemoryPPO.load(tmp_path / "model", env=toy_vec_env(), device="cpu")
    assert same(loaded._last_state, model.policy.get_initial_state(3))


def test_custom_objects_and_arguments_of_load(tmp_path: Path) -> None:
    model = toy_model(normalize_value=False, policy_kwargs={"normalize_observations": False}).learn(36)
    model.save(tmp_path / "model")
    objects = {"learning_rate": 0.0, "lr_schedule": lambda _: 0.0, "clip_range": lambda _: 0.05}
    loaded = MemoryPPO.load(tmp_path / "model", env=toy_vec_env(), device="cpu", custom_objects=objects, n_epochs=3, seq_len=6)
    updates = record_updates(loaded)
    loaded.learn(36)
    assert same(weights(model.policy), weights(loaded.policy))  # at a learning rate of 0
    assert updates[0]["train/clip_range"] == pytest.approx(0.05)
    assert updates[0]["train/n_updates"] == 2 + 3
    assert loaded.rollout_buffer.seq_len == 6
    assert_exact_ratios(updates)


def test_a_policy_can_be_saved_and_loaded_without_its_model(tmp_path: Path) -> None:
    policy = toy_model(use_last_action=True, policy_kwargs={"encoder": "lstm", "lstm_hidden_size": 12, "memory": "kv"}).policy
    policy.save(str(tmp_path / "policy"))
    loaded = MemoryActorCriticPolicy.load(str(tmp_path / "policy"), device="cpu")
    assert same(weights(policy), weights(loaded))
    obs = np.ones((2, 3), np.float32)
    action, state = policy.predict(obs, deterministic=True)
    other, again = loaded.predict(obs, deterministic=True)
    assert (action == other).all()
    assert all((state[name] == again[name]).all() for name in state)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_policies_can_be_copied(how: str) -> None:
    policy = toy_model(policy_kwargs={"encoder": "lstm", "memory": "ring"}).policy
    twin = copy.deepcopy(policy) if how == "deepcopy" else pickle.loads(pickle.dumps(policy))
    obs = np.ones((2, 3), np.float32)
    _, state = policy.predict(obs, deterministic=True)
    _, again = twin.predict(obs, deterministic=True)
    assert all((state[name] == again[name]).all() for name in state)
    before = weights(policy)
    with th.no_grad():
        for parameter in twin.parameters():
            parameter += 1
    assert same(before, weights(policy))
    _, moved = twin.predict(obs, deterministic=True)
    assert not all((state[name] == moved[name]).all() for name in state), "the copy still computes with the original's weights"


def test_a_saved_policy_keeps_amp(tmp_path: Path) -> None:
    model = toy_model(amp=True)
    model.policy.save(str(tmp_path / "policy"))
    loaded = MemoryActorCriticPolicy.load(str(tmp_path / "policy"), device="cpu")
    assert loaded.amp
    state = loaded.get_initial_state(3)
    obs, starts = th.randn(3, 3), th.ones(3)
    with th.no_grad():
        assert th.equal(loaded.predict_values(obs, state, starts), model.policy.predict_values(obs, state, starts))


@pytest.mark.parametrize("through", ["argument", "policy_kwargs"])
def test_amp_can_be_set_in_two_places_and_changed_on_loading(through: str, tmp_path: Path) -> None:
    model = toy_model(amp=True) if through == "argument" else toy_model(policy_kwargs={"amp": True})
    assert model.amp
    assert model.policy.amp
    model.save(tmp_path / "model")
    assert MemoryPPO.load(tmp_path / "model", device="cpu").policy.amp
    assert not MemoryPPO.load(tmp_path / "model", device="cpu", amp=False).policy.amp


def test_default_sizes_are_attributes_and_printed_once(capsys: pytest.CaptureFixture[str]) -> None:
    model = MemoryPPO("MlpPolicy", toy_vec_env(4), policy_kwargs=small(), verbose=1, device="cpu")
    assert (model.n_steps, model.batch_size, model.seq_len) == (512, 512, 64)
    assert capsys.readouterr().out.count("Rollouts of n_steps=512 in 4 environments, minibatches of batch_size=512") == 1
    quiet = MemoryPPO("MlpPolicy", toy_vec_env(4), policy_kwargs=small(), device="cpu")
    assert capsys.readouterr().out == ""
    assert quiet.batch_size == 512


def test_default_sizes_are_chosen_again_for_another_number_of_environments(tmp_path: Path) -> None:
    model = MemoryPPO("MlpPolicy", toy_vec_env(4), policy_kwargs=small(), device="cpu")
    model.save(tmp_path / "model")
    loaded = MemoryPPO.load(tmp_path / "model", env=toy_vec_env(1), device="cpu")
    assert (loaded.n_steps, loaded.batch_size, loaded.seq_len) == (512, 128, 64)
    given = MemoryPPO.load(tmp_path / "model", env=toy_vec_env(1), device="cpu", batch_size=256, seq_len=32)
    assert (given.n_steps, given.batch_size, given.seq_len) == (512, 256, 32)
    given.save(tmp_path / "given")
    again = MemoryPPO.load(tmp_path / "given", env=toy_vec_env(2), device="cpu")
    assert (again.batch_size, again.seq_len) == (256, 32), "an explicit size is kept"


@pytest.mark.parametrize("burn_in", [12, 100_000])
def test_a_burn_in_as_long_as_the_rollout_is_refused(burn_in: int) -> None:
    with pytest.raises(ValueError, match=rf"`burn_in`={burn_in} must be less than `n_steps`=12"):
        toy_model(burn_in=burn_in)
