"""The step of acting as a recording: one call of compiled code instead of hundreds of calls from Python."""

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch as th
from stable_baselines3.common.distributions import StateDependentNoiseDistribution
from torch import nn

from sb3_cyborg import kernels
from sb3_cyborg.kernels.recording import Recorded, Tensors
from sb3_cyborg.memories.trace import tracing
from sb3_cyborg.sequence_model import State, keep_mask, may_branch

KNOWN_PACKAGES = ("torch", "stable_baselines3", "sb3_contrib", "sb3_cyborg")
"""Packages whose modules depend on their inputs and parameters alone. Those of others might do more: they are not recorded."""

STEP_METHODS = frozenset(
    (
        *("forward", "_predict", "get_distribution", "extract_features", "_core_step", "_features_step", "_choose"),
        *("_make_distribution", "_get_action_dist_from_latent", "_uses_default_categorical", "_shape_actions"),
    )
)
"""Methods of a policy that take part in a step of acting."""

OBSERVATION, FEATURES, STARTS, MASKS, STATE = "observation", "features", "episode_starts", "action_masks", "state."
ACTIONS, VALUES, LOG_PROB, LATENT = "actions", "values", "log_prob", "latent_pi"


class Acted(NamedTuple):
    """Result of a step of acting."""

    actions: th.Tensor
    """As sampled, (B, ...)."""
    values: th.Tensor
    """(B, 1)."""
    log_prob: th.Tensor
    """(B,)."""
    state: State
    """After the step and its actions."""


