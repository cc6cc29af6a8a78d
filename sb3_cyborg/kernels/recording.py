"""
Recording of a function of tensors, which is then replayed as one call of compiled code.

A step of acting consists of hundreds of small operations, and calling one from Python takes longer than the operation itself.
:class:`Recorded` runs a function once while a recorder watches PyTorch's operations and the compiled kernels, and writes down
their calls: code, addresses and sizes. Later calls with inputs of the same shapes replay the list.

What depends on the parameters alone (packed weights, for example) is computed again only when a parameter has changed. Random
numbers are drawn by PyTorch, with the same generator and in the same order. Each replay returns new tensors.

A function is recorded only if every operation in it is known; otherwise it runs as it is. It must depend on its inputs and
parameters alone, and must not branch on values: it runs in the select-only form
(:func:`~sb3_cyborg.sequence_model.may_branch`).
"""

import bisect
import ctypes
import logging
import math
import operator
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

import numpy as np
import torch as th
from torch.utils._python_dispatch import TorchDispatchMode

from sb3_cyborg.kernels import primitives
from sb3_cyborg.kernels.library import get
from sb3_cyborg.sequence_model import select_only

logger = logging.getLogger(__name__)

Tensors = dict[str, th.Tensor]
"""Inputs and outputs of a recorded function, by name."""

DIMS = 6
"""Largest number of dimensions of an operation, after adjacent ones have been merged."""

MAX_PROGRAMS = 8
"""Largest number of recordings of one function, one for each set of shapes; further shapes run as they are."""

TOLERANCE = 1e-4
"""Largest difference, relative to max(1, |x|), between the first run and its replay."""

_TYPES = {th.float32: 0, th.int64: 1, th.bool: 2, th.float64: 3, th.uint8: 4, th.int32: 5}
_STORED = (th.float32, th.int64, th.bool)
"""Types that an operation may compute."""

_OPERATIONS = (
    *("copy", "neg", "exp", "log", "log1p", "sqrt", "rsqrt", "reciprocal", "square", "sin", "cos", "tanh", "sigmoid", "silu"),
    *("softplus", "relu", "abs", "not", "add", "sub", "mul", "div", "maximum", "minimum", "eq", "ne", "lt", "le", "gt", "ge"),
    *("and", "or", "where", "addcmul", "clamp", "lerp"),
)
_CODES = {name: code for code, name in enumerate(_OPERATIONS)}
_REDUCTIONS = {name: code for code, name in enumerate(("sum", "mean", "amax", "amin", "any", "all", "argmax"))}

_RANDOM = ("aten.exponential_.default", "aten.normal_.default", "aten.uniform_.default")
"""Random operations whose arguments are numbers; PyTorch runs them before each replay."""


class NotRecordable(Exception):
    """The function contains an operation that cannot be recorded; the message names it."""


class _Kind(Enum):
    INPUT = auto()
    PARAMETER = auto()
    FIXED = auto()  # the same at each call
    CONSTANT = auto()  # computed from parameters
    EMPTY = auto()  # not written yet
    VALUE = auto()  # computed at each call
    UNKNOWN = auto()  # a result that is not replayed


@dataclass(eq=False)
class _Region:
    """Memory of one tensor or of several views of it."""

    start: int
    size: int
    kind: _Kind
    base: int | None = None
    """Index of an input or output in the addresses of a call; ``None`` if the address never changes."""


@dataclass
class _Address:
    region: _Region
    offset: int


_Word = int | _Address
"""An argument of a call."""


@dataclass
class _Call:
    name: str
    words: Sequence[_Word]


