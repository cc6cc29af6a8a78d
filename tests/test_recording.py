"""Recording: frames, states, episode results, files and errors."""

import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import imageio.v3 as iio
import numpy as np
import pytest
from PIL import Image, ImageSequence
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_cyborg import MemoryPPO
from sb3_cyborg.trainers.acting import EpisodeResult
from sb3_cyborg.trainers.trainer_v7 import TrainerV7
from sb3_cyborg.viewers.recording import enjoy
from sb3_cyborg.viewers.runs import enjoy_run
from tests.helpers import ToyEnv, predict, toy_model, toy_vec_env

LENGTH = 5


class PictureEnv(ToyEnv):
    """Episodes of ``LENGTH`` steps with reward 2; the colour of a frame encodes the step."""

    metadata = {"render_modes": ["human", "rgb_array"], "render_fps": 10}  # noqa: RUF012  # gymnasium's

    def __init__(self, render_mode: str | None = "rgb_array", size: tuple[int, int] = (33, 47)) -> None:
        super().__init__()
        self.render_mode, self.size, self.step_number, self.shown = render_mode, size, 0, 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        self.step_number = 0
        return super().reset(seed=seed, options=options)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        obs, *_ = super().step(action)
        self.step_number += 1
        return obs, 2.0, self.step_number == LENGTH, False, {}

    def render(self) -> Any:
        self.shown += 1
        picture = np.full((*self.size, 3), 40 * self.step_number, dtype=np.uint8)
        return picture if self.render_mode == "rgb_array" else None


@pytest.fixture
def model() -> MemoryPPO:
    return toy_model(policy_kwargs={"memory": "ring"})


def greys(frames: Any) -> list[float]:
    return [float(np.asarray(frame)[..., :3].mean()) for frame in frames]


def test_gif(model: MemoryPPO, tmp_path: Path) -> None:
    path, lines = tmp_path / "new" / "agent.gif", list[str]()
    results = enjoy(model, PictureEnv(), video=path, n_episodes=2, report=lines.append)
    assert results == [EpisodeResult(10.0, LENGTH)] * 2
    assert lines == ["episode 1: return 10.00, length 5", "episode 2: return 10.00, length 5", f"video: {path}"]
    with Image.open(path) as gif:
        assert gif.size == (7 * 47, 7 * 33)  # small frames are enlarged to 320 pixels or more
        assert gif.info["duration"] == 100
        assert gif.info["loop"] == 0
        frames = [frame.convert("RGB") for frame in ImageSequence.Iterator(gif)]
    assert greys(frames) == pytest.approx([0, 40, 80, 120, 160] * 2, abs=2)
    assert [entry.name for entry in path.parent.iterdir()] == ["agent.gif"]


def test_mp4(model: MemoryPPO, tmp_path: Path) -> None:
    """Odd sizes are padded to even ones, without a shift."""
    path = tmp_path / "agent.mp4"
    enjoy(model, PictureEnv(), video=path, n_episodes=3, fps=5, report=lambda _: None)
    assert path.stat().st_size > 1_000
    frames = iio.imread(path, plugin="FFMPEG")
    assert frames.shape == (3 * LENGTH, 232, 330, 3)
    assert greys(frames) == pytest.approx([0, 40, 80, 120, 160] * 3, abs=8)
    assert iio.immeta(path, plugin="FFMPEG")["fps"] == 5


