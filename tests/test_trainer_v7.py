"""``TrainerV7``: training from a config, and the files of a run."""

import os
import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
import yaml
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import HParam
from stable_baselines3.common.monitor import load_results
from stable_baselines3.common.vec_env import VecFrameStack, VecNormalize, VecTransposeImage

from sb3_cyborg import MemoryPPO, TrainerV7
from sb3_cyborg.trainers import callbacks
from sb3_cyborg.trainers.checkpoints import find_checkpoint, list_checkpoints, read_checkpoint
from tests.helpers import predict, same, weights
from tests.trainer_helpers import EPISODE_LENGTH, ROLLOUT, TINY, run_folder, tiny


class At(BaseCallback):
    """Call ``action`` once, after ``num_timesteps`` steps."""

    def __init__(self, num_timesteps: int, action: Any) -> None:
        super().__init__()
        self.at, self.action = num_timesteps, action

    def _on_step(self) -> bool:
        if self.num_timesteps < self.at:
            return True
        self.at = 10**9
        return self.action() is not False


def test_the_example_of_the_mission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    trainer = TrainerV7(
        {
            "env": "CartPole-v1",
            "encoder": "mamba",
            "memory": {"type": "pmm", "num_slots": 16},
            "horizon": 1024,
            "burn_in": 128,
            "n_epochs": 1,
            "eval_interval": 0,
        }
    )
    trainer.train(total_timesteps=1024)
    trainer.save("checkpoints/model.pt")
    assert os.listdir("checkpoints") == ["model.pt"]
    model = MemoryPPO.load("checkpoints/model.pt")
    assert model.num_timesteps == 1024
    assert (model.n_steps, model.burn_in) == (1024, 128)
    loaded = TrainerV7.load("checkpoints/model.pt")
    obs = np.ones((1, 4), dtype=np.float32)
    for other in (model, loaded.model):
        assert same(weights(other.policy), weights(trainer.model.policy))
        first, second = (predict(model, obs, deterministic=True)[0] for model in (other, trainer.model))
        assert np.array_equal(first, second)
    assert loaded.evaluate(n_episodes=3) == trainer.evaluate(n_episodes=3)
    assert run_folder(trainer) == Path("runs/CartPole-v1_1")


def test_a_loaded_trainer_trains_as_a_new_run(tmp_path: Path) -> None:
    trainer = tiny(tmp_path, run_name="first").train()
    loaded = TrainerV7.load(run_folder(trainer)).train(total_timesteps=512)
    assert run_folder(loaded).name == "tests-Fixed-v0_1"
    assert loaded.model.num_timesteps == 512
    assert MemoryPPO.load(run_folder(trainer) / "final_model.zip").num_timesteps == 256


def test_files_of_a_run(tmp_path: Path) -> None:
    trainer = tiny(tmp_path, eval_freq=64, n_eval_episodes=3, tensorboard=True, histograms=False, keep_checkpoints=2)
    trainer.train()
    run = run_folder(trainer)
    assert {path.name for path in run.iterdir()} == {
        "best_model.zip",
        "checkpoints",
        "config.yaml",
        "evaluations.npz",
        "final_model.zip",
        "monitor.csv",
        "run.lock",
        "sessions.yaml",
        "tensorboard",
    }
    assert [path.stem for path in list_checkpoints(run)] == ["step_000000000192", "step_000000000256"]
    for path in run.rglob("*.zip"):
        assert MemoryPPO.load(path).num_timesteps == read_checkpoint(path).progress["num_timesteps"]
    (session,) = yaml.safe_load((run / "sessions.yaml").read_text())
    assert session["num_timesteps"] == 0
    assert session["versions"]["torch"] == th.__version__
    episodes = load_results(str(run))
    assert len(episodes) == 256 // EPISODE_LENGTH
    assert episodes["timesteps"].tolist() == sorted(2 * [*range(16, 257, 16)])
    with np.load(run / "evaluations.npz") as evaluations:
        assert evaluations["timesteps"].tolist() == [64, 128, 192, 256]
        assert evaluations["results"].shape == evaluations["ep_lengths"].shape == (4, 3)
        best = int(evaluations["results"].mean(axis=1).argmax())
        assert read_checkpoint(run / "best_model.zip").progress == {
            "num_timesteps": int(evaluations["timesteps"][best]),
            "mean_return": pytest.approx(evaluations["results"][best].mean()),
        }
        assert trainer.evaluate(3) == (evaluations["results"][-1].mean(), evaluations["results"][-1].std())


