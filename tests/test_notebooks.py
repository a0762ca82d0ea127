"""The three notebooks: executed here, and what is committed of them is what they print for the shipped weights."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from file_utils import PROJECT_DIR
from visualization import load_metrics_json

RUNS = {"Mnsit_v4": "mnist_model_1", "Mnsit_v5": "mnist_model_2", "Mnsit_v6": "mnist_model_3"}


def read(name: str) -> nbformat.NotebookNode:
    return nbformat.read(PROJECT_DIR / "notebooks" / f"{name}.ipynb", as_version=4)


def printed(notebook: nbformat.NotebookNode) -> list[str]:
    """What each code cell prints."""
    return [
        "".join(output.text for output in cell.outputs if output.get("name") == "stdout")
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


def accuracy_in(notebook: nbformat.NotebookNode) -> str:
    (accuracy,) = re.findall(r"evaluated here: +([\d.]+) %", "".join(printed(notebook)))
    return str(accuracy)


@pytest.mark.parametrize("name", RUNS)
def test_committed_outputs_are_those_of_one_clean_run(name: str) -> None:
    cells = [cell for cell in read(name).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert {output.output_type for output in outputs} == {"stream", "display_data"}
    assert all(output.name == "stdout" for output in outputs if output.output_type == "stream")


@pytest.mark.parametrize("name", RUNS)
def test_notebook_runs_and_prints_what_is_committed(name: str, mnist: Path) -> None:
    committed, executed = read(name), read(name)
    folder = {"metadata": {"path": str(PROJECT_DIR / "notebooks")}}
    # raises if a cell does
    NotebookClient(executed, timeout=120, kernel_name="python3", resources=folder).execute()

    accuracy = load_metrics_json(RUNS[name])["test_acc"][-1]
    assert accuracy_in(executed) == f"{accuracy:.2f}", "the weights are not those of the run's metrics"
    assert accuracy_in(committed) == accuracy_in(executed), "the notebook is stale: execute it again and commit it"
    assert printed(committed) == printed(executed), "the notebook is stale: execute it again and commit it"
