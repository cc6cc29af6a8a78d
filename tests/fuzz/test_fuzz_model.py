"""
Random arguments, spaces and misbehaving environments.

Every outcome is a ``ValueError`` that names an argument, a space or an environment; the environment's own error; or a run
whose weights are finite.
"""

import dataclasses
import warnings
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from sb3_cyborg import MemoryPPO
from sb3_cyborg.memory_ppo.arguments import LEARN_ARGUMENTS, MODEL_ARGUMENTS, POLICY_ARGUMENTS
from tests.helpers import VECTOR, ToyEnv, small, toy_vec_env, weights

FEW, MANY = 60, 1000
"""Examples of each test in ``make test``, and in ``make test-slow``."""


class OwnError(Exception):
    """An error of an environment."""


def examples(count: int) -> settings:
    """:return: Settings of hypothesis for a number of random cases without a limit of time for each."""
    return settings(max_examples=count, deadline=None, derandomize=count != MANY, suppress_health_check=list(HealthCheck))


def train(env: Any, policy: str = "MlpPolicy", steps: int = 24, **kwargs: Any) -> MemoryPPO:
    """:return: A small model after two updates."""
    arguments: dict[str, Any] = {"n_steps": 4, "seq_len": 2, "batch_size": 4, "n_epochs": 1, "seed": 0, "device": "cpu"}
    kwargs["policy_kwargs"] = small() | kwargs.get("policy_kwargs", {})
    return MemoryPPO(policy, env, **arguments | kwargs).learn(steps)


def outcome(run: Any, *names: str) -> str:
    """
    :param run: Function that creates and trains a model.
    :param names: Texts of which an error has to contain one.
    :return: ``"ran"`` for a run with finite weights, ``"refused"`` for an error that the module's docstring allows.
    """
    message, model = "", None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = run()
        except OwnError:
            return "refused"
        except ValueError as error:
            message = str(error)
    if model is None:
        assert any(name in message for name in names), f"the error names none of {names}: {message}"
        return "refused"
    assert all(tensor.isfinite().all() for tensor in weights(model.policy).values())
    return "ran"


# --- arguments ----------------------------------------------------------------------------------------------------------

NUMBERS = st.one_of(
    st.sampled_from([0, 1, 2, -1, 4, 10**12, 10**30, -(10**30), 0.0, 0.5, 0.9, 2.0, 1e-30, 1e30, 1e300, -0.5]),
    st.floats(),
    st.integers(-3, 3),
)
ODD = st.sampled_from(
    [
        *(None, True, False, "", "no", "0.9", "auto", "cpu", "gpu", "cuda:99", "meta", "lin_1e-3", "lin_x"),
        *(
            10**400,
            [],
            [8],
            [0],
            ["8"],
            (8,),
            {},
            {"pi": [4]},
            {"foo": [8]},
            {"lr": 1},
            {"eps": 1e-5},
            {"eps": "x"},
            {3: 4},
            object(),
        ),
        *(nn.Tanh, nn.Tanh(), nn.Dropout, th.optim.SGD, th.optim.LBFGS),
        *(np.float32(0.5), np.int64(4), np.bool_(True), np.nan, np.zeros(2), 1j),
        *(lambda progress: progress, lambda progress: None, lambda progress: -progress, lambda: 0.1),
    ]
)
VALUES = st.one_of(NUMBERS, NUMBERS.map(str), NUMBERS.map(np.float64), ODD)

MODEL_NAMES = sorted(MODEL_ARGUMENTS.keys() - {"n_envs", "_init_setup_model", "tensorboard_log", "n_epochs", "verbose"})
"""Arguments with random values. Another test covers the others: logs would be written, and many epochs are no fault."""


def check_arguments(given_values: dict[str, Any], policy_kwargs: dict[str, Any]) -> None:
    env = toy_vec_env(2)
    names = [*given_values, *policy_kwargs, "Unknown", "not finite", "nan"]
    if "policy_kwargs" not in given_values:
        given_values = {**given_values, "policy_kwargs": policy_kwargs}
    elif isinstance(given_values["policy_kwargs"], dict):
        names += [str(name) for name in given_values["policy_kwargs"]]
    # Sizes that depend on each other name the other one.
    names += (
        ["n_steps", "batch_size", "mini-batch"]
        if {"n_steps", "batch_size", "seq_len", "burn_in"} & given_values.keys()
        else []
    )
    names += ["hidden_dim"] if "lstm_hidden_size" in policy_kwargs else []
    names += ["gSDE", "use_sde", "squash"] if "use_sde" in given_values or "squash_output" in policy_kwargs else []
    names += ["Dropout"] if "activation_fn" in policy_kwargs else []

    def run() -> MemoryPPO:
        values = dict(given_values)
        if not isinstance(values["policy_kwargs"], dict):
            return MemoryPPO("MlpPolicy", env, **values)
        return train(env, **values)

    outcome(run, *names)


