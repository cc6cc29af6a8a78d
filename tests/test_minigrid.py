"""MiniGrid's Memory environments: both observations, the checkers, and comparison with MiniGrid's own wrappers."""

import sys
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.preprocessing import is_image_space

from sb3_cyborg import MemoryPPO
from sb3_cyborg.envs.minigrid import MINIGRID_MEMORY_IDS, OBSERVATIONS, make_minigrid
from tests.env_helpers import checker_warnings

wrappers = pytest.importorskip("minigrid.wrappers")

EXPECTED_WARNINGS = (
    "different from the unwrapped version",
    "system font",  # of pygame, on machines without fonts
    "pkg_resources",
)
SHAPES = {"onehot": (7 * 7 * (11 + 6 + 3),), "image": (56, 56, 3)}
FORWARD = 2


def spec_of(env_id: str, **kwargs: Any) -> EnvSpec:
    return EnvSpec(
        f"sb3_cyborg/{env_id}", entry_point="sb3_cyborg.envs.minigrid:make_minigrid", kwargs={"env_id": env_id, **kwargs}
    )


def test_ids_are_those_that_minigrid_registers() -> None:
    assert set(MINIGRID_MEMORY_IDS) == {env_id for env_id in gym.registry if env_id.startswith("MiniGrid-Memory")}


