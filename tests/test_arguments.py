"""Types, ranges and sizes of every argument of ``MemoryPPO``, of its policies and of ``learn``."""

import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from torch import nn

from sb3_cyborg import MemoryPPO
from sb3_cyborg.checks import available_memory, divisors, nearest_divisors, readable_bytes
from sb3_cyborg.memory_ppo.arguments import MODEL_ARGUMENTS, POLICY_ARGUMENTS
from sb3_cyborg.memory_ppo.policies import MemoryActorCriticPolicy, policy_options
from sb3_cyborg.trainers.config import MODEL_KEYS, POLICY_KEYS, RULES, TrainerConfig
from tests.helpers import ACTION_SPACES, IMAGE, ToyEnv, same, toy_model, toy_vec_env, weights


def test_every_argument_has_a_rule() -> None:
    code = MemoryPPO.__init__.__code__
    arguments = set(code.co_varnames[1 : code.co_argcount + code.co_kwonlyargcount])
    others = {"policy", "env", "rollout_buffer_class", "rollout_buffer_kwargs"}  # have checks of their own
    assert arguments - others == MODEL_ARGUMENTS.keys() - {"n_envs"}
    assert policy_options(MemoryActorCriticPolicy) - {"encoder", "memory"} == POLICY_ARGUMENTS.keys()
    assert set(MODEL_KEYS) <= RULES.keys()
    assert set(POLICY_KEYS) - {"encoder", "memory"} <= RULES.keys()


@pytest.mark.parametrize(
    ("name", "value", "works"),
    [
        ("gamma", float("nan"), "a number in [0, 1]"),
        ("gamma", "0.9", "a number in [0, 1]"),
        ("gamma", 1.01, "a number in [0, 1]"),
        ("gamma", True, "a number in [0, 1]"),
        ("gae_lambda", 2, "a number in [0, 1]"),
        ("max_grad_norm", -0.5, "a finite number above 0"),
        ("max_grad_norm", float("inf"), "a finite number above 0"),
        ("target_kl", -1, "a finite number above 0, or None for no limit"),
        ("vf_coef", -1, "a finite number of at least 0"),
        ("ent_coef", None, "a finite number of at least 0"),
        ("memory_loss_coef", float("nan"), "a finite number of at least 0"),
        ("clip_range", float("nan"), "a positive number, a function"),
        ("clip_range", lambda progress: 1e300, "give finite numbers of at least 0"),
        ("vf_coef", 1e39, "a float32 number, at most 3.4e+38 in size"),
        ("ent_coef", float("inf"), "a finite number of at least 0"),
        ("clip_range", "0.2", "a positive number, a function"),
        ("clip_range", lambda progress: float("nan"), "give finite numbers of at least 0"),
        ("learning_rate", None, "a finite number of at least 0, a function"),
        ("learning_rate", -1e-3, "a finite number of at least 0, a function"),
        ("learning_rate", lambda progress: progress - 0.1, "give finite numbers of at least 0"),
        ("learning_rate", lambda progress: None, "give finite numbers of at least 0"),
        ("learning_rate", lambda: 1e-3, "give finite numbers of at least 0"),
        ("normalize_advantage", "no", "True or False"),
        ("use_last_action", "no", "True or False"),
        ("use_sde", 1, "True or False"),
        ("amp", None, "True or False"),
        ("sde_sample_freq", 1.5, "a whole number of at least -1"),
        ("stats_window_size", 1e300, "a whole number of at least 1"),
        ("seed", -1, "a whole number of at least 0, or None"),
        ("seed", 2**32, "at most 4294967295, or None"),
        ("verbose", "1", "a whole number of at least 0"),
        ("device", "gpu", "a device such as"),
        ("device", "meta", "a device that this PyTorch can compute on"),
        ("tensorboard_log", 3, "a path, or None"),
        ("policy_kwargs", 3, "a dictionary of options by name, or None"),
    ],
)
def test_arguments_out_of_range_are_refused(name: str, value: Any, works: str) -> None:
    with pytest.raises(
        ValueError, match=re.escape(f"`{name}` must {works if works.startswith('give') else f'be {works}'}")
    ) as error:
        MemoryPPO("MlpPolicy", toy_vec_env(1), **{name: value})
    assert repr(value) in str(error.value)


