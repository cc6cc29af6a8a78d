"""The learning benchmark: its agents' settings, a tiny grid that is interrupted and resumed, and the report."""

import json
import multiprocessing
import pickle
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3.common.vec_env import VecNormalize

from benchmarks import learning, learning_report
from benchmarks.learning import CURVES, RUNS, Grid, Run, Trial, append, execute, latest, main, parse_args, plan, read
from benchmarks.learning_tasks import (
    AGENTS,
    BEST,
    BURN_IN_AGENTS,
    DEFAULT,
    GRIDS,
    KINDS,
    STUDY_STEPS,
    TASKS,
    LastActionObservation,
    TimeObservation,
    as_json,
    digest,
    settings,
    the_same,
)
from sb3_cyborg import MemoryPPO
from sb3_cyborg.memories.memory_v7 import MEMORIES
from sb3_cyborg.memory_ppo.episode_time import TIME_WAVES, encode_time
from tests.helpers import toy_vec_env

TINY = ["--tasks", "MemoryChain-16", "--steps", "64", "--processes", "1"]


def row(task: str, agent: str, seed: int, score: float, **changes: Any) -> dict[str, Any]:
    """:return: A row of the CSV of runs, as ``execute`` makes them."""
    metric = {TASKS[task].metric: score}
    return {
        "task": task,
        "agent": agent,
        "seed": seed,
        "steps": TASKS[task].steps,
        "wall_s": 60.0,
        "cpu_s": 60.0,
        "eval_s": 3.0,
        "return": score,
        "std": 0.1,
        "success": None,
        **metric,
        "best": score,
        "solved_at": None,
        "finished": "2026-01-01T00:00:00",
        "commit": "abc",
        "versions": "torch=2",
        "threads": 1,
        "digest": learning.digest_today(task, agent),
        "settings": "{}",
        **changes,
    }


def curve(task: str, agent: str, seed: int, values: list[float], digest: str = "") -> list[dict[str, Any]]:
    steps = np.linspace(0, TASKS[task].steps, len(values)).astype(int)
    key = {"task": task, "agent": agent, "seed": seed, "digest": digest or learning.digest_today(task, agent)}
    return [{**key, "steps": int(s), "return": v, "success": v} for s, v in zip(steps, values, strict=True)]


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", GRIDS)
def test_every_cell_of_every_grid_has_settings_of_its_own(grid: str) -> None:
    tasks, agents = GRIDS[grid]
    for name in tasks:
        different = {the_same(TASKS[name], name, agent) for agent in agents}
        assert different | {BEST} == {*agents, BEST}
        found = [settings(TASKS[name], name, agent) for agent in agents]
        assert len({digest(each) for each in found}) == len(different)
        for each in found:
            budget = TASKS[name].steps if grid in ("table", "masks") else STUDY_STEPS
            assert json.loads(as_json(each))["n_timesteps"] == budget
            assert each["n_envs"] >= 1
            assert TASKS[name].env_kwargs.items() <= each["env_kwargs"].items()


def test_the_default_agent_is_told_nothing_but_the_task() -> None:
    given = settings(TASKS["MemoryChain-64"], "MemoryChain-64", "memory_ppo")
    assert set(given) == {"algo", "env", "policy", "n_envs", "n_timesteps", "env_kwargs"}


def test_peers_train_as_the_best_memory_ppo_does() -> None:
    name = "RepeatPreviousMedium"
    best, recurrent, ppo = (settings(TASKS[name], name, agent) for agent in ("memory_ppo_best", "recurrent_ppo", "ppo"))
    model = MemoryPPO("MlpPolicy", toy_vec_env(best["n_envs"]), device="cpu")
    for peer in (recurrent, ppo):
        assert peer["n_envs"] == best["n_envs"] == 64
        for key in ("n_steps", "n_epochs", "gamma", "gae_lambda", "ent_coef"):
            assert peer[key] == getattr(model, key), key
        assert peer["batch_size"] == model.batch_size
        assert peer["learning_rate"] == f"lin_{model.lr_schedule(1.0)}"
        assert peer["normalize"] == {"norm_obs": True, "norm_reward": False}
    assert recurrent["policy_kwargs"] == {"lstm_hidden_size": 128}
    assert ppo["policy_kwargs"] == {"net_arch": [128, 128]}
    assert settings(TASKS[name], name, "frame_stack_ppo") == {**ppo, "frame_stack": 33}


