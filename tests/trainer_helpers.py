"""A small environment and small settings for tests of the trainer."""

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from sb3_cyborg.trainers.trainer_v7 import TrainerV7
from tests.helpers import IMAGE, VECTOR

FIXED = "tests/Fixed-v0"
EPISODE_LENGTH = 8


class FixedEnv(gym.Env[Any, Any]):
    """
    Episodes of a fixed length without randomness. The observation is the step and the last action.

    :param break_at: Step of the environment at which it fails, or returns NaN.
    :param how: ``"raise"`` or ``"nan"``.
    """

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012  # gymnasium's convention

    def __init__(self, break_at: int = 0, how: str = "raise", render_mode: str | None = None) -> None:
        self.break_at, self.how, self.render_mode = break_at, how, render_mode
        self.observation_space, self.action_space = spaces.Box(-1.0, 8.0, (2,)), spaces.Discrete(2)
        self.steps = self.timestep = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.timestep = 0
        return np.zeros(2, dtype=np.float32), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        self.timestep += 1
        obs = np.array([self.timestep, action], dtype=np.float32)
        if self.steps == self.break_at:
            if self.how == "raise":
                raise RuntimeError("the simulator has died")
            obs[:] = np.nan
        return obs, float(action) * self.timestep, self.timestep == EPISODE_LENGTH, False, {}


OBSERVATIONS: dict[str, spaces.Space[Any]] = {
    "Image": IMAGE,
    "Dict": spaces.Dict({"image": IMAGE, "vector": VECTOR}),
    "Discrete": spaces.Discrete(4),
}

if FIXED not in gym.registry:
    gym.register(FIXED, entry_point="tests.trainer_helpers:FixedEnv")
    for name, space in OBSERVATIONS.items():
        gym.register(f"tests/{name}-v0", entry_point="tests.helpers:ToyEnv", kwargs={"observation_space": space})

TINY: dict[str, Any] = {
    "env": FIXED,
    "n_envs": 2,
    "encoder": "gru",
    "memory": {"type": "slot", "num_slots": 4},
    "hidden_dim": 8,
    "net_arch": [8],
    "n_steps": 2 * EPISODE_LENGTH,
    "n_epochs": 2,
    "seed": 3,
    "total_timesteps": 256,
    "save_freq": 64,
    "eval_freq": 0,
    "tensorboard": False,
    "progress_bar": False,
    "device": "cpu",
}
ROLLOUT = 2 * 2 * EPISODE_LENGTH


def tiny(folder: Path, **settings: Any) -> TrainerV7:
    """:return: A trainer with few weights and few steps."""
    return TrainerV7(TINY | {"log_dir": str(folder)} | settings)


def run_folder(trainer: TrainerV7) -> Path:
    """:return: The folder of a trainer's run."""
    assert trainer.run is not None
    return trainer.run
