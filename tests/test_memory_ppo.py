"""``MemoryPPO`` is a drop-in: scripts written for ``RecurrentPPO`` or ``PPO`` run with only the class changed."""

import copy
import io
import itertools
import math
import pickle
import warnings
from pathlib import Path
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from sb3_contrib import RecurrentPPO
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CheckpointCallback,
    EvalCallback,
    StopTrainingOnMaxEpisodes,
    StopTrainingOnRewardThreshold,
)
from stable_baselines3.common.distributions import make_proba_distribution
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.torch_layers import NatureCNN
from stable_baselines3.common.vec_env import SubprocVecEnv, VecEnv, VecFrameStack, VecMonitor, VecNormalize
from torch import nn

from sb3_cyborg import MemoryActorCriticCnnPolicy, MemoryActorCriticPolicy, MemoryMultiInputActorCriticPolicy, MemoryPPO
from sb3_cyborg.encoders.encoder_v7 import ENCODERS
from sb3_cyborg.memories.memory_v7 import MEMORIES
from sb3_cyborg.memory_ppo import losses
from sb3_cyborg.memory_ppo.episode_time import TIME_WAVES, encode_time
from tests.toys import (
    ACTION_SPACES,
    OBSERVATION_SPACES,
    RATIO_TOLERANCE,
    DropoutBatchNorm,
    ToyEnv,
    assert_honest,
    predict,
    record_updates,
    rollout,
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


# --- spaces, policies, encoders and memories ----------------------------------------------------------------------------


@pytest.mark.parametrize("actions", ACTION_SPACES)
@pytest.mark.parametrize("use_last_action", [False, True])
def test_all_action_spaces(actions: str, use_last_action: bool) -> None:
    model = toy_model(toy_vec_env(make=lambda: ToyEnv(action_space=ACTION_SPACES[actions])), use_last_action=use_last_action)
    updates = record_updates(model)
    model.learn(3 * 36)
    assert_honest(updates, 3)
    assert ("last_action" in model.rollout_buffer.states) == use_last_action
    obs, state = np.zeros((2, 3), np.float32), None
    for deterministic in (True, False):
        action, state = predict(model, obs, state, deterministic=deterministic)
        assert all(model.action_space.contains(row) for row in action)


@pytest.mark.parametrize("observations", OBSERVATION_SPACES)
def test_all_observation_spaces(observations: str) -> None:
    space = OBSERVATION_SPACES[observations]
    env = toy_vec_env(2, lambda: ToyEnv(space))
    model = toy_model(env, policy_for(space), burn_in=2, n_steps=8, batch_size=8)
    updates = record_updates(model)
    model.learn(2 * 16)
    assert_honest(updates, 2)
    many, _ = predict(model, env.reset(), deterministic=True)
    assert many.shape == (2,)
    space.seed(0)
    action, state = predict(model, space.sample())
    assert action.shape == ()
    assert all(leaf.shape[0] == 1 for leaf in state.values())


@pytest.mark.parametrize("alias", ["MlpPolicy", "MlpLstmPolicy", MemoryActorCriticPolicy])
def test_mlp_policies(alias: str | type) -> None:
    assert type(toy_model(policy=alias).policy) is MemoryActorCriticPolicy


@pytest.mark.parametrize("alias", ["CnnPolicy", "CnnLstmPolicy", MemoryActorCriticCnnPolicy])
def test_cnn_policies(alias: str | type) -> None:
    model = toy_model(ToyEnv(OBSERVATION_SPACES["image"]), policy=alias)
    assert type(model.policy) is MemoryActorCriticCnnPolicy


class OwnCnn(NatureCNN):
    """Flattens with a view, which only images that are not channels-last in memory allow; ``layouts`` records them."""

    layouts: ClassVar[list[bool]] = []

    def forward(self, observations: th.Tensor) -> th.Tensor:
        self.layouts.append(observations.is_contiguous())
        features: th.Tensor = self.linear(self.cnn[:-1](observations).view(len(observations), -1))
        return features


@pytest.mark.parametrize("burn_in", [0, 2])
def test_images_stay_channels_last_from_the_environment_to_the_convolutions(burn_in: int) -> None:
    space = spaces.Box(0, 255, (36, 37, 3), np.uint8)
    model = toy_model(toy_vec_env(2, lambda: ToyEnv(space)), policy="CnnPolicy", burn_in=burn_in)
    layouts: list[bool] = []

    def record(module: nn.Module, args: tuple[th.Tensor]) -> None:
        layouts.append(args[0].is_contiguous(memory_format=th.channels_last) and not args[0].is_contiguous())

    extractor = model.policy.features_extractor
    assert isinstance(extractor, NatureCNN)
    extractor.cnn.register_forward_pre_hook(record)
    updates = record_updates(model)
    model.learn(2 * 24)
    assert_honest(updates, 2)
    assert all(layouts)
    assert len(layouts) > model.n_steps  # of updates, too


@pytest.mark.parametrize("burn_in", [0, 2])
def test_images_stay_channels_first_where_the_environment_makes_them_so(burn_in: int) -> None:
    space = spaces.Box(0, 255, (3, 36, 37), np.uint8)
    OwnCnn.layouts.clear()
    kwargs = {"features_extractor_class": OwnCnn}
    model = toy_model(toy_vec_env(2, lambda: ToyEnv(space)), policy="CnnPolicy", burn_in=burn_in, policy_kwargs=kwargs)
    model.learn(2 * 24)
    assert all(OwnCnn.layouts)
    assert len(OwnCnn.layouts) > model.n_steps


@pytest.mark.parametrize("policy", ["MlpPolicy", "CnnPolicy"])
def test_only_convolutions_want_images_channels_last(policy: str) -> None:
    model = toy_model(ToyEnv(spaces.Box(0, 255, (36, 37, 3), np.uint8)), policy=policy)
    observations = model.rollout_buffer.observations
    assert isinstance(observations, th.Tensor)
    assert observations.is_contiguous() == (policy == "MlpPolicy")


@pytest.mark.parametrize("alias", ["MultiInputPolicy", "MultiInputLstmPolicy", MemoryMultiInputActorCriticPolicy])
def test_multi_input_policies(alias: str | type) -> None:
    model = toy_model(ToyEnv(OBSERVATION_SPACES["dict"]), policy=alias)
    assert type(model.policy) is MemoryMultiInputActorCriticPolicy


def test_every_alias_of_ppo_and_recurrent_ppo_exists() -> None:
    assert MemoryPPO.policy_aliases.keys() == PPO.policy_aliases.keys() | RecurrentPPO.policy_aliases.keys()


@pytest.mark.parametrize("memory", ["ring", "slot", "pmm", "kv", "none"])
@pytest.mark.parametrize("encoder", ["gru", "lstm"])
def test_encoders_and_memories(encoder: str, memory: str) -> None:
    model = toy_model(policy_kwargs={"encoder": encoder, "memory": memory}, burn_in=3)
    updates = record_updates(model)
    model.learn(2 * 36)
    assert_honest(updates, 2)
    logged = {name for name in updates[-1] if name.startswith("memory/")}
    reads = {"memory/read_entropy", "memory/usage", "memory/fill"}
    assert logged == {"none": set(), "ring": reads, "kv": reads}.get(memory, reads | {"memory/write_strength"})
    assert all(np.isfinite(updates[-1][name]) for name in logged)


def test_memory_diagnostics_mean_what_they_say() -> None:
    """On one long episode, the ring fills up: half full on average over the first rollout, then full."""
    env = toy_vec_env(1, lambda: ToyEnv(mean_length=10**9))
    model = toy_model(env, n_steps=8, batch_size=8, policy_kwargs={"memory": "ring", "memory_kwargs": {"num_slots": 8}})
    updates = record_updates(model)
    model.learn(3 * 8)
    fills = [update["memory/fill"] for update in updates]
    assert fills == pytest.approx([sum(range(8)) / 64, 1, 1])
    assert all(0 < update["memory/read_entropy"] <= np.log(9) for update in updates)
    assert all(0 < update["memory/usage"] < 1 for update in updates)


# --- arguments ----------------------------------------------------------------------------------------------------------


def test_small_settings_of_recurrent_ppo_run_in_silence() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = MemoryPPO("MlpLstmPolicy", "CartPole-v1", n_steps=16, n_epochs=1, device="cpu", policy_kwargs=small())
    updates = record_updates(model)
    model.learn(32)
    assert_honest(updates, 2)


def test_an_explicit_batch_size_larger_than_the_rollout_warns_and_runs() -> None:
    with pytest.warns(UserWarning, match="mini-batch size of 128, but .* mini-batches of 16 are used"):
        model = toy_model(toy_vec_env(1), n_steps=16, batch_size=128, seq_len=None)
    updates = record_updates(model)
    model.learn(16)
    assert_honest(updates)


def test_the_arguments_of_ppo() -> None:
    model = MemoryPPO(
        "MlpPolicy",
        toy_vec_env(1),
        learning_rate=1e-3,
        n_steps=128,
        batch_size=64,
        n_epochs=2,
        gamma=0.9,
        gae_lambda=0.8,
        clip_range=0.1,
        clip_range_vf=0.3,
        normalize_advantage=False,
        ent_coef=0.01,
        vf_coef=0.7,
        max_grad_norm=0.4,
        use_sde=False,
        sde_sample_freq=-1,
        rollout_buffer_class=None,
        rollout_buffer_kwargs=None,
        target_kl=10.0,
        stats_window_size=3,
        tensorboard_log=None,
        policy_kwargs=small(),
        verbose=0,
        seed=1,
        device="auto",
        _init_setup_model=True,
    )
    updates = record_updates(model)
    model.learn(
        total_timesteps=128, callback=None, log_interval=1, tb_log_name="x", reset_num_timesteps=True, progress_bar=False
    )
    assert_honest(updates)
    assert updates[0]["train/n_updates"] == 2
    assert updates[0]["train/clip_range"] == pytest.approx(0.1)
    assert updates[0]["train/clip_range_vf"] == pytest.approx(0.3)
    assert updates[0]["train/learning_rate"] == pytest.approx(1e-3)
    assert model.rollout_buffer.gamma == 0.9
    assert model.rollout_buffer.gae_lambda == 0.8
    assert model.ep_info_buffer is not None
    assert model.ep_info_buffer.maxlen == 3


def test_positional_arguments_are_those_of_recurrent_ppo() -> None:
    ours, theirs = (cls.__init__.__code__ for cls in (MemoryPPO, RecurrentPPO))
    assert ours.co_varnames[: ours.co_argcount] == theirs.co_varnames[: theirs.co_argcount]


def test_advantages_are_normalized_only_if_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    real = th.Tensor.std

    def counted(tensor: th.Tensor, *args: Any, **kwargs: Any) -> th.Tensor:
        calls.append(tensor.numel())
        return real(tensor, *args, **kwargs)

    monkeypatch.setattr(th.Tensor, "std", counted)
    toy_model(normalize_advantage=False, burn_in=2, scale_lr_by_advantage=False).learn(36)
    assert calls == []
    toy_model(normalize_advantage=True, burn_in=2, scale_lr_by_advantage=False).learn(36)
    assert calls == [12] * 6  # three minibatches of 12 training steps, two epochs


def test_the_loss_is_the_weighted_sum_of_its_parts() -> None:
    model = toy_model(n_epochs=1, batch_size=36, ent_coef=0.3, vf_coef=0.7)
    updates = record_updates(model)
    model.learn(36)
    logged = updates[0]
    want = logged["train/policy_gradient_loss"] + 0.3 * logged["train/entropy_loss"] + 0.7 * logged["train/value_loss"]
    assert logged["train/loss"] == pytest.approx(want, rel=1e-5)
    assert abs(logged["train/entropy_loss"]) > 0.1
    assert logged["train/value_loss"] > 0.1


@pytest.mark.parametrize("max_grad_norm", [0.01, 0.02])
def test_gradients_are_clipped(max_grad_norm: float) -> None:
    model = toy_model(
        n_epochs=1,
        batch_size=36,
        learning_rate=1.0,
        max_grad_norm=max_grad_norm,
        normalize_value=False,  # no weight and no buffer moves but by a gradient
        policy_kwargs={"optimizer_class": th.optim.SGD, "normalize_observations": False},
    )
    before = weights(model.policy)
    model.learn(36)
    moved = sum((before[name] - now).square().sum().item() for name, now in weights(model.policy).items())
    assert moved**0.5 == pytest.approx(max_grad_norm, rel=1e-3)


class Squashed(nn.Module):
    def forward(self, x: th.Tensor) -> th.Tensor:
        return x.tanh() * 0.5


def test_policy_kwargs_of_sb3() -> None:
    kwargs = {
        "net_arch": {"pi": [7], "vf": [6, 5]},
        "activation_fn": Squashed,
        "ortho_init": False,
        "features_extractor_class": DropoutBatchNorm,
        "features_extractor_kwargs": {"scale": 2.0},
        "optimizer_class": th.optim.SGD,
        "optimizer_kwargs": {"momentum": 0.5},
    }
    model = toy_model(policy_kwargs=kwargs)
    model.learn(36)
    policy = model.policy
    assert [layer.out_features for layer in policy.mlp_extractor.policy_net if isinstance(layer, nn.Linear)] == [7]
    assert [layer.out_features for layer in policy.mlp_extractor.value_net if isinstance(layer, nn.Linear)] == [6, 5]
    assert any(isinstance(layer, Squashed) for layer in policy.mlp_extractor.policy_net)
    assert isinstance(policy.features_extractor, DropoutBatchNorm)
    assert policy.features_extractor.scale == 2
    assert isinstance(policy.optimizer, th.optim.SGD)
    assert policy.optimizer.param_groups[0]["momentum"] == 0.5
    optimized = {id(parameter) for group in policy.optimizer.param_groups for parameter in group["params"]}
    assert optimized == {id(parameter) for parameter in policy.parameters()}


def test_train_eval_mode() -> None:
    """Acting, predicting and looking ahead are in evaluation mode, updates in training mode."""
    model = toy_model(policy_kwargs={"features_extractor_class": DropoutBatchNorm})
    extractor = model.policy.features_extractor
    assert isinstance(extractor, DropoutBatchNorm)
    before = weights(extractor.batch_norm)
    rollout(model)
    assert not any(extractor.modes)
    assert same(before, weights(extractor.batch_norm))
    extractor.modes.clear()
    model.train()
    assert extractor.modes == [True] * 6
    assert not same(before, weights(extractor.batch_norm))
    obs = np.ones((4, 3), np.float32)
    after = weights(extractor.batch_norm)
    first, state = predict(model, obs, deterministic=True)
    second, again = predict(model, obs, deterministic=True)
    assert (first == second).all()
    assert all((state[name] == again[name]).all() for name in state)
    assert same(after, weights(extractor.batch_norm))


def test_lstm_sizes_set_ours() -> None:
    policy = toy_model(policy_kwargs={"lstm_hidden_size": 12, "n_lstm_layers": 2, "encoder": "lstm"}).policy
    assert policy.get_initial_state(1)["encoder.layer1.h"].shape == (1, 12)
    assert "encoder.layer2.h" not in policy.get_initial_state(1)


@pytest.mark.parametrize("size", [1, 6, 10, 30])
@pytest.mark.parametrize("memory", ["ring", "slot", "pmm", "kv"])
def test_any_lstm_hidden_size_runs(size: int, memory: str) -> None:
    """A script for RecurrentPPO does not know of heads, so their number adapts to what divides."""
    model = MemoryPPO("MlpLstmPolicy", toy_vec_env(1), n_steps=4, policy_kwargs={"lstm_hidden_size": size, "memory": memory})
    action, _ = predict(model, np.zeros(3, np.float32))
    assert model.action_space.contains(int(action))


@pytest.mark.parametrize(
    ("kwargs", "named"),
    [
        ({"enable_critic_lstm": False}, ["enable_critic_lstm"]),
        ({"shared_lstm": True, "enable_critic_lstm": False}, ["shared_lstm", "enable_critic_lstm"]),
        ({"lstm_kwargs": {"dropout": 0.1}}, ["lstm_kwargs"]),
        ({"share_features_extractor": False}, ["share_features_extractor=False"]),
    ],
)
def test_lstm_options_warn_once_and_run(kwargs: dict[str, Any], named: list[str]) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = toy_model(policy_kwargs=kwargs)
        updates = record_updates(model)
        model.learn(36)
    messages = [str(warning.message) for warning in caught if "no effect here" in str(warning.message)]
    assert len(messages) == 1
    assert all(name in messages[0] for name in named)
    assert "Actor and critic share" in messages[0]
    assert_honest(updates)


@pytest.mark.parametrize("squash_output", [False, True])
@pytest.mark.parametrize("use_last_action", [False, True])
def test_gsde(squash_output: bool, use_last_action: bool) -> None:
    space = spaces.Box(-2, 6, (2,))
    env: Any = toy_vec_env(make=lambda: ToyEnv(action_space=space))
    model = toy_model(
        env,
        use_sde=True,
        sde_sample_freq=4,
        use_last_action=use_last_action,
        policy_kwargs={"squash_output": squash_output, "log_std_init": -1.0},
    )
    noises: list[int] = []
    reset_noise = model.policy.reset_noise

    def counted(n_envs: int = 1) -> None:
        noises.append(n_envs)
        reset_noise(n_envs)

    setattr(model.policy, "reset_noise", counted)  # noqa: B010
    updates = record_updates(model)
    model.learn(3 * 36)
    assert noises == [3] * 3 * 4  # each rollout at its start, and in it every 4 of 12 steps
    assert_honest(updates, 3)
    assert updates[-1]["train/std"] > 0
    actions = model.rollout_buffer.actions
    assert squash_output == bool((actions.abs() <= 1).all())
    taken = np.stack([toy.actions[-12:] for toy in env.envs], axis=1)
    want = 4 * actions.numpy() + 2 if squash_output else actions.numpy().clip(-2, 6)
    np.testing.assert_allclose(taken, want, atol=1e-5)
    action, _ = predict(model, np.zeros((4, 3), np.float32))
    assert all(space.contains(row) for row in action)


# --- environments, callbacks, logs --------------------------------------------------------------------------------------


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
    assert_honest(updates, 2)
    assert model.ep_info_buffer is not None
    assert (len(model.ep_info_buffer) > 0) == (kind == "monitor")
    mean, _ = evaluate_policy(model, env, n_eval_episodes=3, warn=False)
    assert np.isfinite(mean)
    env.close()


def test_evaluate_policy_threads_the_state() -> None:
    """Episodes are as long as when the state is threaded by hand."""
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


def test_callbacks(tmp_path: Path) -> None:
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


def test_a_callback_may_learn_from_what_it_sees() -> None:
    callback = LearnFromValues()
    toy_model().learn(24, callback=callback)
    assert callback.scale.grad is not None
    assert callback.scale.grad.isfinite().all()


def test_training_that_a_callback_ended_in_mid_rollout_can_go_on() -> None:
    model = toy_model()
    before = weights(model.policy)
    model.learn(10**6, callback=StopAt(5))
    assert model.num_timesteps == 15
    assert same(before, weights(model.policy))
    updates = record_updates(model)
    model.learn(36, reset_num_timesteps=False)
    assert_honest(updates)
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


def test_the_memory_loss_is_logged_and_weighed() -> None:
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


def test_the_log_barrier_is_logged_and_weighed() -> None:
    results = []
    for coefficient in (0.0, 1e-9, 1e4):  # a new policy is all but uniform
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
def test_a_log_barrier_of_no_weight_is_refused(coefficient: Any) -> None:
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


def test_constant_settings_are_logged_as_they_are() -> None:
    model = toy_model(clip_range=0.3)
    updates = record_updates(model)
    model.learn(36)
    assert updates[0]["train/clip_range"] == pytest.approx(0.3)
    assert "train/clip_range_vf" not in updates[0]


# --- the life of a model ------------------------------------------------------------------------------------------------


def test_same_seed_same_result() -> None:
    first, second, other = (toy_model(seed=seed, burn_in=2).learn(2 * 36) for seed in (3, 3, 4))
    assert same(weights(first.policy), weights(second.policy))
    assert not same(weights(first.policy), weights(other.policy))


def test_learn_goes_on() -> None:
    model = toy_model()
    model.learn(36)
    updates = record_updates(model)
    model.learn(2 * 36, reset_num_timesteps=False)
    assert model.num_timesteps == 3 * 36
    assert model._n_updates == 3 * 2
    assert_honest(updates, 2)
    model.learn(36)
    assert model.num_timesteps == 36


def test_set_env() -> None:
    model = toy_model()
    model.learn(36)
    updates = record_updates(model)
    model.set_env(toy_vec_env(seed=9))
    model.learn(36, reset_num_timesteps=False)
    assert_honest(updates)
    assert (model.rollout_buffer.episode_starts[0] == 1).all()
    with pytest.raises(AssertionError, match="number of environments"):
        model.set_env(toy_vec_env(2))


def test_get_and_set_parameters() -> None:
    first, second = toy_model(seed=1).learn(36), toy_model(seed=2)
    assert not same(weights(first.policy), weights(second.policy))
    parameters: Any = first.get_parameters()  # SB3's types of the two do not fit
    second.set_parameters(parameters)
    assert same(weights(first.policy), weights(second.policy))
    state, other = (model.policy.optimizer.state_dict()["state"][0]["exp_avg"] for model in (first, second))
    assert th.equal(state, other)


@pytest.mark.parametrize("as_file", [False, True])
def test_save_and_load(tmp_path: Path, as_file: bool) -> None:
    policy_kwargs = {"memory": "pmm", "encoder": "lstm", "use_time": True}
    model = toy_model(burn_in=2, use_last_action=True, clip_range_vf=0.5, policy_kwargs=policy_kwargs)
    model.learn(36)
    target: Any = io.BytesIO() if as_file else tmp_path / "model"
    model.save(target)
    loaded = MemoryPPO.load(io.BytesIO(target.getvalue()) if as_file else target, device="cpu")
    assert same(weights(model.policy), weights(loaded.policy))
    assert (loaded.seq_len, loaded.burn_in, loaded.batch_size, loaded.memory_loss_coef) == (4, 2, 12, 1)
    assert loaded.num_timesteps == 36
    obs = np.random.default_rng(0).normal(size=(5, 4, 3)).astype(np.float32)
    state = again = None
    for step in obs:
        action, state = predict(model, step, state, deterministic=True)
        other, again = predict(loaded, step, again, deterministic=True)
        assert (action == other).all()
        assert all((state[name] == again[name]).all() for name in state)


def test_saving_leaves_out_the_states_and_the_rollout(tmp_path: Path) -> None:
    model = toy_model().learn(36)
    assert {"_last_state", "rollout_buffer", "policy"} <= set(model._excluded_save_params())
    model.save(tmp_path / "model")
    loaded = MemoryPPO.load(tmp_path / "model", env=toy_vec_env(), device="cpu")
    assert same(loaded._last_state, model.policy.get_initial_state(3))


def test_custom_objects_and_arguments_of_load(tmp_path: Path) -> None:
    model = toy_model(normalize_value=False, policy_kwargs={"normalize_observations": False}).learn(36)
    model.save(tmp_path / "model")
    objects = {"learning_rate": 0.0, "lr_schedule": lambda _: 0.0, "clip_range": lambda _: 0.05}
    loaded = MemoryPPO.load(tmp_path / "model", env=toy_vec_env(), device="cpu", custom_objects=objects, n_epochs=3, seq_len=6)
    updates = record_updates(loaded)
    loaded.learn(36)
    assert same(weights(model.policy), weights(loaded.policy))  # at a learning rate of 0
    assert updates[0]["train/clip_range"] == pytest.approx(0.05)
    assert updates[0]["train/n_updates"] == 2 + 3
    assert loaded.rollout_buffer.seq_len == 6
    assert_honest(updates)


def test_a_policy_saves_and_loads_alone(tmp_path: Path) -> None:
    policy = toy_model(use_last_action=True, policy_kwargs={"encoder": "lstm", "lstm_hidden_size": 12, "memory": "kv"}).policy
    policy.save(str(tmp_path / "policy"))
    loaded = MemoryActorCriticPolicy.load(str(tmp_path / "policy"), device="cpu")
    assert same(weights(policy), weights(loaded))
    obs = np.ones((2, 3), np.float32)
    action, state = policy.predict(obs, deterministic=True)
    other, again = loaded.predict(obs, deterministic=True)
    assert (action == other).all()
    assert all((state[name] == again[name]).all() for name in state)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_policies_can_be_copied(how: str) -> None:
    policy = toy_model(policy_kwargs={"encoder": "lstm", "memory": "ring"}).policy
    twin = copy.deepcopy(policy) if how == "deepcopy" else pickle.loads(pickle.dumps(policy))
    obs = np.ones((2, 3), np.float32)
    _, state = policy.predict(obs, deterministic=True)
    _, again = twin.predict(obs, deterministic=True)
    assert all((state[name] == again[name]).all() for name in state)
    before = weights(policy)
    with th.no_grad():
        for parameter in twin.parameters():
            parameter += 1
    assert same(before, weights(policy))
    _, moved = twin.predict(obs, deterministic=True)
    assert not all((state[name] == moved[name]).all() for name in state), "the copy still computes with the original's weights"


# --- predict ------------------------------------------------------------------------------------------------------------


def test_predict_starts_anew_without_a_state() -> None:
    model = toy_model(policy_kwargs={"memory": "ring"})
    obs = np.random.default_rng(0).normal(size=(2, 3, 3)).astype(np.float32)
    _, fresh = predict(model, obs[0])
    _, warm = predict(model, obs[1], fresh)
    _, other = predict(model, obs[1])
    _, reset = predict(model, obs[1], fresh, episode_start=np.array([True, False, True]))
    for name in fresh:
        assert isinstance(fresh[name], np.ndarray)
        assert fresh[name].shape[0] == 3
        np.testing.assert_array_equal(reset[name][[0, 2]], other[name][[0, 2]])
        np.testing.assert_array_equal(reset[name][1], warm[name][1])
    assert any((warm[name][0] != other[name][0]).any() for name in warm)


def test_predict_does_not_write_into_the_state_that_it_is_given() -> None:
    model = toy_model(use_last_action=True, policy_kwargs={"memory": "pmm", "use_time": True})
    _, state = predict(model, np.ones((2, 3), np.float32))
    before = {name: leaf.copy() for name, leaf in state.items()}
    predict(model, np.zeros((2, 3), np.float32), state, episode_start=np.array([True, False]))
    assert all((state[name] == before[name]).all() for name in state)


def test_the_time_is_that_of_the_episode() -> None:
    """Counted while acting and along sequences, from the start of each episode, wherever a rollout begins."""
    model = toy_model(burn_in=2, policy_kwargs={"use_time": True})
    for _ in range(2):  # the second begins in mid-episode
        age = np.zeros(3) if model._last_episode_starts is None else model._last_state["time"].numpy().copy()
        buffer = rollout(model).rollout_buffer
        starts, anchors = buffer.episode_starts.numpy(), iter(buffer.states["time"].numpy())
        for t in range(buffer.n_steps):
            if t in buffer._anchors:
                np.testing.assert_array_equal(next(anchors), age)  # before it is reset
            age = np.where(starts[t] > 0.5, 0, age) + 1
        np.testing.assert_array_equal(model._last_state["time"].numpy(), age)


def test_times_are_told_apart() -> None:
    waves = encode_time(th.arange(1000.0))
    assert waves.shape == (1000, 2 * TIME_WAVES)
    assert waves.abs().max() <= 1
    assert th.pdist(waves).min() > 0.5
    th.testing.assert_close(encode_time(th.tensor([[0.0]])), th.tensor([[[0.0] * TIME_WAVES + [1.0] * TIME_WAVES]]))


def test_predict_of_one_observation_is_a_row_of_many() -> None:
    model = toy_model(toy_vec_env(make=lambda: ToyEnv(action_space=ACTION_SPACES["box_2x3"])))
    obs = np.random.default_rng(0).normal(size=(2, 3)).astype(np.float32)
    many, states = predict(model, obs, deterministic=True)
    one, state = predict(model, obs[1], deterministic=True)
    assert many.shape == (2, 2, 3)
    assert one.shape == (2, 3)
    np.testing.assert_allclose(one, many[1], atol=1e-6)
    for name in state:
        np.testing.assert_allclose(state[name][0], states[name][1], atol=1e-6)
    _, again = predict(model, obs[1], state, episode_start=np.array([True]))
    assert all((again[name] == state[name]).all() for name in state)


def test_deterministic_predictions_are_the_mode() -> None:
    model = toy_model()
    obs = np.zeros((200, 3), np.float32)
    actions, _ = predict(model, obs, deterministic=True)
    assert len(set(actions.tolist())) == 1
    samples, _ = predict(model, obs)
    assert len(set(samples.tolist())) > 1


@pytest.mark.parametrize("memory", ["ring", "slot", "pmm"])
def test_states_threaded_through_predict_are_those_of_the_rollout(memory: str) -> None:
    model = rollout(toy_model(policy_kwargs={"memory": memory}, burn_in=2))
    buffer = model.rollout_buffer
    assert isinstance(buffer.observations, th.Tensor)
    anchors = {0: 0, 2: 1, 6: 2}
    state: dict[str, np.ndarray] | None = None
    for t in range(buffer.n_steps):
        if t in anchors and state is not None:
            for name, leaf in buffer.states.items():
                np.testing.assert_array_equal(leaf[anchors[t]].numpy(), state[name])
        _, state = predict(model, buffer.observations[t].numpy(), state, buffer.episode_starts[t].numpy())
    assert state is not None
    for name, leaf in model._last_state.items():
        np.testing.assert_array_equal(leaf.numpy(), state[name])
    assert buffer.episode_starts[1:].sum() > 0, "no episode ended: the test shows less than it should"


# --- the last action ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("through", ["argument", "policy_kwargs"])
def test_use_last_action_can_be_set_in_two_places(through: str) -> None:
    kwargs: dict[str, Any] = {"use_last_action": True}
    model = toy_model(**kwargs) if through == "argument" else toy_model(policy_kwargs=kwargs)
    assert model.policy.use_last_action
    assert model.policy_kwargs["use_last_action"] is True
    assert not toy_model().policy.use_last_action


@pytest.mark.parametrize("actions", ACTION_SPACES)
def test_the_last_action_is_read_and_forgotten_at_an_episode_start(actions: str) -> None:
    space = ACTION_SPACES[actions]
    model = toy_model(toy_vec_env(1, lambda: ToyEnv(action_space=space)), use_last_action=True)
    obs = np.zeros((1, 3), np.float32)
    action, state = predict(model, obs)
    width = {"discrete": 3, "box": 2, "box_2x3": 6, "multi_discrete": 5, "multi_binary": 3}[actions]
    assert state["last_action"].shape == (1, width)
    if isinstance(space, spaces.Box):  # scaled to [-1, 1], and flat
        np.testing.assert_allclose(state["last_action"], action.reshape(1, -1) / 0.5, atol=1e-6)
    elif isinstance(space, spaces.Discrete):
        np.testing.assert_array_equal(state["last_action"], np.eye(3)[action])
    elif isinstance(space, spaces.MultiDiscrete):
        one_hot = np.concatenate([np.eye(2)[action[0, 0]], np.eye(3)[action[0, 1]]])
        np.testing.assert_array_equal(state["last_action"][0], one_hot)
    else:
        np.testing.assert_array_equal(state["last_action"], action)

    def encoder_state(last_action: np.ndarray, start: bool) -> np.ndarray:
        _, after = predict(model, obs, state | {"last_action": last_action}, np.array([start]))
        return after["encoder.layer0.h"]

    ones, zeros = (np.full((1, width), value, dtype=np.float32) for value in (1, 0))
    assert (encoder_state(ones, False) != encoder_state(zeros, False)).any()
    assert (encoder_state(ones, True) == encoder_state(zeros, True)).all()


def test_an_environment_that_is_not_vectorized() -> None:
    model = MemoryPPO("MlpPolicy", gym.make("Pendulum-v1"), n_steps=16, n_epochs=1, policy_kwargs=small(), device="cpu")
    updates = record_updates(model)
    model.learn(16)
    assert_honest(updates)


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("memory", MEMORIES)
def test_amp_keeps_states_and_gradients_in_fp32(encoder: str, memory: str) -> None:
    model = toy_model(amp=True, policy_kwargs={"encoder": encoder, "memory": memory})
    model.learn(2 * 36)
    assert all(leaf.dtype == th.float32 for leaf in model._last_state.values())
    assert all(leaf.dtype == th.float32 for leaf in model.rollout_buffer.states.values())
    assert all(parameter.dtype == th.float32 for parameter in model.policy.parameters())
    assert all(th.isfinite(parameter).all() for parameter in model.policy.parameters())


def test_amp_computes_the_features_in_bf16_and_survives_saving(tmp_path: Path) -> None:
    seen: list[th.dtype] = []
    model = toy_model(amp=True)
    first = model.policy.get_submodule("core.encoder.input_projection.0")
    first.register_forward_hook(lambda _module, _inputs, output: seen.append(output.dtype))
    model.learn(36)
    assert set(seen) == {th.bfloat16}
    model.save(tmp_path / "model")
    assert MemoryPPO.load(tmp_path / "model").policy.amp
