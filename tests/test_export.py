"""Export: the exported step equals the agent, for every stack, every space and any end of episodes; errors are clear."""

import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import VecNormalize

from sb3_cyborg import MaskableMemoryPPO, MemoryPPO, maskable
from sb3_cyborg.encoders.encoder_v7 import ENCODERS
from sb3_cyborg.encoders.gru import GRUCore
from sb3_cyborg.export import AgentStep, export_onnx, export_pt2
from sb3_cyborg.memories.memory_v7 import MEMORIES
from sb3_cyborg.memory_ppo.inputs import Inputs
from sb3_cyborg.memory_ppo.normalization import ObservationNormalizer
from sb3_cyborg.runtime import OnnxAgent
from tests.helpers import ACTION_SPACES, OBSERVATION_SPACES, VECTOR, ToyEnv, small, toy_model, toy_vec_env
from tests.mask_helpers import MASKABLE_SPACES, MaskedToyEnv

TOLERANCE = 1e-5


logging.getLogger("torch.__trace").disabled = True  # pytest would keep its hundred thousand records


def randomize(model: MemoryPPO) -> MemoryPPO:
    """Add noise to all weights and draw the moments of the normalizers, so that nothing is at its initial value."""
    generator = th.Generator().manual_seed(0)
    with th.no_grad():
        for parameter in model.policy.parameters():
            parameter.add_(0.1 * th.randn(parameter.shape, generator=generator))
        for module in model.policy.modules():
            if isinstance(module, ObservationNormalizer):
                module.mean += 0.3 * th.randn(module.mean.shape, generator=generator)
                module.scale *= 1 + th.rand(module.scale.shape, generator=generator)
        model.policy.value_net.mean += 0.7
    return model


def make_model(
    mode: str = "gru",
    kind: str = "ring",
    actions: str = "discrete",
    observations: str = "box",
    policy: str = "MlpPolicy",
    **settings: Any,
) -> MemoryPPO:
    def make() -> gym.Env[Any, Any]:
        return ToyEnv(OBSERVATION_SPACES[observations], ACTION_SPACES[actions])

    memory_kwargs = {} if kind == "none" else {"num_slots": 4}
    policy_kwargs = {"encoder": mode, "memory": kind, "memory_kwargs": memory_kwargs, "use_time": True, "hidden_dim": 16}
    env = settings.pop("env", None) or toy_vec_env(2, make)
    return randomize(
        toy_model(
            env, policy, use_last_action=True, policy_kwargs=policy_kwargs | settings.pop("policy_kwargs", {}), **settings
        )
    )


def sample(space: spaces.Space[Any], rows: int) -> Any:
    """:return: Random observations, (B, ...), or a dictionary of them."""
    if isinstance(space, spaces.Dict):
        return {key: sample(part, rows) for key, part in space.spaces.items()}
    return np.stack([space.sample() for _ in range(rows)])


def values(model: MemoryPPO, obs: Any, state: dict[str, np.ndarray], starts: np.ndarray) -> np.ndarray:
    tensors = {name: th.as_tensor(leaf) for name, leaf in state.items()}
    with th.no_grad():
        return model.policy.predict_values(th.as_tensor(obs), tensors, th.as_tensor(starts)).numpy()[:, 0]


