"""``MemoryPPO``: PPO for policies with an encoder and a memory, trained from the states stored during the rollout."""

import copy
import io
import json
import pathlib
import pickle
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch as th
from gymnasium import spaces
from sb3_contrib import RecurrentPPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.save_util import recursive_getattr, save_to_zip_file
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule
from stable_baselines3.common.utils import obs_as_tensor, update_learning_rate
from stable_baselines3.common.vec_env import VecEnv, VecTransposeImage
from torch import nn

from sb3_cyborg import kernels
from sb3_cyborg.checks import Number, all_finite, check_finite_observations, check_values, plain, unknown_name
from sb3_cyborg.files import write_atomically
from sb3_cyborg.memory_ppo import losses, model_file
from sb3_cyborg.memory_ppo.actions import DIVERGED
from sb3_cyborg.memory_ppo.arguments import LEARN_ARGUMENTS, MODEL_ARGUMENTS, check_policy_arguments, scheduled_value
from sb3_cyborg.memory_ppo.env_checks import check_observation, check_observations, check_returns, check_spaces, check_step
from sb3_cyborg.memory_ppo.objective import LossTerm, Minibatch, UpdateScales, measure, ppo_terms, weighted_sum
from sb3_cyborg.memory_ppo.policies import (
    MemoryActorCriticCnnPolicy,
    MemoryActorCriticPolicy,
    MemoryMultiInputActorCriticPolicy,
    policy_options,
)
from sb3_cyborg.memory_ppo.rank_error import RankError
from sb3_cyborg.memory_ppo.ranks import NormalizeMerger, Ranks, callbacks_of_rank, find_ranks, use_own_gpu
from sb3_cyborg.memory_ppo.rollout_buffer_v7 import (
    RolloutBufferV7,
    TrainingBatch,
    check_burn_in,
    plan_minibatches,
    plan_n_steps,
)
from sb3_cyborg.memory_ppo.schedules import AUTO, as_schedule, learning_rate_schedule
from sb3_cyborg.memory_ppo.sizes import check_rollout_memory, check_state_memory
from sb3_cyborg.sequence_model import AUX_LOSS, State, index_state, may_branch, without_diagnostics

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
"""Exceptions that SB3 raises for files that are damaged or no SB3 models."""

NOT_FINITE = (
    "{what} are not finite: training has diverged. The update is undone, and the weights are those before it. Try a smaller "
    "`learning_rate`, and normalize rewards and observations."
)
"""Error message for an update that would make weights NaN or infinite."""

CRITIC_DIVERGED = (
    "The values of the critic are not finite: training has diverged, or numbers overflow float32. Try a smaller "
    "`learning_rate`, and normalize observations and rewards."
)
"""Error message for values of the critic that are NaN or infinite in a rollout."""

Stats = dict[str, list[th.Tensor]]
"""Diagnostics of the minibatches of an update, as tensors: a conversion to numbers would synchronize with the device."""


