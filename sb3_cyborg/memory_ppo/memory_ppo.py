"""``MemoryPPO``: PPO for policies with an encoder and a memory, trained from the very states that it acted with."""

import io
import json
import pathlib
import pickle
import zipfile
from collections import defaultdict
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch as th
from gymnasium import spaces
from sb3_contrib import RecurrentPPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule
from stable_baselines3.common.utils import FloatSchedule, LinearSchedule, explained_variance, obs_as_tensor
from stable_baselines3.common.vec_env import VecEnv, VecTransposeImage
from torch import nn

from sb3_cyborg.checks import check_finite_observations, check_options, check_positive, check_whole, unknown_name
from sb3_cyborg.memory_ppo import losses
from sb3_cyborg.memory_ppo.normalization import RunningMoments
from sb3_cyborg.memory_ppo.policies import (
    LOG_BARRIER,
    MemoryActorCriticCnnPolicy,
    MemoryActorCriticPolicy,
    MemoryMultiInputActorCriticPolicy,
    policy_options,
)
from sb3_cyborg.memory_ppo.rollout_buffer_v7 import RolloutBufferV7, SequenceBatch, plan_minibatches, plan_n_steps
from sb3_cyborg.sequence_model import AUX_LOSS, State, index_state

SelfMemoryPPO = TypeVar("SelfMemoryPPO", bound="MemoryPPO")

