"""
Export of a trained agent: one step of acting as an ONNX graph or as a ``torch.export`` program.

The graph contains everything between the observation of the environment and its action: normalization, one-hot vectors,
scaling of images, features, the last action, the time step, encoder, memory, heads, clipping or scaling of actions. The state
is an input and an output. :class:`sb3_cyborg.runtime.OnnxAgent` acts with the file.

It needs ``pip install "sb3-cyborg[export]"``.
"""

import base64
import copy
import hashlib
import io
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.distributions import (
    BernoulliDistribution,
    CategoricalDistribution,
    DiagGaussianDistribution,
    Distribution,
    MultiCategoricalDistribution,
    StateDependentNoiseDistribution,
)
from stable_baselines3.common.preprocessing import is_image_space, is_image_space_channels_first
from stable_baselines3.common.vec_env import VecNormalize
from torch import nn

from sb3_cyborg.checks import warn_caller
from sb3_cyborg.files import write_atomically
from sb3_cyborg.memory_ppo.action_masks import component_sizes
from sb3_cyborg.memory_ppo.maskable import MaskableMemoryPPO
from sb3_cyborg.memory_ppo.memory_ppo import MemoryPPO
from sb3_cyborg.memory_ppo.policies import MemoryActorCriticPolicy
from sb3_cyborg.packages import package_versions
from sb3_cyborg.sequence_model import State

FORMAT = 1
"""Version of the names, shapes and the description, see :mod:`sb3_cyborg.runtime`."""
OPSET = 20
"""Default version of ONNX's operator set: onnxruntime >= 1.17 and onnxruntime-web read it."""
LEAST_OPSET = 18
"""Lowest version that PyTorch's exporter writes."""
EXAMPLE_ROWS = 3
"""Rows of the example from which the graph is traced. PyTorch would treat 0 and 1 rows as constants."""
MOST_ROWS = 2**20
CHECK_STEPS, CHECK_ROWS, CHECK_TOLERANCE = 6, 2, 1e-4
"""Steps, rows and relative tolerance of the comparison that follows an export."""

Normalizer = Mapping[str, tuple[np.ndarray, np.ndarray]]


class AgentStep(nn.Module):
    """
    One step of acting, from the observation of the environment to its action.

    :param policy: The policy, on the CPU, in evaluation mode.
    :param normalize: ``VecNormalize`` of the agent, or ``None``.
    """

    low: th.Tensor
    high: th.Tensor

    def __init__(self, policy: MemoryActorCriticPolicy, normalize: VecNormalize | None = None) -> None:
        super().__init__()
        self.policy = policy
        self.clip_obs = 0.0 if normalize is None else float(normalize.clip_obs)
        self.moments = _moments(normalize, policy.observation_space)
        if isinstance(policy.action_space, spaces.Box):
            self.register_buffer("low", th.as_tensor(policy.action_space.low))
            self.register_buffer("high", th.as_tensor(policy.action_space.high))

    def forward(
        self, observation: Any, state: State, episode_start: th.Tensor, action_masks: th.Tensor | None = None
    ) -> tuple[dict[str, th.Tensor], State]:
        """
        :param observation: Observations of the environment, (B, ...), or a dictionary of them.
        :param state: State before the step, every leaf (B, ...).
        :param episode_start: True where an episode starts with the observation, (B,).
        :param action_masks: Legal actions, bool, (B, M); ``None`` if all are.
        :return: The outputs by name: ``action``, the mode, as the environment takes it; ``logits`` (B, n), or ``mean`` and
            ``log_std`` (B, A); ``value`` (B,). And the state after the step, with this action as the last one.
        """
        policy = self.policy
        latent, state = policy._core_step(self._normalized(observation), state, episode_start)
        latent_pi, latent_vf = policy.mlp_extractor(latent)
        distribution = policy._make_distribution(latent_pi, action_masks)
        actions = distribution.get_actions(deterministic=True)
        outputs = {"action": self._environment_actions(policy._shape_actions(actions))}
        outputs |= sampling_parameters(distribution)
        outputs["value"] = policy.value_net(latent_vf).flatten()
        return outputs, policy.inputs.remember(state, actions.unsqueeze(-1))

    def _normalized(self, observation: Any) -> Any:
        """Normalize as ``VecNormalize`` does: in float64, with the result in float32."""
        if not self.moments:
            return observation
        parts = observation if isinstance(observation, dict) else {"": observation}
        normalized = dict(parts)
        for name, (mean, std) in self.moments.items():
            values = (parts[name].double() - th.as_tensor(mean)) / th.as_tensor(std)
            normalized[name] = values.clamp(-self.clip_obs, self.clip_obs).float()
        return normalized if isinstance(observation, dict) else normalized[""]

    def _environment_actions(self, actions: th.Tensor) -> th.Tensor:
        if not isinstance(self.policy.action_space, spaces.Box):
            return actions
        if self.policy.squash_output:
            return self.low + 0.5 * (actions + 1.0) * (self.high - self.low)
        return th.minimum(th.maximum(actions.to(self.low.dtype), self.low), self.high)


