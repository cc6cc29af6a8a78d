"""The Hub: the files and the model card of a run, uploads and downloads with a double of the server, files of strangers."""

import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from gymnasium import spaces
from huggingface_hub import ModelCard, constants
from PIL import Image
from typer.testing import CliRunner

from sb3_cyborg import MemoryPPO, TrainerV7, cli
from sb3_cyborg.hub import download_from_hub, load_from_hub, packaging, push_to_hub
from sb3_cyborg.hub.files import CARD, CONFIG, CURVE, FILES, MODEL, ONNX, RESULTS, VIDEO
from sb3_cyborg.hub.model_card import Agent, SeedResult, model_card
from sb3_cyborg.hub.packaging import OF_THE_MACHINE, copy_model, other_seeds, package_run
from sb3_cyborg.trainers.acting import ActingLoop
from sb3_cyborg.trainers.config import TrainerConfig
from sb3_cyborg.trainers.trainer_v7 import EVAL_SEED_OFFSET
from tests.hub_double import TOKEN, HubDouble, Repository, hub_double
from tests.test_model_file import assert_no_pickle, members_of, pickled, pickled_entry, with_data, write_members
from tests.trainer_helpers import FIXED, tiny

REPO = "me/chain"
SETTINGS: dict[str, Any] = {"env": "sb3_cyborg/MemoryChain-v0", "env_kwargs": {"memory_length": 5}, "wandb_project": "secret"}
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """:return: The folder of runs: two seeds of one config, and runs that do not belong to them."""
    folder = tmp_path_factory.mktemp("alice")
    for name, seed in {"first": 3, "second": 4}.items():
        tiny(folder, **SETTINGS, run_name=name, seed=seed).train().close()
    changes: dict[str, dict[str, Any]] = {"longer": {"total_timesteps": 320}, "other": {"gamma": 0.5}, "unfinished": {}}
    for number, (name, change) in enumerate(changes.items(), start=5):
        shutil.copytree(folder / "second", folder / name)
        config = TrainerConfig.parse(folder / name / CONFIG).changed(seed=number, **change)
        (folder / name / CONFIG).write_text(config.to_yaml())
    (folder / "unfinished" / "final_model.zip").unlink()
    return folder


