"""
Draw ``docs/images/burn_in.png``: which steps a sequence is trained on, replays, and never touches.

    python docs/figures/burn_in.py
"""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

N_STEPS, SEQ_LEN, BURN_IN = 16, 4, 6
EPISODE_START = 10
ACTED, REPLAYED, TRAINED, PADDING, BEFORE = "#d9dee7", "#9ec9f5", "#f6a04d", "white", "#f3f3f3"
KEPT, RESET = "#2b6cb0", "#c53030"


def box(axes: Axes, step: int, y: float, colour: str, text: str = "", style: str = "-", edge: str = "0.35") -> None:
    axes.add_patch(Rectangle((step, y), 0.92, 0.7, facecolor=colour, edgecolor=edge, linestyle=style, linewidth=1))
    axes.text(step + 0.46, y + 0.34, text, ha="center", va="center", fontsize=9, color="0.15")


def draw_rollout(axes: Axes, y: float) -> None:
    axes.add_patch(Rectangle((-BURN_IN, y), BURN_IN - 0.08, 0.7, facecolor=BEFORE, edgecolor="0.75"))
    axes.text(-BURN_IN / 2, y + 0.34, "the rollout before, acted\nwith older weights", ha="center", va="center", fontsize=9)
    for step in range(N_STEPS):
        box(axes, step, y, ACTED, str(step))
    axes.plot([EPISODE_START - 0.04] * 2, [0, y + 0.7], color=RESET, linewidth=1.2, linestyle="--", zorder=0)
    axes.text(EPISODE_START - 0.04, y + 0.9, "an episode starts: the state is reset", ha="center", fontsize=9, color=RESET)
    axes.plot([EPISODE_START - 0.04] * 2, [y - 0.04, y + 0.74], color=RESET, linewidth=2.5)
    for anchor in sorted({max(0, start - BURN_IN) for start in range(0, N_STEPS, SEQ_LEN)}):
        axes.plot(anchor + 0.06, y - 0.3, marker="D", color=KEPT, markersize=8)


def draw_sequence(axes: Axes, start: int, y: float) -> None:
    prefix = min(start, BURN_IN)
    for step in range(start - BURN_IN, start - prefix):
        box(axes, step, y, PADDING, style=":", edge="0.5")
    for step in range(start - prefix, start):
        box(axes, step, y, REPLAYED, str(step))
    for step in range(start, start + SEQ_LEN):
        box(axes, step, y, TRAINED, str(step))
    if start - prefix < EPISODE_START < start + SEQ_LEN:
        axes.plot([EPISODE_START - 0.04] * 2, [y - 0.04, y + 0.74], color=RESET, linewidth=2.5)
    axes.plot(start - prefix + 0.06, y + 0.34, marker="D", color=KEPT, markersize=8, zorder=5)
    arrow = {"arrowstyle": "->", "color": "0.25", "linewidth": 1.4}
    inside = [EPISODE_START] if start < EPISODE_START < start + SEQ_LEN else []
    for first, end in zip([start, *inside], [*inside, start + SEQ_LEN], strict=True):
        axes.annotate("", xy=(first, y - 0.14), xytext=(end - 0.08, y - 0.14), arrowprops=arrow)
        axes.plot([first] * 2, [y - 0.24, y - 0.04], color="0.25", linewidth=2)
    axes.text(-BURN_IN - 0.3, y + 0.34, f"sequence {start // SEQ_LEN}", ha="right", va="center", fontsize=9)


def main() -> None:
    figure = Figure(figsize=(11, 5.6), layout="constrained")
    axes = figure.subplots()
    draw_rollout(axes, 5.6)
    axes.text(-BURN_IN - 0.3, 5.94, "acting", ha="right", va="center", fontsize=9)
    for index, start in enumerate(range(0, N_STEPS, SEQ_LEN)):
        draw_sequence(axes, start, 3.7 - 1.1 * index)
    handles = [
        axes.plot([], [], marker="D", color=KEPT, linestyle="", markersize=8, label="state as acting had it, kept here")[0],
        Patch(facecolor=REPLAYED, edgecolor="0.35", label="burn-in: replayed without gradient, in no loss"),
        Patch(facecolor=TRAINED, edgecolor="0.35", label="trained on (arrows: how far gradients go back)"),
        Patch(facecolor=PADDING, edgecolor="0.5", linestyle=":", label="padding: never computed"),
    ]
    axes.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.01), ncols=2, frameon=False, fontsize=9)
    axes.set_title(f"n_steps={N_STEPS}, seq_len={SEQ_LEN}, burn_in={BURN_IN}, one environment", fontsize=11, y=0.99)
    axes.set(xlim=(-BURN_IN - 2.6, N_STEPS + 0.3), ylim=(-0.1, 7))
    axes.axis("off")
    figure.savefig(Path(__file__).resolve().parent.parent / "images" / "burn_in.png", dpi=110)


if __name__ == "__main__":
    main()
