"""
Error of the core of Mamba-2 in fp32 against fp64 on the same numbers, by sequence length and step size.

For each implementation the table shows the largest error of the outputs and the final state, and the largest error of the
gradients. Errors are relative to the largest value if that is above 1. ``stepped`` computes one step after the other,
``chunked`` is the sequence form, and ``official`` are the kernels of ``mamba_ssm`` (on a GPU).
"""

import argparse
from collections.abc import Callable, Iterable
from typing import Any

import torch as th

from sb3_cyborg.ops.ssd import ssd_chunked, ssd_reference
from sb3_cyborg.ops.ssd_official import INSTALL, load_kernels, ssd_official

Ssd = Callable[..., tuple[th.Tensor, th.Tensor]]
STEP_SIZES = (0.01, 0.1, 1.0, 10.0)
"""Medians of the step sizes. The initialization draws values from 0.001 to 0.1."""
WIDTH, STATE_SIZE, RESETS = 32, 32, 0.02


def draw(rows: int, steps: int, heads: int, step_size: float) -> tuple[list[th.Tensor], th.Tensor]:
    """:return: The arguments of the core in fp64, in order, and keep-masks."""
    generator = th.Generator().manual_seed(0)

    def randn(*shape: int) -> th.Tensor:
        # Rounded to fp32, so that both precisions compute with the same numbers.
        return th.randn(shape, generator=generator).double()

    x, b, c = (randn(rows, steps, count, size) for count, size in ((heads, WIDTH), (1, STATE_SIZE), (1, STATE_SIZE)))
    dt = (step_size * th.exp(randn(rows, steps, heads))).float().double()
    a = -(1 + 15 * th.rand(heads, generator=generator)).double()
    masks = th.rand(rows, steps, generator=generator) >= RESETS
    return [x, dt, a, b, c, randn(heads), randn(rows, heads, WIDTH, STATE_SIZE)], masks


def evaluate(function: Ssd, tensors: list[th.Tensor], masks: th.Tensor) -> tuple[list[th.Tensor], list[th.Tensor]]:
    """:return: The results, and the gradients of a fixed linear function of them, in fp64."""
    leaves = [tensor.requires_grad_() for tensor in tensors]
    results = function(*leaves, masks)
    generator = th.Generator().manual_seed(1)
    weights = [th.randn(result.shape, generator=generator).to(result) for result in results]
    gradients = th.autograd.grad(results, leaves, weights)
    return [result.detach().double().cpu() for result in results], [gradient.double().cpu() for gradient in gradients]


def error(got: th.Tensor, want: th.Tensor) -> float:
    """:return: The largest difference, relative to the largest value if that is above 1."""
    return ((got - want).abs().max() / want.abs().max().clamp(min=1)).item()


def error_table(
    functions: dict[str, Ssd], *, steps: Iterable[int], rows: int = 4, heads: int = 8, device: str = "cpu"
) -> list[dict[str, Any]]:
    """
    :param functions: Implementations of the core, by name.
    :param steps: Sequence lengths.
    :param rows: Number of sequences.
    :param heads: Number of heads of width ``WIDTH``.
    :param device: Device of the implementations. The reference is always computed on the CPU.
    :return: A row for each length and step size: ``T``, ``dt``, and two errors for each implementation.
    """
    table = []
    for length in steps:
        for step_size in STEP_SIZES:
            tensors, masks = draw(rows, length, heads, step_size)
            want = evaluate(ssd_chunked, [tensor.clone() for tensor in tensors], masks)
            row: dict[str, Any] = {"T": length, "dt": step_size}
            for name, function in functions.items():
                got = evaluate(function, [tensor.to(device, th.float32) for tensor in tensors], masks.to(device))
                for kind, ours, exact in zip(("output", "gradient"), got, want, strict=True):
                    row[f"{name} {kind}"] = max(error(one, other) for one, other in zip(ours, exact, strict=True))
            table.append(row)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", default=[64, 256, 1024], help="default: %(default)s")
    args = parser.parse_args()
    device = "cuda" if th.cuda.is_available() else "cpu"
    functions: dict[str, Ssd] = {"stepped": ssd_reference, "chunked": ssd_chunked}
    if device == "cuda":
        try:
            load_kernels()
            functions["official"] = ssd_official
        except ImportError:
            print(f"Without the official kernels: {INSTALL}")
    table = error_table(functions, steps=args.steps, device=device)
    print(f"torch {th.__version__} on {device}\n")
    print("| " + " | ".join(table[0]) + " |\n|" + "---:|" * len(table[0]))
    for row in table:
        print(
            "| "
            + " | ".join(
                f"{value:.1e}" if isinstance(value, float) and " " in key else f"{value:g}" for key, value in row.items()
            )
            + " |"
        )


if __name__ == "__main__":
    main()
