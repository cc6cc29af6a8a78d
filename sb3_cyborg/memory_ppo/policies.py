"""Actor-critic policies with an encoder and an external memory."""

import copy
import functools
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch as th
from gymnasium import spaces
from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
from stable_baselines3.common.distributions import CategoricalDistribution, Distribution, MultiCategoricalDistribution
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, CombinedExtractor, FlattenExtractor, NatureCNN
from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.common.utils import ConstantSchedule, get_device
from torch import nn

from sb3_cyborg.checks import check_finite_observations, check_positive, nearest_divisors, warn_caller
from sb3_cyborg.encoders.encoder_v7 import EncoderV7
from sb3_cyborg.kernels import status as kernel_status
from sb3_cyborg.memories.memory_v7 import MEMORIES, MemoryV7
from sb3_cyborg.memory_ppo.action_masks import check_action_masks, mask_distribution, mask_logits
from sb3_cyborg.memory_ppo.actions import (
    DIVERGED,
    action_encoding_dim,
    distribution_checks,
    evaluate_categorical,
    sample_categorical,
    sample_multi_categorical,
)
from sb3_cyborg.memory_ppo.arguments import check_keywords
from sb3_cyborg.memory_ppo.env_checks import check_predicted
from sb3_cyborg.memory_ppo.episode_time import TIME_WAVES
from sb3_cyborg.memory_ppo.inputs import Inputs
from sb3_cyborg.memory_ppo.model_file import read_policy, save_policy
from sb3_cyborg.memory_ppo.normalization import ValueHead
from sb3_cyborg.memory_ppo.recorded_step import Acted, RecordedStep
from sb3_cyborg.memory_ppo.rollout_buffer_v7 import Observations, Sequences
from sb3_cyborg.memory_ppo.sizes import COPIES, check_memory, check_network_memory, module_bytes
from sb3_cyborg.ops.linear import FusedSequential
from sb3_cyborg.sequence_model import Logs, Stack, State, index_state, keep_mask, may_branch

NumpyState = dict[str, np.ndarray]

SelfPolicy = TypeVar("SelfPolicy", bound="MemoryActorCriticPolicy")

LOST_WITH_MASKS = (
    " sb3-contrib's maskable `evaluate_policy` and `MaskableEvalCallback` drop the state: use those of "
    "`sb3_cyborg.maskable`, which have the same arguments."
)
"""Added to the warning of a lost memory if the call has action masks."""


class Evaluation(NamedTuple):
    """Evaluation of the actions of a batch of sequences with the current weights."""

    values: th.Tensor
    """Value estimates, (B, T)."""
    log_prob: th.Tensor
    """Log-probabilities of the actions, (B, T)."""
    entropy: th.Tensor | None
    """Entropies, (B, T); ``None`` if they have no closed form."""
    logs: Logs
    """Diagnostics, and the memory's auxiliary loss, see :data:`~sb3_cyborg.sequence_model.Logs`."""
    distribution: Callable[[], Distribution]
    """Creates the distribution of the actions, with B * T rows; only some losses need it."""
    action_masks: th.Tensor | None = None
    """Legal actions, bool, (B * T, M), for the rows of the distribution; ``None`` if all are."""


