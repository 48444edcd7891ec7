"""Notebooks run from top to bottom."""

from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
LONG = ("07_", "08_")
"""Notebooks that train models for about half a minute of a core each, and so are slow tests."""


@pytest.mark.filterwarnings("default")  # the kernel's own libraries warn; the notebook's code runs elsewhere
@pytest.mark.parametrize("path", [
    pytest.param(path, id=path.stem, marks=[pytest.mark.slow] if path.stem.startswith(LONG) else [])
    for path in NOTEBOOKS
])  # fmt: skip
def test_notebook_runs(path):
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute()


def test_there_are_notebooks():
    assert NOTEBOOKS
