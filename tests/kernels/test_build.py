"""The build of the library: compilers, failures, rebuilds, symbols."""

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sb3_cyborg.kernels import build as builder
from sb3_cyborg.kernels.build import FOLDER, KERNEL_SOURCES, LIBRARY, BuildError, build, is_current, isa_flags
from sb3_cyborg.kernels.library import load


def symbols(nm_options: str, *paths: Path) -> list[tuple[str, str]]:
    """:return: Type and name of the symbols in binary files. Tests are skipped without ``nm``."""
    if shutil.which("nm") is None or sys.platform != "linux":
        pytest.skip("needs nm of binutils")
    output = subprocess.run(["nm", *nm_options.split(), *map(str, paths)], check=True, capture_output=True, text=True).stdout
    return [(kind, name) for kind, name in re.findall(r"^[0-9a-f]* +(\w) (.+)$", output, re.MULTILINE)]


QUERIES = ("sb3_cyborg_abi", "sb3_cyborg_best_isa")


def test_only_what_is_marked_is_exported(library: Path) -> None:
    source = "".join((FOLDER / "src" / f"{name}.cpp").read_text() for name in KERNEL_SOURCES)
    kernels = re.findall(r"^EXPORT .*?\bKERNEL\((\w+)\)", source, re.MULTILINE)
    kernels += [f"{kernel}_thunk" for kernel in re.findall(r"^RECORDABLE\((\w+)\)", source, re.MULTILINE)]
    expected = {f"{kernel}_{isa}" for kernel in kernels for isa in isa_flags()} | set(QUERIES)
    assert {name for _, name in symbols("-D --defined-only", library)} == expected


SHARED_INLINE = (
    "inline __attribute__((noinline)) float shared(float x) { return x + 1; }\nfloat use(float x) { return shared(x); }"
)


def shared_functions(objects: list[Path]) -> list[str]:
    """:return: Functions that each object file has and of which the linker keeps one copy (weak symbols)."""
    return [name for kind, name in symbols("-C --defined-only", *objects) if kind in "WVu"]


@pytest.mark.slow
def test_instruction_sets_share_no_code(compiler: list[str], tmp_path: Path) -> None:
    assert shared_functions(builder._compile(compiler, tmp_path)) == []
    (tmp_path / "planted.cpp").write_text(SHARED_INLINE)
    subprocess.run([*compiler, "-c", str(tmp_path / "planted.cpp"), "-o", str(tmp_path / "planted.o")], check=True)
    assert shared_functions([tmp_path / "planted.o"]) == ["shared(float)"]


def test_the_library_needs_no_cpp_runtime(library: Path) -> None:
    if shutil.which("objdump") is None or sys.platform != "linux":
        pytest.skip("needs objdump of binutils")
    output = subprocess.run(["objdump", "-p", str(library)], check=True, capture_output=True, text=True).stdout
    assert "libstdc++" not in output
    assert "libgcc" not in output


@pytest.mark.parametrize(
    ("machine", "isas"),
    [
        ("x86_64", ["base", "avx2", "avx512"]),
        ("AMD64", ["base", "avx2", "avx512"]),
        ("aarch64", ["neon"]),
        ("arm64", ["neon"]),
        ("riscv64", ["base"]),
    ],
)
def test_instruction_sets_of_architectures(monkeypatch: pytest.MonkeyPatch, machine: str, isas: list[str]) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    assert list(isa_flags()) == isas


@pytest.mark.slow
def test_a_current_library_is_kept_and_a_stale_one_replaced(
    compiler: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / LIBRARY.name
    path.write_text("not a library")
    assert not is_current(path)
    assert build(path) == path
    assert is_current(path)
    inode = path.stat().st_ino
    monkeypatch.setenv("CXX", "no-such-compiler")  # none is needed
    build(path)
    assert path.stat().st_ino == inode

    monkeypatch.delenv("CXX")
    changed = tmp_path / "source.h"
    changed.write_text("// new")
    monkeypatch.setattr(builder, "SOURCES", (*builder.SOURCES, changed))
    assert "other sources" in load(path)[0].reason
    build(path)
    assert path.stat().st_ino != inode
    assert sorted(tmp_path.iterdir()) == sorted([path, changed]), "object files are removed"
    assert is_current(path)
    assert load(path)[0].isa is not None, "the old file was not loaded, so this process can load the new one"


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"CXX": "", "PATH": "/nonexistent"}, r"no C\+\+ compiler is found \(c\+\+, g\+\+, clang\+\+ or \$CXX\)"),
        ({"CXX": "no-such-compiler -O3"}, r"CXX='no-such-compiler -O3' is not found: set it to a C\+\+ compiler, or unset it"),
        ({"CXX": "false"}, "`false` fails: exit code 1"),
    ],
)
def test_compilers_that_do_not_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], message: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(BuildError) as error:
        build(tmp_path / LIBRARY.name)
    assert re.search(message, str(error.value)) or message in str(error.value)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_the_compiler_is_one_line(compiler: list[str], tmp_path: Path) -> None:
    (tmp_path / "bad.cpp").write_text("int main() { return undeclared; }")
    with pytest.raises(BuildError) as error:
        builder._run([*compiler, str(tmp_path / "bad.cpp"), "-o", str(tmp_path / "bad")])
    assert "undeclared" in str(error.value)
    assert "\n" not in str(error.value)


def test_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(BuildError, match="kernels are not built on Windows"):
        build(tmp_path / LIBRARY.name)


def test_the_command(library: Path) -> None:
    command = [sys.executable, str(FOLDER / "build.py")]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip() == str(library)
    command = [sys.executable, "-c", "from sb3_cyborg.kernels import build; build.SOURCES = (); build.main()"]
    environment = {**os.environ, "CXX": "no-such-compiler"}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 1
    assert result.stderr.startswith("sb3-cyborg: error: the kernels are not built: CXX='no-such-compiler' is not found")
    assert result.stderr.count("\n") == 1
