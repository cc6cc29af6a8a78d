"""
Cost of a training step as a function of the sequence length, the memory's slots, the environments and the width.

Each figure is the time of a forward and a backward pass over sequences, divided by its steps; for the environments it is the
time of one step of acting. One size varies, the others are fixed: T=64 steps, 8 rows, S=64 slots, width 128. A cost that is
linear in T has the same time per step for all T. Times are CPU times of one thread, the minimum of the repeats.

Run it from the root of the repository: ``python -m benchmarks.growth``.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch as th
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from benchmarks.limits import least, set_up, table, write_report
from benchmarks.throughput import RESULTS, describe_machine
from sb3_cyborg.encoders.encoder_v7 import EncoderV7
from sb3_cyborg.memories.memory_v7 import MemoryV7
from sb3_cyborg.sequence_model import SequenceModel, Stack

T, ROWS, SLOTS, WIDTH = 64, 8, 64, 128
ALL = ("gru/none", "lstm/none", "mamba/none", "gru/ring", "gru/kv", "gru/slot", "gru/pmm")
AXES = {
    "T": ("training step, 8 rows", "steps T of a sequence"),
    "S": ("training step, 8 rows", "slots S of the memory"),
    "width": ("training step, 8 rows", "width"),
    "N": ("step of acting", "environments N"),
}
"""Titles of the panels, and labels of their horizontal axes."""
WITH_SLOTS = ("gru/ring", "gru/kv", "gru/slot", "gru/pmm")


def make(agent: str, width: int = WIDTH, slots: int = SLOTS) -> SequenceModel:
    encoder, memory = agent.split("/")
    options = {} if memory == "none" else {"memory_dim": width // 2, "num_slots": slots}
    return Stack(EncoderV7(width, width, mode=encoder), MemoryV7(2 * width, memory, **options))


def sequence(model: SequenceModel, steps: int, width: int) -> Callable[[], None]:
    x, state = th.randn(ROWS, steps, width), model.get_initial_state(ROWS)
    masks = th.rand(ROWS, steps) > 0.02
    return lambda: model.forward_sequence(x, state, masks)[0].sum().backward()


def acting(model: SequenceModel, n_envs: int) -> Callable[[], None]:
    x, state, mask = th.randn(n_envs, WIDTH), model.get_initial_state(n_envs), th.ones(n_envs, dtype=th.bool)
    model.eval()

    def step() -> None:
        with th.no_grad():
            model.forward_step(x, state, mask)

    return step


Section = tuple[str, str, Sequence[int], Sequence[str], Callable[[str, int], tuple[Callable[[], None], int]]]

SECTIONS: list[Section] = [
    ("T", "us a step of 8 rows, by steps T", (64, 128, 256, 512, 1024), ALL, lambda a, n: (sequence(make(a), n, WIDTH), n)),
    (
        "S",
        "us a step of 8 rows, by slots S",
        (16, 64, 256),
        WITH_SLOTS,
        lambda a, n: (sequence(make(a, slots=n), T, WIDTH), T),
    ),
    ("width", "us a step of 8 rows, by width", (64, 128, 256, 512), ALL, lambda a, n: (sequence(make(a, width=n), T, n), T)),
    ("N", "us a step of acting, by environments N", (1, 4, 16, 64, 256), ALL, lambda a, n: (acting(make(a), n), 1)),
]


GrowthTables = dict[str, tuple[str, Sequence[int], dict[str, list[float]]]]
"""By the name of the varied size: title, sizes, and times in microseconds of each agent at these sizes."""


def growth_figure(results: GrowthTables) -> Figure:
    """
    Draws the tables, one panel each; an agent has the same colour in all panels.

    :param results: The tables.
    :return: The figure.
    """
    colours = {agent: f"C{number}" for number, agent in enumerate(ALL)}
    figure = Figure(figsize=(4 * len(results), 4.2), layout="constrained")
    panels = figure.subplots(1, len(results), squeeze=False)[0]
    for axes, (name, (_, sizes, times)) in zip(panels, results.items(), strict=True):
        for agent, values in times.items():
            axes.plot(sizes, values, marker="o", color=colours[agent], label=agent)
        axes.set(xscale="log", yscale="log", xlabel=AXES[name][1], ylabel="CPU time, microseconds", title=AXES[name][0])
        axes.set_xticks(sizes, [str(size) for size in sizes], minor=False)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:,.0f}")
        axes.minorticks_off()
        axes.grid(alpha=0.25)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return figure


def main() -> None:
    repeats = set_up(__doc__)
    results: GrowthTables = {}
    report = [describe_machine()]
    for name, title, sizes, agents, build in SECTIONS:
        turns, steps = {}, {}
        for agent in agents:
            for size in sizes:
                turns[f"{agent} {size}"], steps[f"{agent} {size}"] = build(agent, size)
        seconds = least(turns, repeats)
        times = {agent: [1e6 * seconds[f"{agent} {n}"] / steps[f"{agent} {n}"] for n in sizes] for agent in agents}
        results[name] = (title, sizes, times)
        rows: list[list[Any]] = [[agent, *(f"{value:.0f}" for value in values)] for agent, values in times.items()]
        report += [f"**{title}**", table([name, *map(str, sizes)], rows)]
    write_report(report, "growth.md")
    growth_figure(results).savefig(RESULTS / "growth.png", dpi=110)


if __name__ == "__main__":
    main()
