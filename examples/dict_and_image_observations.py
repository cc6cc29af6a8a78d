"""
Image observations with CnnPolicy, and Dict observations with MultiInputPolicy, in MiniGrid's Memory environment.

    python examples/dict_and_image_observations.py

The example shows the use of observations; solving the task takes longer. After 100,000 steps CnnPolicy had a return of 0.45:
the agent reaches an object, but the correct one only in half of the episodes.
"""

import argparse
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_cyborg import MemoryPPO, make_memory_vec_env

ENV = "sb3_cyborg/MiniGrid-MemoryS7-v0"
ENV_KWARGS = {"observation": "image", "actions": "move"}  # the agent's view in 56x56 pixels; left, right, forward


class WithCompass(gym.ObservationWrapper[dict[str, Any], Any, np.ndarray]):
    """Adds the direction of the agent, 0 to 3, to the image."""

    def __init__(self, env: gym.Env[np.ndarray, Any]) -> None:
        super().__init__(env)
        self.observation_space = spaces.Dict({"image": env.observation_space, "direction": spaces.Discrete(4)})

    def observation(self, observation: np.ndarray) -> dict[str, Any]:
        world: Any = self.unwrapped
        return {"image": observation, "direction": world.agent_dir}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100_000, help="environment steps to train for (default: %(default)s)")
    args = parser.parse_args()
    th.set_num_threads(1)  # policies of this size are slower with several threads

    for policy, wrapper in (("CnnPolicy", None), ("MultiInputPolicy", WithCompass)):
        env, eval_env = (
            make_memory_vec_env(ENV, n_envs=8, seed=seed, env_kwargs=ENV_KWARGS, wrapper_class=wrapper) for seed in (0, 1_000)
        )
        print(f"{policy}: {env.observation_space}")
        model = MemoryPPO(policy, env, n_steps=64, n_epochs=4, ent_coef=0.01, seed=0, policy_kwargs={"memory": "ring"})
        model.learn(args.steps)
        mean, std = evaluate_policy(model, eval_env, n_eval_episodes=24, deterministic=False)
        print(f"{policy}: return {mean:.2f} +/- {std:.2f} after {model.num_timesteps:,} steps", flush=True)


if __name__ == "__main__":
    main()