class MemoryActorCriticPolicy(RecurrentActorCriticPolicy):
    """
    :class:`Inputs` (features, last action, time) → :class:`EncoderV7` → :class:`MemoryV7` → actor and critic.

    Actor and critic share the core, and both train it. The memory and the heads also read the input directly:
    ``[latent, input]`` and ``[latent, read, input]``, see :class:`Stack`.

    :param observation_space: Observation space.
    :param action_space: Action space.
    :param lr_schedule: Learning rate schedule (could be constant).
    :param net_arch: Hidden layers of the actor and critic heads, as in SB3.
    :param activation_fn: Activation function of the heads.
    :param ortho_init: Whether to initialize features extractor and heads orthogonally.
    :param use_sde: Whether to use generalized State-Dependent Exploration.
    :param log_std_init: Initial value for the log standard deviation.
    :param full_std: With gSDE, use (n_features x n_actions) parameters for the std instead of (n_features,).
    :param use_expln: Use ``expln()`` instead of ``exp()`` for a positive standard deviation.
    :param squash_output: With gSDE, squash the output with a tanh.
    :param features_extractor_class: Features extractor to use.
    :param features_extractor_kwargs: Its keyword arguments.
    :param share_features_extractor: Must be true: actor and critic share everything up to the heads. ``False`` warns and has
        no effect.
    :param normalize_images: Divide images by 255.
    :param optimizer_class: The optimizer, ``th.optim.Adam`` by default.
    :param optimizer_kwargs: Its keyword arguments, without the learning rate.
    :param encoder: Mode of the encoder, see :class:`EncoderV7`.
    :param memory: Kind of the memory, see :class:`MemoryV7`.
    :param hidden_dim: Features of the encoder's core, >= 1.
    :param latent_dim: Features of the latent, >= 1; ``None`` is ``hidden_dim``.
    :param num_layers: Layers of the encoder's core, >= 1.
    :param memory_dim: Features of the read, >= 1, if the kind has this option; ``None`` is the number of latent features.
    :param encoder_kwargs: Options of the encoder's mode.
    :param memory_kwargs: Options of the memory's kind, e.g. ``{"num_slots": 64}``.
    :param use_last_action: Append the last action to the input; zeros at the start of an episode. It is part of the state.
    :param use_time: Append a sinusoidal encoding of the steps since the start of the episode to the input, see
        :func:`~sb3_cyborg.memory_ppo.episode_time.encode_time`. The count is part of the state. It is for tasks where the
        right action depends on the time.
    :param normalize_observations: Normalize observations by running moments, except images (Boxes of three dimensions), see
        :class:`ObservationNormalizer`; it replaces ``VecNormalize``'s normalization of observations.
    :param amp: Compute features and the encoder's projections in bf16 (autocast); recurrence, memory, state and heads stay in
        fp32.
    :param lstm_hidden_size: RecurrentPPO's name for ``hidden_dim``, which it overrides if given.
    :param n_lstm_layers: RecurrentPPO's name for ``num_layers``, which it overrides if given.
    :param shared_lstm: Option of RecurrentPPO without effect: actor and critic always share the core. ``False`` warns.
    :param enable_critic_lstm: Option of RecurrentPPO without effect: the critic uses the shared core. ``True`` warns, and so
        does ``False`` without ``shared_lstm=True``.
    :param lstm_kwargs: Option of RecurrentPPO without effect; any content warns.
    :raises ValueError: for unknown names, sizes below 1 and sizes that no memory holds, a features extractor that cannot be
        created, and layers that compute something else in training than in acting, see :func:`check_same_in_training`.
    """

    inputs: Inputs
    core: Stack
    value_net: ValueHead
    _warned_of_lost_memory = False
    _recorded_step: RecordedStep | None = None

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        lr_schedule: Schedule,
        net_arch: list[int] | dict[str, list[int]] | None = None,
        activation_fn: type[nn.Module] = nn.Tanh,
        ortho_init: bool = True,
        use_sde: bool = False,
        log_std_init: float = 0.0,
        full_std: bool = True,
        use_expln: bool = False,
        squash_output: bool = False,
        features_extractor_class: type[BaseFeaturesExtractor] = FlattenExtractor,
        features_extractor_kwargs: dict[str, Any] | None = None,
        share_features_extractor: bool = True,
        normalize_images: bool = True,
        optimizer_class: type[th.optim.Optimizer] = th.optim.Adam,
        optimizer_kwargs: dict[str, Any] | None = None,
        encoder: str = "gru",
        memory: str = "ring",
        hidden_dim: int = 128,
        latent_dim: int | None = None,
        num_layers: int = 1,
        memory_dim: int | None = None,
        encoder_kwargs: dict[str, Any] | None = None,
        memory_kwargs: dict[str, Any] | None = None,
        use_last_action: bool = False,
        use_time: bool = False,
        normalize_observations: bool = True,
        amp: bool = False,
        lstm_hidden_size: int | None = None,
        n_lstm_layers: int | None = None,
        shared_lstm: bool | None = None,
        enable_critic_lstm: bool | None = None,
        lstm_kwargs: dict[str, Any] | None = None,
    ) -> None:
        _warn_of_lstm_options(shared_lstm, enable_critic_lstm, lstm_kwargs, share_features_extractor)
        self._core_kwargs: dict[str, Any] = {
            "encoder": encoder,
            "memory": memory,
            "hidden_dim": hidden_dim if lstm_hidden_size is None else lstm_hidden_size,
            "latent_dim": latent_dim,
            "num_layers": num_layers if n_lstm_layers is None else n_lstm_layers,
            "memory_dim": memory_dim,
            "encoder_kwargs": encoder_kwargs or {},
            "memory_kwargs": memory_kwargs or {},
            "use_last_action": use_last_action,
            "use_time": use_time,
            "normalize_observations": normalize_observations,
            "amp": amp,
        }
        if optimizer_class in (th.optim.Adam, th.optim.AdamW):
            optimizer_kwargs = _fused(optimizer_kwargs or {})
        # Skips the constructor of RecurrentActorCriticPolicy, which would build two LSTMs.
        ActorCriticPolicy.__init__(
            self,
            observation_space,
            action_space,
            lr_schedule,
            net_arch,
            activation_fn,
            ortho_init,
            use_sde,
            log_std_init,
            full_std,
            use_expln,
            squash_output,
            features_extractor_class,
            features_extractor_kwargs,
            True,
            normalize_images,
            optimizer_class,
            optimizer_kwargs,
        )

    def _build_mlp_extractor(self) -> None:
        """Build inputs, core and heads; SB3 calls this method before it creates the optimizer."""
        settings = self._core_kwargs
        self.use_last_action, self.use_time, self.amp = (settings[name] for name in ("use_last_action", "use_time", "amp"))
        actions = action_encoding_dim(self.action_space)
        input_dim = self.features_dim + actions * self.use_last_action + 2 * TIME_WAVES * self.use_time
        latent_dim = settings["hidden_dim"] if settings["latent_dim"] is None else settings["latent_dim"]
        memory_dim = latent_dim if settings["memory_dim"] is None else settings["memory_dim"]
        memory_kwargs = _fitting_options(settings["memory"], settings["memory_kwargs"], memory_dim)
        check_network_memory(settings | {"memory_kwargs": memory_kwargs}, self.net_arch, input_dim, actions)
        self.inputs = Inputs(
            self.observation_space,
            self.action_space,
            self.features_extractor,
            use_last_action=self.use_last_action,
            use_time=self.use_time,
            normalize_observations=settings["normalize_observations"],
            normalize_images=self.normalize_images,
            squash_output=self.squash_output,
        )
        encoder = EncoderV7(
            input_dim,
            settings["hidden_dim"],
            settings["latent_dim"],
            settings["encoder"],
            settings["num_layers"],
            **settings["encoder_kwargs"],
        )
        self.core = Stack(encoder, MemoryV7(encoder.output_dim + input_dim, settings["memory"], **memory_kwargs))
        self.lstm_output_dim = self.core.output_dim  # input size of the heads in RecurrentActorCriticPolicy
        super()._build_mlp_extractor()
        heads = self.mlp_extractor
        heads.policy_net, heads.value_net = FusedSequential(*heads.policy_net), FusedSequential(*heads.value_net)

    def _build(self, lr_schedule: Schedule) -> None:
        super()._build(lr_schedule)
        self.value_net = ValueHead(self.value_net)  # same parameters, which the optimizer already holds
        self.set_training_mode(True)
        check_same_in_training(self)

    def make_features_extractor(self) -> BaseFeaturesExtractor:
        """
        Create the features extractor.

        :return: The features extractor.
        :raises ValueError: for keyword arguments that its class does not take, and if it cannot be created.
        """
        extractor_class, kwargs = self.features_extractor_class, self.features_extractor_kwargs
        check_keywords("features_extractor_kwargs", extractor_class, kwargs)

        def create(space: spaces.Space[Any]) -> BaseFeaturesExtractor:
            try:
                return extractor_class(space, **kwargs)
            except Exception as error:  # code of the user, and SB3's assertions
                raise ValueError(
                    f"`features_extractor_class` {extractor_class.__name__} cannot be created for {space} with "
                    f"`features_extractor_kwargs`={kwargs}: {error}"
                ) from error

        if extractor_class.__module__.startswith("stable_baselines3."):  # others may not expect to be created twice
            space = copy.deepcopy(self.observation_space)  # NatureCNN draws from it
            size = COPIES * module_bytes(lambda: create(space))
            check_memory(f"{extractor_class.__name__} with `features_extractor_kwargs`={kwargs}", size)
        return create(self.observation_space)

    # --- observations -----------------------------------------------------------------------------------------------

    def extract_features(self, obs: Any, features_extractor: BaseFeaturesExtractor | None = None) -> th.Tensor:
        """
        Extract features from preprocessed and normalized observations.

        :param obs: Observations, (B, ...), or a dictionary of them.
        :param features_extractor: The features extractor; ``None`` is the policy's own.
        :return: Features, (B, F).
        """
        if features_extractor is None:
            return self.inputs.features(obs)
        features: th.Tensor = features_extractor(self.inputs.preprocess(obs))
        return features

    # --- states -----------------------------------------------------------------------------------------------------

    def get_initial_state(self, batch_size: int) -> State:
        """
        State at the start of an episode.

        :param batch_size: Number of rows B, >= 1.
        :return: The state on the policy's device, every leaf ``(B, ...)``.
        """
        return self.core.get_initial_state(batch_size, self.device) | self.inputs.get_initial_state(batch_size, self.device)

    def _autocast(self) -> AbstractContextManager[Any]:
        """:return: The autocast context of features and core: bf16 with ``amp``; recurrence and memory disable it."""
        return th.autocast(self.device.type, th.bfloat16) if self.amp else nullcontext()

    def _core_step(self, obs: Any, state: State, episode_starts: th.Tensor) -> tuple[th.Tensor, State]:
        """:return: ``[latent, read, input]`` (B, D) for observations (B, ...), and the state after the step."""
        if not isinstance(state, dict):
            raise ValueError(
                "`state` must be a dictionary of tensors as `policy.get_initial_state(batch_size)` returns, got a "
                f"{type(state).__name__}: MemoryPPO does not use a pair of LSTM states."
            )
        no_resets = may_branch(episode_starts.device) and not episode_starts.any()
        mask = None if no_resets else keep_mask(episode_starts)
        with self._autocast():
            return self._features_step(self.extract_features(obs), state, mask)

    def _features_step(self, features: th.Tensor, state: State, mask: th.Tensor | None) -> tuple[th.Tensor, State]:
        """:return: ``[latent, read, input]`` (B, D) for features (B, F), and the state after the step."""
        x, input_state = self.inputs.read(features, state, mask)
        latent, core_state, _ = self.core.forward_step(x, state, mask)
        return latent, core_state | input_state

    def _core_sequence(
        self, obs: Observations, actions: th.Tensor, state: State, masks: th.Tensor
    ) -> tuple[th.Tensor, State, Logs]:
        """:return: ``[latent, read, input]`` (B, T, D) for observations (B, T, ...), the state after them, diagnostics."""
        flat = {key: _flatten(value) for key, value in obs.items()} if isinstance(obs, dict) else _flatten(obs)
        # The models select rows at a reset, but in the backward 0 times a NaN of the earlier state would be NaN.
        core_state = {name: leaf for name, leaf in state.items() if name not in self.inputs.leaves}
        core_state = self.core.reset_states(core_state, masks[:, 0])
        with self._autocast():
            features = self.extract_features(flat).unflatten(0, masks.shape)
            x, input_state = self.inputs.read_sequence(features, actions, state, masks)
            latent, core_state, logs = self.core.forward_sequence(x, core_state, masks)
        return latent, core_state | input_state, logs

    # --- acting -----------------------------------------------------------------------------------------------------

    def forward(  # type: ignore[override]  # a State where RecurrentPPO has a pair of LSTM states
        self,
        obs: Any,
        state: State,
        episode_starts: th.Tensor,
        deterministic: bool = False,
        action_masks: th.Tensor | None = None,
    ) -> tuple[th.Tensor, th.Tensor, th.Tensor, State]:
        """
        Choose actions for one step.

        :param obs: Observations, (B, ...), or a dictionary of them.
        :param state: State before the step, every leaf (B, ...).
        :param episode_starts: Non-zero where an episode starts with ``obs``, (B,).
        :param deterministic: Return the mode instead of a sample.
        :param action_masks: Legal actions, bool, (B, M), see :mod:`~sb3_cyborg.memory_ppo.action_masks`; ``None`` if all are.
        :return: Actions (B, ...), values (B, 1), log-probabilities (B,), state after the step.
        :raises ValueError: for a state that is not a dictionary, and for logits that are NaN.
        """
        replayed = self._replay(obs, state, episode_starts, deterministic, action_masks)
        if replayed is not None:
            return self._shape_actions(replayed.actions), replayed.values, replayed.log_prob, replayed.state
        latent, state = self._core_step(obs, state, episode_starts)
        latent_pi, latent_vf = self.mlp_extractor(latent)
        actions, log_prob = self._choose(latent_pi, deterministic, action_masks)
        state = self.inputs.remember(state, actions.unsqueeze(-1))
        return self._shape_actions(actions), self.value_net(latent_vf), log_prob, state

    def _replay(
        self, obs: Any, state: State, episode_starts: th.Tensor, deterministic: bool, action_masks: th.Tensor | None
    ) -> Acted | None:
        """
        :return: The step as a replay of its recording; ``None`` if it is not recorded.
        :raises ValueError: for logits that are NaN.
        """
        if self._recorded_step is None or not self._recorded_step.is_current():
            self._recorded_step = RecordedStep(self)
        if not self._recorded_step.applies(state, episode_starts):
            return None
        acted = self._recorded_step(obs, state, episode_starts, deterministic, action_masks)
        if acted is not None and acted.log_prob.sum().isnan():
            raise ValueError(DIVERGED)
        return acted

    def recording_report(self) -> str:
        """
        :return: Once: a line for a log if steps of acting, or parts of them, are not recorded
            (:mod:`~sb3_cyborg.memory_ppo.recorded_step`). Empty otherwise, and where there are no compiled kernels.
        """
        step = self._recorded_step
        return "" if step is None or kernel_status().isa is None else step.tell_once()

    def _choose(
        self, latent_pi: th.Tensor, deterministic: bool, action_masks: th.Tensor | None
    ) -> tuple[th.Tensor, th.Tensor]:
        """
        :param latent_pi: Features of the actor, (B, D).
        :param deterministic: Choose the mode instead of a sample.
        :param action_masks: Legal actions, bool, (B, M); ``None`` if all are.
        :return: Actions as sampled, (B, ...), and their log-probabilities (B,).
        """
        if self._uses_default_categorical():
            return sample_categorical(mask_logits(self.action_net(latent_pi), action_masks), deterministic)
        if type(self.action_dist) is MultiCategoricalDistribution and not self._overrides_distribution():
            logits = mask_logits(self.action_net(latent_pi), action_masks)
            return sample_multi_categorical(logits, self.action_dist.action_dims, deterministic)
        with distribution_checks(latent_pi.device):
            distribution = self._make_distribution(latent_pi, action_masks)
            actions = distribution.get_actions(deterministic=deterministic)
            return actions, distribution.log_prob(actions)

    def _uses_default_categorical(self) -> bool:
        """:return: Whether the action distribution is SB3's categorical one, and no subclass has overridden its creation."""
        return type(self.action_dist) is CategoricalDistribution and not self._overrides_distribution()

    def _overrides_distribution(self) -> bool:
        return type(self)._get_action_dist_from_latent is not ActorCriticPolicy._get_action_dist_from_latent

    def _make_distribution(self, latent_pi: th.Tensor, action_masks: th.Tensor | None = None) -> Distribution:
        """:return: The distribution of the legal actions."""
        with distribution_checks(latent_pi.device):
            distribution = self._get_action_dist_from_latent(latent_pi)
            return distribution if action_masks is None else mask_distribution(distribution, action_masks)

    def _shape_actions(self, actions: th.Tensor) -> th.Tensor:
        shape = self.action_space.shape
        assert shape is not None
        return actions.reshape(-1, *shape)

    def get_distribution(  # type: ignore[override]  # see forward
        self, obs: Any, state: State, episode_starts: th.Tensor, action_masks: th.Tensor | None = None
    ) -> tuple[Distribution, State]:
        """
        Compute the action distribution of one step.

        :param obs: Observations, (B, ...), or a dictionary of them.
        :param state: State before the step, every leaf (B, ...).
        :param episode_starts: Non-zero where an episode starts with ``obs``, (B,).
        :param action_masks: Legal actions, bool, (B, M); ``None`` if all are.
        :return: The distribution of the actions, and the state after the step without its action.
        :raises ValueError: for a state that is not a dictionary.
        """
        latent, state = self._core_step(obs, state, episode_starts)
        return self._make_distribution(self.mlp_extractor.forward_actor(latent), action_masks), state

    def predict_values(  # type: ignore[override]  # see forward
        self, obs: Any, state: State, episode_starts: th.Tensor
    ) -> th.Tensor:
        """
        Estimate values without changing the state.

        :param obs: Observations, (B, ...), or a dictionary of them.
        :param state: State before the step, every leaf (B, ...).
        :param episode_starts: Non-zero where an episode starts with ``obs``, (B,).
        :return: Values in units of the return, (B, 1).
        :raises ValueError: for a state that is not a dictionary.
        """
        latent, _ = self._core_step(obs, state, episode_starts)
        values: th.Tensor = self.value_net(self.mlp_extractor.forward_critic(latent))
        return values

    def _predict(  # type: ignore[override]  # see forward
        self,
        observation: Any,
        state: State,
        episode_starts: th.Tensor,
        deterministic: bool = False,
        action_masks: th.Tensor | None = None,
    ) -> tuple[th.Tensor, State]:
        replayed = self._replay(observation, state, episode_starts, deterministic, action_masks)
        if replayed is not None:
            return replayed.actions, replayed.state
        distribution, state = self.get_distribution(observation, state, episode_starts, action_masks)
        actions = distribution.get_actions(deterministic=deterministic)
        return actions, self.inputs.remember(state, actions.unsqueeze(-1))

    def predict(  # type: ignore[override]  # see forward
        self,
        observation: np.ndarray | dict[str, np.ndarray] | tuple[Any, ...],
        state: NumpyState | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
        action_masks: np.ndarray | None = None,
    ) -> tuple[np.ndarray, NumpyState]:
        """
        Choose actions, as in SB3; the returned state is the ``state`` of the next call.

        :param observation: One observation, or a batch of them (B, ...).
        :param state: State that the previous call returned; ``None`` is the initial state.
        :param episode_start: Whether an episode starts with the observation, (B,); ``None`` means that none does.
        :param deterministic: Return the mode instead of a sample.
        :param action_masks: Legal actions, true or 1, (B, M) or for one observation (M,), see
            :mod:`~sb3_cyborg.memory_ppo.action_masks`; ``None`` if all are.
        :return: Actions, and the state after the step: a dictionary of arrays, every leaf ``(B, ...)``.
        :raises ValueError: for observations that are not finite, for a state or ``episode_start`` of another batch size, and
            for masks of another size or without a legal action.
        """
        if isinstance(observation, tuple):
            raise ValueError(
                "You have passed a tuple to predict() instead of an array or a dict: `obs, info = env.reset()` is gymnasium's "
                "API, `obs = vec_env.reset()` SB3's."
            )
        self.set_training_mode(False)
        check_predicted(observation, self.observation_space)
        obs, vectorized = self.obs_to_tensor(observation)
        check_finite_observations(obs, "in `predict`")
        batch_size = len(next(iter(obs.values())) if isinstance(obs, dict) else obs)
        starts = th.zeros(batch_size, device=self.device)
        if episode_start is not None:
            starts = th.as_tensor(np.asarray(episode_start), dtype=th.float32, device=self.device).reshape(-1)
            if len(starts) != batch_size:
                raise ValueError(f"`episode_start` has {len(starts)} rows, but there are {batch_size} observations.")
        if state is None and not self._warned_of_lost_memory and not bool((starts != 0).all()) and episode_start is not None:
            self._warned_of_lost_memory = True
            warn_caller(
                "`predict` got `state=None` although `episode_start` is false for some rows: each such call resets the "
                "memory. Pass the state that the previous call returned: `action, state = model.predict(obs, state, ...)`."
                + (LOST_WITH_MASKS if action_masks is not None else "")
            )
        masks = None
        if action_masks is not None:
            # One mask of one observation has no batch dimension.
            rows = np.reshape(action_masks, (1, -1)) if batch_size == 1 else action_masks
            masks = th.as_tensor(check_action_masks(rows, batch_size, self.action_space, "in `predict`"), device=self.device)
        with th.no_grad():
            first = self.get_initial_state(batch_size)
            tensors = first if state is None else self._check_state(state, first)
            taken, new_state = self._predict(obs, tensors, starts, deterministic, masks)
        actions = self._shape_actions(taken).cpu().numpy()
        if isinstance(self.action_space, spaces.Box):
            if self.squash_output:
                actions = self.unscale_action(actions)
            else:
                actions = np.clip(actions, self.action_space.low, self.action_space.high)
        if not vectorized:
            actions = actions.squeeze(axis=0)
        return actions, {name: leaf.cpu().numpy() for name, leaf in new_state.items()}

    def _check_state(self, state: NumpyState, like: State) -> State:
        """:return: The state as tensors, after a check against ``like``, the initial state of the same batch size."""
        if not isinstance(state, dict) or state.keys() != like.keys():
            got = sorted(state) if isinstance(state, dict) else type(state).__name__
            raise ValueError(
                f"`state` must be the one that the last `predict` of this policy returned, a dict with {sorted(like)}, "
                f"got {got}; pass None for the initial state."
            )
        for name, leaf in like.items():
            if np.shape(state[name]) != tuple(leaf.shape):
                raise ValueError(
                    f"`state[{name!r}]` has shape {np.shape(state[name])}, but for {len(leaf)} observations it must be "
                    f"{tuple(leaf.shape)}; pass None for the initial state."
                )
        return {name: th.as_tensor(value, device=self.device, dtype=like[name].dtype) for name, value in state.items()}

    # --- training ---------------------------------------------------------------------------------------------------

    def burn_in(self, batch: Sequences) -> State:
        """
        Replay the burn-in steps without gradient.

        Rows with a shorter burn-in are skipped until theirs begins, so padding never enters a computation.

        :param batch: Sequences with their burn-in.
        :return: The state before the first training step, detached.
        """
        state = batch["state"]
        ends = sorted(set(batch["prefix_lens"]), reverse=True)
        if not ends or ends[0] == 0:
            return state
        total, lengths = batch["burn_in"], batch["prefix_lens"]
        training = self.training
        self.set_training_mode(False)  # as in acting: running statistics of modules are not updated
        with th.no_grad():
            for longest, shorter in zip(ends, [*ends[1:], 0], strict=True):
                if longest == shorter:
                    continue
                part = slice(total - longest, total - shorter)
                rows = th.tensor([row for row, length in enumerate(lengths) if length >= longest], device=self.device)
                obs, actions, masks = _steps(batch, part)
                obs = {key: value[rows] for key, value in obs.items()} if isinstance(obs, dict) else obs[rows]
                _, replayed, _ = self._core_sequence(obs, actions[rows], index_state(state, rows), masks[rows])
                state = {name: leaf.index_copy(0, rows, replayed[name]) for name, leaf in state.items()}
        self.set_training_mode(training)
        return state

    def evaluate_sequences(self, batch: Sequences) -> Evaluation:
        """
        Replay the burn-in, then evaluate the actions of the training steps with gradient.

        :param batch: B sequences with P burn-in steps and L training steps.
        :return: The evaluation of the training steps, (B, L).
        """
        state = self.burn_in(batch)
        training = slice(batch["burn_in"], None)
        obs, actions, masks = _steps(batch, training)
        action_masks = batch["action_masks"][:, training] if "action_masks" in batch else None
        return self.evaluate_actions(obs, actions, state, masks, action_masks)

    def evaluate_actions(  # type: ignore[override]  # see forward
        self,
        obs: Observations,
        actions: th.Tensor,
        state: State,
        masks: th.Tensor,
        action_masks: th.Tensor | None = None,
    ) -> Evaluation:
        """
        Evaluate the actions of sequences.

        :param obs: Observations, (B, T, ...), or a dictionary of them.
        :param actions: Actions as sampled, (B, T, A).
        :param state: State before the first step, every leaf (B, ...).
        :param masks: Keep-masks, bool, (B, T).
        :param action_masks: Legal actions, bool, (B, T, M), those of acting; ``None`` if all are.
        :return: The evaluation, (B, T).
        """
        latent, _, logs = self._core_sequence(obs, actions, state, masks)
        latent_pi, latent_vf = self.mlp_extractor(latent.flatten(0, 1))
        flat, shape = actions.flatten(0, 1), masks.shape
        legal = None if action_masks is None else action_masks.flatten(0, 1)
        distribution = functools.cache(functools.partial(self._make_distribution, latent_pi, legal))
        entropy: th.Tensor | None
        if self._uses_default_categorical():
            log_prob, entropy = evaluate_categorical(mask_logits(self.action_net(latent_pi), legal), flat)
        else:
            flat = flat.squeeze(-1) if isinstance(self.action_space, spaces.Discrete) else flat
            with distribution_checks(latent_pi.device):
                log_prob, entropy = distribution().log_prob(flat), distribution().entropy()
        values = self.value_net(latent_vf).view(shape)
        entropy = None if entropy is None else entropy.view(shape)
        return Evaluation(values, log_prob.view(shape), entropy, logs, distribution, legal)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        # SB3's dummy of a schedule is a function, which has no plain form.
        return super()._get_constructor_parameters() | self._core_kwargs | {"lr_schedule": ConstantSchedule(0.0)}

    def save(self, path: str) -> None:
        """
        Save the policy alone, without pickles, atomically.

        :param path: The file.
        """
        save_policy(path, self.state_dict(), self._get_constructor_parameters())

    @classmethod
    def load(cls: type[SelfPolicy], path: str, device: th.device | str = "auto", *, trust: bool = False) -> SelfPolicy:
        """
        Load a policy that was saved alone. No code of the file is run.

        :param path: The file.
        :param device: Device to load it on.
        :param trust: Also load pickled objects and import the modules of the file's classes, which can run any code. Files of
            earlier versions need it.
        :return: The policy.
        :raises ValueError: for a file that is damaged, and for one that needs ``trust``.
        """
        device = get_device(device)
        parameters, weights = read_policy(path, device, trust)
        policy = cls(**parameters)
        policy.load_state_dict(weights)
        return policy.to(device)


