"""``make_memory_vec_env``, the ids, and the errors of workers that die."""

import functools
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3.common.monitor import Monitor, load_results
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecFrameStack, VecMonitor

from sb3_cyborg import MemoryPPO, make_memory_vec_env
from sb3_cyborg.envs import FAMILIES
from sb3_cyborg.envs.worker_vec_env import WorkerError, WorkerVecEnv
from tests.helpers import ToyEnv

CHAIN = "sb3_cyborg/MemoryChain-v0"


class CountingEnv(gym.Env[np.ndarray, np.int64]):
    """Observes the number of its steps. At a given step it raises an error, kills its own process, or exits."""

    observation_space = spaces.Box(0, 1e9, (1,))
    action_space = spaces.Discrete(2)

    def __init__(self, fails_at: int = 0, how: str = "raise") -> None:
        if how == "construct":
            raise OSError("no such world")
        self.fails_at, self.how, self.steps = fails_at, how, 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {"seed": seed}

    def step(self, action: np.int64) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        if self.steps == self.fails_at:
            if self.how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.how == "exit":
                os._exit(3)
            raise KeyError("the world is broken")
        return np.full(1, self.steps, np.float32), 1.0, False, False, {}


def failing_envs(start_method: str | None = None, **kwargs: Any) -> WorkerVecEnv:
    """:return: Three environments, of which the middle one fails."""
    make: list[Callable[[], CountingEnv]] = [CountingEnv, functools.partial(CountingEnv, **kwargs), CountingEnv]
    return WorkerVecEnv(make, start_method, name="Counting-v0")


def reset(envs: VecEnv) -> np.ndarray:
    obs = envs.reset()
    assert isinstance(obs, np.ndarray)
    return obs


def assert_no_process_left(envs: WorkerVecEnv) -> None:
    assert [process.is_alive() for process in envs.processes] == [False] * 3
    envs.close()  # closing twice is allowed


@pytest.mark.parametrize(
    ("how", "what"),
    [
        ("raise", "failed in its worker process: KeyError: 'the world is broken'"),
        ("kill", "was killed by signal 9"),
        ("exit", "ended with exit code 3"),
    ],
)
@pytest.mark.parametrize("start_method", ["forkserver", "fork"])
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")  # "fork" is tested on purpose
def test_a_worker_that_dies_is_an_error_that_names_the_environment(how: str, what: str, start_method: str) -> None:
    """With "fork" a sibling keeps the dead worker's pipe open, and SB3's own class waits forever."""
    envs = failing_envs(start_method, fails_at=3, how=how)
    envs.reset()
    for _ in range(2):
        envs.step(np.zeros(3, int))
    with pytest.raises(WorkerError, match=r"environment 1 of 3 \(Counting-v0\)") as caught:
        envs.step(np.zeros(3, int))
    assert what in str(caught.value)
    assert_no_process_left(envs)


def test_a_worker_that_is_killed_between_steps() -> None:
    envs = failing_envs()
    envs.reset()
    envs.processes[1].kill()
    envs.processes[1].join()
    with pytest.raises(WorkerError, match=r"environment 1 of 3 \(Counting-v0\) was killed by signal 9"):
        envs.step(np.zeros(3, int))
    assert_no_process_left(envs)


def test_an_environment_that_cannot_be_made() -> None:
    with pytest.raises(WorkerError, match=r"environment 1 of 3 \(Counting-v0\) failed .*: OSError: no such world"):
        failing_envs(how="construct")


def test_close_while_a_step_is_under_way() -> None:
    envs = failing_envs(fails_at=1, how="kill")
    envs.reset()
    envs.step_async(np.zeros(3, int))
    envs.close()
    assert_no_process_left(envs)


def test_the_model_can_be_saved_after_a_worker_died(tmp_path: Path) -> None:
    envs = failing_envs(fails_at=20, how="kill")
    model = MemoryPPO("MlpPolicy", envs, n_steps=8, batch_size=24, n_epochs=1, device="cpu")
    with pytest.raises(WorkerError):
        model.learn(1_000)
    model.save(tmp_path / "model")
    assert MemoryPPO.load(tmp_path / "model").num_timesteps == model.num_timesteps > 0


def test_workers_do_what_dummies_do() -> None:
    kwargs: dict[str, Any] = {"n_envs": 3, "seed": 5}
    results = []
    for vec_env in ("dummy", "subproc"):
        envs = make_memory_vec_env("CartPole-v1", vec_env=vec_env, **kwargs)
        steps: list[Any] = [envs.reset()]
        steps += [envs.step(np.array([step % 2, 0, 1])) for step in range(40)]
        assert envs.env_is_wrapped(Monitor) == [True] * 3
        assert envs.get_attr("render_mode") == ["rgb_array"] * 3
        assert envs.has_attr("spec")
        results.append(steps)
        envs.close()
    first, second = results
    np.testing.assert_array_equal(first[0], second[0])
    for (obs, rewards, dones, infos), (obs_2, rewards_2, dones_2, infos_2) in zip(first[1:], second[1:], strict=True):
        np.testing.assert_array_equal(obs, obs_2)
        np.testing.assert_array_equal(rewards, rewards_2)
        np.testing.assert_array_equal(dones, dones_2)
        for info, info_2 in zip(infos, infos_2, strict=True):
            assert info.keys() == info_2.keys()


def test_ids_of_this_package_exist_in_workers() -> None:
    """A worker starts as a new interpreter, which has not imported this package."""
    envs = make_memory_vec_env(CHAIN, 2, seed=0, vec_env="subproc", env_kwargs={"memory_length": 3})
    assert reset(envs).shape == (2, 3)
    envs.close()


