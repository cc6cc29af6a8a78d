"""
The compiled kernels as functions of tensors.

Each function here is a faster form of operations that exist in PyTorch; the module that calls it has both forms and asks
:func:`usable` or :func:`usable_without_gradient` which one applies.
"""

import ctypes
import functools
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch as th
from torch.optim.optimizer import register_optimizer_step_post_hook

from sb3_cyborg.kernels.library import get, status
from sb3_cyborg.sequence_model import may_branch

NO_ACTIVATION, TANH, RELU, SILU = range(4)
"""Activations that :func:`affine` applies to its result."""

_P, _I, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_CODE = ctypes.c_int32


class CallRecorder(Protocol):
    """An object that writes down the calls of kernels, see :func:`recording`."""

    def kernel(self, name: str, types: Sequence[type], args: Sequence[Any]) -> None:
        """
        :param name: Name of the kernel.
        :param types: ctypes types of its arguments.
        :param args: Its arguments.
        """


class _Recording(threading.local):
    """The recorder of this thread; a recording must not contain the calls of another one."""

    recorder: CallRecorder | None = None


_recording = _Recording()


@contextmanager
def recording(recorder: CallRecorder) -> Iterator[None]:
    """
    A context in which this thread's calls of kernels are written down, and kernels run also in the select-only form.

    :param recorder: Writes down the calls.
    """
    _recording.recorder = recorder
    try:
        yield
    finally:
        _recording.recorder = None


