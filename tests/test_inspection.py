"""Inspection: the records of each memory, the arrays of an episode, and their figure."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from PIL import Image
from sb3_contrib import RecurrentPPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecNormalize

from sb3_cyborg import MemoryPPO, SequenceModel, State
from sb3_cyborg.memories.attention import AttentionMemory
from sb3_cyborg.memories.memory_v7 import MEMORIES, MemoryV7
from sb3_cyborg.memories.ring import RingMemory
from sb3_cyborg.memories.slot import SlotMemory
from sb3_cyborg.memories.trace import QUANTITIES, record, trace, tracing
from sb3_cyborg.memory_ppo.recorded_step import RecordedStep
from sb3_cyborg.sequence_model import Logs
from sb3_cyborg.trainers.trainer_v7 import TrainerV7
from sb3_cyborg.trainers.write_gates import write_gates
from sb3_cyborg.viewers.inspection import Inspection, inspect_episode
from sb3_cyborg.viewers.inspection_figure import draw_inspection, inspection_figure
from sb3_cyborg.viewers.runs import inspect_run
from tests.helpers import OBSERVATION_SPACES, ToyEnv, predict, rollout, same, toy_model, toy_vec_env, weights

KINDS = ("pmm", "slot", "kv", "ring")
STEPS = 24


class LongToyEnv(ToyEnv):
    """Episodes of exactly ``STEPS`` steps."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.left = STEPS

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        self.left = STEPS
        return super().reset(seed=seed, options=options)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        obs, reward, *_ = super().step(action)
        self.left -= 1
        return obs, reward, self.left == 0, False, {}


def agent(kind: str, num_slots: int = 4, env: VecEnv | None = None, **policy_kwargs: Any) -> MemoryPPO:
    """:return: An agent with random weights in the memory, as weights that are initialized to zero would hide faults."""
    options: dict[str, Any] = {} if kind == "none" else {"memory_kwargs": {"num_slots": num_slots, "num_heads": 2}}
    model = toy_model(env or toy_vec_env(1, LongToyEnv), policy_kwargs={"memory": kind, **options, **policy_kwargs})
    with th.no_grad():
        for parameter in model.policy.core.parts["memory"].parameters():
            parameter.copy_(2 * th.randn(parameter.shape, generator=th.Generator().manual_seed(parameter.numel())))
    return model


def memory_of(model: MemoryPPO) -> Any:
    """:return: The memory inside ``MemoryV7``; untyped, as tests access attributes of all kinds."""
    memory = model.policy.core.parts["memory"]
    assert isinstance(memory, MemoryV7)
    return memory.memory


# --- the trace --------------------------------------------------------------------------------------------------------


def make_memory(kind: str) -> MemoryV7:
    th.manual_seed(0)
    return MemoryV7(3, kind, **({} if kind == "none" else {"memory_dim": 4, "num_slots": 3, "num_heads": 2}))


def run(memory: SequenceModel, stepped: bool) -> tuple[th.Tensor, State]:
    """Run two rows of nine steps with resets."""
    x = th.randn(2, 9, 3, generator=th.Generator().manual_seed(1))
    masks = th.ones(2, 9, dtype=th.bool)
    masks[0, 5] = masks[1, 0] = 0
    method = SequenceModel.forward_sequence if stepped else type(memory).forward_sequence
    with th.no_grad():
        output, state, _ = method(memory, x, memory.get_initial_state(2), masks)
    return output, state


