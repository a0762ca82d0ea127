"""The three notebooks: executed here, and what is committed of them belongs to the shipped weights."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from common.files import PROJECT_DIR
from visualization import load_metrics_json

RUNS = {"Mnsit_v4": "mnist_model_1", "Mnsit_v5": "mnist_model_2", "Mnsit_v6": "mnist_model_3"}


def read(name: str) -> nbformat.NotebookNode:
    return nbformat.read(PROJECT_DIR / "notebooks" / f"{name}.ipynb", as_version=4)


def accuracy_in(notebook: nbformat.NotebookNode) -> float:
    cells = (cell for cell in notebook.cells if cell.cell_type == "code")
    printed = "".join(output.text for cell in cells for output in cell.outputs if output.get("name") == "stdout")
    (accuracy,) = re.findall(r"evaluated here: +([\d.]+) %", printed)
    return float(accuracy)


@pytest.mark.parametrize("name", RUNS)
def test_committed_outputs_are_those_of_one_clean_run(name: str) -> None:
    cells = [cell for cell in read(name).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert {output.output_type for output in outputs} == {"stream", "display_data"}
    assert all(output.name == "stdout" for output in outputs if output.output_type == "stream")


@pytest.mark.parametrize(
    "name", ["Mnsit_v4", *(pytest.param(name, marks=pytest.mark.long) for name in ("Mnsit_v5", "Mnsit_v6"))]
)
def test_notebook_runs_on_the_shipped_network(name: str, shipped_project: Path) -> None:
    """20 s: a kernel of its own, which loads PyTorch, trains on 10,000 images twice and evaluates."""
    committed, executed = read(name), read(name)
    folder = {"metadata": {"path": str(shipped_project / "notebooks")}}
    # raises if a cell does
    NotebookClient(executed, timeout=600, kernel_name="python3", resources=folder).execute()

    # within one image of the 10,000: another processor rounds otherwise
    accuracy = load_metrics_json(RUNS[name], shipped_project)["test_acc"][-1]
    assert accuracy_in(executed) == pytest.approx(accuracy, abs=0.011), "the weights are not those of the metrics"
    assert accuracy_in(committed) == pytest.approx(accuracy, abs=0.011), "stale: execute the notebook and commit it"
