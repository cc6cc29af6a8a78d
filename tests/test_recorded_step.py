"""The recorded step of acting: it equals the step as it is, and what cannot be recorded is told."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import nn

from sb3_cyborg import MemoryPPO, kernels
from sb3_cyborg.memory_ppo.policies import (
    MemoryActorCriticCnnPolicy,
    MemoryActorCriticPolicy,
    MemoryMultiInputActorCriticPolicy,
)
from sb3_cyborg.memory_ppo.recorded_step import RecordedStep
from sb3_cyborg.sequence_model import State
from tests.helpers import stacks

pytestmark = pytest.mark.skipif(kernels.status().isa is None, reason="needs compiled kernels")

ROWS, STEPS = 3, 12
BOX = spaces.Box(-1.0, 1.0, (2,), np.float32)
ACTIONS = {
    "Discrete": spaces.Discrete(4),
    "Box": BOX,
    "MultiDiscrete": spaces.MultiDiscrete([3, 2]),
    "MultiBinary": spaces.MultiBinary(3),
}
OBSERVATIONS = {
    "Discrete": spaces.Discrete(5),
    "MultiDiscrete": spaces.MultiDiscrete([3, 4]),
    "MultiBinary": spaces.MultiBinary(4),
    "matrix": spaces.Box(-1.0, 1.0, (2, 3), np.float32),
    "float64": spaces.Box(-1.0, 1.0, (3,), np.float64),
}
Outputs = list[tuple[th.Tensor, th.Tensor, th.Tensor, State]]


def run(policy: MemoryActorCriticPolicy, recorded: bool, masks: bool = False, rows: int = ROWS) -> Outputs:
    """:return: Actions, values, log-probabilities and states of some steps, with random episode starts."""
    policy.set_training_mode(False)
    policy._recorded_step = RecordedStep(policy)
    if not recorded:
        policy._recorded_step.reason = "off"
    rng, space = np.random.default_rng(0), policy.observation_space
    space.seed(0)
    th.manual_seed(1)
    state, outputs = policy.get_initial_state(rows), []
    for t in range(STEPS):
        samples = [space.sample() for _ in range(rows)]
        obs = (
            {key: np.stack([sample[key] for sample in samples]) for key in space.spaces}
            if isinstance(space, spaces.Dict)
            else np.stack(samples)
        )
        starts = th.as_tensor(rng.random(rows) < (1.0 if t == 0 else 0.2), dtype=th.float32)
        legal = th.as_tensor(rng.random((rows, 4)) < 0.6) if masks else None
        if legal is not None:
            legal[:, 0] = True
        with th.no_grad():
            step = policy(policy.obs_to_tensor(obs)[0], state, starts, action_masks=legal)
        outputs.append(step)
        state = step[3]
    return outputs


def assert_recorded_equals(policy: MemoryActorCriticPolicy, masks: bool = False) -> RecordedStep:
    """Require that recorded steps equal the others, with the same random numbers."""
    with th.no_grad():
        for parameter in policy.parameters():  # heads begin near zero
            parameter.add_(0.05 * th.randn_like(parameter))
    plain, recorded = run(policy, False, masks), run(policy, True, masks)
    for (actions, values, log_prob, state), got in zip(plain, recorded, strict=True):
        th.testing.assert_close(got[0], actions, rtol=1e-4, atol=1e-5)
        th.testing.assert_close(got[1], values, rtol=1e-4, atol=1e-5)
        th.testing.assert_close(got[2], log_prob, rtol=1e-4, atol=1e-5)
        assert got[3].keys() == state.keys()
        for name, leaf in state.items():
            th.testing.assert_close(got[3][name], leaf, rtol=1e-4, atol=1e-5)
    step = policy._recorded_step
    assert step is not None
    return step


def make_policy(**kwargs: object) -> MemoryActorCriticPolicy:
    settings: dict[str, object] = {"hidden_dim": 12, "net_arch": [8]} | kwargs
    observation = settings.pop("observation_space", spaces.Box(-1.0, 1.0, (3,), np.float32))
    action = settings.pop("action_space", ACTIONS["Discrete"])
    return MemoryActorCriticPolicy(observation, action, lambda _: 1e-3, **settings)  # type: ignore[arg-type]


@stacks()
def test_all_stacks(encoder: str, memory: str) -> None:
    step = assert_recorded_equals(make_policy(encoder=encoder, memory=memory))
    assert step.reason == ""
    assert step.tell_once() == ""


@pytest.mark.parametrize("inputs", [{}, {"use_last_action": True, "use_time": True}], ids=["plain", "inputs"])
@pytest.mark.parametrize("space", sorted(ACTIONS))
def test_action_spaces(space: str, inputs: dict[str, bool]) -> None:
    step = assert_recorded_equals(make_policy(action_space=ACTIONS[space], **inputs))
    expected = "Steps of acting are recorded without the choice of actions" if space == "MultiBinary" else ""
    assert step.tell_once() == expected
    assert step.tell_once() == ""


@pytest.mark.parametrize("squash_output", [False, True])
def test_state_dependent_exploration(squash_output: bool) -> None:
    policy = make_policy(action_space=BOX, use_sde=True, squash_output=squash_output)
    policy.reset_noise(ROWS)
    step = assert_recorded_equals(policy)
    assert "without the choice of actions" in step.tell_once()


@pytest.mark.parametrize("space", sorted(OBSERVATIONS))
def test_observation_spaces(space: str) -> None:
    assert assert_recorded_equals(make_policy(observation_space=OBSERVATIONS[space])).reason == ""


def test_dictionaries_and_images() -> None:
    image = spaces.Box(0, 255, (3, 36, 36), np.uint8)
    action = ACTIONS["Discrete"]
    entries = spaces.Dict({"vector": spaces.Box(-1.0, 1.0, (3,), np.float32), "number": spaces.Discrete(4)})
    assert assert_recorded_equals(MemoryMultiInputActorCriticPolicy(entries, action, lambda _: 1e-3)).tell_once() == ""
    step = assert_recorded_equals(MemoryActorCriticCnnPolicy(image, action, lambda _: 1e-3))
    assert step.tell_once() == "Steps of acting are recorded without features"


def test_action_masks() -> None:
    policy = make_policy()
    assert assert_recorded_equals(policy, masks=True).reason == ""
    legal = th.tensor([[False, True, False, False]]).expand(ROWS, 4)
    state = policy.get_initial_state(ROWS)
    with th.no_grad():
        for _ in range(20):
            actions, _, _, state = policy(th.randn(ROWS, 3), state, th.zeros(ROWS), action_masks=legal)
            assert (actions == 1).all()


class Countdown(BaseFeaturesExtractor):
    """A features extractor that does more than return features."""

    calls = 0

    def __init__(self, observation_space: gym.Space[np.ndarray]) -> None:
        super().__init__(observation_space, 3)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        Countdown.calls += 1
        return observations


def test_modules_of_other_packages_are_called() -> None:
    policy = make_policy(features_extractor_class=Countdown)
    Countdown.calls = 0
    assert assert_recorded_equals(policy).tell_once() == "Steps of acting are recorded without features"
    assert Countdown.calls == 2 * STEPS


class Scaled(nn.Module):
    def forward(self, x: th.Tensor) -> th.Tensor:
        return x * 2


def test_heads_of_other_packages_are_not_recorded() -> None:
    policy = make_policy()
    policy.mlp_extractor.policy_net.append(Scaled())
    step = assert_recorded_equals(policy)
    assert step.tell_once() == "Steps of acting run as they are, without a recording: it has modules of other packages"


class Overriding(MemoryActorCriticPolicy):
    def extract_features(self, obs: Any, features_extractor: BaseFeaturesExtractor | None = None) -> th.Tensor:
        return super().extract_features(obs * 2, features_extractor)


def test_a_subclass_that_overrides_the_step_is_not_recorded() -> None:
    policy = Overriding(spaces.Box(-1.0, 1.0, (3,), np.float32), spaces.Discrete(3), lambda _: 1e-3)
    assert "Overriding overrides extract_features" in assert_recorded_equals(policy).reason


def test_hooks_are_called() -> None:
    policy = make_policy()
    run(policy, True)
    seen: list[th.Tensor] = []
    handle = policy.action_net.register_forward_hook(lambda _, __, output: seen.append(output))
    obs, state, starts = th.randn(ROWS, 3), policy.get_initial_state(ROWS), th.ones(ROWS)
    with th.no_grad():
        policy(obs, state, starts)
        assert len(seen) == 1
        handle.remove()
        policy(obs, state, starts)
    assert len(seen) == 1


def replace_a_weight(policy: MemoryActorCriticPolicy) -> None:
    policy.value_net.weight = nn.Parameter(policy.value_net.weight * 3)


def replace_a_module(policy: MemoryActorCriticPolicy) -> None:
    policy.mlp_extractor.value_net = nn.Sequential(nn.Linear(policy.core.output_dim, 8), nn.Tanh())


def load_a_vector(policy: MemoryActorCriticPolicy) -> None:
    policy.load_from_vector(policy.parameters_to_vector() * 1.5)


@pytest.mark.parametrize("change", [replace_a_weight, replace_a_module, load_a_vector])
def test_a_policy_that_changes_is_recorded_again(change: Callable[[MemoryActorCriticPolicy], None]) -> None:
    policy = make_policy()
    run(policy, True)
    change(policy)
    obs, state, starts = th.randn(ROWS, 3), policy.get_initial_state(ROWS), th.ones(ROWS)
    with th.no_grad():
        latent, _ = policy._core_step(obs, state, starts)
        wanted = policy.value_net(policy.mlp_extractor.forward_critic(latent))
        for _ in range(2):
            th.testing.assert_close(policy(obs, state, starts)[1], wanted, rtol=1e-4, atol=1e-5)


def test_a_gradient_is_not_lost() -> None:
    policy = make_policy()
    run(policy, True)
    values = policy(th.randn(ROWS, 3), policy.get_initial_state(ROWS), th.ones(ROWS))[1]
    values.sum().backward()
    assert policy.value_net.weight.grad is not None


def test_nan_logits_are_an_error() -> None:
    policy = make_policy()
    run(policy, True)
    with th.no_grad():
        assert isinstance(policy.action_net, nn.Linear)
        policy.action_net.bias.fill_(float("nan"))
        with pytest.raises(ValueError, match="logits of the actions are nan"):
            policy(th.randn(ROWS, 3), policy.get_initial_state(ROWS), th.ones(ROWS))


def test_a_nan_of_one_row_stays_in_it() -> None:
    policy = make_policy(memory="ring")
    run(policy, True)
    obs, starts = th.randn(ROWS, 3), th.zeros(ROWS)
    clean = policy.get_initial_state(ROWS)
    spoiled = {name: leaf.clone() for name, leaf in clean.items()}
    for leaf in spoiled.values():
        leaf[0] = float("nan")
    with th.no_grad():
        wanted = policy(obs, clean, starts, deterministic=True)
        starts[0] = 1.0  # the reset removes it
        got = policy(obs, spoiled, starts, deterministic=True)
    th.testing.assert_close(got[1], wanted[1])
    for name, leaf in got[3].items():
        th.testing.assert_close(leaf, wanted[3][name])


def test_threads_that_share_a_policy_do_not_share_its_memory() -> None:
    policy = make_policy(memory="ring", hidden_dim=48)
    policy.set_training_mode(False)
    generator = th.Generator().manual_seed(0)
    observations = [th.randn(ROWS, 3, generator=generator) for _ in range(60)]

    def act(obs: th.Tensor) -> list[th.Tensor]:
        state, starts, values = policy.get_initial_state(ROWS), th.ones(ROWS), []
        with th.no_grad():
            for _ in range(8):
                _, value, _, state = policy(obs, state, starts, deterministic=True)
                values.append(value)
        return values

    wanted = [act(obs) for obs in observations]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(act, observations))
    for one, other in zip(got, wanted, strict=True):
        th.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_threads_record_their_own_policies() -> None:
    def record(seed: int) -> str:
        th.set_num_threads(1)
        policy = make_policy(memory=("none", "ring", "kv", "slot")[seed % 4])
        run(policy, True)
        step = policy._recorded_step
        assert step is not None
        return step.reason

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(record, range(12))) == [""] * 12


def test_learn_tells_what_is_not_recorded(capsys: pytest.CaptureFixture[str]) -> None:
    settings: dict[str, Any] = {"n_steps": 16, "batch_size": 16, "n_epochs": 1, "verbose": 1}
    MemoryPPO("MlpPolicy", "CartPole-v1", policy_kwargs={"hidden_dim": 8}, **settings).learn(32)
    assert "recorded" not in capsys.readouterr().out
    kwargs = {"hidden_dim": 8, "features_extractor_class": Cart}
    MemoryPPO("MlpPolicy", "CartPole-v1", policy_kwargs=kwargs, **settings).learn(32)
    assert capsys.readouterr().out.count("Steps of acting are recorded without features") == 1


class Cart(BaseFeaturesExtractor):
    def __init__(self, observation_space: gym.Space[np.ndarray]) -> None:
        super().__init__(observation_space, 4)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return observations
