"""The networks that are shipped: their weights against their metrics, on the real test images."""

import math

import numpy as np
import pytest

from file_utils import RunFiles
from imports import torch
from model_strategy import get_strategy
from visualization import load_metrics_json, load_model_params, metrics_figure, model_summary

NAMES = ["1", "2", "3"]


def accuracy_from_the_files(name, raw) -> float:
    """Evaluated on the IDX files with as little of the project's code as can be."""
    images = np.frombuffer((raw / "t10k-images-idx3-ubyte").read_bytes(), dtype=np.uint8, offset=16)
    labels = np.frombuffer((raw / "t10k-labels-idx1-ubyte").read_bytes(), dtype=np.uint8, offset=8)
    x = (torch.from_numpy(images.reshape(-1, 1, 28, 28).astype(np.float32)) / 255 - 0.1307) / 0.3081
    model = load_model_params(get_strategy(name).build(), f"mnist_model_{name}")
    with torch.inference_mode():
        digits = torch.cat([model(part).argmax(1) for part in x.split(1000)])
    assert len(digits) == 10_000
    return 100 * float((digits.numpy() == labels).mean())


@pytest.fixture(scope="module")
def accuracies(mnist) -> dict[str, float]:
    return {name: accuracy_from_the_files(name, mnist / "MNIST" / "raw") for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_as_good_as_their_metrics_say(name, accuracies):
    metrics = load_metrics_json(f"mnist_model_{name}")
    # another processor rounds otherwise, which may turn one image in ten thousand
    assert accuracies[name] == pytest.approx(metrics["test_acc"][-1], abs=0.011)
    assert metrics["status"] == "finished"
    assert metrics["model"] == name


def test_accuracy_bar(accuracies):
    assert min(accuracies.values()) >= 99.30
    assert sum(accuracies.values()) / 3 >= 99.40


@pytest.mark.parametrize("name", NAMES)
def test_trained_by_the_command_as_the_readme_says(name):
    metrics = load_metrics_json(f"mnist_model_{name}")
    config = metrics["config"]
    assert (config["scheduler"], config["epochs"], config["seed"]) == ("onecycle", 15, 1)
    assert (config["max_lr"], config["batch_size"], config["val_split"]) == (0.75, 128, 0)
    assert len(metrics["test_acc"]) == len(metrics["epoch_seconds"]) == 15
    assert len(metrics["train_losses"]) == 15 * math.ceil(60_000 / 128)
    assert not any(path and path.startswith("/") for path in (config["data_dir"], config["output_dir"]))


@pytest.mark.parametrize("name", NAMES)
def test_summary_and_plot_belong_to_the_network(name):
    files = RunFiles(f"mnist_model_{name}")
    assert files.summary.read_text(encoding="utf-8") == model_summary(get_strategy(name).build())
    assert files.plot.read_bytes().startswith(b"\x89PNG")
    title = metrics_figure(load_metrics_json(files.name)).get_suptitle()
    assert f"{load_metrics_json(files.name)['test_acc'][-1]:.2f} %" in title