@pytest.mark.parametrize("stepped", [True, False])
@pytest.mark.parametrize("kind", MEMORIES)
def test_tracing_does_not_change_outputs(kind: str, stepped: bool) -> None:
    memory = make_memory(kind)
    output, state = run(memory, stepped)
    with trace() as records:
        traced_output, traced_state = run(memory, stepped)
    assert th.equal(output, traced_output)
    assert same(state, traced_state)
    assert len(records) == (0 if kind == "none" else 9 if stepped else 1)


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_trace_nothing_is_recorded_or_computed(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with trace() as records:
        assert tracing()
    assert not tracing()
    calls: list[dict[str, th.Tensor]] = []
    for module in ("attention", "pmm", "slot"):
        monkeypatch.setattr(f"sb3_cyborg.memories.{module}.record", lambda **quantities: calls.append(quantities))
    for stepped in (True, False):
        run(make_memory(kind), stepped)
    assert calls == []
    assert records == []
    with trace():
        run(make_memory(kind), stepped=True)
    assert len(calls) == 9, "and they are made where somebody does"


@pytest.mark.parametrize("kind", KINDS)
def test_sequences_and_steps_record_the_same(kind: str) -> None:
    memory = make_memory(kind)
    with trace() as steps:
        run(memory, stepped=True)
    with trace() as sequences:
        run(memory, stepped=False)
    assert {"read", "null"} <= sequences[0].keys() <= steps[0].keys() <= QUANTITIES.keys()
    for name, whole in sequences[0].items():
        th.testing.assert_close(whole, th.stack([step[name] for step in steps], dim=1))
    assert not any(tensor.requires_grad for tensor in steps[0].values())


def test_traces_nest_and_end_with_an_error() -> None:
    with trace() as outer:
        with suppress(RuntimeError), trace() as inner:
            record(read=th.ones(1))
            raise RuntimeError
        record(null=th.ones(1))
    assert [list(part) for part in (*inner, *outer)] == [["read"], ["null"]]
    assert not tracing()


def test_an_unknown_quantity() -> None:
    with trace(), pytest.raises(ValueError, match=r"Unknown option for a trace 'reads'\. Did you mean 'read'"):
        record(reads=th.ones(1))


# --- an episode -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_attention_reproduces_the_read(kind: str) -> None:
    """Attention times the values of each step reproduces the read; the shares sum to one."""
    model = agent(kind)
    memory, inputs, latents, contexts = memory_of(model), [], [], []
    encoder: Any = model.policy.core.parts["encoder"]
    encoder.input_projection.register_forward_pre_hook(lambda _, args: inputs.append(args[0][0]))
    encoder.output_projection.register_forward_hook(lambda _, __, latent: latents.append(latent[0]))
    memory.out.register_forward_pre_hook(lambda _, args: contexts.append(args[0][0].view(2, -1)))
    inspection = inspect_episode(model)
    assert inspection.steps == len(latents) == STEPS
    assert inspection.ended
    x = th.cat([th.stack(latents), th.stack(inputs)], dim=-1)
    with th.no_grad():
        stored = memory.item(x) if kind in ("pmm", "slot") else x
        values = (stored if kind == "slot" else memory.value(stored)).view(STEPS, 2, -1).double().numpy()
        null = (memory.null if kind == "slot" else memory.null_value).double().numpy()
    attention, nulls = inspection.attention, inspection.memory["null"]
    assert attention is not None
    np.testing.assert_allclose(attention.sum(-1) + nulls, 1, atol=1e-5)
    assert (attention >= 0).all()
    assert not np.triu(attention.max(axis=1)).any(), "nobody reads what is yet to come"
    expected = np.einsum("thu,uhd->thd", attention, values) + nulls[..., None] * null
    np.testing.assert_allclose(th.stack(contexts).detach().numpy(), expected, atol=1e-4)


def test_a_ring_that_reads_three_steps_back() -> None:
    model = agent("ring", num_slots=5)
    memory = memory_of(model)
    assert isinstance(memory, RingMemory)
    assert memory.num_first == 4
    with th.no_grad():
        for parameter in (memory.key.weight, memory.age_key, memory.null_key, memory.first_key):
            parameter.zero_()
        memory.age_bias.fill_(-50.0)
        memory.age_bias[:, 2] = 50.0
    inspection = inspect_episode(model)
    attention = inspection.attention
    assert attention is not None
    wanted = np.zeros((STEPS, STEPS))
    wanted[np.arange(3, STEPS), np.arange(STEPS - 3)] = 1
    for head in range(2):
        np.testing.assert_allclose(attention[:, head], wanted, atol=1e-6)
    np.testing.assert_allclose(inspection.memory["null"][:3], 1, atol=1e-6)
    np.testing.assert_allclose(inspection.memory["null"][3:], 0, atol=1e-6)
    assert inspection.is_window
    assert inspection.held is not None
    assert inspection.held[2].tolist() == [-1, -1, -1, -1, -1, -1, -1, 0, 1]
    assert inspection.held[7].tolist() == [0, 1, -1, -1, 2, 3, 4, 5, 6], "the first steps stay, each in its place"
    assert inspection.held[9].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8]
    image = maps(inspection)["step that was read"][0]
    for t in range(3, STEPS):
        np.testing.assert_allclose(image[t - 3, t], 1, atol=1e-6)
    assert np.ma.getmaskarray(image)[9, 9]
    assert np.ma.getmaskarray(image)[4, 10], "forgotten"
    assert not np.ma.getmaskarray(image)[4:9, 9].any()
    by_age = maps(inspection)["age (steps ago)"][0]
    np.testing.assert_allclose(by_age[2, 3:].filled(np.nan), 1, atol=1e-6)


