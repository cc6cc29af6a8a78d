"""Tier three: Minecraft hangs, dies and loses its connection; the environment continues or raises an error."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from sb3_cyborg import MemoryPPO
from sb3_cyborg.envs import make_memory_vec_env
from sb3_cyborg.envs.minerl import MineRLEnv, MineRLError
from sb3_cyborg.envs.worker_vec_env import WorkerError
from tests.minerl.conftest import Minecraft
from tests.minerl.test_minerl_wire import ATTACK, picture

STEP_FAULTS = ["drop", "drop in reply", "drop after reply", "hang", "kill", "orphan"]


@pytest.mark.parametrize("fault", STEP_FAULTS)
def test_a_fault_is_one_truncated_step(minecraft: Minecraft, pool: Callable[[], list[Any]], fault: str) -> None:
    minecraft.plan({"fault": fault, "at": 6})
    env = minecraft.env(frame_skip=1, step_timeout=2.0)
    env.reset(seed=3)
    for tick in range(1, 6):
        obs, *_, info = env.step(ATTACK)
        np.testing.assert_array_equal(obs, picture(3, tick))
        assert "minerl_fault" not in info
    minecraft.assert_processes(3)  # the launcher, the double and MineRL's watcher
    good = 5
    if fault == "drop after reply":  # the answer to this step arrives, and the message after it is lost
        *_, truncated, _ = env.step(ATTACK)
        assert not truncated
        good = 6

    obs, reward, terminated, truncated, info = env.step(ATTACK)
    print(f"{fault}: {info['minerl_fault']}")
    np.testing.assert_array_equal(obs, picture(3, good))
    assert (reward, terminated, truncated, info["ticks"]) == (0.0, False, True, good)
    assert pool() == []
    minecraft.assert_processes(0)

    obs, info = env.reset(seed=4)
    np.testing.assert_array_equal(obs, picture(4, 0))
    assert info["launches"] == minecraft.launches == 2
    for tick in range(1, 11):
        obs, reward, terminated, truncated, info = env.step(ATTACK)
        np.testing.assert_array_equal(obs, picture(4, tick))
        assert (reward, terminated, truncated) == (1.0, False, False)
        assert "minerl_fault" not in info
    assert env.faults == 1
    assert len(pool()) == 1


def test_a_fault_within_a_frame_skip_keeps_what_was_good(minecraft: Minecraft) -> None:
    minecraft.plan({"fault": "kill", "at": 7})
    env = minecraft.env(frame_skip=4, frame_stack=2)
    env.reset(seed=3)
    env.step(ATTACK)
    obs, reward, terminated, truncated, info = env.step(ATTACK)
    np.testing.assert_array_equal(obs, np.concatenate([picture(3, 4), picture(3, 6)], axis=-1))
    assert (reward, terminated, truncated, info["ticks"]) == (2.0, False, True, 6)
    assert "minerl_fault" in info
    with pytest.raises(Exception, match="`reset` the environment"):
        env.step(ATTACK)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"launch": "silent"}, "TimeoutError: Launching Minecraft took more than 15 seconds"),
        ({"launch": "exit"}, "EOFError"),
        ({"mission": "hang"}, "TimeoutError: Making a world took more than 5 seconds"),
    ],
)
def test_a_launch_or_a_world_that_does_not_come(
    minecraft: Minecraft,
    pool: Callable[[], list[Any]],
    plan: dict[str, Any],
    message: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    minecraft.plan(plan)
    env = minecraft.env(launch_timeout=15.0, reset_timeout=5.0)
    obs, info = env.reset(seed=8)
    np.testing.assert_array_equal(obs, picture(8, 0))
    assert (info["launches"], minecraft.launches, env.faults, len(pool())) == (2, 2, 1, 1)
    assert message in caplog.text
    minecraft.assert_processes(3)


def test_minecraft_that_died_between_episodes(minecraft: Minecraft, pool: Callable[[], list[Any]]) -> None:
    """MineRL alone would start one Minecraft after another here without ending any."""
    env = minecraft.env()
    env.reset()
    assert env._simulator is not None
    for process in env._simulator.processes():
        process.kill()
    _, info = env.reset()
    assert (info["launches"], minecraft.launches, env.faults, len(pool())) == (2, 2, 1, 1)
    minecraft.assert_processes(3)


def test_a_minecraft_that_never_starts_is_one_clear_error(minecraft: Minecraft, pool: Callable[[], list[Any]]) -> None:
    minecraft.plan(default={"launch": "exit"})
    env = minecraft.env(retries=2)
    for _ in range(2):  # the error is raised again
        with pytest.raises(
            MineRLError, match=r"3 faults of Minecraft in a row \(`retries`=2\).*docs/minerl.md.*EOFError"
        ) as error:
            env.reset()
    print(error.value)
    assert minecraft.launches == 3
    assert pool() == []
    minecraft.assert_processes(0)


def test_faults_right_after_the_start_do_not_go_on_for_ever(minecraft: Minecraft) -> None:
    minecraft.plan(default={"fault": "drop", "at": 2})
    env = minecraft.env(retries=1, frame_skip=1)
    for _ in range(2):
        env.reset()
        assert [env.step(0)[3] for _ in range(2)] == [False, True]
    with pytest.raises(MineRLError, match="2 faults of Minecraft in a row"):
        env.reset()
    assert minecraft.launches == 2


def test_good_steps_end_a_row_of_faults(minecraft: Minecraft) -> None:
    minecraft.plan(*[{"fault": "drop", "at": at} for at in (50, 101, 101, 50)], default={"launch": "exit"})
    env = minecraft.env(retries=1, frame_skip=1)
    for steps in (50, 101, 101, 50):
        env.reset()
        for step in range(1, steps + 1):
            *_, truncated, _ = env.step(0)
            assert truncated == (step == steps)
    with pytest.raises(MineRLError):
        env.reset()
    assert env.faults == 4


def test_other_environments_of_the_process_are_left_alone(minecraft: Minecraft, pool: Callable[[], list[Any]]) -> None:
    minecraft.plan({}, {"fault": "kill", "at": 3})
    one, two = minecraft.env(frame_skip=1), minecraft.env(frame_skip=1)
    one.reset(seed=1)
    two.reset(seed=2)
    for tick in range(1, 6):
        obs, *_ = one.step(0)
        np.testing.assert_array_equal(obs, picture(1, tick))
        if two._running:
            two.step(0)
    assert (one.faults, two.faults, len(pool())) == (0, 1, 1)
    two.reset()
    assert len(pool()) == 2
    one.close()
    two.step(0)
    assert two.faults == 1


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Ctrl-C raises a ``KeyboardInterrupt`` also if the tests run in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_within_a_step(minecraft: Minecraft) -> None:
    """The late answer to an interrupted step is not used for a later step."""
    minecraft.plan({"fault": "hang", "at": 3})
    env = minecraft.env(frame_skip=1)
    env.reset(seed=1)
    env.step(0)
    env.step(0)
    timer = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        env.step(0)
    obs, reward, terminated, truncated, info = env.step(0)
    np.testing.assert_array_equal(obs, picture(1, 2))
    assert (reward, terminated, truncated) == (0.0, False, True)
    assert "interrupted" in info["minerl_fault"]
    env.reset()
    env.step(0)
    assert env.faults == 1


# --- training -----------------------------------------------------------------------------------------------------------


def small_model(vec_env: VecEnv) -> MemoryPPO:
    extractor = {"features_dim": 16}
    kwargs: dict[str, Any] = {
        "encoder": "gru",
        "memory": "ring",
        "features_extractor_kwargs": extractor,
        "normalize_images": True,
    }
    return MemoryPPO("CnnPolicy", vec_env, n_steps=32, seq_len=16, batch_size=32, n_epochs=1, seed=0, policy_kwargs=kwargs)


class Infos(BaseCallback):
    """Records the infos of all steps."""

    def __init__(self) -> None:
        super().__init__()
        self.infos: list[dict[str, Any]] = []

    def _on_step(self) -> bool:
        self.infos += self.locals["infos"]
        return True


def test_training_goes_on_through_drop_hang_and_kill(minecraft: Minecraft, pool: Callable[[], list[Any]]) -> None:
    minecraft.plan(*[{"fault": fault, "at": 20} for fault in ("drop", "hang", "kill")])
    env = minecraft.env(frame_skip=1, step_timeout=2.0)
    model, callback = small_model(DummyVecEnv([lambda: Monitor(env)])), Infos()
    model.learn(128, callback)
    lost = [(step, info) for step, info in enumerate(callback.infos) if "minerl_fault" in info]
    for step, info in lost:
        print(f"step {step + 1}: {info['minerl_fault']}, episode of {info['episode']['l']}")
    assert [step for step, _ in lost] == [19, 39, 59]
    for _, info in lost:
        assert info["TimeLimit.truncated"]  # so that the value is bootstrapped rather than 0
        assert env.observation_space.contains(info["terminal_observation"].transpose(1, 2, 0))
        assert info["episode"]["l"] == 20
    assert (model.num_timesteps, minecraft.launches, env.faults, len(pool())) == (128, 4, 3, 1)
    assert all(tensor.isfinite().all() for tensor in model.policy.state_dict().values())
    minecraft.assert_processes(3)


def test_a_training_that_ends_leaves_a_model_that_loads(minecraft: Minecraft, tmp_path: Path) -> None:
    minecraft.plan({"fault": "kill", "at": 40}, default={"launch": "exit"})
    env = minecraft.env(frame_skip=1, retries=1)
    model = small_model(DummyVecEnv([lambda: Monitor(env)]))
    path = tmp_path / "treechop"

    def train() -> None:
        """The code that docs/minerl.md recommends."""
        try:
            model.learn(10_000)
        except MineRLError:
            model.save(path)
            raise

    with pytest.raises(MineRLError) as error:
        train()
    print(f"after {model.num_timesteps} steps: {error.value}")
    minecraft.assert_processes(0)
    loaded = MemoryPPO.load(path)
    assert (loaded.num_timesteps, loaded._n_updates) == (39, 1)
    obs = np.stack([picture(0, tick) for tick in range(4)]).transpose(0, 3, 1, 2)
    starts = np.ones(4, dtype=bool)
    before, after = (agent.predict(obs, episode_start=starts, deterministic=True)[0] for agent in (model, loaded))
    np.testing.assert_array_equal(before, after)
    assert all(th.equal(tensor, loaded.policy.state_dict()[name]) for name, tensor in model.policy.state_dict().items())


def make_in_a_worker(minecraft: Minecraft, **kwargs: Any) -> Callable[[], MineRLEnv]:
    """:return: A function that makes an environment in a process with its own MineRL."""
    from minerl.env.malmo import InstanceManager

    home, told = InstanceManager.MINECRAFT_DIR, str(minecraft.folder)

    def make() -> MineRLEnv:
        InstanceManager.MINECRAFT_DIR = home
        os.environ["MALMO_DOUBLE"] = told
        return MineRLEnv(frame_skip=1, **kwargs)

    return make


def test_workers_have_their_own_minecraft(minecraft: Minecraft) -> None:
    minecraft.plan(*[{"fault": "kill", "at": 5}] * 2)
    vec_env = make_memory_vec_env(make_in_a_worker(minecraft), 2, seed=0, vec_env="subproc")
    try:
        vec_env.reset()
        lost = 0
        for _ in range(12):
            _, _, dones, infos = vec_env.step(np.array([ATTACK, ATTACK]))
            lost += sum("minerl_fault" in info for info in infos)
            assert list(dones) == ["minerl_fault" in info for info in infos]
    finally:
        vec_env.close()
    assert (lost, minecraft.launches) == (2, 4)
    minecraft.assert_processes(0)


def steps(vec_env: VecEnv, number: int) -> None:
    for _ in range(number):
        vec_env.step(np.zeros(vec_env.num_envs, dtype=int))


def test_a_worker_that_gives_up(minecraft: Minecraft) -> None:
    """The sibling's process is terminated without an error, and MineRL's watcher ends its Minecraft."""
    minecraft.plan({}, {"fault": "kill", "at": 5}, default={"launch": "exit"})
    vec_env = make_memory_vec_env(make_in_a_worker(minecraft, retries=1), 2, seed=0, vec_env="subproc")
    try:
        vec_env.reset()
        time.sleep(5)  # MineRL's watcher starts after a second and never notices a process that has ended before
        with pytest.raises(WorkerError, match="MineRLError: MineRLTreechop-v0 gives up after 2 faults"):
            steps(vec_env, 6)
    finally:
        vec_env.close()
    assert minecraft.launches == 3
    minecraft.assert_processes(0)
