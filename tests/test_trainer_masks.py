"""The trainer, the command line and RL Zoo find action masks by themselves; all that act afterwards use them."""

import argparse
import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from sb3_cyborg import MaskableMemoryPPO, MemoryPPO, cli, zoo
from sb3_cyborg.envs import FAMILIES
from sb3_cyborg.trainers.config import TrainerConfig
from sb3_cyborg.trainers.trainer_v7 import TrainerV7, _algorithm
from sb3_cyborg.viewers.inspection import inspect_episode
from sb3_cyborg.viewers.recording import enjoy
from tests.mask_helpers import MaskedToyEnv
from tests.trainer_helpers import TINY

MASKED = "tests/Masked-v0"
"""Its environments assert that actions are legal, so a step without masks fails sooner or later."""


class Drawn(MaskedToyEnv):
    """:class:`MaskedToyEnv` with pictures."""

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012  # gymnasium's convention

    def __init__(self, render_mode: str | None = None) -> None:
        super().__init__()
        self.render_mode = render_mode

    def render(self) -> Any:
        return np.zeros((8, 8, 3), np.uint8)


@pytest.fixture(autouse=True)
def masked() -> Any:
    gym.register(MASKED, entry_point="tests.test_trainer_masks:Drawn")
    yield
    del gym.registry[MASKED]


def config(tmp_path: Path, **settings: Any) -> dict[str, Any]:
    return {**TINY, "env": MASKED, "log_dir": str(tmp_path), **settings}


def test_masks_are_found(tmp_path: Path) -> None:
    trainer = TrainerV7(config(tmp_path)).train()
    assert type(trainer.model) is MaskableMemoryPPO
    assert trainer.run is not None
    assert yaml.safe_load((trainer.run / "config.yaml").read_text())["use_masking"] is True
    trainer.evaluate(n_episodes=20, deterministic=False)


def test_environments_without_masks(tmp_path: Path) -> None:
    trainer = TrainerV7(TINY | {"log_dir": str(tmp_path)})
    assert type(trainer.model) is MemoryPPO
    assert trainer.config.use_masking is False
    with pytest.raises(ValueError, match="`use_masking`=true needs discrete actions and a method `action_masks"):
        TrainerV7(TINY | {"log_dir": str(tmp_path), "use_masking": True})


def test_masks_can_be_turned_off(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="illegal action"):
        TrainerV7(config(tmp_path, use_masking=False)).train()


def test_a_run_with_masks_is_loaded_and_resumed(tmp_path: Path) -> None:
    run = TrainerV7(config(tmp_path)).train().run
    assert run is not None
    resumed = TrainerV7.resume(run, total_timesteps=2 * TINY["total_timesteps"])
    assert type(resumed.model) is MaskableMemoryPPO
    resumed.train()
    loaded = TrainerV7.load(run, "last")
    assert type(loaded.model) is MaskableMemoryPPO
    loaded.evaluate(n_episodes=20, deterministic=False)


def test_checkpoints_of_earlier_versions_have_no_masks() -> None:
    """Their config has no key ``use_masking``."""
    assert _algorithm(TrainerConfig.parse({"env": MASKED})) is MemoryPPO


def test_watching_and_inspecting_take_legal_actions(tmp_path: Path) -> None:
    model = TrainerV7(config(tmp_path)).model
    results = enjoy(
        model, Drawn("rgb_array"), video=tmp_path / "a.gif", n_episodes=10, deterministic=False, report=lambda _: None
    )
    assert len(results) == 10
    for seed in range(10):
        inspect_episode(model, Drawn(), seed=seed, deterministic=False)


@pytest.mark.parametrize(("flag", "algorithm"), [((), "True"), (("--use-masking",), "True"), (("--no-use-masking",), "False")])
def test_flag_of_the_command_line(tmp_path: Path, flag: tuple[str, ...], algorithm: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config(tmp_path, run_name="run", total_timesteps=8)))
    result = CliRunner().invoke(cli.app, ["train", "--config", str(path), *flag])
    if algorithm == "True":
        assert result.exit_code == 0, result.output
    assert f"use_masking: {algorithm.lower()}" in (tmp_path / "run" / "config.yaml").read_text()


# --- RL Zoo -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def run_zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """:return: Runs a command in an empty folder and returns what it printed."""
    monkeypatch.chdir(tmp_path)

    def run(command: str, *argv: str) -> str:
        capsys.readouterr()
        with warnings.catch_warnings():
            warnings.filterwarnings("error", ".*state=None.*")
            zoo.zoo_main([command, "--algo", zoo.MASKABLE_ALGO, "--env", MASKED, *argv])
        return capsys.readouterr().out

    return run


MASKED_GAMES = sorted(FAMILIES["POPGymMasked"].kwargs)


@pytest.mark.parametrize("name", MASKED_GAMES)
def test_zoo_entry(name: str, tmp_path: Path) -> None:
    pytest.importorskip("popgym")
    zoo.register()
    manager_class: Any = vars(import_module("rl_zoo3.train"))["ExperimentManager"]
    quiet: dict[str, Any] = {"seed": 0, "verbose": 0, "eval_freq": -1, "device": "cpu"}
    manager = manager_class(argparse.Namespace(), zoo.MASKABLE_ALGO, name, str(tmp_path), **quiet)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*mini-batch")
        model, _ = manager.setup_experiment()
    assert type(model) is MaskableMemoryPPO
    assert model.n_envs == 32
    assert model.policy.use_last_action == ("Concentration" not in name)


PARAMS = ["-params", "n_envs:2", "n_steps:64", "batch_size:64"]


def test_zoo_trains_evaluates_and_watches_with_masks(run_zoo: Callable[..., str]) -> None:
    run_zoo("train", "-n", "256", "--eval-freq", "64", "--eval-episodes", "5", "--seed", "1", *PARAMS)
    folder = Path("logs", zoo.MASKABLE_ALGO, "tests-Masked-v0_1")
    assert (folder / "evaluations.npz").is_file()
    assert type(MaskableMemoryPPO.load(folder / "best_model.zip", device="cpu")) is MaskableMemoryPPO
    assert "Mean reward" in run_zoo("evaluate", "-n", "100", "--stochastic")
    assert "Mean reward" in run_zoo("enjoy", "-n", "100", "--no-render", "--load-best")


def test_zoo_records_with_masks(run_zoo: Callable[..., str]) -> None:
    run_zoo("train", "-n", "128", "--eval-freq", "-1", "--seed", "1", *PARAMS)
    run_zoo("record_video", "-n", "40", "--stochastic")
    assert list(Path("logs").rglob("*.mp4"))


def test_zoo_tunes_with_masks(run_zoo: Callable[..., str]) -> None:
    run_zoo(
        "train", "-n", "300", "-optimize", "--n-trials", "1", "--n-startup-trials", "1", "--n-evaluations", "2",
        "--sampler", "random", "--pruner", "none", "--seed", "1", "-params", "n_envs:2",
    )  # fmt: skip
    (report,) = Path("logs", zoo.MASKABLE_ALGO).glob("report_*.csv")
    assert "COMPLETE" in report.read_text()  # a trial whose evaluation takes an illegal action is pruned


def test_the_zoos_algorithm_is_restored_after_a_script(run_zoo: Callable[..., str]) -> None:
    import rl_zoo3

    with pytest.raises(ValueError, match="folder was not found"):
        run_zoo("enjoy", "--exp-id", "9")
    assert rl_zoo3.ALGOS[zoo.MASKABLE_ALGO] is MaskableMemoryPPO
