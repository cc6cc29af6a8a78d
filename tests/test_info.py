"""``sb3-cyborg info``, the description of an installation for bug reports."""

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch as th
from typer.testing import CliRunner

from sb3_cyborg import __version__, cli, info, kernels
from sb3_cyborg.kernels import library
from sb3_cyborg.kernels.build import LIBRARY
from sb3_cyborg.packages import missing_packages


def as_dict(text: str) -> dict[str, str]:
    """:return: Values by name; a value without a name belongs to the name before."""
    found: dict[str, str] = {}
    name = ""
    column = text.index(__version__)
    for line in text.splitlines():
        name = line[:column].strip() or name
        assert line[column - 2 : column] == "  ", f"not aligned: {line}"
        found[name] = "\n".join(filter(None, [found.get(name), line[column:]]))
    return found


def test_the_command_prints_the_report() -> None:
    result = CliRunner().invoke(cli.app, ["info"])
    assert result.exit_code == 0, result.output
    assert result.stdout == info.report() + "\n"
    found = as_dict(result.stdout)
    assert found["sb3-cyborg"].startswith(f"{__version__} in ")
    assert found["torch"] == th.__version__
    assert found["torch threads"] == str(th.get_num_threads())
    for name in ("stable-baselines3", "sb3-contrib", "gymnasium", "numpy"):
        assert found[name] == metadata.version(name)
    assert {"python", "platform", "processor", "instruction sets", "CUDA", "mamba_ssm"} <= found.keys()
    assert "MKL" in found["torch on the CPU"]
    assert str(kernels.status().path) in found["compiled kernels"]


@pytest.mark.parametrize(
    ("value", "part"),
    [
        ("off", "not in use: SB3_CYBORG_KERNELS is off\nto use them: unset SB3_CYBORG_KERNELS"),
        ("sse", "error: SB3_CYBORG_KERNELS='sse' is unknown"),
    ],
)
def test_kernels_that_are_not_in_use(monkeypatch: pytest.MonkeyPatch, value: str, part: str) -> None:
    monkeypatch.setattr(kernels, "status", lambda: library.load(LIBRARY, value)[0])
    assert part in as_dict(info.report())["compiled kernels"]


def test_missing_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    requirements = [
        "torch<3,>=2.4",
        "no-such-package>=1; extra == 'wandb'",
        'no_such.other[part]>=1; (python_version >= "3.11") and extra == "wandb"',
        "numpy; extra == 'wandb'",
        "no-such-third; extra == 'video'",
    ]
    monkeypatch.setattr(metadata, "requires", lambda package: requirements)
    assert missing_packages("sb3-cyborg", "wandb") == ["no-such-package", "no_such.other"]
    assert as_dict(info.report())["missing extras"] == (
        'wandb, which lacks no-such-package, no_such.other: pip install "sb3-cyborg[wandb]"\n'
        'video, which lacks no-such-third: pip install "sb3-cyborg[video]"'
    )
    monkeypatch.setattr(metadata, "requires", lambda package: None)
    assert as_dict(info.report())["missing extras"] == "none"


def test_extras_are_those_of_the_package() -> None:
    extras = set(metadata.metadata("sb3-cyborg").get_all("Provides-Extra") or [])
    assert extras == {*info.EXTRAS, "envs", "mamba-cuda", "docs", "dev"}


def test_a_package_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def requires(package: str) -> list[str]:
        raise metadata.PackageNotFoundError(package)

    monkeypatch.setattr(metadata, "requires", requires)
    assert "pip install -e ." in as_dict(info.report())["extras"]


def test_processors(tmp_path: Path) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text("processor\t: 0\nmodel name\t: AMD EPYC\nflags\t\t: fpu avx fma avx2\n\nprocessor\t: 1\n")
    assert info.read_processor(path) == ("AMD EPYC", "avx avx2 fma")
    path.write_text("processor\t: 0\nFeatures\t: fp asimd sve\n")
    assert info.read_processor(path)[1] == "asimd sve"
    path.write_text("model name\t: Old\nflags\t: fpu\n")
    assert info.read_processor(path)[1].startswith("none of avx")
    assert info.read_processor(tmp_path / "none")[1] == "not known on this system"


def test_it_needs_no_command_line() -> None:
    program = "import sys; sys.modules['typer'] = None; import runpy; runpy.run_module('sb3_cyborg.info', run_name='__main__')"
    environment = {**os.environ, "SB3_CYBORG_KERNELS": "off"}
    output = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True, env=environment
    ).stdout
    assert as_dict(output)["compiled kernels"].startswith("not in use")
