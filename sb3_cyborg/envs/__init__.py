"""Environments: their ids, and :func:`make_memory_vec_env`, which creates several of one id as a ``VecEnv``."""

from sb3_cyborg.envs.registration import FAMILIES, register_envs
from sb3_cyborg.envs.vec_env import make_memory_vec_env

__all__ = ["FAMILIES", "make_memory_vec_env", "register_envs"]
