"""The loader: instruction sets, its environment variable, and libraries that cannot be used."""

import ast
import ctypes
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from sb3_cyborg import kernels
from sb3_cyborg.kernels import library as loader
from sb3_cyborg.kernels.build import FOLDER, LIBRARY, abi
from sb3_cyborg.kernels.library import SUPPORTED, VARIABLE, load

RMS_NORM = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_float)


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The variable is unset, and read again by each test and after it."""
    monkeypatch.delenv(VARIABLE, raising=False)
    loader._loaded.cache_clear()
    yield
    loader._loaded.cache_clear()


def make_library(compiler: list[str], folder: Path, source: str) -> Path:
    """:return: A shared library that is compiled from C++ source text."""
    (folder / "fake.cpp").write_text(source)
    path = folder / LIBRARY.name
    subprocess.run([*compiler, "-shared", "-fPIC", str(folder / "fake.cpp"), "-o", str(path)], check=True)
    return path


def fake(abi_text: str, best_isa: str) -> str:
    """:return: Source text of a library without kernels."""
    return (
        f'extern "C" const char* sb3_cyborg_abi() {{ return "{abi_text}"; }}\n'
        f'extern "C" const char* sb3_cyborg_best_isa() {{ return "{best_isa}"; }}\n'
    )


def best_isa(library: Path) -> str:
    """:return: The best instruction set of this processor."""
    isa = load(library)[0].isa
    assert isa is not None
    return isa


def test_each_instruction_set_computes_the_same(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for isa in SUPPORTED[best_isa(library)]:
        monkeypatch.setenv(VARIABLE, isa)
        loader._loaded.cache_clear()
        assert kernels.status().isa == isa
        assert kernels.describe() == f"Compiled CPU kernels: {isa}"
        rms_norm = kernels.get("rms_norm", RMS_NORM)
        for n in (1, 7, 16, 33, 1000):
            x = np.random.default_rng(n).standard_normal((3, n), dtype=np.float32)
            x[1, -1] = np.nan
            y = np.ones(3 * n + 1, dtype=np.float32)
            rms_norm(x.ctypes.data, y.ctypes.data, 3, n, 0.0)
            want = x / np.sqrt(np.square(x).mean(1, keepdims=True))
            np.testing.assert_allclose(y[:-1].reshape(3, n), want, rtol=1e-5, atol=1e-6)
            assert y[-1] == 1, "it wrote beyond the end"


def test_the_best_instruction_set_is_the_default(library: Path) -> None:
    assert kernels.status() == kernels.KernelStatus(best_isa(library), LIBRARY)


def test_off(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "off")
    assert kernels.status().isa is None
    assert kernels.describe() == (
        "Compiled CPU kernels: not in use, PyTorch's operations run instead (SB3_CYBORG_KERNELS is off). "
        "To use them: unset SB3_CYBORG_KERNELS"
    )
    with pytest.raises(RuntimeError, match="'rms_norm': no compiled kernels are in use: SB3_CYBORG_KERNELS is off"):
        kernels.get("rms_norm", RMS_NORM)


def test_an_unknown_value_is_an_error(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=f"'sse' is unknown; this processor has: {best_isa(library)}"):
        load(library, "sse")
    with pytest.raises(ValueError, match=r"'sse' is unknown; `off` or unset works: .* is missing"):
        load(tmp_path / "none", "sse")
    monkeypatch.setenv(VARIABLE, "AVX2")  # names are as written
    with pytest.raises(ValueError, match="SB3_CYBORG_KERNELS='AVX2' is unknown"):
        kernels.status()


def test_an_instruction_set_of_another_processor_is_an_error(compiler: list[str], tmp_path: Path) -> None:
    path = make_library(compiler, tmp_path, fake(abi(), "avx2"))
    assert load(path)[0].isa == "avx2"
    assert load(path, "base")[0].isa == "base"
    for isa in ("avx512", "neon"):
        with pytest.raises(ValueError, match=f"'{isa}' is not supported by this processor; this processor has: avx2, base"):
            load(path, isa)


def test_a_library_of_other_sources_is_not_used(compiler: list[str], tmp_path: Path) -> None:
    path = make_library(compiler, tmp_path, fake("sb3_cyborg_abi=00000000", "base"))
    status, handle = load(path)
    assert (status.isa, handle) == (None, None)
    assert status.reason == f"{path} was built from other sources than {FOLDER / 'src'}"
    assert "python -m sb3_cyborg.kernels" in status.remedy
    with pytest.raises(ValueError, match=r"SB3_CYBORG_KERNELS='base' needs compiled kernels, but .* other sources"):
        load(path, "base")


def test_a_foreign_library_is_not_used(compiler: list[str], tmp_path: Path) -> None:
    status, handle = load(make_library(compiler, tmp_path, "int other() { return 0; }"))
    assert (status.isa, handle) == (None, None)
    assert "was built from other sources" in status.reason


def test_a_missing_or_broken_library_is_not_used(tmp_path: Path) -> None:
    path = tmp_path / LIBRARY.name
    assert load(path)[0].reason == f"{path} is missing: it could not be built when the package was installed"
    with pytest.raises(ValueError, match=r"SB3_CYBORG_KERNELS='base' needs compiled kernels, but .* is missing"):
        load(path, "base")
    path.write_text(f"not a library, but {abi()}")
    status, handle = load(path)
    assert (status.isa, handle) == (None, None)
    assert str(path) in status.reason


def test_an_unknown_kernel_is_an_error(library: Path) -> None:
    with pytest.raises(AttributeError, match="no_such_kernel"):
        kernels.get("no_such_kernel", ())


def test_a_kernel_has_types_of_its_own(library: Path) -> None:
    first, second = kernels.get("rms_norm", RMS_NORM), kernels.get("rms_norm", RMS_NORM[:1], ctypes.c_int)
    assert first is not second
    with pytest.raises(ctypes.ArgumentError):
        first([], 0, 0, 0, 0.0)


def test_the_loader_needs_the_standard_library_alone() -> None:
    by_models = {FOLDER / "primitives.py", FOLDER / "recording.py"}  # which the models alone import
    for path in set(FOLDER.glob("*.py")) - by_models:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                assert name.startswith("sb3_cyborg.kernels.") or name.partition(".")[0] in sys.stdlib_module_names, path