def pairs(names: list[str]) -> st.SearchStrategy[dict[str, Any]]:
    """:return: A strategy for one or two arguments with random values."""
    return st.dictionaries(st.sampled_from(names), VALUES, min_size=0, max_size=2)


@examples(4 * FEW)
@given(values=pairs(MODEL_NAMES), policy=pairs(sorted(POLICY_ARGUMENTS)))
def test_arguments(values: dict[str, Any], policy: dict[str, Any]) -> None:
    check_arguments(values, policy)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@examples(MANY)
@given(values=pairs(MODEL_NAMES), policy=pairs(sorted(POLICY_ARGUMENTS)))
def test_many_arguments(values: dict[str, Any], policy: dict[str, Any]) -> None:
    check_arguments(values, policy)


@examples(4 * FEW)
@given(name=st.sampled_from(sorted(MODEL_ARGUMENTS)), value=VALUES)
def test_each_rule_accepts_or_explains(name: str, value: Any) -> None:
    """A rule never raises, and its text completes a sentence."""
    problem = MODEL_ARGUMENTS[name].problem(value)
    assert problem is None or problem.startswith(("must ", "asks "))


@examples(4 * FEW)
@given(name=st.sampled_from(sorted({**POLICY_ARGUMENTS, **LEARN_ARGUMENTS})), value=VALUES)
def test_each_rule_of_policies_and_learn_accepts_or_explains(name: str, value: Any) -> None:
    problem = {**POLICY_ARGUMENTS, **LEARN_ARGUMENTS}[name].problem(value)
    assert problem is None or problem.startswith("must ")


# --- spaces -------------------------------------------------------------------------------------------------------------

DTYPES = st.sampled_from([np.float16, np.float32, np.float64, np.uint8, np.int8, np.int32, np.int64, np.uint16, np.uint32])


@st.composite
def boxes(draw: st.DrawFn) -> spaces.Space[Any]:
    shape, dtype = tuple(draw(st.lists(st.integers(0, 3), max_size=4))), draw(DTYPES)
    kind = np.dtype(dtype).kind
    largest = 1e3 if dtype == np.float16 else 3e38 if kind == "f" else 100
    bound = draw(st.sampled_from([1, 2, largest, np.inf] if kind == "f" else [1, largest]))
    return spaces.Box(0 if kind == "u" else -bound, bound, shape, dtype)


@st.composite
def parts(draw: st.DrawFn) -> spaces.Space[Any]:
    start = draw(st.sampled_from([0, 0, 0, 1, -2]))
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    return draw(
        st.one_of(
            boxes(),
            st.just(spaces.Discrete(sizes[0], start=start)),
            st.just(spaces.MultiDiscrete(sizes)),
            st.just(spaces.MultiDiscrete(np.array([sizes, sizes]))),
            st.just(spaces.MultiBinary(sizes)),
            st.just(spaces.MultiBinary(sizes[0])),
            st.just(spaces.Text(4)),
            st.just(spaces.Tuple([spaces.Discrete(2)])),
            st.just(spaces.Sequence(spaces.Discrete(2))),
        )
    )


KEYS = st.sampled_from(["a", "b", "time", "last_action", "observation", "a.b", "keys", "", "forward"])
OBSERVATIONS = st.one_of(parts(), st.dictionaries(KEYS, parts(), max_size=3).map(spaces.Dict))


class AnyEnv(ToyEnv):
    """Random observations of any space; it does not check the actions."""

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return self.observation_space.sample(), float(self.np_random.normal()), bool(self.np_random.random() < 0.3), False, {}


def check_spaces(observations: spaces.Space[Any], actions: spaces.Space[Any], use_last_action: bool) -> None:
    policy = "MultiInputPolicy" if isinstance(observations, spaces.Dict) else "MlpPolicy"
    names = ("space", "bounds", "not finite")
    outcome(lambda: train(AnyEnv(observations, actions), policy, use_last_action=use_last_action), *names)


@examples(FEW)
@given(observations=OBSERVATIONS, actions=parts(), use_last_action=st.booleans())
def test_spaces(observations: spaces.Space[Any], actions: spaces.Space[Any], use_last_action: bool) -> None:
    check_spaces(observations, actions, use_last_action)


@examples(FEW)
@given(observations=OBSERVATIONS)
def test_observation_spaces(observations: spaces.Space[Any]) -> None:
    check_spaces(observations, spaces.Discrete(3), use_last_action=False)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@examples(MANY)
@given(observations=OBSERVATIONS, actions=parts(), use_last_action=st.booleans())
def test_many_spaces(observations: spaces.Space[Any], actions: spaces.Space[Any], use_last_action: bool) -> None:
    check_spaces(observations, actions, use_last_action)


