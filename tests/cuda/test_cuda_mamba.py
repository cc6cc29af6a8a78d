"""
Mamba-2 on a GPU: the official kernels against the CPU, against the step form, and in training. Only ``make test-cuda`` runs
these tests.
"""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th

from sb3_cyborg import MemoryPPO
from sb3_cyborg.encoders.encoder_v7 import EncoderV7
from sb3_cyborg.encoders.mamba import Mamba2
from sb3_cyborg.ops import ssd_official
from sb3_cyborg.ops.ssd_official import choose_ssd, load_kernels
from sb3_cyborg.sequence_model import Logs, SequenceModel, State
from sb3_cyborg.testing import assert_close, outcome, run_full, run_stepped, verify_contract, warm_state
from tests.helpers import ACTION_SPACES, ToyEnv, assert_exact_ratios, predict, record_updates, toy_model, toy_vec_env
from tests.test_ssd import NAMES, Case, Run, make_case, ssd_chunked

run_official: Run = ssd_official.ssd_official


def missing() -> str:
    """:return: The reason to skip these tests, or an empty string."""
    if not th.cuda.is_available():
        return f"needs a GPU: torch {th.__version__} finds no CUDA device"
    try:
        load_kernels()
    except ImportError as error:
        return str(error)
    return ""


REASON = missing()
pytestmark = [
    pytest.mark.skipif(bool(REASON), reason=REASON or "-"),
    pytest.mark.timeout(1200),  # the first call of each kernel compiles and tunes it
]


class OnCuda(SequenceModel):
    """
    A model on the GPU with inputs and outputs on the CPU, for the contract.

    :param model: The model; it is moved to the GPU.
    """

    def __init__(self, model: SequenceModel) -> None:
        super().__init__()
        self.model = model.cuda()
        self.input_dim, self.output_dim = model.input_dim, model.output_dim

    def get_initial_state(self, batch_size: int, device: th.device | str | None = None) -> State:
        return self.model.get_initial_state(batch_size, "cpu")

    def forward_step(self, x: th.Tensor, state: State, mask: th.Tensor | None = None) -> tuple[th.Tensor, State, Logs]:
        return self._run("forward_step", x, state, mask)

    def forward_sequence(self, x: th.Tensor, state: State, masks: th.Tensor | None = None) -> tuple[th.Tensor, State, Logs]:
        return self._run("forward_sequence", x, state, masks)

    def _run(self, method: str, x: th.Tensor, state: State, mask: th.Tensor | None) -> tuple[th.Tensor, State, Logs]:
        state = {name: leaf.cuda() for name, leaf in state.items()}
        output, state, logs = getattr(self.model, method)(x.cuda(), state, None if mask is None else mask.cuda())
        return output.cpu(), {name: leaf.cpu() for name, leaf in state.items()}, logs


def evaluate(function: Run, case: Case, device: str) -> dict[str, th.Tensor]:
    """:return: Results and all gradients of a fixed functional of both results, on the CPU."""
    leaves = [tensor.detach().to(device).requires_grad_() for tensor in case.tensors()]
    results = function(*leaves, None if case.masks is None else case.masks.to(device), 32)
    generator = th.Generator().manual_seed(1)
    weights = [th.randn(result.shape, generator=generator).to(device) for result in results]
    values = [*[result.detach() for result in results], *th.autograd.grad(results, leaves, weights)]
    return {name: value.cpu() for name, value in zip(NAMES, values, strict=True)}


@pytest.mark.parametrize("resets", [0.0, 0.05, 1.0])
@pytest.mark.parametrize(("steps", "groups"), [(1, 1), (64, 2), (333, 1)])
def test_core_equals_the_cpu(steps: int, groups: int, resets: float) -> None:
    case = make_case(steps, width=32, size=32, groups=groups, resets=resets).to(th.float32)
    got, want = evaluate(run_official, case, "cuda"), evaluate(ssd_chunked, case, "cpu")
    results = ("output", "state")
    assert_close({name: got[name] for name in results}, {name: want[name] for name in results}, 1e-5, "results")
    assert_close(got, want, 2e-5, "gradients")


def test_the_torch_backend_runs_on_cuda_too() -> None:
    case = make_case(70, width=32, size=32).to(th.float32)
    assert_close(evaluate(ssd_chunked, case, "cuda"), evaluate(ssd_chunked, case, "cpu"), 1e-5, "torch")


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("leaf", ["x", "dt", "b", "c", "state"])
def test_a_nan_stays_in_its_own_episode(leaf: str, poison: float) -> None:
    masks = th.ones(3, 40, dtype=th.bool)
    masks[:, 16] = 0
    case = make_case(40, resets=0.0, width=32, size=32).to(th.float32)._replace(masks=masks)
    dirty = getattr(case, leaf).clone()
    dirty[(slice(None),) if leaf == "state" else (slice(None), slice(0, 16))] = poison
    clean = run_official(*[tensor.cuda() for tensor in case.tensors()], masks.cuda())
    got = run_official(*[tensor.cuda() for tensor in case._replace(**{leaf: dirty}).tensors()], masks.cuda())
    assert got[0][:, :16].isnan().all()
    assert th.allclose(got[0][:, 16:], clean[0][:, 16:], atol=1e-5)
    assert th.allclose(got[1], clean[1], atol=1e-5)


