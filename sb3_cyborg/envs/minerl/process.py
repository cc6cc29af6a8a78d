"""Minecraft's process: the packages that it needs, its launch under a watchdog, and its end with all child processes."""

import contextlib
import logging
import os
import shutil
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import Any

from sb3_cyborg.checks import unknown_name

PAGE = "docs/minerl.md"
# The simulators of MineRL 0.4.4 and 1.0.
JARS = ("MalmoMod-0.37.0-fat.jar", "mcprec-6.13.jar")
LAUNCHER_WAIT = 5.0  # seconds between SIGTERM and SIGKILL

logger = logging.getLogger(__name__)


class MineRLError(RuntimeError):
    """Minecraft failed more often in a row than the ``retries`` of ``MineRLEnv``."""


def describe(error: BaseException) -> str:
    """:return: An error in one line. Some of MineRL's errors contain all output of Minecraft; the end of it is kept."""
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message if len(message) <= 300 else '...' + message[-300:]}"


def import_minerl() -> Any:
    """
    Imports MineRL, which registers its tasks with the old ``gym``.

    :return: The module ``gym``.
    :raises ImportError: if MineRL or a ``gym`` that it works with is not installed.
    """
    try:
        import gym
        import minerl.herobraine.envs  # noqa: F401
    except ModuleNotFoundError as error:
        raise ImportError(
            f"MineRL's tasks need the packages minerl and gym, and {error.name!r} is missing. Install them in a separate "
            "environment, with Java 8 to build the simulator: `pip install --no-deps minerl==0.4.4 gym==0.17.3` and the "
            f"further steps in {PAGE}."
        ) from error
    except Exception as error:
        version = getattr(sys.modules.get("gym"), "__version__", "unknown")
        raise ImportError(
            f"MineRL is installed, but cannot be imported beside gym {version} ({describe(error)}). MineRL 0.4.4 works with "
            f"gym 0.17.3: `pip install --no-deps gym==0.17.3`. See {PAGE}."
        ) from error
    return gym


def make_task(env_id: str) -> Any:
    """
    :param env_id: MineRL's name of a task.
    :return: MineRL's environment, before Minecraft is launched.
    :raises ImportError: see :func:`import_minerl`.
    :raises ValueError: for an unknown name.
    """
    gym = import_minerl()
    known = [name for name in gym.envs.registry.env_specs if name.startswith("MineRL")]
    if env_id not in known:
        raise unknown_name("task of MineRL", env_id, known)
    return gym.make(env_id)


def find_simulator() -> Path:
    """
    :return: The simulator that MineRL launches.
    :raises FileNotFoundError: if it was not built. MineRL would then try to build it with Gradle at the first ``reset``.
    """
    from minerl.env.malmo import InstanceManager

    libs = Path(InstanceManager.MINECRAFT_DIR).resolve() / "build" / "libs"
    for jar in JARS:
        if (libs / jar).is_file():
            return libs / jar
    raise FileNotFoundError(
        f"MineRL is installed, but not its simulator: neither of {', '.join(JARS)} is in {libs}. It is built when MineRL is "
        f"installed, with Java 8 and Gradle's downloads: see {PAGE}."
    )


def processes_of(instance: Any) -> list[Any]:
    """
    :param instance: A ``MinecraftInstance``.
    :return: The launcher and all of its descendants (``psutil.Process``). Descendants without a parent are found by their
        session: MineRL starts the launcher in a new session, and Java stays in it after the launcher was killed.
    """
    import psutil

    launcher = instance.minecraft_process
    if launcher is None:
        return []
    found = {}
    with contextlib.suppress(psutil.NoSuchProcess):
        found = {process.pid: process for process in launcher.children(recursive=True)}
    if hasattr(os, "getsid"):
        for pid in psutil.pids():
            with contextlib.suppress(OSError, psutil.NoSuchProcess):
                if os.getsid(pid) == launcher.pid:
                    found.setdefault(pid, psutil.Process(pid))
    found[launcher.pid] = launcher
    return list(found.values())


