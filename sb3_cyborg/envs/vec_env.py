"""Creates vectorized environments, for the trainer, RL Zoo, the examples and scripts of users."""

import contextlib
import functools
import os
import warnings
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import gymnasium as gym
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.monitor import ResultsWriter
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecFrameStack, VecMonitor

from sb3_cyborg.checks import check_options, check_positive, unknown_name
from sb3_cyborg.envs.registration import Family, family_of, register_envs
from sb3_cyborg.envs.worker_vec_env import WorkerVecEnv

VEC_ENVS = ("auto", "dummy", "subproc", "native")
MONITOR_OPTIONS = ("allow_early_resets", "info_keywords", "override_existing", "reset_keywords")


EnvMaker = Callable[..., gym.Env[Any, Any]]


def make_memory_vec_env(
    name: str | EnvMaker,
    n_envs: int = 1,
    *,
    seed: int | None = None,
    env_kwargs: dict[str, Any] | None = None,
    wrapper_class: EnvMaker | None = None,
    wrapper_kwargs: dict[str, Any] | None = None,
    frame_stack: int = 1,
    vec_env: str = "auto",
    monitor_dir: str | Path | None = None,
    monitor_kwargs: dict[str, Any] | None = None,
) -> VecEnv:
    """
    Creates seeded and monitored environments that step together.

    :param name: An id that is registered with gymnasium, or a callable that makes an environment. ``module:id`` imports the
        module first.
    :param n_envs: Number of environments, at least 1.
    :param seed: Environment ``i`` gets ``seed + i``; ``None`` draws random seeds.
    :param env_kwargs: Keyword arguments of the environment.
    :param wrapper_class: Wrapper of each environment, outside its ``Monitor`` as in SB3's ``make_vec_env``.
    :param wrapper_kwargs: Keyword arguments of the wrapper.
    :param frame_stack: Number of the latest observations that ``VecFrameStack`` stacks into one; 1 adds no stack.
    :param vec_env: ``"dummy"`` steps the environments one after the other. ``"subproc"`` runs each one in a process.
        ``"native"`` computes all of them as arrays, for environments that have this form. ``"auto"`` is native where
        possible; else subproc for several slow environments (Crafter, MineRL); else dummy.
    :param monitor_dir: Folder for SB3's ``monitor.csv`` files; ``None`` writes no files. ``info["episode"]`` is set either
        way.
    :param monitor_kwargs: Options of SB3's ``Monitor``. Native forms read ``info_keywords`` and ``override_existing``.
    :return: The environments.
    :raises ValueError: for an unknown id, keyword or form, and for numbers below 1.
    :raises ImportError: for an environment whose package is missing, with the command that installs it.
    :raises WorkerError: later, when an environment in a process raises an error or its process dies.
    """
    check_positive(n_envs=n_envs, frame_stack=frame_stack)
    if vec_env not in VEC_ENVS:
        raise unknown_name("vec_env", vec_env, VEC_ENVS)
    monitor_kwargs = _monitor_options(monitor_kwargs, monitor_dir)
    make_env: EnvMaker = name if callable(name) else functools.partial(make_env_by_id, check_env_id(name))
    family = family_of(name) if isinstance(name, str) else None
    if vec_env == "auto":
        vec_env = _choose_form(family, n_envs, is_wrapped=wrapper_class is not None)
    if vec_env == "native":
        make_native = _native_form(name, family, is_wrapped=wrapper_class is not None)
        with _wrong_keywords_as_value_errors(name, env_kwargs):
            envs = make_native(n_envs, **(env_kwargs or {}))
        envs.seed(seed)
        if monitor_dir is not None:
            envs = _write_episodes(envs, str(name), monitor_dir, monitor_kwargs)
    else:
        in_processes = vec_env == "subproc"
        label = name if isinstance(name, str) else getattr(name, "__name__", repr(name))
        envs = make_vec_env(
            make_env,
            n_envs,
            seed,
            monitor_dir=None if monitor_dir is None else str(monitor_dir),
            wrapper_class=wrapper_class,
            wrapper_kwargs=wrapper_kwargs,
            env_kwargs=env_kwargs,
            # SB3's type names two classes, but it works with every VecEnv that takes a list of functions.
            vec_env_cls=WorkerVecEnv if in_processes else DummyVecEnv,
            vec_env_kwargs={"name": label} if in_processes else None,
            monitor_kwargs=monitor_kwargs,
        )
    return VecFrameStack(envs, frame_stack) if frame_stack > 1 else envs