def check_same_in_training(module: nn.Module) -> None:
    """
    Require layers that compute the same in training mode as in evaluation mode.

    Acting uses evaluation mode and updates use training mode, so other layers would make the ratio differ from 1 before the
    first step. A layer that stays in evaluation mode when the module is in training mode is accepted.

    :param module: A module in training mode.
    :raises ValueError: for dropout with p > 0, for batch and instance normalization that use statistics of the minibatch, and
        for ``RReLU``, with the name of the layer and what would work.
    """
    for name, layer in module.named_modules():
        p = layer.p if isinstance(layer, nn.modules.dropout._DropoutNd) else getattr(layer, "dropout", 0)
        differs = layer.training and isinstance(p, (int, float)) and p > 0
        if differs:
            raise ValueError(f"Dropout ({name}, p={p}) would make acting and training disagree; use p=0.")
        running = getattr(layer, "track_running_stats", False)
        batch_norm = isinstance(layer, nn.modules.batchnorm._BatchNorm) and (layer.training or not running)
        if batch_norm or (isinstance(layer, nn.modules.instancenorm._InstanceNorm) and running and layer.training):
            raise ValueError(
                f"{type(layer).__name__} ({name}) normalizes by the statistics of a minibatch, which would make acting and "
                "training disagree; use LayerNorm, or keep it in evaluation mode with its running statistics."
            )
        if isinstance(layer, nn.RReLU) and layer.training and layer.lower != layer.upper:
            raise ValueError(f"RReLU ({name}) is random in training, unlike in acting; use LeakyReLU.")