@pytest.mark.parametrize(
    ("name", "value", "works"),
    [
        ("net_arch", {"foo": [8]}, "the known keys are 'pi' and 'vf'"),
        ("net_arch", [0], "at least one unit each"),
        ("net_arch", 8, "must be a list of layer sizes"),
        ("activation_fn", "tanh", "a class of modules"),
        ("activation_fn", nn.Tanh(), "must create a module"),
        ("activation_fn", nn.Linear, "must create a module"),
        ("log_std_init", 1000, "a number in [-20, 20]"),
        ("optimizer_class", "adam", "a subclass of Optimizer"),
        ("optimizer_class", th.optim.LBFGS, "does not work with `optimizer_kwargs`={}"),
        (
            "optimizer_kwargs",
            {"epsilon": 1e-5},
            "Unknown option for `optimizer_kwargs` of Adam 'epsilon'. Did you mean 'eps'?",
        ),
        ("optimizer_kwargs", {"lr": 1e-3}, "Unknown option for `optimizer_kwargs` of Adam 'lr'"),
        ("optimizer_kwargs", {"betas": 3}, "does not work with `optimizer_kwargs`={'betas': 3}"),
        ("optimizer_kwargs", {"eps": float("nan")}, "`optimizer_kwargs['eps']` must be finite"),
        ("features_extractor_class", nn.Linear, "a subclass of BaseFeaturesExtractor"),
        ("features_extractor_kwargs", {"dim": 4}, "Unknown option for `features_extractor_kwargs` of FlattenExtractor 'dim'"),
        ("normalize_observations", "no", "True or False"),
        ("squash_output", True, "needs `use_sde`=True"),
        ("hidden_dim", 2**63, "at most 9223372036854775807"),
        ("num_layers", 10**6, "at most 1000"),
        ("encoder", ["gru"], "Unknown encoder ['gru']. Did you mean 'gru'?"),
        ("memory_kwargs", 3, "a dictionary of options by name"),
    ],
)
def test_policy_arguments_out_of_range_are_refused(name: str, value: Any, works: str) -> None:
    with pytest.raises(ValueError, match=re.escape(works)) as error:
        toy_model(policy_kwargs={name: value})
    assert name.removesuffix("_kwargs") in str(error.value)


@pytest.mark.parametrize("value", ["x", None, 0, float("nan"), 1.5])
@pytest.mark.parametrize("name", ["usage_decay", "write_rate"])
def test_options_of_pmm_are_checked(name: str, value: Any) -> None:
    if (name, value) == ("write_rate", None):
        pytest.skip("None adds no loss")
    with pytest.raises(ValueError, match=f"`{name}` must be a number in .*got {value!r}"):
        toy_model(policy_kwargs={"memory": "pmm", "memory_kwargs": {name: value}})


def test_numpy_scalars_are_accepted_and_become_numbers_of_python() -> None:
    model = toy_model(
        gamma=np.float32(0.5),
        learning_rate=np.float32(1e-3),
        clip_range=np.float32(0.25),
        seed=np.int64(3),
        normalize_value=np.bool_(True),
        policy_kwargs={"hidden_dim": np.int32(8), "ortho_init": np.bool_(False)},
    )
    assert (model.gamma, model.seed, model.normalize_value) == (0.5, 3, True)
    assert [type(value) for value in (model.gamma, model.seed, model.normalize_value)] == [float, int, bool]
    assert type(model.policy_kwargs["hidden_dim"]) is int
    model.learn(36)
    assert same(weights(model.policy), weights(toy_model(
        gamma=0.5, learning_rate=float(np.float32(1e-3)), clip_range=0.25, seed=3, policy_kwargs={"ortho_init": False}
    ).learn(36).policy))  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value"),
    [("total_timesteps", "x"), ("total_timesteps", float("nan")), ("log_interval", 0), ("reset_num_timesteps", "no")],
)
def test_arguments_of_learn_are_checked(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"`{name}` must be .*got {value!r}"):
        toy_model().learn(**{"total_timesteps": 36, name: value})


