"""
The pictures of the documentation for which an agent is trained first.

    python -m benchmarks.trained_pictures                # demo, inspect, curves: minutes
    python -m benchmarks.trained_pictures --only crafter # about 15 minutes on one core

Draws into ``docs/images``: ``demo.png`` (the learning curve of ``make demo``), ``inspect.png`` (reads of a ``ring``),
``learning_curves.png`` (three seeds of MemoryChain), ``crafter_wood.gif`` and ``crafter_wood.png``. ``make pictures`` runs the
first three; ``make pictures CRAFTER=1`` all of them. Needs the extras ``train`` and ``envs``.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch as th

from benchmarks.pictures import IMAGES
from sb3_cyborg import MemoryPPO, make_memory_vec_env
from sb3_cyborg.viewers.inspection import inspect_episode
from sb3_cyborg.viewers.inspection_figure import draw_inspection
from sb3_cyborg.viewers.plotting import plot_learning_curves

ROOT = IMAGES.parent.parent
INSPECT_STEPS, CURVE_STEPS, CURVE_SEEDS = 120_000, 20_000, (0, 1, 2)


def draw_demo(folder: Path, out: Path) -> None:
    """Runs the demo with its default steps and copies its learning curve."""
    command = [sys.executable, str(ROOT / "examples" / "demo_repeat_previous.py"), "--folder", str(folder)]
    subprocess.run(command, check=True)
    shutil.copy(folder / "learning_curve.png", out / "demo.png")


def draw_inspect(folder: Path, out: Path) -> None:
    """Trains an agent with a ring of 16 slots on RepeatPreviousEasy and draws the reads of one episode."""
    env = make_memory_vec_env("sb3_cyborg/popgym-RepeatPreviousEasy-v0", n_envs=16, seed=0)
    model = MemoryPPO("MlpPolicy", env, seed=0, policy_kwargs={"memory_kwargs": {"num_slots": 16}})
    model.learn(INSPECT_STEPS)
    draw_inspection(inspect_episode(model, seed=0), out / "inspect.png")


def draw_curves(folder: Path, out: Path) -> None:
    """Trains three seeds on MemoryChain and draws their mean return."""
    for seed in CURVE_SEEDS:
        runs = folder / f"chain_{seed}"
        env = make_memory_vec_env("sb3_cyborg/MemoryChain-v0", n_envs=16, seed=seed, monitor_dir=str(runs))
        MemoryPPO("MlpPolicy", env, seed=seed).learn(CURVE_STEPS)
        env.close()
    plot_learning_curves([folder / f"chain_{seed}" for seed in CURVE_SEEDS], out / "learning_curves.png")


def draw_crafter(folder: Path, out: Path) -> None:
    """Runs the Crafter example, which trains both of its agents, and copies the curves and the recording of MemoryPPO."""
    command = [sys.executable, str(ROOT / "examples" / "crafter_wood.py"), "--folder", str(folder)]
    subprocess.run(command, check=True)
    shutil.copy(folder / "learning_curve.png", out / "crafter_wood.png")
    shutil.copy(folder / "memory.gif", out / "crafter_wood.gif")


PICTURES: dict[str, Callable[[Path, Path], None]] = {
    "demo": draw_demo,
    "inspect": draw_inspect,
    "curves": draw_curves,
    "crafter": draw_crafter,
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PICTURES, default=["demo", "inspect", "curves"])
    parser.add_argument("--out", type=Path, default=IMAGES, help="folder of the pictures (default: %(default)s)")
    args = parser.parse_args(argv)
    th.set_num_threads(1)  # policies of this size are slower with several threads
    for name in args.only:
        with tempfile.TemporaryDirectory() as folder:
            PICTURES[name](Path(folder), args.out)
        print(f"{name}: drawn", flush=True)


if __name__ == "__main__":
    main()
