"""``MemoryPPO`` with SB3's environments, callbacks and logs."""

import itertools
import math
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CheckpointCallback,
    EvalCallback,
    StopTrainingOnMaxEpisodes,
    StopTrainingOnRewardThreshold,
)
from stable_baselines3.common.distributions import make_proba_distribution
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import SubprocVecEnv, VecEnv, VecFrameStack, VecMonitor, VecNormalize

from sb3_cyborg import MemoryPPO
from sb3_cyborg.memory_ppo import losses
from tests.helpers import (
    OBSERVATION_SPACES,
    RATIO_TOLERANCE,
    ToyEnv,
    assert_exact_ratios,
    predict,
    record_updates,
    same,
    small,
    toy_model,
    toy_vec_env,
    weights,
)


def policy_for(space: spaces.Space[Any]) -> str:
    if isinstance(space, spaces.Dict):
        return "MultiInputPolicy"
    return "CnnPolicy" if space.dtype == np.uint8 and len(space.shape or ()) == 3 else "MlpPolicy"


def make_vec_env(kind: str) -> VecEnv:
    env: VecEnv
    if kind == "subproc":
        env = SubprocVecEnv([ToyEnv] * 2, start_method="fork")
        env.seed(0)
        return env
    env = toy_vec_env(2, lambda: ToyEnv(OBSERVATION_SPACES["image"]) if kind == "frame_stack_image" else ToyEnv())
    if kind == "normalize":
        return VecNormalize(env)
    if kind == "monitor":
        return VecMonitor(env)
    return VecFrameStack(env, 3) if kind.startswith("frame_stack") else env


@pytest.mark.parametrize("kind", ["dummy", "subproc", "normalize", "monitor", "frame_stack", "frame_stack_image"])
def test_vec_envs(kind: str) -> None:
    env = make_vec_env(kind)
    model = toy_model(env, policy_for(env.observation_space), burn_in=2)
    updates = record_updates(model)
    model.learn(2 * 24)
    assert_exact_ratios(updates, 2)
    assert model.ep_info_buffer is not None
    assert (len(model.ep_info_buffer) > 0) == (kind == "monitor")
    mean, _ = evaluate_policy(model, env, n_eval_episodes=3, warn=False)
    assert np.isfinite(mean)
    env.close()


def test_an_environment_that_is_not_vectorized() -> None:
    model = MemoryPPO("MlpPolicy", gym.make("Pendulum-v1"), n_steps=16, n_epochs=1, policy_kwargs=small(), device="cpu")
    updates = record_updates(model)
    model.learn(16)
    assert_exact_ratios(updates)


def test_evaluate_policy_threads_the_state() -> None:
    """Episode lengths equal those of a loop that passes the state explicitly."""
    model = toy_model()
    env = toy_vec_env(1, seed=5)
    _, lengths = evaluate_policy(model, env, n_eval_episodes=4, return_episode_rewards=True, warn=False)
    env.seed(5)
    obs, state, starts = env.reset(), None, np.ones(1, dtype=bool)
    episodes: list[int] = []
    length = 0
    while len(episodes) < 4:
        action, state = predict(model, obs, state, starts, deterministic=True)
        obs, _, starts, _ = env.step(action)
        length += 1
        if starts[0]:
            episodes.append(length)
            length = 0
    assert lengths == episodes


def test_callbacks_of_sb3_run(tmp_path: Path) -> None:
    model = toy_model()
    model.learn(
        2 * 36,
        callback=[
            EvalCallback(
                toy_vec_env(1),
                n_eval_episodes=2,
                eval_freq=6,
                log_path=str(tmp_path),
                best_model_save_path=str(tmp_path),
                verbose=0,
                warn=False,
            ),
            CheckpointCallback(save_freq=12, save_path=str(tmp_path), name_prefix="checkpoint"),
        ],
    )
    assert (tmp_path / "evaluations.npz").is_file()
    steps = [36, 72]
    for path in [tmp_path / "best_model.zip", *(tmp_path / f"checkpoint_{step}_steps.zip" for step in steps)]:
        assert MemoryPPO.load(path, device="cpu").num_timesteps > 0


