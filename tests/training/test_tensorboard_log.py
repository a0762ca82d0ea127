import builtins
import importlib.util

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import main as command
from imports import torch
from training import tensorboard_log
from training.tensorboard_log import PER_EPOCH
from visualization import load_metrics_json


def scalars(folder) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def pairs(steps, values) -> list[tuple[int, float]]:
    return [(step, pytest.approx(value, rel=1e-6)) for step, value in zip(steps, values, strict=True)]


def assert_as_in_the_metrics(output_dir) -> None:
    metrics = load_metrics_json("run", output_dir)
    found = scalars(output_dir / "outputs" / "tensorboard" / "run")
    batches = range(1, len(metrics["train_losses"]) + 1)
    assert found.pop("loss/train") == pairs(batches, metrics["train_losses"])
    assert found.pop("learning_rate") == pairs(batches, metrics["learning_rates"])
    ends = batches[:: len(batches) // len(metrics["test_acc"])]
    ends = [start + len(batches) // len(metrics["test_acc"]) - 1 for start in ends]
    assert found == {tag: pairs(ends, metrics[key]) for key, tag in PER_EPOCH.items() if metrics[key]}


@pytest.fixture
def flags(tiny, tmp_path) -> list[str]:
    folders = ["--data_dir", str(tiny), "--output_dir", str(tmp_path)]
    return ["--epochs", "3", "--batch_size", "50", "--device", "cpu", "--name", "run", *folders]


def test_every_number_is_there(flags, tmp_path):
    assert command.main(["--tensorboard", "--val_split", "50", *flags]) == 0
    assert_as_in_the_metrics(tmp_path)


def test_a_later_run_of_the_same_name_replaces_it(flags, tmp_path):
    assert command.main(["--tensorboard", *flags]) == 0
    assert command.main(["--tensorboard", *flags, "--seed", "2"]) == 0
    assert_as_in_the_metrics(tmp_path)


def test_a_resumed_run_goes_on(flags, tmp_path):
    """3 s: TensorBoard loads its own reader."""
    assert command.main([*flags, "--tensorboard", "--epochs", "2"]) == 0
    assert command.main([*flags, "--tensorboard", "--resume"]) == 0
    assert_as_in_the_metrics(tmp_path)


def test_it_changes_nothing_else(flags, tmp_path):
    assert command.main(flags) == 0
    assert not (tmp_path / "outputs" / "tensorboard").exists()
    weights = [torch.load(tmp_path / "outputs" / "run_params.pth", weights_only=True)]
    assert command.main([*flags, "--tensorboard"]) == 0
    weights.append(torch.load(tmp_path / "outputs" / "run_params.pth", weights_only=True))
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_without_tensorboard_one_line_says_so(flags, tmp_path, monkeypatch, capsys):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(tensorboard_log, "find_spec", lambda name: None if name == "tensorboard" else find_spec(name))
    with pytest.raises(SystemExit) as caught:
        command.main([*flags, "--tensorboard"])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert not (tmp_path / "outputs").exists()
    assert "tensorboard: it is not installed; add it with: pip install -r requirements-tools.txt" in error
    assert error.count("\n") == 1


def test_training_does_without(flags, monkeypatch):
    real = builtins.__import__

    def refuse(name, *rest, **options):
        assert not name.startswith(("tensorboard.", "torch.utils.tensorboard")), name
        return real(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    assert command.main(flags) == 0
