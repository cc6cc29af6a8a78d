"""
Files of models and policies, which are read without running code of the file.

A model's file is SB3's zip. Its entry ``data`` is JSON with an object under each key: as plain data (see ``plain_data``), or,
where an object has no such form, pickled as SB3 does it. Pickled objects are loaded only from files that the caller trusts.
"""

import base64
import io
import json
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.save_util import data_to_json, open_path

from sb3_cyborg.checks import warn_caller
from sb3_cyborg.files import write_atomically
from sb3_cyborg.memory_ppo.plain_data import Classes, NotPlainError, from_plain, to_plain

PICKLED = ":serialized:"
"""SB3's key of a pickled object."""

DATA = "data"
"""SB3's name of the zip's entry with all objects but tensors."""

BUILD_ERRORS = (
    pickle.UnpicklingError,
    ImportError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    SyntaxError,
    RecursionError,
)
"""Exceptions while an object is built from parts that are damaged, or were written by another version."""

NOT_TENSORS = "it holds other objects than tensors and numbers among its tensors, or is damaged; such objects are never loaded"


def to_entries(objects: Mapping[str, Any], registered: Mapping[str, type] | None = None) -> dict[str, Any]:
    """
    :param objects: Objects by key.
    :param registered: Classes by registered name.
    :return: By key, a form that JSON can hold: plain data, or, with a warning, the object pickled as in SB3.
    """
    classes = Classes(registered or {})
    entries, pickled = {}, []
    for key, value in objects.items():
        try:
            entries[key] = to_plain(value, classes, key)
        except NotPlainError as error:
            entries[key] = json.loads(data_to_json({key: value}))[key]
            pickled.append(f"`{key}` ({error})")
    if pickled:
        warn_caller(
            f"Saved as a pickle: {', '.join(pickled)}. A file with pickles loads with `trust=True` only, because they can run "
            "code. Numbers, text, arrays, spaces, SB3's schedules and classes at the top level of a module need none."
        )
    return entries