def test_stop_training_callbacks() -> None:
    model = toy_model()
    stop = StopTrainingOnRewardThreshold(reward_threshold=-1e9, verbose=0)
    model.learn(10**6, callback=EvalCallback(toy_vec_env(1), callback_on_new_best=stop, eval_freq=2, verbose=0, warn=False))
    assert model.num_timesteps == 6
    model.learn(10**6, callback=StopTrainingOnMaxEpisodes(max_episodes=2))
    assert 3 <= model.num_timesteps < 10**4


class StopAt(BaseCallback):
    def __init__(self, calls: int) -> None:
        super().__init__()
        self.last = calls

    def _on_step(self) -> bool:
        return self.n_calls < self.last


class LearnFromValues(BaseCallback):
    def __init__(self) -> None:
        super().__init__()
        self.scale = th.ones(1, requires_grad=True)

    def _on_step(self) -> bool:
        (self.scale * self.locals["values"]).sum().backward()
        (self.scale * self.locals["log_probs"]).sum().backward()
        return True


def test_a_callback_may_compute_gradients_from_values() -> None:
    callback = LearnFromValues()
    toy_model().learn(24, callback=callback)
    assert callback.scale.grad is not None
    assert callback.scale.grad.isfinite().all()


def test_training_can_continue_after_a_callback_stopped_it_in_a_rollout() -> None:
    model = toy_model()
    before = weights(model.policy)
    model.learn(10**6, callback=StopAt(5))
    assert model.num_timesteps == 15
    assert same(before, weights(model.policy))
    updates = record_updates(model)
    model.learn(36, reset_num_timesteps=False)
    assert_exact_ratios(updates)
    assert model.num_timesteps == 15 + 36


def test_callbacks_see_the_local_variables_of_sb3() -> None:
    seen: set[str] = set()
    toy_model().learn(36, callback=lambda variables, _: seen.update(variables))
    assert {"env", "callback", "rollout_buffer", "n_rollout_steps", "n_steps", "obs_tensor", "actions", "values"} <= seen
    assert {"log_probs", "episode_starts", "new_obs", "rewards", "dones", "infos"} <= seen


