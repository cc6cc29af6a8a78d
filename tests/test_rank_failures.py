"""Ranks that fail, are killed or are stopped end all of them, with one error and a whole checkpoint; runs go on from it."""

import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from sb3_cyborg.trainers.checkpoints import newest_file
from sb3_cyborg.trainers.launch import report_error
from tests.trainer_helpers import EPISODE_LENGTH

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT = 240.0
TORCHRUN = ("-m", "torch.distributed.run")
TRAIN = ("-m", "sb3_cyborg.cli", "train")
ENV = "tests.rank_envs:tests/RankFailure-v0"
SETTINGS = (
    "--env",
    ENV,
    "--n-envs=4",
    "--memory=none",
    "--hidden-dim=8",
    "--net-arch=[8]",
    "--no-tensorboard",
    "--eval-freq=0",
)
ROLLOUT = 4 * 2 * EPISODE_LENGTH
SIZES = (f"--n-steps={2 * EPISODE_LENGTH}", f"--save-freq={ROLLOUT}", "--seed=3", "--run-name=run")


class Command:
    """A command whose output is read while it runs, and whose descendants are known after :meth:`wait`."""

    def __init__(self, *arguments: str, cwd: Path) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
        self.process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=cwd,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.begun = threading.Event()
        self.output: dict[str, list[str]] = {"stdout": [], "stderr": []}
        self.readers = [threading.Thread(target=self._read, args=(name,), daemon=True) for name in self.output]
        for reader in self.readers:
            reader.start()
        self.descendants: list[psutil.Process] = []

    def _read(self, name: str) -> None:
        for line in getattr(self.process, name):
            self.output[name].append(line)
            if line.startswith("Run: "):
                self.begun.set()

    def workers(self) -> list[psutil.Process]:
        """:return: The ranks, in order."""
        self.descendants = psutil.Process(self.process.pid).children(recursive=True)
        ranks = {process.environ()["RANK"]: process for process in self.descendants if "RANK" in process.environ()}
        return [ranks[rank] for rank in sorted(ranks)]

    def wait(self) -> int:
        """:return: The exit code. No process of the command is left."""
        try:
            code = self.process.wait(TIMEOUT)
            for reader in self.readers:
                reader.join(TIMEOUT)
            _, alive = psutil.wait_procs(self.descendants, timeout=5)
            assert not alive, f"left over: {alive}"
            return code
        finally:
            for process in self.descendants:
                if process.is_running():
                    process.kill()
            if self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGKILL)

    def errors(self) -> list[str]:
        """:return: The lines of errors."""
        return [line.strip() for line in self.output["stderr"] if "error:" in line]


def steps_of(run: Path) -> int:
    """:return: Steps of the newest file of a run; none is damaged. A rank that is killed may leave one under another name."""
    newest = newest_file(run)
    assert not newest.damaged
    return newest.num_timesteps


def train(*flags: str, cwd: Path) -> Command:
    """Start training in two workers."""
    return Command(*TRAIN, *flags, "--workers=2", cwd=cwd)


# --- one error line -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("failure", "line"),
    [
        ("raise", r"sb3-cyborg: error: Rank 1: .*the simulator has died"),
        ("kill", r"sb3-cyborg: error: Rank 1 was ended by SIGKILL \(process \d+\)\."),
    ],
)
def test_a_rank_that_fails_ends_all_with_one_error(failure: str, line: str, tmp_path: Path) -> None:
    options = f"--env-kwargs={{rank: 1, at: 56, failure: {failure}}}"
    command = train(*SETTINGS, *SIZES, options, "--vec-env=subproc" if failure == "raise" else "--vec-env=dummy", cwd=tmp_path)
    assert command.begun.wait(TIMEOUT)
    command.workers()
    assert command.wait() == 1
    errors = command.errors()
    assert len(errors) == 1
    assert re.search(line, errors[0]), errors
    run = tmp_path / "runs" / "run"
    assert steps_of(run) == 3 * ROLLOUT, "the fourth rollout is interrupted"
    resumed = train(f"--resume={run}", f"--total-timesteps={5 * ROLLOUT}", "--trust", cwd=tmp_path)
    assert resumed.wait() == 0, resumed.output
    assert steps_of(run) == 5 * ROLLOUT


@pytest.mark.slow
def test_bad_settings_are_one_line_before_any_process_starts(tmp_path: Path) -> None:
    command = train(*SETTINGS, "--n-envs=3", cwd=tmp_path)
    assert command.wait() == 2
    (line,) = command.output["stderr"]
    assert line.startswith("sb3-cyborg: error: `n_envs`=3 environments cannot be divided among 2 processes;")
    assert not command.output["stdout"]
    assert not (tmp_path / "runs").exists()


def test_without_a_launcher_an_error_is_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    assert not report_error("it broke", is_consequence=False)


# --- scripts --------------------------------------------------------------------------------------------------------------


def script(folder: Path, rank: str, how: str = "fail") -> Command:
    """Start ``tests/rank_script.py`` in two ranks."""
    torchrun = (*TORCHRUN, "--standalone", "--nproc-per-node=2")
    return Command(*torchrun, "-m", "tests.rank_script", str(folder), rank, how, cwd=ROOT)


