"""Learning curves: reading Monitor files, grouping runs, statistics of a curve, and the figure."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.monitor import load_results
from stable_baselines3.common.results_plotter import ts2xy

from sb3_cyborg.viewers.episodes import find_runs, read_episodes
from sb3_cyborg.viewers.plotting import learning_curves, learning_figure, plot_learning_curves
from tests.helpers import ToyEnv, toy_model

Row = tuple[float, int, float]


def write_monitor(folder: Path, rows: list[Row], name: str = "0", start: float = 1000.0, env_id: str = "Toy-v0") -> Path:
    """:param rows: Return, length and seconds since ``start``; :return: the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["#" + json.dumps({"t_start": start, "env_id": env_id}), "r,l,t", *(f"{r},{length},{t}" for r, length, t in rows)]
    (folder / f"{name}.monitor.csv").write_text("\n".join(lines) + "\n")
    return folder


def steady(value: float, episodes: int = 40, length: int = 10) -> list[Row]:
    return [(value, length, index + 1.0) for index in range(episodes)]


def test_episodes_of_several_environments_are_in_order_of_their_end(tmp_path: Path) -> None:
    write_monitor(tmp_path / "monitor", [(1, 10, 5.0), (3, 20, 15.0)])
    write_monitor(
        tmp_path / "monitor", [(2, 7, 3.0), (4, 8, 16.0)], name="1", start=1004.0
    )  # 7 and 20 in the first one's clock
    episodes = read_episodes(tmp_path)
    assert episodes.columns["r"].tolist() == [1, 2, 3, 4]
    assert episodes.columns["t"].tolist() == [5, 7, 15, 20]
    assert episodes.axis("steps").tolist() == [10, 17, 37, 45]
    assert episodes.axis("episodes").tolist() == [1, 2, 3, 4]
    assert episodes.env_id == "Toy-v0"


def test_the_same_as_sb3_reads(tmp_path: Path) -> None:
    """Returns and steps equal those of SB3's ``load_results`` and ``ts2xy`` on the files of a training run."""
    pytest.importorskip("pandas")
    env = make_vec_env(ToyEnv, n_envs=3, seed=0, monitor_dir=str(tmp_path))
    toy_model(env).learn(200)
    env.close()
    episodes = read_episodes(tmp_path)
    results = load_results(str(tmp_path))
    steps, returns = ts2xy(results, "timesteps")
    assert len(returns) > 20
    assert episodes.columns["r"].tolist() == returns.tolist()
    assert episodes.axis("steps").tolist() == steps.tolist()
    np.testing.assert_allclose(episodes.columns["t"], results["t"])
    assert episodes.env_id == ""


def test_a_line_that_a_killed_run_left_unfinished_is_left_out(tmp_path: Path) -> None:
    file = write_monitor(tmp_path, steady(1.0, 3)) / "0.monitor.csv"
    file.write_text(file.read_text() + "2.5,1")
    assert read_episodes(tmp_path).columns["r"].tolist() == [1, 1, 1]


def test_the_clock_of_a_resumed_run_goes_on(tmp_path: Path) -> None:
    write_monitor(tmp_path, [(1, 10, 5.0), (2, 10, 9.0), (3, 10, 2.0), (4, 10, 4.0)])  # appended by a second session
    episodes = read_episodes(tmp_path)
    assert episodes.columns["r"].tolist() == [1, 2, 3, 4]
    assert episodes.columns["t"].tolist() == [5, 9, 11, 13]


def test_one_run_is_the_mean_and_the_spread_of_its_last_episodes(tmp_path: Path) -> None:
    returns = np.random.default_rng(0).normal(size=30)
    write_monitor(tmp_path, [(value, 10, index) for index, value in enumerate(returns.tolist())])
    (curve,) = learning_curves([tmp_path], window=5)
    assert curve.runs == 1
    assert curve.x.tolist() == list(range(50, 301, 10))
    for point in (0, 7, 25):
        last = returns[point : point + 5]
        assert curve.mean[point] == pytest.approx(last.mean())
        assert (curve.low[point], curve.high[point]) == pytest.approx(tuple(np.percentile(last, [10, 90])))


