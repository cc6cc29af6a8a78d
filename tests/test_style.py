"""The rules of style and of structure that a machine can check, over the package, the benchmarks and the examples."""

import ast
import graphlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = [path for folder in ("sb3_cyborg", "benchmarks", "examples") for path in sorted((ROOT / folder).rglob("*.py"))]
PACKAGE = "sb3_cyborg"

LAYERS = (
    {"checks", "files", "packages", "runtime"},
    {"sequence_model"},
    {"kernels"},
    {"ops", "registry", "testing"},
    {"memories"},
    {"encoders"},
    {"memory_ppo"},
    {"maskable", "export"},
    {"trainers"},
    {"viewers"},
    {"info", "seeds", "zoo"},
    {"hub"},
    {"cli"},
    {"__main__"},
)
"""The parts of the package, from the lowest layer to the highest. A part imports itself and what is in lower layers."""
ENVS = "envs"
"""A part outside the layers: it imports only ``checks``, and only ``trainers`` and higher layers import it."""
MASK_NAMES = {"mask", "masks", "keep"}

RIDDLES = re.compile(
    r"the very states?|one door|way through the house|worlds? to remember|\bhonest\b|needs no memory takes"
    r"|\b(equally|as) loud\b|half the usual|what is smaller|learns soon what|what followed what|\bwhoever\b"
    r"|leaves them out|blow(n|s)? up|breaks off nothing|than it is used in|measures as lines|\bfor want of\b|under one roof",
    re.IGNORECASE,
)
"""Phrases that readers had to guess the meaning of. Write the term of the field instead."""
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
MAX_README_LINES = 150
MAX_PROSE_WIDTH = 150
"""Characters of a line of prose in a page. Tables, code and lines with links may be wider."""

Problems = Iterator[tuple[int, str]]
"""Line numbers with messages."""


def docstrings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """:return: Line and text of each string that stands alone: docstrings of modules, classes, functions and attributes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.lineno, node.value.value.strip()


def find_riddles(tree: ast.Module) -> Problems:
    """:return: Docstrings that begin with "What", "Whoever" or "How", and docstrings with a phrase of :data:`RIDDLES`."""
    for line, text in docstrings(tree):
        if first := re.match(r"(What|Whoever|How)\b", text):
            yield line, f"a docstring begins with {first[0]!r} instead of the term or a verb: {text.splitlines()[0]}"
        elif riddle := RIDDLES.search(" ".join(text.split())):
            yield line, f"a docstring has a phrase that is not plain English: {riddle[0]!r}"


def definitions(node: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]:
    """:return: The public functions, methods and classes that are defined in a module or class, at any depth of classes."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            if not child.name.startswith("_"):
                yield child
                if isinstance(child, ast.ClassDef):
                    yield from definitions(child)
        elif isinstance(child, (ast.If, ast.Try)):
            yield from definitions(child)


