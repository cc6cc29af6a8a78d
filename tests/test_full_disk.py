"""A disk that is full at any write of a run: files stay complete, the error is one line, and the run can be resumed."""

import builtins
import errno
import io
import os
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stable_baselines3.common.monitor import load_results
from typer.testing import CliRunner

from sb3_cyborg import MemoryPPO, TrainerV7, cli
from sb3_cyborg.trainers.checkpoints import list_checkpoints, read_progress
from tests.trainer_helpers import ROLLOUT, run_folder, tiny

BEFORE, AFTER = 128, 128 + 3 * ROLLOUT
SETTINGS: dict[str, Any] = {"eval_freq": ROLLOUT, "n_eval_episodes": 1, "tensorboard": True, "histograms": False}
SETTINGS |= {"total_timesteps": BEFORE, "save_freq": ROLLOUT, "keep_checkpoints": 2, "normalize": True}


class Disk:
    """
    Counts the writes below a folder: of bytes, new files, new names and new folders. Some of them fail as on a full disk.

    ``kinds`` lists them: the operation, and the file without its numbers.

    :param folder: The folder.
    :param fails: Whether a write fails, by its number from 1 on.
    """

    def __init__(self, folder: Path, fails: Callable[[int], bool]) -> None:
        self.folder, self.fails, self.kinds = folder, fails, list[str]()

    def write(self, operation: str, path: object) -> None:
        name = os.path.basename(os.fsdecode(path)) if isinstance(path, (str, bytes, os.PathLike)) else ""
        self.kinds.append(f"{operation} {re.sub('[0-9]+', '', name.split('tfevents')[0])}")
        if self.fails(len(self.kinds)):
            raise OSError(errno.ENOSPC, "No space left on device")

    def holds(self, path: object) -> bool:
        return isinstance(path, (str, bytes, os.PathLike)) and self.folder in Path(os.path.abspath(os.fsdecode(path))).parents

    def install(self, patch: pytest.MonkeyPatch) -> None:
        """Redirect the functions of Python that write files."""
        disk, real_open, real_fsync, real_replace, real_mkdir = self, io.open, os.fsync, os.replace, os.mkdir

        class RawFile(io.FileIO):
            def write(self, data: Any) -> int:
                disk.write("write", self.name)
                return super().write(data)

        def open_file(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if not (set(mode) & set("wax+") and disk.holds(file)):
                return real_open(file, mode, *args, **kwargs)
            if not os.path.exists(file):
                disk.write("create", file)
            raw = RawFile(file, mode.replace("b", "").replace("t", ""))
            buffer: Any = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
            text = {name: kwargs[name] for name in ("encoding", "errors", "newline") if name in kwargs}
            return buffer if "b" in mode else io.TextIOWrapper(buffer, **text)

        def fsync(descriptor: int) -> None:
            disk.write("fsync", None)
            real_fsync(descriptor)

        def replace(source: Any, target: Any) -> None:
            disk.write("rename", target)
            real_replace(source, target)

        def mkdir(path: Any, *args: Any, **kwargs: Any) -> None:
            if disk.holds(path) and not os.path.exists(path):
                disk.write("mkdir", path)
            real_mkdir(path, *args, **kwargs)

        patch.setattr(builtins, "open", open_file)
        patch.setattr(io, "open", open_file)
        for function in (fsync, replace, mkdir):
            patch.setattr(os, function.__name__, function)


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """:return: The folder of a run that has made half of its steps."""
    return run_folder(tiny(tmp_path_factory.mktemp("half"), run_name="run", **SETTINGS).train())


def resume(run: Path, fails: Callable[[int], bool]) -> tuple[list[str], Any]:
    """:return: The kinds of the writes of ``sb3-cyborg train --resume``, and its result."""
    disk = Disk(run, fails)
    with pytest.MonkeyPatch.context() as patch:
        disk.install(patch)
        result = CliRunner().invoke(cli.app, ["train", "--resume", str(run), "--timesteps", str(AFTER)])
    return disk.kinds, result


@pytest.fixture(scope="module")
def kinds(half: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """:return: The kinds of the writes of a resumed run on a disk with space."""
    run = Path(shutil.copytree(half, tmp_path_factory.mktemp("count") / "run"))
    found, result = resume(run, lambda _: False)
    assert result.exit_code == 0, result.output
    files = ("config.yaml", "sessions.yaml", "monitor.csv", "evaluations.npz", "step_.zip", "final_model.zip")
    assert {f"rename {name}" for name in files} <= set(found)
    assert {"write run.lock", "write monitor.csv", "write events.out.", "fsync "} <= set(found)
    return found


def check(run: Path, half: Path, result: Any) -> None:
    """Files are complete and nothing of the first half is lost; the error is one line; the run goes on."""
    assert result.exit_code == 1, result.output
    errors = [line for line in result.stderr.splitlines() if "error: " in line]
    assert len(errors) == 1, result.stderr
    assert "No space left on device" in errors[0]
    assert "Traceback" not in result.output
    for path in [*list_checkpoints(run), run / "best_model.zip", run / "final_model.zip"]:
        assert MemoryPPO.load(path).num_timesteps == read_progress(path)["num_timesteps"]
    assert read_progress(list_checkpoints(run)[-1])["num_timesteps"] >= BEFORE
    old = (half / "monitor.csv").read_bytes().splitlines()
    assert (run / "monitor.csv").read_bytes().splitlines()[: len(old)] == old
    with np.load(run / "evaluations.npz") as file:
        assert file["timesteps"][: BEFORE // ROLLOUT].tolist() == [*range(ROLLOUT, BEFORE + 1, ROLLOUT)]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # about files that are damaged or missing
        assert TrainerV7.resume(run, total_timesteps=AFTER + ROLLOUT).train().model.num_timesteps == AFTER + ROLLOUT
    assert load_results(str(run))["l"].sum() == AFTER + ROLLOUT
    assert not list(run.rglob("*.writing"))


def fails_at(number: int, lasting: bool) -> Callable[[int], bool]:
    """:return: Whether a write fails: this one, and, on a disk that stays full, all after it."""
    return lambda write: write >= number if lasting else write == number


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=[pytest.mark.slow, pytest.mark.timeout(7200)])])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # files that are closed with unwritten bytes
def test_a_full_disk_at_each_write(tmp_path: Path, half: Path, kinds: list[str], every: bool) -> None:
    """One write of each kind fails; among the slow tests each write, on a disk that stays full and on one that does not."""
    cases = [(number, lasting) for number in range(1, len(kinds) + 1) for lasting in (True, False)]
    if not every:
        of_kind = {kind: [number for number, other in enumerate(kinds, start=1) if other == kind] for kind in kinds}
        cases = [(numbers[len(numbers) // 2], index % 2 == 0) for index, numbers in enumerate(of_kind.values())]
    for number, lasting in cases:
        run = Path(shutil.copytree(half, tmp_path / "run"))
        found, result = resume(run, fails_at(number, lasting))
        print(f"write {number} of {len(kinds)} failed ({found[number - 1]}, {lasting=}): {result.stderr}")
        check(run, half, result)
        shutil.rmtree(run)


def test_the_error_of_the_disk_is_raised_where_pytorch_raises_its_own(tmp_path: Path) -> None:
    trainer = tiny(tmp_path, **SETTINGS)
    trainer.save(tmp_path / "model.zip")
    hidden = 0
    for number in range(1, 40):
        with pytest.MonkeyPatch.context() as patch:
            Disk(tmp_path, fails_at(number, lasting=False)).install(patch)
            try:
                trainer.save(tmp_path / "model.zip")
            except OSError as error:
                hidden += isinstance(error.__context__, RuntimeError)
                assert error.errno == errno.ENOSPC  # noqa: PT017  # of several kinds of errors
            else:
                break
        assert read_progress(tmp_path / "model.zip") == {"num_timesteps": 0}, "the old file, or the new one"
    assert hidden, "some were hidden"


def test_a_new_run_on_a_full_disk(tmp_path: Path) -> None:
    disk = Disk(tmp_path, lambda _: True)
    trainer = tiny(tmp_path, run_name="run", **SETTINGS)
    with pytest.MonkeyPatch.context() as patch:
        disk.install(patch)
        with pytest.raises(OSError, match="No space left on device"):
            trainer.train()
    assert tiny(tmp_path, run_name="run", **SETTINGS).train().model.num_timesteps == BEFORE
