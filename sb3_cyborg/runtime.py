"""
Acting with an exported agent: :class:`OnnxAgent` needs NumPy and onnxruntime alone, neither PyTorch nor Stable-Baselines3.

This file imports nothing of the package. ``pip install ./runtime`` in a checkout installs it alone, as ``sb3_cyborg_runtime``;
a copy of the file works as well.
"""

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

import numpy as np

try:
    import onnxruntime as ort
except ModuleNotFoundError as error:
    raise ImportError(f"OnnxAgent needs {error.name}: pip install onnxruntime", name=error.name) from error

METADATA = "sb3_cyborg"
"""Key of the description, a JSON text, in the metadata of the file."""
HASH = "sb3_cyborg_sha256"
"""Key of the content hash in the metadata of the file."""
FORMAT = 1
"""Version of the names, shapes and the description. A reader refuses other versions."""

OBSERVATION, STATE, NEXT_STATE = "observation", "state.", "next_state."
EPISODE_START, ACTION_MASKS = "episode_start", "action_masks"
ACTION, VALUE, LOGITS, MEAN, LOG_STD = "action", "value", "logits", "mean", "log_std"
"""Names of inputs and outputs; ``observation.<key>`` is an entry of a Dict observation, ``state.<leaf>`` one of the state."""
LAST_ACTION = "last_action"
"""Leaf of the state that holds the last action."""

NumpyState = dict[str, np.ndarray]
DESCRIBED = ("observation", "action_space", "state", "squash_output", "action_masks")
"""Entries of the description that acting needs."""


def hash_entry(digest: str) -> bytes:
    """
    Encode the content hash as the last bytes of a file.

    In the format of protocol buffers, messages that follow each other are merged. So this entry of the metadata (field 14 of
    ``ModelProto``) can stand behind the rest of the file, and the hash is that of all bytes before it.

    :param digest: SHA-256, 64 hexadecimal digits.
    :return: The bytes of the entry.
    """
    pair = b"\x0a" + bytes([len(HASH)]) + HASH.encode() + b"\x12" + bytes([len(digest)]) + digest.encode()
    return b"\x72" + bytes([len(pair)]) + pair


def content_hash(content: bytes) -> str | None:
    """
    :param content: Content of an exported file.
    :return: Its content hash, or ``None`` if the bytes before the hash are not those that were exported.
    """
    body = content[: -len(hash_entry("0" * 64))]
    digest = hashlib.sha256(body).hexdigest()
    return digest if content == body + hash_entry(digest) else None


