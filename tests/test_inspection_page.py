"""The page of an inspection: its data, its text as a file of its own, and its use in headless Chromium."""

import base64
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_cyborg import MemoryPPO
from sb3_cyborg.envs import make_memory_vec_env
from sb3_cyborg.trainers.trainer_v7 import TrainerV7
from sb3_cyborg.viewers.frames import LARGEST_SIDE, encode_frame, picture_of_observation
from sb3_cyborg.viewers.inspection import Inspection, inspect_episode
from sb3_cyborg.viewers.inspection_page import MISSING, inspection_page, page_data, write_inspection_page
from sb3_cyborg.viewers.runs import inspect_run
from tests.browser_helpers import ROOT, require_chromium
from tests.helpers import OBSERVATION_SPACES, ToyEnv, toy_model, toy_vec_env
from tests.mask_helpers import masked_model, masked_vec_env
from tests.test_inspection import KINDS, STEPS, LongToyEnv, agent, transformer_agent

EVIL = '</script><script>attacked = 1</script><img src=x onerror="attacked = 1">&lt;{{data}}'
"""A name that would run code or be filled in where it is not escaped."""
EPISODE = ["Action", "Reward", "Observation"]


def decoded(shown: dict[str, Any]) -> np.ndarray:
    """:return: The values of a map, (heads, steps, rows), NaN for missing ones."""
    data = np.frombuffer(base64.b64decode(shown["values"]), dtype=np.uint8).astype(float)
    values = np.where(data == MISSING, np.nan, (data / (MISSING - 1)) ** 2 * shown["top"])
    return values.reshape(shown["heads"], -1, shown["rows"])


def embedded(page: str) -> dict[str, Any]:
    """:return: The data that a page holds."""
    match = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert match is not None
    data: dict[str, Any] = json.loads(match[1])
    return data


# --- details of an episode --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("deterministic", [True, False])
def test_details_do_not_change_the_episode(deterministic: bool) -> None:
    model = agent("pmm")
    plain, detailed = (
        inspect_episode(model, seed=3, deterministic=deterministic, details=details) for details in (False, True)
    )
    np.testing.assert_array_equal(plain.actions, detailed.actions)
    np.testing.assert_array_equal(plain.rewards, detailed.rewards)
    for name, values in plain.memory.items():
        np.testing.assert_array_equal(values, detailed.memory[name])
    assert plain.values is None
    assert plain.probabilities is None
    assert plain.frames is None
    assert detailed.encoder == "gru"


def test_values_and_probabilities_are_those_of_the_policy() -> None:
    """They equal those of the whole episode as one sequence."""
    model = agent("ring")
    inspection = inspect_episode(model, seed=0, details=True)
    assert inspection.values is not None
    assert inspection.probabilities is not None
    assert inspection.observations is not None
    policy, steps = model.policy, inspection.steps
    obs = th.as_tensor(inspection.observations, dtype=th.float32).unsqueeze(0)
    starts = th.zeros(1, steps)
    starts[0, 0] = 1
    state, rows = policy.get_initial_state(1), []
    with th.no_grad():
        for t in range(steps):
            values = policy.predict_values(obs[:, t], state, starts[:, t])
            distribution, state = policy.get_distribution(obs[:, t], state, starts[:, t])
            rows.append((values.item(), distribution.distribution.probs[0].numpy()))  # type: ignore[union-attr]  # Categorical
            state = policy.inputs.remember(state, th.as_tensor(inspection.actions[t : t + 1]))
    np.testing.assert_allclose(inspection.values, [value for value, _ in rows], atol=1e-5)
    np.testing.assert_allclose(inspection.probabilities, [odds for _, odds in rows], atol=1e-5)
    assert np.std(inspection.values) > 1e-3
    assert (inspection.probabilities.argmax(axis=1) == inspection.actions[:, 0]).all()


def test_continuous_actions_have_no_probabilities() -> None:
    env = toy_vec_env(1, lambda: LongToyEnv(OBSERVATION_SPACES["box"], spaces.Box(-0.5, 0.5, (2,))))
    inspection = inspect_episode(agent("kv", env=env), details=True)
    assert inspection.probabilities is None
    data = page_data(inspection)
    assert data["probabilities"] is None
    assert not data["discrete_actions"]


def test_illegal_actions_have_probability_zero() -> None:
    env = masked_vec_env(1, mean_length=100)
    model = masked_model(env, policy_kwargs={"memory": "kv"})
    inspection = inspect_episode(model, env, details=True, max_steps=6)
    probabilities = inspection.probabilities
    assert probabilities is not None
    (masks,) = env.get_attr("masks")
    illegal = ~np.array(masks)[-inspection.steps :]
    assert illegal.any()
    np.testing.assert_array_equal(probabilities == 0, illegal)


