"""Categorical actions without distribution objects equal those of SB3's distribution."""

import pytest
import torch as th
from stable_baselines3.common.distributions import CategoricalDistribution, Distribution

from sb3_cyborg.memory_ppo.actions import evaluate_categorical, sample_categorical
from sb3_cyborg.memory_ppo.policies import MemoryActorCriticPolicy
from tests.helpers import assert_exact_ratios, record_updates, rollout, toy_model


def test_samples_equal_those_of_sb3() -> None:
    logits = 3 * th.randn(64, 5)
    distribution = CategoricalDistribution(5).proba_distribution(logits)
    for deterministic in (True, False):
        th.manual_seed(1)
        actions, log_probs = sample_categorical(logits, deterministic)
        th.manual_seed(1)
        expected = distribution.get_actions(deterministic=deterministic)
        assert th.equal(actions, expected)
        # SB3 subtracts a log-sum-exp, which has larger rounding errors than log_softmax.
        th.testing.assert_close(log_probs, distribution.log_prob(expected), atol=1e-6, rtol=1e-6)


def test_evaluation_equals_sb3_and_sampling() -> None:
    logits = 3 * th.randn(64, 5)
    distribution = CategoricalDistribution(5).proba_distribution(logits)
    actions, sampled = sample_categorical(logits, deterministic=False)
    log_probs, entropy = evaluate_categorical(logits, actions.unsqueeze(1))
    assert th.equal(log_probs, sampled)
    th.testing.assert_close(entropy, distribution.entropy())


def test_nan_logits_are_refused() -> None:
    logits = th.zeros(4, 3)
    logits[2, 1] = th.nan
    with pytest.raises(ValueError, match="logits of the actions are nan"):
        sample_categorical(logits, deterministic=True)


class WithoutTheFirstAction(MemoryActorCriticPolicy):
    """A user's policy that masks an action in SB3's hook for the distribution."""

    def _get_action_dist_from_latent(self, latent_pi: th.Tensor) -> Distribution:
        forbidden = th.tensor([-th.inf, 0.0, 0.0])
        return self.action_dist.proba_distribution(action_logits=self.action_net(latent_pi) + forbidden)


def test_an_overridden_action_distribution_is_used() -> None:
    model = rollout(toy_model(policy=WithoutTheFirstAction))
    assert set(model.rollout_buffer.actions.flatten().tolist()) == {1, 2}
    updates = record_updates(model)
    model.learn(80)
    assert_exact_ratios(updates)
