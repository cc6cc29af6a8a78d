"""``RolloutBufferV7``: a rollout of ``T`` steps in ``N`` environments, and the states that training starts from."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple, TypedDict, cast

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.preprocessing import get_action_dim, is_image_space

from sb3_cyborg.checks import check_divides, check_positive, check_whole, divisors, warn_caller
from sb3_cyborg.sequence_model import State, keep_mask

Observations = th.Tensor | dict[str, th.Tensor]

TARGET_SEQ_LEN, LONG_SEQ_LEN, MIN_ROWS = 64, 128, 8
"""
Sequences are at most 64 steps long where the user does not say, if ``n_steps`` has such a divisor, and at most 128 where
minibatches hold 8 of those. What a memory stored before the sequence has no gradient: longer ones learn sooner, and forget
less as the encoder changes. With fewer rows the steps of a loop cost as much and do less.
"""
SHORT_SEQ_LEN = 16
"""They are at least this long; if ``n_steps`` has no such divisor, the next longer one."""
MIN_BATCH_SIZE, MAX_BATCH_SIZE = 128, 1024
"""Minibatches are at least and at most this large where the user does not say."""
MINIBATCHES = 4
"""How many minibatches a rollout is cut into where the user does not say."""
MIN_STEPS, MIN_ROLLOUT = 128, 2048
"""Steps of each environment, and of all together, that a rollout has at least where the user does not say."""


class Sequences(TypedDict):
    """Sequences with their burn-in, as the policy evaluates them: B sequences of L steps behind a prefix of P steps."""

    obs: Observations  # (B, P + L, ...)
    actions: th.Tensor  # (B, P + L, A)
    masks: th.Tensor  # keep-mask, bool, (B, P + L): false where an episode starts
    state: State  # at the first step of each row's prefix
    prefix_lens: list[int]  # of each row: how many of the P steps are real; the padding comes first
    burn_in: int  # P


class TrainingBatch(Sequences):
    """A minibatch: what only losses read is of the L training steps alone."""

    old_values: th.Tensor  # (B, L), as the others below
    old_log_prob: th.Tensor
    advantages: th.Tensor
    returns: th.Tensor


class SequenceBatch(Sequences):
    """A minibatch with all columns of the burn-in, too."""

    old_values: th.Tensor  # (B, P + L), as the others below
    old_log_prob: th.Tensor
    advantages: th.Tensor
    returns: th.Tensor
    grad_mask: th.Tensor  # 0 burn-in, 1 training


class _Places(NamedTuple):
    """Where in the rollout some sequences are."""

    step: th.Tensor  # (B, P + L)
    env: th.Tensor  # (B,)
    anchor: th.Tensor  # index of the stored state, (B,)
    prefix_lens: list[int]


def plan_n_steps(n_envs: int, seq_len: int | None) -> int:
    """
    :param n_envs: Environments.
    :param seq_len: Wanted length of a sequence, or ``None``.
    :return: Steps of each environment in a rollout where the user does not say: 128, or as many times that as few
        environments need for 2048 steps together, which is SB3's PPO for one. ``seq_len`` divides it.
    """
    check_positive(n_envs=n_envs)
    if seq_len is not None:
        check_positive(seq_len=seq_len)
    unit = MIN_STEPS if seq_len is None else math.ceil(MIN_STEPS / seq_len) * seq_len
    return unit * math.ceil(MIN_ROLLOUT / (unit * n_envs))


def plan_minibatches(n_steps: int, n_envs: int, seq_len: int | None, batch_size: int | None) -> tuple[int, int]:
    """
    Find lengths that divide. What the user left open adapts; what cannot work is refused.

    :param n_steps: Steps of a rollout in each environment.
    :param n_envs: Environments.
    :param seq_len: Wanted length of a sequence, or ``None``.
    :param batch_size: Wanted transitions in a minibatch, or ``None``.
    :return: ``seq_len``, which divides ``n_steps``, and ``batch_size``, a multiple of it, at least 2.
    :raises ValueError: for numbers that cannot work, with the nearest that do.
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
        if batch_size is not None and batch_size % seq_len:
            below = max(batch_size // seq_len, 1) * seq_len
            raise ValueError(
                f"`batch_size`={batch_size} is not a multiple of `seq_len`={seq_len}; the nearest that are: "
                f"{below} and {below + seq_len}."
            )
    wanted = min(max(MIN_BATCH_SIZE, total // MINIBATCHES), MAX_BATCH_SIZE) if batch_size is None else batch_size
    if seq_len is None:
        longest = LONG_SEQ_LEN if min(wanted, total) >= MIN_ROWS * LONG_SEQ_LEN else TARGET_SEQ_LEN
        seq_len = _fitting_seq_len(n_steps, batch_size, longest)
        if batch_size is not None and batch_size < SHORT_SEQ_LEN <= n_steps:
            warn_caller(
                f"`batch_size`={batch_size} leaves sequences of {seq_len} steps, too few to learn what to remember: use a "
                f"`batch_size` of at least {SHORT_SEQ_LEN}, or give `seq_len`."
            )
    rows = max(1, min(wanted, total) // seq_len)
    fewest = 2 if seq_len == 1 else 1
    if batch_size is None:
        # As many sequences as divide them all, so that no minibatch is smaller than the rest; the nearest in ratio.
        fitting = [divisor for divisor in divisors(total // seq_len) if divisor >= fewest]
        rows = min(fitting, key=lambda divisor: max(divisor / rows, rows / divisor))
    rows = max(rows, fewest)
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
    return int(seq_len), int(rows * seq_len)  # numpy's whole numbers are welcome, too


def check_burn_in(burn_in: int, n_steps: int) -> None:
    """
    Refuse a burn-in that no sequence of a rollout has room for.

    :param burn_in: Steps before each sequence that are replayed without gradient, >= 0.
    :param n_steps: Steps of each environment in a rollout.
    :raises ValueError: for a ``burn_in`` that is no whole number of at least 0, or not less than ``n_steps``.
    """
    check_whole(0, burn_in=burn_in)
    if 0 < burn_in >= n_steps:
        raise ValueError(f"`burn_in`={burn_in} must be less than `n_steps`={n_steps}: it replays steps of the same rollout.")


def _fitting_seq_len(n_steps: int, batch_size: int | None, longest: int) -> int:
    """:return: A divisor of ``n_steps`` that is long enough to learn from and, if possible, divides ``batch_size``."""
    longest = min(longest, batch_size or longest)
    fitting = [length for length in divisors(n_steps) if length <= longest]
    if fitting[-1] < min(SHORT_SEQ_LEN, longest):
        return min((length for length in divisors(n_steps) if length > fitting[-1]), default=fitting[-1])
    # One that the batch size is a multiple of, unless that would cut sequences to less than half.
    exact = [length for length in fitting if (batch_size or 0) % length == 0]
    return exact[-1] if 2 * exact[-1] >= fitting[-1] else fitting[-1]


def _refuse_single(total: int, seq_len: int, rows: int) -> None:
    if total % (rows * seq_len) == 1:
        size = rows * seq_len
        good = [candidate for candidate in range(2, total + 1) if candidate % seq_len == 0 and total % candidate != 1]
        nearest = sorted(good, key=lambda candidate: abs(candidate - size))[:2]
        raise ValueError(
            f"`batch_size`={size} leaves a last minibatch of one transition out of {total}, which has no advantage to "
            f"normalize; the nearest that work: {' and '.join(map(str, sorted(nearest)))}."
        )


class RolloutBufferV7:
    """
    A rollout as torch tensors, ``[T, N, ...]``, allocated once, for Box, Dict, discrete and image observations alike.

    It keeps the states the agent acted with, but only where a sequence begins: every ``seq_len`` steps, or
    ``burn_in`` steps before. A sequence near the start of the rollout has a shorter burn-in: what came before was
    acted with older weights.

    :param n_steps: T.
    :param observation_space: Observation space.
    :param action_space: Action space.
    :param initial_state: A state of N rows; the structure of those that will be stored.
    :param device: Where the tensors live.
    :param gae_lambda: λ of generalized advantage estimation.
    :param gamma: Discount factor.
    :param n_envs: N.
    :param seq_len: L, length of a training sequence; divides ``n_steps``; ``None`` is all of it.
    :param burn_in: P, steps before each sequence that are replayed without gradient.
    :param channels_last: Images (C, H, W) lie in memory as (H, W, C), as environments make them; shapes are the same.
    :raises ValueError: for sizes that cannot work.
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
    ) -> None:
        seq_len = n_steps if seq_len is None else seq_len
        check_positive(n_steps=n_steps, n_envs=n_envs, seq_len=seq_len)
        check_divides("seq_len", seq_len, "n_steps", n_steps)
        check_whole(0, burn_in=burn_in)
        self.n_steps, self.n_envs, self.seq_len = n_steps, n_envs, seq_len = int(n_steps), int(n_envs), int(seq_len)
        # No sequence has more steps before it than this; more would be padding for all of them.
        self.burn_in = min(int(burn_in), n_steps - seq_len)
        self.gae_lambda, self.gamma = gae_lambda, gamma
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
        discrete = isinstance(action_space, (spaces.Discrete, spaces.MultiDiscrete))
        self.actions = steps(get_action_dim(action_space), dtype=th.int64 if discrete else th.float32)
        self.rewards, self.values, self.log_probs = steps(), steps(), steps()
        self.episode_starts, self.advantages, self.returns = steps(), steps(), steps()
        starts = sorted({max(0, start - self.burn_in) for start in range(0, n_steps, seq_len)})
        self._anchors = {step: index for index, step in enumerate(starts)}
        self.states: State = {
            name: th.zeros((len(starts), *leaf.shape), dtype=leaf.dtype, device=self.device)
            for name, leaf in initial_state.items()
        }
        self.pos = 0

    @property
    def full(self) -> bool:
        """Whether all steps were added."""
        return self.pos == self.n_steps

    def reset(self) -> None:
        """Begin a new rollout."""
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
    ) -> None:
        """
        Add one step of all environments.

        :param obs: Observations that were acted on, (N, ...).
        :param actions: Actions as sampled, (N, ...).
        :param rewards: (N,).
        :param episode_starts: Whether an episode starts with ``obs``, (N,).
        :param values: Value estimates of ``obs``, (N, 1) or (N,).
        :param log_probs: Log-probabilities of the actions, (N,).
        :param state: The state *before* the step, as it was passed to the policy; kept only at anchors.
        :raises ValueError: when the buffer is full.
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
        if t in self._anchors:
            for name, leaf in state.items():
                self.states[name][self._anchors[t]] = leaf
        self.pos += 1

    def compute_returns_and_advantage(self, last_values: th.Tensor, dones: np.ndarray) -> None:
        """
        Generalized advantage estimation (Schulman et al. 2015, https://arxiv.org/abs/1506.02438), as in SB3.

        :param last_values: Value of the observation after the last step, (N,) or (N, 1).
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
        One epoch: every transition once, in random order of sequences.

        :param seq_len: What the buffer was made for, or ``None``: only there are states kept.
        :param burn_in: Likewise.
        :param batch_size: Transitions in a minibatch, a multiple of ``seq_len``; ``None`` is all of them.
        :return: The minibatches.
        :raises ValueError: for a rollout that is not complete, and for sizes that cannot work.
        """
        burn_in = None if burn_in is None else min(burn_in, self.n_steps - self.seq_len)  # as when it was made
        for name, wanted, have in (("seq_len", seq_len, self.seq_len), ("burn_in", burn_in, self.burn_in)):
            if wanted is not None and wanted != have:
                raise ValueError(f"States were kept for `{name}`={have}, so `{name}`={wanted} cannot be sampled.")
        return (self._whole_batch(places) for places in self._epoch(batch_size))

    def minibatches(self, batch_size: int | None = None) -> Iterator[TrainingBatch]:
        """
        :func:`sample_sequences` for the update, without the columns that nothing reads.

        :param batch_size: Transitions in a minibatch, a multiple of ``seq_len``; ``None`` is all of them.
        :return: The minibatches.
        :raises ValueError: for a rollout that is not complete, and for sizes that cannot work.
        """
        return (self._training_batch(places) for places in self._epoch(batch_size))

    def _epoch(self, batch_size: int | None) -> list[_Places]:
        """:return: The places of all minibatches. They go to the device at once, so that no minibatch waits for it."""
        if not self.full:
            raise ValueError(f"The rollout is not complete: {self.pos} of {self.n_steps} steps.")
        total = self.n_steps * self.n_envs
        batch_size = total if batch_size is None else int(batch_size)
        if batch_size < self.seq_len or batch_size % self.seq_len:
            raise ValueError(f"`batch_size`={batch_size} is not a multiple of `seq_len`={self.seq_len}.")
        places, size = self._places(th.randperm(total // self.seq_len)), batch_size // self.seq_len
        steps, envs, anchors = (tensor.to(self.device).split(size) for tensor in places[:3])
        lengths = (places.prefix_lens[start : start + size] for start in range(0, total // self.seq_len, size))
        return [_Places(*place) for place in zip(steps, envs, anchors, lengths, strict=True)]

    def _places(self, rows: th.Tensor) -> _Places:
        """
        :param rows: Sequences, (B,): sequence ``i`` is the ``i // N``-th of environment ``i % N``.
        :return: Their places, on the CPU.
        """
        start, env = rows // self.n_envs * self.seq_len, rows % self.n_envs
        prefix_lens = start.clamp(max=self.burn_in)
        anchor = th.tensor([self._anchors[step] for step in (start - prefix_lens).tolist()])
        # A prefix that is shorter than the others is padded with step 0.
        step = (start.unsqueeze(1) + th.arange(-self.burn_in, self.seq_len)).clamp(min=0)
        return _Places(step, env, anchor, prefix_lens.tolist())

    def _sequences(self, places: _Places) -> Sequences:
        """:return: What the policy reads of the sequences at ``places``."""
        obs = self.observations
        return {
            "obs": {key: _take(tensor, places) for key, tensor in obs.items()}
            if isinstance(obs, dict)
            else _take(obs, places),
            "actions": _take(self.actions, places),
            "masks": keep_mask(_take(self.episode_starts, places)),
            "state": {name: leaf[places.anchor, places.env] for name, leaf in self.states.items()},
            "prefix_lens": places.prefix_lens,
            "burn_in": self.burn_in,
        }

    def _targets(self, places: _Places) -> dict[str, th.Tensor]:
        """:return: What losses read of the steps at ``places``."""
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
    """:return: Of a tensor (T, N, ...), the steps at ``places``, (B, steps, ...)."""
    return tensor[places.step, places.env.unsqueeze(1)]


def _shape(space: spaces.Space[Any]) -> tuple[int, ...]:
    assert space.shape is not None, space
    return space.shape


def _dtype(space: spaces.Space[Any]) -> th.dtype:
    """:return: How to store observations: as they are, but floats as float32, which is what networks read."""
    dtype = np.dtype(space.dtype)
    return th.float32 if dtype.kind == "f" else th.as_tensor(np.zeros(1, dtype)).dtype
