"""Triton interprets its kernels on the CPU; what they ask a GPU for is answered here. Comes before Triton is imported."""

import os
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch as th

os.environ["TRITON_INTERPRET"] = "1"
os.environ["MAMBA_DETERMINISTIC"] = "1"  # otherwise each kernel is timed with each of its settings
th.set_num_threads(1)


class NoDevice:
    """``torch.cuda.device``, of which there is none."""

    def __init__(self, device: object) -> None:
        pass

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


@pytest.fixture(autouse=True, scope="session")
def fixture_no_gpu() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(th.cuda, "device", NoDevice)
        monkeypatch.setattr(th.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=1))
        yield
