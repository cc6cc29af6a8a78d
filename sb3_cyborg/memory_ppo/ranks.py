"""
Data-parallel training: several processes, the ranks, train one policy, each with environments of its own.

A launcher such as ``torchrun`` starts the processes and gives each its number. They communicate by ``torch.distributed``: gloo
for tensors on a CPU, NCCL for those on a GPU.
"""

import atexit
import contextlib
import copy
import io
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch as th
import torch.distributed as dist
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CallbackList,
    CheckpointCallback,
    EvalCallback,
    EventCallback,
    ProgressBarCallback,
)
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.type_aliases import MaybeCallback
from stable_baselines3.common.vec_env import VecNormalize
from torch import nn
from torch.distributed.rendezvous import rendezvous

from sb3_cyborg.memory_ppo.rank_error import RankError

T = TypeVar("T")

Reduce = Callable[[th.Tensor], th.Tensor]
"""A function that sums a float64 vector over all processes."""

LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Environment variables that ``torchrun``, and other launchers of PyTorch, set for each process."""

FAILURE = "sb3_cyborg/failure"
"""Key of the first error of a rank, in the store of the process group."""

WRITERS = (CheckpointCallback, EvalCallback, ProgressBarCallback)
"""Callbacks of SB3 that write files or to the terminal; they and their subclasses run on rank 0 only."""


def in_one_process(sums: th.Tensor) -> th.Tensor:
    """
    The sum over processes for a single process.

    :param sums: A vector, float64.
    :return: The same vector.
    """
    return sums


@dataclass
class _Joined:
    """The process group that this process has joined, and where to look for errors of other ranks."""

    group: dist.ProcessGroup
    store: Any
    """``None`` if the script has made the process group."""


_joined: _Joined | None = None
_has_left = False


def _disconnect() -> None:
    """Close the connections at the end of the process: it may abort if threads of PyTorch's backend are left then."""
    if dist.is_initialized():
        with contextlib.suppress(RuntimeError, ValueError):  # connections that are lost already
            dist.destroy_process_group()


