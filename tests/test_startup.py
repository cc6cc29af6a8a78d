"""The start of the command line and of the package: what is not imported before a command needs it."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import sb3_cyborg
from sb3_cyborg import EncoderV7, MemoryPPO

HEAVY = ("torch", "stable_baselines3", "sb3_contrib", "pandas", "matplotlib", "popgym", "minigrid", "onnxruntime")
REPORT = f"import json, sys\nprint(json.dumps([name for name in {HEAVY} if name in sys.modules]))"
COMMAND = """
try:
    from sb3_cyborg.cli import app
    app({arguments})
except SystemExit as end:
    assert not end.code
"""


def imported(code: str) -> list[str]:
    """:return: The heavy packages that a new interpreter has imported after it has run some code."""
    result = subprocess.run([sys.executable, "-c", f"{code}\n{REPORT}"], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    found: list[str] = json.loads(result.stdout.splitlines()[-1])
    return found


LIGHT = ["--help", "--version", "", "eval --help", "inspect -h", "export -h", "hub push -h", "hub load -h", "envs memorychain"]


@pytest.mark.parametrize("line", LIGHT)
def test_a_command_that_answers_at_once_imports_nothing_heavy(line: str) -> None:
    if line:
        assert imported(COMMAND.format(arguments=line.split())) == []
    else:
        assert imported("import sb3_cyborg.cli") == []


def test_a_command_that_needs_pytorch_imports_it() -> None:
    """The test above can fail: flags of ``train`` are the keys of the config, whose checks need PyTorch and SB3."""
    assert {"torch", "stable_baselines3"} <= set(imported(COMMAND.format(arguments=["train", "-h"])))


def test_the_package_alone_imports_nothing_heavy_and_registers_the_environments() -> None:
    code = "import sb3_cyborg, gymnasium\nfor name in ('sb3_cyborg/MemoryChain-v0', 'CartPoleNoVel-v1'): gymnasium.spec(name)"
    assert imported(code) == []
    assert imported("import sb3_cyborg.kernels\nsb3_cyborg.kernels.describe()") == []


def test_public_names_are_imported_on_first_access() -> None:
    code = """
import sys, sb3_cyborg
assert "torch" not in sys.modules
for name in sb3_cyborg.__all__:
    assert name in dir(sb3_cyborg)
    assert getattr(sb3_cyborg, name) is not None
"""
    assert "torch" in imported(code)


def test_public_names_are_the_classes_themselves() -> None:
    from sb3_cyborg.encoders.encoder_v7 import EncoderV7 as Direct

    assert EncoderV7 is Direct
    assert pickle.loads(pickle.dumps(MemoryPPO)) is MemoryPPO


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("module", ["sb3_cyborg", "sb3_cyborg.cli"])
def test_the_package_is_a_command(module: str) -> None:
    result = run("-m", module, "--version")
    assert (result.stdout, result.stderr) == (f"sb3-cyborg {sb3_cyborg.__version__}\n", "")
    bad = run("-m", module, "trian")
    assert bad.returncode == 2
    assert "Did you mean 'train'" in bad.stderr


def test_help_lists_every_command() -> None:
    shown = run("-m", "sb3_cyborg", "--help").stdout
    listed = [line.split()[0] for line in shown.partition("Commands:\n")[2].splitlines()]
    assert listed == ["train", "eval", "enjoy", "plot", "inspect", "export", "envs", "info", "zoo", "hub"]
    assert "Train an agent, or resume a run." in shown


def test_the_command_without_its_extra(tmp_path: Path) -> None:
    code = "import sys\nsys.modules['{0}'] = None\nimport sb3_cyborg.cli"
    for package in ("typer", "pydantic", "yaml"):
        result = run("-c", code.format(package))
        assert result.stderr == f'sb3-cyborg: error: {package} is missing: pip install "sb3-cyborg[train]"\n'
        assert result.returncode == 1
