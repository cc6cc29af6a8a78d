"""Watching an agent: in a window, or as a GIF or a video."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch as th
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, unwrap_vec_normalize
from stable_baselines3.common.vec_env.base_vec_env import tile_images

from sb3_cyborg.checks import check_positive
from sb3_cyborg.memory_ppo.memory_ppo import MemoryPPO

FORMATS = (".gif", ".mp4")
DEFAULT_FPS = 30
"""Frames per second of an environment that does not say."""
LARGEST_GIF_FPS = 50
"""What viewers show; many play faster ones slowly."""


class EpisodeResult(NamedTuple):
    """
    What an episode came to.

    :param total: Its return.
    :param length: Its steps.
    """

    total: float
    length: int


def check_video(video: Path | str) -> Path:
    """
    :param video: Where a video is to go.
    :return: The path.
    :raises ValueError: for a format that cannot be written.
    :raises ImportError: with the install command, if what writes it is missing.
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
    from importlib import import_module

    try:
        import_module(module)
    except ImportError as error:
        raise ImportError(message) from error


def check_display() -> None:
    """
    Require a display to open a window on.

    :raises ValueError: on a Linux without one, where SDL would draw into nothing and say nothing.
    """
    if sys.platform.startswith("linux") and not any(map(os.environ.get, ("DISPLAY", "WAYLAND_DISPLAY", "SDL_VIDEODRIVER"))):
        raise ValueError("There is no display to open a window on; record a video in its place: `--video agent.gif`.")


def _check_output(video: Path | str | None) -> Path | None:
    if video is None:
        check_display()
        return None
    return check_video(video)


