"""The acting loop of evaluation, inspection and recording: an agent acts in environments, with its State threaded."""

from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecMonitor, is_vecenv_wrapped, unwrap_vec_normalize

from sb3_cyborg.maskable import WithActionMasks, get_action_masks, is_masking_supported
from sb3_cyborg.memory_ppo.maskable import MaskableMemoryPPO
from sb3_cyborg.memory_ppo.memory_ppo import MemoryPPO


class EpisodeResult(NamedTuple):
    """
    A finished episode.

    :param total: Its return, not normalized.
    :param length: Its number of steps.
    """

    total: float
    length: int


class Step(NamedTuple):
    """
    A step of N environments.

    :param obs: Observations that the agent acted on, (N, ...), normalized as the agent reads them.
    :param actions: (N, ...).
    :param rewards: (N,), not normalized.
    :param dones: Whether the episode ended with this step, (N,).
    :param finished: Results of the episodes that ended, in order of the environments.
    """

    obs: Any
    actions: np.ndarray
    rewards: np.ndarray
    dones: np.ndarray
    finished: list[EpisodeResult]


class Outlook(NamedTuple):
    """
    Estimates of an agent for the present observations of N environments, before it acts.

    :param values: Values in units of the (normalized) return, (N,).
    :param probabilities: Probabilities of Discrete actions, (N, A); ``None`` for other actions.
    """

    values: np.ndarray
    probabilities: np.ndarray | None


class ActingLoop:
    """
    Let an agent act, step by step. Construction resets the environments; each :meth:`step` acts once.

    Episodes are counted as SB3's ``evaluate_policy`` does: where a ``Monitor`` reports them, return and length are its own,
    which outer wrappers cannot change, and an end without a report (a lost life in Atari) is not the end of an episode.

    :param model: The agent. A ``MaskableMemoryPPO`` takes legal actions if the environments have masks.
    :param env: Its environments.
    :param deterministic: Take the mode of the policy instead of a sample.
    :param seed: Seed of the environments and of PyTorch, which samples the actions; ``None`` leaves both as they are.
    """

    def __init__(self, model: MemoryPPO, env: VecEnv, *, deterministic: bool = True, seed: int | None = None) -> None:
        self.model, self.env, self.deterministic = model, env, deterministic
        if seed is not None:
            env.seed(seed)
            th.manual_seed(seed)
        reads_masks = isinstance(model, MaskableMemoryPPO) and is_masking_supported(env)
        self._agent: Any = WithActionMasks(model, env) if reads_masks else model
        self._normalize = unwrap_vec_normalize(env)
        self._monitored = is_vecenv_wrapped(env, VecMonitor) or env.env_is_wrapped(Monitor)[0]
        self.obs: Any = env.reset()
        self._state: Any = None
        self._starts = np.ones(env.num_envs, dtype=bool)
        self.totals = np.zeros(env.num_envs)
        """Sum of the rewards since the last end, (N,), not normalized."""
        self._lengths = np.zeros(env.num_envs, dtype=int)

    def outlook(self) -> Outlook:
        """:return: Value and probabilities of the coming step. The state and the random numbers stay as they are."""
        policy: Any = self.model.policy
        policy.set_training_mode(False)
        obs, _ = policy.obs_to_tensor(self.obs)
        starts = th.as_tensor(self._starts, dtype=th.float32, device=policy.device)
        if self._state is None:
            state = policy.get_initial_state(len(starts))
        else:
            state = {name: th.as_tensor(leaf, device=policy.device) for name, leaf in self._state.items()}
        masks = None
        if self._agent is not self.model:
            masks = th.as_tensor(get_action_masks(self.env), dtype=th.bool, device=policy.device)
        with th.no_grad():
            values = policy.predict_values(obs, state, starts)
            distribution, _ = policy.get_distribution(obs, state, starts, masks)
        probabilities = None
        if isinstance(self.model.action_space, spaces.Discrete):
            probabilities = distribution.distribution.probs.cpu().numpy()
        return Outlook(values[:, 0].cpu().numpy(), probabilities)

    def step(self) -> Step:
        """:return: The next step."""
        obs = self.obs
        actions, self._state = self._agent.predict(obs, self._state, self._starts, self.deterministic)
        self.obs, rewards, dones, infos = self.env.step(actions)
        if self._normalize is not None:
            rewards = self._normalize.get_original_reward()
        self._starts = dones
        self.totals += rewards
        self._lengths += 1
        finished = [result for row in np.flatnonzero(dones).tolist() if (result := self._result(row, infos[row])) is not None]
        self.totals[dones], self._lengths[dones] = 0, 0
        return Step(obs, actions, rewards, dones, finished)

    def _result(self, row: int, info: dict[str, Any]) -> EpisodeResult | None:
        """:return: The episode that has ended in an environment, or ``None`` if ``Monitor`` reports no end."""
        if reported := info.get("episode"):
            return EpisodeResult(float(reported["r"]), int(reported["l"]))
        return None if self._monitored else EpisodeResult(float(self.totals[row]), int(self._lengths[row]))


def env_to_act_in(model: MemoryPPO, env: VecEnv | gym.Env[Any, Any] | None) -> VecEnv:
    """
    :param model: An agent.
    :param env: Environments, or ``None`` for those of the agent.
    :return: The environments, vectorized.
    :raises ValueError: for ``None`` if the agent has no environments.
    """
    chosen = model.get_env() if env is None else env
    if chosen is None:
        raise ValueError("This model was loaded without an environment: pass `env`.")
    return chosen if isinstance(chosen, VecEnv) else DummyVecEnv([lambda: chosen])
