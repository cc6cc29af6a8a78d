"""
The LSTM logic of CleanRL's ``ppo_atari_lstm.py``, rewritten for vector observations.

CleanRL (Huang et al. 2022, JMLR 23(274), MIT licence, https://github.com/vwxyzjn/cleanrl) is not a library: its file for Atari
is a script without functions to call. The parts that determine its speed are kept: one LSTM for actor and critic; one call of
``nn.LSTM`` per step, in the rollout and in the update, with the state multiplied by ``1 - done`` before it; minibatches of
whole environments with all ``n_steps``, from the state at the start of the rollout; no padding; the losses, value clipping and
one ``item()`` per minibatch. Three parts differ: SB3's heads replace one linear layer each, there is no image network, and
nothing is logged.
"""

import argparse

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from torch import nn
from torch.distributions import Categorical

from benchmarks.peer_agents.common import clock, make_head

GAMMA, GAE_LAMBDA = 0.99, 0.95
CLIP, VALUE_COEF, ENTROPY_COEF, MAX_GRAD_NORM = 0.1, 0.5, 0.01, 0.5

LstmState = tuple[th.Tensor, th.Tensor]


class LstmAgent(nn.Module):
    """
    :param features: Size of an observation.
    :param actions: Number of actions.
    :param width: Width of the LSTM.
    """

    def __init__(self, features: int, actions: int, width: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(features, width)
        self.actor, self.critic = make_head(width, actions), make_head(width, 1)

    def run_lstm(self, obs: th.Tensor, state: LstmState, dones: th.Tensor) -> tuple[th.Tensor, LstmState]:
        """
        :param obs: (T, B, features).
        :param state: Hidden and cell state before the first step, each (1, B, width).
        :param dones: 1 if an episode starts with the observation, else 0, (T, B).
        :return: Outputs (T * B, width), and the state after the last step.
        """
        outputs = []
        for step_obs, done in zip(obs, dones, strict=True):
            keep = (1.0 - done).view(1, -1, 1)
            output, state = self.lstm(step_obs.unsqueeze(0), (keep * state[0], keep * state[1]))
            outputs.append(output)
        return th.cat(outputs).flatten(0, 1), state


class CleanRLPeer:
    """
    Trains a :class:`LstmAgent` and measures the time.

    :param env_id: Environment with vector observations and discrete actions.
    :param args: ``n_envs``, ``n_steps``, ``batch_size``, ``n_epochs``, ``width`` and ``learning_rate``.
    :raises ValueError: for a batch size that is not a multiple of ``n_steps`` or does not divide the rollout.
    """

    def __init__(self, env_id: str, args: argparse.Namespace) -> None:
        self.n_envs, self.n_steps, self.n_epochs = args.n_envs, args.n_steps, args.n_epochs
        self.steps = args.n_envs * args.n_steps
        if args.batch_size % args.n_steps or self.steps % args.batch_size:
            raise ValueError(
                f"CleanRL's minibatches are whole environments: `batch_size` must be a multiple of n_steps={args.n_steps} "
                f"that divides n_envs * n_steps = {self.steps}, got {args.batch_size}; {args.n_steps} would do."
            )
        self.envs_per_batch = args.batch_size // args.n_steps
        th.manual_seed(0)
        self.rng = np.random.default_rng(0)
        self.envs = SyncVectorEnv(
            [lambda: gym.wrappers.RecordEpisodeStatistics(gym.make(env_id))] * args.n_envs,
            autoreset_mode=AutoresetMode.SAME_STEP,
        )
        space, actions = self.envs.single_observation_space, self.envs.single_action_space
        assert isinstance(space, gym.spaces.Box)
        assert isinstance(actions, gym.spaces.Discrete)
        self.agent = LstmAgent(int(np.prod(space.shape)), int(actions.n), args.width)
        self.optimizer = th.optim.Adam(self.agent.parameters(), lr=args.learning_rate, eps=1e-5)
        self.parameters = sum(parameter.numel() for parameter in self.agent.parameters())

        shape = (args.n_steps, args.n_envs)
        self.obs = th.zeros(*shape, *space.shape)
        self.actions, self.log_probs, self.rewards, self.dones, self.values = th.zeros(5, *shape).unbind()
        self.next_obs = th.as_tensor(self.envs.reset(seed=0)[0], dtype=th.float32)
        self.next_done = th.zeros(args.n_envs)
        self.state: LstmState = (th.zeros(1, args.n_envs, args.width), th.zeros(1, args.n_envs, args.width))

    def run_iteration(self) -> dict[str, float]:
        """:return: The CPU seconds of one rollout and one update."""
        start = clock()
        first_state = (self.state[0].clone(), self.state[1].clone())
        self._collect()
        self._estimate_advantages()
        collected = clock()
        self._update(first_state)
        end = clock()
        return {"collect": collected - start, "update": end - collected, "overall": end - start}

    @th.no_grad()
    def _collect(self) -> None:
        for step in range(self.n_steps):
            self.obs[step], self.dones[step] = self.next_obs, self.next_done
            hidden, self.state = self.agent.run_lstm(self.next_obs.unsqueeze(0), self.state, self.next_done.unsqueeze(0))
            distribution = Categorical(logits=self.agent.actor(hidden))
            action = distribution.sample()
            self.actions[step], self.log_probs[step] = action, distribution.log_prob(action)
            self.values[step] = self.agent.critic(hidden).flatten()
            obs, reward, terminated, truncated, _ = self.envs.step(action.numpy())
            self.rewards[step] = th.as_tensor(reward, dtype=th.float32)
            self.next_obs = th.as_tensor(obs, dtype=th.float32)
            self.next_done = th.as_tensor(np.logical_or(terminated, truncated), dtype=th.float32)

    @th.no_grad()
    def _estimate_advantages(self) -> None:
        hidden, _ = self.agent.run_lstm(self.next_obs.unsqueeze(0), self.state, self.next_done.unsqueeze(0))
        next_value, done = self.agent.critic(hidden).flatten(), self.next_done
        self.advantages = th.zeros_like(self.rewards)
        advantage = th.zeros(self.n_envs)
        for step in reversed(range(self.n_steps)):
            delta = self.rewards[step] + GAMMA * next_value * (1.0 - done) - self.values[step]
            advantage = delta + GAMMA * GAE_LAMBDA * (1.0 - done) * advantage
            self.advantages[step] = advantage
            next_value, done = self.values[step], self.dones[step]
        self.returns = self.advantages + self.values

    def _update(self, first_state: LstmState) -> None:
        self.clip_fractions: list[float] = []
        for _ in range(self.n_epochs):
            order = self.rng.permutation(self.n_envs)
            for start in range(0, self.n_envs, self.envs_per_batch):
                rows = th.as_tensor(order[start : start + self.envs_per_batch])
                loss = self._loss(rows, (first_state[0][:, rows], first_state[1][:, rows]))
                self.optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(self.agent.parameters(), MAX_GRAD_NORM)
                self.optimizer.step()

    def _loss(self, rows: th.Tensor, state: LstmState) -> th.Tensor:
        hidden, _ = self.agent.run_lstm(self.obs[:, rows], state, self.dones[:, rows])
        distribution = Categorical(logits=self.agent.actor(hidden))
        log_ratio = distribution.log_prob(self.actions[:, rows].flatten()) - self.log_probs[:, rows].flatten()
        ratio = log_ratio.exp()
        with th.no_grad():
            self.approx_kl = ((ratio - 1) - log_ratio).mean()
            self.clip_fractions.append(((ratio - 1).abs() > CLIP).float().mean().item())
        advantages = self.advantages[:, rows].flatten()
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        policy_loss = th.max(-advantages * ratio, -advantages * ratio.clamp(1 - CLIP, 1 + CLIP)).mean()
        values, old = self.agent.critic(hidden).flatten(), self.values[:, rows].flatten()
        returns = self.returns[:, rows].flatten()
        clipped = old + (values - old).clamp(-CLIP, CLIP)
        value_loss = 0.5 * th.max((values - returns) ** 2, (clipped - returns) ** 2).mean()
        loss: th.Tensor = policy_loss - ENTROPY_COEF * distribution.entropy().mean() + VALUE_COEF * value_loss
        return loss
