"""Fixtures: the real MineRL 0.4.4, whose launcher starts a test double instead of Minecraft."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch as th

from sb3_cyborg.envs.minerl import MineRLEnv
from sb3_cyborg.envs.minerl.process import JARS

th.set_num_threads(1)
DOUBLE = Path(__file__).with_name("malmo_double.py")
LAUNCHER = f'#!/bin/bash\n"{sys.executable}" "{DOUBLE}" "$@"\n'


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("filterwarnings", "ignore:setDaemon:DeprecationWarning:minerl")
    config.addinivalue_line("filterwarnings", "ignore:.*Box bound precision lowered:UserWarning")


class Minecraft:
    """
    Controls the double from tests, and reads the commands that it received from MineRL.

    :param folder: An empty folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.envs: list[MineRLEnv] = []
        self.plan()

    def plan(self, *launches: dict[str, Any], default: dict[str, Any] | None = None) -> None:
        """Sets the plan of each launch of the double, and the plan of all later launches."""
        (self.folder / "plan.json").write_text(json.dumps({"launches": launches, "default": default or {}}))

    def env(self, env_id: str = "MineRLTreechop-v0", **kwargs: Any) -> MineRLEnv:
        env = MineRLEnv(env_id, **kwargs)
        self.envs.append(env)
        return env

    def processes(self) -> list[list[str]]:
        """:return: Command lines of all living processes that the test has started, also of those without a parent."""
        found = []
        for process in psutil.process_iter(["cmdline", "environ", "status"]):
            ours = (process.info["environ"] or {}).get("MALMO_DOUBLE") == str(self.folder)
            command = process.info["cmdline"] or []
            if ours and process.info["status"] != psutil.STATUS_ZOMBIE and "from multiprocessing." not in " ".join(command):
                found.append(command)
        return found

    def assert_processes(self, number: int) -> None:
        """MineRL's watcher ends one or two seconds after the process that it watches."""
        end = time.monotonic() + 10
        while len(self.processes()) > number and time.monotonic() < end:
            time.sleep(0.1)
        assert len(self.processes()) == number, self.processes()

    @property
    def launches(self) -> int:
        return len(list(self.folder.glob("launch-*")))

    def transcript(self, launch: int = 0) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / f"transcript-{launch}.jsonl").read_text().splitlines()]

    def commands(self, launch: int = 0) -> list[str]:
        return [entry["command"] for entry in self.transcript(launch) if "command" in entry]

    def tokens(self, launch: int = 0) -> list[str]:
        return [entry["token"] for entry in self.transcript(launch) if "token" in entry]


@pytest.fixture
def minecraft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Minecraft]:
    """Puts the double where MineRL looks for Minecraft. No process of it may be alive after the test."""
    from minerl.env.malmo import InstanceManager

    home, told = tmp_path / "Minecraft", tmp_path / "told"
    (home / "build" / "libs").mkdir(parents=True)
    (home / "build" / "libs" / JARS[0]).touch()
    (home / "launchClient.sh").write_text(LAUNCHER)
    (home / "launchClient.sh").chmod(0o755)
    told.mkdir()
    monkeypatch.setattr(InstanceManager, "MINECRAFT_DIR", str(home))
    monkeypatch.setenv("MALMO_DOUBLE", str(told))
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")  # of MineRL's watchers
    monkeypatch.chdir(tmp_path)  # MineRL writes its logs to the working directory
    minecraft = Minecraft(told)
    yield minecraft
    for env in minecraft.envs:
        env.close()
    assert InstanceManager._instance_pool == []
    minecraft.assert_processes(0)


@pytest.fixture
def pool() -> Callable[[], list[Any]]:
    """:return: The class that lists MineRL's instances."""
    from minerl.env.malmo import InstanceManager

    return lambda: list(InstanceManager._instance_pool)