def _steps(batch: Sequences, part: slice) -> tuple[Observations, th.Tensor, th.Tensor]:
    """:return: Observations, actions and masks of the steps ``part`` of a batch."""
    obs = batch["obs"]
    cut = {key: value[:, part] for key, value in obs.items()} if isinstance(obs, dict) else obs[:, part]
    return cut, batch["actions"][:, part], batch["masks"][:, part]


def _flatten(steps: th.Tensor) -> th.Tensor:
    """:return: (B, T, ...) as (B * T, ...); if it has to copy, a channels-last memory layout of images is preserved."""
    dense = steps.stride(0) == steps.shape[1] * steps.stride(1)
    return (steps if dense else steps.clone()).flatten(0, 1)


def _fitting_options(kind: str, given: dict[str, Any], memory_dim: int) -> dict[str, Any]:
    """:return: Options of a memory: the given ones, default ``memory_dim``, and default heads that divide it."""
    known = MEMORIES.options(kind)
    options = dict(given)
    if "memory_dim" in known:
        options.setdefault("memory_dim", memory_dim)
        check_positive(memory_dim=options["memory_dim"])
    if {"memory_dim", "num_heads"} <= known.keys() and "num_heads" not in options:
        wanted = known["num_heads"].default
        options["num_heads"] = nearest_divisors(options["memory_dim"], wanted)[0]
    return options


