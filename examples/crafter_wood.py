"""
Trains ``MemoryPPO`` and a frame-stack PPO to collect wood in Crafter, and compares their wood with that of a random agent.

All code except the imports from ``sb3_cyborg`` is plain Stable-Baselines3. Needs ``pip install "sb3-cyborg[crafter,train]"``.
"""

import argparse
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from matplotlib.figure import Figure
from PIL import Image
from stable_baselines3 import PPO
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import load_results
from stable_baselines3.common.utils import set_random_seed
from stable_baselines3.common.vec_env import VecEnv

from sb3_cyborg import MemoryPPO
from sb3_cyborg.envs import make_memory_vec_env

EVAL_SEED = 100_000  # first seed of the evaluation worlds, which no training environment has
GIF_STEPS = 140  # only daylight, because the noise at night makes the GIF large
HYPERPARAMS: dict[str, Any] = {"n_steps": 128, "batch_size": 256, "n_epochs": 4, "learning_rate": 3e-4, "ent_coef": 0.01}
MEMORY: dict[str, Any] = {"encoder": "gru", "memory": "ring", "memory_kwargs": {"num_slots": 64}}
FRAME_STACK = {"memory": 1, "framestack": 4}
NAMES = {"memory": "MemoryPPO", "framestack": "PPO, 4 frames stacked"}


def make_env(agent: str, n_envs: int, seed: int, monitor_dir: Path | None = None, **env_kwargs: Any) -> VecEnv:
    return make_memory_vec_env(
        "sb3_cyborg/CrafterWood-v0",
        n_envs,
        seed=seed,
        env_kwargs={"peaceful": True, **env_kwargs},
        frame_stack=FRAME_STACK.get(agent, 1),
        vec_env="dummy",
        monitor_dir=monitor_dir,
    )


def make_model(agent: str, seed: int, folder: Path) -> BaseAlgorithm:
    common: dict[str, Any] = {"tensorboard_log": str(folder), "seed": seed, "device": "cpu", **HYPERPARAMS}
    env = make_env(agent, 8, seed, folder / agent)
    if agent == "memory":
        return MemoryPPO("CnnPolicy", env, seq_len=64, policy_kwargs=MEMORY, **common)
    return PPO("CnnPolicy", env, **common)


class RandomAgent:
    """Draws each action with the same probability."""

    def predict(self, obs: np.ndarray, *_: Any, **__: Any) -> tuple[np.ndarray, None]:
        return np.random.randint(6, size=len(obs)), None  # noqa: NPY002  # `set_random_seed` seeds this generator


def evaluate(model: Any, agent: str, episodes: int) -> float:
    """Prints and returns the mean wood over episodes in unseen worlds, one each, which are the same for every agent."""
    set_random_seed(EVAL_SEED)
    env = make_env(agent, episodes, EVAL_SEED)
    # Actions are sampled, as in training and as in RL Zoo's evaluation on images.
    wood, _ = evaluate_policy(model, env, episodes, deterministic=False, return_episode_rewards=True)
    print(f"  {agent:10s} {np.mean(wood):5.1f} ± {np.std(wood) / np.sqrt(episodes):.1f}", flush=True)
    return float(np.mean(wood))


def record(model: BaseAlgorithm, agent: str, path: Path) -> None:
    """Writes every other step of the start of the first evaluation episode as a GIF."""
    set_random_seed(EVAL_SEED)
    env = make_env(agent, 1, EVAL_SEED, render_mode="rgb_array", render_size=360)
    obs, state, starts, frames = env.reset(), None, np.ones(1, bool), []
    for _ in range(GIF_STEPS):
        frames.append(Image.fromarray(np.asarray(env.render())).quantize(32))
        actions, state = model.predict(obs, state, starts, deterministic=False)  # type: ignore[arg-type]
        obs, _, starts, _ = env.step(actions)
    frames[0].save(path, save_all=True, append_images=frames[2::2], duration=160, loop=0, optimize=True)


def plot(folder: Path, random_wood: float) -> None:
    """Draws the training episodes from SB3's ``Monitor`` files in the folder, including those of earlier runs."""
    axes = (figure := Figure(figsize=(8, 4.5), layout="constrained")).subplots()
    for agent, name in NAMES.items():
        if (folder / agent).exists():
            episodes = load_results(str(folder / agent))
            axes.plot(episodes.l.cumsum(), episodes.r.rolling(24, min_periods=8).mean(), linewidth=2, label=name)
    axes.axhline(random_wood, color="tab:red", linestyle=":", label="random agent (evaluation)")
    axes.set(title="CrafterWood-v0, peaceful", xlabel="environment steps", ylabel="wood per training episode, mean of 24")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.legend(loc="upper left", fontsize="small")
    figure.savefig(folder / "learning_curve.png", dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=100_000, help="environment steps for each agent (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--agent", choices=[*FRAME_STACK, "both"], default="both")
    parser.add_argument("--episodes", type=int, default=30, help="evaluation episodes (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="folder of the results (default: runs/crafter-<date-time>)")
    args = parser.parse_args()
    folder = args.folder or Path("runs") / f"crafter-{datetime.now():%Y%m%d-%H%M%S}"
    folder.mkdir(parents=True, exist_ok=True)
    th.set_num_threads(1)  # policies of this size are slower with several threads

    print(f"Mean wood per episode over {args.episodes} episodes in unseen worlds, ± its standard error:")
    random_wood = evaluate(RandomAgent(), "random", args.episodes)
    for agent in FRAME_STACK if args.agent == "both" else [args.agent]:
        model, start = make_model(agent, args.seed, folder), time.perf_counter()
        model.learn(args.steps, tb_log_name=f"tensorboard-{agent}")
        minutes = (time.perf_counter() - start) / 60
        evaluate(model, agent, args.episodes)
        print(f"             after {model.num_timesteps:,} steps in {minutes:.1f} minutes, seed {args.seed}", flush=True)
        model.save(folder / f"{agent}.zip")
        record(model, agent, folder / f"{agent}.gif")
    plot(folder, random_wood)
    print(f"Models, learning curve, GIFs and TensorBoard log are in {folder.resolve()}")


if __name__ == "__main__":
    main()