@pytest.mark.parametrize("name", ["learning_rate", "clip_range", "clip_range_vf"])
def test_schedules_are_checked_wherever_they_are_used(name: str) -> None:
    """At set-up a schedule is right, at a later progress it is not; the weights are those before that update."""
    seen: list[dict[str, th.Tensor]] = []

    def schedule(progress: float) -> float:
        return -1.0 if 0.5 < progress < 0.9 else 1e-3

    arguments: dict[str, Any] = {name: schedule}
    model = toy_model(**arguments)
    train = model.train

    def recorded() -> None:
        seen.append(weights(model.policy))
        train()

    setattr(model, "train", recorded)  # noqa: B010
    with pytest.raises(ValueError, match=rf"`{name}` must give finite numbers of at least 0 .* at 0.666667 it gives -1.0"):
        model.learn(3 * 36)
    assert same(seen[-1], weights(model.policy))


def test_a_linear_schedule_ends_at_zero_if_the_last_rollout_exceeds_the_total() -> None:
    """The progress remaining would be -0.44, and the rate of an SB3 user's linear schedule negative."""
    model = toy_model(learning_rate=lambda progress: progress * 1e-3).learn(50)
    assert model.num_timesteps == 72
    assert model.policy.optimizer.param_groups[0]["lr"] == 0


# --- the config ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [("gamma", 1.5), ("max_grad_norm", 0.0), ("n_epochs", 0), ("seed", 2**32), ("num_layers", 1001),
     ("net_arch", {"foo": [8]}), ("device", "gpu"), ("verbose", 3), ("log_barrier_coef", -0.1)],
)  # fmt: skip
def test_the_config_and_the_model_refuse_the_same_with_the_same_words(name: str, value: Any) -> None:
    with pytest.raises(ValueError) as ours:  # noqa: PT011  # compared below
        toy_model(policy_kwargs={name: value}) if name in POLICY_ARGUMENTS else toy_model(**{name: value})
    with pytest.raises(ValueError) as config:  # noqa: PT011
        TrainerConfig.parse({"env": "CartPole-v1", name: value})
    assert str(config.value) == str(ours.value).replace(f"`{name}` ", f"`{name}`: ")


