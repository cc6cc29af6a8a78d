"""The browser example: its agent in Python, and its page in headless Chromium."""

import functools
import http.server
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxruntime")

from sb3_cyborg.runtime import OnnxAgent
from tests.browser_helpers import EXAMPLE, ROOT, require_chromium

STEPS, ROWS, BACK = 200, 3, 4
LARGEST_FILE = 500_000


def inputs() -> tuple[np.ndarray, np.ndarray]:
    """:return: Suits and starts of episodes, (STEPS, ROWS) each."""
    generator = np.random.default_rng(0)
    starts = generator.random((STEPS, ROWS)) < 1 / 20
    starts[0] = True
    return generator.integers(4, size=(STEPS, ROWS)), starts


def replay(agent: OnnxAgent) -> dict[str, list[Any]]:
    """:return: Outputs of each step, with the state threaded."""
    outputs: dict[str, list[Any]] = {"action": [], "value": [], "logits": []}
    state = None
    for observation, starts in zip(*inputs(), strict=True):
        step = agent.step(observation, state, starts)
        state = {name.removeprefix("next_state."): leaf for name, leaf in step.items() if name.startswith("next_state.")}
        for name, values in outputs.items():
            values.append(step[name].reshape(-1))
    return outputs


def test_the_agent_of_the_page_knows_the_game() -> None:
    """The file is small, and its answers are right wherever a card is asked for."""
    path = EXAMPLE / "agent.onnx"
    assert path.stat().st_size < LARGEST_FILE
    suits, starts = inputs()
    actions = np.array(replay(OnnxAgent(path))["action"])
    checked = 0
    for row in range(ROWS):
        began = 0
        for step in range(STEPS):
            began = step if starts[step, row] else began
            if BACK <= step - began <= 47:  # a deck has 52 cards
                assert actions[step, row] == suits[step - BACK, row], (step, row)
                checked += 1
    assert checked > STEPS


def test_the_page_loads_nothing_from_elsewhere() -> None:
    versions = json.loads((EXAMPLE / "package.json").read_text())
    for version in [*versions["dependencies"].values(), *versions["devDependencies"].values()]:
        assert re.fullmatch(r"\d+\.\d+\.\d+", version), "versions are pinned"
    lock = json.loads((EXAMPLE / "package-lock.json").read_text())["packages"]
    assert all(package["integrity"] for name, package in lock.items() if name)
    for path in EXAMPLE.glob("*.*"):
        if path.suffix in (".html", ".css", ".js"):
            assert not re.search(r"https?://", path.read_text()), path.name


@pytest.mark.slow
def test_an_agent_that_has_not_learned_is_not_written(tmp_path: Path) -> None:
    pytest.importorskip("popgym")
    command = [sys.executable, str(EXAMPLE / "train_agent.py"), "--steps", "300", "--output", str(tmp_path / "agent.onnx")]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=250, env=environment)
    assert result.returncode == 1
    assert "has not learned the task" in result.stderr.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


# --- in Chromium ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chromium() -> str:
    """:return: The path of Chromium; node and the packages of the page are there as well."""
    path = require_chromium()
    subprocess.run(["npm", "run", "build"], cwd=EXAMPLE, check=True, capture_output=True, timeout=60)
    return path


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """:return: A context with the address of a plain server, which sends no special headers."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            """Print nothing."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(scope="module")
def seen(chromium: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """:return: What the page has computed and shown."""
    folder = tmp_path_factory.mktemp("browser")
    observations, starts = inputs()
    given = {"executable": chromium, "observations": observations.tolist(), "starts": starts.tolist()}
    (folder / "inputs.json").write_text(json.dumps(given))
    with served(EXAMPLE) as address:
        script, files = ROOT / "tests" / "browser" / "page.mjs", [str(folder / "inputs.json"), str(folder)]
        command = ["node", str(script), f"{address}/index.html", *files]
        result = subprocess.run(command, capture_output=True, text=True, timeout=270)
    assert result.returncode == 0, result.stderr
    return {**json.loads(result.stdout), "folder": folder, "address": address}


@pytest.mark.slow
def test_the_browser_agrees_with_python(seen: dict[str, Any]) -> None:
    expected = replay(OnnxAgent(EXAMPLE / "agent.onnx"))
    got = seen["steps"]
    assert np.shape(got["action"]) == (STEPS, ROWS)
    np.testing.assert_array_equal(got["action"], expected["action"])
    np.testing.assert_allclose(got["value"], expected["value"], atol=1e-4, rtol=0)
    np.testing.assert_allclose(got["logits"], expected["logits"], atol=1e-3, rtol=0)
    assert len(set(np.ravel(got["action"]))) == 4
    assert not seen["isolated"], "the server has sent headers that allow threads"


@pytest.mark.slow
def test_the_game_can_be_played(seen: dict[str, Any]) -> None:
    """The agent answers all twenty questions right; a visitor who says spades each time does not."""
    assert seen["problems"] == []
    assert seen["origins"] == [seen["address"]]
    for name in ("wide", "narrow"):
        match = re.fullmatch(r"The game is over\. You: (\d+) of 20\. Agent: 20 of 20\.", seen[name])
        assert match, seen[name]
        assert int(match[1]) <= 13  # a deck has thirteen spades
        assert seen[f"{name}_overflow"] == 0
        assert (seen["folder"] / f"{name}.png").stat().st_size > 10_000
