"""MineRL's tasks. MineRL is imported when the first environment is made."""

from sb3_cyborg.envs.minerl.adapter import MineRLEnv
from sb3_cyborg.envs.minerl.process import MineRLError

__all__ = ["MineRLEnv", "MineRLError"]
