"""The runs of one configuration with several seeds: their group's folder, and the command that starts or resumes each."""

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sb3_cyborg.trainers.checkpoints import CONFIG_FILE, newest_file, write_text
from sb3_cyborg.trainers.config import RESUME_KEYS, TrainerConfig
from sb3_cyborg.trainers.config_file import dump_yaml, parse_yaml, read_yaml
from sb3_cyborg.trainers.runs import RUN_FILES, folder_stem
from sb3_cyborg.trainers.vocabulary import canonical

SETTINGS_FILE = "settings.yaml"
"""The settings of all seeds of a group."""

MAX_SEEDS = 1000
"""Largest number of seeds of one call."""

NOT_COMPARED = ("seed", "run_name", "log_dir", *RESUME_KEYS)
"""Settings that may differ between two calls for the same group."""


def parse_seeds(text: str) -> list[int]:
    """
    :param text: Whole numbers and ranges, with commas between them: ``0-4`` or ``0,3,7-9``.
    :return: The seeds, in the given order.
    :raises ValueError: for other text, a seed that is there twice, and more than :data:`MAX_SEEDS` seeds.
    """
    seeds: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,10})(?:-(\d{1,10}))?\s*", part, re.ASCII)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if last < first:
            raise ValueError(f"`--seeds` must be whole numbers and ranges, e.g. 0-4 or 0,3,7-9, got {text!r}.")
        if len(seeds) + last - first + 1 > MAX_SEEDS:
            raise ValueError(f"`--seeds` must be at most {MAX_SEEDS} seeds, got {text!r}.")
        seeds += range(first, last + 1)
    if twice := sorted({seed for seed in seeds if seeds.count(seed) > 1}):
        raise ValueError(f"`--seeds` {text!r} holds {twice[0]} twice: give each seed once.")
    return seeds


@dataclass(frozen=True)
class SeedRun:
    """
    The run of one seed of a group.

    :param group: Folder of the group.
    :param seed: The seed.
    :param trust: Whether the run may load pickled objects and import modules that its files name when it is resumed.
    """

    group: Path
    seed: int
    trust: bool = False

    @property
    def folder(self) -> Path:
        """The folder of the run."""
        return self.group / f"seed_{self.seed}"

    @property
    def log(self) -> Path:
        """The file with the output of the run's process, to which each process appends."""
        return self.group / f"seed_{self.seed}.log"

    @property
    def is_finished(self) -> bool:
        """Whether the run has a complete file that was saved after all of its steps."""
        return newest_file(self.folder).num_timesteps >= int(self._settings()["total_timesteps"])

    def command(self) -> list[str]:
        """
        :return: The command that starts the run, or resumes it if it has begun. Settings that may change in a resumed run are
            those of the group.
        """
        train = [sys.executable, "-m", "sb3_cyborg.cli", "train"]
        if not any((self.folder / name).exists() for name in RUN_FILES):
            where = ["--log-dir", str(self.group), "--run-name", self.folder.name]
            return [*train, "--config", str(self.group / SETTINGS_FILE), "--seed", str(self.seed), *where]
        return [*train, "--resume", str(self.folder), *self._changes(), *(["--trust"] if self.trust else [])]

    def _settings(self) -> dict[str, Any]:
        return read_yaml(self.group / SETTINGS_FILE)

    def _changes(self) -> list[str]:
        """:return: Flags for the settings in which the run's config differs from the group and which may change."""
        try:
            before = canonical(read_yaml(self.folder / CONFIG_FILE))
        except ValueError:  # the resumed run tells it, or goes on without this file
            return []
        wanted, flags = self._settings(), list[str]()
        for key in RESUME_KEYS:
            if key in before and before[key] != (value := wanted[key]):
                flag = key.replace("_", "-")
                is_switch = isinstance(value, bool)
                flags += (
                    [f"--{flag}" if value else f"--no-{flag}"] if is_switch else [f"--{flag}", dump_yaml(value).split("\n")[0]]
                )
        return flags


def group_folder(config: TrainerConfig) -> Path:
    """
    :param config: Settings of the runs.
    :return: The folder of the group: ``run_name`` in ``log_dir``, or ``<env>_seeds``, so that the same settings find it again.
    """
    return Path(config.log_dir) / (config.run_name or f"{folder_stem(config.env)}_seeds")


def check_group(group: Path, config: TrainerConfig) -> None:
    """
    :param group: Folder of a group; it may be missing.
    :param config: Settings of the runs.
    :raises ValueError: if the folder is that of a run, or if its runs have other settings.
    """
    if any((group / name).exists() for name in RUN_FILES):
        raise ValueError(f"{str(group)!r} is the folder of a single run: give another `run_name`.")
    if not (group / SETTINGS_FILE).exists():
        return
    before, wanted = canonical(read_yaml(group / SETTINGS_FILE)), _as_read(config)
    for key, field in TrainerConfig.model_fields.items():
        old = before.get(key, field.default)
        if key not in NOT_COMPARED and dump_yaml(old) != dump_yaml(wanted[key]):  # as text, in which a nan equals itself
            raise ValueError(
                f"The seeds in {str(group)!r} have other settings: `{key}` is {old!r} there, but {wanted[key]!r} here. "
                "Give another `run_name`, or the settings from before."
            )


def write_settings(group: Path, config: TrainerConfig) -> None:
    """
    Write the settings of a group.

    :param group: Its folder.
    :param config: Settings of the runs.
    """
    write_text(group / SETTINGS_FILE, dump_yaml({**_as_read(config), "seed": None}))


def _as_read(config: TrainerConfig) -> Mapping[str, Any]:
    """:return: All settings, as they are after they were written and read."""
    settings: dict[str, Any] = parse_yaml(config.to_yaml(), "the config")
    return settings
