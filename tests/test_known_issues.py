"""
Known issues of recurrent policies, with one regression test each.

C, S: issues of sb3-contrib and stable-baselines3. Some are tested elsewhere: that the ratio is one with several
environments on later rollouts (C290) in ``test_ratio.py``; time and environment swapped (C111), minibatches that are not of
``batch_size`` (C155, C285) and the size of stored states (S834) in ``test_rollout_buffer_v7.py``.
"""

import copy
import re
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.vec_env import DummyVecEnv
from torch import nn

from sb3_cyborg import MemoryPPO, SequenceModel, State, register_memory
from sb3_cyborg.memories.memory_v7 import MEMORIES
from sb3_cyborg.memories.none import NoMemory
from sb3_cyborg.memory_ppo import losses
from sb3_cyborg.memory_ppo.rollout_buffer_v7 import TrainingBatch
from sb3_cyborg.sequence_model import Logs
from tests.helpers import (
    ACTION_SPACES,
    DropoutBatchNorm,
    ModeRecorder,
    ToyEnv,
    assert_exact_ratios,
    predict,
    record_updates,
    rollout,
    same,
    toy_model,
    toy_vec_env,
    weights,
)


def minibatch_loss(
    model: MemoryPPO, batch: TrainingBatch, clip_range_vf: float | None = None
) -> tuple[th.Tensor, dict[str, list[th.Tensor]]]:
    """:return: The loss of a minibatch and its statistics."""
    model.policy.set_training_mode(True)
    stats: dict[str, list[th.Tensor]] = defaultdict(list)
    loss = model._minibatch_loss(batch, model._loss_terms(0.2, clip_range_vf), 0.2, stats)
    return loss, stats


def assert_same_loss(model: MemoryPPO, clean: TrainingBatch, poisoned: TrainingBatch) -> None:
    """Assert that loss, gradients and statistics of both batches are equal and finite."""
    results = []
    for batch in (clean, poisoned):
        loss, stats = minibatch_loss(model, batch, clip_range_vf=0.5)
        found = th.autograd.grad(loss, list(model.policy.parameters()), allow_unused=True)
        results.append((loss, stats, [gradient for gradient in found if gradient is not None]))
    (loss, stats, wanted), (other_loss, other_stats, got) = results
    assert loss.isfinite()
    assert th.equal(loss, other_loss)
    assert stats.keys() == other_stats.keys()
    assert all(th.equal(*pair) for name in stats for pair in zip(stats[name], other_stats[name], strict=True))
    assert all(th.equal(*pair) for pair in zip(wanted, got, strict=True))


def whole_batch(model: MemoryPPO) -> TrainingBatch:
    (batch,) = model.rollout_buffer.minibatches()
    return batch


def poison(tensor: th.Tensor, where: th.Tensor) -> th.Tensor:
    """:return: The tensor with NaN, an invalid action, or an inverted bool, where ``where`` is true."""
    if tensor.dtype == th.bool:
        return tensor ^ where
    bad = float("nan") if tensor.is_floating_point() else -(10**6)
    return th.where(where.view(*where.shape, *[1] * (tensor.dim() - where.dim())), bad, tensor)


# --- minibatches --------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:You have specified a mini-batch size")
@pytest.mark.parametrize(("n_steps", "n_envs", "batch_size"), [(1, 3, 2), (7, 1, 3), (7, 1, 2), (5, 5, 8)])
def test_a_last_minibatch_of_one_sample_is_refused(n_steps: int, n_envs: int, batch_size: int) -> None:
    """Its normalized advantage, and then the weights, would be NaN (S440). The sizes that the error names work."""
    kwargs: dict[str, Any] = {"n_steps": n_steps, "seq_len": 1}
    with pytest.raises(ValueError, match=f"`batch_size`={batch_size} leaves a last minibatch of one transition") as error:
        toy_model(toy_vec_env(n_envs), batch_size=batch_size, **kwargs)
    works = [int(number) for number in re.findall(r"\d+", str(error.value).split("nearest")[1])]
    assert works
    for good in works:
        model = toy_model(toy_vec_env(n_envs), batch_size=good, **kwargs)
        updates = record_updates(model)
        model.learn(2 * n_steps * n_envs)
        assert_exact_ratios(updates, 2)
        assert all(tensor.isfinite().all() for tensor in weights(model.policy).values())


