"""Environments: their ids, and :func:`make_memory_vec_env`, which creates several of one id as a ``VecEnv``."""

from typing import TYPE_CHECKING, Any

from sb3_cyborg.envs.registration import FAMILIES, register_envs

if TYPE_CHECKING:
    from sb3_cyborg.envs.vec_env import make_memory_vec_env

__all__ = ["FAMILIES", "make_memory_vec_env", "register_envs"]


def __getattr__(name: str) -> Any:
    """Import :func:`make_memory_vec_env` on first access: it needs SB3, the registration of the ids does not."""
    if name != "make_memory_vec_env":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from sb3_cyborg.envs.vec_env import make_memory_vec_env

    return make_memory_vec_env
