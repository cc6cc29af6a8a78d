"""
Integration of ``MemoryPPO`` and ``MaskableMemoryPPO`` into RL Zoo (https://github.com/DLR-RM/rl-baselines3-zoo), as the
algorithms ``memory_ppo`` and ``maskable_memory_ppo``.

The Zoo has no interface for further algorithms, so :func:`register` extends its registries, in the current process only.
Needs ``pip install "sb3-cyborg[zoo]"``.
"""

import argparse
import contextlib
import copy
import functools
import inspect
import runpy
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
from stable_baselines3.common.vec_env import SubprocVecEnv, VecEnv

from sb3_cyborg.checks import check_options, check_positive, unknown_name
from sb3_cyborg.encoders.encoder_v7 import ENCODERS
from sb3_cyborg.envs.registration import family_of
from sb3_cyborg.envs.vec_env import make_memory_vec_env
from sb3_cyborg.maskable import MaskableEvalCallback, WithActionMasks
from sb3_cyborg.memories.memory_v7 import MEMORIES
from sb3_cyborg.memory_ppo.maskable import MaskableMemoryPPO
from sb3_cyborg.memory_ppo.memory_ppo import MemoryPPO

if TYPE_CHECKING:
    import optuna

ALGO, MASKABLE_ALGO = "memory_ppo", "maskable_memory_ppo"
"""Names of ``MemoryPPO`` and ``MaskableMemoryPPO`` in the Zoo."""

OUR_ALGOS: dict[str, type[MemoryPPO]] = {ALGO: MemoryPPO, MASKABLE_ALGO: MaskableMemoryPPO}
"""The algorithms of this package, by name."""

LOG_FOLDER = "logs"
"""Default output folder of the Zoo's ``train``."""

GIVEN_BY_ZOO = {"env", "seed", "device", "tensorboard_log", "verbose", "_init_setup_model"}
"""Arguments of ``MemoryPPO`` that the Zoo sets, so that a file of hyperparameters must not contain them."""

CONVERTED = ("n_steps", "seq_len", "burn_in", "batch_size", "gamma", "gae_lambda")
"""Hyperparameters that are sampled in another form, e.g. as a power of two. A trial also stores their converted values."""


OPEN_ATTEMPTS = 5
"""Number of attempts, a second apart, to open a database in which another worker makes the tables."""

HEARTBEAT_SECONDS = 60
"""Interval at which a worker that tunes tells the database that it lives. After twice this time its trial counts as failed."""


def hyperparams_file(algo: str = ALGO) -> Path:
    """
    :param algo: One of :data:`OUR_ALGOS`.
    :return: The file of the Zoo's hyperparameters of the algorithm, in the installed package or in the checkout.
    """
    package = Path(__file__).resolve().parent
    name = Path("zoo_hyperparams", f"{algo}.yml")
    for folder in (package, package.parent):
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"{package / name} is missing: install sb3-cyborg again, or pass a file of your own with -conf.")


@functools.cache
def register() -> None:
    """
    Registers ``memory_ppo`` and ``maskable_memory_ppo`` with RL Zoo, in the current process.

    Afterwards ``rl_zoo3.train.train()``, ``rl_zoo3.enjoy.enjoy()`` and the other scripts accept them as ``--algo``.
    ``rl_zoo3.ALGOS`` contains the classes and the samplers of ``-optimize`` one for them. Without ``-conf`` the
    hyperparameters come from :func:`hyperparams_file`. Other algorithms do not change.

    :raises ImportError: if RL Zoo is not installed, with the command that installs it.
    """
    train, optimization = _import_zoo("rl_zoo3.train"), _import_zoo("rl_zoo3.hyperparams_opt")
    for algo, algorithm in OUR_ALGOS.items():
        train.ALGOS[algo] = algorithm  # all of the Zoo's modules share this dict
        optimization.HYPERPARAMS_SAMPLER[algo] = sample_memory_ppo_params
        optimization.HYPERPARAMS_CONVERTER[algo] = convert_memory_ppo_params
    train.ExperimentManager = _experiment_manager(train.ExperimentManager)  # type: ignore[attr-defined]


