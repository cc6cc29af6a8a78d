"""Runs whose files are missing, damaged, edited or in use: they go on without a loss, or are refused in one line."""

import shutil
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from stable_baselines3.common.monitor import load_results

from sb3_cyborg import TrainerV7
from sb3_cyborg.trainers import logs
from sb3_cyborg.trainers.checkpoints import checkpoint_path, find_checkpoint, list_checkpoints, newest_file, read_progress
from sb3_cyborg.trainers.monitor import _in_order
from sb3_cyborg.trainers.run_lock import LOCK_FILE, RunInUseError, RunLock
from tests.trainer_helpers import run_folder, tiny

TOTAL = 256
SETTINGS: dict[str, Any] = {"eval_freq": 64, "n_eval_episodes": 2, "tensorboard": True, "histograms": False}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """:return: The folder of a finished run of 256 steps, with checkpoints after 128, 192 and 256 steps."""
    return run_folder(tiny(tmp_path_factory.mktemp("finished"), run_name="run", **SETTINGS).train())


@pytest.fixture
def run(tmp_path: Path, finished: Path) -> Path:
    """:return: A copy of the finished run, for a test to damage."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def content(run: Path) -> dict[str, bytes]:
    """:return: The content of all files of a run but its lock."""
    files = (path for path in run.rglob("*") if path.is_file() and path.name != LOCK_FILE)
    return {str(path.relative_to(run)): path.read_bytes() for path in files}


def truncate(path: Path) -> None:
    """Cut a file in half."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def goes_on(run: Path, total: int = 2 * TOTAL) -> TrainerV7:
    """:return: The trainer of a run that was resumed and trained; its episodes are each counted once."""
    trainer = TrainerV7.resume(run, total_timesteps=total).train()
    assert trainer.model.num_timesteps == total
    assert not list(run.rglob("*.writing"))
    assert load_results(str(run))["timesteps"].is_monotonic_increasing
    with np.load(run / "evaluations.npz") as file:
        assert file["timesteps"][-1] == total
    assert read_progress(run / "best_model.zip")["mean_return"] is not None
    return trainer


# --- checkpoints ------------------------------------------------------------------------------------------------------


