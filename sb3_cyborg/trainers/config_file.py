"""Reads YAML files, and formats errors of pydantic as one line for each key."""

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from pydantic import ValidationError

from sb3_cyborg.checks import unknown_name
from sb3_cyborg.trainers.vocabulary import OTHER_NAMES

MAX_CHARACTERS = 1_000_000
"""Longest text that is read as YAML. PyYAML reads about as many characters in ten seconds."""

MAX_VALUES = 100_000
"""Largest number of values of a YAML text, after its aliases are expanded."""

MAX_DEPTH = 50
"""Deepest nesting of a YAML text."""

_FLOAT = re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9]*)?[eE][-+]?[0-9]+$")


class _Loader(yaml.SafeLoader):
    """
    A safe loader with the numbers of YAML 1.2: ``3e-4`` and ``1e6`` are floats, and ``1:30`` is text, not 90.

    It refuses a key given twice, and a text that is small only because of its aliases: they share their values, so whatever
    copies or prints these would take exponentially long.
    """

    def resolve(self, kind: type[yaml.Node], value: Any, implicit: Any) -> Any:
        tag = super().resolve(kind, value, implicit)  # type: ignore[no-untyped-call]  # the stubs of PyYAML have no types
        is_sexagesimal = tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float") and ":" in str(value)
        return "tag:yaml.org,2002:str" if is_sexagesimal else tag

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None:
            self._sizes: dict[int, int] = {}
            if (size := self._count(node, 1)) > MAX_VALUES:
                raise _problem(f"it holds {size:,} values with its aliases expanded, at most {MAX_VALUES:,} are read", node)
        return node

    def _count(self, node: yaml.Node, depth: int) -> int:
        """:return: The number of values in a node, each as often as aliases repeat it."""
        if depth > MAX_DEPTH:
            raise _problem(f"it is nested more than {MAX_DEPTH} levels deep", node)
        if isinstance(node, yaml.ScalarNode):
            return 1
        if id(node) not in self._sizes:
            self._sizes[id(node)] = 0
            if isinstance(node, yaml.MappingNode):
                self._check_keys(node)
                parts = [part for pair in node.value for part in pair]
            else:
                parts = node.value
            self._sizes[id(node)] = 1 + sum(self._count(part, depth + 1) for part in parts)
        elif self._sizes[id(node)] == 0:
            raise _problem("an alias is inside of its own anchor", node)
        return self._sizes[id(node)]

    def _check_keys(self, node: yaml.MappingNode) -> None:
        """Refuse a key given twice. Keys of a merge (``<<``) are not counted: those of the mapping override them."""
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    raise _problem(f"key {key.value!r} is there twice", key)
                seen.add((key.tag, key.value))


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789"))


class _Dumper(yaml.SafeDumper):
    """
    A safe dumper for :class:`_Loader`. It quotes text that the loader would read as a float, and text with control characters,
    some of which PyYAML would write as they are.
    """

    def represent_text(self, value: str) -> yaml.ScalarNode:
        """:return: A node, quoted if some character cannot be printed."""
        return self.represent_scalar("tag:yaml.org,2002:str", value, style=None if value.isprintable() else '"')


_Dumper.add_representer(str, _Dumper.represent_text)
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789"))


def _problem(text: str, node: yaml.Node) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, text, node.start_mark)


def plain_values(value: Any, where: str = "", depth: int = MAX_DEPTH) -> Any:
    """
    :param value: A value of a config.
    :param where: The keys that led to it, for the error.
    :param depth: Number of levels that may follow.
    :return: The same value with numbers and lists of Python in place of those of numpy, which :func:`dump_yaml` cannot write.
    :raises ValueError: for objects that YAML has no notation for, and for a value that is nested too deep.
    """
    if depth == 0:
        raise ValueError(f"is nested more than {MAX_DEPTH} levels deep")
    if isinstance(value, (np.generic, np.ndarray)):
        value = value.tolist()
    if isinstance(value, Mapping):
        items = ((key, plain_values(item, f"{where}[{key!r}]", depth - 1)) for key, item in value.items())
        return {plain_values(key, where, depth - 1): item for key, item in items}
    if type(value) in (list, tuple):
        return type(value)([plain_values(item, f"{where}[{index}]", depth - 1) for index, item in enumerate(value)])
    if type(value) not in _Dumper.yaml_representers:
        kind = type(value).__name__
        raise ValueError(f"{where} must be data that a YAML file can hold, got {value!r} of type {kind}".strip())
    return value


def dump_yaml(value: Any) -> str:
    """
    :param value: Numbers, text, lists and mappings.
    :return: YAML, which :func:`parse_yaml` reads as the same value.
    """
    text: str = yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    return text


def parse_yaml(text: str, where: str) -> Any:
    """
    :param text: YAML.
    :param where: Source of the text, for the error.
    :return: The content.
    :raises ValueError: if it is not YAML, with the line, and if it is too large.
    """
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"{where} has {len(text):,} characters, at most {MAX_CHARACTERS:,} are read.")
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or "it cannot be read"
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ValueError(f"{where}{place} is not YAML: {' '.join(problem.split())}.") from None
    except RecursionError:
        raise ValueError(f"{where} is not YAML: it is nested more than {MAX_DEPTH} levels deep.") from None
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:  # of values such as a date 2024-13-01
        raise ValueError(f"{where} is not YAML: {' '.join(str(error).split())}.") from None


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