def test_held_steps_of_pmm() -> None:
    """``held`` equals a search for each slot's item among those of all steps; gates, strength and usage equal the state's."""
    model = agent("pmm", num_slots=3)
    memory, offered, gates = memory_of(model), [], []
    memory.item.register_forward_hook(lambda _, __, item: offered.append(item[0]))
    memory.write_gate.register_forward_hook(lambda _, __, logit: gates.append(th.sigmoid(logit).item()))
    env = model.get_env()
    assert env is not None
    env.seed(3)
    obs: Any = env.reset()
    states: list[Any] = []
    state: Any = None
    for _ in range(STEPS):
        states.append(state)
        action, state = predict(model, obs, state, np.zeros(1), deterministic=True)
        obs, *_ = env.step(action)
    by_hand, gates_by_hand = list(offered), list(gates)
    inspection = inspect_episode(model, seed=3)
    held = inspection.held
    assert held is not None
    assert (held[0] == -1).all()
    for t in range(1, STEPS):
        for slot in range(3):
            item = states[t]["memory.items"][0, slot]
            steps = [step for step in range(t) if np.array_equal(by_hand[step].numpy(), item)]
            assert steps == ([held[t, slot]] if held[t, slot] >= 0 else []), (t, slot)
        for name in ("usage", "strength"):
            np.testing.assert_allclose(inspection.memory[name][t], states[t][f"memory.{name}"][0])
    assert len(np.unique(held)) > 6, "slots were written anew"
    np.testing.assert_allclose(inspection.memory["gate"][:, 0], gates_by_hand, rtol=1e-5)
    assert not inspection.is_window


def test_slot_shows_its_gate_and_what_is_unwritten() -> None:
    model = agent("slot")
    memory, logits = memory_of(model), []
    assert isinstance(memory, SlotMemory)
    memory.write_gate.register_forward_hook(lambda _, __, logit: logits.append(logit[0]))
    inspection = inspect_episode(model)
    np.testing.assert_allclose(inspection.memory["gate"], th.sigmoid(th.stack(logits)).detach(), atol=2e-3)  # times MAX_WRITE
    before = np.cumprod(1 - inspection.memory["write"], axis=0)[:-1]
    np.testing.assert_allclose(inspection.memory["unwritten"][1:], before, atol=1e-5)
    np.testing.assert_allclose(inspection.memory["unwritten"][0], 1)


@pytest.mark.parametrize("space", ["box", "discrete", "image", "dict"])
def test_actions_equal_those_of_predict(space: str) -> None:
    env = toy_vec_env(2, lambda: LongToyEnv(OBSERVATION_SPACES[space], spaces.Box(-0.5, 0.5, (2,))))
    policy = "MultiInputPolicy" if space == "dict" else "MlpPolicy"
    model = toy_model(env, policy, policy_kwargs={"memory": "kv", "use_last_action": True})
    inspection = inspect_episode(model, seed=5, max_steps=10, deterministic=False)
    # An inspection replays no recorded step, whose last digit rounds differently, so `predict` must not do so here.
    model.policy._recorded_step = RecordedStep(model.policy)
    model.policy._recorded_step.reason = "off"
    env.seed(5)
    th.manual_seed(5)
    obs: Any = env.reset()
    state: Any = None
    for t in range(10):
        action, state = predict(model, obs, state, np.zeros(2))
        np.testing.assert_array_equal(action[0], inspection.actions[t])
        if inspection.observations is not None:
            np.testing.assert_array_equal(np.ravel(obs[0]), inspection.observations[t])
        obs, rewards, *_ = env.step(action)
        assert inspection.rewards[t] == pytest.approx(rewards[0])
    assert not inspection.ended
    assert (inspection.observations is None) == (space in ("image", "dict"))


def test_rewards_are_not_normalised() -> None:
    env = VecNormalize(toy_vec_env(1, LongToyEnv), training=False)
    model = agent("ring", env=env)
    plain = inspect_episode(model, toy_vec_env(1, LongToyEnv), seed=0)
    env.ret_rms.var = np.array(100.0)
    np.testing.assert_allclose(inspect_episode(model, env, seed=0).rewards, plain.rewards, rtol=1e-6)