@pytest.mark.slow
def test_a_script_without_changes_runs_in_two_ranks(tmp_path: Path) -> None:
    command = Command(
        *TORCHRUN, "--standalone", "--nproc-per-node=2", "-m", "tests.rank_script", str(tmp_path), "-1", "", cwd=ROOT
    )
    assert command.wait() == 0, command.output
    reports = [(tmp_path / f"{rank}.txt").read_text() for rank in (0, 1)]
    assert reports[0] == reports[1], "steps, episodes and statistics of VecNormalize are the same"
    assert reports[0].startswith("240 ")
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1, "one log"
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"rl_model_96_steps.zip", "rl_model_192_steps.zip"}
    assert len([line for line in command.output["stdout"] if "total_timesteps" in line]) >= 5


@pytest.mark.slow
def test_the_error_of_a_rank_is_raised_on_the_others(tmp_path: Path) -> None:
    """The process that failed goes on to live, so its launcher ends nobody."""
    command = Command(
        *TORCHRUN, "--standalone", "--nproc-per-node=2", "-m", "tests.rank_script", str(tmp_path), "1", "", cwd=ROOT
    )
    assert command.wait() == 0, command.output
    assert (tmp_path / "1.txt").read_text() == "RuntimeError: the simulator has died"
    assert (tmp_path / "0.txt").read_text() == "RankError: Rank 1 has failed: RuntimeError: the simulator has died"


@pytest.mark.slow
def test_a_callback_that_stops_on_one_rank_stops_all(tmp_path: Path) -> None:
    command = script(tmp_path, "1", "stop")
    assert command.wait() == 0, command.output
    assert [int((tmp_path / f"{rank}.txt").read_text().split()[0]) for rank in (0, 1)] == [96, 72]


# --- stopped, restarted, on two machines ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_ctrl_c_saves_and_ends_all_ranks(tmp_path: Path) -> None:
    command = train(*SETTINGS, *SIZES, "--total-timesteps=10_000_000", cwd=tmp_path)
    assert command.begun.wait(TIMEOUT)
    time.sleep(3)
    command.workers()
    command.process.send_signal(signal.SIGINT)
    assert command.wait() == 130, command.output
    assert not command.errors()
    assert steps_of(tmp_path / "runs" / "run") > 0


@pytest.mark.slow
def test_the_launcher_restarts_from_the_checkpoint(tmp_path: Path) -> None:
    options = ("--env-kwargs={rank: 1, at: 56, failure: kill}", f"--total-timesteps={6 * ROLLOUT}", "--max-restarts=1")
    command = train(*SETTINGS, *SIZES, *options, cwd=tmp_path)
    assert command.wait() == 0, command.output
    assert any(f"Resuming from runs/run/checkpoints/step_{3 * ROLLOUT:012d}.zip" in line for line in command.output["stderr"])
    assert steps_of(tmp_path / "runs" / "run") == 6 * ROLLOUT


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_workers(tmp_path: Path) -> None:
    run, new = tmp_path / "runs" / "run", (*SETTINGS, *SIZES, f"--total-timesteps={2 * ROLLOUT}")
    for workers, flags in ((2, new), (1, ()), (4, ())):
        before = steps_of(run) if run.exists() else 0
        resumed = flags or (f"--resume={run}", "--trust", f"--total-timesteps={before + 2 * ROLLOUT}")
        command = Command(*TRAIN, *resumed, f"--workers={workers}", cwd=tmp_path)
        assert command.wait() == 0, command.output
        assert steps_of(run) == before + 2 * ROLLOUT


@pytest.mark.slow
def test_two_nodes_on_the_loopback(tmp_path: Path) -> None:
    """Two launchers, each with one rank, meet at an address, as on two machines that share a folder."""
    nodes = ("--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:29417", "--rdzv-id=test")
    arguments = (*TORCHRUN, *nodes, "--local-addr=localhost", *TRAIN, *SETTINGS, *SIZES, f"--total-timesteps={4 * ROLLOUT}")
    commands = [Command(*arguments, cwd=tmp_path) for _ in range(2)]
    assert [command.wait() for command in commands] == [0, 0], [command.output for command in commands]
    assert steps_of(tmp_path / "runs" / "run") == 4 * ROLLOUT


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("kills", [20])
def test_ranks_killed_at_random(tmp_path: Path, kills: int) -> None:
    """A rank of a run is killed at a random time, again and again; the run goes on from its newest checkpoint each time."""
    generator, run, before = random.Random(0), tmp_path / "runs" / "run", 0
    flags: tuple[str, ...] = (*SETTINGS, *SIZES, "--total-timesteps=100_000_000")
    for kill in range(kills):
        command = train(*flags, cwd=tmp_path)
        flags = (f"--resume={run}", "--trust")
        assert command.begun.wait(TIMEOUT), command.output
        time.sleep(2 * generator.random())
        workers = command.workers()
        assert len(workers) == 2
        killed = generator.randrange(2)
        workers[killed].kill()
        assert command.wait() == 1, command.output
        assert any(f"Rank {killed} was ended by SIGKILL" in line for line in command.errors()), command.output
        assert len(command.errors()) == 1
        assert steps_of(run) >= before
        before = steps_of(run)
        print(f"kill {kill + 1}: rank {killed}, checkpoint after {before} steps")
    assert before > 0
    last = train(*flags, f"--total-timesteps={before + 2 * ROLLOUT}", cwd=tmp_path)
    assert last.wait() == 0, last.output
    assert steps_of(run) == before + 2 * ROLLOUT
    assert not list(run.rglob("*.writing"))
