"""Several seeds of one configuration: which runs are started, resumed and left out; their table, plot and exit code."""

import dataclasses
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import psutil
import pytest
import yaml
from typer.testing import CliRunner

from sb3_cyborg import MemoryPPO, cli
from sb3_cyborg.seeds import jobs as jobs_module
from sb3_cyborg.seeds import train_seeds as train_module
from sb3_cyborg.seeds.cluster import ClusterJob, ClusterJobs
from sb3_cyborg.seeds.jobs import FAILED, FINISHED, STOPPED, WAITING, Outcome, run_jobs
from sb3_cyborg.seeds.seed_runs import SeedRun, group_folder, parse_seeds, write_settings
from sb3_cyborg.seeds.table import returns_of, seeds_table, t_interval, t_quantile
from sb3_cyborg.seeds.train_seeds import train_seeds
from sb3_cyborg.trainers.checkpoints import newest_file
from sb3_cyborg.trainers.config import TrainerConfig
from sb3_cyborg.trainers.run_lock import RunInUseError, RunLock
from sb3_cyborg.trainers.trainer_v7 import TrainerV7
from tests.trainer_helpers import TINY, FixedEnv

ROOT = Path(__file__).resolve().parent.parent
FRAGILE = "tests/Fragile-v0"
FLAGS = "--n-envs 1 --n-steps 16 --n-epochs 1 --hidden-dim 8 --eval-freq 0 --no-tensorboard --no-progress-bar -n 128"


