"""
The wrapper of the official kernels, without the kernels: choice of backend, import, and non-finite values.

The kernels themselves: ``make test-official`` (in Triton's interpreter) and ``make test-cuda``.
"""

import importlib
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch as th

from sb3_cyborg import MemoryPPO
from sb3_cyborg.encoders.mamba import Mamba2
from sb3_cyborg.ops import ssd_official
from sb3_cyborg.ops.ssd_official import choose_ssd, import_without_package
from tests.helpers import toy_model
from tests.test_ssd import Case, Run, make_case, ssd_chunked

run_official: Run = ssd_official.ssd_official

CACHED = (ssd_official.load_kernels, ssd_official._log_once)


@pytest.fixture(autouse=True)
def fixture_fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Clear the caches of imports and logs, and hide an installed ``mamba_ssm``."""
    monkeypatch.setitem(sys.modules, "mamba_ssm", None)
    for name in ("TRITON_F32_DEFAULT", "TRITON_INTERPRET"):
        monkeypatch.setenv(name, "")  # so that it is restored afterwards
        monkeypatch.delenv(name)
    for function in CACHED:
        function.cache_clear()
    yield
    for function in CACHED:
        function.cache_clear()


class OnCuda(th.Tensor):
    """A CPU tensor that reports to be on a GPU."""

    is_cuda = True


def multiplying_kernel(
    x: th.Tensor,
    dt: th.Tensor,
    a: th.Tensor,
    b: th.Tensor,
    c: th.Tensor,
    chunk_size: int,
    *,
    D: th.Tensor,
    initial_states: th.Tensor,
    seq_idx: th.Tensor | None,
    return_final_states: bool,
) -> tuple[th.Tensor, th.Tensor]:
    """A function with the official arguments; as the kernels, it masks by multiplication, so a NaN spreads."""
    assert return_final_states
    assert chunk_size >= 1
    episode = th.zeros(x.shape[:2], dtype=th.int32) if seq_idx is None else seq_idx
    assert episode.dtype == th.int32
    heads = x.shape[2] // b.shape[2]
    b, c = b.repeat_interleave(heads, 2), c.repeat_interleave(heads, 2)
    log_decay = (dt * a).cumsum(1)
    same = (episode.unsqueeze(2) == episode.unsqueeze(1)).tril().unsqueeze(-1)  # (B, T, T, 1)
    decay = (log_decay.unsqueeze(2) - log_decay.unsqueeze(1)).clamp(max=0).exp() * same
    y = th.einsum("bthn,bshn,btsh,bsh,bshp->bthp", c, b, decay, dt, x)
    fade = log_decay.exp() * (episode == 0).unsqueeze(-1)
    y = y + th.einsum("bthn,bhpn,bth->bthp", c, initial_states, fade) + x * D.unsqueeze(-1)
    state = th.einsum("bshn,bsh,bsh,bshp->bhpn", b, decay[:, -1], dt, x)
    return y, state + initial_states * fade[:, -1, :, None, None]


@pytest.fixture(name="kernel")
def fixture_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssd_official, "load_kernels", lambda: multiplying_kernel)


def gradients(results: tuple[th.Tensor, th.Tensor], leaves: list[th.Tensor]) -> tuple[th.Tensor, ...]:
    y, state = results
    return th.autograd.grad((y.nan_to_num().square().sum(), state.nan_to_num().square().sum()), leaves)


@pytest.mark.parametrize("resets", [0.0, 0.2, 1.0])
@pytest.mark.usefixtures("kernel")
def test_arguments_have_the_official_meaning(resets: float) -> None:
    """A function with the official signature gives the outputs, state and gradients of the torch backend."""
    case = make_case(13, resets=resets)
    leaves = [tensor.requires_grad_() for tensor in case.tensors()]
    got = run_official(*leaves, case.masks, 4)
    want = ssd_chunked(*leaves, case.masks, 4)
    for one, other in zip((*got, *gradients(got, leaves)), (*want, *gradients(want, leaves)), strict=True):
        assert th.allclose(one, other, atol=1e-10)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf"), 1e9])
@pytest.mark.parametrize("leaf", ["x", "dt", "b", "c", "state"])
def test_a_nan_stays_in_its_own_episode(leaf: str, poison: float) -> None:
    """As in the torch backend. Row 0 has resets at 5 and 11, and a NaN at 7 or in its state."""
    masks = th.ones(2, 16, dtype=th.bool)
    masks[:, 5] = masks[:, 11] = 0
    case = make_case(16, rows=2, resets=0.0)._replace(masks=masks)
    dirty = getattr(case, leaf).clone()
    dirty[0 if leaf == "state" else (0, 7)] = abs(poison) if leaf == "dt" else poison

    def outcome(case: Case) -> tuple[list[th.Tensor], th.Tensor]:
        leaves = [tensor.clone().requires_grad_() for tensor in case.tensors()]
        y, state = run_official(*leaves, case.masks)
        finite = y.isfinite().flatten(2).all(-1)
        return [y.detach(), state.detach(), *gradients((y[:, 11:], state), leaves)], finite

    got, finite = outcome(case._replace(**{leaf: dirty}))
    want, _ = outcome(case)
    assert finite[1].all()
    lost = {"c": [7], "state": [0, 1, 2, 3, 4]}.get(leaf, [7, 8, 9, 10])
    assert (~finite[0]).nonzero().flatten().tolist() == lost
    assert th.allclose(got[0][finite], want[0][finite], atol=1e-12)
    for one, other in zip(got[1:], want[1:], strict=True):  # the last state and the gradients of the last episode
        assert th.allclose(one, other, atol=1e-12)


@pytest.mark.usefixtures("kernel")
def test_a_state_stays_nan_until_its_episode_ends() -> None:
    case = make_case(9, resets=0.0)
    case.state[0, 0, 0, 0] = float("nan")
    case.x[1, 3, 0, 0] = float("inf")
    y, state = run_official(*case)
    assert (~y.isfinite().flatten(2).all(-1)).int().tolist() == [[1] * 9, [0] * 3 + [1] * 6, [0] * 9]
    assert (~state.flatten(1).isfinite().all(-1)).tolist() == [True, True, False]


def test_official_without_the_package_names_the_command() -> None:
    with pytest.raises(ImportError, match=r"PyTorch with CUDA, then: pip install .*sb3-cyborg\[mamba-cuda\]"):
        Mamba2(8, mamba_backend="official")


@pytest.mark.usefixtures("kernel")
def test_official_without_a_gpu_names_the_command() -> None:
    model = Mamba2(8, mamba_backend="official")
    with pytest.raises(ValueError, match=r"got torch.float32 on cpu.* pip install .*sb3-cyborg\[mamba-cuda\]"):
        model.forward_sequence(th.zeros(1, 2, 8), model.get_initial_state(1))
    model.forward_step(th.zeros(1, 8), model.get_initial_state(1))  # acting needs no kernels


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Unknown mamba_backend 'oficial'\. Did you mean 'official'"):
        Mamba2(8, mamba_backend="oficial")


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_the_backend_is_an_option_of_the_policy(backend: str, tmp_path: Path) -> None:
    kwargs = {"encoder": "mamba", "encoder_kwargs": {"mamba_backend": backend, "headdim": 4, "d_state": 3}}
    model = toy_model(policy_kwargs=kwargs)
    model.learn(36)
    model.save(tmp_path / "model.zip")
    loaded = MemoryPPO.load(tmp_path / "model.zip")
    assert {module.mamba_backend for module in loaded.policy.modules() if isinstance(module, Mamba2)} == {backend}


def test_auto_logs_its_choice_once(caplog: pytest.LogCaptureFixture) -> None:
    x = th.zeros(1, 2, 1, 1)
    with caplog.at_level(logging.INFO, logger="sb3_cyborg"):
        for backend in ("auto", "auto", "torch"):
            assert choose_ssd(backend, x) is ssd_chunked
        assert choose_ssd("auto", x.double()) is ssd_chunked
    assert [(record.levelname, record.message) for record in caplog.records] == [
        ("INFO", "mamba_backend='auto' takes 'torch' for torch.float32 on cpu."),
        ("INFO", "mamba_backend='auto' takes 'torch' for torch.float64 on cpu."),
    ]


def test_auto_warns_if_the_package_is_missing_on_a_gpu(caplog: pytest.LogCaptureFixture) -> None:
    x = th.zeros(1, 2, 1, 1).as_subclass(OnCuda)
    for _ in range(2):
        assert choose_ssd("auto", x) is ssd_chunked
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert ssd_official.INSTALL in record.message


def fake_package(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ``mamba_ssm`` whose ``__init__`` fails, as without its compiled parts, with an importable submodule."""
    inner = folder / "mamba_ssm" / "ops" / "triton"
    inner.mkdir(parents=True)
    (folder / "mamba_ssm" / "__init__.py").write_text("import selective_scan_cuda\n")
    (inner / "ssd_combined.py").write_text("def mamba_chunk_scan_combined():\n    pass\n")
    monkeypatch.syspath_prepend(folder)
    for name in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton", "mamba_ssm.ops.triton.ssd_combined"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def test_auto_uses_the_kernels_on_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fake_package(tmp_path, monkeypatch)
    x = th.zeros(1, 2, 1, 1).as_subclass(OnCuda)
    with caplog.at_level(logging.INFO, logger="sb3_cyborg"):
        for backend in ("auto", "official", "auto"):
            assert choose_ssd(backend, x) is run_official
    assert len(caplog.records) == 1
    assert "takes 'official'" in caplog.text
    assert choose_ssd("auto", x.double()) is ssd_chunked
    with pytest.raises(ValueError, match="float64"):
        choose_ssd("official", x.double())


