"""Memory safety of the kernels: a C++ driver calls each of them under the address, leak and undefined-behaviour sanitizers."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from sb3_cyborg.kernels.build import COMMON_FLAGS, FOLDER, KERNEL_SOURCES, isa_flags
from sb3_cyborg.kernels.library import SUPPORTED, status

pytestmark = pytest.mark.slow

DRIVER = Path(__file__).with_name("driver.cpp")
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g")
# The environment of the tests may preload libraries or set options of its own.
OPTIONS = {"ASAN_OPTIONS": "detect_leaks=1", "UBSAN_OPTIONS": "print_stacktrace=1"}


@pytest.fixture(scope="module")
def sanitizers(compiler: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """:return: The flags of the sanitizers. Tests are skipped where the compiler has no runtime for them."""
    folder = tmp_path_factory.mktemp("sanitizers")
    (folder / "empty.cpp").write_text("int main() {}\n")
    command = [*compiler, *SANITIZERS, "empty.cpp", "-o", "empty"]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if result.returncode:
        pytest.skip(f"the compiler lacks the sanitizers: {result.stderr.splitlines()[-1]}")
    return SANITIZERS


@pytest.fixture(scope="module", params=sorted(isa_flags()))
def driver(
    request: pytest.FixtureRequest,
    compiler: list[str],
    library: Path,
    sanitizers: tuple[str, ...],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """:return: The driver, compiled for an instruction set that this processor has."""
    isa = request.param
    best = status().isa
    if best is None or isa not in SUPPORTED[best]:
        pytest.skip(f"this processor has no {isa}")
    program = tmp_path_factory.mktemp("driver") / f"driver_{isa}"
    flags = [*COMMON_FLAGS, *isa_flags()[isa], f"-DKERNEL_SUFFIX={isa}", f"-I{FOLDER / 'src'}", *sanitizers]
    subprocess.run([*compiler, *flags, str(DRIVER), "-o", str(program)], check=True)
    return program


def run(driver: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """:return: The finished driver."""
    environment = {**os.environ, **OPTIONS}
    environment.pop("LD_PRELOAD", None)
    return subprocess.run([driver, *arguments], capture_output=True, text=True, check=False, env=environment)


def test_the_driver_calls_every_kernel_without_a_fault(driver: Path) -> None:
    source = "".join((FOLDER / "src" / f"{name}.cpp").read_text() for name in KERNEL_SOURCES)
    kernels = set(re.findall(r"^EXPORT .*?\bKERNEL\((\w+)\)", source, re.MULTILINE))
    assert "affine" in kernels
    result = run(driver)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert set(result.stdout.split()) == kernels, "add a row to CASES in driver.cpp"


@pytest.mark.parametrize(
    ("fault", "message"),
    [("overrun", "heap-buffer-overflow"), ("leak", "detected memory leaks"), ("undefined", "signed integer overflow")],
)
def test_a_planted_fault_is_found(driver: Path, fault: str, message: str) -> None:
    result = run(driver, fault)
    assert result.returncode != 0
    assert message in result.stderr