# --- sizes that no memory holds -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        ({"n_steps": 10**12, "seq_len": None}, ["`n_steps`=1000000000000 in 3 environments", "TiB", "132000000000000 bytes"]),
        ({"n_steps": None, "seq_len": 10**15}, ["`n_steps`=1000000000000000", "PiB"]),
        ({"policy_kwargs": {"hidden_dim": 10**7}}, ["`hidden_dim`=10000000", "PiB"]),
        ({"policy_kwargs": {"hidden_dim": 2**62}}, ["`hidden_dim`=4611686018427387904"]),
        ({"policy_kwargs": {"latent_dim": 10**10}}, ["`latent_dim`=10000000000"]),
        ({"policy_kwargs": {"num_layers": 1000, "hidden_dim": 20000, "encoder": "lstm"}}, ["`num_layers`=1000", "TiB"]),
        ({"policy_kwargs": {"net_arch": [10**7, 10**7]}}, ["`net_arch`=[10000000, 10000000]", "PiB"]),
        ({"policy_kwargs": {"memory": "ring", "memory_kwargs": {"num_slots": 10**11}}}, ["'num_slots': 100000000000"]),
        ({"policy_kwargs": {"memory": "slot", "memory_kwargs": {"num_slots": 2**62}}}, ["'num_slots': 4611686018427387904"]),
        ({"policy_kwargs": {"memory": "pmm", "memory_kwargs": {"num_slots": 10**11}}}, ["States of", "TiB"]),
        ({"env": ToyEnv(spaces.Discrete(10**13))}, ["10000000000000 inputs", "PiB"]),
        ({"env": ToyEnv(action_space=spaces.Discrete(10**12))}, ["1000000000000 actions"]),
        (
            {"env": ToyEnv(IMAGE), "policy": "CnnPolicy",
             "policy_kwargs": {"features_extractor_kwargs": {"features_dim": 10**11}}},
            ["NatureCNN", "'features_dim': 100000000000", "TiB"],
        ),
    ],
)  # fmt: skip
def test_sizes_that_no_memory_holds_are_refused_at_once_with_their_bytes(kwargs: dict[str, Any], said: list[str]) -> None:
    before = time.perf_counter()
    with pytest.raises(ValueError, match=r"would take .* \(\d+ bytes\), but only .* of memory are available on cpu") as error:
        toy_model(**kwargs)
    assert time.perf_counter() - before < 20
    assert all(text in str(error.value) for text in said), str(error.value)


