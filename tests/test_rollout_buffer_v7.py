"""``RolloutBufferV7``: each transition is sampled once, at its position, with the state stored during acting."""

import re
import warnings
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from sb3_contrib.common.recurrent.buffers import RecurrentRolloutBuffer
from stable_baselines3.common.buffers import RolloutBuffer

from sb3_cyborg import RolloutBufferV7, Stack, State
from sb3_cyborg.encoders.encoder_v7 import EncoderV7
from sb3_cyborg.memories.memory_v7 import MemoryV7
from sb3_cyborg.memory_ppo.rollout_buffer_v7 import SequenceBatch, plan_minibatches, plan_n_steps
from tests.helpers import ACTION_SPACES, OBSERVATION_SPACES

DISCRETE = spaces.Discrete(7)
PLACE = spaces.Box(-np.inf, np.inf, (3,))  # an observation that encodes its step, environment and rollout

few = settings(max_examples=60, deadline=None)


def toy_state(rows: int) -> State:
    return {"vector": th.zeros(rows, 2), "count": th.zeros(rows), "matrix": th.zeros(rows, 2, 2)}


def make_buffer(n_steps: int, n_envs: int, **kwargs: Any) -> RolloutBufferV7:
    return RolloutBufferV7(n_steps, PLACE, DISCRETE, toy_state(n_envs), n_envs=n_envs, **kwargs)


def fill(buffer: RolloutBufferV7, seed: int = 0, rollout: int = 0) -> dict[str, np.ndarray]:
    """
    Fill a buffer with numbers that encode their step, environment and rollout.

    :return: The added arrays, (T, N, ...); all elements of the state's leaves are ``code``.
    """
    steps, envs = buffer.n_steps, buffer.n_envs
    rng = np.random.default_rng(seed)
    step, env = np.meshgrid(np.arange(steps), np.arange(envs), indexing="ij")
    code = (1e6 * rollout + 100 * step + env + 1).astype(np.float32)
    data: dict[str, np.ndarray] = {
        "place": np.stack([step, env, np.full_like(step, rollout)], axis=-1).astype(np.float32),
        "code": code,
        "actions": rng.integers(0, 7, (steps, envs)),
        "rewards": rng.normal(size=(steps, envs)).astype(np.float32),
        "starts": rng.random((steps, envs)) < 0.3,
        "values": code + 0.25,
        "log_probs": -code,
    }
    buffer.reset()
    for t in range(steps):
        row_code = th.as_tensor(code[t])
        state = {name: leaf + row_code.view(-1, *[1] * (leaf.dim() - 1)) for name, leaf in toy_state(envs).items()}
        buffer.add(
            data["place"][t],
            th.as_tensor(data["actions"][t]),
            data["rewards"][t],
            data["starts"][t],
            th.as_tensor(data["values"][t]).unsqueeze(-1),
            th.as_tensor(data["log_probs"][t]),
            state,
        )
    buffer.compute_returns_and_advantage(th.zeros(envs), np.zeros(envs, dtype=bool))
    return data


# --- advantages ---------------------------------------------------------------------------------------------------------