@pytest.fixture(scope="module")
def package(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """:return: The files of the first run."""
    folder = tmp_path_factory.mktemp("package") / "files"
    lines = list[str]()
    written = package_run(runs / "first", folder, REPO, n_eval_episodes=3, report=lines.append)
    assert sorted(written) == sorted(folder.iterdir())
    assert [line.split(":")[0] for line in lines][:2] == ["seed 3", "seed 4"], lines
    return folder


@pytest.fixture(autouse=True)
def quick_export(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the export, which takes seconds. The fixture ``package`` is made before, with the real one."""
    monkeypatch.setattr(packaging, "export_onnx", lambda model, path, normalize: path.write_bytes(b"graph"))


def point_to(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let huggingface_hub in this process talk to a server, as HF_ENDPOINT does before its import."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubDouble]:
    """:return: A double that huggingface_hub talks to, with a token."""
    with hub_double() as double:
        point_to(double.url, monkeypatch)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield double


def text_of(folder: Path) -> str:
    return (folder / CARD).read_text(encoding="utf-8")


def silent(_: str) -> None:
    """A report that prints nothing."""


# --- the files ------------------------------------------------------------------------------------------------------------


def test_files(package: Path) -> None:
    names = {path.name for path in package.iterdir()}
    assert {MODEL, CONFIG, RESULTS, CARD, CURVE, VIDEO} <= names <= set(FILES)
    with Image.open(package / VIDEO) as video, Image.open(package / CURVE) as curve:
        assert video.format == "GIF"
        assert video.n_frames > 5  # type: ignore[attr-defined]  # of a GIF
        assert curve.format == "PNG"


def test_the_exported_agent_acts_as_the_model(package: Path) -> None:
    pytest.importorskip("onnxruntime")
    from sb3_cyborg.runtime import OnnxAgent

    agent, model = OnnxAgent(package / ONNX), MemoryPPO.load(package / MODEL)
    state: Any = None
    own: Any = None
    starts = np.ones(1, dtype=bool)
    for _ in range(5):
        observation = model.observation_space.sample()[None]
        action, state = agent.predict(observation, state, starts)
        expected, own = model.predict(observation, own, starts, deterministic=True)
        assert action == expected
        starts[:] = False
    for name, leaf in state.items():
        np.testing.assert_allclose(leaf, own[name], atol=1e-5)


def test_an_agent_that_cannot_be_exported_has_no_graph(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ValueError("The agent cannot be exported: a reason.")

    monkeypatch.setattr(packaging, "export_onnx", refuse)
    lines = list[str]()
    options: dict[str, Any] = {"n_eval_episodes": 1, "seeds": False, "video": False}
    package_run(runs / "first", tmp_path / "new", REPO, report=lines.append, **options)
    assert "no agent.onnx: The agent cannot be exported: a reason." in lines
    assert not (tmp_path / "new" / ONNX).exists()
    assert "OnnxAgent" not in text_of(tmp_path / "new")
    assert "- onnx" not in text_of(tmp_path / "new")


def test_the_model_is_that_of_the_run_and_holds_no_pickle(runs: Path, package: Path) -> None:
    assert_no_pickle(members_of(package / MODEL))
    own, theirs = MemoryPPO.load(runs / "first" / "final_model.zip"), MemoryPPO.load(package / MODEL)
    for name, weights in own.policy.state_dict().items():
        assert weights.equal(theirs.policy.state_dict()[name]), name
    assert TrainerV7.load(package / MODEL).evaluate(2) == TrainerV7.load(runs / "first").evaluate(2)


def test_nothing_of_the_machine_is_published(runs: Path, package: Path) -> None:
    for path in package.iterdir():
        content = path.read_bytes()
        parts = members_of(path).values() if path.suffix == ".zip" else [content]
        for part in parts:
            for private in (str(runs), "alice", "secret", "first"):
                assert private.encode() not in part, f"{private} in {path.name}"
    before, after = TrainerConfig.parse(runs / "first" / "config.yaml"), TrainerConfig.parse(package / CONFIG)
    changed = {key for key in TrainerConfig.model_fields if getattr(before, key) != getattr(after, key)}
    assert changed <= set(OF_THE_MACHINE)
    assert {"log_dir", "run_name", "wandb_project"} <= changed


def test_results(package: Path) -> None:
    results = json.loads((package / RESULTS).read_text())
    assert [seed["seed"] for seed in results["seeds"]] == [3, 4]
    for seed in results["seeds"]:
        assert len(seed["returns"]) == results["n_eval_episodes"] == 3
        assert seed["mean_reward"] == np.mean(seed["returns"])
        assert seed["std_reward"] == np.std(seed["returns"])
        assert seed["lengths"] == [6, 6, 6]
    assert results["mean_reward"] == results["seeds"][0]["mean_reward"]
    assert results["is_deterministic"] is True


def test_the_evaluation_has_other_episodes_than_those_that_choose_the_best_model(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds = list[int]()

    class Loop(ActingLoop):
        def __init__(self, *args: Any, seed: int, **options: Any) -> None:
            seeds.append(seed)
            super().__init__(*args, seed=seed, **options)

    monkeypatch.setattr(packaging, "ActingLoop", Loop)
    package_run(runs / "first", tmp_path / "new", REPO, n_eval_episodes=1, seeds=False, video=False, report=silent)
    assert seeds == [3 + packaging.SEED_OFFSET]
    assert packaging.SEED_OFFSET != EVAL_SEED_OFFSET


def test_other_seeds(runs: Path) -> None:
    assert other_seeds(runs / "first") == [runs / "second"]
    assert other_seeds(runs / "other") == []


def test_parts_that_cannot_be_made_are_named(tmp_path: Path) -> None:
    trainer = tiny(tmp_path, env="CartPole-v1", run_name="run", total_timesteps=32).train()
    trainer.save(tmp_path / "model.pt")
    trainer.close()
    lines = list[str]()
    package_run(tmp_path / "model.pt", tmp_path / "new", REPO, n_eval_episodes=1, video=False, report=lines.append)
    assert any(line.startswith("no learning curve: ") for line in lines)
    text = text_of(tmp_path / "new")
    assert CURVE not in text
    assert VIDEO not in text
    assert {CURVE, VIDEO} & {path.name for path in (tmp_path / "new").iterdir()} == set()


def test_an_environment_without_pictures_has_no_video(tmp_path: Path) -> None:
    tiny(tmp_path, env="tests/Discrete-v0", run_name="run", total_timesteps=32).train().close()
    lines = list[str]()
    package_run(tmp_path / "run", tmp_path / "new", REPO, n_eval_episodes=1, report=lines.append)
    assert any(line.startswith("no video: ") for line in lines), lines
    assert not (tmp_path / "new" / VIDEO).exists()


def test_a_folder_with_files_is_left_alone(runs: Path, tmp_path: Path) -> None:
    (tmp_path / CARD).write_text("mine")
    with pytest.raises(ValueError, match="not an empty folder"):
        package_run(runs / "first", tmp_path, REPO, report=silent)
    assert text_of(tmp_path) == "mine"


def test_a_model_with_pickles_is_not_published(runs: Path, tmp_path: Path) -> None:
    path = write_members(
        tmp_path / "model.zip",
        with_data(members_of(runs / "first" / "final_model.zip"), ep_info_buffer=pickled_entry(tmp_path / "marker")),
    )
    with pytest.raises(ValueError, match="pickled objects"):
        package_run(path, tmp_path / "a", REPO, report=silent)
    with pytest.raises(ValueError, match=r"cannot be published.*pickled objects"):
        package_run(path, tmp_path / "b", REPO, trust=True, report=silent)
    assert list((tmp_path / "b").iterdir()) == []


# --- the model card -------------------------------------------------------------------------------------------------------


def test_metadata(package: Path) -> None:
    results = json.loads((package / RESULTS).read_text())
    data: Any = ModelCard(text_of(package)).data
    assert data.library_name == "stable-baselines3"
    assert data.pipeline_tag == "reinforcement-learning"
    assert {"sb3_cyborg/MemoryChain-v0", "reinforcement-learning", "stable-baselines3", "sb3-cyborg"} <= set(data.tags)
    assert data.model_name == "MemoryPPO"
    (result,) = data.eval_results
    assert (result.task_type, result.dataset_type) == ("reinforcement-learning", "sb3_cyborg/MemoryChain-v0")
    assert result.metric_type == "mean_reward"
    assert result.metric_value == f"{results['mean_reward']:.2f} +/- {results['std_reward']:.2f}"


def test_the_card_describes_the_run(package: Path) -> None:
    text, results = text_of(package), json.loads((package / RESULTS).read_text())
    own, other = results["seeds"]
    assert f"| 3 (this model) | {own['num_timesteps']} | {own['mean_reward']:.3f} ± {own['std_reward']:.3f} |" in text
    assert f"| 4 | {other['num_timesteps']} | {other['mean_reward']:.3f} ± {other['std_reward']:.3f} |" in text
    means = [seed["mean_reward"] for seed in results["seeds"]]
    assert f"Over 2 seeds: {np.mean(means):.3f} ± {np.std(means):.3f}" in text
    assert "The agent sees some bits at the start" in text  # from the docstring of the environment
    assert "`{'memory_length': 5}`" in text
    assert "`Discrete(2)`" in text
    for name in (CURVE, VIDEO):
        assert f"]({name})" in text
    for name in {path.name for path in package.iterdir()} - {CARD}:
        assert f"| `{name}` |" in text


def test_the_config_of_the_card_makes_the_same_settings(package: Path) -> None:
    """The card leaves defaults out."""
    shown = yaml.safe_load(next(code for language, code in BLOCK.findall(text_of(package)) if language == "yaml"))
    assert TrainerConfig.parse(shown) == TrainerConfig.parse(package / CONFIG)


def test_the_command_of_the_card_makes_the_same_weights(package: Path, tmp_path: Path) -> None:
    config = TrainerConfig.parse(package / CONFIG).changed(log_dir=str(tmp_path))
    trainer = TrainerV7(config).train()
    theirs = MemoryPPO.load(package / MODEL).policy.state_dict()
    for name, weights in trainer.model.policy.state_dict().items():
        assert weights.equal(theirs[name]), name
    trainer.close()


def test_the_code_of_the_card_runs(hub: HubDouble, package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add(REPO, {path.name: path.read_bytes() for path in package.iterdir()})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", "")
    # The distribution of this name is the same file.
    monkeypatch.setitem(sys.modules, "sb3_cyborg_runtime", import_module("sb3_cyborg.runtime"))
    model = MemoryPPO.load(package / MODEL)
    namespace: dict[str, Any] = {"observation": model.observation_space.sample()}
    blocks = BLOCK.findall(text_of(package))
    for language, code in blocks:
        if language == "python":
            exec(compile(code, CARD, "exec"), namespace)
    assert namespace["state"].keys() == model.policy.get_initial_state(1).keys()
    assert namespace["mean"] == TrainerV7.load(package / MODEL).evaluate(10)[0]
    commands = [line for language, code in blocks if language == "sh" for line in code.splitlines()]
    commands = [line for line in commands if line.startswith("sb3-cyborg") and "train" not in line]
    assert len(commands) == 3
    for line in dict.fromkeys(commands):
        result = CliRunner().invoke(cli.app, line.split()[1:])
        assert result.exit_code == 0, result.output


@pytest.mark.parametrize("use_masking", [False, True])
def test_the_code_of_the_card_passes_masks_to_an_agent_that_has_them(use_masking: bool) -> None:
    algorithm = "MaskableMemoryPPO" if use_masking else "MemoryPPO"
    config = TrainerConfig.parse({"env": f"tests.trainer_helpers:{FIXED}", "use_masking": use_masking})
    space = spaces.Discrete(2)
    results = [SeedResult(0, 10, [1.0], [2])]
    text = model_card(Agent(REPO, algorithm, config, space, space, "", "the last model", True, results, {}, [MODEL, ONNX]))
    assert text.count("action_masks=masks)") == 2 * use_masking
    assert f"from sb3_cyborg import {algorithm}, TrainerV7" in text
    code = [code for language, code in BLOCK.findall(text) if language == "python"]
    assert code[0].startswith("import tests.trainer_helpers ")
    assert f"sb3-cyborg eval chain/{MODEL} --trust" in text
    for block in code:
        compile(block, CARD, "exec")


# --- uploads and downloads ------------------------------------------------------------------------------------------------


def push(runs: Path, repo: str = REPO, **options: Any) -> str:
    return push_to_hub(
        repo, runs / "first", **{"n_eval_episodes": 1, "seeds": False, "video": False, "report": silent, **options}
    )


def test_push_and_load(hub: HubDouble, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = push(runs, commit_message="the first one", video=True)
    assert url == f"{hub.url}/{REPO}"
    repository = hub.repositories[REPO]
    assert not repository.private
    assert [message for message, _ in repository.commits] == ["initial commit", "the first one"]
    assert {MODEL, CONFIG, RESULTS, CARD, CURVE, VIDEO, ".gitattributes"} <= set(repository.files)
    assert any("sb3-cyborg" in agent for agent in hub.user_agents)

    monkeypatch.setenv("HF_TOKEN", "")
    path = Path(load_from_hub(REPO))
    assert path.read_bytes() == repository.files[MODEL]
    assert path.is_relative_to(tmp_path / "cache")
    assert MemoryPPO.load(path).num_timesteps == 256
    assert (
        Path(load_from_hub(repo_id=REPO, filename=CONFIG, cache_dir=tmp_path / "b")).read_bytes() == repository.files[CONFIG]
    )
    model = download_from_hub(REPO, tmp_path / "folder")
    assert {file.name: file.read_bytes() for file in (tmp_path / "folder").iterdir() if file.is_file()} == {
        name: content for name, content in repository.files.items() if name in FILES
    }
    assert TrainerV7.load(model).evaluate(1) == TrainerV7.load(runs / "first").evaluate(1)


def test_a_second_push_replaces_our_files_and_no_others(hub: HubDouble, runs: Path) -> None:
    hub.add(REPO, {"agent.onnx": b"of another agent", VIDEO: b"old", "notes.txt": b"mine", CARD: b"old"})
    push(runs)
    files = hub.repositories[REPO].files
    assert files["notes.txt"] == b"mine"
    assert files.get("agent.onnx") != b"of another agent"
    assert VIDEO not in files
    assert files[CARD] != b"old"


def test_private_repositories_and_pull_requests(hub: HubDouble, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "")
    push(runs, private=True, token=TOKEN)
    assert hub.repositories[REPO].private
    with pytest.raises(ValueError, match=r"no repository 'me/chain' on the Hub, or it is not open to you"):
        load_from_hub(REPO)
    assert Path(load_from_hub(REPO, token=TOKEN)).is_file()
    assert push(runs, token=TOKEN, create_pr=True) == f"{hub.url}/{REPO}/discussions/1"
    assert len(hub.repositories[REPO].commits) == 2


def test_a_revision(hub: HubDouble, package: Path) -> None:
    hub.add(REPO, {MODEL: (package / MODEL).read_bytes()})
    assert Path(load_from_hub(REPO, revision=hub.repositories[REPO].sha)).is_file()
    with pytest.raises(ValueError, match="no such revision"):
        load_from_hub(REPO, revision="v2")


@pytest.mark.parametrize("repo", ["chain", "me/chain/x", "me/", "../chain", "me/ch ain", 3])
def test_names_of_repositories_are_checked_first(runs: Path, repo: Any) -> None:
    for call in (lambda: push(runs, repo), lambda: load_from_hub(repo), lambda: download_from_hub(repo, "new")):
        with pytest.raises(ValueError, match=r"repo_id|[Rr]epo id"):
            call()


def test_a_missing_token_is_noticed_before_the_evaluation(hub: HubDouble, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = list[str]()
    monkeypatch.setenv("HF_TOKEN", "")
    with pytest.raises(ValueError, match="hf auth login"):
        push(runs, report=lines.append)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(OSError, match=r"[Ii]nvalid"):
        push(runs, report=lines.append)
    assert lines == []
    assert hub.repositories == {}


def test_what_is_missing_is_named(hub: HubDouble, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no repository 'me/nothing'"):
        load_from_hub("me/nothing")
    with pytest.raises(ValueError, match="no repository 'me/nothing'"):
        download_from_hub("me/nothing", tmp_path / "new")
    hub.add(REPO, {CARD: b"# A card"})
    with pytest.raises(ValueError, match=r"'me/chain' has no such file"):
        load_from_hub(REPO)
    with pytest.raises(ValueError, match=r"has no file 'model.zip'"):
        download_from_hub(REPO, tmp_path / "new")


def test_downloads_replace_no_files_of_others(hub: HubDouble, package: Path, tmp_path: Path) -> None:
    hub.add(REPO, {MODEL: (package / MODEL).read_bytes(), "setup.py": b"", "agent.onnx": b"graph"})
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / CARD).write_text("mine")
    with pytest.raises(ValueError, match="not an empty folder"):
        download_from_hub(REPO, folder)
    assert text_of(folder) == "mine"
    (folder / CARD).unlink()
    download_from_hub(REPO, folder)
    assert {path.name for path in folder.iterdir()} == {MODEL, "agent.onnx", ".cache"}
    hub.repositories[REPO] = Repository(commits=[("later", {MODEL: b"new"})])
    assert download_from_hub(REPO, folder).read_bytes() == b"new"
    assert not (folder / "agent.onnx").exists()


def test_a_hub_that_cannot_be_reached_is_an_error(
    hub: HubDouble, package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An earlier download is not taken for the present one."""
    hub.add(REPO, {MODEL: (package / MODEL).read_bytes()})
    download_from_hub(REPO, tmp_path / "folder")
    point_to("http://127.0.0.1:1", monkeypatch)
    monkeypatch.setattr(time, "sleep", lambda _: None)  # between the attempts of huggingface_hub
    with pytest.raises(Exception, match=r"[Cc]onnect"):
        download_from_hub(REPO, tmp_path / "folder")
    assert (tmp_path / "folder" / MODEL).is_file()
    with pytest.raises(ConnectionError, match="cannot be reached"):
        load_from_hub("me/another")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r'pip install "sb3-cyborg\[hub\]"'):
        load_from_hub(REPO)


# --- files of strangers ---------------------------------------------------------------------------------------------------


def hostile_files(package: Path, marker: Path) -> dict[str, bytes]:
    """:return: A repository whose every file runs code when it is unpickled."""
    members = members_of(package / MODEL)
    pickles = {"vec_normalize.pkl": pickled(marker), "random_state.pkl": pickled(marker)}
    path = write_members(marker.parent / "hostile.zip", with_data(members, ep_info_buffer=pickled_entry(marker)) | pickles)
    return {MODEL: path.read_bytes(), "agent.onnx": pickled(marker), CONFIG: pickled(marker), CARD: pickled(marker)}


WAYS: dict[str, Callable[[], Any]] = {
    "MemoryPPO.load": lambda: MemoryPPO.load(load_from_hub(REPO)),
    "TrainerV7.load": lambda: TrainerV7.load(load_from_hub(REPO)),
    "download_from_hub": lambda: TrainerV7.load(download_from_hub(REPO, "new")),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_hostile_repository_runs_no_code(
    hub: HubDouble, package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    marker = tmp_path / "code_was_run"
    hub.add(REPO, hostile_files(package, marker))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"pickled .*`trust=True`"):
        WAYS[way]()
    assert not marker.exists()


def test_the_command_runs_no_code_without_trust(
    hub: HubDouble, package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = tmp_path / "code_was_run"
    hub.add(REPO, hostile_files(package, marker))
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(cli.app, ["hub", "load", REPO])
    assert result.exit_code == 2
    assert "--trust" in result.stderr
    assert not marker.exists()
    CliRunner().invoke(cli.app, ["hub", "load", REPO, "--trust"])
    assert marker.exists(), "the payload does not work, so this test shows nothing"


# --- the command ----------------------------------------------------------------------------------------------------------


def test_commands(hub: HubDouble, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--episodes", "2", "--no-video"]
    local = CliRunner().invoke(cli.app, ["hub", "push", str(runs / "first"), REPO, *options, "--local", "card"])
    assert local.exit_code == 0, local.output
    assert hub.requests == []
    pushed = CliRunner().invoke(cli.app, ["hub", "push", str(runs / "first"), REPO, *options, "-m", "a message"])
    assert pushed.exit_code == 0, pushed.output
    assert pushed.stdout.splitlines()[-1] == f"uploaded: {hub.url}/{REPO}"
    assert hub.repositories[REPO].commits[-1][0] == "a message"
    assert hub.repositories[REPO].files[CARD].decode() == text_of(tmp_path / "card")
    loaded = CliRunner().invoke(cli.app, ["hub", "load", REPO])
    assert loaded.exit_code == 0, loaded.output
    assert "hub/me/chain/model.zip: sb3_cyborg/MemoryChain-v0, 256 steps of training" in loaded.stdout
    for line in ("push -h", "load -h"):
        assert "Examples:" in CliRunner().invoke(cli.app, ["hub", *line.split()]).stdout
    for line in ("hub lod", "hub load chain", "hub push nothing me/chain", "hub load me/nothing"):
        result = CliRunner().invoke(cli.app, line.split())
        assert (result.exit_code, len(result.stderr.splitlines())) == (2, 1), result.output


@pytest.mark.slow
def test_commands_in_processes_of_their_own(runs: Path, tmp_path: Path) -> None:
    """The environment variables of huggingface_hub alone point it at the double."""
    with hub_double() as double:
        names = {"HF_ENDPOINT": double.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
        for line in (f"push {runs / 'first'} {REPO} --episodes 1", f"load {REPO} --output new"):
            command = [sys.executable, "-m", "sb3_cyborg.cli", "hub", *line.split()]
            result = subprocess.run(
                command, cwd=tmp_path, env={**os.environ, **names}, capture_output=True, text=True, timeout=120
            )
            assert result.returncode == 0, result.stderr
        uploaded = double.repositories[REPO].files[MODEL]
    assert hashlib.sha256((tmp_path / "new" / MODEL).read_bytes()).digest() == hashlib.sha256(uploaded).digest()


def test_copies_of_models_differ_in_the_config_alone(runs: Path, tmp_path: Path) -> None:
    source = runs / "first" / "final_model.zip"
    copy_model(source, tmp_path / "copy.zip", TrainerConfig.parse({"env": "CartPole-v1"}))
    with zipfile.ZipFile(io.BytesIO((tmp_path / "copy.zip").read_bytes())) as archive:
        assert archive.testzip() is None
    before, after = members_of(source), members_of(tmp_path / "copy.zip")
    assert before.keys() == after.keys()
    assert {name for name in before if before[name] != after[name]} == {"trainer_config.yaml"}
