"""Bytes that a model needs, computed before they are allocated."""

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch as th
from gymnasium import spaces
from torch import nn

from sb3_cyborg.checks import available_memory, readable_bytes
from sb3_cyborg.encoders.encoder_v7 import EncoderV7
from sb3_cyborg.memories.memory_v7 import MemoryV7
from sb3_cyborg.memory_ppo.rollout_buffer_v7 import row_bytes
from sb3_cyborg.sequence_model import SequenceModel

COPIES = 4
"""Tensors of the size of a parameter in training: the parameter, its gradient and Adam's two moments."""


CORE_SIZES = ("encoder", "hidden_dim", "latent_dim", "num_layers", "encoder_kwargs", "memory", "memory_kwargs")
"""Arguments of the policy that encoder and memory are made of."""


def check_memory(what: str, size: int, device: th.device | str = "cpu") -> None:
    """
    Require that a size fits into the memory of a device.

    :param what: Subject of the message, with the numbers that the size follows from.
    :param size: Bytes to allocate.
    :param device: Device to allocate on.
    :raises ValueError: if less memory is available, with both sizes.
    """
    available = available_memory(device)
    if size > available:
        raise ValueError(
            f"{what} would take {readable_bytes(size)} ({size} bytes), but only {readable_bytes(available)} of memory are "
            f"available on {device}: use smaller numbers."
        )


def check_rollout_memory(
    n_steps: int,
    n_envs: int,
    observation_space: spaces.Space[Any],
    action_space: spaces.Space[Any],
    device: th.device | str,
) -> None:
    """
    Require memory for the rollout buffer, without its states.

    :param n_steps: Steps of each environment in a rollout, >= 1.
    :param n_envs: Number of environments, >= 1.
    :param observation_space: Observation space.
    :param action_space: Action space.
    :param device: Device of the buffer.
    :raises ValueError: if less memory is available, with both sizes.
    """
    size = n_steps * n_envs * row_bytes(observation_space, action_space)
    check_memory(f"A rollout of `n_steps`={n_steps} in {n_envs} environments", size, device)


def check_state_memory(core: SequenceModel, n_envs: int, stored: int, device: th.device | str) -> None:
    """
    Require memory for the states of a rollout and the current one.

    :param core: Encoder and memory.
    :param n_envs: Number of environments.
    :param stored: Number of states of each environment in the rollout buffer.
    :param device: Device of the buffer.
    :raises ValueError: if less memory is available, with both sizes.
    """
    each = tensor_bytes(core.get_initial_state(1, "meta"))
    what = (
        f"States of {readable_bytes(each)}, {stored} for the sequences of each of {n_envs} environments and the current one,"
    )
    check_memory(what, (stored + 1) * n_envs * each, device)


def check_network_memory(
    core: Mapping[str, Any], net_arch: list[int] | dict[str, list[int]], inputs: int, actions: int
) -> None:
    """
    Require memory for encoder, memory and heads of a policy, with their gradients and the optimizer's moments.

    :param core: Values of :data:`CORE_SIZES` by name.
    :param net_arch: Hidden layers of the heads.
    :param inputs: Features of the input of the core, >= 1.
    :param actions: Outputs of the actor, >= 1.
    :raises ValueError: if less memory is available, with both sizes and the sizes of the network.
    """
    given = ", ".join(f"`{name}`={core[name]!r}" for name in CORE_SIZES if core[name])
    size = COPIES * (_core_bytes(core, inputs) + _heads_bytes(core, net_arch, inputs, actions))
    check_memory(f"A network for {inputs} inputs and {actions} actions with {given}, `net_arch`={net_arch}", size)


def module_bytes(build: Callable[[], nn.Module]) -> int:
    """
    Measure a module on PyTorch's "meta" device, which allocates nothing.

    :param build: Function that creates the module.
    :return: Bytes of its parameters and buffers; 0 if it cannot be created there, because it reads values of tensors.
    """
    try:
        with th.device("meta"):
            return tensor_bytes(build().state_dict())
    except (RuntimeError, TypeError) as error:  # PyTorch raises both for numbers that overflow
        return 2**63 if "overflow" in str(error).lower() else 0


def tensor_bytes(tensors: Mapping[str, th.Tensor]) -> int:
    """
    :param tensors: Tensors by name.
    :return: Bytes of all of them.
    """
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _core_bytes(core: Mapping[str, Any], inputs: int) -> int:
    """:return: Bytes of encoder and memory; layers of the encoder beyond the second take as much as the second."""

    def encoder(layers: int) -> int:
        arguments = (inputs, core["hidden_dim"], core["latent_dim"], core["encoder"], layers)
        return module_bytes(lambda: EncoderV7(*arguments, **core["encoder_kwargs"]))

    latent = core["latent_dim"] or core["hidden_dim"]
    memory = module_bytes(lambda: MemoryV7(latent + inputs, core["memory"], **core["memory_kwargs"]))
    first, layers = encoder(1), int(core["num_layers"])
    return memory + first + (layers - 1) * (encoder(2) - first if layers > 1 else 0)


def _heads_bytes(core: Mapping[str, Any], net_arch: list[int] | dict[str, list[int]], inputs: int, actions: int) -> int:
    """:return: Bytes of the parameters of both heads; the read of the memory is not counted among their inputs."""
    features: int = inputs + (core["latent_dim"] or core["hidden_dim"])
    branches = (net_arch.get("pi", []), net_arch.get("vf", [])) if isinstance(net_arch, dict) else (net_arch, net_arch)
    pairs = [itertools.pairwise([features, *branch, outputs]) for branch, outputs in zip(branches, (actions, 1), strict=True)]
    return th.float32.itemsize * sum(a * b for a, b in itertools.chain(*pairs))
