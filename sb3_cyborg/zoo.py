"""
RL Zoo (https://github.com/DLR-RM/rl-baselines3-zoo) with ``MemoryPPO`` in it, as the algorithm ``memory_ppo``.

The Zoo has no interface for algorithms of others: :func:`register` adds to what it looks names up in, in this process alone.
Needs ``pip install "sb3-cyborg[zoo]"``.
"""

import argparse
import functools
import inspect
import runpy
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import gymnasium as gym
from stable_baselines3.common.vec_env import SubprocVecEnv, VecEnv

from sb3_cyborg.checks import check_options, unknown_name
from sb3_cyborg.encoders.encoder_v7 import ENCODERS
from sb3_cyborg.envs.registration import family_of
from sb3_cyborg.envs.vec_env import make_memory_vec_env
from sb3_cyborg.memories.memory_v7 import MEMORIES
from sb3_cyborg.memory_ppo.memory_ppo import MemoryPPO

if TYPE_CHECKING:
    import optuna

ALGO = "memory_ppo"
"""Name of ``MemoryPPO`` in the Zoo."""

LOG_FOLDER = "logs"
"""Where the Zoo's ``train`` writes if it is told nothing else."""

GIVEN_BY_ZOO = {"env", "seed", "device", "tensorboard_log", "verbose", "_init_setup_model"}
"""Arguments of ``MemoryPPO`` that have no place in a file of hyperparameters."""

TUNED = ("n_steps", "seq_len", "batch_size", "gamma", "gae_lambda")
"""What is sampled in another form than it is used in; a trial shows both."""


def hyperparams_file() -> Path:
    """:return: The Zoo's hyperparameters of ``memory_ppo``: in the package once installed, else in the checkout."""
    package = Path(__file__).resolve().parent
    name = Path("zoo_hyperparams", f"{ALGO}.yml")
    for folder in (package, package.parent):
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"{package / name} is missing: install sb3-cyborg again, or pass a file of your own with -conf.")


@functools.cache
def register() -> None:
    """
    Make ``memory_ppo`` known to RL Zoo, in this process.

    After it ``rl_zoo3.train.train()``, ``rl_zoo3.enjoy.enjoy()`` and the like take ``--algo memory_ppo``: the class is in
    ``rl_zoo3.ALGOS``, a sampler for ``-optimize`` beside the others, and without ``-conf`` hyperparameters come from
    :func:`hyperparams_file`. Other algorithms stay as they are.

    :raises ImportError: without RL Zoo, with the command that installs it.
    """
    train, optimization = _import_zoo("rl_zoo3.train"), _import_zoo("rl_zoo3.hyperparams_opt")
    train.ALGOS[ALGO] = MemoryPPO  # the one dict that all of the Zoo's modules share
    optimization.HYPERPARAMS_SAMPLER[ALGO] = sample_memory_ppo_params
    optimization.HYPERPARAMS_CONVERTER[ALGO] = convert_memory_ppo_params
    train.ExperimentManager = _experiment_manager(train.ExperimentManager)  # type: ignore[attr-defined]


