"""A flag of the command line for each key of the config: their values, and how they override a file."""

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from sb3_cyborg.trainers.config import TrainerConfig
from sb3_cyborg.trainers.config_file import parse_yaml, read_yaml

SHORT: dict[str, tuple[str, ...]] = {"total_timesteps": ("--timesteps", "-n"), "env": ("-e",), "seed": ("-s",)}
"""Further names of flags."""


def _is_bool(annotation: object) -> bool:
    return annotation is bool or annotation == bool | dict[str, Any]


def _is_text(annotation: object) -> bool:
    return annotation is str or annotation == str | None


def _options() -> dict[str, tuple[Any, Any]]:
    """:return: Type and option of each key of the config, by its name."""
    options: dict[str, tuple[Any, Any]] = {}
    for key, field in TrainerConfig.model_fields.items():
        flag, default = "--" + key.replace("_", "-"), field.default
        shown = "required" if field.is_required() else f"default: {_plain(default)}"
        text = f"{field.description} [{shown}]"
        if _is_bool(field.annotation):
            kind: Any = bool | None
            names: tuple[str, ...] = (f"{flag}/--no-{flag[2:]}",)
        else:
            kind, names = str | None, (flag, *SHORT.get(key, ()))
        metavar = None if _is_bool(field.annotation) else "TEXT" if _is_text(field.annotation) else "VALUE"
        options[key] = kind, typer.Option(*names, help=text, metavar=metavar, show_default=False)
    return options


def _plain(value: object) -> object:
    return {None: "null", True: "on", False: "off"}.get(value, value) if value is None or isinstance(value, bool) else value


def with_config_flags(function: Callable[..., None]) -> Callable[..., None]:
    """:return: The function with a flag for each key of the config, besides its own; it gets those that were given."""
    own = list(inspect.signature(function).parameters.values())[:-1]
    kinds = {key: Annotated[kind, option] for key, (kind, option) in _options().items()}
    flags = [
        inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind) for key, kind in kinds.items()
    ]

    def command(**values: Any) -> None:
        function(**{key: value for key, value in values.items() if key not in kinds or value is not None})

    command.__doc__ = function.__doc__
    command.__name__ = function.__name__
    setattr(command, "__signature__", inspect.Signature([*own, *flags]))  # noqa: B010  # mypy knows no such attribute
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in own} | kinds
    return command


def read_flags(given: Mapping[str, Any]) -> dict[str, Any]:
    """
    :param given: Flags as text, or as booleans.
    :return: Their values: as in a YAML file, but for keys whose value is text.
    :raises ValueError: for text that is no YAML.
    """
    fields = TrainerConfig.model_fields
    return {
        key: parse_yaml(value, f"`--{key.replace('_', '-')}` {value!r}")
        if isinstance(value, str) and not _is_text(fields[key].annotation)
        else value
        for key, value in given.items()
    }


def effective_config(config: Path | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """
    :param config: A YAML file, or ``None``.
    :param given: Values of flags.
    :return: The file's values, overridden. ``--memory pmm`` keeps the options of a file that has this memory already.
    """
    values = {} if config is None else dict(read_yaml(config))
    for key, value in given.items():
        before = values.get(key)
        same = isinstance(before, Mapping) and isinstance(value, str) and value in (before.get("type"), before.get("mode"))
        if not same:
            values[key] = value
    return values
