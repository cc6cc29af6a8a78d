"""Registries: options are read from signatures; classes with other signatures are refused."""

import inspect
from typing import Any

import pytest
import torch as th

from sb3_cyborg import register_encoder, register_memory
from sb3_cyborg.encoders.encoder_v7 import ENCODERS, EncoderV7
from sb3_cyborg.encoders.mamba import Mamba2
from sb3_cyborg.memories.memory_v7 import MEMORIES, MemoryV7
from sb3_cyborg.memories.none import NoMemory
from sb3_cyborg.registry import Registry, with_options_of


def test_all_models_of_the_package_are_registered() -> None:
    assert set(ENCODERS) == {"gru", "lstm", "mamba", "mingru", "trxl", "hybrid", "fusion"}
    assert set(MEMORIES) == {"pmm", "slot", "kv", "ring", "none"}


def test_options_are_those_of_the_signature() -> None:
    assert not ENCODERS.options("gru")
    block = {name for name, p in inspect.signature(Mamba2).parameters.items() if p.kind is p.KEYWORD_ONLY}
    for mode in ("mamba", "hybrid", "fusion"):
        assert ENCODERS.options(mode).keys() == block
        assert ENCODERS.options(mode)["expand"].default == 1, "the core's own default"
    assert ENCODERS.options("mingru").keys() == {"expand"}
    assert ENCODERS.options("trxl").keys() == {"window", "num_heads", "expand"}
    assert MEMORIES.options("ring").keys() == {"memory_dim", "num_slots", "num_heads", "num_first"}
    assert not MEMORIES.options("none")


def test_no_option_has_a_name_of_the_front_class() -> None:
    for registry, front in ((ENCODERS, EncoderV7), (MEMORIES, MemoryV7)):
        taken = set(inspect.signature(front).parameters) - set(registry.arguments)
        assert not any(taken & registry.options(name).keys() for name in registry)


@pytest.mark.parametrize("mode", ["mamba", "hybrid", "fusion"])
def test_options_reach_the_block(mode: str) -> None:
    encoder = EncoderV7(3, 8, mode=mode, d_state=5, headdim=4)
    blocks = [module for module in encoder.modules() if isinstance(module, Mamba2)]
    assert [(block.d_state, block.headdim) for block in blocks] == [(5, 4)]


class _NoNumLayers(NoMemory):
    def __init__(self, hidden_dim: int) -> None:
        super().__init__(hidden_dim)


class _OpenEnded(NoMemory):
    def __init__(self, input_dim: int, **options: Any) -> None:
        super().__init__(input_dim)


class _TakesKind(NoMemory):
    def __init__(self, input_dim: int, kind: str = "a") -> None:
        super().__init__(input_dim)


def test_a_class_that_cannot_be_built_or_read_is_refused() -> None:
    with pytest.raises(ValueError, match="_NoNumLayers takes no `num_layers`"):
        register_encoder("bad", _NoNumLayers)
    with pytest.raises(ValueError, match=r"_OpenEnded takes `\*\*options: Any`.*with_options_of"):
        register_memory("bad", _OpenEnded)
    with pytest.raises(ValueError, match="_TakesKind takes an option `kind`, a name that is reserved"):
        register_memory("bad", _TakesKind)
    assert "bad" not in ENCODERS
    assert "bad" not in MEMORIES


def test_unknown_names_and_options_are_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"Unknown encoder 'gur'. Did you mean 'gru'\?"):
        EncoderV7(3, mode="gur")
    with pytest.raises(ValueError, match=r"Unknown option for memory 'ring' 'num_slot'. Did you mean 'num_slots'\?"):
        MemoryV7(3, "ring", num_slot=4)


def test_with_options_of_shows_the_inner_options() -> None:
    registry = Registry("thing", ("input_dim",))

    def inner(input_dim: int, *, size: int = 3, shape: str = "a") -> NoMemory:
        return NoMemory(input_dim + size)

    @registry.register("outer")
    @with_options_of(inner)
    class Outer(NoMemory):
        def __init__(self, input_dim: int, shape: str = "b", **options: Any) -> None:
            super().__init__(inner(input_dim, **options).input_dim)

    assert {name: p.default for name, p in registry.options("outer").items()} == {"shape": "b", "size": 3}
    assert registry.build("outer", 4, size=5).input_dim == 9


def test_a_custom_memory_needs_one_class_and_one_call() -> None:
    class Last(NoMemory):
        """Returns the scaled input."""

        def __init__(self, input_dim: int, scale: float = 2.0) -> None:
            super().__init__(input_dim)
            self.scale = scale

    register_memory("last", Last)
    try:
        memory = MemoryV7(3, "last", scale=4.0)
        assert isinstance(memory.memory, Last)
        assert memory.memory.scale == 4.0
        assert memory.forward_step(th.ones(1, 3), {})[0].shape == (1, 0)
    finally:
        del MEMORIES["last"]
