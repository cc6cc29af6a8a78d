"""
Checkpoints, each in one file that is written atomically.

A checkpoint is the zip file that SB3's ``save`` writes, so that ``MemoryPPO.load`` reads it, with up to four more entries: the
config, the trainer's counters, ``VecNormalize`` with its statistics, and the state of the random generators.
"""

import json
import os
import pickle
import random
import re
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch as th
import yaml
from stable_baselines3.common.vec_env import VecNormalize

from sb3_cyborg.checks import warn_caller
from sb3_cyborg.memory_ppo.memory_ppo import MemoryPPO
from sb3_cyborg.trainers.config import TrainerConfig
from sb3_cyborg.trainers.config_file import parse_yaml
from sb3_cyborg.trainers.side_files import one_line

CONFIG, PROGRESS, NORMALIZE, RANDOM = "trainer_config.yaml", "trainer_progress.json", "vec_normalize.pkl", "random_state.pkl"

MODEL = "data"
"""The entry that SB3's ``save`` writes first."""

FOLDER, CONFIG_FILE = "checkpoints", "config.yaml"
CHECKPOINT_NAME = re.compile(r"step_([0-9]{1,18})\.zip")
BEST, FINAL = "best_model.zip", "final_model.zip"
TEMPORARY = ".writing"
"""Suffix of files that are being written. A process that is killed leaves such a file behind."""

DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    OSError,
    RuntimeError,
    ValueError,
    LookupError,
    TypeError,
    SyntaxError,
    OverflowError,
    MemoryError,
)
"""Exceptions of ``zipfile``, ``json`` and NumPy for files that are damaged, of another kind, or not readable. A damaged length
is a ``MemoryError`` or an ``OverflowError``."""


def write_atomically(path: str | Path, write: Callable[[IO[bytes]], object]) -> None:
    """
    Write a file so that at any moment the path holds either the complete old content or the complete new one.

    :param path: The file; its folder is created if it is missing.
    :param write: Writes the content into an open file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")
    try:
        with open(temporary, "w+b") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Flush the new name to the disk, where the system can open folders (not on Windows)."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_text(path: str | Path, text: str) -> None:
    """
    :func:`write_atomically` for text.

    :param path: The file; its folder is created if it is missing.
    :param text: The content.
    """
    write_atomically(path, lambda file: file.write(text.encode()))


def random_state() -> dict[str, Any]:
    """:return: The states of the random generators of Python, NumPy and PyTorch, including those of all GPUs."""
    state = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": th.get_rng_state()}  # noqa: NPY002
    return state | {"cuda": th.cuda.get_rng_state_all() if th.cuda.is_available() else []}


def set_random_state(state: dict[str, Any]) -> None:
    """:param state: The result of :func:`random_state`; states of GPUs that this machine does not have are skipped."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])  # noqa: NPY002  # what SB3 seeds and uses
    th.set_rng_state(state["torch"])
    if th.cuda.is_available():
        for index, cuda in enumerate(state["cuda"][: th.cuda.device_count()]):
            th.cuda.set_rng_state(cuda, index)


@dataclass
class Checkpoint:
    """
    The entries of a checkpoint beside the model.

    :param path: The file.
    :param config: Settings of the run, under the names that they were saved with.
    :param progress: The trainer's counters: ``num_timesteps``, and for a best model ``mean_return``.
    :param normalize: ``VecNormalize`` with its statistics, without environments, or ``None``.
    :param random: States of the random generators.
    """

    path: Path
    config: dict[str, Any]
    progress: dict[str, Any]
    normalize: VecNormalize | None
    random: dict[str, Any]


def save_checkpoint(path: str | Path, model: MemoryPPO, config: TrainerConfig, **progress: Any) -> None:
    """
    Write a checkpoint atomically, under exactly this name.

    :param path: The file; any suffix is allowed.
    :param model: The model; its ``VecNormalize`` is saved with it.
    :param config: Settings of the run.
    :param progress: Further counters of the trainer.
    :raises ValueError: for weights that are not finite; they would replace a usable model.
    """
    broken = [name for name, tensor in model.policy.state_dict().items() if not tensor.isfinite().all()]
    if broken:
        raise ValueError(
            f"The weights are not finite after {model.num_timesteps} steps ({broken[0]}): training has diverged. Nothing was "
            "saved; try a smaller `learning_rate`, or resume from an earlier checkpoint."
        )
    entries = {
        CONFIG: config.to_yaml().encode(),
        PROGRESS: json.dumps({"num_timesteps": model.num_timesteps, **progress}).encode(),
        RANDOM: pickle.dumps(random_state()),
    }
    if (normalize := model.get_vec_normalize_env()) is not None:
        entries[NORMALIZE] = pickle.dumps(normalize)

    def write(file: IO[bytes]) -> None:
        model.save(file)  # type: ignore[arg-type]  # SB3 takes any binary file that is open
        with zipfile.ZipFile(file, "a") as archive:
            for name, content in entries.items():
                archive.writestr(name, content)

    write_atomically(path, write)


