import contextlib
import io
import json
import shutil
import subprocess
import sys

import pytest

from common.files import PROJECT_DIR
from data_utils import load_images, split_indices
from imports import torch
from main import main as train
from model_strategy import get_strategy
from tools.evaluate.__main__ import main
from tools.evaluate.corruptions import CORRUPTIONS, corrupt
from tools.evaluate.measures import as_input, confusion_matrix, fit_temperature, mean_corrupted_accuracy, predict
from tools.intervals import wilson_interval
from visualization import load_metrics_json, load_model_params, save_metrics_json

CPU = torch.device("cpu")
PICTURES = ["confusion", "mistakes", "reliability", "robustness", "saliency"]


@pytest.fixture(scope="module")
def evaluated(tiny, tmp_path_factory):
    """10 s: a run on a tiny data set with 100 images held out, its evaluation, and what the command said."""
    folder = tmp_path_factory.mktemp("evaluate")
    places = ["--name", "trial", "--data_dir", str(tiny), "--output_dir", str(folder), "--threads", "1"]
    assert train([*places, "--epochs", "3", "--batch_size", "20", "--val_split", "100"]) == 0
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main(places) == 0
    return folder, json.loads((folder / "outputs" / "trial_evaluation.json").read_text()), printed.getvalue()


def test_the_evaluation_is_of_the_test_images(evaluated, tiny):
    folder, evaluation, printed = evaluated
    metrics = load_metrics_json("trial", folder)
    images, labels = load_images(tiny, train=False)
    model = load_model_params(get_strategy("1").build(), "trial", folder)
    log_probabilities = predict(model, as_input(images, CPU))
    predicted = log_probabilities.argmax(1)
    wrong = (predicted != labels).nonzero().flatten().tolist()
    assert wrong, "the tiny run must make mistakes for this test to say something"

    assert evaluation["schema"] == 1
    assert (evaluation["name"], evaluation["parameters"], evaluation["images"]) == ("trial", 7720, 100)
    assert evaluation["accuracy"] == pytest.approx(metrics["test_acc"][-1], abs=1e-4)
    assert evaluation["accuracy_interval"] == list(wilson_interval(100 - len(wrong), 100))
    assert torch.equal(torch.tensor(evaluation["confusion"]), confusion_matrix(predicted, labels))
    assert sorted(mistake["index"] for mistake in evaluation["mistakes"]) == wrong
    assert all(labels[m["index"]] == m["true"] != m["predicted"] for m in evaluation["mistakes"])
    assert [row["support"] for row in evaluation["per_class"]] == [10] * 10
    assert list(evaluation["corruptions"]) == list(CORRUPTIONS)
    for name, accuracies in evaluation["corruptions"].items():
        spoilt = predict(model, as_input(corrupt(images, name, 5), CPU)).argmax(1)
        assert accuracies[4] == pytest.approx(100 * float((spoilt == labels).float().mean()), abs=1.01)
        assert len(accuracies) == 5
        row = next(line for line in printed.splitlines() if line.startswith(f"{name} "))
        assert all(f"{accuracy:.2f}" in row for accuracy in accuracies)
    low, high = evaluation["accuracy_interval"]
    assert f"accuracy {evaluation['accuracy']:.2f} %, 95 % interval {low:.2f} to {high:.2f} %" in printed


def test_the_temperature_is_fitted_on_the_runs_held_out_images(evaluated, tiny):
    folder, evaluation, printed = evaluated
    images, labels = load_images(tiny, train=True)
    held_out = split_indices(labels, 100)[1]
    model = load_model_params(get_strategy("1").build(), "trial", folder)
    temperature = fit_temperature(predict(model, as_input(images[held_out], CPU)), labels[held_out])
    assert evaluation["calibration"]["temperature"] == pytest.approx(temperature, rel=1e-3)
    assert evaluation["calibration"]["fitted_on"] == 100
    assert f"temperature {temperature:.3f}, fitted on 100 held-out training images" in printed


