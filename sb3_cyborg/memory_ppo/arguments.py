"""The arguments of ``MemoryPPO`` and of its policies: one table of their types and ranges, which the config uses, too."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch as th
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import nn

from sb3_cyborg.checks import (
    Flag,
    Instance,
    Number,
    Options,
    OrNone,
    Rule,
    Subclass,
    Whole,
    check_options,
    check_values,
    plain,
)
from sb3_cyborg.memory_ppo.schedules import AUTO, parse_schedule

MAX_LAYERS = 1000
"""Upper bound of numbers of layers: more take minutes to build, even if they fit into memory."""

WEIGHT = Number(0)
"""Rule of the weight of a loss term."""


@dataclass(frozen=True)
class Scheduled:
    """
    A number, text in the notation of :func:`~sb3_cyborg.memory_ppo.schedules.parse_schedule`, or a function of the
    progress remaining with finite values of at least 0, which is called at 1, 0.5 and 0.

    :param names: Further texts that are accepted.
    :param above: Whether a number must be above 0. RL Zoo sets a learning rate of 0 to load models for acting.
    """

    names: tuple[str, ...] = ()
    above: bool = True

    def problem(self, value: Any) -> str | None:
        if isinstance(value, str):
            return None if value in self.names else _problem_of_text(value)
        if callable(value):
            try:
                for progress in (1.0, 0.5, 0.0):
                    scheduled_value(value, progress)
            except ValueError as error:
                return str(error)
            return None
        number = "a positive number" if self.above else "a finite number of at least 0"
        works = f"must be {number}, a function of the progress remaining, or a schedule such as 'lin_3e-4'"
        return works if Number(0, above=self.above).problem(value) else None


def _problem_of_text(text: str) -> str | None:
    try:
        parse_schedule(text)
    except ValueError as error:
        return f"must be a positive number, a function or a schedule: {str(error).rstrip('.')}"
    return None


def scheduled_value(schedule: Callable[[float], Any], progress: float) -> float:
    """
    Evaluate a schedule.

    :param schedule: A function of the progress remaining; it is the user's and may raise anything.
    :param progress: The progress remaining, from 1 to 0.
    :return: Its value, finite and >= 0.
    :raises ValueError: for any other value, and if the function raises an error; the name of the schedule is to be put before
        the message.
    """
    works = "must give finite numbers of at least 0 for the progress remaining, from 1 to 0"
    try:
        value = plain(schedule(progress))
    except Exception as error:
        raise ValueError(f"{works}; at {progress:g} it raises {type(error).__name__}: {error}") from error
    if Number(0).problem(value):
        raise ValueError(f"{works}; at {progress:g} it gives {value!r}")
    return float(value)


@dataclass(frozen=True)
class Device:
    """``"auto"``, or a device that PyTorch has."""

    def problem(self, value: Any) -> str | None:
        examples = "must be a device such as 'auto', 'cpu', 'cuda', 'cuda:0'"
        if not isinstance(value, (str, th.device)):
            return examples
        try:
            device = th.device("cpu" if value == "auto" else value)
        except RuntimeError:
            return examples
        if device.type == "cpu":
            return None
        if device.type != "cuda":
            return _problem_of_allocation(device)
        if not th.cuda.is_available():
            return "asks for a GPU, but PyTorch finds none; it must be 'cpu' or 'auto'"
        count = th.cuda.device_count()
        return None if (device.index or 0) < count else f"must be one of the {count} GPUs, 'cuda:0' to 'cuda:{count - 1}'"


def _problem_of_allocation(device: th.device) -> str | None:
    try:
        th.zeros(1, device=device).tolist()  # "meta" allocates, but holds no numbers
    except (RuntimeError, NotImplementedError, AssertionError):
        return "must be a device that this PyTorch can compute on, such as 'cpu' or 'auto'"
    return None


@dataclass(frozen=True)
class NetArch:
    """Hidden layers of the heads: sizes, or sizes by ``"pi"`` and ``"vf"``; SB3's older list with one dictionary, too."""

    def problem(self, value: Any) -> str | None:
        works = "must be a list of layer sizes, at least one unit each, such as [64, 64], or {'pi': [64], 'vf': [64]}"
        if isinstance(value, (list, tuple)) and len(value) == 1 and isinstance(value[0], Mapping):
            value = value[0]
        if isinstance(value, Mapping) and not set(value) <= {"pi", "vf"}:
            return f"{works}; the known keys are 'pi' and 'vf'"
        branches = list(value.values()) if isinstance(value, Mapping) else [value]
        if any(isinstance(sizes, (list, tuple)) and len(sizes) > MAX_LAYERS for sizes in branches):
            return f"must have at most {MAX_LAYERS} layers"
        if all(isinstance(sizes, (list, tuple)) for sizes in branches):
            return works if any(Whole(1).problem(size) for sizes in branches for size in sizes) else None
        return works


