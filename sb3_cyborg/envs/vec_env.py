"""One door to many environments: for the trainer, RL Zoo, the examples and your own scripts alike."""

import functools
import os
import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import gymnasium as gym
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.monitor import ResultsWriter
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecFrameStack, VecMonitor

from sb3_cyborg.checks import check_options, check_positive, unknown_name
from sb3_cyborg.envs.registration import family_of, register_envs
from sb3_cyborg.envs.worker_vec_env import WorkerVecEnv

VEC_ENVS = ("auto", "dummy", "subproc", "native")
MONITOR_OPTIONS = ("info_keywords", "override_existing")


def make_memory_vec_env(
    name: str | Callable[..., gym.Env[Any, Any]],
    n_envs: int = 1,
    *,
    seed: int | None = None,
    env_kwargs: dict[str, Any] | None = None,
    wrapper_class: Callable[..., gym.Env[Any, Any]] | None = None,
    wrapper_kwargs: dict[str, Any] | None = None,
    frame_stack: int = 1,
    vec_env: str = "auto",
    monitor_dir: str | Path | None = None,
    monitor_kwargs: dict[str, Any] | None = None,
) -> VecEnv:
    """
    Make environments that run side by side, monitored and seeded.

    :param name: An id that is registered with gymnasium (``module:id`` imports the module before), or a callable.
    :param n_envs: How many.
    :param seed: Environment ``i`` gets ``seed + i``; ``None`` seeds at random.
    :param env_kwargs: Keyword arguments of the environment.
    :param wrapper_class: Wrapper around each environment, outside of its ``Monitor``, as in SB3's ``make_vec_env``.
    :param wrapper_kwargs: Keyword arguments of the wrapper.
    :param frame_stack: Latest observations that are stacked into one (``VecFrameStack``); 1 stacks none.
    :param vec_env: ``"dummy"`` steps them one after the other; ``"subproc"`` gives each a process; ``"native"`` computes all
        at once, where the environment has such a form; ``"auto"`` is native if it can be, else a process each for several
        environments that are slow (Crafter, MineRL), else dummy.
    :param monitor_dir: Folder for SB3's ``monitor.csv`` files; ``None`` writes none, but ``info["episode"]`` is there anyway.
    :param monitor_kwargs: ``info_keywords`` and ``override_existing`` of SB3's ``Monitor``.
    :return: The environments.
    :raises ValueError: for an unknown id, keyword or form, and sizes that cannot be.
    :raises ImportError: for an environment whose package is missing, with the command that installs it.
    :raises WorkerError: later on, when an environment in a process of its own raises or dies.
    """
    check_positive(n_envs=n_envs, frame_stack=frame_stack)
    if vec_env not in VEC_ENVS:
        raise unknown_name("vec_env", vec_env, VEC_ENVS)
    monitor_kwargs = {"override_existing": True, **(monitor_kwargs or {})}
    check_options("monitor_kwargs", monitor_kwargs, MONITOR_OPTIONS)
    if monitor_dir is not None and not any(Path(monitor_dir).glob("*monitor.csv")):
        monitor_kwargs["override_existing"] = True  # SB3 writes a header only then
    make_env: Callable[..., gym.Env[Any, Any]] = (
        name if callable(name) else functools.partial(make_env_by_id, check_env_id(name))
    )
    family = family_of(name) if isinstance(name, str) else None
    native = family.native if family is not None else None
    if vec_env == "auto":
        slow = family is not None and family.slow and n_envs > 1 and (os.cpu_count() or 1) > 1
        vec_env = "native" if native and wrapper_class is None else "subproc" if slow else "dummy"
    envs: VecEnv
    if vec_env == "native":
        envs = _make_native(name, native, n_envs, seed, env_kwargs, wrapper_class, monitor_dir, monitor_kwargs)
    else:
        vec_env_kwargs = {"name": name if isinstance(name, str) else getattr(name, "__name__", repr(name))}
        envs = make_vec_env(
            make_env,
            n_envs,
            seed,
            monitor_dir=None if monitor_dir is None else str(monitor_dir),
            wrapper_class=wrapper_class,
            wrapper_kwargs=wrapper_kwargs,
            env_kwargs=env_kwargs,
            # SB3's type names two classes, but any VecEnv that takes a list of functions will do.
            vec_env_cls=WorkerVecEnv if vec_env == "subproc" else DummyVecEnv,
            vec_env_kwargs=vec_env_kwargs if vec_env == "subproc" else None,
            monitor_kwargs=monitor_kwargs,
        )
    return VecFrameStack(envs, frame_stack) if frame_stack > 1 else envs


