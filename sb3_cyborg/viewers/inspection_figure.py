"""Draws an :class:`Inspection` as a column of panels over the steps of the episode."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sb3_cyborg.checks import check_whole
from sb3_cyborg.viewers.figures import check_picture, new_figure, save_figure
from sb3_cyborg.viewers.inspection import Inspection

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Heads = str | int
"""Reduction over the heads: ``"mean"``, ``"max"``, or the number of one head."""

ABSENT = "0.9"
"""Colour of missing values: grey."""


class _Panel:
    """
    A row of the figure.

    :param axes: Axes of the panel, with steps from left to right.
    :param bar: Axes for a colour bar, hidden until used.
    :param side: Axes beside them, hidden until used.
    :param steps: Number of steps.
    :param part: Name of the part that the row shows, for its title; empty if there is one part.
    """

    def __init__(self, axes: "Axes", bar: "Axes", side: "Axes", steps: int, part: str = "") -> None:
        self.axes, self.bar, self.side, self.steps, self.part = axes, bar, side, steps, part
        bar.set_visible(False)
        side.set_visible(False)

    def title(self, text: str) -> None:
        self.axes.set_title(f"{self.part}: {text}" if self.part else text, loc="left", fontsize=10)

    def map(
        self, values: np.ndarray, label: str, *, first: float = 0, top: float | None = None, cmap: str = "magma_r"
    ) -> None:
        """
        Draw a heat map.

        :param values: (rows, T), NaN for missing values.
        :param label: Label of the colour bar.
        :param first: Position of the first row on the vertical axis; the next is 1 above.
        :param top: Value of the last colour; ``None`` takes the largest value.
        :param cmap: Name of the colour map.
        """
        import matplotlib

        colours = matplotlib.colormaps[cmap].with_extremes(bad=ABSENT)
        largest = float(np.nanmax(values)) if np.isfinite(values).any() else 1.0
        image = self.axes.imshow(
            np.ma.masked_invalid(values),
            origin="lower",
            aspect="auto",
            cmap=colours,
            vmin=0,
            vmax=(largest or 1.0) if top is None else top,
            extent=(-0.5, self.steps - 0.5, first - 0.5, first + len(values) - 0.5),
            interpolation="nearest" if self.steps <= 300 else "auto",
        )
        self.bar.set_visible(True)
        self.axes.figure.colorbar(image, cax=self.bar).set_label(label, fontsize=8)
        self.bar.tick_params(labelsize=8)

    def lines(self, values: np.ndarray, labels: list[str], **style: Any) -> None:
        """
        Draw lines.

        :param values: (T, lines).
        :param labels: Names of the lines.
        :param style: Options of matplotlib's ``plot``.
        """
        for line, label in zip(values.T, labels, strict=True):
            self.axes.plot(np.arange(self.steps), line, label=label, **({"linewidth": 1.2} | style))

    def legend(self) -> None:
        legend = self.axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.02), fontsize=8, frameon=False, borderaxespad=0)
        legend.set_in_layout(False)  # the column beside has room for it; the layout would widen it


def inspection_figure(inspection: Inspection, heads: Heads = "mean") -> "Figure":
    """
    Draw an episode.

    :param inspection: The episode.
    :param heads: Reduction over the heads: ``"mean"``, ``"max"``, or the number of the only head to draw.
    :return: The figure.
    :raises ValueError: for an unknown reduction, and for a head that does not exist.
    """
    parts = inspection.parts
    rows: list[tuple[float, Draw, Inspection, str, Choose]] = []
    for name, part in parts.items():
        choose = _chooser(heads, part.memory["null"].shape[1])
        rows += [(height, draw, part, name if len(parts) > 1 else "", choose) for height, draw in _panels(part)]
    rows += [(height, draw, inspection, "", choose) for height, draw in _episode_panels(inspection)]
    heights = [height for height, *_ in rows]
    figure = new_figure(11, 1.0 + sum(heights))
    grid = figure.add_gridspec(len(rows), 3, width_ratios=[30, 0.7, 6], height_ratios=heights)
    first: Axes | None = None
    for row, (_, draw, part, name, choose) in enumerate(rows):
        axes = figure.add_subplot(grid[row, 0], sharex=first)
        first = first or axes
        panel = _Panel(axes, figure.add_subplot(grid[row, 1]), figure.add_subplot(grid[row, 2]), inspection.steps, name)
        draw(panel, part, choose)
        axes.tick_params(labelsize=8, labelbottom=row == len(rows) - 1)
        axes.yaxis.label.set_fontsize(9)
        if row == len(rows) - 1:
            axes.set_xlabel("step of the episode")
    assert first is not None
    first.set_xlim(-0.5, inspection.steps - 0.5)
    figure.suptitle(_headline(inspection, heads), fontsize=12)
    return figure


def draw_inspection(inspection: Inspection, output: Path | str, heads: Heads = "mean") -> Path:
    """
    Draw an episode into a file.

    :param inspection: The episode.
    :param output: A PNG, PDF or SVG file.
    :param heads: As in :func:`inspection_figure`.
    :return: The file.
    :raises ValueError: for a file name of another format, and as :func:`inspection_figure`.
    """
    path = check_picture(output)
    save_figure(inspection_figure(inspection, heads), path)
    return path


Choose = Callable[[np.ndarray], np.ndarray]
Draw = Callable[[_Panel, Inspection, Choose], None]


def _chooser(heads: Heads, number: int) -> Choose:
    """:return: A function that reduces (T, H, ...) to (T, ...)."""
    if heads == "mean":
        return lambda values: np.asarray(values.mean(axis=1))
    if heads == "max":
        return lambda values: np.asarray(values.max(axis=1))
    if isinstance(heads, str):
        raise ValueError(f"`heads` must be 'mean', 'max' or the number of a head, got {heads!r}.")
    check_whole(0, heads=heads)
    if heads >= number:
        raise ValueError(f"`heads` is {heads}, but this memory has {number} heads: 0 to {number - 1}.")
    return lambda values: np.asarray(values[:, heads])


def _headline(inspection: Inspection, heads: Heads) -> str:
    length = f"{inspection.steps} steps" if inspection.ended else f"the first {inspection.steps} steps"
    names = ", ".join(inspection.parts)
    sizes = "; ".join(dict.fromkeys(_sizes(part.memory, heads) for part in inspection.parts.values()))
    return (
        f"{names[0].upper()}{names[1:]} along an episode of {inspection.name}\n"
        f"{sizes}; {length}, return {inspection.rewards.sum():.2f}"
    )


def _sizes(memory: dict[str, np.ndarray], heads: Heads) -> str:
    _, number, slots = memory["read"].shape
    over = f"head {heads} of {number}" if isinstance(heads, int) else f"{heads} of {number} head{'s' * (number > 1)}"
    each = " each" if "write" in memory else ""
    return f"{over}, {slots} slots{each}"


def _panels(inspection: Inspection) -> list[tuple[float, Draw]]:
    """:return: Height in inches and drawing function of each panel for which the memory has records."""
    memory = inspection.memory
    per_slot = min(2.4, 0.9 + 0.06 * memory["read"].shape[2])
    panels: list[tuple[float, Draw]] = []
    if inspection.attention is not None:
        panels.append((4.6, _draw_attention))
    if inspection.is_window:
        panels.append((2.4, _draw_ages))
    elif "write" in memory:
        slots_of_all_heads = min(4.0, 0.9 + 0.04 * memory["read"].shape[1] * memory["read"].shape[2])
        panels += [(slots_of_all_heads, draw) for draw in (_draw_reads_by_head, _draw_writes, _draw_unwritten)]
    else:
        panels.append((per_slot, _draw_slots))
        panels += [(per_slot, draw) for name, draw in _BY_SLOT.items() if name in memory]
    panels.append((1.3, _draw_shares))
    return panels


def _episode_panels(inspection: Inspection) -> list[tuple[float, Draw]]:
    """:return: Height in inches and drawing function of each panel that does not depend on the memory."""
    panels: list[tuple[float, Draw]] = [(0.9, _draw_actions), (0.9, _draw_rewards)]
    return panels if inspection.observations is None else [(0.9, _draw_observations), *panels]


def _draw_attention(panel: _Panel, inspection: Inspection, choose: Choose) -> None:
    attention = inspection.attention
    assert attention is not None
    steps = np.arange(inspection.steps)
    values = choose(attention).T  # (read, reading)
    absent = steps[:, None] >= steps  # future steps
    if inspection.held is not None:
        stored = (inspection.held[:, :, None] == steps).any(axis=1).T
        absent = absent | ~stored
    panel.map(np.where(absent, np.nan, values), "share of the read")
    panel.axes.plot(steps, steps, color="0.4", linewidth=1, linestyle=":")
    panel.axes.set_ylabel("step that was read")
    panel.title("Attention over past steps. Parallel to the dots: a constant age. Horizontal: one step, read again and again")
    panel.side.set_visible(True)
    panel.side.axis("off")
    panel.side.text(
        0.3, 0.98, "grey: not stored\n(future,\nor overwritten)", fontsize=8, va="top", transform=panel.side.transAxes
    )


def _draw_ages(panel: _Panel, inspection: Inspection, choose: Choose) -> None:
    read, age = inspection.memory["read"], inspection.memory["age"].astype(np.int64)
    oldest = max(1, int(age.max()))
    by_age = np.full((inspection.steps, read.shape[1], oldest), np.nan)
    for t in range(inspection.steps):
        by_age[t][:, age[t, age[t] > 0] - 1] = read[t][:, age[t] > 0]
    panel.map(choose(by_age).T, "share of the read", first=1)
    panel.axes.set_ylabel("age (steps ago)")
    panel.title("The same by age: steps between storing and reading")
    panel.side.set_visible(True)
    ages = np.arange(1, oldest + 1)
    for head in range(read.shape[1]):
        panel.side.plot(np.nan_to_num(by_age[:, head]).mean(axis=0), ages, linewidth=1, label=f"head {head}")
    panel.side.set_ylim(0.5, oldest + 0.5)
    panel.side.set_xlim(left=0)
    panel.side.tick_params(labelsize=8, labelleft=False)
    panel.side.set_title("each head, mean\nof the episode", fontsize=8)
    panel.side.legend(fontsize=7, frameon=False)


def _draw_slots(panel: _Panel, inspection: Inspection, choose: Choose) -> None:
    read = choose(inspection.memory["read"])
    held = inspection.held
    panel.map(np.where(held >= 0, read, np.nan).T if held is not None else read.T, "share of the read")
    panel.axes.set_ylabel("slot")
    panel.title("Which slot is read (grey: empty)")


def _draw_held(panel: _Panel, inspection: Inspection, choose: Choose) -> None:
    age = inspection.memory["age"]
    panel.map(np.where(age > 0, age, np.nan).T, "age (steps)", cmap="viridis_r")
    written, slot = np.nonzero(age == 1)
    panel.axes.plot(written - 1, slot, ".", color="tab:red", markersize=4, label="written here")
    panel.axes.set_ylabel("slot")
    panel.title("Age of the item in each slot; a red dot is a write")


def _draw_usage(panel: _Panel, inspection: Inspection, choose: Choose) -> None:
    panel.map(_where_filled(inspection, "usage"), "usage", cmap="Blues")
    panel.axes.set_ylabel("slot")
    panel.title("Usage: the least-used slot is overwritten next")


def _draw_strength(panel: _Panel, inspection: Inspection, choose: Choose) -> None:
    panel.map(_where_filled(inspection, "strength"), "write gate", top=1, cmap="Greens")
    panel.axes.set_ylabel("slot")
    panel.title("Strength: the write gate of the item in each slot when it was written")


def _where_filled(inspection: Inspection, name: str) -> np.ndarray:
    """:return: (S, T), NaN for empty slots."""
    held = inspection.held
    values = inspection.memory[name]
    return (values if held is None else np.where(held >= 0, values, np.nan)).T


_BY_SLOT: dict[str, Draw] = {"age": _draw_held, "usage": _draw_usage, "strength": _draw_strength}


def _draw_by_head(panel: _Panel, inspection: Inspection, values: np.ndarray, label: str, **style: Any) -> None:
    """
    Draw a heat map of the slots of all heads, for memories whose heads have separate slots.

    :param values: (T, H, S).
    :param label: Label of the colour bar.
    :param style: Options of :meth:`_Panel.map`.
    """
    _, heads, slots = values.shape
    panel.map(values.reshape(len(values), -1).T, label, **style)
    for head in range(1, heads):
        panel.axes.axhline(head * slots - 0.5, color="0.4", linewidth=0.6)
    panel.axes.set_yticks([(head + 0.5) * slots - 0.5 for head in range(heads)], [f"head {head}" for head in range(heads)])
    panel.axes.set_ylabel("slots of")


def _draw_reads_by_head(panel: _Panel, inspection: Inspection, choose: Choose) -> None:
    _draw_by_head(panel, inspection, inspection.memory["read"], "share of the read")
    panel.title("Which slot is read")


def _draw_writes(panel: _Panel, inspection: Inspection, choose: Choose) -> None:
    _draw_by_head(panel, inspection, inspection.memory["write"], "share replaced", cmap="Reds")
    panel.title("Share of each slot that is replaced by a write")


def _draw_unwritten(panel: _Panel, inspection: Inspection, choose: Choose) -> None:
    unwritten = inspection.memory.get("unwritten")
    if unwritten is None:
        unwritten = np.cumprod(1 - inspection.memory["write"], axis=0)
        unwritten = np.concatenate([np.ones_like(unwritten[:1]), unwritten[:-1]])
    _draw_by_head(panel, inspection, 1 - unwritten, "share written", top=1, cmap="Blues")
    panel.title("Share of each slot that was ever written")


def _draw_shares(panel: _Panel, inspection: Inspection, choose: Choose) -> None:
    memory = inspection.memory
    panel.lines(choose(memory["null"])[:, None], ["null vector"], color="tab:gray")
    gate = memory.get("gate")
    if gate is not None:
        several = gate.shape[1] > 1
        names = [f"write gate, head {index}" if several else "write gate" for index in range(gate.shape[1])]
        panel.lines(gate, names)
        if "usage" in memory:
            panel.axes.axhline(0.5, color="tab:red", linewidth=0.8, linestyle="--", label="open above")
    panel.axes.set_ylim(-0.05, 1.05)
    panel.axes.set_ylabel("share")
    panel.title("Share of the read that is the null vector" + (", and the write gate" if gate is not None else ""))
    panel.legend()


def _draw_rewards(panel: _Panel, inspection: Inspection, choose: Choose) -> None:
    steps = np.arange(inspection.steps)
    good = inspection.rewards >= 0
    for chosen, colour in ((good, "tab:green"), (~good, "tab:red")):
        panel.axes.vlines(
            steps[chosen], 0, inspection.rewards[chosen], color=colour, linewidth=max(0.8, min(4, 300 / len(steps)))
        )
    panel.axes.axhline(0, color="0.5", linewidth=0.6)
    panel.axes.set_ylabel("reward")


def _draw_actions(panel: _Panel, inspection: Inspection, choose: Choose) -> None:
    _draw_numbers(panel, inspection.actions, "action")


def _draw_observations(panel: _Panel, inspection: Inspection, choose: Choose) -> None:
    assert inspection.observations is not None
    _draw_numbers(panel, inspection.observations, "observation")


def _draw_numbers(panel: _Panel, values: np.ndarray, name: str) -> None:
    """Draw discrete values as markers and continuous ones as lines."""
    if np.issubdtype(values.dtype, np.integer):
        from matplotlib.ticker import MaxNLocator

        style: dict[str, Any] = {"linestyle": "", "marker": "s", "markersize": max(1.5, min(4, 250 / panel.steps))}
        panel.axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=5 if np.ptp(values) < 5 else 4, min_n_ticks=1))
    else:
        style = {}
    labels = [name if values.shape[1] == 1 else f"{name} {index}" for index in range(values.shape[1])]
    panel.lines(values, labels, **style)
    panel.axes.margins(y=0.2)
    panel.axes.set_ylabel(name)
    if len(labels) > 1:
        panel.legend()
