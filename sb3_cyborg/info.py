"""
A description of the installation for bug reports: ``sb3-cyborg info``.

``python -m sb3_cyborg.info`` prints the same without the extra ``train``, which the command line needs.
"""

import os
import platform
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import torch as th

from sb3_cyborg import __version__, kernels
from sb3_cyborg.ops.ssd_official import load_kernels
from sb3_cyborg.packages import missing_packages, package_versions

OWN = "sb3-cyborg"
EXTRAS = (
    *("train", "popgym", "minigrid", "crafter", "zoo", "postgresql", "cluster", "wandb", "video", "export", "runtime", "hub"),
)
"""The extras for users. ``envs`` consists of others, and ``mamba-cuda`` has a line of its own."""
INSTRUCTION_SETS = (
    *("avx", "avx2", "fma", "avx512f", "avx512vl", "avx512dq", "avx512bw", "avx512_bf16", "avx512_fp16"),
    *("amx_bf16", "asimd", "sve", "sve2"),
)
"""Those that matter here, with the names of Linux."""
CPU_INFO = Path("/proc/cpuinfo")


def report() -> str:
    """:return: Lines of a name and a value, aligned; a long value continues on lines without a name."""
    rows = list(_rows())
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _rows() -> Iterator[tuple[str, str]]:
    yield OWN, f"{__version__} in {Path(__file__).resolve().parent}"
    yield "python", f"{platform.python_version()} ({platform.python_implementation()})"
    yield "platform", platform.platform()
    for name, version in package_versions().items():
        if name != OWN:
            yield name, version
    processor, isas = read_processor()
    yield "processor", f"{processor}, {os.cpu_count()} logical cores"
    yield "instruction sets", isas
    yield "torch threads", f"{th.get_num_threads()}"
    yield "torch on the CPU", _torch_libraries()
    yield from _kernels()
    yield "CUDA", _cuda()
    yield "mamba_ssm", _mamba()
    yield from _missing_extras()


def read_processor(cpu_info: Path = CPU_INFO) -> tuple[str, str]:
    """
    :param cpu_info: Linux's description of the processors; missing on other systems.
    :return: The processor's name, and its instruction sets among ``INSTRUCTION_SETS``, separated by spaces.
    """
    if not cpu_info.is_file():
        return platform.processor() or platform.machine(), "not known on this system"
    lines = (line.partition(":") for line in cpu_info.read_text(encoding="utf-8").splitlines())
    fields = {name.strip(): value.strip() for name, _, value in lines}
    has = (fields.get("flags") or fields.get("Features", "")).split()  # x86, aarch64
    found = " ".join(isa for isa in INSTRUCTION_SETS if isa in has)
    return fields.get("model name", platform.machine()), found or f"none of {', '.join(INSTRUCTION_SETS)}"


def _torch_libraries() -> str:
    libraries = {"MKL": th.backends.mkl, "oneDNN": th.backends.mkldnn}
    found = ", ".join(f"{name} {'yes' if library.is_available() else 'no'}" for name, library in libraries.items())
    return f"{found}, uses {th.backends.cpu.get_cpu_capability()}"


def _kernels() -> Iterator[tuple[str, str]]:
    try:
        now = kernels.status()
    except ValueError as error:
        yield "compiled kernels", f"error: {error}"
        return
    if now.isa is not None:
        yield "compiled kernels", f"{now.isa}, {now.path}"
    else:
        yield "compiled kernels", f"not in use: {now.reason}"
        yield "", f"to use them: {now.remedy}"


def _cuda() -> str:
    if th.cuda.is_available():
        return f"{th.version.cuda}, " + ", ".join(map(th.cuda.get_device_name, range(th.cuda.device_count())))
    return "no device" if th.version.cuda else "this PyTorch has no CUDA"


def _mamba() -> str:
    try:
        load_kernels()
    except (ImportError, RuntimeError) as error:  # Triton raises RuntimeError without a driver
        return str(error)
    return f"{package_versions(['mamba-ssm']).get('mamba-ssm', 'unknown version')}, can be imported"


def _missing_extras() -> Iterator[tuple[str, str]]:
    try:
        missing = {extra: missing_packages(OWN, extra) for extra in EXTRAS}
    except metadata.PackageNotFoundError:
        yield "extras", f"{OWN} is not installed, it runs from a folder on Python's path: `pip install -e .` in that folder"
        return
    label = "missing extras"
    for extra, packages in missing.items():
        if packages:
            yield label, f'{extra}, which lacks {", ".join(packages)}: pip install "{OWN}[{extra}]"'
            label = ""
    if label:
        yield label, "none"


if __name__ == "__main__":
    print(report())
