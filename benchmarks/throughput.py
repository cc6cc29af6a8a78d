"""
Speed of ``MemoryPPO`` compared with sb3-contrib's ``RecurrentPPO``: collection, update and overall.

The agents run in turns in one process: RecurrentPPO, an agent, RecurrentPPO with a shared LSTM, then the next agent. A ratio
compares an agent with the peer that ran next to it, and the tables show medians over the repeats, so other load on the
machine affects both alike. Environment, seed, width, ``n_envs``, ``n_steps``, batch size, epochs, threads, policy head and
value head are equal.

There are two peers. ``RecurrentPPO`` has its default of two LSTMs, one for the actor and one for the critic. ``RecurrentPPO
shared`` has a single LSTM (``shared_lstm=True``, ``enable_critic_lstm=False``), as MemoryPPO has a single core. The value loss
does not train this LSTM.

``--full`` runs all settings: two widths, two numbers of environments, one and two threads. ``--seq-len`` and ``--burn-in`` are
options of MemoryPPO alone. They change the objective, so the comparison leaves them at their defaults.

The learning rate is close to zero, so that every agent keeps acting at random and sees episodes of the same length.
"""

import argparse
import csv
import functools
import gc
import itertools
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gymnasium as gym
import torch as th
from sb3_contrib import RecurrentPPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecEnv

from sb3_cyborg import MemoryPPO

ENCODERS = ("gru", "lstm", "mamba", "mingru", "trxl", "hybrid", "fusion")
NUM_LAYERS = {"trxl": 2}
"""Layers of encoders that have more than one in this benchmark."""
MEMORIES = ("none", "ring", "kv", "slot", "pmm")
AGENTS = [f"{encoder}/none" for encoder in ENCODERS] + [f"gru/{memory}" for memory in MEMORIES if memory != "none"]
PEER, SHARED_PEER = "RecurrentPPO", "RecurrentPPO shared"
PACKAGES = ("torch", "stable-baselines3", "sb3-contrib", "gymnasium", "numpy")
PHASES = ("collect", "update", "overall")
LEARNING_RATE = 1e-8
RESULTS = Path(__file__).parent / "results"
FULL = {"width": [128, 256], "n_envs": [16, 64], "threads": [1, 2]}
"""The settings of ``--full``."""

Seconds = dict[str, float]


