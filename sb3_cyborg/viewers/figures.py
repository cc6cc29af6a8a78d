"""Figures of matplotlib, which is imported on use, and their files."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = (".png", ".pdf", ".svg")


def new_figure(width: float, height: float) -> "Figure":
    """
    :param width: Width in inches.
    :param height: Height in inches.
    :return: An empty figure, without a window and independent of pyplot.
    :raises ImportError: with the install command, if matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('Pictures need matplotlib: pip install "sb3-cyborg[train]"') from error
    return Figure(figsize=(width, height), layout="constrained")


def check_picture(output: Path | str) -> Path:
    """
    :param output: File of a picture.
    :return: The path.
    :raises ValueError: for a format that cannot be written, and for a folder.
    """
    path = Path(output)
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"A picture's name ends in {', '.join(FORMATS)}, got {str(path)!r}.")
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give a file in it, like {path / ('picture' + FORMATS[0])}.")
    return path


def save_figure(figure: "Figure", path: Path, dpi: int = 120) -> None:
    """
    Write a figure. Missing folders are created.

    :param figure: The figure.
    :param path: A PNG, PDF or SVG file.
    :param dpi: Pixels per inch of a PNG.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=dpi, facecolor="white")
