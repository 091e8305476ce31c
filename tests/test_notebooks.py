"""Every notebook runs from its first cell to its last, on runs of a few steps of a small model."""

import pytest
from command import ROOT, TINY, environment

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# Before the first cell: whatever recipe the notebook asks for, and so many images as it measures.
FLAGS = [*TINY, "--config.total_steps=4"]
SMALL = f"""
from crate_jax.cli import flags, looking

flags.parse_config = lambda recipe, given, whole=flags.parse_config: whole(
    recipe, [*given, *{FLAGS}]
)
looking.open_specimen = lambda workdir, examples, whole=looking.open_specimen: whole(
    workdir, examples=8
)
"""
# How many pictures a notebook shows, and of which kind.
PICTURES = {
    "fine_tune": (0, ""),
    "quick_start": (1, "image/png"),
    "white_box": (5, "image/svg+xml"),
}


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request):
    nbformat = pytest.importorskip("nbformat")
    return request.param.stem, nbformat.read(request.param, as_version=4)


def test_there_are_notebooks():
    assert [path.stem for path in NOTEBOOKS] == sorted(PICTURES)


def test_a_notebook_is_clean_and_installs_first(notebook):
    import nbformat

    _, notebook = notebook
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs for cell in cells), "commit it without outputs"
    assert "%pip install" in cells[0].source and "crate_jax" in cells[0].source
    assert not [cell for cell in cells[1:] if "pip" in cell.source]


@pytest.mark.slow
def test_a_notebook_runs(notebook, tmp_path):
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("matplotlib")
    name, notebook = notebook
    notebook.cells.insert(0, nbformat.v4.new_code_cell(SMALL))
    client = nbclient.NotebookClient(
        notebook, timeout=240, resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute(env=environment())
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert not [output for output in outputs if output.output_type == "error"]
    count, kind = PICTURES[name]
    assert sum(kind in output.get("data", {}) for output in outputs) == count
    assert (tmp_path / "runs").is_dir()