class MemoryPPO(RecurrentPPO):
    """
    Proximal Policy Optimization (clip version) with an encoder and an external memory.

    A drop-in replacement for sb3-contrib's ``RecurrentPPO``. PPO: https://arxiv.org/abs/1707.06347. Stored states and burn-in
    follow R2D2 (Kapturowski et al. 2019, https://openreview.net/forum?id=r1lyTjAqYX), but on-policy, where the stored states
    are exact in the first epoch.

    :param policy: ``"MlpPolicy"``, ``"CnnPolicy"``, ``"MultiInputPolicy"`` (sb3-contrib's ``"MlpLstmPolicy"``… are aliases),
        or a subclass of :class:`MemoryActorCriticPolicy`.
    :param env: The environment to learn from (if registered in Gym, can be str).
    :param learning_rate: Learning rate: a number, a function of the progress remaining (from 1 to 0), or RL Zoo's
        ``"lin_3e-4"`` (linear from 3e-4 to 0) or ``"lin_3e-4_1e-5"`` (to 1e-5). ``"auto"`` is ``"lin_7e-4_7e-5"`` over a call
        of :meth:`learn`; in calls with ``reset_num_timesteps=False`` it does not fall below its middle, 3.85e-4.
    :param n_steps: Steps of each environment in a rollout, >= 1; ``None`` is the smallest multiple of 128 that gives at least
        2048 transitions per rollout.
    :param batch_size: Training transitions in a minibatch, >= 2, a multiple of ``seq_len``; ``None`` is a quarter of the
        rollout, at least 128 and at most 1024, adapted so that it divides the rollout.
    :param n_epochs: Number of passes over a rollout, >= 1.
    :param gamma: Discount factor, in [0, 1].
    :param gae_lambda: λ of generalized advantage estimation, in [0, 1].
    :param clip_range: Clip range of the ratio: a number, a function of the progress remaining, or text such as ``"lin_0.2"``.
    :param clip_range_vf: Clip range of the value, in units of the return, in the same forms; the loss is the maximum of the
        clipped and the unclipped error. ``None`` does not clip.
    :param normalize_advantage: Normalize the advantages of each minibatch by their standard deviation, or by that of the last
        128 rollouts if it is larger. If the rewards of a rollout are constant, its advantages are mostly noise of the value
        estimates, which SB3's normalization would amplify.
    :param ent_coef: Weight of the entropy.
    :param vf_coef: Weight of the value loss.
    :param max_grad_norm: Upper bound of the gradient norm, for clipping.
    :param use_sde: Whether to use generalized State-Dependent Exploration.
    :param sde_sample_freq: Sample a new noise matrix every n steps; -1 only at the start of a rollout.
    :param target_kl: Stop the update before a step if the approximate KL divergence exceeds 1.5 times this value; ``None``
        never stops.
    :param stats_window_size: Number of episodes that the logged means are computed over.
    :param tensorboard_log: Folder for TensorBoard; ``None`` disables it.
    :param policy_kwargs: Arguments of the policy, e.g. ``{"encoder": "mamba", "memory": "pmm",
        "memory_kwargs": {"num_slots": 16}}``; see :class:`MemoryActorCriticPolicy`.
    :param verbose: 0 no output, 1 info messages, 2 debug messages.
    :param seed: Seed for the pseudo random generators.
    :param device: ``"cpu"``, ``"cuda"``…; ``"auto"`` uses a GPU if available.
    :param _init_setup_model: Whether to build the network at once.
    :param seq_len: Steps of a training sequence, i.e. of truncated backpropagation through time; divides ``n_steps``. ``None``
        is the largest divisor up to 64, or up to 128 if minibatches contain at least 8 sequences of 128.
    :param burn_in: Steps before each sequence that are replayed without gradient and with the current weights, to update the
        state at its start; >= 0 and less than ``n_steps``.
    :param memory_loss_coef: Weight of the memory's auxiliary loss (``pmm`` with ``write_rate``).
    :param normalize_value: Train the critic in units of the return's standard deviation (PopArt, see :class:`ValueHead`),
        which balances the value loss and the policy loss for rewards of any scale.
    :param scale_lr_by_advantage: Multiply the learning rate of an update by ``min(1, 2 std(A) / s)``, logged as
        ``train/lr_scale``: ``std(A)`` is the standard deviation of the rollout's advantages, ``s`` that of the last 128
        rollouts. Adam divides by the size of the gradient, so without the factor a rollout with small advantages would change
        the policy as much as any other.
    :param log_barrier_coef: Weight of the log barrier, the KL divergence from a uniform policy, >= 0, see
        :func:`~sb3_cyborg.memory_ppo.losses.log_barrier_loss`. It is for discrete actions, and for tasks where an action is
        right for many steps and wrong once; use 0.01 to 0.03 there. 0 disables it.
    :param use_last_action: Append the last action to the policy's input (same as in ``policy_kwargs``).
    :param amp: Compute features and the encoder's projections in bf16 (autocast; same as in ``policy_kwargs``). Recurrence,
        memory, state and heads stay in fp32. It is faster for image observations, and for wide networks on a GPU.
        ``train/ratio_error`` is up to 0.05 with it.
    :param distributed: Train together with the other processes if ``torchrun`` has started several, see :class:`Ranks`. The
        environments are those of this process; ``n_steps``, ``batch_size`` and all numbers of steps mean what they mean for
        one process with the environments of all. ``False`` trains alone.
    :param rollout_buffer_class: PPO's argument; must be ``None``, because the buffer is :class:`RolloutBufferV7`.
    :param rollout_buffer_kwargs: PPO's argument; must be ``None`` or empty.
    :raises ValueError: for invalid names, options and sizes, with values that work.
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
    """Steps of each environment in a rollout; as ``batch_size`` and ``seq_len``, an int after ``_setup_model``."""
    batch_size: int
    """Training transitions in a minibatch."""
    seq_len: int
    """Steps in a training sequence."""
    ranks: Ranks
    """The processes that train together, and the number of this one."""
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
        distributed: bool = True,
        rollout_buffer_class: None = None,
        rollout_buffer_kwargs: dict[str, Any] | None = None,
    ) -> None:
        check_values(MODEL_ARGUMENTS, locals())  # this constructor and SB3's use some of them
        check_values({"amp": MODEL_ARGUMENTS["amp"]}, policy_kwargs or {})
        if rollout_buffer_class is not None or rollout_buffer_kwargs:
            raise ValueError(
                "MemoryPPO supports only RolloutBufferV7: omit `rollout_buffer_class` and `rollout_buffer_kwargs`."
            )
        if use_last_action:
            policy_kwargs = {**(policy_kwargs or {}), "use_last_action": True}
        self.distributed, self.ranks = distributed, find_ranks(distributed)
        use_own_gpu(self.ranks)
        super().__init__(
            policy,
            env,
            learning_rate=learning_rate,  # type: ignore[arg-type]  # text is converted in `_setup_lr_schedule`
            n_steps=n_steps,  # type: ignore[arg-type]  # an int after `_setup_model`, as `batch_size` and `seq_len`
            batch_size=batch_size,
            n_epochs=n_epochs,
            gamma=gamma,
            gae_lambda=gae_lambda,
            clip_range=clip_range,  # type: ignore[arg-type]  # a schedule after `_setup_model`, as `clip_range_vf`
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
            verbose=verbose if self.ranks.is_first else 0,
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
        self._merger: NormalizeMerger | None = None
        self._episodes: list[dict[str, Any]] = []
        self.amp = amp or bool((policy_kwargs or {}).get("amp", False))
        if _init_setup_model:
            self._setup_model()

    def _get_policy_from_name(self, policy_name: str) -> type[BasePolicy]:
        if policy_name not in self.policy_aliases:
            raise unknown_name("policy", policy_name, self.policy_aliases)
        return self.policy_aliases[policy_name]

    @staticmethod
    def _wrap_env(env: GymEnv, verbose: int = 0, monitor_wrapper: bool = True) -> VecEnv:
        check_spaces(env)
        wrapped = RecurrentPPO._wrap_env(env, verbose, monitor_wrapper)
        check_returns(wrapped)
        return wrapped

    def _setup_model(self) -> None:
        self._check_arguments()
        self.ranks = find_ranks(self.distributed)  # once more, for a model that is loaded
        self._scales.reduce = self.ranks.sum
        if not self.ranks.is_first:
            self.verbose = 0
        self._setup_lr_schedule()
        self.set_random_seed(self.seed)
        self._plan_sizes()
        assert issubclass(self.policy_class, MemoryActorCriticPolicy)
        self.policy = self.policy_class(
            self.observation_space,
            self.action_space,
            self.lr_schedule,
            use_sde=self.use_sde,
            **self.policy_kwargs | ({"amp": self.amp} if self.amp or "amp" in self.policy_kwargs else {}),
        ).to(self.device)
        check_state_memory(self.policy.core, self.n_envs, self.n_steps // self.seq_len, self.device)
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
            action_mask_dim=self._action_mask_dim(),
            reduce=self.ranks.sum if self.ranks.size > 1 else None,
        )
        self.clip_range = as_schedule(self.clip_range)
        if self.clip_range_vf is not None:
            self.clip_range_vf = as_schedule(self.clip_range_vf)

    def _check_arguments(self) -> None:
        """Check the arguments, those of a loaded model, too, before anything is built, and make Python numbers of NumPy's."""
        for name in MODEL_ARGUMENTS.keys() & vars(self).keys():
            setattr(self, name, plain(getattr(self, name)))
        check_values(MODEL_ARGUMENTS, vars(self))
        for name, rule in MODEL_ARGUMENTS.items():
            if isinstance(rule, Number):
                setattr(self, name, float(getattr(self, name)))  # PyTorch takes no int above 2**63, such as 10**30
        check_values(
            {"stats_window_size": MODEL_ARGUMENTS["stats_window_size"]}, {"stats_window_size": self._stats_window_size}
        )
        policy = self.policy_class
        if not (isinstance(policy, type) and issubclass(policy, MemoryActorCriticPolicy)):
            raise ValueError(
                f"`policy` must be a subclass of MemoryActorCriticPolicy or one of {sorted(self.policy_aliases)}, got "
                f"{getattr(policy, '__name__', repr(policy))}; load a model of another algorithm with that algorithm."
            )
        if not hasattr(self, "observation_space"):
            raise ValueError("`env` must be an environment or its id, got None.")
        if self.env is not None and self.n_envs != self.env.num_envs:
            raise ValueError(f"`n_envs`={self.n_envs}, but `env` has {self.env.num_envs} environments; leave `n_envs` out.")
        has_dict = isinstance(self.observation_space, spaces.Dict)
        if has_dict and policy in (MemoryActorCriticPolicy, MemoryActorCriticCnnPolicy):
            raise ValueError("You must use `MultiInputPolicy` when working with dict observation space.")
        if (
            not has_dict
            and policy is MemoryMultiInputActorCriticPolicy
            and "features_extractor_class" not in self.policy_kwargs
        ):
            raise ValueError(
                f"`policy`='MultiInputPolicy' is for Dict observations, got {self.observation_space}; use 'MlpPolicy', or "
                "'CnnPolicy' for images."
            )
        self.policy_kwargs = {name: plain(value) for name, value in self.policy_kwargs.items()}
        check_policy_arguments(self.policy_kwargs, policy_options(policy), self.device)
        if self.policy_kwargs.get("squash_output") and not self.use_sde:
            raise ValueError("`squash_output`=True needs `use_sde`=True: only gSDE's actions are squashed.")
        self._check_log_barrier()

    def _setup_lr_schedule(self) -> None:
        self.lr_schedule = learning_rate_schedule(self.learning_rate)

    def set_random_seed(self, seed: int | None = None) -> None:
        """
        Set the seeds of the random generators, and of the environments.

        On rank ``r`` of several, generators get ``seed + r``, and environment ``i`` gets ``seed + r * n_envs + i``, which it
        would get in one process with all environments.

        :param seed: The seed. ``None`` changes nothing in one process; each of several draws one, because they would start
            with the same random numbers otherwise.
        """
        if self.ranks.size == 1:
            super().set_random_seed(seed)
            return
        if seed is None:
            seed = int(np.random.SeedSequence().generate_state(1)[0])
        super().set_random_seed((seed + self.ranks.rank) % 2**32)
        if self.env is not None:
            self.env.seed((seed + self.ranks.rank * self.n_envs) % 2**32)

    @property
    def total_envs(self) -> int:
        """Number of environments of all ranks."""
        return self.n_envs * self.ranks.size

    def _plan_sizes(self) -> None:
        """
        Choose ``n_steps``, ``batch_size`` and ``seq_len`` where the user gave ``None``.

        A loaded model may have another number of environments. Then ``batch_size`` and ``seq_len`` that were chosen here are
        chosen again, and ``n_steps`` is kept.
        """
        given: dict[str, int | None] = {"batch_size": self.batch_size, "seq_len": self.seq_len}
        for name, (wanted, planned) in self._planned.items():
            if given[name] == planned:  # `load(path, batch_size=...)` may have changed it
                given[name] = wanted
        n_steps: int | None = self.n_steps
        self.n_steps = plan_n_steps(self.total_envs, given["seq_len"]) if n_steps is None else n_steps
        check_rollout_memory(self.n_steps, self.n_envs, self.observation_space, self.action_space, self.device)
        self.seq_len, self.batch_size = plan_minibatches(
            self.n_steps, self.total_envs, given["seq_len"], given["batch_size"], self.ranks.size
        )
        self._planned = {name: (given[name], getattr(self, name)) for name in given}
        check_burn_in(self.burn_in, self.n_steps)
        if self.verbose >= 1:
            if self.device.type == "cpu":
                print(kernels.describe())
            print(
                f"Rollouts of n_steps={self.n_steps} in {self.total_envs} environments, minibatches of "
                f"batch_size={self.batch_size} in sequences of seq_len={self.seq_len}, burn_in={self.burn_in}"
            )
            if self.ranks.size > 1:
                print(
                    f"{self.ranks.size} processes with n_envs={self.n_envs} each, {self.total_envs} environments in total; of "
                    f"each minibatch, each process computes {self.batch_size // self.ranks.size} transitions"
                )

    def _check_log_barrier(self) -> None:
        if self.log_barrier_coef and isinstance(self.action_space, spaces.Box):
            raise ValueError(
                f"`log_barrier_coef` is for discrete actions, got {self.log_barrier_coef} with {self.action_space}; see "
                "`use_sde`."
            )

    def _keeps_channels_last(self) -> bool:
        """:return: Whether to keep images channels-last in memory, which makes convolutions on a CPU faster."""
        convolves = any(isinstance(module, nn.Conv2d) for module in self.policy.features_extractor.modules())
        return convolves and isinstance(self.env, VecTransposeImage) and self.device.type == "cpu"

    # --- rollout ----------------------------------------------------------------------------------------------------

    def collect_rollouts(  # type: ignore[override]  # the buffer is no subclass of SB3's
        self, env: VecEnv, callback: BaseCallback, rollout_buffer: RolloutBufferV7, n_rollout_steps: int
    ) -> bool:
        """
        Collect a rollout and fill the buffer.

        :param env: The training environments.
        :param callback: Callback, called at each step and at the start and end of the rollout.
        :param rollout_buffer: Buffer to fill.
        :param n_rollout_steps: Steps of each environment, equal to the size of the buffer.
        :return: False if the callback stopped training.
        :raises ValueError: for observations and rewards of another shape or dtype than declared, or that are not finite, for
            returns that overflow float32, and for logits that are NaN. No weights are changed.
        """
        assert self._last_obs is not None, "No previous observation was provided"
        self.policy.set_training_mode(False)
        rollout_buffer.reset()
        if self.use_sde:
            self.policy.reset_noise(env.num_envs)
        callback.on_rollout_start()
        check_observations(self._last_obs, self.observation_space, env.num_envs, f"after {self.num_timesteps} steps")
        self._check_finite(self._last_obs, np.zeros(1))

        for n_steps in range(n_rollout_steps):
            if self.use_sde and self.sde_sample_freq > 0 and n_steps % self.sde_sample_freq == 0:
                self.policy.reset_noise(env.num_envs)
            last_obs, last_starts = self._last_obs, self._last_episode_starts
            assert last_obs is not None
            assert last_starts is not None
            obs_tensor = obs_as_tensor(last_obs, self.device)
            episode_starts = th.as_tensor(last_starts, dtype=th.float32, device=self.device)
            action_masks = self._action_masks(env)
            with th.inference_mode():  # 10% faster than `no_grad`
                action_tensor, values, log_probs, state = self.policy(
                    obs_tensor, self._last_state, episode_starts, action_masks=action_masks
                )
            values, log_probs = values.clone(), log_probs.clone()  # no inference tensors: a callback may need gradients
            actions = action_tensor.cpu().numpy()

            new_obs: Any  # SB3's type of a VecEnv's observations is wider than that of its other functions
            new_obs, rewards, dones, infos = env.step(self._env_actions(actions))

            self.num_timesteps += env.num_envs * self.ranks.size
            callback.update_locals(locals())
            if not callback.on_step():
                self._end_rollout(False)
                return False
            when = f"after {self.num_timesteps} steps"
            check_observations(new_obs, self.observation_space, env.num_envs, when)
            check_step(rewards, dones, infos, env.num_envs, when)
            self._check_finite(new_obs, rewards)
            self._update_info_buffer(infos, dones)
            targets = th.as_tensor(rewards, dtype=th.float32, device=self.device)
            if dones.any():
                targets = self._add_truncation_bootstrap(targets, infos, dones, state)

            rollout_buffer.add(
                last_obs, action_tensor, targets, last_starts, values, log_probs, self._last_state, action_masks=action_masks
            )
            self._last_obs = new_obs
            self._last_episode_starts = dones
            self._last_state = state

        if not self._end_rollout(True):
            return False
        with th.no_grad():
            values = self.policy.predict_values(
                obs_as_tensor(new_obs, self.device), state, th.as_tensor(dones, dtype=th.float32, device=self.device)
            )
        if rollout_buffer.log_probs.isnan().any():  # in the select-only form, acting does not check the logits
            raise ValueError(DIVERGED)
        rollout_buffer.compute_returns_and_advantage(last_values=values, dones=dones)
        if not rollout_buffer.advantages.isfinite().all():
            if not all_finite([rollout_buffer.values, values]):
                raise ValueError(CRITIC_DIVERGED)
            largest = rollout_buffer.rewards.abs().max().item()
            raise ValueError(f"Returns are not finite: rewards as large as {largest:g} overflow float32; scale them down.")
        if self.verbose >= 1 and (text := self.policy.recording_report()):
            print(text)
        callback.update_locals(locals())
        callback.on_rollout_end()
        return True

    def _end_rollout(self, complete: bool) -> bool:
        """
        Merge the episodes and the statistics of ``VecNormalize`` of all ranks.

        :param complete: Whether this rank has a complete rollout; its callback may have stopped training.
        :return: Whether all ranks have one.
        """
        if self.ranks.size == 1:
            return complete
        of_ranks = self.ranks.gather((complete, self._episodes))
        for rank, (_, episodes) in enumerate(of_ranks):
            if rank != self.ranks.rank:
                super()._update_info_buffer(episodes, np.ones(len(episodes), dtype=bool))
        self._episodes = []
        if self._merger is not None:
            self._merger.merge()
        return all(one for one, _ in of_ranks)

    def _update_info_buffer(self, infos: list[dict[str, Any]], dones: np.ndarray | None = None) -> None:
        super()._update_info_buffer(infos, dones)
        if self.ranks.size > 1:
            ended = np.zeros(len(infos), dtype=bool) if dones is None else dones
            self._episodes += [
                {name: info[name] for name in ("episode", "is_success") if name in info and (end or name == "episode")}
                for info, end in zip(infos, ended, strict=True)
                if "episode" in info or (end and "is_success" in info)
            ]

    def _action_mask_dim(self) -> int:
        """:return: Entries of the action mask of a step; 0 if no masks are stored."""
        return 0

    def _action_masks(self, env: VecEnv) -> th.Tensor | None:
        """:return: Legal actions of the next step, bool, (N, M); ``None`` if all are."""
        return None

    def _env_actions(self, actions: np.ndarray) -> np.ndarray:
        """:return: Actions for the environment: rescaled if squashed, otherwise clipped to the bounds of the Box."""
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
        Add ``gamma * V(terminal observation)`` to the rewards of truncated episodes, as in SB3.

        :param rewards: (N,).
        :param infos: Infos of the step, N of them.
        :param dones: Whether the step ended the episode, bool, (N,).
        :param state: State after the step, for the value of the terminal observation; not changed.
        :return: The rewards with bootstrapped values, (N,).
        """
        rows = [
            row
            for row in np.flatnonzero(dones).tolist()
            if infos[row].get("TimeLimit.truncated", False) and infos[row].get("terminal_observation") is not None
        ]
        if not rows:
            return rewards
        terminal = [infos[row]["terminal_observation"] for row in rows]
        for row, last in zip(rows, terminal, strict=True):
            check_observation(last, self.observation_space, f"Environment {row}, at the end of an episode,")
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
        """
        Update the policy with the rollout in the buffer: ``n_epochs`` passes of minibatch steps on PPO's objective.

        :raises ValueError: if gradients or weights become NaN or infinite, and for schedules with values that are not finite
            numbers of at least 0. The update is undone.
        """
        before = [_copied(part) for part in (self.policy.state_dict(), self.policy.optimizer.state_dict(), vars(self._scales))]
        try:
            self._update()
            if not all_finite(self.policy.state_dict().values()):
                raise ValueError(NOT_FINITE.format(what="Weights"))
        except (ValueError, RankError):
            policy, optimizer, scales = before
            self.policy.load_state_dict(policy)
            self.policy.optimizer.load_state_dict(optimizer)
            vars(self._scales).update(scales)
            raise

    def _update(self) -> None:
        """The update of :meth:`train`."""
        self.policy.set_training_mode(True)
        buffer, policy = self.rollout_buffer, self.policy
        observed = self._scales.update(buffer.advantages, buffer.returns, policy.inputs.parts(buffer.observations))
        if self.normalize_value:
            policy.value_net.rescale(self._scales.returns)
        self._update_learning_rate(policy.optimizer)
        clip_range, clip_range_vf = self._clip_ranges()
        terms = self._loss_terms(clip_range, clip_range_vf)
        stats: Stats = defaultdict(list)
        parameters = list(policy.parameters())  # here, because a walk through the modules takes as long as a small product
        for epoch in range(self.n_epochs):
            stepped, stop = False, False
            for batch in buffer.minibatches(self.batch_size // self.ranks.size):
                loss = self._minibatch_loss(batch, terms, clip_range, stats)
                if stop := self._exceeds_target_kl(stats, epoch):
                    break
                self._step(loss, parameters)
                stepped = True
            self._n_updates += stepped
            if stop:
                break
        policy.inputs.update_normalization(observed)
        self._log_update(stats, clip_range, clip_range_vf)

    def _clip_ranges(self) -> tuple[float, float | None]:
        """:return: Clip ranges of the ratio and of the value at the current progress."""
        assert callable(self.clip_range)
        clip_range_vf = self._scheduled("clip_range_vf", self.clip_range_vf) if callable(self.clip_range_vf) else None
        return self._scheduled("clip_range", self.clip_range), clip_range_vf

    def _scheduled(self, name: str, schedule: Schedule) -> float:
        """:return: The value of a schedule at the current progress, checked."""
        try:
            return scheduled_value(schedule, self._current_progress_remaining)
        except ValueError as error:
            raise ValueError(f"`{name}` {error}.") from error

    def _update_current_progress_remaining(self, num_timesteps: int, total_timesteps: int) -> None:
        super()._update_current_progress_remaining(num_timesteps, total_timesteps)
        # The last rollout may exceed the total, and a linear schedule would then be negative.
        self._current_progress_remaining = max(self._current_progress_remaining, 0.0)

    def _loss_terms(self, clip_range: float, clip_range_vf: float | None) -> list[LossTerm]:
        """:return: The terms of the objective; a subclass may add terms."""
        return ppo_terms(
            clip_range,
            clip_range_vf,
            ent_coef=self.ent_coef,
            vf_coef=self.vf_coef,
            memory_loss_coef=self.memory_loss_coef,
            log_barrier_coef=self.log_barrier_coef,
        )

    def _update_learning_rate(self, optimizers: list[th.optim.Optimizer] | th.optim.Optimizer) -> None:
        rate = self._scheduled("learning_rate", self.lr_schedule)
        self.logger.record("train/learning_rate", rate)
        if self.scale_lr_by_advantage:
            rate *= self._scales.lr_scale
            self.logger.record("train/lr_scale", self._scales.lr_scale)
        for optimizer in optimizers if isinstance(optimizers, list) else [optimizers]:
            update_learning_rate(optimizer, rate)

    def _minibatch_loss(self, batch: TrainingBatch, terms: Sequence[LossTerm], clip_range: float, stats: Stats) -> th.Tensor:
        """:return: The loss of a minibatch, 0-d, attached to the graph; its diagnostics are appended to ``stats``."""
        first = not stats  # of the update, where the ratio must be 1; only here the memory computes diagnostics
        with nullcontext() if first else without_diagnostics():
            evaluation = self.policy.evaluate_sequences(batch)
        advantages = batch["advantages"]
        if self.normalize_advantage:
            advantages = losses.normalize_advantages(
                advantages, self._scales.advantages.std, batch.get("advantage_mean"), batch.get("advantage_std")
            )
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
            action_masks=evaluation.action_masks,
        )
        loss, parts = weighted_sum(terms, minibatch)
        with th.no_grad():
            error = (minibatch.ratio - 1).abs()
            if first:
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
        """:return: Whether the KL divergence of the last minibatch stops the update; it synchronizes with the device."""
        if self.target_kl is None:
            return False
        kl = self.ranks.mean(stats["train/approx_kl"][-1]).item()
        if kl <= 1.5 * self.target_kl:
            return False
        if self.verbose >= 1:
            print(f"Early stopping at step {epoch} due to reaching max kl: {kl:.2f}")
        return True

    def _step(self, loss: th.Tensor, parameters: Sequence[nn.Parameter]) -> None:
        """
        Step the optimizer with the clipped gradient of the loss.

        :param loss: The loss, 0-d.
        :param parameters: The parameters of the policy.
        :raises ValueError: for a gradient that is not finite, if code may branch on values; otherwise :meth:`train` finds it
            in the weights.
        """
        self.policy.optimizer.zero_grad()
        loss.backward()
        self.ranks.average_gradients(parameters)
        norm = th.nn.utils.clip_grad_norm_(parameters, self.max_grad_norm)
        if may_branch(norm.device) and not norm.isfinite():
            # The norm of finite gradients may overflow: then they were clipped to 0.
            gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
            if not all_finite(gradients):
                raise ValueError(NOT_FINITE.format(what="Gradients"))
        self.policy.optimizer.step()

    def _of_all_ranks(self, stats: Stats) -> dict[str, list[float]]:
        """:return: The means of the diagnostics over the minibatches of an update, a number of each rank."""
        own = {name: th.stack(entries).mean().item() for name, entries in stats.items()}
        of_ranks = self.ranks.gather(own)
        return {name: [one[name] for one in of_ranks if name in one] for name in own}

    def _log_update(self, stats: Stats, clip_range: float, clip_range_vf: float | None) -> None:
        for name, values in self._of_all_ranks(stats).items():
            # A minibatch is divided equally among the ranks, so its mean is the mean of theirs.
            self.logger.record(name, max(values) if name == "train/ratio_error" else sum(values) / len(values))
        buffer = self.rollout_buffer
        errors = buffer.returns.double() - buffer.values.double()
        moments = measure({"errors": errors.view(-1, 1), "returns": buffer.returns.view(-1, 1)}, self.ranks.sum)
        unexplained, var = moments["errors"].var.item(), moments["returns"].var.item()
        varies = var > 1e-12 * moments["returns"].square.item()  # otherwise it is rounding of equal returns
        self.logger.record("train/explained_variance", 1 - unexplained / var if varies else np.nan)
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

        Schedules depend on the progress remaining: the remaining share of the total steps of all calls. With
        ``reset_num_timesteps=False``, a call adds its steps to the total, so each of many short calls would end at the lowest
        rate. The default ``learning_rate`` then does not fall below its middle.

        :param total_timesteps: Number of environment steps, over all environments.
        :param callback: Callbacks, called at each step.
        :param log_interval: Number of rollouts between two logs.
        :param tb_log_name: Name of the run in TensorBoard.
        :param reset_num_timesteps: Whether to start counting steps at 0; ``False`` continues the count.
        :param progress_bar: Whether to show a progress bar.
        :return: The model.
        :raises ValueError: for arguments out of range; for observations, rewards and ends of episodes of another shape or
            dtype than declared, or that are not finite; for logits that are NaN; and for an update that would make weights
            NaN or infinite, which is undone.
        """
        check_values(LEARN_ARGUMENTS, locals())
        self.lr_schedule = learning_rate_schedule(self.learning_rate, continued=not reset_num_timesteps)
        if self.ranks.size == 1:
            return super().learn(total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar)
        with self.ranks.together():
            self._take_state_of_first_rank(total_timesteps)
            callback = callbacks_of_rank(callback, self.ranks)
            progress_bar = progress_bar and self.ranks.is_first
            super().learn(total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar)
            self.ranks.gather(None)  # so that no rank ends while another one still computes with it
        return self

    def _setup_learn(self, *args: Any, **options: Any) -> tuple[int, BaseCallback]:
        if self.ranks.is_first or self._custom_logger:
            return super()._setup_learn(*args, **options)
        self.set_logger(Logger(None, []))  # SB3 would make a folder for TensorBoard
        try:
            return super()._setup_learn(*args, **options)
        finally:
            self._custom_logger = False

    def _take_state_of_first_rank(self, total_timesteps: int) -> None:
        """
        Take weights, optimizer, counters and running moments of rank 0.

        :param total_timesteps: Number of environment steps, which must be the same on all ranks.
        :raises ValueError: if the ranks have different settings.
        """
        names = ("n_envs", "n_steps", "seq_len", "burn_in", "batch_size", "n_epochs", "target_kl", "normalize_advantage")
        shapes = [tuple(parameter.shape) for parameter in self.policy.parameters()]
        settings = {name: getattr(self, name) for name in names}
        self.ranks.check_equal(settings | {"total_timesteps": total_timesteps, "shapes of the weights": shapes})
        scales = {"advantages": vars(self._scales.advantages), "returns": vars(self._scales.returns)}
        own = (self.policy.state_dict(), self.policy.optimizer.state_dict(), scales, self.num_timesteps, self._n_updates)
        policy, optimizer, scales, self.num_timesteps, self._n_updates = self.ranks.of_first(own, self.device)
        if not self.ranks.is_first:
            self.policy.load_state_dict(policy)
            self.policy.optimizer.load_state_dict(optimizer)
            vars(self._scales.advantages).update(scales["advantages"])
            vars(self._scales.returns).update(scales["returns"])
        normalize = self.get_vec_normalize_env()
        self._merger = None if normalize is None else NormalizeMerger(normalize, self.ranks)

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_last_state", "_merger", "_episodes", "ranks"]

    def save(
        self,
        path: str | pathlib.Path | io.BufferedIOBase,
        exclude: Iterable[str] | None = None,
        include: Iterable[str] | None = None,
    ) -> None:
        """
        Save the model in SB3's zip, without pickles: see :mod:`~sb3_cyborg.memory_ppo.model_file`.

        A path is written atomically: if writing fails, an old file stays. An object without plain form, such as a function as
        a schedule, is pickled with a warning, and the file then loads with ``trust=True`` only.

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
        Load a model from a file, as in SB3; the number of environments may differ from the saved model's.

        No code of the file is run. Classes come from torch, stable_baselines3, sb3_contrib, gymnasium, this package, and
        modules that are imported already.

        :param path: Path to the file, or a file object.
        :param env: The environment to train on; ``None`` for prediction only.
        :param device: Device of the model.
        :param custom_objects: Objects that replace saved ones, by key; a class also by the import path that is in the file.
        :param print_system_info: Whether to print the saved and the current system info.
        :param force_reset: Whether to reset the environment before training.
        :param trust: Also load pickled objects and import the modules of the file's classes, which can run any code. Files of
            earlier versions need it.
        :param kwargs: Attributes of the model to change.
        :return: The model.
        :raises ValueError: for a file that is damaged or is no MemoryPPO model, and for one that needs ``trust``, with what
            needs it.
        """
        try:
            content = model_file.read_content(path)
            objects = model_file.read_objects(content, path, trust, cls, custom_objects)
            # The objects replace all that SB3 would read, and so unpickle, itself.
            return super().load(io.BytesIO(content), env, device, objects, print_system_info, force_reset, **kwargs)
        except pickle.UnpicklingError as error:
            raise ValueError(f"{path} is not a complete file of a MemoryPPO model: {model_file.NOT_TENSORS}.") from error
        except CORRUPT_FILE_ERRORS as error:
            raise ValueError(f"{path} is not a complete file of a MemoryPPO model: {error}") from error


def _copied(value: Any) -> Any:
    """:return: A deep copy. Dictionaries of tensors, as state-dicts, are copied several times faster than by ``deepcopy``."""
    if isinstance(value, th.Tensor):
        return value.clone()
    if isinstance(value, dict):
        copied = copy.copy(value)  # keeps the type, and the attributes of a state-dict
        copied.update((key, _copied(entry)) for key, entry in value.items())
        return copied
    return copy.deepcopy(value)