def test_a_gymnasium_environment_and_its_name() -> None:
    model = agent("ring")
    assert inspect_episode(model, LongToyEnv()).name == "LongToyEnv"
    assert inspect_episode(model, VecNormalize(toy_vec_env(1, LongToyEnv), training=False)).name == "LongToyEnv"
    assert inspect_episode(model, name="Mine").name == "Mine"


def test_agents_that_cannot_be_inspected(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"no memory to inspect \(memory 'none'\); memories that can be inspected: 'kv', 'pmm', 'ring'"
    ):
        inspect_episode(agent("none"))
    with pytest.raises(ValueError, match="Only a MemoryPPO agent can be inspected, got RecurrentPPO"):
        inspect_episode(RecurrentPPO("MlpLstmPolicy", toy_vec_env(), n_steps=8))  # type: ignore[arg-type]  # on purpose
    with pytest.raises(ValueError, match="`max_steps` must be a whole number of at least 1, got 0"):
        inspect_episode(agent("ring"), max_steps=0)
    agent("ring").save(tmp_path / "model")
    with pytest.raises(ValueError, match="loaded without an environment: pass `env`"):
        inspect_episode(MemoryPPO.load(tmp_path / "model"))


class OwnMemory(AttentionMemory):
    """Stores nothing, and records the given quantities."""

    shown: dict[str, th.Tensor]

    def __init__(self, input_dim: int) -> None:
        super().__init__(input_dim, 4, 3, 2)

    def get_initial_state(self, batch_size: int, device: th.device | str | None = None) -> State:
        return {}

    def forward_step(self, x: th.Tensor, state: State, mask: th.Tensor | None = None) -> tuple[th.Tensor, State, Logs]:
        if self.shown:
            record(**self.shown)
        return self.out(x[:, :4]), {}, {}


def test_registered_memories(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MEMORIES, "own", OwnMemory)
    model = toy_model(toy_vec_env(1, LongToyEnv), policy_kwargs={"memory": "own", "memory_kwargs": {}})

    def shows(**shown: th.Tensor) -> Inspection:
        monkeypatch.setattr(OwnMemory, "shown", shown, raising=False)
        return inspect_episode(model)

    read = {"read": th.full((1, 2, 3), 0.25), "null": th.full((1, 2), 0.25)}
    inspection = shows(**read)
    assert inspection.attention is None
    assert inspection.held is None
    assert [image.tolist() for image in maps(inspection)["slot"]] == [[[0.25] * STEPS] * 3]
    assert maps(shows(**read, usage=th.ones(1, 3)))["slot"][1].tolist() == [[1.0] * STEPS] * 3
    with pytest.raises(ValueError, match=r"Memory 'own' \(OwnMemory\) cannot be inspected: 0 records in a step.*record"):
        shows()
    with pytest.raises(ValueError, match=r"only \['gate'\] in a step"):
        shows(gate=th.ones(1, 1))
    with pytest.raises(ValueError, match=r"recorded `usage` of shape \(1, 4\); it must be \(B, S\)"):
        shows(**read, usage=th.ones(1, 4))
    with pytest.raises(ValueError, match=r"recorded `read` of shape \(1, 6\); it must be \(B, H, S\)"):
        shows(read=th.ones(1, 6), null=th.ones(1, 2))


# --- write gates of a rollout -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pmm", "slot"])
def test_write_gates_are_those_the_agent_acted_with(kind: str) -> None:
    model = agent(kind, env=toy_vec_env(3))
    model.lr_schedule = lambda _: 0.0  # the second rollout, which begins within episodes, by the same weights
    model.learn(72)
    buffer = model.rollout_buffer
    assert not buffer.episode_starts[0].all()
    state = {name: leaf[0] for name, leaf in buffer.states.items()}
    assert isinstance(buffer.observations, th.Tensor)
    assert buffer.episode_starts[1:].any()
    with th.no_grad(), trace() as records:
        for t in range(buffer.n_steps):
            _, state = model.policy._core_step(buffer.observations[t], state, buffer.episode_starts[t])
    acted = th.stack([step["gate"] for step in records], dim=1)  # (N, T, G)
    gates, few = write_gates(model), write_gates(model, max_transitions=3 * 5)
    assert gates is not None
    assert few is not None
    th.testing.assert_close(gates.view(acted.shape), acted)
    th.testing.assert_close(few, acted[:, :5].flatten())
    assert ((gates >= 0) & (gates <= 1)).all()
    assert gates.std() > 0.01


