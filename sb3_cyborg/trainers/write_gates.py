"""The write gates of a memory during a rollout."""

import torch as th

from sb3_cyborg.checks import check_positive
from sb3_cyborg.memories.trace import trace
from sb3_cyborg.memory_ppo.memory_ppo import MemoryPPO
from sb3_cyborg.sequence_model import keep_mask


def write_gates(model: MemoryPPO, max_transitions: int = 1024) -> th.Tensor | None:
    """
    Compute the write gates of the rollout that the buffer holds, for a histogram. Call it at the end of a rollout.

    It replays the first steps of every environment from the state at the start of the rollout, in one pass without gradient.
    Weights, states and random numbers are not changed.

    :param model: A model whose rollout is complete.
    :param max_transitions: About how many transitions are replayed, at least 1.
    :return: (n,) float32 in [0, 1], on the CPU; ``None`` for a memory without a write gate.
    :raises ValueError: before the first rollout is complete.
    """
    check_positive(max_transitions=max_transitions)
    buffer, policy = model.rollout_buffer, model.policy
    if not buffer.full:
        raise ValueError(f"There is no rollout to look at yet: {buffer.pos} of {buffer.n_steps} steps.")
    obs, first = buffer.observations, {name: leaf[0] for name, leaf in buffer.states.items()}

    def replay(steps: int) -> list[th.Tensor]:
        def take(tensor: th.Tensor) -> th.Tensor:
            return tensor[:steps].transpose(0, 1)

        rows = {key: take(value) for key, value in obs.items()} if isinstance(obs, dict) else take(obs)
        with th.no_grad(), trace() as records:
            policy._core_sequence(rows, take(buffer.actions), first, keep_mask(take(buffer.episode_starts)))
        return [record["gate"].flatten().float().cpu() for record in records if "gate" in record]

    training = policy.training
    policy.set_training_mode(False)  # as when acting
    gates = replay(1)  # one step shows cheaply whether the memory has write gates
    if gates:
        gates = replay(min(buffer.n_steps, max(1, max_transitions // buffer.n_envs)))
    policy.set_training_mode(training)
    return th.cat(gates) if gates else None
