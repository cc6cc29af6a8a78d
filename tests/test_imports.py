"""The direction of imports: ``memory_ppo`` <- ``trainers`` <- ``viewers`` <- ``cli``, without cycles."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "sb3_cyborg"
LAYERS = ("memory_ppo", "trainers", "viewers", "cli")
"""Parts of the package, each of which may import those before it alone."""


def imported_modules(source: str) -> set[str]:
    """:return: Modules of this package that a source file imports, at its top or in a function, without the first name."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not read here"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name.removeprefix("sb3_cyborg.") for name in found if name.startswith("sb3_cyborg.")}


def imports() -> dict[str, set[str]]:
    """:return: The modules that each module of the package imports, by dotted name."""
    modules = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
    graph = {}
    for module, path in modules.items():
        names = imported_modules(path.read_text(encoding="utf-8"))
        # `from a.b import c` imports the module a.b.c if there is one, and otherwise the module a.b
        graph[module] = {name if name in modules else name.rpartition(".")[0] for name in names} & modules.keys()
    return graph


def wrong_directions(graph: dict[str, set[str]]) -> list[str]:
    """:return: The imports of a later layer in an earlier one."""
    rank = {layer: index for index, layer in enumerate(LAYERS)}
    return [
        f"{module} imports {name}"
        for module, names in graph.items()
        for name in names
        if rank.get(name.partition(".")[0], -1) > rank.get(module.partition(".")[0], len(LAYERS))
    ]


def test_imports_point_one_way() -> None:
    graph = imports()
    assert {module.partition(".")[0] for module in graph} >= set(LAYERS)
    assert wrong_directions(graph) == []


def test_there_are_no_cycles() -> None:
    graph = {module: names for module, names in imports().items() if module.partition(".")[0] in LAYERS}
    TopologicalSorter(graph).prepare()


def test_a_wrong_import_is_found() -> None:
    found = imported_modules("def f():\n    from sb3_cyborg.viewers.inspection import inspect_episode\n")
    assert found == {"viewers.inspection.inspect_episode"}
    graph = imports()
    graph["trainers.callbacks"] |= {"viewers.inspection"}
    assert wrong_directions(graph) == ["trainers.callbacks imports viewers.inspection"]
    graph["viewers.inspection"] |= {"viewers.inspection_figure"}
    with pytest.raises(CycleError):
        TopologicalSorter(graph).prepare()
