"""Runs the seeds of a group as jobs of a cluster, through submitit (https://github.com/facebookincubator/submitit)."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sb3_cyborg.checks import unknown_name
from sb3_cyborg.seeds.jobs import POLL_SECONDS, LocalJob
from sb3_cyborg.seeds.seed_runs import SeedRun

CLUSTERS = ("slurm", "local")
"""Executors of submitit; ``local`` starts processes on this machine, for tests."""
DEFAULTS = {"cpus_per_task": 1, "timeout_min": 24 * 60}
"""Options of submitit, which ``--cluster-options`` override. Its own limit is 5 minutes."""


class Task:
    """:param run: The run that the job of a cluster starts or resumes."""

    def __init__(self, run: SeedRun) -> None:
        self.run = run
        self.process: LocalJob | None = None

    def __call__(self) -> int:
        """:return: The exit code of the run."""
        self.process = LocalJob(self.run)
        try:
            while (code := self.process.poll()) is None:
                time.sleep(POLL_SECONDS)
        finally:
            self.process.stop(at_once=False)
        return code

    def checkpoint(self) -> Any:
        """:return: The task for a new job. submitit calls this before a job is preempted, and at its limit of time."""
        import submitit

        if self.process is not None:
            self.process.stop(at_once=False)
            self.process.process.wait()
        return submitit.helpers.DelayedSubmission(Task(self.run))


class ClusterJob:
    """:param job: A job of submitit. :param run: Its run."""

    def __init__(self, job: Any, run: SeedRun) -> None:
        self.job, self.run = job, run

    def poll(self) -> int | None:
        """:return: The exit code of the run, 1 for a job that the cluster has ended; ``None`` while it waits or runs."""
        if not self.job.done():
            return None
        try:
            return int(self.job.result())
        except Exception as error:  # of several types: cancelled, out of time too often, a node that was lost
            lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
            with open(self.run.log, "a", encoding="utf-8") as log:
                log.write(f"sb3-cyborg: error: job {self.job.job_id} has no result: {lines[0]} See {self.job.paths.stderr}.\n")
            return 1

    def stop(self, at_once: bool) -> None:
        """Cancel the job: the cluster sends ``SIGTERM``, at which the run saves a checkpoint, later ``SIGKILL``."""
        self.job.cancel(check=False)


class ClusterJobs:
    """
    Starts runs as jobs of a cluster.

    :param cluster: One of :data:`CLUSTERS`.
    :param options: Options of submitit's ``AutoExecutor``, e.g. ``{"slurm_partition": "cpu", "mem_gb": 4}``.
    :param group: Folder of the group, on a file system that all nodes see.
    :raises ValueError: for an unknown cluster or option.
    :raises ImportError: without submitit, with the command that installs it.
    """

    def __init__(self, cluster: str, options: Mapping[str, Any], group: Path) -> None:
        if cluster not in CLUSTERS:
            raise unknown_name("cluster", cluster, CLUSTERS)
        try:
            import submitit
        except ImportError as error:
            raise ImportError('`--cluster` needs submitit: pip install "sb3-cyborg[cluster]"') from error
        if not isinstance(options, Mapping):
            raise ValueError(f"The options of a cluster are a mapping, e.g. {{mem_gb: 4}}, got {options!r}.")
        self.executor = submitit.AutoExecutor(folder=group / "cluster", cluster=cluster)
        try:
            self.executor.update_parameters(**{**DEFAULTS, **options}, nodes=1, tasks_per_node=1)
        except (NameError, TypeError, AssertionError, ValueError) as error:
            raise ValueError(f"submitit does not take the options {dict(options)}: {error}.") from error

    def __call__(self, run: SeedRun) -> ClusterJob:
        """:return: The submitted job of a run."""
        return ClusterJob(self.executor.submit(Task(run)), run)
