"""Sphinx's settings: ``sphinx-build -W --keep-going -b html docs docs/_build/html``. The build needs no network."""

import sys
from inspect import get_annotations
from pathlib import Path
from typing import Any, get_type_hints

from sphinx.util.typing import stringify_annotation

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sb3_cyborg

project = "sb3_cyborg"
author = "the sb3_cyborg authors"
release = version = sb3_cyborg.__version__

extensions = ["myst_parser", "sphinx_design", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_title = f"{project} {release}"

myst_enable_extensions = ["colon_fence"]  # for the cards of the landing page
myst_heading_anchors = 4  # so that links like page.md#a-heading work, as on GitHub
default_role = "code"  # single backticks in docstrings
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_typehints_format = "short"


def describe_parameters(_: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Adds the fields of pydantic models, from their descriptions, and types of arguments that differ from attributes."""
    if what != "class":
        return
    if hasattr(obj, "model_fields"):
        types = get_type_hints(obj)  # without validators
        for key, field in obj.model_fields.items():
            default = "Required." if field.is_required() else f"Default: ``{field.default!r}``."
            lines.append(f":param {key}: {field.description} {default}")
            lines.append(f":type {key}: {stringify_annotation(types[key], 'smart')}")
    else:  # autodoc would show the type of an attribute for an argument with the same name
        attributes, arguments = get_annotations(obj), get_annotations(obj.__init__)
        for key in attributes.keys() & arguments.keys():
            if attributes[key] != arguments[key]:
                lines.append(f":type {key}: {stringify_annotation(arguments[key], 'smart')}")
    lines.append("")


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", describe_parameters)
