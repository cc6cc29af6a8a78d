"""``RolloutBufferV7``: a rollout of ``T`` steps in ``N`` environments, with the recurrent states stored during acting."""

import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple, TypedDict, cast

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.preprocessing import get_action_dim, is_image_space
from typing_extensions import NotRequired

from sb3_cyborg.checks import check_divides, check_positive, check_whole, divisors, warn_caller
from sb3_cyborg.memory_ppo.ranks import Reduce
from sb3_cyborg.sequence_model import State, keep_mask

Observations = th.Tensor | dict[str, th.Tensor]

TARGET_SEQ_LEN, LONG_SEQ_LEN, MIN_ROWS = 64, 128, 8
"""
Upper bound of the default ``seq_len``: 64, or 128 if minibatches contain at least 8 sequences of 128. Entries that a memory
stored before the sequence have no gradient, so longer sequences learn with fewer transitions. With fewer rows, the steps of a
loop take the same time for fewer transitions.
"""
SHORT_SEQ_LEN = 16
"""Lower bound of the default ``seq_len``; if ``n_steps`` has no divisor in the range, the next larger divisor is used."""
MIN_BATCH_SIZE, MAX_BATCH_SIZE = 128, 1024
"""Bounds of the default ``batch_size``, in transitions."""
MINIBATCHES = 4
"""Default number of minibatches in a rollout, within the bounds of ``batch_size``."""
MIN_STEPS, MIN_ROLLOUT = 128, 2048
"""Lower bounds of a default rollout: steps of each environment, and transitions of all environments."""


class Sequences(TypedDict):
    """Inputs of the policy's evaluation: B sequences of P burn-in steps and L training steps."""

    obs: Observations  # (B, P + L, ...)
    actions: th.Tensor  # (B, P + L, A)
    masks: th.Tensor  # keep-masks, bool, (B, P + L): false where an episode starts
    state: State  # before the first step of each row's burn-in
    prefix_lens: list[int]  # burn-in steps of each row, in [0, P]; the first P - prefix_len columns are padding
    burn_in: int  # P
    action_masks: NotRequired[th.Tensor]  # legal actions, bool, (B, P + L, M); only if the buffer stores them


class TrainingBatch(Sequences):
    """A minibatch whose loss inputs cover only the L training steps."""

    old_values: th.Tensor  # (B, L), as the others below
    old_log_prob: th.Tensor
    advantages: th.Tensor
    returns: th.Tensor
    advantage_mean: NotRequired[th.Tensor]  # 0-d, over the parts of all processes, as `advantage_std`; only with `reduce`
    advantage_std: NotRequired[th.Tensor]


class SequenceBatch(Sequences):
    """A minibatch whose loss inputs cover burn-in and training steps."""

    old_values: th.Tensor  # (B, P + L), as the others below
    old_log_prob: th.Tensor
    advantages: th.Tensor
    returns: th.Tensor
    grad_mask: th.Tensor  # 0 burn-in, 1 training


class _Places(NamedTuple):
    """Positions of sequences in the rollout."""

    step: th.Tensor  # (B, P + L)
    env: th.Tensor  # (B,)
    anchor: th.Tensor  # index of the stored state, (B,)
    prefix_lens: list[int]


def plan_n_steps(n_envs: int, seq_len: int | None) -> int:
    """
    Choose the default ``n_steps``: the smallest multiple of 128 that gives at least 2048 transitions per rollout.

    With one environment, this equals the default of SB3's PPO.

    :param n_envs: Number of environments, >= 1.
    :param seq_len: Steps in a sequence, >= 1, or ``None``.
    :return: Steps of each environment in a rollout. With ``seq_len``, the multiples are those of the smallest multiple of
        ``seq_len`` that is at least 128.
    :raises ValueError: for numbers below 1.
    """
    check_positive(n_envs=n_envs)
    if seq_len is not None:
        check_positive(seq_len=seq_len)
    unit = MIN_STEPS if seq_len is None else math.ceil(MIN_STEPS / seq_len) * seq_len
    return unit * math.ceil(MIN_ROLLOUT / (unit * n_envs))


