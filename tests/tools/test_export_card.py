"""The weights as safetensors, and the card."""

import json
import shutil

import pytest
from safetensors import safe_open
from safetensors.torch import load_file

from common.files import RunFiles
from common.results import load_tensors
from imports import torch
from tools.export.__main__ import main as export


@pytest.mark.parametrize("name", ["mnist_model_1", "mnist_model_3"])
def test_the_library_s_own_loader_gives_what_the_pth_holds(name, shipped_project, tmp_path, capsys):
    files, here = RunFiles(name, shipped_project), RunFiles(name, tmp_path)
    here.make_folders()
    for path in (files.params, files.metrics, files.metrics.with_name(f"{name}_evaluation.json")):
        shutil.copy(path, here.params.parent)
    assert export(["--name", name, "--format", "safetensors", "--output_dir", str(tmp_path)]) == 0
    path, card = (here.params.with_name(f"{name}{ending}") for ending in (".safetensors", "_card.md"))
    assert capsys.readouterr().out.splitlines() == [str(path), str(card)]
    found, kept = load_file(path), load_tensors(files.params)
    assert found.keys() == kept.keys()
    assert all(found[key].dtype == kept[key].dtype and torch.equal(found[key], kept[key]) for key in kept)
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["classes"]) == list("0123456789")

    text, metrics = card.read_text(), json.loads(files.metrics.read_text())
    evaluation = json.loads(files.metrics.with_name(f"{name}_evaluation.json").read_text())
    low, high = evaluation["accuracy_interval"]
    assert f"**{metrics['test_acc'][-1]:.2f} %** of the test images, 95 % interval {low:.2f} to {high:.2f} %" in text
    assert f"Expected calibration error {evaluation['calibration']['ece']:.2f} %" in text
    assert f"| fog | {evaluation['corruptions']['fog'][0]:.2f} |" in text
    assert f"| `max_lr` | {metrics['config']['max_lr']} |" in text
    assert "Not measured" not in text
    assert "{" not in text


@pytest.mark.parametrize("evaluation", [None, "{", '{"accuracy": 1.0, "calibration": {"ece": 1.0, "loss": 1.0}}'])
def test_what_was_not_measured_is_not_claimed(evaluation, finished_run, capsys):
    """There is no evaluation, a damaged one, or one of other weights."""
    if evaluation is not None:
        finished_run.metrics.with_name("run_evaluation.json").write_text(evaluation)
    assert export(["--name", "run", "--format", "safetensors", "--output_dir", str(finished_run.root)]) == 0
    text = finished_run.metrics.with_name("run_card.md").read_text()
    assert text.count("Not measured.") == 2
    assert "300 training and 100 test images" in text


def test_an_ensemble_s_card_names_its_members(shipped_project, tmp_path):
    shutil.copytree(shipped_project / "outputs", tmp_path / "outputs")
    assert export(["--name", "ensemble", "--format", "safetensors", "--output_dir", str(tmp_path)]) == 0
    assert "ensemble_model_3_seed_10" in (tmp_path / "outputs" / "ensemble_card.md").read_text()
    members = {key.split(".")[1] for key in load_file(tmp_path / "outputs" / "ensemble.safetensors")}
    assert members == set("0123456789")