def _render_mode(video: Path | None) -> str:
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
    Let an agent act, to be watched.

    Of an episode's last step only the reward is seen, as SB3's environments begin the next one at once.

    :param model: The agent.
    :param env: Where to act, made with ``render_mode="human"`` for a window and ``"rgb_array"`` for a video. ``None`` takes
        the model's own.
    :param video: A ``.gif`` or ``.mp4`` file; ``None`` opens a window.
    :param n_episodes: How many episodes.
    :param max_steps: Steps after which the recording ends in any case; ``None`` sets no limit.
    :param deterministic: Take the mode of the policy instead of a sample.
    :param seed: Seed of the environment, and of sampled actions; ``None`` leaves both as they are.
    :param fps: Frames per second of the video; ``None`` takes the environment's own, or 30.
    :param report: Called with a line for each episode, and where the video went.
    :return: Return (not normalised) and length of each finished episode.
    :raises ValueError: for an environment that does not render as is needed, a name that is no video's, and bad sizes.
    :raises ImportError: with the install command, if what writes the video is missing.
    """
    check_positive(n_episodes=n_episodes, **({} if max_steps is None else {"max_steps": max_steps}))
    if fps is not None and not 0 < fps <= 1000:
        raise ValueError(f"`fps` must be in (0, 1000], got {fps!r}.")
    path = _check_output(video)
    chosen = model.get_env() if env is None else env
    if chosen is None:
        raise ValueError("This model was loaded without an environment: pass `env`.")
    vec_env = chosen if isinstance(chosen, VecEnv) else DummyVecEnv([lambda: chosen])
    _check_render_mode(vec_env, _render_mode(path))
    if seed is not None:
        vec_env.seed(seed)
        th.manual_seed(seed)
    results: list[EpisodeResult] = []
    frames = _play(model, vec_env, results, n_episodes, max_steps, deterministic, report, images=path is not None)
    if path is None:
        for _ in frames:
            pass
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        write = _write_gif if path.suffix.lower() == ".gif" else _write_mp4
        # A name of its own until it is whole: what was recorded before is not lost to a crash or Ctrl-C.
        part = path.with_name(f".{path.stem}.part{path.suffix}")
        try:
            write(part, frames, fps or _render_fps(vec_env))
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
        report(f"video: {path}")
    return results


def enjoy_run(
    run: Path | str,
    *,
    video: Path | str | None = None,
    which: str = "best",
    device: str = "auto",
    seed: int | None = None,
    **options: Any,
) -> list[EpisodeResult]:
    """
    Let the agent of a run act, to be watched, in an environment like the one it was trained in.

    :param run: Folder of a run of ``TrainerV7``, or a file that it saved.
    :param video: A ``.gif`` or ``.mp4`` file; ``None`` opens a window.
    :param which: Of a run: ``"best"``, ``"last"``, or the number of steps of a checkpoint.
    :param device: Where the agent is computed.
    :param seed: Seed of the environment, and of sampled actions; ``None`` takes the run's.
    :param options: Further ones of :func:`enjoy`: ``n_episodes``, ``max_steps``, ``deterministic``, ``fps``, ``report``.
    :return: Return and length of each finished episode.
    :raises ValueError: as :func:`enjoy` does, and for a run that cannot be loaded.
    :raises ImportError: with the install command, if what writes the video is missing.
    """
    from sb3_cyborg.trainers.trainer_v7 import TrainerV7  # it needs more than watching does

    mode = _render_mode(_check_output(video))
    trainer = TrainerV7.load(run, which, device=device)
    try:
        try:
            env = trainer.make_eval_env(mode)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{trainer.config.env!r} cannot be made with `render_mode={mode!r}`: {error}") from error
        try:
            return enjoy(trainer.model, env, video=video, seed=trainer.config.seed if seed is None else seed, **options)
        finally:
            env.close()
    finally:
        trainer.close()


def _check_render_mode(env: VecEnv, wanted: str) -> None:
    known = _attribute(env, "metadata", None) or {}
    modes = ", ".join(map(repr, known.get("render_modes") or ())) or "none"
    if env.render_mode != wanted or (modes != "none" and repr(wanted) not in modes):
        what = "A window" if wanted == "human" else "A video"
        raise ValueError(
            f"{what} needs an environment made with `render_mode={wanted!r}`; this one was made with {env.render_mode!r}, and "
            f"the modes that it has are: {modes}."
        )


def _attribute(env: VecEnv, name: str, default: Any) -> Any:
    try:
        return env.get_attr(name, indices=[0])[0]
    except AttributeError:  # a native vectorised environment
        return getattr(env, name, default)


def _render_fps(env: VecEnv) -> float:
    return float((_attribute(env, "metadata", None) or {}).get("render_fps") or DEFAULT_FPS)


def _play(
    model: MemoryPPO,
    env: VecEnv,
    results: list[EpisodeResult],
    n_episodes: int,
    max_steps: int | None,
    deterministic: bool,
    report: Callable[[str], None],
    images: bool,
) -> Iterator[np.ndarray]:
    """
    Act, and fill ``results``.

    :return: What is seen before each step, (height, width, 3) uint8; nothing of use for a window.
    """
    normaliser = unwrap_vec_normalize(env)
    obs: Any = env.reset()
    state: Any = None
    starts = np.ones(env.num_envs, dtype=bool)
    totals, lengths, taken = np.zeros(env.num_envs), np.zeros(env.num_envs, dtype=int), 0
    while len(results) < n_episodes and (max_steps is None or taken < max_steps):
        yield _frame(env) if images else _show(env)
        action, state = model.predict(obs, state, starts, deterministic)
        obs, reward, starts, infos = env.step(action)
        totals += reward if normaliser is None else normaliser.get_original_reward()
        lengths, taken = lengths + 1, taken + 1
        for row in np.flatnonzero(starts)[: n_episodes - len(results)]:
            monitored = infos[row].get("episode", {"r": totals[row], "l": lengths[row]})  # what wrappers have not changed
            results.append(EpisodeResult(float(monitored["r"]), int(monitored["l"])))
            report(f"episode {len(results)}: return {results[-1].total:.2f}, length {results[-1].length}")
        totals[starts], lengths[starts] = 0, 0
    if len(results) < n_episodes:
        report(f"stopped after {taken} steps, in episode {len(results) + 1}: return {totals[0]:.2f} so far")


def _show(env: VecEnv) -> np.ndarray:
    env.render("human")
    return np.empty((0, 0, 3), dtype=np.uint8)


def _frame(env: VecEnv) -> np.ndarray:
    """:return: The picture of all environments, (height, width, 3) uint8."""
    images = [np.asarray(image) for image in env.get_images() if image is not None]
    if len(images) < env.num_envs:
        raise ValueError("This environment gives no picture: its `render()` returned None.")
    for image in images:
        shape, kind = image.shape, image.dtype
        if len(shape) != 3 or shape[2] != 3 or kind != np.uint8:
            raise ValueError(f"A picture is (height, width, 3) of uint8, but `render()` gave {shape} of {kind}.")
    return tile_images(images) if len(images) > 1 else images[0]


def _write_gif(path: Path, frames: Iterator[np.ndarray], fps: float) -> None:
    from PIL import Image

    # A palette for each: 256 colours are enough for most worlds, and a quarter of the memory.
    pictures = (Image.fromarray(frame).quantize() for frame in frames)
    first = next(pictures)
    duration = 10 * max(round(100 / min(fps, LARGEST_GIF_FPS)), 1)  # GIF counts hundredths of a second
    first.save(path, save_all=True, append_images=pictures, duration=duration, loop=0)


def _write_mp4(path: Path, frames: Iterator[np.ndarray], fps: float) -> None:
    from imageio.v2 import get_writer

    # Sizes are made even below, as the codec needs them; by itself imageio would scale to multiples of 16. And after an
    # error its own context leaves ffmpeg running.
    with closing(get_writer(path, fps=fps, codec="libx264", macro_block_size=1)) as writer:
        for frame in frames:
            writer.append_data(np.pad(frame, [(0, frame.shape[0] % 2), (0, frame.shape[1] % 2), (0, 0)], mode="edge"))
