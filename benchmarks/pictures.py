"""
The pictures of the README and of the landing page, from the measurements in ``benchmarks/results``.

    python -m benchmarks.pictures

Draws ``memory.png``, ``learning.png``, ``speed.png`` and ``steadiness.png`` into ``docs/images``, and ``growth.png`` beside
its measurements. ``make pictures`` runs it.
"""

import argparse
import csv
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchmarks.growth import GrowthTables, growth_figure
from benchmarks.learning import CURVES, RESULTS, RUNS, latest, read
from benchmarks.learning_report import Cells, by_cell, curves_of, scores, seeds_counted
from benchmarks.learning_tasks import DEFAULT, FRAME_STACK, RECURRENT, TASKS
from benchmarks.throughput import PEER, SHARED_PEER, ratio

IMAGES = Path(__file__).resolve().parent.parent / "docs" / "images"
COLOURS = {DEFAULT: "tab:blue", RECURRENT: "tab:orange", FRAME_STACK: "tab:green"}
NAMES = {DEFAULT: "MemoryPPO, defaults", RECURRENT: "RecurrentPPO", FRAME_STACK: "PPO with stacked frames"}
MARKERS = {DEFAULT: "o", RECURRENT: "s", FRAME_STACK: "^"}

MEMORY_TASKS = {
    "RepeatPreviousMedium": "RepeatPreviousMedium: name the card of 32 steps ago",
    "RepeatFirstMedium": "RepeatFirstMedium: name the first card of the episode",
}
"""The tasks of the first picture, with their titles."""
LEARNING_TASKS = [
    *(f"MemoryChain-{length}" for length in (16, 32, 64, 128, 256, 1000)),
    *(f"RepeatPrevious{level}" for level in ("Easy", "Medium", "Hard")),
    *(f"RepeatFirst{level}" for level in ("Easy", "Medium", "Hard")),
    "MiniGrid-MemoryS9",
    "AutoencodeEasy",
    "ConcentrationEasy",
    "TMaze-100",
    "TMaze-500",
]
"""The tasks that need memory and whose score is at most 1, those that the defaults do not solve last."""
SPEED_TABLE = "avx2_width128.csv"
SPEED_TITLE = "width 128, 16 environments x 128 steps, one CPU thread (AVX2)"


def read_cells(folder: Path) -> tuple[Cells, Cells]:
    """
    Reads the learning benchmark.

    :param folder: Folder with ``learning_runs.csv`` and ``learning_curves.csv``.
    :return: The rows of finished runs and the points of their curves, each by task and agent.
    """
    rows = latest(read(folder / RUNS))
    finished = {(row["task"], row["agent"], row["digest"], row["seed"]) for row in rows}
    points = [p for p in latest(read(folder / CURVES)) if (p["task"], p["agent"], p["digest"], p["seed"]) in finished]
    return by_cell(rows), by_cell(points)


def draw_memory(curves: Cells, path: Path) -> None:
    """
    Draws evaluations during training, a thin line for each seed and a thick one for their mean.

    :param curves: Points of the curves, by task and agent.
    :param path: PNG file to write.
    """
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    panels: Any = figure.subplots(1, len(MEMORY_TASKS), sharey=True)
    for axes, (name, title) in zip(panels, MEMORY_TASKS.items(), strict=True):
        task = TASKS[name]
        for agent, colour in COLOURS.items():
            steps, values = curves_of(curves[name, agent], task)
            label = f"{NAMES[agent]}, {seeds_counted(len(values))}"
            if agent == FRAME_STACK:
                label = f"PPO with {task.frames} stacked frames, {seeds_counted(len(values))}"
            axes.plot(steps, values.T, color=colour, linewidth=0.8, alpha=0.5)
            axes.plot(steps, values.mean(0), color=colour, linewidth=2.5, label=label)
        assert task.solved is not None
        axes.axhline(task.solved, color="black", linewidth=0.8, linestyle=":", label=f"solved: {task.solved}")
        axes.set_title(title, fontsize=10)
        axes.set(xlabel="environment steps", ylim=(-0.85, 1.12))
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2, frameon=False)
        axes.grid(alpha=0.25)
    panels[0].set_ylabel("mean return of an evaluation")
    figure.suptitle("Thin lines: one seed each. Thick lines: the mean of the seeds.", fontsize=9)
    figure.savefig(path, dpi=110)


def draw_learning(cells: Cells, path: Path) -> None:
    """
    Draws the score of each final policy, a mark for each seed.

    :param cells: Rows of finished runs, by task and agent.
    :param path: PNG file to write.
    """
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    for line, name in enumerate(LEARNING_TASKS):
        for offset, agent in zip((-0.25, 0.0, 0.25), COLOURS, strict=True):
            values = scores(cells[name, agent], TASKS[name])
            spread = np.linspace(-0.1, 0.1, len(values)) if len(values) > 1 else np.zeros(1)
            axes.plot(values, line + offset + spread, MARKERS[agent], color=COLOURS[agent], markersize=6, alpha=0.65)
        axes.axhline(line + 0.5, color="0.9", linewidth=0.8)
    axes.set_yticks(range(len(LEARNING_TASKS)), LEARNING_TASKS)
    axes.invert_yaxis()
    axes.set(
        xlabel="score of the final policy: mean return (MiniGrid, T-Maze: success rate) of 100 episodes", xlim=(-0.75, 1.08)
    )
    handles = [Line2D([], [], color=c, marker=MARKERS[a], linestyle="none", label=NAMES[a]) for a, c in COLOURS.items()]
    axes.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.45, 1.08), ncols=3, frameon=False)
    axes.grid(axis="x", alpha=0.25)
    figure.savefig(path, dpi=110)