MODEL_ARGUMENTS: dict[str, Rule] = {
    "learning_rate": Scheduled((AUTO,), above=False),
    "n_steps": OrNone(Whole(1)),
    "batch_size": OrNone(Whole(1)),  # 1 has a message of its own in `plan_minibatches`
    "n_epochs": Whole(1),
    "gamma": Number(0, 1),
    "gae_lambda": Number(0, 1),
    "clip_range": Scheduled(),
    "clip_range_vf": OrNone(Scheduled(), " for no clipping"),
    "normalize_advantage": Flag(),
    "ent_coef": WEIGHT,
    "vf_coef": WEIGHT,
    "max_grad_norm": Number(0, above=True),
    "use_sde": Flag(),
    "sde_sample_freq": Whole(-1),
    "target_kl": OrNone(Number(0, above=True), " for no limit"),
    "stats_window_size": Whole(1),
    "tensorboard_log": OrNone(Instance((str, PathLike), "a path")),
    "policy_kwargs": OrNone(Options()),
    "verbose": Whole(0, 2),
    "seed": OrNone(Whole(0, 2**32 - 1)),
    "device": Device(),
    "_init_setup_model": Flag(),
    "seq_len": OrNone(Whole(1)),
    "burn_in": Whole(0),
    "memory_loss_coef": WEIGHT,
    "log_barrier_coef": WEIGHT,
    "normalize_value": Flag(),
    "scale_lr_by_advantage": Flag(),
    "use_last_action": Flag(),
    "amp": Flag(),
    "distributed": Flag(),
    "n_envs": Whole(1),
}
"""Rules of the arguments of ``MemoryPPO``. Conditions on several arguments are checked where these are used."""

LEARN_ARGUMENTS: dict[str, Rule] = {
    "total_timesteps": Number(0),
    "log_interval": OrNone(Whole(1), " for no logs"),
    "tb_log_name": Instance(str, "a name"),
    "reset_num_timesteps": Flag(),
    "progress_bar": Flag(),
}
"""Rules of the arguments of ``MemoryPPO.learn``."""

POLICY_ARGUMENTS: dict[str, Rule] = {
    "net_arch": OrNone(NetArch()),
    "activation_fn": Instance(Callable, "a class of modules, such as torch.nn.Tanh"),  # type: ignore[arg-type]  # an ABC
    "ortho_init": Flag(),
    # The standard deviation is exp of it; its square and its inverse must be float32 numbers, with room for training.
    "log_std_init": Number(-20, 20),
    "full_std": Flag(),
    "use_expln": Flag(),
    "squash_output": Flag(),
    "features_extractor_class": Subclass(BaseFeaturesExtractor),
    "features_extractor_kwargs": OrNone(Options()),
    "share_features_extractor": Flag(),
    "normalize_images": Flag(),
    "optimizer_class": Subclass(th.optim.Optimizer),
    "optimizer_kwargs": OrNone(Options()),
    "hidden_dim": Whole(1),
    "latent_dim": OrNone(Whole(1)),
    "num_layers": Whole(1, MAX_LAYERS),
    "memory_dim": OrNone(Whole(1)),
    "encoder_kwargs": OrNone(Options()),
    "memory_kwargs": OrNone(Options()),
    "use_last_action": Flag(),
    "use_time": Flag(),
    "normalize_observations": Flag(),
    "amp": Flag(),
    "lstm_hidden_size": OrNone(Whole(1)),
    "n_lstm_layers": OrNone(Whole(1, MAX_LAYERS)),
    "shared_lstm": OrNone(Flag()),
    "enable_critic_lstm": OrNone(Flag()),
    "lstm_kwargs": OrNone(Options()),
}
"""Rules of the arguments of the policies, i.e. of ``policy_kwargs``. Encoders and memories check their own options."""


