"""Names of the files of an agent on the Hub."""

from pathlib import Path

MODEL = "model.zip"
"""The model, as the trainer saves it: with the config and, if there is one, ``VecNormalize``. It holds no pickle."""
ONNX = "agent.onnx"
CONFIG = "config.yaml"
RESULTS = "results.json"
"""The returns, under the keys of huggingface_sb3."""
CARD = "README.md"
CURVE = "learning_curve.png"
VIDEO = "replay.gif"

FILES = (MODEL, ONNX, CONFIG, RESULTS, CARD, CURVE, VIDEO)
"""All of them. A repository may hold further files, which are neither changed nor downloaded."""


def check_is_empty(folder: Path) -> None:
    """
    :param folder: A folder for the files, which may be missing.
    :raises ValueError: if it holds files: some of the names, e.g. ``README.md``, are common.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{str(folder)!r} is not an empty folder: give a new one, as files in it could be replaced.")