def _import_zoo(name: str) -> ModuleType:
    """:return: A module of RL Zoo. Its import does not replace registered environments such as ``CartPoleNoVel-v1``."""
    registered = dict(gym.registry)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*Overriding environment .*NoVel")
            module = import_module(name)
    except ImportError as error:
        raise ImportError(f'RL Zoo or a part of it cannot be imported ({error}): pip install "sb3-cyborg[zoo]"') from error
    gym.registry.update(registered)
    return module


def _experiment_manager(base: type[Any]) -> type[Any]:
    """
    :param base: The Zoo's ``ExperimentManager``.
    :return: A subclass. For our algorithms it reads :func:`hyperparams_file`, refuses unknown hyperparameters, and creates
        environments with :func:`~sb3_cyborg.envs.vec_env.make_memory_vec_env`. Evaluations of ``maskable_memory_ppo`` have
        masks. For all algorithms, a trial may have several seeds, and several processes may work on one study.
    """
    zoo = _import_zoo("rl_zoo3.exp_manager")
    making_envs = threading.Lock()  # of the Zoo's module, which is changed meanwhile; `--n-jobs` are threads

    class MaskableTrialEvalCallback(MaskableEvalCallback, zoo.TrialEvalCallback):  # type: ignore[misc,name-defined]
        """The Zoo's evaluation of a trial, with action masks."""

    masked = {"EvalCallback": MaskableEvalCallback, "TrialEvalCallback": MaskableTrialEvalCallback}

    class MemoryExperimentManager(base):  # type: ignore[misc]  # the Zoo has no types
        seeds_per_trial = 1

        def __init__(self, args: argparse.Namespace, algo: str, *rest: Any, config: str | None = None, **options: Any) -> None:
            if algo in OUR_ALGOS:
                config = str(hyperparams_file(algo)) if config is None else config
                if config.endswith((".yml", ".yaml")):  # the Zoo takes modules and files of Python as well
                    _check_hyperparams(Path(config))
            super().__init__(args, algo, *rest, config=config, **options)
            _check_storage(self.storage)

        def create_envs(self, *args: Any, **kwargs: Any) -> Any:
            with making_envs, _replaced(zoo, {"make_vec_env": self._make_vec_env} if self.algo in OUR_ALGOS else {}):
                return super().create_envs(*args, **kwargs)

        def create_callbacks(self) -> Any:
            with _replaced(zoo, masked if self.algo == MASKABLE_ALGO else {}):
                return super().create_callbacks()

        def hyperparameters_optimization(self) -> None:
            names = masked if self.algo == MASKABLE_ALGO else {}
            with _replaced(zoo, names), _replaced(zoo.optuna, {"create_study": _create_study}), _terminable():
                super().hyperparameters_optimization()

        def _create_sampler(self, sampler_method: str) -> Any:
            sampler = super()._create_sampler(sampler_method)
            if self.storage is not None:
                # With one seed for all workers, and for each session of a study, all would try the same values.
                sampler.reseed_rng()
            return sampler

        def objective(self, trial: "optuna.Trial") -> float:
            if self.seeds_per_trial == 1:
                return float(super().objective(trial))
            values: list[float] = []
            reports: list[list[float]] = []
            for index in range(self.seeds_per_trial):
                seeded = copy.copy(self)  # trials may run in threads, which share this object
                seeded.seed = self.seed + index
                reports.append([])
                values.append(float(base.objective(seeded, SeedOfTrial(trial, reports, self.n_evaluations))))
                trial.set_user_attr("values", values)
            return float(np.mean(values))

        def _make_vec_env(
            self, make_env: Callable[..., Any], *, vec_env_cls: type[VecEnv], vec_env_kwargs: Any, **kwargs: Any
        ) -> VecEnv:
            """Replaces SB3's ``make_vec_env``. The Zoo's default, ``--vec-env dummy``, selects the native form if any."""
            env_id = self.env_name.gym_id
            make_env.__name__ = env_id  # the name in errors of workers
            family = family_of(env_id)
            if vec_env_cls is SubprocVecEnv:
                return make_memory_vec_env(make_env, vec_env="subproc", **kwargs)
            if family is not None and family.native and kwargs["wrapper_class"] is None:
                return make_memory_vec_env(env_id, vec_env="native", **kwargs)
            return make_memory_vec_env(make_env, vec_env="dummy", **kwargs)

        def _preprocess_hyperparams(self, hyperparams: dict[str, Any]) -> Any:
            # The first result no longer contains the hyperparameters that the Zoo reads itself.
            processed = super()._preprocess_hyperparams(hyperparams)
            if self.algo in OUR_ALGOS:
                check_options(self.algo, processed[0], set(inspect.signature(MemoryPPO).parameters) - GIVEN_BY_ZOO)
            return processed

        def _preprocess_schedules(self, hyperparams: dict[str, Any]) -> Any:
            # MemoryPPO reads `lin_` itself; objects of the Zoo's class would be pickled in the file of the model.
            return hyperparams if self.algo in OUR_ALGOS else super()._preprocess_schedules(hyperparams)

    return MemoryExperimentManager


