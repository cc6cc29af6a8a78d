"""Checks of environments: their spaces, and the form of the values that they return."""

import types
from collections.abc import Callable, Mapping
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv
from torch import nn

# --- spaces -------------------------------------------------------------------------------------------------------------


def check_spaces(env: object) -> None:
    """
    Require an environment with spaces that a policy can read and act in.

    :param env: An environment, or vectorized environments.
    :raises ValueError: for another object and for other spaces, with what would work.
    """
    observation_space, action_space = (getattr(env, name, None) for name in ("observation_space", "action_space"))
    if not isinstance(observation_space, spaces.Space) or not isinstance(action_space, spaces.Space):
        raise ValueError(f"`env` must be an environment with an observation and an action space, or its id, got {env!r}.")
    problem = _problem_of_dict(observation_space) if isinstance(observation_space, spaces.Dict) else None
    if problem := problem or _problem_of_observation(observation_space):
        raise ValueError(f"Observation space {observation_space}: {problem}.")
    if problem := _problem_of_action(action_space):
        raise ValueError(f"Action space {action_space}: {problem}.")


def _problem_of_dict(space: spaces.Dict) -> str | None:
    """:return: What is wrong with the keys of a Dict space; they become names in a ``torch.nn.ModuleDict``."""
    if not space.spaces:
        return "a Dict space needs at least one entry"
    for key in space.spaces:
        if not isinstance(key, str) or not key or "." in key or hasattr(nn.ModuleDict, key):
            return (
                f"the key {key!r} cannot be the name of a PyTorch module; rename it, e.g. to '{str(key).replace('.', '_')}_'"
            )
    return None


def _problem_of_observation(space: spaces.Space[Any], nested: bool = False) -> str | None:
    if isinstance(space, spaces.Dict) and not nested:
        problems = ((key, _problem_of_observation(part, nested=True)) for key, part in space.spaces.items())
        return next((f"entry {key!r}: {problem}" for key, problem in problems if problem), None)
    if isinstance(space, spaces.Box):
        if not space.shape:
            return "a Box without dimensions is not supported; use one of shape (1,)"
        return None if np.prod(space.shape) else "a Box without elements holds nothing to observe"
    return _problem_of_discrete(
        space, "a Box, Discrete, MultiDiscrete or MultiBinary" + (" space" if nested else ", or a Dict of them")
    )


def _problem_of_action(space: spaces.Space[Any]) -> str | None:
    if isinstance(space, spaces.Box):
        if not space.shape or not np.prod(space.shape):
            return "a Box without dimensions or elements is not supported; use one of shape (1,)"
        with np.errstate(over="ignore"):
            finite = np.isfinite(space.high.astype(np.float32) - space.low.astype(np.float32)).all()
        return None if finite else "the bounds of a Box and their difference must be finite float32 numbers, e.g. -1 and 1"
    if isinstance(space, spaces.MultiBinary) and not isinstance(space.n, int):
        return f"its size must be a number; flatten it to MultiBinary({np.prod(space.shape)})"
    return _problem_of_discrete(space, "a Box, Discrete, MultiDiscrete or MultiBinary space")


def _problem_of_discrete(space: spaces.Space[Any], works: str) -> str | None:
    """:return: What is wrong with a space that is no Box."""
    if isinstance(space, spaces.MultiBinary):
        return None
    if not isinstance(space, (spaces.Discrete, spaces.MultiDiscrete)):
        return f"it must be {works}"
    if isinstance(space, spaces.MultiDiscrete) and space.nvec.ndim != 1:
        return f"`nvec` must have one dimension; flatten it to MultiDiscrete({space.nvec.flatten().tolist()})"
    if np.any(np.asarray(getattr(space, "start", 0)) != 0):
        return "values must start at 0; subtract `start` in the environment"
    return None


CHECKED = "_sb3_cyborg_checked"
"""Attribute of methods that check the values of an environment, see :func:`check_returns`."""

# --- values -------------------------------------------------------------------------------------------------------------


