"""The networks that are shipped: their weights against their metrics, on the real test images.

They are looked at as they are committed: a training that replaced one in the working tree is nothing to complain of.
"""

import json
import math
import re
import statistics

import numpy as np
import pytest

from common.files import PROJECT_DIR, RunFiles
from imports import torch
from model_strategy import get_strategy
from tools.ensemble import load_ensemble
from tools.evaluate.measures import as_input, predict
from training.config import TrainConfig, fields_in
from training.report import epoch_line
from visualization import count_parameters, load_metrics_json, load_model_params, metrics_figure, model_summary

NAMES = ["1", "2", "3"]


def accuracy_from_the_files(name, raw, output_dir) -> float:
    """Evaluated on the IDX files with as little of the project's code as can be."""
    images = np.frombuffer((raw / "t10k-images-idx3-ubyte").read_bytes(), dtype=np.uint8, offset=16)
    labels = np.frombuffer((raw / "t10k-labels-idx1-ubyte").read_bytes(), dtype=np.uint8, offset=8)
    x = (torch.from_numpy(images.reshape(-1, 1, 28, 28).astype(np.float32)) / 255 - 0.1307) / 0.3081
    model = load_model_params(get_strategy(name).build(), f"mnist_model_{name}", output_dir)
    with torch.inference_mode():
        digits = torch.cat([model(part).argmax(1) for part in x.split(1000)])
    assert len(digits) == 10_000
    return 100 * float((digits.numpy() == labels).mean())


@pytest.fixture(scope="module")
def accuracies(mnist, shipped_project) -> dict[str, float]:
    """4 s: what all else rests on, so it is held at every change, on all test images."""
    return {name: accuracy_from_the_files(name, mnist / "MNIST" / "raw", shipped_project) for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_as_good_as_their_metrics_say(name, accuracies, shipped_project):
    metrics = load_metrics_json(f"mnist_model_{name}", shipped_project)
    # another processor rounds otherwise, which may turn one image in ten thousand
    assert accuracies[name] == pytest.approx(metrics["test_acc"][-1], abs=0.011)
    assert metrics["status"] == "finished"
    assert metrics["model"] == name


def test_accuracy_bar(accuracies):
    assert min(accuracies.values()) >= 99.40
    assert sum(accuracies.values()) / 3 >= 99.48


@pytest.mark.parametrize("name", NAMES)
def test_trained_by_the_command_as_the_docs_say(name, shipped_project):
    metrics = load_metrics_json(f"mnist_model_{name}", shipped_project)
    config = TrainConfig(**metrics["config"])
    wanted = TrainConfig.from_sources({"model": name}, "best")
    assert all(getattr(config, key) == getattr(wanted, key) for key in fields_in("recipe"))
    assert (config.epochs, config.seed, config.val_split) == (15, 1, 0)
    assert len(metrics["test_acc"]) == len(metrics["epoch_seconds"]) == 15
    assert len(metrics["train_losses"]) == 15 * math.ceil(60_000 / config.batch_size)


@pytest.mark.long
def test_the_ensemble_is_as_good_as_its_file_says(test_set, shipped_project):
    facts = json.loads((shipped_project / "outputs" / "ensemble.json").read_text(encoding="utf-8"))
    ensemble = load_ensemble("ensemble", shipped_project)
    assert count_parameters(ensemble) == facts["parameters"]
    images, labels = test_set
    said = predict(ensemble, as_input(images, torch.device("cpu")))
    accuracy = 100 * (said.argmax(1) == labels).float().mean().item()
    assert accuracy == pytest.approx(facts["accuracy"], abs=0.011)
    assert accuracy >= 99.70
    assert facts["parameters"] <= 100_000


@pytest.mark.parametrize("name", NAMES)
def test_summary_and_plot_belong_to_the_network(name, shipped_project):
    files = RunFiles(f"mnist_model_{name}", shipped_project)
    assert files.summary.read_text(encoding="utf-8") == model_summary(get_strategy(name).build())
    assert files.plot.read_bytes().startswith(b"\x89PNG")
    metrics = load_metrics_json(files.name, shipped_project)
    assert f"{metrics['test_acc'][-1]:.2f} %" in metrics_figure(metrics).get_suptitle()


def test_the_docs_show_the_shipped_results(shipped_project):
    accuracy_page = (PROJECT_DIR / "docs" / "accuracy.md").read_text(encoding="utf-8")
    train_page = (PROJECT_DIR / "docs" / "train.md").read_text(encoding="utf-8")
    for name in NAMES:
        metrics = load_metrics_json(f"mnist_model_{name}", shipped_project)
        final, best = metrics["test_acc"][-1], max(metrics["test_acc"])
        row = rf"^\| {name} \| {metrics['parameters']:,} \| {final:.2f} \| {best:.2f} \| "
        assert re.search(row, accuracy_page, re.MULTILINE)
    # the listing is of today's command: as long and as good as the shipped run, and marked as the command marks
    shipped = load_metrics_json("mnist_model_3", shipped_project)["test_acc"]
    listed = [float(found) for found in re.findall(r"^EPOCH: .*Accuracy: ([\d.]+)%", train_page, re.MULTILINE)]
    assert len(listed) == len(shipped)
    assert abs(listed[-1] - shipped[-1]) < 0.2
    for epoch in range(len(listed)):
        assert f"{epoch_line({'test_acc': listed, 'val_acc': []}, epoch)}\n" in train_page


def test_the_readme_shows_the_series(shipped_project):
    readme = (PROJECT_DIR / "README.md").read_text(encoding="utf-8")
    series = json.loads((shipped_project / "outputs" / "benchmark_accuracy.json").read_text(encoding="utf-8"))
    recipes = {"specification, step": 5, "specification, onecycle": 10, "--config best": 10, "--config record": 10}
    for recipe, seeds in recipes.items():
        cells = []
        for name in NAMES:
            (runs,) = (entry["runs"] for entry in series if entry["label"] == f"model {name}, {recipe}")
            values = [runs[str(seed)]["accuracy"] for seed in range(1, seeds + 1)]
            cells.append(f"{statistics.mean(values):.3f} +- {statistics.stdev(values):.3f}")
        assert f"| {' | '.join(cells)} | {seeds} |" in readme.replace("**", "")


def test_the_readme_shows_the_ensemble(shipped_project):
    readme = (PROJECT_DIR / "README.md").read_text(encoding="utf-8")
    facts = json.loads((shipped_project / "outputs" / "ensemble.json").read_text(encoding="utf-8"))
    assert f"**{facts['accuracy']:.2f} %** with {facts['parameters']:,} parameters" in readme
