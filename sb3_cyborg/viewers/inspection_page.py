"""Writes an :class:`Inspection` as one self-contained HTML page: a slider over the episode, its frames, memory and value."""

import base64
import hashlib
import html
import io
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sb3_cyborg import __version__
from sb3_cyborg.files import write_text
from sb3_cyborg.viewers.frames import LARGEST_SIDE
from sb3_cyborg.viewers.inspection import MAX_OBSERVATION, Inspection

TEMPLATE = Path(__file__).parent / "page"
FORMATS = (".html", ".htm")
MISSING = 255
"""Byte of a cell without a value. The others are in proportion to the square root of the value; 254 is the largest value."""
DIGITS = 6
"""Significant digits of the numbers in the page."""


def check_page(output: Path | str) -> Path:
    """
    :param output: File of a page.
    :return: The path.
    :raises ValueError: for another ending, and for a folder.
    """
    path = Path(output)
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"A page's name ends in {' or '.join(FORMATS)}, got {str(path)!r}.")
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give a file in it, like {path / 'memory.html'}.")
    return path


def write_inspection_page(inspection: Inspection, output: Path | str) -> Path:
    """
    Write an episode as one HTML page, which needs no network and no other file.

    The page shows values, probabilities and frames of an inspection with ``details=True``, and works without them.

    :param inspection: The episode.
    :param output: An HTML file. Missing folders are created.
    :return: The file.
    :raises ValueError: for a file name of another format.
    """
    path = check_page(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, inspection_page(inspection))
    return path