def check_observations(obs: Any, space: spaces.Space[Any], n_envs: int, when: str) -> None:
    """
    Require observations of all environments that have the shape and the dtype of their space.

    :param obs: Observations, (N, ...), or a dictionary of them.
    :param space: Observation space.
    :param n_envs: Number of environments N.
    :param when: Time or origin of the observations, for the message.
    :raises ValueError: for other shapes and dtypes, and values that the dtype of the space cannot hold.
    """
    for key, values, part in _entries(obs, space, f"The environments {when}"):
        wanted = (n_envs, *(part.shape or ()))
        name = f"Observation{key} of the environments {when}"
        if not isinstance(values, np.ndarray):
            raise ValueError(f"{name} must be an array of shape {wanted}, got {type(values).__name__}.")
        if values.shape != wanted:
            raise ValueError(f"{name} has shape {values.shape}, but {n_envs} environments with {part} must return {wanted}.")
        if problem := _problem_of_values(values, part):
            row = next((row for row in range(n_envs) if _problem_of_values(values[row], part)), 0)
            raise ValueError(f"Observation{key} of environment {row} {when} {problem}.")


def check_predicted(obs: Any, space: spaces.Space[Any]) -> None:
    """
    Require observations for ``predict`` that are arrays of numbers, or a dictionary of them, as their space declares.

    :param obs: One observation, or a batch of them.
    :param space: Observation space.
    :raises ValueError: for another structure, values that are no numbers, an empty batch, and numbers out of a discrete space.
    """
    if isinstance(obs, Mapping) and not isinstance(space, spaces.Dict):
        raise ValueError(f"`predict` must get an array of {space} as observation, got a dictionary with {sorted(obs)}.")
    for key, given, part in _entries(obs, space, "`predict`"):
        values = np.asarray(given)
        discrete = isinstance(part, (spaces.Discrete, spaces.MultiDiscrete))
        if values.dtype.kind not in "fiub" or values.size == 0:
            raise ValueError(
                f"Observation{key} in `predict` must hold numbers, got {values.dtype} of shape {values.shape} for {part}."
            )
        if discrete and values.shape[values.ndim - len(part.shape or ()) :] == part.shape and _problem_of_values(values, part):
            raise ValueError(f"Observation{key} in `predict` {_problem_of_values(values, part)}.")


def check_step(rewards: Any, dones: Any, infos: Any, n_envs: int, when: str) -> None:
    """
    Require one number, one truth value and one dictionary for each environment.

    :param rewards: (N,).
    :param dones: Whether the step ended an episode, (N,).
    :param infos: Dictionaries, N of them. If one has ``"episode"``, it is a dictionary with the return ``"r"`` and the length
        ``"l"``.
    :param n_envs: Number of environments N.
    :param when: Time of the step, for the message.
    :raises ValueError: for other shapes, dtypes and structures.
    """
    for name, values, kinds, what in (("Rewards", rewards, "fiub", "numbers"), ("Dones", dones, "b", "True or False")):
        if np.shape(values) != (n_envs,):
            raise ValueError(
                f"{name} of the environments {when} have shape {np.shape(values)}, but {n_envs} environments must return "
                f"({n_envs},)."
            )
        if np.asarray(values).dtype.kind not in kinds:
            row = next((row for row in range(n_envs) if np.asarray(values[row]).dtype.kind not in kinds), 0)
            raise ValueError(f"{name} of the environments {when} must be {what}, got {values[row]!r} of environment {row}.")

    if len(infos) != n_envs:
        raise ValueError(f"Infos of the environments {when} must be {n_envs} dictionaries, got {len(infos)}.")
    for row, info in enumerate(infos):
        if "episode" in info and not (isinstance(info["episode"], Mapping) and {"r", "l"} <= info["episode"].keys()):
            raise ValueError(
                f"Info 'episode' of environment {row} {when} must be a dictionary with 'r' and 'l', got {info['episode']!r}."
            )


USUAL_REWARDS = (float, int, np.float64, np.float32)
USUAL_ENDS = (bool, np.bool_)
USUAL_INTEGERS = (int, np.int64, np.int32)