@pytest.mark.parametrize("actions", ["discrete", "box"])
def test_losses_and_statistics_exclude_burn_in(actions: str) -> None:
    """Nor do normalized advantages (C75); loss inputs of burn-in steps may have any value."""
    env = toy_vec_env(make=lambda: ToyEnv(action_space=ACTION_SPACES[actions]))
    model = rollout(toy_model(env, burn_in=3, use_last_action=True))
    buffer = model.rollout_buffer
    places = buffer._places(th.tensor([4]))  # the second sequence of the second environment
    clean = buffer._training_batch(places)
    assert places.prefix_lens == [3]
    burn_in = th.zeros(buffer.n_steps, buffer.n_envs, dtype=th.bool)
    burn_in[buffer.seq_len - 3 : buffer.seq_len, 1] = True
    for name in ("advantages", "returns", "values", "log_probs"):
        setattr(buffer, name, poison(getattr(buffer, name), burn_in))
    assert_same_loss(model, clean, buffer._training_batch(places))


@pytest.mark.parametrize("actions", ["discrete", "box"])
@pytest.mark.parametrize("memory", ["ring", "slot", "pmm", "kv"])
def test_padding_has_no_effect(memory: str, actions: str) -> None:
    """A burn-in that would begin before the rollout is shorter, and its padding is never used (C75)."""
    env = toy_vec_env(make=lambda: ToyEnv(action_space=ACTION_SPACES[actions]))
    model = rollout(toy_model(env, burn_in=6, use_last_action=True, policy_kwargs={"memory": memory}))
    clean = whole_batch(model)
    padding = th.arange(clean["masks"].shape[1]) < 6 - th.tensor(clean["prefix_lens"]).unsqueeze(1)
    assert padding.any(dim=1).sum() == 6  # of three environments, the first and the second sequence
    poisoned: Any = copy.copy(clean)
    for name in ("obs", "actions", "masks"):
        poisoned[name] = poison(poisoned[name], padding)
    assert_same_loss(model, clean, poisoned)


def test_running_statistics_exclude_burn_in() -> None:
    """The burn-in runs in evaluation mode as acting does, so modules with statistics of their own are not updated (C75)."""
    model = rollout(toy_model(burn_in=3, policy_kwargs={"features_extractor_class": ModeRecorder}))
    extractor = model.policy.features_extractor
    assert isinstance(extractor, ModeRecorder)
    extractor.modes.clear()
    minibatch_loss(model, whole_batch(model))
    assert extractor.modes == [False, True]
    assert extractor.updates == 1
    assert model.policy.training


def test_resets_do_not_cause_a_loop_over_steps_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """In sb3-contrib, any episode start in a minibatch causes a loop over its steps (C113, C118)."""
    model = rollout(toy_model())
    assert model.rollout_buffer.episode_starts[1:].any()
    batch = whole_batch(model)

    def refuse(*_: Any) -> None:
        raise AssertionError("training stepped")

    for module in model.policy.core.modules():
        monkeypatch.setattr(module, "forward_step", refuse, raising=False)
    minibatch_loss(model, batch)
    model.policy._recorded_step = None  # a recording does not call the modules
    with pytest.raises(AssertionError, match="training stepped"):
        predict(model, np.zeros((3, 3), np.float32))


