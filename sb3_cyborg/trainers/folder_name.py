"""Names of folders that every operating system can have."""

import re

MAX_BYTES = 255
"""Longest name of a file on common file systems, in UTF-8."""

DEVICES = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)
"""Names that Windows reserves."""


def check_folder_name(name: str) -> str:
    """
    :param name: Name of a folder.
    :return: The name, unchanged.
    :raises ValueError: if it is not the name of one folder on every system: for separators, ``.`` and ``..``, characters that
        cannot be printed, names that Windows reserves, and names of more than 255 bytes.
    """
    reason = ""
    if bad := next((character for character in name if character in '/\\:*?"<>|' or not character.isprintable()), ""):
        reason = f"it holds {bad!r}"
    elif DEVICES.fullmatch(name) or name.strip(". ") == "" or name[-1] in ". " or name[0] == " ":
        reason = "not every system has a folder of that name"
    elif len(name.encode()) > MAX_BYTES:
        reason = f"it has {len(name.encode())} bytes, at most {MAX_BYTES} are possible"
    if reason:
        raise ValueError(f"must be the plain name of a folder, e.g. 'gru_seed1', got {name[:300]!r}: {reason}.")
    return name
