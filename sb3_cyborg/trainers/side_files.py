"""Files that a run can continue without: they are moved aside if they are damaged, and never deleted."""

import shutil
from pathlib import Path

from sb3_cyborg.checks import warn_caller
from sb3_cyborg.trainers.run_lock import LOCK_FILE

OLD_FOLDER = "old_"
"""Folders with the files of a run before it was restarted: ``old_1``, ``old_2``, …"""


def move_aside(path: Path, reason: object, consequence: str) -> None:
    """
    Rename a damaged file to ``<name>.damaged_<number>`` in its folder, and warn.

    :param path: The file.
    :param reason: What is wrong with it.
    :param consequence: What happens without it, as a sentence.
    """
    number = 1
    while (target := path.with_name(f"{path.name}.damaged_{number}")).exists():
        number += 1
    path.rename(target)
    warn_caller(f"{path} is damaged ({one_line(reason)}) and was renamed to {target.name}. {consequence}")


def one_line(error: object) -> str:
    """:return: The text of an error as one line, or its type if it has no text; no more than 300 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:297]}..."


def move_to_old_folder(run: Path, keep: str) -> Path | None:
    """
    Move all files of a run into a new folder ``old_<number>`` in it. Folders of earlier calls stay.

    :param run: Folder of the run, which the caller has locked.
    :param keep: Name of a file that stays; a copy is moved.
    :return: The new folder, or ``None`` if there was nothing to move.
    """
    stay = {keep, LOCK_FILE}
    files = [path for path in run.iterdir() if path.name not in stay and not path.name.startswith(OLD_FOLDER)]
    if not files:
        return None
    number = 1
    while (folder := run / f"{OLD_FOLDER}{number}").exists():
        number += 1
    folder.mkdir()
    shutil.copy2(run / keep, folder / keep)
    # Checkpoints come last: if this is interrupted, the run can still be resumed.
    for path in sorted(files, key=lambda path: (path.suffix == ".zip", path.is_dir(), path.name)):
        path.rename(folder / path.name)
    return folder
