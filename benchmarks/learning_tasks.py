"""
Tasks and agents of the learning benchmark.

An agent on a task is defined by its settings alone: an algorithm and an entry in RL Zoo's form, including the number of
environments and steps. ``benchmarks.learning`` runs it and stores the settings with the result.
"""

import functools
import hashlib
import inspect
import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import rl_zoo3
import torch as th
import yaml
from gymnasium import spaces
from gymnasium.spaces.utils import flatten
from gymnasium.utils import RecordConstructorArgs
from sb3_contrib import MaskablePPO
from torch import nn

from sb3_cyborg import MemoryPPO, zoo
from sb3_cyborg.checks import unknown_name
from sb3_cyborg.encoders.encoder_v7 import ENCODERS
from sb3_cyborg.memories.memory_v7 import MEMORIES
from sb3_cyborg.memory_ppo.actions import action_encoding_dim, encode_actions
from sb3_cyborg.memory_ppo.episode_time import TIME_WAVES, encode_time
from sb3_cyborg.memory_ppo.policies import MemoryActorCriticPolicy
from sb3_cyborg.memory_ppo.rollout_buffer_v7 import plan_minibatches, plan_n_steps
from sb3_cyborg.memory_ppo.schedules import AUTO, AUTO_LEARNING_RATE, parse_schedule

DEFAULT, BEST, RECURRENT, FRAME_STACK, PLAIN = "memory_ppo", "memory_ppo_best", "recurrent_ppo", "frame_stack_ppo", "ppo"
AGENTS = {
    DEFAULT: 'MemoryPPO("MlpPolicy", env) with its defaults',
    BEST: "MemoryPPO with the task's entry in zoo_hyperparams/memory_ppo.yml",
    RECURRENT: "sb3-contrib's RecurrentPPO: RL Zoo's settings for the task if there are any, else those of memory_ppo_best, "
    "with observations normalized by VecNormalize, because the policy of MemoryPPO normalizes them",
    FRAME_STACK: "PPO with the last frames stacked; settings as for RecurrentPPO",
    PLAIN: "PPO; settings as for RecurrentPPO",
}
"""The agents by name, with descriptions. :func:`settings` derives others from these."""

MASKABLE, MASKABLE_PPO, MASKABLE_STACK = "maskable_memory_ppo", "maskable_ppo", "maskable_frame_stack_ppo"
MASK_AGENTS = {
    MASKABLE: "MaskableMemoryPPO with the task's entry in zoo_hyperparams/maskable_memory_ppo.yml",
    BEST: "MemoryPPO, without masks; the same settings",
    MASKABLE_PPO: "sb3-contrib's MaskablePPO, with masks and without a memory; settings as for the peers above",
    MASKABLE_STACK: "MaskablePPO with the last frames stacked",
}
"""The agents of the tasks with action masks, by name, with descriptions."""
PEER_ALGO = "ppo_mask"
"""Name of MaskablePPO, which RL Zoo does not have."""

Settings = dict[str, Any]
"""``algo``, and the keys of an entry in RL Zoo's YAML files."""