def read_speeds(path: Path) -> list[dict[str, Any]]:
    """
    Reads a table of ``benchmarks.throughput``.

    :param path: Its CSV file.
    :return: The rows, with speeds in steps per second of CPU time.
    """
    with path.open(newline="") as file:
        return [
            {key: float(value) if key in ("collect", "update", "overall") else value for key, value in row.items()}
            for row in csv.DictReader(file)
        ]


def draw_speed(rows: list[dict[str, Any]], path: Path) -> None:
    """
    Draws the overall training speed of each agent as a multiple of that of RecurrentPPO, in its two forms.

    :param rows: Rows of a table of ``benchmarks.throughput``, all of one setting.
    :param path: PNG file to write.
    """
    agents = list(dict.fromkeys(row["agent"] for row in rows if row["agent"] not in (PEER, SHARED_PEER)))
    names = [f"{agent}, the default" if agent == "gru/ring" else agent for agent in agents]
    peers = {PEER: "RecurrentPPO with its default of two LSTMs", SHARED_PEER: "RecurrentPPO with one shared LSTM"}
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    axes = figure.subplots()
    for (peer, label), offset, colour in zip(peers.items(), (-0.2, 0.2), ("tab:blue", "tab:cyan"), strict=True):
        values = [ratio(rows, agent, peer, "overall") for agent in agents]
        bars = axes.barh(np.arange(len(agents)) + offset, values, height=0.38, color=colour, label=f"beside {label}")
        axes.bar_label(bars, fmt="%.1f", fontsize=8, padding=2)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(range(len(agents)), names)
    axes.invert_yaxis()
    repeats = len({row["repeat"] for row in rows})
    axes.set(xlabel=f"training speed, times the peer's (CPU time, median of {repeats} repeats)", title=SPEED_TITLE)
    axes.legend(fontsize=9, loc="upper center", bbox_to_anchor=(0.45, -0.1), ncols=2, frameon=False)
    figure.savefig(path, dpi=110)


def steadiness(cells: Cells, name: str) -> list[float]:
    """
    Measures whether a solved task stays solved.

    :param cells: Points of the curves, by task and agent.
    :param name: A task with a threshold.
    :return: For each seed of MemoryPPO with its defaults that has reached the threshold: the share of evaluations that reached
        it, from the first success on (included), in (0, 1].
    """
    task = TASKS[name]
    assert task.solved is not None
    _, values = curves_of(cells[name, DEFAULT], task)
    shares = []
    for reached in values >= task.solved:
        if reached.any():
            shares.append(float(reached[reached.argmax() :].mean()))
    return shares


def draw_steadiness(curves: Cells, path: Path) -> None:
    """
    Draws for each seed of the default agent how many evaluations after the first success were successes.

    :param curves: Points of the curves, by task and agent.
    :param path: PNG file to write.
    """
    names = [name for name in LEARNING_TASKS if TASKS[name].solved is not None]
    shares = {name: steadiness(curves, name) for name in names}
    figure = Figure(figsize=(9, 4.4), layout="constrained")
    axes = figure.subplots()
    for line, (name, values) in enumerate(shares.items()):
        spread = line + np.linspace(-0.25, 0.25, len(values))
        axes.plot(values, spread, marker="o", linestyle="none", color=COLOURS[DEFAULT], alpha=0.65)
        seeds = len({point["seed"] for point in curves[name, DEFAULT]})
        axes.text(1.02, line, f"{len(values)} of {seeds}", va="center", fontsize=8, transform=axes.get_yaxis_transform())
        axes.axhline(line + 0.5, color="0.9", linewidth=0.8)
    axes.set_yticks(range(len(shares)), list(shares))
    axes.invert_yaxis()
    every = statistics.median(value for values in shares.values() for value in values)
    axes.set(xlim=(0, 1.03), xlabel="share of the evaluations from the first success on that were successes")
    axes.set_title(f"MemoryPPO, defaults: one mark a seed, median {every:.2f}. Right: seeds with a success.", fontsize=10)
    axes.grid(axis="x", alpha=0.25)
    figure.savefig(path, dpi=110)


def read_growth(path: Path) -> GrowthTables:
    """
    Reads the tables of ``benchmarks.growth``.

    :param path: Its report, ``growth.md``.
    :return: By the name of the varied size: title, sizes, and times in microseconds of each agent.
    :raises ValueError: if the file has no table.
    """
    tables: GrowthTables = {}
    for title, text in re.findall(r"^\*\*(.*)\*\*\n\n((?:\|.*\n?)+)", path.read_text(), re.MULTILINE):
        header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
        times = {agent: [float(value) for value in values] for agent, *values in rows}
        tables[header[0]] = (title, [int(size) for size in header[1:]], times)
    if not tables:
        raise ValueError(f"There is no table in {path}: run `python -m benchmarks.growth` first.")
    return tables


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=IMAGES, help="folder of the pictures (default: %(default)s)")
    out = parser.parse_args(argv).out
    cells, curves = read_cells(RESULTS)
    draw_memory(curves, out / "memory.png")
    draw_learning(cells, out / "learning.png")
    draw_speed(read_speeds(RESULTS / SPEED_TABLE), out / "speed.png")
    draw_steadiness(curves, out / "steadiness.png")
    growth_figure(read_growth(RESULTS / "growth.md")).savefig(RESULTS / "growth.png", dpi=110)


if __name__ == "__main__":
    main()
