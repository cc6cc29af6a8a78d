"""Actor-critic policies with an encoder and a memory between the features and the heads."""

import inspect
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
from stable_baselines3.common.distributions import CategoricalDistribution, Distribution
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.preprocessing import get_flattened_obs_dim, preprocess_obs
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, CombinedExtractor, FlattenExtractor, NatureCNN
from stable_baselines3.common.type_aliases import Schedule
from torch import nn

from sb3_cyborg.checks import check_finite_observations, check_positive, nearest_divisors
from sb3_cyborg.encoders.encoder_v7 import EncoderV7
from sb3_cyborg.memories.memory_v7 import MEMORIES, MemoryV7, memory_options
from sb3_cyborg.memory_ppo import losses
from sb3_cyborg.memory_ppo.actions import action_encoding_dim, encode_actions, evaluate_categorical, sample_categorical
from sb3_cyborg.memory_ppo.episode_time import TIME_WAVES, encode_time
from sb3_cyborg.memory_ppo.normalization import ObservationNormalizer, ValueHead
from sb3_cyborg.memory_ppo.rollout_buffer_v7 import Observations, SequenceBatch
from sb3_cyborg.ops.linear import FusedSequential
from sb3_cyborg.ops.window_attention import steps_since_start
from sb3_cyborg.sequence_model import Logs, Stack, State, index_state, keep_mask, shift_steps

LAST_ACTION, TIME = OWN_LEAVES = "last_action", "time"
"""Keys of the last action and of the steps so far in the state of a policy that reads them; all others are the core's."""

LOG_BARRIER = "log_barrier"
"""Name of the log barrier among the diagnostics of evaluated actions; it stays attached, the algorithm adds it to its loss."""

OBSERVATION = "observation"
"""Name of an observation that is no dictionary of several."""

NumpyState = dict[str, np.ndarray]