def test_peers_read_what_memory_ppo_reads() -> None:
    recurrent = settings(TASKS["TMaze-100"], "TMaze-100", "recurrent_ppo")
    assert recurrent["env_wrapper"] == ["benchmarks.learning_tasks.LastActionObservation"]
    assert recurrent["normalize"] == {"norm_obs": True, "norm_reward": True}  # rewards as its entry says
    assert "env_wrapper" not in settings(TASKS["MemoryChain-64"], "MemoryChain-64", "recurrent_ppo")


def test_the_best_agent_is_not_run_where_it_is_the_default_one() -> None:
    args = parse_args(["--tasks", "MemoryChain-64", "TMaze-100", "--agents", BEST, DEFAULT, "ppo", "--seeds", "0"])
    planned = [(run.name, run.agent) for run in plan(args)]
    assert planned == [
        ("MemoryChain-64", DEFAULT),
        ("MemoryChain-64", "ppo"),
        ("TMaze-100", BEST),
        ("TMaze-100", DEFAULT),
        ("TMaze-100", "ppo"),
    ]


def test_peers_take_the_zoos_settings_where_there_are() -> None:
    recurrent, ppo = (settings(TASKS["PendulumNoVel"], "PendulumNoVel", agent) for agent in ("recurrent_ppo", "ppo"))
    assert recurrent["n_steps"] == 1024
    assert recurrent["normalize"]
    assert "lstm_hidden_size=64" in recurrent["policy_kwargs"]
    assert "lstm_hidden_size" not in ppo["policy_kwargs"]
    assert ppo["policy_kwargs"]["net_arch"] == {"pi": [64], "vf": [64]}


def test_names_of_agents_change_settings() -> None:
    task = TASKS["MemoryChain-64"]
    best = settings(task, "MemoryChain-64", "memory_ppo_best")
    changed = settings(task, "MemoryChain-64", "learning_rate=1e-4 policy_kwargs.hidden_dim=32")
    assert changed == {**best, "learning_rate": 1e-4, "policy_kwargs": {"hidden_dim": 32}}
    maze = settings(TASKS["TMaze-100"], "TMaze-100", "policy_kwargs.hidden_dim=32")
    assert maze["policy_kwargs"] == {"use_last_action": True, "hidden_dim": 32}
    assert settings(task, "MemoryChain-64", "memory_ppo gamma=0.9")["gamma"] == 0.9
    kind = settings(task, "MemoryChain-64", "lstm+slot")["policy_kwargs"]
    assert (kind["encoder"], kind["memory"], kind["memory_kwargs"]) == ("lstm", "slot", {"num_slots": 128})
    assert settings(task, "MemoryChain-64", "memory_ppo_best") == best, "the file's entries were changed in place"
    pendulum = settings(TASKS["PendulumNoVel"], "PendulumNoVel", "recurrent_ppo policy_kwargs.lstm_hidden_size=7")
    assert pendulum["policy_kwargs"]["lstm_hidden_size"] == 7


@pytest.mark.parametrize("agent", ["memory_pp", "gru+rings", "grus+ring"])
def test_unknown_agents_are_refused(agent: str) -> None:
    with pytest.raises(ValueError, match="nknown"):
        settings(TASKS["CartPole"], "CartPole", agent)


def test_unknown_tasks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="MemoryChain-16"):
        main(["--tasks", "MemoryChain-15", "--out", str(tmp_path)])


