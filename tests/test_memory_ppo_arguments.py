"""Arguments of ``MemoryPPO`` and of its policies."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from sb3_contrib import RecurrentPPO
from torch import nn

from sb3_cyborg import MemoryPPO
from tests.helpers import (
    ModeRecorder,
    ToyEnv,
    assert_exact_ratios,
    predict,
    record_updates,
    rollout,
    small,
    stacks,
    toy_model,
    toy_vec_env,
    weights,
)


def test_small_settings_of_recurrent_ppo_do_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = MemoryPPO("MlpLstmPolicy", "CartPole-v1", n_steps=16, n_epochs=1, device="cpu", policy_kwargs=small())
    updates = record_updates(model)
    model.learn(32)
    assert_exact_ratios(updates, 2)


def test_an_explicit_batch_size_larger_than_the_rollout_warns_and_runs() -> None:
    with pytest.warns(UserWarning, match="mini-batch size of 128, but .* mini-batches of 16 are used"):
        model = toy_model(toy_vec_env(1), n_steps=16, batch_size=128, seq_len=None)
    updates = record_updates(model)
    model.learn(16)
    assert_exact_ratios(updates)


def test_all_arguments_of_ppo_are_accepted() -> None:
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
    assert_exact_ratios(updates)
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


def test_normalize_advantage_switches_the_normalization(monkeypatch: pytest.MonkeyPatch) -> None:
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
        normalize_value=False,  # weights and buffers change only by gradients
        policy_kwargs={"optimizer_class": th.optim.SGD, "normalize_observations": False},
    )
    before = weights(model.policy)
    model.learn(36)
    moved = sum((before[name] - now).square().sum().item() for name, now in weights(model.policy).items())
    assert moved**0.5 == pytest.approx(max_grad_norm, rel=1e-3)


class Squashed(nn.Module):
    def forward(self, x: th.Tensor) -> th.Tensor:
        return x.tanh() * 0.5


def test_policy_kwargs_of_sb3_are_applied() -> None:
    kwargs = {
        "net_arch": {"pi": [7], "vf": [6, 5]},
        "activation_fn": Squashed,
        "ortho_init": False,
        "features_extractor_class": ModeRecorder,
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
    assert isinstance(policy.features_extractor, ModeRecorder)
    assert policy.features_extractor.scale == 2
    assert isinstance(policy.optimizer, th.optim.SGD)
    assert policy.optimizer.param_groups[0]["momentum"] == 0.5
    optimized = {id(parameter) for group in policy.optimizer.param_groups for parameter in group["params"]}
    assert optimized == {id(parameter) for parameter in policy.parameters()}


def test_acting_uses_evaluation_mode_and_updates_training_mode() -> None:
    """Acting, ``predict`` and ``predict_values`` use evaluation mode, updates training mode."""
    model = toy_model(policy_kwargs={"features_extractor_class": ModeRecorder})
    extractor = model.policy.features_extractor
    assert isinstance(extractor, ModeRecorder)
    rollout(model)
    assert not any(extractor.modes)
    assert extractor.updates == 0
    extractor.modes.clear()
    model.train()
    assert extractor.modes == [True] * 6
    assert extractor.updates == 6
    obs = np.ones((4, 3), np.float32)
    first, state = predict(model, obs, deterministic=True)
    second, again = predict(model, obs, deterministic=True)
    assert (first == second).all()
    assert all((state[name] == again[name]).all() for name in state)
    assert extractor.updates == 6


def test_lstm_sizes_override_hidden_dim_and_num_layers() -> None:
    policy = toy_model(policy_kwargs={"lstm_hidden_size": 12, "n_lstm_layers": 2, "encoder": "lstm"}).policy
    assert policy.get_initial_state(1)["encoder.layer1.h"].shape == (1, 12)
    assert "encoder.layer2.h" not in policy.get_initial_state(1)


@pytest.mark.parametrize("size", [1, 6, 10, 30])
@pytest.mark.parametrize("memory", ["ring", "slot", "pmm", "kv"])
def test_any_lstm_hidden_size_runs(size: int, memory: str) -> None:
    """Scripts for RecurrentPPO set no heads, so the default number of heads adapts to a divisor."""
    model = MemoryPPO("MlpLstmPolicy", toy_vec_env(1), n_steps=4, policy_kwargs={"lstm_hidden_size": size, "memory": memory})
    action, _ = predict(model, np.zeros(3, np.float32))
    assert model.action_space.contains(int(action))


@pytest.mark.parametrize(
    ("kwargs", "named"),
    [
        ({"enable_critic_lstm": False}, ["enable_critic_lstm=False"]),
        ({"enable_critic_lstm": True}, ["enable_critic_lstm=True"]),
        ({"shared_lstm": False}, ["shared_lstm=False"]),
        ({"shared_lstm": False, "enable_critic_lstm": True}, ["shared_lstm=False", "enable_critic_lstm=True"]),
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
    found = [warning for warning in caught if "no effect here" in str(warning.message)]
    assert len(found) == 1
    message = str(found[0].message)
    assert all(name in message for name in named)
    assert "Actor and critic share" in message
    assert Path(found[0].filename).name == "helpers.py", "the warning is not at the line of the caller"
    assert_exact_ratios(updates)


@pytest.mark.parametrize(
    "kwargs", [{"shared_lstm": True, "enable_critic_lstm": False}, {"shared_lstm": True}, {"lstm_kwargs": {}}]
)
def test_lstm_options_that_ask_for_one_shared_core_do_not_warn(kwargs: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        toy_model(policy_kwargs=kwargs)


def test_a_small_batch_size_that_shortens_sequences_warns_at_the_line_of_the_caller() -> None:
    with pytest.warns(UserWarning, match="`batch_size`=8 leaves sequences of 8 steps") as caught:
        model = MemoryPPO("MlpPolicy", toy_vec_env(2), n_steps=64, batch_size=8, policy_kwargs=small(), device="cpu")
    assert model.seq_len == 8
    assert [warning.filename for warning in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # an explicit `seq_len`, or a short rollout, does not warn
        toy_model(n_steps=64, batch_size=8, seq_len=8)
        toy_model(n_steps=8, batch_size=8, seq_len=None)


@pytest.mark.parametrize("squash_output", [False, True])
@pytest.mark.parametrize("use_last_action", [False, True])
def test_gsde_samples_noise_at_its_frequency(squash_output: bool, use_last_action: bool) -> None:
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
    assert noises == [3] * 3 * 4  # at the start of each rollout, and every 4 of its 12 steps
    assert_exact_ratios(updates, 3)
    assert updates[-1]["train/std"] > 0
    actions = model.rollout_buffer.actions
    assert squash_output == bool((actions.abs() <= 1).all())
    taken = np.stack([toy.actions[-12:] for toy in env.envs], axis=1)
    want = 4 * actions.numpy() + 2 if squash_output else actions.numpy().clip(-2, 6)
    np.testing.assert_allclose(taken, want, atol=1e-5)
    action, _ = predict(model, np.zeros((4, 3), np.float32))
    assert all(space.contains(row) for row in action)


@stacks()
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
