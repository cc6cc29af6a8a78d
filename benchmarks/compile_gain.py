"""
Speed of the update of ``MemoryPPO`` with ``torch.compile`` after its warm-up, and the cost of the warm-up.

A turn is one minibatch: forward, losses, backward, clipping, Adam. Eager and compiled code run in turns. Times are CPU times
of one thread, the minimum of the repeats. One of these parts is compiled:

- *features*: the features extractor;
- *heads, loss*: actor, critic, distribution and losses;
- *whole*: the whole forward pass of a minibatch, core included, with Dynamo's graph breaks.

The warm-up is the CPU time of the first turn, including the C++ compiler. The ratio error is the largest ``|ratio - 1|`` on a
rollout that eager code collected, before the first update: ``train/ratio_error`` of the first minibatch.

Needs a C++ compiler. Run it from the root of the repository: ``OMP_NUM_THREADS=1 python -m benchmarks.compile_gain``.
"""

import argparse
import os
import resource
import sys
import time
from typing import Any

os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # so that the compiler runs in children of this process

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env

from benchmarks.limits import table
from benchmarks.throughput import describe_machine, memory_ppo_kwargs
from sb3_cyborg import MemoryPPO
from sb3_cyborg.memory_ppo import losses
from sb3_cyborg.memory_ppo.actions import evaluate_categorical

WORKLOADS = {
    "images, gru/none": ("images", "gru/none"),
    "gru/none": ("sb3_cyborg/popgym-RepeatPreviousEasy-v0", "gru/none"),
    "gru/ring": ("sb3_cyborg/popgym-RepeatPreviousEasy-v0", "gru/ring"),
}
PARTS = ("features", "heads, loss", "whole")


class Images(gym.Env[np.ndarray, Any]):
    """Random images with Atari's shape, in episodes of 50 steps."""

    observation_space = spaces.Box(0, 255, (4, 84, 84), np.uint8)
    action_space = spaces.Discrete(6)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.steps = 0
        return self._observe(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        return self._observe(), float(action == 0), self.steps == 50, False, {}

    def _observe(self) -> np.ndarray:
        return self.np_random.integers(0, 256, (4, 84, 84), np.uint8)


def cpu_seconds() -> float:
    """:return: CPU seconds of this process and of its finished children."""
    return sum(u.ru_utime + u.ru_stime for u in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))


class Updater:
    """A model with a rollout, on which one minibatch is trained again and again. ``part`` of the model is compiled."""

    def __init__(self, workload: str, part: str | None, mode: str, args: argparse.Namespace) -> None:
        env_id, agent = WORKLOADS[workload]
        images = env_id == "images"
        env = make_vec_env(Images if images else env_id, n_envs=args.n_envs, seed=0)
        self.model = MemoryPPO(
            "CnnPolicy" if images else "MlpPolicy",
            env,
            learning_rate=0.0,
            n_steps=args.n_steps,
            batch_size=args.batch_size,
            n_epochs=1,
            policy_kwargs=memory_ppo_kwargs(agent, args.width),
            seed=0,
            device="cpu",
        )
        self.model.learn(args.n_envs * args.n_steps)
        self.model.policy.set_training_mode(True)
        self.batch = next(iter(self.model.rollout_buffer.sample_sequences(batch_size=args.batch_size)))
        if part is not None:
            self._compile(part, mode)

    def _compile(self, part: str, mode: str) -> None:
        policy = self.model.policy
        if part == "features":
            extractor: Any = th.compile(policy.features_extractor, mode=mode)
            policy.features_extractor = policy.pi_features_extractor = policy.vf_features_extractor = extractor
        elif part == "heads, loss":
            self.heads_and_loss = th.compile(self.heads_and_loss, mode=mode)  # type: ignore[method-assign]
        else:
            self.loss = th.compile(self.loss, mode=mode)  # type: ignore[method-assign]

    def core(self) -> th.Tensor:
        """:return: ``[latent, read]`` of the minibatch (B, T, D)."""
        batch = self.batch
        latent, _, _ = self.model.policy._core_sequence(batch["obs"], batch["actions"], batch["state"], batch["masks"])
        return latent

    def heads_and_loss(self, latent: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """:return: The loss and the ratio error, as in ``MemoryPPO._minibatch_loss``."""
        policy, batch = self.model.policy, self.batch
        latent_pi, latent_vf = policy.mlp_extractor(latent.flatten(0, 1))
        log_prob, entropy = evaluate_categorical(policy.action_net(latent_pi), batch["actions"].flatten(0, 1))
        values = policy.value_net(latent_vf).view_as(batch["returns"])
        ratio = (log_prob.view_as(values) - batch["old_log_prob"]).exp()
        loss = (
            losses.clipped_policy_loss(ratio, losses.normalize_advantages(batch["advantages"]), 0.2)
            + 0.01 * losses.entropy_loss(entropy, log_prob)
            + 0.5 * losses.value_loss(values, batch["old_values"], batch["returns"])
        )
        return loss, (ratio.detach() - 1).abs().max()

    def loss(self) -> tuple[th.Tensor, th.Tensor]:
        """:return: The results of :meth:`heads_and_loss`, computed by the whole policy."""
        return self.heads_and_loss(self.core())

    def run(self) -> float:
        """:return: The ratio error of the minibatch; an optimizer step follows it."""
        loss, error = self.loss()
        self.model.policy.optimizer.zero_grad()
        loss.backward()
        th.nn.utils.clip_grad_norm_(list(self.model.policy.parameters()), 0.5)
        self.model.policy.optimizer.step()
        return float(error)


def compare(workload: str, part: str, mode: str, eager: Updater, args: argparse.Namespace) -> list[str]:
    """:return: A row of the table."""
    th._dynamo.reset()
    compiled = Updater(workload, part, mode, args)
    eager.run()
    wall, start = time.perf_counter(), cpu_seconds()
    error = compiled.run()
    wall, warm_up = time.perf_counter() - wall, cpu_seconds() - start
    compiled.run()  # compiles again if guards of the first compilation fail
    best = {eager: float("inf"), compiled: float("inf")}
    for _ in range(args.repeats):
        for updater in best:
            start = time.process_time()
            updater.run()
            best[updater] = min(best[updater], time.process_time() - start)
    milliseconds = [1000 * seconds for seconds in best.values()]
    gain = f"{milliseconds[0] / milliseconds[1]:.2f}"
    return [workload, part, mode, *(f"{ms:.1f}" for ms in milliseconds), gain, f"{warm_up:.0f} ({wall:.0f})", f"{error:.0e}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--modes", nargs="+", default=["default", "max-autotune"])
    for name, default in {"width": 128, "n-envs": 16, "n-steps": 128, "batch-size": 512, "repeats": 15}.items():
        parser.add_argument(f"--{name}", type=int, default=default, help="default: %(default)s")
    args = parser.parse_args()
    th.set_num_threads(1)
    header = ["workload", "compiled", "mode", "eager ms", "compiled ms", "gain", "warm-up CPU s (wall)", "ratio error"]
    rows = []
    for workload in args.workloads:
        eager = Updater(workload, None, "default", args)
        for mode in args.modes:
            for part in args.parts:
                try:
                    rows.append(compare(workload, part, mode, eager, args))
                except Exception as error:  # a part that cannot be compiled is a result, too
                    reason = f"{type(error).__name__}: {str(error).splitlines()[0][:150]}"
                    rows.append([workload, part, mode, *[""] * 4, reason])
                print(rows[-1], file=sys.stderr, flush=True)
    print(describe_machine(), table(header, rows), sep="\n\n")


if __name__ == "__main__":
    main()
