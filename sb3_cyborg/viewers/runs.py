"""Viewers of a run of ``TrainerV7``: its agent is loaded and acts in an environment like the one it was trained in."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stable_baselines3.common.vec_env import VecEnv

from sb3_cyborg.trainers.acting import EpisodeResult
from sb3_cyborg.trainers.trainer_v7 import TrainerV7
from sb3_cyborg.viewers.figures import check_picture
from sb3_cyborg.viewers.inspection import Inspection, check_inspectable, inspect_episode
from sb3_cyborg.viewers.inspection_figure import Heads, draw_inspection
from sb3_cyborg.viewers.inspection_page import check_page, write_inspection_page
from sb3_cyborg.viewers.recording import check_output, enjoy, has_pictures, pictures, render_mode_for


@contextmanager
def rendered_env(trainer: TrainerV7, render_mode: str | None = None) -> Iterator[VecEnv]:
    """
    :param trainer: A trainer.
    :param render_mode: Render mode of gymnasium; ``None`` leaves it to the environment.
    :return: A context with an environment as in training, which is closed at its end.
    :raises ValueError: for an environment that does not have the render mode.
    """
    try:
        env = trainer.make_eval_env(render_mode)
    except (TypeError, ValueError) as error:
        if render_mode is None:
            raise
        raise ValueError(f"{trainer.config.env!r} cannot be made with `render_mode={render_mode!r}`: {error}") from error
    try:
        yield env
    finally:
        env.close()


@contextmanager
def _loaded(
    run: Path | str, which: str, device: str, trust: bool, render_mode: str | None = None
) -> Iterator[tuple[TrainerV7, VecEnv]]:
    """:return: A context with the trainer of a run and an environment to act in, which are closed at its end."""
    trainer = TrainerV7.load(run, which, device=device, trust=trust)
    try:
        with rendered_env(trainer, render_mode) as env:
            yield trainer, env
    finally:
        trainer.close()


def inspect_run(
    run: Path | str,
    output: Path | str | None = None,
    *,
    html: Path | str | None = None,
    which: str = "best",
    device: str = "auto",
    trust: bool = False,
    heads: Heads = "mean",
    deterministic: bool = True,
    max_steps: int = 500,
    seed: int | None = None,
) -> Inspection:
    """
    Show the memory of a run's agent along one episode, as a picture, as a page, or as both.

    :param run: Folder of a run of ``TrainerV7``, or a file that it saved.
    :param output: A PNG, PDF or SVG file, or ``None``.
    :param html: An HTML file, or ``None``. The page needs no network. It shows frames if the environment renders pictures, and
        agents without a memory as well.
    :param which: Which checkpoint of a run: ``"best"``, ``"last"``, or its number of steps.
    :param device: Device of the agent.
    :param trust: As for :meth:`TrainerV7.load <sb3_cyborg.trainers.trainer_v7.TrainerV7.load>`.
    :param heads: Reduction over the heads in the picture: ``"mean"``, ``"max"``, or the number of the only head to draw.
    :param deterministic: Take the mode of the policy instead of a sample.
    :param max_steps: Steps after which to stop if the episode is longer, at least 1.
    :param seed: Seed of the environment and of sampled actions; ``None`` takes that of the run.
    :return: The episode that was drawn.
    :raises ValueError: for a run that cannot be loaded, without a file to write, and for a picture of an agent whose memory
        cannot be inspected.
    """
    if output is None and html is None:
        raise ValueError("Nothing to write: give `output`, a picture, or `html`, a page.")
    if output is not None:
        check_picture(output)
    if html is not None:
        check_page(html)
    with (
        _loaded(run, which, device, trust) as (trainer, env),
        _with_pictures(trainer, env, html is not None) as (shown, renders),
    ):
        if output is not None:
            check_inspectable(trainer.model)
        inspection = inspect_episode(
            trainer.model,
            shown,
            deterministic=deterministic,
            max_steps=max_steps,
            seed=trainer.config.seed if seed is None else seed,
            name=trainer.config.env,
            details=html is not None,
            rendered=renders,
        )
    if output is not None:
        draw_inspection(inspection, output, heads)
    if html is not None:
        write_inspection_page(inspection, html)
    return inspection


@contextmanager
def _with_pictures(trainer: TrainerV7, env: VecEnv, wanted: bool) -> Iterator[tuple[VecEnv, bool]]:
    """
    :return: A context with environments that render pictures, if these are wanted and possible, otherwise with ``env``, and
        whether they render. A warning says why an environment that names ``rgb_array`` among its render modes renders none.
    """
    if not wanted or not has_pictures(env):
        yield env, False
        return
    with rendered_env(trainer, "rgb_array") as rendered:
        rendered.reset()
        try:
            pictures(rendered)
        except Exception as error:  # of the environment
            warnings.warn(f"The page has no frames: `render()` raised {type(error).__name__}: {error}", stacklevel=2)
            yield env, False
            return
        yield rendered, True


def enjoy_run(
    run: Path | str,
    *,
    video: Path | str | None = None,
    which: str = "best",
    device: str = "auto",
    trust: bool = False,
    seed: int | None = None,
    **options: Any,
) -> list[EpisodeResult]:
    """
    Show a run's agent in a window or a video.

    :param run: Folder of a run of ``TrainerV7``, or a file that it saved.
    :param video: A ``.gif`` or ``.mp4`` file; ``None`` opens a window.
    :param which: Which checkpoint of a run: ``"best"``, ``"last"``, or its number of steps.
    :param device: Device of the agent.
    :param trust: As for :meth:`TrainerV7.load <sb3_cyborg.trainers.trainer_v7.TrainerV7.load>`.
    :param seed: Seed of the environment and of sampled actions; ``None`` takes that of the run.
    :param options: Further options of :func:`~sb3_cyborg.viewers.recording.enjoy`: ``n_episodes``, ``max_steps``,
        ``deterministic``, ``fps``, ``report``.
    :return: Return and length of each finished episode.
    :raises ValueError: as ``enjoy`` does, and for a run that cannot be loaded.
    :raises ImportError: if the package that writes the video is missing, with the command that installs it.
    """
    with _loaded(run, which, device, trust, render_mode_for(check_output(video))) as (trainer, env):
        return enjoy(trainer.model, env, video=video, seed=trainer.config.seed if seed is None else seed, **options)
