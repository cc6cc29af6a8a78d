"""``MemoryPPO``: PPO for policies with an encoder and a memory, trained from the states stored during the rollout."""

import io
import json
import pathlib
import pickle
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch as th
from gymnasium import spaces
from sb3_contrib import RecurrentPPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.save_util import recursive_getattr, save_to_zip_file
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule
from stable_baselines3.common.utils import explained_variance, obs_as_tensor
from stable_baselines3.common.vec_env import VecEnv, VecTransposeImage
from torch import nn

from sb3_cyborg.checks import check_finite_observations, check_options, check_positive, unknown_name
from sb3_cyborg.files import write_atomically
from sb3_cyborg.memory_ppo import losses, model_file
from sb3_cyborg.memory_ppo.actions import DIVERGED
from sb3_cyborg.memory_ppo.objective import LossTerm, Minibatch, UpdateScales, ppo_terms, weighted_sum
from sb3_cyborg.memory_ppo.policies import (
    MemoryActorCriticCnnPolicy,
    MemoryActorCriticPolicy,
    MemoryMultiInputActorCriticPolicy,
    policy_options,
)
from sb3_cyborg.memory_ppo.rollout_buffer_v7 import (
    RolloutBufferV7,
    TrainingBatch,
    check_burn_in,
    plan_minibatches,
    plan_n_steps,
)
from sb3_cyborg.memory_ppo.schedules import AUTO, as_schedule, learning_rate_schedule
from sb3_cyborg.sequence_model import AUX_LOSS, State, index_state

SelfMemoryPPO = TypeVar("SelfMemoryPPO", bound="MemoryPPO")

CORRUPT_FILE_ERRORS = (
    zipfile.BadZipFile,
    zlib.error,
    pickle.UnpicklingError,
    json.JSONDecodeError,
    UnicodeDecodeError,
    EOFError,
    KeyError,
    AssertionError,
    AttributeError,
    RuntimeError,
    TypeError,
)
"""Exceptions that SB3 raises for files that are damaged, or of another kind."""

Stats = dict[str, list[th.Tensor]]
"""Diagnostics of the minibatches of an update, as tensors: no minibatch waits for a number."""