def parameter_names(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> set[str] | None:
    """
    :param node: A function, or a class, whose parameters are those of its ``__init__`` or the fields of a dataclass.
    :return: The names of the parameters; ``None`` for a class that inherits its ``__init__``.
    """
    if isinstance(node, ast.ClassDef):
        for child in node.body:
            if isinstance(child, ast.FunctionDef) and child.name == "__init__":
                return parameter_names(child)
        if not any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
            return None
        fields = [child.target for child in node.body if isinstance(child, ast.AnnAssign)]
        return {field.id for field in fields if isinstance(field, ast.Name)}
    arguments = node.args
    found = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
    return {argument.arg for argument in found if argument is not None} - {"self", "cls"}


def find_undescribed_parameters(tree: ast.Module) -> Problems:
    """:return: Public docstrings with ``:param`` for some of the parameters only, or for names that are no parameters."""
    for node in definitions(tree):
        described = set(re.findall(r":param (\w+):", ast.get_docstring(node) or ""))
        names = parameter_names(node)
        if described and names is not None:
            if missing := {name for name in names - described if not name.startswith("_")}:
                yield node.lineno, f"`{node.name}` has no :param for {', '.join(sorted(missing))}"
            if unknown := described - names:
                yield node.lineno, f"`{node.name}` has a :param for {', '.join(sorted(unknown))}, no parameter of it"


def names_in(node: ast.AST) -> Iterator[object]:
    """:return: The variables, attributes and constants in an expression."""
    for child in ast.walk(node):
        if isinstance(child, ast.Name):
            yield child.id
        elif isinstance(child, ast.Attribute):
            yield child.attr
        elif isinstance(child, ast.Constant):
            yield child.value


def find_float_masks(tree: ast.Module) -> Problems:
    """:return: Comparisons of masks with 0.5: masks are bool."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            is_with_half = any(isinstance(side, ast.Constant) and side.value == 0.5 for side in sides)
            if is_with_half and any(name in MASK_NAMES for side in sides for name in names_in(side)):
                yield node.lineno, f"a mask is compared with 0.5: {ast.unparse(node)}"


def imports(node: ast.AST) -> Iterator[tuple[int, str]]:
    """:return: Line and name of each module that is imported, lazy imports included, those for types alone left out."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from ((child.lineno, alias.name) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"line {child.lineno}: imports name the package"
            for alias in child.names:
                yield child.lineno, f"{child.module}.{alias.name}"
        elif isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            yield from imports(ast.Module(child.orelse, type_ignores=[]))
        else:
            yield from imports(child)


def may_import(part: str, other: str) -> bool:
    """:return: Whether a part of the package may import another part."""
    if part == other:
        return True
    level = {name: index for index, layer in enumerate(LAYERS) for name in layer}
    if part == ENVS:
        return other == "checks"
    if other == ENVS:
        return level[part] >= level["trainers"]
    return level.get(other, len(LAYERS)) < level[part]


def find_upward_imports(tree: ast.Module, part: str) -> Problems:
    """:return: Imports of parts of the package that are not below ``part``."""
    for line, name in imports(tree):
        package, _, rest = name.partition(".")
        other = rest.partition(".")[0]
        if package == PACKAGE and other != "__version__" and not may_import(part, other):
            yield line, f"`{part}` imports `{name}`, which is not below it"


def collect(find: Callable[[ast.Module], Problems]) -> list[str]:
    """:return: The problems of all files."""
    return [
        f"{path.relative_to(ROOT)}:{line}: {message}" for path in FILES for line, message in find(ast.parse(path.read_text()))
    ]


RULES = [find_riddles, find_undescribed_parameters, find_float_masks]


@pytest.mark.parametrize("find", RULES)
def test_rule(find: Callable[[ast.Module], Problems]) -> None:
    problems = collect(find)
    assert not problems, "\n" + "\n".join(problems)


BAD = [
    (find_riddles, '"""What the module is for."""'),
    (find_riddles, 'class A:\n    def f(self) -> None:\n        """\n        What it does.\n        """'),
    (find_riddles, 'SIZE = 1\n"""What is large."""'),
    (find_riddles, '"""How it works."""'),
    (find_riddles, 'def f() -> None:\n    """How the caller waits."""'),
    (find_riddles, '"""One door to many environments."""'),
    (find_riddles, '"""Trained from the very\nstates of the rollout."""'),
    (find_undescribed_parameters, 'def f(a, *, b):\n    """:param a: One."""'),
    (find_undescribed_parameters, 'def f(a):\n    """:param a: One. :param b: Gone."""'),
    (find_undescribed_parameters, 'class A:\n    """:param a: One."""\n    def __init__(self, a, **options): ...'),
    (find_undescribed_parameters, '@dataclass(frozen=True)\nclass A:\n    """:param a: One."""\n    a: int\n    b: int'),
    (find_float_masks, "x = masks[:, 0] > 0.5"),
    (find_float_masks, "x = 0.5 >= self.mask.float()"),
    (find_float_masks, 'x = batch["masks"] > 0.5'),
]


@pytest.mark.parametrize(("find", "source"), BAD)
def test_rule_finds_what_it_forbids(find: Callable[[ast.Module], Problems], source: str) -> None:
    assert len(list(find(ast.parse(source)))) == 1


GOOD = [
    '"""Whatever it is."""\ndef f(a, b): ...\ndef _f(a, b):\n    """:param a: One."""',
    'class A(B):\n    """:param a: Of B."""\n    b: int',
    'def f(self, a, *args, **options):\n    """:param a: One.\n    :param args: More.\n    :param options: Named."""',
    "x = gate > 0.5\ny = masks == 1\nz = mask[0.5 > gate]",
]


@pytest.mark.parametrize("source", GOOD)
def test_rules_find_nothing_else(source: str) -> None:
    assert [problem for find in RULES for problem in find(ast.parse(source))] == []


def find_unplain_text(text: str) -> Problems:
    """
    :param text: A page in Markdown.
    :return: Phrases of :data:`RIDDLES`, headings that begin with "What", "Whoever" or "How", and too long lines of prose.
    """
    for riddle in RIDDLES.finditer(text):
        yield text.count("\n", 0, riddle.start()) + 1, f"a phrase that is not plain English: {riddle[0]!r}"
    is_code = False
    for number, line in enumerate(text.splitlines(), start=1):
        is_code ^= line.startswith("```")
        if not is_code and re.match(r"#+ (What|Whoever|How)\b", line):
            yield number, f"a heading that needs the text below it: {line}"
        if not is_code and not line.startswith(("|", "```")) and "](" not in line and len(line) > MAX_PROSE_WIDTH:
            yield number, f"a line of {len(line)} characters, at most {MAX_PROSE_WIDTH}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_are_in_plain_english(page: Path) -> None:
    problems = [f"{page.name}:{line}: {message}" for line, message in find_unplain_text(page.read_text())]
    assert not problems, "\n" + "\n".join(problems)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("# Speed\n\nIt is fast.", 0),
        ("# What is honest about it", 2),
        ("## How a change is measured", 1),
        ("Worlds to remember in", 1),
        ("x" * 151, 1),
        ("| " + "x" * 200 + " |", 0),
        ("```python\n# What is this?\n" + "x" * 200 + "\n```", 0),
    ],
)
def test_text_that_is_not_plain_is_found(text: str, count: int) -> None:
    assert len(list(find_unplain_text(text))) == count


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= MAX_README_LINES


