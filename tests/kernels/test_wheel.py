"""Wheels, source archives and installations, with and without a C++ compiler."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from sb3_cyborg.kernels.build import FOLDER, LIBRARY, build

pytestmark = pytest.mark.slow

ROOT = FOLDER.parent.parent
BUILT_FROM = ("hatch_build.py", "pyproject.toml", "README.md", "LICENSE", ".gitignore", "sb3_cyborg", "zoo_hyperparams")
IN_WHEEL = f"sb3_cyborg/kernels/{LIBRARY.name}"
WITHOUT_COMPILER = {"CXX": "", "PATH": "/nonexistent"}
REQUIRED = {"SB3_CYBORG_REQUIRE_KERNELS": "1"}


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """:return: A copy of the files that a wheel is made from, without a library."""
    root = tmp_path / "checkout"
    root.mkdir()
    for name in BUILT_FROM:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, root / name, ignore=shutil.ignore_patterns("__pycache__", LIBRARY.name, "build_*"))
        else:
            shutil.copy(source, root / name)
    return root


def python(*arguments: object, cwd: Path, fails: bool = False, environment: Mapping[str, str] | None = None) -> str:
    """:return: The output of Python, both streams. It succeeds or fails as expected."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SB3_CYBORG_") and name != "PYTHONPATH"}
    result = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env={**kept, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert (result.returncode != 0) == fails, result.stdout
    return result.stdout


def build_wheel(checkout: Path, *options: str, environment: Mapping[str, str]) -> tuple[Path, str]:
    """:return: The wheel and the output."""
    output = python("-m", "build", "--no-isolation", *options, cwd=checkout, environment=environment)
    (wheel,) = (checkout / "dist").glob("*.whl")
    return wheel, output


def describe_installed(wheel: Path, site: Path) -> str:
    """:return: The line about kernels from a wheel that is installed into an empty folder."""
    python("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", site, wheel, cwd=site.parent)
    code = "import sb3_cyborg; from sb3_cyborg import kernels; print(sb3_cyborg.__file__, kernels.describe(), sep='\\n')"
    file, line = python("-W", "ignore", "-c", code, cwd=site.parent, environment={"PYTHONPATH": str(site)}).splitlines()
    assert Path(file).is_relative_to(site)
    return line


def test_a_wheel_has_the_library_and_the_tag_of_the_platform(compiler: list[str], checkout: Path, tmp_path: Path) -> None:
    wheel, output = build_wheel(checkout, "--wheel", environment=REQUIRED)
    assert "without compiled kernels" not in output
    tag = wheel.stem.split("-", 2)[2]
    assert tag.startswith("py3-none-")
    assert tag != "py3-none-any"
    if sys.platform == "linux":
        assert tag == f"py3-none-linux_{os.uname().machine}"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(next(name for name in names if name.endswith(".dist-info/WHEEL"))).decode()
    assert IN_WHEEL in names
    assert "sb3_cyborg/kernels/src/kernels.cpp" in names, "the loader compares the library with its sources"
    assert not any(name.endswith(".o") for name in names)
    assert "Root-Is-Purelib: false" in metadata
    assert f"Tag: {tag}\n" in metadata
    assert describe_installed(wheel, tmp_path / "site").startswith("Compiled CPU kernels: ")
    assert "not in use" not in describe_installed(wheel, tmp_path / "again")


def test_a_source_archive_has_the_sources_and_builds_the_same_wheel(compiler: list[str], checkout: Path) -> None:
    build(checkout / IN_WHEEL)  # a library of the checkout stays there
    wheel, _ = build_wheel(checkout, environment=REQUIRED)
    assert IN_WHEEL in zipfile.ZipFile(wheel).namelist()
    (archive,) = (checkout / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as files:
        names = {name.partition("/")[2] for name in files.getnames()}
    assert names >= {"hatch_build.py", *(f"sb3_cyborg/kernels/src/{path.name}" for path in (FOLDER / "src").iterdir())}
    assert IN_WHEEL not in names


def test_without_a_compiler_the_package_installs_and_says_so(checkout: Path, tmp_path: Path) -> None:
    (checkout / IN_WHEEL).write_text("a library of other sources")  # which is not shipped
    wheel, output = build_wheel(checkout, "--wheel", environment=WITHOUT_COMPILER)
    lines = [line for line in output.splitlines() if "kernels" in line]
    assert len(lines) == 1
    assert lines[0].endswith(
        "sb3-cyborg is installed without compiled kernels, and works without: "
        "no C++ compiler is found (c++, g++, clang++ or $CXX)"
    )
    assert wheel.name.endswith("-py3-none-any.whl")
    assert IN_WHEEL not in zipfile.ZipFile(wheel).namelist()
    line = describe_installed(wheel, tmp_path / "site")
    assert "not in use, PyTorch's operations run instead" in line
    assert "is missing: it could not be built when the package was installed" in line


def test_the_command_adds_kernels_to_an_installation_without_them(compiler: list[str], checkout: Path, tmp_path: Path) -> None:
    wheel, _ = build_wheel(checkout, "--wheel", environment=WITHOUT_COMPILER)
    site = tmp_path / "site"
    assert "not in use" in describe_installed(wheel, site)
    python("-W", "ignore", "-m", "sb3_cyborg.kernels", cwd=tmp_path, environment={"PYTHONPATH": str(site)})
    line = python(
        "-W",
        "ignore",
        "-c",
        "from sb3_cyborg import kernels; print(kernels.describe())",
        cwd=tmp_path,
        environment={"PYTHONPATH": str(site)},
    )
    assert line.startswith("Compiled CPU kernels: ")
    assert "not in use" not in line


def test_kernels_that_are_required_and_cannot_be_built_are_an_error(checkout: Path) -> None:
    environment = {**WITHOUT_COMPILER, **REQUIRED}
    output = python("-m", "build", "--no-isolation", "--wheel", cwd=checkout, fails=True, environment=environment)
    assert "SB3_CYBORG_REQUIRE_KERNELS=0 installs the package without compiled kernels" in output
    assert not list((checkout / "dist").glob("*.whl"))
    build_wheel(checkout, "--wheel", environment={**environment, "SB3_CYBORG_REQUIRE_KERNELS": "0"})


def test_a_failing_compiler_does_not_fail_the_installation(checkout: Path) -> None:
    wheel, output = build_wheel(checkout, "--wheel", environment={"CXX": "false"})
    assert wheel.name.endswith("-py3-none-any.whl")
    assert "works without: `false` fails: exit code 1" in output


def test_an_editable_installation_has_the_library_in_the_checkout(compiler: list[str], checkout: Path, tmp_path: Path) -> None:
    prefix = tmp_path / "environment"
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--ignore-installed", "--prefix", prefix)
    python("-m", "pip", "install", *options, "--editable", checkout, cwd=tmp_path, environment=REQUIRED)
    assert (checkout / IN_WHEEL).is_file()
    (link,) = prefix.rglob("*sb3_cyborg*.pth")
    code = "from sb3_cyborg import kernels; print(kernels.status().path, kernels.status().isa is not None)"
    output = python("-W", "ignore", "-c", code, cwd=tmp_path, environment={"PYTHONPATH": link.read_text().strip()})
    assert output.strip() == f"{checkout / IN_WHEEL} True"
