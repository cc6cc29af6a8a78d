"""RL Zoo with ``memory_ppo``: commands, files, tuning, and the hyperparameters of this package."""

import argparse
import itertools
import os
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable
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
from stable_baselines3.common.monitor import load_results
from stable_baselines3.common.vec_env import DummyVecEnv

import sb3_cyborg.zoo
from sb3_cyborg import MemoryPPO, make_memory_vec_env
from sb3_cyborg.encoders.encoder_v7 import ENCODERS
from sb3_cyborg.envs import FAMILIES
from sb3_cyborg.envs.memory_chain import MemoryChainVecEnv
from sb3_cyborg.envs.worker_vec_env import WorkerError
from sb3_cyborg.memories.memory_v7 import MEMORIES
from sb3_cyborg.memory_ppo.rollout_buffer_v7 import plan_minibatches, plan_n_steps
from sb3_cyborg.zoo import (
    ALGO,
    COMMANDS,
    GIVEN_BY_ZOO,
    MASKABLE_ALGO,
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


def test_optimize_then_train_with_a_trial(zoo: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    suggest = optuna.Trial.suggest_int

    def small(self: optuna.Trial, name: str, low: int, high: int, **kwargs: Any) -> int:
        return suggest(self, name, low, min(high, 6), **kwargs)

    monkeypatch.setattr(optuna.Trial, "suggest_int", small)  # short rollouts; the space is otherwise the same
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
