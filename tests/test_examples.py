"""The examples run as scripts with few steps, and the memory of one of them keeps the contract."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sb3_cyborg.memories.memory_v7 import MEMORIES
from sb3_cyborg.sequence_model import SequenceModel
from sb3_cyborg.testing import verify_contract, verify_gradcheck

ROOT = Path(__file__).resolve().parent.parent
# The last output of each example, and the arguments for its output folder.
EXAMPLES = {
    "swap_recurrent_ppo.py": (["RecurrentPPO   return", "MemoryPPO      return"], []),
    "eval_and_normalize.py": (["Eval num_timesteps=", "Return of 8 episodes after 2,048 steps"], ["--folder", "run"]),
    "dict_and_image_observations.py": (["CnnPolicy: return", "MultiInputPolicy: return"], []),
    "custom_memory.py": (["Return"], []),
    "action_masks.py": (["MaskableMemoryPPO: return", "MemoryPPO:         return", "Tiles opened: ["], []),
    "compare_with_frame_stacking.py": (
        ["| PPO | 1 |", "| PPO | 4 |", "| PPO | 10 |", "| MemoryPPO |"],
        [],
    ),
}
BIGGER = {"crafter_wood.py", "demo_repeat_previous.py"}
"""Demos with their own results. Each other example shows one feature, in at most 60 lines."""


@pytest.fixture
def trace_memory() -> Iterator[type[SequenceModel]]:
    from examples.custom_memory import TraceMemory

    yield TraceMemory
    MEMORIES.pop("traces", None)  # other tests iterate over all registered memories


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_example_runs(name: str, tmp_path: Path) -> None:
    expected, arguments = EXAMPLES[name]
    path = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    result = subprocess.run(
        [sys.executable, str(ROOT / "examples" / name), "--steps", "300", *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    for line in expected:
        assert line in result.stdout, result.stdout


def test_each_example_is_run_and_short() -> None:
    lengths = {path.name: len(path.read_text().splitlines()) for path in (ROOT / "examples").glob("*.py")}
    small = {name for name in lengths if name not in BIGGER}
    assert small - {"train_v7.py"} == set(EXAMPLES)  # test_cli.py runs that one
    assert max(lengths[name] for name in small) <= 60, lengths


def test_custom_memory_keeps_the_contract(trace_memory: type[SequenceModel]) -> None:
    assert MEMORIES["traces"] is trace_memory
    verify_contract(trace_memory(5, memory_dim=4, num_traces=3))
    verify_gradcheck(trace_memory(3, memory_dim=2, num_traces=2))
