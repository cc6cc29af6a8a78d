"""Short seeded training runs on tasks that need memory."""

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import EvalCallback, StopTrainingOnRewardThreshold
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import VecEnv

from sb3_cyborg import MemoryPPO


class WithoutVelocities(gym.ObservationWrapper[np.ndarray, np.int64, np.ndarray]):
    """CartPole whose observation is position and angle only, scaled to about 1."""

    def __init__(self) -> None:
        super().__init__(gym.make("CartPole-v1"))
        self.observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)

    def observation(self, observation: np.ndarray) -> np.ndarray:
        return np.array([observation[0] / 2.4, observation[2] / 0.2], dtype=np.float32)


class LastSymbol(gym.Env[np.ndarray, np.int64]):
    """The right action is the symbol of the previous step; it is learned in seconds."""

    observation_space = spaces.Box(0, 1, (3,))
    action_space = spaces.Discrete(3)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.steps, self.before, self.symbol = 0, 0, int(self.np_random.integers(3))
        return np.eye(3, dtype=np.float32)[self.symbol], {}

    def step(self, action: np.int64) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        reward = float(self.steps > 0 and action == self.before)
        self.steps, self.before, self.symbol = self.steps + 1, self.symbol, int(self.np_random.integers(3))
        return np.eye(3, dtype=np.float32)[self.symbol], reward, self.steps >= 20, False, {}


def mean_return(model: MemoryPPO | PPO, env: VecEnv, episodes: int) -> float:
    mean, _ = evaluate_policy(model, env, n_eval_episodes=episodes)
    assert isinstance(mean, float)
    return mean


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    threads = th.get_num_threads()
    th.set_num_threads(1)
    yield
    th.set_num_threads(threads)


@pytest.mark.parametrize(
    "policy_kwargs",
    [
        {"encoder": "gru", "memory": "none"},
        {"encoder": "mamba", "memory": "none"},
        {"encoder": "gru", "memory": "ring", "memory_kwargs": {"num_slots": 4}},
    ],
    ids=lambda kwargs: f"{kwargs['encoder']}-{kwargs['memory']}",
)
def test_learns_to_recall_the_last_symbol(policy_kwargs: dict[str, Any]) -> None:
    """Random guessing gives 6.3 of 19."""
    env = make_vec_env(LastSymbol, 8, seed=0)
    model = MemoryPPO(
        "MlpPolicy",
        env,
        n_steps=40,
        seq_len=20,
        batch_size=160,
        n_epochs=4,
        gamma=0.5,
        learning_rate=3e-3,
        seed=0,
        device="cpu",
        policy_kwargs={"hidden_dim": 32, "net_arch": [32], **policy_kwargs},
    )
    model.learn(16_000)
    assert mean_return(model, make_vec_env(LastSymbol, 8, seed=1), episodes=20) > 17


@pytest.mark.slow
def test_a_recurrent_encoder_solves_cartpole_without_velocities() -> None:
    """A recurrent encoder reaches the full return; PPO without memory, with as many steps, does not."""
    settings: dict[str, Any] = {
        "n_steps": 64,
        "batch_size": 512,
        "n_epochs": 10,
        "gamma": 0.98,
        "gae_lambda": 0.9,
        "learning_rate": LinearSchedule(1e-3, 0.0, 1.0),
        "seed": 0,
        "device": "cpu",
    }
    solved = EvalCallback(
        make_vec_env(WithoutVelocities, 8, seed=50),
        callback_on_new_best=StopTrainingOnRewardThreshold(490),
        n_eval_episodes=20,
        eval_freq=1_000,
        verbose=0,
    )
    kwargs = {"encoder": "gru", "memory": "none", "hidden_dim": 64, "net_arch": [64]}
    remembers = MemoryPPO("MlpPolicy", make_vec_env(WithoutVelocities, 8, seed=0), policy_kwargs=kwargs, **settings)
    remembers.learn(200_000, callback=solved)
    forgets = PPO("MlpPolicy", make_vec_env(WithoutVelocities, 8, seed=0), **settings)
    forgets.learn(remembers.num_timesteps)
    unseen = make_vec_env(WithoutVelocities, 8, seed=100)
    assert mean_return(remembers, unseen, episodes=50) >= 450
    assert mean_return(forgets, unseen, episodes=50) <= 200