# --- states -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", ["ring", "slot", "pmm", "kv"])
@pytest.mark.parametrize("encoder", ["gru", "lstm"])
def test_the_stored_state_at_an_episode_start_has_no_effect(encoder: str, memory: str) -> None:
    """It belongs to the previous episode and is masked; even a NaN in it has no effect."""
    env = toy_vec_env(make=lambda: ToyEnv(mean_length=2))
    policy_kwargs = {"encoder": encoder, "memory": memory}
    model = rollout(toy_model(env, n_steps=24, use_last_action=True, policy_kwargs=policy_kwargs))
    buffer = model.rollout_buffer
    clean = buffer._training_batch(buffer._places(th.arange(18)))  # in order: the first three are of step 0
    starts = ~clean["masks"][:, 0]
    assert starts[3:].any(), "no episode started at an anchor after the first: the test shows nothing"
    assert any(leaf[3:][starts[3:]].any() for leaf in clean["state"].values())
    poisoned = copy.copy(clean)
    poisoned["state"] = {name: poison(leaf, starts) for name, leaf in clean["state"].items()}
    assert_same_loss(model, clean, poisoned)


def test_predict_returns_the_state_of_actor_and_critic() -> None:
    """sb3-contrib returns only the actor's state (C117)."""
    model = rollout(toy_model())
    buffer = model.rollout_buffer
    assert isinstance(buffer.observations, th.Tensor)
    state: dict[str, np.ndarray] = {name: leaf.numpy() for name, leaf in model.policy.get_initial_state(3).items()}
    for t in range(buffer.n_steps):
        obs, starts = buffer.observations[t], buffer.episode_starts[t]
        with th.no_grad():
            tensors = {name: th.as_tensor(leaf) for name, leaf in state.items()}
            values = model.policy.predict_values(obs, tensors, starts)
        th.testing.assert_close(values.flatten(), buffer.values[t], atol=1e-6, rtol=0)
        _, state = predict(model, obs.numpy(), state, starts.numpy())