def read_checkpoint(path: str | Path) -> Checkpoint:
    """
    :param path: A checkpoint.
    :return: Its entries beside the model.
    :raises ValueError: if there is no such file, if it is damaged, or if it was not written by the trainer.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"There is no checkpoint {str(path)!r}.")
    try:
        with zipfile.ZipFile(path) as archive:
            if broken := archive.testzip():
                raise zipfile.BadZipFile(f"{broken} is broken")
            names = set(archive.namelist())
            entries = {name: archive.read(name) for name in (CONFIG, PROGRESS, NORMALIZE, RANDOM) if name in names}
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
        raise ValueError(f"{path} is not a complete checkpoint: {error}.") from error
    if "data" not in names:  # the end of a truncated file may be an archive: PyTorch's files in it are zip files, too
        raise ValueError(f"{path} is not a complete checkpoint: it holds no model.")
    if not {CONFIG, PROGRESS, RANDOM} <= entries.keys():
        raise ValueError(f"{path} was not written by TrainerV7; `MemoryPPO.load` reads what `MemoryPPO.save` wrote.")
    return Checkpoint(
        path,
        yaml.safe_load(entries[CONFIG]),
        json.loads(entries[PROGRESS]),
        pickle.loads(entries[NORMALIZE]) if NORMALIZE in entries else None,
        pickle.loads(entries[RANDOM]),
    )


def checkpoint_path(run: Path, num_timesteps: int) -> Path:
    """:return: The file of the checkpoint of a run after ``num_timesteps`` steps."""
    return run / FOLDER / f"step_{num_timesteps:012d}.zip"


def list_checkpoints(run: str | Path) -> list[Path]:
    """:return: The files ``step_<number>.zip`` of a run, the oldest first. Files of other names are no checkpoints."""
    found = ((CHECKPOINT_NAME.fullmatch(path.name), path) for path in (Path(run) / FOLDER).glob("step_*.zip"))
    return [path for _, path in sorted((int(match[1]), path) for match, path in found if match)]


def read_progress(path: Path) -> dict[str, Any]:
    """
    Read all of a checkpoint to see that it is whole. Nothing in it is unpickled.

    :param path: A checkpoint.
    :return: The trainer's counters, of which ``num_timesteps`` is a whole number.
    :raises ValueError: with the reason, if the file is damaged, or if it was not written by the trainer.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if broken := archive.testzip():
                raise ValueError(f"{broken} is broken")
            if missing := {MODEL, CONFIG, PROGRESS} - set(archive.namelist()):
                raise ValueError(f"it holds no {min(missing)}")
            progress = json.loads(archive.read(PROGRESS))
            settings = parse_yaml(archive.read(CONFIG).decode(), CONFIG)
    except DAMAGE as error:
        raise ValueError(one_line(error)) from error
    steps = progress.get("num_timesteps") if isinstance(progress, dict) else None
    if not isinstance(settings, dict) or not isinstance(steps, int) or isinstance(steps, bool) or steps < 0:
        raise ValueError("its settings or its number of steps are none")
    return dict(progress)


class Newest(NamedTuple):
    """
    The result of :func:`newest_file`.

    :param path: The file to go on from, or ``None``.
    :param num_timesteps: The steps after which it was saved; 0 for ``None``.
    :param damaged: The files that cannot be read, each with the reason.
    """

    path: Path | None
    num_timesteps: int
    damaged: dict[Path, str]


def newest_file(run: str | Path) -> Newest:
    """
    Find the file of a run that was saved after the most steps, among its checkpoints, its final and its best model.

    :param run: Folder of a run.
    :return: The newest complete file; a checkpoint where several were saved after the same number of steps.
    """
    newest, damaged = Newest(None, 0, {}), dict[Path, str]()
    others = [path for name in (FINAL, BEST) if (path := Path(run) / name).exists()]
    for path in [*reversed(list_checkpoints(run)), *others]:
        try:
            steps = read_progress(path)["num_timesteps"]
        except ValueError as error:
            damaged[path] = str(error)
            continue
        if newest.path is None or steps > newest.num_timesteps:
            newest = Newest(path, steps, damaged)
    return newest._replace(damaged=damaged)


def find_checkpoint(path: str | Path, which: str = "best") -> Path:
    """
    Find the file to load.

    :param path: A file, or the folder of a run.
    :param which: Which checkpoint of a run: ``"best"`` by evaluation (the newest if the run had no evaluation), ``"last"``, or
        the number of steps after which it was saved.
    :return: The file.
    :raises ValueError: if there is none.
    """
    path = Path(path)
    if path.is_file():
        return path
    if not path.is_dir():
        raise ValueError(f"There is no run or checkpoint {str(path)!r}.")
    if which == "best" and (path / BEST).is_file():
        return path / BEST
    if which in ("best", "last"):
        newest = newest_file(path)
        for damaged, reason in newest.damaged.items():
            warn_caller(f"{damaged} is not a complete checkpoint ({reason}): it is left out.")
        if newest.path is None:
            has = "no whole checkpoint" if newest.damaged else "no checkpoint yet"
            raise ValueError(f"The run {str(path)!r} has {has}.")
        return newest.path
    saved = {str(int(file.stem.removeprefix("step_"))): file for file in list_checkpoints(path)}
    if which not in saved:
        raise ValueError(
            f"The run {str(path)!r} has no checkpoint {which!r}: 'best', 'last' and {', '.join(saved) or 'none'}."
        )
    return saved[which]


def remove_leftovers(run: str | Path) -> None:
    """Remove the unfinished files of processes that were killed while writing."""
    for folder in (Path(run), Path(run) / FOLDER):
        for path in folder.glob(f".*{TEMPORARY}"):
            path.unlink(missing_ok=True)