@dataclass(frozen=True)
class Task:
    """
    A task, and the target for MemoryPPO.

    :param env_id: The environment's id.
    :param steps: Budget, in steps of all environments together.
    :param n_envs: Number of environments of the default agent.
    :param goal: The target, as text.
    :param beat: The best public result, as text.
    :param solved: Threshold of the mean score of a run's evaluation episodes, from which the run counts as solved.
    :param seeds_solved: Number of runs of five that must be solved; ``None`` compares the mean over the runs with ``solved``.
    :param above: Instead: a peer and a margin by which the mean over the runs must exceed that of the peer.
    :param agent: The agent that the target refers to.
    :param metric: The score: ``"return"`` of an episode, or ``"success"``, the rate of ``is_success``.
    :param env_kwargs: Keyword arguments of the environment.
    :param frames: Size of the frame stack: the steps that the task requires if that is at most 257, else 4.
    :param slots: Slots of memories, and window of ``trxl``, in the grid of kinds: enough for the steps that the task requires.
    :param zoo: For each peer's algorithm the file and the entry of RL Zoo with its settings.
    :param curve_episodes: Episodes per evaluation during training.
    :param masked: Whether the environment has action masks: its agents are ``MASK_AGENTS``.
    :param deterministic: Whether evaluations take the mode of the policy instead of a sample.
    """

    env_id: str
    steps: int
    n_envs: int
    goal: str
    beat: str
    solved: float | None = None
    seeds_solved: int | None = None
    above: tuple[str, float] | None = None
    agent: str = DEFAULT
    metric: str = "return"
    env_kwargs: dict[str, Any] = field(default_factory=dict)
    frames: int = 4
    slots: int = 64
    zoo: dict[str, tuple[str, str]] = field(default_factory=dict)
    curve_episodes: int = 20
    masked: bool = False
    deterministic: bool = True


def _chain(length: int, beat: str, **options: Any) -> Task:
    return Task(
        **{
            "env_id": "sb3_cyborg/MemoryChain-v0",
            "steps": 1_000_000,
            "n_envs": 32,
            "goal": "5 of 5 seeds",
            "beat": beat,
            "solved": 0.95,
            "seeds_solved": 5,
            "env_kwargs": {"memory_length": length},
            "frames": length + 1 if length <= 256 else 4,
            "slots": 2 * length,
            **options,
        }
    )


def _maze(length: int, steps: int, frames: int) -> Task:
    return Task(
        "sb3_cyborg/TMaze-v0",
        steps,
        32,
        "success 0.95",
        "LSTM fails far shorter",
        solved=0.95,
        metric="success",
        env_kwargs={"corridor_length": length},
        frames=frames,
        slots=2 * length,
    )


def _minigrid(name: str, steps: int, beat: str) -> Task:
    """A Memory task. View and actions are those of S9's result to beat, which had images of 84x84 and 99 mazes."""
    return Task(
        f"sb3_cyborg/MiniGrid-{name}-v0",
        steps,
        16,
        "success 0.95",
        beat,
        solved=0.95,
        metric="success",
        env_kwargs={"agent_view_size": 3, "actions": "move"},
    )


def _popgym(name: str, solved: float | None, beat: str, *, steps: int = 1_000_000, **options: Any) -> Task:
    goal = options.pop("goal", f"return {solved}")
    return Task(f"sb3_cyborg/popgym-{name}-v0", steps, 64, goal, beat, solved=solved, **options)


def _control(env_id: str, steps: int, n_envs: int, **options: Any) -> Task:
    """A task without velocities. The peers have RL Zoo's settings of RecurrentPPO, as in sb3-contrib's comparison."""
    zoo_entries = dict.fromkeys(("ppo_lstm", "ppo"), ("ppo_lstm", env_id))
    # Ten evaluation episodes, because they are long relative to the runs.
    return Task(env_id, steps, n_envs, **{"zoo": zoo_entries, "curve_episodes": 10, **options})


def _masked(name: str, steps: int) -> Task:
    """
    A game of POPGym with action masks. Its entry in RL Zoo's form is that of MaskableMemoryPPO.

    Policies are evaluated as they act in training: a mode without a memory repeats a move that did not work, for ever.
    """
    return Task(
        f"sb3_cyborg/{name}-v0",
        steps,
        32,
        "MaskablePPO, same run",
        "MaskablePPO, same run",
        above=(MASKABLE_PPO, 0.0),
        agent=MASKABLE,
        masked=True,
        deterministic=False,
    )