class MemoryActorCriticPolicy(RecurrentActorCriticPolicy):
    """
    Features, [last action, time] → :class:`EncoderV7` → :class:`MemoryV7` → actor and critic; memory and heads also see what
    comes in: ``[latent, input]`` and ``[latent, read, input]``, see :class:`Stack`.

    Actor and critic share the core, and both train it. What needs no memory takes no way through one, and what is seen for
    the first time looks new to them, whatever the core's state is full of.

    :param observation_space: Observation space.
    :param action_space: Action space.
    :param lr_schedule: Learning rate schedule (could be constant).
    :param net_arch: Layers of actor and critic behind the core, as in SB3.
    :param activation_fn: Activation function of those layers.
    :param ortho_init: Orthogonal initialization of features and heads.
    :param use_sde: Whether to use generalized State-Dependent Exploration.
    :param log_std_init: Initial value for the log standard deviation.
    :param full_std: With gSDE, use (n_features x n_actions) parameters for the std instead of (n_features,).
    :param use_expln: Use ``expln()`` instead of ``exp()`` for a positive standard deviation.
    :param squash_output: With gSDE, squash the output with a tanh.
    :param features_extractor_class: Features extractor to use.
    :param features_extractor_kwargs: Its keyword arguments.
    :param share_features_extractor: Actor and critic share all up to the heads; ``False`` warns and does the same.
    :param normalize_images: Divide images by 255.
    :param optimizer_class: The optimizer, ``th.optim.Adam`` by default.
    :param optimizer_kwargs: Its keyword arguments, without the learning rate.
    :param encoder: Mode of the encoder, see :class:`EncoderV7`.
    :param memory: Kind of the memory, see :class:`MemoryV7`.
    :param hidden_dim: Width of the encoder's core.
    :param latent_dim: Features of the latent; ``None`` takes ``hidden_dim``.
    :param num_layers: Layers of the encoder's core.
    :param memory_dim: Features of the read; ``None`` takes the latent's, where the kind has such an option.
    :param encoder_kwargs: Options of the encoder's mode.
    :param memory_kwargs: Options of the memory's kind, e.g. ``{"num_slots": 64}``.
    :param use_last_action: Also read the action before, carried in the state; zeros at the start of an episode.
    :param use_time: Also read how many steps old the episode is, carried in the state, as sines and cosines: see
        :func:`~sb3_cyborg.memory_ppo.episode_time.encode_time`. For tasks where what is asked for depends on when it is.
    :param normalize_observations: Normalize observations that are no images (Boxes of three dimensions) by running moments,
        see :class:`ObservationNormalizer`; ``VecNormalize`` is not needed for them.
    :param lstm_hidden_size: RecurrentPPO's name of ``hidden_dim``; takes its place if given.
    :param n_lstm_layers: RecurrentPPO's name of ``num_layers``; takes its place if given.
    :param shared_lstm: An option of RecurrentPPO that has no meaning here; warns.
    :param enable_critic_lstm: Likewise.
    :param lstm_kwargs: Likewise.
    :raises ValueError: for unknown names and sizes that cannot be.
    """

    core: Stack
    observation_normalizers: nn.ModuleDict
    value_net: ValueHead
    amp: bool = False
    """Whether features and projections are computed in bf16; set by ``MemoryPPO(amp=True)``."""
    log_barrier: bool = False
    """Whether :meth:`evaluate_actions` also returns the log barrier; set by ``MemoryPPO(log_barrier_coef=...)``."""

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
        }
        if optimizer_class in (th.optim.Adam, th.optim.AdamW):
            optimizer_kwargs = _fused(optimizer_kwargs or {})
        # Past RecurrentActorCriticPolicy, which would build two LSTMs: all that is used of it is its type.
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
        """Build the core and the heads behind it; SB3 calls this where it creates networks, before the optimizer."""
        settings = self._core_kwargs
        self.use_last_action, self.use_time = settings["use_last_action"], settings["use_time"]
        self.observation_normalizers = nn.ModuleDict()
        if settings["normalize_observations"]:
            for name, space in _parts(self.observation_space).items():
                if len(space.shape or ()) != 3:  # not an image
                    self.observation_normalizers[name] = ObservationNormalizer(get_flattened_obs_dim(space))
        action_features = action_encoding_dim(self.action_space) if self.use_last_action else 0
        input_dim = self.features_dim + action_features + 2 * TIME_WAVES * self.use_time
        encoder = EncoderV7(
            input_dim,
            settings["hidden_dim"],
            settings["latent_dim"],
            settings["encoder"],
            settings["num_layers"],
            **settings["encoder_kwargs"],
        )
        memory_dim = encoder.output_dim if settings["memory_dim"] is None else settings["memory_dim"]
        memory_kwargs = _fitting_options(settings["memory"], settings["memory_kwargs"], memory_dim)
        self.core = Stack(encoder, MemoryV7(encoder.output_dim + input_dim, settings["memory"], **memory_kwargs))
        for name, module in self.core.named_modules():
            # Acting and updating run in different modes, so they would not agree.
            p = module.p if isinstance(module, nn.modules.dropout._DropoutNd) else getattr(module, "dropout", 0)
            if isinstance(p, (int, float)) and p > 0:
                raise ValueError(f"Dropout in the core ({name}, p={p}) would make acting and training disagree; use p=0.")
        self.lstm_output_dim = self.core.output_dim  # what RecurrentActorCriticPolicy builds its heads on
        super()._build_mlp_extractor()
        heads = self.mlp_extractor
        heads.policy_net, heads.value_net = FusedSequential(*heads.policy_net), FusedSequential(*heads.value_net)

    def _build(self, lr_schedule: Schedule) -> None:
        super()._build(lr_schedule)
        self.value_net = ValueHead(self.value_net)  # with the parameters that the optimizer knows by now

    # --- observations -----------------------------------------------------------------------------------------------

    def extract_features(self, obs: Any, features_extractor: BaseFeaturesExtractor | None = None) -> th.Tensor:
        """
        :param obs: Observations, (B, ...).
        :param features_extractor: The features extractor; ``None`` takes the policy's own.
        :return: Features (B, D) of the normalized observations.
        """
        seen: Any = preprocess_obs(obs, self.observation_space, normalize_images=self.normalize_images)
        if isinstance(seen, dict):
            known = self.observation_normalizers
            seen = {name: known[name](value) if name in known else value for name, value in seen.items()}
        elif self.observation_normalizers:
            seen = self.observation_normalizers[OBSERVATION](seen)
        features: th.Tensor = (self.features_extractor if features_extractor is None else features_extractor)(seen)
        return features

    def update_normalization(self, obs: Observations) -> None:
        """
        Let the observations of a rollout move the scale that observations are normalized to.

        :param obs: Observations, (T, N, ...), as they were stored.
        """
        parts = obs if isinstance(obs, dict) else {OBSERVATION: obs}
        for name, normalizer in self.observation_normalizers.items():
            assert isinstance(normalizer, ObservationNormalizer)
            seen = preprocess_obs(parts[name].flatten(0, 1), _parts(self.observation_space)[name])
            assert isinstance(seen, th.Tensor)
            normalizer.update(seen)

    # --- states -----------------------------------------------------------------------------------------------------

    def get_initial_state(self, batch_size: int) -> State:
        """
        :param batch_size: Rows B.
        :return: The state that episodes start with, every leaf ``(B, ...)``.
        """
        state = self.core.get_initial_state(batch_size, self.device)
        if self.use_last_action:
            state[LAST_ACTION] = th.zeros(batch_size, action_encoding_dim(self.action_space), device=self.device)
        if self.use_time:
            state[TIME] = th.zeros(batch_size, device=self.device)
        return state

    def _remember_action(self, state: State, actions: th.Tensor) -> State:
        """:return: The state with the actions (B, ...) that were just sampled as the last ones."""
        if not self.use_last_action:
            return state
        return state | {LAST_ACTION: encode_actions(actions.flatten(1), self.action_space, self.squash_output)}

    def _autocast(self) -> AbstractContextManager[Any]:
        """:return: The context of features and core: bf16 with ``amp``; recurrence, memory and heads keep fp32."""
        return th.autocast(self.device.type, th.bfloat16) if self.amp else nullcontext()

    def _core_step(self, obs: Any, state: State, episode_starts: th.Tensor) -> tuple[th.Tensor, State]:
        """:return: ``[latent, read, input]`` (B, D) of observations (B, ...), and the state of the core after them."""
        # On a CPU a look is cheaper than a mask that changes nothing; elsewhere it would wait for the device.
        unbroken = episode_starts.device.type == "cpu" and not episode_starts.any()
        mask = None if unbroken else keep_mask(episode_starts)
        with self._autocast():
            x = self.extract_features(obs)
            if self.use_last_action:
                last = state[LAST_ACTION]
                if mask is not None:
                    last = th.where(mask.unsqueeze(-1) > 0.5, last, 0.0)
                x = th.cat([x, last], dim=-1)
            if self.use_time:
                time = state[TIME] if mask is None else th.where(mask > 0.5, state[TIME], 0.0)
                x = th.cat([x, encode_time(time)], dim=-1)
            latent, new_state, _ = self.core.forward_step(x, state, mask)
        if self.use_last_action:
            new_state[LAST_ACTION] = last
        if self.use_time:
            new_state[TIME] = time + 1
        return latent, new_state

    def _core_sequence(
        self, obs: Observations, actions: th.Tensor, state: State, masks: th.Tensor
    ) -> tuple[th.Tensor, State, Logs]:
        """:return: ``[latent, read, input]`` (B, T, D) of observations (B, T, ...), the state after, diagnostics."""
        flat = {key: _flatten(value) for key, value in obs.items()} if isinstance(obs, dict) else _flatten(obs)
        # The models hide a dead episode's state themselves, but in a gradient zero times its NaN would still be NaN.
        core_state = {name: leaf for name, leaf in state.items() if name not in OWN_LEAVES}
        core_state = self.core.reset_states(core_state, masks[:, 0])
        with self._autocast():
            x = self.extract_features(flat).unflatten(0, masks.shape)
            if self.use_last_action:
                encoded = encode_actions(actions.flatten(0, 1), self.action_space, self.squash_output)
                encoded = encoded.unflatten(0, masks.shape)
                x = th.cat([x, shift_steps(encoded, state[LAST_ACTION], masks)], dim=-1)
            if self.use_time:
                time = steps_since_start(state[TIME], masks, masks.shape[1])
                x = th.cat([x, encode_time(time)], dim=-1)
            latent, new_state, logs = self.core.forward_sequence(x, core_state, masks)
        if self.use_last_action:
            new_state[LAST_ACTION] = encoded[:, -1]
        if self.use_time:
            new_state[TIME] = time[:, -1] + 1
        return latent, new_state, logs

    # --- acting -----------------------------------------------------------------------------------------------------

    def forward(  # type: ignore[override]  # a State where RecurrentPPO has a pair of LSTM states
        self, obs: Any, state: State, episode_starts: th.Tensor, deterministic: bool = False
    ) -> tuple[th.Tensor, th.Tensor, th.Tensor, State]:
        """
        Act for one step.

        :param obs: Observations, (B, ...).
        :param state: The state before the step.
        :param episode_starts: 1 where an episode starts with ``obs``, (B,).
        :param deterministic: Take the mode instead of a sample.
        :return: Actions (B, ...), values (B, 1), log-probabilities (B,), the state after the step.
        """
        latent, state = self._core_step(obs, state, episode_starts)
        latent_pi, latent_vf = self.mlp_extractor(latent)
        if self._is_plain_categorical():
            actions, log_prob = sample_categorical(self.action_net(latent_pi), deterministic)
        else:
            distribution = self._get_action_dist_from_latent(latent_pi)
            actions = distribution.get_actions(deterministic=deterministic)
            log_prob = distribution.log_prob(actions)
        state = self._remember_action(state, actions.unsqueeze(-1))
        return self._shape_actions(actions), self.value_net(latent_vf), log_prob, state

    def _is_plain_categorical(self) -> bool:
        """:return: Whether actions are drawn as SB3 does it, and not by a subclass of the distribution or of this policy."""
        asked, plain = type(self)._get_action_dist_from_latent, ActorCriticPolicy._get_action_dist_from_latent
        return type(self.action_dist) is CategoricalDistribution and asked is plain

    def _shape_actions(self, actions: th.Tensor) -> th.Tensor:
        shape = self.action_space.shape
        assert shape is not None
        return actions.reshape(-1, *shape)

    def get_distribution(  # type: ignore[override]  # see forward
        self, obs: Any, state: State, episode_starts: th.Tensor
    ) -> tuple[Distribution, State]:
        """
        :param obs: Observations, (B, ...).
        :param state: The state before the step.
        :param episode_starts: 1 where an episode starts with ``obs``, (B,).
        :return: The distribution of actions, the state after the step (without the action, which is yet to be taken).
        """
        latent, state = self._core_step(obs, state, episode_starts)
        return self._get_action_dist_from_latent(self.mlp_extractor.forward_actor(latent)), state

    def predict_values(  # type: ignore[override]  # see forward
        self, obs: Any, state: State, episode_starts: th.Tensor
    ) -> th.Tensor:
        """
        Look ahead: nothing of this step stays in the state that was passed.

        :param obs: Observations, (B, ...).
        :param state: The state before the step.
        :param episode_starts: 1 where an episode starts with ``obs``, (B,).
        :return: Values, (B, 1).
        """
        latent, _ = self._core_step(obs, state, episode_starts)
        values: th.Tensor = self.value_net(self.mlp_extractor.forward_critic(latent))
        return values

    def _predict(  # type: ignore[override]  # see forward
        self, observation: Any, state: State, episode_starts: th.Tensor, deterministic: bool = False
    ) -> tuple[th.Tensor, State]:
        distribution, state = self.get_distribution(observation, state, episode_starts)
        actions = distribution.get_actions(deterministic=deterministic)
        return actions, self._remember_action(state, actions.unsqueeze(-1))

    def predict(  # type: ignore[override]  # see forward
        self,
        observation: np.ndarray | dict[str, np.ndarray] | tuple[Any, ...],
        state: NumpyState | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, NumpyState]:
        """
        Act as in SB3: pass back the state that the last call returned, and whether an episode starts.

        :param observation: One observation or (B, ...) of them.
        :param state: What the last call returned; ``None`` starts anew.
        :param episode_start: Whether an episode starts with the observation, (B,); ``None`` means no, but with
            ``state=None`` every row starts anew anyway.
        :param deterministic: Take the mode instead of a sample.
        :return: Actions, and the state after them: a dictionary of arrays, every one ``(B, ...)``.
        :raises ValueError: for observations that are not finite, and for a state or starts of another batch size.
        """
        if isinstance(observation, tuple):
            raise ValueError(
                "You have passed a tuple to predict() instead of an array or a dict: `obs, info = env.reset()` is gymnasium's "
                "API, `obs = vec_env.reset()` SB3's."
            )
        self.set_training_mode(False)
        obs, vectorized = self.obs_to_tensor(observation)
        check_finite_observations(obs, "in `predict`")
        batch_size = len(next(iter(obs.values())) if isinstance(obs, dict) else obs)
        starts = th.zeros(batch_size, device=self.device)
        if episode_start is not None:
            starts = th.as_tensor(np.asarray(episode_start), dtype=th.float32, device=self.device).reshape(-1)
            if len(starts) != batch_size:
                raise ValueError(f"`episode_start` has {len(starts)} rows, but there are {batch_size} observations.")
        with th.no_grad():
            first = self.get_initial_state(batch_size)
            tensors = first if state is None else self._check_state(state, first)
            taken, new_state = self._predict(obs, tensors, starts, deterministic)
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
        """:return: A state given to ``predict`` as tensors; ``like`` is the initial one of the right batch size."""
        if not isinstance(state, dict) or state.keys() != like.keys():
            got = sorted(state) if isinstance(state, dict) else type(state).__name__
            raise ValueError(
                f"`state` must be what the last `predict` of this policy returned, a dict with {sorted(like)}, got {got}; "
                "pass None to start anew."
            )
        for name, leaf in like.items():
            if np.shape(state[name]) != tuple(leaf.shape):
                raise ValueError(
                    f"`state[{name!r}]` has shape {np.shape(state[name])}, but for {len(leaf)} observations it must be "
                    f"{tuple(leaf.shape)}; pass None to start anew."
                )
        return {name: th.as_tensor(value, device=self.device, dtype=like[name].dtype) for name, value in state.items()}

    # --- training ---------------------------------------------------------------------------------------------------

    def burn_in(self, batch: SequenceBatch) -> State:
        """
        Replay the steps before the sequences without gradient.

        Rows of a shorter prefix sit out until their own begins: padding is never computed with.

        :param batch: Sequences with their prefix.
        :return: The state at the first training step, detached.
        """
        state = batch["state"]
        ends = sorted(set(batch["prefix_lens"]))[::-1]
        if not ends or ends[0] == 0:
            return state
        total = batch["masks"].shape[1] - int(batch["grad_mask"][0].sum())
        lengths = th.tensor(batch["prefix_lens"])
        training = self.training
        self.set_training_mode(False)  # as when acting: no running statistic sees these steps
        with th.no_grad():
            for longest, shorter in zip(ends, [*ends[1:], 0], strict=True):
                if longest == shorter:
                    continue
                part = slice(total - longest, total - shorter)
                rows = th.nonzero(lengths >= longest).squeeze(1).to(batch["masks"].device)
                obs, actions, masks = _steps(batch, part)
                obs = {key: value[rows] for key, value in obs.items()} if isinstance(obs, dict) else obs[rows]
                _, replayed, _ = self._core_sequence(obs, actions[rows], index_state(state, rows), masks[rows])
                state = {name: leaf.index_copy(0, rows, replayed[name]) for name, leaf in state.items()}
        self.set_training_mode(training)
        return state

    def evaluate_sequences(self, batch: SequenceBatch) -> tuple[th.Tensor, th.Tensor, th.Tensor | None, Logs]:
        """
        Evaluate the actions of the training steps, with gradient, after the burn-in, without.

        :param batch: Sequences with their prefix of P steps and L training steps.
        :return: Values (B, L), log-probabilities (B, L), entropies (B, L) or ``None``, diagnostics.
        """
        state = self.burn_in(batch)
        steps = batch["masks"].shape[1]
        first = steps - int(batch["grad_mask"][0].sum())
        obs, actions, masks = _steps(batch, slice(first, steps))
        return self.evaluate_actions(obs, actions, state, masks)

    def evaluate_actions(  # type: ignore[override]  # see forward
        self, obs: Observations, actions: th.Tensor, state: State, masks: th.Tensor
    ) -> tuple[th.Tensor, th.Tensor, th.Tensor | None, Logs]:
        """
        Evaluate actions along sequences.

        :param obs: Observations, (B, T, ...).
        :param actions: Actions as sampled, (B, T, A).
        :param state: The state before the first step.
        :param masks: Keep-masks, (B, T).
        :return: Values (B, T), log-probabilities (B, T), entropies (B, T) or ``None``, diagnostics, and with ``log_barrier``
            under that name among them the loss.
        """
        latent, _, logs = self._core_sequence(obs, actions, state, masks)
        latent_pi, latent_vf = self.mlp_extractor(latent.flatten(0, 1))
        flat, shape = actions.flatten(0, 1), masks.shape
        entropy: th.Tensor | None
        if self._is_plain_categorical() and not self.log_barrier:
            log_prob, entropy = evaluate_categorical(self.action_net(latent_pi), flat)
        else:
            distribution = self._get_action_dist_from_latent(latent_pi)
            log_prob = distribution.log_prob(flat.squeeze(-1) if isinstance(self.action_space, spaces.Discrete) else flat)
            entropy = distribution.entropy()
            if self.log_barrier:
                logs = {**logs, LOG_BARRIER: losses.log_barrier_loss(distribution)}
        values = self.value_net(latent_vf).view(shape)
        return values, log_prob.view(shape), None if entropy is None else entropy.view(shape), logs

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return super()._get_constructor_parameters() | self._core_kwargs


