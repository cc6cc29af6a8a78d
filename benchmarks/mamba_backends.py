"""
Speed of the Mamba-2 block compared with ``nn.GRU`` and ``nn.LSTM`` of the same width, forward and backward over a sequence.

All layers run in turns. Each figure is the median over the turns of the ratio to the ``nn.GRU`` that ran just before, so other
load on the machine affects all alike. A GPU runs both backends of the block, a CPU the PyTorch one.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch as th
from torch import nn

from sb3_cyborg.encoders.mamba import Mamba2
from sb3_cyborg.ops.ssd_official import load_kernels

CPU_SHAPES = ("16,64,128", "64,64,128", "16,256,128", "16,64,256", "64,64,256")
CUDA_SHAPES = ("64,64,256", "64,256,256", "256,1024,256")
RESETS = 0.02

Turn = Callable[[], None]


def turn(run: Callable[[th.Tensor], th.Tensor], x: th.Tensor, parameters: list[nn.Parameter]) -> Turn:
    """:return: A function that runs forward and backward, with gradients of the input and of all parameters."""

    def once() -> None:
        output = run(x)
        th.autograd.grad(output.sum(), [x, *parameters])

    return once


def contestants(batch_size: int, steps: int, width: int, device: str, args: argparse.Namespace) -> dict[str, Turn]:
    """:return: The functions that run in turns, by name; ``nn.GRU`` is first."""
    x = th.randn(batch_size, steps, width, device=device, requires_grad=True)
    masks = th.rand(batch_size, steps, device=device) >= RESETS
    turns: dict[str, Turn] = {}
    for name, layer in (("nn.GRU", nn.GRU), ("nn.LSTM", nn.LSTM)):
        peer = layer(width, width, batch_first=True).to(device)

        def run_peer(x: th.Tensor, peer: nn.GRU | nn.LSTM = peer) -> th.Tensor:
            output: th.Tensor = peer(x)[0]
            return output

        turns[name] = turn(run_peer, x, list(peer.parameters()))
    backends = ["torch"]
    if device == "cuda":
        load_kernels()  # raises an error with the installation command if they are missing
        backends.append("official")
    for backend in backends:
        for chunk_size in args.chunk_sizes:
            for expand in args.expand:
                for with_resets in (False, True):
                    block = Mamba2(width, expand=expand, chunk_size=chunk_size, mamba_backend=backend).to(device)

                    def run_block(x: th.Tensor, block: Mamba2 = block, masks: th.Tensor | None = masks) -> th.Tensor:
                        return block.forward_sequence(x, block.get_initial_state(len(x)), masks)[0]

                    def run_without(x: th.Tensor, run: Callable[..., th.Tensor] = run_block) -> th.Tensor:
                        return run(x, masks=None)

                    name = f"{backend}, expand {expand}, chunk {chunk_size}{', resets' if with_resets else ''}"
                    turns[name] = turn(run_block if with_resets else run_without, x, list(block.parameters()))
    return turns


def seconds(once: Turn, device: str) -> float:
    if device == "cuda":
        th.cuda.synchronize()
    start = time.perf_counter()
    once()
    if device == "cuda":
        th.cuda.synchronize()
    return time.perf_counter() - start


def measure(turns: dict[str, Turn], device: str, repeats: int) -> tuple[float, dict[str, float]]:
    """:return: Median seconds of the first function, and for each other one the median ratio to the first just before it."""
    first, *others = turns
    for once in turns.values():  # warm-up: allocations, and compilation on a GPU
        seconds(once, device)
    base: list[float] = []
    ratios: dict[str, list[float]] = {name: [] for name in others}
    for _ in range(repeats):
        for name in others:
            base.append(seconds(turns[first], device))
            ratios[name].append(seconds(turns[name], device) / base[-1])
    return statistics.median(base), {name: statistics.median(values) for name, values in ratios.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if th.cuda.is_available() else "cpu")
    parser.add_argument("--shapes", nargs="+", metavar="B,T,D", help=f"default: {CPU_SHAPES}, on a GPU {CUDA_SHAPES}")
    parser.add_argument("--expand", type=int, nargs="+", default=[2, 1], help="default: %(default)s")
    parser.add_argument("--chunk-sizes", type=int, nargs="+", help="default: 32, on a GPU 32 128 256")
    parser.add_argument("--threads", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=11, help="default: %(default)s")
    args = parser.parse_args()
    th.set_num_threads(args.threads)
    on_gpu = args.device == "cuda"
    args.chunk_sizes = args.chunk_sizes or ([32, 128, 256] if on_gpu else [32])
    shapes = args.shapes or (CUDA_SHAPES if on_gpu else CPU_SHAPES)

    columns: dict[str, dict[str, float]] = {}
    for shape in shapes:
        batch_size, steps, width = map(int, shape.split(","))
        th.manual_seed(0)
        turns = contestants(batch_size, steps, width, args.device, args)
        base, ratios = measure(turns, args.device, args.repeats)
        columns[shape] = {"nn.GRU, ms": 1000 * base, **ratios}
    where = th.cuda.get_device_name() if on_gpu else f"{args.threads} threads of a CPU"
    print(f"torch {th.__version__}, {where}; medians of {args.repeats}; ratios to nn.GRU, below 1 is faster\n")
    print("| B,T,d | " + " | ".join(columns) + " |\n|---|" + "---:|" * len(columns))
    for name in next(iter(columns.values())):
        cells = [f"{column[name]:.1f}" if name.endswith("ms") else f"{column[name]:.2f}" for column in columns.values()]
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