class SeedOfTrial:
    """
    One seed of a trial that has several, one after another. The Zoo takes it for a trial.

    An evaluation reports the mean over the seeds so far, of their evaluations after the same number of steps. So the pruner
    compares trials after equally many seeds and steps. The last report is the value of the trial.

    :param trial: The trial.
    :param reports: The mean returns that each seed has reported; the list of this seed is the last one.
    :param n_evaluations: Number of evaluations of each seed. Further ones, in a last rollout that is longer, are not reported.
    """

    def __init__(self, trial: "optuna.Trial", reports: list[list[float]], n_evaluations: int) -> None:
        self.trial, self.reports, self.n_evaluations = trial, reports, n_evaluations
        self.number = f"{trial.number}_seed_{len(reports) - 1}"  # for the name of its folder

    def __getattr__(self, name: str) -> Any:
        return getattr(self.trial, name)

    def report(self, value: float, step: int) -> None:
        """
        :param value: Mean return of an evaluation.
        :param step: Number of the evaluation of this seed, from 1.
        """
        self.reports[-1].append(value)
        if step <= self.n_evaluations:
            mean = float(np.mean([values[step - 1] for values in self.reports]))
            self.trial.report(mean, (len(self.reports) - 1) * self.n_evaluations + step)


def _check_storage(storage: str | None) -> None:
    """:raises ValueError: for a ``--storage`` that is neither a journal nor the URL of a database."""
    if storage is not None and not storage.endswith(".log") and "://" not in storage:
        raise ValueError(
            f"`--storage` must be a file that ends with .log, which becomes a journal, or the URL of a database, e.g. "
            f"postgresql+psycopg://user@host/name, got {storage!r}."
        )


def _create_study(*, storage: Any, **options: Any) -> "optuna.Study":
    """:return: Optuna's study. In a database, trials of workers that have died are found by their heartbeat, and fail."""
    import optuna

    if isinstance(storage, str):
        storage = _open_database(storage)
    return optuna.study.create_study(storage=storage, **options)


