"""
``MaskableMemoryPPO``: acting and training use the same masks, and all terms are those of the distribution over legal actions.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from sb3_contrib.common.maskable.distributions import make_masked_proba_distribution
from stable_baselines3.common.distributions import Distribution, make_proba_distribution
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecFrameStack, VecNormalize

from sb3_cyborg import MaskableMemoryPPO, MemoryPPO, make_memory_vec_env
from sb3_cyborg.envs.memory_chain import MemoryChainEnv, MemoryChainVecEnv
from sb3_cyborg.memory_ppo import policies
from sb3_cyborg.memory_ppo.action_masks import check_action_masks, component_sizes, mask_distribution
from sb3_cyborg.memory_ppo.losses import log_barrier_loss
from sb3_cyborg.memory_ppo.policies import MemoryActorCriticPolicy
from sb3_cyborg.memory_ppo.rollout_buffer_v7 import RolloutBufferV7, TrainingBatch
from sb3_cyborg.sequence_model import select_only
from tests.device_waits import DeviceWaits
from tests.helpers import (
    OBSERVATION_SPACES,
    RATIO_TOLERANCE,
    VECTOR,
    assert_exact_ratios,
    encoder_options,
    record_updates,
    rollout,
    same,
    small,
    stacks,
    weights,
)
from tests.mask_helpers import MASKABLE_SPACES, MaskedToyEnv, masked_model, masked_vec_env

UPDATES = 3


def random_masks(rows: int, space: spaces.Space[Any]) -> np.ndarray:
    env = MaskedToyEnv(VECTOR, space)
    env.reset(seed=0)
    masks = []
    for _ in range(rows):
        env._draw()
        masks.append(env.mask)
    return np.stack(masks)


# --- the masked distribution ------------------------------------------------------------------------------------------


def raw_logits(space: spaces.Space[Any], rows: int) -> tuple[th.Tensor, th.Tensor]:
    """:return: Logits of SB3's distribution, and those of sb3-contrib's for the same policy, two for each binary action."""
    if isinstance(space, spaces.MultiBinary):
        ours = 3 * th.randn(rows, space.shape[0])
        return ours, th.stack([th.zeros_like(ours), ours], dim=-1).flatten(1)
    ours = 3 * th.randn(rows, sum(component_sizes(space)))
    return ours, ours


@pytest.mark.parametrize("name", MASKABLE_SPACES)
def test_the_masked_distribution_equals_that_of_sb3_contrib(name: str) -> None:
    space = MASKABLE_SPACES[name]
    masks = th.as_tensor(random_masks(64, space))
    ours, theirs = raw_logits(space, 64)
    distribution: Any = mask_distribution(make_proba_distribution(space).proba_distribution(ours), masks)
    reference: Any = make_masked_proba_distribution(space).proba_distribution(theirs)
    reference.apply_masking(masks)
    actions = distribution.sample()
    th.testing.assert_close(distribution.log_prob(actions), reference.log_prob(actions))
    th.testing.assert_close(distribution.entropy(), reference.entropy())
    th.testing.assert_close(distribution.mode().float(), reference.mode().float())


@pytest.mark.parametrize("name", MASKABLE_SPACES)
def test_illegal_actions_have_probability_zero_and_no_gradient(name: str) -> None:
    space = MASKABLE_SPACES[name]
    masks = th.as_tensor(random_masks(64, space))
    logits = raw_logits(space, 64)[0].requires_grad_()
    distribution: Any = mask_distribution(make_proba_distribution(space).proba_distribution(logits), masks)
    starts = np.cumsum([0, *component_sizes(space)[:-1]])
    for _ in range(50):
        actions = distribution.sample().reshape(64, -1).long()
        assert masks.gather(1, actions + th.as_tensor(starts)).all()
    loss = (
        distribution.entropy().sum() + distribution.log_prob(distribution.mode()).sum() + log_barrier_loss(distribution, masks)
    )
    loss.backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    if isinstance(space, spaces.Discrete):
        assert logits.grad[~masks].abs().max() < 1e-6


def test_a_single_legal_action_is_certain() -> None:
    masks = th.eye(3, dtype=th.bool)
    distribution: Any = mask_distribution(
        make_proba_distribution(spaces.Discrete(3)).proba_distribution(th.randn(3, 3)), masks
    )
    assert th.equal(distribution.distribution.probs, th.eye(3))
    assert (distribution.entropy() == 0).all()


def test_other_distributions_are_refused() -> None:
    distribution = make_proba_distribution(spaces.Box(-1, 1, (2,)))
    with pytest.raises(ValueError, match="discrete actions, got DiagGaussianDistribution"):
        mask_distribution(distribution, th.ones(1, 2, dtype=th.bool))


# --- the log barrier --------------------------------------------------------------------------------------------------


def test_log_barrier_of_legal_actions_by_hand() -> None:
    logits = th.tensor([[math.log(1.0), math.log(3.0), 5.0]])
    masks = th.tensor([[True, True, False]])
    distribution = mask_distribution(make_proba_distribution(spaces.Discrete(3)).proba_distribution(logits), masks)
    expected = -(math.log(0.25) + math.log(0.75)) / 2 - math.log(2)
    assert log_barrier_loss(distribution, masks).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", MASKABLE_SPACES)
def test_log_barrier_is_zero_for_a_uniform_policy_over_legal_actions(name: str) -> None:
    space = MASKABLE_SPACES[name]
    masks = th.as_tensor(random_masks(32, space))
    logits = th.zeros_like(raw_logits(space, 32)[0])
    distribution = mask_distribution(make_proba_distribution(space).proba_distribution(logits), masks)
    assert log_barrier_loss(distribution, masks).abs().item() < 1e-6
    assert log_barrier_loss(distribution).abs().item() > 1


@pytest.mark.parametrize("name", MASKABLE_SPACES)
def test_log_barrier_with_all_actions_legal_is_that_without_masks(name: str) -> None:
    space = MASKABLE_SPACES[name]
    distribution = make_proba_distribution(space).proba_distribution(raw_logits(space, 32)[0])
    masks = th.ones(32, sum(component_sizes(space)), dtype=th.bool)
    th.testing.assert_close(log_barrier_loss(distribution, masks), log_barrier_loss(distribution))


# --- checks of masks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("masks", "space", "message"),
    [
        ([[1, 1, 1], [0, 0, 0]], spaces.Discrete(3), "mask of environment 1 after 7 steps has no legal action:"),
        ([[1, 1, 0, 0, 0]], spaces.MultiDiscrete([2, 3]), "no legal action for component 1 of MultiDiscrete"),
        ([[1, 1], [1, 1]], spaces.Discrete(3), r"3 entries for each of 2 environments.* got 2 of shape \(2,\)"),
        ([[1, 1, 1], [1, 1]], spaces.Discrete(3), r"got 2 of shape \(2,\) or \(3,\)"),
        ([None], spaces.Discrete(3), r"got 1 of shape \(\)"),
        (1, spaces.Discrete(3), r"got 1 of shape \(\)"),
        ([[1, 1]], spaces.Box(-1, 1, (2,)), "MemoryPPO supports it without masks"),
    ],
)
def test_bad_masks_are_refused(masks: Any, space: spaces.Space[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_action_masks(masks, len(masks) if isinstance(masks, list) else 1, space, "after 7 steps")


def test_masks_may_be_nested_lists_of_numbers() -> None:
    legal = check_action_masks([[[0, 1], [1.0, 1.0]]], 1, spaces.MultiBinary(2), "")
    assert legal.dtype == bool
    assert legal.tolist() == [[False, True, True, True]]


class DeadEndEnv(MaskedToyEnv):
    """The fourth step of an episode has no legal action."""

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        self.time = 0
        return super().reset(**kwargs)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.time += 1
        return super().step(action)

    def action_masks(self) -> np.ndarray:
        return self.mask & (self.time < 3)


def test_a_mask_without_a_legal_action_names_environment_and_step() -> None:
    env = DummyVecEnv([MaskedToyEnv, lambda: DeadEndEnv(mean_length=100)])
    model = masked_model(env, batch_size=8)
    before = weights(model.policy)
    with pytest.raises(ValueError, match="mask of environment 1 after 6 steps has no legal action"):
        model.learn(100)
    assert same(before, weights(model.policy))


# --- acting and training use the same masks ---------------------------------------------------------------------------


def ratio_errors(encoder: str, memory: str, burn_in: int, action_space: str = "discrete", **kwargs: Any) -> list[float]:
    """:return: The largest |ratio - 1| of the first minibatch of each update; the minibatch is the whole rollout."""
    memory_kwargs = {} if memory == "none" else {"num_slots": 5, "num_heads": 2}
    n_steps, n_envs = 24, 4
    model = masked_model(
        masked_vec_env(n_envs, action_space=MASKABLE_SPACES[action_space], mean_length=9),
        n_steps=n_steps,
        batch_size=n_steps * n_envs,
        seq_len=6,
        burn_in=burn_in,
        learning_rate=3e-3,
        log_barrier_coef=0.01,
        policy_kwargs={
            "encoder": encoder,
            "memory": memory,
            "encoder_kwargs": encoder_options(encoder),
            "memory_kwargs": memory_kwargs,
        },
        **kwargs,
    )
    updates = record_updates(model)
    model.learn(UPDATES * n_steps * n_envs, log_interval=100)
    assert len(updates) == UPDATES
    assert all(np.isfinite(update["train/loss"]) for update in updates)
    return [float(update["train/ratio_error"]) for update in updates]


@pytest.mark.parametrize("burn_in", [0, 9])
@stacks()
def test_ratio_is_one_with_masks(encoder: str, memory: str, burn_in: int) -> None:
    errors = ratio_errors(encoder, memory, burn_in)
    assert errors[-1] <= RATIO_TOLERANCE, errors


@pytest.mark.parametrize("burn_in", [0, 9])
@pytest.mark.parametrize("action_space", MASKABLE_SPACES)
def test_ratio_is_one_with_masks_and_the_last_action(action_space: str, burn_in: int) -> None:
    errors = ratio_errors("gru", "ring", burn_in, action_space, use_last_action=True)
    assert max(errors) <= RATIO_TOLERANCE, errors


@pytest.mark.parametrize("name", ["image", "dict"])
def test_ratio_is_one_with_images_and_dictionaries(name: str) -> None:
    policy = {"image": "CnnPolicy", "dict": "MultiInputPolicy"}[name]
    model = masked_model(masked_vec_env(observation_space=OBSERVATION_SPACES[name]), policy, use_last_action=True, burn_in=3)
    updates = record_updates(model)
    model.learn(UPDATES * 36)
    assert_exact_ratios(updates, at_least=UPDATES)


def test_the_buffer_stores_the_masks_of_each_step() -> None:
    model = rollout(masked_model())
    env = model.get_env()
    assert env is not None
    stored = model.rollout_buffer.action_masks
    assert stored is not None
    assert not stored.all()
    for index, masks in enumerate(env.get_attr("masks")):
        assert np.array_equal(stored[:, index].numpy(), np.stack(masks))


def _store(change: Callable[[list[th.Tensor]], th.Tensor]) -> Callable[[pytest.MonkeyPatch], None]:
    """:return: Plants a fault: the buffer stores what ``change`` makes of the masks of all steps so far."""

    def plant(monkeypatch: pytest.MonkeyPatch) -> None:
        add: Callable[..., None] = RolloutBufferV7.add
        seen: list[th.Tensor] = []

        def faulty(self: RolloutBufferV7, *args: Any, action_masks: th.Tensor) -> None:
            seen.append(action_masks)
            add(self, *args, action_masks=change(seen))

        monkeypatch.setattr(RolloutBufferV7, "add", faulty)

    return plant


FAULTS = {
    "the step before": _store(lambda seen: seen[max(0, len(seen) - 2)]),
    "another environment": _store(lambda seen: seen[-1].roll(1, dims=0)),
    "none": _store(lambda seen: th.ones_like(seen[-1])),
}


@pytest.mark.parametrize("action_space", MASKABLE_SPACES)
@pytest.mark.parametrize("fault", FAULTS)
def test_other_masks_in_training_change_the_ratio(monkeypatch: pytest.MonkeyPatch, fault: str, action_space: str) -> None:
    FAULTS[fault](monkeypatch)
    assert ratio_errors("gru", "ring", 9, action_space)[-1] > 10 * RATIO_TOLERANCE


def test_masks_of_another_row_of_a_minibatch_change_the_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    minibatches = RolloutBufferV7.minibatches

    def faulty(self: RolloutBufferV7, batch_size: int | None = None) -> Iterator[TrainingBatch]:
        for batch in minibatches(self, batch_size):
            batch["action_masks"] = batch["action_masks"].roll(1, dims=0)
            yield batch

    monkeypatch.setattr(RolloutBufferV7, "minibatches", faulty)
    assert ratio_errors("gru", "ring", 9)[-1] > 10 * RATIO_TOLERANCE


@pytest.mark.parametrize("fault", ["the step before", "another environment"])
def test_other_masks_in_acting_give_illegal_actions(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    read = MaskableMemoryPPO._action_masks
    seen: list[th.Tensor] = []

    def faulty(self: MaskableMemoryPPO, env: VecEnv) -> th.Tensor | None:
        masks = read(self, env)
        assert masks is not None
        seen.append(masks)
        return seen[max(0, len(seen) - 2)] if fault == "the step before" else masks.roll(1, dims=0)

    monkeypatch.setattr(MaskableMemoryPPO, "_action_masks", faulty)
    with pytest.raises(AssertionError, match="illegal action"):
        rollout(masked_model())


# --- the terms of the objective ---------------------------------------------------------------------------------------


def evaluation_errors(action_space: str) -> tuple[float, float]:
    """:return: Largest errors of log-probability and entropy in a minibatch, against sb3-contrib's distribution."""
    space = MASKABLE_SPACES[action_space]
    model = masked_model(masked_vec_env(action_space=space))
    model.learn(72)  # a policy that is no longer uniform
    batch = next(model.rollout_buffer.minibatches())
    logits: list[th.Tensor] = []
    hook = model.policy.action_net.register_forward_hook(lambda _module, _inputs, output: logits.append(output.detach()))
    with th.no_grad():
        evaluation = model.policy.evaluate_sequences(batch)
    hook.remove()
    theirs = (
        th.stack([th.zeros_like(logits[0]), logits[0]], dim=-1).flatten(1) if action_space == "multi_binary" else logits[0]
    )
    reference: Any = make_masked_proba_distribution(space).proba_distribution(theirs)
    reference.apply_masking(batch["action_masks"].flatten(0, 1))
    actions = batch["actions"].flatten(0, 1)
    expected = reference.log_prob(actions.squeeze(-1))
    assert evaluation.entropy is not None
    errors = (evaluation.log_prob.flatten() - expected, evaluation.entropy.flatten() - reference.entropy())
    return float(errors[0].abs().max()), float(errors[1].abs().max())


