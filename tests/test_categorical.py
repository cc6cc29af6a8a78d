"""Discrete actions without distribution objects: what SB3's distribution gives."""

import torch as th
from stable_baselines3.common.distributions import CategoricalDistribution

from sb3_cyborg.memory_ppo.actions import evaluate_categorical, sample_categorical


def test_samples_are_those_of_sb3() -> None:
    logits = 3 * th.randn(64, 5)
    distribution = CategoricalDistribution(5).proba_distribution(logits)
    for deterministic in (True, False):
        th.manual_seed(1)
        actions, log_probs = sample_categorical(logits, deterministic)
        th.manual_seed(1)
        expected = distribution.get_actions(deterministic=deterministic)
        assert th.equal(actions, expected)
        assert th.equal(log_probs, distribution.log_prob(expected))


def test_evaluation_is_that_of_sb3_and_of_sampling() -> None:
    logits = 3 * th.randn(64, 5)
    distribution = CategoricalDistribution(5).proba_distribution(logits)
    actions, sampled = sample_categorical(logits, deterministic=False)
    log_probs, entropy = evaluate_categorical(logits, actions.unsqueeze(1))
    assert th.equal(log_probs, sampled)
    th.testing.assert_close(entropy, distribution.entropy())
