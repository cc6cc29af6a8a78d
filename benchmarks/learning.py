"""
The learning benchmark: runs a grid of (task, agent, seed), with one process per run and one thread per process.

    python -m benchmarks.learning --tasks MemoryChain-64 RepeatPreviousMedium --agents memory_ppo recurrent_ppo --seeds 0-4

A finished run is added to ``learning_runs.csv`` and ``learning_curves.csv``, the only output, and is not repeated unless its
settings change. The command can be interrupted and started again; only runs in progress are lost. The first seeds of all
agents run before the second ones, so that an interrupted grid has equally many seeds of each agent. ``--list`` shows tasks,
agents and finished runs.

A run trains an agent with its settings from ``benchmarks.learning_tasks`` (in RL Zoo's form, read by RL Zoo's own code) for
the task's steps. It is evaluated in separate environments, with ``deterministic=True`` unless the task says otherwise: the
final policy in 100 episodes, and every 5% of the training in 10 or 20 episodes. Needs ``pip install
"sb3-cyborg[envs,zoo]"``. ``python -m benchmarks.learning_report`` writes the table and the plots.
"""

import os

# Set before torch is imported, and inherited by the processes. Policies of this size run slower on several threads.
os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")

import argparse
import csv
import fcntl
import functools
import io
import multiprocessing
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from importlib import import_module
from importlib.metadata import version
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import rl_zoo3
import torch as th
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecEnv, VecFrameStack, VecNormalize, sync_envs_normalization

from benchmarks.learning_tasks import (
    AGENTS,
    GRIDS,
    MASK_AGENTS,
    TASKS,
    Settings,
    Task,
    as_json,
    digest,
    register,
    settings,
    the_same,
)
from sb3_cyborg import make_memory_vec_env
from sb3_cyborg.checks import unknown_name
from sb3_cyborg.maskable import evaluate_policy

RESULTS = Path(__file__).parent / "results"
RUNS, CURVES = "learning_runs.csv", "learning_curves.csv"
EVALUATIONS, FINAL_EPISODES = 20, 100
CURVE_SEED, FINAL_SEED = 1_000_000, 2_000_000
"""First seeds of the evaluation environments; 1000 times the seed of the run is added to them."""
PACKAGES = ("torch", "stable-baselines3", "sb3-contrib", "gymnasium", "numpy")

Row = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One run of the grid."""

    task: Task
    name: str
    agent: str
    seed: int

    def __str__(self) -> str:
        return f"{self.name}, {self.agent}, seed {self.seed}"

    @functools.cached_property
    def settings(self) -> Settings:
        """The settings when the run was planned. The process runs these, and the row and the digest refer to these."""
        return settings(self.task, self.name, self.agent)

    @functools.cached_property
    def digest(self) -> str:
        return digest(self.settings, self.evaluation)

    @property
    def evaluation(self) -> tuple[int, ...]:
        """The numbers that define the evaluation; that of modes, which all earlier runs have, adds none."""
        return (EVALUATIONS, self.task.curve_episodes, FINAL_EPISODES, *([] if self.task.deterministic else [0]))

    @property
    def cell(self) -> tuple[str, str, str]:
        """The key of the run's row, without the seed."""
        return self.name, self.agent, self.digest


# --- one run ----------------------------------------------------------------------------------------------------------


