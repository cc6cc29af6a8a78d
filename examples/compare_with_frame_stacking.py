"""
Compares MemoryPPO with PPO on stacked frames, on a task that requires an observation from ten steps ago.

    python examples/compare_with_frame_stacking.py

A sufficiently long stack solves the task, too, but its length must be known. A memory needs no such setting.
"""

import argparse
import time
from typing import Any

import torch as th
from stable_baselines3 import PPO
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_cyborg import MemoryPPO, make_memory_vec_env

ENV, MEMORY_LENGTH = "sb3_cyborg/MemoryChain-v0", 10
COMMON: dict[str, Any] = {"n_steps": 128, "batch_size": 512, "n_epochs": 4, "learning_rate": 1e-3, "ent_coef": 0.01}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100_000, help="environment steps to train for (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    th.set_num_threads(1)  # policies of this size are slower with several threads

    print(f"{ENV}, memory length {MEMORY_LENGTH}, {args.steps:,} steps, seed {args.seed}; at random 0, at most 1\n")
    print("| agent | frames | return | seconds |\n|---|---:|---:|---:|")
    for algorithm, frames in ((PPO, 1), (PPO, 4), (PPO, MEMORY_LENGTH), (MemoryPPO, 1)):
        env, eval_env = (
            make_memory_vec_env(ENV, 16, seed=seed, env_kwargs={"memory_length": MEMORY_LENGTH}, frame_stack=frames)
            for seed in (args.seed, args.seed + 10_000)
        )
        model = algorithm("MlpPolicy", env, seed=args.seed, device="cpu", **COMMON)
        start = time.perf_counter()
        model.learn(args.steps)
        seconds = time.perf_counter() - start
        mean, _ = evaluate_policy(model, eval_env, n_eval_episodes=100)
        print(f"| {algorithm.__name__} | {frames} | {mean:.2f} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