TASKS: dict[str, Task] = {
    "MemoryChain-16": _chain(16, "GRU, GTrXL, sLSTM 5/5"),
    "MemoryChain-32": _chain(32, "GTrXL, sLSTM 5/5; GRU 2/5"),
    "MemoryChain-64": _chain(64, "GTrXL, sLSTM 5/5; GRU 0/5"),
    "MemoryChain-128": _chain(128, "GTrXL, sLSTM 5/5; GRU 0/5"),
    "MemoryChain-256": _chain(256, "sLSTM 5/5; GTrXL 4/5; GRU 0/5"),
    "MemoryChain-1000": _chain(1000, "none known", steps=3_000_000, goal="3 of 5 seeds", seeds_solved=3, agent=BEST),
    "TMaze-100": _maze(100, 1_000_000, 101),
    "TMaze-500": _maze(500, 3_000_000, 4),
    "RepeatPreviousEasy": _popgym("RepeatPreviousEasy", 0.97, "RecurrentPPO 1.00", frames=5, slots=64),
    "RepeatPreviousMedium": _popgym("RepeatPreviousMedium", 0.97, "RecurrentPPO -0.49", frames=33, slots=64),
    "RepeatPreviousHard": _popgym("RepeatPreviousHard", 0.95, "RecurrentPPO -0.50", frames=65, slots=128),
    "RepeatFirstEasy": _popgym("RepeatFirstEasy", 0.99, "RecurrentPPO, same run", frames=52, slots=64),
    "RepeatFirstMedium": _popgym("RepeatFirstMedium", 0.99, "RecurrentPPO, same run"),
    "RepeatFirstHard": _popgym("RepeatFirstHard", 0.99, "RecurrentPPO, same run"),
    # The budget is a fifth of the steps that the target allows.
    "AutoencodeEasy": _popgym("AutoencodeEasy", 0.5, "RecurrentPPO -0.48 after 570k", agent=BEST, frames=104, slots=128),
    "ConcentrationEasy": _popgym(
        "ConcentrationEasy",
        None,
        "RecurrentPPO, same run",
        steps=3_000_000,
        goal="RecurrentPPO + 0.2",
        above=(RECURRENT, 0.2),
        slots=128,
    ),
    "MiniGrid-MemoryS9": _minigrid("MemoryS9", 800_000, "LSTM-256 PPO 0.90"),
    "MiniGrid-MemoryS13": _minigrid("MemoryS13", 400_000, "none known"),
    "CartPoleNoVel": _control("CartPoleNoVel-v1", 100_000, 8, goal="return 500", beat="RecurrentPPO 500", solved=500),
    "PendulumNoVel": _control("PendulumNoVel-v1", 100_000, 4, goal="return -200", beat="RecurrentPPO -217.9", solved=-200),
    "MountainCarContinuousNoVel": _control(
        "MountainCarContinuousNoVel-v0", 300_000, 8, goal="return 92", beat="RecurrentPPO 91.5", solved=92
    ),
    "CartPole": _control(
        "CartPole-v1",
        100_000,
        8,
        goal="not below PPO",
        beat="PPO, same run",
        solved=475,
        above=(PLAIN, 0.0),
        zoo={"ppo_lstm": ("ppo_lstm", "CartPoleNoVel-v1"), "ppo": ("ppo", "CartPole-v1")},
    ),
    "LunarLander": _control(
        "LunarLander-v3",
        500_000,
        16,
        goal="not below PPO",
        beat="PPO, same run",
        solved=200,
        above=(PLAIN, 0.0),
        zoo={"ppo_lstm": ("ppo_lstm", "LunarLanderNoVel-v2"), "ppo": ("ppo", "LunarLander-v3")},
    ),
    "ConcentrationMaskedEasy": _masked("ConcentrationMaskedEasy", 100_000),
    "BattleshipMaskedEasy": _masked("BattleshipMaskedEasy", 200_000),
    "MineSweeperMaskedEasy": _masked("MineSweeperMaskedEasy", 400_000),
}
"""All tasks, in the order of the table."""

MASK_TASKS = tuple(name for name, task in TASKS.items() if task.masked)
"""The tasks with action masks."""