class FixedLengthEnv(gym.Env[Any, Any]):
    """The observation is the step, the reward its square; the episode is truncated or terminated at a given step."""

    observation_space = spaces.Box(-1, 100, (1,))
    action_space = spaces.Discrete(3)

    def __init__(self, length: int, truncate: bool) -> None:
        self.length, self.truncate = length, truncate
        self.time = 0

    def observe(self) -> np.ndarray:
        return np.array([self.time / 10], np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.time = 0
        return self.observe(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.time += 1
        ended = self.time == self.length
        return self.observe(), float(self.time**2), ended and not self.truncate, ended and self.truncate, {}


EPISODE_ENDS = [(4, False), (4, True), (3, True), (4, True), (100, True)]
"""Length of the episodes of each environment, and whether they are truncated; some end at the same step."""


def fixed_length_model(**kwargs: Any) -> MemoryPPO:
    env = DummyVecEnv([partial(FixedLengthEnv, *end) for end in EPISODE_ENDS])
    return rollout(toy_model(env, n_steps=8, batch_size=20, gamma=0.9, **kwargs))


def post_step_states(model: MemoryPPO) -> list[State]:
    """:return: The state after each step, replayed; with the action that was taken, where the policy reads it."""
    buffer, policy = model.rollout_buffer, model.policy
    assert isinstance(buffer.observations, th.Tensor)
    state, states = policy.get_initial_state(buffer.n_envs), []
    with th.no_grad():
        for t in range(buffer.n_steps):
            _, state = policy.get_distribution(buffer.observations[t], state, buffer.episode_starts[t])
            if policy.use_last_action:
                state = state | {"last_action": nn.functional.one_hot(buffer.actions[t].flatten(), 3).float()}
            states.append(state)
    return states


@pytest.mark.parametrize("memory", ["ring", "slot", "pmm"])
@pytest.mark.parametrize("use_last_action", [False, True])
@pytest.mark.parametrize("use_time", [False, True])
def test_timeouts_bootstrap_from_the_terminal_observation(memory: str, use_last_action: bool, use_time: bool) -> None:
    """The bootstrap uses the state after the last step, and changes no state (S633)."""
    model = fixed_length_model(use_last_action=use_last_action, policy_kwargs={"memory": memory, "use_time": use_time})
    buffer, states = model.rollout_buffer, post_step_states(model)
    for n, (length, truncate) in enumerate(EPISODE_ENDS):
        for t in range(buffer.n_steps):
            time = t % length + 1
            want = float(time**2)
            if time == length and truncate:
                row = {name: leaf[n : n + 1] for name, leaf in states[t].items()}
                with th.no_grad():
                    value = model.policy.predict_values(th.tensor([[time / 10]]), row, th.zeros(1))
                assert abs(value.item()) > 1e-3, "the bootstrap value is too small for the test"
                want += 0.9 * value.item()
            assert buffer.rewards[t, n].item() == pytest.approx(want, abs=1e-5), (t, n)
    for name, leaf in model._last_state.items():
        th.testing.assert_close(leaf, states[-1][name], atol=1e-6, rtol=0)


def test_terminations_and_truncations_both_end_the_advantage() -> None:
    """Advantages do not cross the end of an episode; after a truncation, the value is added to the reward."""
    buffer = fixed_length_model(gae_lambda=0.8).rollout_buffer
    for n, (length, truncate) in enumerate(EPISODE_ENDS[:-1]):
        t = length - 1
        assert buffer.returns[t, n].item() == pytest.approx(buffer.rewards[t, n].item(), abs=1e-5)
        assert (buffer.rewards[t, n].item() == float(length**2)) != truncate
        delta = buffer.rewards[t - 1, n] + 0.9 * buffer.values[t, n] - buffer.values[t - 1, n]
        want = delta + 0.9 * 0.8 * buffer.advantages[t, n]
        assert buffer.advantages[t - 1, n].item() == pytest.approx(want.item(), abs=1e-5)


def test_predict_values_does_not_change_the_state() -> None:
    """Values of a terminal observation, or of the one after the rollout, change no memory (S633)."""
    model = fixed_length_model(policy_kwargs={"memory": "pmm"})
    state = model._last_state
    before = {name: leaf.clone() for name, leaf in state.items()}
    infos = [{"TimeLimit.truncated": True, "terminal_observation": np.ones(1, np.float32)}] * len(EPISODE_ENDS)
    rewards = th.zeros(len(EPISODE_ENDS))
    assert model._add_truncation_bootstrap(rewards, infos, np.ones(len(EPISODE_ENDS), dtype=bool), state).all()
    assert not rewards.any()
    assert same(before, state)


@pytest.mark.parametrize("n_envs", [2, 8, 1])
def test_a_model_trained_with_four_environments_runs_with_others(tmp_path: Path, n_envs: int) -> None:
    """Stored and current states have one row per environment."""
    model = toy_model(toy_vec_env(4), burn_in=2, batch_size=None).learn(48)
    model.save(tmp_path / "model")
    loaded = MemoryPPO.load(tmp_path / "model", env=toy_vec_env(n_envs), device="cpu")
    assert same(weights(model.policy), weights(loaded.policy))
    updates = record_updates(loaded)
    loaded.learn(2 * 12 * n_envs)
    assert_exact_ratios(updates, 2)
    assert loaded.rollout_buffer.n_envs == n_envs
    assert not same(weights(model.policy), weights(loaded.policy))
    action, _ = predict(loaded, np.zeros((n_envs + 1, 3), np.float32))
    assert action.shape == (n_envs + 1,)


def test_a_loaded_model_continues_within_an_episode(tmp_path: Path) -> None:
    """Without a reset, training continues in the current episodes from initial states, and the ratio is 1."""
    model = toy_model().learn(36)
    assert model.env is not None
    model.save(tmp_path / "model")
    loaded = MemoryPPO.load(tmp_path / "model", env=model.env, device="cpu", force_reset=False)
    updates = record_updates(loaded)
    loaded.learn(36, reset_num_timesteps=False)
    assert_exact_ratios(updates)


# --- the core -----------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:shared_lstm")
@pytest.mark.parametrize("policy_kwargs", [{}, {"shared_lstm": True, "enable_critic_lstm": False}])
def test_actor_and_critic_both_train_the_core(policy_kwargs: dict[str, Any]) -> None:
    """``shared_lstm`` of sb3-contrib detaches the critic's gradient from the core."""
    model = rollout(toy_model(policy_kwargs=policy_kwargs))
    model.policy.set_training_mode(True)
    values, log_prob, *_ = model.policy.evaluate_sequences(whole_batch(model))
    core = dict(model.policy.core.named_parameters())
    for output in (values, log_prob):
        gradients = th.autograd.grad(output.square().sum(), list(core.values()), retain_graph=True)
        for name, gradient in zip(core, gradients, strict=True):
            assert gradient.any(), f"{name} learns nothing"


class DropoutMemory(NoMemory):
    """A memory with dropout in a layer of the given kind."""

    def __init__(self, input_dim: int, layer: str = "module", p: float = 0.1) -> None:
        super().__init__(input_dim)
        layers: dict[str, nn.Module] = {
            "module": nn.Sequential(nn.Linear(2, 2), nn.Dropout(p)),
            "lstm": nn.LSTM(2, 2, num_layers=2, dropout=p),
            "attention": nn.MultiheadAttention(2, 1, dropout=p),
            "transformer": nn.TransformerEncoderLayer(2, 1, 2, dropout=p),
        }
        self.inner = layers[layer]


@pytest.fixture
def dropping() -> Any:
    register_memory("dropping", DropoutMemory)
    yield
    del MEMORIES["dropping"]


@pytest.mark.usefixtures("dropping")
@pytest.mark.parametrize("layer", ["module", "lstm", "attention", "transformer"])
def test_dropout_in_the_core_is_refused(layer: str) -> None:
    """Only training would apply dropout: the ratio would be wrong by 7e-3."""
    kwargs = {"memory": "dropping", "memory_kwargs": {"layer": layer}}
    with pytest.raises(ValueError, match=r"Dropout \(core.memory.memory.inner.*p=0.1\).*use p=0"):
        toy_model(policy_kwargs=kwargs)
    toy_model(policy_kwargs=kwargs | {"memory_kwargs": {"layer": layer, "p": 0.0}})


class FrozenBatchNorm(DropoutBatchNorm):
    """The same layers, kept in evaluation mode."""

    def train(self, mode: bool = True) -> "FrozenBatchNorm":
        super().train(False)
        return self


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"BatchNorm1d \(features_extractor.batch_norm\) .*use LayerNorm"),
        ({"batch_norm": False}, r"Dropout \(features_extractor.dropout, p=0.5\).*use p=0"),
    ],
)
def test_dropout_and_batch_normalization_in_a_features_extractor_are_refused(options: dict[str, Any], message: str) -> None:
    """The ratio would be wrong by 0.005 to 0.06; SB3 and sb3-contrib accept them."""
    kwargs = {"features_extractor_class": DropoutBatchNorm, "features_extractor_kwargs": options}
    with pytest.raises(ValueError, match=message):
        toy_model(policy_kwargs=kwargs)