def sampling_parameters(distribution: Distribution) -> dict[str, th.Tensor]:
    """
    :param distribution: SB3's distribution of B rows.
    :return: ``logits`` (B, n), normalized for categorical actions; or ``mean`` and ``log_std`` (B, A), before a tanh.
    :raises ValueError: for another distribution.
    """
    if isinstance(distribution, (CategoricalDistribution, BernoulliDistribution)):
        return {"logits": distribution.distribution.logits}
    if isinstance(distribution, MultiCategoricalDistribution):
        return {"logits": th.cat([part.logits for part in distribution.distribution], dim=-1)}
    if isinstance(distribution, (DiagGaussianDistribution, StateDependentNoiseDistribution)):
        return {"mean": distribution.distribution.mean, "log_std": distribution.distribution.stddev.log()}
    raise ValueError(f"The export knows SB3's distributions of actions, got {type(distribution).__name__}.")


def _moments(normalize: VecNormalize | None, space: spaces.Space[Any]) -> Normalizer:
    """:return: Mean and standard deviation of the normalized observations, by key; the key of an array is ``""``."""
    if normalize is None or not normalize.norm_obs:
        return {}
    for name in ("_normalize_obs", "normalize_obs"):
        if getattr(type(normalize), name) is not getattr(VecNormalize, name):
            raise ValueError(f"{type(normalize).__name__} overrides `VecNormalize.{name}`, which the export does not know.")
    parts = space.spaces if isinstance(space, spaces.Dict) else {"": space}
    moments = normalize.obs_rms if isinstance(normalize.obs_rms, dict) else {"": normalize.obs_rms}
    for name, running in moments.items():
        where = f"{name!r} " if name else ""
        shape = parts[name].shape if name in parts else None
        if shape != np.shape(running.mean):
            raise ValueError(
                f"`VecNormalize` normalizes observations {where}of shape {np.shape(running.mean)}, but the agent reads "
                f"{shape}: a wrapper outside of `VecNormalize` changes them. Put `VecNormalize` outside of it."
            )
        if len(shape) == 3:
            raise ValueError(
                f"`VecNormalize` normalizes images {where}, and the dtype of the original ones is not known to the agent: it "
                "cannot be exported. List the other observations in `norm_obs_keys`."
            )
    return {name: (running.mean, np.sqrt(running.var + normalize.epsilon)) for name, running in moments.items()}


# --- description ----------------------------------------------------------------------------------------------------------


def observation_parts(space: spaces.Space[Any]) -> dict[str, spaces.Space[Any]]:
    """
    :param space: Observation space.
    :return: The spaces of the inputs by name: ``observation``, or ``observation.<key>`` for each entry of a Dict.
    """
    if isinstance(space, spaces.Dict):
        return {f"observation.{key}": part for key, part in space.spaces.items()}
    return {"observation": space}


def describe_observation(name: str, space: spaces.Space[Any]) -> dict[str, Any]:
    """
    :param name: Name of the input.
    :param space: Space of the observation, or of one entry of a Dict.
    :return: Name, kind, shape and dtype; ``sizes`` for discrete numbers; ``channels_first`` for images.
    """
    described: dict[str, Any] = {
        "name": name,
        "kind": type(space).__name__,
        "shape": list(space.shape or ()),
        "dtype": str(space.dtype),
    }
    if isinstance(space, spaces.Discrete):
        described["sizes"] = int(space.n)
    if isinstance(space, spaces.MultiDiscrete):
        described["sizes"] = space.nvec.tolist()
    if isinstance(space, spaces.Box) and is_image_space(space) and is_image_space_channels_first(space):
        described["channels_first"] = True
    return described