def test_a_changed_default_changes_the_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    given = settings(TASKS["CartPole"], "CartPole", "memory_ppo")
    before = digest(given)
    assert digest(given) == before
    monkeypatch.setattr(MEMORIES["ring"].__init__, "__defaults__", (1,) * 3)
    assert digest(given) != before


def test_what_is_off_has_no_part_in_the_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    given, off = settings(TASKS["CartPole"], "CartPole", "memory_ppo"), MemoryPPO.__init__.__kwdefaults__
    assert off is not None
    before = digest(given)
    monkeypatch.setattr(MemoryPPO.__init__, "__kwdefaults__", off | {"amp": None})
    assert digest(given) == before
    monkeypatch.setattr(MemoryPPO.__init__, "__kwdefaults__", off | {"amp": True})
    assert digest(given) != before


def test_last_action_is_part_of_the_observation() -> None:
    env = LastActionObservation(gym.make("CartPole-v1"))
    obs, _ = env.reset(seed=0)
    np.testing.assert_array_equal(obs[4:], [0, 0])
    obs, *_ = env.step(1)
    np.testing.assert_array_equal(obs[4:], [0, 1])
    assert env.observation_space.contains(obs)


@pytest.mark.parametrize(
    ("env_id", "action", "encoded"),
    [
        ("sb3_cyborg/popgym-MineSweeperEasy-v0", [1, 3], [0, 1, 0, 0, 0, 0, 0, 1]),
        ("Pendulum-v1", np.array([-1.0], np.float32), [-0.5]),
    ],
)
def test_last_actions_of_other_spaces(env_id: str, action: Any, encoded: list[float]) -> None:
    env = LastActionObservation(gym.make(env_id))
    env.reset(seed=0)
    obs, *_ = env.step(action)
    np.testing.assert_array_equal(obs[-len(encoded) :], encoded)
    assert env.observation_space.contains(obs)


def test_time_is_part_of_the_observation() -> None:
    env = TimeObservation(gym.make("CartPole-v1"))
    for _ in range(2):
        obs, _ = env.reset(seed=0)
        np.testing.assert_array_equal(obs[4:], [0] * TIME_WAVES + [1] * TIME_WAVES)
        for step in (1, 2):
            obs, *_ = env.step(1)
            np.testing.assert_array_equal(obs[4:], encode_time(th.tensor(float(step))))
            assert env.observation_space.contains(obs)


# --- runs -------------------------------------------------------------------------------------------------------------


PENDULUM = "memory_ppo_best n_steps=8 seq_len=8 batch_size=8 n_epochs=1 normalize=true"


def test_a_run_makes_a_row_and_a_curve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learning, "FINAL_EPISODES", 3)
    task = replace(TASKS["PendulumNoVel"], steps=16, curve_episodes=2)
    result, points = execute(Run(task, "PendulumNoVel", PENDULUM, 3))
    # Rewards are normalized, to about 1 a step; the episodes of an untrained pendulum earn about -1200.
    assert -2000 < result["return"] < -500
    assert result["success"] is None
    assert result["steps"] == 32
    assert [point["steps"] for point in points] == [0, 32]
    assert points[-1]["return"] == result["return"]
    assert result["best"] == max(point["return"] for point in points)
    assert json.loads(result["settings"])["n_steps"] == 8