def test_auto_uses_the_kernels() -> None:
    x = th.zeros(1, 1, 1, 1, device="cuda")
    assert choose_ssd("auto", x) is run_official
    assert choose_ssd("auto", x.double()) is ssd_chunked
    assert choose_ssd("torch", x) is ssd_chunked


@pytest.mark.parametrize("sizes", [{}, {"expand": 1}, {"ngroups": 2, "d_state": 16}, {"chunk_size": 256}])
def test_step_equals_sequence(sizes: dict[str, Any]) -> None:
    """Outputs, final state, and the gradients of parameters, input and first state; resets inside."""
    th.manual_seed(0)
    model = OnCuda(Mamba2(64, mamba_backend="official", **sizes))
    generator = th.Generator().manual_seed(0)
    x = th.randn(4, 77, 64, generator=generator)
    masks = th.rand(4, 77, generator=generator) > 0.05
    state = warm_state(model, 4, th.float32, generator)
    got, want = (outcome(model, form, x, state, masks, 0) for form in (run_full, run_stepped))
    assert_close(got, want, 2e-5, "official against stepped")


@pytest.mark.parametrize("mode", ["mamba", "hybrid", "fusion"])
def test_contract(mode: str) -> None:
    """The whole contract: fp32 in the official kernels, fp64 in PyTorch, both on the GPU."""
    th.manual_seed(0)
    verify_contract(OnCuda(EncoderV7(3, 32, mode=mode, d_state=16, headdim=16, chunk_size=8)), steps=29)


def test_device_of_a_model_does_not_change_it() -> None:
    th.manual_seed(0)
    model = EncoderV7(3, 64, mode="mamba")
    x, masks = th.randn(5, 90, 3), th.rand(5, 90) > 0.05
    state = warm_state(model, 5, th.float32, th.Generator().manual_seed(0))
    want = outcome(model, run_full, x, state, masks, 0)
    got = outcome(OnCuda(copy.deepcopy(model)), run_full, x, state, masks, 0)
    got = {name.replace("gradient of model.", "gradient of "): value.cpu() for name, value in got.items()}
    assert_close(got, want, 2e-5, "CUDA against CPU")


def cuda_model(backend: str, action_space: str, **kwargs: Any) -> MemoryPPO:
    """:return: A small MemoryPPO on the GPU with burn-in, resets inside of its rollouts, and Mamba-2."""
    env = toy_vec_env(4, lambda: ToyEnv(action_space=ACTION_SPACES[action_space], mean_length=9))
    encoder = {"encoder": "mamba", "hidden_dim": 32, "encoder_kwargs": {"mamba_backend": backend, "chunk_size": 16}}
    settings = {"n_steps": 64, "batch_size": 256, "seq_len": 32, "burn_in": 9, "learning_rate": 3e-3} | kwargs
    return toy_model(env, device="cuda", policy_kwargs=encoder, **settings)


@pytest.mark.parametrize("backend", ["official", "torch"])
@pytest.mark.parametrize("action_space", ["discrete", "box"])
def test_ratio_is_one(action_space: str, backend: str) -> None:
    model = cuda_model(backend, action_space)
    updates = record_updates(model)
    model.learn(3 * 256)
    assert_exact_ratios(updates, 3)


@pytest.mark.parametrize("action_space", ["discrete", "box"])
def test_a_model_trained_on_cuda_acts_the_same_on_a_cpu(action_space: str, tmp_path: Path) -> None:
    """Both start from the same state and then use their own."""
    model = cuda_model("auto", action_space)
    model.learn(3 * 256)
    model.save(tmp_path / "model.zip")
    loaded = MemoryPPO.load(tmp_path / "model.zip", device="cpu")
    assert {parameter.device.type for parameter in loaded.policy.parameters()} == {"cpu"}
    rng = np.random.default_rng(0)
    state, cpu_state = None, None
    starts = np.ones(4, dtype=bool)
    for _ in range(50):
        obs = rng.uniform(-1, 1, (4, 3)).astype(np.float32)
        action, state = predict(model, obs, state, episode_start=starts, deterministic=True)
        cpu_action, cpu_state = predict(loaded, obs, cpu_state, episode_start=starts, deterministic=True)
        np.testing.assert_allclose(cpu_action, action, atol=1e-4)
        for name, leaf in state.items():
            np.testing.assert_allclose(cpu_state[name], leaf, atol=1e-4, err_msg=name)
        starts = rng.random(4) < 0.1
