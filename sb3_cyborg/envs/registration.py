"""
Ids of the environments. ``import sb3_cyborg`` registers them with gymnasium as strings.

The packages of an environment are imported when it is made. If one is missing, the error names the extra that installs it.
"""

from dataclasses import dataclass, field
from typing import Any

import gymnasium as gym

from sb3_cyborg.envs.minigrid import MINIGRID_MEMORY_IDS
from sb3_cyborg.envs.no_velocity import VELOCITY_INDICES
from sb3_cyborg.envs.popgym import POPGYM_NAMES
from sb3_cyborg.envs.popgym_masked import POPGYM_MASKED_NAMES

MINERL = {
    "minerl_treechop": "MineRLTreechop-v0",
    "minerl_navigate": "MineRLNavigate-v0",
    "minerl_navigate_dense": "MineRLNavigateDense-v0",
    "minerl_obtain_diamond": "MineRLObtainDiamond-v0",
}
"""Short ids of four of MineRL's tasks, with MineRL's own ids."""

MINERL_OTHERS = (
    "MineRLNavigateExtreme-v0",
    "MineRLNavigateExtremeDense-v0",
    "MineRLObtainDiamondDense-v0",
    "MineRLObtainIronPickaxe-v0",
    "MineRLObtainIronPickaxeDense-v0",
)
"""MineRL's ids of its other basic tasks."""


@dataclass(frozen=True)
class Family:
    """
    Environments with one entry point.

    :param entry_point: The callable that makes one environment, as ``module:name``.
    :param kwargs: Keyword arguments of the entry point, by environment id.
    :param native: The ``NativeVecEnv`` that computes all environments as arrays, as ``module:name``, or ``None``.
    :param slow: Whether a step is slow enough for one process per environment to be faster.
    """

    entry_point: str
    kwargs: dict[str, dict[str, Any]] = field(default_factory=dict)
    native: str | None = None
    slow: bool = False


FAMILIES: dict[str, Family] = {
    "MemoryChain": Family(
        "sb3_cyborg.envs.memory_chain:MemoryChainEnv",
        {"sb3_cyborg/MemoryChain-v0": {}},
        native="sb3_cyborg.envs.memory_chain:MemoryChainVecEnv",
    ),
    "TMaze": Family(
        "sb3_cyborg.envs.t_maze:TMazeEnv",
        {"sb3_cyborg/TMaze-v0": {}},
        native="sb3_cyborg.envs.t_maze:TMazeVecEnv",
    ),
    "NoVel": Family(
        "sb3_cyborg.envs.no_velocity:make_no_velocity",
        {env_id.replace("-v", "NoVel-v"): {"env_id": env_id} for env_id in VELOCITY_INDICES},
    ),
    "POPGym": Family(
        "sb3_cyborg.envs.popgym:make_popgym",
        {f"sb3_cyborg/popgym-{name}-v0": {"name": name} for name in POPGYM_NAMES},
    ),
    "POPGymMasked": Family(
        "sb3_cyborg.envs.popgym_masked:make_masked_popgym",
        {f"sb3_cyborg/{name}-v0": {"name": official} for name, official in POPGYM_MASKED_NAMES.items()},
    ),
    "MiniGrid": Family(
        "sb3_cyborg.envs.minigrid:make_minigrid",
        {f"sb3_cyborg/{env_id}": {"env_id": env_id} for env_id in MINIGRID_MEMORY_IDS},
    ),
    "Crafter": Family("sb3_cyborg.envs.crafter:CrafterWoodEnv", {"sb3_cyborg/CrafterWood-v0": {}}, slow=True),
    "MineRL": Family(
        "sb3_cyborg.envs.minerl:MineRLEnv",
        {name: {"env_id": official} for short, official in MINERL.items() for name in (short, official)}
        | {official: {"env_id": official} for official in MINERL_OTHERS},
        slow=True,
    ),
}
"""All environments of this package, by family."""


def register_envs() -> None:
    """Registers the ids that are not registered yet. RL Zoo registers ids such as ``CartPoleNoVel-v1``, too."""
    for family in FAMILIES.values():
        for env_id, kwargs in family.kwargs.items():
            if env_id not in gym.registry:
                gym.register(env_id, entry_point=family.entry_point, kwargs=kwargs)


def family_of(env_id: str) -> Family | None:
    """:return: The family of an environment of this package; ``None`` for any other id."""
    return next((family for family in FAMILIES.values() if env_id in family.kwargs), None)
