"""Folders of runs: names that are free, and what is written down about a run."""

import contextlib
import datetime
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from sb3_cyborg.memory_ppo.memory_ppo import MemoryPPO
from sb3_cyborg.trainers.checkpoints import CONFIG_FILE, write_text
from sb3_cyborg.trainers.config import TrainerConfig

SESSIONS_FILE = "sessions.yaml"
PACKAGES = (
    "sb3-cyborg",
    "stable-baselines3",
    "sb3-contrib",
    "torch",
    "gymnasium",
    "numpy",
    "popgym",
    "minigrid",
    "crafter",
    "minerl",
)
"""Packages whose versions a run depends on."""


def new_run(log_dir: Path, name: str | None, env: str) -> Path:
    """
    :param log_dir: Folder of all runs.
    :param name: The run's, or ``None`` for one that is free.
    :param env: Name of the environment, which a free name is made of.
    :return: A folder that no run has yet, made.
    :raises ValueError: if there is a run of that name.
    """
    if name is not None:
        run = log_dir / name
        if (run / CONFIG_FILE).exists():
            raise ValueError(
                f"There is a run {str(run)!r} already: give another `run_name`, or go on with it by `--resume {run}`."
            )
        run.mkdir(parents=True, exist_ok=True)
        return run
    stem, number = env.replace("/", "-").replace(":", "-"), 1
    while True:
        with contextlib.suppress(FileExistsError):  # another run may have been quicker
            (log_dir / f"{stem}_{number}").mkdir(parents=True)
            return log_dir / f"{stem}_{number}"
        number += 1


def describe_run(run: Path, config: TrainerConfig, model: MemoryPPO) -> None:
    """
    Write down the config, and what the run is started or resumed with.

    :param run: Its folder.
    :param config: Its settings.
    :param model: Its model.
    """
    write_text(run / CONFIG_FILE, config.to_yaml())
    sessions = run / SESSIONS_FILE
    before = sessions.read_text(encoding="utf-8") if sessions.is_file() else ""
    write_text(sessions, before + yaml.safe_dump([_session(model)], sort_keys=False))


def _session(model: MemoryPPO) -> dict[str, Any]:
    """:return: What a run was started or resumed with."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return {
        "started": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "num_timesteps": int(model.num_timesteps),
        "command": " ".join(sys.argv),
        "platform": platform.platform(),
        "device": str(model.device),
        "versions": versions,
    }