class _Recorder(TorchDispatchMode):
    """
    Writes down the operations of a function.

    :param inputs: Inputs of the function.
    :param parameters: Tensors that it reads beside its inputs, which keep their memory.
    """

    def __init__(self, inputs: Iterable[th.Tensor], parameters: Iterable[th.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch gives it no types
        self.calls: list[_Call] = []
        self.constant_calls: list[_Call] = []
        self.random: list[Callable[[], Any]] = []
        self.alive: list[Any] = []
        self._starts: list[int] = []
        self._regions: dict[int, _Region] = {}
        self._packed: dict[tuple[Any, ...], th.Tensor] = {}
        for tensor in parameters:
            self.add(tensor, _Kind.PARAMETER)
        for tensor in inputs:
            self.add(tensor, _Kind.INPUT)

    # --- memory -----------------------------------------------------------------------------------------------------

    def add(self, tensor: th.Tensor, kind: _Kind) -> _Region:
        """
        :param tensor: A tensor that is not known yet.
        :param kind: What its memory holds.
        :return: Its memory.
        """
        storage = tensor.untyped_storage()
        region = _Region(storage.data_ptr(), storage.nbytes(), kind)
        if region.size and region.start not in self._regions:
            self._regions[region.start] = region
            bisect.insort(self._starts, region.start)
        self.alive.append(tensor)
        return self._regions.get(region.start, region)

    def region(self, tensor: th.Tensor) -> _Region:
        """
        :param tensor: A tensor.
        :return: Its memory.
        :raises NotRecordable: for a tensor that is no input, no parameter, and no result of a recorded operation.
        """
        region = self._regions.get(tensor.untyped_storage().data_ptr())
        if region is None:
            raise NotRecordable(f"it reads a tensor of shape {tuple(tensor.shape)} that is neither an input nor a parameter")
        if region.kind is _Kind.UNKNOWN:
            raise NotRecordable("it reads a result that is not computed in a replay")
        return region

    def address(self, tensor: th.Tensor) -> _Address:
        """
        :param tensor: A tensor.
        :return: The address of its first element.
        """
        return _Address(self.region(tensor), tensor.data_ptr() - tensor.untyped_storage().data_ptr())

    def _at(self, pointer: int) -> _Address:
        index = bisect.bisect_right(self._starts, pointer) - 1
        region = self._regions[self._starts[index]] if index >= 0 else None
        if region is None or pointer >= region.start + region.size:
            raise NotRecordable("a kernel reads memory that is neither of an input nor of a parameter")
        return _Address(region, pointer - region.start)

    # --- calls ------------------------------------------------------------------------------------------------------

    def call(self, name: str, words: Sequence[_Word], reads: Sequence[_Region], writes: Sequence[_Region]) -> None:
        """
        Write down a call.

        :param name: Name of the kernel or operation.
        :param words: Its arguments.
        :param reads: Memory that it reads.
        :param writes: Memory that it writes.
        :raises NotRecordable: if it changes an input, a parameter or something that is computed only once.
        """
        changing = any(region.kind in (_Kind.INPUT, _Kind.VALUE) for region in (*reads, *writes))
        for region in writes:
            if region.kind in (_Kind.INPUT, _Kind.PARAMETER, _Kind.FIXED) or (changing and region.kind is _Kind.CONSTANT):
                raise NotRecordable(f"{name} changes an input, a parameter or a constant in place")
            region.kind = _Kind.VALUE if changing else _Kind.CONSTANT
        (self.calls if changing else self.constant_calls).append(_Call(name, words))

    def kernel(self, name: str, types: Sequence[type], args: Sequence[Any]) -> None:
        """
        Write down the call of a compiled kernel.

        :param name: Name of the kernel.
        :param types: ctypes types of the arguments.
        :param args: The arguments.
        """
        words: list[_Word] = []
        regions = []
        for kind, value in zip(types, args, strict=True):
            if kind is ctypes.c_void_p and value:
                address = self._at(value)
                words.append(address)
                regions.append(address.region)
            elif kind is ctypes.c_float:
                words.append(int(np.float32(value).view(np.int32)))
            else:
                words.append(int(value or 0))
        # A kernel reads what has been written before, and writes into new memory.
        writes = [region for region in regions if region.kind is _Kind.EMPTY]
        reads = [region for region in regions if region.kind is not _Kind.EMPTY]
        if any(region.kind is _Kind.UNKNOWN for region in reads):
            raise NotRecordable(f"{name} reads a result that is not computed in a replay")
        if not writes:  # in place
            writes = [region for region in reads if region.kind is _Kind.VALUE]
        # Memory that the kernel may change must not be the result of a computation that runs only once.
        self.call(name, words, reads, writes)

    def describe(self, numbers: Sequence[int]) -> int:
        """
        :param numbers: The description of an operation.
        :return: Address of the numbers as int64.
        """
        array = np.array(numbers, dtype=np.int64)
        self.alive.append(array)
        return int(array.ctypes.data)

    def _number(self, value: float, like: th.Tensor) -> th.Tensor:
        """:return: A number as a tensor, in the precision in which an operation with ``like`` computes."""
        number = th.tensor(value, dtype=th.float32 if like.dtype == th.float32 else th.float64)
        self.add(number, _Kind.FIXED)
        return number

    def elementwise(self, operation: str, out: th.Tensor, *inputs: th.Tensor | float) -> None:
        """
        Write down an operation by element.

        :param operation: One of the operations of ``operations.cpp``.
        :param out: Its result.
        :param inputs: Its one to three inputs, which are broadcast.
        """
        if out.dtype not in _STORED:
            raise NotRecordable(f"{operation} has a result of {out.dtype}")
        like = next((each for each in inputs if isinstance(each, th.Tensor)), out)
        tensors = [each if isinstance(each, th.Tensor) else self._number(each, like) for each in inputs]
        operands = [out, *(tensor.expand(out.shape) for tensor in tensors)]
        if any(operand.dtype not in _TYPES for operand in operands):
            raise NotRecordable(f"{operation} of {[operand.dtype for operand in operands]}")
        shape, strides = _merged(operands)
        empty = [0] * (1 + DIMS)
        described = [[_TYPES[operand.dtype], *_padded(row)] for operand, row in zip(operands, strides, strict=True)]
        described += [empty] * (4 - len(described))
        numbers = [_CODES[operation], len(shape), *_padded(shape), *(number for row in described for number in row)]
        addresses: list[_Word] = [self.address(operand) for operand in operands]
        words: list[_Word] = [self.describe(numbers), *addresses, *[0] * (4 - len(operands))]
        self.call("elementwise", words, [self.region(tensor) for tensor in tensors], [self.region(out)])

    def dense(self, tensor: th.Tensor) -> th.Tensor:
        """
        :param tensor: A tensor.
        :return: The tensor if it is contiguous, otherwise a copy that is; the copy is recorded.
        """
        if tensor.is_contiguous():
            return tensor
        copy = tensor.contiguous()
        self.add(copy, _Kind.EMPTY)
        self.elementwise("copy", copy, tensor)
        return copy

    def product(self, out: th.Tensor, a: th.Tensor, b: th.Tensor, bias: th.Tensor | None) -> None:
        """
        Write down ``out = a b + bias``.

        :param out: (..., M, N), contiguous.
        :param a: (..., M, K).
        :param b: (..., K, N).
        :param bias: (N,), contiguous, or ``None``.
        """
        if any(tensor.dtype != th.float32 for tensor in (out, a, b)) or not out.is_contiguous():
            raise NotRecordable("a product that is not of floats, or whose result is not contiguous")
        depth, columns = b.shape[-2:]
        at_bias: _Word = 0 if bias is None else self.address(bias)
        reads = [self.region(tensor) for tensor in (a, b) if tensor.numel()] + ([] if bias is None else [self.region(bias)])
        if a.dim() == 2 and self.region(b).kind in (_Kind.PARAMETER, _Kind.CONSTANT, _Kind.FIXED):
            a = a if a.stride(1) == 1 and a.stride(0) >= depth else self.dense(a)
            start: list[_Word] = [self.address(a), a.stride(0), self.address(self._pack(b)), at_bias, self.address(out)]
            self.call("affine", [*start, columns, len(a), depth, columns, 0], reads, [self.region(out)])
            return
        a3, b3 = (tensor if tensor.dim() == 3 else tensor.unsqueeze(0) for tensor in (a, b))
        numbers = [len(a3), a3.shape[1], columns, depth, *a3.stride(), *b3.stride()]
        words: list[_Word] = [self.describe(numbers), self.address(a), self.address(b), at_bias, self.address(out)]
        self.call("products", words, reads, [self.region(out)])

    def _pack(self, b: th.Tensor) -> th.Tensor:
        """:return: A constant matrix (K, N) in the layout of ``affine``."""
        key = (b.data_ptr(), b.shape, b.stride())
        if key not in self._packed:
            depth, columns = b.shape
            packed = th.empty(primitives.packed_size(columns, depth))
            self._packed[key] = packed
            region = self.add(packed, _Kind.EMPTY)
            words: list[_Word] = [self.address(b), b.stride(1), b.stride(0), columns, depth, _Address(region, 0)]
            self.call("pack", words, [self.region(b)], [region])
        return self._packed[key]

    # --- PyTorch's operations ---------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = str(func)
        outputs = [each for each in (out if isinstance(out, tuple | list) else (out,)) if isinstance(each, th.Tensor)]
        if len(outputs) == 0:
            raise NotRecordable(f"{name} gives a value to Python")
        if any(each.device.type != "cpu" for each in outputs):
            raise NotRecordable(f"{name} is not on the CPU")
        tensors = list(_tensors(args))
        if name in _RANDOM:
            self.region(out).kind = _Kind.VALUE
            self.random.append(lambda: func(*args, **(kwargs or {})))
            return out
        if name == "aten.lift_fresh.default":  # data from Python
            self.add(out, _Kind.FIXED)
            return out
        if th.Tag.nondeterministic_seeded in func.tags:
            raise NotRecordable(f"{name} has no compiled form")
        starts = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        in_place = name.split(".")[1].endswith("_")
        if not in_place and all(each.untyped_storage().data_ptr() in starts for each in outputs):
            return out  # a view
        if name.startswith(("aten.empty", "aten.new_empty")):
            self.add(out, _Kind.EMPTY)
            return out
        if not in_place and (
            len(tensors) == 0
            or name in _LIKE
            or all(tensor.numel() == 0 or self.region(tensor).kind is _Kind.FIXED for tensor in tensors)
        ):
            for each in outputs:
                self.add(each, _Kind.FIXED)
            return out
        for each in outputs:
            if not in_place:
                self.add(each, _Kind.EMPTY)
        write_down = _TRANSLATIONS.get(name)
        if write_down is None:
            raise NotRecordable(f"{name} has no compiled form")
        if outputs[0].numel():
            write_down(self, out, *args, **(kwargs or {}))
        return out

    def unknown(self, tensor: th.Tensor) -> None:
        """
        Mark a result that is not computed in a replay.

        :param tensor: The result.
        """
        self.region(tensor).kind = _Kind.UNKNOWN


def _tensors(args: Iterable[Any]) -> Iterable[th.Tensor]:
    for each in args:
        if isinstance(each, th.Tensor):
            yield each
        elif isinstance(each, tuple | list):
            yield from _tensors(each)


def _padded(numbers: Sequence[int]) -> list[int]:
    return [*numbers, *[0] * (DIMS - len(numbers))]


def _merged(operands: Sequence[th.Tensor]) -> tuple[list[int], list[list[int]]]:
    """
    Merge the dimensions of operands of equal shapes that are adjacent in the memory of all.

    :return: Shape, and strides of each operand; at least one dimension.
    """
    out = operands[0]
    order = sorted((d for d in range(out.dim()) if out.shape[d] != 1), key=lambda d: -out.stride()[d])
    shape: list[int] = []
    strides: list[list[int]] = [[] for _ in operands]
    for d in order:
        size, steps = out.shape[d], [operand.stride(d) for operand in operands]
        if shape and all(row[-1] == step * size for row, step in zip(strides, steps, strict=True)):
            shape[-1] *= size
            for row, step in zip(strides, steps, strict=True):
                row[-1] = step
        else:
            shape.append(size)
            for row, step in zip(strides, steps, strict=True):
                row.append(step)
    if len(shape) > DIMS:
        raise NotRecordable(f"an operation of {len(shape)} dimensions")
    return (shape or [1]), ([row or [0] for row in strides] if not shape else strides)


# --- translations: the recorder, the result, then the arguments of PyTorch's operation ---------------------------------------


def _scale(name: str, value: Any, wanted: Any) -> None:
    if value != wanted:
        raise NotRecordable(f"{name} with another factor than {wanted}")


def _by_element(operation: str) -> Callable[..., None]:
    def write_down(recorder: _Recorder, out: th.Tensor, *inputs: Any, **kwargs: Any) -> None:
        for value in kwargs.values():
            _scale(operation, value, 1)
        recorder.elementwise(operation, out, *inputs)

    return write_down


def _unary(operation: str) -> Callable[..., None]:
    def write_down(recorder: _Recorder, out: th.Tensor, x: th.Tensor, **_: Any) -> None:
        recorder.elementwise(operation, out, x)

    return write_down


def _alias(recorder: _Recorder, out: th.Tensor, x: th.Tensor, *_: Any, **__: Any) -> None:
    recorder.elementwise("copy", out, x)


def _copy_(recorder: _Recorder, out: th.Tensor, _: th.Tensor, source: th.Tensor, *__: Any) -> None:
    recorder.elementwise("copy", out, source)


def _fill_(recorder: _Recorder, out: th.Tensor, _: th.Tensor, value: Any) -> None:
    recorder.elementwise("copy", out, value)


def _rsub(recorder: _Recorder, out: th.Tensor, x: th.Tensor, other: Any, alpha: float = 1) -> None:
    _scale("rsub", alpha, 1)
    recorder.elementwise("sub", out, other, x)


def _power(recorder: _Recorder, out: th.Tensor, x: th.Tensor, exponent: float) -> None:
    names = {2: "square", 0.5: "sqrt", -0.5: "rsqrt", 1: "copy"}
    if exponent not in names:
        raise NotRecordable(f"a power of {exponent}")
    recorder.elementwise(names[exponent], out, x)


def _clamp(recorder: _Recorder, out: th.Tensor, x: th.Tensor, low: Any = None, high: Any = None) -> None:
    recorder.elementwise("clamp", out, x, -math.inf if low is None else low, math.inf if high is None else high)


def _clamp_min(recorder: _Recorder, out: th.Tensor, x: th.Tensor, low: Any) -> None:
    recorder.elementwise("maximum", out, x, low)


def _softplus(recorder: _Recorder, out: th.Tensor, x: th.Tensor, beta: float = 1, threshold: float = 20) -> None:
    _scale("softplus", (beta, threshold), (1, 20))
    recorder.elementwise("softplus", out, x)


def _cat(recorder: _Recorder, out: th.Tensor, tensors: Sequence[th.Tensor], dim: int = 0) -> None:
    parts = [tensor for tensor in tensors if tensor.numel()]
    if any(recorder.region(part).kind in (_Kind.INPUT, _Kind.VALUE) for part in parts):
        recorder.region(out).kind = _Kind.VALUE
    start = 0
    for part in parts:
        recorder.elementwise("copy", out.narrow(dim, start, part.shape[dim]), part)
        start += part.shape[dim]


def _stack(recorder: _Recorder, out: th.Tensor, tensors: Sequence[th.Tensor], dim: int = 0) -> None:
    _cat(recorder, out, [tensor.unsqueeze(dim) for tensor in tensors], dim)


def _flip(recorder: _Recorder, out: th.Tensor, x: th.Tensor, dims: Sequence[int]) -> None:
    # Copied backwards: PyTorch has no tensors with negative strides.
    dim = dims[0] % x.dim()
    if len(dims) != 1:
        raise NotRecordable("flip of several dimensions")
    if recorder.region(x).kind in (_Kind.INPUT, _Kind.VALUE):
        recorder.region(out).kind = _Kind.VALUE
    for index in range(x.shape[dim]):
        recorder.elementwise("copy", out.select(dim, index), x.select(dim, x.shape[dim] - 1 - index))


def _reduction(name: str) -> Callable[..., None]:
    def write_down(
        recorder: _Recorder, out: th.Tensor, x: th.Tensor, dims: Any = None, keepdim: bool = False, **kwargs: Any
    ) -> None:
        dims = range(x.dim()) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
        reduced = [dim % max(x.dim(), 1) for dim in dims]
        kept = [dim for dim in range(x.dim()) if dim not in reduced]
        if x.dim() > DIMS or x.dtype not in _TYPES or out.dtype not in _STORED or not out.is_contiguous():
            raise NotRecordable(f"{name} of {x.dtype} over {len(reduced)} of {x.dim()} dimensions")
        if name == "argmax" and len(reduced) != 1:
            raise NotRecordable("argmax over several dimensions")
        numbers = [_REDUCTIONS[name], _TYPES[x.dtype], _TYPES[out.dtype]]
        for chosen in (kept, reduced):
            numbers += [len(chosen), *_padded([x.shape[d] for d in chosen]), *_padded([x.stride(d) for d in chosen])]
        words: list[_Word] = [recorder.describe(numbers), recorder.address(x), recorder.address(out)]
        recorder.call("reduce", words, [recorder.region(x)], [recorder.region(out)])

    return write_down


def _softmax(logarithm: bool) -> Callable[..., None]:
    def write_down(recorder: _Recorder, out: th.Tensor, x: th.Tensor, dim: int, _: bool) -> None:
        if dim % x.dim() != x.dim() - 1 or x.dtype != th.float32 or not out.is_contiguous():
            raise NotRecordable("softmax of another dimension than the last, or not of floats")
        x = recorder.dense(x)
        words: list[_Word] = [
            recorder.address(x),
            recorder.address(out),
            x.numel() // x.shape[-1],
            x.shape[-1],
            int(logarithm),
        ]
        recorder.call("softmax", words, [recorder.region(x)], [recorder.region(out)])

    return write_down


def _gather(recorder: _Recorder, out: th.Tensor, x: th.Tensor, dim: int, index: th.Tensor, **_: Any) -> None:
    if dim % x.dim() != x.dim() - 1 or x.shape[:-1] != index.shape[:-1] or not out.is_contiguous():
        raise NotRecordable("gather of another dimension than the last")
    x, index = recorder.dense(x), recorder.dense(index)
    sizes = [index.numel() // index.shape[-1], x.shape[-1], index.shape[-1], x.element_size()]
    words: list[_Word] = [recorder.address(x), recorder.address(index), recorder.address(out), *sizes]
    recorder.call("gather", words, [recorder.region(x), recorder.region(index)], [recorder.region(out)])


def _addmm(
    recorder: _Recorder, out: th.Tensor, bias: th.Tensor, a: th.Tensor, b: th.Tensor, beta: float = 1, alpha: float = 1
) -> None:
    _scale("addmm", (beta, alpha), (1, 1))
    if bias.dim() != 1 or not bias.is_contiguous():
        raise NotRecordable("addmm with a matrix as its bias")
    recorder.product(out, a, b, bias)


def _mm(recorder: _Recorder, out: th.Tensor, a: th.Tensor, b: th.Tensor) -> None:
    recorder.product(out, a, b, None)


def _layer_norm(
    recorder: _Recorder,
    out: tuple[th.Tensor, ...],
    x: th.Tensor,
    shape: Sequence[int],
    weight: th.Tensor | None,
    bias: th.Tensor | None,
    eps: float,
) -> None:
    if len(shape) != 1 or x.dtype != th.float32:
        raise NotRecordable("a layer norm over several dimensions, or not of floats")
    if weight is None:
        recorder.add(weight := th.ones(shape[0]), _Kind.FIXED)
    if bias is None:
        recorder.add(bias := th.zeros(shape[0]), _Kind.FIXED)
    x = recorder.dense(x)
    tensors = x, weight, bias, out[0]
    words: list[_Word] = [recorder.address(tensor) for tensor in tensors]
    words += [x.numel() // x.shape[-1], x.shape[-1], int(np.float32(eps).view(np.int32)), 0]
    recorder.call("layer_norm", words, [recorder.region(tensor) for tensor in tensors[:3]], [recorder.region(out[0])])
    for rest in out[1:]:
        recorder.unknown(rest)


def _translations() -> dict[str, Callable[..., None]]:
    table: dict[str, Callable[..., None]] = {}
    for name in _OPERATIONS[1 : _OPERATIONS.index("not")]:
        table[f"aten.{name}.default"] = table[f"aten.{name}_.default"] = _unary(name)
    for name, operation in {"bitwise_not": "not", "logical_not": "not"}.items():
        table[f"aten.{name}.default"] = _unary(operation)
    for name in ("add", "sub", "mul", "div"):
        for form in ("Tensor", "Scalar"):
            table[f"aten.{name}.{form}"] = table[f"aten.{name}_.{form}"] = _by_element(name)
    for name in ("eq", "ne", "lt", "le", "gt", "ge"):
        table[f"aten.{name}.Tensor"] = table[f"aten.{name}.Scalar"] = _by_element(name)
    for name, operation in {"bitwise_and": "and", "bitwise_or": "or"}.items():
        table[f"aten.{name}.Tensor"] = _only_bools(operation)
    for name, operation in {"logical_and": "and", "logical_or": "or", "maximum": "maximum", "minimum": "minimum"}.items():
        table[f"aten.{name}.default"] = _by_element(operation)
    table |= {
        "aten.where.self": _by_element("where"),
        "aten.addcmul.default": _by_element("addcmul"),
        "aten.lerp.Tensor": _by_element("lerp"),
        "aten.lerp.Scalar": _by_element("lerp"),
        "aten.rsub.Scalar": _rsub,
        "aten.rsub.Tensor": _rsub,
        "aten.pow.Tensor_Scalar": _power,
        "aten.clamp.default": _clamp,
        "aten.clamp_min.default": _clamp_min,
        "aten.softplus.default": _softplus,
        "aten._to_copy.default": _alias,
        "aten.clone.default": _alias,
        "aten.copy_.default": _copy_,
        "aten.fill_.Scalar": _fill_,
        "aten.zero_.default": lambda recorder, out, x: recorder.elementwise("copy", out, 0.0),
        "aten.cat.default": _cat,
        "aten.stack.default": _stack,
        "aten.flip.default": _flip,
        "aten.sum.dim_IntList": _reduction("sum"),
        "aten.sum.default": _reduction("sum"),
        "aten.mean.dim": _reduction("mean"),
        "aten.mean.default": _reduction("mean"),
        "aten.amax.default": _reduction("amax"),
        "aten.amin.default": _reduction("amin"),
        "aten.any.dim": _reduction("any"),
        "aten.all.dim": _reduction("all"),
        "aten.argmax.default": _reduction("argmax"),
        "aten._softmax.default": _softmax(logarithm=False),
        "aten._log_softmax.default": _softmax(logarithm=True),
        "aten.gather.default": _gather,
        "aten.addmm.default": _addmm,
        "aten.mm.default": _mm,
        "aten.bmm.default": _mm,
        "aten.native_layer_norm.default": _layer_norm,
    }
    return table


def _only_bools(operation: str) -> Callable[..., None]:
    def write_down(recorder: _Recorder, out: th.Tensor, *inputs: Any) -> None:
        if out.dtype != th.bool:
            raise NotRecordable(f"a bitwise {operation} of {out.dtype}")
        recorder.elementwise(operation, out, *inputs)

    return write_down


_TRANSLATIONS = _translations()
_LIKE = {f"aten.{name}.default" for name in ("zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full")}
"""Operations that read only the shape of their argument."""


# --- replay ------------------------------------------------------------------------------------------------------------------


@dataclass
class _Slot:
    """An input or output of a program."""

    name: str
    shape: th.Size
    stride: tuple[int, ...]
    dtype: th.dtype


class _CallStruct(ctypes.Structure):
    _fields_ = (("thunk", ctypes.c_void_p), ("words", ctypes.c_void_p))


class _PatchStruct(ctypes.Structure):
    _fields_ = (("word", ctypes.c_void_p), ("base", ctypes.c_int64), ("offset", ctypes.c_int64))


@dataclass
class _Tape:
    """A list of calls in the form of the compiled replay."""

    calls: Any
    patches: Any
    words: np.ndarray = field(repr=False)

    @classmethod
    def of(cls, calls: Sequence[_Call]) -> "_Tape":
        """
        :param calls: Calls.
        :return: The calls, with addresses of inputs and outputs left open.
        """
        words = np.zeros(sum(len(call.words) for call in calls) + 1, dtype=np.int64)
        start, structs, patches = 0, [], []
        for call in calls:
            at = int(words.ctypes.data) + 8 * start
            structs.append(_CallStruct(_thunk(call.name), at))
            for index, word in enumerate(call.words):
                if isinstance(word, int):
                    words[start + index] = word
                elif word.region.base is None:
                    words[start + index] = word.region.start + word.offset
                else:
                    patches.append(_PatchStruct(at + 8 * index, word.region.base, word.offset))
            start += len(call.words)
        return cls((_CallStruct * len(structs))(*structs), (_PatchStruct * len(patches))(*patches), words)

    def replay(self, bases: Any) -> None:
        """
        :param bases: Addresses of inputs and outputs.
        """
        _replay()(self.calls, len(self.calls), self.patches, len(self.patches), bases)


def _thunk(name: str) -> int | None:
    function: Any = get(f"{name}_thunk", [ctypes.c_void_p])
    return ctypes.cast(function, ctypes.c_void_p).value


_replay_function: Callable[..., Any] | None = None


def _replay() -> Callable[..., Any]:
    global _replay_function
    if _replay_function is None:
        pointer, size = ctypes.c_void_p, ctypes.c_int64
        _replay_function = get("replay", [pointer, size, pointer, size, pointer])
    return _replay_function


class _Program:
    """
    The recording of a function for inputs of certain shapes.

    :param function: The function.
    :param inputs: Inputs, with which it is run.
    :param parameters: Tensors that it reads beside its inputs.
    :raises NotRecordable: if it cannot be recorded.
    """

    def __init__(self, function: Callable[[Tensors], Tensors], inputs: Tensors, parameters: Sequence[th.Tensor]) -> None:
        # Copies have memory of their own, and they are not overwritten by the function's caller.
        inputs = {name: tensor.clone() for name, tensor in inputs.items()}
        recorder = _Recorder(inputs.values(), parameters)
        with th.inference_mode(False), th.no_grad(), select_only(), recorder, primitives.recording(recorder):
            outputs = function(inputs)
        self.first_outputs = {name: tensor.clone() for name, tensor in outputs.items()}  # replays write to the same memory
        self._inputs = [_slot(name, tensor) for name, tensor in inputs.items()]
        self._outputs = [_slot(name, tensor) for name, tensor in outputs.items()]
        self._random = recorder.random
        for base, tensor in enumerate(inputs.values()):
            if tensor.numel():
                recorder.region(tensor).base = base
        with th.inference_mode(False):
            for base, (name, tensor) in enumerate(outputs.items(), start=len(inputs)):
                self._open(recorder, base, name, tensor)
        self._bases = (ctypes.c_int64 * (len(inputs) + len(outputs)))()
        self._constants, self._steps = _Tape.of(recorder.constant_calls), _Tape.of(recorder.calls)
        self._alive = recorder.alive

    def _open(self, recorder: _Recorder, base: int, name: str, tensor: th.Tensor) -> None:
        """Let an output have memory of its own at each call."""
        slot = self._outputs[base - len(self._inputs)]
        if tensor.numel() == 0:
            return
        region = recorder.region(tensor)
        whole = region.kind is _Kind.VALUE and region.base is None and region.size == tensor.numel() * tensor.element_size()
        if not whole or tensor.stride() != slot.stride:
            copy = th.empty_strided(slot.shape, slot.stride, dtype=slot.dtype)
            region = recorder.add(copy, _Kind.EMPTY)
            recorder.elementwise("copy", copy, tensor)
            if region.kind is _Kind.CONSTANT:
                raise NotRecordable(f"its result {name!r} does not depend on its inputs")
        region.base = base

    def refresh(self) -> None:
        """Compute again what depends on the parameters alone."""
        self._constants.replay(self._bases)

    def __call__(self, inputs: Tensors, draw: bool = True) -> Tensors:
        """
        Replay the recording.

        :param inputs: Inputs.
        :param draw: Whether to draw new random numbers.
        :return: The outputs, new tensors.
        """
        bases, copies = self._bases, []
        for base, slot in enumerate(self._inputs):
            tensor = inputs[slot.name]
            if tensor.stride() != slot.stride:
                tensor = th.empty_strided(slot.shape, slot.stride, dtype=slot.dtype).copy_(tensor)
                copies.append(tensor)  # lives until the replay has ended
            bases[base] = tensor.data_ptr()
        outputs = {}
        for base, slot in enumerate(self._outputs, start=len(self._inputs)):
            outputs[slot.name] = tensor = th.empty_strided(slot.shape, slot.stride, dtype=slot.dtype)
            bases[base] = tensor.data_ptr()
        if draw:
            for random in self._random:
                random()
        self._steps.replay(bases)
        return outputs

    def fits(self, inputs: Tensors) -> bool:
        """
        :param inputs: Inputs.
        :return: Whether they have the recorded names, shapes and types.
        """
        if len(inputs) != len(self._inputs):
            return False
        for slot in self._inputs:
            tensor = inputs.get(slot.name)
            if tensor is None or tensor.shape != slot.shape or tensor.dtype != slot.dtype:
                return False
        return True


def _slot(name: str, tensor: th.Tensor) -> _Slot:
    dense = sorted((step, size) for step, size in zip(tensor.stride(), tensor.shape, strict=True) if size != 1)
    expected, overlaps = 1, False
    for step, size in dense:
        overlaps = overlaps or step != expected
        expected *= size
    stride = tensor.stride() if not overlaps else th.empty(tensor.shape, device="meta").stride()
    return _Slot(name, tensor.shape, tuple(stride), tensor.dtype)


_memory_of, _version_of = th.Tensor.data_ptr, operator.attrgetter("_version")


class Recorded:
    """
    A function of tensors that is recorded at its first call with inputs of each shape, and replayed afterwards.

    :param function: The function, from tensors by name to tensors by name.
    :param parameters: Returns the tensors that it reads beside its inputs, at each call: it must be fast. They may change in
        place between calls. With tensors of other memory the function is recorded again.
    """

    def __init__(self, function: Callable[[Tensors], Tensors], parameters: Callable[[], Iterable[th.Tensor]]) -> None:
        self._function, self._parameters = function, parameters
        self._lock = threading.Lock()
        self._programs: list[_Program] = []
        self._kept: list[th.Tensor] = []
        self._memory: list[int] = []
        self._versions: list[int] = []
        self.reason = ""
        """Why the function is not recorded; empty if it is."""

    def __call__(self, inputs: Tensors) -> Tensors | None:
        """
        :param inputs: Inputs of the function, on the CPU.
        :return: Its outputs; ``None`` if it is not recorded, and while another thread replays it: a recording has one memory.
        """
        if self.reason or not self._lock.acquire(blocking=False):
            return None
        try:
            return self._run(inputs)
        finally:
            self._lock.release()

    def _run(self, inputs: Tensors) -> Tensors | None:
        tensors = list(self._parameters())
        memory = list(map(_memory_of, tensors))
        if memory != self._memory:
            self._programs.clear()
            # The memory is kept alive, so that no other tensor can have the same address.
            self._memory, self._kept = memory, [tensor.detach() for tensor in tensors]
        versions = [primitives.optimizer_steps(), *map(_version_of, tensors)]
        if versions != self._versions:
            self._versions = versions
            for program in self._programs:
                program.refresh()
        for program in self._programs:
            if program.fits(inputs):
                return program(inputs)
        return self._record(inputs)

    def _record(self, inputs: Tensors) -> Tensors | None:
        if len(self._programs) >= MAX_PROGRAMS:
            return None
        random_state = th.get_rng_state()
        try:
            program = _Program(self._function, inputs, self._kept)
            program.refresh()
            outputs = program(inputs, draw=False)  # as all later calls round
            _compare(outputs, program.first_outputs)
        except NotRecordable as error:
            self.reason = str(error)
            th.set_rng_state(random_state)  # the function will run again
            return None
        program.first_outputs = {}
        self._programs.append(program)
        return outputs


def _compare(replayed: Tensors, first: Tensors) -> None:
    """:raises NotRecordable: if a replay differs from the first run."""
    for name, wanted in first.items():
        got = replayed[name].double()
        wanted = wanted.double()
        close = (got - wanted).abs() <= TOLERANCE * wanted.abs().clamp(min=1.0)
        if not (close | (got == wanted) | (got.isnan() & wanted.isnan())).all():
            raise NotRecordable(f"its replay has another {name!r} than the function")