def _parts(space: spaces.Space[Any]) -> Mapping[str, spaces.Space[Any]]:
    """:return: The spaces that an observation consists of, by name."""
    return space.spaces if isinstance(space, spaces.Dict) else {OBSERVATION: space}


def _steps(batch: SequenceBatch, part: slice) -> tuple[Observations, th.Tensor, th.Tensor]:
    """:return: Observations, actions and masks of some steps of a batch."""
    obs = batch["obs"]
    cut = {key: value[:, part] for key, value in obs.items()} if isinstance(obs, dict) else obs[:, part]
    return cut, batch["actions"][:, part], batch["masks"][:, part]


def _flatten(steps: th.Tensor) -> th.Tensor:
    """:return: (B, T, ...) as (B * T, ...). A copy, if it takes one, keeps images channels-last in memory, if they are."""
    dense = steps.stride(0) == steps.shape[1] * steps.stride(1)
    return (steps if dense else steps.clone()).flatten(0, 1)


def _fitting_options(kind: str, given: dict[str, Any], memory_dim: int) -> dict[str, Any]:
    """:return: Options of a memory: the given ones, ``memory_dim``, and a number of heads that divides it."""
    known = memory_options(kind)
    options = dict(given)
    if "memory_dim" in known:
        options.setdefault("memory_dim", memory_dim)
        check_positive(memory_dim=options["memory_dim"])
    if {"memory_dim", "num_heads"} <= known and "num_heads" not in options:
        wanted = inspect.signature(MEMORIES[kind]).parameters["num_heads"].default
        options["num_heads"] = nearest_divisors(options["memory_dim"], wanted)[0]
    return options