def _open_database(url: str) -> "optuna.storages.RDBStorage":
    """:return: The storage in a database. Of several workers that find it empty, one makes its tables, and the others wait."""
    import optuna
    import sqlalchemy.exc

    options: dict[str, Any] = {"engine_kwargs": {"pool_pre_ping": True}, "heartbeat_interval": HEARTBEAT_SECONDS}
    attempt = 1
    while True:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # of the heartbeat
                return optuna.storages.RDBStorage(url, **options)
        except (sqlalchemy.exc.IntegrityError, sqlalchemy.exc.ProgrammingError):  # what another worker makes is there already
            if attempt == OPEN_ATTEMPTS:
                raise
            attempt += 1
            time.sleep(1)


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """:return: A context in which ``SIGTERM`` acts as Ctrl-C: Optuna marks the trial as failed, the Zoo writes its report."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _check_hyperparams(path: Path) -> None:
    """:raises ValueError: for a file without a mapping of environments to their hyperparameters; the Zoo expects one."""
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"The hyperparameters {str(path)!r} cannot be read: {' '.join(str(error).split())}.") from error
    if not isinstance(content, dict) or not all(isinstance(part, dict) for part in content.values()):
        raise ValueError(f"{str(path)!r} must hold hyperparameters by environment, e.g. `CartPole-v1: {{n_timesteps: 1e5}}`.")


@contextlib.contextmanager
def _replaced(module: ModuleType, values: Mapping[str, Any]) -> Iterator[None]:
    """:return: A context in which names of a module have other values."""
    before = {name: getattr(module, name) for name in values}
    vars(module).update(values)
    try:
        yield
    finally:
        vars(module).update(before)


# --- tuning -----------------------------------------------------------------------------------------------------------


def sample_memory_ppo_params(
    trial: "optuna.Trial", n_actions: int, n_envs: int, additional_args: dict[str, Any]
) -> dict[str, Any]:
    """
    Samples hyperparameters for the Zoo's ``-optimize``. ``MemoryPPO`` accepts every combination.

    The search space is the same in every trial, because the Zoo's multivariate TPE sampler requires it. Values that do not
    apply, such as the slots of the memory ``none``, are dropped afterwards. Registered encoders and memories are included.

    :param trial: The trial.
    :param n_actions: Ignored.
    :param n_envs: Ignored, because a loaded study (``--trial-id``) must convert to the same hyperparameters.
    :param additional_args: Ignored.
    :return: Arguments of ``MemoryPPO``.
    """
    sampled = {
        "encoder": trial.suggest_categorical("encoder", list(ENCODERS)),
        "memory": trial.suggest_categorical("memory", list(MEMORIES)),
        "num_slots_pow": trial.suggest_int("num_slots_pow", 3, 7),
        "hidden_dim": trial.suggest_categorical("hidden_dim", [32, 64, 128, 256]),
        "num_layers": trial.suggest_int("num_layers", 1, 2),
        "use_last_action": trial.suggest_categorical("use_last_action", [False, True]),
        "n_steps_pow": trial.suggest_int("n_steps_pow", 5, 10),
        "seq_len_pow": trial.suggest_int("seq_len_pow", 3, 8),
        "burn_in": trial.suggest_categorical("burn_in", [0, 8, 32]),
        "batch_size_pow": trial.suggest_int("batch_size_pow", 6, 12),
        "n_epochs": trial.suggest_categorical("n_epochs", [2, 4, 10, 20]),
        "learning_rate": trial.suggest_float("learning_rate", 1e-5, 3e-3, log=True),
        "one_minus_gamma": trial.suggest_float("one_minus_gamma", 1e-4, 0.1, log=True),
        "one_minus_gae_lambda": trial.suggest_float("one_minus_gae_lambda", 1e-4, 0.2, log=True),
        "ent_coef": trial.suggest_float("ent_coef", 1e-8, 0.1, log=True),
        "clip_range": trial.suggest_categorical("clip_range", [0.1, 0.2, 0.3, 0.4]),
        "max_grad_norm": trial.suggest_float("max_grad_norm", 0.3, 2.0),
        "net_arch": trial.suggest_categorical("net_arch", ["tiny", "small", "medium"]),
        "activation_fn": trial.suggest_categorical("activation_fn", ["tanh", "relu"]),
    }
    hyperparams = convert_memory_ppo_params(sampled)
    for name in CONVERTED:
        trial.set_user_attr(name, hyperparams[name])
    return hyperparams


def convert_memory_ppo_params(sampled_params: Mapping[str, Any]) -> dict[str, Any]:
    """
    :param sampled_params: Parameters of a trial, as :func:`sample_memory_ppo_params` names them.
    :return: Arguments of ``MemoryPPO``. ``seq_len`` divides ``n_steps`` and ``batch_size``, because all are powers of two;
        ``burn_in`` is at most half of ``n_steps``.
    """
    hyperparams: dict[str, Any] = _import_zoo("rl_zoo3.hyperparams_opt").convert_onpolicy_params(dict(sampled_params))
    hyperparams["seq_len"] = min(2 ** hyperparams.pop("seq_len_pow"), hyperparams["n_steps"])
    hyperparams["burn_in"] = min(hyperparams["burn_in"], hyperparams["n_steps"] // 2)
    hyperparams["batch_size"] = max(hyperparams["batch_size"], hyperparams["seq_len"])
    core = {name: hyperparams.pop(name) for name in ("encoder", "memory", "hidden_dim", "num_layers", "use_last_action")}
    num_slots = 2 ** hyperparams.pop("num_slots_pow")
    if "num_slots" in MEMORIES.options(core["memory"]):
        core["memory_kwargs"] = {"num_slots": num_slots}
    hyperparams["policy_kwargs"] |= core
    return hyperparams


# --- the command line -------------------------------------------------------------------------------------------------


def zoo_main(argv: Sequence[str]) -> None:
    """
    Runs a script of RL Zoo with our algorithms, of which ``memory_ppo`` is the default of ``--algo``.

    :param argv: One of :data:`COMMANDS`, then the script's own arguments.
    :raises ImportError: if RL Zoo is not installed, with the command that installs it.
    :raises ValueError: for an unknown command, wrong hyperparameters, and paths that do not exist.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return
    command, *arguments = argv
    if command not in COMMANDS:
        raise unknown_name("zoo command", command, COMMANDS)
    register()
    try:
        COMMANDS[command][0](command, arguments)
    except AssertionError as error:
        if not str(error):
            raise
        raise ValueError(str(error)) from error  # the Zoo asserts that paths exist