class FragileEnv(FixedEnv):
    """Fails at a step in the run of seed 1, until ``repaired`` is true."""

    repaired = False

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        if seed is not None:
            self.break_at = 100 if seed == 1 and not FragileEnv.repaired else 0
        return super().reset(seed=seed)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """:return: The working directory, in which no file waits for a poll."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(jobs_module, "POLL_SECONDS", 0.0)
    monkeypatch.setitem(gym.registry, FRAGILE, gym.envs.registration.EnvSpec(FRAGILE, "tests.test_seeds:FragileEnv"))
    FragileEnv.repaired = False
    return tmp_path


class HereJob:
    """A job that has run its command in this process, which spares the seconds of an import."""

    def __init__(self, run: SeedRun) -> None:
        _, module, *arguments = run.command()[1:]
        assert module == "sb3_cyborg.cli"
        result = CliRunner().invoke(cli.app, arguments)
        with open(run.log, "a") as log:
            log.write(result.output)
        self.code = result.exit_code

    def poll(self) -> int | None:
        return self.code

    def stop(self, at_once: bool) -> None:
        raise AssertionError("the job has ended")


def settings(**changes: Any) -> TrainerConfig:
    """:return: Settings of a run of 128 steps; one environment, whose seed is that of the run."""
    return TrainerConfig.parse(
        {**TINY, "env": FRAGILE, "n_envs": 1, "total_timesteps": 128, "save_freq": 0, "eval_freq": 128} | changes
    )


def train(seeds: Sequence[int], **changes: Any) -> dict[int, Outcome]:
    """:return: The end of each run."""
    result = train_seeds(settings(**changes), seeds, start=HereJob, tell=lambda _: None)
    assert (result.group / "seeds.md").read_text() == result.table
    return {outcome.run.seed: outcome for outcome in result.outcomes}


def sessions(seed: int) -> list[int]:
    """:return: The step at which each session of a run began."""
    path = Path("runs/tests-Fragile-v0_seeds") / f"seed_{seed}" / "sessions.yaml"
    return [session["num_timesteps"] for session in yaml.safe_load(path.read_text())]


def weights(path: Path) -> np.ndarray:
    parameters = MemoryPPO.load(path, device="cpu").policy.parameters()
    return np.concatenate([parameter.detach().numpy().ravel() for parameter in parameters])


# --- seeds ------------------------------------------------------------------------------------------------------------


def test_seeds_are_numbers_and_ranges() -> None:
    assert parse_seeds("0-4") == [0, 1, 2, 3, 4]
    assert parse_seeds("7, 0,3-4") == [7, 0, 3, 4]
    assert len(parse_seeds("0-999")) == 1000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        *((text, "whole numbers and ranges") for text in ("", "a", "-1", "4-0", "0-", "1.5", "0,,1", "0..4", "٣")),
        ("1,0-3", "1 twice"),
        ("0-1000", "at most 1000"),
        ("0-9999999999", "at most 1000"),
    ],
)
def test_other_text_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_seeds(text)


# --- runs -------------------------------------------------------------------------------------------------------------


def test_a_failed_seed_does_not_end_the_others_and_a_second_call_goes_on() -> None:
    outcomes = train([0, 1, 2])
    assert {seed: outcome.state for seed, outcome in outcomes.items()} == {0: FINISHED, 1: FAILED, 2: FINISHED}
    assert outcomes[1].reason == "the simulator has died"
    check_table(list(outcomes.values()))
    group = outcomes[0].run.group
    assert {path.name for path in group.iterdir()} == {
        *(name for seed in (0, 1, 2) for name in (f"seed_{seed}", f"seed_{seed}.log")),
        *("settings.yaml", "seeds.md", "learning_curves.png", "run.lock"),
    }
    FragileEnv.repaired = True
    assert {outcome.state for outcome in train([0, 1, 2]).values()} == {FINISHED}
    assert [sessions(seed) for seed in (0, 1, 2)] == [[0], [0, 96], [0]], "finished runs are left out, the other is resumed"
    assert {outcome.state for outcome in train([0, 1, 2], total_timesteps=192).values()} == {FINISHED}
    assert [sessions(seed) for seed in (0, 1, 2)] == [[0, 128], [0, 96, 128], [0, 128]], "all go on to the new total"


def check_table(outcomes: Sequence[Outcome]) -> None:
    """The table of finished seeds 0 and 2 and of a failed seed 1 has the mean over the finished ones."""
    table = seeds_table(outcomes)
    returns = [returns_of(outcome) for outcome in outcomes]
    for column in (0, 1):
        finished = [
            value
            for outcome, values in zip(outcomes, returns, strict=True)
            if outcome.state == FINISHED and (value := values[column]) is not None
        ]
        assert f" {np.mean(finished):.3f} (n = 2) " in table
    archive = np.load(outcomes[0].run.folder / "evaluations.npz")
    assert archive["timesteps"][-1] == 128
    assert returns[0][0] == np.mean(archive["results"][-1])
    rows = [[cell.strip() for cell in line.strip("|\n ").split("|")] for line in table.splitlines()]
    assert [row[:3] for row in rows[2:5]] == [["0", FINISHED, "128"], ["1", FAILED, "96"], ["2", FINISHED, "128"]]
    assert len({len(line) for line in table.splitlines()}) == 1


def test_a_seed_is_the_run_that_train_would_make(folder: Path) -> None:
    outcome = train([2])[2]
    alone = TrainerV7(settings(seed=2, run_name="alone", log_dir=str(folder))).train()
    alone.close()
    np.testing.assert_array_equal(weights(outcome.run.folder / "final_model.zip"), weights(folder / "alone/final_model.zip"))


def test_other_settings_are_refused(folder: Path) -> None:
    group = Path("runs/tests-Fragile-v0_seeds")
    write_settings(group, settings())
    (group / "seed_0").mkdir()
    (group / "seed_0" / "config.yaml").write_text(settings(seed=0).to_yaml())
    before = {path: path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))}
    with pytest.raises(ValueError, match=r"`gamma` is 0.99 there, but 0.9 here"):
        train([0], gamma=0.9)
    with pytest.raises(ValueError, match=r"the folder of a single run"):
        train([0], log_dir="runs/tests-Fragile-v0_seeds", run_name="seed_0")
    assert {path: path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))} == before


def test_settings_that_may_change_are_flags_of_the_resumed_run() -> None:
    config = settings(total_timesteps=512, save_freq=128, tensorboard=True, torch_threads=None, device="cpu")
    run = SeedRun(Path("group"), 3, trust=True)
    write_settings(run.group, config)
    assert run.command()[3:] == [
        *("train", "--config", "group/settings.yaml", "--seed", "3", "--log-dir", "group", "--run-name", "seed_3")
    ]
    run.folder.mkdir()
    (run.folder / "config.yaml").write_text(settings(seed=3).to_yaml())
    flags = ["--total-timesteps", "512", "--save-freq", "128", "--tensorboard", "--torch-threads", "null", "--trust"]
    assert run.command()[3:] == ["train", "--resume", "group/seed_3", *flags]


def test_the_folder_of_a_group() -> None:
    assert group_folder(settings(log_dir="logs")) == Path("logs/tests-Fragile-v0_seeds")
    assert group_folder(settings(log_dir="logs", run_name="gru")) == Path("logs/gru")


def test_a_group_in_use_is_refused() -> None:
    group = Path("runs/tests-Fragile-v0_seeds")
    group.mkdir(parents=True)
    with RunLock(group), pytest.raises(RunInUseError, match="in use"):
        train([0])
    assert not (group / "seed_0").exists()


# --- jobs -------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class FakeJob:
    """A job that ends after a number of polls, or when it is stopped."""

    code: int
    polls: int = 3
    stops: list[bool] = dataclasses.field(default_factory=list)

    def poll(self) -> int | None:
        self.polls -= 1
        return self.code if self.polls < 0 else None

    def stop(self, at_once: bool) -> None:
        self.stops.append(at_once)
        self.code, self.polls = 130, 1


def fake_runs(count: int) -> list[SeedRun]:
    group = Path("group")
    write_settings(group, settings())
    return [SeedRun(group, seed) for seed in range(count)]


def test_no_more_jobs_at_a_time_than_asked_for() -> None:
    started: list[FakeJob] = []
    most = 0

    def start(run: SeedRun) -> FakeJob:
        nonlocal most
        started.append(FakeJob(code=0, polls=3 + run.seed % 2))
        most = max(most, sum(job.polls >= 0 for job in started))
        return started[-1]

    outcomes = run_jobs(fake_runs(7), 3, start, lambda _: None)
    assert [outcome.state for outcome in outcomes] == 7 * [FINISHED]
    assert (len(started), most) == (7, 3)


def test_signals_stop_all_jobs_and_start_no_further_one() -> None:
    started: list[FakeJob] = []

    def start(_: SeedRun) -> FakeJob:
        started.append(FakeJob(code=0, polls=1000))
        if len(started) == 2:
            signal.raise_signal(signal.SIGTERM)
        return started[-1]

    before = signal.getsignal(signal.SIGTERM)
    outcomes = run_jobs(fake_runs(4), 2, start, lambda _: None)
    assert [outcome.state for outcome in outcomes] == [STOPPED, STOPPED, WAITING, WAITING]
    assert [job.stops for job in started] == [[False], [False]]
    assert signal.getsignal(signal.SIGTERM) is before


def test_an_error_of_ours_leaves_no_job_behind() -> None:
    started: list[FakeJob] = []

    def start(_: SeedRun) -> FakeJob:
        if started:
            raise OSError("no more processes")
        started.append(FakeJob(code=0))
        return started[-1]

    with pytest.raises(OSError, match="no more processes"):
        run_jobs(fake_runs(2), 2, start, lambda _: None)
    assert started[0].stops == [False]


@pytest.mark.parametrize(
    ("code", "log", "reason"),
    [
        (1, "sb3-cyborg: error: old\n|x\nsb3-cyborg: error: it broke\nResume with ...\n", "it broke"),
        (1, "sb3-cyborg: error: old\n|x\n", "exit code 1, see group/seed_0.log"),
        (-9, "|", "its process was ended by SIGKILL"),
        (130, "|", "a signal from elsewhere has stopped it"),
    ],
)
def test_the_reason_of_a_failure_is_in_the_log_of_this_call(code: int, log: str, reason: str) -> None:
    (run,) = fake_runs(1)
    before, now = log.split("|")
    run.log.write_text(before)

    def start(run: SeedRun) -> FakeJob:
        with open(run.log, "a") as file:
            file.write(now)
        return FakeJob(code)

    assert run_jobs([run], 1, start, lambda _: None) == [Outcome(run, FAILED, reason)]


# --- table ------------------------------------------------------------------------------------------------------------


T_975 = {1: 12.706205, 2: 4.302653, 3: 3.182446, 4: 2.776445, 9: 2.262157, 99: 1.984217, 999: 1.962341}
"""Quantiles 0.975 of Student's distribution by degrees of freedom, of ``scipy.stats.t.ppf``."""