class _Kernels:
    """The C functions by name, each looked up and typed at its first use."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        argtypes, restype = _SIGNATURES[name]
        function = get(name, argtypes, restype)
        if restype is not None:  # a size
            setattr(self, name, function)
            return function

        def call(*args: Any) -> None:
            recorder = _recording.recorder
            if recorder is not None:
                recorder.kernel(name, argtypes, args)
            function(*args)

        setattr(self, name, call)
        return call


_SIGNATURES: dict[str, tuple[list[type], type | None]] = {
    "packed_size": ([_I] * 2, _I),
    "pack": ([_P, *[_I] * 4, _P], None),
    "packed_gates_size": ([_I] * 2, _I),
    "pack_gates": ([_P, _I, _I, _P], None),
    "affine": ([_P, _I, *[_P] * 3, *[_I] * 4, _CODE], None),
    "layer_norm": ([*[_P] * 4, _I, _I, _F, _CODE], None),
    "rms_norm": ([_P, _P, _I, _I, _F], None),
    "gru_forward": ([*[_P] * 7, *[_I] * 3], None),
    "gru_backward": ([*[_P] * 9, *[_I] * 3], None),
    "lstm_forward": ([*[_P] * 7, *[_I] * 3], None),
    "lstm_backward": ([*[_P] * 8, *[_I] * 3], None),
    "window_scratch": ([_I] * 4, _I),
    "window_forward": ([*[_P] * 3, *[_I] * 4, *[_P] * 12, *[_I] * 7], None),
    "window_backward": ([*[_P] * 3, *[_I] * 4, *[_P] * 20, *[_I] * 7], None),
    "attend_projected": ([*[_P] * 12, *[_I] * 6], None),
    "ring_step": ([*[_P] * 17, *[_I] * 6], None),
    "shift": ([*[_P] * 4, *[_I] * 3], None),
    "kv_step": ([*[_P] * 10, *[_I] * 4], None),
    "pmm_forward": ([*[_P] * 17, *[_I] * 5, _F], None),
    "pmm_backward": ([*[_P] * 15, *[_I] * 5], None),
    "conv_forward": ([_P, _I, *[_P] * 6, *[_I] * 4, _CODE], None),
    "conv_backward": ([_P, _I, *[_P] * 10, *[_I] * 4, _CODE], None),
    "ssd_saved_size": ([_I] * 5, _I),
    "ssd_scratch_size": ([_I] * 3, _I),
    "ssd_forward": ([_P, _I, _P, _P, *[_P, _I] * 2, *[_P] * 7, *[_I] * 6], None),
    "ssd_backward": ([_P, _I, _P, _P, *[_P, _I] * 2, *[_P] * 13, *[_I] * 6], None),
    "gated_norm": ([*[_P] * 2, _I, *[_P] * 3, *[_I] * 3, _F], None),
    "gated_norm_backward": ([*[_P] * 2, _I, *[_P] * 6, *[_I] * 3], None),
}
"""Types of the arguments of each kernel, and of its result."""

_kernels = _Kernels()


@functools.cache
def _available() -> bool:
    return status().isa is not None


def _is_recording() -> bool:
    return not th.compiler.is_compiling() and _recording.recorder is not None


def usable(*tensors: th.Tensor) -> bool:
    """
    :param tensors: Inputs of a kernel, on one device.
    :return: Whether the kernels are loaded and the inputs are of single precision, on a CPU, in eager mode.
    """
    # An export calls `may_branch` first, so that it does not trace how the library is found.
    if not (may_branch(tensors[0].device) or _is_recording()) or not _available() or th.is_autocast_enabled("cpu"):
        return False
    for tensor in tensors:  # noqa: SIM110  # a generator takes twice as long
        if tensor.dtype != th.float32:
            return False
    return True


def usable_without_gradient(*tensors: th.Tensor) -> bool:
    """
    :param tensors: Inputs of a kernel that has no backward.
    :return: :func:`usable`, and no gradient is recorded.
    """
    return not th.is_grad_enabled() and usable(*tensors)


def _pointer(tensor: th.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


_optimizer_steps = 0


def _count_step(*_: Any) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


# A fused optimizer changes weights without a new version of their tensors.
register_optimizer_step_post_hook(_count_step)


class Packed:
    """
    A weight in the layout of the kernels, packed again when the weight has changed.

    A change is recognized by the tensor's version, by its memory, and by a step of any optimizer. Writing into ``weight.data``
    in place is none of them; call :func:`forget_packed` after it.

    :param pack: Packs the weight.
    """

    def __init__(self, pack: Callable[[th.Tensor], th.Tensor]) -> None:
        self._pack = pack
        self._key: tuple[int, int, int] | None = None
        self._weight: th.Tensor | None = None
        self._packed: th.Tensor | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "Packed":
        return Packed(self._pack)

    def __getstate__(self) -> dict[str, Any]:
        return {"_pack": self._pack, "_key": None, "_weight": None, "_packed": None}

    def __call__(self, weight: th.Tensor) -> th.Tensor:
        """
        :param weight: The weight; always the same parameter.
        :return: It in the layout of the kernels.
        """
        if _recording.recorder is not None:  # the recording packs it when the weight has changed
            return self._pack(weight.detach())
        key = weight.data_ptr(), weight._version, _optimizer_steps
        if key != self._key or self._packed is None:
            # The memory is kept alive, so that no other weight can have the same address.
            self._key, self._weight, self._packed = key, weight.detach(), self._pack(weight.detach())
        return self._packed


def forget_packed() -> None:
    """Pack all weights again at their next use."""
    _count_step()


def optimizer_steps() -> int:
    """:return: Number of steps of all optimizers in this process so far."""
    return _optimizer_steps


def packed_size(columns: int, depth: int) -> int:
    """
    :param columns: N.
    :param depth: K.
    :return: Number of floats of :func:`pack`'s result for a weight (N, K).
    """
    return int(_kernels.packed_size(columns, depth))


def pack(weight: th.Tensor) -> th.Tensor:
    """
    :param weight: (N, K), of any strides.
    :return: The weight in the layout of :func:`affine`.
    """
    columns, depth = weight.shape
    size = _kernels.packed_size(columns, depth)
    packed = th.empty(size)
    _kernels.pack(weight.data_ptr(), weight.stride(0), weight.stride(1), columns, depth, packed.data_ptr())
    return packed


def pack_gates(weight: th.Tensor, num_gates: int) -> th.Tensor:
    """
    :param weight: Recurrent weights, (num_gates * H, H).
    :param num_gates: Number of gates.
    :return: The weight in the layout of the recurrent kernels.
    """
    size = weight.shape[1]
    packed = th.empty(_kernels.packed_gates_size(num_gates, size))
    _kernels.pack_gates(weight.contiguous().data_ptr(), num_gates, size, packed.data_ptr())
    return packed


def pack_heads(weight: th.Tensor, num_heads: int, transposed: bool) -> th.Tensor:
    """
    Pack the weight of each head by itself, for :func:`attend_projected` and :func:`ring_step`.

    :param weight: (H d, E).
    :param num_heads: H.
    :param transposed: Whether the product is from d to E features, as for keys, or from E to d, as for values.
    :return: The packed weights of the heads, one after the other.
    """
    by_head = weight.unflatten(0, (num_heads, -1))
    return th.cat([pack(head.t() if transposed else head) for head in by_head])


def affine(
    x: th.Tensor, packed: th.Tensor, columns: int, bias: th.Tensor | None, activation: int = NO_ACTIVATION
) -> th.Tensor:
    """
    ``activation(x W^T + b)``.

    :param x: (..., K).
    :param packed: W (N, K), packed.
    :param columns: N.
    :param bias: (N,), or ``None``.
    :param activation: One of the activations of this module.
    :return: (..., N).
    """
    depth = x.shape[-1]
    if x.dim() != 2 or x.stride(1) != 1:
        x = x.contiguous()
    rows = x.numel() // depth
    stride = x.stride(0) if x.dim() == 2 and rows > 1 else depth
    y = th.empty((*x.shape[:-1], columns))
    _kernels.affine(
        *(x.data_ptr(), stride, packed.data_ptr(), None if bias is None else bias.data_ptr(), y.data_ptr()),
        *(columns, rows, depth, columns, activation),
    )
    return y


def layer_norm(x: th.Tensor, weight: th.Tensor, bias: th.Tensor, eps: float, silu: bool = False) -> th.Tensor:
    """
    :param x: (..., D).
    :param weight: (D,).
    :param bias: (D,).
    :param eps: Added to the variance.
    :param silu: Whether SiLU follows.
    :return: Normalized rows, (..., D).
    """
    x = x.contiguous()
    y = th.empty_like(x)
    _kernels.layer_norm(
        *(x.data_ptr(), weight.data_ptr(), bias.data_ptr(), y.data_ptr()),
        *(x.numel() // x.shape[-1], x.shape[-1], eps, silu),
    )
    return y


def rms_norm(x: th.Tensor, eps: float) -> th.Tensor:
    """
    :param x: (..., D).
    :param eps: Added to the mean square.
    :return: Rows with root mean square 1, (..., D).
    """
    x = x.contiguous()
    y = th.empty_like(x)
    _kernels.rms_norm(x.data_ptr(), y.data_ptr(), x.numel() // x.shape[-1], x.shape[-1], eps)
    return y


def gru_forward(
    gates: th.Tensor, first: th.Tensor, packed: th.Tensor, bias: th.Tensor, keep: th.Tensor | None
) -> tuple[th.Tensor, th.Tensor]:
    """
    A GRU over a sequence.

    :param gates: The inputs' part of the gates (reset, update, new) with its bias, (T, B, 3 H), contiguous; overwritten
        with the activated gates.
    :param first: First state, (B, H).
    :param packed: Recurrent weights, packed by :func:`pack_gates`.
    :param bias: Bias of the recurrent part, (3 H,).
    :param keep: Keep-masks, bool, (T, B), or ``None``.
    :return: States, the first included, (T + 1, B, H), and the recurrent part of the new gate, (T, B, H).
    """
    steps, rows, size = gates.shape[0], *first.shape
    keep = None if keep is None else keep.contiguous()
    states, new_h, scratch = th.empty(steps + 1, rows, size), th.empty(steps, rows, size), th.empty(rows, size)
    states[0] = first
    _kernels.gru_forward(
        *(gates.data_ptr(), states.data_ptr(), packed.data_ptr(), bias.data_ptr(), new_h.data_ptr()),
        *(_pointer(keep), scratch.data_ptr(), steps, rows, size),
    )
    return states, new_h


def gru_backward(
    gates: th.Tensor, states: th.Tensor, new_h: th.Tensor, packed: th.Tensor, grad: th.Tensor, keep: th.Tensor | None
) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
    """
    Backward of :func:`gru_forward`.

    :param gates: Activated gates, (T, B, 3 H).
    :param states: (T + 1, B, H).
    :param new_h: (T, B, H).
    :param packed: The transposed recurrent weights (H, 3 H), packed by :func:`pack`.
    :param grad: Gradient of the states after each step, (T, B, H).
    :param keep: Keep-masks, bool, (T, B), or ``None``.
    :return: Gradient of the first state (B, H), of the gates' pre-activations, of the new gate its recurrent part (T, B, 3 H),
        and of the input part of the new gate (T, B, H).
    """
    steps, rows, size = grad.shape
    keep = None if keep is None else keep.contiguous()
    grad_h = th.cat([grad.new_zeros(1, rows, size), grad])
    grad_gates, grad_new, scratch = th.empty_like(gates), th.empty_like(new_h), th.empty(2, rows, size)
    _kernels.gru_backward(
        *(gates.data_ptr(), states.data_ptr(), new_h.data_ptr(), packed.data_ptr(), grad_h.data_ptr()),
        *(grad_gates.data_ptr(), grad_new.data_ptr(), _pointer(keep), scratch.data_ptr(), steps, rows, size),
    )
    return grad_h[0], grad_gates, grad_new


def lstm_forward(
    gates: th.Tensor,
    first: th.Tensor,
    first_cell: th.Tensor,
    packed: th.Tensor,
    bias: th.Tensor,
    keep: th.Tensor | None,
) -> tuple[th.Tensor, th.Tensor]:
    """
    An LSTM over a sequence.

    :param gates: The inputs' part of the gates (input, forget, cell, output) with its bias, (T, B, 4 H), contiguous;
        overwritten with the activated gates.
    :param first: First hidden state, (B, H).
    :param first_cell: First cell state, (B, H).
    :param packed: Recurrent weights, packed by :func:`pack_gates`.
    :param bias: Bias of the recurrent part, (4 H,).
    :param keep: Keep-masks, bool, (T, B), or ``None``.
    :return: Hidden states and cell states, the first included, (T + 1, B, H).
    """
    steps, rows, size = gates.shape[0], *first.shape
    keep = None if keep is None else keep.contiguous()
    states, cells = th.empty(steps + 1, rows, size), th.empty(steps + 1, rows, size)
    states[0], cells[0] = first, first_cell
    scratch = th.empty(2, rows, size)
    _kernels.lstm_forward(
        *map(_pointer, (gates, states, cells, packed, bias, keep, scratch)),
        *(steps, rows, size),
    )
    return states, cells


def lstm_backward(
    gates: th.Tensor,
    cells: th.Tensor,
    packed: th.Tensor,
    grad: th.Tensor,
    grad_cell: th.Tensor,
    keep: th.Tensor | None,
) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
    """
    Backward of :func:`lstm_forward`.

    :param gates: Activated gates, (T, B, 4 H).
    :param cells: Cell states, (T + 1, B, H).
    :param packed: The transposed recurrent weights (H, 4 H), packed by :func:`pack`.
    :param grad: Gradient of the hidden states after each step, (T, B, H).
    :param grad_cell: Gradient of the last cell state, (B, H).
    :param keep: Keep-masks, bool, (T, B), or ``None``.
    :return: Gradients of the first hidden state and the first cell state (B, H), and of the gates' pre-activations
        (T, B, 4 H).
    """
    steps, rows, size = grad.shape
    keep = None if keep is None else keep.contiguous()
    grad_h, grad_c = th.cat([grad.new_zeros(1, rows, size), grad]), grad_cell.clone(memory_format=th.contiguous_format)
    grad_gates, scratch = th.empty_like(gates), th.empty(2, rows, size)
    _kernels.lstm_backward(
        *(gates.data_ptr(), cells.data_ptr(), packed.data_ptr(), grad_h.data_ptr(), grad_c.data_ptr(), grad_gates.data_ptr()),
        *(_pointer(keep), scratch.data_ptr(), steps, rows, size),
    )
    return grad_h[0], grad_c, grad_gates


@functools.cache
def _window_scratch(steps: int, window: int, size: int, extras: int) -> int:
    return int(_kernels.window_scratch(steps, window, size, extras))


def window_forward(
    query: th.Tensor,
    keys: th.Tensor,
    values: th.Tensor,
    reach: th.Tensor,
    extra_keys: th.Tensor | None,
    extra_values: th.Tensor | None,
    extra_bias: th.Tensor | None,
    visible: th.Tensor | None,
    null_key: th.Tensor,
    null_value: th.Tensor,
    age_key: th.Tensor | None,
    age_bias: th.Tensor | None,
) -> tuple[th.Tensor, th.Tensor]:
    """
    Attention of each step to the entries of the last S steps, with the arguments of
    :func:`~sb3_cyborg.ops.window_attention.window_attention`, of which tensors of entries and parameters are contiguous.

    :param query: Queries, already divided by ``sqrt(d)``, (B, T, H, d), contiguous.
    :param keys: (B, S + T, H, d).
    :param values: (B, S + T, H, d).
    :param reach: (B, T), float32, contiguous.
    :param extra_keys: (B, n, E, H, d), or ``None``; blocks have ``min(S, T)`` steps.
    :param extra_values: (B, n, E, H, d), or ``None``.
    :param extra_bias: (H, E), or ``None``.
    :param visible: Bool, (B, T, E), or ``None``.
    :param null_key: (H, d).
    :param null_value: (H, d).
    :param age_key: (H, S, d), or ``None``.
    :param age_bias: (H, S), or ``None``.
    :return: Weighted values (B, T, H, d) and weights (B, H, T, S + E + 1) of window, extra entries and null entry.
    """
    batch, steps, heads, size = query.shape
    window, extras = keys.shape[1] - steps, 0 if extra_keys is None else extra_keys.shape[2]
    context, weights = th.empty_like(query), th.empty(batch, heads, steps, window + extras + 1)
    scratch = th.empty(_window_scratch(steps, window, size, extras))
    _kernels.window_forward(
        *(query.data_ptr(), keys.data_ptr(), values.data_ptr()),
        *(keys.stride(0), keys.stride(1), values.stride(0), values.stride(1)),
        *map(_pointer, (reach, extra_keys, extra_values, extra_bias, visible, null_key, null_value, age_key, age_bias)),
        *map(_pointer, (context, weights, scratch)),
        *(batch, steps, window, heads, size, extras, min(steps, window)),
    )
    return context, weights


def window_backward(saved: Sequence[Any], grad: th.Tensor) -> tuple[th.Tensor | None, ...]:
    """
    Backward of :func:`window_forward`.

    :param saved: Its arguments without biases: query, keys, values, reach, extra keys, extra values, visible, null key, null
        value, age key; then its weights.
    :param grad: Gradient of the weighted values, (B, T, H, d), contiguous.
    :return: Gradients of query, keys, values, extra keys, extra values, extra bias, null key, null value, age key and age
        bias; ``None`` where there is no such argument.
    """
    query, keys, values, reach, extra_keys, extra_values, visible, null_key, null_value, age_key, weights = saved
    batch, steps, heads, size = query.shape
    window, extras = keys.shape[1] - steps, 0 if extra_keys is None else extra_keys.shape[2]
    grad_query = th.empty_like(query)
    grad_keys, grad_values = th.zeros(2, batch, steps + window, heads, size).unbind()
    grad_extra = (
        [None, None, None]
        if extra_keys is None
        else [th.zeros_like(extra_keys), th.zeros_like(extra_keys), th.zeros(heads, extras)]
    )
    grad_null = th.zeros(2, heads, size).unbind()
    grad_age = (None, None) if age_key is None else (th.zeros_like(age_key), th.zeros(heads, window))
    scratch = th.empty(_window_scratch(steps, window, size, extras))
    _kernels.window_backward(
        *(query.data_ptr(), keys.data_ptr(), values.data_ptr()),
        *(keys.stride(0), keys.stride(1), values.stride(0), values.stride(1)),
        *map(_pointer, (reach, extra_keys, extra_values, visible, null_key, null_value, age_key, weights, grad)),
        *map(_pointer, (grad_query, grad_keys, grad_values, *grad_extra, *grad_null, *grad_age, scratch)),
        *(batch, steps, window, heads, size, extras, min(steps, window)),
    )
    return grad_query, grad_keys, grad_values, *grad_extra, *grad_null, *grad_age


def attend_projected(
    query: th.Tensor,
    first: th.Tensor | None,
    entries: th.Tensor,
    key: th.Tensor,
    value: th.Tensor,
    visible: th.Tensor,
    bias: th.Tensor,
    null_logits: th.Tensor,
) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
    """
    One step of attention to keys and values that are projections of the entries, without computing these.

    :param query: (B, H, d).
    :param first: Further entries before the others, (B, F, E), or ``None``.
    :param entries: (B, S, E).
    :param key: Weight of the keys (H d, E), packed by :func:`pack_heads`, transposed.
    :param value: Weight of the values (H d, E), packed by :func:`pack_heads`.
    :param visible: Bool, (B, F + S).
    :param bias: Added to the scores, (B, H, F + S).
    :param null_logits: Scores of the null entry, (B, H).
    :return: Weighted values (B, H, d), weights (B, H, F + S), weights of the null entry (B, H).
    """
    batch, heads, size = query.shape
    slots, width = entries.shape[1:]
    firsts = 0 if first is None else first.shape[1]
    query = query / math.sqrt(size)
    entries, visible, bias, null_logits = (tensor.contiguous() for tensor in (entries, visible, bias, null_logits))
    first = None if first is None else first.contiguous()
    context, weights = th.empty(batch, heads, size), th.empty(batch, heads, firsts + slots)
    null_weights, scratch = th.empty(batch, heads), th.empty(2 * batch * heads * width)
    _kernels.attend_projected(
        *map(_pointer, (query, first, entries, key, value, visible, bias, null_logits)),
        *map(_pointer, (context, weights, null_weights, scratch)),
        *(batch, heads, size, firsts, slots, width),
    )
    return context, weights, null_weights


def ring_step(
    query: th.Tensor,
    first: th.Tensor,
    entries: th.Tensor,
    since: th.Tensor,
    key: th.Tensor,
    value: th.Tensor,
    age_key: th.Tensor,
    age_bias: th.Tensor,
    first_key: th.Tensor,
    first_bias: th.Tensor,
    null_key: th.Tensor,
    null_value: th.Tensor,
) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
    """
    One step of the ring memory's read; parameters are contiguous.

    :param query: (B, H, d).
    :param first: The first inputs of the episode, (B, F, E).
    :param entries: The last inputs, oldest first, (B, S, E).
    :param since: Steps of the episode so far, (B,).
    :param key: Weight of the keys (H d, E), packed by :func:`pack_heads`, transposed.
    :param value: Weight of the values (H d, E), packed by :func:`pack_heads`.
    :param age_key: Keys of the ages, packed by :func:`pack_ages`.
    :param age_bias: (H, S), the oldest age first, as :func:`oldest_first` gives it.
    :param first_key: (F, H, d).
    :param first_bias: (H, F).
    :param null_key: (H, d).
    :param null_value: (H, d).
    :return: Weighted values, the null entry's included (B, H, d), weights (B, H, F + S), weights of the null entry (B, H).
    """
    batch, heads, size = query.shape
    (firsts, width), slots = first.shape[1:], entries.shape[1]
    query = query / math.sqrt(size)
    first, entries, since = (tensor.contiguous() for tensor in (first, entries, since))
    context, weights = th.empty(batch, heads, size), th.empty(batch, heads, firsts + slots)
    null_weights, scratch = th.empty(batch, heads), th.empty(2 * batch * heads * width)
    visible = th.empty(firsts + slots, dtype=th.bool)
    parameters = (key, value, age_key, age_bias, first_key, first_bias, null_key, null_value)
    _kernels.ring_step(
        *map(_pointer, (query, first, entries, since, *parameters, context, weights, null_weights, scratch, visible)),
        *(batch, heads, size, firsts, slots, width),
    )
    return context, weights, null_weights


def pack_ages(age_key: th.Tensor) -> th.Tensor:
    """
    :param age_key: Keys of the ages, (H, S, d), age 1 first.
    :return: The keys of each head as a weight from d to S features, oldest first, packed, one head after the other.
    """
    return th.cat([pack(head) for head in age_key.flip(1)])


def oldest_first(age_bias: th.Tensor) -> th.Tensor:
    """
    :param age_bias: (H, S), age 1 first.
    :return: The same with the oldest age first, contiguous.
    """
    return age_bias.flip(-1).contiguous()


def shift(entries: th.Tensor, x: th.Tensor, keep: th.Tensor | None) -> th.Tensor:
    """
    Append a step to the entries of the last S steps, and drop the oldest one.

    :param entries: Oldest first, (B, S, ...).
    :param x: The step, (B, ...), of the same trailing size.
    :param keep: Keep-mask, bool, (B,); all older entries of the other rows become zeros. ``None`` keeps every row.
    :return: The entries after the step, (B, S, ...).
    """
    batch, slots = entries.shape[:2]
    entries, x = entries.contiguous(), x.contiguous()
    keep = None if keep is None else keep.contiguous()
    shifted = th.empty_like(entries)
    _kernels.shift(*map(_pointer, (entries, x, keep, shifted)), *(batch, slots, x.numel() // batch))
    return shifted


def kv_step(
    query: th.Tensor, keys: th.Tensor, values: th.Tensor, since: th.Tensor, null_key: th.Tensor, null_value: th.Tensor
) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
    """
    One step of attention to stored keys and values.

    :param query: (B, H, d).
    :param keys: Oldest first, (B, S, H, d).
    :param values: (B, S, H, d).
    :param since: Number of entries in use, (B,).
    :param null_key: (H, d).
    :param null_value: (H, d).
    :return: Weighted values, the null entry's included (B, H, d), weights (B, H, S), weights of the null entry (B, H).
    """
    batch, heads, size = query.shape
    slots = keys.shape[1]
    query, keys, values, since = (tensor.contiguous() for tensor in (query, keys, values, since))
    context, weights = th.empty(batch, heads, size), th.empty(batch, heads, slots)
    null_weights, visible = th.empty(batch, heads), th.empty(slots, dtype=th.bool)
    _kernels.kv_step(
        *map(_pointer, (query, keys, values, since, null_key, null_value, context, weights, null_weights, visible)),
        *(batch, heads, size, slots),
    )
    return context, weights, null_weights


class PmmRead(NamedTuple):
    """
    Result of :func:`pmm_forward`.

    :param context: Weighted values, without the null entry's, (B, T, H, d).
    :param weights: (B, T, H, S).
    :param null_weights: Weights of the null entry, (B, T, H).
    :param items: Item of each slot at the read of each step, int64, (B, T, S).
    :param seen: Whether the slot is occupied then, bool, (B, T, S).
    """

    context: th.Tensor
    weights: th.Tensor
    null_weights: th.Tensor
    items: th.Tensor
    seen: th.Tensor


def pmm_forward(
    query: th.Tensor,
    keys: th.Tensor,
    values: th.Tensor,
    bias: th.Tensor,
    null_logits: th.Tensor,
    open_gate: th.Tensor,
    keep: th.Tensor | None,
    slots: Sequence[th.Tensor],
    usage_decay: float,
) -> PmmRead:
    """
    Reads and evictions of the pmm memory over a sequence. The items are the S of the state, then those of the T steps.

    :param query: (B, T, H, d), contiguous.
    :param keys: (B, S + T, H, d), contiguous.
    :param values: (B, S + T, H, d), contiguous.
    :param bias: Added to the scores of an item, (B, S + T), contiguous.
    :param null_logits: Scores of the null entry, (B, T, H).
    :param open_gate: Whether the write gate is open, bool, (B, T).
    :param keep: Keep-masks, bool, (B, T), or ``None``.
    :param slots: Item (int64), occupied (bool), usage and age of each slot before the first step, (B, S), contiguous;
        overwritten with those after the last.
    :param usage_decay: Factor on all usage at each step.
    :return: The reads.
    """
    (batch, steps, heads, size), num_slots = query.shape, slots[0].shape[1]
    null_logits, open_gate = null_logits.contiguous(), open_gate.contiguous()
    keep = None if keep is None else keep.contiguous()
    read = PmmRead(
        th.empty(batch, steps, heads, size),
        th.empty(batch, steps, heads, num_slots),
        th.empty(batch, steps, heads),
        th.empty(batch, steps, num_slots, dtype=th.int64),
        th.empty(batch, steps, num_slots, dtype=th.bool),
    )
    dominant = th.empty(num_slots, dtype=th.bool)
    _kernels.pmm_forward(
        *map(_pointer, (query, keys, values, bias, null_logits, open_gate, keep, *slots, *read, dominant)),
        *(batch, steps, heads, size, num_slots, usage_decay),
    )
    return read


def pmm_backward(
    query: th.Tensor, keys: th.Tensor, values: th.Tensor, read: PmmRead, grad: th.Tensor, grad_null: th.Tensor
) -> tuple[th.Tensor, th.Tensor, th.Tensor, th.Tensor, th.Tensor]:
    """
    Backward of :func:`pmm_forward`.

    :param query: (B, T, H, d).
    :param keys: (B, S + T, H, d).
    :param values: (B, S + T, H, d).
    :param read: Its result.
    :param grad: Gradient of the context, (B, T, H, d).
    :param grad_null: Gradient of the null entry's weight, (B, T, H).
    :return: Gradients of query, keys, values, bias and null logits.
    """
    batch, steps, heads, size = query.shape
    num_slots = read.weights.shape[3]
    grad, grad_null = grad.contiguous(), grad_null.contiguous()
    grads = (th.empty_like(query), th.zeros_like(keys), th.zeros_like(values), grad.new_zeros(keys.shape[:2]))
    grad_null_logits, scratch = th.empty_like(read.null_weights), th.empty(num_slots)
    _kernels.pmm_backward(
        *map(_pointer, (query, keys, values, *read[1:], grad, grad_null, *grads, grad_null_logits, scratch)),
        *(batch, steps, heads, size, num_slots),
    )
    return *grads, grad_null_logits


def _by_step(tensor: th.Tensor) -> tuple[th.Tensor, int]:
    """
    :param tensor: (B, T, ...).
    :return: The tensor, copied if its steps are not contiguous and evenly spaced over all rows, and the floats between steps.
    """
    steps, size = tensor.shape[1], math.prod(tensor.shape[2:])
    if tensor.stride(0) == steps * tensor.stride(1) and tensor.stride(1) >= size and tensor[0, 0].is_contiguous():
        return tensor, tensor.stride(1)
    return tensor.contiguous(), size


def conv_forward(
    x: th.Tensor, state: th.Tensor, weight: th.Tensor, bias: th.Tensor, keep: th.Tensor | None, silu: bool
) -> tuple[th.Tensor, th.Tensor]:
    """
    A causal depthwise convolution over a sequence.

    :param x: (B, T, C).
    :param state: The W - 1 inputs before the first step, newest last, (B, W - 1, C), contiguous.
    :param weight: (W, C), contiguous; the last tap is that of the current step.
    :param bias: (C,).
    :param keep: Keep-masks, bool, (B, T), or ``None``.
    :param silu: Whether SiLU follows.
    :return: Outputs (B, T, C), and the last W - 1 inputs (B, W - 1, C), zeros where they belong to an earlier episode.
    """
    (batch, steps, channels), past = x.shape, state.shape[1]
    (x, step), keep = _by_step(x), None if keep is None else keep.contiguous()
    y, last = th.empty(batch, steps, channels), th.empty_like(state)
    _kernels.conv_forward(
        *(x.data_ptr(), step, *map(_pointer, (state, weight, bias, keep, y, last))),
        *(batch, steps, channels, past, silu),
    )
    return y, last


def conv_backward(
    x: th.Tensor,
    state: th.Tensor,
    weight: th.Tensor,
    bias: th.Tensor,
    keep: th.Tensor | None,
    silu: bool,
    grad: th.Tensor,
    grad_last: th.Tensor,
) -> tuple[th.Tensor, th.Tensor, th.Tensor, th.Tensor]:
    """
    Backward of :func:`conv_forward`.

    :param x: (B, T, C).
    :param state: (B, W - 1, C).
    :param weight: (W, C).
    :param bias: (C,).
    :param keep: Keep-masks, bool, (B, T), or ``None``.
    :param silu: Whether SiLU follows.
    :param grad: Gradient of the outputs, (B, T, C).
    :param grad_last: Gradient of the last inputs, (B, W - 1, C).
    :return: Gradients of ``x``, ``state``, ``weight`` and ``bias``.
    """
    (batch, steps, channels), past = x.shape, state.shape[1]
    (x, step), keep = _by_step(x), None if keep is None else keep.contiguous()
    grad, grad_last = grad.contiguous(), grad_last.contiguous()
    grads = th.zeros(x.shape), th.zeros_like(state), th.zeros_like(weight), th.zeros_like(bias)
    _kernels.conv_backward(
        *(x.data_ptr(), step, *map(_pointer, (state, weight, bias, keep, grad, grad_last, *grads))),
        *(batch, steps, channels, past, silu),
    )
    return grads


def ssd_forward(
    x: th.Tensor,
    dt: th.Tensor,
    a: th.Tensor,
    b: th.Tensor,
    c: th.Tensor,
    d: th.Tensor,
    state: th.Tensor,
    keep: th.Tensor | None,
) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
    """
    The recurrence of Mamba-2 over a sequence.

    :param x: Inputs of the heads, (B, T, H, P).
    :param dt: Step sizes, (B, T, H).
    :param a: Decay rates, (H,).
    :param b: Write directions, (B, T, G, N).
    :param c: Read directions, (B, T, G, N).
    :param d: Weights of the skip connection, (H,).
    :param state: State before the first step, (B, H, P, N).
    :param keep: Keep-masks, bool, (B, T), or ``None``.
    :return: Outputs (B, T, H, P), the state after the last step, and states that the backward needs.
    """
    (batch, steps, heads, width), (groups, size) = x.shape, b.shape[2:]
    (x, x_step), (b, b_step), (c, c_step) = map(_by_step, (x, b, c))
    dt, a, d, state = (tensor.contiguous() for tensor in (dt, a, d, state))
    keep = None if keep is None else keep.contiguous()
    y, last = th.empty(batch, steps, heads, width), th.empty_like(state)
    saved = th.empty(_ssd_saved_size(batch, steps, heads, width, size))
    scratch = th.empty(_ssd_scratch_size(heads, width, size))
    _kernels.ssd_forward(
        *(x.data_ptr(), x_step, dt.data_ptr(), a.data_ptr(), b.data_ptr(), b_step, c.data_ptr(), c_step),
        *(*map(_pointer, (d, state, keep, y, last, saved, scratch)), batch, steps, heads, width, groups, size),
    )
    return y, last, saved


def ssd_backward(
    x: th.Tensor,
    dt: th.Tensor,
    a: th.Tensor,
    b: th.Tensor,
    c: th.Tensor,
    d: th.Tensor,
    keep: th.Tensor | None,
    saved: th.Tensor,
    grad: th.Tensor,
    grad_last: th.Tensor,
) -> tuple[th.Tensor, ...]:
    """
    Backward of :func:`ssd_forward`.

    :param x: (B, T, H, P).
    :param dt: (B, T, H).
    :param a: (H,).
    :param b: (B, T, G, N).
    :param c: (B, T, G, N).
    :param d: (H,).
    :param keep: Keep-masks, bool, (B, T), or ``None``.
    :param saved: The states that the forward saved.
    :param grad: Gradient of the outputs, (B, T, H, P).
    :param grad_last: Gradient of the last state, (B, H, P, N).
    :return: Gradients of ``x``, ``dt``, ``a``, ``b``, ``c``, ``d`` and ``state``.
    """
    (batch, steps, heads, width), (groups, size) = x.shape, b.shape[2:]
    (x, x_step), (b, b_step), (c, c_step) = map(_by_step, (x, b, c))
    dt, a, d, grad, grad_last = (tensor.contiguous() for tensor in (dt, a, d, grad, grad_last))
    keep = None if keep is None else keep.contiguous()
    grad_x, grad_dt, grad_b, grad_c = (th.empty(tensor.shape) for tensor in (x, dt, b, c))
    grad_a, grad_d = th.zeros(2, heads, dtype=th.float64).unbind()
    grad_state, scratch = th.empty_like(grad_last), th.empty(_ssd_scratch_size(heads, width, size))
    _kernels.ssd_backward(
        *(x.data_ptr(), x_step, dt.data_ptr(), a.data_ptr(), b.data_ptr(), b_step, c.data_ptr(), c_step),
        *map(
            _pointer, (d, keep, saved, grad, grad_last, grad_x, grad_dt, grad_a, grad_b, grad_c, grad_d, grad_state, scratch)
        ),
        *(batch, steps, heads, width, groups, size),
    )
    return grad_x, grad_dt, grad_a.float(), grad_b, grad_c, grad_d.float(), grad_state


@functools.cache
def _ssd_saved_size(batch: int, steps: int, heads: int, width: int, size: int) -> int:
    return int(_kernels.ssd_saved_size(batch, steps, heads, width, size))


@functools.cache
def _ssd_scratch_size(heads: int, width: int, size: int) -> int:
    return int(_kernels.ssd_scratch_size(heads, width, size))


def _gate(z: th.Tensor | None) -> tuple[th.Tensor | None, int]:
    """
    :param z: (..., D), or ``None``.
    :return: It with its rows evenly spaced, copied if need be, and the floats between rows.
    """
    if z is None:
        return None, 0
    if z.dim() == 3:
        return _by_step(z)
    z = z if z.dim() == 2 and z.stride(1) == 1 and z.stride(0) >= z.shape[1] else z.contiguous()
    return z, z.stride(0) if z.dim() == 2 else z.shape[-1]


def gated_norm(y: th.Tensor, z: th.Tensor | None, weight: th.Tensor, groups: int, eps: float) -> tuple[th.Tensor, th.Tensor]:
    """
    Root-mean-square norm of each group of features of ``y silu(z)``, or of ``y``.

    :param y: (..., D).
    :param z: (..., D), or ``None``.
    :param weight: (D,).
    :param groups: Number of groups, which divides D.
    :param eps: Added to the mean square.
    :return: Normalized features times the weight, (..., D), and the factor of each group, (..., groups).
    """
    y, (z, z_step) = y.contiguous(), _gate(z)
    size = y.shape[-1] // groups
    out, scale = th.empty_like(y), th.empty(*y.shape[:-1], groups)
    _kernels.gated_norm(
        *(y.data_ptr(), _pointer(z), z_step, weight.data_ptr(), out.data_ptr(), scale.data_ptr()),
        *(scale.numel() // groups, groups, size, eps),
    )
    return out, scale


def gated_norm_backward(
    y: th.Tensor, z: th.Tensor | None, weight: th.Tensor, scale: th.Tensor, grad: th.Tensor
) -> tuple[th.Tensor, th.Tensor | None, th.Tensor]:
    """
    Backward of :func:`gated_norm`.

    :param y: (..., D).
    :param z: (..., D), or ``None``.
    :param weight: (D,).
    :param scale: The factors, (..., groups).
    :param grad: Gradient of the result, (..., D).
    :return: Gradients of ``y``, ``z`` and ``weight``.
    """
    y, (z, z_step), grad = y.contiguous(), _gate(z), grad.contiguous()
    groups = scale.shape[-1]
    grad_y, grad_z, grad_weight = th.empty_like(y), None if z is None else th.empty_like(y), th.zeros_like(weight)
    _kernels.gated_norm_backward(
        *(y.data_ptr(), _pointer(z), z_step, *map(_pointer, (weight, scale, grad, grad_y, grad_z, grad_weight))),
        *(scale.numel() // groups, groups, y.shape[-1] // groups),
    )
    return grad_y, grad_z, grad_weight