def test_seeds_of_one_configuration_are_one_curve_with_an_interval(tmp_path: Path) -> None:
    for seed, value in enumerate((1.0, 2.0, 6.0)):
        write_monitor(tmp_path / f"run_seed{seed}", steady(value, episodes=40 + seed))
    write_monitor(tmp_path / "other", steady(0.0))
    other, run = learning_curves([tmp_path])
    assert (other.label, other.runs) == ("other", 1)
    assert (run.label, run.runs) == ("run", 3)
    np.testing.assert_allclose(run.mean, 3.0)
    # One of 27 equally likely resamples holds only the 1 and one only the 6: each has more than 2.5 % of the probability.
    assert run.low == pytest.approx(np.full_like(run.low, 1.0))
    assert run.high == pytest.approx(np.full_like(run.high, 6.0))
    assert (run.x[0], run.x[-1]) == (20, 400), "as far as all of them have come"
    assert len(learning_curves([tmp_path], group=False)) == 4


def test_the_interval_of_many_seeds_is_that_of_their_mean(tmp_path: Path) -> None:
    values = np.random.default_rng(1).normal(size=40)
    for seed, value in enumerate(values.tolist()):
        write_monitor(tmp_path / f"seed{seed}", steady(value, episodes=3))
        (tmp_path / f"seed{seed}" / "config.yaml").write_text(f"env: Toy-v0\nseed: {seed}\n")
    (curve,) = learning_curves([tmp_path])
    half_width = 1.96 * values.std() / np.sqrt(len(values))
    np.testing.assert_allclose(curve.high - curve.mean, half_width, rtol=0.15)
    np.testing.assert_allclose(curve.mean - curve.low, half_width, rtol=0.15)


def test_runs_of_one_configuration(tmp_path: Path) -> None:
    """A configuration is our file without the seed, or RL Zoo's file, or otherwise the name without a seed suffix."""
    for name, learning_rate, seed in (("a", 1, 0), ("b", 1, 1), ("c", 2, 0)):
        write_monitor(tmp_path / "ours" / name, steady(1.0))
        text = f"learning_rate: {learning_rate}\nseed: {seed}\nrun_name: {name}\nlog_dir: here\n"
        (tmp_path / "ours" / name / "config.yaml").write_text(text)
    for number, learning_rate, algo in ((1, 1, "ppo"), (2, 1, "ppo"), (3, 2, "ppo"), (4, 1, "memory_ppo")):
        run = write_monitor(tmp_path / "memory_ppo" / f"Toy-v0_{number}", steady(1.0))
        (run / "Toy-v0").mkdir()
        (run / "Toy-v0" / "config.yml").write_text(f"- learning_rate\n- {learning_rate}\n")
        arguments = f"- - - algo\n    - {algo}\n  - - env_kwargs\n    - null\n  - - seed\n    - {number}\n"
        (run / "Toy-v0" / "args.yml").write_text(arguments)
    for name in ("ring_16", "ring_32"):
        write_monitor(tmp_path / "plain" / name, steady(1.0))
    assert [(curve.label, curve.runs) for curve in learning_curves([tmp_path / "ours"])] == [("a", 2), ("c", 1)]
    zoos = [(curve.label, curve.runs) for curve in learning_curves([tmp_path / "memory_ppo"])]
    assert zoos == [("Toy-v0", 2), ("Toy-v0_3", 1), ("Toy-v0_4", 1)]
    assert [(curve.label, curve.runs) for curve in learning_curves([tmp_path / "plain"])] == [("ring_16", 1), ("ring_32", 1)]


