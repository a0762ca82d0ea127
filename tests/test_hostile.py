"""Files that are damaged or made to do harm: each is told in one line, none is run, none is lost."""

import json
import pickle
from pathlib import Path

import pytest
from conftest import contents

import main as command
from common.files import DamagedFileError, UsageError
from imports import torch
from model_strategy import get_strategy
from models import model_v1
from visualization import load_metrics_json, load_model_params


class Bomb:
    """What unpickling it does: create a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.fixture
def files(finished_run):
    return finished_run


def truncate(path: Path, mark: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def flip_a_bit(path: Path, mark: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


def empty(path: Path, mark: Path) -> None:
    path.write_bytes(b"")


def a_web_page(path: Path, mark: Path) -> None:
    path.write_text("<!DOCTYPE html><title>404</title>")


def a_bare_pickle(path: Path, mark: Path) -> None:
    path.write_bytes(pickle.dumps(Bomb(mark)))


def a_pickle_in_a_torch_file(path: Path, mark: Path) -> None:
    torch.save({"weight": torch.zeros(3), "bomb": Bomb(mark)}, path)


def a_whole_network(path: Path, mark: Path) -> None:
    torch.save(model_v1.Net(), path)


BROKEN = [truncate, flip_a_bit, empty, a_web_page, a_bare_pickle, a_pickle_in_a_torch_file, a_whole_network]


@pytest.mark.parametrize("damage", BROKEN)
def test_weights(files, tmp_path, damage):
    damage(files.params, tmp_path / "mark")
    before = contents(files.root)
    with pytest.raises(DamagedFileError, match=r"run_params\.pth is damaged") as caught:
        load_model_params(model_v1.Net(), "run", files.root)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "mark").exists()
    assert contents(files.root) == before


@pytest.mark.parametrize("damage", BROKEN)
def test_checkpoints(files, tmp_path, capsys, damage):
    for path in (files.checkpoint, files.previous_checkpoint):
        damage(path, tmp_path / "mark")
    before = contents(files.root)
    assert command.main(["--resume", "--name", "run", "--output_dir", str(files.root)]) == 1
    error = capsys.readouterr().err
    assert error.count("is damaged") == 2
    assert error.count("\n") == 1
    assert not (tmp_path / "mark").exists()
    assert contents(files.root) == before


@pytest.mark.parametrize(
    ("change", "expected", "message"),
    [
        ({"config": {"frobnicate": 1}}, 2, "resume: the checkpoint is of another version of this program"),
        ({"config": {"model": "../1"}}, 2, "model: '../1' is not allowed"),
        ({"config": {"epochs": "many"}}, 2, "epochs: 'many' is not allowed; it must be a whole number"),
        ({"schema": 1}, 1, "does not hold a checkpoint of schema 2"),
        ({"model": {"weight": torch.zeros(3)}, "epochs_done": 1}, 1, "does not fit its own configuration"),
        ({"optimizer": {}, "epochs_done": 1}, 1, "does not fit its own configuration: 'param_groups'"),
        ({"data": torch.zeros(3), "epochs_done": 1}, 1, "does not fit its own configuration: RNG state"),
        ({"metrics": {}, "epochs_done": 1}, 1, "does not fit its own configuration: 'environment'"),
        ({"processes": [{}], "epochs_done": 1}, 1, "does not fit its own configuration: 'torch'"),
        ({"model": None, "processes": 3}, 1, "is no checkpoint: it has no model, processes"),
    ],
)
def test_a_checkpoint_that_was_tampered_with(files, capsys, change, expected, message):
    files.previous_checkpoint.unlink()
    state = torch.load(files.checkpoint, weights_only=True)
    torch.save({**state, **change}, files.checkpoint)
    before = contents(files.root)
    try:
        status = command.main(["--resume", "--name", "run", "--output_dir", str(files.root)])
    except SystemExit as exit_:
        status = exit_.code
    assert status == expected
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert contents(files.root) == before


def test_weights_of_another_network(files):
    torch.save(get_strategy("3").build().state_dict(), files.params)
    with pytest.raises(RuntimeError, match=r"does not hold weights of models\.model_v1\.Net; they fit model 3"):
        load_model_params(model_v1.Net(), "run", files.root)


def test_weights_of_no_network(files):
    torch.save(["not", "a", "state", "dict"], files.params)
    with pytest.raises(RuntimeError, match="they fit none of the registered models"):
        load_model_params(model_v1.Net(), "run", files.root)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"schema": 1, "name": "ru', "is damaged: Unterminated string"),
        (b"\xff\xfe{}", "is damaged: 'utf-8' codec"),
        (b"<html></html>", "is damaged: Expecting value"),
        (b"[1, 2]", "does not hold metrics of schema 1"),
        (b'{"schema": 99}', "does not hold metrics of schema 1"),
        (b'{"schema": 1}', "is not as the schema says: name, model, status"),
        (b"[" * 100_000, "is damaged"),
    ],
)
def test_metrics(files, content, message):
    files.metrics.write_bytes(content)
    with pytest.raises(DamagedFileError) as caught:
        load_metrics_json("run", files.root)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("test_acc", 99.4),
        ("test_acc", [99.4, "99.5"]),
        ("train_losses", [float("nan")]),
        ("learning_rates", [True]),
        ("total_seconds", "long"),
        ("config", []),
        ("status", None),
    ],
)
def test_metrics_of_another_type(files, field, value):
    metrics = json.loads(files.metrics.read_text())
    files.metrics.write_text(json.dumps({**metrics, field: value}))
    with pytest.raises(DamagedFileError, match=rf"is not as the schema says: {field} missing or of another type"):
        load_metrics_json("run", files.root)


@pytest.mark.parametrize("load", [load_metrics_json, lambda *args: load_model_params(model_v1.Net(), *args)])
@pytest.mark.parametrize("name", ["../run", "outputs/run", "/etc/passwd", "run\0", ""])
def test_a_name_with_a_path_in_it(files, load, name):
    with pytest.raises(UsageError, match="is not allowed; a run's name is"):
        load(name, files.root)


@pytest.mark.parametrize("load", [load_metrics_json, lambda *args: load_model_params(model_v1.Net(), *args)])
def test_a_missing_name_lists_those_that_exist(files, load):
    with pytest.raises(FileNotFoundError, match=r"does not exist; runs with such a file in that folder: run$"):
        load("absent", files.root)


def swap(raw: Path) -> None:
    (raw / "train-images-idx3-ubyte").rename(raw / "spare")
    (raw / "train-labels-idx1-ubyte").rename(raw / "train-images-idx3-ubyte")
    (raw / "spare").rename(raw / "train-labels-idx1-ubyte")


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda raw: truncate(raw / "train-images-idx3-ubyte", raw), "train-images-idx3-ubyte"),
        (lambda raw: flip_a_bit(raw / "t10k-images-idx3-ubyte", raw), "t10k-images-idx3-ubyte"),
        (lambda raw: a_web_page(raw / "train-labels-idx1-ubyte", raw), "train-labels-idx1-ubyte"),
        (swap, "train-images-idx3-ubyte"),
    ],
    ids=["truncated", "flipped", "web page", "swapped"],
)
def test_data_of_ones_own_that_changed_is_told_before_a_batch(files, tiny_mnist, capsys, damage, named):
    damage(tiny_mnist / "MNIST" / "raw")
    before = contents(tiny_mnist.parent)
    arguments = ["--data_dir", str(tiny_mnist), "--output_dir", str(files.root), "--name", "run"]
    assert command.main(arguments) == 1
    captured = capsys.readouterr()
    assert named in captured.err
    assert captured.err.count("\n") == 1
    assert "EPOCH" not in captured.out
    assert contents(tiny_mnist.parent) == before