@few
@given(
    n_steps=st.integers(1, 20),
    n_envs=st.integers(1, 4),
    gamma=st.floats(0, 1),
    gae_lambda=st.floats(0, 1),
    ends=st.floats(0, 1),
    seed=st.integers(0, 10**6),
)
def test_advantages_are_those_of_sb3(
    n_steps: int, n_envs: int, gamma: float, gae_lambda: float, ends: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    box = spaces.Box(-1, 1, (1,))
    theirs = RolloutBuffer(n_steps, box, DISCRETE, "cpu", gae_lambda, gamma, n_envs)
    ours = RolloutBufferV7(n_steps, box, DISCRETE, {}, "cpu", gae_lambda, gamma, n_envs)
    for _ in range(n_steps):
        obs, rewards = np.zeros((n_envs, 1), np.float32), rng.normal(size=n_envs).astype(np.float32)
        starts = (rng.random(n_envs) < ends).astype(np.float32)
        values, log_probs = th.as_tensor(rng.normal(size=(n_envs, 1)).astype(np.float32)), th.zeros(n_envs)
        actions = np.zeros((n_envs, 1), dtype=np.int64)
        theirs.add(obs, actions, rewards, starts, values, log_probs)
        ours.add(obs, th.as_tensor(actions), rewards, starts, values, log_probs, {})
    last_values, dones = th.as_tensor(rng.normal(size=(n_envs, 1)).astype(np.float32)), rng.random(n_envs) < ends
    theirs.compute_returns_and_advantage(last_values, dones)
    ours.compute_returns_and_advantage(last_values, dones)
    np.testing.assert_allclose(ours.advantages.numpy(), theirs.advantages, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(ours.returns.numpy(), theirs.returns, rtol=1e-5, atol=1e-5)


# --- minibatches --------------------------------------------------------------------------------------------------------


@st.composite
def shapes(draw: st.DrawFn) -> dict[str, int]:
    seq_len = draw(st.integers(1, 6))
    return {
        "n_steps": seq_len * draw(st.integers(1, 5)),
        "n_envs": draw(st.integers(1, 4)),
        "seq_len": seq_len,
        "burn_in": draw(st.integers(0, 14)),
        "batch_size": seq_len * draw(st.integers(1, 9)),
        "seed": draw(st.integers(0, 10**6)),
    }


def batches_of(shape: dict[str, int]) -> tuple[RolloutBufferV7, dict[str, np.ndarray], list[SequenceBatch]]:
    buffer = make_buffer(shape["n_steps"], shape["n_envs"], seq_len=shape["seq_len"], burn_in=shape["burn_in"])
    fill(buffer, shape["seed"] + 1, rollout=1)
    data = fill(buffer, shape["seed"], rollout=2)
    th.manual_seed(shape["seed"])
    return buffer, data, list(buffer.sample_sequences(shape["seq_len"], shape["burn_in"], shape["batch_size"]))


@few
@given(shapes())
def test_each_transition_is_sampled_exactly_once_per_epoch(shape: dict[str, int]) -> None:
    _, _, batches = batches_of(shape)
    seen: Counter[tuple[int, int]] = Counter()
    for batch in batches:
        assert isinstance(batch["obs"], th.Tensor)
        trained = batch["obs"][batch["grad_mask"] == 1]
        seen.update((int(step), int(env)) for step, env, _ in trained.tolist())
    assert seen == Counter((t, n) for t in range(shape["n_steps"]) for n in range(shape["n_envs"]))
    sizes = [int(batch["grad_mask"].sum()) for batch in batches]
    assert all(size == shape["batch_size"] for size in sizes[:-1])
    assert sizes[-1] <= shape["batch_size"]


@few
@given(shapes())
def test_every_field_matches_its_step_and_environment(shape: dict[str, int]) -> None:
    buffer, data, batches = batches_of(shape)
    for batch in batches:
        obs = batch["obs"]
        assert isinstance(obs, th.Tensor)
        rows, length = batch["masks"].shape
        assert obs.shape == (rows, length, 3)
        for row in range(rows):
            first = length - shape["seq_len"] - batch["prefix_lens"][row]  # earlier columns are padding
            start, env, _ = map(int, obs[row, first].tolist())
            part = slice(start, start + length - first)
            want = {
                "obs": data["place"][part, env],
                "actions": data["actions"][part, env, None],
                "old_values": data["values"][part, env],
                "old_log_prob": data["log_probs"][part, env],
                "advantages": buffer.advantages[part, env],
                "returns": buffer.returns[part, env],
                "masks": data["starts"][part, env] == 0,
            }
            for name, value in want.items():
                got = batch[name][row, first:]  # type: ignore[literal-required]
                np.testing.assert_array_equal(got, value, err_msg=name)
            for leaf in batch["state"].values():
                assert (leaf[row] == float(data["code"][start, env])).all()


@few
@given(shapes())
def test_the_prefix_ends_at_the_sequence_and_stays_in_the_rollout(shape: dict[str, int]) -> None:
    buffer, data, batches = batches_of(shape)
    burn_in, seq_len = buffer.burn_in, shape["seq_len"]
    assert burn_in == min(shape["burn_in"], shape["n_steps"] - seq_len)
    for batch in batches:
        assert isinstance(batch["obs"], th.Tensor)
        rows = len(batch["obs"])
        assert batch["grad_mask"].tolist() == [[0.0] * burn_in + [1.0] * seq_len] * rows
        starts = batch["obs"][:, burn_in, 0].int().tolist()
        assert batch["prefix_lens"] == [min(start, burn_in) for start in starts]
        assert all(start % seq_len == 0 for start in starts)
        # No step, padding included, belongs to the previous rollout, whose weights were older.
        assert (batch["obs"][..., 2] == 2).all()
        assert all((leaf >= 2e6).all() for leaf in batch["state"].values())
        assert (batch["old_values"] >= 2e6).all()
        assert set(batch["old_log_prob"].flatten().tolist()) <= set(data["log_probs"].flatten().tolist())


def test_epochs_are_shuffled_and_repeat_with_the_seed() -> None:
    buffer = make_buffer(32, 4, seq_len=4)
    fill(buffer)

    def order(seed: int) -> list[float]:
        th.manual_seed(seed)
        (batch,) = buffer.sample_sequences()
        assert isinstance(batch["obs"], th.Tensor)
        return [float(place) for place in (batch["obs"][:, 0, 0] * 4 + batch["obs"][:, 0, 1])]

    assert order(0) == order(0)
    assert order(0) != order(1)
    assert order(0) != sorted(order(0))


def test_the_defaults_are_one_sequence_per_environment_and_one_minibatch() -> None:
    buffer = make_buffer(6, 3)
    fill(buffer)
    (batch,) = buffer.sample_sequences()
    assert batch["masks"].shape == (3, 6)


# --- storage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("burn_in", [0, 3, 4, 6, 100])
def test_states_are_stored_at_anchors_only(burn_in: int) -> None:
    buffer = make_buffer(16, 2, seq_len=4, burn_in=burn_in)
    fill(buffer)
    anchors = sorted({max(0, start - min(burn_in, 12)) for start in (0, 4, 8, 12)})
    assert buffer.states["matrix"].shape == (len(anchors), 2, 2, 2)
    want = th.tensor([[100.0 * t + n + 1 for n in range(2)] for t in anchors])
    assert th.equal(buffer.states["count"], want)


def test_add_copies_its_arguments() -> None:
    buffer = make_buffer(1, 2)
    obs, state = np.ones((2, 3), np.float32), toy_state(2)
    values, log_probs, actions = th.ones(2), th.ones(2), th.ones(2, dtype=th.int64)
    rewards, starts = np.ones(2, np.float32), np.ones(2, dtype=bool)
    buffer.add(obs, actions, rewards, starts, values, log_probs, state)
    for given_tensor in (values, log_probs, actions, *state.values()):
        given_tensor += 5
    obs += 5
    rewards += 5
    assert isinstance(buffer.observations, th.Tensor)
    for stored in (buffer.observations, buffer.actions, buffer.rewards, buffer.values, buffer.log_probs):
        assert (stored == 1).all()
    assert all((leaf == 0).all() for leaf in buffer.states.values())


@pytest.mark.parametrize("observations", OBSERVATION_SPACES)
@pytest.mark.parametrize("actions", ACTION_SPACES)
@pytest.mark.parametrize("channels_last", [False, True])
def test_all_spaces_are_sampled_as_stored(observations: str, actions: str, channels_last: bool) -> None:
    obs_space, action_space = OBSERVATION_SPACES[observations], ACTION_SPACES[actions]
    obs_space.seed(0)
    action_space.seed(0)
    n_steps, n_envs = 4, 3
    buffer = RolloutBufferV7(n_steps, obs_space, action_space, {}, n_envs=n_envs, seq_len=2, channels_last=channels_last)

    def stacked(samples: list[Any]) -> Any:
        if isinstance(samples[0], dict):
            return {key: np.stack([sample[key] for sample in samples]) for key in samples[0]}
        return np.stack(samples)

    added = []
    for t in range(n_steps):
        obs = stacked([obs_space.sample() for _ in range(n_envs)])
        action = np.stack([action_space.sample() for _ in range(n_envs)])
        places = th.arange(n_envs) + 10.0 * t
        zeros = np.zeros(n_envs)
        buffer.add(obs, th.as_tensor(action), zeros, zeros, places, places, {})
        added.append((obs, action))
    for batch in buffer.sample_sequences(batch_size=4):
        for row, column in np.ndindex(*batch["masks"].shape):
            t, n = divmod(int(batch["old_values"][row, column]), 10)
            obs, action = added[t]
            got: Any = batch["obs"]
            for key in obs if isinstance(obs, dict) else [None]:
                tensor, array = (got, obs) if key is None else (got[key], obs[key])
                assert tensor[row, column].numpy().dtype == array.dtype
                np.testing.assert_array_equal(tensor[row, column].numpy(), array[n])
            np.testing.assert_array_equal(batch["actions"][row, column].numpy(), action[n].reshape(-1))
    discrete = isinstance(action_space, (spaces.Discrete, spaces.MultiDiscrete))
    assert buffer.actions.dtype == (th.int64 if discrete else th.float32)


@pytest.mark.parametrize("channels_last", [False, True])
def test_channels_last_sets_the_memory_layout_of_images(channels_last: bool) -> None:
    space = spaces.Dict({"image": spaces.Box(0, 255, (3, 9, 8), np.uint8), "map": spaces.Box(-1, 1, (3, 9, 8))})
    buffer = RolloutBufferV7(4, space, DISCRETE, {}, n_envs=2, seq_len=2, burn_in=1, channels_last=channels_last)
    buffer.pos = 4
    (batch,) = buffer.sample_sequences()
    assert isinstance(batch["obs"], dict)
    assert batch["obs"]["image"].shape == batch["obs"]["map"].shape == (4, 3, 3, 9, 8)
    wanted = th.channels_last if channels_last else th.contiguous_format
    assert batch["obs"]["image"].flatten(0, 1).is_contiguous(memory_format=wanted)
    assert batch["obs"]["map"].is_contiguous(), "only images are stored channels-last"


def test_double_precision_observations_are_stored_in_single() -> None:
    buffer = RolloutBufferV7(1, spaces.Box(-1, 1, (2,), dtype=np.float64), DISCRETE, {})
    zeros = th.zeros(1)
    buffer.add(np.array([[0.1, 0.2]]), zeros.long(), np.zeros(1), np.zeros(1), zeros, zeros, {})
    assert isinstance(buffer.observations, th.Tensor)
    assert buffer.observations.dtype == th.float32
    np.testing.assert_array_equal(buffer.observations[0, 0].numpy(), np.array([0.1, 0.2], np.float32))


def state_bytes(buffer: RolloutBufferV7) -> int:
    return sum(leaf.numel() * leaf.element_size() for leaf in buffer.states.values())


@pytest.mark.parametrize("memory", ["none", "slot", "pmm"])
@pytest.mark.parametrize("encoder", ["gru", "lstm"])
def test_states_take_less_than_a_tenth_of_the_memory_of_sb3_contrib(encoder: str, memory: str) -> None:
    """S834: four float32 arrays at each of 512 steps of 16 environments, 256 wide."""
    n_steps, n_envs, width = 512, 16, 256
    box = spaces.Box(-1, 1, (4,))
    options = {} if memory == "none" else {"memory_dim": width, "num_slots": 16}
    stack = Stack(EncoderV7(4, width, mode=encoder), MemoryV7(width + 4, memory, **options))
    seq_len, _ = plan_minibatches(n_steps, n_envs, None, None)
    ours = RolloutBufferV7(n_steps, box, DISCRETE, stack.get_initial_state(n_envs), n_envs=n_envs, seq_len=seq_len)
    theirs = RecurrentRolloutBuffer(n_steps, box, DISCRETE, (n_steps, 1, n_envs, width), n_envs=n_envs)
    arrays = (theirs.hidden_states_pi, theirs.cell_states_pi, theirs.hidden_states_vf, theirs.cell_states_vf)
    assert state_bytes(ours) < sum(array.nbytes for array in arrays) / 10


# --- misuse -------------------------------------------------------------------------------------------------------------


def test_adding_to_a_full_buffer_and_sampling_an_incomplete_one_are_refused() -> None:
    buffer = make_buffer(3, 1)
    with pytest.raises(ValueError, match="not complete: 0 of 3 steps"):
        buffer.sample_sequences()
    fill(buffer)
    with pytest.raises(ValueError, match=r"already holds its 3 steps.*reset"):
        buffer.add(np.zeros((1, 3)), th.zeros(1), np.zeros(1), np.zeros(1), th.zeros(1), th.zeros(1), toy_state(1))
    fill(buffer)  # resets first
    assert len(list(buffer.sample_sequences())) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 6}, "`batch_size`=6 is not a multiple of `seq_len`=4"),
        ({"batch_size": 2}, "`batch_size`=2 is not a multiple of `seq_len`=4"),
        ({"batch_size": 0}, "`batch_size`=0"),
        ({"seq_len": 2}, "stored for `seq_len`=4, so `seq_len`=2 cannot"),
        ({"burn_in": 1}, "stored for `burn_in`=2, so `burn_in`=1 cannot"),
    ],
)
def test_invalid_sample_sizes_are_refused(arguments: dict[str, int], message: str) -> None:
    buffer = make_buffer(8, 2, seq_len=4, burn_in=2)
    fill(buffer)
    with pytest.raises(ValueError, match=re.escape(message)):
        buffer.sample_sequences(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seq_len": 5}, "`seq_len`=5 does not divide `n_steps`=16; the nearest that do: 4 and 8"),
        ({"seq_len": 0}, "`seq_len` must be a whole number of at least 1, got 0"),
        ({"n_envs": 0}, "`n_envs` must be a whole number of at least 1, got 0"),
        ({"burn_in": -1}, "`burn_in` must be a whole number of at least 0, got -1"),
        ({"burn_in": 1.5}, "`burn_in` must be a whole number of at least 0, got 1.5"),
        ({"burn_in": True}, "`burn_in` must be a whole number of at least 0, got True"),
    ],
)
def test_invalid_buffer_sizes_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        RolloutBufferV7(16, PLACE, DISCRETE, {}, **arguments)


