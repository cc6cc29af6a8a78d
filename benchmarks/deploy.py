"""
Measures the steps per second of an exported agent, :class:`~sb3_cyborg.runtime.OnnxAgent`, beside ``model.predict``.

    python -m benchmarks.deploy

Both act deterministically on random observations, with their state. CPU time of one thread; medians of repeats in turns.
"""

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces

from sb3_cyborg import MemoryPPO
from sb3_cyborg.export import export_onnx
from sb3_cyborg.info import read_processor
from sb3_cyborg.runtime import OnnxAgent


class Observations(gym.Env[np.ndarray, Any]):
    """An environment that only has spaces: 8 numbers, 4 actions."""

    observation_space = spaces.Box(-1, 1, (8,))
    action_space = spaces.Discrete(4)


def cpu_seconds(agent: Any, observations: np.ndarray) -> float:
    """
    :param agent: An agent with SB3's ``predict``.
    :param observations: Observations of a number of steps, (T, B, D).
    :return: CPU time of the steps, in seconds.
    """
    state, starts, none = None, np.ones(observations.shape[1], dtype=bool), np.zeros(observations.shape[1], dtype=bool)
    before = time.process_time()
    for step in observations:
        _, state = agent.predict(step, state, starts, deterministic=True)
        starts = none
    return time.process_time() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="steps of a measurement (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=7, help="measurements of each agent (default: %(default)s)")
    args = parser.parse_args()
    th.set_num_threads(1)
    model = MemoryPPO("MlpPolicy", Observations(), seed=0, device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "agent.onnx"
        export_onnx(model, path)
        agents = {"model.predict": model, "OnnxAgent": OnnxAgent(path)}
    print(
        f"{', '.join(read_processor())}; one thread; CPU time; medians of {args.repeats} measurements of {args.steps} steps\n"
    )
    print("| batch | model.predict, steps/s | OnnxAgent, steps/s | ratio (least to most) |\n|---|---|---|---|")
    for rows in (1, 64):
        observations = np.random.default_rng(0).uniform(-1, 1, (args.steps, rows, 8)).astype(np.float32)
        seconds: dict[str, list[float]] = {name: [] for name in agents}
        for repeat in range(args.repeats + 1):
            for name, agent in agents.items():
                measured = cpu_seconds(agent, observations)
                if repeat:  # the first one warms up
                    seconds[name].append(measured)
        speeds = [rows * args.steps / median(times) for times in seconds.values()]
        ratios = [slow / fast for slow, fast in zip(*seconds.values(), strict=True)]
        print(
            f"| {rows} | {speeds[0]:,.0f} | {speeds[1]:,.0f} | "
            f"{median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f}) |",
            flush=True,
        )


if __name__ == "__main__":
    main()
