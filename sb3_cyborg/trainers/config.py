"""``TrainerConfig``: the settings of a training run, checked before anything is built."""

import math
import warnings
from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from torch import nn

from sb3_cyborg.checks import Rule, check_options, check_values, unknown_name
from sb3_cyborg.encoders.encoder_v7 import ENCODERS
from sb3_cyborg.envs.vec_env import VEC_ENVS, check_env_id
from sb3_cyborg.memories.memory_v7 import MEMORIES
from sb3_cyborg.memory_ppo.arguments import MODEL_ARGUMENTS, POLICY_ARGUMENTS
from sb3_cyborg.memory_ppo.memory_ppo import MemoryPPO
from sb3_cyborg.memory_ppo.rollout_buffer_v7 import check_burn_in, plan_minibatches, plan_n_steps
from sb3_cyborg.memory_ppo.schedules import AUTO_LEARNING_RATE
from sb3_cyborg.trainers.config_file import dump_yaml, plain_values, read_yaml, readable
from sb3_cyborg.trainers.folder_name import check_folder_name
from sb3_cyborg.trainers.vocabulary import NAME_OPTIONS, canonical, merge

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
}

MODEL_KEYS = (
    "learning_rate",
    "clip_range",
    "clip_range_vf",
    "n_steps",
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
"""Keys that are passed on to ``MemoryPPO`` under the same name and unchanged."""

POLICY_KEYS = (
    "encoder",
    "encoder_kwargs",
    "memory",
    "memory_kwargs",
    "hidden_dim",
    "latent_dim",
    "num_layers",
    "net_arch",
    "use_time",
    "normalize_observations",
)
"""Keys that are passed on to the policy under the same name and unchanged."""

RULES: dict[str, Rule] = {
    **{name: MODEL_ARGUMENTS[name] for name in MODEL_KEYS},
    **{name: POLICY_ARGUMENTS[name] for name in POLICY_KEYS if name in POLICY_ARGUMENTS},
}
"""Rules of the values of these keys, those of ``MemoryPPO`` and of its policies."""

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
"""Options of the policy that have no key of their own: ``policy_kwargs`` may hold them."""

NORMALIZE_OPTIONS = ("norm_obs", "norm_reward", "clip_obs", "clip_reward", "epsilon", "norm_obs_keys")

RESUME_KEYS = (
    "total_timesteps",
    "save_freq",
    "keep_checkpoints",
    "eval_freq",
    "tensorboard",
    "histograms",
    "wandb",
    "wandb_project",
    "progress_bar",
    "verbose",
    "device",
    "torch_threads",
)
"""Keys that a resumed run may change. They decide how it is carried out; all others decide what is learned."""

MAX_ENVS = 65_536
"""Largest number of environments."""

MAX_STEPS = 10**15
"""Largest number of environment steps: a float, as which schedules count them, is exact up to 9e15."""


def _number(value: Any) -> Any:
    """:return: A float for a number and for text that holds one; YAML reads ``3e-4`` as text, as it has no point."""
    if isinstance(value, bool):
        return value
    if not isinstance(value, (str, Real)):
        return value
    try:
        return float(value)
    except (OverflowError, ValueError):
        return value


def _whole(value: Any) -> Any:
    """:return: An int for whole numbers, also for ``1e6`` and those of numpy."""
    if isinstance(value, bool):
        return value
    if isinstance(value, Integral):
        return int(value)
    number = _number(value)
    return int(number) if isinstance(number, float) and number.is_integer() else value


Whole = Annotated[int, BeforeValidator(_whole)]
Number = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]


def _schedule(value: Any) -> Any:
    """:return: The text of a schedule as it is, anything else as by :func:`_number`."""
    return value if isinstance(value, str) and value.startswith("lin_") else _number(value)


Scheduled = Annotated[float | str, BeforeValidator(_schedule)]


