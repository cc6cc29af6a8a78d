"""The check of ``render_mode`` that the environments share."""

from collections.abc import Sequence

from sb3_cyborg.checks import unknown_name


def check_render_mode(render_mode: str | None, known: Sequence[str]) -> None:
    """
    Requires a render mode that the environment has.

    :param render_mode: The mode, or ``None`` for no rendering, which every environment allows.
    :param known: The modes of the environment.
    :raises ValueError: for any other mode, with the known ones.
    """
    if render_mode is not None and render_mode not in known:
        raise unknown_name("render mode", render_mode, known)
