"""Builds the environments of a config, for training and for evaluation."""

from typing import Any

from gymnasium import spaces
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.vec_env import VecEnv, VecFrameStack, VecNormalize

from sb3_cyborg.checks import unknown_name
from sb3_cyborg.envs import make_memory_vec_env
from sb3_cyborg.maskable import is_masking_supported
from sb3_cyborg.memory_ppo.memory_ppo import MemoryPPO
from sb3_cyborg.memory_ppo.ranks import Ranks
from sb3_cyborg.trainers.config import TrainerConfig


def envs_of_rank(config: TrainerConfig, ranks: Ranks) -> int:
    """
    :param config: The settings.
    :param ranks: The processes that train together.
    :return: Number of environments of each of them.
    :raises ValueError: if they cannot be divided equally.
    """
    size, n_envs = ranks.size, config.n_envs
    if n_envs % size:
        below = max(n_envs // size, 1) * size
        raise ValueError(
            f"`n_envs`={n_envs} environments cannot be divided among {size} processes; the nearest numbers that can: {below} "
            f"and {below + size}."
        )
    return n_envs // size


def make_training_env(config: TrainerConfig, normalize: VecNormalize | None = None, ranks: Ranks = Ranks()) -> VecEnv:  # noqa: B008  # frozen
    """
    :param config: The settings.
    :param normalize: ``VecNormalize`` of a checkpoint, whose statistics are continued, or ``None``.
    :param ranks: The processes that train together, among which the environments are divided.
    :return: The training environments of this process.
    :raises ValueError: for settings that do not fit the environment.
    """
    n_envs = envs_of_rank(config, ranks)
    env = _stacked_env(config, n_envs, first=ranks.rank * n_envs)
    if normalize is not None:
        normalize.set_venv(env)
        return normalize
    arguments = config.normalize_arguments()
    return env if arguments is None else _normalized(config, env, arguments)


def make_evaluation_env(config: TrainerConfig, render_mode: str | None = None) -> VecEnv:
    """
    :param config: The settings.
    :param render_mode: Render mode of gymnasium; ``None`` leaves it to the environment.
    :return: One environment as in training. Its normalization is not updated and does not change rewards.
    """
    env = _stacked_env(config, 1, render_mode)
    if (arguments := config.normalize_arguments()) is not None:
        env = VecNormalize(env, **{**arguments, "norm_reward": False}, training=False)
    return MemoryPPO._wrap_env(env, verbose=0, monitor_wrapper=False)


def _stacked_env(config: TrainerConfig, n_envs: int, render_mode: str | None = None, first: int = 0) -> VecEnv:
    # Native environments cannot render in a window.
    kwargs = config.env_kwargs if render_mode is None else {**config.env_kwargs, "render_mode": render_mode}
    vec_env = config.vec_env if render_mode is None else "dummy"
    seed = None if config.seed is None else config.seed + first
    env = make_memory_vec_env(config.env, n_envs, seed=seed, env_kwargs=kwargs, vec_env=vec_env)
    if config.frame_stack == 1:
        return env
    space = env.observation_space
    parts = space.spaces.values() if isinstance(space, spaces.Dict) else [space]
    if not all(isinstance(part, spaces.Box) for part in parts):
        raise ValueError(f"`frame_stack`={config.frame_stack} needs Box observations, but {config.env!r} has {space}.")
    return VecFrameStack(env, config.frame_stack)


def _normalized(config: TrainerConfig, env: VecEnv, arguments: dict[str, Any]) -> VecNormalize:
    space = env.observation_space
    parts = space.spaces if isinstance(space, spaces.Dict) else {"": space}
    keys = arguments.get("norm_obs_keys") or parts
    if arguments.get("norm_obs", True):
        if images := [key for key in keys if key in parts and is_image_space(parts[key])]:
            raise ValueError(
                f"`normalize` would normalize images{' ' + repr(images[0]) if images[0] else ''}, which the policy divides by "
                "255 already: use {norm_obs: false}, or list the other observations in `norm_obs_keys`."
            )
        if isinstance(space, spaces.Dict) and (unknown := [key for key in keys if key not in parts]):
            raise unknown_name("key in `norm_obs_keys`", unknown[0], parts)
    try:
        return VecNormalize(env, **arguments)
    except (TypeError, ValueError) as error:
        raise ValueError(f"`normalize` cannot be used for {config.env!r}: {error}") from error


def policy_for(config: TrainerConfig, env: VecEnv) -> str:
    """
    :param config: The settings.
    :param env: The training environments.
    :return: Name of the policy: that of the config, or for ``"auto"`` the one that fits the observation space.
    :raises ValueError: for a ``CnnPolicy`` without images, and for a ``MultiInputPolicy`` without Dict observations.
    """
    policy, space = config.policy, env.observation_space
    if policy.startswith("Cnn") and not is_image_space(space):
        raise ValueError(
            f"`policy`={policy!r} needs images, but {config.env!r} has {space}; 'auto' selects a policy that fits."
        )
    if policy.startswith("MultiInput") and not isinstance(space, spaces.Dict):
        raise ValueError(
            f"`policy`={policy!r} needs a Dict space, but {config.env!r} has {space}; 'auto' selects a policy that fits."
        )
    if policy != "auto":
        return policy
    if isinstance(space, spaces.Dict):
        return "MultiInputPolicy"
    return "CnnPolicy" if is_image_space(space) else "MlpPolicy"


def uses_masks(config: TrainerConfig, env: VecEnv) -> bool:
    """
    :param config: The settings.
    :param env: The training environments.
    :return: Whether the agent uses action masks: as the config says, or for ``null`` if the environments have them.
    :raises ValueError: if the config demands masks that the environments do not have.
    """
    offered = is_masking_supported(env) and not isinstance(env.action_space, spaces.Box)
    if config.use_masking and not offered:
        raise ValueError(
            f"`use_masking`=true needs discrete actions and a method `action_masks()`, which {config.env!r} does not have; "
            "null uses masks where there are any."
        )
    return offered if config.use_masking is None else config.use_masking
