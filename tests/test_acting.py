"""The acting loop: viewers take the actions of ``predict`` with a State threaded by hand, and evaluate as SB3 does."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecNormalize

from sb3_cyborg import MemoryPPO, make_memory_vec_env
from sb3_cyborg.trainers.acting import ActingLoop, EpisodeResult, env_to_act_in
from sb3_cyborg.viewers.inspection import inspect_episode
from sb3_cyborg.viewers.recording import enjoy
from tests.helpers import ToyEnv, predict, toy_model, toy_vec_env
from tests.trainer_helpers import tiny

LENGTH = 6


class PictureEnv(ToyEnv):
    """Episodes of ``LENGTH`` steps with a picture of one colour."""

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012  # gymnasium's

    def __init__(self, render_mode: str | None = "rgb_array") -> None:
        super().__init__()
        self.render_mode, self.timestep = render_mode, 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        self.timestep = 0
        return super().reset(seed=seed, options=options)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        obs, reward, *_ = super().step(action)
        self.timestep += 1
        return obs, reward, self.timestep == LENGTH, False, {}

    def render(self) -> Any:
        return np.full((8, 8, 3), 10 * self.timestep, dtype=np.uint8)


@pytest.fixture
def model() -> MemoryPPO:
    """:return: An agent whose actions depend on its memory."""
    agent = toy_model(policy_kwargs={"memory": "ring", "use_last_action": True})
    with th.no_grad():
        for parameter in agent.policy.parameters():
            parameter.mul_(3)
    return agent


def by_hand(model: MemoryPPO, steps: int, deterministic: bool, forget: bool = False) -> np.ndarray:
    """:return: Actions of ``predict``, with the State threaded here, or dropped at every step."""
    env = DummyVecEnv([PictureEnv])
    env.seed(3)
    th.manual_seed(3)
    obs: Any = env.reset()
    state: Any = None
    starts, actions = np.ones(1, dtype=bool), []
    for _ in range(steps):
        action, state = predict(model, obs, None if forget else state, starts, deterministic=deterministic)
        actions.append(action[0])
        obs, _, starts, _ = env.step(action)
    return np.array(actions)


def inspected(model: MemoryPPO, deterministic: bool, folder: Path) -> Any:
    return inspect_episode(model, PictureEnv(), deterministic=deterministic, seed=3).actions.squeeze()


def recorded(model: MemoryPPO, deterministic: bool, folder: Path) -> Any:
    env = PictureEnv()
    enjoy(model, env, video=folder / "a.gif", n_episodes=2, deterministic=deterministic, seed=3, report=lambda _: None)
    return env.actions


def shown(model: MemoryPPO, deterministic: bool, folder: Path) -> Any:
    class Window(PictureEnv):
        metadata = {"render_modes": ["human"]}  # noqa: RUF012  # gymnasium's

    env = Window("human")
    enjoy(model, env, n_episodes=2, deterministic=deterministic, seed=3, report=lambda _: None)
    return env.actions


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("viewer", [inspected, recorded, shown])
def test_viewers_act_as_predict_by_hand(
    model: MemoryPPO,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    viewer: Callable[[MemoryPPO, bool, Path], Any],
    deterministic: bool,
) -> None:
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    actions = np.asarray(viewer(model, deterministic, tmp_path))
    assert len(actions) == (LENGTH if viewer is inspected else 2 * LENGTH)
    np.testing.assert_array_equal(actions, by_hand(model, len(actions), deterministic))


def test_the_memory_matters_to_these_actions(model: MemoryPPO) -> None:
    """Otherwise the comparison above could not show a State that is lost."""
    threaded, forgotten = (by_hand(model, 2 * LENGTH, False, forget=forget) for forget in (False, True))
    assert not np.array_equal(threaded, forgotten)


def test_evaluation_is_that_of_sb3(tmp_path: Path) -> None:
    for settings in ({"env": "CartPole-v1", "normalize": True}, {"env": "sb3_cyborg/MemoryChain-v0"}):
        trainer = tiny(tmp_path, **settings)
        trainer.train(32)
        env = trainer.make_eval_env()
        env.seed(trainer.config.seed + 10_000 if trainer.config.seed is not None else None)
        expected: Any = evaluate_policy(trainer.model, env, 5, return_episode_rewards=True)
        assert trainer.evaluate_episodes(5) == expected


def loop_results(model: MemoryPPO, env: VecEnv, steps: int) -> list[EpisodeResult]:
    loop = ActingLoop(model, env, seed=0)
    return [result for _ in range(steps) for result in loop.step().finished]


class TwoLives(gym.Wrapper[Any, Any, Any, Any]):
    """Ends every third step for the agent, as Atari's wrapper does when a life is lost."""

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        super().__init__(env)
        self.over, self.steps = True, 0

    def reset(self, **kwargs: Any) -> Any:
        if self.over:
            self.steps = 0
            return self.env.reset(**kwargs)
        return np.zeros(self.observation_space.shape or (), dtype=np.float32), {}

    def step(self, action: Any) -> Any:
        obs, reward, self.over, truncated, info = self.env.step(action)
        self.steps += 1
        return obs, reward, self.over or self.steps % 3 == 0, truncated, info


def test_a_lost_life_is_not_the_end_of_an_episode(model: MemoryPPO) -> None:
    monitored = loop_results(model, DummyVecEnv([lambda: TwoLives(Monitor(PictureEnv()))]), 2 * LENGTH)
    assert [result.length for result in monitored] == [LENGTH, LENGTH]
    plain = loop_results(model, DummyVecEnv([lambda: TwoLives(PictureEnv())]), 2 * LENGTH)
    assert [result.length for result in plain] == [LENGTH // 2] * 4


def test_rewards_are_not_normalized(model: MemoryPPO) -> None:
    env = VecNormalize(DummyVecEnv([PictureEnv]), training=False)
    env.ret_rms.var = np.array(100.0)
    (normalized,), (plain,) = (loop_results(model, other, LENGTH) for other in (env, DummyVecEnv([PictureEnv])))
    assert normalized.total == pytest.approx(plain.total)
    assert plain.total != 0


def test_environments_to_act_in(model: MemoryPPO, tmp_path: Path) -> None:
    own = model.get_env()
    assert env_to_act_in(model, None) is own
    vectorized = toy_vec_env(1, ToyEnv)
    assert env_to_act_in(model, vectorized) is vectorized
    assert env_to_act_in(model, PictureEnv()).num_envs == 1
    assert env_to_act_in(model, make_memory_vec_env("CartPole-v1", n_envs=2)).num_envs == 2
    model.save(tmp_path / "model")
    with pytest.raises(ValueError, match="loaded without an environment: pass `env`"):
        env_to_act_in(MemoryPPO.load(tmp_path / "model"), None)
