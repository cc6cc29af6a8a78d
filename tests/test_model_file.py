"""Files of models, policies and checkpoints: no pickle, no code of a file is run, and a write that fails changes nothing."""

import base64
import contextlib
import errno
import functools
import io
import json
import pickle
import re
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
import yaml
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.policies import BaseModel
from stable_baselines3.common.save_util import load_from_zip_file
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import VecNormalize
from torch import nn
from typer.testing import CliRunner

from sb3_cyborg import MemoryActorCriticPolicy, MemoryPPO, TrainerV7, cli
from sb3_cyborg.files import write_atomically
from sb3_cyborg.trainers.checkpoints import list_checkpoints, random_state, read_checkpoint, set_random_state
from tests.helpers import ACTION_SPACES, OBSERVATION_SPACES, ToyEnv, predict, same, toy_model, toy_vec_env, weights
from tests.test_plain_data import SCHEDULES, AtTop, equal
from tests.trainer_helpers import run_folder, tiny

Members = dict[str, bytes]


class Net(MemoryActorCriticPolicy):
    """A policy of the user's own."""


def members_of(path: Path) -> Members:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def write_members(path: Path, members: Members) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def with_data(members: Members, **entries: Any) -> Members:
    """:return: The members of a model's zip with other entries in ``data``."""
    return members | {"data": json.dumps(json.loads(members["data"]) | entries).encode()}


def saved_as_before(model: MemoryPPO, path: Path) -> Path:
    """:return: A model as SB3 saves it, and as earlier versions of this package did: what is no JSON is pickled."""
    BaseAlgorithm.save(model, path)
    return path


# --- round trips --------------------------------------------------------------------------------------------------------


POLICY_KWARGS: list[dict[str, Any]] = [
    {},
    {"activation_fn": nn.ELU, "net_arch": {"pi": [4], "vf": [3, 2]}},
    {"activation_fn": AtTop, "optimizer_class": th.optim.RMSprop, "optimizer_kwargs": {"alpha": 0.5}},
    {"encoder": "lstm", "memory": "pmm", "use_time": True, "optimizer_kwargs": {"betas": (0.8, np.float64(0.9))}},
    {"memory": "ring", "memory_kwargs": {"num_slots": np.int64(3)}, "log_std_init": -1.5},
]


def check_round_trip(model: MemoryPPO, path: Path) -> None:
    """Every attribute and every weight of a model is what it was after saving and loading."""
    model.save(path)
    loaded = MemoryPPO.load(path, device="cpu")
    assert same(weights(model.policy), weights(loaded.policy))
    left_out = {*model._excluded_save_params(), "policy"}
    ours, theirs = ({key: value for key, value in vars(m).items() if key not in left_out} for m in (model, loaded))
    assert ours.keys() == theirs.keys()
    for key in ours:
        assert equal(ours[key], theirs[key]), key


def policy_for(observations: str) -> str:
    return {"dict": "MultiInputPolicy", "image": "CnnPolicy"}.get(observations, "MlpPolicy")


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from(["box", "dict", "discrete", "multi_discrete", "multi_binary"]),
    st.sampled_from(list(ACTION_SPACES)),
    st.sampled_from(POLICY_KWARGS),
    st.one_of(st.just("auto"), st.just("lin_0.01_0.001"), SCHEDULES),
    st.one_of(st.none(), SCHEDULES),
)
def test_models(observations: str, actions: str, policy_kwargs: dict[str, Any], rate: Any, clip_range_vf: Any) -> None:
    env = toy_vec_env(3, lambda: ToyEnv(OBSERVATION_SPACES[observations], ACTION_SPACES[actions]))
    policy = policy_for(observations)
    model = toy_model(env, policy, policy_kwargs=policy_kwargs, learning_rate=rate, clip_range_vf=clip_range_vf)
    with tempfile.TemporaryDirectory() as folder:
        check_round_trip(model, Path(folder) / "model.zip")


@pytest.mark.parametrize("observations", list(OBSERVATION_SPACES))
def test_models_that_have_learned(tmp_path: Path, observations: str) -> None:
    model = toy_model(toy_vec_env(3, lambda: ToyEnv(OBSERVATION_SPACES[observations])), policy_for(observations)).learn(36)
    check_round_trip(model, tmp_path / "model")