@dataclass(frozen=True)
class Ranks:
    """
    The processes of data-parallel training. With one process, each method returns its input.

    Each method is *collective*: it returns when all ranks have called it, so all must call the same methods in the same order.

    :param rank: Number of this process, from 0.
    :param size: Number of processes.
    """

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which writes logs and files."""
        return self.rank == 0

    # --- joining and leaving ----------------------------------------------------------------------------------------

    def join(self) -> None:
        """
        Join the other ranks, unless this process has done so before.

        :raises RuntimeError: if training has failed before in this process: the other ranks have ended.
        """
        global _joined
        if self.size == 1 or _joined is not None:
            return
        if _has_left:
            raise RuntimeError("Training with the other ranks has ended with an error: start all processes again.")
        backend = _backend()
        if dist.is_initialized():  # by the script: its own collectives must not mix with ours
            _joined = _Joined(dist.new_group(backend=backend), None)
            return
        store, rank, size = next(iter(rendezvous("env://")))
        dist.init_process_group(backend, store=store, rank=rank, world_size=size)
        atexit.register(_disconnect)
        assert dist.group.WORLD is not None
        _joined = _Joined(dist.group.WORLD, store)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Join the other ranks. An error in the body ends them, too: they raise a :class:`RankError` with its text."""
        self.join()
        try:
            yield
        except BaseException as error:
            self._leave(error)
            raise

    def _leave(self, error: BaseException) -> None:
        """Tell the other ranks about an error, and close the connections, so that no rank waits for this one."""
        global _joined, _has_left
        if _joined is None:
            return
        if _joined.store is not None and not isinstance(error, RankError):
            text = f"Rank {self.rank} has failed: {type(error).__name__}: {error}"
            with contextlib.suppress(RuntimeError):  # the process with the store may have ended
                _joined.store.compare_set(FAILURE, "", text)
        group, _joined, _has_left = _joined.group, None, True
        with contextlib.suppress(RuntimeError, ValueError):  # connections that are lost already
            dist.destroy_process_group(group)

    def _collective(self, function: Callable[..., object], *args: Any, **options: Any) -> None:
        """Call a function of ``torch.distributed``. :raises RankError: if another rank has ended."""
        if _joined is None:
            raise RankError(f"Rank {self.rank} is not connected to the other ranks: call `learn`.")
        try:
            function(*args, group=_joined.group, **options)
        except RuntimeError as error:
            raise RankError(
                _reason(_joined.store) or f"The connection to another rank is lost ({_first_line(error)})."
            ) from error

    # --- collectives ------------------------------------------------------------------------------------------------

    def sum(self, tensor: th.Tensor) -> th.Tensor:
        """
        :param tensor: Numbers of this rank; all ranks have the same shape and dtype.
        :return: Their sum over all ranks, the same bits on each.
        """
        if self.size == 1:
            return tensor
        total = tensor.detach().clone()
        self._collective(dist.all_reduce, total)
        return total

    def mean(self, tensor: th.Tensor) -> th.Tensor:
        """
        :param tensor: Numbers of this rank; all ranks have the same shape and dtype.
        :return: Their mean over all ranks, the same bits on each.
        """
        return tensor if self.size == 1 else self.sum(tensor) / self.size

    def gather(self, value: T) -> list[T]:
        """
        :param value: An object of this rank that can be pickled.
        :return: The objects of all ranks, in order of the ranks.
        """
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        self._collective(dist.all_gather_object, values, value)
        return values

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """
        Average the gradients over the ranks, all of them in one vector.

        A parameter without a gradient gets zeros, because it may have one on another rank.

        :param parameters: The parameters, in the same order on each rank.
        """
        if self.size == 1:
            return
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        for parameter in trained:
            if parameter.grad is None:
                parameter.grad = th.zeros_like(parameter)
        gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
        mean = self.mean(th.cat([gradient.flatten() for gradient in gradients]))
        for gradient, part in zip(gradients, mean.split([gradient.numel() for gradient in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def of_first(self, tensors: T, device: th.device | str = "cpu") -> T:
        """
        :param tensors: Tensors, numbers and text in nested dictionaries and lists, such as a state-dict.
        :param device: Device of the result.
        :return: Those of rank 0.
        """
        if self.size == 1:
            return tensors
        file = io.BytesIO()
        if self.is_first:
            th.save(tensors, file)
        content: list[Any] = [file.getvalue()]
        self._collective(dist.broadcast_object_list, content, src=0)
        if self.is_first:
            return tensors
        result: T = th.load(io.BytesIO(content[0]), map_location=device, weights_only=True)
        return result

    def check_equal(self, settings: Mapping[str, Any]) -> None:
        """
        :param settings: Settings of this rank by name.
        :raises ValueError: on every rank, if they differ between ranks.
        """
        for rank, others in enumerate(all_settings := self.gather(dict(settings))):
            for name, value in all_settings[0].items():
                if others.get(name) != value:
                    raise ValueError(
                        f"All ranks must train with the same settings, but `{name}` is {value!r} on rank 0 and "
                        f"{others.get(name)!r} on rank {rank}."
                    )


def find_ranks(distributed: bool) -> Ranks:
    """
    Find the ranks of this process: those of the process group that the script has made, or those that a launcher has started.

    :param distributed: Whether to look for them.
    :return: The ranks; one process if there are no others.
    """
    if not distributed or not dist.is_available():
        return Ranks()
    if dist.is_initialized():
        return Ranks(dist.get_rank(), dist.get_world_size())
    if all(name in os.environ for name in LAUNCHER_VARIABLES):
        return Ranks(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    return Ranks()


def use_own_gpu(ranks: Ranks) -> None:
    """
    Make a GPU of this machine the current one, so that the device ``"cuda"`` is another one on each rank.

    :param ranks: The ranks.
    """
    if ranks.size > 1 and th.cuda.is_available():
        th.cuda.set_device(int(os.environ.get("LOCAL_RANK", ranks.rank)) % th.cuda.device_count())


def _backend() -> str:
    """:return: gloo for tensors on a CPU, and NCCL for those on a GPU, unless several ranks share one, which NCCL refuses."""
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    has_own_gpu = th.cuda.is_available() and ranks_here <= th.cuda.device_count()
    return "cpu:gloo,cuda:nccl" if has_own_gpu and dist.is_nccl_available() else "gloo"


def _reason(store: Any) -> str:
    """:return: The first error of a rank that was told, or an empty string."""
    if store is not None:
        with contextlib.suppress(RuntimeError):  # the process with the store may have ended
            if store.check([FAILURE]):
                return str(store.get(FAILURE).decode())
    return ""


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def callbacks_of_rank(callback: MaybeCallback, ranks: Ranks) -> MaybeCallback:
    """
    Leave out callbacks that write files, see :data:`WRITERS`, on all ranks but rank 0.

    :param callback: Callbacks as for SB3's ``learn``.
    :param ranks: The ranks.
    :return: The callbacks to run on this rank.
    """
    if ranks.is_first or callback is None:
        return callback
    if isinstance(callback, list):
        return [kept for part in callback if isinstance(kept := callbacks_of_rank(part, ranks), BaseCallback)]
    if isinstance(callback, CallbackList):
        return CallbackList(
            [kept for part in callback.callbacks if isinstance(kept := callbacks_of_rank(part, ranks), BaseCallback)]
        )
    if isinstance(callback, WRITERS):
        return None
    if isinstance(callback, EventCallback):
        kept = callbacks_of_rank(callback.callback, ranks)
        callback.callback = kept if isinstance(kept, BaseCallback) else None
    return callback


# --- statistics of VecNormalize -------------------------------------------------------------------------------------------


class NormalizeMerger:
    """
    Merges the statistics of ``VecNormalize`` of all ranks.

    :meth:`merge` adds the observations and returns that each rank has counted since the last call, in float64, to those that
    the ranks had in common then (parallel algorithm, Chan et al. 1979).

    :param normalize: ``VecNormalize`` of this rank.
    :param ranks: The ranks. At the start, the statistics of rank 0 are the common ones.
    """

    def __init__(self, normalize: VecNormalize, ranks: Ranks) -> None:
        self.normalize, self.ranks = normalize, ranks
        own = running_statistics(normalize)
        arrays = [th.from_numpy(np.array(array, dtype=np.float64)) for now in own for array in (now.mean, now.var, now.count)]
        common = [tensor.numpy() for tensor in ranks.of_first(arrays)]
        for now, mean, var, count in zip(own, common[::3], common[1::3], common[2::3], strict=True):
            now.mean, now.var, now.count = mean, var, float(count)
        self._common = copy.deepcopy(own)

    def merge(self) -> None:
        """Set the statistics to those of all ranks."""
        own = running_statistics(self.normalize)
        sums = [part for now, before in zip(own, self._common, strict=True) for part in _new_sums(now, before)]
        flat = self.ranks.sum(th.from_numpy(np.concatenate([part.ravel() for part in sums]))).numpy()
        ends = np.cumsum([part.size for part in sums])[:-1]
        reduced = [piece.reshape(part.shape) for piece, part in zip(np.split(flat, ends), sums, strict=True)]
        pairs = zip(own, self._common, strict=True)
        for (now, before), count, total, squares in zip(pairs, reduced[::3], reduced[1::3], reduced[2::3], strict=True):
            now.count = before.count + float(count)
            apart = total / now.count
            now.mean = before.mean + apart
            now.var = np.maximum((before.var * before.count + squares) / now.count - apart**2, 0.0)
        self._common = copy.deepcopy(own)


def running_statistics(normalize: VecNormalize) -> list[RunningMeanStd]:
    """
    :param normalize: ``VecNormalize``.
    :return: Its statistics: those of the observations, if it normalizes them, and those of the returns.
    """
    observations: Any = normalize.obs_rms if normalize.norm_obs else {}
    return [*(observations.values() if isinstance(observations, dict) else [observations]), normalize.ret_rms]


def _new_sums(now: RunningMeanStd, before: RunningMeanStd) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """:return: Count, sum and sum of squares of the samples since ``before``, less its mean, which is near theirs."""
    apart = np.asarray(now.mean - before.mean, dtype=np.float64)
    squares = np.asarray((now.var + apart**2) * now.count - before.var * before.count, dtype=np.float64)
    return np.asarray(now.count - before.count, dtype=np.float64), apart * now.count, squares