def test_the_package_itself_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_package(tmp_path, monkeypatch)
    module: Any = import_without_package("mamba_ssm.ops.triton.ssd_combined")
    assert ssd_official.load_kernels() is module.mamba_chunk_scan_combined
    assert "mamba_ssm" not in sys.modules
    with pytest.raises(ImportError, match="selective_scan_cuda"):  # another import runs its `__init__`
        importlib.import_module("mamba_ssm")


def test_an_imported_package_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    assert import_without_package("torch.nn.functional") is th.nn.functional
    monkeypatch.delitem(sys.modules, "mamba_ssm")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="mamba_ssm"):
        import_without_package("mamba_ssm.ops")


@pytest.mark.parametrize(
    ("chosen", "matmul", "want"),
    [(None, "highest", "ieee"), (None, "high", "tf32"), ("tf32x3", "highest", "tf32x3"), ("ieee", "high", "ieee")],
)
def test_precision_of_the_kernels(
    chosen: str | None, matmul: str, want: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """IEEE, unless TF32 is allowed for PyTorch's matmuls or the user has set another value."""
    fake_package(tmp_path, monkeypatch)
    if chosen:
        monkeypatch.setenv("TRITON_F32_DEFAULT", chosen)
    monkeypatch.setattr(th, "get_float32_matmul_precision", lambda: matmul)
    ssd_official.load_kernels()
    assert os.environ["TRITON_F32_DEFAULT"] == want
