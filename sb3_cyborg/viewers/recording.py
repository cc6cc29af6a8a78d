"""Shows an agent in a window, or records it as a GIF or an MP4 video."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from importlib import import_module
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import tile_images

from sb3_cyborg.checks import check_positive
from sb3_cyborg.memory_ppo.memory_ppo import MemoryPPO
from sb3_cyborg.trainers.acting import ActingLoop, EpisodeResult, env_to_act_in

FORMATS = (".gif", ".mp4")
DEFAULT_FPS = 30
"""Frames per second for an environment whose metadata has none."""
LARGEST_GIF_FPS = 50
"""Frames per second of a GIF at most: many programs show faster ones slowly."""

SMALLEST_PICTURE = 320
"""Pixels of the longer side of a frame below which frames are enlarged."""


def check_video(video: Path | str) -> Path:
    """
    :param video: File of a video.
    :return: The path.
    :raises ValueError: for a format that cannot be written, and for a folder.
    :raises ImportError: if the package that writes it is missing, with the command that installs it.
    """
    path = Path(video)
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"A video's name ends in {' or '.join(FORMATS)}, got {str(path)!r}.")
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give a file in it, like {path / 'video.mp4'}.")
    if path.suffix.lower() == ".gif":
        _import("PIL.Image", 'GIFs need Pillow: pip install "sb3-cyborg[train]"')
    else:
        _import("imageio_ffmpeg", 'MP4 needs imageio and ffmpeg: pip install "sb3-cyborg[video]" (or record a .gif)')
    return path


def _import(module: str, message: str) -> None:
    try:
        import_module(module)
    except ImportError as error:
        raise ImportError(message) from error


def check_display() -> None:
    """
    Require a display to open a window on.

    :raises ValueError: on Linux without one, where SDL would open no window and report no error.
    """
    if sys.platform.startswith("linux") and not any(map(os.environ.get, ("DISPLAY", "WAYLAND_DISPLAY", "SDL_VIDEODRIVER"))):
        raise ValueError("There is no display to open a window on; record a video instead: `--video agent.gif`.")


def check_output(video: Path | str | None) -> Path | None:
    """
    :param video: File of a video, or ``None`` for a window.
    :return: The path, or ``None``.
    :raises ValueError: as :func:`check_video` and :func:`check_display`.
    :raises ImportError: as :func:`check_video`.
    """
    if video is None:
        check_display()
        return None
    return check_video(video)


def render_mode_for(video: Path | None) -> str:
    """:return: The render mode that a video needs, or a window for ``None``."""
    return "human" if video is None else "rgb_array"


def enjoy(
    model: MemoryPPO,
    env: VecEnv | gym.Env[Any, Any] | None = None,
    *,
    video: Path | str | None = None,
    n_episodes: int = 5,
    max_steps: int | None = None,
    deterministic: bool = True,
    seed: int | None = None,
    fps: float | None = None,
    report: Callable[[str], None] = print,
) -> list[EpisodeResult]:
    """
    Show an agent in a window or a video.

    The frame after the last step of an episode is not shown, as SB3's environments reset at once.

    :param model: The agent.
    :param env: Its environment, made with ``render_mode="human"`` for a window and ``"rgb_array"`` for a video. ``None`` takes
        those of the model.
    :param video: A ``.gif`` or ``.mp4`` file; ``None`` opens a window.
    :param n_episodes: Number of episodes, at least 1.
    :param max_steps: Steps after which to stop in any case, at least 1; ``None`` sets no limit.
    :param deterministic: Take the mode of the policy instead of a sample.
    :param seed: Seed of the environment and of sampled actions; ``None`` leaves both as they are.
    :param fps: Frames per second of the video, in (0, 1000]; ``None`` takes those of the environment, or 30.
    :param report: Called with a line for each episode, and with one for the path of the video.
    :return: Return (not normalized) and length of each finished episode.
    :raises ValueError: for an environment of another render mode, a file name of another format, and bad numbers.
    :raises ImportError: if the package that writes the video is missing, with the command that installs it.
    """
    check_positive(n_episodes=n_episodes, **({} if max_steps is None else {"max_steps": max_steps}))
    if fps is not None and not 0 < fps <= 1000:
        raise ValueError(f"`fps` must be in (0, 1000], got {fps!r}.")
    path = check_output(video)
    vec_env = env_to_act_in(model, env)
    _check_render_mode(vec_env, render_mode_for(path))
    results: list[EpisodeResult] = []
    loop = ActingLoop(model, vec_env, deterministic=deterministic, seed=seed)
    frames = _play(loop, results, n_episodes, max_steps, report, _show if path is None else _frame)
    if path is None:
        for _ in frames:
            pass
    else:
        _write_video(path, frames, fps or _render_fps(vec_env))
        report(f"video: {path}")
    return results


def _write_video(path: Path, frames: Iterator[np.ndarray], fps: float) -> None:
    """Write a video under another name and rename it when it is complete, so that a failure keeps the file before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write = _write_gif if path.suffix.lower() == ".gif" else _write_mp4
    part = path.with_name(f".{path.stem}.part{path.suffix}")
    try:
        write(part, frames, fps)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def has_pictures(env: VecEnv) -> bool:
    """:return: Whether the environments name ``rgb_array`` among their render modes, with which they render pictures."""
    return "rgb_array" in ((_attribute(env, "metadata", None) or {}).get("render_modes") or ())