class MemoryPPO(RecurrentPPO):
    """
    Proximal Policy Optimization (clip version) with an encoder and an external memory.

    A drop-in replacement of sb3-contrib's ``RecurrentPPO``. The paper is https://arxiv.org/abs/1707.06347; stored states and
    burn-in follow R2D2 (Kapturowski et al. 2019, https://openreview.net/forum?id=r1lyTjAqYX), but on-policy, where the stored
    states are exact in the first epoch.

    :param policy: ``"MlpPolicy"``, ``"CnnPolicy"``, ``"MultiInputPolicy"`` (sb3-contrib's ``"MlpLstmPolicy"``… mean the
        same), or a subclass of :class:`MemoryActorCriticPolicy`.
    :param env: The environment to learn from (if registered in Gym, can be str).
    :param learning_rate: The learning rate: a number, a function of the progress remaining (from 1 to 0), or RL Zoo's
        ``"lin_3e-4"`` (linear, from 3e-4 to 0) or ``"lin_3e-4_1e-5"`` (to 1e-5). ``"auto"`` is ``"lin_7e-4_7e-5"`` over a call
        of :meth:`learn`; in calls with ``reset_num_timesteps=False`` it does not fall below its middle, 3.85e-4.
    :param n_steps: Steps of each environment in a rollout; ``None`` is the smallest multiple of 128 that gives at least 2048
        transitions per rollout.
    :param batch_size: Training transitions in a minibatch, a multiple of ``seq_len``; ``None`` is a quarter of the
        rollout, at least 128 and at most 1024, adapted so that it divides the rollout.
    :param n_epochs: Passes over a rollout.
    :param gamma: Discount factor.
    :param gae_lambda: λ of generalized advantage estimation.
    :param clip_range: Clipping of the ratio: a number, a function of the progress remaining, or ``"lin_0.2"``.
    :param clip_range_vf: Clipping of the value, in units of the return (the larger of the clipped and the unclipped loss
        counts), in the same forms; ``None`` does not clip.
    :param normalize_advantage: Normalize the advantages of each minibatch: by their standard deviation, or by the average one
        of the last rollouts if that is larger. In rollouts whose rewards do not differ, advantages are mostly noise of the
        values, which SB3's normalization would amplify.
    :param ent_coef: Weight of the entropy.
    :param vf_coef: Weight of the value loss.
    :param max_grad_norm: Largest norm of the gradient.
    :param use_sde: Whether to use generalized State-Dependent Exploration.
    :param sde_sample_freq: Sample a new noise matrix every n steps; -1 only at the start of a rollout.
    :param target_kl: End the update before a step once the approximate KL divergence exceeds 1.5 times this.
    :param stats_window_size: Episodes that the logged means are over.
    :param tensorboard_log: Folder for TensorBoard; ``None`` logs nothing there.
    :param policy_kwargs: Arguments of the policy, e.g. ``{"encoder": "mamba", "memory": "pmm",
        "memory_kwargs": {"num_slots": 16}}``; see :class:`MemoryActorCriticPolicy`.
    :param verbose: 0 no output, 1 info messages, 2 debug messages.
    :param seed: Seed for the pseudo random generators.
    :param device: ``"cpu"``, ``"cuda"``…; ``"auto"`` takes a GPU if there is one.
    :param _init_setup_model: Whether to build the network at once.
    :param seq_len: Steps that gradients flow back through; divides ``n_steps``. ``None`` takes the largest divisor up to
        64, or up to 128 where minibatches hold at least 8 sequences of 128.
    :param burn_in: Steps before each sequence that are replayed without gradient, with the weights of the moment, to
        refresh the state that it starts from.
    :param memory_loss_coef: Weight of the loss that a memory may return (``pmm`` with ``write_rate``).
    :param normalize_value: Train the critic in units of the return's standard deviation (PopArt, see :class:`ValueHead`),
        which balances the value loss and the policy loss for rewards of any scale.
    :param scale_lr_by_advantage: Multiply the learning rate of an update with ``min(1, 2 std(A) / s)``, logged as
        ``train/lr_scale``: ``std(A)`` is the standard deviation of the rollout's advantages, ``s`` that of the last 128
        rollouts. Adam divides by the size of the gradient, so rollouts with small advantages would otherwise move the policy
        as far as any other.
    :param log_barrier_coef: Weight of the log barrier, the divergence of the policy from a uniform one: see
        :func:`~sb3_cyborg.memory_ppo.losses.log_barrier_loss`. For discrete actions, and tasks in which an action is right for
        many steps and wrong once: 0.01 to 0.03. 0, the default, is none.
    :param use_last_action: The policy also reads its last action (the same as in ``policy_kwargs``).
    :param amp: Compute features and the encoder's projections in bf16 (autocast; the same as in ``policy_kwargs``).
        Recurrence, memory, state and heads stay in fp32. It pays for image observations, and for wide networks on a GPU;
        ``train/ratio_error`` then is up to 0.05.
    :param rollout_buffer_class: PPO's; must be ``None``, the buffer is :class:`RolloutBufferV7`.
    :param rollout_buffer_kwargs: PPO's; must be empty.
    :raises ValueError: for names, options and sizes that cannot work, with what would.
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": MemoryActorCriticPolicy,
        "CnnPolicy": MemoryActorCriticCnnPolicy,
        "MultiInputPolicy": MemoryMultiInputActorCriticPolicy,
        "MlpLstmPolicy": MemoryActorCriticPolicy,
        "CnnLstmPolicy": MemoryActorCriticCnnPolicy,
        "MultiInputLstmPolicy": MemoryMultiInputActorCriticPolicy,
    }
    policy: MemoryActorCriticPolicy
    rollout_buffer: RolloutBufferV7  # type: ignore[assignment]  # torch tensors and states: no subclass of SB3's
    n_steps: int
    """Steps of each environment in a rollout; like ``batch_size`` and ``seq_len``, a number once the model is set up."""
    batch_size: int
    """Training transitions in a minibatch."""
    seq_len: int
    """Steps of a training sequence."""
    _last_state: State

    def __init__(
        self,
        policy: str | type[MemoryActorCriticPolicy],
        env: GymEnv | str,
        learning_rate: float | str | Schedule = AUTO,
        n_steps: int | None = None,
        batch_size: int | None = None,
        n_epochs: int = 4,
        gamma: float = 0.99,
        gae_lambda: float = 0.9,
        clip_range: float | str | Schedule = 0.2,
        clip_range_vf: float | str | Schedule | None = None,
        normalize_advantage: bool = True,
        ent_coef: float = 0.01,
        vf_coef: float = 0.5,
        max_grad_norm: float = 0.5,
        use_sde: bool = False,
        sde_sample_freq: int = -1,
        target_kl: float | None = None,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
        *,
        seq_len: int | None = None,
        burn_in: int = 0,
        memory_loss_coef: float = 1.0,
        log_barrier_coef: float = 0.0,
        normalize_value: bool = True,
        scale_lr_by_advantage: bool = True,
        use_last_action: bool = False,
        amp: bool = False,
        rollout_buffer_class: None = None,
        rollout_buffer_kwargs: dict[str, Any] | None = None,
    ) -> None:
        if rollout_buffer_class is not None or rollout_buffer_kwargs:
            raise ValueError(
                "MemoryPPO trains from RolloutBufferV7 alone: leave `rollout_buffer_class` and `rollout_buffer_kwargs` out."
            )
        if use_last_action:
            policy_kwargs = {**(policy_kwargs or {}), "use_last_action": True}
        super().__init__(
            policy,
            env,
            learning_rate=learning_rate,  # type: ignore[arg-type]  # text is converted in `_setup_lr_schedule`
            n_steps=n_steps,  # type: ignore[arg-type]  # a number from `_setup_model` on, as `batch_size` and `seq_len`
            batch_size=batch_size,
            n_epochs=n_epochs,
            gamma=gamma,
            gae_lambda=gae_lambda,
            clip_range=clip_range,  # type: ignore[arg-type]  # a schedule from `_setup_model` on, as `clip_range_vf`
            clip_range_vf=clip_range_vf,  # type: ignore[arg-type]
            normalize_advantage=normalize_advantage,
            ent_coef=ent_coef,
            vf_coef=vf_coef,
            max_grad_norm=max_grad_norm,
            use_sde=use_sde,
            sde_sample_freq=sde_sample_freq,
            target_kl=target_kl,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            policy_kwargs=policy_kwargs,
            verbose=verbose,
            seed=seed,
            device=device,
            _init_setup_model=False,
        )
        self.seq_len = seq_len  # type: ignore[assignment]
        self._planned: dict[str, tuple[int | None, int]] = {}
        self.burn_in = burn_in
        self.memory_loss_coef = memory_loss_coef
        self.log_barrier_coef = log_barrier_coef
        self.normalize_value = normalize_value
        self.scale_lr_by_advantage = scale_lr_by_advantage
        self._scales = UpdateScales()
        self.amp = amp or bool((policy_kwargs or {}).get("amp", False))
        if _init_setup_model:
            self._setup_model()

    def _get_policy_from_name(self, policy_name: str) -> type[BasePolicy]:
        if policy_name not in self.policy_aliases:
            raise unknown_name("policy", policy_name, self.policy_aliases)
        return self.policy_aliases[policy_name]

    def _setup_model(self) -> None:
        self._setup_lr_schedule()
        self.set_random_seed(self.seed)
        if not issubclass(self.policy_class, MemoryActorCriticPolicy):
            raise ValueError(
                f"`policy` must be a subclass of MemoryActorCriticPolicy or one of {sorted(self.policy_aliases)}, got "
                f"{self.policy_class.__name__}; load a model of another algorithm with that algorithm."
            )
        if isinstance(self.observation_space, spaces.Dict) and self.policy_class in (
            MemoryActorCriticPolicy,
            MemoryActorCriticCnnPolicy,
        ):
            raise ValueError("You must use `MultiInputPolicy` when working with dict observation space.")
        check_options("policy_kwargs", self.policy_kwargs, policy_options(self.policy_class))
        # Sizes are checked before anything is built.
        check_positive(n_epochs=self.n_epochs)
        self._check_log_barrier()
        self._plan_sizes()
        self.policy = self.policy_class(
            self.observation_space,
            self.action_space,
            self.lr_schedule,
            use_sde=self.use_sde,
            **self.policy_kwargs | ({"amp": self.amp} if self.amp or "amp" in self.policy_kwargs else {}),
        ).to(self.device)
        self._last_state = self.policy.get_initial_state(self.n_envs)
        self.rollout_buffer = RolloutBufferV7(
            self.n_steps,
            self.observation_space,
            self.action_space,
            self._last_state,
            device=self.device,
            gae_lambda=self.gae_lambda,
            gamma=self.gamma,
            n_envs=self.n_envs,
            seq_len=self.seq_len,
            burn_in=self.burn_in,
            channels_last=self._keeps_channels_last(),
        )
        self.clip_range = as_schedule(self.clip_range)
        if self.clip_range_vf is not None:
            if isinstance(self.clip_range_vf, (float, int)) and self.clip_range_vf <= 0:
                raise ValueError(f"`clip_range_vf` must be positive, or None for no clipping, got {self.clip_range_vf}.")
            self.clip_range_vf = as_schedule(self.clip_range_vf)

    def _setup_lr_schedule(self) -> None:
        self.lr_schedule = learning_rate_schedule(self.learning_rate)

    def _plan_sizes(self) -> None:
        """
        Turn ``n_steps``, ``batch_size`` and ``seq_len`` that were left open into numbers that fit together.

        A model that is loaded may have another number of environments: ``batch_size`` and ``seq_len`` that were planned are
        planned anew, ``n_steps`` stays.
        """
        given: dict[str, int | None] = {"batch_size": self.batch_size, "seq_len": self.seq_len}
        for name, (wanted, planned) in self._planned.items():
            if given[name] == planned:  # and not changed since, as `load(path, batch_size=...)` does
                given[name] = wanted
        n_steps: int | None = self.n_steps
        self.n_steps = plan_n_steps(self.n_envs, given["seq_len"]) if n_steps is None else n_steps
        self.seq_len, self.batch_size = plan_minibatches(self.n_steps, self.n_envs, given["seq_len"], given["batch_size"])
        self._planned = {name: (given[name], getattr(self, name)) for name in given}
        check_burn_in(self.burn_in, self.n_steps)
        if self.verbose >= 1:
            print(
                f"Rollouts of n_steps={self.n_steps} in {self.n_envs} environments, minibatches of "
                f"batch_size={self.batch_size} in sequences of seq_len={self.seq_len}, burn_in={self.burn_in}"
            )

    def _check_log_barrier(self) -> None:
        coef = self.log_barrier_coef
        if not (isinstance(coef, (int, float, np.number)) and 0 <= coef < np.inf):
            raise ValueError(f"`log_barrier_coef` must be a finite number of at least 0, got {coef!r}.")
        if coef and isinstance(self.action_space, spaces.Box):
            raise ValueError(
                f"`log_barrier_coef` is for discrete actions, got {coef} with {self.action_space}; see `use_sde`."
            )

    def _keeps_channels_last(self) -> bool:
        """:return: Whether images come channels-last in memory to convolutions, which a CPU computes faster that way."""
        convolves = any(isinstance(module, nn.Conv2d) for module in self.policy.features_extractor.modules())
        return convolves and isinstance(self.env, VecTransposeImage) and self.device.type == "cpu"

    # --- rollout ----------------------------------------------------------------------------------------------------

    def collect_rollouts(  # type: ignore[override]  # the buffer is no subclass of SB3's
        self, env: VecEnv, callback: BaseCallback, rollout_buffer: RolloutBufferV7, n_rollout_steps: int
    ) -> bool:
        """
        Act for ``n_rollout_steps`` steps and fill the buffer.

        :param env: The training environments.
        :param callback: Called at each step, and at the beginning and end of the rollout.
        :param rollout_buffer: Buffer to fill.
        :param n_rollout_steps: Steps of each environment.
        :return: False if the callback ended training.
        :raises ValueError: for observations or rewards that are not finite; the weights stay as they were.
        """
        assert self._last_obs is not None, "No previous observation was provided"
        self.policy.set_training_mode(False)
        rollout_buffer.reset()
        if self.use_sde:
            self.policy.reset_noise(env.num_envs)
        callback.on_rollout_start()
        self._check_finite(self._last_obs, np.zeros(1))

        for n_steps in range(n_rollout_steps):
            if self.use_sde and self.sde_sample_freq > 0 and n_steps % self.sde_sample_freq == 0:
                self.policy.reset_noise(env.num_envs)
            last_obs, last_starts = self._last_obs, self._last_episode_starts
            assert last_obs is not None
            assert last_starts is not None
            obs_tensor = obs_as_tensor(last_obs, self.device)
            episode_starts = th.as_tensor(last_starts, dtype=th.float32, device=self.device)
            with th.inference_mode():  # 10% faster than `no_grad`
                action_tensor, values, log_probs, state = self.policy(obs_tensor, self._last_state, episode_starts)
            values, log_probs = values.clone(), log_probs.clone()  # a callback may compute gradients from them
            actions = action_tensor.cpu().numpy()

            new_obs: Any  # SB3 types a VecEnv's observations wider than what it passes on
            new_obs, rewards, dones, infos = env.step(self._env_actions(actions))

            self.num_timesteps += env.num_envs
            callback.update_locals(locals())
            if not callback.on_step():
                return False
            self._check_finite(new_obs, rewards)
            self._update_info_buffer(infos, dones)
            targets = th.as_tensor(rewards, dtype=th.float32, device=self.device)
            if dones.any():
                targets = self._add_truncation_bootstrap(targets, infos, dones, state)

            rollout_buffer.add(last_obs, action_tensor, targets, last_starts, values, log_probs, self._last_state)
            self._last_obs = new_obs
            self._last_episode_starts = dones
            self._last_state = state

        with th.no_grad():
            values = self.policy.predict_values(
                obs_as_tensor(new_obs, self.device), state, th.as_tensor(dones, dtype=th.float32, device=self.device)
            )
        if rollout_buffer.log_probs.isnan().any():  # where acting could not look at the logits
            raise ValueError(DIVERGED)
        rollout_buffer.compute_returns_and_advantage(last_values=values, dones=dones)
        callback.update_locals(locals())
        callback.on_rollout_end()
        return True

    def _env_actions(self, actions: np.ndarray) -> np.ndarray:
        """:return: Actions as the environment takes them: rescaled if squashed, else clipped to the bounds."""
        if not isinstance(self.action_space, spaces.Box):
            return actions
        if self.policy.squash_output:
            return self.policy.unscale_action(actions)
        clipped: np.ndarray = np.clip(actions, self.action_space.low, self.action_space.high)
        return clipped

    def _check_finite(self, obs: Any, rewards: np.ndarray) -> None:
        check_finite_observations(obs, f"after {self.num_timesteps} steps")
        if not np.isfinite(rewards).all():
            env = int(np.flatnonzero(~np.isfinite(rewards))[0])
            raise ValueError(
                f"Reward of environment {env} after {self.num_timesteps} steps is not finite: it is {rewards[env]}."
            )

    def _add_truncation_bootstrap(
        self, rewards: th.Tensor, infos: list[dict[str, Any]], dones: np.ndarray, state: State
    ) -> th.Tensor:
        """
        Add ``gamma * V(terminal observation)`` where a time limit ended the episode, seen with the state after the last step.

        :param rewards: (N,).
        :param infos: Of the step, (N).
        :param dones: (N,).
        :param state: After the step; it is read, not changed.
        :return: The rewards with the values added, (N,).
        """
        rows = [
            row
            for row in np.flatnonzero(dones).tolist()
            if infos[row].get("TimeLimit.truncated", False) and infos[row].get("terminal_observation") is not None
        ]
        if not rows:
            return rewards
        terminal = [infos[row]["terminal_observation"] for row in rows]
        obs: Any = (
            np.stack(terminal)
            if not isinstance(terminal[0], dict)
            else {key: np.stack([single[key] for single in terminal]) for key in terminal[0]}
        )
        check_finite_observations(obs, f"at the end of an episode, after {self.num_timesteps} steps,", rows)
        with th.no_grad():
            obs_tensor = self.policy.obs_to_tensor(obs)[0]
            index, starts = th.as_tensor(rows, device=self.device), th.zeros(len(rows), device=self.device)
            values = self.policy.predict_values(obs_tensor, index_state(state, index), starts)
        return rewards.index_add(0, index, self.gamma * values.flatten())

    # --- update -----------------------------------------------------------------------------------------------------

    def train(self) -> None:
        """Update the policy with the rollout in the buffer: epochs of minibatches of the clipped surrogate objective."""
        self.policy.set_training_mode(True)
        buffer, policy = self.rollout_buffer, self.policy
        observed = self._scales.update(buffer.advantages, buffer.returns, policy.inputs.parts(buffer.observations))
        if self.normalize_value:
            policy.value_net.rescale(self._scales.returns)
        self._update_learning_rate(policy.optimizer)
        clip_range, clip_range_vf = self._clip_ranges()
        terms = self._loss_terms(clip_range, clip_range_vf)
        stats: Stats = defaultdict(list)
        for epoch in range(self.n_epochs):
            stepped, stop = False, False
            for batch in buffer.minibatches(self.batch_size):
                loss = self._minibatch_loss(batch, terms, clip_range, stats)
                if stop := self._exceeds_target_kl(stats, epoch):
                    break
                self._step(loss)
                stepped = True
            self._n_updates += stepped
            if stop:
                break
        policy.inputs.update_normalization(observed)
        self._log_update(stats, clip_range, clip_range_vf)

    def _clip_ranges(self) -> tuple[float, float | None]:
        """:return: Clipping of the ratio and of the value, at the progress of the moment."""
        progress = self._current_progress_remaining
        assert callable(self.clip_range)
        clip_range_vf = self.clip_range_vf(progress) if callable(self.clip_range_vf) else None
        return self.clip_range(progress), clip_range_vf

    def _loss_terms(self, clip_range: float, clip_range_vf: float | None) -> list[LossTerm]:
        """:return: The terms of the objective; a subclass may add its own."""
        return ppo_terms(
            clip_range,
            clip_range_vf,
            ent_coef=self.ent_coef,
            vf_coef=self.vf_coef,
            memory_loss_coef=self.memory_loss_coef,
            log_barrier_coef=self.log_barrier_coef,
        )

    def _update_learning_rate(self, optimizers: list[th.optim.Optimizer] | th.optim.Optimizer) -> None:
        super()._update_learning_rate(optimizers)
        if not self.scale_lr_by_advantage:
            return
        for group in self.policy.optimizer.param_groups:
            group["lr"] *= self._scales.lr_scale
        self.logger.record("train/lr_scale", self._scales.lr_scale)

    def _minibatch_loss(self, batch: TrainingBatch, terms: Sequence[LossTerm], clip_range: float, stats: Stats) -> th.Tensor:
        """:return: The loss of a minibatch, 0-d with its graph; ``stats`` gains its diagnostics."""
        evaluation = self.policy.evaluate_sequences(batch)
        advantages = batch["advantages"]
        if self.normalize_advantage:
            advantages = losses.normalize_advantages(advantages, self._scales.advantages.std)
        log_ratio = evaluation.log_prob - batch["old_log_prob"]
        minibatch = Minibatch(
            values=evaluation.values,
            log_prob=evaluation.log_prob,
            entropy=evaluation.entropy,
            ratio=log_ratio.exp(),
            old_values=batch["old_values"],
            returns=batch["returns"],
            advantages=advantages,
            value_scale=self.policy.value_net.scale,
            distribution=evaluation.distribution,
            aux_loss=evaluation.logs.get(AUX_LOSS),
        )
        loss, parts = weighted_sum(terms, minibatch)
        with th.no_grad():
            error = (minibatch.ratio - 1).abs()
            if not stats:  # the first minibatch of the update: before the first step the ratio is 1
                stats["train/ratio_error"].append(error.max())
            stats["train/approx_kl"].append(losses.approximate_kl(log_ratio))
            stats["train/clip_fraction"].append((error > clip_range).float().mean())
            stats["train/loss"] = [loss.detach()]
            for name, part in parts.items():
                stats[f"train/{name}"].append(part)
            for name, value in evaluation.logs.items():
                if name != AUX_LOSS:
                    stats[name.replace(".", "/", 1)].append(value)
        return loss

    def _exceeds_target_kl(self, stats: Stats, epoch: int) -> bool:
        """:return: Whether the KL divergence of the last minibatch ends the update, which is the one wait for a device."""
        if self.target_kl is None:
            return False
        kl = stats["train/approx_kl"][-1].item()
        if kl <= 1.5 * self.target_kl:
            return False
        if self.verbose >= 1:
            print(f"Early stopping at step {epoch} due to reaching max kl: {kl:.2f}")
        return True

    def _step(self, loss: th.Tensor) -> None:
        """Make a step of the optimizer along the clipped gradient."""
        self.policy.optimizer.zero_grad()
        loss.backward()
        th.nn.utils.clip_grad_norm_(self.policy.parameters(), self.max_grad_norm)
        self.policy.optimizer.step()

    def _log_update(self, stats: Stats, clip_range: float, clip_range_vf: float | None) -> None:
        for name, entries in stats.items():
            self.logger.record(name, th.stack(entries).mean().item())
        buffer = self.rollout_buffer
        explained = explained_variance(buffer.values.flatten().cpu().numpy(), buffer.returns.flatten().cpu().numpy())
        self.logger.record("train/explained_variance", explained)
        if hasattr(self.policy, "log_std"):
            self.logger.record("train/std", self.policy.log_std.exp().mean().item())
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        self.logger.record("train/clip_range", clip_range)
        if clip_range_vf is not None:
            self.logger.record("train/clip_range_vf", clip_range_vf)

    # --- SB3's front ------------------------------------------------------------------------------------------------

    def learn(
        self: SelfMemoryPPO,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 1,
        tb_log_name: str = "MemoryPPO",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfMemoryPPO:
        """
        Train, as in SB3.

        Schedules depend on the progress remaining: the share of the steps of all calls so far that is yet to be made. With
        ``reset_num_timesteps=False`` each call adds its steps to that total, so that each of many short calls would end at the
        lowest rate; the default ``learning_rate`` then does not fall below its middle.

        :param total_timesteps: Environment steps to train for.
        :param callback: Callbacks, called at each step.
        :param log_interval: Rollouts between two logs.
        :param tb_log_name: Name of the run in TensorBoard.
        :param reset_num_timesteps: Start counting steps anew; ``False`` goes on.
        :param progress_bar: Show a progress bar.
        :return: The model.
        :raises ValueError: for observations or rewards that are not finite, and for logits that are NaN.
        """
        self.lr_schedule = learning_rate_schedule(self.learning_rate, continued=not reset_num_timesteps)
        return super().learn(total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar)

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_last_state"]

    def save(
        self,
        path: str | pathlib.Path | io.BufferedIOBase,
        exclude: Iterable[str] | None = None,
        include: Iterable[str] | None = None,
    ) -> None:
        """
        Save the model in SB3's zip, without pickles: see :mod:`~sb3_cyborg.memory_ppo.model_file`.

        A path is written atomically: if writing fails, an old file stays. What has no plain form, such as a function as a
        schedule, is pickled with a warning, and the file then loads with ``trust=True`` only.

        :param path: Path to the file, with ``.zip`` added if it has no suffix, or an open file.
        :param exclude: Names of further attributes to leave out.
        :param include: Names of attributes to save that are left out otherwise.
        """
        parameters, variables = self._get_torch_save_params()
        stored_as_tensors = {name.partition(".")[0] for name in (*parameters, *variables)}
        left_out = ({*self._excluded_save_params(), *(exclude or ())} - set(include or ())) | stored_as_tensors
        objects = {name: value for name, value in vars(self).items() if name not in left_out}
        entries = model_file.to_entries(objects, self.policy_aliases)
        tensors = {name: recursive_getattr(self, name) for name in variables}

        def write(file: Any) -> None:
            save_to_zip_file(file, entries, model_file.without_numpy(self.get_parameters()), tensors)

        if isinstance(path, (str, pathlib.Path)):
            write_atomically(model_file.saved_path(path), write)
        else:
            write(path)

    @classmethod
    def load(
        cls: type[SelfMemoryPPO],
        path: str | pathlib.Path | io.BufferedIOBase,
        env: GymEnv | None = None,
        device: th.device | str = "auto",
        custom_objects: dict[str, Any] | None = None,
        print_system_info: bool = False,
        force_reset: bool = True,
        *,
        trust: bool = False,
        **kwargs: Any,
    ) -> SelfMemoryPPO:
        """
        Load a model from a file, as SB3 does; the number of environments may be another one.

        No code of the file is run. Classes come from torch, stable_baselines3, sb3_contrib, gymnasium, this package, and
        modules that are imported already.

        :param path: Path to the file, or a file.
        :param env: The environment to run it on; ``None`` for prediction alone.
        :param device: Device to run it on.
        :param custom_objects: Objects that replace saved ones, by key; a class also by the import path that is in the file.
        :param print_system_info: Whether to print system info of then and now.
        :param force_reset: Reset the environment before training.
        :param trust: Also load pickled objects and import the modules of the file's classes, which can run any code. Files of
            earlier versions need it.
        :param kwargs: Arguments that change the model.
        :return: The model.
        :raises ValueError: for a file that is damaged or holds another kind of model, and for one that needs ``trust``, with
            what needs it.
        """
        try:
            content = model_file.read_content(path)
            objects = model_file.read_objects(content, path, trust, cls, custom_objects)
            # The objects replace all that SB3 would read, and so unpickle, itself.
            return super().load(io.BytesIO(content), env, device, objects, print_system_info, force_reset, **kwargs)
        except pickle.UnpicklingError as error:
            raise ValueError(f"{path} is not a whole file of a MemoryPPO model: {model_file.NOT_TENSORS}.") from error
        except CORRUPT_FILE_ERRORS as error:
            raise ValueError(f"{path} is not a whole file of a MemoryPPO model: {error}") from error