def describe_actions(space: spaces.Space[Any]) -> dict[str, Any]:
    """
    :param space: Action space.
    :return: Kind, shape and dtype; ``n``, ``nvec``, or ``low`` and ``high``.
    """
    described: dict[str, Any] = {"kind": type(space).__name__, "shape": list(space.shape or ()), "dtype": str(space.dtype)}
    if isinstance(space, spaces.Discrete):
        described["n"] = int(space.n)
    if isinstance(space, spaces.MultiDiscrete):
        described["nvec"] = space.nvec.flatten().tolist()
    if isinstance(space, spaces.Box):
        described |= {"low": space.low.tolist(), "high": space.high.tolist()}
    return described


def describe_state(state: State) -> dict[str, Any]:
    """
    :param state: The initial state of one row.
    :return: Shape without batch dimension, dtype and initial value of each leaf: a number, or little-endian bytes in Base64.
    """
    described = {}
    for name, leaf in state.items():
        values = leaf[0].numpy()
        flat = values.reshape(-1)
        constant = bool((flat == flat[0]).all()) if flat.size else True
        little_endian = values.astype(values.dtype.newbyteorder("<")).tobytes()
        initial = (flat[0].item() if flat.size else 0) if constant else base64.b64encode(little_endian).decode()
        described[name] = {"shape": list(values.shape), "dtype": str(values.dtype), "initial": initial}
    return described


def describe(model: MemoryPPO, normalize: VecNormalize | None, masks: int | None) -> dict[str, Any]:
    """
    :param model: The agent.
    :param normalize: ``VecNormalize`` in the graph, or ``None``.
    :param masks: Entries of an action mask; ``None`` for an agent without masks.
    :return: The description that the file contains, as JSON can hold it.
    """
    policy = model.policy
    core = policy._core_kwargs
    return {
        "format": FORMAT,
        "algorithm": type(model).__name__,
        "encoder": core["encoder"],
        "memory": core["memory"],
        "num_timesteps": int(model.num_timesteps),
        "observation": [describe_observation(*part) for part in observation_parts(policy.observation_space).items()],
        "action_space": describe_actions(policy.action_space),
        "state": describe_state(policy.get_initial_state(1)),
        "squash_output": bool(policy.squash_output),
        "action_masks": masks,
        "vec_normalize": bool(normalize is not None and normalize.norm_obs),
        "versions": package_versions(),
    }


# --- tracing --------------------------------------------------------------------------------------------------------------


@contextmanager
def _ready(policy: MemoryActorCriticPolicy) -> Iterator[None]:
    """A context in which the policy is on the CPU, in evaluation mode, in float32."""
    device, training, amp = policy.device, policy.training, policy.amp
    policy.to("cpu")
    policy.set_training_mode(False)
    policy.amp = False
    try:
        with th.no_grad():
            yield
    finally:
        policy.amp = amp
        policy.set_training_mode(training)
        policy.to(device)


def _sample(space: spaces.Space[Any], rows: int) -> th.Tensor:
    """:return: Random observations (B, ...)."""
    return th.as_tensor(np.stack([np.asarray(space.sample(), dtype=space.dtype) for _ in range(rows)]))


def _example(policy: MemoryActorCriticPolicy, masks: int | None, rows: int, seed: int = 0) -> dict[str, Any]:
    """:return: Arguments of :meth:`AgentStep.forward`: random observations and the initial state. No generator is changed."""
    parts = copy.deepcopy(policy.observation_space)
    parts.seed(seed)
    sampled: Any = (
        {key: _sample(part, rows) for key, part in parts.spaces.items()}
        if isinstance(parts, spaces.Dict)
        else _sample(parts, rows)
    )
    starts = th.arange(rows) == 0
    example = {"observation": sampled, "state": policy.get_initial_state(rows), "episode_start": starts}
    return example if masks is None else example | {"action_masks": th.ones(rows, masks, dtype=th.bool)}


def _trace(step: AgentStep, example: dict[str, Any]) -> th.export.ExportedProgram:
    """:raises ValueError: with the reason of PyTorch, if the step cannot be traced."""
    batch = {0: th.export.Dim("batch", min=1, max=MOST_ROWS)}
    shapes = {name: dict.fromkeys(value, batch) if isinstance(value, dict) else batch for name, value in example.items()}
    try:
        return th.export.export(step, (), example, dynamic_shapes=shapes, strict=False)
    except Exception as error:  # of PyTorch's tracer, and of modules of the user
        raise ValueError(
            "The agent cannot be exported: `torch.export` cannot trace one step of it. A features extractor, encoder or "
            "memory of your own must not branch on the values of tensors, see `may_branch`. The reason: "
            f"{type(error).__name__}: {error}"
        ) from error


