"""
skrl's ``PPO_RNN`` (Serrano-Muñoz et al. 2023, JMLR 24(254), MIT licence, https://github.com/Toni-SM/skrl) with LSTMs.

The agent, its memory and its trainer are skrl's. The user defines the networks; these follow skrl's documented examples: a
policy and a value function with one LSTM each. An update starts each sequence from the state that the rollout stored, and
calls ``nn.LSTM`` for each stretch in which no episode of the minibatch ends.
"""

import argparse
from typing import Any

import gymnasium as gym
import torch as th
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from skrl import logger
from skrl.agents.torch.ppo import PPO_CFG, PPO_RNN
from skrl.envs.wrappers.torch import wrap_env
from skrl.memories.torch import RandomMemory
from skrl.models.torch import CategoricalMixin, DeterministicMixin, Model
from skrl.trainers.torch import SequentialTrainer
from torch import nn
from torch.distributions import Distribution

from benchmarks.peer_agents.common import clock, make_head

Distribution.set_default_validate_args(True)  # skrl's import turns it off for the whole process
SEQUENCE_LENGTH = 64
"""Steps of backpropagation through time, as in MemoryPPO."""


class _LstmModel(Model):  # type: ignore[misc]  # skrl is not in the environment that mypy runs in
    """An LSTM and a head with ``outputs`` outputs."""

    def __init__(self, outputs: int, n_envs: int, width: int, sequence_length: int, **spaces: Any) -> None:
        Model.__init__(self, device="cpu", **spaces)
        self.n_envs, self.width, self.sequence_length = n_envs, width, sequence_length
        self.lstm = nn.LSTM(self.num_observations, width, batch_first=True)
        self.head = make_head(width, outputs)

    def get_specification(self) -> dict[str, Any]:
        size = (1, self.n_envs, self.width)
        return {"rnn": {"sequence_length": self.sequence_length, "sizes": [size, size]}}

    def compute(self, inputs: dict[str, Any], role: str = "") -> tuple[th.Tensor, dict[str, Any]]:
        obs, states = inputs["observations"], inputs["rnn"]
        if not self.training:  # a step of the rollout
            outputs, states = self.lstm(obs.unsqueeze(1), tuple(states))
        else:
            obs = obs.unflatten(0, (-1, self.sequence_length))
            states = tuple(s.unflatten(1, (-1, self.sequence_length))[:, :, 0].contiguous() for s in states)
            ends = (inputs["terminated"] | inputs["truncated"]).view(-1, self.sequence_length)
            outputs, states = self._run_stretches(obs, states, ends)
        return self.head(outputs.flatten(0, 1)), {"rnn": list(states)}

    def _run_stretches(self, obs: th.Tensor, states: tuple[th.Tensor, ...], ends: th.Tensor) -> tuple[th.Tensor, Any]:
        """:return: Outputs (B, T, width) and the states after them. ``ends`` (B, T) marks the last steps of episodes."""
        cuts = (ends[:, :-1].any(dim=0).nonzero().flatten() + 1).tolist()
        outputs = []
        for start, stop in zip([0, *cuts], [*cuts, self.sequence_length], strict=True):
            output, states = self.lstm(obs[:, start:stop], states)
            outputs.append(output)
            if stop < self.sequence_length:
                keep = (~ends[:, stop - 1]).view(1, -1, 1)
                states = tuple(keep * state for state in states)
        return th.cat(outputs, dim=1), states


class _Policy(CategoricalMixin, _LstmModel):  # type: ignore[misc]  # skrl is not in the environment that mypy runs in
    def __init__(self, **kwargs: Any) -> None:
        _LstmModel.__init__(self, **kwargs)
        CategoricalMixin.__init__(self)


class _Value(DeterministicMixin, _LstmModel):  # type: ignore[misc]  # skrl is not in the environment that mypy runs in
    def __init__(self, **kwargs: Any) -> None:
        _LstmModel.__init__(self, **kwargs)
        DeterministicMixin.__init__(self)


class SkrlPeer:
    """
    ``PPO_RNN`` under ``SequentialTrainer``. The time of ``update`` is measured, and all other time counts as collection.

    :param env_id: Environment with vector observations and discrete actions.
    :param args: ``n_envs``, ``n_steps``, ``batch_size``, ``n_epochs``, ``width`` and ``learning_rate``.
    :raises ValueError: for a batch size that is not a multiple of the sequence length or does not divide the rollout.
    """

    def __init__(self, env_id: str, args: argparse.Namespace) -> None:
        self.steps = args.n_envs * args.n_steps
        length = min(SEQUENCE_LENGTH, args.n_steps)
        if args.n_steps % length or args.batch_size % length or self.steps % args.batch_size:
            raise ValueError(
                f"skrl's minibatches are whole sequences: `n_steps` and `batch_size` must be multiples of {length}, and "
                f"`batch_size` must divide n_envs * n_steps = {self.steps}, got {args.n_steps} and {args.batch_size}."
            )
        logger.setLevel("WARNING")
        th.manual_seed(0)
        env = wrap_env(
            SyncVectorEnv([lambda: gym.make(env_id)] * args.n_envs, autoreset_mode=AutoresetMode.SAME_STEP),
            wrapper="gymnasium",
            verbose=False,
        )
        spaces = {"observation_space": env.observation_space, "action_space": env.action_space}
        sizes = {"n_envs": args.n_envs, "width": args.width, "sequence_length": length, **spaces}
        models = {"policy": _Policy(outputs=env.action_space.n, **sizes), "value": _Value(outputs=1, **sizes)}
        self.parameters = sum(p.numel() for model in models.values() for p in model.parameters())
        settings = PPO_CFG(
            rollouts=args.n_steps,
            learning_epochs=args.n_epochs,
            mini_batches=self.steps // args.batch_size,
            learning_rate=args.learning_rate,
            experiment={"write_interval": 0, "checkpoint_interval": 0},
        )
        memory = RandomMemory(memory_size=args.n_steps, num_envs=args.n_envs, device="cpu")
        self.agent = PPO_RNN(models=models, memory=memory, cfg=settings, device="cpu", **spaces)
        trainer = {"timesteps": args.n_steps, "headless": True, "disable_progressbar": True}
        self.trainer = SequentialTrainer(env=env, agents=self.agent, cfg=trainer)
        self._time_update()

    def _time_update(self) -> None:
        update = self.agent.update

        def timed(**kwargs: Any) -> None:
            start = clock()
            update(**kwargs)
            self.update_seconds = clock() - start

        self.agent.update = timed

    def run_iteration(self) -> dict[str, float]:
        """:return: The CPU seconds of one rollout and one update."""
        Distribution.set_default_validate_args(False)  # skrl's default
        start = clock()
        self.trainer.train()
        overall = clock() - start
        Distribution.set_default_validate_args(True)
        return {"collect": overall - self.update_seconds, "update": self.update_seconds, "overall": overall}