def test_a_run_without_checkpoints_goes_on_from_its_final_model(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (run / "monitor.csv").read_text().splitlines()
    shutil.rmtree(run / "checkpoints")
    assert TrainerV7.resume(run, total_timesteps=512).model.num_timesteps == TOTAL
    assert f"Resuming from {run / 'final_model.zip'}, after 256 steps." in capsys.readouterr().err
    goes_on(run)
    assert (run / "monitor.csv").read_text().splitlines()[: len(before)] == before


def test_a_run_with_its_best_model_alone_goes_on_from_it(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(run / "checkpoints")
    (run / "final_model.zip").unlink()
    steps = read_progress(run / "best_model.zip")["num_timesteps"]
    assert TrainerV7.resume(run, total_timesteps=512).model.num_timesteps == steps > 0
    assert f"Resuming from {run / 'best_model.zip'}, after {steps} steps." in capsys.readouterr().err
    goes_on(run)


def test_a_run_whose_checkpoints_are_all_truncated_goes_on_from_its_final_model(run: Path) -> None:
    for path in list_checkpoints(run):
        truncate(path)
    with pytest.warns(UserWarning, match=r"step_.*is damaged.* renamed to step_.*\.damaged_1. The run goes on from final_mo"):
        goes_on(run)
    assert len(list((run / "checkpoints").glob("*.damaged_1"))) == 3


def test_files_are_taken_in_order_of_steps(run: Path) -> None:
    (run / "final_model.zip").unlink()
    shutil.copy(checkpoint_path(run, 128), checkpoint_path(run, 999))  # a copy under another name: its own steps count
    assert newest_file(run).path == checkpoint_path(run, 256)
    truncate(checkpoint_path(run, 256))
    best = read_progress(run / "best_model.zip")["num_timesteps"]
    assert newest_file(run).num_timesteps == max(192, best)


@pytest.mark.parametrize("name", ["step_zzz.zip", "step_.zip", "step_-1.zip", "step_1_0.zip", "step_٣.zip", "step_9.zip.zip"])
def test_only_step_number_zip_is_a_checkpoint(run: Path, name: str) -> None:
    shutil.copy(checkpoint_path(run, 128), run / "checkpoints" / name)
    assert [path.stem for path in list_checkpoints(run)] == [f"step_{steps:012d}" for steps in (128, 192, 256)]
    assert find_checkpoint(run, "last") == checkpoint_path(run, 256)
    goes_on(run)
    assert (run / "checkpoints" / name).exists(), "it is no file of ours: it is left alone"


def test_a_damaged_newer_checkpoint_does_not_count_as_one_that_is_kept(run: Path) -> None:
    checkpoint_path(run, 9999).write_bytes(b"")
    with pytest.warns(UserWarning, match="step_000000009999.zip is damaged"):
        trainer = TrainerV7.resume(run, total_timesteps=512, keep_checkpoints=1).train()
    assert [path.stem for path in list_checkpoints(run)] == [f"step_{trainer.model.num_timesteps:012d}"]


@pytest.mark.parametrize("damage", ["yaml", "list", "no config", "no progress", "no steps", "folder"])
def test_a_checkpoint_with_bad_entries_is_skipped(run: Path, damage: str) -> None:
    (run / "final_model.zip").unlink()
    (run / "best_model.zip").unlink()
    path = checkpoint_path(run, 256)
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    if damage == "no config":
        del entries["trainer_config.yaml"]
    elif damage == "no progress":
        del entries["trainer_progress.json"]
    else:
        wrong = {"yaml": b"a: [", "list": b"- a", "no steps": b'{"num_timesteps": "many"}', "folder": b""}[damage]
        entries["trainer_progress.json" if damage == "no steps" else "trainer_config.yaml"] = wrong
    path.unlink()
    if damage == "folder":
        path.mkdir()
    else:
        with zipfile.ZipFile(path, "w") as archive:
            for name, text in entries.items():
                archive.writestr(name, text)
    with pytest.warns(UserWarning, match="step_000000000256.zip is damaged"):
        assert TrainerV7.resume(run, total_timesteps=512).model.num_timesteps == 192


@pytest.mark.parametrize("left", ["monitor.csv", "evaluations.npz", "sessions.yaml", "checkpoints"])
def test_results_without_a_complete_file_are_never_overwritten(run: Path, left: str) -> None:
    for path in [*list_checkpoints(run), run / "final_model.zip", run / "best_model.zip"]:
        if left == "checkpoints" and path.parent.name == left:
            truncate(path)
        else:
            path.unlink()
    for name in {"monitor.csv", "evaluations.npz", "sessions.yaml"} - {left}:
        (run / name).unlink()
    if left == "sessions.yaml":  # the list of a run that was resumed
        (run / left).write_text("- num_timesteps: 0\n- num_timesteps: 64\n")
    before = content(run)
    with pytest.raises(ValueError, match=r"no complete checkpoint to continue from.*`--restart` starts it anew") as caught:
        TrainerV7.resume(run)
    assert "\n" not in str(caught.value)
    assert ("step_" if left == "checkpoints" else left) in str(caught.value)
    assert content(run) == before


def test_restart_moves_the_old_files_aside(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    (run / "note.txt").write_text("mine")
    for number in (1, 2):
        before = {name: data for name, data in content(run).items() if not name.startswith("old_")}
        trainer = TrainerV7.resume(run, restart=True)
        assert trainer.model.num_timesteps == 0
        old = content(run / f"old_{number}")
        assert old == before
        trainer.train()
        assert load_results(str(run))["l"].sum() == TOTAL
        (session,) = yaml.safe_load((run / "sessions.yaml").read_text())
        assert session["num_timesteps"] == 0
    assert {path.name for path in run.glob("old_*")} == {"old_1", "old_2"}


def test_restart_of_a_config_that_cannot_work_moves_nothing(run: Path) -> None:
    (run / "config.yaml").write_text("env: CartPol-v1\n")
    before = content(run)
    with pytest.raises(ValueError, match="CartPole-v1"):
        TrainerV7.resume(run, restart=True)
    assert content(run) == before


def test_a_run_that_was_stopped_before_any_result_starts_anew(tmp_path: Path, run: Path) -> None:
    for name in ("checkpoints", "tensorboard"):
        shutil.rmtree(run / name)
    for name in ("final_model.zip", "best_model.zip", "evaluations.npz"):
        (run / name).unlink()
    header = (run / "monitor.csv").read_text().splitlines(keepends=True)[:2]
    (run / "monitor.csv").write_text("".join(header))
    (run / "sessions.yaml").write_text("- num_timesteps: 0\n")
    trainer = TrainerV7.resume(run).train()
    assert (trainer.model.num_timesteps, trainer.run) == (TOTAL, run)
    assert sorted(content(run / "old_1")) == ["config.yaml", "monitor.csv", "sessions.yaml"], "nothing is deleted"


@pytest.mark.parametrize("left", ["monitor.csv", "best_model.zip", "checkpoints"])
def test_a_new_run_is_not_made_in_a_folder_with_files_of_a_run(run: Path, left: str) -> None:
    for path in run.iterdir():
        if path.name != left:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    before = content(run)
    with pytest.raises(ValueError, match=r"There is a run .* already"):
        tiny(run.parent, run_name="run").train()
    assert content(run) == before


# --- the config -------------------------------------------------------------------------------------------------------


def edit(run: Path, **changes: Any) -> None:
    """Change keys of the config file of a run."""
    path = run / "config.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | changes))


def test_edits_of_the_config_that_may_change_are_taken_and_told(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(run, total_timesteps=512, keep_checkpoints=7)
    trainer = TrainerV7.resume(run)
    assert (trainer.config.total_timesteps, trainer.config.keep_checkpoints) == (512, 7)
    told = capsys.readouterr().err
    assert f"`total_timesteps` is now 512, as {run / 'config.yaml'} says; it was 256." in told
    assert "`keep_checkpoints` is now 7" in told
    assert told.count("is now") == 2
    trainer.train()
    assert trainer.model.num_timesteps == 512


def test_flags_override_edits_of_the_config(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(run, total_timesteps=512)
    assert TrainerV7.resume(run, total_timesteps=320).config.total_timesteps == 320
    assert "is now" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "value", "before"),
    [
        ("gamma", 0.5, 0.99),
        ("encoder", "lstm", "'gru'"),
        ("memory_kwargs", {"num_slots": 5}, "{'num_slots': 4}"),
        ("seed", 4, 3),
    ],
)
def test_other_edits_of_the_config_are_refused_by_name(run: Path, key: str, value: Any, before: object) -> None:
    edit(run, **{key: value, "total_timesteps": 512})
    files = content(run)
    with pytest.raises(ValueError, match=rf"`{key}` cannot change in a run that is resumed") as caught:
        TrainerV7.resume(run)
    assert f"it is {value!r} in {run / 'config.yaml'}" in str(caught.value)
    assert f"trained with {before}" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert content(run) == files


def test_a_key_that_is_removed_from_the_config_counts_as_its_default(run: Path) -> None:
    path = run / "config.yaml"
    settings = yaml.safe_load(path.read_text())
    del settings["n_epochs"]
    path.write_text(yaml.safe_dump(settings))
    with pytest.raises(ValueError, match=r"`n_epochs` cannot change .* it is 4 in .* trained with 2"):
        TrainerV7.resume(run)


def test_a_config_that_cannot_be_read_is_refused_with_the_way_out(run: Path) -> None:
    (run / "config.yaml").write_text("env: [")
    with pytest.raises(ValueError, match=r"is not YAML.*Correct it, or delete it to continue with the settings in step_0000"):
        TrainerV7.resume(run)


def test_a_run_without_a_config_goes_on_with_the_settings_of_its_checkpoint(run: Path) -> None:
    (run / "config.yaml").unlink()
    with pytest.warns(UserWarning, match=r"config.yaml is missing: the settings in step_000000000256.zip are used"):
        goes_on(run)
    assert yaml.safe_load((run / "config.yaml").read_text())["total_timesteps"] == 2 * TOTAL


@pytest.mark.parametrize(
    "value", ["1e6", "1_0e3", "null", "true", "0x1F", "2024-01-01", "~", "- a", "é\x85", float("nan"), [1e6]]
)
def test_settings_of_environments_survive_the_files(tmp_path: Path, value: Any) -> None:
    """``"1e6"`` was read as a number, and would count as an edit."""
    trainer = tiny(tmp_path, env_kwargs={"how": value}, total_timesteps=32).train()
    resumed = TrainerV7.resume(run_folder(trainer), total_timesteps=64)
    assert repr(resumed.config.env_kwargs) == repr({"how": value})


def test_text_with_a_colon_needs_trust_and_survives(tmp_path: Path) -> None:
    """``gymnasium.make("a: b")`` would import the module ``a``."""
    trainer = tiny(tmp_path, env_kwargs={"how": "a: b"}, total_timesteps=32).train()
    with pytest.raises(ValueError, match=r"'a: b' would import the module 'a'.*trust=True"):
        TrainerV7.resume(run_folder(trainer), total_timesteps=64)
    resumed = TrainerV7.resume(run_folder(trainer), total_timesteps=64, trust=True)
    assert resumed.config.env_kwargs == {"how": "a: b"}


# --- the lock ---------------------------------------------------------------------------------------------------------

HOLD = "import sys, time\nfrom pathlib import Path\nfrom sb3_cyborg.trainers.run_lock import RunLock\n"
HOLD += "lock = RunLock(Path(sys.argv[1]))\nlock.acquire()\nprint('held', flush=True)\ntime.sleep(600)\n"


def test_a_run_in_use_is_refused_in_one_line_and_free_after_a_kill(run: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD, str(run)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "held\n"
            before = content(run)
            message = rf"The run '.*run' is in use by process {process.pid} on .* since 20..-..-..T.*: wait for its end\.$"
            for restart in (False, True):
                with pytest.raises(RunInUseError, match=message) as caught:
                    TrainerV7.resume(run, restart=restart, total_timesteps=512)
                assert "\n" not in str(caught.value)
            assert content(run) == before
            assert TrainerV7.load(run, "last").evaluate(1), "evaluation needs no lock"
        finally:
            process.kill()
        process.wait()
    goes_on(run)


def test_a_run_that_is_training_is_locked_until_its_end(run: Path) -> None:
    trainer = TrainerV7.resume(run, total_timesteps=512)
    refused: list[str] = []

    def second(*_: Any) -> bool:
        if not refused:
            with pytest.raises(RunInUseError, match="in use by process") as caught:
                TrainerV7.resume(run)
            refused.append(str(caught.value))
        return True

    trainer.train(callback=second)
    assert refused
    with RunLock(run):
        pass


def test_two_new_runs_of_one_name_at_the_same_time(tmp_path: Path) -> None:
    first, second = (tiny(tmp_path, run_name="same") for _ in range(2))
    first.open_run()
    with pytest.raises(RunInUseError):
        second.open_run()
    first.train()
    with pytest.raises(ValueError, match=r"There is a run .* already"):
        second.train()


def test_a_run_that_another_process_has_continued_is_not_overwritten(run: Path) -> None:
    first = TrainerV7.resume(run, total_timesteps=512)
    goes_on(run, 320)
    before = content(run)
    with pytest.raises(ValueError, match=r"saved after 320 steps, but this trainer has made 256: another process"):
        first.train()
    assert content(run) == before


def test_the_lock_is_released_by_errors(run: Path) -> None:
    def fail(*_: Any) -> bool:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        TrainerV7.resume(run, total_timesteps=512).train(callback=fail)
    trainer = TrainerV7.resume(run, total_timesteps=512)
    trainer.open_run()
    trainer.close()
    with RunLock(run):
        pass


def test_a_file_system_without_locks_is_a_warning(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("sb3_cyborg.trainers.run_lock._try_lock", unsupported)
    with pytest.warns(UserWarning, match="cannot be locked"):
        TrainerV7.resume(run, total_timesteps=320)


# --- side files -------------------------------------------------------------------------------------------------------

SIDE_FILES = ("evaluations.npz", "monitor.csv", "sessions.yaml", "best_model.zip")


def empty(path: Path) -> None:
    path.write_bytes(b"")


def garbage(path: Path) -> None:
    path.write_bytes(np.random.default_rng(0).bytes(500))


def folder(path: Path) -> None:
    path.unlink()
    (path / "inside").mkdir(parents=True)


def zeros_after_the_columns(path: Path) -> None:
    """The second line is that of the columns with a carriage return inside, which Python's csv module refuses."""
    content = path.read_bytes()
    begin = content.index(b"\r") + 1
    path.write_bytes(content[:begin] + bytes(len(content) - begin))


DAMAGES = [(name, damage) for name in SIDE_FILES for damage in (empty, garbage, folder)]
DAMAGES += [("monitor.csv", zeros_after_the_columns)]
# Half of a text file is a shorter text file.
DAMAGES += [(name, truncate) for name in SIDE_FILES if name.endswith((".npz", ".zip"))]


@pytest.mark.parametrize(("name", "damage"), DAMAGES)
def test_a_damaged_side_file_is_moved_aside(run: Path, name: str, damage: Callable[[Path], None]) -> None:
    damage(run / name)
    before = (run / name).read_bytes() if (run / name).is_file() else None
    with pytest.warns(UserWarning, match=rf"{name} is damaged \(.*was renamed to {name}.damaged_1\. ") as caught:
        goes_on(run)
    assert not [warning for warning in caught if "\n" in str(warning.message)]
    aside = run / f"{name}.damaged_1"
    assert aside.is_dir() if before is None else aside.read_bytes() == before
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        goes_on(run, 3 * TOTAL)


@pytest.mark.parametrize("name", SIDE_FILES)
def test_a_missing_side_file_is_a_warning(run: Path, name: str) -> None:
    (run / name).unlink()
    with pytest.warns(UserWarning, match=rf"{name} is missing"):
        goes_on(run)


def test_a_second_damaged_file_gets_the_next_number(run: Path) -> None:
    for number in (1, 2):
        garbage(run / "evaluations.npz")
        with pytest.warns(UserWarning, match=rf"renamed to evaluations.npz.damaged_{number}"):
            goes_on(run, (number + 1) * TOTAL)


def test_damaged_rows_of_the_monitor_are_kept_in_a_copy_and_the_others_stay(run: Path) -> None:
    path = run / "monitor.csv"
    lines = path.read_bytes().split(b"\n")
    before = lines[5], lines[6]
    lines[5], lines[6] = b"\x00\xff\x0c,8,1,96\r", b"1,2\r"
    path.write_bytes(b"\n".join(lines))
    damaged = path.read_bytes()
    with pytest.warns(UserWarning, match=r"monitor.csv is damaged \(2 of 32 rows cannot be read\)"):
        goes_on(run)
    assert (run / "monitor.csv.damaged_1").read_bytes() == damaged
    kept = path.read_bytes()
    assert all(line in kept for line in lines[:5] + lines[7:])
    assert not any(line in kept for line in before)


@pytest.mark.parametrize(
    ("steps", "kept"),
    [
        ([16, 16, 32, 48], [16, 16, 32, 48]),
        ([16, 96, 32, 48], [16, None, 32, 48]),
        ([16, 32, 3, 48], [16, 32, None, 48]),
        ([16, None, 32, 9], [16, None, 32, None]),
        ([96, None, 16, 32], [None, None, 16, 32]),
        ([16, 99, 98, 48], [16, None, None, 48]),
        ([-1, 16], [None, 16]),
        ([], []),
    ],
)
def test_rows_of_the_monitor_that_are_out_of_order_are_damaged(steps: list[int | None], kept: list[int | None]) -> None:
    assert _in_order(steps) == kept


def test_a_changed_digit_in_the_steps_of_the_monitor_is_found(run: Path) -> None:
    path = run / "monitor.csv"
    lines = path.read_bytes().split(b"\n")
    cells = lines[5].rstrip(b"\r").split(b",")
    lines[5] = b",".join([*cells[:-1], b"9" + cells[-1]]) + b"\r"
    path.write_bytes(b"\n".join(lines))
    with pytest.warns(UserWarning, match=r"monitor.csv is damaged \(1 of 32 rows cannot be read\)"):
        goes_on(run)
    assert len(load_results(str(run))) == 63


def test_a_best_model_that_no_evaluation_has_saved_is_moved_aside(run: Path) -> None:
    shutil.copy(checkpoint_path(run, 128), run / "best_model.zip")
    with pytest.warns(UserWarning, match=r"best_model.zip is damaged \(no evaluation has saved it\)"):
        goes_on(run)


@pytest.mark.parametrize("wrong", ["pickle", "npy", "shapes", "other episodes", "text"])
def test_evaluations_of_another_form_are_moved_aside(run: Path, wrong: str) -> None:
    path = run / "evaluations.npz"
    results: Any = np.zeros((4, 2))
    if wrong == "npy":
        with open(path, "wb") as file:
            np.save(file, results)
    else:
        if wrong == "pickle":
            results = np.array([[1, "x"], [None, 2]], dtype=object)
        if wrong == "text":
            results = np.full((4, 2), "high")
        if wrong == "other episodes":
            results = np.zeros((4, 3))
        timesteps = np.arange(3 if wrong == "shapes" else len(results))
        np.savez(path, timesteps=timesteps, results=results, ep_lengths=np.ones(results.shape))
    with pytest.warns(UserWarning, match="evaluations.npz is damaged"):
        goes_on(run)


@pytest.mark.parametrize("damage", [empty, garbage, folder])
def test_a_damaged_wandb_id_is_moved_aside(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    path = tmp_path / "wandb_id"
    first = logs._wandb_id(path)
    assert logs._wandb_id(path) == first
    damage(path)
    with pytest.warns(UserWarning, match="wandb_id is damaged"):
        second = logs._wandb_id(path)
    assert logs._wandb_id(path) == second != first


@pytest.mark.parametrize("name", ["checkpoints", "tensorboard"])
def test_a_file_in_the_place_of_a_folder_is_moved_aside(run: Path, name: str) -> None:
    shutil.rmtree(run / name)
    (run / name).write_text("a file")
    with pytest.warns(UserWarning, match=f"{name} is damaged"):
        goes_on(run)
    assert (run / f"{name}.damaged_1").read_text() == "a file"