# --- misbehaving environments -------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Fault:
    """One wrong value that an environment returns, at a step (0: in ``reset``)."""

    part: str
    value: Any
    at: int


WRONG: dict[str, list[Any]] = {
    "obs": [
        *(None, "x", 1.0, [], [1, 2, 3], [[1], [2, 3]], {"a": np.zeros(3)}, (np.zeros(3), {})),
        *(np.zeros(2), np.zeros(1), np.zeros((3, 1)), np.zeros(3, object), np.zeros(3, complex), np.array(["a", "b", "c"])),
        *(np.full(3, np.nan), np.full(3, np.inf), np.full(3, 1e30, np.float32), np.full(3, 1e300), np.full(3, 1e18)),
        *(np.full(3, 300), np.full(3, -1), np.full(3, 0.5), np.zeros(3, bool)),
    ],
    "reward": [
        *(None, "x", True, 1j, object(), {}, np.nan, np.inf, 1e18, 1e38, -1e38, 1e300),
        *(np.zeros(2), np.ones(1), [1.0], [1.0, 2.0]),
    ],
    "terminated": [None, "no", "", 2, 1, 0, 0.5, np.nan, np.zeros(2, bool), np.ones(1, bool), [], object()],
    "truncated": [None, "no", 2, 1, np.zeros(2, bool), np.bool_(True)],
    "info": [None, [], "x", {"TimeLimit.truncated": "x"}, {"terminal_observation": np.zeros(7)}, {"episode": 3}],
    "result": [None, (), (1, 2), (1, 2, 3, 4), "xxxxx", np.zeros(5)],
    "raise": [OwnError("broken")],
}
FAULTS = st.sampled_from(sorted(WRONG)).flatmap(
    lambda part: st.builds(Fault, st.just(part), st.sampled_from(WRONG[part]), st.integers(0, 9))
)


class MisbehavingEnv(AnyEnv):
    """An environment with a fault, from a step on or once."""

    def __init__(self, space: spaces.Space[Any], fault: Fault, again: bool) -> None:
        super().__init__(space)
        self.fault, self.again, self.steps = fault, again, 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        obs, info = super().reset(seed=seed, options=options)
        if self.fault.at == 0:
            if self.fault.part == "raise":
                raise self.fault.value
            if self.fault.part == "result":
                return self.fault.value
            obs, info = (
                self.fault.value if self.fault.part == name else kept for name, kept in (("obs", obs), ("info", info))
            )
        return obs, info

    def step(self, action: Any) -> Any:
        values = dict(zip(("obs", "reward", "terminated", "truncated", "info"), super().step(action), strict=True))
        self.steps += 1
        if self.steps == self.fault.at or (self.again and self.steps > self.fault.at > 0):
            if self.fault.part == "raise":
                raise self.fault.value
            if self.fault.part == "result":
                return self.fault.value
            values[self.fault.part] = self.fault.value
        return tuple(values.values())


FAULTY_SPACES = st.sampled_from(
    [
        VECTOR,
        spaces.Box(-3e38, 3e38, (3,)),
        spaces.Box(0, 255, (3,), np.uint8),
        spaces.Discrete(3),
        spaces.MultiDiscrete([2, 2, 2]),
    ]
)


def check_environment(space: spaces.Space[Any], fault: Fault, again: bool, vectorized: bool) -> None:
    def make() -> MisbehavingEnv:
        return MisbehavingEnv(space, fault, again)

    env = toy_vec_env(2, make) if vectorized else make()
    outcome(lambda: train(env, steps=32), "of environment", "environments", "not finite")


@examples(2 * FEW)
@given(space=FAULTY_SPACES, fault=FAULTS, again=st.booleans(), vectorized=st.booleans())
def test_misbehaving_environments(space: spaces.Space[Any], fault: Fault, again: bool, vectorized: bool) -> None:
    check_environment(space, fault, again, vectorized)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@examples(MANY)
@given(space=FAULTY_SPACES, fault=FAULTS, again=st.booleans(), vectorized=st.booleans())
def test_many_misbehaving_environments(space: spaces.Space[Any], fault: Fault, again: bool, vectorized: bool) -> None:
    check_environment(space, fault, again, vectorized)


# --- these tests can fail -----------------------------------------------------------------------------------------------


def test_unclear_errors_and_nonfinite_weights_are_found() -> None:
    def unclear() -> MemoryPPO:
        raise ValueError("setting an array element with a sequence")

    def broken() -> MemoryPPO:
        model = train(toy_vec_env(2))
        next(model.policy.parameters()).data.fill_(np.nan)
        return model

    with pytest.raises(AssertionError, match="names none"):
        outcome(unclear, "`gamma`")
    with pytest.raises(AssertionError):
        outcome(broken)
    assert outcome(lambda: train(toy_vec_env(2))) == "ran"