def test_configs_of_earlier_versions_are_the_same_configuration(tmp_path: Path) -> None:
    texts = {
        "a": "env: Toy-v0\nhorizon: 64\nmemory: {type: kv, num_slots: 3}\nseed: 0\ncheckpoint_interval: 7\n",
        "b": "env: Toy-v0\nn_steps: 64\nmemory: kv\nmemory_kwargs: {num_slots: 3}\namp: false\nseed: 1\nsave_freq: 9\n",
        "c": "env: Toy-v0\nn_steps: 32\nmemory: kv\nmemory_kwargs: {num_slots: 3}\n",
    }
    for name, text in texts.items():
        write_monitor(tmp_path / name, steady(1.0))
        (tmp_path / name / "config.yaml").write_text(text)
    assert [(curve.label, curve.runs) for curve in learning_curves([tmp_path])] == [("a", 2), ("c", 1)]


def test_labels_tell_curves_apart(tmp_path: Path) -> None:
    for parent in ("gru", "mamba"):
        write_monitor(tmp_path / parent / "run", steady(1.0))
    folders = [tmp_path / "gru" / "run", tmp_path / "mamba" / "run"]
    assert [curve.label for curve in learning_curves(folders)] == ["gru/run", "mamba/run"]
    assert [curve.label for curve in learning_curves(folders, labels=["A", "B"])] == ["A", "B"]
    assert find_runs([*folders, *folders]) == folders, "each once"


def test_other_axes(tmp_path: Path) -> None:
    write_monitor(tmp_path, [(1, 10, 3600.0), (2, 30, 7200.0)])
    assert learning_curves([tmp_path], x_axis="time")[0].x.tolist() == [1, 2]
    assert learning_curves([tmp_path], x_axis="episodes")[0].x.tolist() == [1, 2]
    assert learning_curves([tmp_path], y_axis="length")[0].mean.tolist() == [10, 30]
    assert learning_curves([tmp_path], max_steps=39)[0].x.tolist() == [10]


def test_success(tmp_path: Path) -> None:
    text = '#{"t_start": 0.0, "env_id": "Toy-v0"}\nr,l,t,is_success\n1,10,1,True\n0,10,2,False\n'
    (tmp_path / "monitor.csv").write_text(text)
    assert learning_curves([tmp_path], y_axis="success")[0].mean.tolist() == [1, 0]


@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(1, 1000), min_size=1, max_size=60), window=st.integers(1, 200), seed=st.integers(0, 99))
def test_any_run_has_a_curve_within_its_returns(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], window: int, seed: int
) -> None:
    returns = np.random.default_rng(seed).normal(size=len(lengths)).tolist()
    rows = [(value, length, index + 1.0) for index, (value, length) in enumerate(zip(returns, lengths, strict=True))]
    (curve,) = learning_curves([write_monitor(tmp_path_factory.mktemp("run"), rows)], window=window)
    assert len(curve.x) == len(curve.mean) == len(lengths) - min(window, len(lengths)) + 1
    assert curve.x[-1] == sum(lengths)
    for values in (curve.low, curve.mean, curve.high):
        assert (values >= min(returns) - 1e-9).all()
        assert (values <= max(returns) + 1e-9).all()
    assert (curve.low <= curve.high).all()


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_the_picture(tmp_path: Path, suffix: str) -> None:
    output = tmp_path / "pictures" / f"curve{suffix}"
    plot_learning_curves([write_monitor(tmp_path / "run", steady(1.0))], output)
    assert output.stat().st_size > 5_000
    if suffix == ".png":
        with Image.open(output) as picture:
            picture.load()
            assert picture.size == (960, 576)
            assert len(picture.convert("RGB").getcolors(1 << 20) or []) > 20, "not an empty page"


