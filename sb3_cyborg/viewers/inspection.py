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
from sb3_cyborg.memories.attention import AttentionMemory
from sb3_cyborg.memories.memory_v7 import MEMORIES, MemoryV7
from sb3_cyborg.memories.trace import QUANTITIES, Record, trace
from sb3_cyborg.memory_ppo.memory_ppo import MemoryPPO
from sb3_cyborg.trainers.acting import ActingLoop, env_to_act_in

MAX_OBSERVATION = 8
"""Observations with at most this many numbers are kept."""


@dataclass(frozen=True)
class Inspection:
    """
    One episode of T steps, from its start, and the records of the memory and of the encoder's attention.

    :param kind: Kind of the memory.
    :param name: Name of the environment.
    :param memory: Records of the memory, ``(T, ...)`` each; the names are those of ``memories.trace.QUANTITIES``. Empty for
        the memory ``none``.
    :param observations: (T, D) if D is at most 8, or ``None``.
    :param actions: (T, A).
    :param rewards: (T,), not normalized.
    :param ended: True if the episode ended, false if ``max_steps`` cut it off.
    :param layers: Records of each attention layer of the encoder (``trxl``), as in ``memory``; empty for other encoders.
    """

    kind: str
    name: str
    memory: dict[str, np.ndarray]
    observations: np.ndarray | None
    actions: np.ndarray
    rewards: np.ndarray
    ended: bool
    layers: tuple[dict[str, np.ndarray], ...] = ()

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
) -> Inspection:
    """
    Play one episode and record the memory, and the attention of the encoder if it has any.

    :param model: The agent.
    :param env: Its environment; of several, the first is recorded. ``None`` takes those of the model.
    :param deterministic: Take the mode of the policy instead of a sample.
    :param max_steps: Steps after which to stop if the episode is longer, at least 1.
    :param seed: Seed of the environment and of sampled actions; ``None`` leaves both as they are.
    :param name: Name of the environment; ``None`` takes its id or class.
    :return: The episode.
    :raises ValueError: for an agent with neither, for a memory that records nothing, and for a model without an environment.
    """
    check_positive(max_steps=max_steps)
    memory, num_layers = _parts_of(model)
    env = env_to_act_in(model, env)
    loop = ActingLoop(model, env, deterministic=deterministic, seed=seed)
    keeps_observations = not isinstance(loop.obs, dict) and np.size(loop.obs[0]) <= MAX_OBSERVATION
    records: list[list[Record]] = []  # of each step: the layers of the encoder, then the memory
    observations: list[np.ndarray] = []
    actions: list[np.ndarray] = []
    rewards: list[float] = []
    ended = False
    while not ended and len(rewards) < max_steps:
        with trace() as recorded:
            step = loop.step()
        records.append(recorded[:num_layers] + _memory_records(recorded[num_layers:], memory))
        if keeps_observations:
            observations.append(np.ravel(step.obs[0]).copy())
        actions.append(np.ravel(step.actions[0]))
        rewards.append(float(step.rewards[0]))
        ended = bool(step.dones[0])
    parts = [_stack(part) for part in zip(*records, strict=True)]
    return Inspection(
        kind=memory.kind,
        name=name or _name_of(env),
        memory=parts[num_layers] if len(parts) > num_layers else {},
        observations=np.stack(observations) if keeps_observations else None,
        actions=np.stack(actions),
        rewards=np.array(rewards),
        ended=ended,
        layers=tuple(parts[:num_layers]),
    )


def _stack(records: Sequence[Record]) -> dict[str, np.ndarray]:
    """:return: The first row of the records of all steps, (T, ...) each."""
    return {key: th.stack([record[key][0] for record in records]).double().cpu().numpy() for key in records[0]}


def _parts_of(model: Any) -> tuple[MemoryV7, int]:
    """
    :return: The memory of an agent, and the number of attention layers of its encoder. Each of them records once in a step.
    :raises ValueError: for other agents, and for one with neither.
    """
    if not isinstance(model, MemoryPPO):
        raise ValueError(f"Only a MemoryPPO agent can be inspected, got {type(model).__name__}.")
    memory = model.policy.core.parts["memory"]
    assert isinstance(memory, MemoryV7)
    num_layers = sum(isinstance(module, AttentionMemory) for module in model.policy.core.parts["encoder"].modules())
    if memory.kind == "none" and not num_layers:
        kinds = ", ".join(repr(kind) for kind in sorted(MEMORIES) if kind != "none")
        raise ValueError(
            f"This agent has no memory to inspect (memory 'none'); memories that can be inspected: {kinds}; encoder: 'trxl'."
        )
    return memory, num_layers


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
