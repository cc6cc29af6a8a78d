"""Reads YAML files, and formats errors of pydantic as one line for each key."""

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from sb3_cyborg.checks import unknown_name
from sb3_cyborg.trainers.vocabulary import OTHER_NAMES


class _Loader(yaml.SafeLoader):
    """A safe loader with the floats of YAML 1.2 (``3e-4``, ``1e6``) that refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for index, key in enumerate(keys):
            if key in keys[:index]:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is there twice", node.value[index][0].start_mark
                )
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def parse_yaml(text: str, where: str) -> Any:
    """
    :param text: YAML.
    :param where: Source of the text, for the error.
    :return: The content.
    :raises ValueError: if it is not YAML, with the line.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or "it cannot be read"
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ValueError(f"{where}{place} is not YAML: {problem}.") from None


def read_yaml(path: str | Path) -> dict[str, Any]:
    """
    :param path: A YAML file that holds a mapping.
    :return: The mapping.
    :raises ValueError: if there is no such file, or if it holds no mapping.
    """
    path = Path(path)
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [other.name for other in path.parent.glob("*.y*ml")], n=1)
        hint = f" Did you mean {str(path.parent / near[0])!r}?" if near else ""
        raise ValueError(f"There is no config file {str(path)!r}.{hint}")
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not a text file.") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold `key: value` lines, got {type(values).__name__}.")
    return values


def readable(error: ValidationError, values: Mapping[Any, Any], keys: Iterable[str]) -> str:
    """
    :param error: Pydantic's error.
    :param values: The settings that were given, by key.
    :param keys: All keys of the config.
    :return: One line for each wrong key: its name, the reason and the given value.
    """
    reasons: dict[str, list[str]] = {}
    for detail in error.errors(include_url=False):
        key = str(detail["loc"][0]) if detail["loc"] else ""
        reason = str(detail["ctx"]["error"]) if detail["type"] == "value_error" else ""
        if detail["type"] == "extra_forbidden":
            reason = _unknown_key(key, keys)
        elif detail["type"] == "missing":
            reason = f"The config needs `{key}`."
        elif not reason:
            inner = "".join(f"[{part!r}]" for part in detail["loc"][1:] if not _is_branch(part))
            reason = f"{inner} {detail['msg']}".strip()
        if reason not in reasons.setdefault(key, []):
            reasons[key].append(reason)
    return "\n".join(_line(key, parts, values) for key, parts in reasons.items())


def _is_branch(part: object) -> bool:
    """:return: Whether ``part`` of a location is pydantic's name for a member of a union, not a key."""
    return isinstance(part, str) and re.match(r"^(str|int|float|bool|dict|list|function-)", part) is not None


def _unknown_key(key: str, keys: Iterable[str]) -> str:
    if key in OTHER_NAMES:
        return f"Unknown config key {key!r}. Its name here is {OTHER_NAMES[key].key!r}."
    return str(unknown_name("config key", key, keys))


def _line(key: str, reasons: list[str], values: Mapping[Any, Any]) -> str:
    if not key or reasons[0].startswith(("Unknown", "The config needs")):
        return reasons[0]
    text = " or ".join(reasons).rstrip(".")
    got = "" if "got " in text else f", got {values.get(key)!r}"
    return f"`{key}`: {text}{got}."