def _check_render_mode(env: VecEnv, wanted: str) -> None:
    known = _attribute(env, "metadata", None) or {}
    modes = ", ".join(map(repr, known.get("render_modes") or ())) or "none"
    if env.render_mode != wanted or (modes != "none" and repr(wanted) not in modes):
        output = "A window" if wanted == "human" else "A video"
        raise ValueError(
            f"{output} needs an environment made with `render_mode={wanted!r}`; this one was made with {env.render_mode!r}. "
            f"Its render modes: {modes}."
        )


def _attribute(env: VecEnv, name: str, default: Any) -> Any:
    try:
        return env.get_attr(name, indices=[0])[0]
    except AttributeError:  # a native vectorised environment
        return getattr(env, name, default)


def _render_fps(env: VecEnv) -> float:
    return float((_attribute(env, "metadata", None) or {}).get("render_fps") or DEFAULT_FPS)


def _play(
    loop: ActingLoop,
    results: list[EpisodeResult],
    n_episodes: int,
    max_steps: int | None,
    report: Callable[[str], None],
    render: Callable[[VecEnv], np.ndarray],
) -> Iterator[np.ndarray]:
    """
    Act, and append to ``results``.

    :return: The frame before each step, (height, width, 3) uint8; empty frames for a window.
    """
    taken = 0
    while len(results) < n_episodes and (max_steps is None or taken < max_steps):
        yield render(loop.env)
        taken += 1
        for result in loop.step().finished[: n_episodes - len(results)]:
            results.append(result)
            report(f"episode {len(results)}: return {result.total:.2f}, length {result.length}")
    if len(results) < n_episodes:
        report(f"stopped after {taken} steps, in episode {len(results) + 1}: return {loop.totals[0]:.2f} so far")


def _show(env: VecEnv) -> np.ndarray:
    env.render("human")
    return np.empty((0, 0, 3), dtype=np.uint8)


def pictures(env: VecEnv) -> list[np.ndarray]:
    """
    :param env: Environments made with ``render_mode="rgb_array"``.
    :return: A picture of each of them, (height, width, 3) uint8.
    :raises ValueError: for environments that render anything else.
    """
    images = [np.asarray(image) for image in env.get_images() if image is not None]
    if len(images) < env.num_envs:
        raise ValueError("This environment gives no picture: its `render()` returned None.")
    for image in images:
        shape, kind = image.shape, image.dtype
        if len(shape) != 3 or shape[2] != 3 or kind != np.uint8:
            raise ValueError(f"A picture is (height, width, 3) of uint8, but `render()` gave {shape} of {kind}.")
    return images


def _frame(env: VecEnv) -> np.ndarray:
    """:return: One picture of all environments, (height, width, 3) uint8."""
    images = pictures(env)
    return _enlarge(tile_images(images) if len(images) > 1 else images[0])


def _enlarge(frame: np.ndarray) -> np.ndarray:
    """:return: The frame with each pixel repeated so often that its longer side has ``SMALLEST_PICTURE`` pixels at least."""
    factor = -(-SMALLEST_PICTURE // max(frame.shape[:2]))
    return frame.repeat(factor, axis=0).repeat(factor, axis=1)


def _write_gif(path: Path, frames: Iterator[np.ndarray], fps: float) -> None:
    from PIL import Image

    # A palette of 256 colours for each frame is enough for most environments, and takes a quarter of the memory.
    pictures = (Image.fromarray(frame).quantize() for frame in frames)
    first = next(pictures)
    duration = 10 * max(round(100 / min(fps, LARGEST_GIF_FPS)), 1)  # in ms; GIF stores hundredths of a second
    first.save(path, save_all=True, append_images=pictures, duration=duration, loop=0)


def _write_mp4(path: Path, frames: Iterator[np.ndarray], fps: float) -> None:
    from imageio.v2 import get_writer

    # The codec needs even sizes, so frames are padded; by default imageio would scale them to multiples of 16. `closing` also
    # ends ffmpeg after an error, which the context of imageio does not.
    with closing(get_writer(path, fps=fps, codec="libx264", macro_block_size=1)) as writer:
        for frame in frames:
            writer.append_data(np.pad(frame, [(0, frame.shape[0] % 2), (0, frame.shape[1] % 2), (0, 0)], mode="edge"))