class Trial:
    """
    The model and the environments of a run.

    :param run: The run to prepare.
    """

    def __init__(self, run: Run) -> None:
        self.settings, self.steps, self.task = run.settings, int(run.settings["n_timesteps"]), run.task
        entry = deepcopy(self.settings)
        algo, env_id = entry.pop("algo"), entry.pop("env")
        register()  # the Zoo's manager then supports MemoryPPO, and refuses unknown hyperparameters
        manager_class = import_module("rl_zoo3.train").ExperimentManager
        self.manager = manager_class(argparse.Namespace(), algo, env_id, log_folder="", seed=run.seed, verbose=0)
        kwargs, self.wrapper, _, _ = self.manager._preprocess_hyperparams(entry)
        self.n_envs = self.manager.n_envs
        # Their seeds are far from those of the training environments. Each environment plays one episode, all in parallel, so
        # that short episodes do not count more than long ones.
        self.curve_envs = self.make_envs(run.task.curve_episodes, CURVE_SEED + 1000 * run.seed, evaluation=True)
        self.final_envs = self.make_envs(FINAL_EPISODES, FINAL_SEED + 1000 * run.seed, evaluation=True)
        envs = self.make_envs(self.n_envs, run.seed)
        self.model: BaseAlgorithm = rl_zoo3.ALGOS[algo](env=envs, seed=run.seed, device="cpu", **kwargs)

    def make_envs(self, n_envs: int, seed: int, *, evaluation: bool = False) -> VecEnv:
        """:return: Environments with RL Zoo's wrappers, in the native form if there is one."""
        manager = self.manager
        envs = make_memory_vec_env(
            self.settings["env"], n_envs, seed=seed, env_kwargs=manager.env_kwargs, wrapper_class=self.wrapper
        )
        if manager.normalize:
            fixed = {"norm_reward": False, "training": False} if evaluation else {}
            envs = VecNormalize(envs, **{**manager.normalize_kwargs, **fixed})
        return VecFrameStack(envs, manager.frame_stack) if manager.frame_stack else envs

    def evaluate(self, envs: VecEnv) -> Row:
        """
        :param envs: Evaluation environments; each plays one episode.
        :return: Mean and standard deviation of the returns, and the success rate if the environment reports success.
        """
        trained_in = self.model.get_env()
        assert trained_in is not None
        sync_envs_normalization(trained_in, envs)
        successes: list[bool] = []

        def note_success(local: dict[str, Any], _: dict[str, Any]) -> None:
            if local["done"] and "is_success" in local["info"]:
                successes.append(bool(local["info"]["is_success"]))

        model: Any = self.model
        returns, _ = evaluate_policy(
            model,
            envs,
            envs.num_envs,
            deterministic=self.task.deterministic,
            return_episode_rewards=True,
            callback=note_success,
            use_masking="mask" in self.settings["algo"],
        )
        success = round(float(np.mean(successes)), 4) if successes else None
        return {"return": round(float(np.mean(returns)), 4), "std": round(float(np.std(returns)), 4), "success": success}


class Evaluations(BaseCallback):
    """
    Evaluates after every 5% of the steps, at the end of an update. Ends the run if its parent process has died.

    :param trial: The run's model and environments.
    """

    def __init__(self, trial: Trial) -> None:
        super().__init__()
        self.trial = trial
        self.curve: list[Row] = []
        self.seconds = 0.0

    def _on_rollout_start(self) -> None:
        grid = multiprocessing.parent_process()
        if grid is not None and not grid.is_alive():
            sys.exit("the parent process of this run has died")
        steps = self.trial.steps
        if self.num_timesteps >= len(self.curve) * steps / EVALUATIONS and self.num_timesteps < steps:
            start = time.perf_counter()
            result = self.trial.evaluate(self.trial.curve_envs)
            self.curve.append({"steps": self.num_timesteps, **result})
            self.seconds += time.perf_counter() - start

    def _on_step(self) -> bool:
        return True


