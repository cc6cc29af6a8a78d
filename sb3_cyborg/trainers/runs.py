"""Folders of runs: their names, and the files that describe how a run was made."""

import contextlib
import datetime
import platform
import sys
from pathlib import Path
from typing import Any

import yaml

from sb3_cyborg.memory_ppo.memory_ppo import MemoryPPO
from sb3_cyborg.packages import package_versions
from sb3_cyborg.trainers.checkpoints import CONFIG_FILE, write_text
from sb3_cyborg.trainers.config import TrainerConfig

SESSIONS_FILE = "sessions.yaml"


def new_run(log_dir: Path, name: str | None, env: str) -> Path:
    """
    Create the folder of a new run.

    :param log_dir: Folder of all runs.
    :param name: Name of the run, or ``None`` for ``<env>_<number>``, with the first number that is not taken.
    :param env: Id of the environment.
    :return: The folder.
    :raises ValueError: if there is a run of that name.
    """
    if name is not None:
        run = log_dir / name
        if (run / CONFIG_FILE).exists():
            raise ValueError(
                f"There is a run {str(run)!r} already: give another `run_name`, or resume it with `--resume {run}`."
            )
        run.mkdir(parents=True, exist_ok=True)
        return run
    stem, number = env.replace("/", "-").replace(":", "-"), 1
    while True:
        with contextlib.suppress(FileExistsError):  # another process may have taken the number
            (log_dir / f"{stem}_{number}").mkdir(parents=True)
            return log_dir / f"{stem}_{number}"
        number += 1


def describe_run(run: Path, config: TrainerConfig, model: MemoryPPO) -> None:
    """
    Write the config of a run, and append to ``sessions.yaml`` how it is started or resumed.

    :param run: Folder of the run.
    :param config: Settings of the run.
    :param model: Model of the run.
    """
    write_text(run / CONFIG_FILE, config.to_yaml())
    sessions = run / SESSIONS_FILE
    before = sessions.read_text(encoding="utf-8") if sessions.is_file() else ""
    write_text(sessions, before + yaml.safe_dump([_session(model)], sort_keys=False))


def _session(model: MemoryPPO) -> dict[str, Any]:
    """:return: Time, step, command, machine and versions with which a run is started or resumed."""
    return {
        "started": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "num_timesteps": int(model.num_timesteps),
        "command": " ".join(sys.argv),
        "platform": platform.platform(),
        "device": str(model.device),
        "versions": {"python": platform.python_version(), **package_versions()},
    }