def check_policy_arguments(given: Mapping[str, Any], known: Iterable[str], device: th.device | str = "cpu") -> None:
    """
    Check ``policy_kwargs`` before anything is built.

    :param given: The arguments.
    :param known: Names that the class of the policy takes.
    :param device: Device of the policy.
    :raises ValueError: for an unknown name, a value that breaks its rule, and options that their class does not take.
    """
    check_options("policy_kwargs", given, known)
    check_values(POLICY_ARGUMENTS, given)
    _check_activation(given.get("activation_fn", nn.Tanh))
    optimizer, options = given.get("optimizer_class", th.optim.Adam), given.get("optimizer_kwargs") or {}
    check_keywords("optimizer_kwargs", optimizer, options, ("lr",))
    _check_optimizer(optimizer, options, device)


def check_keywords(
    name: str, function: Callable[..., Any], given: Mapping[str, Any] | None, reserved: Iterable[str] = ()
) -> None:
    """
    Require keyword arguments that a function takes. Its first parameter is passed by position.

    :param name: Name of the argument that holds them, for the message.
    :param function: The function, or a class.
    :param given: The keyword arguments; ``None`` for none.
    :param reserved: Parameters of the function that this package passes itself.
    :raises ValueError: for an unknown or reserved keyword, with the most similar known one.
    """
    parameters = list(inspect.signature(function).parameters.values())
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return
    known = {parameter.name for parameter in parameters[1:] if parameter.kind is not parameter.VAR_POSITIONAL}
    check_options(f"`{name}` of {function.__name__}", given or {}, known - set(reserved))


def _check_activation(activation_fn: Callable[..., Any]) -> None:
    """Raise a ``ValueError`` for an activation that creates no module, or one that changes the number of features."""
    works = "must create a module that maps features to as many features, such as torch.nn.Tanh"
    example = th.zeros(2, 4)
    try:
        module = activation_fn()
        maps = isinstance(module, nn.Module) and module(example).shape == example.shape
    except Exception as error:  # code of the user
        raise ValueError(
            f"`activation_fn` {works}, got {activation_fn!r}, which raises {type(error).__name__}: {error}"
        ) from error
    if not maps:
        raise ValueError(f"`activation_fn` {works}, got {activation_fn!r}.")


def _check_optimizer(optimizer_class: type[th.optim.Optimizer], options: Mapping[str, Any], device: th.device | str) -> None:
    """Raise a ``ValueError`` for options that the optimizer does not take, after a step with a parameter of its own."""
    for name, value in options.items():
        for number in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(number, float) and Number().problem(number):
                raise ValueError(f"`optimizer_kwargs[{name!r}]` must be finite, got {value!r}.")
    parameter = nn.Parameter(th.zeros(2, device=device))
    parameter.grad = th.ones(2, device=device)
    try:
        optimizer_class([parameter], lr=1e-3, **options).step()  # type: ignore[call-arg]  # every optimizer has a rate
    except Exception as error:  # PyTorch's optimizers raise ValueError, TypeError and RuntimeError, others anything
        raise ValueError(
            f"`optimizer_class` {optimizer_class.__name__} does not work with `optimizer_kwargs`={dict(options)!r}: {error}"
        ) from error