@pytest.mark.parametrize("observation", OBSERVATIONS)
@pytest.mark.parametrize("env_id", MINIGRID_MEMORY_IDS)
def test_checkers_find_nothing(env_id: str, observation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    assert checker_warnings(spec_of(env_id, observation=observation), EXPECTED_WARNINGS) == []


@pytest.mark.parametrize("observation", OBSERVATIONS)
@pytest.mark.parametrize("env_id", MINIGRID_MEMORY_IDS)
def test_random_steps_are_minigrids_own(env_id: str, observation: str) -> None:
    """With equal seeds and actions, observations equal those of MiniGrid's wrappers, and two environments equal each other."""
    envs = [make_minigrid(env_id, observation=observation) for _ in range(2)]
    wrapper = wrappers.OneHotPartialObsWrapper if observation == "onehot" else wrappers.RGBImgPartialObsWrapper
    raw = wrapper(gym.make(env_id, disable_env_checker=True).unwrapped)
    space = envs[0].observation_space
    assert isinstance(space, spaces.Box)
    assert space.shape == SHAPES[observation]
    assert is_image_space(space) == (observation == "image"), "or SB3 divides ones by 255"
    assert envs[0].action_space == raw.action_space == spaces.Discrete(7)
    raw.action_space.seed(0)

    seed: int | None = 3
    done = True
    for _ in range(1_000 if observation == "onehot" else 200):  # images are slow to draw
        if done:
            (raw_obs, _), *ours = (env.reset(seed=seed) for env in (raw, *envs))
            seed, done = None, False
        else:
            action = raw.action_space.sample()
            (raw_obs, *raw_rest, _), *ours = (env.step(action) for env in (raw, *envs))
            for step in ours:
                assert [*step[1:4]] == raw_rest
            done = any(raw_rest[1:])
            assert ("is_success" in ours[0][-1]) == done
        for obs in (ours[0][0], ours[1][0]):
            assert space.contains(obs)
            np.testing.assert_array_equal(obs, raw_obs["image"].reshape(space.shape))


@pytest.mark.parametrize("success", [True, False])
def test_success_is_reported(success: bool) -> None:
    env = make_minigrid("MiniGrid-MemoryS9-v0")
    env.reset(seed=0)
    world: Any = env.unwrapped
    x, y = world.success_pos if success else world.failure_pos
    between = y + (1 if y < world.height // 2 else -1)
    world.agent_pos, world.agent_dir = (x, between), 3 if y < between else 1
    _, reward, terminated, _, info = env.step(FORWARD)
    assert terminated
    assert info["is_success"] is success
    assert (float(reward) > 0) is success


def test_running_out_of_time_is_no_success() -> None:
    env = make_minigrid("MiniGrid-MemoryS9-v0", max_steps=2)
    env.reset(seed=0)
    assert "is_success" not in env.step(0)[4]
    _, _, terminated, truncated, info = env.step(0)
    assert (terminated, truncated) == (False, True)
    assert info["is_success"] is False


def test_moves_alone() -> None:
    """The actions left, right and forward have the same effect as in the full action space."""
    moves, everything = make_minigrid("MiniGrid-MemoryS7-v0", actions="move"), make_minigrid("MiniGrid-MemoryS7-v0")
    assert moves.action_space == spaces.Discrete(3)
    np.testing.assert_array_equal(moves.reset(seed=4)[0], everything.reset(seed=4)[0])
    for action in (0, 1, 2, 1):
        np.testing.assert_array_equal(moves.step(action)[0], everything.step(action)[0])
    world: Any = everything.unwrapped
    assert [world.actions(action).name for action in range(3)] == ["left", "right", "forward"]


def test_size_of_the_view() -> None:
    """The observation that recurrent-ppo-truncated-bptt trains on: 3x3 cells in 84x84 pixels."""
    image = make_minigrid("MiniGrid-MemoryS9-v0", observation="image", agent_view_size=3, tile_size=28)
    assert image.observation_space.shape == image.reset(seed=0)[0].shape == (84, 84, 3)
    onehot = make_minigrid("MiniGrid-MemoryS9-v0", agent_view_size=3)
    assert onehot.observation_space.shape == onehot.reset(seed=0)[0].shape == (180,)


def test_rendering() -> None:
    env = make_minigrid("MiniGrid-MemoryS7-v0", render_mode="rgb_array")
    env.reset(seed=0)
    assert np.asarray(env.render()).ndim == 3


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"'MiniGrid-MemoryS8-v0'.*Did you mean 'MiniGrid-MemoryS"):
        make_minigrid("MiniGrid-MemoryS8-v0")
    for options, message in (
        ({"observation": "one-hot"}, "observation 'one-hot'.*Did you mean 'onehot'"),
        ({"actions": "moves"}, "actions 'moves'.*Did you mean 'move'"),
        ({"render_mode": "rgb"}, "render mode 'rgb'.*'rgb_array'"),
        ({"tile_size": 0}, "`tile_size` must be a whole number"),
        ({"agent_view_size": 4}, "cannot be made with .*'agent_view_size': 4"),
        ({"view": 3}, "unexpected keyword argument 'view'"),
    ):
        with pytest.raises(ValueError, match=message):
            make_minigrid("MiniGrid-MemoryS7-v0", **options)


def test_a_missing_package_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "minigrid.envs", None)
    with pytest.raises(ImportError, match=r'pip install "sb3-cyborg\[minigrid\]"'):
        make_minigrid("MiniGrid-MemoryS7-v0")


@pytest.mark.parametrize(
    ("policy", "env_kwargs"),
    [
        ("MlpPolicy", {"actions": "move"}),
        ("CnnPolicy", {"observation": "image"}),
    ],
)
def test_memory_ppo_learns(policy: str, env_kwargs: dict[str, Any]) -> None:
    """RL Zoo makes it from the spec, with the ``env_kwargs`` of a YAML file."""
    venv = make_vec_env(spec_of("MiniGrid-MemoryS7-v0").make, n_envs=2, env_kwargs=env_kwargs)
    policy_kwargs: dict[str, Any] = {"hidden_dim": 8, "memory_kwargs": {"num_slots": 4}}
    if policy == "CnnPolicy":
        policy_kwargs["features_extractor_kwargs"] = {"features_dim": 8}
    model = MemoryPPO(policy, venv, n_steps=16, batch_size=32, n_epochs=1, seed=0, policy_kwargs=policy_kwargs)
    before = [parameter.detach().clone() for parameter in model.policy.parameters()]
    model.learn(64)
    assert any((one != other).any() for one, other in zip(before, model.policy.parameters(), strict=True))
    assert all(parameter.isfinite().all() for parameter in model.policy.parameters())
