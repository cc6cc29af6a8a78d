"""Sphinx: ``sphinx-build -W --keep-going -b html docs docs/_build/html``. Nothing is looked up online."""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sb3_cyborg

project = "sb3_cyborg"
author = "the sb3_cyborg authors"
release = version = sb3_cyborg.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"{project} {release}"

myst_heading_anchors = 4  # so that links like page.md#a-heading work, as on GitHub
default_role = "code"  # single backticks in docstrings
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_typehints_format = "short"


def describe_settings(_: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Add the fields of a pydantic model, whose meanings are descriptions and not in its docstring."""
    if what == "class" and hasattr(obj, "model_fields"):
        for key, field in obj.model_fields.items():
            default = "Required." if field.is_required() else f"Default: ``{field.default!r}``."
            lines.append(f":param {key}: {field.description} {default}")
        lines.append("")


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", describe_settings)
