"""An environment that fails on one rank: ``tests.rank_envs:RankFailure-v0``."""

import os
import signal
from typing import Any

import gymnasium as gym
import numpy as np

from tests.trainer_helpers import FixedEnv

ENV_ID = "tests/RankFailure-v0"


class RankFailureEnv(FixedEnv):
    """
    Episodes of a fixed length, and a failure on one rank in the first attempt of the launcher.

    :param rank: The rank.
    :param at: Step of the environment at which it fails; 0 never fails.
    :param failure: ``"raise"``, ``"kill"`` or ``"nan"``.
    """

    def __init__(self, rank: int = 1, at: int = 0, failure: str = "raise", render_mode: str | None = None) -> None:
        super().__init__(render_mode=render_mode)
        here = os.environ.get("RANK") == str(rank) and os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0"
        self.at, self.failure = at if here else 0, failure

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        obs, *rest = super().step(action)
        if self.steps == self.at:
            if self.failure == "raise":
                raise RuntimeError("the simulator has died")
            if self.failure == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            obs[:] = np.nan
        return obs, *rest  # type: ignore[return-value]


gym.register(ENV_ID, "tests.rank_envs:RankFailureEnv")