def execute(run: Run) -> tuple[Row, list[Row]]:
    """:return: The row of a run, and the rows of its learning curve."""
    th.set_num_threads(1)
    trial = Trial(run)
    evaluations = Evaluations(trial)
    start, cpu_start = time.perf_counter(), time.process_time()
    trial.model.learn(trial.steps, callback=evaluations, log_interval=None)  # type: ignore[arg-type]  # None is no log
    learned = time.perf_counter()
    final = trial.evaluate(trial.final_envs)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    curve = [*evaluations.curve, {"steps": trial.model.num_timesteps, **final}]
    scores = [point[run.task.metric] for point in curve]
    solved = run.task.solved
    solved_at = next((p["steps"] for p, s in zip(curve, scores, strict=True) if solved is not None and s >= solved), None)
    key = {"task": run.name, "agent": run.agent, "seed": run.seed}
    row = {
        **key,
        "steps": trial.model.num_timesteps,
        "wall_s": round(seconds, 1),
        "cpu_s": round(cpu_seconds, 1),
        "eval_s": round(seconds - (learned - start) + evaluations.seconds, 1),
        **final,
        "best": max(scores),
        "solved_at": solved_at,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S"),
        "commit": _commit(),
        "versions": " ".join(f"{name}={version(name)}" for name in PACKAGES),
        "threads": th.get_num_threads(),
        "digest": run.digest,
        "settings": as_json(trial.settings),
    }
    points = [
        {**key, "digest": run.digest, "steps": p["steps"], "return": p["return"], "success": p["success"]} for p in curve
    ]
    return row, points


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


# --- files ------------------------------------------------------------------------------------------------------------


def append(path: Path, rows: Sequence[Row]) -> None:
    """Adds rows to a CSV file, with a header if the file is new. Several processes may call this at the same time."""
    with path.open("a", newline="") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # released when the file closes
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        if os.fstat(file.fileno()).st_size == 0:
            writer.writeheader()
        writer.writerows(rows)
        file.write(text.getvalue())  # one write, so that a killed process leaves all rows or none


def read(path: Path) -> list[dict[str, str]]:
    """:return: The rows of a CSV file; none if the file does not exist."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        return list(csv.DictReader(file))


def latest(rows: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """:return: For each task and agent the rows of the latest settings, and of these the last row of each seed (and step)."""
    current = {(row["task"], row["agent"]): row["digest"] for row in rows}
    kept = {
        (row["task"], row["agent"], row["seed"], row.get("finished") is None and row["steps"]): row
        for row in rows
        if current[row["task"], row["agent"]] == row["digest"]
    }
    return list(kept.values())


@functools.cache
def digest_today(task: str, agent: str) -> str:
    """:return: The digest of the current settings of an agent on a task."""
    return Run(TASKS[task], task, agent, 0).digest


# --- the grid ---------------------------------------------------------------------------------------------------------


@dataclass
class Worker:
    """A run in progress."""

    run: Run
    process: BaseProcess
    start: float = field(default_factory=time.monotonic)


def _work(run: Run, connection: Connection) -> None:
    """Executes a run and sends its rows, or its traceback. Interrupts are left to the parent process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        connection.send(execute(run))
    except Exception:
        connection.send(traceback.format_exc())


