"""
Speed of ``MemoryPPO`` compared with recurrent PPO of other libraries: skrl, tianshou, CleanRL's logic, and sb3-contrib.

All agents run in turns in one process, each next to RecurrentPPO, as in :mod:`benchmarks.throughput`. A ratio compares an
agent with the RecurrentPPO that ran next to it, and the table shows medians. Environment, number of environments, steps,
transitions per minibatch, epochs, threads and the LSTM's width are equal. ``LIBRARIES`` describes the differences of each
peer, and the report quotes them. Steps per second refer to CPU time, which depends less on other load on the machine.

skrl and tianshou are in ``requirements/bench-peers.txt``. The table marks libraries that are not installed.
Run it from the root of the repository: ``OMP_NUM_THREADS=1 python -m benchmarks.peers``.
"""

import argparse
import csv
import functools
import gc
import sys
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch as th

import sb3_cyborg  # noqa: F401  # registers the environments
from benchmarks.peer_agents.common import clock
from benchmarks.throughput import (
    LEARNING_RATE,
    PEER,
    PHASES,
    RESULTS,
    SHARED_PEER,
    Contestant,
    Seconds,
    describe_machine,
    markdown_table,
)

REQUIREMENTS = "requirements/bench-peers.txt"
AGENTS = ("gru/none", "lstm/none")
ENVS = ("sb3_cyborg/popgym-RepeatPreviousEasy-v0", "CartPole-v1")


class Trainer(Protocol):
    """An agent that the benchmark runs in turns."""

    steps: int
    parameters: int

    def run_iteration(self) -> Seconds: ...


def make_cleanrl(env_id: str, args: argparse.Namespace) -> Trainer:
    from benchmarks.peer_agents.cleanrl_lstm import CleanRLPeer

    return CleanRLPeer(env_id, args)


def make_skrl(env_id: str, args: argparse.Namespace) -> Trainer:
    from benchmarks.peer_agents.skrl_rnn import SkrlPeer

    return SkrlPeer(env_id, args)


def make_tianshou(env_id: str, args: argparse.Namespace, window: int) -> Trainer:
    from benchmarks.peer_agents.tianshou_rnn import TianshouPeer

    return TianshouPeer(env_id, args, window)


class Library(NamedTuple):
    """A peer that is not sb3-contrib's."""

    make: Callable[[str, argparse.Namespace], Trainer]
    package: str | None
    """The package that must be installed, or ``None``."""
    differences: str
    """The differences to the other agents, for the report."""


LIBRARIES = {
    "CleanRL's LSTM logic": Library(
        make_cleanrl,
        None,
        "one LSTM for actor and critic. The update, too, calls `nn.LSTM` for one step at a time, over all steps of the "
        "rollout. Minibatches are whole environments, without padding. Rewritten for vector observations, see "
        "`benchmarks/peer_agents/cleanrl_lstm.py`.",
    ),
    "skrl PPO_RNN": Library(
        make_skrl,
        "skrl",
        "an LSTM for the policy and one for the value function, as in RecurrentPPO. Sequences of 64 steps from stored states, "
        "cut wherever an episode of the minibatch ends. The minibatches are the same in all epochs, in the rollout's order. "
        "skrl 2.1.1 stores the state after the step (two names refer to one dict), so the first steps of a sequence are "
        "replayed from a state that is one step late.",
    ),
    "tianshou PPO, window 64": Library(
        functools.partial(make_tianshou, window=64),
        "tianshou",
        "different computation: for one output, each transition of the update runs its last 64 observations from a zero "
        "state, not from the state that it acted with. The LSTM runs twice per minibatch (actor, critic), and three times "
        "over the rollout before. Linear layers before and after the LSTM; heads with ReLU.",
    ),
    "tianshou PPO, window 4": Library(
        functools.partial(make_tianshou, window=4),
        "tianshou",
        "the same with 4 observations, the window of tianshou's examples. It cannot learn longer dependencies.",
    ),
}
PACKAGES = ("skrl", "tianshou")


