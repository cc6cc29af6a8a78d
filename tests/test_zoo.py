"""RL Zoo with ``memory_ppo``: commands, files, tuning, and the hyperparameters of this package."""

import argparse
import itertools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import optuna
import pytest
import yaml
from gymnasium import spaces
from matplotlib.figure import Figure
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from stable_baselines3.common.monitor import load_results
from stable_baselines3.common.vec_env import DummyVecEnv

import sb3_cyborg.zoo
from sb3_cyborg import MemoryPPO, make_memory_vec_env
from sb3_cyborg.encoders.encoder_v7 import ENCODERS
from sb3_cyborg.envs import FAMILIES
from sb3_cyborg.envs.memory_chain import MemoryChainVecEnv
from sb3_cyborg.envs.worker_vec_env import WorkerError
from sb3_cyborg.memories.memory_v7 import MEMORIES
from sb3_cyborg.memory_ppo.rollout_buffer_v7 import check_burn_in, plan_minibatches, plan_n_steps
from sb3_cyborg.zoo import (
    ALGO,
    COMMANDS,
    GIVEN_BY_ZOO,
    MASKABLE_ALGO,
    SeedOfTrial,
    convert_memory_ppo_params,
    hyperparams_file,
    register,
    sample_memory_ppo_params,
    zoo_main,
)
from tests.helpers import ToyEnv

register()

import rl_zoo3.train  # noqa: E402
from rl_zoo3.exp_manager import ExperimentManager  # noqa: E402
from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER, HYPERPARAMS_SAMPLER  # noqa: E402

OurExperimentManager: Any = vars(rl_zoo3.train)["ExperimentManager"]
HYPERPARAMS: dict[str, dict[str, Any]] = yaml.safe_load(hyperparams_file().read_text())
QUICK = ["n_envs:2", "n_steps:64", "batch_size:64"]
TOY = "tests/Toy-v0"
ROOT = Path(__file__).resolve().parent.parent

IMAGE = spaces.Box(0, 255, (64, 64, 3), np.uint8)
FRAMES = spaces.Box(0, 255, (84, 84, 4), np.uint8)
POV_AND_MORE = spaces.Dict({"pov": IMAGE, "vector": spaces.Box(-1, 1, (20,))})
LANDER = spaces.Box(-1, 1, (8,))
MAZE = spaces.Box(0, 1, (36,))
MINERL = list(FAMILIES["MineRL"].kwargs)
SPACES: dict[str, tuple[spaces.Space[Any], spaces.Space[Any]]] = {
    "atari": (FRAMES, spaces.Discrete(6)),
    "LunarLander-v3": (LANDER, spaces.Discrete(4)),
    "LunarLanderNoVel-v3": (LANDER, spaces.Discrete(4)),
    "LunarLanderContinuousNoVel-v3": (LANDER, spaces.Box(-1, 1, (2,))),
    **{name: (MAZE, spaces.Discrete(4)) for name in FAMILIES["POPGym"].kwargs if "Labyrinth" in name},
    **{name: (IMAGE if "reechop" in name else POV_AND_MORE, spaces.Discrete(18)) for name in MINERL},
}
"""Spaces of environments that need Box2D, Atari's games, mazelib or Minecraft."""

MADE_HERE = sorted(set(HYPERPARAMS) - set(SPACES) - {"default"})


@pytest.fixture(autouse=True)
def toy() -> Any:
    gym.register(TOY, entry_point="tests.helpers:ToyEnv")
    yield
    del gym.registry[TOY]


@pytest.fixture
def zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """:return: Runs a command in an empty folder and returns what it printed."""
    monkeypatch.chdir(tmp_path)

    def run(*argv: str) -> str:
        capsys.readouterr()
        zoo_main(argv)
        return capsys.readouterr().out

    return run


def train(zoo: Callable[..., str], *argv: str, env: str = "CartPole-v1", params: tuple[str, ...] = ()) -> str:
    return zoo("train", "--env", env, "-n", "128", "--eval-freq", "-1", "--seed", "1", "-params", *QUICK, *params, *argv)


def trained(env: str = "CartPole-v1", run: int = 1, name: str = "") -> MemoryPPO:
    env = env.replace("/", "-")
    return MemoryPPO.load(f"logs/{ALGO}/{env}_{run}/{name or env}.zip", device="cpu")


def weights(model: MemoryPPO) -> np.ndarray:
    return np.concatenate([parameter.detach().numpy().ravel() for parameter in model.policy.parameters()])