def _import_zoo(name: str) -> ModuleType:
    """:return: A module of RL Zoo. Ids that gymnasium knows stay: the Zoo, too, has a ``CartPoleNoVel-v1`` and its like."""
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
    :return: One that for ``memory_ppo`` reads our file, refuses names that nobody reads, and makes environments by
        :func:`~sb3_cyborg.envs.vec_env.make_memory_vec_env`.
    """
    zoo = _import_zoo("rl_zoo3.exp_manager")

    class MemoryExperimentManager(base):  # type: ignore[misc]  # imported where it is used
        def __init__(self, args: argparse.Namespace, algo: str, *rest: Any, config: str | None = None, **options: Any) -> None:
            if algo == ALGO and config is None:
                config = str(hyperparams_file())
            super().__init__(args, algo, *rest, config=config, **options)

        def create_envs(self, *args: Any, **kwargs: Any) -> Any:
            if self.algo != ALGO:
                return super().create_envs(*args, **kwargs)
            sb3s, zoo.make_vec_env = zoo.make_vec_env, self._make_vec_env  # type: ignore[attr-defined]
            try:
                return super().create_envs(*args, **kwargs)
            finally:
                zoo.make_vec_env = sb3s  # type: ignore[attr-defined]

        def _make_vec_env(
            self, make_env: Callable[..., Any], *, vec_env_cls: type[VecEnv], vec_env_kwargs: Any, **kwargs: Any
        ) -> VecEnv:
            """What the Zoo has of SB3's ``make_vec_env``; its default, ``--vec-env dummy``, is native where there is that."""
            env_id = self.env_name.gym_id
            make_env.__name__ = env_id  # which an error of a worker names
            family = family_of(env_id)
            if vec_env_cls is SubprocVecEnv:
                return make_memory_vec_env(make_env, vec_env="subproc", **kwargs)
            if family is not None and family.native and kwargs["wrapper_class"] is None:
                return make_memory_vec_env(env_id, vec_env="native", **kwargs)
            return make_memory_vec_env(make_env, vec_env="dummy", **kwargs)

        def _preprocess_hyperparams(self, hyperparams: dict[str, Any]) -> Any:
            # What the Zoo reads itself is gone from the first of these.
            processed = super()._preprocess_hyperparams(hyperparams)
            if self.algo == ALGO:
                check_options(ALGO, processed[0], set(inspect.signature(MemoryPPO).parameters) - GIVEN_BY_ZOO)
            return processed

    return MemoryExperimentManager


# --- tuning -----------------------------------------------------------------------------------------------------------


def sample_memory_ppo_params(
    trial: "optuna.Trial", n_actions: int, n_envs: int, additional_args: dict[str, Any]
) -> dict[str, Any]:
    """
    Sample hyperparameters for the Zoo's ``-optimize``. Every combination is one that ``MemoryPPO`` takes.

    The space is the same in every trial, as the Zoo's multivariate TPE sampler wants it; what does not apply (slots of
    the memory ``none``) is dropped afterwards. Encoders and memories that were registered are candidates, too.

    :param trial: The trial.
    :param n_actions: Not used.
    :param n_envs: Not used: a study must convert to the same hyperparameters when it is loaded (``--trial-id``).
    :param additional_args: Not used.
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
    for name in TUNED:
        trial.set_user_attr(name, hyperparams[name])
    return hyperparams


def convert_memory_ppo_params(sampled_params: Mapping[str, Any]) -> dict[str, Any]:
    """
    :param sampled_params: Parameters of a trial, as :func:`sample_memory_ppo_params` names them.
    :return: Arguments of ``MemoryPPO``: ``seq_len`` divides ``n_steps`` and ``batch_size``, for all are powers of two.
    """
    hyperparams: dict[str, Any] = _import_zoo("rl_zoo3.hyperparams_opt").convert_onpolicy_params(dict(sampled_params))
    hyperparams["seq_len"] = min(2 ** hyperparams.pop("seq_len_pow"), hyperparams["n_steps"])
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
    Run a script of RL Zoo that knows ``memory_ppo``, which it also takes where no algorithm is named.

    :param argv: One of :data:`VERBS`, then the script's own arguments.
    :raises ImportError: without RL Zoo, with the command that installs it.
    :raises ValueError: for an unknown verb, hyperparameters that cannot be, and paths where nothing is.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return
    verb, *arguments = argv
    if verb not in VERBS:
        raise unknown_name("zoo command", verb, VERBS)
    register()
    try:
        VERBS[verb][0](verb, arguments)
    except AssertionError as error:
        if not str(error):
            raise
        raise ValueError(str(error)) from error  # the Zoo's way to say that a path of the user's does not exist


def _run(verb: str, arguments: Sequence[str], script: Callable[[], Any]) -> None:
    """Call a script, which reads ``sys.argv``."""
    before = sys.argv
    sys.argv = [f"sb3-cyborg zoo {verb}", *arguments]
    try:
        script()
    finally:
        sys.argv = before


def _train(verb: str, arguments: Sequence[str]) -> None:
    _run(verb, ["--algo", ALGO, *arguments], _import_zoo("rl_zoo3.train").train)


def _where_trained(arguments: Sequence[str]) -> list[str]:
    """:return: Arguments with the defaults ``memory_ppo`` and train's folder; the Zoo's own algorithms have agents online."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--algo", default=ALGO)
    algo = parser.parse_known_args(arguments)[0].algo
    return ["--algo", ALGO, *(["-f", LOG_FOLDER] if algo == ALGO else []), *arguments]


