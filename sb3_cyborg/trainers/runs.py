"""Folders of runs: their names, and the files that describe how a run was made."""

import contextlib
import datetime
import math
import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from sb3_cyborg.checks import warn_caller
from sb3_cyborg.memory_ppo.memory_ppo import MemoryPPO
from sb3_cyborg.packages import package_versions
from sb3_cyborg.trainers.callbacks import EVALUATIONS
from sb3_cyborg.trainers.checkpoints import (
    BEST,
    CONFIG_FILE,
    FINAL,
    FOLDER,
    Checkpoint,
    check_modules,
    list_checkpoints,
    newest_file,
    read_progress,
    remove_leftovers,
    write_text,
)
from sb3_cyborg.trainers.config import RESUME_KEYS, TrainerConfig
from sb3_cyborg.trainers.config_file import dump_yaml, parse_yaml, read_yaml
from sb3_cyborg.trainers.monitor import MONITOR_FILE
from sb3_cyborg.trainers.run_lock import RunLock
from sb3_cyborg.trainers.side_files import OLD_FOLDER, move_aside, move_to_old_folder
from sb3_cyborg.trainers.vocabulary import canonical, merge

SESSIONS_FILE = "sessions.yaml"

LAUNCH_ID, NO_LAUNCH_ID = "TORCHELASTIC_RUN_ID", "none"
"""Environment variable with the id of a launch by ``torchrun``, and its default."""


RUN_FILES = (CONFIG_FILE, SESSIONS_FILE, MONITOR_FILE, EVALUATIONS, BEST, FINAL, FOLDER)
"""Files by which a folder is that of a run."""


def new_run(log_dir: Path, name: str | None, env: str) -> tuple[Path, RunLock]:
    """
    Create the folder of a new run, and lock it.

    :param log_dir: Folder of all runs.
    :param name: Name of the run, or ``None`` for ``<env>_<number>``, with the first number that is not taken.
    :param env: Id of the environment.
    :return: The folder, and its lock.
    :raises ValueError: if there is a run of that name.
    :raises RunInUseError: if another process creates a run of that name.
    """
    run = _numbered_folder(log_dir, env) if name is None else log_dir / name
    run.mkdir(parents=True, exist_ok=True)
    _check_is_free(run)  # before the lock as well: a refusal changes nothing in a folder of another run
    lock = RunLock(run)
    lock.acquire()
    try:
        _check_is_free(run)
    except ValueError:
        lock.release()
        raise
    return run, lock


def folder_stem(env: str) -> str:
    """:return: The id of an environment as it begins the names of folders."""
    return env.replace("/", "-").replace(":", "-")


def _numbered_folder(log_dir: Path, env: str) -> Path:
    stem, number = folder_stem(env), 1
    while True:
        with contextlib.suppress(FileExistsError):  # another process may have taken the number
            (log_dir / f"{stem}_{number}").mkdir(parents=True)
            return log_dir / f"{stem}_{number}"
        number += 1


def _check_is_free(run: Path) -> None:
    """:raises ValueError: for a folder with files of a run."""
    if any((run / name).exists() for name in RUN_FILES):
        raise ValueError(f"There is a run {str(run)!r} already: give another `run_name`, or resume it with `--resume {run}`.")


def check_is_run(run: Path) -> None:
    """
    :param run: A folder.
    :raises ValueError: if it is not that of a run.
    """
    if not (run / CONFIG_FILE).is_file() and newest_file(run).path is None:
        raise ValueError(f"{str(run)!r} is not a run: it has no {CONFIG_FILE}.")


def file_to_resume(run: Path) -> Path | None:
    """
    Find the file that a run continues from, and move damaged and unfinished files aside.

    :param run: Folder of a run, which the caller has locked.
    :return: The newest complete file, or ``None`` if the run was stopped before it had written any result.
    :raises ValueError: if there are results but no complete file.
    """
    newest = newest_file(run)
    if newest.path is None:
        if results := _results(run):
            damaged = "".join(f" {path.name}: {reason}." for path, reason in [*newest.damaged.items()][:1])
            raise ValueError(
                f"The run {str(run)!r} has {', '.join(results)}, but no complete checkpoint to continue from.{damaged} "
                f"`--restart` starts it anew and moves its files into {OLD_FOLDER}<number>."
            )
        return None
    remove_leftovers(run)
    evaluated = {name for name in (EVALUATIONS, BEST) if (run / name).exists()}
    for name in (MONITOR_FILE, SESSIONS_FILE, *({EVALUATIONS, BEST} - evaluated if evaluated else ())):
        if not (run / name).exists():
            warn_caller(f"{run / name} is missing: it is written anew, without its earlier content.")
    for path, reason in newest.damaged.items():
        move_aside(path, reason, f"The run goes on from {newest.path.name}.")
    for name in (FOLDER, "tensorboard"):
        if (run / name).exists() and not (run / name).is_dir():
            move_aside(run / name, "it is not a folder", "A new folder is created.")
    return newest.path


def _results(run: Path) -> list[str]:
    """:return: Names of files which show that a run has trained: results would be lost if it started anew over them."""
    results = [name for name in (EVALUATIONS, BEST, FINAL) if (run / name).exists()]
    results += [path.name for path in list_checkpoints(run)]
    with contextlib.suppress(OSError):
        if len((run / MONITOR_FILE).read_bytes().splitlines()) > 2:  # more than the header
            results.append(MONITOR_FILE)
    with contextlib.suppress(ValueError):
        if any(session.get("num_timesteps") for session in _read_sessions(run / SESSIONS_FILE)):
            results.append(SESSIONS_FILE)
    return results


