"""
The table and the plots of the learning benchmark, from its two CSV files: ``python -m benchmarks.learning_report``.

Writes ``learning.md`` and, if there are runs for them, ``learning_curves.png``, ``learning_kinds.png`` and
``learning_burn_in.png``. ``-`` marks runs that do not exist. The table is also written into ``docs/results.md``, between its
two marks.
"""

import argparse
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.learning import CURVES, RESULTS, RUNS, digest_today, latest, read
from benchmarks.learning_tasks import (
    AGENTS,
    BEST,
    BURN_IN_AGENTS,
    BURN_IN_EPOCHS,
    BURN_IN_TASKS,
    BURN_INS,
    DEFAULT,
    ENCODER_AGENTS,
    ENCODER_TASKS,
    FRAME_STACK,
    GRIDS,
    KIND_TASKS,
    KINDS,
    MASK_AGENTS,
    MASK_TASKS,
    STUDY_STEPS,
    TASKS,
    Task,
    burn_in_agent,
    kind_agent,
    the_same,
)
from sb3_cyborg.encoders.encoder_v7 import ENCODERS
from sb3_cyborg.memories.memory_v7 import MEMORIES

Rows = list[dict[str, str]]
Cells = Mapping[tuple[str, str], Rows]
"""Rows by task and agent."""

RESAMPLES = 2000
LINE_WIDTHS = (5.0, 3.8, 2.7, 1.8, 1.0)
"""Widths of the curves of the agents. Later ones are on top of earlier ones and narrower, so that all can be seen."""
LONG_RUN = 300.0
"""Duration of a run, in seconds, above which three seeds are sufficient."""
DOCS = Path(__file__).parent.parent / "docs" / "results.md"
EARLIER = "†"
"""Marks runs with earlier settings or defaults of the agent, which should be repeated."""
BEGIN, END = "<!-- `make results` writes from here -->", "<!-- to here -->"


def by_cell(rows: Rows) -> dict[tuple[str, str], Rows]:
    """:return: Rows by task and agent, in order of the seeds (and of the steps)."""
    cells: dict[tuple[str, str], Rows] = defaultdict(list)
    for row in sorted(rows, key=lambda row: (int(row["seed"]), int(row["steps"]))):
        cells[row["task"], row["agent"]].append(row)
    return dict(cells)


def scores(rows: Rows, task: Task) -> np.ndarray:
    """:return: The scores of the final policies, one per seed, in the metric of the task."""
    return np.array([float(row[task.metric]) for row in rows])


def solved(values: np.ndarray, task: Task) -> int | None:
    """:return: How many of the runs solved the task; ``None`` for a task without a threshold."""
    return None if task.solved is None else int(np.sum(values >= task.solved))


def target_rows(name: str, cells: Cells) -> Rows:
    """:return: The rows of the agent that the target of a task refers to."""
    return cells.get((name, the_same(TASKS[name], name, TASKS[name].agent)), [])


def is_met(name: str, cells: Cells) -> bool | None:
    """:return: Whether the existing runs of MemoryPPO reach the target; ``None`` if runs are missing."""
    task = TASKS[name]
    rows = target_rows(name, cells)
    if not rows:
        return None
    values = scores(rows, task)
    if task.above is not None:
        peer, margin = task.above
        others = cells.get((name, peer))
        return bool(values.mean() >= scores(others, task).mean() + margin) if others else None
    if task.seeds_solved is not None:
        return bool(np.sum(values >= task.solved) * 5 >= task.seeds_solved * len(values))
    return bool(values.mean() >= task.solved)


def seeds_counted(number: int) -> str:
    """:return: The number of seeds with its unit."""
    return f"{number} seed{'s' * (number != 1)}"


def seeds_short(name: str, cells: Cells) -> str:
    """:return: A remark if there are fewer seeds than a target needs: five, or three for long runs."""
    if is_met(name, cells) is None:
        return ""
    rows = target_rows(name, cells)
    wanted = 5 if min(float(row["wall_s"]) for row in rows) < LONG_RUN else 3
    return f" so far, {seeds_counted(len(rows))}" if len(rows) < wanted else ""


