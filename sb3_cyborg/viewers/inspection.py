"""Inspection of a memory and of an encoder's attention: reads, writes and contents of slots along one episode, as arrays."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from sb3_cyborg.checks import check_positive
from sb3_cyborg.encoders.encoder_v7 import EncoderV7
from sb3_cyborg.memories.attention import AttentionMemory
from sb3_cyborg.memories.memory_v7 import MEMORIES, MemoryV7
from sb3_cyborg.memories.trace import QUANTITIES, Record, trace
from sb3_cyborg.memory_ppo.memory_ppo import MemoryPPO
from sb3_cyborg.trainers.acting import ActingLoop, Outlook, env_to_act_in
from sb3_cyborg.viewers.frames import encode_frame, picture_of_observation
from sb3_cyborg.viewers.recording import pictures

MAX_OBSERVATION = 8
"""Observations with at most this many numbers are kept."""
MAX_OBSERVATION_WITH_DETAILS = 64
"""The same for an inspection with details."""


@dataclass(frozen=True)
class Inspection:
    """
    One episode of T steps, from its start, and the records of the memory and of the encoder's attention.

    :param kind: Kind of the memory.
    :param name: Name of the environment.
    :param memory: Records of the memory, ``(T, ...)`` each; the names are those of ``memories.trace.QUANTITIES``. Empty for
        the memory ``none``.
    :param observations: (T, D) if D is at most 8, or 64 with details, or ``None``.
    :param actions: (T, A).
    :param rewards: (T,), not normalized.
    :param ended: True if the episode ended, false if ``max_steps`` cut it off.
    :param layers: Records of each attention layer of the encoder (``trxl``), as in ``memory``; empty for other encoders.
    :param encoder: Name of the encoder.
    :param values: With details: the value at each step, (T,), in units of the (normalized) return.
    :param probabilities: With details: the probabilities of Discrete actions, (T, A); ``None`` for other actions.
    :param frames: With details: a picture of the environment before each step, as a PNG or JPEG file; ``None`` for an
        environment without pictures.
    """

    kind: str
    name: str
    memory: dict[str, np.ndarray]
    observations: np.ndarray | None
    actions: np.ndarray
    rewards: np.ndarray
    ended: bool
    layers: tuple[dict[str, np.ndarray], ...] = ()
    encoder: str = ""
    values: np.ndarray | None = None
    probabilities: np.ndarray | None = None
    frames: tuple[bytes, ...] | None = None

    @property
    def parts(self) -> dict[str, "Inspection"]:
        """The layers of the encoder and the memory by name, each as the inspection of an agent that has only this part."""
        layers = {f"encoder, layer {index}": replace(self, memory=layer, layers=()) for index, layer in enumerate(self.layers)}
        return layers | ({f"memory {self.kind!r}": replace(self, layers=())} if self.memory else {})

    @property
    def steps(self) -> int:
        """Number of steps T."""
        return len(self.rewards)

    @property
    def is_window(self) -> bool:
        """
        Whether the slots are a sliding window: the last slot always holds the last step, as in ``ring`` and ``kv``. Slots
        before the window may hold other steps, as ``ring`` keeps the first steps of the episode.
        """
        age = self.memory.get("age")
        return age is not None and bool((age[1:, -1] == 1).all())

    @cached_property
    def attention(self) -> np.ndarray | None:
        """
        Attention over past steps: the share of each read that comes from each earlier step.

        A slot of ``pmm``, ``kv`` or ``ring`` holds the item of one step. A slot of ``slot`` is a weighted mean of the items
        written to it, whose weights are known. The shares are exact for both.

        :return: (T, H, T): entry ``[t, h, u]`` is the share of step u in the read of head h at step t, in [0, 1]. The shares
            of a head and its ``memory["null"]`` sum to 1. ``None`` for a memory that records neither ages nor writes.
        """
        if "age" in self.memory:
            return _by_age(self.memory["read"], self.memory["age"])
        if "write" in self.memory:
            return _by_writes(self.memory["read"], self.memory["write"])
        return None

    @property
    def held(self) -> np.ndarray | None:
        """
        The step whose item each slot holds at each read, (T, S) int64; -1 for an empty slot.

        ``None`` for a memory whose slots do not hold the item of one step.
        """
        age = self.memory.get("age")
        if age is None:
            return None
        age = age.astype(np.int64)
        return np.where(age > 0, np.arange(self.steps)[:, None] - age, -1)


def _by_age(read: np.ndarray, age: np.ndarray) -> np.ndarray:
    steps, heads, _ = read.shape
    attention = np.zeros((steps, heads, steps))
    for t in range(steps):
        filled = age[t] > 0
        np.add.at(attention[t].T, t - age[t, filled].astype(np.int64), read[t][:, filled].T)
    return attention


def _by_writes(read: np.ndarray, write: np.ndarray) -> np.ndarray:
    steps, heads, slots = read.shape
    attention = np.zeros((steps, heads, steps))
    made_of = np.zeros((heads, slots, steps))  # share of each slot written by each step; the rest is unwritten
    for t in range(steps):
        written = made_of.sum(-1, keepdims=True)
        # `read` is a share of the written part of a slot, so the shares of its steps are taken within that part.
        within = np.divide(made_of, written, out=np.zeros_like(made_of), where=written > 0)
        attention[t] = (read[t][..., None] * within).sum(axis=1)
        made_of *= 1 - write[t][..., None]
        made_of[:, :, t] = write[t]
    return attention


def inspect_episode(
    model: MemoryPPO,
    env: VecEnv | gym.Env[Any, Any] | None = None,
    *,
    deterministic: bool = True,
    max_steps: int = 500,
    seed: int | None = None,
    name: str | None = None,
    details: bool = False,
    rendered: bool = True,
) -> Inspection:
    """
    Play one episode and record the memory, and the attention of the encoder if it has any.

    :param model: The agent.
    :param env: Its environment; of several, the first is recorded. ``None`` takes those of the model.
    :param deterministic: Take the mode of the policy instead of a sample.
    :param max_steps: Steps after which to stop if the episode is longer, at least 1.
    :param seed: Seed of the environment and of sampled actions; ``None`` leaves both as they are.
    :param name: Name of the environment; ``None`` takes its id or class.
    :param details: Also record values, probabilities of Discrete actions, observations of up to 64 numbers, and frames. An
        agent without memory and attention is accepted. A step takes about twice as long.
    :param rendered: With details: render the frames, if the environment was made with ``render_mode="rgb_array"``. Otherwise
        observations that are images are the frames.
    :return: The episode.
    :raises ValueError: for an agent with neither, for a memory that records nothing, and for a model without an environment.
    """
    check_positive(max_steps=max_steps)
    check_inspectable(model, needs_memory=not details)
    memory, num_layers = _memory_of(model), _num_layers(model)
    env = env_to_act_in(model, env)
    loop = ActingLoop(model, env, deterministic=deterministic, seed=seed)
    largest = MAX_OBSERVATION_WITH_DETAILS if details else MAX_OBSERVATION
    keeps_observations = not isinstance(loop.obs, dict) and np.size(loop.obs[0]) <= largest
    records: list[list[Record]] = []  # of each step: the layers of the encoder, then the memory
    outlooks: list[Outlook] = []
    frames: list[bytes] = []
    observations: list[np.ndarray] = []
    actions: list[np.ndarray] = []
    rewards: list[float] = []
    ended = False
    while not ended and len(rewards) < max_steps:
        if details:
            outlooks.append(loop.outlook())
            frames += _frame_before(loop, rendered)
        with trace() as recorded:
            step = loop.step()
        records.append(recorded[:num_layers] + _memory_records(recorded[num_layers:], memory))
        if keeps_observations:
            observations.append(np.ravel(step.obs[0]).copy())
        actions.append(np.ravel(step.actions[0]))
        rewards.append(float(step.rewards[0]))
        ended = bool(step.dones[0])
    parts = [_stack(part) for part in zip(*records, strict=True)]
    probabilities = [outlook.probabilities[0] for outlook in outlooks if outlook.probabilities is not None]
    return Inspection(
        kind=memory.kind,
        name=name or _name_of(env),
        memory=parts[num_layers] if len(parts) > num_layers else {},
        observations=np.stack(observations) if keeps_observations else None,
        actions=np.stack(actions),
        rewards=np.array(rewards),
        ended=ended,
        layers=tuple(parts[:num_layers]),
        encoder=_encoder_of(model).mode,
        values=np.array([outlook.values[0] for outlook in outlooks]) if details else None,
        probabilities=np.stack(probabilities) if probabilities else None,
        frames=tuple(frames) if frames else None,
    )


def _frame_before(loop: ActingLoop, rendered: bool) -> list[bytes]:
    """:return: The picture that the first environment shows before a step; none if it has no pictures."""
    if rendered and loop.env.render_mode == "rgb_array":
        return [encode_frame(pictures(loop.env)[0])]
    picture = None if isinstance(loop.obs, dict) else picture_of_observation(loop.obs[0])
    return [] if picture is None else [encode_frame(picture)]


def check_inspectable(model: Any, needs_memory: bool = True) -> None:
    """
    :param model: An agent.
    :param needs_memory: Refuse an agent with neither a memory nor an encoder with attention.
    :raises ValueError: for an agent that :func:`inspect_episode` does not accept.
    """
    if not isinstance(model, MemoryPPO):
        raise ValueError(f"Only a MemoryPPO agent can be inspected, got {type(model).__name__}.")
    if needs_memory and not can_be_inspected(model):
        kinds = ", ".join(repr(kind) for kind in sorted(MEMORIES) if kind != "none")
        raise ValueError(
            f"This agent has no memory to inspect (memory 'none'); memories that can be inspected: {kinds}; encoder: 'trxl'."
        )


def can_be_inspected(model: MemoryPPO) -> bool:
    """:return: Whether an agent has a memory, or an encoder with attention."""
    return _memory_of(model).kind != "none" or _num_layers(model) > 0


def _memory_of(model: MemoryPPO) -> MemoryV7:
    memory = model.policy.core.parts["memory"]
    assert isinstance(memory, MemoryV7)
    return memory


def _encoder_of(model: MemoryPPO) -> EncoderV7:
    encoder = model.policy.core.parts["encoder"]
    assert isinstance(encoder, EncoderV7)
    return encoder


def _num_layers(model: MemoryPPO) -> int:
    """:return: Number of layers with attention of the encoder, each of which records once in a step."""
    return sum(isinstance(module, AttentionMemory) for module in _encoder_of(model).modules())


def _stack(records: Sequence[Record]) -> dict[str, np.ndarray]:
    """:return: The first row of the records of all steps, (T, ...) each."""
    return {key: th.stack([record[key][0] for record in records]).double().cpu().numpy() for key in records[0]}


def _memory_records(records: list[Record], memory: MemoryV7) -> list[Record]:
    """
    :param records: Records of the memory in one step. They are checked, as registered memories record, too.
    :param memory: The memory.
    :return: The only record; none for the memory ``none``.
    :raises ValueError: for several records or none, missing quantities and wrong shapes.
    """
    if memory.kind == "none":
        return []
    name = f"Memory {memory.kind!r} ({type(memory.memory).__name__})"
    if len(records) != 1 or not {"read", "null"} <= records[0].keys():
        got = f"{len(records)} records" if len(records) != 1 else f"only {sorted(records[0])}"
        raise ValueError(
            f"{name} cannot be inspected: {got} in a step. Its `forward_step` must call "
            "`sb3_cyborg.memories.trace.record` once, with at least `read` and `null`."
        )
    _, heads, slots = records[0]["read"].shape if records[0]["read"].dim() == 3 else (0, 0, 0)
    shapes = {"B": None, "H": heads, "S": slots, "G": None}
    for quantity, tensor in records[0].items():
        wanted = QUANTITIES[quantity].split(":")[0]
        sizes = [shapes[letter] for letter in wanted.strip("()").split(", ")]
        if len(sizes) != tensor.dim() or any(size not in (None, got) for size, got in zip(sizes, tensor.shape, strict=True)):
            raise ValueError(f"{name} recorded `{quantity}` of shape {tuple(tensor.shape)}; it must be {wanted}.")
    return records


def _name_of(env: VecEnv) -> str:
    try:
        spec = env.get_attr("spec", indices=[0])[0]
    except AttributeError:  # a native vectorised environment
        spec = None
    if spec is not None:
        return str(spec.id)
    while isinstance(inner := getattr(env, "venv", None), VecEnv):
        env = inner
    return type(env.envs[0].unwrapped).__name__ if isinstance(env, DummyVecEnv) else type(env).__name__