class RecordedStep:
    """
    The step of acting of a policy. What cannot be recorded runs as it is: features extractors of other packages or with
    convolutions before the recording, distributions that draw in another way than recorded after it.

    :param policy: The policy, a ``MemoryActorCriticPolicy``, whose module imports this one.
    """

    def __init__(self, policy: Any) -> None:
        self._policy = policy
        self._recorded: dict[tuple[bool, bool, bool], Recorded] = {}
        self._hooks = [hooks for module in policy.modules() for hooks in (module._forward_hooks, module._forward_pre_hooks)]
        modules = list(policy.modules())
        self._tensors = [content for module in modules for content in (module._parameters, module._buffers) if content]
        self._children = [module._modules for module in modules if module._modules]
        self._structure = self._all_children()
        self._told = False
        self.reason = ""
        """Why steps are not recorded; empty if they are, or if none has been taken yet."""
        known, draws = (
            _is_known(policy.features_extractor),
            not isinstance(policy.action_dist, StateDependentNoiseDistribution),
        )
        # The parts to try, the largest first: with features, with the choice of actions.
        parts = [(True, True), (False, True), (True, False), (False, False)]
        self._parts = [part for part in parts if part[0] <= known and part[1] <= draws]
        if kernels.status().isa is None:
            self.reason = "there are no compiled kernels"
        elif not all(map(_is_known, (policy.core, policy.mlp_extractor, policy.action_net, policy.value_net))):
            self.reason = "it has modules of other packages"
        elif _overrides(policy):
            self.reason = f"{type(policy).__name__} overrides {', '.join(_overrides(policy))}"

    def tell_once(self) -> str:
        """:return: Why steps, or parts of them, are not recorded, at the first call; empty if they are, and at later calls."""
        parts = zip(("features", "the choice of actions"), self._parts[0], strict=True)
        missing = " and ".join(name for name, recorded in parts if not recorded)
        text = f"Steps of acting run as they are, without a recording: {self.reason}" if self.reason else ""
        if missing and not text:
            text = f"Steps of acting are recorded without {missing}"
        told, self._told = self._told, True
        return "" if told else text

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copy of the policy makes its own recording."""

    def __reduce__(self) -> tuple[Callable[..., None], tuple[()]]:
        return _nothing, ()

    def is_current(self) -> bool:
        """:return: Whether the policy still consists of the modules that it had."""
        return self._all_children() == self._structure

    def _all_children(self) -> list[nn.Module | None]:
        return list(itertools.chain.from_iterable(map(dict.values, self._children)))

    def applies(self, state: Any, episode_starts: th.Tensor) -> bool:
        """
        :param state: State before the step.
        :param episode_starts: (B,).
        :return: Whether the step can be a recorded one: without gradient, on the CPU, in single precision, in eager mode, not
            in training mode, and without hooks.
        """
        policy = self._policy
        return not (
            self.reason
            or th.is_grad_enabled()
            or policy.training
            or policy.amp
            or tracing()
            or any(self._hooks)
            or not isinstance(state, dict)
            or not may_branch(episode_starts.device)
            or th.is_autocast_enabled("cpu")
        )

    def __call__(
        self, obs: Any, state: State, episode_starts: th.Tensor, deterministic: bool, action_masks: th.Tensor | None
    ) -> Acted | None:
        """
        :param obs: Observations, (B, ...), or a dictionary of them.
        :param state: State before the step.
        :param episode_starts: Non-zero where an episode starts, (B,).
        :param deterministic: Choose the mode instead of a sample.
        :param action_masks: Legal actions, bool, (B, M), or ``None``.
        :return: The result of the step; ``None`` if it is not recorded.
        """
        while True:
            with_features, with_choice = self._parts[0]
            key = with_features, with_choice, deterministic
            recorded = self._recorded.get(key)
            if recorded is None:
                step = functools.partial(self._step, *key)
                recorded = self._recorded[key] = Recorded(step, self._parameters)
            inputs = {STATE + name: leaf for name, leaf in state.items()}
            inputs[STARTS] = episode_starts
            if not with_features:
                inputs[FEATURES] = self._policy.extract_features(obs)
            elif isinstance(obs, dict):
                inputs |= {f"{OBSERVATION}.{name}": value for name, value in obs.items()}
            else:
                inputs[OBSERVATION] = obs
            if action_masks is not None and with_choice:
                inputs[MASKS] = action_masks
            outputs = recorded(inputs)
            if outputs is not None:
                return self._finish(outputs, deterministic, action_masks)
            if not recorded.reason:  # too many batch sizes, or another thread replays it
                return None
            if len(self._parts) == 1:
                self.reason = recorded.reason
                return None
            self._parts = self._parts[1:]

    def _parameters(self) -> list[th.Tensor]:
        tensors: itertools.chain[th.Tensor | None] = itertools.chain.from_iterable(map(dict.values, self._tensors))
        return [tensor for tensor in tensors if tensor is not None]

    def _step(self, with_features: bool, with_choice: bool, deterministic: bool, inputs: Tensors) -> Tensors:
        """:return: The recorded part of a step."""
        policy = self._policy
        state = {name.removeprefix(STATE): leaf for name, leaf in inputs.items() if name.startswith(STATE)}
        mask = keep_mask(inputs[STARTS])
        if with_features:
            prefix = f"{OBSERVATION}."
            parts = {name.removeprefix(prefix): value for name, value in inputs.items() if name.startswith(prefix)}
            features = policy.extract_features(parts or inputs[OBSERVATION])
        else:
            features = inputs[FEATURES]
        latent, new_state = policy._features_step(features, state, mask)
        latent_pi, latent_vf = policy.mlp_extractor(latent)
        outputs = {VALUES: policy.value_net(latent_vf)}
        if with_choice:
            actions, outputs[LOG_PROB] = policy._choose(latent_pi, deterministic, inputs.get(MASKS))
            outputs[ACTIONS] = actions
            new_state = policy.inputs.remember(new_state, actions.unsqueeze(-1))
        else:
            outputs[LATENT] = latent_pi
        return outputs | {STATE + name: leaf for name, leaf in new_state.items()}

    def _finish(self, outputs: Tensors, deterministic: bool, action_masks: th.Tensor | None) -> Acted:
        """:return: The result of a step from the outputs of its recorded part."""
        state = {name.removeprefix(STATE): leaf for name, leaf in outputs.items() if name.startswith(STATE)}
        if ACTIONS in outputs:
            return Acted(outputs[ACTIONS], outputs[VALUES], outputs[LOG_PROB], state)
        actions, log_prob = self._policy._choose(outputs[LATENT], deterministic, action_masks)
        return Acted(actions, outputs[VALUES], log_prob, self._policy.inputs.remember(state, actions.unsqueeze(-1)))


def _nothing() -> None:
    return None


def _is_known(module: nn.Module) -> bool:
    """:return: Whether the module and all parts of it are of packages that are known."""
    return all(type(part).__module__.split(".")[0] in KNOWN_PACKAGES for part in module.modules())


def _overrides(policy: nn.Module) -> list[str]:
    """:return: Methods of the step of acting that a class of another package overrides."""
    classes = [base for base in type(policy).__mro__ if base.__module__.split(".")[0] not in KNOWN_PACKAGES]
    return sorted({name for base in classes for name in vars(base) if name in STEP_METHODS})
