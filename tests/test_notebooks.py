"""Every notebook runs from top to bottom, and is committed without outputs."""

from __future__ import annotations

from pathlib import Path

import pytest

_FOLDER = Path(__file__).parents[1] / "notebooks"
_NOTEBOOKS = sorted(_FOLDER.glob("*.ipynb"))


@pytest.fixture(params=_NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request):
    nbformat = pytest.importorskip("nbformat", reason="pip install 'kfe-optax[dev]'")
    return nbformat.read(request.param, as_version=4)


def test_a_notebook_is_stripped(notebook):
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)


@pytest.mark.slow
def test_a_notebook_runs(notebook):
    nbclient = pytest.importorskip("nbclient", reason="pip install 'kfe-optax[dev]'")
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(_FOLDER)}}).execute()
    written = [
        output.text
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if output.output_type == "stream" and output.name == "stderr"
    ]
    assert not written, "the notebook prints warnings"
