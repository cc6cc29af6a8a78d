"""
Costs of ``MemoryPPO``'s features (resets, burn-in, stored states), and its arithmetic rate relative to the processor's peak.

- *Resets*: time of forward and backward of the GRU and LSTM layer with resets at 5% of the steps, relative to ``torch.nn``'s
  layers without resets.
- *Burn-in*: time of the update with ``burn_in=128, seq_len=64``, relative to ``burn_in=0``.
- *Bytes*: size of the states in the rollout buffer, relative to those of sb3-contrib (two LSTMs, every step).
- *Nearness*: multiply-adds per second of the update's matrix products, relative to those of one large matrix product in the
  same run, with the faster of PyTorch's libraries for it. A forward pass counts once, its backward pass twice.

The measurements run in turns. Times are CPU times of one thread, which depend less on other load, the minimum of the repeats.
Run it from the root of the repository: ``python -m benchmarks.limits``.
"""

import argparse
import functools
import time
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import torch as th
from sb3_contrib import RecurrentPPO
from torch import nn

from benchmarks.throughput import RESULTS, describe_machine, make_envs, memory_ppo_kwargs
from sb3_cyborg import MemoryPPO
from sb3_cyborg.encoders.gru import GRU
from sb3_cyborg.encoders.lstm import LSTM
from sb3_cyborg.ops.linear import matmul_t

RESET_RATE = 0.05


