"""
The names of settings.

The keys of a config are the words of Stable-Baselines3 and RL Zoo where these have one. :data:`OTHER_NAMES` lists further
words for them; :func:`canonical` gives settings the names and the form of the config.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple


class OtherName(NamedTuple):
    """
    A word that is not a key of the config.

    :param key: The key that it stands for.
    :param accepted: Whether it may be written instead of the key. Otherwise an error points to the key: values of that
        word mean something else there, or the word is a mere abbreviation.
    """

    key: str
    accepted: bool


OTHER_NAMES: dict[str, OtherName] = {
    # keys of earlier versions
    "horizon": OtherName("n_steps", accepted=True),
    "num_envs": OtherName("n_envs", accepted=True),
    "eval_interval": OtherName("eval_freq", accepted=True),
    "checkpoint_interval": OtherName("save_freq", accepted=True),
    # words of SB3 and RL Zoo with the same meaning
    "eval_episodes": OtherName("n_eval_episodes", accepted=True),
    "n_timesteps": OtherName("total_timesteps", accepted=True),
    "timesteps": OtherName("total_timesteps", accepted=True),
    "env_id": OtherName("env", accepted=True),
    # words with other values, and abbreviations
    "lr": OtherName("learning_rate", accepted=False),
    "steps": OtherName("total_timesteps", accepted=False),
    "activation": OtherName("activation_fn", accepted=False),
    "tensorboard_log": OtherName("tensorboard", accepted=False),
    "lstm_hidden_size": OtherName("hidden_dim", accepted=False),
    "n_lstm_layers": OtherName("num_layers", accepted=False),
    "log_folder": OtherName("log_dir", accepted=False),
    "num_threads": OtherName("torch_threads", accepted=False),
    "track": OtherName("wandb", accepted=False),
    "wandb_project_name": OtherName("wandb_project", accepted=False),
}
"""Other words for keys of the config."""

ALIASES: dict[str, str] = {name: other.key for name, other in OTHER_NAMES.items() if other.accepted}
"""The key for each word that is accepted in its place."""

NAME_OPTIONS: dict[str, tuple[str, str]] = {"encoder": ("type", "mode"), "memory": ("type", "kind")}
"""Words for the name in ``{type: pmm, num_slots: 16}``, by key: an alias of the pair ``memory: pmm`` and ``memory_kwargs``."""

ENCODER_SIZES = ("hidden_dim", "latent_dim", "num_layers")
"""Sizes that every encoder has. They are keys of the config, but may be written among the encoder's options."""


def canonical(settings: Mapping[Any, Any]) -> dict[str, Any]:
    """
    Give settings of one source the names and the form of the config.

    Aliases become the key. ``memory: {type: pmm, num_slots: 16}`` becomes ``memory: pmm`` and
    ``memory_kwargs: {num_slots: 16}``, likewise ``encoder``. Sizes among the encoder's options become keys.

    :param settings: Settings by key or alias. Unknown keys, and mappings without one name, are left for the config to refuse.
    :return: The settings by key.
    :raises ValueError: for a setting that is given under two names with different values.
    """
    result = _Settings()
    for name, value in settings.items():
        result.add(ALIASES.get(str(name), str(name)), str(name), value)
    for part, names in NAME_OPTIONS.items():
        result.split(part, names)
    options = result.values.get("encoder_kwargs")
    if isinstance(options, Mapping):
        for size in ENCODER_SIZES:
            if size in options:
                result.add(size, f"encoder_kwargs.{size}", options[size])
        result.values["encoder_kwargs"] = {name: value for name, value in options.items() if name not in ENCODER_SIZES}
    return result.values


def merge(*sources: Mapping[Any, Any]) -> dict[str, Any]:
    """
    Override settings by later ones, each source under names of its own.

    An encoder or a memory of another name drops the options of the one before.

    :param sources: Settings by key or alias, the last one with the highest priority.
    :return: The settings by key.
    :raises ValueError: as :func:`canonical`, for two names within a source.
    """
    merged: dict[str, Any] = {}
    for source in map(canonical, sources):
        for part in NAME_OPTIONS:
            if part in source and source[part] != merged.get(part):
                merged.pop(f"{part}_kwargs", None)
        merged |= source
    return merged


class _Settings:
    """Settings by key, and the name that each was given under."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self._names: dict[str, str] = {}

    def add(self, key: str, name: str, value: Any) -> None:
        """
        :param key: Key of the config.
        :param name: The name that the setting was given under.
        :param value: Its value.
        :raises ValueError: if it was given under another name with another value.
        """
        if key in self.values and self.values[key] != value:
            raise ValueError(
                f"`{self._names[key]}`={self.values[key]!r} and `{name}`={value!r} name the same setting: leave one out."
            )
        self.values[key] = value
        self._names.setdefault(key, name)

    def split(self, part: str, names: tuple[str, str]) -> None:
        """
        Split ``{type: pmm, num_slots: 16}`` into the name and the options. A mapping without exactly one name stays.

        :param part: ``"encoder"`` or ``"memory"``.
        :param names: Words for the name.
        """
        mapping = self.values.get(part)
        if not isinstance(mapping, Mapping):
            return
        given = [mapping[name] for name in names if name in mapping]
        if len(given) != 1 or not isinstance(given[0], str):
            return
        options = {name: value for name, value in mapping.items() if name not in names}
        self.values[part] = given[0]
        if options or f"{part}_kwargs" not in self.values:
            self.add(f"{part}_kwargs", part, options)
