"""Worlds to remember in: ids of environments, and :func:`make_memory_vec_env`, which makes them by the number."""

from sb3_cyborg.envs.registration import FAMILIES, register_envs
from sb3_cyborg.envs.vec_env import make_memory_vec_env

__all__ = ["FAMILIES", "make_memory_vec_env", "register_envs"]
