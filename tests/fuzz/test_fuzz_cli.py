"""Command lines of any content: they do their work or end with one line; none ends in a traceback, and none hangs."""

import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from sb3_cyborg import TrainerV7, cli
from sb3_cyborg.trainers.config import TrainerConfig
from sb3_cyborg.trainers.config_flags import FLAG_KEYS, as_flag
from tests.fuzz.outcomes import ITEMS, cases, some, within
from tests.trainer_helpers import tiny

OWN_SIZES = {"n_envs", "n_steps", "seq_len", "batch_size", "burn_in", "n_epochs", "hidden_dim", "latent_dim", "num_layers"}
OWN_SIZES |= {"net_arch", "frame_stack", "stats_window_size", "n_eval_episodes"}
"""Keys of sizes: small here, as a large one that is allowed takes its time. ``test_fuzz_model.py`` draws them of any size."""

NO_TEXT = "\x00"  # no argument of a process can hold it


def as_argument(value: Any) -> str:
    """:return: A value as it may be written on a command line."""
    if isinstance(value, str):
        return value.replace(NO_TEXT, "")
    try:
        return yaml.safe_dump(value, default_flow_style=True).removesuffix("\n...\n").strip()
    except yaml.YAMLError:  # numpy's numbers
        return str(value)


WORDS = st.one_of(
    ITEMS.map(as_argument),
    st.sampled_from(
        ["run", "run/config.yaml", "run/final_model.zip", "nothing", "", ".", "-", "--", "-h", "{", "[1, 2", "null"]
    ),
    st.sampled_from(
        ["CartPole-v1", "tests/Fixed-v0", ".x:Id", "os:x", "{type: pmm}", "{type: ring, num_slots: x}", "a.png", "a.gif"]
    ),
)


def flag_with_value(name: str) -> st.SearchStrategy[list[str]]:
    """:return: A flag of a setting and a value for it."""
    values = st.integers(-1, 32).map(str) if FLAG_KEYS[name] in OWN_SIZES else WORDS
    field = TrainerConfig.model_fields[FLAG_KEYS[name]]
    if field.annotation is bool:
        return st.sampled_from([[as_flag(name)], [f"--no-{as_flag(name)[2:]}"]])
    return values.map(lambda value: [as_flag(name), value])


SETTINGS = st.lists(st.sampled_from(sorted(FLAG_KEYS)).flatmap(flag_with_value), max_size=3).map(
    lambda parts: [argument for part in parts for argument in part]
)
BASE = ["--env", "tests/Fixed-v0", "--hidden-dim", "8", "--n-steps", "16", "--n-epochs", "1", "--device", "cpu"]
TRAIN = st.tuples(st.sampled_from([[], BASE, BASE, ["--resume", "run"], ["--config", "run/config.yaml"]]), SETTINGS)
COMMANDS = st.sampled_from(["train", "eval", "enjoy", "plot", "inspect", "envs", "zoo", "trian", "", "-h"])
FLAGS = [
    "--episodes",
    "--which",
    "--device",
    "--seed",
    "--max-steps",
    "--heads",
    "--output",
    "--x",
    "--y",
    "--window",
    "--each",
]
FLAGS += ["--stochastic", "--video", "--resume", "--restart", "--config"]
OTHER = st.tuples(COMMANDS, st.lists(st.one_of(WORDS, st.sampled_from(FLAGS)), max_size=5))
LINES = st.one_of(
    TRAIN.map(lambda parts: ["train", *parts[0], *parts[1]]),
    OTHER.map(lambda parts: [parts[0], *parts[1]]),
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """:return: The folder of a finished run."""
    trainer = tiny(tmp_path_factory.mktemp("fuzz_cli"), run_name="run", total_timesteps=64).train()
    assert trainer.run is not None
    return trainer.run


@cases(300, 5000)
def test_command_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: Path, count: int) -> None:
    # Everything but the training itself: a run is made and locked, and its settings and environments are checked.
    monkeypatch.setattr(TrainerV7, "train", TrainerV7.open_run)
    monkeypatch.setenv("MPLBACKEND", "agg")
    codes = set()

    @some(count)
    @given(LINES)
    def check(line: list[str]) -> None:
        folder = tmp_path / "here"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(finished, folder / "run")
        os.chdir(folder)
        # A wish for many episodes is no hang: those here last for 8 steps, in a process that is asked for at most a million.
        with within(120), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = CliRunner().invoke(cli.app, line)
        shown = f"{line}\n{result.output}\n{result.exception!r}"
        assert result.exception is None or isinstance(result.exception, SystemExit), shown
        assert result.exit_code in (0, 1, 2), shown
        assert "Traceback" not in result.output, shown
        if result.exit_code and line[:1] != ["zoo"] and line[:1] != [""]:
            errors = [text for text in result.stderr.splitlines() if text.startswith("sb3-cyborg: error: ")]
            assert len(errors) == 1, shown
            assert len(errors[0]) < 5000, shown
        codes.add(result.exit_code)

    monkeypatch.chdir(tmp_path)
    check()
    os.chdir(tmp_path)
    assert codes >= {0, 2}, "some are accepted, some are not"
