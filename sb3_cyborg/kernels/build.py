"""
Compile the kernels into one shared library inside the package.

``hatch_build.py`` calls it for wheels and editable installs, ``make`` and ``python -m sb3_cyborg.kernels`` after a change of
the sources. It imports the standard library alone: at that time no dependency need be installed.
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
SOURCES = (Path(__file__).resolve(), *sorted((FOLDER / "src").glob("*.[ch]*")))
"""All files that decide what is compiled. This one has the flags."""
KERNEL_SOURCES = ("kernels", "mamba", "operations")
"""Sources that are compiled for each instruction set, without their suffix."""
LIBRARY = FOLDER / {"win32": "_kernels.dll", "darwin": "_kernels.dylib"}.get(sys.platform, "_kernels.so")

COMPILERS = ("c++", "g++", "clang++")
# Not -ffast-math: NaN and inf must stay, and the compiler must not change the order of sums.
COMMON_FLAGS = (
    *("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"),
    *("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),
)
X86_FLAGS: dict[str, tuple[str, ...]] = {
    "base": (),
    "avx2": ("-mavx2", "-mfma"),
    "avx512": ("-mavx512f", "-mavx512vl", "-mavx512dq", "-mavx512bw", "-mfma", "-mprefer-vector-width=512"),
}
FLAGS: dict[str, dict[str, tuple[str, ...]]] = {"x86_64": X86_FLAGS, "aarch64": {"neon": ()}}
"""Flags of each instruction set, by architecture. NEON is a part of every aarch64, so it needs none."""
ARCHITECTURES = {"amd64": "x86_64", "arm64": "aarch64"}
"""Other names of an architecture."""


class BuildError(RuntimeError):
    """The library cannot be built here; the message is one line with the reason."""


def isa_flags() -> dict[str, tuple[str, ...]]:
    """:return: The instruction sets that are compiled for this machine's architecture, each with its compiler flags."""
    machine = platform.machine().lower()
    return FLAGS.get(ARCHITECTURES.get(machine, machine), {"base": ()})


def abi() -> str:
    """
    :return: A text in the library with a checksum of the sources and the architecture. A library of other sources lacks it:
        its functions may take other arguments.
    """
    checksum = zlib.crc32(platform.machine().encode())
    for path in SOURCES:
        checksum = zlib.crc32(path.read_bytes(), checksum)
    return f"sb3_cyborg_abi={checksum:08x}"


def find_compiler() -> list[str]:
    """
    :return: The C++ compiler as a command: ``$CXX``, else the first of ``COMPILERS`` on the path.
    :raises BuildError: if there is none.
    """
    given = shlex.split(os.environ.get("CXX", ""))
    if given:
        if shutil.which(given[0]) is None:
            raise BuildError(f"CXX={os.environ['CXX']!r} is not found: set it to a C++ compiler, or unset it")
        return given
    found = next(filter(shutil.which, COMPILERS), None)
    if found is None:
        raise BuildError(f"no C++ compiler is found ({', '.join(COMPILERS)} or $CXX)")
    return [found]


def is_current(library: Path = LIBRARY) -> bool:
    """
    :param library: A file that need not exist.
    :return: Whether it is a library for this machine, built from the present sources. It is not loaded for that: no code of
        other sources is, and a process that has loaded a file cannot load the one that replaces it.
    """
    return library.is_file() and abi().encode() in library.read_bytes()


def build(library: Path = LIBRARY) -> Path:
    """
    Compile and link the library, unless it is current.

    :param library: The file to write. It is replaced in one step, so processes that have the old one loaded keep it.
    :return: The same.
    :raises BuildError: on Windows, without a C++ compiler, if the compiler fails, or if the folder cannot be written.
    """
    if is_current(library):
        return library
    if sys.platform == "win32":
        raise BuildError("kernels are not built on Windows")
    compiler = find_compiler()
    try:
        with tempfile.TemporaryDirectory(dir=library.parent, prefix="build_") as folder:
            os.replace(_link(compiler, _compile(compiler, Path(folder)), Path(folder) / library.name), library)
    except OSError as error:
        raise BuildError(f"the library cannot be written: {error}") from error
    return library


def _compile(compiler: list[str], folder: Path) -> list[Path]:
    source = FOLDER / "src"
    units = {"dispatch": (source / "dispatch.cpp", [f'-DSB3_CYBORG_ABI="{abi()}"'])}
    for isa, flags in isa_flags().items():
        for name in KERNEL_SOURCES:
            units[f"{name}_{isa}"] = (source / f"{name}.cpp", [*flags, f"-DKERNEL_SUFFIX={isa}"])
    objects = {name: folder / f"{name}.o" for name in units}
    commands = [
        [*compiler, *COMMON_FLAGS, *flags_of_unit, "-c", str(path), "-o", str(objects[name])]
        for name, (path, flags_of_unit) in units.items()
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # the threads wait for compilers
        list(pool.map(_run, commands))
    return list(objects.values())


def _link(compiler: list[str], objects: list[Path], library: Path) -> Path:
    command = [*compiler, "-shared", *map(str, objects), "-o", str(library)]
    if sys.platform != "linux":
        _run(command)
        return library
    try:
        # Then the library runs beside any version of the C++ runtime, e.g. in a conda environment.
        _run([*command, "-static-libstdc++", "-static-libgcc"])
    except BuildError:  # some distributions have the static C++ runtime in a package of its own
        _run(command)
    return library


def _run(command: list[str]) -> None:
    english = {**os.environ, "LC_ALL": "C"}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=english)
    if result.returncode:
        lines = result.stderr.splitlines() or [f"exit code {result.returncode}"]
        # The compiler precedes an error with its context; the linker ends with a line that only says that it failed.
        errors = [line for line in lines if "error: " in line and not line.startswith("collect2")]
        raise BuildError(f"`{command[0]}` fails: {(errors or lines)[0]}")


def main() -> None:
    """Build the library and print its path; a failure is one line and exit code 1."""
    try:
        print(build())
    except BuildError as error:
        sys.exit(f"sb3-cyborg: error: the kernels are not built: {error}")


if __name__ == "__main__":
    main()
