"""``TrainerConfig``: all settings of a training run, checked before anything is built."""

import math
import warnings
from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import Annotated, Any

import torch as th
import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator
from stable_baselines3.common.utils import LinearSchedule
from torch import nn

from sb3_cyborg.checks import check_divides, check_options, unknown_name
from sb3_cyborg.encoders.encoder_v7 import ENCODERS
from sb3_cyborg.envs.vec_env import VEC_ENVS, check_env_id
from sb3_cyborg.memories.memory_v7 import MEMORIES, memory_options
from sb3_cyborg.memory_ppo.memory_ppo import MemoryPPO
from sb3_cyborg.memory_ppo.rollout_buffer_v7 import plan_minibatches, plan_n_steps
from sb3_cyborg.trainers.config_file import read_yaml, readable

CORE_SIZES = ("hidden_dim", "latent_dim", "num_layers")
"""Sizes of any encoder, which its options may hold, too."""

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
}

SAME_NAMES = (
    "seq_len",
    "burn_in",
    "batch_size",
    "n_epochs",
    "gamma",
    "gae_lambda",
    "normalize_advantage",
    "normalize_value",
    "scale_lr_by_advantage",
    "ent_coef",
    "vf_coef",
    "max_grad_norm",
    "target_kl",
    "memory_loss_coef",
    "log_barrier_coef",
    "use_last_action",
    "use_sde",
    "sde_sample_freq",
    "stats_window_size",
    "amp",
    "seed",
    "device",
    "verbose",
)
"""Keys that ``MemoryPPO`` has, too."""

FURTHER_POLICY_OPTIONS = (
    "ortho_init",
    "log_std_init",
    "full_std",
    "use_expln",
    "squash_output",
    "features_extractor_kwargs",
    "normalize_images",
    "optimizer_kwargs",
)
"""Options of the policy that have no key of their own."""

NORMALIZE_OPTIONS = ("norm_obs", "norm_reward", "clip_obs", "clip_reward", "epsilon", "norm_obs_keys")

RESUME_KEYS = (
    "total_timesteps",
    "checkpoint_interval",
    "keep_checkpoints",
    "eval_interval",
    "tensorboard",
    "histograms",
    "wandb",
    "wandb_project",
    "progress_bar",
    "verbose",
    "device",
    "torch_threads",
)
"""Keys that a resumed run may change: how it is carried out. All others say what is learned."""


def _number(value: Any) -> Any:
    """:return: A float for any number, and for text that is one: YAML reads ``3e-4``, which has no point, as text."""
    if isinstance(value, bool):
        return value
    if not isinstance(value, (str, Real)):
        return value
    try:
        return float(value)
    except ValueError:
        return value


def _whole(value: Any) -> Any:
    """:return: A whole number for ``1e6`` and numpy's."""
    if isinstance(value, bool):
        return value
    if isinstance(value, Integral):
        return int(value)
    number = _number(value)
    return int(number) if isinstance(number, float) and number.is_integer() else value


Whole = Annotated[int, BeforeValidator(_whole)]
Number = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]


def _schedule(value: Any) -> Any:
    """:return: A number as such, and the name of a schedule as text."""
    return value if isinstance(value, str) and value.startswith("lin_") else _number(value)


Scheduled = Annotated[float | str, BeforeValidator(_schedule)]