def _fused(optimizer_kwargs: dict[str, Any]) -> dict[str, Any]:
    """:return: Options of Adam: the given ones and ``fused=True``, unless they choose an implementation."""
    implementations = {"fused", "foreach", "capturable", "differentiable"}
    return optimizer_kwargs if implementations & optimizer_kwargs.keys() else {**optimizer_kwargs, "fused": True}


def _warn_of_lstm_options(
    shared_lstm: bool | None, enable_critic_lstm: bool | None, lstm_kwargs: dict[str, Any] | None, share_features: bool
) -> None:
    """Warn of options of RecurrentPPO that have no effect: actor and critic always share one core."""
    ignored = {
        "shared_lstm=False": shared_lstm is False,
        "enable_critic_lstm=True": enable_critic_lstm is True,
        "enable_critic_lstm=False": enable_critic_lstm is False and not shared_lstm,  # a critic without memory
        f"lstm_kwargs={lstm_kwargs}": bool(lstm_kwargs),
        "share_features_extractor=False": not share_features,
    }
    if names := [name for name, given in ignored.items() if given]:
        warn_caller(
            f"{', '.join(names)}: no effect here. Actor and critic share one features extractor and one core, and both train "
            "them; the options of the core are `encoder_kwargs` and `memory_kwargs`."
        )