class Grid:
    """
    Executes runs in processes and writes their results to files.

    :param runs: The runs, in order.
    :param out: Folder of the two CSV files.
    :param processes: Number of processes at a time.
    :param limit: Time limit of the grid, in seconds. A run is not started if the duration of other seeds with the same
        settings shows that it would end later. ``None`` sets no limit.
    :param run_limit: Time limit of a run, in seconds, after which it is ended; ``None`` sets no limit.
    """

    def __init__(
        self, runs: Sequence[Run], out: Path, processes: int, limit: float | None = None, run_limit: float | None = None
    ) -> None:
        self.waiting, self.total, self.out, self.processes = list(runs), len(runs), out, processes
        self.end = None if limit is None else time.monotonic() + limit
        self.run_limit = run_limit
        self.working: dict[Connection, Worker] = {}
        self.seconds: dict[tuple[str, str, str], float] = {}
        for row in read(out / RUNS):
            self._note_seconds((row["task"], row["agent"], row["digest"]), float(row["wall_s"]))
        self.failed: list[str] = []
        self.left: list[Run] = []
        self.finished = 0

    def _note_seconds(self, cell: tuple[str, str, str], seconds: float) -> None:
        self.seconds[cell] = max(seconds, self.seconds.get(cell, 0.0))

    def work(self) -> None:
        """Executes all runs. If it is interrupted, the runs in progress are ended, too."""
        try:
            while self.waiting or self.working:
                while self.waiting and len(self.working) < self.processes:
                    self._start(self.waiting.pop(0))
                for connection in wait(list(self.working), timeout=1.0):
                    assert isinstance(connection, Connection)
                    self._collect(connection)
                self._end_late_runs()
        finally:
            for worker in self.working.values():
                worker.process.terminate()
                worker.process.join()

    def _start(self, run: Run) -> None:
        if self.end is not None and time.monotonic() + self.seconds.get(run.cell, 0.0) >= self.end:
            self.left.append(run)
            return
        context = multiprocessing.get_context("spawn")
        receiving, sending = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(run, sending), daemon=True)
        process.start()
        sending.close()  # so that the death of the process ends the file
        self.working[receiving] = Worker(run, process)

    def _collect(self, connection: Connection) -> None:
        worker = self.working.pop(connection)
        try:
            result = connection.recv()
        except EOFError:
            result = ""
        connection.close()
        worker.process.join()
        if isinstance(result, str):
            self._fail(worker.run, result or f"its process ended with exit code {worker.process.exitcode}")
            return
        row, curve = result
        append(self.out / CURVES, curve)
        append(self.out / RUNS, [row])  # last, because a row in this file marks a finished run
        self._note_seconds(worker.run.cell, row["wall_s"])
        self._report(worker.run, describe(row))

    def _end_late_runs(self) -> None:
        for connection, worker in list(self.working.items()):
            if self.run_limit is not None and time.monotonic() - worker.start > self.run_limit and not connection.poll():
                worker.process.terminate()
                worker.process.join()
                connection.close()
                del self.working[connection]
                self._fail(worker.run, f"time limit: not finished after {self.run_limit / 60:.1f} minutes")

    def _fail(self, run: Run, reason: str) -> None:
        self.failed.append(str(run))
        self._report(run, f"FAILED: {reason}")

    def _report(self, run: Run, result: str) -> None:
        self.finished += 1
        print(f"[{self.finished}/{self.total}] {run}: {result}", flush=True)


def describe(row: Row) -> str:
    """:return: The result of a run in one line."""
    success = "" if row["success"] is None else f", success {row['success']:.2f}"
    solved = "" if row["solved_at"] is None else f", solved first at {row['solved_at']:,} steps"
    result = f"return {row['return']:.3f} ± {row['std']:.3f}{success}, best {row['best']:.3f}{solved}"
    seconds = max(row["wall_s"], 0.1)
    speed = row["steps"] / max(row["wall_s"] - row["eval_s"], 0.1)
    return f"{result}; {seconds / 60:.1f} min ({row['eval_s'] / seconds:.0%} of it evaluation), training {speed:,.0f} steps/s"


# --- the command line -------------------------------------------------------------------------------------------------


def parse_seeds(text: str) -> list[int]:
    """:return: The seeds of a text such as ``"0-4"``, ``"3"`` or ``"0,2,5-7"``."""
    seeds: list[int] = []
    try:
        for part in text.split(","):
            first, _, last = part.partition("-")
            seeds += range(int(first), int(last or first) + 1)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"seeds are like 0-4 or 0,2,5, got {text!r}") from error
    return seeds


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", choices=list(GRIDS), default="table", help="default tasks and agents (default: %(default)s)")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="default: all tasks of the grid")
    parser.add_argument(
        "--agents", nargs="+", metavar="AGENT", help='default: all agents of the grid; also "gru+kv" or "gamma=0.9"'
    )
    parser.add_argument("--seeds", type=parse_seeds, default=parse_seeds("0-4"), help="default: 0-4")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="default: one per core, %(default)s here")
    parser.add_argument("--limit-minutes", type=float, help="do not start a run that would end later")
    parser.add_argument("--run-minutes", type=float, help="end a run that takes longer")
    parser.add_argument("--steps", type=int, help="budget instead of the tasks' budgets; an agent's own n_timesteps stays")
    parser.add_argument("--redo", action="store_true", help="repeat finished runs")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV files (default: %(default)s)")
    parser.add_argument("--list", action="store_true", help="show tasks, agents, budgets and finished runs")
    parser.add_argument(
        "--prune", action="store_true", help="only remove the rows that the report leaves out from the CSV files"
    )
    args = parser.parse_args(argv)
    tasks, agents = GRIDS[args.grid]
    args.tasks, args.agents = args.tasks or list(tasks), args.agents or agents
    if args.steps and args.out.resolve() == RESULTS.resolve():
        parser.error("--steps is for trials: choose another folder with --out")
    if args.processes < 1:
        parser.error(f"--processes must be at least 1, got {args.processes}")
    return args