class TrainerConfig(BaseModel):
    """
    Settings of :class:`~sb3_cyborg.trainers.trainer_v7.TrainerV7`. Every field's meaning is its description.

    Where it says *schedule*, ``"lin_3e-4"`` decreases linearly from that number to zero over ``total_timesteps``, as in
    RL Zoo, and ``"lin_3e-4_1e-5"`` to the second number.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, validate_default=False)

    # --- the environments
    env: str = Field(description="Id of the environment; `module:id` imports the module before. `sb3-cyborg envs` lists ours.")
    env_kwargs: dict[str, Any] = Field({}, description="Its keyword arguments.")
    num_envs: Whole = Field(1, ge=1, description="Environments that run side by side.")
    vec_env: str = Field("auto", description="How they run: auto, dummy, subproc (a process each) or native.")
    frame_stack: Whole = Field(1, ge=1, description="Latest observations stacked into one.")
    normalize: bool | dict[str, Any] = Field(
        False, description="VecNormalize: true, false, or its options, e.g. {norm_obs: true, norm_reward: false}."
    )

    # --- the agent
    policy: str = Field("auto", description="auto picks MlpPolicy, CnnPolicy or MultiInputPolicy by the observations.")
    encoder: str | dict[str, Any] = Field(
        "gru", description="gru, lstm, mamba, hybrid, fusion, or {type: mamba, d_state: 32}, with the encoder's options."
    )
    memory: str | dict[str, Any] = Field(
        "ring", description="ring, kv, slot, pmm, none, or {type: pmm, num_slots: 16}, with the memory's options."
    )
    hidden_dim: Whole = Field(128, ge=1, description="Width of the encoder.")
    latent_dim: Whole | None = Field(None, ge=1, description="Features that the encoder gives; null takes `hidden_dim`.")
    num_layers: Whole = Field(1, ge=1, description="Layers of the encoder.")
    net_arch: list[Whole] | dict[str, list[Whole]] | None = Field(
        None,
        description="Layers of actor and critic behind the memory: [64, 64], {pi: [64], vf: [64]}; null is SB3's default.",
    )
    activation_fn: str = Field("tanh", description=f"Activation of those layers: {', '.join(ACTIVATIONS)}.")
    use_last_action: bool = Field(False, description="The policy also reads its last action.")
    use_time: bool = Field(False, description="The policy also reads how many steps old the episode is.")
    normalize_observations: bool = Field(True, description="Observations that are no images are normalized in the policy.")
    policy_kwargs: dict[str, Any] = Field({}, description="Further arguments of the policy, e.g. {ortho_init: false}.")

    # --- the algorithm
    horizon: Whole | None = Field(
        None,
        ge=1,
        description="Steps of each environment between two updates (PPO's `n_steps`); null is 128, more if `num_envs` < 16.",
    )
    seq_len: Whole | None = Field(
        None, ge=1, description="Steps that gradients flow back through; divides `horizon`. null takes up to 64, or 128."
    )
    burn_in: Whole = Field(0, ge=0, description="Steps before each sequence that are replayed to refresh its state.")
    batch_size: Whole | None = Field(
        None,
        ge=2,
        description="Transitions in a minibatch, a multiple of `seq_len`; null is about a quarter of a rollout, at most 1024.",
    )
    n_epochs: Whole = Field(4, ge=1, description="Passes over a rollout.")
    learning_rate: Scheduled = Field("lin_7e-4_7e-5", description="Learning rate (schedule).")
    gamma: Number = Field(0.99, ge=0, le=1, description="Discount factor.")
    gae_lambda: Number = Field(0.9, ge=0, le=1, description="Lambda of the generalized advantage estimation.")
    clip_range: Scheduled = Field(0.2, description="Clipping of the ratio (schedule).")
    clip_range_vf: Scheduled | None = Field(None, description="Clipping of the value (schedule); null does not clip.")
    normalize_advantage: bool = Field(True, description="Normalize the advantages of each minibatch.")
    normalize_value: bool = Field(True, description="The critic learns in units of the return's standard deviation.")
    scale_lr_by_advantage: bool = Field(True, description="Shorter steps where advantages are less than half the usual size.")
    ent_coef: Number = Field(0.01, ge=0, description="Weight of the entropy.")
    vf_coef: Number = Field(0.5, ge=0, description="Weight of the value loss.")
    max_grad_norm: Number = Field(0.5, gt=0, description="Largest norm of the gradient.")
    target_kl: Number | None = Field(None, gt=0, description="End an update once the KL divergence exceeds 1.5 times this.")
    memory_loss_coef: Number = Field(1.0, ge=0, description="Weight of the loss that a memory may return.")
    log_barrier_coef: Number = Field(0.0, ge=0, description="Weight of the log barrier, which keeps every action possible.")
    use_sde: bool = Field(False, description="State-dependent exploration, for continuous actions.")
    sde_sample_freq: Whole = Field(-1, ge=-1, description="Steps between two of its noise matrices; -1 is one a rollout.")
    stats_window_size: Whole = Field(100, ge=1, description="Episodes that logged means are over.")
    amp: bool = Field(False, description="Features and the encoder's projections in bf16.")
    seed: Whole | None = Field(None, ge=0, lt=2**32, description="Seed of everything; null draws one, and saves it.")

    # --- the run
    total_timesteps: Whole = Field(1_000_000, ge=1, description="Environment steps of the whole run; schedules end there.")
    log_dir: str = Field("runs", min_length=1, description="Folder of all runs.")
    run_name: str | None = Field(None, min_length=1, description="This run's folder in `log_dir`; null is <env>_<number>.")
    checkpoint_interval: Whole = Field(
        50_000, ge=0, description="Environment steps between two checkpoints, at least a rollout; 0 saves at the end alone."
    )
    keep_checkpoints: Whole = Field(3, ge=1, description="Checkpoints that are kept.")
    eval_interval: Whole = Field(
        50_000, ge=0, description="Environment steps between two evaluations, which decide the best model; 0 for none."
    )
    eval_episodes: Whole = Field(10, ge=1, description="Episodes of an evaluation.")
    tensorboard: bool = Field(True, description="Log for TensorBoard.")
    histograms: bool = Field(True, description="With TensorBoard or W&B: also histograms of the memory's write gates.")
    wandb: bool = Field(False, description="Log to Weights & Biases.")
    wandb_project: str = Field("sb3_cyborg", min_length=1, description="Project there.")
    progress_bar: bool = Field(True, description="Show steps, steps per second, return and time left.")
    verbose: Whole = Field(0, ge=0, le=2, description="1 prints SB3's tables, 2 debug messages.")
    device: str = Field("auto", description="cpu, cuda, ...; auto takes a GPU if there is one.")
    torch_threads: Whole | None = Field(
        1, ge=1, description="PyTorch's threads. One is quickest for small policies; null leaves it as it is."
    )

    # --- making one

    @classmethod
    def parse(cls, config: "TrainerConfig | Mapping[str, Any] | str | Path") -> "TrainerConfig":
        """
        :param config: Settings by name, or the path of a YAML file that holds them.
        :return: The settings, checked.
        :raises ValueError: with a line for each key that is unknown, has a wrong type or cannot work.
        """
        if isinstance(config, TrainerConfig):
            return config
        values = read_yaml(config) if isinstance(config, (str, Path)) else config
        if not isinstance(values, Mapping):
            raise ValueError(f"A config is a dictionary or the path of a YAML file, got {type(values).__name__}.")
        try:
            return cls(**{str(key): value for key, value in values.items()})
        except ValidationError as error:
            raise ValueError(readable(error, values, cls.model_fields)) from None

    @model_validator(mode="before")
    @classmethod
    def _lift_sizes(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Sizes among the encoder's options go to their own keys, so that each has one place in the effective config."""
        if not isinstance(encoder := values.get("encoder"), Mapping):
            return values
        sizes = {name: encoder[name] for name in CORE_SIZES if name in encoder}
        for name, size in sizes.items():
            if values.get(name, size) != size:
                raise ValueError(f"`{name}`={values[name]}, but `encoder` has {name}={size}; leave one out.")
        options = {name: value for name, value in encoder.items() if name not in sizes}
        return {**values, **sizes, "encoder": options}

    @field_validator("learning_rate", "clip_range", "clip_range_vf")
    @classmethod
    def _check_schedule(cls, value: float | str | None) -> float | str | None:
        start, end = value, 0.0
        if isinstance(value, str):
            start, end = (_number(part) for part in _ends(value))
        if start is not None and not (isinstance(start, float) and 0 < start < math.inf):
            raise ValueError(f"must be a positive number or a schedule such as 'lin_3e-4', got {value!r}.")
        if not (isinstance(end, float) and 0 <= end < math.inf):
            raise ValueError(f"a schedule ends at a number of at least 0, as 'lin_3e-4_1e-5' does, got {value!r}.")
        return value

    @field_validator("env")
    @classmethod
    def _check_env(cls, value: str) -> str:
        return check_env_id(value)

    @field_validator("vec_env")
    @classmethod
    def _check_vec_env(cls, value: str) -> str:
        return _known("vec_env", value, VEC_ENVS)

    @field_validator("policy")
    @classmethod
    def _check_policy(cls, value: str) -> str:
        return _known("policy", value, ("auto", *MemoryPPO.policy_aliases))

    @field_validator("activation_fn")
    @classmethod
    def _check_activation(cls, value: str) -> str:
        return _known("activation_fn", value, ACTIVATIONS)

    @field_validator("net_arch")
    @classmethod
    def _check_net_arch(cls, value: list[int] | dict[str, list[int]] | None) -> list[int] | dict[str, list[int]] | None:
        if isinstance(value, dict):
            check_options("net_arch", value, ("pi", "vf"))
        for sizes in value.values() if isinstance(value, dict) else [value or []]:
            if any(size < 1 for size in sizes):
                raise ValueError(f"layers have at least one unit, got {sizes}.")
        return value

    @field_validator("normalize")
    @classmethod
    def _check_normalize(cls, value: bool | dict[str, Any]) -> bool | dict[str, Any]:
        if isinstance(value, dict):
            if "gamma" in value:
                raise ValueError("VecNormalize's `gamma` is the config's `gamma`; leave it out.")
            check_options("normalize", value, NORMALIZE_OPTIONS)
        return value

    @field_validator("encoder")
    @classmethod
    def _check_encoder(cls, value: str | dict[str, Any]) -> str | dict[str, Any]:
        mode, options = split_options("encoder", value, ("type", "mode"))
        check_options(f"encoder {_known('encoder', mode, ENCODERS)!r}", options, ENCODERS[mode].options)
        return value

    @field_validator("memory")
    @classmethod
    def _check_memory(cls, value: str | dict[str, Any]) -> str | dict[str, Any]:
        kind, options = split_options("memory", value, ("type", "kind"))
        check_options(f"memory {_known('memory', kind, MEMORIES)!r}", options, memory_options(kind))
        return value

    @field_validator("device")
    @classmethod
    def _check_device(cls, value: str) -> str:
        try:
            kind = "cpu" if value == "auto" else th.device(value).type
        except RuntimeError:
            raise ValueError(f"unknown device {value!r}; 'auto', 'cpu', 'cuda' and 'cuda:0' are such names.") from None
        if kind == "cuda" and not th.cuda.is_available():
            raise ValueError(f"{value!r} asks for a GPU, but PyTorch sees none; use 'cpu' or 'auto'.")
        return value

    @model_validator(mode="after")
    def _check_together(self) -> "TrainerConfig":
        horizon = plan_n_steps(self.num_envs, self.seq_len) if self.horizon is None else self.horizon
        if self.seq_len is not None:
            check_divides("seq_len", self.seq_len, "horizon", horizon)
        if self.burn_in >= horizon > 1 or (self.burn_in and horizon == 1):
            raise ValueError(
                f"`burn_in`={self.burn_in} must be less than `horizon`={horizon}: it replays steps of the same rollout."
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # MemoryPPO says it again
            try:
                plan_minibatches(horizon, self.num_envs, self.seq_len, self.batch_size)
            except ValueError as error:
                raise ValueError(str(error).replace("n_steps", "horizon").replace("n_envs", "num_envs")) from None
        check_options("policy_kwargs", self.policy_kwargs, FURTHER_POLICY_OPTIONS)
        return self

    # --- what others make of it

    def model_arguments(self) -> dict[str, Any]:
        """:return: Arguments of :class:`~sb3_cyborg.memory_ppo.memory_ppo.MemoryPPO`, without policy and environment."""
        encoder, encoder_options = split_options("encoder", self.encoder, ("type", "mode"))
        memory, memory_options = split_options("memory", self.memory, ("type", "kind"))
        sizes = {name: getattr(self, name) for name in CORE_SIZES}
        policy_kwargs = {
            **self.policy_kwargs,
            **sizes,
            "encoder": encoder,
            "encoder_kwargs": encoder_options,
            "memory": memory,
            "memory_kwargs": memory_options,
            "net_arch": self.net_arch,
            "use_time": self.use_time,
            "normalize_observations": self.normalize_observations,
            "activation_fn": ACTIVATIONS[self.activation_fn],
        }
        same = {name: getattr(self, name) for name in SAME_NAMES}
        return {
            **same,
            "n_steps": self.horizon,
            "learning_rate": as_schedule(self.learning_rate),
            "clip_range": as_schedule(self.clip_range),
            "clip_range_vf": None if self.clip_range_vf is None else as_schedule(self.clip_range_vf),
            "policy_kwargs": policy_kwargs,
        }

    def normalize_arguments(self) -> dict[str, Any] | None:
        """:return: Arguments of SB3's ``VecNormalize``, or ``None`` where it is off."""
        if self.normalize is False:
            return None
        return {"gamma": self.gamma, **(self.normalize if isinstance(self.normalize, dict) else {})}

    def changed(self, **values: Any) -> "TrainerConfig":
        """
        :param values: New values by key.
        :return: This config with them, checked.
        :raises ValueError: as :meth:`parse`.
        """
        return self.parse(self.model_dump() | values)

    def to_yaml(self) -> str:
        """:return: All settings, as a file that :meth:`parse` reads."""
        text: str = yaml.safe_dump(self.model_dump(), sort_keys=False, allow_unicode=True)
        return text


def as_schedule(value: float | str) -> float | LinearSchedule:
    """
    :param value: A number, ``"lin_<number>"`` or ``"lin_<number>_<number>"``.
    :return: The number, or a schedule that goes from it to the second number, or zero.
    """
    if not isinstance(value, str):
        return value
    start, end = map(float, _ends(value))
    return LinearSchedule(start, end, 1.0)


def _ends(schedule: str) -> tuple[str, str]:
    """:return: Where ``"lin_<start>_<end>"`` starts and ends, as text; without an end, it is 0."""
    start, _, end = schedule.removeprefix("lin_").partition("_")
    return start, end or "0"


def split_options(key: str, value: str | Mapping[str, Any], names: tuple[str, ...]) -> tuple[str, dict[str, Any]]:
    """
    Take the name out of ``"pmm"`` or ``{"type": "pmm", "num_slots": 16}``.

    :param key: Key of the config, for the message.
    :param value: Its value.
    :param names: Keys that the name may have, the preferred one first.
    :return: The name, and a copy of the options.
    :raises ValueError: if it has no name, or two.
    """
    if isinstance(value, str):
        return value, {}
    options = dict(value)
    given = [options.pop(name) for name in names if name in options]
    if len(given) != 1 or not isinstance(given[0], str):
        raise ValueError(f"needs one `{names[0]}`, e.g. {{'{names[0]}': {_EXAMPLES[key]!r}}}, got {dict(value)}.")
    return given[0], options


_EXAMPLES = {"encoder": "mamba", "memory": "pmm"}


def _known(what: str, name: str, known: Iterable[str]) -> str:
    if name not in (known := list(known)):
        raise unknown_name(what, name, known)
    return name