def best_mean_return(run: Path) -> float:
    """
    :param run: Folder of a run, which the caller has locked.
    :return: Mean return of its best model; ``-inf`` if there is none. A file that is damaged, or that no evaluation has saved,
        is moved aside.
    """
    path = run / BEST
    if not path.exists():
        return -math.inf
    try:
        mean = read_progress(path).get("mean_return")
        if isinstance(mean, (int, float)) and not isinstance(mean, bool) and not math.isnan(mean):
            return float(mean)
        reason = "no evaluation has saved it"
    except ValueError as error:
        reason = str(error)
    move_aside(path, reason, "The next evaluation saves a best model.")
    return -math.inf


def launch_id() -> str | None:
    """:return: The id that ``torchrun`` has given the processes that it started together; ``None`` if they have none."""
    given = os.environ.get(LAUNCH_ID)
    return None if given == NO_LAUNCH_ID else given


def run_of_launch(log_dir: Path) -> Path | None:
    """
    Find the run that the launcher of this process has begun before it started the processes again.

    :param log_dir: Folder of all runs.
    :return: The folder of the run, or ``None`` if there is none yet.
    :raises ValueError: if the launch has no id to find its run by.
    """
    if (wanted := launch_id()) is None:
        raise ValueError("A restart finds its run by the id of the launch: give torchrun `--standalone`, or `--rdzv-id`.")
    for sessions in log_dir.glob(f"*/{SESSIONS_FILE}"):
        with contextlib.suppress(ValueError):
            if any(session.get("launch") == wanted for session in _read_sessions(sessions)):
                return sessions.parent
    return None


def start_anew(run: Path) -> None:
    """
    Move the files of a run into a new folder ``old_<number>`` in it, apart from its config.

    :param run: Folder of a run, which the caller has locked.
    """
    if (folder := move_to_old_folder(run, keep=CONFIG_FILE)) is not None:
        print(f"The run {run} starts anew; its files before are in {folder}.", file=sys.stderr)


def edited_config(run: Path, checkpoint: Checkpoint, changes: Mapping[str, Any], trust: bool) -> TrainerConfig:
    """
    Compare the config file of a run with the settings in its checkpoint. Edits of keys that may change are printed.

    :param run: Folder of the run.
    :param checkpoint: The checkpoint that it continues from.
    :param changes: Settings to change, by key, which override those of the file.
    :param trust: Whether the file may name a module to import.
    :return: The settings to continue with.
    :raises ValueError: for other edits, with both values, and for a file that is no config.
    """
    path = run / CONFIG_FILE
    if not path.is_file():
        if path.exists():
            move_aside(path, "it is not a file", f"The settings in {checkpoint.path.name} are used.")
        else:
            warn_caller(f"{path} is missing: the settings in {checkpoint.path.name} are used.")
        return TrainerConfig.parse(merge(checkpoint.config, changes))
    try:
        edited = read_yaml(path)
    except ValueError as error:
        raise ValueError(
            f"{error} Correct it, or delete it to continue with the settings in {checkpoint.path.name}."
        ) from error
    check_modules(edited, path, trust)
    config = TrainerConfig.parse(merge(edited, changes))
    trained = TrainerConfig.parse(merge(checkpoint.config, {key: getattr(config, key) for key in RESUME_KEYS}))
    for key in TrainerConfig.model_fields:
        if dump_yaml(getattr(config, key)) != dump_yaml(getattr(trained, key)):  # as text, in which a nan equals itself
            raise ValueError(
                f"`{key}` cannot change in a run that is resumed: it is {getattr(config, key)!r} in {path}, but the run was "
                f"trained with {getattr(trained, key)!r} ({checkpoint.path.name}). Set it back, or start a new run."
            )
    before = canonical(checkpoint.config)
    for key in RESUME_KEYS:
        if key not in changes and getattr(config, key) != before.get(key, TrainerConfig.model_fields[key].default):
            print(f"`{key}` is now {getattr(config, key)!r}, as {path} says; it was {before.get(key)!r}.", file=sys.stderr)
    return config


def describe_run(run: Path, config: TrainerConfig, model: MemoryPPO) -> None:
    """
    Write the config of a run, and append to ``sessions.yaml`` how it is started or resumed.

    :param run: Folder of the run.
    :param config: Settings of the run.
    :param model: Model of the run.
    """
    write_text(run / CONFIG_FILE, config.to_yaml())
    sessions, before = run / SESSIONS_FILE, list[dict[str, Any]]()
    try:
        before = _read_sessions(sessions)
    except ValueError as error:
        move_aside(sessions, error, "The list of sessions begins anew.")
    write_text(sessions, yaml.safe_dump([*before, _session(model)], sort_keys=False))


def _read_sessions(path: Path) -> list[dict[str, Any]]:
    """
    :return: The sessions of a run; none for a file that is missing.
    :raises ValueError: for a file that is damaged.
    """
    if not path.exists():
        return []
    try:
        sessions = parse_yaml(path.read_text(encoding="utf-8"), path.name)
    except OSError as error:
        raise ValueError(str(error)) from error
    if not isinstance(sessions, list) or not all(isinstance(session, dict) for session in sessions):
        raise ValueError("it is not a list of sessions")
    return sessions


def _session(model: MemoryPPO) -> dict[str, Any]:
    """:return: Time, step, command, machine and versions with which a run is started or resumed."""
    return {
        "started": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "num_timesteps": int(model.num_timesteps),
        "command": " ".join(sys.argv),
        "platform": platform.platform(),
        "device": str(model.device),
        **({"processes": model.ranks.size, "launch": launch_id()} if model.ranks.size > 1 else {}),
        "versions": {"python": platform.python_version(), **package_versions()},
    }
