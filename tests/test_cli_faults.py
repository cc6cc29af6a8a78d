"""The command line on input that cannot work, on signals and on outputs that are closed: one line, an exit code, an end."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sb3_cyborg import cli
from sb3_cyborg.trainers.checkpoints import list_checkpoints, read_progress
from tests.trainer_helpers import FIXED, run_folder, tiny

ROOT = Path(__file__).parent.parent
SHORT = "--timesteps 64 --n-steps 16 --n-epochs 1 --hidden-dim 8 --eval-freq 0 --no-tensorboard --no-progress-bar"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """:return: The working directory of the commands."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(*arguments: str, code: int = 2) -> str:
    """:return: The error of a command in this process, which is one line and ends with this exit code."""
    result = CliRunner().invoke(cli.app, list(arguments))
    assert isinstance(result.exception, SystemExit), f"{result.output}\n{result.exception!r}"
    assert result.exit_code == code, result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("sb3-cyborg: error: ")
    assert not Path("runs").exists(), "nothing was begun"
    return line


# --- input ------------------------------------------------------------------------------------------------------------

BOMB = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n"
BOMB += "".join(
    f"{name}: &{name} [{', '.join(10 * [f'*{before}'])}]\n" for before, name in zip("abcdefg", "bcdefgh", strict=True)
)

BAD: list[tuple[str, list[str]]] = [
    ("--policy MultiInputPolicy", ["'MultiInputPolicy' needs a Dict space", "'auto'"]),
    ("--policy-kwargs {optimizer_kwargs:{leraning_rate:1}}", ["leraning_rate", "optimizer_kwargs"]),
    ("--policy-kwargs {features_extractor_kwargs:{x:1}}", ["'x'", "features_extractor_kwargs"]),
    ("--memory {type:pmm,write_rate:x}", ["write_rate", "x"]),
    ("--learning-rate 1:30", ["`learning_rate`", "'1:30'"]),
    ("--num-envs 1e12", ["`n_envs`", "65536", "1000000000000"]),
    ("--torch-threads 100000", ["`torch_threads`", "1024", "100000"]),
    ("--timesteps 1e300", ["`total_timesteps`", "1000000000000000", "1e+300"]),
    ("--n-eval-episodes 1e9", ["`n_eval_episodes`", "1000000"]),
    ("--frame-stack 1e9", ["`frame_stack`", "1000"]),
    ("--run-name /", ["`run_name`", "'/'"]),
    ("--run-name ../x", ["`run_name`", "'../x'"]),
    ("--run-name ..", ["`run_name`", "'..'"]),
    ("--log-dir config.yaml/runs", ["config.yaml"]),
    ("--env-kwargs [1,2", ["`--env-kwargs`", "is not YAML"]),
    ("--seed 2024-13-45", ["`--seed` '2024-13-45' is not YAML"]),
    ("--env .x:Id", ["'.x:Id' cannot be imported: TypeError"]),
    ("--env raises:Id-v0", ["'raises:Id-v0' cannot be imported: KeyError: 'boom'"]),
    ("--env exits:Id-v0", ["'exits:Id-v0' cannot be imported: SystemExit: 7"]),
    ("--restart", ["`--restart`", "--resume"]),
]


@pytest.mark.parametrize(("flags", "parts"), BAD, ids=[flags for flags, _ in BAD])
def test_input_that_cannot_work_is_refused_in_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, flags: str, parts: list[str]
) -> None:
    monkeypatch.syspath_prepend(folder)
    (folder / "raises.py").write_text("raise KeyError('boom')\n")
    (folder / "exits.py").write_text("raise SystemExit(7)\n")
    (folder / "config.yaml").write_text("")
    name, *value = flags.split(" ", 1)
    words = [name, *(re.sub(r"([a-z]):(?=[{a-z0-9])", r"\1: ", text) if "{" in text else text for text in value)]
    env = () if "--env " in flags else ("--env", "CartPole-v1")
    line = refused("train", *env, *words, code=1 if "--log-dir" in flags else 2)
    for part in parts:
        assert part in line