def _enjoy(verb: str, arguments: Sequence[str]) -> None:
    _run(verb, _where_trained(arguments), _import_zoo("rl_zoo3.enjoy").enjoy)


def _evaluate(verb: str, arguments: Sequence[str]) -> None:
    _enjoy(verb, [*arguments, "--no-render"])


def _record_video(verb: str, arguments: Sequence[str]) -> None:
    _run(verb, _where_trained(arguments), lambda: runpy.run_module("rl_zoo3.record_video", run_name="__main__"))


def _plot(verb: str, arguments: Sequence[str]) -> None:
    """Run a plotting script. ``--picture`` is ours: the Zoo's learning curves only show in a window."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--picture", type=Path)
    options, rest = parser.parse_known_args(arguments)
    if options.picture:
        _import_zoo("matplotlib").use("Agg")
    script = getattr(_import_zoo("rl_zoo3.plots"), verb)
    # A run's folder is named after the environment, with dashes for slashes.
    rest = [argument.replace("/", "-") if argument in gym.registry else argument for argument in rest]
    defaults = [] if verb == "plot_from_file" else ["-a", ALGO]
    with warnings.catch_warnings():
        if options.picture:
            warnings.filterwarnings("ignore", ".*non-interactive")
        _run(verb, [*defaults, *rest], script)
    if options.picture:
        _save_figures(options.picture)
    elif _import_zoo("matplotlib").get_backend().lower() == "agg":
        print("There is no display to show plots on: add --picture FILE to save them.", file=sys.stderr)


def _save_figures(path: Path) -> None:
    """Save all open figures and close them: one under ``path``, of several each with its number before the suffix."""
    plt = _import_zoo("matplotlib.pyplot")
    numbers = plt.get_fignums()
    path.parent.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        name = path if len(numbers) == 1 else path.with_stem(f"{path.stem}_{number}")
        plt.figure(number).savefig(name, dpi=150)
        print(f"Saved {name}")
    plt.close("all")


VERBS: dict[str, tuple[Callable[[str, Sequence[str]], None], str]] = {
    "train": (_train, "train an agent, or tune its hyperparameters (-optimize)"),
    "enjoy": (_enjoy, "watch a trained agent"),
    "evaluate": (_evaluate, "enjoy without rendering: the mean return of a trained agent"),
    "record_video": (_record_video, "record a video of a trained agent"),
    "plot_train": (_plot, "learning curves of training episodes"),
    "all_plots": (_plot, "learning curves and a table of evaluations, over several runs"),
    "plot_from_file": (_plot, "plots of what all_plots saved (-o)"),
}
"""Commands of :func:`zoo_main`, each with what it is for."""

USAGE = "\n".join(
    [
        "usage: sb3-cyborg zoo COMMAND ...",
        "",
        f"RL Zoo with the algorithm {ALGO}, which is also the default of --algo.",
        "`sb3-cyborg zoo COMMAND --help` lists the options of a command, which are the Zoo's own.",
        "",
        *(f"  {verb:<16}{purpose}" for verb, (_, purpose) in VERBS.items()),
        "",
        "plot_train, all_plots and plot_from_file also take --picture FILE, to save what else only shows in a window.",
    ]
)
