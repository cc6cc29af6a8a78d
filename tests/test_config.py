"""``TrainerConfig``: names and values of settings, errors, and the arguments that ``MemoryPPO`` gets."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sb3_cyborg.encoders.encoder_v7 import ENCODERS
from sb3_cyborg.envs.vec_env import VEC_ENVS
from sb3_cyborg.memories.memory_v7 import MEMORIES
from sb3_cyborg.memory_ppo.memory_ppo import MemoryPPO
from sb3_cyborg.memory_ppo.rollout_buffer_v7 import check_burn_in
from sb3_cyborg.memory_ppo.schedules import AUTO_LEARNING_RATE
from sb3_cyborg.trainers.config import ACTIVATIONS, MODEL_KEYS, POLICY_KEYS, RESUME_KEYS, TrainerConfig
from sb3_cyborg.trainers.config_file import parse_yaml, read_yaml
from sb3_cyborg.trainers.vocabulary import ALIASES, OTHER_NAMES, canonical, merge

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))

NO_FOLDERS = ["/", "..", ".", "../x", "a/b", "a\\b", "C:x", "a\nb", "a\0b", "a\x7f", "\u2028", " ", "a.", "NUL", "com1.txt"]
"""Names that not every operating system accepts for one folder."""

BAD: list[tuple[dict[str, Any], list[str]]] = [
    # settings beside `env`, and parts of the error: the offending value and what would work
    ({"encodr": "gru"}, ["'encodr'", "'encoder'"]),
    ({"lr": 1e-3}, ["'lr'", "'learning_rate'"]),
    ({"tensorboard_log": "logs"}, ["'tensorboard_log'", "'tensorboard'"]),
    ({"horizon": 64, "n_steps": 128}, ["`horizon`=64", "`n_steps`=128", "leave one out"]),
    ({"n_steps": 128, "horizon": 64}, ["`horizon`=64", "`n_steps`=128", "leave one out"]),
    ({"eval_freq": 64, "eval_interval": 8}, ["`eval_interval`=8", "`eval_freq`=64", "leave one out"]),
    ({"memory": {"type": "kv", "num_slots": 4}, "memory_kwargs": {"num_slots": 8}}, ["`memory`", "`memory_kwargs`", "leave"]),
    ({"env": "CartPol-v1"}, ["'CartPol-v1'", "'CartPole-v1'"]),
    ({"env": "no_such_module:CartPole-v1"}, ["no_such_module"]),
    ({"encoder": "mmba"}, ["'mmba'", "'mamba'"]),
    ({"encoder": {"type": "mamba", "d_sate": 8}}, ["'d_sate'", "'d_state'"]),
    ({"memory": "pnm"}, ["'pnm'", "'pmm'"]),
    ({"memory": {"type": "pmm", "slots": 8}}, ["'slots'", "'num_slots'"]),
    ({"memory": "pmm", "memory_kwargs": {"slots": 8}}, ["'slots'", "'num_slots'"]),
    ({"memory": {"num_slots": 8}}, ["`memory`", "`type`", "pmm"]),
    ({"memory": {"type": "pmm", "kind": "kv"}}, ["`memory`", "one `type`"]),
    ({"memory": 5}, ["`memory`", "5", "string"]),
    ({"n_steps": "long"}, ["`n_steps`", "'long'", "integer"]),
    ({"horizon": True}, ["`n_steps`", "True", "integer"]),
    ({"n_steps": 12.5}, ["`n_steps`", "12.5", "integer"]),
    ({"n_envs": 0}, ["`n_envs`", "0", "greater than or equal to 1"]),
    ({"n_steps": 1024, "seq_len": 100}, ["`seq_len`=100", "`n_steps`=1024", "64 and 128"]),
    ({"n_steps": 128, "seq_len": 32, "batch_size": 100}, ["`batch_size`=100", "`seq_len`=32", "96 and 128"]),
    ({"n_steps": 1}, ["n_steps=1", "n_envs=1", "greater than 1"]),
    ({"burn_in": -1}, ["`burn_in`", "-1", "whole number of at least 0"]),
    ({"n_steps": 64, "burn_in": 64}, ["`burn_in`=64", "`n_steps`=64", "less than"]),
    ({"learning_rate": "fast"}, ["`learning_rate`", "'fast'", "lin_3e-4"]),
    ({"learning_rate": "lin_x"}, ["`learning_rate`", "'lin_x'", "lin_3e-4"]),
    ({"learning_rate": "lin_1e-3_x"}, ["`learning_rate`", "'lin_1e-3_x'", "lin_3e-4_1e-5"]),
    ({"clip_range": 0}, ["`clip_range`", "0", "positive"]),
    ({"gamma": 1.2}, ["`gamma`", "1.2", "[0, 1]"]),
    ({"ent_coef": float("nan")}, ["`ent_coef`", "nan"]),
    ({"policy": "MlpPolcy"}, ["'MlpPolcy'", "'MlpPolicy'"]),
    ({"vec_env": "subprocess"}, ["'subprocess'", "'subproc'"]),
    ({"activation_fn": "rellu"}, ["'rellu'", "'relu'"]),
    ({"net_arch": {"p": [8]}}, ["'p'", "'pi'"]),
    ({"net_arch": [0]}, ["`net_arch`", "[0]", "at least one"]),
    ({"normalize": {"norm_ops": True}}, ["'norm_ops'", "'norm_obs'"]),
    ({"normalize": {"gamma": 0.9}}, ["`gamma`", "leave it out"]),
    ({"normalize": {"clip_obs": "x"}}, ["`clip_obs`", "'x'", "positive number"]),
    ({"normalize": {"epsilon": float("nan")}}, ["`epsilon`", "nan"]),
    ({"normalize": {"clip_reward": 0}}, ["`clip_reward`", "0"]),
    ({"normalize": {"norm_obs": "no"}}, ["`norm_obs`", "'no'", "true or false"]),
    ({"normalize": {"norm_obs_keys": "vector"}}, ["`norm_obs_keys`", "'vector'", "list"]),
    ({"policy_kwargs": {"ortho": True}}, ["'ortho'", "'ortho_init'"]),
    ({"encoder": {"type": "gru", "hidden_dim": 8}, "hidden_dim": 16}, ["`hidden_dim`=16", "hidden_dim`=8", "leave one out"]),
    ({"amp": "yes"}, ["`amp`", "'yes'", "boolean"]),
    ({"device": "gpu"}, ["'gpu'", "'cuda'"]),
    ({"env_kwargs": 3}, ["`env_kwargs`", "3", "dictionary"]),
    ({"env_kwargs": {"reward": [max]}}, ["`env_kwargs`", "['reward'][0]", "YAML", "builtin_function_or_method"]),
    ({"seed": -1}, ["`seed`", "-1"]),
    *[({"run_name": name}, ["`run_name`", "plain name of a folder", repr(name)]) for name in NO_FOLDERS],
    ({"run_name": "\ud800"}, ["`run_name`", "unicode"]),
    ({"run_name": ""}, ["`run_name`", "at least 1"]),
    ({"run_name": 256 * "a"}, ["`run_name`", "256 bytes", "255"]),
    ({"run_name": 128 * "é"}, ["`run_name`", "256 bytes"]),
    ({"n_envs": 1e12}, ["`n_envs`", "65536"]),
    ({"torch_threads": 100_000}, ["`torch_threads`", "1024"]),
    ({"total_timesteps": 1e300}, ["`total_timesteps`", "1000000000000000"]),
    ({"save_freq": 1e300}, ["`save_freq`", "1000000000000000"]),
    ({"frame_stack": 10**9}, ["`frame_stack`", "1000"]),
]


def test_values_of_numpy_become_those_of_python() -> None:
    kwargs = {"size": np.int64(3), "scale": [np.float32(0.5), np.bool_(True)], "map": np.eye(2), np.str_("name"): "x"}
    config = TrainerConfig.parse({"env": "CartPole-v1", "env_kwargs": kwargs, "memory_kwargs": {"num_slots": np.int64(4)}})
    assert config.env_kwargs == {"size": 3, "scale": [0.5, True], "map": [[1.0, 0.0], [0.0, 1.0]], "name": "x"}
    assert TrainerConfig.parse(parse_yaml(config.to_yaml(), "here")) == config


def test_deep_values_are_refused() -> None:
    deep: list[Any] = []
    deep.append(deep)
    with pytest.raises(ValueError, match=r"`env_kwargs`: is nested more than 50 levels deep"):
        TrainerConfig.parse({"env": "CartPole-v1", "env_kwargs": {"deep": deep}})


@pytest.mark.parametrize(("given", "said"), BAD, ids=[str(given) for given, _ in BAD])
def test_bad_configs(given: dict[str, Any], said: list[str]) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        TrainerConfig.parse({"env": "CartPole-v1"} | given)
    message = str(caught.value)
    assert "\n" not in message
    assert "pydantic" not in message
    for part in said:
        assert part in message


@pytest.mark.parametrize("name", ["gru", "2024", ".hidden", "a b", "é", 255 * "a", "gru-0.9_lr=1e-3,x", "console", "...a"])
def test_run_names(name: str) -> None:
    assert TrainerConfig.parse({"env": "CartPole-v1", "run_name": name}).run_name == name


def test_a_line_for_each_key() -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        TrainerConfig.parse({"encodr": "gru", "gamma": "x"})
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert sorted(line[:12] for line in lines) == ["The config n", "Unknown conf", "`gamma`: Inp"]


def test_a_missing_gpu_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match=r"`device`: asks for a GPU, but .* got 'cuda:0'"):
        TrainerConfig.parse({"env": "CartPole-v1", "device": "cuda:0"})


def test_bad_files(tmp_path: Path) -> None:
    (tmp_path / "cartpole.yaml").write_text("env: CartPole-v1\nn_steps: [\n")
    (tmp_path / "list.yaml").write_text("- env\n")
    (tmp_path / "twice.yaml").write_text("env: CartPole-v1\nn_steps: 64\nn_steps: 128\n")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    for name, said in {
        "cartpol.yaml": "cartpole.yaml",
        "cartpole.yaml": r"line 3.* is not YAML",
        "list.yaml": "must hold `key: value` lines, got list",
        "twice.yaml": "key 'n_steps' is there twice",
        "binary.yaml": "not a text file|not YAML",
    }.items():
        with pytest.raises(ValueError, match=said) as caught:
            TrainerConfig.parse(tmp_path / name)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="got list"):
        TrainerConfig.parse(["env"])  # type: ignore[arg-type]


def test_merge_keys() -> None:
    text = "base: &base {a: 1, b: 2}\nmore: &more {<<: *base, b: 3}\nlast: {<<: [*more, *base], c: 4}\nagain: *more\n"
    assert parse_yaml(text, "here") == {
        "base": {"a": 1, "b": 2},
        "more": {"a": 1, "b": 3},
        "last": {"a": 1, "b": 3, "c": 4},
        "again": {"a": 1, "b": 3},
    }
    merged = parse_yaml("x: &x {n_steps: 64}\ny: {<<: *x, n_envs: 2}\n", "here")["y"]
    config = TrainerConfig.parse({"env": "CartPole-v1"} | merged)
    assert (config.n_steps, config.n_envs) == (64, 2)
    anchor = "x: &x {a: 1}\n"
    for twice in ("a: {b: 1, b: 2}", f"{anchor}y: {{<<: *x, b: 1, b: 2}}", f"{anchor}y: {{<<: *x, <<: *x}}", "{a: 1, 'a': 2}"):
        with pytest.raises(ValueError, match="is there twice"):
            parse_yaml(twice, "here")
    with pytest.raises(ValueError, match="an alias is inside of its own anchor"):
        parse_yaml("&a {<<: *a}", "here")


def test_limits_of_yaml() -> None:
    items = "[" + ", ".join(99 * ["1"]) + "]"
    wide = f"a: &a {items}\nb: &b [{', '.join(99 * ['*a'])}]\n"  # 9,900 values: no bomb
    assert len(parse_yaml(wide, "here")["b"]) == 99
    with pytest.raises(ValueError, match=r"here, line 1, column 1 is not YAML: it holds 990,205 values with its aliases"):
        parse_yaml(f"{wide}c: [{', '.join(99 * ['*b'])}]\n", "here")
    with pytest.raises(ValueError, match="has 1,000,001 characters, at most 1,000,000"):
        parse_yaml("a" * 1_000_001, "here")
    for depth in (60, 100_000):
        with pytest.raises(ValueError, match="nested more than 50 levels deep"):
            parse_yaml("[" * depth + "]" * depth, "here")


def test_forms_of_numbers() -> None:
    values = parse_yaml("learning_rate: 3e-4\ntotal_timesteps: 1e6\nseed: 1_000\nlog_dir: 1e\n", "here")
    assert values == {"learning_rate": 3e-4, "total_timesteps": 1e6, "seed": 1000, "log_dir": "1e"}
    config = TrainerConfig.parse({"env": "CartPole-v1", **values, "gamma": "9e-1", "n_steps": np.int64(64), "n_epochs": 2.0})
    assert (config.learning_rate, config.total_timesteps, config.gamma, config.n_steps) == (3e-4, 1_000_000, 0.9, 64)
    assert parse_yaml("[1:30, 1:30.5, 'x:1']", "here") == ["1:30", "1:30.5", "x:1"], "no numbers to the base of 60"
    with pytest.raises(ValueError, match=r"`learning_rate`.*'1:30'"):
        TrainerConfig.parse({"env": "CartPole-v1"} | parse_yaml("learning_rate: 1:30", "here"))
    assert all(type(value) is int for value in (config.total_timesteps, config.n_steps, config.n_epochs))


@given(st.floats(1e-6, 1.0), st.integers(1, 64), st.integers(1, 16), st.integers(0, 2**32 - 1))
def test_yaml_round_trip(learning_rate: float, num_slots: int, n_envs: int, seed: int) -> None:
    given = {"learning_rate": learning_rate, "memory": {"type": "kv", "num_slots": num_slots}, "n_envs": n_envs}
    config = TrainerConfig.parse({"env": "CartPole-v1", "seed": seed, **given})
    assert TrainerConfig.parse(parse_yaml(config.to_yaml(), "here")) == config
    assert config.changed(seed=seed) == config


def test_arguments_of_memory_ppo() -> None:
    config = TrainerConfig.parse(
        {
            "env": "CartPole-v1",
            "encoder": {"mode": "mamba", "d_state": 8, "hidden_dim": 24, "num_layers": 2},
            "memory": {"kind": "pmm", "num_slots": 3},
            "n_steps": 32,
            "learning_rate": "lin_1e-3",
            "clip_range_vf": 0.3,
            "net_arch": {"pi": [7], "vf": [9]},
            "activation_fn": "relu",
            "policy_kwargs": {"ortho_init": False},
            "n_epochs": 3,
            "device": "cpu",
        }
    )
    arguments = config.model_arguments()
    model = MemoryPPO("MlpPolicy", "CartPole-v1", **arguments)
    assert [model.lr_schedule(progress) for progress in (1.0, 0.5, 0.0)] == pytest.approx([1e-3, 5e-4, 0.0])
    assert (model.n_steps, model.n_epochs) == (32, 3)
    core: Any = model.policy.core.parts
    assert core["encoder"].output_dim == 24
    assert core["memory"].memory.num_slots == 3
    assert [type(layer) for layer in model.policy.mlp_extractor.policy_net] == [nn.Linear, nn.ReLU]
    assert model.policy.mlp_extractor.latent_dim_vf == 9
    assert model.clip_range_vf(1.0) == pytest.approx(0.3)  # type: ignore[operator,misc]  # a schedule by now


def test_every_argument_of_memory_ppo_is_a_key() -> None:
    import inspect

    own = {"policy", "policy_kwargs"}
    ours = {"env", "tensorboard_log", "_init_setup_model", "distributed", "rollout_buffer_class", "rollout_buffer_kwargs"}
    assert inspect.signature(MemoryPPO).parameters.keys() - own - ours == set(MODEL_KEYS)
    defaults = TrainerConfig.parse({"env": "CartPole-v1"}).model_arguments()
    for name, parameter in inspect.signature(MemoryPPO).parameters.items():
        if name in defaults and name not in ("learning_rate", "policy_kwargs", "seed"):
            assert defaults[name] == parameter.default, name
    assert defaults["learning_rate"] == AUTO_LEARNING_RATE, "the total of a run is known, so its schedule is, too"


def test_names_of_keys_exist() -> None:
    keys = TrainerConfig.model_fields.keys()
    assert set(RESUME_KEYS) | set(MODEL_KEYS) | set(POLICY_KEYS) <= keys
    assert {other.key for other in OTHER_NAMES.values()} <= keys
    assert not OTHER_NAMES.keys() & keys
    assert all(field.description for field in TrainerConfig.model_fields.values())


@pytest.mark.parametrize(
    ("key", "names"),
    [("encoder", ENCODERS), ("memory", MEMORIES), ("vec_env", VEC_ENVS), ("activation_fn", ACTIVATIONS)],
)
def test_descriptions_list_the_names_of_the_registries(key: str, names: Iterable[str]) -> None:
    assert ", ".join(names) in str(TrainerConfig.model_fields[key].description)


# --- names ------------------------------------------------------------------------------------------------------------

VALUES: dict[str, Any] = {
    "n_steps": 64,
    "n_envs": 2,
    "eval_freq": 7,
    "n_eval_episodes": 3,
    "save_freq": 9,
    "env": "CartPole-v1",
}
"""A value for each key that has an alias; 128 for the others."""


@pytest.mark.parametrize("source", ["dictionary", "file"])
@pytest.mark.parametrize("alias", ALIASES)
def test_aliases_are_accepted(tmp_path: Path, alias: str, source: str) -> None:
    key = ALIASES[alias]
    given = ({} if key == "env" else {"env": "CartPole-v1"}) | {alias: VALUES.get(key, 128)}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(given))
    config = TrainerConfig.parse(given if source == "dictionary" else tmp_path / "config.yaml")
    assert getattr(config, key) == VALUES.get(key, 128) != TrainerConfig.model_fields[key].default
    saved = yaml.safe_load(config.to_yaml())
    assert saved.keys() == TrainerConfig.model_fields.keys(), "SB3's words are saved"
    assert config.changed(**{alias: VALUES.get(key, 128)}) == config
    assert TrainerConfig(**given) == config


def test_the_mission_documents_words() -> None:
    config = TrainerConfig.parse(
        {
            "env": "CartPole-v1",
            "encoder": {"type": "mamba", "d_state": 8},
            "memory": {"type": "pmm", "num_slots": 16},
            "horizon": 1024,
            "num_envs": 4,
        }
    )
    sb3_words = {"n_steps": 1024, "n_envs": 4, "encoder": "mamba", "encoder_kwargs": {"d_state": 8}}
    assert (
        yaml.safe_load(config.to_yaml()).items() >= (sb3_words | {"memory": "pmm", "memory_kwargs": {"num_slots": 16}}).items()
    )
    assert (
        TrainerConfig.parse({"env": "CartPole-v1", "memory": "pmm", "memory_kwargs": {"num_slots": 16}} | sb3_words) == config
    )


def test_two_names_with_the_same_value_are_no_conflict() -> None:
    assert canonical({"horizon": 64, "n_steps": 64}) == {"n_steps": 64}
    both = {"memory": {"type": "kv", "num_slots": 4}, "memory_kwargs": {"num_slots": 4}}
    assert canonical(both) == {"memory": "kv", "memory_kwargs": {"num_slots": 4}}
    assert canonical({"memory": {"type": "kv"}, "memory_kwargs": {"num_slots": 4}}) == canonical(both)


def test_later_sources_override_earlier_ones_under_any_name() -> None:
    file = {"env": "CartPole-v1", "horizon": 64, "memory": {"type": "kv", "num_slots": 4}, "encoder": "gru"}
    assert merge(file, {"n_steps": 32})["n_steps"] == 32
    assert merge({"n_steps": 64}, {"horizon": 32}) == {"n_steps": 32}
    with pytest.raises(ValueError, match="`horizon`=32 and `n_steps`=16 name the same setting"):
        merge(file, {"horizon": 32, "n_steps": 16})
    assert merge(file, {"memory": "kv"})["memory_kwargs"] == {"num_slots": 4}, "the same memory keeps its options"
    assert "memory_kwargs" not in merge(file, {"memory": "slot"}), "another memory drops them"
    assert merge(file, {"memory": {"type": "kv"}})["memory_kwargs"] == {}
    assert merge(file, {"memory": "slot", "memory_kwargs": {"num_slots": 2}})["memory_kwargs"] == {"num_slots": 2}
    config = TrainerConfig.parse(file)
    assert config.changed(memory="ring").memory_kwargs == {}
    assert config.changed(gamma=0.9).memory_kwargs == {"num_slots": 4}


def test_burn_in_is_refused_by_one_rule() -> None:
    with pytest.raises(ValueError, match="`burn_in`=64") as of_the_buffer:
        check_burn_in(64, 64)
    with pytest.raises(ValueError, match="`burn_in`=64") as of_the_config:
        TrainerConfig.parse({"env": "CartPole-v1", "n_steps": 64, "burn_in": 64})
    assert str(of_the_config.value) == str(of_the_buffer.value)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configs_in_the_repository(path: Path) -> None:
    config, written = TrainerConfig.parse(path), read_yaml(path)
    assert written.keys() <= TrainerConfig.model_fields.keys(), "they use the keys, not aliases"
    assert config.model_dump().items() >= {key: value for key, value in written.items() if key != "learning_rate"}.items()
    assert yaml.safe_load(config.to_yaml())["env"] == config.env


def test_there_is_a_config_for_each_family() -> None:
    assert {path.stem for path in CONFIGS} >= {
        "memory_ppo_v7",
        "cartpole_no_vel",
        "memory_chain",
        "t_maze",
        "popgym_repeat_previous",
        "minigrid_memory",
        "crafter_wood",
    }