def _masks(model: MemoryPPO) -> int | None:
    return sum(component_sizes(model.action_space)) if isinstance(model, MaskableMemoryPPO) else None


def _output_names(step: AgentStep, example: dict[str, Any]) -> list[str]:
    outputs, state = step(**example)
    return [*outputs, *(f"next_state.{name}" for name in state)]


def _vec_normalize(model: MemoryPPO, normalize: VecNormalize | None) -> VecNormalize | None:
    return model.get_vec_normalize_env() if normalize is None else normalize


def _warn_of_amp(model: MemoryPPO) -> None:
    if model.policy.amp:
        warn_caller("The agent was trained with `amp=True`, which acts in bfloat16; the exported one acts in float32.")


def export_pt2(model: MemoryPPO, path: str | Path, *, normalize: VecNormalize | None = None) -> None:
    """
    Export one step of an agent as a program of ``torch.export``, for ``torch.export.load`` and AOTInductor.

    The program takes the arguments of :meth:`AgentStep.forward` by name, and returns its results. The description is in the
    extra file ``sb3_cyborg.json``.

    :param model: The agent.
    :param path: The file, usually ``.pt2``.
    :param normalize: As for :func:`export_onnx`.
    :raises ValueError: as :func:`export_onnx`.
    """
    normalize = _vec_normalize(model, normalize)
    _warn_of_amp(model)
    policy = model.policy
    with _ready(policy):
        program = _trace(AgentStep(policy, normalize), _example(policy, _masks(model), EXAMPLE_ROWS))
        described = describe(model, normalize, _masks(model))
    buffer = io.BytesIO()
    th.export.save(program, buffer, extra_files={"sb3_cyborg.json": json.dumps(described)})
    write_atomically(path, lambda file: file.write(buffer.getvalue()))


def export_onnx(
    model: MemoryPPO, path: str | Path, *, normalize: VecNormalize | None = None, opset: int = OPSET, check: bool = True
) -> None:
    """
    Export one step of an agent as an ONNX graph, for :class:`~sb3_cyborg.runtime.OnnxAgent` and any other ONNX runtime.

    Inputs: ``observation``, or ``observation.<key>`` for each entry of a Dict, as the environment returns them;
    ``state.<leaf>``; ``episode_start``, bool, (B,); ``action_masks``, bool, (B, M), of a ``MaskableMemoryPPO``. Outputs:
    ``action``, the mode, as the environment takes it; ``logits``, or ``mean`` and ``log_std``; ``value``, (B,);
    ``next_state.<leaf>``. Every one has a batch dimension B >= 1, which may differ from call to call. The metadata have, under
    ``sb3_cyborg``, a description in JSON: shapes, dtypes, spaces, the initial state, versions.

    :param model: The agent.
    :param path: The file, usually ``.onnx``; its folder is created if it is missing.
    :param normalize: ``VecNormalize`` whose normalization of observations becomes a part of the graph; ``None`` is that of the
        model's environments, if they have one.
    :param opset: Version of ONNX's operator set, >= 18.
    :param check: Compare the graph with the agent on a few random steps, with onnxruntime.
    :raises ValueError: for an agent that cannot be exported, with the reason; for an unknown ``opset``; and for a graph that
        computes something else than the agent.
    :raises ImportError: if onnx, onnxscript or onnxruntime is missing, with the command that installs it.
    """
    onnx = _import_onnx(opset)
    normalize = _vec_normalize(model, normalize)
    _warn_of_amp(model)
    policy, masks = model.policy, _masks(model)
    with _ready(policy):
        step, example = AgentStep(policy, normalize), _example(policy, masks, EXAMPLE_ROWS)
        program = _trace(step, example)
        proto = _convert(program, list(_feed(example)), _output_names(step, example), opset)
        entry = proto.metadata_props.add()
        entry.key, entry.value = "sb3_cyborg", json.dumps(describe(model, normalize, masks) | {"opset": opset})
        onnx.checker.check_model(proto)
        body = proto.SerializeToString()
        content = _with_hash(body)
        if check:
            _check(content, step, masks)
    write_atomically(path, lambda file: file.write(content))