def test_frames_are_those_before_each_step() -> None:
    env = make_memory_vec_env("sb3_cyborg/MemoryChain-v0", seed=0, env_kwargs={"render_mode": "rgb_array", "memory_length": 4})
    inspection = inspect_episode(agent("ring", env=env), details=True, seed=1)
    assert inspection.frames is not None
    assert len(inspection.frames) == inspection.steps
    env.seed(1)
    env.reset()
    first = env.get_images()[0]
    assert first is not None
    assert inspection.frames[0] == encode_frame(first)
    data = page_data(inspection)
    assert len(set(data["frames"])) == len(data["frames"]) <= len(set(inspection.frames)), "equal frames are stored once"
    assert data["frames"][data["frame_of"][0]].startswith("data:image/")


def test_images_that_are_observed_are_frames() -> None:
    env = toy_vec_env(1, lambda: LongToyEnv(OBSERVATION_SPACES["image"]))
    inspection = inspect_episode(toy_model(env, "CnnPolicy", policy_kwargs={"memory": "kv"}), details=True, max_steps=3)
    assert inspection.frames is not None
    assert len(inspection.frames) == 3
    assert inspection.observations is None


def test_pictures_of_observations() -> None:
    grey = np.arange(12, dtype=np.uint8).reshape(1, 3, 4)
    picture = picture_of_observation(grey)
    assert picture is not None
    assert picture.shape == (3, 4, 3)
    assert (picture == grey[0][..., None]).all()
    for other in (np.zeros(3), np.zeros((3, 4, 3)), np.zeros((5, 6, 4), dtype=np.uint8)):
        assert picture_of_observation(other) is None


def test_large_frames_are_made_smaller() -> None:
    from io import BytesIO

    from PIL import Image

    noise = np.random.default_rng(0).integers(256, size=(600, 1000, 3), dtype=np.uint8)
    flat = np.zeros((600, 1000, 3), dtype=np.uint8)
    for picture, kind in ((noise, "JPEG"), (flat, "PNG")):
        image = Image.open(BytesIO(encode_frame(picture)))
        assert (image.format, image.size) == (kind, (LARGEST_SIDE, round(0.6 * LARGEST_SIDE)))


# --- the data of the page ---------------------------------------------------------------------------------------------