def test_auto_is_native_where_it_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not isinstance(make_memory_vec_env(CHAIN, 4), (DummyVecEnv, WorkerVecEnv))
    assert isinstance(make_memory_vec_env(CHAIN, 4, vec_env="dummy"), DummyVecEnv)
    assert isinstance(make_memory_vec_env(CHAIN, 4, wrapper_class=gym.wrappers.FlattenObservation), DummyVecEnv)
    assert isinstance(make_memory_vec_env("CartPole-v1", 4), DummyVecEnv)
    with pytest.raises(ValueError, match="has no native form; 'dummy' and 'subproc' would do"):
        make_memory_vec_env("CartPole-v1", vec_env="native")
    with pytest.raises(ValueError, match="takes no `wrapper_class`"):
        make_memory_vec_env(CHAIN, vec_env="native", wrapper_class=gym.wrappers.FlattenObservation)


def test_slow_environments_get_a_process_each(monkeypatch: pytest.MonkeyPatch) -> None:
    crafter = "sb3_cyborg/CrafterWood-v0"
    envs = make_memory_vec_env(crafter, 2, seed=0)
    assert isinstance(envs, WorkerVecEnv)
    envs.close()
    assert isinstance(make_memory_vec_env(crafter, 1), DummyVecEnv)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    assert isinstance(make_memory_vec_env(crafter, 2), DummyVecEnv)


def test_seeds() -> None:
    """Environment i gets seed + i."""

    def first(seed: int | None, n_envs: int) -> np.ndarray:
        return reset(make_memory_vec_env("CartPole-v1", n_envs, seed=seed))

    np.testing.assert_array_equal(first(3, 3)[1:], first(4, 2))
    assert not np.array_equal(first(None, 1), first(None, 1))


def test_wrappers_and_frame_stack() -> None:
    envs = make_memory_vec_env("CartPole-v1", 2, frame_stack=3, wrapper_class=gym.wrappers.TimeAwareObservation)
    assert isinstance(envs, VecFrameStack)
    assert reset(envs).shape == (2, 15)
    chain = make_memory_vec_env(CHAIN, 2, frame_stack=4)
    assert isinstance(chain, VecFrameStack)
    assert reset(chain).shape == (2, 12)


def test_a_callable_as_name() -> None:
    envs = make_memory_vec_env(ToyEnv, 2, seed=0, env_kwargs={"mean_length": 3})
    assert envs.get_attr("mean_length") == [3, 3]


@pytest.mark.parametrize("name", [CHAIN, "CartPole-v1"])
def test_monitor_files(name: str, tmp_path: Path) -> None:
    def run() -> VecEnv:
        envs = make_memory_vec_env(name, 2, seed=0, monitor_dir=tmp_path, monitor_kwargs={"override_existing": False})
        envs.reset()
        for _ in range(100):
            envs.step(np.zeros(2, int))
        envs.close()
        return envs

    first = run()
    assert isinstance(first, VecMonitor if name == CHAIN else DummyVecEnv)
    episodes = len(load_results(str(tmp_path)))
    assert episodes > 2
    run()
    assert len(load_results(str(tmp_path))) == 2 * episodes


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"name": "sb3_cyborg/MemoryChan-v0"}, "Did you mean 'sb3_cyborg/MemoryChain-v0'"),
        ({"name": "no_such_module:X-v0"}, "cannot be imported"),
        ({"name": "CartPole-v1", "n_envs": 0}, "`n_envs` must be a whole number of at least 1, got 0"),
        ({"name": "CartPole-v1", "frame_stack": 1.5}, "`frame_stack` must be a whole number"),
        ({"name": "CartPole-v1", "vec_env": "subprocess"}, "Unknown vec_env 'subprocess'. Did you mean 'subproc'"),
        ({"name": "CartPole-v1", "env_kwargs": {"gravity": 1}}, "does not take `env_kwargs`={'gravity': 1}"),
        ({"name": CHAIN, "env_kwargs": {"length": 1}}, "'length'. Did you mean 'memory_length'?"),
        ({"name": CHAIN, "vec_env": "dummy", "env_kwargs": {"length": 1}}, "'length'. Did you mean 'memory_length'?"),
        ({"name": "CartPole-v1", "monitor_kwargs": {"override": True}}, "Did you mean 'override_existing'"),
    ],
)
def test_bad_input(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make_memory_vec_env(**kwargs)


def test_importing_the_package_registers_ids_and_imports_nothing_heavy() -> None:
    script = (
        "import sys, sb3_cyborg, gymnasium as gym\n"
        "heavy = {'popgym', 'minigrid', 'crafter', 'minerl', 'gym', 'pygame', 'pydantic', 'typer', 'rl_zoo3', 'wandb'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "assert all(i in gym.registry for f in sb3_cyborg.envs.FAMILIES.values() for i in f.kwargs)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_registering_twice_leaves_others_alone() -> None:
    """RL Zoo registers ids such as ``CartPoleNoVel-v1``, too: the first registration stays."""
    script = (
        "import warnings, gymnasium as gym\n"
        "gym.register('CartPoleNoVel-v1', entry_point='somebody:Else')\n"
        "warnings.simplefilter('error')\n"
        "import sb3_cyborg\n"
        "sb3_cyborg.envs.register_envs()\n"
        "assert gym.spec('CartPoleNoVel-v1').entry_point == 'somebody:Else'\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True, timeout=120)


def test_every_family_has_ids() -> None:
    assert {name: len(family.kwargs) for name, family in FAMILIES.items()} == {
        "MemoryChain": 1,
        "TMaze": 1,
        "NoVel": 6,
        "POPGym": 48,
        "POPGymMasked": 9,
        "MiniGrid": 6,
        "Crafter": 1,
        "MineRL": 13,
    }
