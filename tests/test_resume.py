"""Resuming: an interrupted or killed run continues as an uninterrupted one."""

import multiprocessing
import os
import signal
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
import yaml
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.monitor import load_results
from stable_baselines3.common.vec_env import VecNormalize

from sb3_cyborg import MemoryPPO, TrainerV7
from sb3_cyborg.trainers.checkpoints import checkpoint_path, list_checkpoints, read_checkpoint
from sb3_cyborg.trainers.config import TrainerConfig
from tests.helpers import same, weights
from tests.trainer_helpers import ROLLOUT, run_folder, tiny

HALF, WHOLE = 4 * ROLLOUT, 8 * ROLLOUT


class Crash(Exception):
    """The error that ends the first half."""


class CrashAt(BaseCallback):
    """Raise after ``num_timesteps`` steps."""

    def __init__(self, num_timesteps: int) -> None:
        super().__init__()
        self.at = num_timesteps

    def _on_step(self) -> bool:
        if self.num_timesteps >= self.at:
            raise Crash
        return True


@pytest.fixture
def updates(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """:return: A list to which each update appends its log."""
    logged: list[dict[str, Any]] = []
    log_update = MemoryPPO._log_update

    def logging(self: MemoryPPO, *args: Any) -> None:
        log_update(self, *args)
        logged.append(dict(self.logger.name_to_value))

    monkeypatch.setattr(MemoryPPO, "_log_update", logging)
    return logged


def optimizer_state(trainer: TrainerV7) -> dict[str, th.Tensor]:
    """:return: The optimizer's moments and step counts, by name."""
    state = trainer.model.policy.optimizer.state_dict()["state"]
    return {f"{index}.{name}": th.as_tensor(value) for index, part in state.items() for name, value in part.items()}


def statistics(trainer: TrainerV7) -> dict[str, Any]:
    """:return: The statistics of ``VecNormalize``."""
    normalize = trainer.model.get_vec_normalize_env()
    assert isinstance(normalize, VecNormalize)
    obs_rms: Any = normalize.obs_rms  # SB3 types it as that of a Dict
    ret_rms = normalize.ret_rms
    return {
        "mean": obs_rms.mean.tolist(),
        "var": obs_rms.var.tolist(),
        "count": obs_rms.count,
        "return": (float(ret_rms.mean), float(ret_rms.var), ret_rms.count),
    }


SCHEDULED: dict[str, Any] = {
    "normalize": True,
    "learning_rate": "lin_1e-3",
    "clip_range": "lin_0.3",
    "total_timesteps": WHOLE,
    "save_freq": HALF,
    "burn_in": 4,
    "seq_len": 8,
}
SETTINGS = {"tensorboard": True, "histograms": False, "eval_freq": HALF // 2, "n_eval_episodes": 2}


@pytest.mark.parametrize("crash_at", [HALF + 2, HALF + 10, WHOLE - 2])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, updates: list[dict[str, Any]], crash_at: int) -> None:
    straight = tiny(tmp_path / "straight", **SCHEDULED, **SETTINGS)
    straight.train()
    whole = list(updates)

    broken = tiny(tmp_path / "broken", **SCHEDULED, **SETTINGS)
    with pytest.raises(Crash):
        broken.train(callback=CrashAt(crash_at))
    run = run_folder(broken)
    # This test resumes from the first checkpoint. The best model may be newer, and so is the checkpoint of the crash itself.
    for later in [*list_checkpoints(run)[1:], run / "best_model.zip"]:
        later.unlink()
    th.manual_seed(99)  # as another process would
    np.random.seed(99)  # noqa: NPY002
    # TensorBoard orders files by names that hold whole seconds; a new process would start later than that.
    time.sleep(1)
    resumed = TrainerV7.resume(run)
    assert resumed.model.num_timesteps == HALF
    updates.clear()
    resumed.train()

    assert resumed.model.num_timesteps == straight.model.num_timesteps == WHOLE
    assert resumed.model._n_updates == straight.model._n_updates
    for name in ("train/learning_rate", "train/clip_range", "train/loss"):
        assert [update[name] for update in updates] == [update[name] for update in whole[4:]]
    assert same(weights(resumed.model.policy), weights(straight.model.policy))
    assert same(optimizer_state(resumed), optimizer_state(straight))
    assert statistics(resumed) == statistics(straight)
    assert resumed.evaluate(2) == straight.evaluate(2)
    columns = ["r", "l", "timesteps"]
    assert load_results(str(run))[columns].equals(load_results(str(run_folder(straight)))[columns])
    for trainer in (straight, resumed):
        with np.load(run_folder(trainer) / "evaluations.npz") as file:
            assert file["timesteps"].tolist() == [HALF // 2, HALF, HALF + HALF // 2, WHOLE]
    assert scalars(run) == scalars(run_folder(straight))


def scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    """:return: The scalars that TensorBoard shows of a run, without times."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(run / "tensorboard")).Reload()
    tags = [tag for tag in board.Tags()["scalars"] if not tag.startswith("time/")]
    return {tag: [(event.step, event.value) for event in board.Scalars(tag)] for tag in tags}


def test_resuming_restores_the_state(tmp_path: Path, updates: list[dict[str, Any]]) -> None:
    trainer = tiny(tmp_path, **SCHEDULED).train()
    run = run_folder(trainer)
    drawn = th.rand(3).tolist(), np.random.rand(3).tolist()  # noqa: NPY002
    other = TrainerV7.resume(run, total_timesteps=2 * WHOLE)
    assert other.model.num_timesteps == WHOLE
    assert same(weights(other.model.policy), weights(trainer.model.policy))
    assert same(optimizer_state(other), optimizer_state(trainer))
    assert statistics(other) == statistics(trainer)
    assert (th.rand(3).tolist(), np.random.rand(3).tolist()) == drawn  # noqa: NPY002
    # Schedules end at the new total, of which half is left, including the next rollout.
    updates.clear()
    other.train()
    assert updates[0]["train/learning_rate"] == pytest.approx(1e-3 * (1 - (WHOLE + ROLLOUT) / (2 * WHOLE)))
    assert updates[-1]["train/learning_rate"] == pytest.approx(0.0)
    assert other.config.total_timesteps == 2 * WHOLE


def test_resumed_episodes_have_new_seeds(tmp_path: Path) -> None:
    settings = {"env": "CartPole-v1", "total_timesteps": HALF, "keep_checkpoints": 9}
    run = run_folder(tiny(tmp_path, **settings).train())
    first = tiny(tmp_path, **settings)
    starts = [np.asarray(first.env.reset())]
    for _ in range(2):
        starts.append(np.asarray(TrainerV7.resume(run, total_timesteps=WHOLE).model._last_obs))
    assert np.array_equal(starts[1], starts[2])  # a resumed run can be repeated
    assert not np.isclose(starts[0], starts[1]).any()


def test_a_damaged_checkpoint_is_skipped(tmp_path: Path) -> None:
    run = run_folder(tiny(tmp_path, **SCHEDULED).train())
    newest = checkpoint_path(run, WHOLE)
    damaged = newest.read_bytes()[:-100]
    newest.write_bytes(damaged)
    (run / "final_model.zip").write_bytes(b"")
    (run / "checkpoints" / ".step_9.zip.1.writing").write_bytes(b"half")
    with pytest.warns(
        UserWarning, match=r"final_model.zip is damaged \(.*The run goes on from step_000000000128.zip"
    ) as caught:
        resumed = TrainerV7.resume(run)
    assert [Path(str(warning.message).split()[0]).name for warning in caught] == [newest.name, "final_model.zip"]
    assert resumed.model.num_timesteps == HALF
    assert not list(run.rglob(".*"))
    assert resumed.train().model.num_timesteps == WHOLE
    assert MemoryPPO.load(newest).num_timesteps == WHOLE
    assert newest.with_name(f"{newest.name}.damaged_1").read_bytes() == damaged


def test_a_run_without_a_checkpoint_starts_anew(tmp_path: Path) -> None:
    trainer = tiny(tmp_path, seed=None, save_freq=0)
    with pytest.raises(Crash):
        trainer.train(callback=CrashAt(10))
    run = run_folder(trainer)
    for path in list_checkpoints(run):
        path.unlink()
    resumed = TrainerV7.resume(run)
    assert (resumed.model.num_timesteps, resumed.run) == (0, run)
    assert resumed.config.seed == trainer.config.seed


def test_the_best_model_stays_the_best(tmp_path: Path) -> None:
    settings = {"eval_freq": ROLLOUT, "n_eval_episodes": 1}
    trainer = tiny(tmp_path, **settings).train()
    run = run_folder(trainer)
    best = run / "best_model.zip"
    with np.load(run / "evaluations.npz") as file:
        assert read_checkpoint(best).progress["mean_return"] == file["results"].max()
    # As after an evaluation past the last checkpoint whose mean return no later one reaches.
    from sb3_cyborg.trainers.checkpoints import save_checkpoint

    save_checkpoint(best, trainer.model, trainer.config, mean_return=1e9)
    content = best.read_bytes()
    TrainerV7.resume(run, total_timesteps=512).train()
    assert best.read_bytes() == content


def test_bad_resumptions(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is not a run: it has no config.yaml"):
        TrainerV7.resume(tmp_path)
    run = run_folder(tiny(tmp_path).train())
    with pytest.raises(ValueError, match="has made 256 steps already; `total_timesteps`=256 must be more"):
        TrainerV7.resume(run).train()
    with pytest.raises(ValueError, match="`encoder` cannot change in a run that is resumed"):
        TrainerV7.resume(run, encoder="lstm")
    with pytest.raises(ValueError, match=r"'encodr'.*'encoder'"):
        TrainerV7.resume(run, encodr="lstm")


OLD_WORDS = {"n_steps": "horizon", "n_envs": "num_envs", "save_freq": "checkpoint_interval", "eval_freq": "eval_interval"}
OLD_WORDS |= {"n_eval_episodes": "eval_episodes"}


def in_old_words(text: str) -> str:
    """:return: A config file as earlier versions wrote it."""
    values = {OLD_WORDS.get(key, key): value for key, value in yaml.safe_load(text).items()}
    for part, name in (("encoder", "type"), ("memory", "type")):
        if options := values.pop(f"{part}_kwargs"):
            values[part] = {name: values[part]} | options
    return str(yaml.safe_dump(values, sort_keys=False))


def rewrite_checkpoint(path: Path) -> None:
    """Replace the config in a checkpoint by that of an earlier version."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    entries["trainer_config.yaml"] = in_old_words(entries["trainer_config.yaml"].decode()).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)


def test_runs_of_earlier_versions_load_and_resume(tmp_path: Path) -> None:
    trainer = tiny(tmp_path, eval_freq=128, n_eval_episodes=2).train()
    run = run_folder(trainer)
    config = run / "config.yaml"
    config.write_text(in_old_words(config.read_text()))
    for path in run.rglob("*.zip"):
        rewrite_checkpoint(path)
    assert {"horizon", "num_envs", "eval_interval"} <= yaml.safe_load(config.read_text()).keys()
    assert yaml.safe_load(config.read_text())["memory"] == {"type": "slot", "num_slots": 4}
    assert TrainerConfig.parse(config) == trainer.config
    loaded = TrainerV7.load(run, "last")
    assert loaded.config == trainer.config.changed(run_name=None)
    assert loaded.evaluate(2) == trainer.evaluate(2)
    resumed = TrainerV7.resume(run, total_timesteps=2 * WHOLE, checkpoint_interval=128)
    assert resumed.config == trainer.config.changed(total_timesteps=2 * WHOLE, save_freq=128)
    assert resumed.train().model.num_timesteps == 2 * WHOLE
    assert yaml.safe_load(config.read_text()).keys() == TrainerConfig.model_fields.keys(), "SB3's words are saved"


# --- killed at random -------------------------------------------------------------------------------------------------

INTERVAL, EVALUATION_INTERVAL = 2 * ROLLOUT, 3 * ROLLOUT


class Report(BaseCallback):
    """Append to a file how many steps are done at the start of training and of each rollout."""

    def __init__(self, output: Path) -> None:
        super().__init__()
        self.output = output

    def _write(self) -> None:
        with open(self.output, "a") as file:
            file.write(f"{self.num_timesteps}\n")

    def _on_training_start(self) -> None:
        self._write()

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        self._write()  # the trainer's callbacks come first, so a due checkpoint is saved by now


def train_until_killed(folder: Path, output: Path) -> None:
    """Start a run, or resume it, in a process that will be killed."""
    th.set_num_threads(1)
    settings: dict[str, Any] = {"normalize": True, "tensorboard": True, "histograms": False, "total_timesteps": 10**7}
    settings |= {"save_freq": INTERVAL, "eval_freq": EVALUATION_INTERVAL, "n_eval_episodes": 1, "keep_checkpoints": 2}
    if (folder / "killed" / "config.yaml").exists():
        trainer = TrainerV7.resume(folder / "killed")
    else:
        trainer = tiny(folder, **settings, run_name="killed")
    trainer.train(callback=Report(output))


def killed_process(folder: Path, output: Path, seconds: float) -> None:
    """Run :func:`train_until_killed` in a process of its own, and kill it some seconds after training has begun."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.test_resume"])  # so that each process starts at once
    process = context.Process(target=train_until_killed, args=(folder, output))
    process.start()
    deadline = time.monotonic() + 120
    while not output.exists():
        assert process.is_alive(), f"it ended with {process.exitcode} instead of training"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(seconds)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("kills", [4, pytest.param(100, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])])
def test_killed_at_random(tmp_path: Path, kills: int) -> None:
    """Sends SIGKILL during training, evaluating and saving; the last two take a large part of the time here."""
    random = np.random.default_rng(int.from_bytes(os.urandom(4), "little"))
    run, reached, lost, torn = tmp_path / "killed", 0, [], 0
    for kill in range(kills):
        output = tmp_path / f"output_{kill}"
        # The first process makes its first checkpoint: a run without any, but with finished episodes, is refused.
        killed_process(tmp_path, output, random.uniform(0.0, 1.5) + 3.0 * (kill == 0))
        steps = [int(line) for line in output.read_text().splitlines(keepends=True) if line.endswith("\n")]
        # It resumed at most one interval behind the last process, which may have saved once more without printing it.
        assert reached - INTERVAL <= steps[0] <= reached + ROLLOUT
        lost.append(max(0, reached - steps[0]))
        reached = steps[-1]
        torn += len(list(run.rglob("*.writing")))
        for path in run.rglob("*.zip"):
            assert MemoryPPO.load(path).num_timesteps == read_checkpoint(path).progress["num_timesteps"]
        newest = [read_checkpoint(path).progress["num_timesteps"] for path in list_checkpoints(run)]
        assert reached - max(newest, default=0) <= INTERVAL
        assert len(newest) <= 3  # a process may be killed before it removes the oldest one
        if (run / "evaluations.npz").exists():
            with np.load(run / "evaluations.npz") as file:
                assert len(file["results"]) == len(file["timesteps"])
                assert file["timesteps"].tolist() == sorted(set(file["timesteps"].tolist()))
    final = TrainerV7.resume(run, total_timesteps=reached + INTERVAL).train()
    assert final.model.num_timesteps >= reached + INTERVAL
    episodes = load_results(str(run))
    assert episodes["timesteps"].is_monotonic_increasing
    assert episodes["l"].sum() == episodes["timesteps"].iloc[-1], "each episode is there, once"
    with np.load(run / "evaluations.npz") as file:
        total = final.model.num_timesteps
        assert file["timesteps"].tolist() == sorted({*range(EVALUATION_INTERVAL, total + 1, EVALUATION_INTERVAL), total})
    assert not list(run.rglob("*.writing"))
    assert not list(run.rglob("*.damaged_*")), "no file of a killed process is damaged"
    print(f"{kills} kills, {reached} steps; lost {lost}; {torn} files were being written")
