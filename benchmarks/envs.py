"""
Environment steps per second of every id of this package, in one process, with random actions, resets included.

``make_memory_vec_env`` creates the environments with monitors, in a ``DummyVecEnv`` and, if there is one, in the native form.
The figure is the median of the repeats. For an id that cannot run, the reason is printed.
"""

import argparse
import os
import statistics
import sys
import time
from typing import Any

import numpy as np
from stable_baselines3.common.vec_env import VecEnv

from sb3_cyborg.envs import FAMILIES, make_memory_vec_env


def measure(envs: VecEnv, seconds: float) -> float:
    """:return: Steps per second of all environments together."""
    actions = np.array([[envs.action_space.sample() for _ in range(envs.num_envs)] for _ in range(16)])
    steps = 0
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        envs.step(actions[steps % len(actions)])
        steps += 1
    return steps * envs.num_envs / (time.perf_counter() - start)


def median_speed(env_id: str, n_envs: int, vec_env: str, args: argparse.Namespace, **env_kwargs: Any) -> float:
    envs = make_memory_vec_env(env_id, n_envs, seed=0, vec_env=vec_env, env_kwargs=env_kwargs)
    envs.reset()
    measure(envs, args.seconds / 4)  # warm-up
    speeds = [measure(envs, args.seconds) for _ in range(args.repeats)]
    envs.close()
    return statistics.median(speeds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", nargs="+", choices=sorted(FAMILIES), default=list(FAMILIES), metavar="FAMILY")
    parser.add_argument("--n-envs", type=int, default=8, help="environments in a DummyVecEnv (default: %(default)s)")
    parser.add_argument("--native-envs", type=int, default=4096, help="environments in the native form (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=0.4, help="duration of a repeat (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="default: %(default)s")
    args = parser.parse_args()
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")

    print("| id | form | environments | steps/s |\n|---|---|---:|---:|")
    for name in args.family:
        family = FAMILIES[name]
        forms = [("dummy", args.n_envs)] + ([("native", args.native_envs)] if family.native else [])
        for env_id in family.kwargs:
            for form, n_envs in forms:
                try:
                    speed = f"{median_speed(env_id, n_envs, form, args):,.0f}"
                except (ImportError, RuntimeError) as error:
                    speed = "cannot run here"
                    print(f"{env_id}: {error}", file=sys.stderr)
                print(f"| `{env_id}` | {form} | {n_envs:,} | {speed} |", flush=True)


if __name__ == "__main__":
    main()