def kill(instance: Any) -> None:
    """Kills all processes of an instance. A read of their output that blocks then returns the end of the file."""
    import psutil

    for process in processes_of(instance):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def stop(instance: Any) -> None:
    """
    Ends an instance in any state: its processes, its socket, its folder and its entry in MineRL's pool.

    MineRL's own ``InstanceManager.shutdown`` also ends the instances of other environments, and its ``kill`` has no effect on
    an instance whose launch failed.

    :param instance: A ``MinecraftInstance``.
    """
    import psutil
    from minerl.env.malmo import InstanceManager

    instance.running = instance._starting = False  # so that MineRL's own clean-up skips this instance
    if instance.client_socket is not None:
        instance.client_socket.close()
        instance.client_socket = None
    processes = processes_of(instance)
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    psutil.wait_procs(processes, timeout=LAUNCHER_WAIT)
    kill(instance)
    _, alive = psutil.wait_procs(processes, timeout=LAUNCHER_WAIT)
    if alive:
        logger.error("Processes of Minecraft that survived SIGKILL: %s", [process.pid for process in alive])
    if instance in InstanceManager._instance_pool:
        InstanceManager._instance_pool.remove(instance)
    instance.release_lock()
    if instance.instance_dir is not None:
        shutil.rmtree(instance.instance_dir, ignore_errors=True)


class Watchdog:
    """
    Kills an instance after a time limit, because MineRL waits for Minecraft's output and worlds without one.

    :param instance: A ``MinecraftInstance``.
    :param seconds: Time limit of the body of the ``with`` statement, in seconds.
    :param doing: Description of the body, for the error.
    :raises TimeoutError: at the end of a body that took longer.
    """

    def __init__(self, instance: Any, seconds: float, doing: str) -> None:
        self._instance, self._seconds, self._doing = instance, seconds, doing
        self._finished = threading.Event()
        self._expired = False
        self._thread = threading.Thread(target=self._watch, name="minerl-watchdog", daemon=True)

    def _watch(self) -> None:
        wait = self._seconds
        while not self._finished.wait(wait):
            self._expired = True
            kill(self._instance)
            wait = 0.2  # kill again until the body ends, because the process may start later

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._finished.set()
        self._thread.join()
        if self._expired and (kind is None or issubclass(kind, Exception)):
            raise TimeoutError(f"{self._doing} took more than {self._seconds:g} seconds; Minecraft was killed.") from error


class Simulator:
    """
    One instance of Minecraft, and the environment of MineRL that is connected to it. After any exception it must be closed.

    :param env_id: MineRL's name of the task, such as ``"MineRLTreechop-v0"``.
    :param launch_timeout: Time limit for the start of Minecraft, in seconds.
    :param reset_timeout: Time limit for the creation of a world, in seconds.
    :param step_timeout: Time limit for a step, in seconds.
    """

    def __init__(self, env_id: str, launch_timeout: float, reset_timeout: float, step_timeout: float) -> None:
        self._reset_timeout, self._step_timeout = reset_timeout, step_timeout
        self._env = make_task(env_id)
        from minerl.env.malmo import InstanceManager

        # After a lost connection MineRL would launch another Minecraft, which would never be ended.
        self._env.unwrapped._get_new_instance = self._refuse
        self.instance = InstanceManager.get_instance(os.getpid())
        self.episodes = 0
        self._in_step = False
        try:
            with Watchdog(self.instance, launch_timeout, "Launching Minecraft"):
                self.instance.launch()
        except BaseException:
            self.close()
            raise
        self.instance.had_to_clean = False
        self._env.unwrapped.instances = [self.instance]

    @staticmethod
    def _refuse(*_: Any, **__: Any) -> None:
        raise ConnectionError("The connection to Minecraft could not be made.")

    def reset(self, seed: int) -> dict[str, Any]:
        """
        Creates a world.

        :param seed: The seed of the world.
        :return: MineRL's first observation.
        """
        with Watchdog(self.instance, self._reset_timeout, "Making a world"):
            self._env.seed(seed)
            observation: dict[str, Any] = self._env.reset()
        self.instance.client_socket.settimeout(self._step_timeout)
        self.episodes += 1
        self._in_step = False
        return observation

    def step(self, action: dict[str, Any]) -> tuple[dict[str, Any], float, bool, dict[str, Any]]:
        """
        :param action: An action of MineRL.
        :return: MineRL's observation, reward, done and info.
        :raises ConnectionError: if MineRL has lost Minecraft and returns a random observation, and after a step that was
            interrupted by Ctrl-C.
        """
        if self._in_step:
            raise ConnectionError("A step was interrupted, and its answer is still on the way.")
        self._in_step = True
        observation, reward, done, info = self._env.step(action)
        self._in_step = False
        if "error" in info:
            raise ConnectionError(f"MineRL lost the connection to Minecraft: {info['error']!r}")
        return observation, float(reward), bool(done), info

    def processes(self) -> list[Any]:
        """:return: The running processes, as ``psutil.Process``."""
        return processes_of(self.instance)

    def close(self) -> None:
        """Ends Minecraft, see :func:`stop`."""
        stop(self.instance)
