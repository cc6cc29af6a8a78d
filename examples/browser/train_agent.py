"""
Trains the agent of the browser example and writes it to ``agent.onnx``.

The task is POPGym's RepeatPrevious with ``k=5``: name the suit of the card that was shown four cards ago. Training takes about
a minute. It needs ``pip install "sb3-cyborg[popgym,export]"``.
"""

import argparse
from pathlib import Path

import numpy as np
import torch as th
from popgym.envs.repeat_previous import RepeatPrevious
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.utils import LinearSchedule

from sb3_cyborg import MemoryPPO
from sb3_cyborg.export import export_onnx

TASK = {"num_decks": 1, "k": 5}  # POPGym counts the present card: k=5 asks for the card four cards ago
GOAL = 0.95  # mean return that is required; all answers right is 1


def train(steps: int, seed: int) -> MemoryPPO:
    """:return: A trained agent, small enough for a page."""
    env = make_vec_env(RepeatPrevious, n_envs=32, seed=seed, env_kwargs=TASK)
    model = MemoryPPO(
        "MlpPolicy",
        env,
        n_steps=128,
        seq_len=64,
        batch_size=1024,
        learning_rate=LinearSchedule(2e-3, 0.0, 1.0),
        gamma=0.9,  # each answer is rewarded at once
        gae_lambda=0.8,
        seed=seed,
        device="cpu",
        policy_kwargs={
            "encoder": "gru",
            "memory": "ring",
            "memory_kwargs": {"num_slots": 8, "num_first": 0},
            "hidden_dim": 32,
            "net_arch": [32],
        },
    )
    return model.learn(steps)


def main() -> None:
    """Train, evaluate, export."""
    parser = argparse.ArgumentParser(description="Trains the agent of the browser example.")
    parser.add_argument("--steps", type=int, default=150_000, help="environment steps to train for (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("agent.onnx"))
    args = parser.parse_args()
    th.set_num_threads(1)  # policies of this size are slower with several threads
    model = train(args.steps, args.seed)
    env = make_vec_env(RepeatPrevious, n_envs=10, seed=args.seed + 10_000, env_kwargs=TASK)
    returns, _ = evaluate_policy(model, env, n_eval_episodes=50, return_episode_rewards=True)
    mean, std = np.mean(returns), np.std(returns)
    print(f"return {mean:.3f} +/- {std:.3f} over 50 episodes after {model.num_timesteps:,} steps, seed {args.seed}")
    if mean < GOAL:
        raise SystemExit(f"The agent has not learned the task: its return should be at least {GOAL}. Nothing was written.")
    export_onnx(model, args.output)
    print(f"{args.output}: {args.output.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