KIND_TASKS = ("MemoryChain-64", "RepeatPreviousMedium")
ENCODER_TASKS = (*KIND_TASKS, "MemoryChain-256", "MiniGrid-MemoryS9", "MiniGrid-MemoryS13", "CartPoleNoVel", "TMaze-100")
"""Of these, TMaze-100 is the long one: a window must reach back 100 steps. MiniGrid-MemoryS13 is in no other grid."""
STUDY_STEPS = 400_000
"""Budget of the grids of kinds and burn-in, lower than the table's: the default solves their tasks within it."""
BURN_IN_TASKS = ("MemoryChain-64", "RepeatPreviousEasy", "RepeatPreviousMedium", "MiniGrid-MemoryS9")
PEERS_OF_ENCODERS = (("gru", "none"), ("gru", "ring"), ("lstm", "none"))
BURN_INS, BURN_IN_EPOCHS = (0, 32, 64), (4, 10)


def kind_agent(encoder: str, memory: str) -> str:
    """:return: The name of the agent with this encoder and this memory."""
    return f"{encoder}+{memory} n_timesteps={STUDY_STEPS}"


def burn_in_agent(burn_in: int, n_epochs: int) -> str:
    """:return: The name of the agent with these settings, and with sequences short enough for burn-in to have an effect."""
    return f"burn_in={burn_in} n_epochs={n_epochs} seq_len=32 n_timesteps={STUDY_STEPS}"


KINDS = [kind_agent(encoder, memory) for encoder in ENCODERS for memory in MEMORIES]
ENCODER_AGENTS = [kind_agent(*each) for each in (("trxl", "none"), ("mingru", "none"), *PEERS_OF_ENCODERS)]
BURN_IN_AGENTS = [burn_in_agent(burn_in, n_epochs) for n_epochs in BURN_IN_EPOCHS for burn_in in BURN_INS]
GRIDS: dict[str, tuple[tuple[str, ...], list[str]]] = {
    "table": (tuple(name for name in TASKS if name not in (*MASK_TASKS, "MiniGrid-MemoryS13")), list(AGENTS)),
    "masks": (MASK_TASKS, list(MASK_AGENTS)),
    "kinds": (KIND_TASKS, KINDS),
    "encoders": (ENCODER_TASKS, ENCODER_AGENTS),
    "burn_in": (BURN_IN_TASKS, BURN_IN_AGENTS),
}
"""The tasks and agents of each grid."""


def _wider(space: spaces.Space[Any], low: float, high: float, size: int) -> spaces.Box:
    """:return: A flat observation space with ``size`` additional features in ``[low, high]``."""
    assert isinstance(space, spaces.Box)
    more = np.ones(size, np.float32)
    return spaces.Box(np.append(space.low, low * more), np.append(space.high, high * more), dtype=np.float32)


class LastActionObservation(gym.Wrapper[np.ndarray, Any, np.ndarray, Any], RecordConstructorArgs):
    """
    Appends the last action to the observation, with MemoryPPO's encoding and zeros at the start. For peers of a MemoryPPO with
    ``use_last_action``.

    :param env: An environment with flat observations, and with actions of any space that MemoryPPO supports.
    """

    def __init__(self, env: gym.Env[np.ndarray, Any]) -> None:
        RecordConstructorArgs.__init__(self)
        super().__init__(env)
        self.size = action_encoding_dim(env.action_space)
        self.observation_space = _wider(env.observation_space, -1.0, 1.0, self.size)

    def reset(self, **kwargs: Any) -> tuple[np.ndarray, dict[str, Any]]:
        """:return: The first observation, with zeros."""
        obs, info = self.env.reset(**kwargs)
        return np.concatenate([obs, np.zeros(self.size, np.float32)]), info

    def step(self, action: Any) -> tuple[np.ndarray, Any, bool, bool, dict[str, Any]]:
        """:return: The step of the environment, with the action appended to the observation."""
        obs, *rest = self.env.step(action)
        space = self.env.action_space
        if isinstance(space, spaces.Box):
            encoded = encode_actions(th.as_tensor(np.array(action)).reshape(1, -1), space)[0].numpy()
        else:  # the same, and fast enough not to slow the peers down
            encoded = np.asarray(flatten(space, action), np.float32)
        return (np.concatenate([obs, encoded]), *rest)  # type: ignore[return-value]  # mypy does not know the length