def make_contestants(env_id: str, args: argparse.Namespace) -> dict[str, Trainer]:
    """:return: The agents that run in turns, by name, after their warm-up. Libraries that are not installed are left out."""
    contestants: dict[str, Trainer] = {
        name: Contestant(name, env_id, args, clock) for name in (PEER, SHARED_PEER, *args.agents)
    }
    for name in args.libraries:
        if is_installed(name):
            contestants[name] = LIBRARIES[name].make(env_id, args)
            contestants[name].run_iteration()  # warm-up, which a Contestant runs itself
    return contestants


def is_installed(name: str) -> bool:
    package = LIBRARIES[name].package
    return package is None or find_spec(package) is not None


def measure(env_id: str, args: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """:return: One row for each turn, and the number of parameters of each agent, as in ``benchmarks.throughput``."""
    contestants = make_contestants(env_id, args)
    rows: list[dict[str, Any]] = []
    for repeat in range(args.repeats):
        for agent in (name for name in contestants if name not in (PEER, SHARED_PEER)):
            for name in (PEER, agent, SHARED_PEER):
                gc.collect()
                seconds = contestants[name].run_iteration()
                speeds = {phase: contestants[name].steps / seconds[phase] for phase in PHASES}
                rows.append({"env": env_id, "repeat": repeat, "beside": agent, "agent": name, **speeds})
        print(f"{env_id}: repeat {repeat + 1} of {args.repeats} done", file=sys.stderr, flush=True)
    return rows, {name: contestant.parameters for name, contestant in contestants.items()}


def report_missing(names: list[str]) -> str:
    """:return: A row of the table for each library that is not installed."""
    columns = 2 + 3 * len(PHASES)
    return "".join(f"\n| {name} | not installed |" + " |" * (columns - 2) for name in names)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--env", nargs="+", default=ENVS, help="ids with vector observations and discrete actions (default: %(default)s)"
    )
    parser.add_argument("--agents", nargs="+", default=AGENTS, metavar="ENCODER/MEMORY", help="default: %(default)s")
    parser.add_argument("--libraries", nargs="+", choices=LIBRARIES, default=list(LIBRARIES), help="default: all")
    for name, default in {"width": 128, "n-envs": 16, "n-steps": 128, "batch-size": 512, "n-epochs": 4, "threads": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=default, help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--name", default="peers", help="name of the output files (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for <name>.md and .csv (default: %(default)s)")
    parser.set_defaults(seq_len=None, burn_in=0, learning_rate=LEARNING_RATE)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    th.set_num_threads(args.threads)
    missing = [name for name in args.libraries if not is_installed(name)]
    for package in sorted({str(LIBRARIES[name].package) for name in missing}):
        print(f"{package} is not installed: pip install -r {REQUIREMENTS}", file=sys.stderr)
    versions = [f"{package} {version(package)}" for package in PACKAGES if find_spec(package) is not None]
    fixed = ("width", "n_envs", "n_steps", "batch_size", "n_epochs", "threads", "repeats")
    settings = ", ".join(f"{name}={getattr(args, name)}" for name in fixed)
    report = [", ".join([describe_machine(), *versions]), "", f"Steps per second of CPU time; {settings}"]
    notes = ["", *(f"- {name}: {LIBRARIES[name].differences}" for name in args.libraries)]
    all_rows: list[dict[str, Any]] = []
    args.out.mkdir(parents=True, exist_ok=True)
    for env_id in args.env:
        rows, parameters = measure(env_id, args)
        all_rows += rows
        report += ["", f"**{env_id}**", "", markdown_table(rows, parameters) + report_missing(missing)]
        # After each environment, so that an interrupted run keeps what it measured.
        (args.out / f"{args.name}.md").write_text("\n".join(report + notes) + "\n")
        with (args.out / f"{args.name}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(all_rows[0]))
            writer.writeheader()
            writer.writerows(all_rows)
    print("\n".join(report + notes))
    print(f"\nWritten to {(args.out / args.name).resolve()}.md and .csv")


if __name__ == "__main__":
    main()