def assert_acts_alike(model: MemoryPPO, path: Path, steps: int, rows: int = 3, large_states: bool = False) -> None:
    """
    Assert that the agent and its export act alike, each with its own state, through episodes that end at random.

    Discrete actions are equal; Box actions, states and values within 1e-5. With ``large_states``, states are so within 1e-5 of
    their largest entry: with entries of 20, PyTorch's own states are 1.7e-5 from those in fp64, and those of the export 8e-6.
    """
    agent, space, rng = OnnxAgent(path), model.observation_space, np.random.default_rng(0)
    space.seed(0)
    state: Any = None
    onnx_state: Any = None
    seen: list[tuple[Any, np.ndarray, Any, Any]] = []
    for step in range(steps):
        obs, starts = sample(space, rows), rng.random(rows) < (1 if step == 0 else 0.1)
        seen.append((obs, starts, state, onnx_state))
        actions, state = model.predict(obs, state, starts, deterministic=True)
        onnx_actions, onnx_state = agent.predict(obs, onnx_state, starts)
        assert (onnx_actions.dtype, onnx_actions.shape) == (actions.dtype, actions.shape)
        tolerance = TOLERANCE if isinstance(model.action_space, spaces.Box) else 0
        np.testing.assert_allclose(onnx_actions, actions, rtol=0, atol=tolerance, err_msg=f"actions at step {step}")
        assert onnx_state.keys() == state.keys()
        for name, leaf in state.items():
            atol = TOLERANCE * max(1.0, float(np.abs(leaf).max())) if large_states else TOLERANCE
            np.testing.assert_allclose(onnx_state[name], leaf, rtol=0, atol=atol, err_msg=f"{name} at step {step}")
    if isinstance(space, spaces.Dict):
        return
    # The values of all steps but the first, as one batch.
    obs, starts = (np.concatenate([entry[index] for entry in seen[1:]]) for index in (0, 1))
    states, onnx_states = (
        {name: np.concatenate([entry[index][name] for entry in seen[1:]]) for name in state} for index in (2, 3)
    )
    got = agent.step(obs, onnx_states, starts)["value"]
    tensor_obs = model.policy.obs_to_tensor(obs)[0]
    np.testing.assert_allclose(got, values(model, tensor_obs, states, starts), rtol=TOLERANCE, atol=TOLERANCE)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[MemoryPPO, Path]:
    """:return: An agent with every leaf of the state, and its export."""
    path = tmp_path_factory.mktemp("export") / "agent.onnx"
    model = make_model()
    export_onnx(model, path)
    return model, path


# --- the exported step equals the agent -----------------------------------------------------------------------------------


def test_the_exported_agent_acts_as_the_agent(exported: tuple[MemoryPPO, Path]) -> None:
    assert_acts_alike(*exported, steps=150)


@pytest.mark.slow
@pytest.mark.parametrize("actions", ["discrete", "box"])
@pytest.mark.parametrize("kind", MEMORIES)
@pytest.mark.parametrize("mode", ENCODERS)
def test_every_exported_stack_acts_as_the_agent(mode: str, kind: str, actions: str, tmp_path: Path) -> None:
    model = make_model(mode, kind, actions)
    export_onnx(model, tmp_path / "agent.onnx", check=False)
    assert_acts_alike(model, tmp_path / "agent.onnx", steps=500)


SQUASHED_SDE: dict[str, Any] = {"use_sde": True, "policy_kwargs": {"squash_output": True}}