def test_a_run_is_repeated_from_its_folder(tmp_path: Path) -> None:
    first = tiny(tmp_path, seed=None).train()
    second = TrainerV7(run_folder(first) / "config.yaml").train()
    assert first.config.seed == second.config.seed is not None
    assert run_folder(first) != run_folder(second)
    assert same(weights(first.model.policy), weights(second.model.policy))
    third = tiny(tmp_path, seed=None).train()
    assert not same(weights(first.model.policy), weights(third.model.policy))


def test_a_named_run_is_not_overwritten(tmp_path: Path) -> None:
    run = run_folder(tiny(tmp_path, run_name="mine").train())
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"There is a run .*mine.* already: give another `run_name`"):
        tiny(tmp_path, run_name="mine").train()
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_which_checkpoint(tmp_path: Path) -> None:
    run = run_folder(tiny(tmp_path).train())
    assert find_checkpoint(run, "last").stem == "step_000000000256"
    assert find_checkpoint(run, "best").stem == "step_000000000256"  # the run had no evaluation
    assert find_checkpoint(run, "192").stem == "step_000000000192"
    assert TrainerV7.load(run, "192").model.num_timesteps == 192
    with pytest.raises(ValueError, match="no checkpoint '7': 'best', 'last' and 128, 192, 256"):
        TrainerV7.load(run, "7")
    with pytest.raises(ValueError, match="no run or checkpoint"):
        TrainerV7.load(tmp_path / "nothing")


