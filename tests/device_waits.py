"""Counts, on a CPU, the operations that would synchronize with a GPU."""

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch as th
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

METHODS = ("numpy", "cpu", "tolist", "item", "__bool__", "__int__", "__float__", "__index__", "__array__", "nonzero")
"""Methods of tensors that read their values or copy them to the CPU."""

OPERATIONS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique", "repeat_interleave")
"""Operators whose result on the host, or output shape, depends on values."""


class _Operators(TorchDispatchMode):
    def __init__(self, found: Counter[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found = found
        self.sending = False
        """Whether a tensor is created from other data, which is a copy to the device and needs no synchronization."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        copies = name == "_to_copy" and (kwargs or {}).get("device") == th.device("cpu") and not self.sending
        # A boolean index is converted to positions, whose number has to be read.
        masks = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype == th.bool for index in args[1]
        )
        if name in OPERATIONS or copies or masks:
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


class _Methods(TorchFunctionMode):
    def __init__(self, found: Counter[str], operators: _Operators) -> None:
        super().__init__()
        self.found, self.operators = found, operators

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in METHODS and func is getattr(th.Tensor, name, None):
            self.found[name] += 1
        self.operators.sending = func in (th.as_tensor, th.tensor) and not isinstance(args[0], th.Tensor)
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.operators.sending = False


class DeviceWaits:
    """
    A context that counts operations that would synchronize with a GPU.

    ``found`` maps the name of an operation to the number of its calls.
    """

    def __init__(self) -> None:
        self.found: Counter[str] = Counter()

    def __enter__(self) -> "DeviceWaits":
        self._stack = ExitStack()
        operators = self._stack.enter_context(_Operators(self.found))
        self._stack.enter_context(_Methods(self.found, operators))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
