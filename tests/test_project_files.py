"""The files around the project: citation, forms of issues, the workflow of GitHub."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import sb3_cyborg

ROOT = Path(__file__).resolve().parent.parent
GITHUB = ROOT / ".github"
FORMS = sorted(path for path in (GITHUB / "ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml")
FILES = [ROOT / "CITATION.cff", *sorted(path for path in GITHUB.rglob("*") if path.is_file())]


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return content


def test_the_citation_is_that_of_this_version() -> None:
    citation = read(ROOT / "CITATION.cff")
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors", "version", "license"} <= citation.keys()
    assert citation["version"] == sb3_cyborg.__version__
    assert citation["authors"] == [{"name": "the sb3_cyborg authors"}]


def test_no_file_names_a_page_that_does_not_exist() -> None:
    """Nothing is published yet, so the only address is that of PyTorch's packages."""
    found = {url for path in FILES for url in re.findall(r"https?://[^\s\"')]+", path.read_text(encoding="utf-8"))}
    assert found == {"https://download.pytorch.org/whl/cpu"}


@pytest.mark.parametrize("path", FORMS, ids=[path.name for path in FORMS])
def test_a_form_is_complete(path: Path) -> None:
    form = read(path)
    assert {"name", "description", "body"} <= form.keys()
    identifiers = [field["id"] for field in form["body"]]
    assert len(set(identifiers)) == len(identifiers)
    for field in form["body"]:
        assert field["type"] in ("textarea", "input", "dropdown", "checkboxes", "markdown")
        assert field["attributes"]["label"]


def test_a_bug_report_asks_for_the_installation() -> None:
    fields = {field["id"]: field for field in read(GITHUB / "ISSUE_TEMPLATE" / "bug_report.yml")["body"]}
    assert "`sb3-cyborg info`" in fields["info"]["attributes"]["label"]
    assert fields["info"]["validations"]["required"] is True


def test_the_workflow_runs_the_targets_on_each_python() -> None:
    job = read(GITHUB / "workflows" / "ci.yml")["jobs"]["checks"]
    named = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert job["strategy"]["matrix"]["python-version"] == named
    commands = [step["run"] for step in job["steps"] if "run" in step]
    assert commands == [f"make {name}" for name in ("venv", "lint", "type", "docs", "test-slow-short", "test")]
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert {command.removeprefix("make ") for command in commands} <= set(targets)
    for step in job["steps"]:
        assert ("run" in step) != ("uses" in step)
