"""
Compares the speed of ``MemoryPPO`` in two checkouts of this repository: collection, update and overall.

    OMP_NUM_THREADS=1 python benchmarks/compare_checkouts.py ../before . --csv speed.csv

For each round there are two new processes, one per checkout. They run in turns, one iteration (rollout and update) at a time,
in the order A B B A A B ..., so other load on the machine affects both alike. Times are CPU times of one thread. Both
checkouts are measured by the code of the checkout that this script is in, with the same settings.

The ratio of an iteration is the speed in the second checkout over that in the first, in the iterations that ran one after
the other. The table shows the median over all iterations of all rounds, and for ``overall`` also the quartiles: 1.05 means
that the second checkout is 5% faster. ``RecurrentPPO`` is the same code in both checkouts: the distance of its ratios from 1
shows the noise of the measurement.
"""

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DEFAULT_AGENTS = ("RecurrentPPO", "gru/none", "lstm/none", "mamba/none", "gru/ring", "gru/kv", "gru/slot", "gru/pmm")
SETTINGS = {"width": 128, "n-envs": 16, "n-steps": 128, "batch-size": 512, "n-epochs": 4, "burn-in": 0}
PHASES = ("collect", "update", "overall")

Speeds = dict[str, float]
"""Environment steps per CPU second, by phase."""
Row = dict[str, Any]


def serve(agent: str, checkout: Path, args: argparse.Namespace) -> None:
    """
    Measures one iteration for each line of the standard input, and answers with its speeds as a line of JSON.

    :param agent: ``encoder/memory``, or ``RecurrentPPO``.
    :param checkout: Root of the checkout that the package must come from.
    :param args: The settings.
    :raises RuntimeError: if the package was imported from another place.
    """
    import torch as th

    import sb3_cyborg

    if not Path(sb3_cyborg.__file__).resolve().is_relative_to(checkout.resolve()):
        raise RuntimeError(f"sb3_cyborg was imported from {sb3_cyborg.__file__}, not from {checkout}.")
    # Only after the import of the package: `benchmarks` comes from this checkout, the package from the measured one.
    sys.path.insert(0, str(ROOT))
    from benchmarks.throughput import Contestant

    th.set_num_threads(1)
    contestant = Contestant(agent, args.env, args, clock=time.process_time)
    for _ in sys.stdin:
        seconds = contestant.run_iteration()
        print(json.dumps({phase: contestant.steps / seconds[phase] for phase in PHASES}), flush=True)


class Measurement:
    """
    A process that runs :func:`serve`.

    :param agent: The agent.
    :param checkout: Root of the checkout.
    """

    def __init__(self, agent: str, checkout: Path) -> None:
        self.name = f"{agent} in {checkout}"
        command = [sys.executable, __file__, *sys.argv[1:], "--serve", str(checkout), "--agents", agent]
        env = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        self.process = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run_iteration(self) -> Speeds:
        """
        :return: The speeds of one iteration.
        :raises RuntimeError: if the process has failed; its traceback is then on the standard error.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write("\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise RuntimeError(f"The measurement of {self.name} ended with exit code {self.process.wait()}.")
        speeds: Speeds = json.loads(answer)
        return speeds

    def close(self) -> None:
        """Ends the process."""
        self.process.communicate()


def compare(agent: str, checkouts: tuple[Path, Path], rounds: int, iterations: int) -> list[Row]:
    """
    :param agent: The agent.
    :param checkouts: Roots of the two checkouts.
    :param rounds: Number of pairs of processes.
    :param iterations: Iterations of each process.
    :return: A row for each iteration: ``agent``, ``round``, ``iteration``, ``checkout`` (0 or 1) and the speeds.
    """
    rows: list[Row] = []
    for number in range(rounds):
        measurements = [Measurement(agent, checkout) for checkout in checkouts]
        try:
            for measurement in measurements:
                measurement.run_iteration()  # not counted; afterwards neither process is still starting
            for iteration in range(iterations):
                for index in (0, 1) if iteration % 2 == 0 else (1, 0):
                    key = {"agent": agent, "round": number, "iteration": iteration, "checkout": index}
                    rows.append({**key, **measurements[index].run_iteration()})
        finally:
            for measurement in measurements:
                measurement.close()
        print(f"{agent}: round {number + 1} of {rounds} done", file=sys.stderr, flush=True)
    return rows


def ratios(rows: list[Row], phase: str) -> list[float]:
    """:return: For each iteration the speed in the second checkout, divided by that in the first."""
    first, second = ([row[phase] for row in rows if row["checkout"] == index] for index in (0, 1))
    return [b / a for a, b in zip(first, second, strict=True)]


def describe(agent: str, rows: list[Row]) -> str:
    """:return: A row of the table."""
    medians = [f"{statistics.median(ratios(rows, phase)):.3f}" for phase in PHASES]
    low, _, high = statistics.quantiles(ratios(rows, "overall"), n=4, method="inclusive")
    return "| " + " | ".join([agent, *medians, f"{low:.3f} to {high:.3f}"]) + " |"


def at_least(smallest: int) -> Callable[[str], int]:
    """:return: A parser of whole numbers for ``argparse`` that refuses smaller ones."""

    def parse(text: str) -> int:
        if int(text) < smallest:
            raise argparse.ArgumentTypeError(f"must be at least {smallest}, got {text}")
        return int(text)

    return parse


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", type=Path, help="root of the first checkout, the baseline")
    parser.add_argument("second", type=Path, help="root of the second checkout")
    parser.add_argument("--agents", nargs="+", default=DEFAULT_AGENTS, metavar="ENCODER/MEMORY", help="default: %(default)s")
    parser.add_argument("--env", default="RepeatPreviousEasy", help="default: %(default)s")
    for name, default in SETTINGS.items():
        parser.add_argument(f"--{name}", type=int, default=default, help="default: %(default)s")
    parser.add_argument("--seq-len", type=int, help="default: MemoryPPO's own choice")
    parser.add_argument("--rounds", type=at_least(1), default=3, help="pairs of processes per agent (default: %(default)s)")
    parser.add_argument("--iterations", type=at_least(2), default=8, help="of each process (default: %(default)s)")
    parser.add_argument("--csv", type=Path, help="file for all measurements")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)  # makes this process a measurement of that checkout
    args = parser.parse_args()
    for checkout in (args.first, args.second):
        if not (checkout / "sb3_cyborg" / "__init__.py").is_file():
            parser.error(f"{checkout} is not the root of a checkout: it has no sb3_cyborg/__init__.py")
    return args


def main() -> None:
    args = parse_args()
    if args.serve is not None:
        serve(args.agents[0], args.serve, args)
        return
    print("| agent | " + " | ".join(PHASES) + " | quartiles of overall |\n|---" + "|---:" * (len(PHASES) + 1) + "|")
    all_rows: list[Row] = []
    for agent in args.agents:
        rows = compare(agent, (args.first, args.second), args.rounds, args.iterations)
        print(describe(agent, rows), flush=True)
        all_rows += rows
        if args.csv is not None:  # after each agent, so that an interrupted run keeps what it measured
            with args.csv.open("w", newline="") as file:
                writer = csv.DictWriter(file, list(all_rows[0]))
                writer.writeheader()
                writer.writerows(all_rows)


if __name__ == "__main__":
    main()