def check_env_id(name: str) -> str:
    """
    :param name: An id, or ``module:id``.
    :return: The same.
    :raises ValueError: for one that is not registered, with the nearest that is.
    """
    register_envs()
    module, _, env_id = name.rpartition(":")
    if module:
        try:
            import_module(module)
        except ImportError as error:
            raise ValueError(f"The module of environment {name!r} cannot be imported: {error}.") from error
    try:
        gym.spec(env_id)
    except gym.error.Error as error:
        if env_id in gym.registry:
            raise
        raise unknown_name("environment", env_id, gym.registry) from error
    return name


def make_env_by_id(name: str, /, **kwargs: Any) -> gym.Env[Any, Any]:
    """
    ``gym.make`` that renders to arrays unless told otherwise, as SB3's ``make_vec_env`` does.

    It is a function of this module, so that a worker process which unpickles it has the ids of this package registered.

    :param name: The environment's id.
    :param kwargs: Its keyword arguments.
    :return: The environment.
    :raises ValueError: for a keyword that it does not take.
    """
    try:
        try:
            return gym.make(name, **{"render_mode": "rgb_array", **kwargs})
        except TypeError as error:
            if "render_mode" in kwargs or "render_mode" not in str(error):
                raise
            return gym.make(name, **kwargs)
    except TypeError as error:
        if "unexpected keyword argument" not in str(error):
            raise
        raise ValueError(f"Environment {name!r} does not take what `env_kwargs` holds, {kwargs}: {error}.") from error


def _make_native(
    name: str | Callable[..., gym.Env[Any, Any]],
    native: str | None,
    n_envs: int,
    seed: int | None,
    env_kwargs: dict[str, Any] | None,
    wrapper_class: Callable[..., gym.Env[Any, Any]] | None,
    monitor_dir: str | Path | None,
    monitor_kwargs: dict[str, Any],
) -> VecEnv:
    if native is None:
        raise ValueError(f"`vec_env`='native': {name!r} has no native form; 'dummy' and 'subproc' would do.")
    if wrapper_class is not None:
        raise ValueError("`vec_env`='native' takes no `wrapper_class`: there are no single environments to wrap; use 'dummy'.")
    module, _, attribute = native.partition(":")
    try:
        envs: VecEnv = getattr(import_module(module), attribute)(n_envs, **(env_kwargs or {}))
    except TypeError as error:
        if "unexpected keyword argument" not in str(error):
            raise
        raise ValueError(f"Environment {name!r} does not take what `env_kwargs` holds, {env_kwargs}: {error}.") from error
    envs.seed(seed)
    if monitor_dir is not None:
        with warnings.catch_warnings():
            # Native forms report episodes, so they say that they are monitored; they write no files.
            warnings.filterwarnings("ignore", "The environment is already wrapped with a `Monitor`")
            monitored = VecMonitor(envs, info_keywords=monitor_kwargs.get("info_keywords", ()))
        # VecMonitor cannot append to a file, its writer can.
        monitored.results_writer = ResultsWriter(
            str(Path(monitor_dir) / "0"),
            header={"t_start": monitored.t_start, "env_id": str(name)},
            extra_keys=monitored.info_keywords,
            override_existing=monitor_kwargs["override_existing"],
        )
        envs = monitored
    return envs