class TrainerConfig(BaseModel):
    """
    Settings of :class:`~sb3_cyborg.trainers.trainer_v7.TrainerV7`. Each field has a description.

    Keys are the words of SB3 and RL Zoo where these have one. Other words for them are accepted, ``horizon`` for ``n_steps``
    for example: see ``sb3_cyborg.trainers.vocabulary``. ``memory: {type: pmm, num_slots: 16}`` is accepted for
    ``memory: pmm`` with ``memory_kwargs: {num_slots: 16}``, and the same goes for ``encoder``.

    A *schedule* is a number, or text: ``"lin_3e-4"`` decreases linearly from 3e-4 to 0 over ``total_timesteps``, as in RL Zoo,
    and ``"lin_3e-4_1e-5"`` from 3e-4 to 1e-5.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, validate_default=False)

    # --- the environments
    env: str = Field(
        description="Id of the environment; `module:id` imports the module first. `sb3-cyborg envs` lists our own."
    )
    env_kwargs: dict[str, Any] = Field({}, description="Keyword arguments of the environment.")
    n_envs: Whole = Field(1, ge=1, le=MAX_ENVS, description="Number of environments that run in parallel.")
    vec_env: str = Field("auto", description=f"Vectorization of the environments: {', '.join(VEC_ENVS)}.")
    frame_stack: Whole = Field(1, ge=1, le=1000, description="Number of latest observations that are stacked into one.")
    normalize: bool | dict[str, Any] = Field(
        False, description="VecNormalize: true, false, or its options, e.g. {norm_obs: true, norm_reward: false}."
    )

    # --- the agent
    policy: str = Field("auto", description="auto picks MlpPolicy, CnnPolicy or MultiInputPolicy by the observation space.")
    encoder: str = Field(
        "gru", description=f"Encoder: {', '.join(ENCODERS)}; or with its options, {{type: mamba, d_state: 32}}."
    )
    encoder_kwargs: dict[str, Any] = Field({}, description="Options of the encoder, e.g. {d_state: 32}.")
    memory: str = Field(
        "ring", description=f"Memory: {', '.join(MEMORIES)}; or with its options, {{type: pmm, num_slots: 16}}."
    )
    memory_kwargs: dict[str, Any] = Field({}, description="Options of the memory, e.g. {num_slots: 16}.")
    hidden_dim: Whole = Field(128, description="Width of the encoder.")
    latent_dim: Whole | None = Field(None, description="Output features of the encoder; null takes `hidden_dim`.")
    num_layers: Whole = Field(1, description="Number of layers of the encoder.")
    net_arch: list[Whole] | dict[str, list[Whole]] | None = Field(
        None,
        description="Layers of actor and critic behind the memory: [64, 64], {pi: [64], vf: [64]}; null is SB3's default.",
    )
    activation_fn: str = Field("tanh", description=f"Activation of these layers: {', '.join(ACTIVATIONS)}.")
    use_last_action: bool = Field(False, description="The last action is an input of the policy.")
    use_time: bool = Field(False, description="The number of steps since the episode began is an input of the policy.")
    normalize_observations: bool = Field(True, description="The policy normalizes observations that are not images.")
    policy_kwargs: dict[str, Any] = Field({}, description="Further arguments of the policy, e.g. {ortho_init: false}.")

    use_masking: bool | None = Field(
        None,
        description="Give illegal actions probability 0, by the environment's `action_masks()`; null does so if it has them.",
    )

    # --- the algorithm
    n_steps: Whole | None = Field(
        None,
        description="Steps of each environment per rollout; null is the smallest multiple of 128 with 2048 transitions.",
    )
    seq_len: Whole | None = Field(
        None,
        description="Steps that gradients flow back through; a divisor of `n_steps`. null takes up to 64, or 128.",
    )
    burn_in: Whole = Field(
        0, description="Steps before each sequence that are replayed to refresh its state; less than `n_steps`."
    )
    batch_size: Whole | None = Field(
        None,
        description="Transitions per minibatch, a multiple of `seq_len`; null is about a quarter of a rollout, at most 1024.",
    )
    n_epochs: Whole = Field(4, description="Passes over each rollout.")
    learning_rate: Scheduled = Field(AUTO_LEARNING_RATE, description="Learning rate (schedule).")
    gamma: Number = Field(0.99, description="Discount factor.")
    gae_lambda: Number = Field(0.9, description="Lambda of generalized advantage estimation.")
    clip_range: Scheduled = Field(0.2, description="Clipping of the ratio (schedule).")
    clip_range_vf: Scheduled | None = Field(None, description="Clipping of the value (schedule); null turns it off.")
    normalize_advantage: bool = Field(True, description="Normalize the advantages of each minibatch.")
    normalize_value: bool = Field(True, description="Normalize the value targets by the running moments of the returns.")
    scale_lr_by_advantage: bool = Field(
        True, description="Lower the learning rate where advantages are less than half of their running size."
    )
    ent_coef: Number = Field(0.01, description="Weight of the entropy.")
    vf_coef: Number = Field(0.5, description="Weight of the value loss.")
    max_grad_norm: Number = Field(0.5, description="Maximum norm of the gradient.")
    target_kl: Number | None = Field(
        None, description="Stop an update once the KL divergence exceeds 1.5 times this; null turns it off."
    )
    memory_loss_coef: Number = Field(1.0, description="Weight of the auxiliary loss of the memory, if it has one.")
    log_barrier_coef: Number = Field(
        0.0, description="Weight of the log barrier, which keeps the probability of every action above zero."
    )
    use_sde: bool = Field(False, description="State-dependent exploration, for continuous actions.")
    sde_sample_freq: Whole = Field(-1, description="Steps between two noise matrices of it; -1 is one per rollout.")
    stats_window_size: Whole = Field(100, description="Number of episodes that logged means are taken over.")
    amp: bool = Field(False, description="Compute features and the projections of the encoder in bf16.")
    seed: Whole | None = Field(None, description="Seed of all random numbers; null draws one, which is saved in the config.")

    # --- the run
    total_timesteps: Whole = Field(
        1_000_000, ge=1, le=MAX_STEPS, description="Environment steps of the whole run; schedules reach their end there."
    )
    log_dir: str = Field("runs", min_length=1, description="Folder of all runs.")
    run_name: str | None = Field(
        None, min_length=1, description="Name of this run's folder in `log_dir`; null is <env>_<number>."
    )
    save_freq: Whole = Field(
        50_000,
        ge=0,
        le=MAX_STEPS,
        description="Environment steps between two checkpoints, at least a rollout; 0 saves at the end only.",
    )
    keep_checkpoints: Whole = Field(3, ge=1, le=MAX_STEPS, description="Number of latest checkpoints that are kept.")
    eval_freq: Whole = Field(
        50_000,
        ge=0,
        le=MAX_STEPS,
        description="Environment steps between two evaluations, which select the best model; 0 turns them off.",
    )
    n_eval_episodes: Whole = Field(10, ge=1, le=1_000_000, description="Episodes of an evaluation.")
    tensorboard: bool = Field(True, description="Log for TensorBoard.")
    histograms: bool = Field(True, description="Log histograms of the memory's write gates, with TensorBoard or W&B.")
    wandb: bool = Field(False, description="Log to Weights & Biases.")
    wandb_project: str = Field("sb3_cyborg", min_length=1, description="Project on Weights & Biases.")
    progress_bar: bool = Field(True, description="Show steps, steps per second, mean return and remaining time.")
    verbose: Whole = Field(0, description="1 prints SB3's tables, 2 debug messages as well.")
    device: str = Field("auto", description="cpu, cuda, ...; auto takes a GPU if there is one.")
    torch_threads: Whole | None = Field(
        1, ge=1, le=1024, description="Threads of PyTorch. One is fastest for small policies; null keeps the present number."
    )

    # --- construction

    @classmethod
    def parse(cls, config: "TrainerConfig | Mapping[str, Any] | str | Path") -> "TrainerConfig":
        """
        :param config: Settings by key or alias, or the path of a YAML file with them.
        :return: The settings, checked.
        :raises ValueError: with one line for each key that is unknown, has a wrong type or cannot work, and for a setting
            that is given under two names with different values.
        """
        if isinstance(config, TrainerConfig):
            return config
        values = read_yaml(config) if isinstance(config, (str, Path)) else config
        if not isinstance(values, Mapping):
            raise ValueError(f"A config is a dictionary or the path of a YAML file, got {type(values).__name__}.")
        settings = canonical(values)
        try:
            return cls(**settings)
        except ValidationError as error:
            raise ValueError(readable(error, settings, cls.model_fields)) from None

    @model_validator(mode="before")
    @classmethod
    def _canonical(cls, values: dict[str, Any]) -> dict[str, Any]:
        return canonical(values)

    @field_validator(*RULES)
    @classmethod
    def _check_argument(cls, value: Any, info: ValidationInfo) -> Any:
        if problem := RULES[str(info.field_name)].problem(value):
            raise ValueError(f"{problem}, got {value!r}.")
        return value

    @field_validator("env_kwargs", "normalize", "encoder_kwargs", "memory_kwargs", "policy_kwargs")
    @classmethod
    def _check_plain(cls, value: Any) -> Any:
        return plain_values(value)

    @field_validator("env")
    @classmethod
    def _check_env(cls, value: str) -> str:
        return check_env_id(value)

    @field_validator("run_name")
    @classmethod
    def _check_run_name(cls, value: str | None) -> str | None:
        return None if value is None else check_folder_name(value)

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

    @field_validator("normalize")
    @classmethod
    def _check_normalize(cls, value: bool | dict[str, Any]) -> bool | dict[str, Any]:
        if isinstance(value, dict):
            if "gamma" in value:
                raise ValueError("VecNormalize's `gamma` is the config's `gamma`; leave it out.")
            check_options("normalize", value, NORMALIZE_OPTIONS)
            for name in ("norm_obs", "norm_reward"):
                if not isinstance(value.get(name, True), bool):
                    raise ValueError(f"`{name}` must be true or false, got {value[name]!r}.")
            for name in ("clip_obs", "clip_reward", "epsilon"):
                number = _number(value.get(name, 1.0))
                if isinstance(number, bool) or not isinstance(number, float) or not 0 < number < math.inf:
                    raise ValueError(f"`{name}` must be a positive number, got {value[name]!r}.")
                value = {**value, **({name: number} if name in value else {})}
            keys = value.get("norm_obs_keys") or []
            if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
                raise ValueError(f"`norm_obs_keys` must be a list of names of observations, got {keys!r}.")
        return value

    @field_validator("encoder", "memory", mode="before")
    @classmethod
    def _check_one_name(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, Mapping):  # one with a single name has been split by `canonical`
            key = str(info.field_name)
            word, example = NAME_OPTIONS[key][0], {"encoder": "mamba", "memory": "pmm"}[key]
            raise ValueError(f"needs one `{word}`, e.g. {{'{word}': {example!r}}}, got {dict(value)}.")
        return value

    @field_validator("encoder")
    @classmethod
    def _check_encoder(cls, value: str) -> str:
        return _known("encoder", value, ENCODERS)

    @field_validator("memory")
    @classmethod
    def _check_memory(cls, value: str) -> str:
        return _known("memory", value, MEMORIES)

    @model_validator(mode="after")
    def _check_together(self) -> "TrainerConfig":
        check_options(f"encoder {self.encoder!r}", self.encoder_kwargs, ENCODERS.options(self.encoder))
        check_options(f"memory {self.memory!r}", self.memory_kwargs, MEMORIES.options(self.memory))
        check_options("policy_kwargs", self.policy_kwargs, FURTHER_POLICY_OPTIONS)
        check_values(POLICY_ARGUMENTS, self.policy_kwargs)
        n_steps = plan_n_steps(self.n_envs, self.seq_len) if self.n_steps is None else self.n_steps
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # MemoryPPO gives the same warnings later
            plan_minibatches(n_steps, self.n_envs, self.seq_len, self.batch_size)
        check_burn_in(self.burn_in, n_steps)
        return self

    # --- use

    def model_arguments(self) -> dict[str, Any]:
        """:return: Arguments of :class:`~sb3_cyborg.memory_ppo.memory_ppo.MemoryPPO`, without policy and environment."""
        return {
            **{name: getattr(self, name) for name in MODEL_KEYS},
            "policy_kwargs": {
                **self.policy_kwargs,
                **{name: getattr(self, name) for name in POLICY_KEYS},
                "activation_fn": ACTIVATIONS[self.activation_fn],
            },
        }

    def normalize_arguments(self) -> dict[str, Any] | None:
        """:return: Arguments of SB3's ``VecNormalize``, or ``None`` if it is off."""
        if self.normalize is False:
            return None
        return {"gamma": self.gamma, **(self.normalize if isinstance(self.normalize, dict) else {})}

    def changed(self, **values: Any) -> "TrainerConfig":
        """
        :param values: New values by key or alias. Another encoder or memory drops the options of the one before.
        :return: A copy of this config with the new values, checked.
        :raises ValueError: as :meth:`parse`.
        """
        return self.parse(merge(self.model_dump(), values))

    def to_yaml(self) -> str:
        """:return: All settings as YAML, which :meth:`parse` reads."""
        return dump_yaml(self.model_dump())


def _known(what: str, name: str, known: Iterable[str]) -> str:
    if name not in (known := list(known)):
        raise unknown_name(what, name, known)
    return name