FILES: list[tuple[str, str]] = [
    (f"env: CartPole-v1\nenv_kwargs:\n  {BOMB.replace(chr(10), chr(10) + '  ')}", "values with its aliases expanded"),
    ("env: &a [*a]\n", "an alias is inside of its own anchor"),
    (f"env: {'[' * 100}{']' * 100}\n", "nested more than 50 levels deep"),
    (f"env: {'[' * 5000}{']' * 5000}\n", "nested more than 50 levels deep"),
    (f"env: {'a' * 1_000_001}\n", "1,000,00"),
    ("env: !!python/object/apply:os.system ['true']\n", "could not determine a constructor"),
    ('env: CartPole-v1\nrun_name: "a\\nb"\n', r"'a\nb': it holds '\n'"),
    ('env: CartPole-v1\nlog_dir: "a\\0b"\n', "null"),
    ("env: CartPole-v1\nseed: " + "9" * 5000 + "\n", "is not YAML"),
    ("? [a]\n: b\n", "[a]"),
    ("", "must hold `key: value` lines, got NoneType"),
]


@pytest.mark.parametrize(("text", "part"), FILES, ids=[part for _, part in FILES])
def test_files_that_cannot_work_are_refused_in_one_line(folder: Path, text: str, part: str) -> None:
    (folder / "config.yaml").write_text(text)
    began = time.monotonic()
    line = refused("train", "--config", "config.yaml")
    assert part.strip("[]") in line
    assert time.monotonic() - began < 20, "a hang ends after minutes, not seconds"
    assert len(line) < 2000


def test_an_empty_file_of_hyperparameters_of_the_zoo(folder: Path) -> None:
    pytest.importorskip("rl_zoo3")
    for content in ("", "- CartPole-v1\n", "CartPole-v1: 3\n", "a: ["):
        (folder / "empty.yml").write_text(content)
        result = CliRunner().invoke(cli.app, ["zoo", "train", "--env", "CartPole-v1", "-conf", "empty.yml", "-n", "64"])
        assert result.exit_code == 2
        assert "'empty.yml'" in result.stderr.splitlines()[-1]
        assert "Traceback" not in result.output


def test_a_damaged_run_is_one_line_for_each_file(folder: Path) -> None:
    run = run_folder(tiny(folder, run_name="run").train())
    for path in list_checkpoints(run):
        path.write_bytes(b"")
    result = CliRunner().invoke(cli.app, ["train", "--resume", "run", "--timesteps", "320"])
    assert result.exit_code == 0, result.output
    lines = result.stderr.splitlines()
    names = [f"step_{steps:012d}.zip" for steps in (256, 192, 128)]
    warned = [line.split(" is damaged")[0] for line in lines if "is damaged" in line]
    assert warned == [f"sb3-cyborg: warning: run/checkpoints/{name}" for name in names]
    assert "Resuming from run/final_model.zip, after 256 steps." in lines
    (run / "final_model.zip").unlink()
    for path in list_checkpoints(run):
        path.unlink()
    assert "`--restart` starts it anew" in refused("train", "--resume", "run", "--timesteps", "640")
    result = CliRunner().invoke(cli.app, ["train", "--resume", "run", "--restart"])
    assert result.exit_code == 0, result.output
    assert "its files before are in run/old_1" in result.stderr


def test_an_error_of_an_unexpected_type_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise KeyError("key")

    monkeypatch.setattr("sb3_cyborg.trainers.checkpoints.find_checkpoint", fail)
    assert "error: KeyError: 'key' (SB3_CYBORG_TRACEBACK=1 shows where)" in refused("eval", "run", code=1)
    monkeypatch.setenv("SB3_CYBORG_TRACEBACK", "1")
    assert isinstance(CliRunner().invoke(cli.app, ["eval", "run"]).exception, KeyError)