def _fused(optimizer_kwargs: dict[str, Any]) -> dict[str, Any]:
    """:return: Options of Adam: the given ones, and one kernel for all parameters unless they ask for another way."""
    ways = {"fused", "foreach", "capturable", "differentiable"}
    return optimizer_kwargs if ways & optimizer_kwargs.keys() else {**optimizer_kwargs, "fused": True}


def _warn_of_lstm_options(
    shared_lstm: bool | None, enable_critic_lstm: bool | None, lstm_kwargs: dict[str, Any] | None, share_features: bool
) -> None:
    given = {"shared_lstm": shared_lstm, "enable_critic_lstm": enable_critic_lstm, "lstm_kwargs": lstm_kwargs or None}
    names = [name for name, value in given.items() if value is not None]
    if not share_features:
        names.append("share_features_extractor=False")
    if names:
        warnings.warn(
            f"{', '.join(names)}: no effect here. Actor and critic share one features extractor and one core, and both train "
            "it; its options are `encoder_kwargs` and `memory_kwargs`.",
            stacklevel=3,
        )


class MemoryActorCriticCnnPolicy(MemoryActorCriticPolicy):
    """:class:`MemoryActorCriticPolicy` for images: its features come from :class:`NatureCNN`."""

    def __init__(
        self, observation_space: spaces.Space[Any], action_space: spaces.Space[Any], lr_schedule: Schedule, **kwargs: Any
    ) -> None:
        super().__init__(observation_space, action_space, lr_schedule, **{"features_extractor_class": NatureCNN, **kwargs})


class MemoryMultiInputActorCriticPolicy(MemoryActorCriticPolicy):
    """:class:`MemoryActorCriticPolicy` for Dict observations: its features come from :class:`CombinedExtractor`."""

    def __init__(
        self, observation_space: spaces.Space[Any], action_space: spaces.Space[Any], lr_schedule: Schedule, **kwargs: Any
    ) -> None:
        super().__init__(
            observation_space, action_space, lr_schedule, **{"features_extractor_class": CombinedExtractor, **kwargs}
        )


def policy_options(policy_class: type[BasePolicy]) -> set[str]:
    """:return: Names that ``policy_kwargs`` may hold for a policy class, its bases' included where it passes them on."""
    names: set[str] = set()
    for base in policy_class.__mro__:
        if "__init__" not in vars(base):
            continue
        parameters = inspect.signature(vars(base)["__init__"]).parameters.values()
        names |= {parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD}
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            break
    return names - {"self", "args", "observation_space", "action_space", "lr_schedule", "use_sde"}