def test_a_policy_of_the_users_own(tmp_path: Path) -> None:
    toy_model(policy=Net).save(tmp_path / "model")
    assert type(MemoryPPO.load(tmp_path / "model").policy) is Net


def test_registered_names_stand_for_our_policies(tmp_path: Path) -> None:
    toy_model().save(tmp_path / "model")
    entries = json.loads(members_of(tmp_path / "model.zip")["data"])
    assert entries["policy_class"]["name"] == "MlpPolicy"


@pytest.mark.parametrize("normalize", [False, True, {"norm_obs": False}, {"clip_obs": 2.0, "norm_reward": False}])
@pytest.mark.parametrize("env", ["tests/Fixed-v0", "tests.trainer_helpers:tests/Dict-v0"])
def test_checkpoints(tmp_path: Path, normalize: Any, env: str) -> None:
    if "Dict" in env and isinstance(normalize, bool):
        normalize = {"norm_obs_keys": ["vector"]} if normalize else False
    elif "Dict" in env and normalize.get("norm_obs", True):
        normalize = normalize | {"norm_obs_keys": ["vector"]}
    trainer = tiny(tmp_path, env=env, normalize=normalize, total_timesteps=32)
    trainer.train()
    before = trainer.model.get_vec_normalize_env()
    trainer.save(tmp_path / "model.zip")
    state = random_state()
    checkpoint = read_checkpoint(tmp_path / "model.zip")
    assert equal(checkpoint.random, state)
    assert (checkpoint.normalize is None) == (before is None)
    if before is not None and checkpoint.normalize is not None:
        pickled: VecNormalize = pickle.loads(pickle.dumps(before))
        for left in ("old_obs", "old_reward", "reset_infos"):  # of the last step: a reset sets them
            assert left in vars(pickled)
        ours = {key: value for key, value in vars(checkpoint.normalize).items() if not key.startswith(("old_", "reset_"))}
        theirs = {key: value for key, value in vars(pickled).items() if not key.startswith(("old_", "reset_"))}
        theirs.pop("render_mode", None)  # set_venv sets it
        ours.pop("render_mode", None)
        assert equal(dict(sorted(ours.items())), dict(sorted(theirs.items())))
    number, numbers = np.random.random(), th.rand(3)  # noqa: NPY002
    set_random_state(checkpoint.random)
    assert number == np.random.random()  # noqa: NPY002
    assert th.equal(numbers, th.rand(3))


def test_random_states_that_are_damaged() -> None:
    for damaged in ({}, {**random_state(), "python": (3, "x")}, {**random_state(), "torch": th.zeros(3)}, {"python": None}):
        with pytest.raises(ValueError, match=r"random states of a checkpoint are damaged"):
            set_random_state(damaged)


# --- no pickle ----------------------------------------------------------------------------------------------------------


def assert_no_pickle(members: Members) -> None:
    """Nothing is pickled: text is text, JSON holds no pickle, and tensors load as tensors alone."""
    for name, content in members.items():
        assert not name.endswith(".pkl")
        if name.endswith(".pth"):
            th.load(io.BytesIO(content), weights_only=True)
        else:
            assert b":serialized:" not in content
            content.decode()
            if name == "data" or name.endswith(".json"):
                json.loads(content)


@pytest.mark.parametrize("observations", list(OBSERVATION_SPACES))
def test_models_hold_no_pickle_and_sb3_opens_them(tmp_path: Path, observations: str) -> None:
    policy = policy_for(observations)
    kwargs = {"activation_fn": nn.ReLU, "optimizer_kwargs": {"betas": (0.8, 0.9)}}
    model = toy_model(toy_vec_env(3, lambda: ToyEnv(OBSERVATION_SPACES[observations])), policy, policy_kwargs=kwargs)
    model.learn(36).save(tmp_path / "model")
    members = members_of(tmp_path / "model.zip")
    assert {"data", "policy.pth", "policy.optimizer.pth", "pytorch_variables.pth"} < members.keys()
    assert {"_stable_baselines3_version", "system_info.txt"} < members.keys()
    assert_no_pickle(members)
    data, params, _ = load_from_zip_file(tmp_path / "model")
    assert data is not None
    assert (data["n_steps"], data["num_timesteps"]) == (12, 36)
    stored: Any = params["policy"]
    assert same(stored, weights(model.policy))


