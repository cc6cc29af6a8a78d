"""Triton interprets kernels on the CPU, and its queries of a GPU are replaced. It must precede the import of Triton."""

import os
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch as th

os.environ["TRITON_INTERPRET"] = "1"
os.environ["MAMBA_DETERMINISTIC"] = "1"  # no autotuning, which would time every configuration of each kernel
th.set_num_threads(1)


class NoDevice:
    """A replacement of ``torch.cuda.device`` without effect."""

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