def check_returns(env: VecEnv) -> None:
    """
    Check the values that each environment of a ``DummyVecEnv`` returns, from now on.

    A ``DummyVecEnv`` assigns them to arrays, where NumPy broadcasts a wrong shape, wraps numbers that are out of range and
    takes ``"no"`` for true. The arrays do not show it, so ``reset`` and ``step`` of each environment are replaced by methods
    that check what they return.

    :param env: Vectorized environments of any class.
    """
    base = env.unwrapped
    if isinstance(base, DummyVecEnv):
        for index, outer in enumerate(base.envs):
            # Monitor converts rewards to floats, so the environment inside it is checked.
            inner = outer.env if isinstance(outer, Monitor) else outer
            if not getattr(inner.step, CHECKED, False):
                _check_returns_of(inner, index)


def _check_returns_of(env: gym.Env[Any, Any], index: int) -> None:
    """Replace ``reset`` and ``step`` of an environment, as bound methods, so that a deep copy of it calls its own."""
    inherited_reset, inherited_step = (_inherited(env, name) for name in ("reset", "step"))
    of_environment = f"of environment {index}"
    is_usual = _usual_check(env.observation_space)

    def reset(self: gym.Env[Any, Any], **kwargs: Any) -> Any:
        result = inherited_reset(self, **kwargs)
        if not isinstance(result, tuple) or len(result) != 2 or not isinstance(result[1], dict):
            raise ValueError(f"`reset` {of_environment} must return (observation, info), got {result!r}.")
        check_observation(result[0], self.observation_space, f"`reset` {of_environment}")
        return result

    def step(self: gym.Env[Any, Any], action: Any) -> Any:
        result = inherited_step(self, action)
        if is_usual is not None and type(result) is tuple and len(result) == 5:
            # The usual types by themselves: the full check would take a third of the time of a simple environment.
            obs, reward, terminated, truncated, info = result
            usual = is_usual(obs) and type(info) is dict
            if usual and type(reward) in USUAL_REWARDS and type(terminated) in USUAL_ENDS and type(truncated) in USUAL_ENDS:
                return result
        _check_result(result, self.observation_space, f"`step` {of_environment}")
        return result

    setattr(step, CHECKED, True)
    for method in (reset, step):
        setattr(env, method.__name__, types.MethodType(method, env))


def _usual_check(space: spaces.Space[Any]) -> Callable[[Any], bool] | None:
    """:return: A short check of observations, false for valid ones of unusual types, too; ``None`` if a space has none."""
    if isinstance(space, spaces.Box):
        shape, dtype = space.shape, space.dtype
        return lambda obs: type(obs) is np.ndarray and obs.shape == shape and obs.dtype == dtype
    if isinstance(space, spaces.Discrete):
        size = int(space.n)
        return lambda obs: type(obs) in USUAL_INTEGERS and 0 <= obs < size
    return None


def _inherited(env: gym.Env[Any, Any], name: str) -> Callable[..., Any]:
    """:return: A method of the class of an environment, or the function that the instance has in its place."""
    own = vars(env).get(name)
    return getattr(type(env), name) if own is None else lambda _, *args, **kwargs: own(*args, **kwargs)


def _check_result(result: Any, space: spaces.Space[Any], where: str) -> None:
    """Raise a ``ValueError`` for values of ``step`` that are not those of gymnasium's API."""
    if not isinstance(result, tuple) or len(result) != 5:
        raise ValueError(f"{where} must return (observation, reward, terminated, truncated, info), got {result!r}.")
    obs, reward, terminated, truncated, info = result
    check_observation(obs, space, where)
    plain = isinstance(reward, (float, int, np.floating, np.integer))  # the usual types, without NumPy's functions
    if not plain and (np.ndim(reward) != 0 or np.asarray(reward).dtype.kind not in "fiub"):
        raise ValueError(f"{where} must return a number as reward, got {reward!r}.")
    for name, end in (("terminated", terminated), ("truncated", truncated)):
        if not isinstance(end, (bool, np.bool_)) and (np.size(end) != 1 or not np.isin(end, (0, 1)).all()):
            raise ValueError(f"{where} must return True or False as {name}, got {end!r}.")
    if not isinstance(info, dict):
        raise ValueError(f"{where} must return a dictionary as info, got {info!r}.")


