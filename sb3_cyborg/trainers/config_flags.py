"""Command line flags for the keys of the config, and how they override a file."""

import inspect
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import typer

from sb3_cyborg.trainers.config import TrainerConfig
from sb3_cyborg.trainers.config_file import parse_yaml
from sb3_cyborg.trainers.vocabulary import ALIASES, NAME_OPTIONS

SHORT_FLAGS: dict[str, str] = {"total_timesteps": "-n", "env": "-e", "seed": "-s"}
"""One-letter flags by key."""

FLAG_KEYS: dict[str, str] = {key: key for key in TrainerConfig.model_fields} | ALIASES
"""The key of each flag. Those of aliases are accepted, but help shows the keys alone."""


def as_flag(name: str) -> str:
    """:return: The flag of a key or an alias, ``--n-steps`` for ``n_steps``."""
    return "--" + name.replace("_", "-")


def _is_bool(annotation: object) -> bool:
    return annotation is bool or annotation in (bool | None, bool | dict[str, Any])


def _is_text(key: str) -> bool:
    """:return: Whether the value of a key is always text. ``encoder`` and ``memory`` may be ``{type: ...}``."""
    return TrainerConfig.model_fields[key].annotation in (str, str | None) and key not in NAME_OPTIONS


def _option(name: str, key: str) -> Any:
    """:return: The annotated type of a flag."""
    flag, field, hidden = as_flag(name), TrainerConfig.model_fields[key], name != key
    default = "required" if field.is_required() else f"default: {_as_yaml(field.default)}"
    help_text = f"{field.description} [{default}]"
    if _is_bool(field.annotation):
        names = f"{flag}/--no-{flag[2:]}"
        return Annotated[bool | None, typer.Option(names, help=help_text, show_default=False, hidden=hidden)]
    names_of_value = (flag, SHORT_FLAGS[key]) if key in SHORT_FLAGS and not hidden else (flag,)
    metavar = "TEXT" if _is_text(key) else "VALUE"
    option = typer.Option(*names_of_value, help=help_text, metavar=metavar, show_default=False, hidden=hidden)
    return Annotated[str | None, option]


def _as_yaml(value: object) -> object:
    """:return: A default as it is written in YAML, or the state of a switch."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return "null" if value is None else value


def with_config_flags(function: Callable[..., None]) -> Callable[..., None]:
    """
    :param function: A command whose last parameter is ``**given``.
    :return: The command with a flag for each key of the config and each alias. ``given`` holds the flags that were used.
    """
    own = list(inspect.signature(function).parameters.values())[:-1]
    kinds = {name: _option(name, key) for name, key in FLAG_KEYS.items()}
    flags = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind) for name, kind in kinds.items()
    ]

    def command(**values: Any) -> None:
        function(**{name: value for name, value in values.items() if name not in kinds or value is not None})

    command.__doc__ = function.__doc__
    command.__name__ = function.__name__
    setattr(command, "__signature__", inspect.Signature([*own, *flags]))  # noqa: B010  # mypy knows no such attribute
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in own} | kinds
    return command


def as_flags(given: Mapping[str, Any]) -> list[str]:
    """
    :param given: Values of flags by key or alias, as text or booleans.
    :return: The command line that gives them.
    """
    arguments: list[str] = []
    for name, value in given.items():
        flag = as_flag(name)
        arguments += [flag if value else f"--no-{flag[2:]}"] if isinstance(value, bool) else [f"{flag}={value}"]
    return arguments


def read_flags(given: Mapping[str, Any]) -> dict[str, Any]:
    """
    :param given: Values of flags by key or alias, as text or booleans.
    :return: The values, read as YAML where the key does not take text.
    :raises ValueError: for text that is not YAML.
    """
    return {
        name: parse_yaml(value, f"`{as_flag(name)}` {value!r}")
        if isinstance(value, str) and not _is_text(FLAG_KEYS[name])
        else value
        for name, value in given.items()
    }