class MemoryActorCriticCnnPolicy(MemoryActorCriticPolicy):
    """:class:`MemoryActorCriticPolicy` for images, with :class:`NatureCNN` as features extractor."""

    def __init__(
        self, observation_space: spaces.Space[Any], action_space: spaces.Space[Any], lr_schedule: Schedule, **kwargs: Any
    ) -> None:
        super().__init__(observation_space, action_space, lr_schedule, **{"features_extractor_class": NatureCNN, **kwargs})


class MemoryMultiInputActorCriticPolicy(MemoryActorCriticPolicy):
    """:class:`MemoryActorCriticPolicy` for Dict observations, with :class:`CombinedExtractor` as features extractor."""

    def __init__(
        self, observation_space: spaces.Space[Any], action_space: spaces.Space[Any], lr_schedule: Schedule, **kwargs: Any
    ) -> None:
        super().__init__(
            observation_space, action_space, lr_schedule, **{"features_extractor_class": CombinedExtractor, **kwargs}
        )


def policy_options(policy_class: type[BasePolicy]) -> set[str]:
    """
    :param policy_class: A policy class.
    :return: Names that ``policy_kwargs`` may contain: parameters of the class, and those of its bases that ``**kwargs``
        passes on.
    """
    names: set[str] = set()
    for base in policy_class.__mro__:
        if "__init__" not in vars(base):
            continue
        parameters = inspect.signature(vars(base)["__init__"]).parameters.values()
        names |= {parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD}
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            break
    return names - {"self", "args", "observation_space", "action_space", "lr_schedule", "use_sde"}