def test_evaluation_sees_what_training_sees_and_leaves_it_alone() -> None:
    trial = Trial(Run(TASKS["PendulumNoVel"], "PendulumNoVel", PENDULUM, 0))
    training = trial.model.get_vec_normalize_env()
    assert training is not None
    assert isinstance(trial.curve_envs, VecNormalize)
    assert isinstance(trial.final_envs, VecNormalize)
    first = [np.asarray(envs.venv.reset()) for envs in (training, trial.curve_envs, trial.final_envs)]
    assert len(np.unique(np.concatenate(first), axis=0)) == 4 + 10 + 100, "environments share their seeds"
    trial.model.learn(32)
    statistics: list[Any] = [deepcopy(training.obs_rms)]
    trial.evaluate(trial.curve_envs)
    statistics += [training.obs_rms, trial.curve_envs.obs_rms]
    assert len({each.count for each in statistics}) == 1
    np.testing.assert_array_equal(*[each.mean for each in statistics[:2]])
    np.testing.assert_array_equal(*[each.mean for each in statistics[1:]])


@pytest.mark.slow
def test_interrupted_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*TINY, "--agents", "ppo n_steps=16 batch_size=64", "--out", str(tmp_path)]
    report = Grid._report

    def interrupt(self: Grid, run: Run, what: str) -> None:
        report(self, run, what)
        self._start(self.waiting.pop(0))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Grid, "_report", interrupt)
        assert main([*arguments, "--seeds", "0-1"]) == 130
    (first,) = read(tmp_path / RUNS)
    assert first["seed"] == "0"
    assert main([*arguments, "--seeds", "0-1"]) == 0
    assert "1 runs to do, 1 done already" in capsys.readouterr().out
    rows = read(tmp_path / RUNS)
    assert rows[0] == first
    assert [each["seed"] for each in rows] == ["0", "1"]
    assert {each["success"] for each in rows} <= {str(n / 100) for n in range(101)}
    assert {each["seed"] for each in read(tmp_path / CURVES)} == {"0", "1"}
    assert sorted(path.name for path in tmp_path.iterdir()) == [CURVES, RUNS]
    assert main([*arguments, "--seeds", "0-1"]) == 0
    assert "0 runs to do, 2 done already" in capsys.readouterr().out