def plan_minibatches(
    n_steps: int, n_envs: int, seq_len: int | None, batch_size: int | None, n_ranks: int = 1
) -> tuple[int, int]:
    """
    Choose ``seq_len`` and ``batch_size`` where they are ``None``, and check the given ones.

    :param n_steps: Steps of each environment in a rollout, >= 1.
    :param n_envs: Number of environments of all processes together, >= 1, a multiple of ``n_ranks``.
    :param seq_len: Steps in a sequence, a divisor of ``n_steps``, or ``None``.
    :param batch_size: Transitions in a minibatch of all processes together, >= 2, or ``None``.
    :param n_ranks: Number of processes, each of which takes an equal part of each minibatch.
    :return: ``seq_len``, a divisor of ``n_steps``, and ``batch_size``, a multiple of ``seq_len * n_ranks`` that is at least 2.
    :raises ValueError: for numbers that do not work, with the nearest ones that do.
    """
    check_positive(n_steps=n_steps, n_envs=n_envs)
    total = n_steps * n_envs
    if total < 2:
        raise ValueError(
            f"`n_steps * n_envs` must be greater than 1, got n_steps={n_steps} and n_envs={n_envs}: one transition has no "
            "advantage to normalize."
        )
    if batch_size is not None:
        check_positive(batch_size=batch_size)
        if batch_size == 1:
            raise ValueError("`batch_size` must be at least 2, got 1: one transition has no advantage to normalize.")
    if seq_len is not None:
        check_positive(seq_len=seq_len)
        check_divides("seq_len", seq_len, "n_steps", n_steps)
        unit = seq_len * n_ranks
        if batch_size is not None and batch_size % unit:
            below = max(batch_size // unit, 1) * unit
            among = "" if n_ranks == 1 else f" in each of {n_ranks} processes"
            raise ValueError(
                f"`batch_size`={batch_size} is not a multiple of `seq_len`={seq_len}{among}; the nearest that are: "
                f"{below} and {below + unit}."
            )
    wanted = min(max(MIN_BATCH_SIZE, total // MINIBATCHES), MAX_BATCH_SIZE) if batch_size is None else batch_size
    if seq_len is None:
        longest = LONG_SEQ_LEN if min(wanted, total) >= MIN_ROWS * LONG_SEQ_LEN else TARGET_SEQ_LEN
        share = None if batch_size is None else max(batch_size // n_ranks, 1)
        seq_len = _fitting_seq_len(n_steps, share, longest)
        if share is not None and share < SHORT_SEQ_LEN <= n_steps:
            warn_caller(
                f"`batch_size`={batch_size} leaves sequences of {seq_len} steps, too few to train a memory: use a "
                f"`batch_size` of at least {SHORT_SEQ_LEN * n_ranks}, or give `seq_len`."
            )
    rows = max(1, min(wanted, total) // (seq_len * n_ranks))  # of each process
    fewest = 2 if seq_len * n_ranks == 1 else 1
    if batch_size is None:
        # A divisor of the number of sequences, so that all minibatches have the same size; the nearest one in ratio.
        fitting = [divisor for divisor in divisors(total // (seq_len * n_ranks)) if divisor >= fewest]
        rows = min(fitting, key=lambda divisor: max(divisor / rows, rows / divisor))
    rows = max(rows, fewest) * n_ranks
    _refuse_single(total, seq_len, rows)
    if batch_size is not None and rows * seq_len != batch_size:
        warn_caller(
            f"You have specified a mini-batch size of {batch_size}, but the rollout holds `n_steps * n_envs = {total}` "
            f"transitions in sequences of {seq_len}: mini-batches of {rows * seq_len} are used instead."
        )
    elif total % (rows * seq_len):
        warn_caller(
            f"You have specified a mini-batch size of {batch_size}, but because the rollout holds `n_steps * n_envs = "
            f"{total}` transitions, after every {total // (rows * seq_len)} mini-batches there will be one of "
            f"{total % (rows * seq_len)}. We recommend a `batch_size` that is a factor of `n_steps * n_envs`."
        )
    return int(seq_len), int(rows * seq_len)  # the arguments may be NumPy integers


def check_burn_in(burn_in: int, n_steps: int) -> None:
    """
    Require a burn-in that is shorter than the rollout.

    :param burn_in: Steps before each sequence that are replayed without gradient.
    :param n_steps: Steps of each environment in a rollout, >= 1.
    :raises ValueError: for a ``burn_in`` that is not an integer, is below 0, or is above 0 and not less than ``n_steps``.
    """
    check_whole(0, burn_in=burn_in)
    if 0 < burn_in >= n_steps:
        raise ValueError(f"`burn_in`={burn_in} must be less than `n_steps`={n_steps}: it replays steps of the same rollout.")


def _fitting_seq_len(n_steps: int, batch_size: int | None, longest: int) -> int:
    """:return: A divisor of ``n_steps`` in the default range that divides ``batch_size``, if there is one."""
    longest = min(longest, batch_size or longest)
    fitting = [length for length in divisors(n_steps) if length <= longest]
    if fitting[-1] < min(SHORT_SEQ_LEN, longest):
        return min((length for length in divisors(n_steps) if length > fitting[-1]), default=fitting[-1])
    # Prefer a divisor of the batch size, unless it is less than half of the longest fitting length.
    exact = [length for length in fitting if (batch_size or 0) % length == 0]
    return exact[-1] if 2 * exact[-1] >= fitting[-1] else fitting[-1]


def _refuse_single(total: int, seq_len: int, rows: int) -> None:
    """Raise a ``ValueError`` if the last minibatch would contain a single transition."""
    if total % (rows * seq_len) == 1:
        size = rows * seq_len
        good = (n for n in _outward(size, seq_len, total) if n >= 2 and total % n != 1)
        nearest = list(itertools.islice(good, 2))
        raise ValueError(
            f"`batch_size`={size} leaves a last minibatch of one transition out of {total}, which has no advantage to "
            f"normalize; the nearest that work: {' and '.join(map(str, sorted(nearest)))}."
        )


def _outward(size: int, step: int, limit: int) -> Iterator[int]:
    """:return: Multiples of ``step`` from 1 to ``limit``, in order of their distance from ``size``, a multiple of it."""
    for distance in range(step, limit + size, step):
        yield from (candidate for candidate in (size - distance, size + distance) if 1 <= candidate <= limit)


def row_bytes(observation_space: spaces.Space[Any], action_space: spaces.Space[Any]) -> int:
    """
    :param observation_space: Observation space.
    :param action_space: Action space.
    :return: Bytes of one step of one environment in a :class:`RolloutBufferV7`, without states.
    """
    parts = observation_space.spaces.values() if isinstance(observation_space, spaces.Dict) else [observation_space]
    observations = sum(math.prod(_shape(space)) * _dtype(space).itemsize for space in parts)
    scalars = 6 * th.float32.itemsize  # reward, value, log-probability, start, advantage, return
    return observations + get_action_dim(action_space) * _action_dtype(action_space).itemsize + scalars


class RolloutBufferV7:
    """
    Rollout buffer of torch tensors ``[T, N, ...]``, for Box, Dict, discrete and image observations.

    It stores the recurrent states of the rollout only at anchors: at the start of each sequence or, with burn-in, ``burn_in``
    steps before it. Sequences near the start of the rollout have a shorter burn-in, because the states of the previous rollout
    belong to older weights.

    :param n_steps: Steps T of each environment, >= 1.
    :param observation_space: Observation space.
    :param action_space: Action space.
    :param initial_state: A state of N rows with the structure, shapes and dtypes of the states to store.
    :param device: Device of the tensors.
    :param gae_lambda: λ of generalized advantage estimation, in [0, 1].
    :param gamma: Discount factor, in [0, 1].
    :param n_envs: Number of environments N, >= 1.
    :param seq_len: Steps L of a training sequence, a divisor of ``n_steps``; ``None`` is ``n_steps``.
    :param burn_in: Steps P before each sequence that are replayed without gradient, >= 0; at most ``n_steps - seq_len`` are
        used.
    :param channels_last: Whether images (C, H, W) are stored as (H, W, C) in memory; shapes do not change.
    :param action_mask_dim: Entries M of the action mask of a step; 0 stores no masks.
    :param reduce: Sums a float64 vector over all processes, for the moments of the advantages of a minibatch, of which each
        process has a part; ``None`` for one process.
    :raises ValueError: for sizes out of these ranges.
    """

    def __init__(
        self,
        n_steps: int,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        initial_state: State,
        device: th.device | str = "cpu",
        gae_lambda: float = 0.95,
        gamma: float = 0.99,
        n_envs: int = 1,
        seq_len: int | None = None,
        burn_in: int = 0,
        channels_last: bool = False,
        action_mask_dim: int = 0,
        reduce: Reduce | None = None,
    ) -> None:
        seq_len = n_steps if seq_len is None else seq_len
        check_positive(n_steps=n_steps, n_envs=n_envs, seq_len=seq_len)
        check_divides("seq_len", seq_len, "n_steps", n_steps)
        check_whole(0, burn_in=burn_in)
        self.n_steps, self.n_envs, self.seq_len = n_steps, n_envs, seq_len = int(n_steps), int(n_envs), int(seq_len)
        # No sequence has more steps before it; a longer burn-in would be padding in all rows.
        self.burn_in = min(int(burn_in), n_steps - seq_len)
        self.gae_lambda, self.gamma, self.reduce = gae_lambda, gamma, reduce
        self.device = th.device(device)

        def steps(*shape: int, dtype: th.dtype = th.float32) -> th.Tensor:
            return th.zeros((n_steps, n_envs, *shape), dtype=dtype, device=self.device)

        def observations(space: spaces.Space[Any]) -> th.Tensor:
            if channels_last and is_image_space(space):
                channels, height, width = _shape(space)
                return steps(height, width, channels, dtype=_dtype(space)).movedim(-1, 2)
            return steps(*_shape(space), dtype=_dtype(space))

        self.observations: Observations
        if isinstance(observation_space, spaces.Dict):
            self.observations = {key: observations(space) for key, space in observation_space.spaces.items()}
        else:
            self.observations = observations(observation_space)
        self.actions = steps(get_action_dim(action_space), dtype=_action_dtype(action_space))
        self.rewards, self.values, self.log_probs = steps(), steps(), steps()
        self.episode_starts, self.advantages, self.returns = steps(), steps(), steps()
        self.action_masks = steps(action_mask_dim, dtype=th.bool) if action_mask_dim else None
        starts = sorted({max(0, start - self.burn_in) for start in range(0, n_steps, seq_len)})
        self._anchors = {step: index for index, step in enumerate(starts)}
        self.states: State = {
            name: th.zeros((len(starts), *leaf.shape), dtype=leaf.dtype, device=self.device)
            for name, leaf in initial_state.items()
        }
        self.pos = 0

    @property
    def full(self) -> bool:
        """Whether all T steps have been added."""
        return self.pos == self.n_steps

    def reset(self) -> None:
        """Start a new rollout at step 0."""
        self.pos = 0

    def add(
        self,
        obs: np.ndarray | dict[str, np.ndarray],
        actions: th.Tensor,
        rewards: np.ndarray | th.Tensor,
        episode_starts: np.ndarray,
        values: th.Tensor,
        log_probs: th.Tensor,
        state: State,
        action_masks: th.Tensor | None = None,
    ) -> None:
        """
        Add one step of all environments.

        :param obs: Observations that the actions were chosen for, (N, ...), or a dictionary of them.
        :param actions: Actions as sampled, (N, ...).
        :param rewards: (N,).
        :param episode_starts: Whether an episode starts with ``obs``, (N,).
        :param values: Value estimates of ``obs``, (N, 1) or (N,).
        :param log_probs: Log-probabilities of the actions, (N,).
        :param state: State *before* the step, as passed to the policy; stored only at anchors.
        :param action_masks: Legal actions, as passed to the policy, bool, (N, M); ``None`` if all are.
        :raises ValueError: if the buffer is full.
        """
        if self.full:
            raise ValueError(f"The rollout buffer already holds its {self.n_steps} steps; call `reset()` first.")
        t = self.pos
        if isinstance(self.observations, dict):
            assert isinstance(obs, dict)
            for key, stored in self.observations.items():
                stored[t] = th.as_tensor(obs[key])
        else:
            self.observations[t] = th.as_tensor(obs)
        self.actions[t] = actions.view(self.n_envs, -1)
        self.rewards[t] = th.as_tensor(rewards)
        self.episode_starts[t] = th.as_tensor(episode_starts)
        self.values[t] = values.view(-1)
        self.log_probs[t] = log_probs
        if self.action_masks is not None:
            self.action_masks[t] = True if action_masks is None else action_masks
        if t in self._anchors:
            for name, leaf in state.items():
                self.states[name][self._anchors[t]] = leaf
        self.pos += 1

    def compute_returns_and_advantage(self, last_values: th.Tensor, dones: np.ndarray) -> None:
        """
        Generalized advantage estimation (Schulman et al. 2015, https://arxiv.org/abs/1506.02438), as in SB3.

        :param last_values: Value estimates of the observations after the last step, (N,) or (N, 1).
        :param dones: Whether the last step ended the episode, (N,).
        """
        last_dones = th.as_tensor(dones, dtype=th.float32, device=self.device)
        next_values = th.cat([self.values[1:], last_values.detach().view(1, -1).to(self.device)])
        goes_on = self.gamma * keep_mask(th.cat([self.episode_starts[1:], last_dones.view(1, -1)]))
        deltas = self.rewards + goes_on * next_values - self.values
        fades = self.gae_lambda * goes_on
        advantage = th.zeros_like(deltas[0])
        for t in reversed(range(self.n_steps)):
            advantage = th.addcmul(deltas[t], fades[t], advantage, out=self.advantages[t])
        th.add(self.advantages, self.values, out=self.returns)

    def sample_sequences(
        self, seq_len: int | None = None, burn_in: int | None = None, batch_size: int | None = None
    ) -> Iterator[SequenceBatch]:
        """
        Iterate over one epoch of minibatches: sequences in random order, each transition once as a training step.

        :param seq_len: The buffer's ``seq_len``, or ``None``; states are stored only for this length.
        :param burn_in: The buffer's ``burn_in``, or ``None``.
        :param batch_size: Transitions in a minibatch, a multiple of ``seq_len``; ``None`` is the whole rollout.
        :return: The minibatches.
        :raises ValueError: for an incomplete rollout, another ``seq_len`` or ``burn_in``, and a ``batch_size`` that is no
            multiple of ``seq_len``.
        """
        burn_in = None if burn_in is None else min(burn_in, self.n_steps - self.seq_len)  # as in the constructor
        for name, wanted, have in (("seq_len", seq_len, self.seq_len), ("burn_in", burn_in, self.burn_in)):
            if wanted is not None and wanted != have:
                raise ValueError(f"States are stored for `{name}`={have}, so `{name}`={wanted} cannot be sampled.")
        return (self._whole_batch(places) for places in self._epoch(batch_size))

    def minibatches(self, batch_size: int | None = None) -> Iterator[TrainingBatch]:
        """
        Iterate over one epoch of minibatches, as :meth:`sample_sequences`, with loss inputs of the training steps only.

        :param batch_size: Transitions in a minibatch, a multiple of ``seq_len``; ``None`` is the whole rollout.
        :return: The minibatches.
        :raises ValueError: for an incomplete rollout, and a ``batch_size`` that is no multiple of ``seq_len``.
        """
        epoch = self._epoch(batch_size)
        moments = [{}] * len(epoch) if self.reduce is None else self._advantage_moments(epoch, self.reduce)
        pairs = zip(epoch, moments, strict=True)
        return (cast(TrainingBatch, self._training_batch(places) | of_all) for places, of_all in pairs)

    def _advantage_moments(self, epoch: list[_Places], reduce: Reduce) -> list[dict[str, th.Tensor]]:
        """:return: Mean and standard deviation of the advantages of each minibatch of all processes, by one reduction."""
        advantages = [self.advantages[places.step[:, self.burn_in :], places.env.unsqueeze(1)].double() for places in epoch]
        counts = th.tensor([float(part.numel()) for part in advantages], dtype=th.float64, device=self.device)
        sums = [th.stack([part.sum() for part in parts]) for parts in (advantages, [part.square() for part in advantages])]
        count, total, squares = reduce(th.cat([counts, *sums])).chunk(3)
        mean = total / count
        std = ((squares - total * mean).clamp(min=0.0) / (count - 1)).sqrt()
        pairs = zip(mean.to(self.advantages.dtype), std.to(self.advantages.dtype), strict=True)
        return [{"advantage_mean": mean, "advantage_std": std} for mean, std in pairs]

    def _epoch(self, batch_size: int | None) -> list[_Places]:
        """:return: The positions of all minibatches, copied to the device together to avoid one copy per minibatch."""
        if not self.full:
            raise ValueError(f"The rollout is not complete: {self.pos} of {self.n_steps} steps.")
        total = self.n_steps * self.n_envs
        batch_size = total if batch_size is None else int(batch_size)
        if batch_size < self.seq_len or batch_size % self.seq_len:
            raise ValueError(f"`batch_size`={batch_size} is not a multiple of `seq_len`={self.seq_len}.")
        places, size = self._places(self._order(total // self.seq_len)), batch_size // self.seq_len
        steps, envs, anchors = (tensor.to(self.device).split(size) for tensor in places[:3])
        lengths = (places.prefix_lens[start : start + size] for start in range(0, total // self.seq_len, size))
        return [_Places(*place) for place in zip(steps, envs, anchors, lengths, strict=True)]

    def _order(self, n_sequences: int) -> th.Tensor:
        """:return: A random order of the sequences."""
        return th.randperm(n_sequences)

    def _places(self, rows: th.Tensor) -> _Places:
        """
        :param rows: Indices of sequences, (B,): sequence ``i`` is number ``i // N`` of environment ``i % N``.
        :return: Their positions, on the CPU.
        """
        start, env = rows // self.n_envs * self.seq_len, rows % self.n_envs
        prefix_lens = start.clamp(max=self.burn_in)
        anchor = th.tensor([self._anchors[step] for step in (start - prefix_lens).tolist()])
        # A shorter burn-in is padded with step 0.
        step = (start.unsqueeze(1) + th.arange(-self.burn_in, self.seq_len)).clamp(min=0)
        return _Places(step, env, anchor, prefix_lens.tolist())

    def _sequences(self, places: _Places) -> Sequences:
        """:return: Inputs of the policy for the sequences at ``places``."""
        obs = self.observations
        sequences: Sequences = {
            "obs": {key: _take(tensor, places) for key, tensor in obs.items()}
            if isinstance(obs, dict)
            else _take(obs, places),
            "actions": _take(self.actions, places),
            "masks": keep_mask(_take(self.episode_starts, places)),
            "state": {name: leaf[places.anchor, places.env] for name, leaf in self.states.items()},
            "prefix_lens": places.prefix_lens,
            "burn_in": self.burn_in,
        }
        if self.action_masks is not None:
            sequences["action_masks"] = _take(self.action_masks, places)
        return sequences

    def _targets(self, places: _Places) -> dict[str, th.Tensor]:
        """:return: Inputs of the losses for the steps at ``places``."""
        targets = {
            "old_values": self.values,
            "old_log_prob": self.log_probs,
            "advantages": self.advantages,
            "returns": self.returns,
        }
        return {name: _take(tensor, places) for name, tensor in targets.items()}

    def _training_batch(self, places: _Places) -> TrainingBatch:
        training = places._replace(step=places.step[:, self.burn_in :])
        return cast(TrainingBatch, self._sequences(places) | self._targets(training))

    def _whole_batch(self, places: _Places) -> SequenceBatch:
        grad_mask = (th.arange(self.burn_in + self.seq_len, device=self.device) >= self.burn_in).float()
        batch = self._sequences(places) | self._targets(places)
        return cast(SequenceBatch, batch | {"grad_mask": grad_mask.expand(len(places.env), -1)})


def _take(tensor: th.Tensor, places: _Places) -> th.Tensor:
    """:return: The steps of a tensor (T, N, ...) at ``places``, (B, steps, ...)."""
    return tensor[places.step, places.env.unsqueeze(1)]


def _shape(space: spaces.Space[Any]) -> tuple[int, ...]:
    assert space.shape is not None, space
    return space.shape


def _action_dtype(space: spaces.Space[Any]) -> th.dtype:
    """:return: The dtype of stored actions."""
    return th.int64 if isinstance(space, (spaces.Discrete, spaces.MultiDiscrete)) else th.float32


def _dtype(space: spaces.Space[Any]) -> th.dtype:
    """:return: The dtype of stored observations: float32 for floats, otherwise that of the space."""
    dtype = np.dtype(space.dtype)
    return th.float32 if dtype.kind == "f" else th.as_tensor(np.zeros(1, dtype)).dtype