def _run(command: str, arguments: Sequence[str], script: Callable[[], Any]) -> None:
    """Calls a script, which reads ``sys.argv``."""
    before = sys.argv
    sys.argv = [f"sb3-cyborg zoo {command}", *arguments]
    try:
        script()
    finally:
        sys.argv = before


def _train(command: str, arguments: Sequence[str]) -> None:
    """Runs the Zoo's ``train``. ``--seeds-per-trial`` is our addition."""
    parser = argparse.ArgumentParser(prog="sb3-cyborg zoo train", add_help=False, allow_abbrev=False)
    parser.add_argument("--seeds-per-trial", type=int)
    parser.add_argument("-optimize", "--optimize-hyperparameters", action="store_true")
    options, _ = parser.parse_known_args(arguments)
    seeds = options.seeds_per_trial
    module = _import_zoo("rl_zoo3.train")
    managers: dict[str, Any] = {}
    if seeds is not None:
        check_positive(**{"--seeds-per-trial": seeds})
        if not options.optimize_hyperparameters:
            raise ValueError("`--seeds-per-trial` is for `-optimize`: add it, or leave this out.")
        base: Any = vars(module)["ExperimentManager"]
        managers["ExperimentManager"] = type(base.__name__, (base,), {"seeds_per_trial": seeds})
        own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        own.add_argument("--seeds-per-trial")
        arguments = own.parse_known_args(arguments)[1]
    with _replaced(module, managers):
        _run(command, ["--algo", ALGO, *arguments], module.train)


def _where_trained(arguments: Sequence[str]) -> list[str]:
    """
    :param arguments: Arguments of a script.
    :return: The same with ``memory_ppo`` as default, and with the folder of ``train`` if the algorithm is one of ours.
    """
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--algo", default=ALGO)
    algo = parser.parse_known_args(arguments)[0].algo
    return ["--algo", ALGO, *(["-f", LOG_FOLDER] if algo in OUR_ALGOS else []), *arguments]


