"""Evaluation with masks: actions are legal, the state is kept, and sb3-contrib's functions warn that they drop it."""

import itertools
import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from sb3_contrib import MaskablePPO
from sb3_contrib.common.maskable import callbacks as contrib_callbacks
from sb3_contrib.common.maskable import evaluation as contrib_evaluation
from stable_baselines3.common.callbacks import EventCallback, StopTrainingOnRewardThreshold
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecNormalize

from sb3_cyborg import MaskableEvalCallback, MaskableMemoryPPO
from sb3_cyborg.maskable import WithActionMasks, evaluate_policy
from tests.mask_helpers import MaskedToyEnv, masked_model, masked_vec_env

USE_OURS = r"use those of `sb3_cyborg.maskable`"


def record_states(model: MaskableMemoryPPO, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Any, Any]]:
    """:return: A list to which each call of ``predict`` appends the given state, the returned one, and the masks."""
    calls: list[tuple[Any, Any, Any]] = []
    predict = model.policy.predict

    def recorded(obs: Any, state: Any, starts: Any, deterministic: bool, masks: Any) -> Any:
        actions, new_state = predict(obs, state, starts, deterministic, masks)
        calls.append((state, new_state, masks))
        return actions, new_state

    monkeypatch.setattr(model.policy, "predict", recorded)
    return calls


def keeps_states(calls: list[tuple[Any, Any, Any]]) -> bool:
    """:return: Whether each call but the first got the state that the call before returned."""
    return len(calls) > 5 and all(given is before[1] for before, (given, _, _) in itertools.pairwise(calls))


@pytest.mark.parametrize("n_envs", [1, 3])
def test_evaluation_keeps_the_state_and_takes_legal_actions(monkeypatch: pytest.MonkeyPatch, n_envs: int) -> None:
    model, envs = masked_model(), masked_vec_env(n_envs)
    calls = record_states(model, monkeypatch)
    _, lengths = evaluate_policy(model, envs, 7, return_episode_rewards=True, warn=False)
    assert isinstance(lengths, list)
    assert len(lengths) == 7
    assert keeps_states(calls)
    assert all(masks is not None for _, _, masks in calls)


def test_evaluation_in_a_single_environment() -> None:
    mean, std = evaluate_policy(masked_model(), Monitor(MaskedToyEnv()), 3)
    assert np.isfinite([mean, std]).all()


def test_evaluation_without_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = masked_model()
    with pytest.raises(AssertionError, match="illegal action"):
        evaluate_policy(model, masked_vec_env(), 20, deterministic=False, warn=False, use_masking=False)


def test_evaluation_needs_masks() -> None:
    with pytest.raises(ValueError, match="does not support action masking"):
        evaluate_policy(masked_model(), gym.make("CartPole-v1"), warn=False)


def test_evaluation_of_a_maskable_ppo_equals_that_of_sb3_contrib() -> None:
    model = MaskablePPO("MlpPolicy", masked_vec_env(), n_steps=8, seed=0, device="cpu")
    ours = evaluate_policy(model, masked_vec_env(), 9, return_episode_rewards=True, warn=False)
    theirs = contrib_evaluation.evaluate_policy(model, masked_vec_env(), 9, return_episode_rewards=True, warn=False)
    assert ours == theirs


def test_sb3_contribs_evaluation_drops_the_state_and_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = masked_model()
    calls = record_states(model, monkeypatch)
    with pytest.warns(UserWarning, match=USE_OURS):
        contrib_evaluation.evaluate_policy(model, masked_vec_env(), 7, warn=False)
    assert not keeps_states(calls)


def test_sb3_contribs_callback_warns() -> None:
    model = masked_model()
    with pytest.warns(UserWarning, match=USE_OURS):
        model.learn(36, callback=contrib_callbacks.MaskableEvalCallback(masked_vec_env(), eval_freq=6, warn=False))


def test_the_callback_keeps_the_state_and_writes_the_files_of_sb3(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = masked_model()
    calls = record_states(model, monkeypatch)
    best, after = EventCallback(), EventCallback()
    callback = MaskableEvalCallback(
        masked_vec_env(),
        n_eval_episodes=5,
        eval_freq=12,
        callback_on_new_best=best,
        callback_after_eval=after,
        log_path=str(tmp_path),
        best_model_save_path=str(tmp_path),
        warn=False,
        verbose=0,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.learn(36, callback=callback)
    assert keeps_states(calls)
    assert after.n_calls == 1
    assert best.n_calls == 1
    assert callback.model is model
    assert np.load(tmp_path / "evaluations.npz")["results"].shape == (1, 5)
    loaded = MaskableMemoryPPO.load(tmp_path / "best_model", device="cpu")
    assert loaded.num_timesteps == 36


def test_the_callback_stops_training() -> None:
    stop = StopTrainingOnRewardThreshold(-1000, verbose=0)
    callback = MaskableEvalCallback(masked_vec_env(), eval_freq=4, callback_on_new_best=stop, warn=False, verbose=0)
    assert masked_model().learn(360, callback=callback).num_timesteps == 12


def test_the_callback_synchronizes_the_normalization() -> None:
    training, evaluation = VecNormalize(masked_vec_env()), VecNormalize(masked_vec_env())
    evaluation.training = False
    model = masked_model(training)
    model.learn(36, callback=MaskableEvalCallback(evaluation, eval_freq=12, warn=False, verbose=0))
    means = [getattr(env.obs_rms, "mean") for env in (training, evaluation)]  # noqa: B009  # mypy also expects dictionaries
    assert np.array_equal(means[0], means[1])


def test_the_callback_needs_masks_when_training_begins() -> None:
    with pytest.raises(ValueError, match="does not support action masking"):
        masked_model().learn(36, callback=MaskableEvalCallback(gym.make("CartPole-v1"), warn=False))


def test_the_callback_without_masks_takes_illegal_actions() -> None:
    callback = MaskableEvalCallback(
        masked_vec_env(), n_eval_episodes=20, eval_freq=4, deterministic=False, use_masking=False, warn=False
    )
    with pytest.raises(AssertionError, match="illegal action"):
        masked_model().learn(36, callback=callback)


def test_an_agent_that_reads_masks_has_all_other_attributes() -> None:
    model = masked_model()
    env: VecEnv = masked_vec_env()
    agent = WithActionMasks(model, env)
    obs: Any = env.reset()
    actions, state = agent.predict(obs)
    assert np.take_along_axis(np.stack(env.env_method("action_masks")), actions[:, None], axis=1).all()
    assert state.keys() == model.policy.get_initial_state(3).keys()
    assert agent.policy is model.policy
    with pytest.raises(ValueError, match="does not support action masking"):
        WithActionMasks(model, DummyVecEnv([lambda: gym.make("CartPole-v1")]))
