"""What an agent remembers: one episode, step by step, as arrays; ``inspection_figure`` makes a picture of them."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, unwrap_vec_normalize

from sb3_cyborg.checks import check_positive
from sb3_cyborg.memories.memory_v7 import MemoryV7
from sb3_cyborg.memories.trace import QUANTITIES, Record, trace
from sb3_cyborg.memory_ppo.memory_ppo import MemoryPPO
from sb3_cyborg.sequence_model import keep_mask
from sb3_cyborg.viewers.figures import check_picture

MAX_OBSERVATION = 8
"""Observations of at most this many numbers are kept, to be drawn."""

WORKS = "'pmm', 'slot', 'kv' and 'ring'"


@dataclass(frozen=True)
class Inspection:
    """
    One episode of T steps, from its start, and what the memory did in it.

    :param kind: Kind of the memory.
    :param name: Name of the environment.
    :param memory: What the memory recorded, ``(T, ...)`` each; the names are those of ``memories.trace.QUANTITIES``.
    :param observations: (T, D) where they are few numbers, or ``None``.
    :param actions: (T, A).
    :param rewards: (T,), not normalised.
    :param ended: Whether the episode came to its end, or was cut off by ``max_steps``.
    """

    kind: str
    name: str
    memory: dict[str, np.ndarray]
    observations: np.ndarray | None
    actions: np.ndarray
    rewards: np.ndarray
    ended: bool

    @property
    def steps(self) -> int:
        """T."""
        return len(self.rewards)

    @property
    def is_window(self) -> bool:
        """
        Whether the last slot always holds the last step: the memory keeps the last steps in order, as ``ring`` and ``kv``
        do. Before them there may be others, as ``ring`` keeps the first steps.
        """
        age = self.memory.get("age")
        return age is not None and bool((age[1:, -1] == 1).all())

    @cached_property
    def attention(self) -> np.ndarray | None:
        """
        The share of each step's read that goes back to each step before it.

        A slot of ``pmm``, ``kv`` or ``ring`` holds one step's item; one of ``slot`` is a weighted mean of all that was
        written to it, so the share is exact there, too.

        :return: (T, H, T): at ``[t, h, u]`` what head h read at step t of step u; with ``memory["null"]`` a head's shares
            sum to 1. ``None`` for a memory that records neither ages nor writes.
        """
        if "age" in self.memory:
            return _by_age(self.memory["read"], self.memory["age"])
        if "write" in self.memory:
            return _by_writes(self.memory["read"], self.memory["write"])
        return None

    @property
    def held(self) -> np.ndarray | None:
        """
        The step whose item each slot holds when a step reads, (T, S) int64; -1 for an empty one.

        ``None`` for a memory whose slots do not hold one step's item.
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
    made_of = np.zeros((heads, slots, steps))  # share of each slot that each step wrote; what is missing is unwritten
    for t in range(steps):
        written = made_of.sum(-1, keepdims=True)
        # `read` is of what was written, so the shares are those within it.
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
    Act for one episode and keep what the memory did.

    :param model: The agent.
    :param env: Where to act; of several environments, the first is looked at. ``None`` takes the model's own.
    :param deterministic: Take the mode of the policy instead of a sample.
    :param max_steps: Stop there if the episode is longer.
    :param seed: Seed of the environment, and of sampled actions; ``None`` leaves both as they are.
    :param name: Name of the environment; ``None`` asks it.
    :return: The episode.
    :raises ValueError: for an agent without a memory, or whose memory records nothing.
    """
    check_positive(max_steps=max_steps)
    memory = _memory_of(model)
    env = _vectorised(model, env)
    if seed is not None:
        env.seed(seed)
        th.manual_seed(seed)
    normaliser = unwrap_vec_normalize(env)
    obs: Any = env.reset()
    state: Any = None
    starts, ended = np.ones(env.num_envs, dtype=bool), False
    records: list[Record] = []
    few = not isinstance(obs, dict) and np.size(obs[0]) <= MAX_OBSERVATION
    seen: list[np.ndarray] = []
    actions: list[np.ndarray] = []
    rewards: list[float] = []
    while not ended and len(rewards) < max_steps:
        with trace() as step:
            action, state = model.predict(obs, state, starts, deterministic)
        records.append(_one_record(step, memory))
        if few:
            seen.append(np.ravel(obs[0]).copy())
        actions.append(np.ravel(action[0]))
        obs, reward, starts, _ = env.step(action)
        rewards.append(float((reward if normaliser is None else normaliser.get_original_reward())[0]))
        ended = bool(starts[0])
    return Inspection(
        kind=memory.kind,
        name=name or _name_of(env),
        memory={key: th.stack([record[key][0] for record in records]).double().cpu().numpy() for key in records[0]},
        observations=np.stack(seen) if few else None,
        actions=np.stack(actions),
        rewards=np.array(rewards),
        ended=ended,
    )


def inspect_run(
    run: Path | str,
    output: Path | str,
    *,
    which: str = "best",
    device: str = "auto",
    heads: str | int = "mean",
    deterministic: bool = True,
    max_steps: int = 500,
    seed: int | None = None,
) -> Inspection:
    """
    Draw what the agent of a run remembers along one episode.

    :param run: Folder of a run of ``TrainerV7``, or a file that it saved.
    :param output: A PNG, PDF or SVG file.
    :param which: Of a run: ``"best"``, ``"last"``, or the number of steps of a checkpoint.
    :param device: Where the agent is computed.
    :param heads: How heads become one: ``"mean"``, ``"max"``, or the number of the only one to draw.
    :param deterministic: Take the mode of the policy instead of a sample.
    :param max_steps: Stop there if the episode is longer.
    :param seed: Seed of the environment, and of sampled actions; ``None`` takes the run's.
    :return: The episode that was drawn.
    :raises ValueError: for a run that cannot be loaded, or an agent without a memory that shows what it does.
    """
    # Those two import this module.
    from sb3_cyborg.trainers.trainer_v7 import TrainerV7
    from sb3_cyborg.viewers.inspection_figure import draw_inspection

    check_picture(output)
    trainer = TrainerV7.load(run, which, device=device)
    env = trainer.make_eval_env()
    try:
        seed = trainer.config.seed if seed is None else seed
        inspection = inspect_episode(
            trainer.model, env, deterministic=deterministic, max_steps=max_steps, seed=seed, name=trainer.config.env
        )
    finally:
        env.close()
        trainer.close()
    draw_inspection(inspection, output, heads)
    return inspection


def _memory_of(model: Any) -> MemoryV7:
    """:return: The memory of an agent that has one to look at."""
    if not isinstance(model, MemoryPPO):
        raise ValueError(f"Only a MemoryPPO agent can be inspected, got {type(model).__name__}.")
    memory = model.policy.core.parts["memory"]
    assert isinstance(memory, MemoryV7)
    if memory.kind == "none":
        raise ValueError(f"This agent has no memory to inspect (memory 'none'); what can be inspected: {WORKS}.")
    return memory


def _one_record(records: list[Record], memory: MemoryV7) -> Record:
    """:return: The one record of one step, checked: memories of other people record, too."""
    what = f"Memory {memory.kind!r} ({type(memory.memory).__name__})"
    if len(records) != 1 or not {"read", "null"} <= records[0].keys():
        got = f"{len(records)} records" if len(records) != 1 else f"only {sorted(records[0])}"
        raise ValueError(
            f"{what} does not show what it does: {got} in a step. Its `forward_step` must call "
            f"`sb3_cyborg.memories.trace.record` once, with at least `read` and `null`; of ours, {WORKS} do."
        )
    _, heads, slots = records[0]["read"].shape if records[0]["read"].dim() == 3 else (0, 0, 0)
    shapes = {"B": None, "H": heads, "S": slots, "G": None}
    for name, tensor in records[0].items():
        wanted = QUANTITIES[name].split(":")[0]
        sizes = [shapes[letter] for letter in wanted.strip("()").split(", ")]
        if len(sizes) != tensor.dim() or any(size not in (None, got) for size, got in zip(sizes, tensor.shape, strict=True)):
            raise ValueError(f"{what} recorded `{name}` of shape {tuple(tensor.shape)}; it must be {wanted}.")
    return records[0]


def _vectorised(model: MemoryPPO, env: VecEnv | gym.Env[Any, Any] | None) -> VecEnv:
    chosen = model.get_env() if env is None else env
    if chosen is None:
        raise ValueError("This model was loaded without an environment: pass `env`.")
    if isinstance(chosen, VecEnv):
        return chosen
    return DummyVecEnv([lambda: chosen])


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


def write_gates(model: MemoryPPO, max_transitions: int = 1024) -> th.Tensor | None:
    """
    The write gates of the rollout that the buffer holds, for a histogram: call it at the end of a rollout.

    It replays the first steps of every environment from the state that acting began with, in one pass without gradient;
    weights, states and random numbers stay as they are.

    :param model: A model whose rollout is complete.
    :param max_transitions: About how many transitions are replayed.
    :return: (n,) float32 in [0, 1], on the CPU; ``None`` for a memory without a write gate.
    :raises ValueError: before the first rollout is complete.
    """
    check_positive(max_transitions=max_transitions)
    buffer, policy = model.rollout_buffer, model.policy
    if not buffer.full:
        raise ValueError(f"There is no rollout to look at yet: {buffer.pos} of {buffer.n_steps} steps.")
    obs, first = buffer.observations, {name: leaf[0] for name, leaf in buffer.states.items()}

    def replay(steps: int) -> list[th.Tensor]:
        def take(tensor: th.Tensor) -> th.Tensor:
            return tensor[:steps].transpose(0, 1)

        rows = {key: take(value) for key, value in obs.items()} if isinstance(obs, dict) else take(obs)
        with th.no_grad(), trace() as records:
            policy._core_sequence(rows, take(buffer.actions), first, keep_mask(take(buffer.episode_starts)))
        return [record["gate"].flatten().float().cpu() for record in records if "gate" in record]

    training = policy.training
    policy.set_training_mode(False)  # as when acting
    gates = replay(1)  # one step tells whether there are any, and costs next to nothing
    if gates:
        gates = replay(min(buffer.n_steps, max(1, max_transitions // buffer.n_envs)))
    policy.set_training_mode(training)
    return th.cat(gates) if gates else None
