"""
Speed of data-parallel training: N processes beside one, in turns.

Each setting is compared with one process:

==============  =====================================  ================================
setting         environments of each of N processes    batch of all processes
==============  =====================================  ================================
grown           as many as the one process             N times that of the one process
held            as many as the one process             that of the one process
divided         an Nth of those of the one process     that of the one process
crafter         as many as the one process, Crafter    N times that of the one process
independent     as many as the one process             each its own: N processes of one
==============  =====================================  ================================

``independent`` processes exchange nothing, so their ratio is the most that the machine allows to ``grown`` and ``held``.

Each turn starts its processes, makes one iteration of warm-up, and measures the wall time of ``--iterations`` more; the tables
show medians over ``--repeats``. Each process has one thread. The learning rate is close to zero, as in ``throughput.py``.
``time in collectives`` is the share of rank 0's time in calls of ``torch.distributed``, the wait for slower ranks included.

``python -m benchmarks.ranks`` needs as many idle cores as ranks: other load makes one rank slower, and all wait for it.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch as th

from sb3_cyborg import MemoryPPO
from sb3_cyborg.envs import make_memory_vec_env
from sb3_cyborg.memory_ppo.ranks import Ranks

LEARNING_RATE = 1e-8
POPGYM: dict[str, Any] = {
    "env": "sb3_cyborg/popgym-RepeatPreviousEasy-v0",
    "policy": "MlpPolicy",
    "n_envs": 16,
    "n_steps": 128,
    "batch_size": 1024,
    "policy_kwargs": {"encoder": "gru", "memory": "ring", "hidden_dim": 128},
}
CRAFTER: dict[str, Any] = {
    "env": "sb3_cyborg/CrafterWood-v0",
    "policy": "CnnPolicy",
    "n_envs": 4,
    "n_steps": 128,
    "batch_size": 256,
    "seq_len": 32,
    "policy_kwargs": {"encoder": "gru", "memory": "pmm", "hidden_dim": 128, "memory_kwargs": {"num_slots": 16}},
}
SETTINGS: dict[str, dict[str, Any]] = {
    "grown": POPGYM,
    "held": POPGYM,
    "divided": POPGYM,
    "crafter": CRAFTER,
    "independent": POPGYM,
}


def settings_of(name: str, ranks: int) -> dict[str, Any]:
    """:return: Settings of a script that each of the ranks runs."""
    settings = dict(SETTINGS[name])
    if name == "divided":
        settings["n_envs"] //= ranks
    elif name not in ("held", "independent"):
        settings["batch_size"] *= ranks
    return settings


def train(settings: dict[str, Any], iterations: int, output: Path) -> None:
    """Train as one rank, or alone; rank 0 writes the result."""
    th.set_num_threads(1)
    arguments = dict(settings)
    env = make_memory_vec_env(arguments.pop("env"), arguments.pop("n_envs"), vec_env="dummy")
    model = MemoryPPO(arguments.pop("policy"), env, seed=0, device="cpu", learning_rate=LEARNING_RATE, **arguments)
    rollout = model.total_envs * model.n_steps
    seconds = []
    collective = Ranks._collective

    def timed(self: Ranks, *args: Any, **options: Any) -> None:
        start = time.perf_counter()
        collective(self, *args, **options)
        seconds.append(time.perf_counter() - start)

    setattr(Ranks, "_collective", timed)  # noqa: B010  # mypy takes no assignment to a method
    model.learn(rollout)
    seconds.clear()
    wall, cpu = time.perf_counter(), time.process_time()
    model.learn(iterations * rollout, reset_num_timesteps=False)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    if model.ranks.is_first:
        result = {
            "steps_per_second": iterations * rollout / wall,
            "steps_per_cpu_second": iterations * rollout / model.ranks.size / cpu,
            "in_collectives": sum(seconds) / wall,
            "minibatches": iterations * model.n_epochs * rollout // model.batch_size,
            "parameters": sum(parameter.numel() for parameter in model.policy.parameters()),
        }
        output.write_text(json.dumps(result))


def run(name: str, ranks: int, iterations: int, seq_len: int | None) -> dict[str, float]:
    """:return: The result of one turn: one process, or ``ranks`` of them in a setting."""
    settings = SETTINGS[name] if ranks == 1 else settings_of(name, ranks)
    settings = settings if seq_len is None else settings | {"seq_len": seq_len}
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    launcher, launches = (launch, 1) if ranks > 1 and name != "independent" else ([], ranks)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / f"result_{index}.json" for index in range(launches)]
        processes = []
        for output in outputs:
            arguments = ["-m", "benchmarks.ranks", "--worker", json.dumps(settings), str(output), f"--iterations={iterations}"]
            processes.append(subprocess.Popen([sys.executable, *launcher, *arguments], env=environment))
        codes = [process.wait(timeout=1800) for process in processes]
        if any(codes):
            raise SystemExit(f"a process of the setting {name!r} failed")
        results = [json.loads(output.read_text()) for output in outputs]
    result: dict[str, float] = results[0] | {"steps_per_second": sum(each["steps_per_second"] for each in results)}
    return result


def all_reduce(rank: int, size: int, rendezvous: str, numbers: int) -> None:
    """Measure the all-reduce of float32 numbers, as one of the ranks. Rank 0 prints least and median."""
    th.set_num_threads(1)
    th.distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=size)
    vector, seconds = th.ones(numbers), []
    for _ in range(200):
        th.distributed.barrier()
        start = time.perf_counter()
        th.distributed.all_reduce(vector)
        seconds.append(time.perf_counter() - start)
    if rank == 0:
        least, median = min(seconds) * 1e3, statistics.median(seconds) * 1e3
        print(f"all-reduce of {numbers:,} float32 numbers over {size} ranks: least {least:.2f} ms, median {median:.2f} ms")
    th.distributed.destroy_process_group()


def measure_all_reduce(size: int, numbers: int) -> None:
    """Measure the all-reduce of float32 numbers in processes of their own."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        address = f"file://{folder}/rendezvous"
        ranks = [context.Process(target=all_reduce, args=(rank, size, address, numbers)) for rank in range(size)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seq-len", type=int, help="steps of a training sequence; the default is MemoryPPO's choice")
    parser.add_argument("--settings", nargs="*", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--all-reduce", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--iterations", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        train(json.loads(args.worker[0]), args.iterations, Path(args.worker[1]))
        return
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the start")
    for numbers in (2, 100_000, 235_000, 1_000_000) if args.all_reduce else ():
        measure_all_reduce(args.ranks, numbers)
    print("| setting | one process, steps/s | ranks | steps/s | ratio | ratio of CPU time | time in collectives |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for name in args.settings:
        pairs = [[run(name, n, args.iterations, args.seq_len) for n in (1, args.ranks)] for _ in range(args.repeats)]
        one, many = (statistics.median(pair[index]["steps_per_second"] for pair in pairs) for index in (0, 1))
        ratio = statistics.median(pair[1]["steps_per_second"] / pair[0]["steps_per_second"] for pair in pairs)
        cpu = statistics.median(
            args.ranks * pair[1]["steps_per_cpu_second"] / pair[0]["steps_per_cpu_second"] for pair in pairs
        )
        waiting = statistics.median(pair[1]["in_collectives"] for pair in pairs)
        print(f"| {name} | {one:,.0f} | {args.ranks} | {many:,.0f} | {ratio:.2f} | {cpu:.2f} | {waiting:.1%} |", flush=True)
    print(f"load {os.getloadavg()[0]:.1f} at the end")


if __name__ == "__main__":
    main()
