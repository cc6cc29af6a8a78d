"""
Checkpoints, each in one file that is written atomically.

A checkpoint is the zip file that ``MemoryPPO.save`` writes, so that ``MemoryPPO.load`` reads it, with up to four more entries:
the config, the trainer's counters, ``VecNormalize`` with its statistics, and the state of the random generators. None of them
is a pickle.
"""

import functools
import json
import pickle
import random
import re
import struct
import sys
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch as th
import yaml
from stable_baselines3.common.vec_env import VecNormalize

from sb3_cyborg.checks import warn_caller
from sb3_cyborg.files import TEMPORARY
from sb3_cyborg.files import write_atomically as write_atomically
from sb3_cyborg.files import write_text as write_text
from sb3_cyborg.memory_ppo.memory_ppo import MemoryPPO
from sb3_cyborg.memory_ppo.model_file import from_entries, to_entries, untrusted
from sb3_cyborg.trainers.config import TrainerConfig
from sb3_cyborg.trainers.config_file import parse_yaml
from sb3_cyborg.trainers.side_files import one_line
from sb3_cyborg.trainers.vocabulary import canonical

CONFIG, PROGRESS, NORMALIZE, RANDOM = "trainer_config.yaml", "trainer_progress.json", "vec_normalize.json", "random_state.json"
PICKLED_NORMALIZE, PICKLED_RANDOM = "vec_normalize.pkl", "random_state.pkl"
"""Entries of earlier versions."""

ENTRIES = (CONFIG, PROGRESS, NORMALIZE, RANDOM, PICKLED_NORMALIZE, PICKLED_RANDOM)

MODEL = "data"
"""The entry that SB3's ``save`` writes first."""

FOLDER, CONFIG_FILE = "checkpoints", "config.yaml"
CHECKPOINT_NAME = re.compile(r"step_([0-9]{1,18})\.zip")
BEST, FINAL = "best_model.zip", "final_model.zip"