def test_state_and_starts_are_threaded(model: MemoryPPO, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The actions equal those of a hand-written loop over two episodes."""
    env = PictureEnv()
    enjoy(model, env, video=tmp_path / "a.gif", n_episodes=2, seed=3, deterministic=False, report=lambda _: None)
    taken = np.array(env.actions)
    by_hand = DummyVecEnv([PictureEnv])
    by_hand.seed(3)
    model.set_random_seed(3)
    obs: Any = by_hand.reset()
    state: Any = None
    starts = np.ones(1, dtype=bool)
    actions = []
    for _ in range(2 * LENGTH):
        action, state = predict(model, obs, state, starts, deterministic=False)
        actions.append(action[0])
        obs, _, starts, _ = by_hand.step(action)
    np.testing.assert_array_equal(taken, np.array(actions))

    seen = []
    original = model.predict

    def watched(obs: Any, state: Any, starts: Any, deterministic: bool) -> Any:
        seen.append((state is None, starts.tolist()))
        return original(obs, state, starts, deterministic)

    monkeypatch.setattr(model, "predict", watched)
    enjoy(model, PictureEnv(), video=tmp_path / "a.gif", n_episodes=2, report=lambda _: None)
    assert [first for first, _ in seen] == [True] + [False] * 9
    assert [starts for _, starts in seen] == ([[True]] + [[False]] * 4) * 2


def test_a_window(model: MemoryPPO, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    env = PictureEnv("human")
    assert enjoy(model, env, n_episodes=2) == [EpisodeResult(10.0, LENGTH)] * 2
    assert env.shown == 2 * LENGTH
    assert capsys.readouterr().out == "episode 1: return 10.00, length 5\nepisode 2: return 10.00, length 5\n"


def test_a_window_without_a_display(model: MemoryPPO, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "SDL_VIDEODRIVER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("sys.platform", "linux")
    with pytest.raises(ValueError, match="no display to open a window on; record a video instead"):
        enjoy(model, PictureEnv("human"))


def test_returns_are_those_of_the_environment(model: MemoryPPO, tmp_path: Path) -> None:
    """Returns are not normalized and ignore wrappers outside of Monitor; environments are counted separately."""
    normalised = VecNormalize(DummyVecEnv([PictureEnv]), training=False)
    normalised.ret_rms.var = np.array(100.0)
    scaled = DummyVecEnv([lambda: gym.wrappers.TransformReward(Monitor(PictureEnv()), lambda reward: float(reward) / 10)])
    for env in (normalised, scaled, DummyVecEnv([PictureEnv] * 2)):
        results = enjoy(model, env, video=tmp_path / "a.gif", n_episodes=3, report=lambda _: None)
        assert results == [EpisodeResult(10.0, LENGTH)] * 3


def test_max_steps(model: MemoryPPO, tmp_path: Path) -> None:
    lines: list[str] = []
    results = enjoy(model, PictureEnv(), video=tmp_path / "a.gif", max_steps=7, report=lines.append)
    assert len(results) == 1
    assert lines[1] == "stopped after 7 steps, in episode 2: return 4.00 so far"
    with Image.open(tmp_path / "a.gif") as gif:
        assert getattr(gif, "n_frames", 0) == 7


def test_a_failed_recording_keeps_the_old_file(model: MemoryPPO, tmp_path: Path) -> None:
    class Failing(PictureEnv):
        def step(self, action: Any) -> Any:
            if self.step_number == 3:
                raise RuntimeError("the world ended")
            return super().step(action)

    for name in ("a.gif", "a.mp4"):
        (tmp_path / name).write_bytes(b"before")
        with pytest.raises(RuntimeError, match="the world ended"):
            enjoy(model, Failing(), video=tmp_path / name, report=lambda _: None)
        assert (tmp_path / name).read_bytes() == b"before"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a.gif", "a.mp4"]


def test_bad_input(model: MemoryPPO, tmp_path: Path) -> None:
    video = tmp_path / "a.gif"

    def refused(match: str, env: Any = None, **options: Any) -> None:
        with pytest.raises(ValueError, match=match):
            enjoy(model, PictureEnv() if env is None else env, **{"video": video, **options})

    refused(r"A video's name ends in \.gif or \.mp4, got .*a\.avi", video=tmp_path / "a.avi")
    (tmp_path / "folder.gif").mkdir()
    refused("folder.gif is a folder; give a file in it", video=tmp_path / "folder.gif")
    refused("`n_episodes` must be a whole number of at least 1, got 0", n_episodes=0)
    refused("`max_steps` must be a whole number of at least 1, got 0", max_steps=0)
    refused(r"`fps` must be in \(0, 1000\], got nan", fps=float("nan"))
    needed = "A video needs .*'rgb_array'`; this one was made with 'human'. Its render modes: 'human', 'rgb_array'"
    refused(needed, PictureEnv("human"))
    refused("made with None. Its render modes: none", toy_vec_env(1, ToyEnv))

    class Blind(PictureEnv):
        def render(self) -> Any:
            return None

    class Deep(PictureEnv):
        def render(self) -> Any:
            return np.zeros((4, 4), dtype=np.float32)

    refused(r"gives no picture: its `render\(\)` returned None", Blind())
    refused(r"A picture is \(height, width, 3\) of uint8, but `render\(\)` gave \(4, 4\) of float32", Deep())
    model.save(tmp_path / "model")
    with pytest.raises(ValueError, match="loaded without an environment: pass `env`"):
        enjoy(MemoryPPO.load(tmp_path / "model"), video=video)


@pytest.mark.parametrize(
    ("missing", "name", "command"),
    [
        ("imageio_ffmpeg", "a.mp4", r'pip install "sb3-cyborg\[video\]"'),
        ("PIL", "a.gif", r'pip install "sb3-cyborg\[train\]"'),
    ],
)
def test_a_missing_package(
    model: MemoryPPO, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, missing: str, name: str, command: str
) -> None:
    for module in [module for module in sys.modules if module.split(".")[0] == missing]:
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=command):
        enjoy(model, PictureEnv(), video=tmp_path / name)


def test_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {
        "hidden_dim": 8,
        "n_steps": 16,
        "n_epochs": 1,
        "log_dir": str(tmp_path),
        "eval_freq": 0,
        "progress_bar": False,
        "seed": 1,
    }
    trainer = TrainerV7({"env": "CartPole-v1", "normalize": True, **settings}).train(32)
    run = trainer.run
    assert run is not None
    lines: list[str] = []
    results = enjoy_run(run, video=tmp_path / "run.mp4", which="last", n_episodes=2, report=lines.append)
    assert [result.total for result in results] == [result.length for result in results]
    assert len(lines) == 3
    frames = iio.imread(tmp_path / "run.mp4", plugin="FFMPEG")
    assert frames.shape == (sum(result.length for result in results), 400, 600, 3)
    again = enjoy_run(run, video=tmp_path / "again.gif", which="last", n_episodes=2, report=lines.append)
    assert again == results, "a run's own seed"
    with pytest.raises(ValueError, match="no checkpoint 'worst'"):
        enjoy_run(run, which="worst", video=tmp_path / "a.gif")
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    assert enjoy_run(run, which="last", n_episodes=2) == results, "the same in a window"


def test_a_run_whose_environment_does_not_render(tmp_path: Path) -> None:
    pytest.importorskip("popgym")
    trainer = TrainerV7(
        {
            "env": "popgym:popgym-RepeatPreviousEasy-v0",
            "hidden_dim": 8,
            "n_steps": 16,
            "n_epochs": 1,
            "log_dir": str(tmp_path),
            "eval_freq": 0,
            "progress_bar": False,
        }
    )
    trainer.save(tmp_path / "model.pt")
    with pytest.raises(
        ValueError, match=r"'popgym:popgym-RepeatPreviousEasy-v0' cannot be made with `render_mode='rgb_array'`"
    ):
        enjoy_run(tmp_path / "model.pt", video=tmp_path / "a.gif")