def test_files_that_are_not_checkpoints(tmp_path: Path) -> None:
    trainer = tiny(tmp_path)
    trainer.model.save(tmp_path / "plain.zip")
    with pytest.raises(ValueError, match="not written by TrainerV7"):
        TrainerV7.load(tmp_path / "plain.zip")
    trainer.save(tmp_path / "whole.pt")
    content = (tmp_path / "whole.pt").read_bytes()
    for damaged in (content[: len(content) // 2], b"", content.replace(b"num_timesteps", b"mun_timesteps")):
        (tmp_path / "damaged.pt").write_bytes(damaged)
        with pytest.raises(ValueError, match="not a complete checkpoint"):
            TrainerV7.load(tmp_path / "damaged.pt")
    with pytest.raises(ValueError, match="`hidden_dim` cannot change"):
        TrainerV7.load(tmp_path / "whole.pt", hidden_dim=16)
    with pytest.raises(ValueError, match=r"'devise'.*'device'"):
        TrainerV7.load(tmp_path / "whole.pt", devise="cpu")


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = tiny(tmp_path)
    trainer.save(tmp_path / "model.pt")
    before = (tmp_path / "model.pt").read_bytes()

    def full(_: int) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        trainer.save(tmp_path / "model.pt")
    assert (tmp_path / "model.pt").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


# --- environments


def test_normalization(tmp_path: Path) -> None:
    trainer = tiny(tmp_path, normalize={"norm_reward": False, "clip_obs": 3.0}, gamma=0.9).train()
    normalize = trainer.model.get_vec_normalize_env()
    assert isinstance(normalize, VecNormalize)
    assert (normalize.norm_reward, normalize.clip_obs, normalize.gamma) == (False, 3.0, 0.9)
    learned: Any = normalize.obs_rms  # SB3 types it as that of a Dict
    count = learned.count
    trainer.evaluate(2)
    assert learned.count == count
    eval_env = trainer.make_eval_env()
    assert isinstance(eval_env, VecNormalize)
    assert (eval_env.training, eval_env.norm_reward) == (False, False)
    copied: Any = eval_env.obs_rms
    assert np.array_equal(copied.mean, learned.mean)
    assert tiny(tmp_path, normalize=True).model.get_vec_normalize_env() is not None
    assert tiny(tmp_path).model.get_vec_normalize_env() is None
    with pytest.raises(ValueError, match=r"'clip_ops'.*'clip_obs'"):
        tiny(tmp_path, normalize={"clip_ops": 3.0})


@pytest.mark.parametrize(
    ("env", "policy", "settings"),
    [
        ("CartPole-v1", "MlpPolicy", {}),
        ("CartPole-v1", "MlpPolicy", {"frame_stack": 3}),
        ("tests.trainer_helpers:tests/Image-v0", "CnnPolicy", {"frame_stack": 2}),
        ("tests.trainer_helpers:tests/Dict-v0", "MultiInputPolicy", {"normalize": {"norm_obs_keys": ["vector"]}}),
    ],
)
def test_the_policy_fits_the_observations(tmp_path: Path, env: str, policy: str, settings: dict[str, Any]) -> None:
    trainer = tiny(tmp_path, env=env, total_timesteps=ROLLOUT, n_epochs=1, **settings)
    assert trainer.model.policy_class is MemoryPPO.policy_aliases[policy]
    stack = settings.get("frame_stack", 1)
    if policy == "MlpPolicy":
        assert trainer.env.observation_space.shape == (4 * stack,)
    if policy == "CnnPolicy":
        assert isinstance(trainer.env, VecTransposeImage)
        assert isinstance(trainer.env.venv, VecFrameStack)
    trainer.train()
    loaded = TrainerV7.load(run_folder(trainer), "last")
    assert loaded.evaluate(2) == trainer.evaluate(2)


def test_settings_that_do_not_fit_the_observations(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"normalize images.*norm_obs: false"):
        tiny(tmp_path, env="tests.trainer_helpers:tests/Image-v0", normalize=True)
    with pytest.raises(ValueError, match="images 'image'"):
        tiny(tmp_path, env="tests.trainer_helpers:tests/Dict-v0", normalize=True)
    with pytest.raises(ValueError, match=r"'vektor'.*'vector'"):
        tiny(tmp_path, env="tests.trainer_helpers:tests/Dict-v0", normalize={"norm_obs_keys": ["vektor"]})
    with pytest.raises(ValueError, match="`frame_stack`=2 needs Box observations"):
        tiny(tmp_path, env="tests.trainer_helpers:tests/Discrete-v0", frame_stack=2)
    with pytest.raises(ValueError, match="MultiInputPolicy"):
        tiny(tmp_path, env="tests.trainer_helpers:tests/Dict-v0", policy="MlpPolicy")
    with pytest.raises(ValueError, match="num_slots"):
        tiny(tmp_path, memory={"type": "slot", "num_slots": 0})
    assert list(tmp_path.iterdir()) == []  # a run that did not begin leaves no files


def test_evaluation_needs_no_training_environments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = tiny(tmp_path, normalize=True).train()

    def refuse(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr("sb3_cyborg.trainers.trainer_v7.make_training_env", refuse)
    loaded = TrainerV7.load(run_folder(trainer), "last")
    assert loaded.evaluate(3) == trainer.evaluate(3)
    loaded.close()
    with pytest.raises(AssertionError):
        TrainerV7.resume(run_folder(trainer), total_timesteps=512)


def test_saving_a_loaded_trainer(tmp_path: Path) -> None:
    trainer = tiny(tmp_path, normalize=True).train()
    trainer.save(tmp_path / "first.pt")
    TrainerV7.load(tmp_path / "first.pt").save(tmp_path / "second.pt")
    first, second = (read_checkpoint(tmp_path / name) for name in ("first.pt", "second.pt"))
    assert first.progress == second.progress
    statistics: list[Any] = [checkpoint.normalize.obs_rms for checkpoint in (first, second) if checkpoint.normalize]
    assert np.array_equal(statistics[0].mean, statistics[1].mean)
    assert th.equal(first.random["torch"], second.random["torch"])
    assert TrainerV7.load(tmp_path / "second.pt").evaluate(2) == trainer.evaluate(2)


# --- a run that ends early


@pytest.mark.parametrize(("how", "error"), [("raise", RuntimeError), ("nan", ValueError)])
def test_an_error_saves_first(tmp_path: Path, capsys: pytest.CaptureFixture[str], how: str, error: type[Exception]) -> None:
    # The third rollout is interrupted, after 2 complete rollouts of 16 steps of each environment.
    trainer = tiny(tmp_path, env_kwargs={"break_at": 36, "how": how}, save_freq=0)
    with pytest.raises(error, match=r"simulator has died|not finite"):
        trainer.train()
    (path,) = list_checkpoints(run_folder(trainer))
    assert path.stem == f"step_{2 * ROLLOUT:012d}"
    assert same(weights(MemoryPPO.load(path).policy), weights(trainer.model.policy))
    printed = capsys.readouterr().err
    assert f"after {2 * ROLLOUT} steps: saved {path}" in printed
    assert f"--resume {trainer.run}" in printed


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_and_says_where(tmp_path: Path, capsys: pytest.CaptureFixture[str], number: signal.Signals) -> None:
    before = signal.getsignal(number)
    trainer = tiny(tmp_path, save_freq=0)
    with pytest.raises(KeyboardInterrupt):
        trainer.train(callback=At(ROLLOUT + 10, lambda: signal.raise_signal(number)))
    (path,) = list_checkpoints(run_folder(trainer))
    assert MemoryPPO.load(path).num_timesteps == trainer.model.num_timesteps == ROLLOUT
    assert f"saved {path}" in capsys.readouterr().err
    assert signal.getsignal(number) is before
    resumed = TrainerV7.resume(run_folder(trainer)).train()
    assert resumed.model.num_timesteps == 256


def test_a_second_ctrl_c_ends_at_once(tmp_path: Path) -> None:
    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    trainer = tiny(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        trainer.train(callback=At(ROLLOUT + 10, twice))
    assert read_checkpoint(list_checkpoints(run_folder(trainer))[-1]).progress["num_timesteps"] == ROLLOUT


class AtRolloutEnd(At):
    """Call ``action`` once, at the end of the rollout, before the update."""

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        At._on_step(self)


@pytest.mark.parametrize(
    ("when", "error", "outcome"),
    [
        # The steps of the rollout do not count, and the file of its start exists.
        (At, "The values of the critic are not finite", r"after 128 steps: saved .*step_000000000128\.zip"),
        (
            AtRolloutEnd,
            "Gradients are not finite",
            r"after 160 steps: nothing could be saved \(The weights are not finite after",
        ),
    ],
)
def test_weights_that_are_not_finite_are_not_saved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], when: type[At], error: str, outcome: str
) -> None:
    trainer = tiny(tmp_path)

    def poison() -> None:
        with th.no_grad():
            next(iter(trainer.model.policy.value_net.parameters())).fill_(float("nan"))

    with pytest.raises(ValueError, match=error):
        trainer.train(callback=when(128 + ROLLOUT, poison))
    assert re.search(outcome, capsys.readouterr().err)
    for path in list_checkpoints(run_folder(trainer)):
        assert all(tensor.isfinite().all() for tensor in weights(MemoryPPO.load(path).policy).values())
    assert TrainerV7.resume(run_folder(trainer)).model.num_timesteps == 128


def test_a_callback_may_end_training(tmp_path: Path) -> None:
    trainer = tiny(tmp_path).train(callback=At(ROLLOUT + 10, lambda: False))
    assert trainer.model.num_timesteps == ROLLOUT
    assert MemoryPPO.load(run_folder(trainer) / "final_model.zip").num_timesteps == ROLLOUT
    seen: list[int] = []

    def function(variables: dict[str, Any], _: dict[str, Any]) -> bool:
        seen.append(variables["self"].num_timesteps)
        return True

    tiny(tmp_path, total_timesteps=ROLLOUT).train(callback=function)
    assert seen == [*range(2, ROLLOUT + 1, 2)]


# --- logs


def test_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = tiny(tmp_path, tensorboard=True, memory={"type": "pmm", "num_slots": 4}, eval_freq=128).train()
    board = EventAccumulator(str(run_folder(trainer) / "tensorboard"), size_guidance={"histograms": 0}).Reload()
    tags = set(board.Tags()["scalars"])
    assert tags >= {
        "eval/mean_reward",
        "memory/fill",
        "memory/read_entropy",
        "memory/write_strength",
        "rollout/ep_rew_mean",
        "time/fps",
        "train/approx_kl",
        "train/clip_fraction",
        "train/entropy_loss",
        "train/explained_variance",
        "train/learning_rate",
        "train/ratio_error",
        "train/value_loss",
    }
    assert [event.step for event in board.Scalars("eval/mean_reward")] == [128, 256]
    gates = [event.histogram_value for event in board.Histograms("memory/write_gates")]
    assert len(gates) == 256 // ROLLOUT
    for histogram in gates:
        assert histogram.num == ROLLOUT
        assert 0 <= histogram.min <= histogram.max <= 1


class HParamCallback(BaseCallback):
    """The callback of SB3's documentation (guide/tensorboard), unchanged."""

    def _on_training_start(self) -> None:
        hparam_dict = {
            "algorithm": self.model.__class__.__name__,
            "learning rate": self.model.learning_rate,
            "gamma": self.model.gamma,  # type: ignore[attr-defined]  # SB3's base class does not declare it
        }
        metric_dict = {
            "rollout/ep_len_mean": 0.0,
            "train/value_loss": 0.0,
        }
        self.logger.record(
            "hparams",
            HParam(hparam_dict, metric_dict),
            exclude=("stdout", "log", "json", "csv"),
        )

    def _on_step(self) -> bool:
        return True


@pytest.mark.parametrize("settings", [{}, {"learning_rate": 3e-4}])
def test_sb3s_hparam_callback(tmp_path: Path, settings: dict[str, Any]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = tiny(tmp_path, tensorboard=True, histograms=False, **settings).train(callback=HParamCallback())
    board = EventAccumulator(str(run_folder(trainer) / "tensorboard")).Reload()
    shown = board.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    for part in (b"MemoryPPO", b"learning rate", b"gamma"):
        assert part in shown
    assert "train/value_loss" in board.Tags()["scalars"]


def test_progress_without_a_terminal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from rich.console import Console

    monkeypatch.setattr(callbacks, "SECONDS_BETWEEN_LINES", 0.0)
    display = callbacks.ProgressDisplay(Console(file=open(tmp_path / "out", "w"), force_terminal=False))  # noqa: SIM115
    tiny(tmp_path, total_timesteps=128).train(callback=display)
    display.console.file.close()
    lines = (tmp_path / "out").read_text().splitlines()
    assert len(lines) == 128 // 2 + 1
    assert lines[0].startswith("2/128 steps, ")
    assert "return -" in lines[0]
    assert lines[-1].startswith("128/128 steps, ")
    assert lines[-1].endswith(" 0:00:00 left")
    mean = np.mean([episode["r"] for episode in display.model.ep_info_buffer or ()])
    assert f" steps/s, return {mean:.2f}, " in lines[-1]


def test_progress_in_a_terminal(tmp_path: Path) -> None:
    from rich.console import Console

    console = Console(file=open(tmp_path / "out", "w"), force_terminal=True, width=120)  # noqa: SIM115
    display = callbacks.ProgressDisplay(console)
    tiny(tmp_path, total_timesteps=128).train(callback=display)
    display.close()
    console.file.close()
    text = (tmp_path / "out").read_text()
    assert "128/128" in text
    assert "steps/s, return" in text


def test_clock() -> None:
    assert [callbacks.clock(seconds) for seconds in (0, 59.6, 3600 + 62, 360_000)] == [
        "0:00:00",
        "0:01:00",
        "1:01:02",
        "100:00:00",
    ]


@pytest.mark.slow
def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    trainer = tiny(tmp_path, wandb=True, total_timesteps=128, eval_freq=64, memory={"type": "pmm", "num_slots": 4}).train()
    run = run_folder(trainer)
    (file,) = run.glob("wandb/offline-run-*/run-*.wandb")
    deadline = time.monotonic() + 60
    while b"train/ratio_error" not in (content := file.read_bytes()) and time.monotonic() < deadline:
        time.sleep(0.1)  # the process of W&B writes it shortly after `finish`
    assert b"train/ratio_error" in content
    assert b"eval/mean_reward" in content
    assert b"memory/write_gates" in content
    assert (run / "wandb_id").read_text() in file.name


def test_wandb_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match=r'pip install "sb3-cyborg\[wandb\]"'):
        tiny(tmp_path, wandb=True).train()
    assert list(tmp_path.iterdir()) == []


def test_the_model_learns_without_its_trainer(tmp_path: Path) -> None:
    model = tiny(tmp_path, tensorboard=True, histograms=False).train().model
    assert model.learn(64, reset_num_timesteps=False).num_timesteps == 320


def test_without_its_extra() -> None:
    code = """
import sys
import sb3_cyborg
print([name for name in ("pydantic", "yaml", "typer", "wandb") if name in sys.modules])
sys.modules["pydantic"] = None
for name in ("TrainerV7", "TrainerV8"):
    try:
        getattr(sb3_cyborg, name)
    except (ImportError, AttributeError) as error:
        print(error)
import sb3_cyborg.cli
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stdout.splitlines() == [
        "[]",
        'TrainerV7 needs pydantic: pip install "sb3-cyborg[train]"',
        "module 'sb3_cyborg' has no attribute 'TrainerV8'",
    ]
    assert result.stderr.splitlines()[-1] == 'sb3-cyborg: error: pydantic is missing: pip install "sb3-cyborg[train]"'
    assert result.returncode == 1


def test_one_thread_unless_told_otherwise(tmp_path: Path) -> None:
    before = th.get_num_threads()
    try:
        th.set_num_threads(2)
        tiny(tmp_path, torch_threads=None)
        assert th.get_num_threads() == 2
        tiny(tmp_path)
        assert th.get_num_threads() == 1
    finally:
        th.set_num_threads(before)


def test_small_settings_are_tiny() -> None:
    assert TINY["n_steps"] * TINY["n_envs"] == ROLLOUT
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TrainerV7(TINY)