# --- registration -----------------------------------------------------------------------------------------------------


def test_register_adds_one_algorithm() -> None:
    register()
    assert rl_zoo3.ALGOS[ALGO] is MemoryPPO
    assert HYPERPARAMS_SAMPLER[ALGO] is sample_memory_ppo_params
    assert HYPERPARAMS_CONVERTER[ALGO] is convert_memory_ppo_params
    assert vars(rl_zoo3.train)["ExperimentManager"].__mro__[1] is ExperimentManager, "registered twice"


def test_ids_of_both_packages_are_ours() -> None:
    # The Zoo's import registers ids such as CartPoleNoVel-v1, over existing ones.
    for env_id in FAMILIES["NoVel"].kwargs:
        assert gym.spec(env_id).entry_point == FAMILIES["NoVel"].entry_point


def test_without_rl_zoo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rl_zoo3.train", None)
    with pytest.raises(ImportError, match=r'pip install "sb3-cyborg\[zoo\]"'):
        register.__wrapped__()


def test_import_alone_imports_nothing_of_the_zoo() -> None:
    code = "import sys, sb3_cyborg.zoo; assert not {'rl_zoo3', 'optuna', 'matplotlib.pyplot'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.slow
@pytest.mark.parametrize("first", ["from sb3_cyborg.zoo import register; register()", "import rl_zoo3.train"])
def test_two_line_script(first: str, tmp_path: Path) -> None:
    code = f"{first}\nfrom sb3_cyborg.zoo import register; register()\nfrom rl_zoo3.train import train; train()\n"
    (tmp_path / "script.py").write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}")
    argv = ["script.py", "--algo", ALGO, "--env", "CartPoleNoVel-v1", "-n", "512", "--eval-freq", "-1", "--device", "cpu"]
    done = subprocess.run([sys.executable, *argv], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert str(hyperparams_file()) in done.stdout
    assert "Overriding environment" not in done.stderr or "import rl_zoo3" in first
    assert (tmp_path / f"logs/{ALGO}/CartPoleNoVel-v1_1/CartPoleNoVel-v1.zip").is_file()


# --- train, enjoy, plot -----------------------------------------------------------------------------------------------


def test_train_then_evaluate(zoo: Callable[..., str]) -> None:
    argv = ["--env", TOY, "-n", "256", "--eval-freq", "128", "--eval-episodes", "2", "--save-freq", "128"]
    zoo("train", *argv, "--seed", "7", "--verbose", "0", "-params", *QUICK)
    run = Path(f"logs/{ALGO}/tests-Toy-v0_1")
    files = {path.name for path in run.iterdir()}
    assert files >= {"0.monitor.csv", "best_model.zip", "evaluations.npz", "rl_model_128_steps.zip", "tests-Toy-v0.zip"}
    assert np.load(run / "evaluations.npz")["timesteps"].tolist() == [128, 256]
    args = dict(yaml.load((run / "tests-Toy-v0/args.yml").read_text(), Loader=yaml.UnsafeLoader))
    config = dict(yaml.load((run / "tests-Toy-v0/config.yml").read_text(), Loader=yaml.UnsafeLoader))
    assert (args["algo"], args["env"], args["seed"]) == (ALGO, TOY, 7)
    assert config == {**HYPERPARAMS["default"], "n_envs": 2, "n_steps": 64, "batch_size": 64}
    assert load_results(str(run)).l.sum() <= 256
    for which in ([], ["--load-best"], ["--load-last-checkpoint"], ["--load-checkpoint", "128"]):
        output = zoo("evaluate", "--env", TOY, "-n", "60", *which)
        assert "Mean reward" in output
    assert not np.array_equal(weights(trained(TOY)), weights(trained(TOY, name="rl_model_128_steps")))


def test_enjoy_threads_the_state(zoo: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    train(zoo, env=TOY)
    calls: list[tuple[Any, Any, Any]] = []
    predict = MemoryPPO.predict

    def spy(self: MemoryPPO, observation: Any, state: Any, episode_start: Any, deterministic: bool) -> Any:
        actions, new_state = predict(self, observation, state, episode_start, deterministic)
        calls.append((state, episode_start, new_state))
        return actions, new_state

    monkeypatch.setattr(MemoryPPO, "predict", spy)
    zoo("enjoy", "--env", TOY, "-n", "40", "--no-render")
    assert len(calls) == 40
    assert calls[0][0] is None
    assert calls[0][1].all()
    for (_, _, returned), (state, _, _) in itertools.pairwise(calls):
        assert state is returned
    assert 1 < sum(bool(start[0]) for _, start, _ in calls) < 40
    assert all(np.abs(leaf).sum() > 0 for leaf in calls[-1][2].values()), "the state is that of a memory in use"


def test_what_a_file_may_say(zoo: Callable[..., str]) -> None:
    train(
        zoo,
        params=(
            "normalize:True",
            "frame_stack:2",
            "env_wrapper:'rl_zoo3.wrappers.TimeFeatureWrapper'",
            'policy_kwargs:\'dict(encoder="lstm", memory="kv", activation_fn=nn.ReLU)\'',
            "learning_rate:'lin_1e-3'",
            "clip_range:'lin_0.2'",
            "burn_in:16",
        ),
    )
    model = trained()
    assert model.observation_space.shape == (2 * 5,)
    assert model.lr_schedule(0.5) == pytest.approx(5e-4)
    assert model.clip_range(0.5) == pytest.approx(0.1)  # type: ignore[operator]  # a schedule by now
    assert model.burn_in == 16
    assert model.policy_kwargs["encoder"] == "lstm"
    assert Path(f"logs/{ALGO}/CartPole-v1_1/CartPole-v1/vecnormalize.pkl").is_file()
    output = zoo("evaluate", "--env", "CartPole-v1", "-n", "150")
    assert "Loading running average" in output
    assert "Stacking 2 frames" in output
    assert "Mean reward" in output


def test_continue_training(zoo: Callable[..., str]) -> None:
    train(zoo, params=("normalize:True", "normalize_value:False"))
    agent = f"logs/{ALGO}/CartPole-v1_1/CartPole-v1.zip"
    unchanged = ("learning_rate:0.0", "normalize_value:False")
    output = train(zoo, "-i", agent, params=("normalize:True", "n_envs:3", *unchanged))
    assert "Loading saved VecNormalize stats" in output
    assert trained(run=2).n_envs == 3
    np.testing.assert_array_equal(weights(trained(run=2)), weights(trained(run=1)))


class BrokenEnv(ToyEnv):
    """Raises in its first step."""

    def step(self, action: Any) -> Any:
        raise KeyError("the world is broken")


def test_native_forms(zoo: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The Zoo's default runs MemoryChain as arrays; a wrapper needs single environments."""
    made: list[type] = []
    make = make_memory_vec_env

    def spy(*args: Any, **kwargs: Any) -> Any:
        envs = make(*args, **kwargs)
        made.append(type(envs.unwrapped))
        return envs

    monkeypatch.setattr(sb3_cyborg.zoo, "make_memory_vec_env", spy)
    chain = "sb3_cyborg/MemoryChain-v0"
    train(zoo, env=chain)
    assert made
    assert set(made) == {MemoryChainVecEnv}
    assert len(load_results("logs/memory_ppo/sb3_cyborg-MemoryChain-v0_1")) > 1
    made.clear()
    train(zoo, env=chain, params=("env_wrapper:'gymnasium.wrappers.FlattenObservation'",))
    assert set(made) == {DummyVecEnv}


@pytest.mark.slow
def test_subproc(zoo: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    train(zoo, "--vec-env", "subproc")
    assert len(load_results(f"logs/{ALGO}/CartPole-v1_1")) > 0
    assert "Mean reward" in zoo("evaluate", "--env", "CartPole-v1", "-n", "501")
    monkeypatch.setitem(gym.registry, TOY, gym.envs.registration.EnvSpec(TOY, "tests.test_zoo:BrokenEnv"))
    with pytest.raises(WorkerError, match=rf"\({TOY}\) failed in its worker process: KeyError: 'the world is broken'"):
        train(zoo, "--vec-env", "subproc", env=TOY)


def test_video(zoo: Callable[..., str]) -> None:
    train(zoo)
    zoo("record_video", "--env", "CartPole-v1", "-n", "20", "--no-render")
    (video,) = Path(f"logs/{ALGO}/CartPole-v1_1/videos").glob("*.mp4")
    assert video.stat().st_size > 1000


def test_plots(zoo: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[int] = []
    savefig = Figure.savefig

    def spy(self: Figure, *args: Any, **kwargs: Any) -> None:
        lines.append(sum(len(axes.lines) for axes in self.axes))
        savefig(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", spy)
    for seed in ("1", "2"):
        train(zoo, "--seed", seed, "--eval-freq", "64", env=TOY)
    output = zoo("plot_train", "-e", TOY, "-f", "logs", "-w", "5", "--picture", "pictures/train.png")
    assert "Saved pictures/train.png" in output
    output = zoo("all_plots", "-e", TOY, "-f", "logs", "-o", "results", "--no-million", "--picture", "all.png")
    assert "tests-Toy-v0" in output
    zoo("plot_from_file", "-i", "results.pkl", "--no-million", "--picture", "file.png")
    assert lines[:2] == [2, 1], "a curve of each run; a mean of both"
    for picture in ("pictures/train.png", "all.png"):
        assert Path(picture).read_bytes()[1:4] == b"PNG"
    assert len(lines) == 2 + len(list(Path().glob("file*.png"))) > 2


# --- the command line -------------------------------------------------------------------------------------------------


def test_other_algorithms_and_own_files(zoo: Callable[..., str]) -> None:
    peer = ["--algo", "ppo_lstm", "--env", "CartPoleNoVel-v1", "-n"]
    output = zoo("train", *peer, "64", "--eval-freq", "-1", "-params", "n_envs:2")
    assert "rl_zoo3/hyperparams/ppo_lstm.yml" in output
    assert "Mean reward" in zoo("evaluate", *peer, "200", "-f", "logs")
    Path("own.yml").write_text("CartPole-v1: {n_timesteps: 64, n_envs: 1, n_steps: 32, policy: MlpLstmPolicy}")
    output = zoo("train", "--env", "CartPole-v1", "--eval-freq", "-1", "-conf", "own.yml")
    assert "from: own.yml" in output
    assert trained().n_steps == 32


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["trian"], "Did you mean 'train'"),
        (["train", "--env", "CartPol-v1"], "maybe meant CartPole-v1"),
        (["train", "--env", "CartPole-v1", "-params", "batchsize:64"], "Did you mean 'batch_size'"),
        (["train", "--env", "CartPole-v1", "-params", "seed:3"], "Unknown option for memory_ppo 'seed'"),
        (["train", "--env", "CartPole-v1", "-params", "n_steps:128", "seq_len:7"], "`seq_len`=7 does not divide"),
        (["train", "--env", "CartPole-v1", "-params", "policy_kwargs:{'encoder': 'gruu'}"], "Did you mean 'gru'"),
        (["train", "--env", "CartPole-v1", "-i", "nothing.zip"], "valid path to a .zip file"),
        (["enjoy", "--env", "CartPole-v1"], "folder was not found"),
        (["train", "--env", "CartPole-v1", "-optimize", "--storage", "study.db"], "`--storage` must be .* ends with .log"),
        (["train", "--env", "CartPole-v1", "--seeds-per-trial", "2"], "is for `-optimize`"),
        (["train", "--env", "CartPole-v1", "-optimize", "--seeds-per-trial", "0"], "`--seeds-per-trial`"),
    ],
)
def test_mistakes(argv: list[str], message: str, zoo: Callable[..., str]) -> None:
    with pytest.raises(ValueError, match=message):
        zoo(*argv)


def test_help(zoo: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    for argv in ([], ["--help"]):
        output = zoo(*argv)
        assert all(command in output for command in COMMANDS)
    before = sys.argv
    with pytest.raises(SystemExit):
        zoo_main(["train", "--help"])
    assert "sb3-cyborg zoo train" in capsys.readouterr().out
    assert sys.argv is before


# --- tuning -----------------------------------------------------------------------------------------------------------


def test_sampled_values_are_valid() -> None:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    space = None
    for _ in range(300):
        trial = study.ask()
        sampled = sample_memory_ppo_params(trial, 0, 8, {})
        assert space in (None, trial.distributions), "a space that changes turns the Zoo's sampler into a random one"
        space = trial.distributions
        assert convert_memory_ppo_params(trial.params) == sampled
        assert trial.user_attrs["seq_len"] == sampled["seq_len"]
        assert "num_slots" in sampled["policy_kwargs"].get("memory_kwargs", {}) or sampled["policy_kwargs"]["memory"] == "none"
        for n_envs in (1, 3, 8, 64):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # of minibatches that are larger than the rollout
                seq_len, _ = plan_minibatches(sampled["n_steps"], n_envs, sampled["seq_len"], sampled["batch_size"])
            assert seq_len == sampled["seq_len"]
        check_burn_in(sampled["burn_in"], sampled["n_steps"])


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("encoder", ENCODERS)
def test_sampled_models_can_be_made(encoder: str, memory: str) -> None:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    params = study.ask()
    sample_memory_ppo_params(params, 0, 1, {})
    sampled = convert_memory_ppo_params({**params.params, "encoder": encoder, "memory": memory})
    sampled["batch_size"] = sampled["seq_len"]  # of one environment
    model = MemoryPPO("MlpPolicy", "CartPole-v1", device="cpu", **sampled)
    assert model.seq_len == sampled["seq_len"]


@pytest.fixture
def small_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small agents, short rollouts and few epochs. The values that a study draws are those of ``--seed``."""
    suggest, choose = optuna.Trial.suggest_int, optuna.Trial.suggest_categorical
    fixed: dict[str, Any] = {"n_epochs": [2], "hidden_dim": [32], "encoder": ["gru"]}

    def small(self: optuna.Trial, name: str, low: int, high: int, **kwargs: Any) -> int:
        return suggest(self, name, low, min(high, 6), **kwargs)

    def few(self: optuna.Trial, name: str, choices: Any) -> Any:
        return choose(self, name, fixed.get(name, choices))

    monkeypatch.setattr(optuna.Trial, "suggest_int", small)
    monkeypatch.setattr(optuna.Trial, "suggest_categorical", few)
    monkeypatch.setattr(optuna.samplers.TPESampler, "reseed_rng", lambda _: None)


@pytest.mark.usefixtures("small_trials")
def test_optimize_then_train_with_a_trial(zoo: Callable[..., str]) -> None:
    study = ["--storage", "study.log", "--study-name", "tuned"]
    argv = ["-optimize", "--n-trials", "3", "--n-startup-trials", "1", "--n-evaluations", "1", "--eval-episodes", "1"]
    zoo("train", "--env", TOY, "-n", "128", *study, *argv, "--no-optim-plots", "--seed", "0", "-params", "n_envs:2")
    trials = _load_study().trials
    assert [trial.state for trial in trials] == 3 * [optuna.trial.TrialState.COMPLETE]
    zoo("train", "--env", TOY, "-n", "64", "--eval-freq", "-1", *study, "--trial-id", "2", "-params", "n_envs:2")
    wanted = convert_memory_ppo_params(trials[2].params)
    model = trained(TOY, run=2)  # the study uses the first folder, which stays empty
    assert {name: getattr(model, name) for name in ("seq_len", "burn_in", "gamma", "n_epochs")} == {
        name: wanted[name] for name in ("seq_len", "burn_in", "gamma", "n_epochs")
    }
    assert model.policy_kwargs == wanted["policy_kwargs"]
    assert "Mean reward" in zoo("evaluate", "--env", TOY, "-n", "60")


def _load_study() -> optuna.Study:
    storage = optuna.storages.JournalStorage(JournalFileBackend("study.log"))
    return optuna.load_study(study_name="tuned", storage=storage)


TUNE = [
    *["train", "-optimize", "--eval-episodes", "1", "--no-optim-plots", "--study-name", "tuned", "-n", "128", "--seed", "0"],
    "--env",
    TOY,
]


@pytest.mark.usefixtures("small_trials")
def test_a_trial_of_several_seeds(zoo: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    make = make_memory_vec_env

    def spy(*args: Any, **kwargs: Any) -> Any:
        made.append(kwargs["seed"])
        return make(*args, **kwargs)

    monkeypatch.setattr(sb3_cyborg.zoo, "make_memory_vec_env", spy)
    seeds = ["--seed", "7", "--seeds-per-trial", "2", "--n-trials", "1", "--n-evaluations", "2"]
    zoo(*TUNE, *seeds, "--storage", "study.log", "--optimization-log-path", "trials", "-params", "n_envs:2")
    (trial,) = _load_study().trials
    values = trial.user_attrs["values"]
    assert len(set(values)) == 2, "the return of ToyEnv is random: of two seeds it differs"
    assert trial.value == pytest.approx(np.mean(values))
    assert list(trial.intermediate_values) == [1, 2, 3, 4]
    assert trial.intermediate_values[2] == values[0]
    assert trial.intermediate_values[4] == pytest.approx(np.mean(values))
    assert made[-4:] == [7, 7, 8, 8], "environments of training and evaluation"
    assert {path.name for path in Path("trials").iterdir()} == {"trial_0_seed_0", "trial_0_seed_1"}


def test_reports_of_seeds_are_means_after_the_same_steps() -> None:
    study = optuna.create_study()
    trial, reports = study.ask(), list[list[float]]()
    for returns in ([1.0, 2.0, 100.0], [3.0, 6.0], [5.0]):
        reports.append([])
        seed = SeedOfTrial(trial, reports, n_evaluations=2)
        for step, value in enumerate(returns, start=1):
            seed.report(value, step)
    assert study.trials[0].intermediate_values == {1: 1, 2: 2, 3: 2, 4: 4, 5: 3}
    assert (seed.number, seed.should_prune()) == ("0_seed_2", False)


@pytest.mark.parametrize("storage", ["study.log", "sqlite:///study.db", None])
def test_sessions_and_workers_of_a_study_draw_other_values(tmp_path: Path, storage: str | None) -> None:
    quiet: dict[str, Any] = {"seed": 0, "verbose": 0, "n_startup_trials": 3, "storage": storage}
    manager = OurExperimentManager(argparse.Namespace(), ALGO, "CartPole-v1", str(tmp_path), **quiet)
    drawn = []
    for _ in range(2):
        study = optuna.create_study(sampler=manager._create_sampler("tpe"))
        drawn.append([study.ask().suggest_float("x", 0, 1) for _ in range(3)])
    assert (drawn[0] == drawn[1]) == (storage is None), "the Zoo's seed alone would repeat them"


def test_trials_of_dead_workers_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sb3_cyborg.zoo, "HEARTBEAT_SECONDS", 1)
    options: dict[str, Any] = {"storage": f"sqlite:///{tmp_path}/study.db", "study_name": "tuned", "load_if_exists": True}
    dead = sb3_cyborg.zoo._create_study(**options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of Optuna: `ask` alone sends no heartbeats
        dead.ask()
    storage: Any = dead._storage
    storage.record_heartbeat(1)
    study = sb3_cyborg.zoo._create_study(**options)
    study.optimize(lambda _: 1.0, n_trials=1)
    assert [trial.state for trial in study.trials] == [TrialState.RUNNING, TrialState.COMPLETE], "it may still live"
    time.sleep(3.5)
    study.optimize(lambda _: 1.0, n_trials=1)
    assert [trial.state for trial in study.trials] == [TrialState.FAIL, TrialState.COMPLETE, TrialState.COMPLETE]


@pytest.mark.usefixtures("small_trials")
def test_sigterm_ends_a_worker_and_its_trial_fails(zoo: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    def sample(trial: optuna.Trial, *args: Any) -> dict[str, Any]:
        if trial.number == 1:
            signal.raise_signal(signal.SIGTERM)
        return sample_memory_ppo_params(trial, *args)

    monkeypatch.setitem(HYPERPARAMS_SAMPLER, ALGO, sample)
    before = signal.getsignal(signal.SIGTERM)
    output = zoo(*TUNE, "--n-trials", "3", "--n-evaluations", "1", "--storage", "study.log")
    assert "Best trial:" in output
    assert [trial.state for trial in _load_study().trials] == [TrialState.COMPLETE, TrialState.FAIL]
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.slow
@pytest.mark.usefixtures("small_trials")
def test_trials_in_threads_leave_the_zoo_as_it_was(zoo: Callable[..., str]) -> None:
    module: Any = sys.modules["rl_zoo3.exp_manager"]
    before = module.make_vec_env, module.TrialEvalCallback, optuna.create_study
    zoo(*TUNE, "--n-trials", "2", "--n-jobs", "2", "--n-evaluations", "1", "--storage", "study.log")
    assert [trial.state for trial in _load_study().trials] == 2 * [TrialState.COMPLETE]
    assert (module.make_vec_env, module.TrialEvalCallback, optuna.create_study) == before


# --- several processes ------------------------------------------------------------------------------------------------

WORKER = """
import os, sys, time
from pathlib import Path
import optuna
import tests.helpers
import gymnasium as gym

gym.register("tests/Toy-v0", entry_point="tests.helpers:ToyEnv")
suggest, choose = optuna.Trial.suggest_int, optuna.Trial.suggest_categorical

def small(self, name, low, high, **kwargs):
    self.set_user_attr("worker", os.getpid())
    Path(f"worker_{os.getpid()}").touch()
    while len(list(Path().glob("worker_*"))) < 2:
        time.sleep(0.05)
    return suggest(self, name, low, min(high, 6), **kwargs)

optuna.Trial.suggest_int = small
optuna.Trial.suggest_categorical = lambda self, name, choices: choose(self, name, [2] if name == "n_epochs" else choices)
from sb3_cyborg.zoo import zoo_main
zoo_main(sys.argv[1:])
"""
"""A worker whose first trial waits until two workers have one."""


def two_workers(folder: Path, storage: str, study: optuna.Study) -> None:
    """
    Two processes tune on one study, in which each evaluation of three earlier trials was better than any return of ToyEnv. So
    the pruner, which reads them from the storage, ends each trial at its first evaluation.
    """
    (folder / "worker.py").write_text(WORKER)
    for _ in range(3):
        reports = {1: 1e6, 2: 1e6}
        study.add_trial(optuna.trial.create_trial(value=1e6, intermediate_values=reports))
    flags = ["--storage", storage, "--n-trials", "2", "--n-startup-trials", "1", "--n-evaluations", "2", "--num-threads", "1"]
    command = [sys.executable, "worker.py", *TUNE, *flags, "--seed", "0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": environment}
    workers = [subprocess.Popen(command, cwd=folder, **options) for _ in range(2)]
    try:
        for worker in workers:
            output, _ = worker.communicate(timeout=250)
            assert worker.returncode == 0, output
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    trials = study.trials
    assert [trial.number for trial in trials] == list(range(3 + 4))
    assert [trial.state for trial in trials[3:]] == 4 * [TrialState.PRUNED]
    assert [list(trial.intermediate_values) for trial in trials[3:]] == 4 * [[1]]
    made = [trial.user_attrs["worker"] for trial in trials[3:]]
    assert sorted(made.count(worker.pid) for worker in workers) == [2, 2]
    assert len({trial.params["learning_rate"] for trial in trials[3:]}) == 4, "no worker repeats what another one tries"


@pytest.mark.slow
def test_two_processes_on_one_journal(tmp_path: Path) -> None:
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(tmp_path / "study.log")))
    two_workers(tmp_path, "study.log", optuna.create_study(study_name="tuned", storage=storage, direction="maximize"))


@pytest.fixture
def postgresql() -> Iterator[str]:
    """:return: The URL of a database of PostgreSQL, which runs in a temporary folder and ends with the test."""
    if not hasattr(os, "geteuid"):
        pytest.skip("PostgreSQL is started on POSIX only here")
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    initdb = Path(shutil.which("initdb") or (found[-1] if found else ""))
    if not initdb.is_file():
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    pytest.importorskip("psycopg", reason='no driver: pip install "sb3-cyborg[postgresql]"')
    user: list[str] = []
    folder = Path(tempfile.mkdtemp(prefix="pg"))  # a short path, for the socket, that another user can reach
    if os.geteuid() == 0:  # initdb refuses root
        try:
            shutil.chown(folder, "postgres")
        except LookupError:
            pytest.skip("as root, PostgreSQL needs the user postgres")
        user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]

    def run(name: str, *arguments: str) -> None:
        subprocess.run(
            [*user, initdb.with_name(name), "-D", folder / "data", *arguments], check=True, cwd="/", stdout=subprocess.DEVNULL
        )

    run("initdb", "--auth=trust", "--username=tuner", "--no-sync")
    run("pg_ctl", "-o", f"-c listen_addresses='' -k {folder}", "--log", str(folder / "log"), "--wait", "start")
    try:
        yield f"postgresql+psycopg://tuner@/postgres?host={folder}"
    finally:
        run("pg_ctl", "--mode=immediate", "stop")
        shutil.rmtree(folder)


@pytest.mark.slow
def test_two_processes_on_postgresql(tmp_path: Path, postgresql: str) -> None:
    two_workers(tmp_path, postgresql, optuna.create_study(study_name="tuned", storage=postgresql, direction="maximize"))


@pytest.mark.slow
def test_two_processes_create_one_study(tmp_path: Path, postgresql: str) -> None:
    """Both find an empty database: one creates the tables and the study, the other takes them."""
    code = "import sys, sb3_cyborg.zoo as z; s = z._create_study(storage=sys.argv[1], study_name='new', load_if_exists=True);"
    code += "input(); s.optimize(lambda trial: 1.0, n_trials=5)"
    options: dict[str, Any] = {"stdin": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    workers = [subprocess.Popen([sys.executable, "-c", code, postgresql], **options) for _ in range(2)]
    for worker in workers:
        _, errors = worker.communicate("\n", timeout=250)
        assert worker.returncode == 0, errors
    assert len(optuna.load_study(study_name="new", storage=postgresql).trials) == 10


# --- our hyperparameters ----------------------------------------------------------------------------------------------


def test_every_environment_has_an_entry() -> None:
    masked = set(FAMILIES["POPGymMasked"].kwargs)
    ids = {env_id for family in FAMILIES.values() for env_id in family.kwargs} - masked
    assert ids <= set(HYPERPARAMS)
    assert set(yaml.safe_load(hyperparams_file(MASKABLE_ALGO).read_text())) == masked | {"default"}
    assert set(HYPERPARAMS) - ids == {"atari", "default", "CartPole-v1", "LunarLander-v3"}


def set_up(name: str, folder: Path, **hyperparams: Any) -> tuple[Any, MemoryPPO]:
    """:return: The model that the Zoo creates from an entry."""
    quiet: dict[str, Any] = {"seed": 0, "verbose": 0, "eval_freq": -1, "device": "cpu", "hyperparams": hyperparams or None}
    manager = OurExperimentManager(argparse.Namespace(), ALGO, name, str(folder), **quiet)
    model, _ = manager.setup_experiment()
    return manager, model


@pytest.mark.parametrize("name", MADE_HERE)
def test_entry(name: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*mini-batch")
        manager, model = set_up(name, tmp_path)
    entry = HYPERPARAMS[name]
    for option in set(entry) & {"n_steps", "seq_len", "burn_in", "n_envs", "gamma", "use_sde", "log_barrier_coef"}:
        assert getattr(model, option) == entry[option]
    assert manager.n_timesteps == entry["n_timesteps"]
    normalize = entry.get("normalize", False)
    assert manager.normalize == bool(normalize)
    if isinstance(normalize, dict):
        assert normalize.items() <= manager.normalize_kwargs.items()
    assert model.env is not None
    model.env.close()


@pytest.mark.parametrize("name", SPACES)
def test_entry_by_spaces(name: str, tmp_path: Path) -> None:
    entry = dict(HYPERPARAMS[name])
    if name == "atari":
        assert entry.pop("frame_stack") == FRAMES.shape[-1]
        entry.pop("env_wrapper")
    conf = tmp_path / "one.yml"
    conf.write_text(yaml.safe_dump({"tests/Spaces-v0": entry}))
    observations, actions = SPACES[name]
    kwargs = {"observation_space": observations, "action_space": actions}
    gym.register("tests/Spaces-v0", entry_point="tests.helpers:ToyEnv", kwargs=kwargs)
    quiet: dict[str, Any] = {"seed": 0, "verbose": 0, "eval_freq": -1, "device": "cpu", "config": str(conf)}
    try:
        manager = OurExperimentManager(argparse.Namespace(), ALGO, "tests/Spaces-v0", str(tmp_path), **quiet)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", ".*mini-batch")
            model, _ = manager.setup_experiment()
    finally:
        del gym.registry["tests/Spaces-v0"]
    assert model.n_steps == entry.get("n_steps", plan_n_steps(model.n_envs, entry.get("seq_len")))


@pytest.mark.slow
@pytest.mark.parametrize("name", MADE_HERE)
def test_entry_trains(name: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*mini-batch")  # two environments instead of many
        _, model = set_up(name, tmp_path, n_envs=2, n_steps=128, seq_len=32)
        before = weights(model)
        model.learn(512)  # two rollouts: a linear learning rate is 0 in the last
    assert not np.array_equal(weights(model), before)
    assert np.isfinite(weights(model)).all()


def test_sampler_knows_what_the_constructor_takes() -> None:
    parameters = set(MemoryPPO.__init__.__annotations__) - GIVEN_BY_ZOO
    trial = optuna.create_study().ask()
    assert set(sample_memory_ppo_params(trial, 0, 1, {})) <= parameters


@pytest.mark.slow
def test_file_is_in_sdist_and_wheel(tmp_path: Path) -> None:
    # The wheel is built from the sdist.
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    installed = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    code = "from sb3_cyborg.zoo import hyperparams_file; print(hyperparams_file())"
    env = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True, check=True)
    found = installed / "sb3_cyborg/zoo_hyperparams/memory_ppo.yml"
    assert Path(done.stdout.strip()) == found
    assert found.read_text() == hyperparams_file().read_text()
    assert found.with_name("maskable_memory_ppo.yml").read_text() == hyperparams_file(MASKABLE_ALGO).read_text()
