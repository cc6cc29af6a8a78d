"""The pictures of README and documentation: each is drawn by ``make pictures``, from data that is read correctly."""

import re
from pathlib import Path

import pytest

pytest.importorskip("rl_zoo3")

from matplotlib.colors import to_hex

from benchmarks import pictures, trained_pictures
from benchmarks.growth import growth_figure
from benchmarks.learning import RESULTS
from benchmarks.learning_tasks import DEFAULT

ROOT = Path(__file__).resolve().parent.parent
REPORT = """A processor

**us a step of 8 rows, by steps T**

| T | 64 | 128 |
| --- | ---: | ---: |
| gru/none | 112 | 89 |
| gru/ring | 202 | 172 |

**us a step of 8 rows, by slots S**

| S | 16 | 64 |
| --- | ---: | ---: |
| gru/ring | 166 | 184 |
"""


def test_the_report_of_growth_is_read(tmp_path: Path) -> None:
    path = tmp_path / "growth.md"
    path.write_text(REPORT)
    tables = pictures.read_growth(path)
    assert list(tables) == ["T", "S"]
    title, sizes, times = tables["T"]
    assert title == "us a step of 8 rows, by steps T"
    assert list(sizes) == [64, 128]
    assert times == {"gru/none": [112.0, 89.0], "gru/ring": [202.0, 172.0]}
    path.write_text("A processor\n")
    with pytest.raises(ValueError, match=r"no table in .*run `python -m benchmarks.growth` first"):
        pictures.read_growth(path)


def test_an_agent_has_one_colour_in_all_panels(tmp_path: Path) -> None:
    path = tmp_path / "growth.md"
    path.write_text(REPORT)
    figure = growth_figure(pictures.read_growth(path))
    colours: dict[str, set[str]] = {}
    for axes in figure.axes:
        for line in axes.lines:
            colours.setdefault(str(line.get_label()), set()).add(to_hex(line.get_color()))
    assert {agent: len(found) for agent, found in colours.items()} == {"gru/none": 1, "gru/ring": 1}
    assert colours["gru/none"] != colours["gru/ring"]


def test_steadiness_counts_from_the_first_success() -> None:
    """RepeatPreviousEasy is solved at 0.97: one seed loses it once, one keeps it, one never has it."""
    returns = {"0": [0.0, 1.0, 0.5, 1.0, 1.0], "1": [0.0, 0.0, 0.0, 0.0, 1.0], "2": [0.0, 0.9, 0.9, 0.9, 0.9]}
    rows = [
        {"seed": seed, "steps": str(step), "return": str(value)}
        for seed, values in returns.items()
        for step, value in enumerate(values)
    ]
    assert pictures.steadiness({("RepeatPreviousEasy", DEFAULT): rows}, "RepeatPreviousEasy") == [0.75, 1.0]


def test_pictures_are_drawn_from_the_measurements(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = tmp_path / "results"
    results.mkdir()
    for name in ("learning_runs.csv", "learning_curves.csv", pictures.SPEED_TABLE, "growth.md"):
        (results / name).symlink_to(RESULTS / name)
    monkeypatch.setattr(pictures, "RESULTS", results)
    pictures.main(["--out", str(tmp_path)])
    for path in [*tmp_path.glob("*.png"), results / "growth.png"]:
        assert path.stat().st_size > 10_000, path
    assert {path.name for path in tmp_path.glob("*.png")} == {"memory.png", "learning.png", "speed.png", "steadiness.png"}


def test_every_picture_of_the_documentation_is_drawn_by_one_command() -> None:
    """Each file of ``docs/images`` is named in a module that ``make pictures`` runs."""
    rule = re.search(r"^pictures:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert rule
    scripts = [ROOT / "docs" / "figures" / "burn_in.py", Path(pictures.__file__), Path(trained_pictures.__file__)]
    for script in scripts:
        assert script.stem in rule[1]
    text = "".join(script.read_text() for script in scripts)
    for image in (ROOT / "docs" / "images").iterdir():
        assert f'"{image.name}"' in text, f"{image.name} is drawn by no script of `make pictures`"