@contextlib.contextmanager
def _agents_read_masks(module: ModuleType) -> Iterator[None]:
    """
    A context in which a ``MaskableMemoryPPO`` that a script loads acts with the masks of its environments.

    The scripts call ``predict`` without masks.

    :param module: The module whose ``create_test_env`` the script calls to make environments, before it loads the agent.
    """
    algos, made = _import_zoo("rl_zoo3.train").ALGOS, list[VecEnv]()
    create_test_env = module.create_test_env

    def create(*args: Any, **kwargs: Any) -> VecEnv:
        made.append(create_test_env(*args, **kwargs))
        return made[-1]

    class WithMasksOfScript(MaskableMemoryPPO):
        @classmethod
        def load(cls, *args: Any, **kwargs: Any) -> Any:
            return WithActionMasks(MaskableMemoryPPO.load(*args, **kwargs), made[-1])

    algos[MASKABLE_ALGO] = WithMasksOfScript
    try:
        with _replaced(module, {"create_test_env": create}):
            yield
    finally:
        algos[MASKABLE_ALGO] = MaskableMemoryPPO


def _enjoy(command: str, arguments: Sequence[str]) -> None:
    module = _import_zoo("rl_zoo3.enjoy")
    with _agents_read_masks(module):
        _run(command, _where_trained(arguments), module.enjoy)


def _evaluate(command: str, arguments: Sequence[str]) -> None:
    _enjoy(command, [*arguments, "--no-render"])


def _record_video(command: str, arguments: Sequence[str]) -> None:
    with _agents_read_masks(_import_zoo("rl_zoo3.utils")):
        _run(command, _where_trained(arguments), lambda: runpy.run_module("rl_zoo3.record_video", run_name="__main__"))


def _plot(command: str, arguments: Sequence[str]) -> None:
    """Runs a plotting script. ``--picture`` is our addition, because the Zoo shows learning curves only in a window."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--picture", type=Path)
    options, rest = parser.parse_known_args(arguments)
    if options.picture:
        _import_zoo("matplotlib").use("Agg")
    script = getattr(_import_zoo("rl_zoo3.plots"), command)
    # The name of a run's folder is the environment's id with dashes for slashes.
    rest = [argument.replace("/", "-") if argument in gym.registry else argument for argument in rest]
    defaults = [] if command == "plot_from_file" else ["-a", ALGO]
    with warnings.catch_warnings():
        if options.picture:
            warnings.filterwarnings("ignore", ".*non-interactive")
        _run(command, [*defaults, *rest], script)
    if options.picture:
        _save_figures(options.picture)
    elif _import_zoo("matplotlib").get_backend().lower() == "agg":
        print("There is no display for the plots: add --picture FILE to save them.", file=sys.stderr)


def _save_figures(path: Path) -> None:
    """Saves and closes all open figures. Several figures get their number before the suffix of ``path``."""
    plt = _import_zoo("matplotlib.pyplot")
    numbers = plt.get_fignums()
    path.parent.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        name = path if len(numbers) == 1 else path.with_stem(f"{path.stem}_{number}")
        plt.figure(number).savefig(name, dpi=150)
        print(f"Saved {name}")
    plt.close("all")


COMMANDS: dict[str, tuple[Callable[[str, Sequence[str]], None], str]] = {
    "train": (_train, "train an agent, or tune its hyperparameters (-optimize)"),
    "enjoy": (_enjoy, "watch a trained agent"),
    "evaluate": (_evaluate, "print the mean return of a trained agent, without rendering"),
    "record_video": (_record_video, "record a video of a trained agent"),
    "plot_train": (_plot, "learning curves of training episodes"),
    "all_plots": (_plot, "learning curves and a table of evaluations, over several runs"),
    "plot_from_file": (_plot, "plots of what all_plots saved (-o)"),
}
"""Commands of :func:`zoo_main`, each with its function and its description."""

USAGE = "\n".join(
    [
        "usage: sb3-cyborg zoo COMMAND ...",
        "",
        f"RL Zoo with the algorithms {ALGO}, which is the default of --algo, and {MASKABLE_ALGO}.",
        "`sb3-cyborg zoo COMMAND --help` lists the options of a command. They are the Zoo's own.",
        "",
        *(f"  {command:<16}{purpose}" for command, (_, purpose) in COMMANDS.items()),
        "",
        "plot_train, all_plots and plot_from_file also take --picture FILE, which saves the plots without a window.",
        "train -optimize also takes --seeds-per-trial N: the value of a trial is the mean over N seeds.",
    ]
)