def test_the_search_for_pickles_finds_those_of_earlier_versions(tmp_path: Path) -> None:
    members = members_of(saved_as_before(toy_model(), tmp_path / "model.zip"))
    with pytest.raises(AssertionError):
        assert_no_pickle(members)
    with pytest.raises(AssertionError):
        assert_no_pickle({"random_state.pkl": b""})


def test_checkpoints_hold_no_pickle(tmp_path: Path) -> None:
    trainer = tiny(tmp_path, normalize=True, eval_freq=32, n_eval_episodes=1, total_timesteps=64).train()
    paths = list(run_folder(trainer).rglob("*.zip"))
    assert len(paths) >= 3
    for path in paths:
        members = members_of(path)
        assert {"vec_normalize.json", "random_state.json"} < members.keys()
        assert_no_pickle(members)


def test_a_pickle_is_warned_of_and_needs_trust(tmp_path: Path) -> None:
    model = toy_model(clip_range=lambda progress: 0.25 * progress)
    with pytest.warns(UserWarning, match=r"Saved as a pickle: `clip_range` \(an object of type function\)"):
        model.save(tmp_path / "model")
    with pytest.raises(
        ValueError, match=r"model holds pickled objects \('clip_range'\), which can run any code.*`trust=True`"
    ):
        MemoryPPO.load(tmp_path / "model")
    trusted: Any = MemoryPPO.load(tmp_path / "model", trust=True).clip_range
    assert trusted(0.5) == 0.125
    objects = {"clip_range": LinearSchedule(0.5, 0.0, 1.0)}
    replaced: Any = MemoryPPO.load(tmp_path / "model", custom_objects=objects).clip_range
    assert replaced(0.5) == 0.25