def plan(args: argparse.Namespace) -> list[Run]:
    """:return: The runs of a command line, in order: all tasks with the first seed, then all with the second seed."""
    for name in args.tasks:
        if name not in TASKS:
            raise unknown_name("task", name, TASKS)
    tasks = {name: replace(TASKS[name], steps=args.steps or TASKS[name].steps) for name in args.tasks}
    agents = {name: dict.fromkeys(the_same(task, name, agent) for agent in args.agents) for name, task in tasks.items()}
    return [Run(task, name, agent, seed) for seed in args.seeds for name, task in tasks.items() for agent in agents[name]]


def list_all(runs: Sequence[Run], rows: Sequence[dict[str, str]]) -> None:
    """Prints tasks and agents, and how many seeds of each are finished."""
    for agent, description in {**AGENTS, **MASK_AGENTS}.items():
        print(f"{agent:20} {description}")
    print(f"\n{'task':28}{'budget':>10}  {'goal':20} {'to beat':34} seeds done")
    for name in dict.fromkeys(run.name for run in runs):
        first = next(run for run in runs if run.name == name)
        task, budget = first.task, int(first.settings["n_timesteps"])  # an agent's name may contain a budget
        cells = dict.fromkeys((run.agent, run.digest) for run in runs if run.name == name)
        done = {(row["agent"], row["digest"], row["seed"]) for row in rows if row["task"] == name}
        counts = [f"{agent}: {sum(cell[:2] == (agent, known) for cell in done)}" for agent, known in cells]
        print(f"{name:28}{budget:>10,}  {task.goal:20} {task.beat:34} {', '.join(counts)}")


def prune(out: Path) -> None:
    """Rewrites the CSV files with the rows that the report shows: those that :func:`latest` keeps of the existing tasks."""
    for path in (out / RUNS, out / CURVES):
        rows = read(path)
        kept = [row for row in latest(rows) if row["task"] in TASKS]
        fresh = path.with_suffix(".new")
        fresh.unlink(missing_ok=True)
        if kept:
            append(fresh, kept)
            fresh.replace(path)
        else:
            path.unlink(missing_ok=True)
        print(f"{path}: {len(kept)} of {len(rows)} rows kept")


def main(argv: Sequence[str] | None = None) -> int:
    """:return: The exit code: 0 if all runs finished, 1 if runs failed, 130 after an interrupt."""
    args = parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.prune:
        prune(args.out)
        return 0
    runs = plan(args)
    rows = read(args.out / RUNS)
    if args.list:
        list_all(runs, rows)
        return 0
    done = {(row["task"], row["agent"], row["digest"], row["seed"]) for row in rows}
    todo = [run for run in runs if args.redo or (*run.cell, str(run.seed)) not in done]
    print(f"{len(todo)} runs to do, {len(runs) - len(todo)} done already.", flush=True)
    limits = [None if minutes is None else 60 * minutes for minutes in (args.limit_minutes, args.run_minutes)]
    grid = Grid(todo, args.out, args.processes, *limits)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))
    try:
        grid.work()
    except KeyboardInterrupt:
        print("interrupted; the same command continues from here", file=sys.stderr)
        return 130
    if grid.left:
        print(f"Not started, because they would not end in time: {'; '.join(map(str, grid.left))}")
    if grid.failed:
        print(f"Failed: {'; '.join(grid.failed)}")
    return int(bool(grid.failed))


if __name__ == "__main__":
    sys.exit(main())
