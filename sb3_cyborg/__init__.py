"""Memory for Stable-Baselines3: recurrent PPO with encoders, external memories, and stored recurrent states."""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sb3_cyborg.encoders.encoder_v7 import EncoderV7, register_encoder
    from sb3_cyborg.envs.vec_env import make_memory_vec_env
    from sb3_cyborg.maskable import ActionMasker, MaskableEvalCallback, get_action_masks, is_masking_supported
    from sb3_cyborg.memories.memory_v7 import MemoryV7, register_memory
    from sb3_cyborg.memory_ppo.maskable import MaskableMemoryPPO
    from sb3_cyborg.memory_ppo.memory_ppo import MemoryPPO
    from sb3_cyborg.memory_ppo.policies import (
        MemoryActorCriticCnnPolicy,
        MemoryActorCriticPolicy,
        MemoryMultiInputActorCriticPolicy,
    )
    from sb3_cyborg.memory_ppo.rollout_buffer_v7 import RolloutBufferV7
    from sb3_cyborg.sequence_model import SequenceModel, Stack, State
    from sb3_cyborg.trainers.trainer_v7 import TrainerV7 as TrainerV7

__version__ = "0.1.0"

_MODULES = {
    "ActionMasker": "maskable",
    "EncoderV7": "encoders.encoder_v7",
    "MaskableEvalCallback": "maskable",
    "MaskableMemoryPPO": "memory_ppo.maskable",
    "MemoryActorCriticCnnPolicy": "memory_ppo.policies",
    "MemoryActorCriticPolicy": "memory_ppo.policies",
    "MemoryMultiInputActorCriticPolicy": "memory_ppo.policies",
    "MemoryPPO": "memory_ppo.memory_ppo",
    "MemoryV7": "memories.memory_v7",
    "RolloutBufferV7": "memory_ppo.rollout_buffer_v7",
    "SequenceModel": "sequence_model",
    "Stack": "sequence_model",
    "State": "sequence_model",
    "TrainerV7": "trainers.trainer_v7",
    "get_action_masks": "maskable",
    "is_masking_supported": "maskable",
    "make_memory_vec_env": "envs.vec_env",
    "register_encoder": "encoders.encoder_v7",
    "register_memory": "memories.memory_v7",
}
"""Modules of the public names. They are imported on first access, so that ``sb3_cyborg.runtime`` needs no PyTorch."""

# The dependencies of TrainerV7 are an optional extra, so it is not listed.
__all__ = [
    "ActionMasker",
    "EncoderV7",
    "MaskableEvalCallback",
    "MaskableMemoryPPO",
    "MemoryActorCriticCnnPolicy",
    "MemoryActorCriticPolicy",
    "MemoryMultiInputActorCriticPolicy",
    "MemoryPPO",
    "MemoryV7",
    "RolloutBufferV7",
    "SequenceModel",
    "Stack",
    "State",
    "get_action_masks",
    "is_masking_supported",
    "make_memory_vec_env",
    "register_encoder",
    "register_memory",
]


def __getattr__(name: str) -> Any:
    """Import a public name on first access (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = import_module(f"{__name__}.{_MODULES[name]}")
    except ModuleNotFoundError as error:
        if name != "TrainerV7":
            raise
        raise ImportError(f'TrainerV7 needs {error.name}: pip install "sb3-cyborg[train]"', name=error.name) from error
    value = globals()[name] = getattr(module, name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})


# Without gymnasium there is nothing to register with: `sb3_cyborg.runtime` needs NumPy and onnxruntime alone.
if find_spec("gymnasium") is not None:
    from sb3_cyborg.envs.registration import register_envs

    register_envs()