@pytest.mark.parametrize(
    ("extractor", "options"), [(FrozenBatchNorm, {}), (DropoutBatchNorm, {"dropout": 0.0, "batch_norm": False})]
)
def test_layers_that_stay_in_evaluation_mode_are_accepted(extractor: type, options: dict[str, Any]) -> None:
    model = toy_model(policy_kwargs={"features_extractor_class": extractor, "features_extractor_kwargs": options})
    updates = record_updates(model)
    model.learn(2 * 36)
    assert_exact_ratios(updates, 2)


class HeadDropout(nn.Dropout):
    """Dropout as an activation of the heads."""


@pytest.mark.parametrize("activation", [HeadDropout, nn.RReLU])
def test_random_activations_of_the_heads_are_refused(activation: type[nn.Module]) -> None:
    with pytest.raises(ValueError, match=r"(Dropout|RReLU) \(mlp_extractor.policy_net.1"):
        toy_model(policy_kwargs={"activation_fn": activation})


# --- the update ---------------------------------------------------------------------------------------------------------


def test_value_clipping_takes_the_larger_loss() -> None:
    """The loss is the larger of the clipped and the unclipped one; sb3-contrib uses only the clipped one."""
    model = rollout(toy_model())
    batch = whole_batch(model)
    with th.no_grad():
        values = model.policy.evaluate_sequences(batch)[0]
    generator = th.Generator().manual_seed(0)
    batch["old_values"] = values + th.randn(values.shape, generator=generator)
    batch["returns"] = values + th.randn(values.shape, generator=generator)
    clip = 0.3
    clipped = batch["old_values"] + (values - batch["old_values"]).clamp(-clip, clip)
    both = th.stack([(values - batch["returns"]) ** 2, (clipped - batch["returns"]) ** 2])
    _, stats = minibatch_loss(model, batch, clip)
    assert stats["train/value_loss"][-1].item() == pytest.approx(both.max(0).values.mean().item(), rel=1e-5)
    assert stats["train/value_loss"][-1] > 1.05 * both[1].mean(), "sb3-contrib's loss would pass as well"