NORMALIZE_ATTRIBUTES = (
    "num_envs",
    "observation_space",
    "action_space",
    "obs_spaces",
    "metadata",
    "norm_obs",
    "norm_obs_keys",
    "norm_reward",
    "obs_rms",
    "ret_rms",
    "clip_obs",
    "clip_reward",
    "gamma",
    "epsilon",
    "training",
)
"""Attributes of ``VecNormalize`` that a checkpoint holds; ``obs_rms`` and ``obs_spaces`` are not always there."""
UNREADABLE_FILE_ERRORS = (
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


def random_state() -> dict[str, Any]:
    """:return: The states of the random generators of Python, NumPy and PyTorch, including those of all GPUs."""
    state = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": th.get_rng_state()}  # noqa: NPY002
    return state | {"cuda": th.cuda.get_rng_state_all() if th.cuda.is_available() else []}


def set_random_state(state: dict[str, Any]) -> None:
    """
    :param state: The result of :func:`random_state`; states of GPUs that this machine does not have are skipped.
    :raises ValueError: for something else.
    """
    try:
        random.setstate(state["python"])
        np.random.set_state(state["numpy"])  # noqa: NPY002  # what SB3 seeds and uses
        th.set_rng_state(state["torch"])
        if th.cuda.is_available():
            for index, cuda in enumerate(state["cuda"][: th.cuda.device_count()]):
                th.cuda.set_rng_state(cuda, index)
    except (TypeError, ValueError, KeyError, RuntimeError, OverflowError, AttributeError) as error:
        raise ValueError(f"The random states of a checkpoint are damaged ({type(error).__name__}: {error}).") from error


def normalize_entries(normalize: VecNormalize) -> dict[str, Any]:
    """
    :param normalize: ``VecNormalize``.
    :return: Its statistics, options and spaces, as JSON can hold them.
    """
    state = vars(normalize)
    return to_entries({name: state[name] for name in NORMALIZE_ATTRIBUTES if name in state})


def build_normalize(entries: object, where: object, trust: bool = False) -> VecNormalize:
    """
    :param entries: The result of :func:`normalize_entries`.
    :param where: The file, for errors.
    :param trust: Whether to load pickled objects, such as a space of the user's own class.
    :return: ``VecNormalize`` without environments: ``set_venv`` gives it some.
    :raises ValueError: for damaged entries, and for pickled ones without trust.
    """
    state = from_entries(entries, where, trust)
    if missing := set(NORMALIZE_ATTRIBUTES) - {"obs_rms", "obs_spaces"} - state.keys():
        raise ValueError(f"{where}: VecNormalize lacks {sorted(missing)}.")
    normalize = VecNormalize.__new__(VecNormalize)
    # As SB3 unpickles it. The rest belongs to the environments; a reset sets it.
    normalize.__setstate__({name: state[name] for name in NORMALIZE_ATTRIBUTES if name in state})
    normalize.reset_infos = [{} for _ in range(normalize.num_envs)]
    normalize.old_reward = np.array([])
    normalize._reset_seeds()
    normalize._reset_options()
    return normalize


def check_modules(config: Mapping[str, Any], where: object, trust: bool) -> None:
    """
    Refuse settings of a file that would import a module, such as ``env: module:id``.

    :param config: Settings by key or alias.
    :param where: The file, for the error.
    :param trust: Whether any module may be imported.
    :raises ValueError: for a module that is not imported yet.
    """
    settings = canonical(config)
    for text in _texts([settings.get("env"), settings.get("env_kwargs")]):  # an environment may be told to make another one
        module, colon, _ = text.rpartition(":")
        if colon and module not in sys.modules and not trust:
            raise ValueError(
                f"{where}: the environment {text!r} would import the module {module!r}, which can run any code. Import it "
                "before, or, if you trust the author of the file, pass `trust=True` (on the command line `--trust`)."
            )


def trust_flag(config: TrainerConfig) -> str:
    """:return: The flag that commands for a run of this config need in a new process: ``" --trust"``, or nothing."""
    return " --trust" if ":" in config.env else ""


def _texts(value: Any) -> Iterator[str]:
    """:return: All texts in nested lists and dictionaries."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _texts([*value, *value.values()])
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


@dataclass
class Checkpoint:
    """
    The entries of a checkpoint beside the model.

    :param path: The file.
    :param config: Settings of the run, under the names that they were saved with.
    :param progress: The trainer's counters: ``num_timesteps``, and for a best model ``mean_return``.
    :param contents: Contents of the other entries by name, which are read on demand: the counters need no trust.
    :param trust: Whether to load pickled objects and to import the modules that the file names.
    """

    path: Path
    config: dict[str, Any]
    progress: dict[str, Any]
    contents: dict[str, bytes] = field(repr=False)
    trust: bool = False

    @functools.cached_property
    def normalize(self) -> VecNormalize | None:
        """``VecNormalize`` with its statistics, without environments, or ``None``."""
        if PICKLED_NORMALIZE in self.contents:
            unpickled: VecNormalize = self._unpickled(PICKLED_NORMALIZE)
            return unpickled
        return build_normalize(self._parsed(NORMALIZE), self.path, self.trust) if NORMALIZE in self.contents else None

    @functools.cached_property
    def random(self) -> dict[str, Any]:
        """States of the random generators."""
        if PICKLED_RANDOM in self.contents:
            unpickled: dict[str, Any] = self._unpickled(PICKLED_RANDOM)
            return unpickled
        return from_entries(self._parsed(RANDOM), self.path, self.trust)

    def unpack(self, trust: bool) -> None:
        """
        Read all entries, and check that the config imports nothing that it may not.

        :param trust: Whether to load pickled objects and to import the modules that the file names.
        :raises ValueError: for what needs trust without it, and for damaged entries.
        """
        self.trust = trust
        check_modules(self.config, self.path, trust)
        _ = self.normalize, self.random

    def _parsed(self, name: str) -> Any:
        try:
            return json.loads(self.contents[name])
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self.path} is damaged: {name} is not JSON ({error}).") from error

    def _unpickled(self, name: str) -> Any:
        if not self.trust:
            raise untrusted(self.path, f"was written by an earlier version, which pickled {name}")
        return pickle.loads(self.contents[name])


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
        RANDOM: json.dumps(to_entries(random_state())).encode(),
    }
    if (normalize := model.get_vec_normalize_env()) is not None:
        entries[NORMALIZE] = json.dumps(normalize_entries(normalize)).encode()

    def write(file: IO[bytes]) -> None:
        model.save(file)  # type: ignore[arg-type]  # SB3 takes any binary file that is open
        with zipfile.ZipFile(file, "a") as archive:
            for name, content in entries.items():
                archive.writestr(name, content)

    write_atomically(path, write)


def read_checkpoint(path: str | Path) -> Checkpoint:
    """
    :param path: A checkpoint.
    :return: Its entries beside the model; those that may need trust are not read yet.
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
            entries = {name: archive.read(name) for name in ENTRIES if name in names}
    except UNREADABLE_FILE_ERRORS as error:
        raise ValueError(f"{path} is not a complete checkpoint: {one_line(error)}.") from error
    if "data" not in names:  # the end of a truncated file may be an archive: PyTorch's files in it are zip files, too
        raise ValueError(f"{path} is not a complete checkpoint: it holds no model.")
    if not {CONFIG, PROGRESS} <= entries.keys() or not {RANDOM, PICKLED_RANDOM} & entries.keys():
        raise ValueError(f"{path} was not written by TrainerV7; `MemoryPPO.load` reads what `MemoryPPO.save` wrote.")
    try:
        config, progress = yaml.safe_load(entries.pop(CONFIG)), json.loads(entries.pop(PROGRESS))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: its config or its counters cannot be read ({error}).") from error
    if not (isinstance(config, dict) and isinstance(progress, dict) and isinstance(progress.get("num_timesteps"), int)):
        raise ValueError(f"{path} is damaged: its config is no mapping, or its counters lack `num_timesteps`.")
    return Checkpoint(path, config, progress, entries)


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
    except UNREADABLE_FILE_ERRORS as error:
        raise ValueError(one_line(error)) from error
    steps = progress.get("num_timesteps") if isinstance(progress, dict) else None
    if not isinstance(settings, dict) or not isinstance(steps, int) or isinstance(steps, bool) or steps < 0:
        raise ValueError("its settings or its number of steps are none")
    return dict(progress)


class Newest(NamedTuple):
    """
    The result of :func:`newest_file`.

    :param path: The file to continue from, or ``None``.
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