class OnnxAgent:
    """
    An agent that ``sb3_cyborg.export.export_onnx`` or ``sb3-cyborg export`` wrote::

        agent = OnnxAgent("agent.onnx")
        action, state = agent.predict(observation, state, episode_start)

    It has the ``predict`` of Stable-Baselines3, so that ``evaluate_policy`` works with it.

    :param path: The file.
    :param threads: Threads of one operation, >= 1. A policy is small: more than one thread usually slows a step down.
    :param seed: Seed of sampled actions; ``None`` draws one.
    :param verify: Require the file to be unchanged since its export, by its content hash. Pass ``False`` for a file that
        another tool has changed, such as a quantizer.
    :param providers: Execution providers of onnxruntime.
    :raises ValueError: for a file that is damaged, that was not exported by sb3_cyborg, whose format or operator set is not
        known, or that was changed.
    :raises OSError: for a file that cannot be read.
    """

    metadata: dict[str, Any]
    """The description in the file: names, shapes, dtypes, spaces, initial state, versions."""
    sha256: str | None
    """Content hash of the file; ``None`` if the file was changed since its export and ``verify`` is false."""

    def __init__(
        self,
        path: str | PathLike[str],
        *,
        threads: int = 1,
        seed: int | None = None,
        verify: bool = True,
        providers: Sequence[str] = ("CPUExecutionProvider",),
    ) -> None:
        if threads < 1:
            raise ValueError(f"`threads` must be at least 1, got {threads}.")
        with open(path, "rb") as file:
            content = file.read()
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 3  # errors: they are raised; warnings are about the order of nodes
        self.sha256 = content_hash(content)
        try:
            self._session = ort.InferenceSession(content, options, providers=list(providers))
        except Exception as error:  # onnxruntime has no public base class for its exceptions
            raise ValueError(f"{path}: onnxruntime {ort.__version__} cannot load this file: {error}") from error
        self.metadata = _description(self._session, path)
        if verify and self.sha256 is None:
            raise ValueError(
                f"{path}: the content hash differs, so the file is damaged or was changed since its export. Export it "
                "again, or pass `verify=False` if you have changed it on purpose."
            )
        self._observations = {part["name"]: _Part(part) for part in self.metadata["observation"]}
        self._is_dict = OBSERVATION not in self._observations
        self._initial = {name: _initial_leaf(leaf) for name, leaf in self.metadata["state"].items()}
        self._masks: int | None = self.metadata["action_masks"]
        self._actions = _Actions(self.metadata["action_space"], self.metadata["squash_output"])
        self._outputs = [output.name for output in self._session.get_outputs()]
        self._inputs = {name: STATE + name for name in self._initial}
        self._next = {name: self._outputs.index(NEXT_STATE + name) for name in self._initial}
        self._action = self._outputs.index(ACTION)
        self._generator = np.random.default_rng(seed)

    def get_initial_state(self, batch_size: int = 1) -> NumpyState:
        """
        :param batch_size: Number of rows B, >= 1.
        :return: The state at the start of an episode, every leaf ``(B, ...)``.
        """
        return {name: np.repeat(leaf[None], batch_size, axis=0) for name, leaf in self._initial.items()}

    def predict(
        self,
        observation: Any,
        state: Any = None,
        episode_start: Any = None,
        deterministic: bool = True,
        action_masks: Any = None,
    ) -> tuple[np.ndarray, Any]:
        """
        Choose actions, as in Stable-Baselines3; the returned state is the ``state`` of the next call.

        :param observation: One observation, or a batch of them (B, ...), as the environment returns them.
        :param state: State that the previous call returned; ``None`` is the initial state.
        :param episode_start: Whether an episode starts with the observation, (B,); ``None`` means that none does.
        :param deterministic: Return the mode instead of a sample.
        :param action_masks: Legal actions, true or 1, (B, M) or for one observation (M,); ``None`` if all are.
        :return: Actions, and the state after the step: a dictionary of arrays, every leaf ``(B, ...)``.
        :raises ValueError: for observations of another shape, that are not finite or not in a discrete space, for the state of
            another agent or batch size, for masks of another size or without a legal action.
        """
        feed, single = self._feed(observation, state, episode_start, action_masks)
        outputs = self._session.run(None, feed)
        actions = outputs[self._action]
        new_state = {name: outputs[index] for name, index in self._next.items()}
        if not deterministic:
            sampled, actions = self._actions.sample(dict(zip(self._outputs, outputs, strict=True)), self._generator)
            if LAST_ACTION in new_state:
                new_state[LAST_ACTION] = self._actions.encode(sampled, new_state[LAST_ACTION].dtype)
        return actions[0] if single else actions, new_state

    def step(
        self, observation: Any, state: NumpyState | None = None, episode_start: Any = None, action_masks: Any = None
    ) -> dict[str, np.ndarray]:
        """
        Compute all outputs of the graph, for code of your own that samples or reads values.

        :param observation: As for :meth:`predict`.
        :param state: As for :meth:`predict`.
        :param episode_start: As for :meth:`predict`.
        :param action_masks: As for :meth:`predict`.
        :return: The outputs by name, each with a batch dimension: ``action``, the mode; ``logits``, or ``mean`` and
            ``log_std``; ``value``; ``next_state.<leaf>``.
        :raises ValueError: as :meth:`predict`.
        """
        feed, _ = self._feed(observation, state, episode_start, action_masks)
        return dict(zip(self._outputs, self._session.run(None, feed), strict=True))

    def _feed(
        self, observation: Any, state: NumpyState | None, episode_start: Any, action_masks: Any
    ) -> tuple[dict[str, np.ndarray], bool]:
        """:return: The inputs by name, and whether the observation was a single one."""
        feed: dict[str, np.ndarray] = {}
        rows, single = self._read_observation(observation, feed)
        if state is None:
            for name, key in self._inputs.items():
                feed[key] = np.repeat(self._initial[name][None], rows, axis=0)
        else:
            self._read_state(state, rows, feed)
        if episode_start is None:
            feed[EPISODE_START] = np.zeros(rows, dtype=bool)
        else:
            starts = np.asarray(episode_start).reshape(-1) != 0
            if len(starts) != rows:
                raise ValueError(f"`episode_start` has {len(starts)} rows, but there are {rows} observations.")
            feed[EPISODE_START] = starts
        if self._masks is not None:
            feed[ACTION_MASKS] = self._read_masks(action_masks, rows, self._masks)
        elif action_masks is not None:
            raise ValueError("This agent was exported without action masks: export a `MaskableMemoryPPO`.")
        return feed, single

    def _read_observation(self, observation: Any, feed: dict[str, np.ndarray]) -> tuple[int, bool]:
        if not self._is_dict:
            part = self._observations[OBSERVATION]
            if isinstance(observation, (Mapping, tuple)):
                raise ValueError(
                    f"`predict` must get an array {part.shape} as observation, got a {type(observation).__name__}: "
                    "`obs, info = env.reset()` is gymnasium's API."
                )
            feed[OBSERVATION], single = part.read(observation)
            return len(feed[OBSERVATION]), single
        keys = {name[len(OBSERVATION) + 1 :] for name in self._observations}
        if not isinstance(observation, Mapping) or observation.keys() != keys:
            got = sorted(observation) if isinstance(observation, Mapping) else type(observation).__name__
            raise ValueError(f"`predict` must get a dictionary with {sorted(keys)} as observation, got {got}.")
        sizes, singles = set(), set()
        for name, part in self._observations.items():
            feed[name], single = part.read(observation[name[len(OBSERVATION) + 1 :]])
            sizes.add(len(feed[name]))
            singles.add(single)
        if len(sizes) > 1 or len(singles) > 1:
            raise ValueError(f"The entries of the observation have different numbers of rows: {sorted(sizes)}.")
        return sizes.pop(), singles.pop()

    def _read_state(self, state: NumpyState, rows: int, feed: dict[str, np.ndarray]) -> None:
        if not isinstance(state, dict) or state.keys() != self._inputs.keys():
            got = sorted(state) if isinstance(state, dict) else type(state).__name__
            raise ValueError(
                f"`state` must be the one that the last `predict` of this agent returned, a dict with {sorted(self._inputs)}, "
                f"got {got}; pass None for the initial state."
            )
        for name, initial in self._initial.items():
            leaf = np.asarray(state[name], dtype=initial.dtype)
            if leaf.shape != (rows, *initial.shape):
                raise ValueError(
                    f"`state[{name!r}]` has shape {leaf.shape}, but for {rows} observations it must be "
                    f"{(rows, *initial.shape)}; pass None for the initial state."
                )
            feed[self._inputs[name]] = leaf

    def _read_masks(self, action_masks: Any, rows: int, size: int) -> np.ndarray:
        if action_masks is None:
            return np.ones((rows, size), dtype=bool)
        masks = np.asarray(action_masks, dtype=bool)
        if masks.size != rows * size:
            raise ValueError(f"`action_masks` must have shape {(rows, size)}, got {masks.shape}.")
        masks = masks.reshape(rows, size)
        if not np.logical_or.reduceat(masks, self._actions.starts, axis=1).all():
            raise ValueError("An action mask has no legal action: at least one entry of each component must be true.")
        return masks


