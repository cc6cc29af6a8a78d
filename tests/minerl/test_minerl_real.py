"""The real Minecraft. Skipped if it is not installed, see docs/minerl.md."""

import pytest

from sb3_cyborg.envs.minerl import MineRLEnv
from sb3_cyborg.envs.minerl.process import find_simulator, import_minerl


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("env_id", ["minerl_treechop", "minerl_navigate_dense", "minerl_obtain_diamond"])
def test_an_episode_in_minecraft(env_id: str) -> None:
    import_minerl()
    try:
        find_simulator()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    env = MineRLEnv(env_id, render_mode="rgb_array")
    try:
        for seed in (1, 2):
            obs, info = env.reset(seed=seed)
            env.action_space.seed(seed)
            images = []
            for _ in range(200):
                assert env.observation_space.contains(obs)
                obs, _, terminated, truncated, info = env.step(env.action_space.sample())
                assert "minerl_fault" not in info
                images.append(env.render())
                if terminated or truncated:
                    obs, info = env.reset()
            assert any((image != images[0]).any() for image in images if image is not None)
        assert (env.launches, env.faults) == (1, 0)
    finally:
        env.close()