def recorded_kls(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    kls: list[float] = []
    real = losses.approximate_kl

    def recorded(log_ratio: th.Tensor) -> th.Tensor:
        kl = real(log_ratio)
        kls.append(kl.item())
        return kl

    monkeypatch.setattr(losses, "approximate_kl", recorded)
    return kls


def test_approx_kl_is_logged_over_all_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    """sb3-contrib logs only the last epoch's."""
    kls = recorded_kls(monkeypatch)
    model = toy_model(n_epochs=3, learning_rate=0.01)
    updates = record_updates(model)
    model.learn(36)
    assert len(kls) == 3 * 3
    assert updates[0]["train/approx_kl"] == pytest.approx(np.mean(kls), rel=1e-5)
    assert np.mean(kls[-3:]) > 1.2 * np.mean(kls), "the last epoch's would pass as well"


def count_steps(model: MemoryPPO) -> list[int]:
    steps: list[int] = []
    step = model.policy.optimizer.step

    def counted(*args: Any, **kwargs: Any) -> Any:
        steps.append(1)
        return step(*args, **kwargs)

    setattr(model.policy.optimizer, "step", counted)  # noqa: B010
    return steps


@pytest.mark.parametrize(
    ("batch_size", "target_kl", "evaluated", "n_updates"),
    [
        (36, 1e-9, 2, 1),  # one minibatch an epoch: the second epoch makes no step, so it is no update
        (12, 1e-9, 2, 1),  # the second minibatch of the first epoch
        (12, 1e9, 12, 4),
        (12, None, 12, 4),
    ],
)
def test_updates_are_counted_right_after_a_kl_stop(
    monkeypatch: pytest.MonkeyPatch, batch_size: int, target_kl: float | None, evaluated: int, n_updates: int
) -> None:
    """The stop precedes the step, and only epochs with a step are counted (C325, S1229)."""
    kls = recorded_kls(monkeypatch)
    model = toy_model(n_epochs=4, batch_size=batch_size, target_kl=target_kl, learning_rate=0.01)
    updates, steps = record_updates(model), count_steps(model)
    model.learn(36)
    stopped = target_kl == 1e-9
    assert len(kls) == evaluated
    assert len(steps) == evaluated - stopped
    assert (kls[-1] > 1.5e-9) or not stopped
    assert updates[0]["train/n_updates"] == n_updates


def test_a_kl_stop_is_printed_if_verbose(capsys: pytest.CaptureFixture[str]) -> None:
    """With SB3's message, and only with ``verbose>=1``."""
    for verbose in (0, 1):
        model = toy_model(target_kl=1e-9, learning_rate=0.01, verbose=verbose)
        capsys.readouterr()
        rollout(model)
        model.train()
        assert ("Early stopping at step 0 due to reaching max kl" in capsys.readouterr().out) == bool(verbose)


def test_continuous_actions_are_clipped_in_their_shape_and_stored_unclipped() -> None:
    """sb3-contrib clipped after flattening (C318)."""
    low = np.array([[-1, -0.5, 0], [-0.1, -2, -3]], np.float32)
    high = low + np.array([[1, 0.2, 3], [0.2, 4, 1]], np.float32)
    vec_env: Any = toy_vec_env(make=lambda: ToyEnv(action_space=spaces.Box(low, high)))
    model = rollout(toy_model(vec_env))
    stored = model.rollout_buffer.actions.numpy()
    assert stored.shape == (12, 3, 6)
    for n, env in enumerate(vec_env.envs):
        got, sampled = np.stack(env.actions), stored[:, n].reshape(-1, 2, 3)
        np.testing.assert_array_equal(got, np.clip(sampled, low, high))
        assert (got != sampled).any()
    # The probability is that of the sample, so the ratio stays one.
    updates = record_updates(model)
    model.learn(36)
    assert_exact_ratios(updates)


def test_current_states_are_not_used_in_a_new_environment() -> None:
    """The current states belong to episodes of the old environment; those of the new one start from the initial state."""
    model = toy_model().learn(36)
    old = {name: leaf.clone() for name, leaf in model._last_state.items()}
    assert any(leaf.any() for leaf in old.values())
    model.set_env(toy_vec_env(seed=7))
    updates = record_updates(model)
    model.learn(36, reset_num_timesteps=False)
    assert_exact_ratios(updates)
    assert model.rollout_buffer.episode_starts[0].all()
    model._last_state = {name: th.full_like(leaf, float("nan")) for name, leaf in old.items()}
    model.set_env(toy_vec_env(seed=8))
    model.learn(36, reset_num_timesteps=False)
    assert_exact_ratios(updates, 2)
    assert all(tensor.isfinite().all() for tensor in weights(model.policy).values())


class AuxiliaryLoss(NoMemory):
    """A memory with an auxiliary loss, which the algorithm weights, and logs detached."""

    def forward_sequence(self, x: th.Tensor, state: State, masks: th.Tensor | None = None) -> tuple[th.Tensor, State, Logs]:
        read, state, _ = super().forward_sequence(x, state, masks)
        return read, state, {"aux_loss": x.square().mean(), "loudness": x.detach().abs().mean()}


def test_burn_in_has_no_auxiliary_loss() -> None:
    """Burn-in steps do not contribute to the memory's auxiliary loss (C75)."""
    register_memory("auxiliary", AuxiliaryLoss)
    try:
        model = rollout(toy_model(burn_in=3, policy_kwargs={"memory": "auxiliary", "memory_kwargs": {}}))
    finally:
        del MEMORIES["auxiliary"]
    batch = whole_batch(model)
    seen: list[int] = []
    memory = model.policy.core.parts["memory"]
    assert isinstance(memory, SequenceModel)
    real = memory.forward_sequence

    def recorded(x: th.Tensor, state: State, masks: th.Tensor | None = None) -> tuple[th.Tensor, State, Logs]:
        output, state, logs = real(x, state, masks)
        seen.append(x.shape[1] if logs["aux_loss"].requires_grad else 0)
        return output, state, logs

    setattr(memory, "forward_sequence", recorded)  # noqa: B010
    _, stats = minibatch_loss(model, batch)
    assert seen == [0, 4]
    assert len(stats["train/memory_loss"]) == len(stats["memory/loudness"]) == 1