def _import_onnx(opset: int) -> Any:
    """:return: The package ``onnx``, after a check that it and PyTorch know the operator set."""
    try:
        import onnx
        import onnxruntime  # noqa: F401  # checks the graph
        import onnxscript  # noqa: F401  # PyTorch's exporter uses it
    except ModuleNotFoundError as error:
        raise ImportError(f'The export needs {error.name}: pip install "sb3-cyborg[export]"', name=error.name) from error
    most = onnx.defs.onnx_opset_version()
    if isinstance(opset, bool) or not isinstance(opset, int) or not LEAST_OPSET <= opset <= most:
        raise ValueError(f"`opset` must be from {LEAST_OPSET} to {most}, which onnx {onnx.__version__} knows, got {opset!r}.")
    return onnx


def _convert(program: th.export.ExportedProgram, inputs: list[str], outputs: list[str], opset: int) -> Any:
    """:return: The graph as a ``ModelProto``."""
    exporter = logging.getLogger("torch.onnx")
    level = exporter.level
    exporter.setLevel(logging.ERROR)  # it warns of torchvision, which is not used
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecations inside of PyTorch
            converted = th.onnx.export(program, opset_version=opset, dynamo=True, verbose=False)
    except Exception as error:  # of PyTorch's exporter
        raise ValueError(
            f"The agent cannot be exported: an operation has no form in ONNX. The reason: {type(error).__name__}: {error}"
        ) from error
    finally:
        exporter.setLevel(level)
    assert converted is not None
    _rename(converted.model.graph, inputs, outputs)
    proto = converted.model_proto
    written = {entry.domain: entry.version for entry in proto.opset_import}
    if written.get("") != opset:
        raise ValueError(f"The graph cannot be written with `opset`={opset}: the exporter wrote {written.get('')}.")
    return proto


def _rename(graph: Any, inputs: list[str], outputs: list[str]) -> None:
    """Name inputs and outputs. All other values are numbered: the exporter's own names, such as ``mean``, may be the same."""
    for number, node in enumerate(graph):
        for index, value in enumerate(node.outputs):
            value.name = f"_{number}_{index}"
    for given, names in ((graph.inputs, inputs), (graph.outputs, outputs)):
        for value, name in zip(given, names, strict=True):
            value.name = name


def _with_hash(body: bytes) -> bytes:
    from sb3_cyborg.runtime import hash_entry  # needs onnxruntime

    return body + hash_entry(hashlib.sha256(body).hexdigest())


def _check(content: bytes, step: AgentStep, masks: int | None) -> None:
    """:raises ValueError: for a graph whose outputs differ from those of the step, over a few random steps with resets."""
    import onnxruntime as ort

    try:
        session = ort.InferenceSession(content, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has no public base class for its exceptions
        raise ValueError(f"onnxruntime {ort.__version__} cannot load the exported graph: {error}") from error
    state = step.policy.get_initial_state(CHECK_ROWS)
    for t in range(CHECK_STEPS):
        example = _example(step.policy, masks, CHECK_ROWS, seed=t) | {"state": state}
        example["episode_start"] = th.arange(CHECK_ROWS) == t - 2  # each row but the last is reset once
        outputs, state = step(**example)
        expected = outputs | {f"next_state.{name}": leaf for name, leaf in state.items()}
        names = [output.name for output in session.get_outputs()]
        for name, got in zip(names, session.run(names, _feed(example)), strict=True):
            want = expected[name].numpy()
            apart = np.abs(got.astype(np.float64) - want) / (1 + np.abs(want))
            if name != "action" and not (apart <= CHECK_TOLERANCE).all():
                raise ValueError(
                    f"The exported graph computes something else than the agent: {name!r} differs by {apart.max():.3g} at "
                    f"step {t} of a comparison. A part of your own may keep a state outside of the "
                    "State; otherwise this is a bug."
                )


def _feed(example: dict[str, Any]) -> dict[str, np.ndarray]:
    """:return: The inputs of the graph by name."""
    feed: dict[str, np.ndarray] = {}
    for name, value in example.items():
        parts = {f"{name}.{key}": part for key, part in value.items()} if isinstance(value, dict) else {name: value}
        feed |= {key: part.numpy() for key, part in parts.items()}
    return feed
