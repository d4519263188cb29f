"""Every notebook runs from top to bottom, and is committed without outputs."""

from __future__ import annotations

from pathlib import Path

import pytest

_FOLDER = Path(__file__).parents[1] / "notebooks"
_NOTEBOOKS = sorted(_FOLDER.glob("*.ipynb"))
# Every line runs in fewer steps as well; whole runs are for the nightly tests.
_FEWER = {
    "methods": {
        "STEPS = 100": "STEPS = 8",
        "LAST, EVERY, REFRESH = 160, 8, 40": "LAST, EVERY, REFRESH = 16, 8, 8",
    },
    "multi_device": {"STEPS, BATCH = 40,": "STEPS, BATCH = 12,"},
    "quickstart": {"STEPS, BATCH = 150,": "STEPS, BATCH = 40,"},
}


@pytest.fixture(params=_NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request):
    nbformat = pytest.importorskip("nbformat", reason="pip install 'kfe-optax[dev]'")
    return nbformat.read(request.param, as_version=4)


def test_a_notebook_is_stripped(notebook):
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)


def shorten(notebook, changes):
    for old, new in changes.items():
        (cell,) = (cell for cell in notebook.cells if cell.cell_type == "code" and old in cell.source)
        cell.source = cell.source.replace(old, new)


@pytest.mark.slow
@pytest.mark.parametrize("steps", ["few", pytest.param("all", marks=pytest.mark.nightly)])
def test_a_notebook_runs(notebook, steps, request):
    if steps == "few":
        shorten(notebook, _FEWER.get(request.node.callspec.params["notebook"].stem, {}))
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