def test_the_t_interval() -> None:
    for degrees, quantile in T_975.items():
        assert t_quantile(degrees) == pytest.approx(quantile, abs=2e-6)
    half = T_975[3] * np.sqrt((9 + 4 + 0 + 25) / 3) / 2
    assert t_interval([1.0, 2.0, 4.0, 9.0]) == pytest.approx((4 - half, 4 + half), rel=1e-6)
    with pytest.raises(ValueError, match="at least 2 values, got 1"):
        t_interval([3.0])


def test_the_interval_holds_the_mean_in_95_of_100_samples_of_five() -> None:
    samples = np.random.default_rng(0).normal(size=(4000, 5))
    quantile = t_quantile(4)
    half = quantile * samples.std(axis=1, ddof=1) / np.sqrt(5)
    assert np.mean(np.abs(samples.mean(axis=1)) < half) == pytest.approx(0.95, abs=0.015)
    wrong = 1.96 * samples.std(axis=1, ddof=1) / np.sqrt(5)
    assert np.mean(np.abs(samples.mean(axis=1)) < wrong) < 0.92, "a normal interval would be too narrow"


def test_a_table_without_a_finished_run() -> None:
    table = seeds_table([Outcome(run, WAITING) for run in fake_runs(2)])
    assert re.search(r"mean +\|[ |]*-", table)
    assert "nan" not in table


