"""Every notebook runs from its first cell to its last, on a run of a few steps."""

from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
WHOLE = 'parse_config("digits", [])'
SMALL = (
    'parse_config("digits", ["--config.total_steps=20", "--config.optim.warmup_epochs=0", '
    '"--config.log_objective_every_steps=0"])'
)


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, tmp_path):
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("matplotlib")
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert all(not cell.get("outputs") for cell in notebook.cells), "commit it without outputs"
    replaced = 0
    for cell in notebook.cells:
        replaced += cell.source.count(WHOLE)
        cell.source = cell.source.replace(WHOLE, SMALL)
    assert replaced == 1
    client = nbclient.NotebookClient(
        notebook, timeout=240, resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert not [output for output in outputs if output.output_type == "error"]
    pictures = [output for output in outputs if "image/svg+xml" in output.get("data", {})]
    assert len(pictures) == 5  # as many as it shows
