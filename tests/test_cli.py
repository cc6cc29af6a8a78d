"""The command line: the mission's command lines, flags, errors, and the commands for runs."""

import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from sb3_cyborg import MemoryPPO, TrainerV7, cli, kernels
from sb3_cyborg.envs import FAMILIES
from sb3_cyborg.trainers.checkpoints import list_checkpoints, read_checkpoint
from sb3_cyborg.trainers.config import TrainerConfig
from sb3_cyborg.trainers.config_flags import as_flag, read_flags
from sb3_cyborg.trainers.monitor import MonitorLog
from sb3_cyborg.trainers.vocabulary import ALIASES
from tests.trainer_helpers import FIXED, run_folder, tiny

ROOT = Path(__file__).parent.parent
SHORT = ["--timesteps", "64", "--n-steps", "16", "--n-epochs", "1", "--hidden-dim", "8", "--eval-freq", "0"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """:return: The working directory of the commands."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    return tmp_path


def run(*arguments: str, code: int = 0) -> Any:
    """:return: The result of a command, in this process; its exit code is as expected."""
    result = CliRunner().invoke(cli.app, list(arguments))
    unexpected = result.exception is not None and not isinstance(result.exception, SystemExit)
    assert result.exit_code == code and not unexpected, f"{result.output}\n{result.exception!r}"  # noqa: PT018
    return result


def said(result: Any) -> str:
    """:return: The line of an error, which is the only one."""
    errors = [line for line in result.stderr.splitlines() if "rror: " in line]
    assert len(errors) == 1, result.stderr
    assert "Traceback" not in result.output
    return str(errors[0])


# --- the mission's lines

MISSION = [
    ("--env minerl_treechop --encoder mamba --memory pmm", "minerl"),
    ("--config configs/memory_ppo_v7.yaml --wandb", "minerl"),
    pytest.param(
        "--env CartPole-v1 --encoder fusion --memory kv --num-envs 8 --horizon 2048 --burn-in 256 --amp",
        "CartPole-v1",
        marks=pytest.mark.slow,
    ),
]


@pytest.mark.parametrize(("line", "env"), MISSION)
def test_the_missions_lines(folder: Path, line: str, env: str) -> None:
    arguments = line.replace("configs/", f"{ROOT}/configs/").split()
    if env == "minerl":
        result = run("train", *arguments, code=1)
        assert re.search("docs/minerl.md|minerl.html", said(result)), result.stderr
        assert not (folder / "runs").exists()
        return
    run("train", *arguments, "--timesteps", "16384", "--n-epochs", "1", "--eval-freq", "0")
    path = list_checkpoints(folder / "runs" / "CartPole-v1_1")[-1]
    model = MemoryPPO.load(path)
    assert (model.num_timesteps, model.n_envs, model.n_steps, model.burn_in, model.amp) == (16384, 8, 2048, 256, True)
    assert (model.policy_kwargs["encoder"], model.policy_kwargs["memory"]) == ("fusion", "kv")


@pytest.mark.slow
def test_the_example_takes_the_same_flags(folder: Path) -> None:
    example = [sys.executable, str(ROOT / "examples" / "train_v7.py")]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*example, "--env", "CartPole-v1", "--encoder", "gru", "--memory", "kv", *SHORT, "--run-name", "mine"],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert MemoryPPO.load(folder / "runs" / "mine" / "final_model.zip").num_timesteps == 64
    bad = subprocess.run([*example, "--env", "CartPol-v1"], capture_output=True, text=True, check=False, env=environment)
    assert bad.returncode == 2
    (line,) = bad.stderr.splitlines()
    assert "'CartPol-v1'. Did you mean 'CartPole-v1'?" in line


# --- train

BAD: list[tuple[str, list[str]]] = [
    ("train", ["--env", "--config", "sb3-cyborg envs"]),
    ("train --n-stps 64", ["--n-stps", "--n-steps"]),
    ("train --env CartPole-v1 --n-steps 64 --horizon 128", ["`n_steps`=64", "`horizon`=128", "leave one out"]),
    ("train --env CartPole-v1 --n-envs 2 --num-envs 4", ["`n_envs`=2", "`num_envs`=4", "leave one out"]),
    ("train --env CartPol-v1", ["'CartPol-v1'", "'CartPole-v1'"]),
    ("train --env CartPole-v1 --n-steps long", ["`n_steps`", "'long'", "integer"]),
    ("train --env CartPole-v1 --horizon", ["--horizon", "argument"]),
    ("train --env CartPole-v1 --encoder mmba", ["'mmba'", "'mamba'"]),
    ("train --env CartPole-v1 --memory {type:pmm", ["--memory", "is not YAML"]),
    ("train --env CartPole-v1 --memory {type:pmm}", ["`memory`", "one `type`"]),
    ("train --env CartPole-v1 --n-envs 0", ["`n_envs`", "0", "greater than or equal to 1"]),
    ("train --env CartPole-v1 --horizon 128 --seq-len 48", ["`seq_len`=48", "`n_steps`=128", "32 and 64"]),
    ("train --env CartPole-v1 --n-steps 128 --burn-in 500", ["`burn_in`=500", "`n_steps`=128"]),
    ("train --env CartPole-v1 --learning-rate lin_fast", ["'lin_fast'", "lin_3e-4"]),
    ("train --env CartPole-v1 --policy CnnPolicy", ["'CnnPolicy' needs images", "'auto'"]),
    ("train --env CartPole-v1 --env-kwargs {length:3}", ["`env_kwargs`", "'length:3'"]),
    ("train --env FrozenLake-v1 --normalize", ["`normalize`", "Discrete", "Box"]),
    ("train --env FrozenLake-v1 --frame-stack 4", ["`frame_stack`=4", "Box"]),
    ("train --env CartPole-v1 --vec-env native", ["'native'", "'dummy'"]),
    ("train --config nothing.yaml", ["'nothing.yaml'", "no config file"]),
    ("train --resume nothing", ["'nothing'", "not a run"]),
    ("train --resume run --env CartPole-v1", ["`--env` cannot change", "--total-timesteps"]),
    ("train --resume run --config run/config.yaml", ["`--config`", "leave"]),
    ("train --resume run", ["256 steps already", "must be more"]),
    ("train --resume run --horizon 8", ["`--n-steps` cannot change", "--eval-freq"]),
    ("train --resume run --timesteps lots", ["`total_timesteps`", "'lots'"]),
    ("train --env CartPole-v1 --run-name run --log-dir .", ["'run'", "--resume run"]),
    ("eval", ["'run'"]),
    ("eval nothing", ["no run or checkpoint 'nothing'"]),
    ("eval run --which 7", ["no checkpoint '7'", "'best', 'last'"]),
    ("eval run --episodes 0", ["`n_episodes`", "0", "at least 1"]),
    ("eval run/config.yaml", ["not a complete checkpoint"]),
    ("envs nothing", ["'nothing'", "sb3-cyborg envs"]),
    ("trian", ["trian", "train"]),
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """:return: Folder with a finished run named ``run``."""
    log_dir = tmp_path_factory.mktemp("finished")
    tiny(log_dir, run_name="run").train()
    return log_dir


@pytest.mark.parametrize(("line", "parts"), BAD, ids=[line for line, _ in BAD])
def test_bad_command_lines(monkeypatch: pytest.MonkeyPatch, finished: Path, line: str, parts: list[str]) -> None:
    monkeypatch.chdir(finished)
    before = sorted(finished.rglob("*"))
    message = said(run(*line.split(), code=2))
    for part in parts:
        assert part in message
    assert sorted(finished.rglob("*")) == before


def test_a_flag_overrides_the_file(folder: Path) -> None:
    Path("mine.yaml").write_text(
        f"env: {FIXED}\nn_envs: 2\nhorizon: 16\nmemory: {{type: kv, num_slots: 3}}\nencoder: gru\nn_epochs: 1\n"
        "eval_interval: 0\ntensorboard: true\nlearning_rate: 3e-4\n"
    )
    flags = ["--num-envs", "4", "--memory", "kv", "--encoder", "{type: mamba, d_state: 4}", "--hidden-dim", "8", "--amp"]
    result = run("train", "-c", "mine.yaml", *flags, "--learning-rate", "lin_1e-3", "-n", "1e2", "--no-tensorboard", "-s", "5")
    saved = yaml.safe_load((folder / "runs/tests-Fixed-v0_1/config.yaml").read_text())
    assert (
        saved.items()
        >= {
            "n_envs": 4,
            "n_steps": 16,
            "eval_freq": 0,
            "memory": "kv",
            "memory_kwargs": {"num_slots": 3},
            "encoder": "mamba",
            "encoder_kwargs": {"d_state": 4},
            "learning_rate": "lin_1e-3",
            "total_timesteps": 100,
            "tensorboard": False,
            "amp": True,
            "seed": 5,
        }.items()
    )
    assert saved.keys() == TrainerConfig.model_fields.keys()
    assert "Run: runs/tests-Fixed-v0_1" in result.stdout
    assert "n_envs 4 x n_steps 16 = 64 transitions" in result.stdout
    assert "encoder mamba, memory kv, " in result.stdout
    assert "Finished after 128 steps" in result.stdout


def test_sizes_before_training_and_commands_after_it() -> None:
    flags = "--n-envs 2 --n-steps 32 --batch-size 32 --seq-len 16 --burn-in 8 --n-epochs 3 --hidden-dim 8 --eval-freq 0"
    result = run("train", "--env", "CartPole-v1", *flags.split(), "--memory", "ring", "--device", "cpu", "-n", "100")
    parameters = sum(
        parameter.numel() for parameter in MemoryPPO.load("runs/CartPole-v1_1/final_model.zip").policy.parameters()
    )
    assert result.stdout.splitlines() == [
        "Run: runs/CartPole-v1_1",
        "  rollout   n_envs 2 x n_steps 32 = 64 transitions",
        "  minibatch batch_size 32 transitions = 2 x seq_len 16",
        "  update    n_epochs 3 x 2 minibatches, burn_in 8",
        f"  agent     encoder gru, memory ring, {parameters:,} parameters",
        f"  device    cpu, {kernels.describe()}",
        "Finished after 128 steps. Next:",
        "  sb3-cyborg eval runs/CartPole-v1_1",
        "  sb3-cyborg plot runs/CartPole-v1_1 --output curve.png",
        "  sb3-cyborg inspect runs/CartPole-v1_1 --html memory.html",
        "  sb3-cyborg enjoy runs/CartPole-v1_1 --video agent.gif",
        "  sb3-cyborg export runs/CartPole-v1_1 --output agent.onnx",
    ]
    assert "note" not in result.stderr


def test_commands_that_would_not_work_are_not_suggested() -> None:
    pytest.importorskip("popgym")
    shown = run("train", "--env", "sb3_cyborg/popgym-RepeatPreviousEasy-v0", *SHORT, "--memory", "none").stdout
    assert "sb3-cyborg eval" in shown
    assert "inspect" not in shown, "an agent without memory"
    assert "enjoy" not in shown, "an environment without pictures"


@pytest.mark.parametrize(("total", "is_told"), [("32", False), ("20", True)])
def test_fewer_steps_than_a_rollout_are_told(total: str, is_told: bool) -> None:
    flags = ["--n-steps", "32", "--n-epochs", "1", "--hidden-dim", "8", "--eval-freq", "0", "--no-progress-bar"]
    result = run("train", "--env", FIXED, *flags, "--timesteps", total)
    notes = [line for line in result.stderr.splitlines() if "note" in line]
    assert [line[:75] for line in notes] == is_told * [
        "sb3-cyborg: note: `total_timesteps`=20 leaves 20 steps, less than a rollout"
    ]
    assert "Finished after 32 steps" in result.stdout


def test_each_key_is_a_flag() -> None:
    shown = run("train", "--help").stdout
    for key, field in TrainerConfig.model_fields.items():
        assert as_flag(key) in shown
        assert str(field.description).split()[0] in shown
    assert "[default: 0.99]" in shown
    assert "sb3-cyborg train --resume runs/CartPole-v1_1" in shown


def test_help_shows_keys_and_no_aliases() -> None:
    shown = run("train", "--help").stdout
    assert not re.findall(rf"(?:{'|'.join(map(as_flag, ALIASES))})(?![\w-])", shown)


@pytest.mark.parametrize("alias", ALIASES)
def test_aliases_are_flags(monkeypatch: pytest.MonkeyPatch, alias: str) -> None:
    given: list[dict[str, Any]] = []

    def trainer(settings: dict[str, Any]) -> None:
        given.append(settings)
        raise ValueError("that is all")

    monkeypatch.setattr("sb3_cyborg.trainers.trainer_v7.TrainerV7", trainer)
    value = "CartPole-v1" if alias == "env_id" else 64
    run("train", *(() if alias == "env_id" else ("--env", "CartPole-v1")), as_flag(alias), str(value), code=2)
    assert given == [{"env": "CartPole-v1", ALIASES[alias]: value}]


def test_aliases_change_a_resumed_run(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert TrainerV7.resume(finished / "run", eval_interval=8, timesteps=512).config.eval_freq == 8
    monkeypatch.chdir(finished)
    assert "`eval_freq`=9 and `eval_interval`=8" in said(
        run(*["train", "--resume", "run", "--eval-interval", "8", "--eval-freq", "9"], code=2)
    )


def test_flags_are_read_as_yaml_except_text() -> None:
    text = {"run_name": "2024", "env": "CartPole-v1", "env_id": "1"}
    assert read_flags(text) == text
    read = read_flags({"seed": "2024", "net_arch": "[8, 8]", "batch_size": "null", "amp": True, "learning_rate": "1e-3"})
    assert read == {"seed": 2024, "net_arch": [8, 8], "batch_size": None, "amp": True, "learning_rate": 1e-3}
    assert read_flags({"horizon": "64", "memory": "{type: kv}"}) == {"horizon": 64, "memory": {"type": "kv"}}


def test_resume(folder: Path) -> None:
    run("train", "--env", FIXED, *SHORT)
    path = folder / "runs" / "tests-Fixed-v0_1"
    run("train", "--resume", str(path), "--timesteps", "128")
    assert MemoryPPO.load(path / "final_model.zip").num_timesteps == 128
    assert [session["num_timesteps"] for session in yaml.safe_load((path / "sessions.yaml").read_text())] == [0, 64]
    assert yaml.safe_load((path / "config.yaml").read_text())["total_timesteps"] == 128


def test_trust_is_for_files() -> None:
    assert "`--trust` is for `--resume`" in said(run("train", "--env", FIXED, *SHORT, "--trust", code=2))


def test_hints_name_trust_where_a_command_needs_it() -> None:
    result = run("train", "--env", f"tests.trainer_helpers:{FIXED}", *SHORT, "--run-name", "mine")
    assert "sb3-cyborg eval runs/mine --trust\n" in result.stdout
    result = run("train", "--env", f"tests.trainer_helpers:{FIXED}", *SHORT, "--env-kwargs", "{break_at: 36}", code=1)
    assert re.search(r"--resume \S+ --trust\n", result.stderr)


@pytest.mark.parametrize("how", ["raise", "nan"])
def test_errors_while_running(folder: Path, how: str) -> None:
    result = run("train", "--env", FIXED, "--env-kwargs", f"{{break_at: 36, how: {how}}}", *SHORT, code=1)
    assert re.search("simulator has died|not finite", said(result))
    (path,) = list_checkpoints(folder / "runs" / "tests-Fixed-v0_1")
    assert f"saved {path.relative_to(folder)}" in result.stderr
    assert read_checkpoint(path).progress["num_timesteps"] == 32


def test_ctrl_c(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_step = MonitorLog._on_step

    def interrupted(self: MonitorLog) -> bool:
        if self.num_timesteps == 40:
            signal.raise_signal(signal.SIGINT)
        return on_step(self)

    monkeypatch.setattr(MonitorLog, "_on_step", interrupted)
    result = run("train", "--env", FIXED, *SHORT, code=130)
    assert "saved runs/tests-Fixed-v0_1/checkpoints/step_000000000032.zip" in result.stderr
    assert "sb3-cyborg train --resume runs/tests-Fixed-v0_1" in result.stderr
    assert read_checkpoint("runs/tests-Fixed-v0_1/checkpoints/step_000000000032.zip").progress["num_timesteps"] == 32


# --- what to do with a run


def test_eval(finished: Path) -> None:
    trainer = TrainerV7.load(finished / "run", "last")
    mean, std = trainer.evaluate(4)
    shown = run("eval", str(finished / "run"), "--episodes", "4").stdout
    assert f"return {mean:.3f} +/- {std:.3f}" in shown
    assert "256 steps of training" in shown
    assert "128 steps of training" in run("eval", str(finished / "run"), "--which", "128", "--episodes", "1").stdout
    trainer.save(finished / "model.pt")
    assert f"return {mean:.3f} +/- {std:.3f}" in run("eval", str(finished / "model.pt"), "--episodes", "4").stdout


def test_pictures(folder: Path, finished: Path) -> None:
    path = str(finished / "run")
    run("plot", path, "-o", "curve.png")
    run("inspect", path, "-o", "memory.png", "--max-steps", "5")
    result = run("inspect", path, "--html", "memory.html", "--max-steps", "5")
    assert result.stdout.startswith("memory.html: 5 steps of tests/Fixed-v0, return ")
    assert "The page has no frames: `render()` raised NotImplementedError" in result.stderr
    assert (folder / "memory.html").read_text().startswith("<!doctype html>")
    assert ".html" in said(run("inspect", path, "--html", "memory.txt", code=2))
    for picture in ("curve.png", "memory.png"):
        assert (folder / picture).read_bytes().startswith(b"\x89PNG")
    assert ".png" in said(run("plot", path, "-o", "curve.txt", code=2))
    assert "nothing" in said(run("plot", "nothing", code=2))
    assert ".gif" in said(run("enjoy", path, "--video", "agent.txt", code=2))


def test_video(folder: Path) -> None:
    trainer = tiny(folder, env="CartPole-v1").train()
    run("enjoy", str(run_folder(trainer)), "--video", "agent.gif", "--episodes", "1", "--max-steps", "5")
    assert (folder / "agent.gif").read_bytes().startswith(b"GIF8")


def test_envs(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = run("envs").stdout.splitlines()
    assert lines[:2] == ["MemoryChain", "  sb3_cyborg/MemoryChain-v0"]
    (minerl,) = [line for line in lines if line.startswith("  minerl_treechop")]
    assert "docs/minerl.md" in minerl
    monkeypatch.setattr(cli, "find_spec", lambda name: None)
    assert run("envs", "repeatpreviouseasy").stdout.splitlines() == [
        "POPGym",
        '  sb3_cyborg/popgym-RepeatPreviousEasy-v0  (needs popgym: pip install "sb3-cyborg[popgym]")',
    ]
    assert run("envs", "memorychain").stdout.splitlines() == lines[:2]


def test_requirements_name_a_family_or_part_of_an_id() -> None:
    everything = [*FAMILIES, *(env_id for family in FAMILIES.values() for env_id in family.kwargs)]
    for part, _, _ in cli.REQUIREMENTS:
        assert any(part in name for name in everything), part


def test_zoo_is_passed_through() -> None:
    assert "train" in run("zoo").stdout
    assert "trian" in said(run("zoo", "trian", code=2))


def test_every_command_has_help_with_examples() -> None:
    for command in ("train", "eval", "enjoy", "plot", "inspect", "envs", "info"):
        assert re.search(rf"sb3-cyborg {command}\b", run(command, "-h").stdout.split("Examples:")[1])


@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("cartpole_no_vel", "gymnasium"),
        ("memory_chain", "gymnasium"),
        ("t_maze", "gymnasium"),
        ("popgym_repeat_previous", "popgym"),
        ("minigrid_memory", "minigrid"),
        pytest.param("crafter_wood", "crafter", marks=pytest.mark.slow),
    ],
)
def test_configs_train(folder: Path, name: str, package: str) -> None:
    pytest.importorskip(package)
    sizes = "--n-envs 2 --n-steps 128 --batch-size 64 --seq-len 32 --n-epochs 1"
    short = f"{sizes} --timesteps 256 --eval-freq 0 --vec-env dummy"
    run("train", "--config", str(ROOT / "configs" / f"{name}.yaml"), *short.split())
    (path,) = (folder / "runs").glob("*/final_model.zip")
    assert MemoryPPO.load(path).num_timesteps == 256