class TimeObservation(gym.ObservationWrapper[np.ndarray, Any, np.ndarray], RecordConstructorArgs):
    """
    Appends the time of the episode to the observation, with MemoryPPO's encoding. For peers of a MemoryPPO with ``use_time``.

    :param env: An environment with flat observations.
    """

    def __init__(self, env: gym.Env[np.ndarray, Any]) -> None:
        RecordConstructorArgs.__init__(self)
        super().__init__(env)
        self.observation_space = _wider(env.observation_space, -1.0, 1.0, 2 * TIME_WAVES)
        self.steps = 0

    def reset(self, **kwargs: Any) -> tuple[np.ndarray, dict[str, Any]]:
        """:return: The first observation, at time 0."""
        self.steps = 0
        return super().reset(**kwargs)

    def step(self, action: Any) -> tuple[np.ndarray, Any, bool, bool, dict[str, Any]]:
        """:return: The step of the environment, with the time appended to the observation."""
        self.steps += 1
        return super().step(action)

    def observation(self, observation: np.ndarray) -> np.ndarray:
        """:return: The observation with the time appended."""
        return np.concatenate([observation, encode_time(th.tensor(float(self.steps))).numpy()])


# --- settings ---------------------------------------------------------------------------------------------------------

ZOO_KEYS = ("n_envs", "n_timesteps", "normalize", "env_wrapper", "frame_stack", "env_kwargs")
SHARED_KEYS = (
    "n_steps",
    "batch_size",
    "n_epochs",
    "learning_rate",
    "gamma",
    "gae_lambda",
    "clip_range",
    "clip_range_vf",
    "normalize_advantage",
    "ent_coef",
    "vf_coef",
    "max_grad_norm",
    "target_kl",
    "use_sde",
    "sde_sample_freq",
)
"""The arguments that the three algorithms share, apart from the keys that RL Zoo itself reads."""
LSTM_KEYS = ("lstm_hidden_size", "n_lstm_layers", "shared_lstm", "enable_critic_lstm", "lstm_kwargs")


def register() -> None:
    """Registers the algorithms of all agents with RL Zoo."""
    zoo.register()
    rl_zoo3.ALGOS[PEER_ALGO] = MaskablePPO


def settings(task: Task, name: str, agent: str) -> Settings:
    """
    :param task: The task.
    :param name: Name of the task. The file of hyperparameters has an entry for the name or for the environment.
    :param agent: One of ``AGENTS``; or ``encoder+memory``, which is ``memory_ppo_best`` with these two; or changes of the form
        ``name=value``, separated by spaces, of ``memory_ppo_best`` or of an agent that is named before them. The name may be a
        path: ``policy_kwargs.hidden_dim=64``.
    :return: The settings of the agent on the task.
    :raises ValueError: for any other agent.
    """
    base, changes = agent, list[str]()
    if "=" in agent:
        words = agent.split()
        base, changes = (BEST, words) if "=" in words[0] else (words[0], words[1:])
    entry = _base_settings(task, name, base)
    entry |= {"n_timesteps": task.steps, "env_kwargs": {**(entry.get("env_kwargs") or {}), **task.env_kwargs}}
    for change in changes:
        path, _, value = change.partition("=")
        *parents, key = path.split(".")
        target = entry
        for parent in parents:
            if isinstance(target.get(parent), str):
                target[parent] = _mapping(target[parent])
            target = target.setdefault(parent, {})
        target[key] = _parse(value)
    return {"algo": entry.pop("algo"), "env": task.env_id, **entry}