def _description(session: ort.InferenceSession, path: object) -> dict[str, Any]:
    """:return: The description in the metadata of a file, after a check of its format."""
    text = session.get_modelmeta().custom_metadata_map.get(METADATA)
    if text is None:
        raise ValueError(f"{path}: this ONNX file was not exported by sb3_cyborg: its metadata has no {METADATA!r}.")
    try:
        description: dict[str, Any] = json.loads(text)
        version = description["format"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: the description {METADATA!r} in the metadata of the file is damaged: {error!r}") from error
    if version != FORMAT:
        raise ValueError(f"{path}: the file has format {version}, this version of the runtime reads format {FORMAT}.")
    if missing := [name for name in DESCRIBED if name not in description]:
        raise ValueError(f"{path}: the description in the metadata of the file lacks {missing}.")
    return description


def _initial_leaf(leaf: dict[str, Any]) -> np.ndarray:
    """:return: The initial value of a leaf of the state, without batch dimension."""
    dtype, shape, value = np.dtype(leaf["dtype"]), tuple(leaf["shape"]), leaf["initial"]
    if isinstance(value, str):
        little_endian = np.frombuffer(base64.b64decode(value), dtype=dtype.newbyteorder("<"))
        return little_endian.astype(dtype).reshape(shape)
    return np.full(shape, value, dtype=dtype)


class _Part:
    """Reads an observation, or one entry of a Dict observation."""

    def __init__(self, part: dict[str, Any]) -> None:
        self.name: str = part["name"]
        self.shape = tuple(part["shape"])
        self.dtype = np.dtype(part["dtype"])
        self.is_float = self.dtype.kind == "f"
        self.channels_last = (*self.shape[1:], self.shape[0]) if part.get("channels_first") else None
        self.sizes = None if part.get("sizes") is None else np.array(part["sizes"], dtype=np.int64).reshape(self.shape)

    def read(self, observation: Any) -> tuple[np.ndarray, bool]:
        """:return: The observations with a batch dimension, and whether it had none."""
        values = np.asarray(observation)
        if values.dtype.kind not in "fiub" or values.size == 0:
            raise ValueError(f"`{self.name}` must hold numbers, got {values.dtype} of shape {values.shape}.")
        single = values.ndim == len(self.shape)
        if single:
            values = values[None]
        if values.shape[1:] != self.shape:
            if self.channels_last is None or values.shape[1:] != self.channels_last:
                raise ValueError(
                    f"`{self.name}` must have shape {self.shape}, or (B, ...) for a batch, got {np.shape(observation)}."
                )
            values = np.moveaxis(values, -1, 1)
        if self.sizes is not None and ((values < 0) | (values >= self.sizes)).any():
            raise ValueError(f"`{self.name}` must be at least 0 and less than {self.sizes.tolist()}, got {values.tolist()}.")
        values = np.ascontiguousarray(values, dtype=self.dtype)
        if self.is_float and not np.isfinite(values).all():
            raise ValueError(f"`{self.name}` must be finite, got {values[~np.isfinite(values)][0]}.")
        return values, single


class _Actions:
    """Samples actions from the parameters of their distribution, and encodes them as the last action of the state."""

    def __init__(self, space: dict[str, Any], squash_output: bool) -> None:
        self.kind: str = space["kind"]
        self.shape = tuple(space["shape"])
        self.dtype = np.dtype(space["dtype"])
        self.squash_output = squash_output
        sizes: list[int] = [space["n"]] if self.kind == "Discrete" else space.get("nvec", [])
        self.ends: list[int] = np.cumsum(sizes).tolist() if sizes else []
        self.starts = [0, *self.ends[:-1]] if sizes else list(range(0, 2 * int(np.prod(self.shape)), 2))
        if self.kind == "Box":
            self.low, self.high = (np.array(space[name], dtype=self.dtype).reshape(self.shape) for name in ("low", "high"))

    def sample(self, outputs: dict[str, np.ndarray], generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """:return: Actions as sampled (B, A), and actions of the environment (B, ...)."""
        like = outputs[ACTION]
        if self.kind == "Box":
            mean, std = outputs[MEAN], np.exp(outputs[LOG_STD])
            sampled = mean + std * generator.standard_normal(mean.shape, dtype=np.float32)
            sampled = np.tanh(sampled) if self.squash_output else sampled
            shaped = sampled.reshape(like.shape)
            if self.squash_output:
                scaled = self.low + 0.5 * (shaped + 1.0) * (self.high - self.low)
            else:
                scaled = np.clip(shaped, self.low, self.high)
            return sampled, scaled.astype(like.dtype)
        logits = outputs[LOGITS]
        if self.kind == "MultiBinary":
            sampled = generator.random(logits.shape) < 1 / (1 + np.exp(-logits.clip(-80, 80)))
        else:  # the Gumbel-max trick
            scores = logits + generator.gumbel(size=logits.shape)
            parts = [scores[:, start:end] for start, end in zip(self.starts, self.ends, strict=True)]
            sampled = np.stack([part.argmax(axis=1) for part in parts], axis=1)
        return sampled, sampled.reshape(like.shape).astype(like.dtype)

    def encode(self, sampled: np.ndarray, dtype: Any) -> np.ndarray:
        """:return: The last action of the state (B, D) for actions as sampled (B, A)."""
        if self.kind in ("Discrete", "MultiDiscrete"):
            encoded = np.zeros((len(sampled), self.ends[-1]), dtype=dtype)
            np.put_along_axis(encoded, sampled + np.array(self.starts), 1, axis=1)
            return encoded
        if self.kind == "Box" and not self.squash_output:
            low, high = (bound.reshape(-1).astype(np.float32) for bound in (self.low, self.high))
            width = np.maximum(high - low, np.float32(1e-8))
            scaled: np.ndarray = np.clip(2 * (sampled - low) / width - 1, -1, 1).astype(dtype)
            return scaled
        return sampled.astype(dtype)