def cell(rows: Rows | None, task: Task) -> str:
    """:return: Mean and standard deviation over the seeds, the number of solved ones, and a mark if settings have changed."""
    if not rows:
        return "-"
    values = scores(rows, task)
    digits = 1 if np.abs(values).max() >= 10 else 2
    done = solved(values, task)
    seeds = seeds_counted(len(values)) if done is None else f"{done}/{len(values)}"
    first = rows[0]  # all rows have the same digest
    mark = "" if first["digest"] == digest_today(first["task"], first["agent"]) else EARLIER
    return f"{values.mean():.{digits}f} ± {values.std():.{digits}f} ({seeds}){mark}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def main_table(cells: Cells) -> str:
    words = {None: "-", True: "met", False: "**missed**"}
    rows = []
    for name in GRIDS["table"][0]:
        task = TASKS[name]
        goal = task.goal if task.agent == DEFAULT else f"{task.goal}, best"
        same = the_same(task, name, BEST) == DEFAULT
        results = ["the same" if agent == BEST and same else cell(cells.get((name, agent)), task) for agent in AGENTS]
        reached = words[is_met(name, cells)] + seeds_short(name, cells)
        rows.append([name, f"{task.steps:,}", goal, task.beat, reached, *results])
    return table(["task", "budget", "target", "to beat", "reached", *AGENTS], rows)


def mask_table(cells: Cells) -> str:
    """:return: The table of the tasks with action masks."""
    rows = []
    for name in MASK_TASKS:
        results = [cell(cells.get((name, agent)), TASKS[name]) for agent in MASK_AGENTS]
        rows.append([name, f"{TASKS[name].steps:,}", *results])
    return table(["task", "budget", *MASK_AGENTS], rows)