@pytest.mark.slow
def test_runs_that_fail_or_are_late_do_not_end_the_grid(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    agents = ["memory_ppo seq_len=-1", "ppo n_steps=16 batch_size=64"]
    assert main([*TINY, "--agents", *agents, "--seeds", "0", "--out", str(tmp_path)]) == 1
    output = capsys.readouterr().out
    assert "`seq_len`" in output
    assert "Failed: MemoryChain-16, memory_ppo seq_len=-1, seed 0" in output
    assert [each["agent"] for each in read(tmp_path / RUNS)] == agents[1:]
    assert main([*TINY, "--agents", "ppo", "--seeds", "0", "--out", str(tmp_path), "--run-minutes", "0.001"]) == 1
    assert "time limit" in capsys.readouterr().out
    assert len(read(tmp_path / RUNS)) == 1


def test_no_run_starts_that_would_not_end_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [Run(TASKS["CartPole"], "CartPole", agent, 1) for agent in ("memory_ppo", "ppo")]
    append(tmp_path / RUNS, [row("CartPole", "memory_ppo", 0, 1.0, wall_s=100.0, digest=runs[0].digest)])
    append(tmp_path / RUNS, [row("CartPole", "ppo", 0, 1.0, wall_s=10.0, digest=runs[1].digest)])

    class Started(Exception):
        pass

    def start(method: str) -> None:
        raise Started

    monkeypatch.setattr(multiprocessing, "get_context", start)
    grid = Grid(runs, tmp_path, 1, limit=50.0)
    with pytest.raises(Started):
        grid.work()
    assert grid.left == runs[:1]
    assert grid.waiting == []


def test_seeds_are_the_outer_loop() -> None:
    runs = plan(learning.parse_args(["--tasks", "CartPole", "TMaze-100", "--agents", "ppo", "memory_ppo", "--seeds", "3,5-6"]))
    assert [run.seed for run in runs] == [3] * 4 + [5] * 4 + [6] * 4
    assert [run.name for run in runs[:4]] == ["CartPole"] * 2 + ["TMaze-100"] * 2


def test_budgets_of_your_own_stay_out_of_the_results(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--steps", "64"])
    assert "--out" in capsys.readouterr().err


def test_what_was_planned_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Someone may edit the file of hyperparameters while a grid runs: a row's settings are those of its digest."""
    run = Run(TASKS["CartPole"], "CartPole", "memory_ppo_best", 0)
    planned, written = run.digest, as_json(run.settings)
    monkeypatch.setattr(learning, "settings", lambda *_: {"algo": "ppo", "env": "CartPole-v1", "policy": "MlpPolicy"})
    sent = pickle.loads(pickle.dumps(run))
    assert (sent.digest, as_json(sent.settings)) == (planned, written)


def test_the_latest_settings_count(tmp_path: Path) -> None:
    append(tmp_path / RUNS, [row("CartPole", "ppo", seed, 1.0, digest="d0") for seed in (0, 1)])
    append(tmp_path / RUNS, [row("CartPole", "ppo", 0, 2.0), row("CartPole", "ppo", 0, 3.0)])
    append(tmp_path / CURVES, curve("CartPole", "ppo", 0, [0, 1], "d0") + curve("CartPole", "ppo", 0, [0, 3]))
    append(tmp_path / RUNS, [row("TMaze-100", "ppo", 0, 1.0, digest="d0")])
    append(tmp_path / CURVES, curve("TMaze-100", "ppo", 0, [0, 1], "d0"))
    append(tmp_path / RUNS, [{**row("TMaze-100", "ppo", 0, 1.0), "task": "no longer there"}])
    rows = [(each["task"], each["seed"], each["return"]) for each in latest(read(tmp_path / RUNS))]
    assert rows == [("CartPole", "0", "3.0"), ("TMaze-100", "0", "1.0"), ("no longer there", "0", "1.0")]
    assert main(["--prune", "--out", str(tmp_path)]) == 0
    assert [each["return"] for each in read(tmp_path / RUNS)] == ["3.0", "1.0"]
    assert [each["return"] for each in read(tmp_path / CURVES)] == ["0", "3", "0", "1"]
    learning_report.main(["--out", str(tmp_path)])
    text = (tmp_path / "learning.md").read_text()
    assert cells_of(text, "CartPole")[-1] == "3.00 ± 0.00 (0/1)"
    assert cells_of(text, "TMaze-100")[-1] == "1.00 ± 0.00 (1/1)†"


# --- report -----------------------------------------------------------------------------------------------------------


def cells_of(text: str, task: str) -> list[str]:
    """:return: The cells of the main table's row of a task."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {task} |"))
    return [part.strip() for part in line.strip("|").split("|")]


def test_report_of_a_part_of_the_grid(tmp_path: Path) -> None:
    rows = [row("MemoryChain-16", "memory_ppo", seed, 1.0) for seed in range(5)]
    rows += [row("MemoryChain-32", "memory_ppo", seed, 1.0 if seed else 0.5) for seed in range(5)]
    rows += [row("MemoryChain-1000", "memory_ppo", seed, float(seed < 3)) for seed in range(5)]
    rows += [row("AutoencodeEasy", "memory_ppo", 0, 0.6), row("AutoencodeEasy", "memory_ppo_best", 0, 0.4)]
    rows += [row("TMaze-100", "memory_ppo", 0, 0.9, best=1.0, solved_at=5000)]
    rows += [row("ConcentrationEasy", "memory_ppo", 0, 0.0), row("ConcentrationEasy", "recurrent_ppo", 0, -0.25)]
    rows += [row("LunarLander", "memory_ppo", 0, 210.0), row("LunarLander", "ppo", 0, 250.0)]
    rows += [row("CartPole", "memory_ppo", 0, 500.0)]
    rows += [row("RepeatFirstEasy", "memory_ppo", seed, 1.0, wall_s=299.0) for seed in range(3)]
    rows += [row("RepeatFirstHard", "memory_ppo", seed, 1.0, wall_s=300.0) for seed in range(3)]
    append(tmp_path / RUNS, rows)
    append(tmp_path / CURVES, curve("MemoryChain-16", "memory_ppo", 0, [0, 0.5, 1]))
    learning_report.main(["--out", str(tmp_path)])
    text = (tmp_path / "learning.md").read_text()
    assert cells_of(text, "MemoryChain-16")[4:] == ["met", "1.00 ± 0.00 (5/5)", "the same", "-", "-", "-"]
    assert cells_of(text, "MemoryChain-32")[4:6] == ["**missed**", "0.90 ± 0.20 (4/5)"]
    assert cells_of(text, "MemoryChain-1000")[4:7] == ["met", "0.60 ± 0.49 (3/5)", "the same"]
    assert cells_of(text, "AutoencodeEasy")[4] == "**missed** so far, 1 seed"
    assert cells_of(text, "TMaze-100")[4:6] == ["**missed** so far, 1 seed", "0.90 ± 0.00 (0/1)"]
    assert cells_of(text, "ConcentrationEasy")[4:6] == ["met so far, 1 seed", "0.00 ± 0.00 (1 seed)"]
    assert cells_of(text, "LunarLander")[4:6] == ["**missed** so far, 1 seed", "210.0 ± 0.0 (1/1)"]
    assert cells_of(text, "RepeatFirstEasy")[4] == "met so far, 3 seeds"
    assert cells_of(text, "RepeatFirstHard")[4] == "met"
    assert cells_of(text, "CartPole")[4:6] == ["-", "500.0 ± 0.0 (1/1)"]
    assert cells_of(text, "PendulumNoVel")[4:] == ["-"] * (1 + len(AGENTS))
    assert "- TMaze-100, memory_ppo, seed 0: best 1.000, final 0.900" in text
    assert (tmp_path / "learning_curves.png").stat().st_size > 10_000
    assert not (tmp_path / "learning_kinds.png").exists()


def test_report_of_the_other_grids(tmp_path: Path) -> None:
    for number, agent in enumerate([KINDS[0], KINDS[-1], *BURN_IN_AGENTS[:4]]):
        for seed in (0, 1):
            append(tmp_path / RUNS, [row("MemoryChain-64", agent, seed, number / 10)])
            append(tmp_path / CURVES, curve("MemoryChain-64", agent, seed, [0, number / 10]))
    learning_report.main(["--out", str(tmp_path)])
    text = (tmp_path / "learning.md").read_text()
    encoder = KINDS[0].partition("+")[0]
    assert f"| {encoder} | 0.00 ± 0.00 (0/2) | - | - | - | - |" in text
    assert f"| {BURN_IN_AGENTS[0]} | 0.20 ± 0.00 (0/2) | 0.100 ± 0.000 |" in text
    for plot in ("learning_kinds.png", "learning_burn_in.png"):
        assert (tmp_path / plot).stat().st_size > 10_000
    assert not (tmp_path / "learning_curves.png").exists()


def test_the_table_in_the_docs_is_that_of_the_runs() -> None:
    text = learning_report.DOCS.read_text()
    assert text.count(learning_report.BEGIN) == text.count(learning_report.END) == 1
    assert text == learning_report.with_table(text, learning.RESULTS), "run `make results`"


def test_report_without_runs_says_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        learning_report.main(["--out", str(tmp_path)])
    assert "benchmarks.learning" in capsys.readouterr().err


def test_bootstrap_band_covers_the_mean() -> None:
    values = np.random.default_rng(0).normal(size=(5, 3))
    low, high = learning_report.bootstrap_band(values)
    assert (low < values.mean(0)).all()
    assert (values.mean(0) < high).all()
    assert (low >= values.min(0)).all()
    assert (high <= values.max(0)).all()
    np.testing.assert_array_equal(learning_report.bootstrap_band(values[:1]), [values[0], values[0]])
