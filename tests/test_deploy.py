"""Deployment: the runtime in an environment of its own, and the C++ program of the documentation."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from sb3_cyborg.export import export_onnx
from sb3_cyborg.runtime import OnnxAgent
from tests.test_export import make_model

ROOT = Path(__file__).resolve().parent.parent
INCLUDE = os.environ.get("ONNXRUNTIME_INCLUDE")
"""Folder of ``onnxruntime_cxx_api.h``: no package on PyPI contains it."""

FIVE_LINES = """
from sb3_cyborg_runtime import OnnxAgent
agent, state = OnnxAgent("agent.onnx"), None
for step in range(5):
    action, state = agent.predict([0.1 * step, 0.2, 0.3], state, episode_start=[step == 0])
    print(action)
"""


def expected(path: Path, observations: np.ndarray, starts: np.ndarray) -> list[int]:
    agent, state, actions = OnnxAgent(path), None, []
    for observation, start in zip(observations, starts, strict=True):
        action, state = agent.predict(observation, state, [start])
        actions.append(int(action))
    return actions


@pytest.mark.slow
def test_the_runtime_acts_in_an_environment_without_pytorch(tmp_path: Path) -> None:
    def run(*command: Any) -> str:
        result = subprocess.run([*map(str, command)], check=True, timeout=600, cwd=tmp_path, capture_output=True, text=True)
        return result.stdout

    export_onnx(make_model("gru", "slot"), tmp_path / "agent.onnx")
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, ROOT / "runtime")
    run(sys.executable, "-m", "venv", tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    run(python, "-m", "pip", "install", "--no-index", "--no-deps", next(tmp_path.glob("*.whl")))
    packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    for module in (np, onnxruntime):  # links instead of an installation: tests use no network
        folder = Path(module.__file__ or "").parent
        for part in (folder, folder.with_name(f"{folder.name}.libs")):
            if part.exists():
                (packages / part.name).symlink_to(part)
    found = run(
        python, "-c", "import importlib.util as i; print([i.find_spec(n) for n in ('torch', 'gymnasium', 'sb3_cyborg')])"
    )
    assert found.strip() == "[None, None, None]"
    observations = np.array([[0.1 * step, 0.2, 0.3] for step in range(5)])
    want = expected(tmp_path / "agent.onnx", observations, np.arange(5) == 0)
    assert [int(line) for line in run(python, "-c", FIVE_LINES).split()] == want


@pytest.mark.slow
@pytest.mark.skipif(INCLUDE is None, reason="ONNXRUNTIME_INCLUDE does not name the folder of onnxruntime's C++ headers")
def test_the_program_in_cpp_acts_as_in_python(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
    match = re.search(r"^```cpp\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert match is not None
    (tmp_path / "agent.cpp").write_text(match[1], encoding="utf-8")
    library = next((Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so*"))
    (tmp_path / "libonnxruntime.so.1").symlink_to(library)  # the name that programs look for
    command = ["g++", "-std=c++17", f"-I{INCLUDE}", "agent.cpp", str(library), f"-Wl,-rpath,{tmp_path}", "-o", "agent"]
    subprocess.run(command, check=True, timeout=300, cwd=tmp_path)
    export_onnx(make_model("gru", "ring"), tmp_path / "agent.onnx")
    rng = np.random.default_rng(0)
    observations, starts = rng.normal(size=(200, 3)).astype(np.float32), rng.random(200) < 0.1
    starts[0] = True
    lines = [
        f"{int(start)} {' '.join(map(repr, observation.tolist()))}"
        for start, observation in zip(starts, observations, strict=True)
    ]
    result = subprocess.run(
        [tmp_path / "agent", "agent.onnx"],
        input="\n".join(lines),
        check=True,
        timeout=60,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert [int(line) for line in result.stdout.split()] == expected(tmp_path / "agent.onnx", observations, starts)
