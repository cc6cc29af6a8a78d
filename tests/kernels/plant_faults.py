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
FAULTS: dict[str, list[tuple[str, str, str]]] = {
    "mamba": [
        ("convolution: a reset hides too little", "keep && !keep[t] ? 0 : since + 1", "keep && !keep[t] ? 1 : since + 1"),
        ("convolution: the taps are in another order", "weight + (inputs.past - lag)", "weight + lag"),
        (
            "convolution: the last inputs are not cut at a reset",
            "if (past - 1 - i <= since) std::memcpy",
            "if (true) std::memcpy",
        ),
        ("convolution: the gradient of SiLU lacks a term", "g * s * (1.0f + total * (1.0f - s))", "g * s"),
        ("convolution: no gradient for the state", "(t < lag ? to_state + (past + t - lag) * channels", "(t < lag ? to_x"),
        ("recurrence: the state is not reset", "if (keep && !keep[place]) std::memset(now", "if (false) std::memset(now"),
        ("recurrence: heads read another group", "h * groups / heads * size", "0 * size"),
        ("recurrence: the step itself is read twice", "y[v] += faded * c[n]", "y[v] += (faded + write[v] * b[n]) * c[n]"),
        ("recurrence: the backward forgets a reset", "kept && !kept[i] ? zeros : states", "false ? zeros : states"),
        (
            "recurrence: the gradient passes a reset",
            "        live[h] = 1.0f;\n          if (reset) {",
            "        live[h] = 1.0f;\n          if (false) {",
        ),
        ("recurrence: the gradient of dt lacks the decay", "sum(step.by_x) + fade * a[h]", "sum(step.by_x)"),
        (
            "recurrence: the gradient of d counts the step size",
            "step.by_d += out[v] * in[v]",
            "step.by_d += out[v] * write[v]",
        ),
        ("norm: the gate has no gradient through the norm", "value * x * s * factor * mean", "value * factor * mean"),
        (
            "norm: one group reads the weights of the first",
            "load_n(weight + g * size + i, size - i), size - i);\n      scale",
            "load_n(weight + i, size - i), size - i);\n      scale",
        ),
    ],
    "kernels": [
        ("pmm: the newest slot is the victim", "if (candidate > oldest) victim", "if (candidate >= oldest) victim"),
        ("pmm: the age starts at the write before", "    age[victim] = 0.0f;", ""),
        ("pmm: usage counts weak reads", "dominant[s] |= p[s] > 0.5f", "dominant[s] |= p[s] > 0.1f"),
        ("pmm: a closed gate writes", "if (!open && !(least <= 0.0f)) return;", ""),
        ("pmm: the slots are not reset", "if (keep && !keep[place]) table.reset();", ""),
        ("pmm: the bias of an item has no gradient", "            grad_bias[first + item[s]] += d;\n", ""),
        ("pmm: the null entry has no part in the softmax's gradient", "float mean = null * d_null;", "float mean = 0.0f;"),
    ],
}
"""By source: what is wrong, the text before, the text after."""


def tests_fail(folder: Path) -> bool:
    """:return: Whether the tests fail with the sources of a folder, compiled."""
    subprocess.run([sys.executable, "sb3_cyborg/kernels/build.py"], cwd=folder, check=True, capture_output=True)
    tests = [
        sys.executable,
        "-m",
        "pytest",
        "-xq",
        "--hypothesis-seed=0",
        "-p",
        "no:cacheprovider",
        "tests/kernels/test_mamba_kernels.py",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "SB3_CYBORG_REQUIRE_KERNELS": "1", "PYTHONPATH": str(folder)}
    done = subprocess.run(tests, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    if done.returncode not in (0, 1):
        raise RuntimeError(f"The tests did not run: {done.stdout[-2000:]} {done.stderr[-2000:]}")
    return done.returncode == 1


def main() -> int:
    """:return: The exit code."""
    missed = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in ("sb3_cyborg", "tests"):
            shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", folder)
        if tests_fail(folder):
            raise RuntimeError("The tests fail without a fault: mend that first.")
        for source, faults in FAULTS.items():
            path = folder / "sb3_cyborg" / "kernels" / "src" / f"{source}.cpp"
            text = path.read_text()
            for title, before, after in faults:
                if before not in text:
                    raise ValueError(f"{path.name} does not hold {before!r}: the list of faults is older than the kernels.")
                path.write_text(text.replace(before, after))
                is_found = tests_fail(folder)
                print(f"{'found' if is_found else 'NOT FOUND'}: {title}", flush=True)
                missed += [] if is_found else [title]
            path.write_text(text)
    print(f"{len(missed)} of {sum(map(len, FAULTS.values()))} faults are not found.")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