# --- plan_n_steps -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n_envs", "seq_len", "n_steps"),
    [
        (1, None, 2048),
        (4, None, 512),
        (8, None, 256),
        (15, None, 256),
        (16, None, 128),
        (64, None, 128),
        (16, 100, 200),
        (3, 32, 768),
    ],
)
def test_a_default_rollout_has_at_least_2048_transitions(n_envs: int, seq_len: int | None, n_steps: int) -> None:
    assert plan_n_steps(n_envs, seq_len) == n_steps


@given(n_envs=st.integers(1, 100), seq_len=st.none() | st.integers(1, 300))
def test_a_planned_rollout_can_be_cut_into_minibatches(n_envs: int, seq_len: int | None) -> None:
    n_steps = plan_n_steps(n_envs, seq_len)
    assert n_steps >= 128
    assert n_steps * n_envs >= 2048
    assert n_steps % plan_minibatches(n_steps, n_envs, seq_len, None)[0] == 0


# --- plan_minibatches ---------------------------------------------------------------------------------------------------


def plan(n_steps: int, n_envs: int, seq_len: int | None, batch_size: int | None) -> tuple[int, int, list[str]]:
    """:return: Lengths and the warnings that came with them."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lengths = plan_minibatches(n_steps, n_envs, seq_len, batch_size)
    return *lengths, [str(warning.message) for warning in caught]


def assert_works(n_steps: int, n_envs: int, seq_len: int, batch_size: int) -> None:
    total = n_steps * n_envs
    assert n_steps % seq_len == 0
    assert batch_size % seq_len == 0
    assert 2 <= batch_size <= total
    assert total % batch_size != 1, "a last minibatch of one"


@few
@given(n_steps=st.integers(1, 400), n_envs=st.integers(1, 200))
def test_default_sizes_always_work_without_a_warning(n_steps: int, n_envs: int) -> None:
    if n_steps * n_envs < 2:
        n_envs = 2
    seq_len, batch_size, caught = plan(n_steps, n_envs, None, None)
    assert_works(n_steps, n_envs, seq_len, batch_size)
    assert n_steps * n_envs % batch_size == 0, "a minibatch is smaller than the others"
    assert not caught


@few
@given(n_steps=st.integers(1, 400), n_envs=st.integers(1, 40), batch_size=st.integers(2, 600))
def test_an_explicit_batch_size_is_kept_or_adapted_with_a_warning_or_refused_with_one_that_works(
    n_steps: int, n_envs: int, batch_size: int
) -> None:
    if n_steps * n_envs < 2:
        n_envs = 2
    try:
        seq_len, size, caught = plan(n_steps, n_envs, None, batch_size)
    except ValueError as error:
        offending, advice = str(error).split("nearest")
        assert f"`batch_size`={batch_size}" in offending
        for number in map(int, re.findall(r"\d+", advice)):
            _, size, _ = plan(n_steps, n_envs, None, number)
            assert size == number
        return
    assert_works(n_steps, n_envs, seq_len, size)
    exact = size == batch_size and n_steps * n_envs % size == 0
    shortened = batch_size < 16 <= n_steps
    assert len(caught) == (0 if exact else 1) + shortened
    if shortened:
        assert f"`batch_size`={batch_size} leaves sequences of {seq_len}" in caught[0]
    if not exact:
        assert f"mini-batch size of {batch_size}" in caught[-1]


@few
@given(n_steps=st.integers(1, 200), n_envs=st.integers(1, 20), seq_len=st.integers(1, 200), batch_size=st.integers(2, 600))
def test_an_explicit_seq_len_is_kept_or_refused_with_ones_that_work(
    n_steps: int, n_envs: int, seq_len: int, batch_size: int
) -> None:
    if n_steps * n_envs < 2:
        n_envs = 2
    try:
        length, size, _ = plan(n_steps, n_envs, seq_len, batch_size)
    except ValueError as error:
        offending, advice = str(error).split("nearest")
        assert f"`seq_len`={seq_len}" in offending or f"`batch_size`={batch_size}" in offending
        for number in map(int, re.findall(r"\d+", advice)):
            if offending.startswith("`seq_len`"):
                assert plan(n_steps, n_envs, number, None)[0] == number
            else:
                assert plan(n_steps, n_envs, seq_len, number)[0] == seq_len
        return
    assert length == seq_len
    assert_works(n_steps, n_envs, length, size)
    assert size == batch_size or n_steps * n_envs < batch_size


@pytest.mark.parametrize(
    ("n_steps", "n_envs", "batch_size", "want"),
    [
        (16, 1, None, (16, 16)),  # RecurrentPPO's small settings: the default is larger than the rollout
        (128, 1, None, (64, 128)),
        (128, 8, None, (64, 256)),  # a quarter of the rollout
        (512, 16, None, (128, 1024)),  # long sequences, where there are at least 8 in a minibatch
        (128, 64, None, (128, 1024)),
        (128, 64, 512, (64, 512)),
        (2048, 1, 64, (64, 64)),  # PPO's defaults
        (127, 1, None, (127, 127)),  # a prime has no other divisor in the range
        (16, 11, None, (16, 176)),  # a prime number of environments: one minibatch instead of 11
        (1, 131, None, (1, 131)),
        (100, 1, 20, (20, 20)),
    ],
)
def test_planned_lengths_by_hand(n_steps: int, n_envs: int, batch_size: int | None, want: tuple[int, int]) -> None:
    assert plan(n_steps, n_envs, None, batch_size) == (*want, [])


@pytest.mark.parametrize(
    ("n_steps", "n_envs", "batch_size", "want", "message"),
    [
        (16, 1, 128, (16, 16), "mini-batch size of 128, but .* 16` transitions in sequences of 16: mini-batches of 16"),
        (128, 1, 100, (64, 64), "mini-batch size of 100, but .* mini-batches of 64 are used"),
        (128, 3, 256, (64, 256), "after every 1 mini-batches there will be one of 128. We recommend"),
    ],
)
def test_warnings_are_like_those_of_sb3(
    n_steps: int, n_envs: int, batch_size: int, want: tuple[int, int], message: str
) -> None:
    *lengths, caught = plan(n_steps, n_envs, None, batch_size)
    assert tuple(lengths) == want
    assert len(caught) == 1
    assert re.search(message, caught[0])