TITLES = {
    "ring": ["Attention over past steps", "The same by age: steps between storing and reading"],
    "kv": ["Attention over past steps", "The same by age: steps between storing and reading"],
    "pmm": [
        "Attention over past steps",
        "Which slot is read",
        "Age of the item in each slot",
        "Usage of each slot: the least-used one is overwritten next",
        "Strength of each slot: the write gate when its item was written",
    ],
    "slot": [
        "Attention over past steps",
        "Which slot is read",
        "Share of each slot that is replaced",
        "Share of each slot that was ever written",
    ],
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_maps_are_those_of_the_inspection(kind: str) -> None:
    inspection = inspect_episode(agent(kind))
    (part,) = page_data(inspection)["parts"]
    assert part["name"] == f"Memory '{kind}'"
    assert [shown["title"] for shown in part["maps"]] == TITLES[kind]
    values, attention = decoded(part["maps"][0]), inspection.attention
    assert attention is not None
    known = np.isfinite(values)
    expected = attention.transpose(1, 0, 2)
    np.testing.assert_allclose(values[known], expected[known], atol=1 / (MISSING - 1))
    assert not expected[~known].any(), "a missing cell is one that nothing is read from"
    np.testing.assert_allclose(part["null_shares"], inspection.memory["null"], atol=1e-5)
    if "gate" in inspection.memory:
        np.testing.assert_allclose(part["gates"], inspection.memory["gate"], atol=1e-5)
    if kind == "pmm":
        assert part["held"] == inspection.held.tolist()  # type: ignore[union-attr]  # pmm's slots hold steps
    if kind == "slot":
        np.testing.assert_allclose(decoded(part["maps"][2])[0], inspection.memory["write"].reshape(STEPS, -1), atol=4e-3)


def test_each_layer_of_attention_is_a_part() -> None:
    names = [part["name"] for part in page_data(inspect_episode(transformer_agent("slot")))["parts"]]
    assert names == ["Encoder, layer 0", "Encoder, layer 1", "Memory 'slot'"]


def test_an_agent_without_memory_has_a_page() -> None:
    data = page_data(inspect_episode(agent("none"), details=True))
    assert data["parts"] == []
    assert "no external memory" in data["summary"]
    with pytest.raises(ValueError, match="no memory to inspect"):
        inspect_episode(agent("none"))


def test_observations_of_many_numbers_are_a_map() -> None:
    env = DummyVecEnv([lambda: ToyEnv(spaces.Box(-1, 1, (30,)), mean_length=100)])
    inspection = inspect_episode(agent("kv", env=env), details=True, max_steps=5)
    observations = inspection.observations
    assert observations is not None
    shown = page_data(inspection)["observation_map"]
    low = observations.min()
    np.testing.assert_allclose(decoded(shown)[0] + low, observations, atol=(observations.max() - low) / 250)


def test_numbers_that_are_not_finite_are_null() -> None:
    from dataclasses import replace

    inspection = inspect_episode(agent("kv"), details=True, max_steps=3)
    data = embedded(inspection_page(replace(inspection, values=np.array([1.0, np.nan, np.inf]))))
    assert data["values"] == [1.0, None, None]


def test_the_page_is_one_file_and_escapes_text(tmp_path: Path) -> None:
    inspection = inspect_episode(agent("ring"), name=EVIL, details=True)
    page = write_inspection_page(inspection, tmp_path / "new" / "memory.html").read_text(encoding="utf-8")
    assert embedded(page)["title"] == f"Encoder gru, memory ring in {EVIL}"
    assert page.count("<script") == page.count("</script>") == 2
    assert "<img" not in page
    assert not re.search(r"https?://|<link|@import|\bimport\(|\bfetch\(", page), "nothing is loaded"
    assert "{{style" not in page
    assert "default-src 'none'" in page


def test_a_bad_name_of_a_page(tmp_path: Path) -> None:
    inspection = inspect_episode(agent("ring"), max_steps=2)
    with pytest.raises(ValueError, match=r"A page's name ends in .html or .htm, got"):
        write_inspection_page(inspection, tmp_path / "memory.png")
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(ValueError, match="is a folder"):
        write_inspection_page(inspection, tmp_path / "folder.html")


def trained(folder: Path, **settings: Any) -> Path:
    """:return: The folder of a run of a few steps."""
    config = {"env": "CartPole-v1", "hidden_dim": 8, "n_steps": 16, "n_epochs": 1, "eval_freq": 0, "progress_bar": False}
    trainer = TrainerV7({**config, "log_dir": str(folder), "tensorboard": False, "seed": 1, **settings})
    trainer.train(32)
    assert trainer.run is not None
    return trainer.run


def test_a_run(tmp_path: Path) -> None:
    run = trained(tmp_path, memory={"type": "pmm", "num_slots": 4})
    both = inspect_run(run, tmp_path / "memory.png", html=tmp_path / "memory.html", which="last", max_steps=9)
    assert both.frames is not None
    assert (tmp_path / "memory.png").stat().st_size > 10_000
    assert len(embedded((tmp_path / "memory.html").read_text(encoding="utf-8"))["rewards"]) == 9
    with pytest.raises(ValueError, match="Nothing to write"):
        inspect_run(run)
    with pytest.raises(ValueError, match="A page's name"):
        inspect_run(run, html=tmp_path / "memory.txt")


def test_a_run_without_memory(tmp_path: Path) -> None:
    run = trained(tmp_path, memory="none")
    assert inspect_run(run, html=tmp_path / "memory.html", which="last", max_steps=3).parts == {}
    with pytest.raises(ValueError, match="no memory to inspect"):
        inspect_run(run, tmp_path / "memory.png", html=tmp_path / "other.html", which="last")
    assert not (tmp_path / "other.html").exists()


# --- in Chromium ------------------------------------------------------------------------------------------------------

AT = 9
"""The step that the slider is moved to."""


def pole_agent(kind: str, **policy_kwargs: Any) -> MemoryPPO:
    """:return: An agent in an environment with frames."""
    return agent(kind, env=make_memory_vec_env("CartPole-v1", env_kwargs={"render_mode": "rgb_array"}), **policy_kwargs)


def inspections() -> dict[str, Inspection]:
    """:return: An episode for each memory, one with attention in the encoder, and one without either."""
    found = {kind: inspect_episode(agent(kind), details=True, name=EVIL) for kind in KINDS}
    found["none"] = inspect_episode(agent("none"), details=True)
    found["trxl"] = inspect_episode(transformer_agent("none"), details=True)
    found["frames"] = inspect_episode(pole_agent("pmm"), details=True, seed=0, deterministic=False)
    found["plain"] = inspect_episode(agent("ring"))
    return found


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """:return: What the pages have shown, and the inspections."""
    chromium = require_chromium()
    folder = tmp_path_factory.mktemp("pages")
    episodes = inspections()
    pages = {name: str(write_inspection_page(episode, folder / f"{name}.html")) for name, episode in episodes.items()}
    (folder / "inputs.json").write_text(json.dumps({"executable": chromium, "pages": pages, "step": AT}))
    command = ["node", str(ROOT / "tests" / "browser" / "inspection.mjs"), str(folder / "inputs.json"), str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stderr
    return {**json.loads(result.stdout), "folder": folder, "episodes": episodes}


@pytest.mark.slow
def test_the_pages_load_nothing_and_run_no_foreign_code(seen: dict[str, Any]) -> None:
    assert seen["problems"] == []
    requests = [request for request in seen["requests"] if not request.startswith("data:")]
    assert sorted(requests) == sorted((seen["folder"] / f"{name}.html").as_uri() for name in seen["pages"])
    for page in seen["pages"].values():
        assert not page["attacked"]
    assert seen["pages"]["kv"]["title"] == f"Encoder gru, memory kv in {EVIL}"


@pytest.mark.slow
def test_nothing_is_wider_than_the_window(seen: dict[str, Any]) -> None:
    for name, page in seen["pages"].items():
        assert (page["overflow_1300"], page["overflow_400"]) == (0, 0), name
        for width in (1300, 400):
            assert (seen["folder"] / f"{name}_{width}.png").stat().st_size > 10_000


@pytest.mark.slow
def test_the_parts_are_shown(seen: dict[str, Any]) -> None:
    pages = seen["pages"]
    for kind in KINDS:
        assert pages[kind]["cards"] == [f"Memory '{kind}'", "Episode"]
        assert pages[kind]["charts"][1 : 1 + len(TITLES[kind])] == TITLES[kind]
        assert ("Write gates" in pages[kind]["charts"]) == ("gate" in seen["episodes"][kind].memory)
    assert pages["trxl"]["cards"] == ["Encoder, layer 0", "Encoder, layer 1", "Episode"]
    assert pages["none"]["cards"] == ["Episode"]
    assert pages["plain"]["charts"][-3:] == EPISODE
    assert not any(chart.startswith("Value") for chart in pages["plain"]["charts"])
    for name, page in pages.items():
        assert min(page["drawn"]) > 1, f"{name}: a chart is empty"
        assert page["steps"] == seen["episodes"][name].steps


@pytest.mark.slow
def test_slider_keys_and_play(seen: dict[str, Any]) -> None:
    for name, page in seen["pages"].items():
        assert (page["slider"], page["clicked"], page["arrows"], page["end"]) == (AT, 0, 1, page["steps"] - 1), name
        assert (page["playing"], page["stopped"]) == ("Pause", "Play"), name
        assert f"action{seen['episodes'][name].actions[AT, 0]}" in page["now"]


@pytest.mark.slow
def test_frames_are_shown(seen: dict[str, Any]) -> None:
    page = seen["pages"]["frames"]
    assert page["frames"] == 1
    assert page["decoded"]
    assert seen["pages"]["kv"]["frames"] == 0


@pytest.mark.slow
def test_hovering_shows_the_numbers_of_the_step(seen: dict[str, Any]) -> None:
    for name in ("ring", "kv", "pmm", "slot"):
        page, episode = seen["pages"][name], seen["episodes"][name]
        share = episode.attention[AT, :, AT - 1].mean()
        match = re.fullmatch(
            rf"Step {AT}\n(share of the read of )?step {AT - 1}: (.*)\naction .*\nvalue .*\nobs.*", page["tip"]
        )
        assert match, page["tip"]
        if match[1] is None:  # pmm has overwritten it, or never stored it
            assert (name, match[2], share) == ("pmm", "not stored", 0)
        else:
            assert float(match[2].removesuffix(" %")) == pytest.approx(100 * share, abs=0.8)
        assert f"step {AT + 1} is not past yet" in page["future"]
    for name, page in seen["pages"].items():
        episode = seen["episodes"][name]
        reward = re.search(rf"Step {AT}\naction (\S+), reward (\S+)", page["rewardTip"])
        assert reward is not None
        assert int(reward[1]) == episode.actions[AT, 0]
        assert float(reward[2]) == pytest.approx(episode.rewards[AT], abs=0.01)
        assert page["tipIsHidden"]


@pytest.mark.slow
def test_bars_are_as_long_as_the_probabilities(seen: dict[str, Any]) -> None:
    for name in ("ring", "none", "frames"):
        np.testing.assert_allclose(seen["pages"][name]["bars"], seen["episodes"][name].probabilities[AT], atol=0.02)


@pytest.mark.slow
def test_the_steps_that_are_read_most_are_shown(seen: dict[str, Any]) -> None:
    for name in ("ring", "kv", "slot", "frames"):
        attention = seen["episodes"][name].attention[AT].mean(axis=0)
        first, *_, null = seen["pages"][name]["reads"]
        assert first.startswith(f"step {attention.argmax()}: "), name
        shares = re.match(r"null vector: (\S+) %", null)
        assert shares is not None
        assert float(shares[1]) == pytest.approx(100 * seen["episodes"][name].memory["null"][AT].mean(), abs=0.6)