@pytest.mark.parametrize("action_space", MASKABLE_SPACES)
def test_log_probability_and_entropy_are_those_of_sb3_contrib(action_space: str) -> None:
    assert max(evaluation_errors(action_space)) < 1e-5


@pytest.mark.parametrize("action_space", MASKABLE_SPACES)
def test_the_entropy_of_the_unmasked_distribution_is_found(monkeypatch: pytest.MonkeyPatch, action_space: str) -> None:
    evaluate, mask = vars(policies)["evaluate_categorical"], vars(policies)["mask_distribution"]
    unmasked: list[Any] = []

    def faulty_evaluate(logits: th.Tensor, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        uniform = th.where(logits > -1e7, logits, 0.0)
        log_prob, entropy = evaluate(logits, actions)[0], evaluate(uniform, actions)[1]
        return log_prob, entropy

    def faulty_mask(distribution: Distribution, masks: th.Tensor) -> Distribution:
        unmasked.append(type(distribution).entropy(distribution))
        masked: Distribution = mask(distribution, masks)
        monkeypatch.setattr(masked, "entropy", lambda: unmasked[-1])
        return masked

    monkeypatch.setattr(policies, "evaluate_categorical", faulty_evaluate)
    monkeypatch.setattr(policies, "mask_distribution", faulty_mask)
    log_prob_error, entropy_error = evaluation_errors(action_space)
    assert log_prob_error < 1e-5
    assert entropy_error > 0.1


def test_logged_entropy_and_log_barrier_are_those_of_legal_actions() -> None:
    """The first minibatch of a policy with equal logits: the entropy is the mean of ``log(number of legal actions)``."""
    model = masked_model(log_barrier_coef=0.1, n_epochs=1, batch_size=36)
    weight = model.policy.action_net.weight
    assert isinstance(weight, th.Tensor)
    with th.no_grad():
        weight.zero_()
    updates = record_updates(model)
    model.learn(36)
    masks = model.rollout_buffer.action_masks
    assert masks is not None
    expected = masks.sum(-1).float().log().mean().item()
    assert expected < math.log(5) - 0.1
    assert updates[0]["train/entropy_loss"] == pytest.approx(-expected, abs=1e-5)
    assert updates[0]["train/log_barrier_loss"] == pytest.approx(0, abs=1e-5)


def test_masks_that_allow_all_actions_change_nothing() -> None:
    class AllLegal(MaskedToyEnv):
        def _draw(self) -> None:
            self.np_random.random()
            self.mask = np.ones(5, dtype=bool)

    env = [DummyVecEnv([AllLegal] * 3) for _ in range(3)]
    for envs in env:
        envs.seed(0)
    settings: dict[str, Any] = {"n_steps": 12, "batch_size": 12, "seq_len": 4, "seed": 0, "device": "cpu"}
    plain = MemoryPPO("MlpPolicy", env[0], policy_kwargs=small(), **settings).learn(72)
    masked = MaskableMemoryPPO("MlpPolicy", env[1], policy_kwargs=small(), **settings).learn(72)
    without = MaskableMemoryPPO("MlpPolicy", env[2], policy_kwargs=small(), **settings).learn(72, use_masking=False)
    assert same(weights(plain.policy), weights(masked.policy))
    assert same(weights(plain.policy), weights(without.policy))


# --- SB3's interface --------------------------------------------------------------------------------------------------


def test_box_actions_are_refused_with_a_hint() -> None:
    with pytest.raises(ValueError, match=r"got Box.*use MemoryPPO"):
        MaskableMemoryPPO("MlpPolicy", "Pendulum-v1")


def test_environments_without_masks_are_refused() -> None:
    model = MaskableMemoryPPO("MlpPolicy", "CartPole-v1", n_steps=32)
    with pytest.raises(ValueError, match=r"does not support action masking. Consider using ActionMasker wrapper"):
        model.learn(32)
    assert model.learn(32, use_masking=False).num_timesteps == 32


def test_without_masks_illegal_actions_are_taken() -> None:
    with pytest.raises(AssertionError, match="illegal action"):
        masked_model().learn(36, use_masking=False)


def test_masks_are_used_again_after_a_call_without_them() -> None:
    model = masked_model()
    with pytest.raises(AssertionError, match="illegal action"):
        model.learn(36, use_masking=False)
    assert model.learn(36).num_timesteps == 36


@pytest.mark.parametrize("action_space", MASKABLE_SPACES)
@pytest.mark.parametrize("deterministic", [False, True])
def test_predict_takes_legal_actions(deterministic: bool, action_space: str) -> None:
    space = MASKABLE_SPACES[action_space]
    model = masked_model(masked_vec_env(action_space=space))
    starts = np.cumsum([0, *component_sizes(space)[:-1]])
    state = None
    for _ in range(10):
        obs, masks = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32), random_masks(8, space)
        actions, state = model.predict(obs, state, None, deterministic, action_masks=masks)
        assert np.take_along_axis(masks, starts + actions.reshape(8, -1).astype(int), axis=1).all()


