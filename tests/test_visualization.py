import json
from typing import Any

import pytest

from imports import nn, torch
from models import model_v1, model_v2, model_v3
from visualization import (
    count_parameters,
    load_metrics_json,
    load_model_params,
    metrics_figure,
    model_summary,
    plot_metrics,
    save_metrics_json,
    save_model_params,
    save_model_summary,
)


@pytest.fixture
def results(tmp_path):
    for folder in ("outputs", "plots", "summaries"):
        (tmp_path / folder).mkdir()
    return tmp_path


def some_metrics(epochs: int = 3, val: bool = False) -> dict[str, Any]:
    return {
        "schema": 1,
        "name": "mnist_model_1",
        "model": "1",
        "parameters": 7720,
        "status": "finished",
        "pid": 1,
        "updated": "2026-01-01T00:00:00.000+00:00",
        "config": {"scheduler": "onecycle"},
        "environment": {},
        "train_losses": [1.0 / (i + 1) for i in range(10 * epochs)],
        "learning_rates": [0.1] * 10 * epochs,
        "train_acc": [90.0 + i for i in range(epochs)],
        "test_losses": [0.1] * epochs,
        "test_acc": [97.0 + i for i in range(epochs)],
        "val_losses": [0.2] * epochs if val else [],
        "val_acc": [96.0 + i for i in range(epochs)] if val else [],
        "epoch_seconds": [1.0] * epochs,
        "total_seconds": 1.5 * epochs,
    }


@pytest.mark.parametrize("net", [model_v1.Net, model_v2.Net, model_v3.Net])
def test_weights_round_trip(results, net):
    model = net().to(memory_format=torch.channels_last)
    model.train()(torch.randn(8, 1, 28, 28))  # moves BatchNorm's statistics: they are saved too
    path = save_model_params(model, "run", results)
    assert path == results / "outputs" / "run_params.pth"
    loaded = load_model_params(net(), "run", results)
    assert not loaded.training
    state = model.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())
    x = torch.randn(4, 1, 28, 28)
    torch.testing.assert_close(loaded(x), model.eval()(x))
    # and as anybody loads them
    plain = net()
    plain.load_state_dict(torch.load(path, weights_only=True))


def test_metrics_round_trip(results):
    metrics = some_metrics()
    path = save_metrics_json(metrics, "run", results)
    assert load_metrics_json("run", results) == metrics == json.loads(path.read_text())
    assert len(path.read_text().splitlines()) == len(metrics) + 2  # a line a field


def test_metrics_must_be_numbers(results):
    metrics = some_metrics()
    save_metrics_json(metrics, "run", results)
    with pytest.raises(ValueError, match="JSON"):
        save_metrics_json({**metrics, "train_losses": [float("nan")]}, "run", results)
    assert load_metrics_json("run", results) == metrics  # the file that was there is whole


def test_summary_is_the_table_and_changes_nothing(results):
    model = model_v1.Net().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    path = save_model_summary(model, "run", results)
    assert torch.equal(torch.rand(3), expected)  # nor the random generator
    assert model.training
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    table = path.read_text()
    assert table == model_summary(model)
    assert "Conv2d-1" in table
    assert "Total params: 7,720" in table
    assert "None" not in table
    assert path == results / "summaries" / "run_summary.txt"


@pytest.mark.parametrize(("epochs", "val"), [(3, False), (3, True), (1, True), (0, False)])
def test_plot_has_the_four_panels(results, epochs, val):
    metrics = some_metrics(epochs, val)
    figure = metrics_figure(metrics)
    panels = figure.axes
    assert [panel.get_title().split(" (")[0] for panel in panels] == [
        "Training loss",
        "Test loss",
        "Training accuracy",
        "Test accuracy",
    ]
    assert all(panel.get_xlabel() and panel.get_ylabel() for panel in panels)
    title = figure.get_suptitle()
    assert "7,720 parameters" in title
    assert (f"{96 + epochs:.2f} %" in title) == (epochs > 0)
    raw, smoothed = panels[0].lines
    assert list(raw.get_ydata()) == metrics["train_losses"]
    assert len(smoothed.get_ydata()) == len(metrics["train_losses"])
    assert list(panels[3].lines[0].get_ydata()) == metrics["test_acc"]
    assert len(panels[3].lines) == 1 + val
    path = plot_metrics(metrics, "run", results)
    assert path == results / "plots" / "run.png"
    assert path.read_bytes().startswith(b"\x89PNG")


def test_smoothing_of_a_constant_is_the_constant():
    def smoothed(losses):
        lists = {key: [] for key in ("learning_rates", "train_acc", "test_acc", "test_losses", "val_acc", "val_losses")}
        facts = {"name": "run", "model": "1", "config": {"scheduler": "step"}, "parameters": 7720}
        return metrics_figure({**lists, **facts, "train_losses": losses}).axes[0].lines[1].get_ydata().tolist()

    assert smoothed([2.0] * 50) == pytest.approx([2.0] * 50)
    assert smoothed([1.0, 0.0]) == pytest.approx([1.0, 0.98 / 1.98])


def test_count_parameters_counts_what_is_trained():
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    assert count_parameters(model) == 3 * 2 + 2 + 4
    model[0].bias.requires_grad_(False)
    assert count_parameters(model) == 3 * 2 + 4


def test_the_projects_own_folders_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_metrics_json("mnist_model_1")["parameters"] == 7_720
    load_model_params(model_v1.Net(), "mnist_model_1")
