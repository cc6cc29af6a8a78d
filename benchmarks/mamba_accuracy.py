"""
How far fp32 takes the core of Mamba-2 from fp64 on the same numbers, by length and by the size of the steps.

For each way to compute it: the largest error of the outputs and the final state, and of all gradients, relative to the
largest value where that is above one. ``stepped`` is one step after the other, ``chunked`` the sequence form;
``official``, the kernels of ``mamba_ssm``, is added where there is a GPU.
"""

import argparse
from collections.abc import Callable, Iterable
from typing import Any

import torch as th

from sb3_cyborg.ops.ssd import ssd_chunked, ssd_reference
from sb3_cyborg.ops.ssd_official import INSTALL, load_kernels, ssd_official

Ssd = Callable[..., tuple[th.Tensor, th.Tensor]]
STEP_SIZES = (0.01, 0.1, 1.0, 10.0)
"""Medians; initialisation draws from 0.001 to 0.1."""
WIDTH, STATE_SIZE, RESETS = 32, 32, 0.02


def draw(rows: int, steps: int, heads: int, step_size: float) -> tuple[list[th.Tensor], th.Tensor]:
    """:return: Arguments of the core in fp64, in order, and keep-masks."""
    generator = th.Generator().manual_seed(0)

    def randn(*shape: int) -> th.Tensor:
        # To fp32 and back, so that each precision sees the same numbers.
        return th.randn(shape, generator=generator).double()

    x, b, c = (randn(rows, steps, count, size) for count, size in ((heads, WIDTH), (1, STATE_SIZE), (1, STATE_SIZE)))
    dt = (step_size * th.exp(randn(rows, steps, heads))).float().double()
    a = -(1 + 15 * th.rand(heads, generator=generator)).double()
    masks = th.rand(rows, steps, generator=generator) >= RESETS
    return [x, dt, a, b, c, randn(heads), randn(rows, heads, WIDTH, STATE_SIZE)], masks


def evaluate(function: Ssd, tensors: list[th.Tensor], masks: th.Tensor) -> tuple[list[th.Tensor], list[th.Tensor]]:
    """:return: Results, and the gradients of a fixed functional of them, in fp64."""
    leaves = [tensor.requires_grad_() for tensor in tensors]
    results = function(*leaves, masks)
    generator = th.Generator().manual_seed(1)
    weights = [th.randn(result.shape, generator=generator).to(result) for result in results]
    gradients = th.autograd.grad(results, leaves, weights)
    return [result.detach().double().cpu() for result in results], [gradient.double().cpu() for gradient in gradients]


def error(got: th.Tensor, want: th.Tensor) -> float:
    """:return: The largest difference, relative to the largest value where that is above one."""
    return ((got - want).abs().max() / want.abs().max().clamp(min=1)).item()


def error_table(
    functions: dict[str, Ssd], *, steps: Iterable[int], rows: int = 4, heads: int = 8, device: str = "cpu"
) -> list[dict[str, Any]]:
    """
    :param functions: Ways to compute the core, by name.
    :param steps: Lengths.
    :param rows: Sequences.
    :param heads: Heads of ``WIDTH``.
    :param device: Where to compute them; the reference is always computed on the CPU.
    :return: A row for each length and size of steps: ``T``, ``dt``, and two errors for each function.
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
