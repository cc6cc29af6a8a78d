"""Inputs of the core: features of the normalized observation, the last action, the time step of the episode."""

from collections.abc import Mapping
from typing import Any

import torch as th
from gymnasium import spaces
from stable_baselines3.common.preprocessing import get_flattened_obs_dim, preprocess_obs
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import nn

from sb3_cyborg.memory_ppo.actions import action_encoding_dim, encode_actions
from sb3_cyborg.memory_ppo.episode_time import TIME_WAVES, encode_time
from sb3_cyborg.memory_ppo.normalization import Moments, ObservationNormalizer
from sb3_cyborg.memory_ppo.rollout_buffer_v7 import Observations
from sb3_cyborg.ops.episodes import shift_steps, steps_since_start
from sb3_cyborg.sequence_model import Logs, SequenceModel, State

LAST_ACTION, TIME = "last_action", "time"
"""Names of the state leaves."""

OBSERVATION = "observation"
"""Name of the normalizer if the observation is not a dictionary."""


MAX_INPUT = 1e15
"""Bound of observations without normalizer: layer normalization squares its input, which overflows float32 above 1e19."""


class Inputs(SequenceModel):
    """
    Observation normalization and features extractor; the output is ``[features, last action, time]``.

    In acting, the action of a step is known only after the step: :meth:`read` processes the step, :meth:`remember` stores its
    action. In training, :meth:`read_sequence` processes both. The :class:`SequenceModel` methods, which the contract tests,
    take ``[features, encoded action of the same step]`` as input.

    State: ``last_action`` (B, A), the encoded action of the previous step, with ``use_last_action``; ``time`` (B,), steps
    since the start of the episode, with ``use_time``.

    :param observation_space: Observation space.
    :param action_space: Action space.
    :param features_extractor: SB3's features extractor, from normalized observations (B, ...) to features (B, F).
    :param use_last_action: Append the last action, see :func:`~sb3_cyborg.memory_ppo.actions.encode_actions`; zeros at the
        first step of an episode.
    :param use_time: Append the steps since the start of the episode, see
        :func:`~sb3_cyborg.memory_ppo.episode_time.encode_time`.
    :param normalize_observations: Normalize observations by running moments, except images (Boxes of three dimensions).
    :param normalize_images: Divide images by 255.
    :param squash_output: Whether the actions of a Box are already in [-1, 1].
    """

    counters = frozenset({TIME})
    leaves: frozenset[str]
    """Names of the state leaves."""
    _reference: th.Tensor

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        features_extractor: BaseFeaturesExtractor,
        *,
        use_last_action: bool = False,
        use_time: bool = False,
        normalize_observations: bool = True,
        normalize_images: bool = True,
        squash_output: bool = False,
    ) -> None:
        super().__init__()
        self.observation_space, self.action_space = observation_space, action_space
        self.use_last_action, self.use_time = use_last_action, use_time
        self.normalize_images, self.squash_output = normalize_images, squash_output
        self.features_extractor = features_extractor
        self.normalizers = nn.ModuleDict()
        if normalize_observations:
            for name, space in _parts(observation_space).items():
                if len(space.shape or ()) != 3:  # not an image
                    self.normalizers[name] = ObservationNormalizer(get_flattened_obs_dim(space))
        self.action_dim = action_encoding_dim(action_space) if use_last_action else 0
        self.input_dim = features_extractor.features_dim + self.action_dim
        self.output_dim = self.input_dim + 2 * TIME_WAVES * use_time
        self.leaves = frozenset([LAST_ACTION] * use_last_action + [TIME] * use_time)
        self.register_buffer("_reference", th.zeros(()), persistent=False)  # device and dtype of the state

    # --- observations -----------------------------------------------------------------------------------------------

    def preprocess(self, obs: Any) -> Any:
        """
        Preprocess observations for the features extractor.

        :param obs: Observations, (B, ...), or a dictionary of them.
        :return: One-hot vectors for discrete observations, images in [0, 1], all others normalized, or clipped to
            [-MAX_INPUT, MAX_INPUT] without normalizer.
        """
        if isinstance(self.observation_space, spaces.Dict):
            parts = self.observation_space.spaces
            return {name: self._bounded(name, self._preprocess(value, parts[name])) for name, value in obs.items()}
        return self._bounded(OBSERVATION, self._preprocess(obs, self.observation_space))

    def _preprocess(self, value: th.Tensor, space: spaces.Space[Any]) -> th.Tensor:
        if isinstance(space, spaces.Discrete | spaces.MultiDiscrete):
            # Equal to SB3's one-hot vectors, whose check of the range would branch on values.
            return encode_actions(value.reshape(value.shape[0], -1).long(), space)  # `len` would fix the batch of an export
        seen = preprocess_obs(value, space, normalize_images=self.normalize_images)
        assert isinstance(seen, th.Tensor)
        return seen

    def _bounded(self, name: str, value: th.Tensor) -> th.Tensor:
        if name in self.normalizers:
            normalized: th.Tensor = self.normalizers[name](value)
            return normalized
        return value if value.dim() == 4 else value.clamp(-MAX_INPUT, MAX_INPUT)  # images are as large as their space allows

    def parts(self, obs: Observations) -> dict[str, th.Tensor]:
        """
        Observations for the moments of the normalizers.

        :param obs: Observations of a rollout, (T, N, ...), as stored in the buffer.
        :return: Unnormalized observations without outliers by the name of their normalizer, (T * N, D), float64, see
            :meth:`ObservationNormalizer.without_outliers`.
        """
        by_name = obs if isinstance(obs, dict) else {OBSERVATION: obs}
        result: dict[str, th.Tensor] = {}
        for name in self.normalizers:
            seen = preprocess_obs(by_name[name].flatten(0, 1), _parts(self.observation_space)[name])
            assert isinstance(seen, th.Tensor)
            result[name] = ObservationNormalizer.without_outliers(seen)
        return result

    def update_normalization(self, rollout: Mapping[str, Moments]) -> None:
        """
        Update the running moments of the normalizers.

        :param rollout: Moments of the observations of a rollout, by the name of their normalizer.
        """
        for name, moments in rollout.items():
            normalizer = self.normalizers[name]
            assert isinstance(normalizer, ObservationNormalizer)
            normalizer.update(moments)

    def features(self, obs: Any) -> th.Tensor:
        """
        Extract features from observations.

        :param obs: Observations, (B, ...), or a dictionary of them.
        :return: Features, (B, F).
        """
        features: th.Tensor = self.features_extractor(self.preprocess(obs))
        return features

    # --- one step, and a sequence -----------------------------------------------------------------------------------

    def read(self, features: th.Tensor, state: State, mask: th.Tensor | None = None) -> tuple[th.Tensor, State]:
        """
        Process a step before its action is known.

        :param features: (B, F).
        :param state: State before the step.
        :param mask: Keep-mask, bool, (B,); ``None`` keeps every row.
        :return: ``[features, last action, time]`` (B, output_dim), and the state after the step without its action.
        """
        columns, new_state = [features], {}
        if self.use_last_action:
            last = state[LAST_ACTION]
            new_state[LAST_ACTION] = last if mask is None else th.where(mask.unsqueeze(-1), last, 0.0)
            columns.append(new_state[LAST_ACTION])
        if self.use_time:
            time = state[TIME] if mask is None else th.where(mask, state[TIME], 0.0)
            new_state[TIME] = time + 1
            columns.append(encode_time(time))
        return (th.cat(columns, dim=-1) if len(columns) > 1 else features), new_state

    def remember(self, state: State, actions: th.Tensor) -> State:
        """
        Store the actions of a step in the state.

        :param state: State after the step; it may have other leaves.
        :param actions: Actions of the step, as sampled, (B, ...).
        :return: The state with these actions as the last ones.
        """
        return state | {LAST_ACTION: self._encode(actions.flatten(1))} if self.use_last_action else state

    def read_sequence(
        self, features: th.Tensor, actions: th.Tensor, state: State, masks: th.Tensor | None = None
    ) -> tuple[th.Tensor, State]:
        """
        Process a sequence and its actions.

        :param features: (B, T, F).
        :param actions: Actions as sampled, (B, T, A).
        :param state: State before the first step.
        :param masks: Keep-masks, bool, (B, T); ``None`` keeps every row.
        :return: ``[features, last action, time]`` (B, T, output_dim), and the state after the last step.
        """
        encoded = self._encode(actions.flatten(0, 1)).unflatten(0, features.shape[:2]) if self.use_last_action else None
        return self._append(features, encoded, state, masks)

    def _encode(self, actions: th.Tensor) -> th.Tensor:
        return encode_actions(actions, self.action_space, self.squash_output)

    def _append(
        self, features: th.Tensor, encoded: th.Tensor | None, state: State, masks: th.Tensor | None
    ) -> tuple[th.Tensor, State]:
        """:meth:`read_sequence` with encoded actions (B, T, action_dim)."""
        columns, new_state = [features], {}
        if encoded is not None:
            columns.append(shift_steps(encoded, state[LAST_ACTION], masks))
            new_state[LAST_ACTION] = encoded[:, -1]
        if self.use_time:
            time = steps_since_start(state[TIME], masks, features.shape[1])
            columns.append(encode_time(time))
            new_state[TIME] = time[:, -1] + 1
        return (th.cat(columns, dim=-1) if len(columns) > 1 else features), new_state

    # --- the contract -----------------------------------------------------------------------------------------------

    def get_initial_state(self, batch_size: int, device: th.device | str | None = None) -> State:
        device = self._reference.device if device is None else device
        state: State = {}
        if self.use_last_action:
            state[LAST_ACTION] = self._reference.new_zeros(batch_size, self.action_dim, device=device)
        if self.use_time:
            state[TIME] = self._reference.new_zeros(batch_size, device=device)
        return state

    def forward_step(self, x: th.Tensor, state: State, mask: th.Tensor | None = None) -> tuple[th.Tensor, State, Logs]:
        features, encoded = x.split([self.input_dim - self.action_dim, self.action_dim], dim=-1)
        output, new_state = self.read(features, state, mask)
        return output, new_state | ({LAST_ACTION: encoded} if self.use_last_action else {}), {}

    def forward_sequence(self, x: th.Tensor, state: State, masks: th.Tensor | None = None) -> tuple[th.Tensor, State, Logs]:
        features, encoded = x.split([self.input_dim - self.action_dim, self.action_dim], dim=-1)
        return *self._append(features, encoded if self.use_last_action else None, state, masks), {}


def _parts(space: spaces.Space[Any]) -> Mapping[str, spaces.Space[Any]]:
    """:return: The spaces of the entries of an observation, by name."""
    return space.spaces if isinstance(space, spaces.Dict) else {OBSERVATION: space}