def test_contents_of_the_figure(tmp_path: Path) -> None:
    for seed in range(2):
        write_monitor(tmp_path / f"run_seed{seed}", [(seed + index, 10, index) for index in range(9)])
    curves = learning_curves([tmp_path], window=1)
    (axes,) = learning_figure(curves, title="Toy").axes
    (line,) = axes.lines
    assert np.asarray(line.get_xdata()).tolist() == curves[0].x.tolist()
    assert np.asarray(line.get_ydata()).tolist() == curves[0].mean.tolist()
    band = axes.collections[0].get_paths()[0].vertices
    assert isinstance(band, np.ndarray)
    assert (band[:, 1].min(), band[:, 1].max()) == (curves[0].low.min(), curves[0].high.max())
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("environment steps", "return of an episode")
    legend = axes.get_legend()
    assert legend is not None
    assert legend.get_texts()[0].get_text() == "run\nmean of 2 runs, band: 95% bootstrap interval"


def test_bad_input(tmp_path: Path) -> None:
    run = write_monitor(tmp_path / "run", steady(1.0, 3))
    output = tmp_path / "curve.png"

    def refused(runs: list[Path], match: str, **options: object) -> None:
        with pytest.raises(ValueError, match=match):
            plot_learning_curves(runs, **({"output": output} | options))  # type: ignore[arg-type]  # wrong on purpose

    refused([], "No run to plot")
    refused([tmp_path / "nowhere"], "nowhere does not exist")
    refused([run / "0.monitor.csv"], "is a file; give the folder of a run")
    (tmp_path / "empty").mkdir()
    refused([tmp_path / "empty"], "not the folder of a run: no .*monitor.csv")
    refused([write_monitor(tmp_path / "young", [])], "No episode of .*young has finished yet")
    refused([run], r"ends in \.png, \.pdf, \.svg, got .*curve\.jpg", output=tmp_path / "curve.jpg")
    (tmp_path / "folder.png").mkdir()
    refused([run], "folder.png is a folder; give a file in it", output=tmp_path / "folder.png")
    refused([run], "Unknown x axis 'step'. Did you mean 'steps'", x_axis="step")
    refused([run], "Unknown column of .*run 'returns'. Did you mean 'return'", y_axis="returns")
    refused([run], "Unknown column of .*run 'success'", y_axis="success")
    refused([run], "`window` must be a whole number of at least 1, got 0", window=0)
    refused([run], "No episode of .*run has finished within 5 steps", max_steps=5)
    refused([run], "There are 2 labels for 1 curves", labels=["a", "b"])
    assert not output.exists()


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "sb3-cyborg\[train\]"'):
        plot_learning_curves([write_monitor(tmp_path / "run", steady(1.0))], tmp_path / "curve.png")


START = '#{"t_start": 0}\n'


@pytest.mark.parametrize("text", ["", "r,l,t\n1,2,3\n", "#{}\nr,l,t\n", "\xff\n", f"{START}reward\n", START])
def test_a_file_that_is_not_monitors(tmp_path: Path, text: str) -> None:
    (tmp_path / "monitor.csv").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"monitor\.csv is not a file that SB3's Monitor wrote"):
        read_episodes(tmp_path)


@pytest.mark.parametrize(
    "line", ["1,2", "1,2,3,4", "1,two,3", "", pytest.param("1,2," + 200_000 * "3", id="too long for csv")]
)
def test_a_damaged_line(tmp_path: Path, line: str) -> None:
    (tmp_path / "monitor.csv").write_text(f'#{{"t_start": 0}}\nr,l,t\n1,2,3\n{line}\n1,2,3\n')
    with pytest.raises(ValueError, match=r"monitor\.csv, line 4, does not fit its columns r, l, t"):
        read_episodes(tmp_path)


def test_runs_that_share_nothing(tmp_path: Path) -> None:
    write_monitor(tmp_path / "run_seed0", steady(1.0, 2, length=1))
    write_monitor(tmp_path / "run_seed1", steady(1.0, 2, length=100))
    with pytest.raises(ValueError, match="have no environment steps in common: draw each by itself"):
        learning_curves([tmp_path])
