"""Configs of any content: they are refused with a line for each key, or mean what was given; none hangs."""

import math
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sb3_cyborg.trainers.config import TrainerConfig
from sb3_cyborg.trainers.config_file import dump_yaml, parse_yaml
from sb3_cyborg.trainers.folder_name import check_folder_name
from sb3_cyborg.trainers.vocabulary import ALIASES, canonical
from tests.fuzz.outcomes import ITEMS, VALUES, WORDS, cases, check_message, some, within

SIZES = ("n_steps", "seq_len", "batch_size", "burn_in")
"""Keys whose numbers are those of ``MemoryPPO``: ``test_fuzz_model.py`` draws them without a limit."""

KEYS = [key for key in [*TrainerConfig.model_fields, *ALIASES] if ALIASES.get(key, key) not in (*SIZES, "env")]
NEARLY_KEYS = st.one_of(st.sampled_from([*KEYS, *map(str.upper, KEYS), "lr", "n_stps"]), st.text(max_size=8))
PLAIN_SIZES = st.dictionaries(st.sampled_from(SIZES), st.integers(0, 512), max_size=2)


def same(given_value: Any, value: Any) -> bool:
    """:return: Whether a config holds what was given: the same value, or a number of another type or as text."""
    if isinstance(given_value, np.bool_) and isinstance(value, bool):  # of an option of an environment, a memory and so on
        given_value = bool(given_value)
    if isinstance(given_value, bool) or isinstance(value, bool):
        return bool(given_value is value)
    if type(given_value) is type(value) is int:
        return bool(given_value == value)
    if isinstance(value, float) and math.isnan(value):
        return math.isnan(float(given_value))
    if isinstance(value, (int, float)) and not isinstance(given_value, (dict, list)):
        return float(given_value) == value
    if isinstance(value, list):
        return len(value) == len(given_value) and all(map(same, given_value, value))
    if isinstance(value, dict):
        return value.keys() == given_value.keys() and all(same(given_value[key], value[key]) for key in value)
    return bool(given_value == value)


@cases(250, 5000)
def test_configs(count: int) -> None:
    accepted = []

    @some(count)
    @given(st.dictionaries(NEARLY_KEYS, VALUES, max_size=3), PLAIN_SIZES)
    def check(settings: dict[str, Any], sizes: dict[str, Any]) -> None:
        settings = {"env": "CartPole-v1", **settings, **sizes}
        with within(10):
            try:
                config = TrainerConfig.parse(settings)
            except ValueError as error:
                check_message(error, len(settings))
                return
            accepted.append(settings)
            for key, value in canonical(settings).items():
                assert same(value, getattr(config, key)), f"{key}={value!r} became {getattr(config, key)!r}"
            text = config.to_yaml()
            assert TrainerConfig.parse(parse_yaml(text, "here")).to_yaml() == text

    check()
    assert accepted, "some configs are accepted"


@cases(250, 5000)
def test_configs_with_one_key(count: int) -> None:
    """More of these are accepted than of those with several keys."""

    @some(count)
    @given(st.sampled_from(KEYS), st.one_of(ITEMS, VALUES))
    def check(key: str, value: Any) -> None:
        with within(10):
            try:
                config = TrainerConfig.parse({"env": "CartPole-v1", key: value})
            except ValueError as error:
                check_message(error, 2)
                return
            for name, part in canonical({key: value}).items():
                assert same(part, getattr(config, name)), f"{name}={part!r} became {getattr(config, name)!r}"

    check()


PARTS = ["a", "b: ", "- ", "? ", "{", "}", "[", "]", ", ", "&x ", "*x", "<<: ", "!!int ", "!!set ", "'", '"', "|\n", ">\n"]
PARTS += ["\n", "  ", "#", "%", "@", "`", "~", "---\n", "...\n", "\t", "\x00", "\x85", "\ufeff"]
PARTS += ["1e400", "0x", "1:30", "2024-13-01", "=", ".inf"]
YAML = st.one_of(st.text(max_size=200), st.lists(st.sampled_from(PARTS), max_size=30).map("".join))


@cases(400, 10000)
def test_texts_that_may_be_yaml(count: int) -> None:
    @some(count)
    @given(YAML)
    def check(text: str) -> None:
        with within(10):
            try:
                parse_yaml(text, "here")
            except ValueError as error:
                check_message(error)

    check()


TEXT = st.text(st.characters(codec="utf-8"), max_size=20)
PLAIN = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), TEXT),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXT, inner, max_size=4)),
    max_leaves=10,
)


@cases(300, 5000)
def test_what_is_written_is_read(count: int) -> None:
    @some(count)
    @given(PLAIN)
    def check(value: Any) -> None:
        with within(10):
            assert parse_yaml(dump_yaml(value), "here") == value

    check()


@cases(300, 5000)
def test_names_of_runs(count: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        parent = Path(name)

        @some(count)
        @given(st.one_of(WORDS, st.text(st.characters(codec="utf-8"), min_size=1, max_size=300)))
        def check(text: str) -> None:
            try:
                TrainerConfig.parse({"env": "CartPole-v1", "run_name": text})
            except ValueError as error:
                check_message(error)
                return
            (parent / check_folder_name(text)).mkdir()
            assert os.listdir(parent) == [text]
            (parent / text).rmdir()

        check()