def package_files() -> Iterator[tuple[Path, str]]:
    """:return: The files of the package that are in a part, each with its part; the package's ``__init__`` imports all."""
    for path in FILES:
        folder, *rest = path.relative_to(ROOT).parts
        if folder == PACKAGE and rest != ["__init__.py"]:
            yield path, rest[0].removesuffix(".py")


def test_every_part_has_a_layer() -> None:
    parts = {part for _, part in package_files()}
    assert parts <= set().union(*LAYERS) | {ENVS}, "add the new part to LAYERS"


def test_imports_point_downward() -> None:
    problems = [
        f"{path.relative_to(ROOT)}:{line}: {message}"
        for path, part in package_files()
        for line, message in find_upward_imports(ast.parse(path.read_text()), part)
    ]
    assert not problems, "\n" + "\n".join(problems)


def test_modules_import_each_other_in_no_circle() -> None:
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path, _ in package_files()}
    graph: dict[str, set[str]] = {}
    for name, path in modules.items():
        imported = {found for _, found in imports(ast.parse(path.read_text()))}
        graph[name] = {known for found in imported for known in (found, found.rpartition(".")[0]) if known in modules}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


@pytest.mark.parametrize(
    ("part", "source", "count"),
    [
        ("ops", "from sb3_cyborg.memories.kv import KV", 1),
        ("ops", "from sb3_cyborg.sequence_model import State\nimport torch", 0),
        ("encoders", "from sb3_cyborg.memories.kv import KV", 0),
        ("memories", "from sb3_cyborg.encoders.gru import GRU", 1),
        ("memory_ppo", "def f():\n    import sb3_cyborg.trainers.config", 1),
        ("memory_ppo", "if TYPE_CHECKING:\n    import sb3_cyborg.trainers.config\nelse:\n    import sb3_cyborg.cli", 1),
        ("memory_ppo", "from sb3_cyborg.envs import make_memory_vec_env", 1),
        ("trainers", "from sb3_cyborg.envs import make_memory_vec_env\nfrom sb3_cyborg import __version__", 0),
        ("envs", "from sb3_cyborg.sequence_model import State", 1),
        ("envs", "from sb3_cyborg.checks import check_whole", 0),
        ("viewers", "from sb3_cyborg import MemoryPPO", 1),
    ],
)
def test_upward_imports_are_found(part: str, source: str, count: int) -> None:
    assert len(list(find_upward_imports(ast.parse(source), part))) == count