def least(turns: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """:return: The minimum CPU seconds of each function over the repeats, which run in turns."""
    best: dict[str, float] = {}
    for _ in range(repeats + 1):  # the first is a warm-up, so it is hardly the minimum
        for name, turn in turns.items():
            start = time.process_time()
            turn()
            best[name] = min(best.get(name, float("inf")), time.process_time() - start)
    return best


def table(header: list[str], rows: list[list[Any]]) -> str:
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def backward(run: Callable[..., Any], *args: Any) -> None:
    run(*args)[0].sum().backward()


def resets(repeats: int) -> str:
    rows = []
    for batch_size, steps, width in ((8, 64, 128), (8, 64, 256), (32, 64, 128), (16, 128, 256)):
        x = th.randn(batch_size, steps, width, requires_grad=True)
        masks = th.rand(batch_size, steps) > RESET_RATE
        turns: dict[str, Callable[[], Any]] = {}
        for ours, theirs in ((GRU, nn.GRU), (LSTM, nn.LSTM)):
            layer, torch_layer = ours(width, width), theirs(width, width, batch_first=True)
            state = layer.get_initial_state(batch_size)
            for name, mask in (("none", None), ("resets", masks)):
                turns[f"{ours.__name__} {name}"] = functools.partial(backward, layer.forward_sequence, x, state, mask)
            turns[f"torch {ours.__name__}"] = functools.partial(backward, torch_layer, x)
        seconds = least(turns, repeats)
        for name in ("GRU", "LSTM"):
            base = seconds[f"torch {name}"]
            ratios = [f"{seconds[f'{name} {way}'] / base:.2f}" for way in ("none", "resets")]
            rows.append([f"{name} {batch_size} x {steps} x {width}", f"{1000 * base:.1f}", *ratios])
    return table(["layer, B x T x width", "torch.nn, ms", "x without resets", "x with resets"], rows)


def make_model(agent: str, width: int, n_envs: int, n_steps: int, **kwargs: Any) -> MemoryPPO:
    policy_kwargs = memory_ppo_kwargs(agent, width)
    env = make_envs("RepeatPreviousEasy", n_envs)
    model = MemoryPPO(
        "MlpPolicy", env, policy_kwargs=policy_kwargs, n_steps=n_steps, n_epochs=1, seed=0, device="cpu", **kwargs
    )
    model.learn(n_envs * n_steps)
    return model


def burn_in(repeats: int) -> str:
    rows = []
    for agent in ("gru/none", "lstm/none", "gru/ring", "mamba/none"):
        models = {p: make_model(agent, 128, 16, 512, seq_len=64, batch_size=512, burn_in=p) for p in (0, 128)}
        seconds = least({str(p): model.train for p, model in models.items()}, repeats)
        rows.append(
            [agent, f"{1000 * seconds['0']:.0f}", f"{1000 * seconds['128']:.0f}", f"{seconds['128'] / seconds['0']:.2f}"]
        )
    return table(["agent", "burn_in=0, ms", "burn_in=128, ms", "ratio"], rows)


def state_bytes() -> str:
    n_steps, n_envs, width = 512, 16, 256
    theirs = 4 * n_steps * n_envs * width * 4  # h and c, of actor and critic, fp32
    rows = [["RecurrentPPO", f"{theirs:,}", "1"]]
    for agent in (
        "gru/none",
        "lstm/none",
        "mamba/none",
        "hybrid/none",
        "fusion/none",
        "gru/ring",
        "gru/kv",
        "gru/slot",
        "gru/pmm",
    ):
        env = make_envs("RepeatPreviousEasy", n_envs)
        model = MemoryPPO("MlpPolicy", env, n_steps=n_steps, policy_kwargs=memory_ppo_kwargs(agent, width), device="cpu")
        ours = sum(leaf.numel() * leaf.element_size() for leaf in model.rollout_buffer.states.values())
        rows.append([agent, f"{ours:,}", f"{ours / theirs:.3f}"])
    return table([f"states of {n_steps} steps x {n_envs} envs x {width}", "bytes", "of RecurrentPPO's"], rows)


def peak(repeats: int) -> float:
    """:return: Floating-point operations per second (two per multiply-add) of a product of 1024 x 1024 matrices."""
    a, b = th.randn(2, 1024, 1024).unbind()
    seconds = least({"torch": lambda: a @ b.t(), "library": lambda: matmul_t(a, b)}, repeats)
    return 2 * 1024**3 / min(seconds.values())


def nearness(repeats: int) -> str:
    rate = peak(repeats)
    rows = [["peak of a product", "", f"{rate / 1e9:.0f}", "1"]]
    sizes = [("gru/none", 128, 512, 64), ("gru/none", 256, 512, 64), ("gru/none", 256, 1024, 128), ("gru/none", 256, 2048, 64)]
    for agent, width, batch_size, seq_len in [*sizes, ("lstm/none", 256, 512, 64), ("mamba/none", 256, 512, 64)]:
        model = make_model(agent, width, 64, 128, batch_size=batch_size, seq_len=seq_len)
        weights = sum(p.numel() for p in model.policy.parameters() if p.dim() == 2)
        operations = 3 * 2 * weights * 64 * 128
        rows.append(near(f"{agent} {width}, batch {batch_size} of {seq_len} steps", model.train, operations, rate, repeats))
    env: gym.Env[Any, Any] | Any = make_envs("RepeatPreviousEasy", 64)
    sizes_of_peer: dict[str, Any] = {"n_steps": 128, "batch_size": 512, "n_epochs": 1}
    peer = RecurrentPPO("MlpLstmPolicy", env, policy_kwargs={"lstm_hidden_size": 256}, device="cpu", **sizes_of_peer)
    peer.learn(64 * 128)
    weights = sum(p.numel() for p in peer.policy.parameters() if p.dim() == 2)
    rows.append(near("RecurrentPPO 256, batch 512", peer.train, 3 * 2 * weights * 64 * 128, rate, repeats))
    return table(["update of", "ms", "GFLOP/s", "of the peak"], rows)


def near(name: str, train: Callable[[], None], operations: float, rate: float, repeats: int) -> list[str]:
    seconds = least({name: train}, repeats)[name]
    return [name, f"{1000 * seconds:.0f}", f"{operations / seconds / 1e9:.0f}", f"{operations / seconds / rate:.2f}"]


def set_up(description: str | None) -> int:
    """Sets one thread and a fixed seed. :return: The number of repeats from the command line."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7, help="default: %(default)s")
    repeats: int = parser.parse_args().repeats
    th.set_num_threads(1)
    th.manual_seed(0)
    return repeats


def write_report(parts: list[str], name: str) -> None:
    """Prints a report and writes it to a file in ``benchmarks/results``."""
    text = "\n\n".join(parts)
    print(text)
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / name).write_text(text + "\n")


def main() -> None:
    repeats = set_up(__doc__)
    report = [describe_machine()]
    report += [f"**Resets at {RESET_RATE:.0%} of the steps**", resets(3 * repeats), "**Burn-in**", burn_in(repeats)]
    report += ["**State storage**", state_bytes(), "**Nearness to the limit**", nearness(repeats)]
    write_report(report, "limits.md")


if __name__ == "__main__":
    main()
