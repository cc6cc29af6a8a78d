"""Memory for Stable-Baselines3: recurrent PPO with encoders, external memories, and stored recurrent states."""

from typing import TYPE_CHECKING, Any

from sb3_cyborg.encoders.encoder_v7 import EncoderV7, register_encoder
from sb3_cyborg.envs import make_memory_vec_env, register_envs
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

if TYPE_CHECKING:
    from sb3_cyborg.trainers.trainer_v7 import TrainerV7 as TrainerV7

__version__ = "0.1.0"

register_envs()

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
    """Import ``TrainerV7`` on first access. Its dependencies are an optional extra, so ``__all__`` omits it."""
    if name != "TrainerV7":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from sb3_cyborg.trainers.trainer_v7 import TrainerV7
    except ModuleNotFoundError as error:
        raise ImportError(f'TrainerV7 needs {error.name}: pip install "sb3-cyborg[train]"', name=error.name) from error
    return TrainerV7