def memory_ppo_kwargs(agent: str, width: int) -> dict[str, Any]:
    """:return: The ``policy_kwargs`` of ``MemoryPPO`` for an agent named ``encoder/memory``."""
    encoder, memory = agent.split("/")
    sizes = {"hidden_dim": width, "latent_dim": width, "memory_dim": width // 2, "num_layers": NUM_LAYERS.get(encoder, 1)}
    return {"encoder": encoder, "memory": memory, **sizes}


def recurrent_ppo_kwargs(agent: str, width: int) -> dict[str, Any]:
    """:return: The ``policy_kwargs`` of ``RecurrentPPO`` for one of the two peers."""
    shared = {"shared_lstm": True, "enable_critic_lstm": False} if agent == SHARED_PEER else {}
    return {"lstm_hidden_size": width, **shared}


def make_envs(name: str, n_envs: int) -> VecEnv:
    env: str | Callable[..., gym.Env[Any, Any]] = name
    if name.startswith("RepeatPrevious"):
        from popgym.envs import repeat_previous

        env = getattr(repeat_previous, name)
    return make_vec_env(env, n_envs=n_envs, seed=0)


def make_model(agent: str, env_name: str, args: argparse.Namespace) -> RecurrentPPO:
    common: dict[str, Any] = {
        "n_steps": args.n_steps,
        "batch_size": args.batch_size,
        "n_epochs": args.n_epochs,
        "learning_rate": LEARNING_RATE,
        "seed": 0,
        "device": "cpu",
    }
    env = make_envs(env_name, args.n_envs)
    if agent in (PEER, SHARED_PEER):
        return RecurrentPPO("MlpLstmPolicy", env, policy_kwargs=recurrent_ppo_kwargs(agent, args.width), **common)
    policy_kwargs = memory_ppo_kwargs(agent, args.width)
    return MemoryPPO("MlpPolicy", env, policy_kwargs=policy_kwargs, seq_len=args.seq_len, burn_in=args.burn_in, **common)


class Contestant:
    """
    A model whose ``collect_rollouts`` and ``train`` are timed, after one iteration of warm-up.

    :param agent: ``encoder/memory``, or one of the two peers.
    :param env_name: Environment id, or the name of one of POPGym's RepeatPrevious classes.
    :param args: ``width``, ``n_envs``, ``n_steps``, ``batch_size``, ``n_epochs``, ``seq_len`` and ``burn_in``.
    :param clock: Returns the time in seconds: wall time, or ``time.process_time`` for CPU time.
    """

    def __init__(
        self, agent: str, env_name: str, args: argparse.Namespace, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.clock = clock
        self.model = make_model(agent, env_name, args)
        self.steps = args.n_envs * args.n_steps
        self.parameters = sum(parameter.numel() for parameter in self.model.policy.parameters())
        self.seconds: Seconds = {}
        self._time("collect_rollouts", "collect")
        self._time("train", "update")
        self.run_iteration()  # warm-up: allocations, first calls of kernels

    def _time(self, method: str, phase: str) -> None:
        original = getattr(self.model, method)

        @functools.wraps(original)
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = self.clock()
            result = original(*args, **kwargs)
            self.seconds[phase] = self.clock() - start
            return result

        setattr(self.model, method, timed)

    def run_iteration(self) -> Seconds:
        """:return: The seconds of one rollout, of one update, and of both together with the rest of ``learn``."""
        gc.collect()
        start = self.clock()
        self.model.learn(self.steps, reset_num_timesteps=self.model.num_timesteps == 0)
        return {**self.seconds, "overall": self.clock() - start}


def measure(env_name: str, args: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """:return: One row for each turn of an agent or a peer, and the number of parameters of each."""
    contestants = {name: Contestant(name, env_name, args) for name in (PEER, SHARED_PEER, *args.agents)}
    rows: list[dict[str, Any]] = []
    for repeat in range(args.repeats):
        for agent in args.agents:
            for name in (PEER, agent, SHARED_PEER):
                seconds = contestants[name].run_iteration()
                speeds = {phase: contestants[name].steps / seconds[phase] for phase in PHASES}
                rows.append({"env": env_name, "repeat": repeat, "beside": agent, "agent": name, **speeds})
        print(f"{env_name}: repeat {repeat + 1} of {args.repeats} done", file=sys.stderr, flush=True)
    return rows, {name: contestant.parameters for name, contestant in contestants.items()}


def ratio(rows: list[dict[str, Any]], agent: str, peer: str, phase: str) -> float:
    """:return: The median over the repeats of the ratio of an agent's speed to that of the peer that ran next to it."""
    speed = {(row["repeat"], row["agent"]): row[phase] for row in rows if row["beside"] == agent}
    return float(statistics.median(speed[repeat, agent] / speed[repeat, peer] for repeat, name in speed if name == agent))


def markdown_table(rows: list[dict[str, Any]], parameters: dict[str, int]) -> str:
    header = ["agent", "parameters"]
    for phase in PHASES:
        header += [f"{phase} steps/s", f"x {PEER}", "x shared"]
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    for agent in parameters:
        cells = [agent, f"{parameters[agent]:,}"]
        for phase in PHASES:
            cells.append(f"{statistics.median(row[phase] for row in rows if row['agent'] == agent):,.0f}")
            is_peer = agent in (PEER, SHARED_PEER)
            cells += ["", ""] if is_peer else [f"{ratio(rows, agent, peer, phase):.2f}" for peer in (PEER, SHARED_PEER)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def describe_machine() -> str:
    cpu_info = Path("/proc/cpuinfo")
    lines = cpu_info.read_text().splitlines() if cpu_info.exists() else []
    cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    packages = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    return f"{cpu}, {os.cpu_count()} cores{load}; Python {platform.python_version()}, {packages}"


def draw(bars: dict[str, dict[str, float]], path: Path) -> None:
    """Draws the ratio to RecurrentPPO of each agent, overall and in the update, with one group of bars per setting."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 1.5 + 0.5 * len(bars) * max(map(len, bars.values())) / 3), sharey=True)
    for axis, phase in zip(axes, ("overall", "update"), strict=True):
        names = [f"{agent}, {setting}" for setting, speeds in bars.items() for agent in speeds if agent.endswith(phase)]
        values = [value for speeds in bars.values() for agent, value in speeds.items() if agent.endswith(phase)]
        axis.barh([name.replace(f" {phase}", "") for name in names], values)
        axis.axvline(1, color="black", linewidth=1)
        axis.set_title(f"{phase}: times RecurrentPPO")
        axis.invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", nargs="+", default=["RepeatPreviousEasy", "CartPole-v1"], help="default: %(default)s")
    parser.add_argument(
        "--agents",
        nargs="+",
        choices=[f"{encoder}/{memory}" for encoder in ENCODERS for memory in MEMORIES],
        default=AGENTS,
        metavar="ENCODER/MEMORY",
    )
    parser.add_argument("--width", type=int, nargs="+", default=[128], help="width of LSTM and core (default: %(default)s)")
    parser.add_argument("--n-envs", type=int, nargs="+", default=[16], help="default: %(default)s")
    parser.add_argument("--threads", type=int, nargs="+", default=[1], help="default: %(default)s")
    parser.add_argument("--full", action="store_true", help=f"run all of {FULL}")
    parser.add_argument("--n-steps", type=int, default=128, help="default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=512, help="default: %(default)s")
    parser.add_argument("--n-epochs", type=int, default=4, help="default: %(default)s")
    parser.add_argument("--seq-len", type=int, help="seq_len of MemoryPPO (default: its own choice)")
    parser.add_argument("--burn-in", type=int, default=0, help="burn_in of MemoryPPO (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--name", default="throughput", help="name of the output files (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for <name>.md, .csv and .png (default: %(default)s)")
    args = parser.parse_args()
    if args.full:
        vars(args).update(FULL)
    return args


def main() -> None:
    args = parse_args()
    fixed = ("n_steps", "batch_size", "n_epochs", "seq_len", "burn_in", "repeats")
    report = [describe_machine(), "", ", ".join(f"{name}={getattr(args, name)}" for name in fixed)]
    all_rows: list[dict[str, Any]] = []
    bars: dict[str, dict[str, float]] = {}
    args.out.mkdir(parents=True, exist_ok=True)
    for threads, width, n_envs, env_name in itertools.product(args.threads, args.width, args.n_envs, args.env):
        th.set_num_threads(threads)
        setting = {"width": width, "n_envs": n_envs, "threads": threads}
        title = f"{env_name}, " + ", ".join(f"{name}={value}" for name, value in setting.items())
        print(title, file=sys.stderr, flush=True)
        rows, parameters = measure(env_name, argparse.Namespace(**{**vars(args), **setting}))
        all_rows += [{**setting, **row} for row in rows]
        bars[title] = {f"{agent} {phase}": ratio(rows, agent, PEER, phase) for agent in args.agents for phase in PHASES[1:]}
        report += ["", f"**{title}**", "", markdown_table(rows, parameters)]
        # After each setting, so that an interrupted run keeps what it measured.
        (args.out / f"{args.name}.md").write_text("\n".join(report) + "\n")
        with (args.out / f"{args.name}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(all_rows[0]))
            writer.writeheader()
            writer.writerows(all_rows)
    print("\n".join(report))
    draw(bars, args.out / f"{args.name}.png")
    print(f"\nWritten to {args.out.resolve()}")


if __name__ == "__main__":
    main()
