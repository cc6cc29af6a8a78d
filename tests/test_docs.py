"""The documentation: code blocks run, commands parse, links and pictures exist, Sphinx builds it without a warning."""

import argparse
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm

from sb3_cyborg import cli
from sb3_cyborg.encoders.encoder_v7 import ENCODERS
from sb3_cyborg.memories.memory_v7 import MEMORIES

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]
NOT_RUN = "<!-- not run -->"
"""On the line before a block of Python: the block is compiled, but not run, because it needs hardware or packages."""
BLOCK = re.compile(
    rf"^(?P<mark>{re.escape(NOT_RUN)}\n+)?```(?P<language>[^\n]*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)
SHELLS = ("sh", "bash", "console")
OTHER_LANGUAGES = ("", "cpp", "diff", "text", "toml", "yaml", "{eval-rst}", "{include}", "{toctree}")
"""Languages of blocks that no test here reads (`test_deploy.py` compiles C++).
Another one, e.g. ``py``, is an error: nothing would check its blocks."""
LINK = re.compile(r"\]\((?P<target>[^)\s]+)\)")
MAX_STEPS = 100


def blocks(page: Path) -> list[tuple[str, bool]]:
    """:return: The Python blocks of a page, padded so that errors name the line in the page, and whether each one is run."""
    text = page.read_text()
    return [
        ("\n" * text.count("\n", 0, block.start("code")) + block["code"], block["mark"] is None)
        for block in BLOCK.finditer(text)
        if block["language"] == "python"
    ]


def command_lines(page: Path) -> list[list[str]]:
    """:return: The commands in the shell blocks of a page, as words, without comments; in ``console`` they follow ``$ ``."""
    lines: list[str] = []
    for block in BLOCK.finditer(page.read_text()):
        if block["language"] in SHELLS:
            code = block["code"].replace("\\\n", " ").splitlines()
            is_console = block["language"] == "console"
            lines += [line.removeprefix("$ ") for line in code if line.startswith("$ ") or not is_console]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@pytest.fixture
def short_training(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Ends training after the rollout that reaches ``MAX_STEPS``; afterwards removes what a page has registered."""
    learn = OnPolicyAlgorithm.learn

    def learn_shortly(self: Any, total_timesteps: int, *args: Any, **kwargs: Any) -> Any:
        return learn(self, min(total_timesteps, MAX_STEPS), *args, **kwargs)

    monkeypatch.setattr(OnPolicyAlgorithm, "learn", learn_shortly)
    before: list[tuple[dict[str, Any], dict[str, Any]]] = [(names, dict(names)) for names in (ENCODERS, MEMORIES)]
    yield
    for names, known in before:
        names.clear()
        names.update(known)


def test_blocks_are_found() -> None:
    assert sum(run for page in PAGES for _, run in blocks(page)) >= 20
    assert sum(words[0] == "sb3-cyborg" for page in PAGES for words in command_lines(page)) >= 20


@pytest.mark.parametrize("name", NAMES)
def test_every_block_is_of_a_known_language(name: str) -> None:
    text = (ROOT / name).read_text()
    languages = [block["language"].partition(" ")[0] for block in BLOCK.finditer(text)]
    assert set(languages) <= {"python", *SHELLS, *OTHER_LANGUAGES}
    # A fence that is indented or never closed is no block for the pattern, and its code would not be run.
    assert len(re.findall(r"^\s*```", text, re.MULTILINE)) == 2 * len(languages)


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


class ParsedError(Exception):
    """Raised in place of running a command whose arguments have been parsed."""


def parse_command(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """
    Parses the arguments of ``sb3-cyborg``, without running the command.

    :param words: The words after ``sb3-cyborg``.
    :param monkeypatch: Ends the scripts of RL Zoo when they have parsed their arguments.
    :raises Exception: typer's or argparse's error for arguments that the command does not take.
    """
    name, *arguments = words
    if name == "zoo":  # its arguments are parsed by the scripts of RL Zoo
        zoo = pytest.importorskip("sb3_cyborg.zoo")
        pytest.importorskip("rl_zoo3")
        parse_args = argparse.ArgumentParser.parse_args

        def parse_only(self: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> None:
            parse_args(self, *args, **kwargs)
            raise ParsedError

        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
        with pytest.raises(ParsedError):
            zoo.zoo_main(arguments)
        return
    app: Any = typer.main.get_command(cli.app)
    command = app.commands[name]
    if hasattr(command, "commands"):  # a group, such as `hub`
        name, *arguments = arguments
        command = command.commands[name]
    command.make_context(name, arguments)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        pytest.param(name, words[1:], id=f"{name}: {' '.join(words)}")
        for name in NAMES
        for words in command_lines(ROOT / name)
        if words[0] == "sb3-cyborg"
    ],
)
def test_commands_of_the_package_parse(name: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    parse_command(words, monkeypatch)
    if "--config" in words:
        assert (ROOT / words[words.index("--config") + 1]).is_file()


@pytest.mark.parametrize(
    "line", ["trian", "train --horizn 64", "plot", "envs a b", "hub psh", "hub push run", "zoo trian", "zoo train --horizn 64"]
)
def test_a_wrong_command_does_not_parse(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises((Exception, SystemExit)) as caught:  # of click, argparse and this package
        parse_command(line.split(), monkeypatch)
    assert not isinstance(caught.value, (AssertionError, ParsedError))


@pytest.mark.parametrize("name", NAMES)
def test_scripts_and_make_targets_exist(name: str) -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for words in command_lines(ROOT / name):
        if words[0] == "python":
            script = words[1] if words[1] != "-m" else words[2].replace(".", "/") + ".py"
            assert (ROOT / script).is_file(), f"{name}: {' '.join(words)}"
        if words[0] == "make":
            assert set(words[1:]) <= set(targets), f"{name}: {' '.join(words)}"


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


def test_the_tests_of_each_promise_exist() -> None:
    text = (ROOT / "docs" / "reliability.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("|") and not line.startswith(("| promise", "|---"))]
    assert len(rows) > 15
    for row in rows:
        file = ""
        for name in re.findall(r"`([\w/.]+\.py(?:::\w+)?|test_\w+)`", row.split("|")[2]):
            file, _, test = name.rpartition("::") if "::" in name else (file, "", name)
            assert re.search(rf"^def {test}\(", (ROOT / "tests" / file).read_text(), re.MULTILINE), f"{file}::{test} in: {row}"
        assert file, row
