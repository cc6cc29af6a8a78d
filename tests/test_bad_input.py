"""Invalid input is refused with an error that has the value and values that would work."""

import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from sb3_contrib import RecurrentPPO
from stable_baselines3 import PPO
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_cyborg import MemoryPPO
from sb3_cyborg.checks import unknown_name
from tests.helpers import (
    OBSERVATION_SPACES,
    ToyEnv,
    assert_exact_ratios,
    predict,
    record_updates,
    same,
    toy_model,
    toy_vec_env,
    weights,
)

# --- sizes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "message", "works"),
    [
        ({"seq_len": 5}, "`seq_len`=5 does not divide `n_steps`=12; the nearest that do: 4 and 6", {"seq_len": 4}),
        ({"seq_len": 24}, "`seq_len`=24 does not divide `n_steps`=12; the nearest that do: 12", {"seq_len": 12}),
        (
            {"batch_size": 10},
            "`batch_size`=10 is not a multiple of `seq_len`=4; the nearest that are: 8 and 12",
            {"batch_size": 8},
        ),
        (
            {"batch_size": 3},
            "`batch_size`=3 is not a multiple of `seq_len`=4; the nearest that are: 4 and 8",
            {"batch_size": 4},
        ),
        ({"batch_size": 1}, "`batch_size` must be at least 2, got 1", {"batch_size": 2, "seq_len": None}),
        ({"batch_size": 1, "seq_len": None}, "`batch_size` must be at least 2, got 1", {"batch_size": 2, "seq_len": None}),
        ({"burn_in": -1}, "`burn_in` must be a whole number of at least 0, got -1", {"burn_in": 0}),
        ({"burn_in": 2.0}, "`burn_in` must be a whole number of at least 0, got 2.0", {"burn_in": 2}),
        ({"burn_in": None}, "`burn_in` must be a whole number of at least 0, got None", {"burn_in": 0}),
        ({"n_epochs": 0}, "`n_epochs` must be a whole number of at least 1, got 0", {"n_epochs": 1}),
        (
            {"clip_range_vf": 0},
            "or a schedule such as 'lin_3e-4', or None for no clipping, got 0",
            {"clip_range_vf": None},
        ),
        (
            {"clip_range_vf": -0.2},
            "`clip_range_vf` must be a positive number, a function of the progress remaining, or a schedule",
            {"clip_range_vf": 0.2},
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:You have specified a mini-batch size")
def test_invalid_sizes_are_refused(kwargs: dict[str, Any], message: str, works: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        toy_model(**kwargs)
    toy_model(**works)


@pytest.mark.parametrize("size", [0, -4, 4.0, "4", True])
@pytest.mark.parametrize("name", ["n_steps", "batch_size", "seq_len", "n_epochs"])
def test_sizes_that_are_no_positive_integers_are_refused(name: str, size: Any) -> None:
    none = "" if name == "n_epochs" else ", or None"
    with pytest.raises(ValueError, match=re.escape(f"`{name}` must be a whole number of at least 1{none}, got {size!r}")):
        toy_model(**{name: size})


@pytest.mark.parametrize("size", [0, -8, 8.0, "8", True])
@pytest.mark.parametrize("name", ["hidden_dim", "latent_dim", "num_layers", "memory_dim", "lstm_hidden_size", "n_lstm_layers"])
def test_network_sizes_that_are_no_positive_integers_are_refused(name: str, size: Any) -> None:
    none = "" if name in ("hidden_dim", "num_layers") else ", or None"
    with pytest.raises(ValueError, match=re.escape(f"`{name}` must be a whole number of at least 1{none}, got {size!r}")):
        toy_model(policy_kwargs={name: size})


@pytest.mark.parametrize("size", [0, -8, 8.0])
@pytest.mark.parametrize("name", ["num_slots", "num_heads", "memory_dim"])
@pytest.mark.parametrize("memory", ["ring", "slot", "kv", "pmm"])
def test_memory_sizes_that_are_no_positive_integers_are_refused(memory: str, name: str, size: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(f"`{name}` must be a whole number of at least 1, got {size!r}")):
        toy_model(policy_kwargs={"memory": memory, "memory_kwargs": {name: size}})


@pytest.mark.parametrize("memory", ["ring", "slot", "kv", "pmm"])
def test_heads_that_do_not_divide_memory_dim_are_refused(memory: str) -> None:
    message = "`num_heads`=3 does not divide `memory_dim`=8; the nearest that do: 2 and 4"
    with pytest.raises(ValueError, match=re.escape(message)):
        toy_model(policy_kwargs={"memory": memory, "memory_kwargs": {"num_heads": 3}})
    toy_model(policy_kwargs={"memory": memory, "memory_kwargs": {"num_heads": 2}})


def test_numpy_integers_are_accepted_as_sizes() -> None:
    model = toy_model(n_steps=np.int64(12), batch_size=np.int32(12), seq_len=np.int64(4), burn_in=np.int64(2))
    updates = record_updates(model)
    model.learn(36)
    assert_exact_ratios(updates)


# --- names --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy_kwargs", "message"),
    [
        (
            {"encoder": "gur"},
            "Unknown encoder 'gur'. Did you mean 'gru'? Known: 'fusion', 'gru', 'hybrid', 'lstm', 'mamba', 'mingru', 'trxl'",
        ),
        ({"encoder": "Mamba2"}, "Unknown encoder 'Mamba2'. Did you mean 'mamba'?"),
        ({"memory": "rign"}, "Unknown memory 'rign'. Did you mean 'ring'? Known: 'kv', 'none', 'pmm', 'ring', 'slot'"),
        ({"memory": None}, "Unknown memory None."),
        ({"hiden_dim": 8}, "Unknown option for policy_kwargs 'hiden_dim'. Did you mean 'hidden_dim'?"),
        ({"lstm_hidden_dim": 8}, "Unknown option for policy_kwargs 'lstm_hidden_dim'. Did you mean"),
        ({"num_slots": 8}, "Unknown option for policy_kwargs 'num_slots'."),
        ({"encoder_kwargs": {"d_state": 8}}, "Unknown option for encoder 'gru' 'd_state'. Known: none."),
        (
            {"memory": "ring", "memory_kwargs": {"num_slot": 8}},
            "option for memory 'ring' 'num_slot'. Did you mean 'num_slots'?",
        ),
        ({"memory": "none", "memory_kwargs": {"num_slots": 8}}, "Unknown option for memory 'none' 'num_slots'. Known: none."),
        ({"memory": "slot", "memory_kwargs": {"write_rate": 0.1}}, "Unknown option for memory 'slot' 'write_rate'."),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(policy_kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        toy_model(policy_kwargs=policy_kwargs)


@pytest.mark.parametrize(
    ("name", "hint"),
    [("MlpPolcy", "Did you mean 'MlpPolicy'?"), ("LstmPolicy", "Did you mean '"), ("mlp", "'MultiInputPolicy'")],
)
def test_unknown_policies_are_refused(name: str, hint: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"Unknown policy {name!r}.") + ".*" + re.escape(hint)):
        toy_model(policy=name)


def test_a_policy_without_memory_is_refused() -> None:
    with pytest.raises(ValueError, match=r"subclass of MemoryActorCriticPolicy.*'MlpPolicy'.*got ActorCriticPolicy"):
        toy_model(policy=ActorCriticPolicy)


@pytest.mark.parametrize("policy", ["MlpPolicy", "MlpLstmPolicy", "CnnPolicy", "CnnLstmPolicy"])
def test_dict_observations_need_multi_input(policy: str) -> None:
    with pytest.raises(ValueError, match="must use `MultiInputPolicy` when working with dict"):
        toy_model(ToyEnv(OBSERVATION_SPACES["dict"]), policy)


@pytest.mark.parametrize("kwargs", [{"rollout_buffer_class": list}, {"rollout_buffer_kwargs": {"a": 1}}])
def test_other_buffers_are_refused(kwargs: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="only RolloutBufferV7"):
        toy_model(**kwargs)


# --- non-finite values ------------------------------------------------------------------------------------------------

PAIR = spaces.Dict({"vector": spaces.Box(-1, 1, (3,)), "number": spaces.Discrete(3)})


class FaultyEnv(ToyEnv):
    """Returns one non-finite number at a given step; an episode ends there only if the fault is a terminal observation."""

    def __init__(self, fault: str, value: float, at: int, observation_space: spaces.Space[Any]) -> None:
        super().__init__(observation_space, mean_length=10**9)
        self.fault, self.value, self.at = fault, value, at
        self.steps = 0

    def corrupted(self, obs: Any) -> Any:
        array = (obs["vector"] if isinstance(obs, dict) else obs).copy()
        array[1] = self.value
        return obs | {"vector": array} if isinstance(obs, dict) else array

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        obs, info = super().reset(seed=seed, options=options)
        return (self.corrupted(obs) if self.fault == "reset" else obs), info

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        obs, reward, terminated, truncated, info = super().step(action)
        self.steps += 1
        if self.steps == self.at and self.fault != "reset":
            if self.fault == "reward":
                return obs, self.value, terminated, truncated, info
            return self.corrupted(obs), reward, terminated, self.fault == "terminal", info
        return obs, reward, terminated, truncated, info


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("fault", ["reset", "step", "terminal", "reward"])
@pytest.mark.parametrize("dictionary", [False, True])
def test_nonfinite_observations_and_rewards_are_refused(fault: str, value: float, dictionary: bool) -> None:
    space: spaces.Space[Any] = PAIR if dictionary else OBSERVATION_SPACES["box"]

    def healthy() -> gym.Env[Any, Any]:
        return ToyEnv(space)

    model = toy_model(toy_vec_env(3, healthy), "MultiInputPolicy" if dictionary else "MlpPolicy")
    model.learn(36)
    before = weights(model.policy)
    # The last of the environments, so that its index is not that of its row among the ones that ended.
    makers: list[Callable[[], gym.Env[Any, Any]]] = [healthy, healthy, lambda: FaultyEnv(fault, value, 5, space)]
    model.set_env(DummyVecEnv(makers))
    steps = 36 if fault == "reset" else 36 + 5 * 3
    what = "Reward" if fault == "reward" else "Observation 'vector'" if dictionary else "Observation"
    where = f"at the end of an episode, after {steps} steps," if fault == "terminal" else f"after {steps} steps"
    with pytest.raises(ValueError, match=re.escape(f"{what} of environment 2 {where} is not finite: it ")) as error:
        model.learn(10 * 36, reset_num_timesteps=False)
    assert str(value) in str(error.value)
    assert same(before, weights(model.policy))
    model.set_env(toy_vec_env(3, healthy))
    updates = record_updates(model)
    model.learn(2 * 36, reset_num_timesteps=False)
    assert_exact_ratios(updates, 2)


def test_a_nonfinite_last_observation_of_a_terminated_episode_is_ignored() -> None:
    """It is used only after a truncation."""

    class Ends(FaultyEnv):
        def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
            obs, reward, _, truncated, info = super().step(action)
            return obs, reward, truncated, False, info

    env = DummyVecEnv([lambda: Ends("terminal", np.nan, 5, OBSERVATION_SPACES["box"])])
    model = toy_model(env)
    updates = record_updates(model)
    model.learn(12)
    assert_exact_ratios(updates)
    assert model.rollout_buffer.episode_starts.sum() == 2


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nonfinite_observations_of_predict_are_refused(value: float) -> None:
    model = toy_model()
    obs = np.zeros((4, 3), np.float32)
    obs[2, 1] = value
    with pytest.raises(ValueError, match=f"Observation of environment 2 in `predict` is not finite: it holds {value}"):
        model.predict(obs)
    with pytest.raises(ValueError, match=f"Observation of environment 0 in `predict` is not finite: it holds {value}"):
        model.predict(obs[2])


# --- predict ------------------------------------------------------------------------------------------------------------


def test_states_of_another_structure_are_refused() -> None:
    model = toy_model()
    obs = np.zeros((3, 3), np.float32)
    _, state = predict(model, obs)
    shape = state["encoder.layer0.h"].shape
    message = f"`state['encoder.layer0.h']` has shape {shape}, but for 2 observations it must be {(2, *shape[1:])}"
    with pytest.raises(ValueError, match=re.escape(message)):
        predict(model, obs[:2], state)
    with pytest.raises(ValueError, match="for 1 observations it must be"):
        predict(model, obs[0], state)
    for wrong, name in (((np.zeros(3), np.zeros(3)), "tuple"), (np.zeros(3), "ndarray"), ([], "list")):
        with pytest.raises(
            ValueError, match=f"`state` must be the one that the last `predict`.*encoder.layer0.h.*got {name}; pass None"
        ):
            predict(model, obs, wrong)
    for keys in ({}, {"h": 0}, dict(list(state.items())[1:]), state | {"more": 0}):
        with pytest.raises(ValueError, match=re.escape(f"got {sorted(keys)}; pass None for the initial state")):
            predict(model, obs, keys)


def test_episode_starts_of_another_batch_size_are_refused() -> None:
    with pytest.raises(ValueError, match="`episode_start` has 2 rows, but there are 3 observations"):
        predict(toy_model(), np.zeros((3, 3), np.float32), None, np.ones(2, dtype=bool))


def test_a_tuple_of_gymnasium_reset_is_refused() -> None:
    env = ToyEnv()
    with pytest.raises(ValueError, match=r"tuple to predict.*obs, info = env.reset\(\)"):
        predict(toy_model(), env.reset(seed=0))


def test_observations_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match="Unexpected observation shape"):
        predict(toy_model(), np.zeros((3, 4), np.float32))


# --- files --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("bad_input") / "model.zip"
    toy_model(toy_vec_env(1)).learn(12).save(path)
    return path.read_bytes()


def test_files_of_other_algorithms_are_refused(tmp_path: Path) -> None:
    env = toy_vec_env(1)
    PPO("MlpPolicy", env, n_steps=8, batch_size=8, policy_kwargs={"net_arch": [4]}).save(tmp_path / "ppo")
    with pytest.raises(ValueError, match=r"ppo holds no MemoryPPO: load a model of another algorithm with that algorithm"):
        MemoryPPO.load(tmp_path / "ppo")
    with pytest.raises(ValueError, match=r"MemoryActorCriticPolicy.*got ActorCriticPolicy; load a model of another algorithm"):
        MemoryPPO.load(tmp_path / "ppo", trust=True)
    RecurrentPPO("MlpLstmPolicy", env, n_steps=8, policy_kwargs={"lstm_hidden_size": 4}).save(tmp_path / "recurrent")
    with pytest.raises(ValueError, match=r"recurrent holds no MemoryPPO: load a model of another algorithm"):
        MemoryPPO.load(tmp_path / "recurrent", env=env)
    with pytest.raises(ValueError, match=r"MemoryActorCriticPolicy.*got RecurrentActorCriticPolicy; load a model of another"):
        MemoryPPO.load(tmp_path / "recurrent", env=env, trust=True)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_truncated_files_are_refused(tmp_path: Path, saved: bytes, share: float) -> None:
    path = tmp_path / "model.zip"
    path.write_bytes(saved[: int(len(saved) * share)])
    with pytest.raises(ValueError, match=r"model\.zip"):
        MemoryPPO.load(path)


def test_files_of_random_bytes_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "noise.zip"
    path.write_bytes(np.random.default_rng(0).bytes(5000))
    with pytest.raises(ValueError, match=r"noise\.zip"):
        MemoryPPO.load(path)


@pytest.mark.parametrize("seed", range(12))
def test_damaged_files_are_refused_or_load_unchanged(tmp_path: Path, saved: bytes, seed: int) -> None:
    """A few bytes are changed: the file is refused as damaged, or loads with equal weights if they have no effect."""
    rng = np.random.default_rng(seed)
    damaged = np.frombuffer(saved, np.uint8).copy()
    damaged[rng.integers(0, len(damaged), 1 + 3 * seed)] ^= 0xFF
    path, whole = tmp_path / "model.zip", tmp_path / "whole.zip"
    path.write_bytes(damaged.tobytes())
    whole.write_bytes(saved)
    message = str(path)  # of the refusal
    try:
        loaded = MemoryPPO.load(path)
    except ValueError as error:
        message, loaded = str(error), MemoryPPO.load(whole)
    assert str(path) in message
    assert same(weights(loaded.policy), weights(MemoryPPO.load(whole).policy))


def rewritten(saved: bytes, path: Path, change: Callable[[dict[str, bytes]], object]) -> Path:
    """:return: The saved model with other members."""
    path.write_bytes(saved)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    change(members)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


@pytest.mark.parametrize("missing", ["data", "policy.pth", "policy.optimizer.pth"])
def test_files_with_a_missing_member_are_refused(tmp_path: Path, saved: bytes, missing: str) -> None:
    path = rewritten(saved, tmp_path / "model.zip", lambda members: members.pop(missing))
    with pytest.raises(ValueError, match=r"model\.zip|Names of parameters do not match agents' parameters"):
        MemoryPPO.load(path)


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"not json", b"\xff\xfe"])
def test_files_with_invalid_data_are_refused(tmp_path: Path, saved: bytes, content: bytes) -> None:
    path = rewritten(saved, tmp_path / "model.zip", lambda members: members.update(data=content))
    with pytest.raises(ValueError, match=r"model\.zip"):
        MemoryPPO.load(path)


def test_other_zip_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(ValueError, match=r"other\.zip"):
        MemoryPPO.load(path)


def test_weights_of_other_shapes_are_refused(tmp_path: Path, saved: bytes) -> None:
    other = tmp_path / "other.zip"
    toy_model(toy_vec_env(1), policy_kwargs={"hidden_dim": 12}).save(other)
    with zipfile.ZipFile(other) as archive:
        policy = archive.read("policy.pth")
    path = rewritten(saved, tmp_path / "model.zip", lambda members: members.update({"policy.pth": policy}))
    with pytest.raises(ValueError, match=r"model\.zip(.|\n)*size mismatch"):
        MemoryPPO.load(path)


def test_a_missing_file_raises_file_not_found(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        MemoryPPO.load(tmp_path / "nothing")


def test_environments_with_other_spaces_are_refused(tmp_path: Path, saved: bytes) -> None:
    path = rewritten(saved, tmp_path / "model.zip", lambda members: None)
    with pytest.raises(ValueError, match="Observation spaces do not match"):
        MemoryPPO.load(path, env=toy_vec_env(1, lambda: ToyEnv(OBSERVATION_SPACES["discrete"])))


def test_an_unknown_name_lists_few_of_many_known_ones() -> None:
    message = str(unknown_name("thing", "zzz", [f"name_{number:03d}" for number in range(300)]))
    assert message.startswith("Unknown thing 'zzz'. Known: 'name_000', ")
    assert message.endswith("'name_019' and 280 more.")
    assert "more" not in str(unknown_name("thing", "zzz", [f"name_{number:03d}" for number in range(20)]))
