"""
Compares sb3-contrib's RecurrentPPO with MemoryPPO: the same arguments, one changed import.

    python examples/swap_recurrent_ppo.py

The task is CartPole without velocities, which must be inferred from past observations.
"""

import argparse
import time
from typing import Any

import torch as th
from sb3_contrib import RecurrentPPO
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_cyborg import MemoryPPO, make_memory_vec_env  # the import that changes

ENV = "CartPoleNoVel-v1"
ARGUMENTS: dict[str, Any] = {"n_steps": 64, "batch_size": 512, "learning_rate": 1e-3, "gamma": 0.98, "gae_lambda": 0.9}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50_000, help="environment steps to train for (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    th.set_num_threads(1)  # policies of this size are slower with several threads

    print(f"{ENV}, {args.steps:,} steps, seed {args.seed}")
    for algorithm in (RecurrentPPO, MemoryPPO):
        env = make_memory_vec_env(ENV, n_envs=8, seed=args.seed)
        model = algorithm("MlpLstmPolicy", env, seed=args.seed, device="cpu", **ARGUMENTS)
        start = time.perf_counter()
        model.learn(args.steps)
        seconds = time.perf_counter() - start
        eval_env = make_memory_vec_env(ENV, n_envs=8, seed=args.seed + 10_000)
        mean, std = evaluate_policy(model, eval_env, n_eval_episodes=24)
        print(f"{algorithm.__name__:14s} return {mean:6.1f} +/- {std:.1f}, trained in {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