def test_predict_of_one_observation_takes_one_mask() -> None:
    model = masked_model()
    for legal in range(5):
        action, state = model.predict(np.zeros(3, np.float32), action_masks=np.arange(5) == legal)
        assert action.shape == ()
        assert action == legal
        assert all(len(leaf) == 1 for leaf in state.values())


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        (np.ones((2, 4)), r"in `predict` must have 5 entries for each of 3 environments"),
        (np.zeros((3, 5)), "environment 0 in `predict` has no legal action"),
    ],
)
def test_bad_masks_of_predict_are_refused(masks: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        masked_model().predict(np.zeros((3, 3), np.float32), action_masks=masks)


class WithoutTheFirstAction(MemoryActorCriticPolicy):
    """A user's policy that overrides SB3's hook for the distribution."""

    def _get_action_dist_from_latent(self, latent_pi: th.Tensor) -> Distribution:
        forbidden = th.tensor([-20.0, 0.0, 0.0, 0.0, 0.0])
        return self.action_dist.proba_distribution(action_logits=self.action_net(latent_pi) + forbidden)


def test_an_overridden_distribution_is_masked() -> None:
    model = masked_model(policy=WithoutTheFirstAction)
    updates = record_updates(model)
    model.learn(UPDATES * 36)
    assert_exact_ratios(updates, at_least=UPDATES)


def test_get_distribution_is_masked() -> None:
    policy = masked_model().policy
    masks = th.tensor([[True, False, False, True, False]])
    distribution: Any = policy.get_distribution(th.zeros(1, 3), policy.get_initial_state(1), th.ones(1), masks)[0]
    assert (distribution.distribution.probs[~masks] == 0).all()


def test_save_and_load(tmp_path: Path) -> None:
    model = masked_model(use_last_action=True)
    model.learn(36)
    model.save(tmp_path / "model")
    loaded = MaskableMemoryPPO.load(tmp_path / "model", env=masked_vec_env(), device="cpu")
    assert same(weights(model.policy), weights(loaded.policy))
    obs, masks = np.ones((3, 3), np.float32), random_masks(3, MASKABLE_SPACES["discrete"])
    actions = [m.predict(obs, deterministic=True, action_masks=masks)[0] for m in (model, loaded)]
    assert np.array_equal(actions[0], actions[1])
    updates = record_updates(loaded)
    loaded.learn(36, reset_num_timesteps=False)
    assert_exact_ratios(updates)


def test_files_of_one_class_load_as_the_other(tmp_path: Path) -> None:
    model = masked_model()
    model.save(tmp_path / "masked")
    plain = MemoryPPO.load(tmp_path / "masked", device="cpu")
    assert same(weights(model.policy), weights(plain.policy))
    plain.save(tmp_path / "plain")
    again = MaskableMemoryPPO.load(tmp_path / "plain", env=masked_vec_env(), device="cpu")
    assert again.learn(36).num_timesteps == 36


# --- vectorized environments ------------------------------------------------------------------------------------------


class MaskedChainEnv(MemoryChainEnv):
    """A native environment with masks: while the time is odd, action 1 is illegal."""

    def action_masks(self) -> np.ndarray:
        return np.array([True, self.timestep % 2 == 0])


class MaskedChainVecEnv(MemoryChainVecEnv):
    def __init__(self, n_envs: int) -> None:
        super().__init__(n_envs, memory_length=3)
        self._env = self._chain = MaskedChainEnv(memory_length=3)


VEC_ENVS: dict[str, Callable[[], VecEnv]] = {
    "dummy": lambda: make_memory_vec_env(MaskedToyEnv, 2, seed=0, vec_env="dummy"),
    "subproc": lambda: make_memory_vec_env(MaskedToyEnv, 2, seed=0, vec_env="subproc"),
    "native": lambda: MaskedChainVecEnv(2),
    "normalized": lambda: VecNormalize(masked_vec_env(2)),
    "stacked": lambda: VecFrameStack(masked_vec_env(2), 3),
}


@pytest.mark.parametrize("name", VEC_ENVS)
def test_ratio_is_one_in_vectorized_environments(name: str) -> None:
    env = VEC_ENVS[name]()
    model = masked_model(env, n_steps=12, batch_size=12)
    updates = record_updates(model)
    model.learn(UPDATES * 24)
    assert_exact_ratios(updates, at_least=UPDATES)
    masks = model.rollout_buffer.action_masks
    assert masks is not None
    assert not masks.all()
    env.close()


def test_masks_of_a_wrapped_environment() -> None:
    class Wrapped(gym.Wrapper[Any, Any, Any, Any]):
        pass

    model = masked_model(DummyVecEnv([lambda: Wrapped(MaskedToyEnv())] * 2), batch_size=8)
    assert model.learn(24).num_timesteps == 24


# --- the select-only form ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("action_space", MASKABLE_SPACES)
def test_masked_minibatches_do_not_wait_for_the_device(action_space: str) -> None:
    with select_only():
        model = rollout(
            masked_model(masked_vec_env(action_space=MASKABLE_SPACES[action_space]), burn_in=3, log_barrier_coef=0.01)
        )
        model.policy.set_training_mode(True)
        batches, terms = model.rollout_buffer.minibatches(model.batch_size), model._loss_terms(0.2, 0.2)
        stats: dict[str, list[th.Tensor]] = defaultdict(list)
        with DeviceWaits() as waits:
            for batch in batches:
                model._step(model._minibatch_loss(batch, terms, 0.2, stats), list(model.policy.parameters()))
    assert not waits.found


@pytest.mark.parametrize("action_space", MASKABLE_SPACES)
def test_a_step_of_acting_with_masks_waits_only_for_its_actions(action_space: str) -> None:
    found = []
    with select_only():
        for n_steps in (12, 24):
            model = masked_model(masked_vec_env(action_space=MASKABLE_SPACES[action_space]), n_steps=n_steps)
            _, callback = model._setup_learn(model.n_steps * model.n_envs, None)
            assert model.env is not None
            with DeviceWaits() as waits:
                assert model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)
            found.append(waits.found)
    assert found[1] - found[0] == {"cpu": 12, "numpy": 12}, found


@pytest.mark.parametrize("action_space", MASKABLE_SPACES)
def test_ratio_is_one_in_the_select_only_form(action_space: str) -> None:
    with select_only():
        errors = ratio_errors("lstm", "pmm", 9, action_space)
    assert max(errors) <= RATIO_TOLERANCE, errors
