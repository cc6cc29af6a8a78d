"""Counts, on a CPU, the operations that would make a GPU wait."""

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch as th
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

METHODS = ("numpy", "cpu", "tolist", "item", "__bool__", "__int__", "__float__", "__index__", "__array__", "nonzero")
"""Methods of tensors that need their values, or copy them to the CPU."""

OPERATIONS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique", "repeat_interleave")
"""Operators whose result, or its shape, depends on values."""


class _Operators(TorchDispatchMode):
    def __init__(self, found: Counter[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found = found
        self.sending = False
        """Whether data that is not a tensor is made one: on a GPU that is a copy to the device."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        copies = name == "_to_copy" and (kwargs or {}).get("device") == th.device("cpu") and not self.sending
        # An index that is a mask is turned into positions, whose number must be known.
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
    A context that counts what would make a GPU wait for its result.

    ``found`` has the names of the operations and how often each was called.
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
