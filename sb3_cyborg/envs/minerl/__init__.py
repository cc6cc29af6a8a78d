"""MineRL's tasks; MineRL itself is imported when the first environment is made."""

from sb3_cyborg.envs.minerl.adapter import MINERL_IDS, MineRLEnv
from sb3_cyborg.envs.minerl.process import MineRLError

__all__ = ["MINERL_IDS", "MineRLEnv", "MineRLError"]
