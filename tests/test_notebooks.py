"""The notebooks run, and say what they say; `python tests/test_notebooks.py` runs them and keeps what they print.

What they do, README and examples do in `make test` too.
"""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[1] / "examples").glob("*.ipynb"))


def printed(notebook):
    """What each cell of code prints, numbers aside: they differ between machines."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [re.sub(r"\d[\d.,e-]*", "0", "".join(output.text for output in cell.outputs)) for cell in cells]


def run(path):
    """The notebook with what it prints now; warnings and progress bars are not kept."""
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=600, record_timing=False).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") == "stdout"]
    return notebook


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(path):
    assert printed(run(path)) == printed(nbformat.read(path, as_version=4))


if __name__ == "__main__":
    for path in NOTEBOOKS:
        nbformat.write(run(path), path)