def test_models_without_pickles_do_not_warn(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    toy_model().learn(36).save(tmp_path / "model")
    assert not [warning for warning in recwarn if "pickle" in str(warning.message)]


def test_files_of_earlier_versions_need_trust(tmp_path: Path) -> None:
    model = toy_model(toy_vec_env(), policy_kwargs={"activation_fn": nn.ELU}).learn(36)
    path = saved_as_before(model, tmp_path / "model.zip")
    with pytest.raises(
        ValueError, match=r"model.zip was written by an earlier version, which pickled.*`trust=True`"
    ) as refused:
        MemoryPPO.load(path)
    assert "\n" not in str(refused.value)
    loaded = MemoryPPO.load(path, env=toy_vec_env(), trust=True)
    assert same(weights(model.policy), weights(loaded.policy))
    loaded.save(tmp_path / "again")
    again = MemoryPPO.load(tmp_path / "again", env=toy_vec_env()).learn(36, reset_num_timesteps=False)
    assert again.num_timesteps == 72


def test_parameters_come_from_files_of_any_version(tmp_path: Path) -> None:
    model = toy_model(seed=1).learn(36)
    model.save(tmp_path / "new")
    for path in (tmp_path / "new.zip", saved_as_before(model, tmp_path / "old.zip")):
        other = toy_model(seed=2)
        other.set_parameters(str(path))
        assert same(weights(model.policy), weights(other.policy))
        assert same(weights(model.policy), other.get_parameters()["policy"])


def test_policies_alone(tmp_path: Path) -> None:
    model = toy_model(policy_kwargs={"activation_fn": nn.ELU, "optimizer_kwargs": {"betas": (0.8, 0.9)}})
    new, old = str(tmp_path / "new"), str(tmp_path / "old")
    model.policy.save(new)
    BaseModel.save(model.policy, old)
    assert b":serialized:" not in Path(new).read_bytes()
    th.load(new, weights_only=True)
    loaded = MemoryActorCriticPolicy.load(new, device="cpu")
    assert same(weights(model.policy), weights(loaded))
    assert loaded.activation_fn is nn.ELU
    assert loaded.optimizer_kwargs["betas"] == (0.8, 0.9)
    with pytest.raises(ValueError, match=r"old was written by an earlier version.*`trust=True`"):
        MemoryActorCriticPolicy.load(old, device="cpu")
    assert same(weights(model.policy), weights(MemoryActorCriticPolicy.load(old, device="cpu", trust=True)))
    Path(old).write_bytes(Path(new).read_bytes()[:500])
    with pytest.raises(ValueError, match="old"):
        MemoryActorCriticPolicy.load(old)
    with pytest.raises(FileNotFoundError):
        MemoryActorCriticPolicy.load(str(tmp_path / "nothing"))


def test_custom_objects_give_classes_by_their_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy_model(policy_kwargs={"activation_fn": AtTop}).save(tmp_path / "model")
    monkeypatch.delitem(sys.modules, AtTop.__module__)
    with pytest.raises(ValueError, match=r"`activation_fn` is 'tests.test_plain_data.AtTop', whose module is not imported"):
        MemoryPPO.load(tmp_path / "model")
    given = {"tests.test_plain_data.AtTop": nn.SiLU}
    assert MemoryPPO.load(tmp_path / "model", custom_objects=given).policy.activation_fn is nn.SiLU
    loaded = MemoryPPO.load(tmp_path / "model", trust=True)
    assert loaded.policy.activation_fn.__qualname__ == "AtTop"


@pytest.mark.parametrize(
    "entry", [{":type:": "nothing"}, {":type:": "Box"}, {":type:": "array", "dtype": "O", "shape": [1]}, 3]
)
def test_damaged_entries(tmp_path: Path, entry: Any) -> None:
    toy_model().save(tmp_path / "model")
    path = write_members(tmp_path / "model.zip", with_data(members_of(tmp_path / "model.zip"), observation_space=entry))
    with pytest.raises(ValueError, match=r"observation_space|The space is of type"):
        MemoryPPO.load(path)


# --- malicious files ----------------------------------------------------------------------------------------------------


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return open, (str(self.marker), "w")


def pickled(marker: Path) -> bytes:
    return pickle.dumps(Payload(marker))


def pickled_entry(marker: Path) -> dict[str, str]:
    """:return: A payload as SB3 keeps an object in ``data``."""
    return {":type:": "<class 'collections.deque'>", ":serialized:": base64.b64encode(pickled(marker)).decode()}


def pickled_tensors(marker: Path) -> bytes:
    file = io.BytesIO()
    th.save({"weight": th.zeros(1), "more": Payload(marker)}, file)
    return file.getvalue()


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """:return: The file that a payload makes."""
    return tmp_path / "code_was_run"


def test_the_payload_works(marker: Path) -> None:
    pickle.loads(pickled(marker))
    assert marker.exists()
    marker.unlink()
    th.load(io.BytesIO(pickled_tensors(marker)), weights_only=False)
    assert marker.exists()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """:return: A run with one checkpoint, of a kind that all viewers can show."""
    folder = tmp_path_factory.mktemp("model_file")
    trainer = tiny(folder, env="CartPole-v1", normalize=True, total_timesteps=32, run_name="run", n_steps=16).train()
    trainer.close()
    (folder / "run" / "final_model.zip").unlink()
    return folder / "run"


@pytest.fixture(scope="module")
def old_run(run: Path) -> Members:
    """:return: The checkpoint of the run, as an earlier version wrote it."""
    (path,) = list_checkpoints(run)
    trainer = TrainerV7.load(path)
    checkpoint = read_checkpoint(path)
    target = run.parent / "old.zip"
    members = members_of(saved_as_before(trainer.model, target))
    kept = {name: content for name, content in members_of(path).items() if name.startswith("trainer_")}
    normalize = trainer.env
    assert isinstance(normalize, VecNormalize)
    pickles = {"random_state.pkl": pickle.dumps(checkpoint.random), "vec_normalize.pkl": pickle.dumps(normalize)}
    trainer.close()
    return members | kept | pickles


def test_checkpoints_of_earlier_versions_need_trust(run: Path, old_run: Members) -> None:
    (path,) = list_checkpoints(run)
    before = path.read_bytes()
    write_members(path, old_run)
    try:
        for door in ("TrainerV7.load", "TrainerV7.resume"):
            assert re.search(r"written by an earlier version, which pickled \w+.*`--trust`", DOORS[door](run))
        assert read_checkpoint(path).progress == {"num_timesteps": 32}
        mean, _ = TrainerV7.load(run, "last", trust=True).evaluate(2)
        resumed = TrainerV7.resume(run, trust=True, total_timesteps=64)
        assert resumed.model.num_timesteps == 32
        path.write_bytes(before)
        assert TrainerV7.load(run, "last").evaluate(2)[0] == mean
    finally:
        path.write_bytes(before)


def one_line(result: Any) -> str:
    """:return: The error of a command."""
    assert result.exit_code in (1, 2), result.output
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    (line,) = (line for line in result.stderr.splitlines() if line.startswith("sb3-cyborg: error: "))
    return str(line)


def command(*arguments: str) -> str:
    return one_line(CliRunner().invoke(cli.app, list(arguments)))


def refused(call: Callable[[], object]) -> str:
    with pytest.raises(ValueError) as error:  # noqa: PT011  # the caller looks at the message
        call()
    return str(error.value)


DOORS: dict[str, Callable[[Path], str]] = {
    "MemoryPPO.load": lambda run: refused(lambda: MemoryPPO.load(list_checkpoints(run)[0])),
    "TrainerV7.load": lambda run: refused(lambda: TrainerV7.load(run)),
    "TrainerV7.resume": lambda run: refused(lambda: TrainerV7.resume(run, total_timesteps=64)),
    "eval": lambda run: command("eval", str(run), "--episodes", "1"),
    "enjoy": lambda run: command("enjoy", str(run), "--video", str(run / "a.gif"), "--episodes", "1", "--max-steps", "3"),
    "inspect": lambda run: command("inspect", str(run), "-o", str(run / "a.png"), "--max-steps", "3"),
    "train --resume": lambda run: command("train", "--resume", str(run), "-n", "64"),
}
"""The ways that a file of a stranger is read, each with a function that returns the message of the refusal."""


def pickled_in_json(marker: Path, key: str) -> bytes:
    return json.dumps({key: pickled_entry(marker)}).encode()


ATTACKS: dict[str, Callable[[Members, Path], Members]] = {
    "data": lambda members, marker: with_data(members, ep_info_buffer=pickled_entry(marker)),
    "policy.pth": lambda members, marker: members | {"policy.pth": pickled_tensors(marker)},
    "policy.optimizer.pth": lambda members, marker: members | {"policy.optimizer.pth": pickled_tensors(marker)},
    "pytorch_variables.pth": lambda members, marker: members | {"pytorch_variables.pth": pickled_tensors(marker)},
    "random_state.pkl": lambda members, marker: members | {"random_state.pkl": pickled(marker)},
    "vec_normalize.pkl": lambda members, marker: members | {"vec_normalize.pkl": pickled(marker)},
    "random_state.json": lambda members, marker: members | {"random_state.json": pickled_in_json(marker, "python")},
    "vec_normalize.json": lambda members, marker: members | {"vec_normalize.json": pickled_in_json(marker, "ret_rms")},
}
"""Entries with a payload in them."""

OF_THE_TRAINER = ("random_state", "vec_normalize")
"""Entries that ``MemoryPPO.load`` does not read."""


def under_attack(attack: str, marker: Path, members: Members) -> Members:
    return ATTACKS[attack](members, marker)


def attacked(run: Path, folder: Path, change: Callable[[Members], Members]) -> Path:
    """:return: A copy of the run whose checkpoint was changed."""
    copy = folder / "run"
    (source,) = list_checkpoints(run)
    (copy / "checkpoints").mkdir(parents=True)
    (copy / "config.yaml").write_bytes((run / "config.yaml").read_bytes())
    write_members(copy / "checkpoints" / source.name, change(members_of(source)))
    return copy


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("format_", ["new", "old"])
def test_nothing_is_unpickled(
    tmp_path: Path, marker: Path, run: Path, old_run: Members, door: str, attack: str, format_: str
) -> None:
    copy = attacked(run, tmp_path, lambda members: ATTACKS[attack](members if format_ == "new" else old_run, marker))
    if door == "MemoryPPO.load" and attack.startswith(OF_THE_TRAINER) and format_ == "new":
        assert MemoryPPO.load(list_checkpoints(copy)[0]).num_timesteps == 32
        assert not marker.exists()
        return
    message = DOORS[door](copy)
    assert not marker.exists()
    assert message.strip()
    assert "\n" not in message
    if ".pth" in attack and format_ == "new":
        assert "other objects than tensors" in message
    else:
        assert "trust" in message


def keys_of_data(run: Path, old_run: Members) -> set[str]:
    new = members_of(list_checkpoints(run)[0])
    return set(json.loads(new["data"])) | set(json.loads(old_run["data"]))


def test_no_key_of_data_is_unpickled(tmp_path: Path, marker: Path, run: Path, old_run: Members) -> None:
    (path,) = list_checkpoints(run)
    new = members_of(path)
    for members in (new, old_run):
        for key in keys_of_data(run, old_run) | {"env", "anything", "policy"}:
            attack = write_members(tmp_path / "model.zip", with_data(members, **{key: pickled_entry(marker)}))
            assert "`trust=True`" in refused(functools.partial(MemoryPPO.load, attack)), key
            assert not marker.exists(), key


def test_trust_runs_what_a_file_holds(tmp_path: Path, marker: Path, run: Path) -> None:
    """With trust the same files do run their payload: the tests above would see it."""
    for attack in ("data", "random_state.pkl", "vec_normalize.pkl", "random_state.json", "vec_normalize.json"):
        copy = attacked(run, tmp_path / attack, functools.partial(under_attack, attack, marker))
        with contextlib.suppress(ValueError):  # what the payload leaves is no such object
            TrainerV7.load(copy, trust=True)
        assert marker.exists(), attack
        marker.unlink()


@pytest.fixture
def module(tmp_path: Path, marker: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """:return: The name of a module that makes a file when it is imported."""
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / "a_strangers_module.py").write_text(
        f"import torch\nopen({str(marker)!r}, 'w')\nclass Net(torch.nn.ReLU):\n    pass\n", encoding="utf-8"
    )
    monkeypatch.syspath_prepend(folder)
    yield "a_strangers_module"
    sys.modules.pop("a_strangers_module", None)


def with_config(members: Members, **settings_: Any) -> Members:
    config = yaml.safe_load(members["trainer_config.yaml"]) | settings_
    return members | {"trainer_config.yaml": yaml.safe_dump(config).encode()}


@pytest.mark.parametrize("door", [door for door in DOORS if door != "MemoryPPO.load"])
@pytest.mark.parametrize("where", ["env", "env_kwargs", "env_kwargs of a list"])
def test_no_environment_is_imported(tmp_path: Path, marker: Path, run: Path, module: str, door: str, where: str) -> None:
    env_id = f"{module}:CartPole-v1"
    changes: dict[str, dict[str, Any]] = {
        "env": {"env": env_id},
        "env_kwargs": {"env_kwargs": {"env_id": env_id}},
        "env_kwargs of a list": {"env_kwargs": {"inner": [{"env": env_id}]}},
    }
    change = changes[where]
    message = DOORS[door](attacked(run, tmp_path, lambda members: with_config(members, **change)))
    assert not marker.exists()
    assert f"would import the module '{module}'" in message
    assert "--trust" in message


def test_an_environment_is_imported_with_trust_or_was_before(tmp_path: Path, marker: Path, run: Path, module: str) -> None:
    copy = attacked(run, tmp_path, lambda members: with_config(members, env=f"{module}:CartPole-v1"))
    assert TrainerV7.load(copy, trust=True).config.env == f"{module}:CartPole-v1"
    assert marker.exists()
    TrainerV7.load(copy)  # imported by now
    result = CliRunner().invoke(cli.app, ["eval", str(copy), "--episodes", "1", "--trust"])
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("door", ["TrainerV7.resume", "train --resume"])
def test_the_config_of_a_run_without_checkpoints_imports_nothing(
    tmp_path: Path, marker: Path, run: Path, module: str, door: str
) -> None:
    copy = attacked(run, tmp_path, lambda members: members)
    for path in list_checkpoints(copy):
        path.unlink()
    config = yaml.safe_load((copy / "config.yaml").read_text()) | {"env": f"{module}:CartPole-v1"}
    (copy / "config.yaml").write_text(yaml.safe_dump(config))
    assert "--trust" in DOORS[door](copy)
    assert not marker.exists()


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("name", ["a_strangers_module.Net", "os.system", "subprocess.Popen", "builtins.exec"])
@pytest.mark.parametrize("key", ["activation_fn", "optimizer_class", "features_extractor_class"])
def test_names_of_classes_run_nothing(
    tmp_path: Path, marker: Path, run: Path, module: str, door: str, name: str, key: str
) -> None:
    entry = {key: {":type:": "class", "name": name}}
    message = DOORS[door](attacked(run, tmp_path, lambda members: with_data(members, policy_kwargs=entry)))
    assert not marker.exists()
    assert f"`{key}` is '{name}'" in message
    assert ("not imported" if module in name else "no subclass of") in message


@pytest.mark.parametrize("name", ["torch.nn.modules.activation.ReLU", "os.system", "no name"])
def test_the_policy_is_a_policy(tmp_path: Path, run: Path, name: str) -> None:
    members = with_data(members_of(list_checkpoints(run)[0]), policy_class={":type:": "class", "name": name})
    message = refused(lambda: MemoryPPO.load(write_members(tmp_path / "model.zip", members)))
    assert f"`policy_class` is {name!r}" in message
    assert "is no subclass of BasePolicy" in message or "whose module is not imported" in message


def test_an_env_in_data_is_not_made(tmp_path: Path, marker: Path, run: Path, module: str) -> None:
    members = with_data(members_of(list_checkpoints(run)[0]), env=f"{module}:CartPole-v1")
    assert "`env` is no data" in refused(lambda: MemoryPPO.load(write_members(tmp_path / "model.zip", members)))
    assert not marker.exists()


@pytest.mark.parametrize("key", ["predict", "learn", "_setup_model", "set_random_seed"])
def test_data_replaces_no_method(tmp_path: Path, run: Path, key: str) -> None:
    entry = {":type:": "class", "name": "torch.nn.modules.linear.Linear"}
    members = with_data(members_of(list_checkpoints(run)[0]), **{key: entry})
    assert f"`{key}` is no data" in refused(lambda: MemoryPPO.load(write_members(tmp_path / "model.zip", members)))


@pytest.mark.parametrize("attack", ["data", "policy.pth", "class"])
def test_zoo_enjoy_runs_nothing(
    tmp_path: Path, marker: Path, module: str, monkeypatch: pytest.MonkeyPatch, attack: str
) -> None:
    pytest.importorskip("rl_zoo3")
    monkeypatch.chdir(tmp_path)
    runner = CliRunner()
    params = ["n_envs:1", "n_steps:64", "batch_size:64", "n_epochs:1"]
    zoo = ["zoo", "train", "--env", "CartPole-v1", "-n", "64", "--eval-freq", "-1", "--seed", "1", "-params", *params]
    result = runner.invoke(cli.app, zoo)
    assert result.exit_code == 0, result.output
    enjoy = ["zoo", "enjoy", "--env", "CartPole-v1", "-n", "5", "--no-render", "--device", "cpu"]
    assert runner.invoke(cli.app, enjoy).exit_code == 0
    path = tmp_path / "logs/memory_ppo/CartPole-v1_1/CartPole-v1.zip"
    members = members_of(path)
    if attack == "class":
        entry = {"activation_fn": {":type:": "class", "name": f"{module}.Net"}}
        members = with_data(members, policy_kwargs=entry)
    else:
        members = ATTACKS[attack](members, marker)
    write_members(path, members)
    line = one_line(runner.invoke(cli.app, enjoy))
    assert "trust" in line or "other objects than tensors" in line
    assert not marker.exists()


def test_a_policy_alone_runs_nothing(tmp_path: Path, marker: Path, module: str) -> None:
    policy, path = toy_model().policy, tmp_path / "policy"
    policy.save(str(path))
    good = th.load(path, weights_only=True)
    data = json.loads(good["data"])
    attacks: list[Any] = [
        good | {"data": json.dumps(data | {"net_arch": pickled_entry(marker)})},
        good | {"data": json.dumps(data | {"activation_fn": {":type:": "class", "name": f"{module}.Net"}})},
        good | {"data": json.dumps(data | {"activation_fn": {":type:": "class", "name": "os.system"}})},
        good | {"data": {"observation_space": Payload(marker)}},
        good | {"state_dict": Payload(marker)},
        Payload(marker),
    ]
    for attack in attacks:
        th.save(attack, path)
        with pytest.raises(ValueError, match=r"trust=True|no subclass of Module"):
            MemoryActorCriticPolicy.load(str(path))
        assert not marker.exists()


# --- writing ------------------------------------------------------------------------------------------------------------


def full_disk(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Make every file that is opened for writing full after a number of bytes."""
    original = open

    def opened(path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        file = original(path, mode, *args, **kwargs)
        return Limited(file, after) if "w" in mode and "b" in mode else file

    monkeypatch.setattr("sb3_cyborg.files.open", opened, raising=False)


class Limited(io.BufferedRandom):
    """A file on a disk that becomes full."""

    def __init__(self, file: Any, left: int) -> None:
        super().__init__(file.raw)
        self.left, self.file = left, file

    def write(self, content: Any) -> int:
        self.left -= len(content)
        if self.left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(content)


@pytest.mark.parametrize("after", [0, 1_000, 20_000])
def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    model = toy_model()
    targets: dict[str, Callable[[], object]] = {
        "model.zip": lambda: model.save(tmp_path / "model"),
        "policy": lambda: model.policy.save(str(tmp_path / "policy")),
    }
    for save in targets.values():
        save()
    assert all((tmp_path / name).stat().st_size > 20_000 for name in targets)
    before = {name: (tmp_path / name).read_bytes() for name in targets}
    model.learn(36)
    full_disk(monkeypatch, after)
    for name, save in targets.items():
        with pytest.raises((OSError, RuntimeError)):  # PyTorch's writer raises a RuntimeError of its own
            save()
        assert (tmp_path / name).read_bytes() == before[name]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(targets), "no remains"
    monkeypatch.undo()
    for name, save in targets.items():
        save()
        assert (tmp_path / name).read_bytes() != before[name]


def test_paths_are_those_of_sb3(tmp_path: Path) -> None:
    model = toy_model()
    for name, file in {"a": "a.zip", "b.zip": "b.zip", "c.pt": "c.pt", "d.v1": "d.v1"}.items():
        model.save(str(tmp_path / name))
        assert MemoryPPO.load(tmp_path / name).num_timesteps == 0
        assert (tmp_path / file).is_file()
    with pytest.warns(UserWarning, match="does not exist. Will create it"):
        model.save(tmp_path / "new" / "folder" / "model")
    (tmp_path / "folder.zip").mkdir()
    with pytest.warns(UserWarning, match=r"is a folder. Will save instead to .*folder.zip_2"):
        model.save(tmp_path / "folder")
    assert MemoryPPO.load(tmp_path / "folder.zip_2").num_timesteps == 0


def test_what_to_leave_out_and_to_include(tmp_path: Path) -> None:
    model = toy_model()
    model.save(tmp_path / "model", exclude=["ep_info_buffer", "_n_updates"], include=["_last_state"])
    data = json.loads(members_of(tmp_path / "model.zip")["data"])
    assert "_last_state" in data
    assert not {"ep_info_buffer", "_n_updates", "policy", "rollout_buffer"} & data.keys()
    assert MemoryPPO.load(tmp_path / "model").ep_info_buffer is None
    model.start_time = (number for number in range(3))  # type: ignore[assignment]
    with pytest.raises(TypeError, match="pickle"):
        model.save(tmp_path / "model")
    assert same(MemoryPPO.load(tmp_path / "model").get_parameters()["policy"], weights(model.policy))


def test_links_stay(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "file")
    write_atomically(tmp_path / "link", lambda file: file.write(b"new"))
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_bytes() == b"new"


def test_predictions_are_those_of_the_saved_model(tmp_path: Path) -> None:
    model = toy_model(policy_kwargs={"activation_fn": AtTop, "memory": "kv"}).learn(36)
    model.save(tmp_path / "model")
    loaded = MemoryPPO.load(tmp_path / "model", device="cpu")
    obs = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    assert (predict(model, obs, deterministic=True)[0] == predict(loaded, obs, deterministic=True)[0]).all()


def test_spaces_of_the_users_own_are_pickled(tmp_path: Path) -> None:
    class Half(spaces.Box):
        pass

    model = toy_model(toy_vec_env(1, lambda: ToyEnv(Half(0, 0.5, (3,)))))
    with pytest.warns(UserWarning, match=r"`observation_space` \(an object of type Half\)"):
        model.save(tmp_path / "model")
    with pytest.raises(ValueError, match="holds pickled objects"):
        MemoryPPO.load(tmp_path / "model")
    assert MemoryPPO.load(tmp_path / "model", trust=True).observation_space == model.observation_space