def from_entries(
    entries: object,
    where: object,
    trust: bool = False,
    registered: Mapping[str, type] | None = None,
    custom_objects: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """
    :param entries: The result of :func:`to_entries`, from a file.
    :param where: The file, for errors.
    :param trust: Whether to load pickled objects and to import the modules that the file names.
    :param registered: Classes by registered name.
    :param custom_objects: Objects that replace those of the file, by key, and classes by the import path in the file.
    :return: The objects by key.
    :raises ValueError: for pickled objects without trust, for a class that may not be used, and for damaged entries.
    """
    if not isinstance(entries, dict):
        raise ValueError(f"{where} is damaged: its objects are a {type(entries).__name__}, not a dictionary.")
    given = custom_objects or {}
    classes = Classes(registered or {}, given, trust)
    pickled = [key for key, entry in entries.items() if key not in given and _is_pickled(entry)]
    if pickled and not trust:
        raise _untrusted(where, entries, pickled)
    objects = {}
    for key, entry in entries.items():
        try:
            if key in given:
                objects[key] = given[key]
            elif key in pickled:
                objects[key] = pickle.loads(base64.b64decode(entry[PICKLED]))
            else:
                objects[key] = from_plain(entry, classes, key)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        except BUILD_ERRORS as error:
            raise ValueError(
                f"{where}: `{key}` is damaged or of another version ({type(error).__name__}: {error})."
            ) from error
    return objects


def _is_pickled(entry: object) -> bool:
    return isinstance(entry, dict) and PICKLED in entry


def untrusted(where: object, what: str) -> ValueError:
    """
    :param where: A file.
    :param what: Verb and object: the part of it that can run code.
    :return: The error for a file that is loaded without trust.
    """
    return ValueError(
        f"{where} {what}, which can run any code when it is loaded. If you trust the author of the file, pass `trust=True` "
        "(on the command line `--trust`)."
    )


def _untrusted(where: object, entries: Mapping[str, Any], pickled: list[str]) -> ValueError:
    if "policy_class" in entries and "seq_len" not in entries:
        return ValueError(f"{where} holds no MemoryPPO: load a model of another algorithm with that algorithm.")
    if {"policy_class", "observation_space", "ep_info_buffer"} <= set(pickled):
        return untrusted(where, "was written by an earlier version, which pickled its objects")
    return untrusted(where, f"holds pickled objects ({', '.join(map(repr, pickled))})")


# --- models ---------------------------------------------------------------------------------------------------------------


def saved_path(path: str | Path) -> Path:
    """
    :param path: Path that a model is saved to.
    :return: The file that SB3 writes then: with the suffix ``.zip`` if it has none, and with ``_2`` if there is a folder of
        this name. As in SB3, the latter warns, and so does a folder that is missing and will be made.
    """
    path = Path(path)
    path = path if path.suffix else path.with_name(f"{path.name}.zip")
    if path.is_dir():
        warnings.warn(f"Path '{path}' is a folder. Will save instead to {path}_2", stacklevel=3)
        path = path.with_name(f"{path.name}_2")
    if not path.parent.exists():
        warnings.warn(f"Path '{path.parent}' does not exist. Will create it.", stacklevel=3)
    return path


def without_numpy(state: Any) -> Any:
    """
    :param state: A state-dict.
    :return: The same with Python's numbers for NumPy's, e.g. in the options of an optimizer: these would be pickled objects.
    """
    if type(state) is dict:  # not a module's OrderedDict, which has an attribute with versions
        return {name: without_numpy(value) for name, value in state.items()}
    if type(state) in (list, tuple):
        return type(state)(map(without_numpy, state))
    return state.item() if isinstance(state, np.generic) else state


def read_content(path: str | Path | io.BufferedIOBase) -> bytes:
    """
    :param path: Path of a file, with or without the suffix ``.zip``, or an open file.
    :return: The content.
    """
    file = open_path(path, "r", suffix="zip")
    if file is path:
        file.seek(0)
        return file.read()
    with file:
        return file.read()


def read_objects(
    content: bytes,
    where: object,
    trust: bool,
    model_class: type[BaseAlgorithm],
    custom_objects: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """
    Read the objects of a model, so that SB3 need not: passed to its ``load`` as ``custom_objects``, they replace every entry.

    :param content: Content of the model's file.
    :param where: The file, for errors.
    :param trust: As for :func:`from_entries`, like the others.
    :param model_class: Class of the model, whose policies have registered names.
    :param custom_objects: Objects that replace those of the file.
    :return: The objects by key.
    :raises ValueError: as :func:`from_entries`, and for a file that names an environment to make or replaces a method.
    :raises BadZipFile: for a damaged file.
    """
    if custom_objects is not None and not isinstance(custom_objects, Mapping):
        raise ValueError(f"`custom_objects` must be a dictionary or None, got {custom_objects!r}.")
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        if broken := archive.testzip():
            raise zipfile.BadZipFile(f"{broken} is damaged")
        entries = json.loads(archive.read(DATA).decode())
    objects = from_entries(entries, where, trust, model_class.policy_aliases, custom_objects)
    # SB3 makes an `env` that is text: gymnasium would import the module of a `module:id`. All objects become attributes.
    methods = [key for key in objects if callable(getattr(model_class, key, None)) and not trust]
    if methods or isinstance(objects.get("env"), str):
        raise ValueError(f"{where} holds no model as `save` writes it: `{methods[0] if methods else 'env'}` is no data.")
    return objects


# --- policies -------------------------------------------------------------------------------------------------------------


def save_policy(path: str | Path, weights: Mapping[str, Any], parameters: Mapping[str, Any]) -> None:
    """
    Write the file of a policy atomically.

    :param path: The file.
    :param weights: Its state-dict.
    :param parameters: Arguments of its constructor.
    """
    content = {"state_dict": weights, "data": json.dumps(to_entries(parameters))}
    write_atomically(path, lambda file: th.save(content, file))


def read_policy(path: str | Path, device: th.device, trust: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """
    :param path: A file of :func:`save_policy`, or with trust one of SB3.
    :param device: Device of the weights.
    :param trust: Whether to load pickled objects and to import the modules that the file names.
    :return: Arguments of the policy's constructor, and its state-dict.
    :raises ValueError: for pickled objects without trust, and for a damaged file.
    """
    try:
        saved = th.load(path, map_location=device, weights_only=not trust)
        weights, parameters = saved["state_dict"], saved["data"]
    except pickle.UnpicklingError as error:
        raise untrusted(path, "was written by an earlier version, which pickled its objects, or is damaged") from error
    except (RuntimeError, EOFError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a whole file of a policy: {error}") from error
    if isinstance(parameters, str):
        return from_entries(json.loads(parameters), path, trust), weights
    return parameters, weights