CORRUPT_FILE_ERRORS = (
    zipfile.BadZipFile,
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
"""What SB3 raises for files that are damaged, or of something else."""


LEARNING_RATE = LinearSchedule(7e-4, 7e-5, 1.0)
"""The default: a rate that learns soon what to remember, and falls to a tenth, so that what was learned stays."""


class MemoryPPO(RecurrentPPO):
    """
    Proximal Policy Optimization (clip version) for agents that remember.

    A drop-in for sb3-contrib's ``RecurrentPPO``: the paper is https://arxiv.org/abs/1707.06347, the treatment of
    stored states and burn-in follows R2D2 (Kapturowski et al. 2019, https://openreview.net/forum?id=r1lyTjAqYX), but
    on-policy, where the stored states are exact in the first epoch.

    :param policy: ``"MlpPolicy"``, ``"CnnPolicy"``, ``"MultiInputPolicy"`` (sb3-contrib's ``"MlpLstmPolicy"``… mean the
        same), or a subclass of :class:`MemoryActorCriticPolicy`.
    :param env: The environment to learn from (if registered in Gym, can be str).
    :param learning_rate: The learning rate, or a function of the progress remaining (from 1 to 0).
    :param n_steps: Steps of each environment in a rollout; ``None`` is 128, or as many times 128 as few environments need for
        2048 steps together.
    :param batch_size: Training transitions in a minibatch, a multiple of ``seq_len``; ``None`` is a quarter of the
        rollout, but at least 128 and at most 1024, adapted to what divides.
    :param n_epochs: Passes over a rollout.
    :param gamma: Discount factor.
    :param gae_lambda: λ of generalized advantage estimation.
    :param clip_range: Clipping of the ratio, or a function of the progress remaining.
    :param clip_range_vf: Clipping of the value (the larger of clipped and unclipped loss counts), in units of the return, or
        a function of the progress remaining; ``None`` does not clip.
    :param normalize_advantage: Normalize the advantages of each minibatch: by their standard deviation, or by the average one
        of the last rollouts if that is larger. Where nothing was won or lost, what is left is the noise of the values;
        blown up to the usual size, it would undo what was learned.
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
    :param normalize_value: Let the critic learn in units of the return's standard deviation (PopArt, see
        :class:`ValueHead`), so that it matters as much beside the actor whatever the rewards' scale.
    :param scale_lr_by_advantage: Shorten the steps of an update whose advantages are less than half as large as usual, in
        proportion (``train/lr_scale`` is logged, 1 for full steps). Adam divides by the size of the gradient: rollouts in
        which nothing is won or lost would move the policy as far as any other.
    :param log_barrier_coef: Weight of the log barrier, which keeps every action possible: see
        :func:`~sb3_cyborg.memory_ppo.losses.log_barrier_loss`. For discrete actions, where one that is right for long is
        wrong once; then 0.01 to 0.03. 0, the default, is none.
    :param use_last_action: Let the policy read its last action, too (the same as in ``policy_kwargs``).
    :param amp: Compute features and the encoder's projections in bf16 (autocast); recurrence, memory, state and heads stay in
        fp32. It pays for image observations, and for wide networks on a GPU; ``train/ratio_error`` then is up to 0.05.
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
    _last_state: State

    def __init__(
        self,
        policy: str | type[MemoryActorCriticPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = LEARNING_RATE,
        n_steps: int | None = None,
        batch_size: int | None = None,
        n_epochs: int = 4,
        gamma: float = 0.99,
        gae_lambda: float = 0.9,
        clip_range: float | Schedule = 0.2,
        clip_range_vf: float | Schedule | None = None,
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
            learning_rate=learning_rate,
            n_steps=n_steps,  # type: ignore[arg-type]  # a number from `_setup_model` on
            batch_size=batch_size,
            n_epochs=n_epochs,
            gamma=gamma,
            gae_lambda=gae_lambda,
            clip_range=clip_range,
            clip_range_vf=clip_range_vf,
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
        self.seq_len = seq_len
        self.burn_in = burn_in
        self.memory_loss_coef = memory_loss_coef
        self.log_barrier_coef = log_barrier_coef
        self.normalize_value = normalize_value
        self.scale_lr_by_advantage = scale_lr_by_advantage
        # Rewards may be rare, and what is solved stays so for long: the usual size is remembered. Returns grow with skill.
        self._advantage_moments, self._return_moments = RunningMoments(horizon=128), RunningMoments(horizon=32)
        self.amp = amp
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
        check_whole(0, burn_in=self.burn_in)
        self._check_log_barrier()
        asked: int | None = self.n_steps
        self.n_steps = plan_n_steps(self.n_envs, self.seq_len) if asked is None else asked
        seq_len, self._minibatch_size = plan_minibatches(self.n_steps, self.n_envs, self.seq_len, self.batch_size)
        self.policy = self.policy_class(
            self.observation_space, self.action_space, self.lr_schedule, use_sde=self.use_sde, **self.policy_kwargs
        ).to(self.device)
        self.policy.amp = self.amp
        self.policy.log_barrier = self.log_barrier_coef > 0
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
            seq_len=seq_len,
            burn_in=self.burn_in,
            channels_last=self._keeps_channels_last(),
        )
        self.clip_range = FloatSchedule(self.clip_range)
        if self.clip_range_vf is not None:
            if isinstance(self.clip_range_vf, (float, int)) and self.clip_range_vf <= 0:
                raise ValueError(f"`clip_range_vf` must be positive, or None for no clipping, got {self.clip_range_vf}.")
            self.clip_range_vf = FloatSchedule(self.clip_range_vf)

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
            with th.inference_mode():  # a tenth of the rollout less than `no_grad`
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
            if dones.any():
                rewards = rewards + self._truncation_bootstrap(infos, dones, state)

            rollout_buffer.add(last_obs, action_tensor, rewards, last_starts, values, log_probs, self._last_state)
            self._last_obs = new_obs
            self._last_episode_starts = dones
            self._last_state = state

        with th.no_grad():
            values = self.policy.predict_values(
                obs_as_tensor(new_obs, self.device), state, th.as_tensor(dones, dtype=th.float32, device=self.device)
            )
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

    def _truncation_bootstrap(self, infos: list[dict[str, Any]], dones: np.ndarray, state: State) -> np.ndarray:
        """
        What a time limit cut off: ``gamma * V(terminal observation)``, seen with the state after the last step.

        :param infos: Of the step, (N).
        :param dones: (N,).
        :param state: After the step; it is read, not changed.
        :return: What to add to the rewards, (N,).
        """
        extra = np.zeros(len(dones), dtype=np.float32)
        rows = [
            row
            for row in np.flatnonzero(dones).tolist()
            if infos[row].get("TimeLimit.truncated", False) and infos[row].get("terminal_observation") is not None
        ]
        if not rows:
            return extra
        terminal = [infos[row]["terminal_observation"] for row in rows]
        obs: Any = (
            np.stack(terminal)
            if not isinstance(terminal[0], dict)
            else {key: np.stack([single[key] for single in terminal]) for key in terminal[0]}
        )
        check_finite_observations(obs, f"at the end of an episode, after {self.num_timesteps} steps,", rows)
        with th.no_grad():
            obs_tensor = self.policy.obs_to_tensor(obs)[0]
            starts = th.zeros(len(rows), device=self.device)
            values = self.policy.predict_values(obs_tensor, index_state(state, th.as_tensor(rows, device=self.device)), starts)
        extra[rows] = self.gamma * values.flatten().cpu().numpy()
        return extra

    # --- update -----------------------------------------------------------------------------------------------------

    def train(self) -> None:
        """Update the policy with the rollout in the buffer."""
        self.policy.set_training_mode(True)
        self._advantage_moments.update(self.rollout_buffer.advantages)
        self._update_learning_rate(self.policy.optimizer)
        clip_range = self.clip_range(self._current_progress_remaining)  # type: ignore[operator]  # a schedule by now
        clip_range_vf = None
        if self.clip_range_vf is not None:
            clip_range_vf = self.clip_range_vf(self._current_progress_remaining)  # type: ignore[operator]
        if self.normalize_value:
            self._return_moments.update(self.rollout_buffer.returns)
            self.policy.value_net.rescale(self._return_moments)
        stats: dict[str, list[th.Tensor]] = defaultdict(list)
        parameters = list(self.policy.parameters())
        for epoch in range(self.n_epochs):
            stepped, stop = False, False
            for batch in self.rollout_buffer.sample_sequences(batch_size=self._minibatch_size):
                loss = self._minibatch_loss(batch, clip_range, clip_range_vf, stats)
                if self.target_kl is not None and stats["train/approx_kl"][-1].item() > 1.5 * self.target_kl:
                    if self.verbose >= 1:
                        kl = stats["train/approx_kl"][-1].item()
                        print(f"Early stopping at step {epoch} due to reaching max kl: {kl:.2f}")
                    stop = True
                    break
                self.policy.optimizer.zero_grad()
                loss.backward()
                th.nn.utils.clip_grad_norm_(parameters, self.max_grad_norm)
                self.policy.optimizer.step()
                stepped = True
            self._n_updates += stepped
            if stop:
                break
        self.policy.update_normalization(self.rollout_buffer.observations)
        self._log_update(stats, clip_range, clip_range_vf)

    def _update_learning_rate(self, optimizers: list[th.optim.Optimizer] | th.optim.Optimizer) -> None:
        super()._update_learning_rate(optimizers)
        if not self.scale_lr_by_advantage:
            return
        usual = self._advantage_moments.std
        # Half the usual size counts as usual: advantages become smaller with every skill, and steps need not.
        scale = min(1.0, 2 * self.rollout_buffer.advantages.std(correction=0).item() / usual) if usual > 0 else 1.0
        for group in self.policy.optimizer.param_groups:
            group["lr"] *= scale
        self.logger.record("train/lr_scale", scale)

    def _minibatch_loss(
        self, batch: SequenceBatch, clip_range: float, clip_range_vf: float | None, stats: dict[str, list[th.Tensor]]
    ) -> th.Tensor:
        """:return: The loss of a minibatch; ``stats`` gains what is logged of it, as tensors: nothing waits for them here."""
        values, log_prob, entropy, logs = self.policy.evaluate_sequences(batch)
        steps = values.shape[1]
        old_log_prob, old_values, returns, advantages = (
            batch[key][:, -steps:]  # burn-in stays out of every loss and statistic
            for key in ("old_log_prob", "old_values", "returns", "advantages")
        )
        if self.normalize_advantage:
            advantages = losses.normalize_advantages(advantages, self._advantage_moments.std)
        log_ratio = log_prob - old_log_prob
        ratio = log_ratio.exp()
        parts = {
            "policy_gradient_loss": losses.clipped_policy_loss(ratio, advantages, clip_range),
            "entropy_loss": losses.entropy_loss(entropy, log_prob),
            "value_loss": losses.value_loss(values, old_values, returns, clip_range_vf)
            / self.policy.value_net.scale.square().sum(),
        }
        loss = parts["policy_gradient_loss"] + self.ent_coef * parts["entropy_loss"] + self.vf_coef * parts["value_loss"]
        if AUX_LOSS in logs:
            parts["memory_loss"] = logs[AUX_LOSS]
            loss = loss + self.memory_loss_coef * logs[AUX_LOSS]
        if LOG_BARRIER in logs:
            parts["log_barrier_loss"] = logs[LOG_BARRIER]
            loss = loss + self.log_barrier_coef * logs[LOG_BARRIER]
        with th.no_grad():
            error = (ratio - 1).abs()
            if not stats:  # the first minibatch of the update: nothing has been learned yet, so nothing may differ
                stats["train/ratio_error"].append(error.max())
            stats["train/approx_kl"].append(losses.approximate_kl(log_ratio))
            stats["train/clip_fraction"].append((error > clip_range).float().mean())
            stats["train/loss"] = [loss.detach()]
            for name, part in parts.items():
                stats[f"train/{name}"].append(part.detach())
            for name, value in logs.items():
                if name not in (AUX_LOSS, LOG_BARRIER):
                    stats[name.replace(".", "/", 1)].append(value)
        return loss

    def _log_update(self, stats: dict[str, list[th.Tensor]], clip_range: float, clip_range_vf: float | None) -> None:
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
        return super().learn(total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar)

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_last_state"]

    @classmethod
    def load(
        cls: type[SelfMemoryPPO],
        path: str | pathlib.Path | io.BufferedIOBase,
        env: GymEnv | None = None,
        device: th.device | str = "auto",
        custom_objects: dict[str, Any] | None = None,
        print_system_info: bool = False,
        force_reset: bool = True,
        **kwargs: Any,
    ) -> SelfMemoryPPO:
        """
        Load a model from a file, as SB3 does; the number of environments may be another one.

        :param path: Path to the file, or a file.
        :param env: The environment to run it on; ``None`` for prediction alone.
        :param device: Device to run it on.
        :param custom_objects: Objects that replace saved ones.
        :param print_system_info: Whether to print system info of then and now.
        :param force_reset: Reset the environment before training.
        :param kwargs: Arguments that change the model.
        :return: The model.
        :raises ValueError: for a file that is damaged or holds another kind of model.
        """
        try:
            return super().load(path, env, device, custom_objects, print_system_info, force_reset, **kwargs)
        except CORRUPT_FILE_ERRORS as error:
            raise ValueError(f"{path} is not a whole file of a MemoryPPO model: {error}") from error
