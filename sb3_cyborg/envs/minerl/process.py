"""Minecraft as a process: what has to be installed, launching it with a watchdog, and ending it without leaving anything."""

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
# The simulator of MineRL 0.4.4, and that of 1.0.
JARS = ("MalmoMod-0.37.0-fat.jar", "mcprec-6.13.jar")
LAUNCHER_WAIT = 5.0  # seconds that a process has to follow SIGTERM

logger = logging.getLogger(__name__)


class MineRLError(RuntimeError):
    """Minecraft could not be brought back: the retries of ``MineRLEnv`` are used up."""


def describe(error: BaseException) -> str:
    """:return: An error in one line; MineRL puts all that Minecraft has printed into some, of which the end is kept."""
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message if len(message) <= 300 else '...' + message[-300:]}"


def import_minerl() -> Any:
    """
    Import MineRL, which registers its tasks with the old ``gym``.

    :return: The module ``gym``.
    :raises ImportError: if MineRL is not installed, or not with a ``gym`` that it works with.
    """
    try:
        import gym
        import minerl.herobraine.envs  # noqa: F401
    except ModuleNotFoundError as error:
        raise ImportError(
            f"MineRL's tasks need the packages minerl and gym, and {error.name!r} is missing. They go into an environment of "
            "their own, with Java 8 to build the simulator: `pip install --no-deps minerl==0.4.4 gym==0.17.3` and what else "
            f"{PAGE} says."
        ) from error
    except Exception as error:
        version = getattr(sys.modules.get("gym"), "__version__", "unknown")
        raise ImportError(
            f"MineRL is installed, but cannot be imported beside gym {version} ({describe(error)}). MineRL 0.4.4 works with "
            f"gym 0.17.3 and 0.19.0: `pip install --no-deps gym==0.17.3`. See {PAGE}."
        ) from error
    return gym


def make_task(env_id: str) -> Any:
    """
    :param env_id: MineRL's name of a task.
    :return: MineRL's environment, which has started nothing so far.
    :raises ImportError: see ``import_minerl``.
    :raises ValueError: for a name that MineRL does not know.
    """
    gym = import_minerl()
    known = [name for name in gym.envs.registry.env_specs if name.startswith("MineRL")]
    if env_id not in known:
        raise unknown_name("task of MineRL", env_id, known)
    return gym.make(env_id)


def find_simulator() -> Path:
    """
    :return: The simulator that MineRL would launch.
    :raises FileNotFoundError: if there is none. MineRL alone would try to build it with Gradle at the first ``reset``.
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
    :return: Its launcher and all that descends from it (``psutil.Process``), also what has lost its parent: MineRL starts the
        launcher in a session of its own, and Java stays in it when the launcher is killed.
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
    """Kill all processes of an instance at once; whatever waits for one of them then reads the end of its output."""
    import psutil

    for process in processes_of(instance):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def stop(instance: Any) -> None:
    """
    End an instance in whichever state it is: its processes, its socket, its folder and its place in MineRL's pool.

    MineRL's own ``InstanceManager.shutdown`` would end those of other environments too, and its ``kill`` does nothing to an
    instance whose launch has failed.

    :param instance: A ``MinecraftInstance``.
    """
    import psutil
    from minerl.env.malmo import InstanceManager

    instance.running = instance._starting = False  # so that MineRL's own clean-up leaves it alone
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
    Kills an instance that takes too long: MineRL waits for a line of Minecraft's output, or for a world, without a limit.

    :param instance: A ``MinecraftInstance``.
    :param seconds: How long the body of the ``with`` may take.
    :param doing: What it does, for the error.
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
            wait = 0.2  # until the body notices: the process may not have been started yet

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._finished.set()
        self._thread.join()
        if self._expired and (kind is None or issubclass(kind, Exception)):
            raise TimeoutError(f"{self._doing} took more than {self._seconds:g} seconds; Minecraft was killed.") from error


class Simulator:
    """
    One Minecraft, and the environment of MineRL that is connected to it. After any exception, ``close`` it and make another.

    :param env_id: MineRL's name of the task, such as ``"MineRLTreechop-v0"``.
    :param launch_timeout: Seconds that Minecraft may take to start.
    :param reset_timeout: Seconds that a world may take to be made.
    :param step_timeout: Seconds that a step may take.
    """

    def __init__(self, env_id: str, launch_timeout: float, reset_timeout: float, step_timeout: float) -> None:
        self._reset_timeout, self._step_timeout = reset_timeout, step_timeout
        self._env = make_task(env_id)
        from minerl.env.malmo import InstanceManager

        # MineRL answers a lost connection by launching one more Minecraft that nobody would ever end.
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
        Make a world.

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
        :raises ConnectionError: where MineRL returns a random observation, and after a step that Ctrl-C interrupted.
        """
        if self._in_step:
            raise ConnectionError("A step was interrupted, and its answer is still on the way.")
        self._in_step = True
        observation, reward, done, info = self._env.step(action)
        self._in_step = False
        if "error" in info:
            raise ConnectionError(f"MineRL lost Minecraft, and says {info['error']!r}")
        return observation, float(reward), bool(done), info

    def processes(self) -> list[Any]:
        """:return: What runs, as ``psutil.Process``."""
        return processes_of(self.instance)

    def close(self) -> None:
        """End Minecraft and all that belongs to it."""
        stop(self.instance)