def _monitor_options(monitor_kwargs: dict[str, Any] | None, monitor_dir: str | Path | None) -> dict[str, Any]:
    """:return: The options of SB3's ``Monitor``, checked, with the default of ``override_existing``."""
    options = {"override_existing": True, **(monitor_kwargs or {})}
    check_options("monitor_kwargs", options, MONITOR_OPTIONS)
    if monitor_dir is not None and not any(Path(monitor_dir).glob("*monitor.csv")):
        options["override_existing"] = True  # with False SB3 writes no header into a new file
    return options


def _choose_form(family: Family | None, n_envs: int, is_wrapped: bool) -> str:
    """:return: The form that ``vec_env="auto"`` stands for."""
    if family is None:
        return "dummy"
    if family.native is not None and not is_wrapped:
        return "native"
    return "subproc" if family.slow and n_envs > 1 and (os.cpu_count() or 1) > 1 else "dummy"


def _native_form(name: str | EnvMaker, family: Family | None, is_wrapped: bool) -> Callable[..., VecEnv]:
    """
    :return: The class that computes all environments as arrays.
    :raises ValueError: for environments that have no such class, and for a wrapper, which needs single environments.
    """
    if family is None or family.native is None:
        raise ValueError(f"`vec_env`='native': {name!r} has no native form; 'dummy' and 'subproc' would do.")
    if is_wrapped:
        raise ValueError("`vec_env`='native' takes no `wrapper_class`: there are no single environments to wrap; use 'dummy'.")
    module, _, attribute = family.native.partition(":")
    native: Callable[..., VecEnv] = getattr(import_module(module), attribute)
    return native


def _write_episodes(envs: VecEnv, env_id: str, monitor_dir: str | Path, monitor_kwargs: dict[str, Any]) -> VecEnv:
    """:return: Native environments whose episodes are written to a ``monitor.csv`` file."""
    with warnings.catch_warnings():
        # Native forms report episodes and therefore count as monitored, but they write no files.
        warnings.filterwarnings("ignore", "The environment is already wrapped with a `Monitor`")
        monitored = VecMonitor(envs, info_keywords=monitor_kwargs.get("info_keywords", ()))
    # VecMonitor itself cannot append to a file; its writer can.
    monitored.results_writer = ResultsWriter(
        str(Path(monitor_dir) / "0"),
        header={"t_start": monitored.t_start, "env_id": env_id},
        extra_keys=monitored.info_keywords,
        override_existing=monitor_kwargs["override_existing"],
    )
    return monitored


def check_env_id(name: str) -> str:
    """
    Requires an environment id that is registered with gymnasium.

    :param name: An id, or ``module:id``, whose module is imported first.
    :return: The name, unchanged.
    :raises ValueError: for an id that is not registered, with the nearest known one, and for a module that cannot be imported.
    """
    register_envs()
    module, _, env_id = name.rpartition(":")
    if module:
        try:
            import_module(module)
        except (Exception, SystemExit) as error:  # a module may raise anything, and may end the program
            reason = error if isinstance(error, ImportError) else f"{type(error).__name__}: {error}"
            raise ValueError(f"The module of environment {name!r} cannot be imported: {reason}.") from error
    try:
        gym.spec(env_id)
    except gym.error.Error as error:
        if env_id in gym.registry:
            raise
        raise unknown_name("environment", env_id, gym.registry) from error
    return name


def make_env_by_id(name: str, /, **kwargs: Any) -> gym.Env[Any, Any]:
    """
    Makes one environment, as ``gym.make`` does, with ``render_mode="rgb_array"`` by default as in SB3's ``make_vec_env``.

    It is a function of this module so that a worker process that unpickles it registers the ids of this package.

    :param name: The environment's id.
    :param kwargs: Keyword arguments of the environment.
    :return: The environment.
    :raises ValueError: for a keyword that the environment does not take.
    """
    with _wrong_keywords_as_value_errors(name, kwargs):
        try:
            return gym.make(name, **{"render_mode": "rgb_array", **kwargs})
        except TypeError as error:
            if "render_mode" in kwargs or "render_mode" not in str(error):
                raise
            return gym.make(name, **kwargs)


@contextlib.contextmanager
def _wrong_keywords_as_value_errors(name: object, env_kwargs: dict[str, Any] | None) -> Iterator[None]:
    """Turns the ``TypeError`` for a keyword that the environment does not take into a ``ValueError`` with all of them."""
    try:
        yield
    except TypeError as error:
        if "unexpected keyword argument" not in str(error):
            raise
        raise ValueError(f"Environment {name!r} does not take `env_kwargs`={env_kwargs}: {error}.") from error