def test_every_picture_is_written(evaluated):
    folder, _, printed = evaluated
    for what in PICTURES:
        path = folder / "plots" / f"trial_{what}.png"
        assert path.read_bytes().startswith(b"\x89PNG")
        assert str(path) in printed
    assert not list(folder.rglob("*.partial"))


def test_a_damaged_network_is_told_in_one_line(evaluated, tmp_path, capsys):
    folder, _, _ = evaluated
    shutil.copytree(folder / "outputs", tmp_path / "outputs")
    weights = tmp_path / "outputs" / "trial_params.pth"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert main(["--name", "trial", "--output_dir", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert "is damaged" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "plots").exists()


def test_a_run_under_way_is_refused(evaluated, tmp_path, capsys):
    folder, _, _ = evaluated
    shutil.copytree(folder / "outputs", tmp_path / "outputs")
    save_metrics_json({**load_metrics_json("trial", tmp_path), "status": "running"}, "trial", tmp_path)
    with pytest.raises(SystemExit) as caught:
        main(["--name", "trial", "--output_dir", str(tmp_path)])
    assert caught.value.code == 2
    assert "trial is not finished; its metrics say that it is running" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--name", "absent"], "absent_metrics.json does not exist; runs with such a file in that folder: mnist_model"),
        (["--name", "a/b"], "name: 'a/b' is not allowed"),
        (["--threads", "0"], "threads: 0 is not allowed; it must be at least 1"),
        (["--device", "tpu"], "device: 'tpu' is not allowed"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
    ],
)
def test_wrong_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_flags_are_read_without_torch():
    code = "import sys, tools.evaluate.__main__ as command; command.get_args_parser(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT_DIR, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# ---------------------------------------------------------------------------------------------------------------------
# what is shipped
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", ["1", "2", "3"])
def test_the_shipped_evaluations_are_of_the_shipped_networks(number, shipped_project, test_set):
    name = f"mnist_model_{number}"
    evaluation = json.loads((shipped_project / "outputs" / f"{name}_evaluation.json").read_text())
    images, labels = test_set
    model = load_model_params(get_strategy(number).build(), name, shipped_project)
    predicted = predict(model, as_input(images, CPU)).argmax(1)
    wrong = set((predicted != labels).nonzero().flatten().tolist())
    # another processor rounds otherwise, which may turn one image in ten thousand
    assert len(wrong ^ {mistake["index"] for mistake in evaluation["mistakes"]}) <= 1
    assert evaluation["accuracy"] == load_metrics_json(name, shipped_project)["test_acc"][-1]
    assert (torch.tensor(evaluation["confusion"]) - confusion_matrix(predicted, labels)).abs().sum() <= 2
    assert evaluation["calibration"]["temperature"] is None  # no image was held out


def test_the_page_shows_the_shipped_evaluations(shipped_project):
    page = (PROJECT_DIR / "docs" / "evaluate.md").read_text(encoding="utf-8")
    for number in ("1", "2", "3"):
        evaluation = json.loads((shipped_project / "outputs" / f"mnist_model_{number}_evaluation.json").read_text())
        assert row_of(number, evaluation) in page
    for what in PICTURES:
        assert f"plots/mnist_model_3_{what}.png" in page
        assert (shipped_project / "plots" / f"mnist_model_3_{what}.png").read_bytes().startswith(b"\x89PNG")


def row_of(number: str, evaluation: dict) -> str:
    low, high = evaluation["accuracy_interval"]
    lowest = min(evaluation["per_class"], key=lambda row: row["f1"])
    ece, spoilt = evaluation["calibration"]["ece"], mean_corrupted_accuracy(evaluation["corruptions"])
    return (
        f"| {number} | {evaluation['accuracy']:.2f} | {low:.2f} to {high:.2f} | {lowest['f1']:.2f} ({lowest['digit']})"
        f" | {ece:.2f} | {spoilt:.2f} |"
    )