def the_same(task: Task, name: str, agent: str) -> str:
    """:return: The default agent if the best one has the same settings, so that no run is repeated; else the agent itself."""
    same = agent == BEST and settings(task, name, BEST) == settings(task, name, DEFAULT)
    return DEFAULT if same else agent


def _base_settings(task: Task, name: str, agent: str) -> Settings:
    if agent == DEFAULT:
        return {"algo": zoo.ALGO, "policy": "MlpPolicy", "n_envs": task.n_envs}
    if agent == BEST:
        return {"algo": zoo.ALGO, **_best(task, name)}
    if agent == MASKABLE:
        return {"algo": zoo.MASKABLE_ALGO, **_best(task, name)}
    if agent in (MASKABLE_PPO, MASKABLE_STACK):
        entry = {**_peer(task, name, "ppo"), "algo": PEER_ALGO}
        entry = {key: value for key, value in entry.items() if key not in ("use_sde", "sde_sample_freq")}
        return entry | ({"frame_stack": task.frames} if agent == MASKABLE_STACK else {})
    if agent == RECURRENT:
        return _peer(task, name, "ppo_lstm")
    if agent == FRAME_STACK:
        return {**_peer(task, name, "ppo"), "frame_stack": task.frames}
    if agent == PLAIN:
        return _peer(task, name, "ppo")
    encoder, plus, memory = agent.partition("+")
    if not plus:
        raise unknown_name("agent", agent, [*AGENTS, *MASK_AGENTS, "encoder+memory"])
    for what, value, known in (("encoder", encoder, ENCODERS), ("memory", memory, MEMORIES)):
        if value not in known:
            raise unknown_name(what, value, known)
    entry = {"algo": zoo.ALGO, **_best(task, name)}
    replaced = ("encoder_kwargs", "memory_kwargs")
    kept = {key: value for key, value in _mapping(entry.get("policy_kwargs")).items() if key not in replaced}
    slots = {"memory_kwargs": {"num_slots": task.slots}} if "num_slots" in MEMORIES.options(memory) else {}
    window = {"encoder_kwargs": {"window": task.slots}} if "window" in ENCODERS.options(encoder) else {}
    return {**entry, "policy_kwargs": {**kept, "encoder": encoder, "memory": memory, **slots, **window}}


def _best(task: Task, name: str) -> Settings:
    entries = _read(zoo.hyperparams_file(zoo.MASKABLE_ALGO if task.masked else zoo.ALGO))
    entry = deepcopy(next(entries[key] for key in (name, task.env_id, "default") if key in entries))
    entry.pop("monitor_kwargs", None)  # it only affects logging
    return entry


def _peer(task: Task, name: str, algo: str) -> Settings:
    """:return: Settings of RecurrentPPO or PPO: RL Zoo's if the task names them, else those of the best MemoryPPO."""
    policy = {"ppo": "MlpPolicy", "ppo_lstm": "MlpLstmPolicy"}[algo]
    if algo in task.zoo:
        file, key = task.zoo[algo]
        entry = deepcopy(_read(Path(rl_zoo3.__file__).parent / "hyperparams" / f"{file}.yml")[key])
        if file != algo and "policy_kwargs" in entry:
            entry["policy_kwargs"] = {k: v for k, v in _mapping(entry["policy_kwargs"]).items() if k not in LSTM_KEYS}
        return {"algo": algo, **entry, "policy": policy}
    best, defaults = _best(task, name), _defaults(MemoryPPO)
    kwargs = _mapping(best.get("policy_kwargs"))
    width = kwargs.get("hidden_dim", _defaults(MemoryActorCriticPolicy)["hidden_dim"])
    shared = {key: best.get(key, defaults[key]) for key in SHARED_KEYS}
    if shared["n_steps"] is None:
        shared["n_steps"] = plan_n_steps(best["n_envs"], best.get("seq_len"))
    if shared["batch_size"] is None:
        shared["batch_size"] = plan_minibatches(shared["n_steps"], best["n_envs"], best.get("seq_len"), None)[1]
    if shared["learning_rate"] == AUTO_LEARNING_RATE:
        shared["learning_rate"] = f"lin_{parse_schedule(AUTO_LEARNING_RATE)[0]}"  # RL Zoo's linear schedules end at zero
    entry = {key: best[key] for key in ZOO_KEYS if key in best}
    entry |= {key: value for key, value in shared.items() if value is not None}
    if kwargs.get("normalize_observations", _defaults(MemoryActorCriticPolicy)["normalize_observations"]):
        normalize = entry.get("normalize")
        rewards = {"norm_reward": bool(normalize), **({} if isinstance(normalize, bool) else _mapping(normalize))}
        entry["normalize"] = {**rewards, "norm_obs": True}
    read = {"use_last_action": LastActionObservation, "use_time": TimeObservation}
    if added := [_name_of(wrapper) for option, wrapper in read.items() if best.get(option) or kwargs.get(option)]:
        wrappers = entry.get("env_wrapper") or []
        entry["env_wrapper"] = [*([wrappers] if isinstance(wrappers, str) else wrappers), *added]
    same = {key: kwargs[key] for key in ("activation_fn", "ortho_init", "log_std_init") if key in kwargs}
    size = {"net_arch": [width, width]} if algo == "ppo" else {"lstm_hidden_size": width}
    return {"algo": algo, **entry, "policy": policy, "policy_kwargs": {**same, **size}}