@pytest.mark.filterwarnings("ignore:rich is experimental")
def test_progress_bar(capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tqdm")
    pytest.importorskip("rich")
    toy_model().learn(36, progress_bar=True)
    captured = capfd.readouterr()
    assert "36" in captured.out + captured.err


def test_tensorboard_log(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    toy_model(tensorboard_log=str(tmp_path)).learn(3 * 36)
    (folder,) = tmp_path.iterdir()
    assert folder.name == "MemoryPPO_1"
    events = accumulator.EventAccumulator(str(folder)).Reload()
    tags = set(events.Tags()["scalars"])
    losses = {"entropy_loss", "policy_gradient_loss", "value_loss", "loss"}
    others = {"approx_kl", "clip_fraction", "explained_variance", "clip_range", "ratio_error", "learning_rate"}
    assert {f"train/{name}" for name in losses | others} | {"memory/usage"} <= tags
    ratio_errors = events.Scalars("train/ratio_error")
    assert [event.step for event in ratio_errors] == [72, 108]  # SB3 logs an update when the next rollout is done
    assert all(event.value <= RATIO_TOLERANCE for event in ratio_errors)


def test_the_memory_loss_is_logged_and_weighted() -> None:
    policy_kwargs = {"memory": "pmm", "memory_kwargs": {"num_slots": 4, "write_rate": 0.1}}
    results = []
    for coefficient in (0.0, 10.0):
        model = toy_model(memory_loss_coef=coefficient, batch_size=36, n_epochs=1, policy_kwargs=policy_kwargs)
        updates = record_updates(model)
        model.learn(36)
        results.append((updates[0], weights(model.policy)))
    (without, weights_without), (with_it, weights_with) = results
    assert without["train/memory_loss"] == with_it["train/memory_loss"] > 0
    assert with_it["train/loss"] - without["train/loss"] == pytest.approx(10 * with_it["train/memory_loss"], rel=1e-4)
    assert not same(weights_without, weights_with)


@pytest.mark.parametrize(
    "space", [spaces.Discrete(3), spaces.MultiDiscrete([2, 4]), spaces.MultiBinary(3)], ids=lambda space: type(space).__name__
)
def test_the_log_barrier_is_the_divergence_of_a_uniform_policy_from_ours(space: spaces.Space[Any]) -> None:
    distribution = make_proba_distribution(space)
    sizes = {spaces.Discrete: [3], spaces.MultiDiscrete: [2, 4], spaces.MultiBinary: [2, 2, 2]}[type(space)]
    n_logits = 3 if isinstance(space, spaces.MultiBinary) else sum(sizes)
    logits = th.randn(5, n_logits, generator=th.Generator().manual_seed(0))
    every_action = th.tensor(list(itertools.product(*map(range, sizes))))

    def barrier(scale: float) -> th.Tensor:
        return losses.log_barrier_loss(distribution.proba_distribution(action_logits=scale * logits))

    assert barrier(0.0).item() == pytest.approx(0, abs=1e-6)
    value = barrier(2.0)
    actions = every_action.float() if isinstance(space, spaces.MultiBinary) else every_action
    log_probs = th.stack([distribution.log_prob(a.expand(5, -1) if len(sizes) > 1 else a.expand(5)) for a in actions])
    assert value.item() == pytest.approx((-log_probs.mean() - math.log(len(every_action))).item(), rel=1e-5)


def test_the_log_barrier_is_logged_and_weighted() -> None:
    results = []
    for coefficient in (0.0, 1e-9, 1e4):  # an untrained policy is almost uniform
        model = toy_model(log_barrier_coef=coefficient, batch_size=36, n_epochs=1)
        updates = record_updates(model)
        model.learn(36)
        results.append((updates[0], weights(model.policy)))
    (without, weights_without), (next_to_none, weights_next), (with_it, weights_with) = results
    assert "train/log_barrier_loss" not in without
    for name, value in without.items():
        assert next_to_none[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    assert with_it["train/log_barrier_loss"] > 0
    assert with_it["train/loss"] - without["train/loss"] == pytest.approx(1e4 * with_it["train/log_barrier_loss"], rel=1e-3)
    th.testing.assert_close(weights_next, weights_without, rtol=0, atol=1e-5)
    with pytest.raises(AssertionError):
        th.testing.assert_close(weights_with, weights_without, rtol=0, atol=1e-5)


@pytest.mark.parametrize("coefficient", [-0.1, np.nan, np.inf, "much"])
def test_an_invalid_log_barrier_coef_is_refused(coefficient: Any) -> None:
    with pytest.raises(ValueError, match="`log_barrier_coef` must be a finite number of at least 0"):
        toy_model(log_barrier_coef=coefficient)


def test_a_log_barrier_needs_discrete_actions() -> None:
    with pytest.raises(ValueError, match=r"is for discrete actions, got 0\.01 with Box"):
        MemoryPPO("MlpPolicy", "Pendulum-v1", log_barrier_coef=0.01)
    with pytest.raises(ValueError, match="is for discrete actions, got those of Normal"):
        losses.log_barrier_loss(
            make_proba_distribution(spaces.Box(-1, 1, (2,))).proba_distribution(th.zeros(1, 2), th.zeros(2))
        )


def test_schedules() -> None:
    model = toy_model(
        learning_rate=lambda progress: 1e-3 * (progress + 0.5),
        clip_range=lambda progress: 0.1 + 0.2 * progress,
        clip_range_vf=lambda progress: 0.4 + progress,
    )
    updates = record_updates(model)
    model.learn(3 * 36)
    progress = np.array([2 / 3, 1 / 3, 0])
    for name, want in (
        ("learning_rate", 1e-3 * (progress + 0.5)),
        ("clip_range", 0.1 + 0.2 * progress),
        ("clip_range_vf", 0.4 + progress),
    ):
        assert [update[f"train/{name}"] for update in updates] == pytest.approx(list(want)), name
    assert model.policy.optimizer.param_groups[0]["lr"] == pytest.approx(5e-4)


def test_constant_clip_ranges_are_logged() -> None:
    model = toy_model(clip_range=0.3)
    updates = record_updates(model)
    model.learn(36)
    assert updates[0]["train/clip_range"] == pytest.approx(0.3)
    assert "train/clip_range_vf" not in updates[0]