# --- processes --------------------------------------------------------------------------------------------------------

STUCK = """
import signal, sys, time
from pathlib import Path
import gymnasium as gym
from tests.trainer_helpers import FixedEnv

class Stuck(FixedEnv):
    def step(self, action):
        if self.steps == 40:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            Path("stuck").touch()
            while True:
                time.sleep(1)
        return super().step(action)

gym.register("Stuck-v0", entry_point=Stuck)
"""


def start(*arguments: str, **options: Any) -> "subprocess.Popen[str]":
    """:return: A process of the command line, in a group of its own."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.getcwd()}"}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True, **options}
    if os.name == "posix":  # in a background job of a shell, SIGINT is ignored, and a child inherits that
        options["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen([sys.executable, "-m", "sb3_cyborg.cli", *arguments], env=environment, **options)


def wait_for(path: Path, process: "subprocess.Popen[str]") -> None:
    """Wait until a file exists."""
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def assert_group_ends(group: int) -> None:
    """Processes of the group end within seconds: workers were ended, and their server ends with its parent."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    pytest.fail("a process is left over")


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize("workers", [2, 0], ids=["workers", "no workers"])
def test_two_ctrl_c_to_the_parent_alone_end_a_stuck_step(folder: Path, workers: int) -> None:
    (folder / "stuck_env.py").write_text(STUCK)
    flags = ["--vec-env", "subproc", "--n-envs", str(workers)] if workers else []
    process = start("train", "--env", "stuck_env:Stuck-v0", *flags, *SHORT.split(), "--timesteps", "4096")
    try:
        wait_for(folder / "stuck", process)
        process.send_signal(signal.SIGINT)
        time.sleep(1)
        assert process.poll() is None, "the first waits for the end of the step"
        process.send_signal(signal.SIGINT)
        began = time.monotonic()
        output, errors = process.communicate(timeout=60)
        assert time.monotonic() - began < 20
        assert process.returncode == 130, errors
        assert "Traceback" not in output + errors
        assert "saved runs/stuck_env-Stuck-v0_1/checkpoints/step_" in errors
        assert_group_ends(process.pid)
    finally:
        process.kill()
        process.wait()
    (path,) = list_checkpoints(folder / "runs" / "stuck_env-Stuck-v0_1")
    assert read_progress(path)["num_timesteps"] == 32 * max(workers, 1)


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_ctrl_c_ends_an_evaluation_silently(folder: Path) -> None:
    tiny(folder, run_name="run", env="CartPole-v1").train()
    process = start("eval", "run", "--episodes", "1000000")
    assert process.stdout is not None
    try:
        assert process.stdout.readline().startswith("run/"), "the line before the first episode"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert (process.returncode, errors) == (130, "")
    finally:
        process.kill()
        process.wait()


@pytest.mark.skipif(os.name != "posix", reason="pipes of POSIX")
def test_a_closed_pipe_is_silent() -> None:
    process = start("envs")
    assert process.stdout is not None
    assert process.stdout.readline() == "MemoryChain\n"
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == ""
    assert process.wait(60) in (0, 1)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_a_full_output_is_one_line() -> None:
    with open("/dev/full", "w") as full:
        process = start("envs", stdout=full)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert errors.splitlines() == ["sb3-cyborg: error: [Errno 28] No space left on device"]


def test_an_error_in_a_worker_is_one_line(folder: Path) -> None:
    flags = ["--env-kwargs", "{break_at: 20}", "--vec-env", "subproc", "--n-envs", "2"]
    result = CliRunner().invoke(cli.app, ["train", "--env", f"tests.trainer_helpers:{FIXED}", *flags, *SHORT.split()])
    assert result.exit_code == 1, result.output
    (line,) = [line for line in result.stderr.splitlines() if "error: " in line]
    assert line.endswith("failed in its worker process: RuntimeError: the simulator has died")
    assert "Traceback" not in result.output