class _Look(BaseCallback):
    """Compute the write gates of each rollout."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[th.Tensor | None] = []

    def _on_rollout_end(self) -> None:
        assert isinstance(self.model, MemoryPPO)
        self.seen.append(write_gates(self.model))
        assert not self.model.policy.training

    def _on_step(self) -> bool:
        return True


def test_write_gates_leave_training_as_it_was() -> None:
    """The weights after three updates are bitwise equal with and without computing the write gates."""
    models, look = [agent("pmm", env=toy_vec_env(3)) for _ in range(2)], _Look()
    for model, callback in zip(models, (None, look), strict=True):
        model.set_random_seed(0)
        model.learn(108, callback=callback)
    assert len(look.seen) == 3
    assert same(*[weights(model.policy) for model in models])


def test_without_write_gates() -> None:
    assert write_gates(rollout(agent("ring", env=toy_vec_env()))) is None
    assert write_gates(rollout(agent("none", env=toy_vec_env()))) is None
    with pytest.raises(ValueError, match="no rollout to look at yet: 0 of 12 steps"):
        write_gates(agent("pmm"))


def test_write_gates_of_dict_observations() -> None:
    env = toy_vec_env(2, lambda: ToyEnv(OBSERVATION_SPACES["dict"]))
    gates = write_gates(rollout(toy_model(env, "MultiInputPolicy", policy_kwargs={"memory": "pmm", "use_last_action": True})))
    assert gates is not None
    assert gates.shape == (24,)


# --- the picture ------------------------------------------------------------------------------------------------------


def maps(inspection: Inspection, heads: str | int = "mean") -> dict[str, list[Any]]:
    """:return: The arrays of the heat maps, by the label of their vertical axis."""
    found: dict[str, list[Any]] = {}
    for axes in inspection_figure(inspection, heads).axes:
        for image in axes.get_images():
            if axes.get_label() != "<colorbar>":
                found.setdefault(axes.get_ylabel(), []).append(image.get_array())
    return found


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        ("ring", ["step that was read", "age (steps ago)"]),
        ("kv", ["step that was read", "age (steps ago)"]),
        ("pmm", ["step that was read", "slot", "slot", "slot", "slot"]),
        ("slot", ["step that was read", "slots of", "slots of", "slots of"]),
    ],
)
def test_panels(kind: str, wanted: list[str], tmp_path: Path) -> None:
    inspection = inspect_episode(agent(kind))
    figure = inspection_figure(inspection)
    left = [axes for axes in figure.axes if axes.get_ylabel() and axes.get_xlim() == (-0.5, STEPS - 0.5)]
    assert [axes.get_ylabel() for axes in left] == [*wanted, "share", "observation", "action", "reward"]
    assert left[-1].get_xlabel() == "step of the episode"
    title = figure.get_suptitle()
    assert f"Memory '{kind}' along an episode" in title
    assert f"; {STEPS} steps, return {inspection.rewards.sum():.2f}" in title
    path = draw_inspection(inspection, tmp_path / "new" / "picture.png")
    with Image.open(path) as picture:
        picture.load()
        assert picture.width == 1320
        assert len(picture.convert("RGB").getcolors(1 << 22) or []) > 50
    assert 30_000 < path.stat().st_size < 400_000


def test_heads() -> None:
    inspection = inspect_episode(agent("pmm"))
    attention = inspection.attention
    assert attention is not None
    several: dict[str | int, np.ndarray] = {
        "mean": attention.mean(1),
        "max": attention.max(1),
        0: attention[:, 0],
        1: attention[:, 1],
    }
    for heads, values in several.items():
        image = maps(inspection, heads)["step that was read"][0]
        shown = ~np.ma.getmaskarray(image)
        np.testing.assert_allclose(image[shown], values.T[shown])
        assert not values.T[~shown].any(), "grey is only where nothing is"
    for heads, match in (("median", "`heads` must be 'mean', 'max' or the number"), (2, "this memory has 2 heads: 0 to 1")):
        with pytest.raises(ValueError, match=match):
            inspection_figure(inspection, heads)


def test_very_short_and_long_episodes(tmp_path: Path) -> None:
    for kind in KINDS:
        inspection_figure(inspect_episode(agent(kind), max_steps=1))
    env = DummyVecEnv([lambda: ToyEnv(action_space=spaces.MultiDiscrete([2, 3]), mean_length=10**9)])
    inspection = inspect_episode(agent("ring", env=env), max_steps=310)
    assert "the first 310 steps" in inspection_figure(inspection).get_suptitle()
    draw_inspection(inspection, tmp_path / "long.png")


def test_a_bad_picture_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="A picture's name ends in"):
        draw_inspection(inspect_episode(agent("ring"), max_steps=2), tmp_path / "picture.gif")


def test_a_run(tmp_path: Path) -> None:
    trainer = TrainerV7(
        {
            "env": "CartPole-v1",
            "memory": {"type": "pmm", "num_slots": 4, "num_heads": 2},
            "hidden_dim": 8,
            "n_steps": 16,
            "n_epochs": 1,
            "log_dir": str(tmp_path),
            "normalize": True,
            "eval_freq": 0,
            "progress_bar": False,
            "seed": 1,
        }
    )
    trainer.train(32)
    assert trainer.run is not None
    first, again = (inspect_run(trainer.run, tmp_path / f"{name}.png", max_steps=30, which="last") for name in "ab")
    assert first.name == "CartPole-v1"
    assert (first.rewards == 1).all()
    assert first.actions.tolist() == again.actions.tolist(), "a run's own seed"
    assert (tmp_path / "a.png").stat().st_size > 30_000
    with pytest.raises(ValueError, match="A picture's name ends in"):
        inspect_run(tmp_path / "nowhere", tmp_path / "a.txt")
    with pytest.raises(ValueError, match="nowhere"):
        inspect_run(tmp_path / "nowhere", tmp_path / "a.png")


# --- attention in the encoder -------------------------------------------------------------------------------------------


def transformer_agent(memory: str) -> MemoryPPO:
    encoder: dict[str, Any] = {"encoder": "trxl", "num_layers": 2, "encoder_kwargs": {"window": 3, "num_heads": 2}}
    return agent(memory, **encoder)


@pytest.mark.parametrize("memory", ["none", "ring", "pmm"])
def test_attention_of_each_layer(memory: str) -> None:
    """The layers come first, in order, each with its own attention; the memory's records are those of the memory."""
    model = transformer_agent(memory)
    encoder: Any = model.policy.core.parts["encoder"]
    first, second = (encoder.core.get_submodule(f"layer{index}").attention for index in range(2))
    with th.no_grad():
        for layer, age in ((first, 1), (second, 3)):
            for parameter in (layer.key.weight, layer.age_key, layer.null_key):
                parameter.zero_()
            layer.age_bias.fill_(-50.0)
            layer.age_bias[:, age - 1] = 50.0
    inspection = inspect_episode(model)
    layers = ["encoder, layer 0", "encoder, layer 1"]
    assert list(inspection.parts) == (layers if memory == "none" else [*layers, f"memory {memory!r}"])
    for name, age in zip(layers, (1, 3), strict=True):
        attention = inspection.parts[name].attention
        assert attention is not None
        wanted = np.zeros((STEPS, STEPS))
        wanted[np.arange(age, STEPS), np.arange(STEPS - age)] = 1
        for head in range(2):
            np.testing.assert_allclose(attention[:, head], wanted, atol=1e-6)
    if memory != "none":
        assert inspection.memory["read"].shape[2] == 4 + 4 * (memory == "ring"), "slots, and the ring's first inputs"


@pytest.mark.parametrize("memory", ["none", "slot"])
def test_panels_of_each_layer(memory: str, tmp_path: Path) -> None:
    figure = inspection_figure(inspect_episode(transformer_agent(memory)))
    title = figure.get_suptitle()
    assert "Encoder, layer 0, encoder, layer 1" in title
    assert ("memory 'slot'" in title) == (memory == "slot")
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert sum(text.startswith("encoder, layer 1: Attention") for text in titles) == 1
    assert sum(text.startswith("memory 'slot': ") for text in titles) == 5 * (memory == "slot")
    assert [axes.get_ylabel() for axes in figure.axes].count("reward") == 1
    draw_inspection(inspect_episode(transformer_agent(memory)), tmp_path / "picture.png")


def test_an_agent_without_memory_and_attention_names_the_encoder() -> None:
    with pytest.raises(ValueError, match="encoder: 'trxl'"):
        inspect_episode(agent("none", encoder="mingru"))
