"""The built documentation in headless Chromium, 1300 and 400 pixels wide: nothing is cut off, and no page scrolls sideways."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_browser import chromium, served  # noqa: F401  chromium is a fixture

ROOT = Path(__file__).resolve().parent.parent
NOT_CONTENT = {"genindex", "py-modindex", "search"}
WIDE = """<!doctype html><meta name="viewport" content="width=device-width"><article>
<p style="width: {width}px; background: silver">A paragraph that is wider than the window.</p></article>"""
HIDDEN = """<!doctype html><article style="width: 300px"><div style="overflow: hidden; width: 200px">
<p style="width: 600px">The end of this line is hidden.</p></div></article>"""
SCROLLED = """<!doctype html><article style="width: 300px"><div style="overflow-x: auto">
<p style="width: 2000px">The box around it scrolls.</p></div></article>"""


def find_problems(executable: str, folder: Path, names: list[str], pictures: Path) -> dict[str, list[str]]:
    """
    Opens pages in both widths.

    :param executable: Path of Chromium.
    :param folder: Folder of the pages.
    :param names: Files in it.
    :param pictures: Folder for pictures of the landing page, the results and the encoders.
    :return: What is cut off, by page and width.
    """
    with served(folder) as address:
        script = ROOT / "tests" / "browser" / "layout.mjs"
        addresses = [f"{address}/{name}" for name in names]
        command = ["node", str(script), executable, str(pictures), "index,results,encoders,choosing", *addresses]
        result = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stderr
    problems: dict[str, list[str]] = json.loads(result.stdout)
    return problems


@pytest.mark.slow
def test_no_page_is_cut_off(chromium: str, tmp_path: Path) -> None:  # noqa: F811
    pytest.importorskip("sphinx_design")
    html = tmp_path / "html"
    command = [sys.executable, "-m", "sphinx", "-q", "-b", "html", str(ROOT / "docs"), str(html)]
    subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True, capture_output=True, timeout=250)
    names = sorted(path.name for path in html.glob("*.html") if path.stem not in NOT_CONTENT)
    assert len(names) >= len(list((ROOT / "docs").glob("*.md")))
    problems = find_problems(chromium, html, names, tmp_path)
    assert not problems, json.dumps(problems, indent=1)
    assert (tmp_path / "index_400.png").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.parametrize(
    ("page", "expected"), [(WIDE.format(width=1500), 2), (WIDE.format(width=600), 1), (HIDDEN, 2), (SCROLLED, 0)]
)
def test_cut_off_content_is_found(chromium: str, tmp_path: Path, page: str, expected: int) -> None:  # noqa: F811
    (tmp_path / "page.html").write_text(page)
    assert len(find_problems(chromium, tmp_path, ["page.html"], tmp_path)) == expected