def inspection_page(inspection: Inspection) -> str:
    """
    :param inspection: The episode.
    :return: The page, see :func:`write_inspection_page`.
    """
    style, script = ((TEMPLATE / f"inspection.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    data = page_data(inspection)
    texts = {
        "title": html.escape(data["title"]),
        "version": html.escape(__version__),
        "style": style,
        "style hash": _source_hash(style),
        "script": script,
        "script hash": _source_hash(script),
        "data": _embedded_json(data),
    }
    template = (TEMPLATE / "inspection.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{([a-z ]+)\}\}", lambda match: texts[match[1]], template)


def _source_hash(source: str) -> str:
    """:return: The source of a content security policy that allows this text alone, as a style or a script."""
    return f"sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}"


def _embedded_json(data: Mapping[str, Any]) -> str:
    """:return: JSON without characters of HTML, so that no text in it can end the element that holds it."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def page_data(inspection: Inspection) -> dict[str, Any]:
    """
    :param inspection: The episode.
    :return: The data of the page: lists, numbers and text; maps and frames are text in base64.
    """
    observations = inspection.observations
    is_wide = observations is not None and observations.shape[1] > MAX_OBSERVATION
    frames, frame_of = _unique(inspection.frames)
    return {
        "title": f"{_agent_name(inspection)} in {inspection.name}",
        "summary": _summary(inspection),
        "steps": inspection.steps,
        "rewards": _plain(inspection.rewards),
        "values": _plain(inspection.values),
        "actions": _plain(inspection.actions),
        "discrete_actions": _is_discrete(inspection.actions),
        "probabilities": _plain(inspection.probabilities),
        "observations": _plain(observations),
        "discrete_observations": _is_discrete(observations),
        "observation_map": _observation_map(observations) if is_wide and observations is not None else None,
        "frames": frames,
        "frame_of": frame_of,
        "pixelated": _is_small(inspection.frames),
        "parts": [_part(name, part) for name, part in inspection.parts.items()],
    }


def _agent_name(inspection: Inspection) -> str:
    memory = "no memory" if inspection.kind == "none" else f"memory {inspection.kind}"
    return f"Encoder {inspection.encoder}, {memory}" if inspection.encoder else memory.capitalize()


def _summary(inspection: Inspection) -> str:
    length = f"{inspection.steps} steps" if inspection.ended else f"the first {inspection.steps} steps"
    summary = f"One episode: {length}, return {inspection.rewards.sum():.3g}."
    return summary if inspection.parts else f"{summary} This agent has no external memory and no attention to show."


def _is_discrete(values: np.ndarray | None) -> bool:
    return values is not None and np.issubdtype(values.dtype, np.integer)


def _plain(values: np.ndarray | None) -> Any:
    """:return: Nested lists of numbers with few digits, ``None`` for numbers that are not finite; ``None`` for ``None``."""
    if values is None:
        return None

    def shortened(value: Any) -> Any:
        if isinstance(value, list):
            return [shortened(item) for item in value]
        if isinstance(value, float):
            return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
        return int(value)

    return shortened(values.tolist())


def _unique(frames: tuple[bytes, ...] | None) -> tuple[list[str] | None, list[int] | None]:
    """:return: The different frames as data URLs, and the number of the frame of each step."""
    if frames is None:
        return None, None
    numbers: dict[bytes, int] = {}
    frame_of = [numbers.setdefault(frame, len(numbers)) for frame in frames]
    return [_data_url(frame) for frame in numbers], frame_of


def _data_url(frame: bytes) -> str:
    kind = "png" if frame.startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(frame).decode()}"


def _is_small(frames: tuple[bytes, ...] | None) -> bool:
    """:return: Whether frames are much smaller than the place for them, so that their pixels are shown as squares."""
    if frames is None:
        return False
    from PIL import Image

    return 4 * max(Image.open(io.BytesIO(frames[0])).size) <= LARGEST_SIDE


# --- the parts of the agent -------------------------------------------------------------------------------------------


def _part(name: str, part: Inspection) -> dict[str, Any]:
    """:return: The data of one layer of the encoder or of the memory."""
    memory = part.memory
    has_attention = part.attention is not None
    gates = memory.get("gate")
    names = None
    if gates is not None:
        names = [f"gate of head {index}" for index in range(gates.shape[1])] if gates.shape[1] > 1 else ["write gate"]
    return {
        "name": f"{name[0].upper()}{name[1:]}",
        "note": _sizes(memory) + (" Below: the past steps that the chosen step reads most." if has_attention else ""),
        "heads": memory["null"].shape[1],
        "null_shares": _plain(memory["null"]),
        "gates": _plain(gates),
        "gate_names": names,
        "held": _plain(part.held),
        "maps": [shown for shown in (_attention_map(part), *_slot_maps(part)) if shown is not None],
    }


def _sizes(memory: Mapping[str, np.ndarray]) -> str:
    _, heads, slots = memory["read"].shape
    each = " each" if "write" in memory and heads > 1 else ""
    return f"{heads} head{'s' * (heads > 1)}, {slots} slots{each}."


def _map(values: np.ndarray, **options: Any) -> dict[str, Any]:
    """
    :param values: (H, T, rows) of at least 0, NaN for missing values.
    :param options: Further data of the map: title, quantity and how it is drawn. ``top`` is the value of the last colour; the
        default is the largest value.
    :return: The data of a map, with its values as bytes.
    """
    heads, _, rows = values.shape
    known = np.isfinite(values)
    top = float(options.pop("top", 0) or (values[known].max() if known.any() else 0) or 1)
    scaled = np.round(np.sqrt(np.clip(np.where(known, values, 0) / top, 0, 1)) * (MISSING - 1)).astype(np.uint8)
    data = base64.b64encode(np.where(known, scaled, np.uint8(MISSING)).tobytes()).decode()
    defaults = {"kind": "slot", "first": 0, "share": True, "colours": "violet", "absent": "empty", "note": ""}
    height = int(np.clip(6 * rows, 48, 300))
    return {**defaults, "heads": heads, "rows": rows, "top": top, "values": data, "height": height, **options}


def _attention_map(part: Inspection) -> dict[str, Any] | None:
    attention = part.attention
    if attention is None:
        return None
    steps = np.arange(part.steps)
    absent = steps[:, None] <= steps  # (reading, read): future steps
    if part.held is not None:
        absent = absent | ~(part.held[:, :, None] == steps).any(axis=1)
    return _map(
        np.where(absent[:, None], np.nan, attention).transpose(1, 0, 2),
        kind="attention",
        title="Attention over past steps",
        note="Horizontal: the step that reads. Vertical: the step that is read. A line parallel to the diagonal has a "
        "constant age; a horizontal line is one step that is read again and again.",
        quantity="share of the read",
        absent="not stored: future, or overwritten",
        height=300,
    )


def _slot_maps(part: Inspection) -> list[dict[str, Any]]:
    """:return: The maps by age for a sliding window, otherwise those by slot."""
    memory = part.memory
    if part.is_window:
        return [_age_map(part)]
    if "write" in memory:
        return _maps_of_separate_slots(memory)
    held = part.held
    filled = np.ones_like(memory["read"][:, 0], dtype=bool) if held is None else held >= 0
    maps = [
        _map(
            np.where(filled[:, None], memory["read"], np.nan).transpose(1, 0, 2),
            title="Which slot is read",
            quantity="share of the read",
        )
    ]
    looks: dict[str, dict[str, Any]] = {
        "age": {"title": "Age of the item in each slot", "quantity": "age in steps", "share": False, "colours": "age"},
        "usage": {
            "title": "Usage of each slot: the least-used one is overwritten next",
            "quantity": "usage",
            "share": False,
            "colours": "blue",
        },
        "strength": {
            "title": "Strength of each slot: the write gate when its item was written",
            "quantity": "strength",
            "colours": "green",
            "top": 1,
        },
    }
    maps += [_map(np.where(filled, memory[name], np.nan)[None], **look) for name, look in looks.items() if name in memory]
    return maps


def _age_map(part: Inspection) -> dict[str, Any]:
    """:return: The reads of a sliding window by age in steps."""
    read, age = part.memory["read"], part.memory["age"].astype(np.int64)
    by_age = np.full((read.shape[1], part.steps, max(1, int(age.max()))), np.nan)
    for step in range(part.steps):
        filled = age[step] > 0
        by_age[:, step, age[step, filled] - 1] = read[step][:, filled]
    return _map(
        by_age,
        kind="age",
        first=1,
        title="The same by age: steps between storing and reading",
        quantity="share of the read",
        absent="not stored",
        height=160,
    )


def _maps_of_separate_slots(memory: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """:return: The maps of a memory whose heads have slots of their own: all slots, head after head."""
    _, heads, slots = memory["read"].shape
    unwritten = memory.get("unwritten")
    if unwritten is None:
        unwritten = np.cumprod(1 - memory["write"], axis=0)
        unwritten = np.concatenate([np.ones_like(unwritten[:1]), unwritten[:-1]])
    looks: list[tuple[np.ndarray, dict[str, Any]]] = [
        (memory["read"], {"title": "Which slot is read", "quantity": "share of the read"}),
        (
            memory["write"],
            {"title": "Share of each slot that is replaced", "quantity": "share replaced", "colours": "red"},
        ),
        (
            1 - unwritten,
            {"title": "Share of each slot that was ever written", "quantity": "share written", "colours": "blue", "top": 1},
        ),
    ]
    names = [f"head {head}, slot {slot}" for head in range(heads) for slot in range(slots)]
    return [
        _map(values.reshape(1, len(values), -1), row_names=names, group=slots if heads > 1 else 0, **look)
        for values, look in looks
    ]


def _observation_map(observations: np.ndarray) -> dict[str, Any]:
    """:return: The map of observations with many numbers, from the smallest number to the largest."""
    values = observations.astype(np.float64)
    finite = values[np.isfinite(values)]
    low = float(finite.min()) if len(finite) else 0.0
    title = f"Observation: {values.shape[1]} numbers" + (f", less {low:.3g}" if low else "")
    return _map(
        (values - low)[None], kind="number", title=title, quantity="value", share=False, colours="blue", absent="not finite"
    )