# --- processes --------------------------------------------------------------------------------------------------------

TOGETHER = """
import os, time
from pathlib import Path
import gymnasium as gym
import torch as th
from tests.trainer_helpers import FixedEnv

class Together(FixedEnv):
    def __init__(self, seconds: float = 0.0, **options):
        super().__init__(**options)
        self.seconds = seconds

    def step(self, action):
        if self.steps == 0:
            threads = f"{th.get_num_threads()} {os.environ['OMP_NUM_THREADS']}"
            Path(f"process_{os.getpid()}").write_text(threads)
            while len(list(Path().glob("process_*"))) < 2:
                time.sleep(0.05)
        time.sleep(self.seconds)
        return super().step(action)

gym.register("Together-v0", entry_point=Together)
"""
"""An environment whose first step waits until two processes have begun; each writes its number and its threads."""


def start(folder: Path, *flags: str) -> "subprocess.Popen[str]":
    """:return: A process that trains two seeds at a time."""
    (folder / "together.py").write_text(TOGETHER)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}"}
    slowly = ["--env-kwargs", "{seconds: 0.05}"]
    line = [*FLAGS.split(), "--env", "together:Together-v0", "--run-name", "group", "--seeds", "0-1", "--jobs", "2"]
    # A background job of a shell ignores SIGINT, and a child inherits that.
    return subprocess.Popen(
        [sys.executable, "-m", "sb3_cyborg.cli", "train", *line, *slowly, *flags],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def processes(folder: Path) -> list[int]:
    """:return: The numbers of the processes of both seeds, once they have begun."""
    deadline = time.monotonic() + 200
    while len(found := list(folder.glob("process_*"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return [int(path.name.partition("_")[2]) for path in found]


def assert_they_end(numbers: Sequence[int]) -> None:
    deadline = time.monotonic() + 60
    while left := [number for number in numbers if psutil.pid_exists(number)]:
        assert time.monotonic() < deadline, f"left over: {left}"
        time.sleep(0.1)


def forget_processes(folder: Path) -> None:
    for path in folder.glob("process_*"):
        path.unlink()


posix = pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")


@pytest.mark.slow
@posix
def test_ctrl_c_ends_all_and_the_same_command_goes_on(folder: Path) -> None:
    process = start(folder, "-n", "1000000")
    numbers = processes(folder)
    assert [path.read_text() for path in folder.glob("process_*")] == ["1 1", "1 1"], "threads of each process"
    time.sleep(3)  # some rollouts of 0.8 s
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    assert output.count(": stopped") == 2, output
    assert_they_end(numbers)
    before = [newest_file(folder / f"runs/group/seed_{seed}").num_timesteps for seed in (0, 1)]
    assert min(before) > 0
    forget_processes(folder)
    total = str(max(before) + 64)
    process = start(folder, "-n", total)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 1, output
    assert "with `--trust`" in output, "as for a single run, its files may name a module to import"
    process = start(folder, "-n", total, "--trust")
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    for seed, steps in enumerate(before):
        lines = yaml.safe_load((folder / f"runs/group/seed_{seed}/sessions.yaml").read_text())
        assert [line["num_timesteps"] for line in lines] == [0, steps]
    assert "(n = 2)" in (folder / "runs/group/seeds.md").read_text()
    assert (folder / "runs/group/learning_curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="prctl of Linux")
def test_a_killed_parent_leaves_no_process_behind(folder: Path) -> None:
    process = start(folder, "-n", "1000000")
    numbers = processes(folder)
    time.sleep(3)
    process.kill()
    process.communicate()
    assert_they_end(numbers)
    assert all(newest_file(folder / f"runs/group/seed_{seed}").num_timesteps > 0 for seed in (0, 1))


@pytest.mark.slow
@posix
def test_jobs_of_a_cluster_are_preempted_and_go_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("submitit")
    monkeypatch.setattr(jobs_module, "POLL_SECONDS", 0.2)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    config = settings(env="CartPole-v1", total_timesteps=1024)
    jobs = ClusterJobs("local", {"mem_gb": 2}, group_folder(config))
    submitted: list[ClusterJob] = []

    def start(run: SeedRun) -> ClusterJob:
        submitted.append(jobs(run))
        return submitted[-1]

    class Preempts(list[str]):
        """Preempts the job when its run has made a rollout."""

        def append(self, line: str) -> None:
            super().append(line)
            if "started" in line:
                wait_for_rows(group_folder(config) / "seed_0" / "monitor.csv")
                (task,) = psutil.Process(int(submitted[0].job.job_id)).children()  # submitit's controller has one child
                for process in (*task.children(), task):  # Slurm sends it to all processes of a job
                    process.send_signal(signal.SIGUSR2)

    result = train_seeds(config, [0], start=start, tell=Preempts().append)
    assert [outcome.state for outcome in result.outcomes] == [FINISHED], (result.group / "seed_0.log").read_text()
    lines = yaml.safe_load((result.group / "seed_0" / "sessions.yaml").read_text())
    assert len(lines) == 2, "preempted once"
    assert lines[1]["num_timesteps"] > 0


def wait_for_rows(path: Path) -> None:
    """Wait for three rows of a Monitor file."""
    deadline = time.monotonic() + 200
    while not path.exists() or path.read_text().count("\n") < 5:
        assert time.monotonic() < deadline
        time.sleep(0.05)


# --- command line -----------------------------------------------------------------------------------------------------
BAD = [
    ("--seeds 0-x", "whole numbers and ranges"),
    ("--seeds 0-1 --seed 3", "leave one out"),
    ("--seeds 0-1 --jobs 0", "`jobs`"),
    ("--seeds 0-1 --resume run", "`--seeds` resumes by itself"),
    ("--seeds 0-1 --restart", "`--seeds` resumes by itself"),
    ("--seeds 0-1 --memory pnm", "'pmm'"),
    ("--seeds 0-1 --cluster slrm", "'slurm'"),
    ("--seeds 0-1 --cluster-options {mem_gb:4}", "`--cluster-options` is for `--cluster`"),
    ("--jobs 2", "`--jobs` is for `--seeds`"),
    ("--cluster slurm", "`--cluster` is for `--seeds`"),
]


@pytest.mark.parametrize(("line", "message"), BAD, ids=[line for line, _ in BAD])
def test_bad_lines_are_refused_in_one_line(folder: Path, line: str, message: str) -> None:
    result = CliRunner().invoke(cli.app, ["train", "--env", "CartPole-v1", *line.split()])
    assert result.exit_code == 2, result.output
    (error,) = result.stderr.splitlines()
    assert message in error
    assert list(folder.iterdir()) == []


def test_the_exit_code_and_the_seed_of_a_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs_module, "LocalJob", HereJob)
    (folder / "mine.yaml").write_text(f"env: {FRAGILE}\nseed: 9\n")
    line = ["train", "--config", "mine.yaml", "--seeds", "0-1", *FLAGS.split()]
    result = CliRunner().invoke(cli.app, line)
    assert result.exit_code == 1, result.output
    assert "sb3-cyborg: error: seed 1 has failed: the simulator has died" in result.stderr
    assert "The same command goes on" in result.stderr
    assert "(n = 1)" in result.stdout
    FragileEnv.repaired = True
    result = CliRunner().invoke(cli.app, line)
    assert result.exit_code == 0, result.output
    assert "seed 0: finished before" in result.stdout
    assert "(n = 2)" in result.stdout
    assert yaml.safe_load((folder / "runs/tests-Fragile-v0_seeds/seed_1/config.yaml").read_text())["seed"] == 1
    monkeypatch.setattr(train_module, "run_jobs", lambda runs, *_: [Outcome(run, STOPPED) for run in runs])
    assert CliRunner().invoke(cli.app, line).exit_code == 130


def test_without_submitit(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(ImportError, match=r'pip install "sb3-cyborg\[cluster\]"'):
        ClusterJobs("slurm", {}, folder)
