"""The notebooks of the docs run from start to end."""

import os
from ast import literal_eval
from pathlib import Path

import pytest

nbclient = pytest.importorskip("nbclient", reason="needs the package nbclient")
nbformat = pytest.importorskip("nbformat", reason="needs the package nbformat")
pytest.importorskip("ipykernel", reason="needs the package ipykernel")

NOTEBOOKS = sorted((Path(__file__).parents[1] / "docs" / "notebooks").glob("*.ipynb"))


def outputs(notebook, name):
    """The notebook's outputs of a kind, as text."""
    parts = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return [part["data"][name] for part in parts if name in part.get("data", {})]


@pytest.fixture
def execute(tmp_path, monkeypatch):
    def run(name):
        if name == "adapt_a_vit":
            pytest.importorskip("peft")
        (path,) = (path for path in NOTEBOOKS if path.stem == name)
        # The kernel finds the packages as this process does, and works in a folder of its own.
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(path.parents[2]), os.environ.get("PYTHONPATH", "")]))
        notebook = nbformat.read(path, as_version=4)
        nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
        return notebook

    return run


@pytest.mark.slow
def test_adapting_a_vit_compares_it_with_peft_and_merges_it(execute, tmp_path):
    notebook = execute("adapt_a_vit")
    table, merged = outputs(notebook, "text/plain")[-2:]
    assert "LoRA-FA (vitlorafa)" in table and "LoRA-FA (PEFT)" in table
    name, difference = literal_eval(merged)
    assert name == "VisionTransformer" and difference < 1e-3
    assert (tmp_path / "digits_adapter").is_dir()


@pytest.mark.slow
def test_reading_a_sweep_draws_its_figure(execute, tmp_path):
    notebook = execute("read_a_sweep")
    assert len(list((tmp_path / "runs" / "notebook").glob("*/results.jsonl"))) == 24
    assert len(outputs(notebook, "image/png")) == 1
    assert "LoRA-FA" in outputs(notebook, "text/plain")[1]


def test_notebooks_are_stored_without_outputs():
    assert NOTEBOOKS
    for path in NOTEBOOKS:
        cells = nbformat.read(path, as_version=4).cells
        assert not [cell for cell in cells if cell.get("outputs") or cell.get("execution_count")], path.name