def encoder_table(cells: Cells) -> str:
    """:return: The table of encoders: score, median of the steps at which runs were solved first, and minutes of CPU time."""
    rows = []
    for name in ENCODER_TASKS:
        results = []
        for agent in ENCODER_AGENTS:
            runs = cells.get((name, agent), [])
            text = cell(runs, TASKS[name])
            if runs:
                # Runs that were never solved count as later than the others.
                first = sorted(float(row["solved_at"] or "inf") for row in runs)[len(runs) // 2]
                text += f"; {'-' if first == math.inf else f'{first / 1000:,.0f}k'}"
                text += f"; {np.mean([float(row['cpu_s']) for row in runs]) / 60:.1f} min"
            results.append(text)
        rows.append([name, *results])
    return table(["task", *(agent.partition(" ")[0].replace("+", "/") for agent in ENCODER_AGENTS)], rows)


def cost_table(cells: Cells) -> str:
    rows = []
    for name in GRIDS["table"][0]:
        costs = []
        for agent in AGENTS:
            runs = cells.get((name, agent), [])
            minutes = [float(row["wall_s"]) / 60 for row in runs]
            speed = [int(row["steps"]) / max(float(row["wall_s"]) - float(row["eval_s"]), 0.1) for row in runs]
            costs.append(f"{np.mean(minutes):.1f} ({np.mean(speed):,.0f})" if runs else "-")
        rows.append([name, *costs])
    return table(["task", *AGENTS], rows)


def lost(cells: Cells) -> list[str]:
    """:return: A line for each run that solved its task at an earlier evaluation, but not with its final policy."""
    lines = []
    for (name, agent), rows in cells.items():
        task = TASKS[name]
        for row in rows:
            if task.solved is not None and row["solved_at"] and float(row[task.metric]) < task.solved:
                final = float(row[task.metric])
                lines.append(f"- {name}, {agent}, seed {row['seed']}: best {float(row['best']):.3f}, final {final:.3f}")
    return lines


def curves_of(rows: Rows, task: Task) -> tuple[np.ndarray, np.ndarray]:
    """:return: Steps (P,), and the scores at these steps (seeds, P)."""
    seeds: dict[str, Rows] = defaultdict(list)
    for row in rows:
        seeds[row["seed"]].append(row)
    steps = np.array([int(row["steps"]) for row in next(iter(seeds.values()))], dtype=float)
    values = [np.interp(steps, [int(row["steps"]) for row in seed], scores(seed, task)) for seed in seeds.values()]
    return steps, np.array(values)


def bootstrap_band(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """
    :param values: One row per seed, (seeds, ...).
    :return: Lower and upper end of the 95% interval of the mean over seeds, each (...): percentiles over resampled seeds.
    """
    drawn = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.percentile(values[drawn].mean(1), [2.5, 97.5], axis=0)
    return low, high


def kinds_table(name: str, cells: Cells) -> str:
    rows = [
        [encoder, *(cell(cells.get((name, kind_agent(encoder, memory))), TASKS[name]) for memory in MEMORIES)]
        for encoder in ENCODERS
    ]
    return table(["encoder", *MEMORIES], rows)


def burn_in_rows(name: str, cells: Cells, curves: Cells) -> list[list[str]]:
    """:return: A row for each setting: the final score, and the mean score over the training."""
    rows = []
    for agent in BURN_IN_AGENTS:
        if (name, agent) in cells:
            _, values = curves_of(curves[name, agent], TASKS[name])
            rows.append([agent, cell(cells[name, agent], TASKS[name]), f"{values.mean():.3f} ± {values.mean(1).std():.3f}"])
    return rows


# --- plots ------------------------------------------------------------------------------------------------------------


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    _pyplot().close(figure)


def _draw_task(name: str, curves: Cells, axis: Any) -> None:
    """Draws the mean evaluations of each agent on a task, with their 95% bands."""
    task, seeds = TASKS[name], list[str]()
    for number, agent in enumerate(AGENTS):
        if (name, agent) in curves:
            steps, values = curves_of(curves[name, agent], task)
            axis.plot(steps / 1000, values.mean(0), color=f"C{number}", linewidth=LINE_WIDTHS[number], label=agent)
            if len(values) > 1:
                axis.fill_between(steps / 1000, *bootstrap_band(values), color=f"C{number}", alpha=0.2, linewidth=0)
            seeds.append(str(len(values)))
    if task.solved is not None:
        axis.axhline(task.solved, color="black", linewidth=1, linestyle=":", label="threshold of a solved task")
    axis.set_title(f"{name} (seeds: {', '.join(seeds)})", fontsize=9)
    axis.set(ylabel=f"mean {task.metric} of an evaluation", xlabel="environment steps, thousands")


def draw_curves(curves: Cells, path: Path) -> bool:
    """Draws the evaluations during training, one panel per task. :return: Whether there are runs."""
    names = [name for name in TASKS if name not in MASK_TASKS and any((name, agent) in curves for agent in AGENTS)]
    if not names:
        return False
    columns = min(4, len(names))
    lines = -(-len(names) // columns)
    figure, axes = _pyplot().subplots(lines, columns, figsize=(4 * columns, 3.1 * lines), squeeze=False)
    for axis in axes.flat[len(names) :]:
        axis.set_axis_off()
    for name, axis in zip(names, axes.flat, strict=False):
        _draw_task(name, curves, axis)
    found = {label: h for axis in axes.flat for h, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    handles = {label: found.pop(label) for label in AGENTS if label in found} | found
    figure.legend(handles.values(), handles, loc="upper center", ncols=len(handles), bbox_to_anchor=(0.5, 0.0))
    figure.suptitle(
        "Mean over the seeds (their numbers in order of the legend). Band: 95% bootstrap interval, for several seeds.\n"
        "Widths differ so that lines on top of each other can be seen.",
        fontsize=10,
    )
    figure.tight_layout(rect=(0, 0, 1, 0.99))
    figure.savefig(path, dpi=100, bbox_inches="tight")
    _pyplot().close(figure)
    return True


def draw_kinds(cells: Cells, path: Path) -> bool:
    """Draws a heat map of encoders and memories for each task. :return: Whether there are runs."""
    names = [name for name in KIND_TASKS if any((name, agent) in cells for agent in KINDS)]
    if not names:
        return False
    figure, axes = _pyplot().subplots(1, len(names), figsize=(5 * len(names), 4), squeeze=False)
    for name, axis in zip(names, axes.flat, strict=True):
        values = np.full((len(ENCODERS), len(MEMORIES)), np.nan)
        for i, encoder in enumerate(ENCODERS):
            for j, memory in enumerate(MEMORIES):
                if rows := cells.get((name, kind_agent(encoder, memory))):
                    values[i, j] = scores(rows, TASKS[name]).mean()
                text = "-" if np.isnan(values[i, j]) else f"{values[i, j]:.2f}"
                axis.text(j, i, text, ha="center", va="center", bbox={"facecolor": "white", "alpha": 0.6, "linewidth": 0})
        # The range is fixed, from below the score of guesses to the maximum, because a fitted range exaggerates differences.
        image = axis.imshow(values, cmap="viridis", aspect="auto", vmin=-0.5, vmax=1.0)
        axis.set_xticks(range(len(MEMORIES)), list(MEMORIES))
        axis.set_yticks(range(len(ENCODERS)), list(ENCODERS))
        axis.set(title=name, xlabel="memory", ylabel="encoder")
        figure.colorbar(image, ax=axis, label=f"mean {TASKS[name].metric} of the final policy, one to three seeds")
    _save(figure, path)
    return True


def draw_burn_in(curves: Cells, path: Path) -> bool:
    """Draws the final score and the mean score over the training against burn-in. :return: Whether there are runs."""
    names = [name for name in BURN_IN_TASKS if any((name, agent) in curves for agent in BURN_IN_AGENTS)]
    if not names:
        return False
    figure, axes = _pyplot().subplots(2, len(names), figsize=(4 * len(names), 6), squeeze=False, sharex=True)
    for column, name in enumerate(names):
        for n_epochs in BURN_IN_EPOCHS:
            agents = {burn_in: burn_in_agent(burn_in, n_epochs) for burn_in in BURN_INS}
            done = {
                b: curves_of(curves[name, agent], TASKS[name])[1] for b, agent in agents.items() if (name, agent) in curves
            }
            for axis, last in zip(axes[:, column], (True, False), strict=True):
                values = [v[:, -1] if last else v.mean(1) for v in done.values()]
                means = np.array([v.mean() for v in values])
                bands = np.array([bootstrap_band(v) for v in values]).reshape(-1, 2)
                errors = np.abs(bands.T - means)  # matplotlib expects distances, first below the mean
                axis.errorbar(list(done), means, errors, marker="o", capsize=3, label=f"{n_epochs} epochs")
                axis.set(ylabel=f"{TASKS[name].metric}, {'final' if last else 'mean over training'}", xticks=list(BURN_INS))
        axes[0, column].set_title(name)
        axes[1, column].set_xlabel("burn_in")
    axes[0, 0].legend()
    _save(figure, path)
    return True


# --- the report -------------------------------------------------------------------------------------------------------


def report(out: Path) -> str:
    """:return: The text of ``learning.md``. The plots are written to the same folder."""
    all_rows = [row for row in read(out / RUNS) if row["task"] in TASKS]
    rows = latest(all_rows)
    finished = {(row["task"], row["agent"], row["digest"], row["seed"]) for row in rows}
    points = [p for p in latest(read(out / CURVES)) if (p["task"], p["agent"], p["digest"], p["seed"]) in finished]
    cells, curves = by_cell(rows), by_cell(points)
    parts = [
        "Final policies, acting with `deterministic=True`: the mean over seeds of the mean of 100 evaluation episodes, ± the "
        "standard deviation over seeds, and in brackets how many seeds are solved. "
        f"`best` targets are {BEST}'s, the others {DEFAULT}'s. "
        f"{FRAME_STACK} sees as many frames as the task requires if that is at most 257, else 4. "
        f"{EARLIER}: run with settings or defaults that have changed since. "
        f"Written by `python -m benchmarks.learning_report` from `{RUNS}` and `{CURVES}`.",
        main_table(cells),
        "Minutes per run, and steps per second without evaluation, with one thread:",
        cost_table(cells),
    ]
    if any((name, agent) in cells for name in MASK_TASKS for agent in MASK_AGENTS):
        parts += ["**Tasks with action masks**, acting with `deterministic=False`:", mask_table(cells)]
    if gone := lost(cells):
        parts += ["Solved at an evaluation during training, but not at the end:", "\n".join(gone)]
    if draw_curves(curves, out / "learning_curves.png"):
        parts += [
            "Mean over seeds, with the 95% bootstrap interval where there are several; dotted: threshold of a solved task.",
            "![Learning curves](learning_curves.png)",
        ]
    studied = f", after {STUDY_STEPS:,} steps"
    if draw_kinds(cells, out / "learning_kinds.png"):
        for name in KIND_TASKS:
            parts += [f"**Encoders and memories on {name}{studied}**", kinds_table(name, cells)]
        parts.append("![Encoders and memories](learning_kinds.png)")
    if any((name, agent) in cells for name in ENCODER_TASKS for agent in ENCODER_AGENTS):
        parts += [
            f"**Encoders{studied}**: the score; the steps after which it was solved first (median of the seeds, `-` if most "
            "never were); CPU time with evaluations:",
            encoder_table(cells),
        ]
    if draw_burn_in(curves, out / "learning_burn_in.png"):
        for name in BURN_IN_TASKS:
            if lines := burn_in_rows(name, cells, curves):
                parts += [f"**Burn-in on {name}{studied}**", table(["settings", "final", "mean over training"], lines)]
        parts.append("![Burn-in](learning_burn_in.png)")
    if rows:
        commits, versions = {row["commit"] for row in rows}, {row["versions"] for row in rows}
        parts.append(f"{len(rows)} runs; commits {', '.join(sorted(commits))}; {'; '.join(sorted(versions))}.")
    if left := len(all_rows) - len(rows):
        parts.append(f"{left} rows of earlier settings or of repeated runs are left out.")
    return "\n\n".join(parts) + "\n"


def with_table(text: str, out: Path) -> str:
    """
    :param text: A text that contains the two marks.
    :param out: Folder of the CSV files.
    :return: The text with the table between the marks.
    """
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    cells = by_cell(latest([row for row in read(out / RUNS) if row["task"] in TASKS]))
    return f"{before}{BEGIN}\n\n{main_table(cells)}\n\n{END}{after}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=RESULTS, help="folder of the CSV files and the report (default: %(default)s)"
    )
    out = parser.parse_args(argv).out
    if not (out / RUNS).is_file():
        parser.error(f"there is no {out / RUNS}: run `python -m benchmarks.learning` first")
    (out / "learning.md").write_text(report(out))
    print(f"Written to {out / 'learning.md'}")
    if out.resolve() == RESULTS.resolve():
        DOCS.write_text(with_table(DOCS.read_text(), out))


if __name__ == "__main__":
    main()