@functools.cache
def _read(path: Path) -> dict[str, Settings]:
    entries: dict[str, Settings] = yaml.safe_load(path.read_text())
    return entries


def _mapping(policy_kwargs: str | dict[str, Any] | None) -> dict[str, Any]:
    """:return: ``policy_kwargs`` as a mapping. RL Zoo's files may contain a string instead, which is evaluated."""
    if isinstance(policy_kwargs, str):
        return dict(eval(policy_kwargs, {"nn": nn, "th": th}))
    return deepcopy(policy_kwargs or {})


def _parse(text: str) -> Any:
    value = yaml.safe_load(text)
    if isinstance(value, str):
        try:
            return float(value)  # YAML reads 1e-3 as a string
        except ValueError:
            return value
    return value


def _defaults(function: Callable[..., Any]) -> dict[str, Any]:
    defaults = {name: parameter.default for name, parameter in inspect.signature(function).parameters.items()}
    if defaults.get("learning_rate") == AUTO:
        defaults["learning_rate"] = AUTO_LEARNING_RATE
    return defaults


def _name_of(value: Any) -> str:
    return f"{value.__module__}.{value.__qualname__}" if hasattr(value, "__qualname__") else repr(value)


def as_json(values: Settings) -> str:
    """:return: The settings in the form of the CSV file."""
    return json.dumps(values, sort_keys=True, default=_name_of)


WITHOUT_EFFECT = {"distributed"}
"""Options that do not change what a run in one process learns."""


def digest(values: Settings, evaluation: tuple[int, ...] = ()) -> str:
    """
    :param values: The settings.
    :param evaluation: The numbers that define the evaluation.
    :return: A short hash of the settings and of the defaults that they do not set, so that a changed default gives a new run.
        Options that are off by default are left out, so that a new option does not change the digest of earlier runs, and so
        are options that do not change what a run learns.
    """
    register()
    algorithm = rl_zoo3.ALGOS[values["algo"]]
    parts: list[Callable[..., Any]] = [algorithm, algorithm.policy_aliases[values["policy"]]]
    if values["algo"] in zoo.OUR_ALGOS:
        parts += [MEMORIES[name] for name in sorted(MEMORIES)]
    counted = [{name: value for name, value in _defaults(part).items() if name not in WITHOUT_EFFECT} for part in parts]
    on = [{name: value for name, value in each.items() if value not in (None, False)} for each in counted]
    defaults = [sorted((name, _name_of(value)) for name, value in each.items()) for each in on]
    return hashlib.sha256(f"{as_json(values)} {defaults} {evaluation}".encode()).hexdigest()[:8]
