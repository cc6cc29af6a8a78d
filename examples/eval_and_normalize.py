"""
EvalCallback, VecNormalize, saving and loading, and the acting loop of a trained agent, all as in Stable-Baselines3.

    python examples/eval_and_normalize.py --folder runs/pendulum
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.vec_env import VecNormalize

from sb3_cyborg import MemoryPPO, make_memory_vec_env

ENV = "PendulumNoVel-v1"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100_000, help="environment steps to train for (default: %(default)s)")
    parser.add_argument("--folder", type=Path, default=Path("runs/pendulum"))
    args = parser.parse_args()
    th.set_num_threads(1)  # policies of this size are slower with several threads

    env = VecNormalize(make_memory_vec_env(ENV, n_envs=4, seed=0), gamma=0.9)
    # EvalCallback copies the statistics before each evaluation. Its frequency counts the steps of one environment.
    eval_env = VecNormalize(make_memory_vec_env(ENV, n_envs=4, seed=1_000), training=False, norm_reward=False)
    callback = EvalCallback(eval_env, eval_freq=max(args.steps // 40, 1), n_eval_episodes=8, log_path=str(args.folder))
    kwargs = {"encoder": "gru", "memory": "none", "hidden_dim": 64}
    model = MemoryPPO("MlpPolicy", env, n_steps=512, gamma=0.9, learning_rate=1e-3, seed=0, policy_kwargs=kwargs)
    model.learn(args.steps, callback=callback)
    model.save(args.folder / "model")
    env.save(str(args.folder / "vec_normalize.pkl"))

    # Later, in another script:
    env = VecNormalize.load(str(args.folder / "vec_normalize.pkl"), make_memory_vec_env(ENV, n_envs=4, seed=2_000))
    env.training, env.norm_reward = False, False
    model = MemoryPPO.load(args.folder / "model", env=env)

    obs: Any = env.reset()  # SB3's type of VecEnv observations is wider than that of `predict`
    state, episode_start = None, np.ones(env.num_envs, dtype=bool)
    returns: list[float] = []
    while len(returns) < 8:
        action, state = model.predict(obs, state=state, episode_start=episode_start, deterministic=True)
        obs, _, episode_start, infos = env.step(action)
        returns += [info["episode"]["r"] for info in infos if "episode" in info]
    print(f"Return of {len(returns)} episodes after {model.num_timesteps:,} steps: {np.mean(returns):.1f}")


if __name__ == "__main__":
    main()
