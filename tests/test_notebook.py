"""The notebook runs from its first cell to its last one, and shows what its text says."""

import os
import re
from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "examples" / "memory_ppo.ipynb"


def read() -> Any:
    """:return: The notebook, checked against its format."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    return notebook


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_the_notebook_is_committed_without_outputs() -> None:
    cells = code_cells(read())
    assert len(cells) >= 8
    for cell in cells:
        assert (cell.outputs, cell.execution_count) == ([], None)
        compile(cell.source, NOTEBOOK.name, "exec")


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    notebook = read()
    client = nbclient.NotebookClient(
        notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    printed = "".join(output.text for output in outputs if output.get("name") == "stdout")
    returns = {name: float(mean) for name, mean in re.findall(r"^(\w+PPO) +return +(-?[\d.]+)", printed, re.MULTILINE)}
    assert returns["MemoryPPO"] > 0.9
    assert returns["RecurrentPPO"] < 0.5, "it has as much time as MemoryPPO, which is too little for it"
    exported = re.search(r"return of the exported agent: (-?[\d.]+)", printed)
    assert exported is not None
    assert float(exported[1]) > 0.9
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    for name in ("curves.png", "memory.png", "memory.html", "agent.onnx"):
        assert (tmp_path / name).stat().st_size > 1_000