def check_observation(obs: Any, space: spaces.Space[Any], where: str) -> None:
    """
    Require an observation of one environment that has the shape and the dtype of its space.

    :param obs: The observation.
    :param space: Observation space.
    :param where: Name of the function or the environment that returned it, for the message.
    :raises ValueError: for other shapes and dtypes, and values that the dtype of the space cannot hold.
    """
    for key, given, part in _entries(obs, space, where):
        if _is_usual(given, part):
            continue
        try:
            values = np.asarray(given)
        except ValueError as error:  # lists of different lengths
            raise ValueError(f"{where} returned an observation{key} that is no array: {error}.") from error
        shape = part.shape or ()
        if values.shape != shape and not (values.size == 1 and shape == ()):
            raise ValueError(f"{where} returned an observation{key} of shape {values.shape}, but {part} has shape {shape}.")
        if problem := _problem_of_values(values, part):
            raise ValueError(f"{where} returned an observation{key} that {problem}.")


def _is_usual(given: Any, space: spaces.Space[Any]) -> bool:
    """
    :return: Whether the value is an array of a Box, or whole numbers of a Discrete or MultiDiscrete space, in the usual types.
        Most values are, and this is faster than the full check, which would run in each step of each environment.
    """
    if isinstance(space, spaces.Discrete):
        return isinstance(given, (int, np.integer)) and not isinstance(given, bool) and bool(0 <= given < space.n)
    if not isinstance(given, np.ndarray) or given.shape != space.shape:
        return False
    if isinstance(space, spaces.Box):
        return bool(given.dtype == space.dtype)
    if isinstance(space, spaces.MultiDiscrete) and given.ndim == 1 and given.dtype.kind in "iu":
        return all(0 <= value < size for value, size in zip(given.tolist(), space.nvec.tolist(), strict=True))
    return False


def _entries(obs: Any, space: spaces.Space[Any], where: str) -> list[tuple[str, Any, spaces.Space[Any]]]:
    """:return: Name for messages, value and space of each entry of an observation."""
    if not isinstance(space, spaces.Dict):
        return [("", obs, space)]
    if not isinstance(obs, Mapping):
        raise ValueError(
            f"{where} must give a dictionary with {sorted(space.spaces)} as observation, got {type(obs).__name__}."
        )
    if missing := sorted(space.spaces.keys() - obs.keys()):
        raise ValueError(f"{where} gave an observation without {missing[0]!r}; it must have {sorted(space.spaces)}.")
    return [(f" {key!r}", obs[key], part) for key, part in space.spaces.items()]


def _problem_of_values(values: np.ndarray, space: spaces.Space[Any]) -> str | None:
    """:return: What is wrong with the dtype, or with numbers that the space's dtype cannot hold; ``None`` if nothing is."""
    if isinstance(space, (spaces.Discrete, spaces.MultiDiscrete)):
        sizes = space.n if isinstance(space, spaces.Discrete) else space.nvec
        if values.dtype.kind in "iu" and ((values >= 0) & (values < sizes)).all():
            return None
        return f"is not in {space}: it holds {values.tolist()} of dtype {values.dtype}"
    declared = np.dtype(space.dtype or np.float32)
    if values.dtype == declared:
        return None
    if values.dtype.kind not in "fiub":
        return f"has dtype {values.dtype}, but {space} declares {declared}"
    if declared.kind == "f":
        return None
    with np.errstate(invalid="ignore"):
        lost = ~(values.astype(declared) == values)
    return (
        f"holds {values[lost].flat[0]!r} of dtype {values.dtype}, which {declared} of {space} cannot hold"
        if lost.any()
        else None
    )