def test_the_measured_bytes_are_those_of_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a little more memory than the network takes, it is built; with a little less, it is refused."""
    kwargs: dict[str, Any] = {"policy_kwargs": {"encoder": "mamba", "num_layers": 5, "memory": "ring"}}
    parameters = sum(p.numel() * 4 for p in toy_model(**kwargs).policy.parameters())
    for share, fits in ((1.02, True), (0.9, False)):
        monkeypatch.setattr("sb3_cyborg.memory_ppo.sizes.available_memory", lambda _, share=share: int(share * 4 * parameters))
        if fits:
            toy_model(**kwargs)
        else:
            with pytest.raises(ValueError, match="A network for 3 inputs and 3 actions"):
                toy_model(**kwargs)


def test_measuring_draws_no_random_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    def built() -> tuple[dict[str, th.Tensor], th.Tensor, float]:
        env = ToyEnv(spaces.Box(0, 255, (1, 36, 36), np.uint8))
        env.observation_space.seed(0)
        th.manual_seed(0)
        policy = toy_model(env, "CnnPolicy", seed=None).policy
        return weights(policy), th.get_rng_state(), float(policy.observation_space.sample().mean())

    measured = built()
    monkeypatch.setattr("sb3_cyborg.memory_ppo.sizes.module_bytes", lambda _: 0)
    monkeypatch.setattr("sb3_cyborg.memory_ppo.policies.module_bytes", lambda _: 0)
    plain = built()
    assert same(measured[0], plain[0])
    assert th.equal(measured[1], plain[1])
    assert measured[2] == plain[2]


def test_available_memory_is_that_of_the_machine() -> None:
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []
    total = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemTotal:")), 2**47)
    assert 2**20 < available_memory() <= total
    assert [readable_bytes(size) for size in (5, 2048, 3 * 2**40, 2**60)] == ["5 bytes", "2 KiB", "3 TiB", "1024 PiB"]


def test_divisors_take_no_time() -> None:
    assert divisors(360) == [n for n in range(1, 361) if 360 % n == 0]
    assert divisors(1) == [1]
    assert nearest_divisors(97, 10) == (1, 97)
    before = time.perf_counter()
    assert len(divisors(2**40)) == 41
    assert divisors(2**63) == [1, 2**63]
    assert time.perf_counter() - before < 5


# --- spaces -------------------------------------------------------------------------------------------------------------

BOX = spaces.Box(-1, 1, (2,))


@pytest.mark.parametrize(
    ("space", "said"),
    [
        (spaces.Tuple([BOX, BOX]), "must be a Box, Discrete, MultiDiscrete or MultiBinary, or a Dict of them"),
        (spaces.Box(-1, 1, ()), "use one of shape (1,)"),
        (spaces.Box(-1, 1, (0,)), "without elements"),
        (spaces.Discrete(3, start=2), "values must start at 0"),
        (spaces.MultiDiscrete(np.array([[2, 3], [2, 2]])), "flatten it to MultiDiscrete([2, 3, 2, 2])"),
        (spaces.Dict({"a.b": BOX}), "the key 'a.b' cannot be the name of a PyTorch module; rename it, e.g. to 'a_b_'"),
        (spaces.Dict({"keys": BOX}), "the key 'keys' cannot be the name of a PyTorch module"),
        (spaces.Dict({}), "at least one entry"),
        (spaces.Dict({"a": spaces.Dict({"b": BOX})}), "entry 'a': it must be a Box"),
        (spaces.Text(4), "must be a Box"),
    ],
)
def test_observation_spaces_that_no_policy_reads_are_refused(space: spaces.Space[Any], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape("Observation space ") + "(.|\n)*" + re.escape(said)):
        toy_model(ToyEnv(space), "MultiInputPolicy" if isinstance(space, spaces.Dict) else "MlpPolicy")


@pytest.mark.parametrize(
    ("space", "said"),
    [
        (spaces.Box(-1, 1, ()), "use one of shape (1,)"),
        (spaces.Box(-np.inf, np.inf, (2,)), "must be finite"),
        (spaces.Box(-3e38, 3e38, (2,)), "must be finite"),
        (spaces.Discrete(3, start=1), "values must start at 0"),
        (spaces.MultiDiscrete(np.array([[2, 3], [2, 2]])), "flatten it to MultiDiscrete([2, 3, 2, 2])"),
        (spaces.MultiBinary((2, 3)), "flatten it to MultiBinary(6)"),
        (spaces.Dict({"a": BOX}), "must be a Box, Discrete, MultiDiscrete or MultiBinary space"),
    ],
)
def test_action_spaces_that_no_policy_acts_in_are_refused(space: spaces.Space[Any], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape("Action space ") + "(.|\n)*" + re.escape(said)):
        toy_model(ToyEnv(action_space=space))


@pytest.mark.parametrize("env", [None, 3])
def test_an_environment_is_needed(env: Any) -> None:
    with pytest.raises(ValueError, match=f"`env` must be an environment.*or its id, got {env}"):
        MemoryPPO("MlpPolicy", env)


def test_multi_input_policy_needs_dict_observations() -> None:
    with pytest.raises(ValueError, match=r"'MultiInputPolicy' is for Dict observations, got Box.*use 'MlpPolicy'"):
        MemoryPPO("MultiInputPolicy", "CartPole-v1")


def test_cnn_policy_needs_images() -> None:
    with pytest.raises(ValueError, match="`features_extractor_class` NatureCNN cannot be created for Box"):
        MemoryPPO("CnnPolicy", "CartPole-v1")


def test_gsde_needs_continuous_actions() -> None:
    with pytest.raises(ValueError, match="can only be used with continuous actions"):
        toy_model(use_sde=True)
    toy_model(ToyEnv(action_space=ACTION_SPACES["box"]), use_sde=True)


def test_a_number_of_environments_other_than_that_of_env_is_refused(tmp_path: Path) -> None:
    toy_model().save(tmp_path / "model")
    with pytest.raises(ValueError, match="`n_envs`=9, but `env` has 3 environments"):
        MemoryPPO.load(tmp_path / "model", env=toy_vec_env(3), n_envs=9)
    with pytest.raises(ValueError, match=r"`gamma` must be a number in \[0, 1\], got 2"):
        MemoryPPO.load(tmp_path / "model", gamma=2)
    model = MemoryPPO.load(tmp_path / "model", n_envs=9)
    model.set_env(toy_vec_env(9))
    model.learn(9 * 12)