@pytest.mark.parametrize(
    ("actions", "observations", "policy", "settings"),
    [
        pytest.param("box_2x3", "matrix", "MlpPolicy", {}, marks=pytest.mark.slow),
        pytest.param("box", "box", "MlpPolicy", {"use_sde": True}, marks=pytest.mark.slow),
        pytest.param("multi_binary", "multi_discrete", "MlpPolicy", {}, marks=pytest.mark.slow),
        ("multi_discrete", "discrete", "MlpPolicy", {}),
        pytest.param("discrete", "image", "CnnPolicy", {}, marks=pytest.mark.slow),
        pytest.param("box", "dict", "MultiInputPolicy", SQUASHED_SDE, marks=pytest.mark.slow),
    ],
)
def test_every_space_is_exported(
    actions: str, observations: str, policy: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    model = make_model("lstm", "kv", actions, observations, policy, **settings)
    export_onnx(model, tmp_path / "agent.onnx")
    assert_acts_alike(model, tmp_path / "agent.onnx", steps=60, large_states=observations in ("image", "dict"))


@pytest.mark.slow
def test_squashed_actions_of_gsde(tmp_path: Path) -> None:
    model = make_model("mamba", "pmm", "box", **SQUASHED_SDE)
    export_onnx(model, tmp_path / "agent.onnx", check=False)
    assert_acts_alike(model, tmp_path / "agent.onnx", steps=60)
    outputs = OnnxAgent(tmp_path / "agent.onnx").step(np.zeros((2, 3)))
    with th.no_grad():
        distribution, _ = model.policy.get_distribution(
            th.zeros(2, 3), model.policy.get_initial_state(2), th.zeros(2, dtype=th.bool)
        )
    normal: Any = distribution.distribution
    np.testing.assert_allclose(outputs["mean"], normal.mean, atol=TOLERANCE)
    np.testing.assert_allclose(np.exp(outputs["log_std"]), normal.stddev, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["multi_discrete", "multi_binary"])
def test_action_masks_are_an_input(name: str, tmp_path: Path) -> None:
    space = MASKABLE_SPACES[name]
    env = toy_vec_env(2, lambda: MaskedToyEnv(VECTOR, space))
    model = MaskableMemoryPPO("MlpPolicy", env, n_steps=8, batch_size=8, use_last_action=True, policy_kwargs=small(), seed=0)
    randomize(model)
    export_onnx(model, tmp_path / "agent.onnx")
    agent, rng = OnnxAgent(tmp_path / "agent.onnx", seed=0), np.random.default_rng(0)
    state: Any = None
    onnx_state: Any = None
    starts = np.ones(2, dtype=bool)
    for _ in range(40):
        obs, masks = sample(VECTOR, 2), np.stack(env.env_method("action_masks"))
        actions, state = model.predict(obs, state, starts, True, action_masks=masks)
        onnx_actions, onnx_state = agent.predict(obs, onnx_state, starts, action_masks=masks)
        np.testing.assert_array_equal(onnx_actions, actions)
        sampled, _ = agent.predict(obs, onnx_state, starts, deterministic=False, action_masks=masks)
        env.env_method("step", sampled[0], indices=0)  # it asserts that the action is legal
        env.env_method("step", sampled[1], indices=1)
        starts = rng.random(2) < 0.2
    agent.predict(obs, onnx_state)  # without masks all actions are legal
    maskable.evaluate_policy(agent, env, n_eval_episodes=4, warn=False)  # type: ignore[arg-type]  # it calls `predict` alone
    with pytest.raises(ValueError, match="no legal action"):
        agent.predict(obs, onnx_state, action_masks=np.zeros_like(masks))
    with pytest.raises(ValueError, match="must have shape"):
        agent.predict(obs, onnx_state, action_masks=masks[:, 1:])


# --- planted faults -------------------------------------------------------------------------------------------------------


def _ignore_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sb3_cyborg.memory_ppo.policies.keep_mask", lambda starts: th.ones_like(starts, dtype=th.bool))


def _forget_last_action(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Inputs, "remember", lambda self, state, actions: state)


@pytest.mark.parametrize(
    ("plant", "where"), [(_ignore_reset, "state|encoder|memory|time"), (_forget_last_action, "last_action")]
)
def test_a_planted_fault_is_found(plant: Callable[[pytest.MonkeyPatch], None], where: str, tmp_path: Path) -> None:
    model = make_model("gru", "none")
    with pytest.MonkeyPatch.context() as monkeypatch:
        plant(monkeypatch)
        export_onnx(model, tmp_path / "agent.onnx")
    with pytest.raises(AssertionError, match=where):
        assert_acts_alike(model, tmp_path / "agent.onnx", steps=60)


def test_an_export_that_computes_something_else_is_refused(tmp_path: Path) -> None:
    """A part that keeps a state outside of the State is traced once, with the value it has then."""
    model = make_model("gru", "none", "discrete", policy_kwargs={"features_extractor_class": CountingExtractor})
    with pytest.raises(ValueError, match="computes something else than the agent"):
        export_onnx(model, tmp_path / "agent.onnx")
    assert not (tmp_path / "agent.onnx").exists()


class CountingExtractor(BaseFeaturesExtractor):
    """It adds the number of its calls to the features: a state outside of the State."""

    def __init__(self, observation_space: spaces.Space[Any]) -> None:
        super().__init__(observation_space, 3)
        self.calls = 0

    def forward(self, observations: th.Tensor) -> th.Tensor:
        self.calls += 1
        return observations + self.calls


# --- predict --------------------------------------------------------------------------------------------------------------


def test_predict_takes_single_observations_and_any_batch(exported: tuple[MemoryPPO, Path]) -> None:
    model, path = exported
    agent = OnnxAgent(path)
    for rows in (1, 2, 9):
        action, state = agent.predict(np.zeros((rows, 3)))
        assert action.shape == (rows,)
        assert all(len(leaf) == rows for leaf in state.values())
    action, state = agent.predict(np.zeros(3), episode_start=[True])
    want, _ = model.predict(np.zeros(3, dtype=np.float32), episode_start=np.ones(1), deterministic=True)
    assert action.shape == want.shape == ()
    assert action == want
    assert all(
        np.array_equal(leaf, model.policy.get_initial_state(2)[name]) for name, leaf in agent.get_initial_state(2).items()
    )


def test_sampled_actions_have_the_probabilities_of_the_agent(exported: tuple[MemoryPPO, Path]) -> None:
    model, path = exported
    agent, rows = OnnxAgent(path, seed=0), 4000
    obs = np.tile(np.array([0.5, -0.2, 0.9], dtype=np.float32), (rows, 1))
    actions, state = agent.predict(obs, deterministic=False)
    with th.no_grad():
        distribution, _ = model.policy.get_distribution(
            th.as_tensor(obs[:1]), model.policy.get_initial_state(1), th.zeros(1, dtype=th.bool)
        )
    categorical: Any = distribution.distribution
    want = categorical.probs[0].numpy()
    assert np.abs(np.bincount(actions, minlength=3) / rows - want).max() < 5 * np.sqrt(0.25 / rows)
    np.testing.assert_array_equal(state["last_action"], np.eye(3)[actions])
    again, _ = OnnxAgent(path, seed=0).predict(obs, deterministic=False)
    np.testing.assert_array_equal(again, actions)


def test_evaluate_policy_works(exported: tuple[MemoryPPO, Path]) -> None:
    _, path = exported
    returns, lengths = evaluate_policy(
        OnnxAgent(path), toy_vec_env(2), n_eval_episodes=4, return_episode_rewards=True, warn=False
    )
    assert len(returns) == len(lengths) == 4  # type: ignore[arg-type]


# --- the file -------------------------------------------------------------------------------------------------------------


def test_the_metadata_describe_the_agent(exported: tuple[MemoryPPO, Path]) -> None:
    model, path = exported
    agent = OnnxAgent(path)
    described = agent.metadata
    assert described["format"] == 1
    assert (described["encoder"], described["memory"], described["opset"]) == ("gru", "ring", 20)
    assert described["versions"]["torch"].startswith(str(th.__version__).split("+")[0])
    assert described["observation"] == [{"name": "observation", "kind": "Box", "shape": [3], "dtype": "float32"}]
    assert described["action_space"] == {"kind": "Discrete", "shape": [], "dtype": "int64", "n": 3}
    assert described["state"].keys() == model.policy.get_initial_state(1).keys()
    assert agent.sha256 is not None
    assert len(agent.sha256) == 64


def test_a_damaged_file_is_refused(exported: tuple[MemoryPPO, Path], tmp_path: Path) -> None:
    content, path = exported[1].read_bytes(), tmp_path / "damaged.onnx"
    layer: Any = exported[0].policy.action_net
    weight = layer.weight.detach().numpy().tobytes()[:16]
    place = content.index(weight)
    path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    with pytest.raises(ValueError, match="content hash differs"):
        OnnxAgent(path)
    assert OnnxAgent(path, verify=False).sha256 is None
    for damaged in (content[: len(content) // 2], b"", b"no model", content[1000:]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"damaged\.onnx"):
            OnnxAgent(path)
    with pytest.raises(OSError, match="missing"):
        OnnxAgent(tmp_path / "missing.onnx")


def test_files_of_others_are_refused(exported: tuple[MemoryPPO, Path], tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    proto, path = onnx.load(exported[1]), tmp_path / "other.onnx"
    described = json.loads(next(entry.value for entry in proto.metadata_props if entry.key == "sb3_cyborg"))

    def write(text: str | None) -> None:
        del proto.metadata_props[:]
        if text is not None:
            onnx.helper.set_model_props(proto, {"sb3_cyborg": text})
        onnx.save(proto, path)

    for text, reason in (
        (None, "was not exported by sb3_cyborg"),
        ("{", "is damaged"),
        ("[]", "is damaged"),
        (json.dumps(described | {"format": 2}), "format 2"),
        (json.dumps({"format": 1}), "lacks"),
    ):
        write(text)
        with pytest.raises(ValueError, match=reason):
            OnnxAgent(path)
    write(json.dumps(described))
    with pytest.raises(ValueError, match="content hash"):
        OnnxAgent(path)
    proto.opset_import[0].version = 999
    onnx.save(proto, path)
    with pytest.raises(ValueError, match=r"cannot load this file.*(?i:opset)"):
        OnnxAgent(path)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (lambda state: (np.zeros((2, 4)), None), r"must have shape \(3,\)"),
        (lambda state: (np.zeros((2, 1, 3)), None), r"must have shape \(3,\)"),
        (lambda state: ({"vector": np.zeros((2, 3))}, None), "got a dict"),
        (lambda state: ((np.zeros(3), {}), None), "gymnasium's API"),
        (lambda state: (np.array([[0, np.nan, 0]]), None), "must be finite"),
        (lambda state: (np.array([["a", "b", "c"]]), None), "must hold numbers"),
        (lambda state: (np.zeros((3, 3)), state), "for 3 observations"),
        (lambda state: (np.zeros((2, 3)), {**state, "other": np.zeros(2)}), "got .*other"),
        (lambda state: (np.zeros((2, 3)), (np.zeros(2), np.zeros(2))), "got tuple"),
        (lambda state: (np.zeros((2, 3)), {**state, "time": np.zeros((2, 1))}), r"state\['time'\]"),
        (lambda state: (np.zeros((2, 3)), state, [True]), "`episode_start` has 1 rows"),
        (lambda state: (np.zeros((2, 3)), state, None, True, np.ones((2, 3))), "without action masks"),
    ],
)
def test_wrong_input_is_refused(exported: tuple[MemoryPPO, Path], arguments: Callable[[Any], Any], reason: str) -> None:
    agent = OnnxAgent(exported[1])
    with pytest.raises(ValueError, match=reason):
        agent.predict(*arguments(agent.get_initial_state(2)))


# --- what cannot be exported ------------------------------------------------------------------------------------------------


class BranchingCore(GRUCore):
    """An encoder that branches on values."""

    def forward_step(self, x: th.Tensor, state: Any, mask: th.Tensor | None = None) -> Any:
        return super().forward_step(x if x.sum() > 0 else -x, state, mask)


def test_an_encoder_that_does_not_export_is_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setitem(ENCODERS, "branching", BranchingCore)
        model = make_model("branching", "none")
    with pytest.raises(ValueError, match=r"must not branch on the values of tensors.*data-dependent"):
        export_onnx(model, tmp_path / "agent.onnx")


@pytest.mark.parametrize("opset", [17, 999, True, "20"])
def test_an_unknown_opset_is_refused(opset: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`opset` must be from 18 to"):
        export_onnx(make_model("gru", "none"), tmp_path / "agent.onnx", opset=opset)


# --- VecNormalize ---------------------------------------------------------------------------------------------------------


def normalized_env(**settings: Any) -> VecNormalize:
    env = VecNormalize(toy_vec_env(2), **settings)
    rng = np.random.default_rng(1)
    moments: Any = env.obs_rms
    moments.update(rng.normal(3.0, 5.0, (50, 3)))
    return env


def test_vec_normalize_is_a_part_of_the_step() -> None:
    env = normalized_env(clip_obs=0.5)
    model = make_model("gru", "none", env=env)
    step = AgentStep(model.policy, env)
    obs = np.random.default_rng(0).normal(3.0, 5.0, (40, 3)).astype(np.float32)
    want = env.normalize_obs(obs)
    assert isinstance(want, np.ndarray)
    assert np.abs(want).max() == 0.5
    np.testing.assert_array_equal(step._normalized(th.as_tensor(obs)), want)


def test_vec_normalize_that_cannot_be_exported_is_refused() -> None:
    model, env = make_model("gru", "none"), normalized_env()
    moments: Any = env.obs_rms
    moments.mean = np.zeros(6)  # as below a VecFrameStack
    with pytest.raises(ValueError, match="a wrapper outside of `VecNormalize`"):
        AgentStep(model.policy, env)

    class Other(VecNormalize):
        def normalize_obs(self, obs: Any) -> Any:
            return obs

    with pytest.raises(ValueError, match="Other overrides"):
        AgentStep(model.policy, Other(toy_vec_env(2)))


@pytest.mark.slow
def test_the_command_exports_a_run_with_its_vec_normalize(tmp_path: Path) -> None:
    from sb3_cyborg.trainers.trainer_v7 import TrainerV7

    trainer = TrainerV7(
        {"env": "CartPole-v1", "n_envs": 2, "n_steps": 64, "normalize": True, "log_dir": str(tmp_path), "hidden_dim": 8}
    )
    trainer.train(total_timesteps=512)
    normalize, run = trainer.normalize, trainer.run
    assert normalize is not None
    trainer.close()
    for arguments in (["-o", "a.onnx"], ["--format", "pt2", "-o", "a.pt2"]):
        command = [sys.executable, "-m", "sb3_cyborg.cli", "export", str(run), "--which", "last", *arguments]
        subprocess.run(command, check=True, timeout=600, cwd=tmp_path)
    agent, program = OnnxAgent(tmp_path / "a.onnx"), th.export.load(tmp_path / "a.pt2").module()
    state: Any = None
    onnx_state: Any = None
    for step in range(30):
        obs = np.random.default_rng(step).normal(size=(2, 4)).astype(np.float32)
        starts = np.array([step == 0, step % 7 == 0])
        actions, state = trainer.model.predict(normalize.normalize_obs(obs), state, starts, True)
        pt2_state = agent.get_initial_state(2) if onnx_state is None else onnx_state
        with th.no_grad():
            outputs, pt2_state = program(
                observation=th.as_tensor(obs),
                state={name: th.as_tensor(leaf) for name, leaf in pt2_state.items()},
                episode_start=th.as_tensor(starts),
            )
        onnx_actions, onnx_state = agent.predict(obs, onnx_state, starts)
        np.testing.assert_array_equal(onnx_actions, actions)
        np.testing.assert_array_equal(outputs["action"], actions)
        for name, leaf in state.items():
            np.testing.assert_allclose(onnx_state[name], leaf, atol=TOLERANCE)
            np.testing.assert_allclose(pt2_state[name], leaf, atol=TOLERANCE)


def test_the_command_refuses_wrong_usage(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from sb3_cyborg.cli import app

    for arguments, reason in (
        (["--format", "tflite"], "'onnx' or 'pt2'"),
        (["--format", "pt2", "--opset", "20"], "leave it out"),
    ):
        result = CliRunner().invoke(app, ["export", str(tmp_path), *arguments])
        assert result.exit_code == 2
        assert reason in result.stderr


def test_the_policy_is_left_as_it_was() -> None:
    model = make_model("gru", "none")
    model.policy.set_training_mode(True)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("sb3_cyborg.export._trace", lambda step, example: (_ for _ in ()).throw(ValueError("stop")))
        before = th.get_rng_state()
        with pytest.raises(ValueError, match="stop"):
            export_pt2(model, "unused.pt2")
    assert model.policy.training
    assert th.equal(before, th.get_rng_state())


# --- without PyTorch --------------------------------------------------------------------------------------------------------


def test_the_runtime_imports_neither_pytorch_nor_sb3(exported: tuple[MemoryPPO, Path]) -> None:
    script = (
        "import sys\n"
        "from sb3_cyborg.runtime import OnnxAgent\n"
        f"agent = OnnxAgent({str(exported[1])!r})\n"
        "agent.predict([0.0, 0.0, 0.0])\n"
        "found = {'torch', 'stable_baselines3', 'sb3_contrib'} & sys.modules.keys()\n"
        "assert not found, found\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_the_package_imports_its_names_on_access() -> None:
    import sb3_cyborg

    for name in sb3_cyborg.__all__:
        assert getattr(sb3_cyborg, name) is not None
    assert set(sb3_cyborg.__all__) <= set(dir(sb3_cyborg))
    assert set(sb3_cyborg.__all__) | {"TrainerV7"} == sb3_cyborg._MODULES.keys()
    with pytest.raises(AttributeError, match="has no attribute 'Missing'"):
        _ = sb3_cyborg.Missing
