"""Trains one configuration with several seeds: a process and a folder for each, one plot and one table of all."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from sb3_cyborg.checks import check_positive
from sb3_cyborg.seeds.jobs import FINISHED, LocalJob, Outcome, Start, run_jobs
from sb3_cyborg.seeds.seed_runs import SeedRun, check_group, group_folder, write_settings
from sb3_cyborg.seeds.table import seeds_table
from sb3_cyborg.trainers.checkpoints import write_text
from sb3_cyborg.trainers.config import TrainerConfig
from sb3_cyborg.trainers.run_lock import RunLock
from sb3_cyborg.viewers.plotting import plot_learning_curves

PLOT_FILE, TABLE_FILE = "learning_curves.png", "seeds.md"


class SeedsResult(NamedTuple):
    """
    The result of :func:`train_seeds`.

    :param group: Folder of the group.
    :param outcomes: The end of each run.
    :param table: The table, as in the file :data:`TABLE_FILE` of the group.
    """

    group: Path
    outcomes: list[Outcome]
    table: str


def train_seeds(
    config: TrainerConfig,
    seeds: Sequence[int],
    jobs: int = 1,
    *,
    trust: bool = False,
    start: Start = LocalJob,
    tell: Callable[[str], None] = print,
) -> SeedsResult:
    """
    Train one configuration with several seeds, each in a process of its own with one thread.

    The runs are in a folder: ``run_name`` in ``log_dir``, or ``<env>_seeds``.

    ======================= ===========================================================================================
    ``settings.yaml``       the settings of all seeds
    ``seed_0/``, …          the run of each seed, as :class:`~sb3_cyborg.trainers.trainer_v7.TrainerV7` writes it
    ``seed_0.log``, …       the output of its processes
    ``learning_curves.png`` the mean over the finished runs with its 95 % bootstrap interval
    ``seeds.md``            the returns of each seed, their mean over the n finished runs and its 95 % t interval
    ======================= ===========================================================================================

    A second call with the same settings continues: finished seeds are left out, others are resumed. It may have other seeds,
    and other values of the settings that may change in a resumed run, e.g. more ``total_timesteps``.

    :param config: Settings; ``seed`` is not used.
    :param seeds: The seeds.
    :param jobs: Number of runs at a time, at least 1.
    :param trust: Whether runs that are resumed may load pickled objects and import the modules that their files name.
    :param start: Starts the job of a run, on this machine or on a cluster.
    :param tell: Gets a line for each start and each end of a run.
    :return: The folder, the end of each run, and the table.
    :raises ValueError: if the folder is that of a run, or holds seeds with other settings.
    :raises RunInUseError: if another process trains seeds in the folder.
    """
    check_positive(jobs=jobs)
    group = group_folder(config)
    check_group(group, config)
    group.mkdir(parents=True, exist_ok=True)
    with RunLock(group):
        check_group(group, config)  # again: another process may have made the group
        write_settings(group, config)
        outcomes = run_jobs([SeedRun(group, seed, trust) for seed in seeds], jobs, start, tell)
        table = seeds_table(outcomes)
        write_text(group / TABLE_FILE, table)
        tell(f"table: {group / TABLE_FILE}")
        if finished := [outcome.run.folder for outcome in outcomes if outcome.state == FINISHED]:
            try:
                plot_learning_curves(finished, group / PLOT_FILE, labels=[group.name])
                tell(f"plot: {group / PLOT_FILE}")
            except ValueError as error:  # e.g. of a run without a finished episode
                tell(f"no plot: {error}")
    return SeedsResult(group, outcomes, table)
