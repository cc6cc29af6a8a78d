"""
Action masks with a memory: MineSweeper, where a tile that has been opened is illegal, and its number is seen only once.

    python examples/action_masks.py

It trains MaskableMemoryPPO, and MemoryPPO for comparison, and plays a game with the masks read by hand.
"""

import argparse
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.evaluation import evaluate_policy as evaluate_without_masks

from sb3_cyborg import MaskableEvalCallback, MaskableMemoryPPO, MemoryPPO, get_action_masks, make_memory_vec_env
from sb3_cyborg.maskable import evaluate_policy

ENV = "sb3_cyborg/MineSweeperMaskedEasy-v0"
SETTINGS: dict[str, Any] = {"gamma": 0.95, "use_last_action": True, "seed": 0, "policy_kwargs": {"hidden_dim": 64}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100_000, help="environment steps to train for (default: %(default)s)")
    args = parser.parse_args()
    th.set_num_threads(1)  # policies of this size are slower with several threads
    env, eval_env = (make_memory_vec_env(ENV, n_envs=32, seed=seed) for seed in (0, 1_000))

    masked = MaskableMemoryPPO("MlpPolicy", env, **SETTINGS)
    callback = MaskableEvalCallback(eval_env, n_eval_episodes=100, eval_freq=1_000, deterministic=False)
    masked.learn(args.steps, callback=callback)
    mean, std = evaluate_policy(masked, eval_env, n_eval_episodes=100, deterministic=False)
    print(f"MaskableMemoryPPO: return {mean:.2f} +/- {std:.2f}", flush=True)

    plain = MemoryPPO("MlpPolicy", env, **SETTINGS)
    plain.learn(args.steps)
    mean, std = evaluate_without_masks(plain, eval_env, n_eval_episodes=100, deterministic=False)
    print(f"MemoryPPO:         return {mean:.2f} +/- {std:.2f}", flush=True)

    game = make_memory_vec_env(ENV, seed=1)
    obs: Any = game.reset()
    state, starts, opened = None, np.ones(1, dtype=bool), []
    while True:
        masks = get_action_masks(game)
        action, state = masked.predict(obs, state, starts, action_masks=masks)
        obs, _, starts, infos = game.step(action)
        opened.append(int(action[0]))
        if starts[0]:
            break
    print(f"Tiles opened: {opened}, return {infos[0]['episode']['r']:.2f}")


if __name__ == "__main__":
    main()
