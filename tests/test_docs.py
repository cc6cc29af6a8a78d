"""The docs: code blocks run, links and pictures are there, Sphinx builds them without a warning."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm

from sb3_cyborg.encoders.encoder_v7 import ENCODERS
from sb3_cyborg.memories.memory_v7 import MEMORIES

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]
NOT_RUN = "<!-- not run -->"
"""On the line before a block of code: it is compiled, but what it needs is not here."""
BLOCK = re.compile(rf"^(?P<mark>{re.escape(NOT_RUN)}\n+)?```python\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?P<target>[^)\s]+)\)")
MOST_STEPS = 100


def blocks(page: Path) -> list[tuple[str, bool]]:
    """:return: The Python in a page, each block padded so that errors name its line, and whether it is run."""
    text = page.read_text()
    return [("\n" * text.count("\n", 0, m.start("code")) + m["code"], m["mark"] is None) for m in BLOCK.finditer(text)]


@pytest.fixture
def short_training(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Training ends with the rollout in which it has made ``MOST_STEPS``; what a page has registered is forgotten."""
    learn = OnPolicyAlgorithm.learn

    def learn_shortly(self: Any, total_timesteps: int, *args: Any, **kwargs: Any) -> Any:
        return learn(self, min(total_timesteps, MOST_STEPS), *args, **kwargs)

    monkeypatch.setattr(OnPolicyAlgorithm, "learn", learn_shortly)
    before: list[tuple[dict[str, Any], dict[str, Any]]] = [(names, dict(names)) for names in (ENCODERS, MEMORIES)]
    yield
    for names, known in before:
        names.clear()
        names.update(known)


def test_blocks_are_found() -> None:
    assert sum(run for page in PAGES for _, run in blocks(page)) >= 20


@pytest.mark.parametrize("name", NAMES)
def test_code_compiles(name: str) -> None:
    for code, _ in blocks(ROOT / name):
        compile(code, name, "exec")


@pytest.mark.slow
@pytest.mark.usefixtures("short_training")
@pytest.mark.parametrize("name", [name for name in NAMES if any(run for _, run in blocks(ROOT / name))])
def test_code_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "docs"}  # one for the page: later blocks go on from earlier ones
    for code, run in blocks(ROOT / name):
        if run:
            exec(compile(code, name, "exec"), namespace)


def anchors(page: Path) -> set[str]:
    """:return: The names that GitHub and MyST give to a page's headings."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)  # where # begins a comment
    headings = re.findall(r"^#+ +(.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", NAMES)
def test_links_and_pictures_are_there(name: str) -> None:
    page = ROOT / name
    for target in LINK.findall(page.read_text()):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.is_relative_to(ROOT), f"{name}: {target} is outside of the repository"
        assert file.exists(), f"{name}: {target} is not there"
        assert not anchor or anchor in anchors(file), f"{name}: {target} names no heading"


@pytest.mark.parametrize("name", NAMES)
def test_commands_of_the_package_exist(name: str) -> None:
    from sb3_cyborg.cli import app

    commands = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    for block in re.findall(r"^```sh\n(.*?)^```$", (ROOT / name).read_text(), re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["sb3-cyborg"]:
                assert words[1] in commands, f"{name}: {line}"
            if words[:1] == ["python"]:
                script = words[1] if words[1] != "-m" else words[2].replace(".", "/") + ".py"
                assert (ROOT / script).is_file(), f"{name}: {line}"


@pytest.mark.slow
def test_sphinx_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("furo")
    result = subprocess.run(
        [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", ROOT / "docs", tmp_path],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert result.returncode == 0, result.stderr
    api = (tmp_path / "api.html").read_text()
    for name in ("sb3_cyborg.MemoryPPO", "sb3_cyborg.trainers.trainer_v7.TrainerV7.resume", "sb3_cyborg.register_memory"):
        assert f'id="{name}"' in api
