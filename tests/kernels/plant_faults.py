"""
Plants faults in the sources of the kernels, one at a time, and shows that their tests fail (minutes; needs a compiler).

    python -m tests.kernels.plant_faults

Each fault is compiled in a copy of the repository. Prints a line for each; exits with 1 if the tests pass with one.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
FAULTS: list[tuple[str, str, str, str]] = [
    # what is wrong, the file, the text before, the text after
    ("convolution: a reset hides too little", "mamba", "keep && !keep[t] ? 0 : since + 1", "keep && !keep[t] ? 1 : since + 1"),
    ("convolution: the taps are in another order", "mamba", "weight + (inputs.past - lag)", "weight + lag"),
    (
        "convolution: the last inputs are not cut at a reset",
        "mamba",
        "if (past - 1 - i <= since) std::memcpy",
        "if (true) std::memcpy",
    ),
    ("convolution: the gradient of SiLU lacks a term", "mamba", "g * s * (1.0f + total * (1.0f - s))", "g * s"),
    (
        "convolution: no gradient for the state",
        "mamba",
        "(t < lag ? to_state + (past + t - lag) * channels",
        "(t < lag ? to_x",
    ),
    ("recurrence: the state is not reset", "mamba", "if (keep && !keep[place]) std::memset(now", "if (false) std::memset(now"),
    ("recurrence: heads read another group", "mamba", "h * groups / heads * size", "0 * size"),
    ("recurrence: the step itself is read twice", "mamba", "y[v] += faded * c[n]", "y[v] += (faded + write[v] * b[n]) * c[n]"),
    ("recurrence: the backward forgets a reset", "mamba", "kept && !kept[i] ? zeros : states", "false ? zeros : states"),
    (
        "recurrence: the gradient passes a reset",
        "mamba",
        "        live[h] = 1.0f;\n          if (reset) {",
        "        live[h] = 1.0f;\n          if (false) {",
    ),
    ("recurrence: the gradient of dt lacks the decay", "mamba", "sum(step.by_x) + fade * a[h]", "sum(step.by_x)"),
    (
        "recurrence: the gradient of d counts the step size",
        "mamba",
        "step.by_d += out[v] * in[v]",
        "step.by_d += out[v] * write[v]",
    ),
    ("norm: the gate has no gradient through the norm", "mamba", "value * x * s * factor * mean", "value * factor * mean"),
    (
        "norm: one group reads the weights of the first",
        "mamba",
        "load_n(weight + g * size + i, size - i), size - i);\n      scale",
        "load_n(weight + i, size - i), size - i);\n      scale",
    ),
    ("pmm: the newest slot is the victim", "kernels", "if (candidate > oldest) victim", "if (candidate >= oldest) victim"),
    ("pmm: the age starts at the write before", "kernels", "    age[victim] = 0.0f;", ""),
    ("pmm: usage counts weak reads", "kernels", "dominant[s] |= p[s] > 0.5f", "dominant[s] |= p[s] > 0.1f"),
    ("pmm: a closed gate writes", "kernels", "if (!open && !(least <= 0.0f)) return;", ""),
    ("pmm: the slots are not reset", "kernels", "if (keep && !keep[place]) table.reset();", ""),
    ("pmm: the bias of an item has no gradient", "kernels", "            grad_bias[first + item[s]] += d;\n", ""),
    (
        "pmm: the null entry has no part in the softmax's gradient",
        "kernels",
        "float mean = null * d_null;",
        "float mean = 0.0f;",
    ),
]
"""Faults in the kernels of Mamba-2 and pmm."""


def found(folder: Path, source: str, before: str, after: str) -> bool:
    """:return: Whether the tests fail with a fault. The source is restored."""
    path = folder / "sb3_cyborg" / "kernels" / "src" / f"{source}.cpp"
    text = path.read_text()
    if text.count(before) < 1:
        raise ValueError(f"{path.name} does not hold {before!r}: the list of faults is older than the kernels.")
    path.write_text(text.replace(before, after))
    try:
        subprocess.run([sys.executable, "sb3_cyborg/kernels/build.py"], cwd=folder, check=True, capture_output=True)
        tests = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "tests/kernels/test_mamba_kernels.py"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "SB3_CYBORG_REQUIRE_KERNELS": "1", "PYTHONPATH": str(folder)}
        done = subprocess.run(tests, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
        if done.returncode not in (0, 1):
            raise RuntimeError(f"The tests did not run: {done.stdout[-2000:]} {done.stderr[-2000:]}")
        return done.returncode == 1
    finally:
        path.write_text(text)


def main() -> int:
    """:return: The exit code."""
    missed = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in ("sb3_cyborg", "tests"):
            shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", folder)
        for title, source, before, after in FAULTS:
            is_found = found(folder, source, before, after)
            print(f"{'found' if is_found else 'NOT FOUND'}: {title}", flush=True)
            missed += [] if is_found else [title]
    print(f"{len(FAULTS) - len(missed)} of {len(FAULTS)} faults are found.")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
