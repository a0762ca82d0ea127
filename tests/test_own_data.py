"""A data set of one's own on its whole way: three letters, set in matplotlib's fonts, by every command."""

import base64
import csv
import gzip
import json
import re
import shutil
import statistics
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from conftest import StopAfter, write_idx
from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont
from sklearn.datasets import load_digits

import main as command
from common.cli import silent
from common.files import PROJECT_DIR
from data_utils import load_images
from image_data.facts import facts_of
from imports import torch
from tests.browser import ask, connected
from tools import ensemble, predict
from tools.compare.__main__ import main as compare
from tools.compare.comparer import Comparer
from tools.evaluate.__main__ import main as evaluate
from tools.export.__main__ import main as export
from tools.networks import Networks, load_network, probabilities
from training.config import TrainConfig
from training.run import StoppedError
from training.step import evaluate as evaluate_batches
from training.train import train_and_evaluate
from visualization import load_metrics_json, save_model_params

FONTS = sorted({font.fname for font in font_manager.fontManager.ttflist if "/mpl-data/" in font.fname})


def write_letters(folder, letters, train=20, test=6):
    """Class folders of letters, white on black, 40x40 pixels."""
    draw = np.random.default_rng(0)
    fonts = [name for name in FONTS if "Display" not in name and "STIXSiz" not in name and "cmex" not in name]
    for part, count in (("train", train), ("test", test)):
        for letter in letters:
            (folder / part / letter).mkdir(parents=True)
            for number in range(count):
                image = Image.new("L", (40, 40))
                font = ImageFont.truetype(fonts[draw.integers(len(fonts))], 30)
                ImageDraw.Draw(image).text((20, 20), letter, font=font, fill=255, anchor="mm")
                image.rotate(float(draw.uniform(-8, 8))).save(folder / part / letter / f"{number}.png")
    return folder


class Own(NamedTuple):
    """A folder with letters, their data and the results of a finished run on them, and that run's flags."""

    folder: Path
    flags: list[str]
    recipe: list[str]
    classes: list[str]

    @property
    def results(self):
        return self.folder / "results"

    @property
    def metrics(self):
        return load_metrics_json("abc", self.results)

    @property
    def accuracy(self):
        return self.metrics["test_acc"][-1]


@pytest.fixture(scope="module")
def letters(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    source = write_letters(folder / "letters", "ABC")
    flags = ["--dataset", str(source), "--data_dir", str(folder / "data"), "--output_dir", str(folder / "results")]
    recipe = ["--scheduler", "onecycle", "--batch_size", "10", "--max_lr", "0.2", "--epochs", "12", "--threads", "1"]
    assert command.main(["--name", "abc", *flags, *recipe]) == 0
    return Own(folder, flags, recipe, [*"ABC"])


def test_what_the_run_knows_of_its_data(letters):
    folder = letters.folder
    metrics = letters.metrics
    data = metrics["data"]
    assert (data["name"], data["place"], data["classes"]) == ("letters", str(folder / "letters"), letters.classes)
    of_each = data["train_images"] / len(letters.classes), data["test_images"] / len(letters.classes)
    assert (of_each, data["form"]) == ((20, 6), "whole")
    images, _ = load_images(TrainConfig(**metrics["config"]).data_folder, True)
    assert data["mean"] == pytest.approx(float(images.float().mean() / 255), abs=1e-4)
    assert data["std"] == pytest.approx(float(images.float().std() / 255), abs=1e-3)
    assert metrics["test_acc"][-1] > 60


@pytest.mark.long
def test_an_evaluation_is_of_its_own_test_images(letters, capsys):
    results = ["--output_dir", str(letters.results)]
    accuracy = letters.accuracy
    assert evaluate(["--name", "abc", *results]) == 0
    found = json.loads((letters.results / "outputs" / "abc_evaluation.json").read_text())
    assert found["accuracy"] == pytest.approx(accuracy, abs=1e-3)
    assert (found["images"], found["classes"]) == (6 * len(letters.classes), letters.classes)
    assert re.search(r"^A +\d", capsys.readouterr().out, re.MULTILINE)


def test_exports_and_comparisons_are_of_its_own_test_images(letters, capsys):
    """5 s: ONNX is made, and timed."""
    results = ["--output_dir", str(letters.results)]
    accuracy = letters.accuracy
    assert export(["--name", "abc", "--format", "onnx", "--precision", "fp32", *results]) == 0
    found = json.loads((letters.results / "outputs" / "abc_export.json").read_text())
    assert found["files"][0]["accuracy"] == pytest.approx(accuracy, abs=1e-3)
    assert export(["--name", "abc", "--format", "html", *results]) == 0
    assert f'"classes": {json.dumps(letters.classes)}' in (letters.results / "outputs" / "abc.html").read_text()
    assert compare(results) == 0
    assert f"{accuracy:.2f}%" in capsys.readouterr().out


def test_its_letters_are_the_answers(letters, tmp_path, capsys):
    folder = letters.folder
    results = ["--name", "abc", "--output_dir", str(letters.results)]
    assert predict.main([str(folder / "letters" / "test" / "B"), *results]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert len(lines) == 6
    assert sum(line.split()[1] == "B" for line in lines) >= 4
    noise = np.random.default_rng(0).integers(0, 256, (500, 28, 28)).astype(np.uint8)
    network = load_network("abc", letters.results)
    rows = np.array(probabilities(network, list(noise)))
    assert rows[:, len(letters.classes) :].sum() < 1e-3  # an output without a class is no answer
    assert rows.sum(1) == pytest.approx(1, abs=1e-5)
    (found,) = Networks(str(letters.results)).all()
    assert found.data.classes == tuple(letters.classes)


@pytest.mark.long
def test_an_ensemble_of_them(letters, capsys):
    folder, flags = letters.folder, letters.flags
    (folder / "recipe.toml").write_text('scheduler = "onecycle"\nbatch_size = 10\nmax_lr = 0.2\nepochs = 12\n')
    wanted = ["--models", "1", "3", "--seeds", "1", "--config", str(folder / "recipe.toml")]
    assert ensemble.main([*wanted, *flags]) == 0
    found = json.loads((letters.results / "outputs" / "ensemble.json").read_text())
    assert found["data"]["classes"] == letters.classes
    assert evaluate(["--ensemble", "ensemble", "--output_dir", str(letters.results)]) == 0
    evaluated = json.loads((letters.results / "outputs" / "ensemble_evaluation.json").read_text())
    assert evaluated["accuracy"] == pytest.approx(found["accuracy"])
    assert evaluated["images"] == 6 * len(letters.classes)


@pytest.mark.long
def test_the_page_answers_by_their_names(letters, serve):
    """An ensemble of the test above may be there too."""
    address, _ = serve("--output_dir", letters.results)
    with connected(address) as connection:
        connection.request("GET", "/api/models")
        (found, *_) = json.loads(connection.getresponse().read())
        assert found["classes"] == letters.classes
        right = 0
        for path in (letters.folder / "letters" / "test" / "B").iterdir():
            answer = ask(connection, path.read_bytes())["predictions"]["abc"]
            right += letters.classes[answer["digit"]] == "B"
    assert right >= 4


def test_its_files_have_its_name():
    for dataset, name in (
        ("mnist", "mnist"),
        ("fashion", "fashion"),
        ("x/my letters.csv.gz", "my_letters"),
        ("_", "own"),
    ):
        assert TrainConfig(dataset=dataset, model="3").run_name == f"{name}_model_3"


# A run goes on with its own data, and with no others


def refused(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        command.main(arguments)
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_other_data_are_refused_and_moved_ones_found(letters, tmp_path, tiny, capsys):
    folder = letters.folder
    results = shutil.copytree(letters.results, tmp_path / "results")
    resume = ["--resume", "--name", "abc", "--output_dir", str(results)]
    (results / "outputs" / "abc_params.pth").unlink()  # not finished
    line = refused([*resume, "--dataset", "mnist", "--data_dir", str(tiny)], capsys)
    assert "resume: the run is of letters" in line
    assert str(folder / "letters") in line
    assert str(tiny) in line
    moved = shutil.copytree(folder / "letters", tmp_path / "moved")
    assert command.main([*resume, "--dataset", str(moved), "--data_dir", str(tmp_path / "data")]) == 0


def test_a_relative_folder_is_found_from_elsewhere(tiny, tmp_path, monkeypatch, capsys):
    shutil.copytree(tiny, tmp_path / "here" / "mine")
    monkeypatch.chdir(tmp_path / "here")
    flags = ["--name", "far", "--output_dir", str(tmp_path / "results")]
    assert command.main(["--data_dir", "mine", "--epochs", "1", *flags]) == 0
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "there")
    assert command.main(["--resume", "--epochs", "2", *flags]) == 0
    shutil.rmtree(tmp_path / "here")
    line = refused(["--resume", "--epochs", "3", *flags], capsys)
    assert f"are not in {tmp_path / 'here' / 'mine'}; give their --data_dir" in line
    assert not (tmp_path / "here").exists()
    with pytest.raises(SystemExit):
        export(["--name", "far", "--format", "onnx", "--output_dir", str(tmp_path / "results")])
    assert "data_dir: far is of mine" in capsys.readouterr().err


def test_a_schedule_that_the_data_cannot_carry(tiny, tmp_path, capsys):
    (tmp_path / "half.toml").write_text('scheduler = "onecycle"\npct_start = 0.5\nepochs = 2\nbatch_size = 300\n')
    flags = ["--config", str(tmp_path / "half.toml"), "--data_dir", str(tiny), "--output_dir", str(tmp_path)]
    assert "pct_start: 0.5 is not allowed with 2 epochs of 1 batches" in refused(flags, capsys)


# Saved weights to begin with


def test_training_goes_on_from_saved_weights(letters, tmp_path, capsys):
    flags, recipe = letters.flags, letters.recipe
    state = torch.load(letters.results / "outputs" / "abc_params.pth", weights_only=True)
    wrapped = tmp_path / "wrapped.pth"
    torch.save({f"module._orig_mod.{name}": value for name, value in state.items()}, wrapped)
    few = [*flags[:4], "--output_dir", str(tmp_path), *recipe, "--epochs", "1", "--max_lr", "0.001"]
    accuracies = []
    for name, init in (("cold", []), ("warm", ["--init", str(wrapped)])):
        assert command.main(["--name", name, *few, *init]) == 0
        accuracies.append(load_metrics_json(name, tmp_path)["test_acc"][-1])
    assert accuracies[1] > accuracies[0] + 20
    assert "init: nowhere is neither a run here nor a file" in refused([*few, "--init", "nowhere"], capsys)
    legacy = tmp_path / "legacy.pth"
    torch.save(state, legacy, _use_new_zipfile_serialization=False)
    line = refused([*few, "--init", str(legacy)], capsys)
    assert "is of the format before PyTorch 1.6; save it again: torch.save(" in line
    save_model_params(torch.nn.Linear(2, 2), "other", tmp_path)
    assert "init: " in refused([*few, "--init", "other"], capsys)


@pytest.mark.long
def test_few_pictures_are_best_learnt_from_the_shipped_weights(tmp_path):
    """200 letters, judged on 1,000 others, by five seeds."""
    source = write_letters(tmp_path / "letters", "ABCDEFGHIJ", train=20, test=100)
    place = {
        "dataset": str(source),
        "data_dir": str(tmp_path),
        "output_dir": str(tmp_path),
        "name": "run",
        "threads": 1,
    }
    recipe = {"scheduler": "onecycle", "epochs": 10, "batch_size": 20, "max_lr": 0.05}

    def accuracies(init):
        runs = [TrainConfig(**place, **recipe, init=init, seed=seed) for seed in range(1, 6)]
        return [train_and_evaluate(run, silent).metrics["test_acc"][-1] for run in runs]

    alone, tuned = accuracies(None), accuracies(str(PROJECT_DIR / "outputs" / "mnist_model_1_params.pth"))
    print(f"alone {alone}, from the shipped weights {tuned}")
    assert statistics.mean(tuned) - statistics.mean(alone) > 2 * statistics.stdev(alone) / 5**0.5


# Kaggle


def test_a_submission(letters, tmp_path, capsys):
    images = load_images(TrainConfig(**letters.metrics["config"]).data_folder, False)[0]
    table = tmp_path / "test.csv"
    header = ",".join(f"pixel{place}" for place in range(784))
    np.savetxt(table, images.numpy().reshape(-1, 784), "%d", ",", header=header, comments="")
    where = ["--name", "abc", "--output_dir", str(letters.results)]
    assert predict.main([str(table), "--submission", str(tmp_path / "submission.csv"), *where]) == 0
    assert capsys.readouterr().out == f"{len(images)} answers written to {tmp_path / 'submission.csv'}\n"
    with open(tmp_path / "submission.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["ImageId"] for row in rows] == [str(number) for number in range(1, len(images) + 1)]
    right = sum(row["Label"] == letter for row, letter in zip(rows, np.repeat(letters.classes, 6), strict=True))
    assert 100 * right / len(images) == pytest.approx(letters.accuracy, abs=1e-3)
    with pytest.raises(SystemExit):
        predict.main([str(table), str(table), "--submission", str(tmp_path / "s.csv"), *where])
    assert "submission: give one CSV file of images" in capsys.readouterr().err


# What must not be taken for something else


def test_networks_are_compared_on_the_images_that_they_share(letters, tiny, tmp_path):
    """Two networks of letters and one of bars: the letters are theirs alone."""
    folder = letters.results.parent
    (tmp_path / "outputs").mkdir()
    for name, answer in {"one": 1, "other": 2, "bars": 3}.items():
        metrics = load_metrics_json("abc", folder / "results") | {"name": name}
        if name == "bars":
            metrics["data"] = facts_of(tiny).as_json()
        (tmp_path / "outputs" / f"{name}_metrics.json").write_text(json.dumps(metrics))
        evaluation = {
            "accuracy": 90.0,
            "accuracy_interval": [80.0, 95.0],
            "classes": metrics["data"]["classes"],
            "confusion": [[1] * 10] * 10,
            "per_class": [{"recall": 50.0}] * 10,
            "mistakes": [{"index": 5, "true": 0, "predicted": answer}],
        }
        (tmp_path / "outputs" / f"{name}_evaluation.json").write_text(json.dumps(evaluation))
    compared = Comparer(str(tmp_path)).compare()
    (found,) = compared.disagreements
    assert (found["predicted"], found["classes"]) == (
        {"one": 1, "other": 2},
        load_metrics_json("abc", folder / "results")["data"]["classes"],
    )
    images, _ = load_images(TrainConfig(**metrics["config"]).data_folder, False)
    assert base64.b64decode(found["pixels"]) == images[5].numpy().tobytes()
    assert compared.evaluations["one"]["confusion"] == [[1] * len(letters.classes)] * len(letters.classes)


def test_members_of_several_data_sets_do_not_vote(letters, a_finished_run, tmp_path, capsys):
    folder = letters.results.parent
    shutil.copytree(folder / "results", tmp_path / "both")
    shutil.copytree(a_finished_run, tmp_path / "both", dirs_exist_ok=True)
    with pytest.raises(SystemExit):
        ensemble.main(["--members", "abc", "run", "--output_dir", str(tmp_path / "both")])
    assert "members: they are of several data sets (letters (" in capsys.readouterr().err


def test_fewer_images_than_a_batch(letters, tmp_path, capsys):
    flags = [*letters.flags[:4], "--output_dir", str(tmp_path), "--batch_size", "9999"]
    assert "batch_size: 9999 is not allowed; there are" in refused(flags, capsys)


def test_an_output_without_a_class_is_never_the_answer():
    class Stubborn(torch.nn.Module):
        def forward(self, images):
            return torch.tensor([[-3.0, -2.0, -4.0, *[-0.5] * 7]]).expand(len(images), 10)

    batches = [(torch.zeros(4, 1, 28, 28), torch.tensor([1, 1, 1, 0]))]
    assert evaluate_batches(Stubborn(), batches, torch.device("cpu"), classes=3)[1] == 75.0


def test_going_on_needs_no_weights_to_start_from(letters, tmp_path):
    folder, flags = letters.results.parent, letters.flags
    weights = shutil.copy(folder / "results" / "outputs" / "abc_params.pth", tmp_path / "weights.pth")
    places = {"dataset": flags[1], "data_dir": flags[3], "output_dir": str(tmp_path), "name": "tuned"}
    config = TrainConfig(**places, init=str(weights), epochs=2, batch_size=10)
    with pytest.raises(StoppedError):
        train_and_evaluate(config, silent, stop_requested=StopAfter(8))
    weights.unlink()
    assert command.main(["--resume", "--name", "tuned", "--output_dir", str(tmp_path)]) == 0


def same_images(tmp_path, mnist, count, test_count):
    """MNIST's first images as IDX, packed IDX, CSV and a folder."""
    places = {form: tmp_path / form for form in ("idx", "gz", "csv", "folder")}
    for part, prefix, size in (("train", "train", count), ("test", "t10k", test_count)):
        images, labels = (values[:size] for values in load_images(mnist, part == "train", silent))
        for form in ("idx", "csv"):
            places[form].mkdir(exist_ok=True)
        write_idx(places["idx"] / f"{prefix}-images-idx3-ubyte", images.contiguous())
        write_idx(places["idx"] / f"{prefix}-labels-idx1-ubyte", labels.to(torch.uint8))
        rows = np.column_stack([labels.numpy(), images.numpy().reshape(size, -1)])
        header = ",".join(["label", *(f"pixel{place}" for place in range(784))])
        np.savetxt(places["csv"] / f"{part}.csv", rows, "%d", ",", header=header, comments="")
        for number, (image, label) in enumerate(zip(images.numpy(), labels.tolist(), strict=True)):
            path = places["folder"] / part / str(label) / f"{number:05}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    for path in shutil.copytree(places["idx"], places["gz"]).iterdir():
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    return places


@pytest.mark.long
def test_ten_other_classes(tmp_path, capsys):
    """scikit-learn's digits, 8x8, of other hands: trained, evaluated, exported, compared and voting on their own."""
    sets = load_digits()
    for number, (image, label) in enumerate(zip(np.rint(sets.images * 255 / 16), sets.target, strict=True)):
        path = tmp_path / "digits" / f"no{label}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.astype(np.uint8)).save(path)
    results = ["--output_dir", str(tmp_path)]
    flags = ["--dataset", str(tmp_path / "digits"), "--data_dir", str(tmp_path / "data"), *results, "--name", "ten"]
    recipe = ["--scheduler", "onecycle", "--epochs", "12", "--batch_size", "30", "--max_lr", "0.2", "--threads", "1"]
    assert command.main([*flags, *recipe, "--val_split", "200"]) == 0
    metrics = load_metrics_json("ten", tmp_path)
    accuracy, data = metrics["test_acc"][-1], metrics["data"]
    assert accuracy > 90
    assert (data["classes"], data["train_images"] + data["test_images"]) == ([f"no{n}" for n in range(10)], 1797)
    assert evaluate(["--name", "ten", *results]) == 0
    assert export(["--name", "ten", "--precision", "fp32", *results]) == 0
    for what, found in (("evaluation", "accuracy"), ("export", "pytorch")):
        measured = json.loads((tmp_path / "outputs" / f"ten_{what}.json").read_text())
        assert measured["images"] == data["test_images"]
        right = measured[found] if what == "evaluation" else measured[found]["accuracy"]
        assert right == pytest.approx(accuracy, abs=1e-3)
    assert ensemble.main(["--members", "ten", *results]) == 0
    assert json.loads((tmp_path / "outputs" / "ensemble.json").read_text())["accuracy"] == pytest.approx(
        accuracy, abs=1e-3
    )
    assert compare(results) == 0
    assert f"{accuracy:.2f}%" in capsys.readouterr().out
    assert predict.main([str(tmp_path / "digits" / "no3"), "--name", "ten", *results]) == 0
    answers = [line.split()[1] for line in capsys.readouterr().out.splitlines()[1:]]
    assert answers.count("no3") > 0.8 * len(answers)


@pytest.mark.parametrize(
    ("count", "test_count", "most"), [(600, 200, 100), pytest.param(12_000, 10_000, 0.5, marks=pytest.mark.long)]
)
def test_the_same_images_give_the_same_weights(mnist, tmp_path, count, test_count, most):
    """3 s: bit for bit; in the order of a folder as accurate, which 600 images do not tell."""
    digests, accuracies = {}, {}
    for form, place in same_images(tmp_path, mnist, count, test_count).items():
        places = {"dataset": str(place), "data_dir": str(tmp_path / "data"), "output_dir": str(tmp_path / "out")}
        config = TrainConfig(**places, name=form, scheduler="onecycle", epochs=3, threads=1)
        accuracies[form] = train_and_evaluate(config, silent).metrics["test_acc"][-1]
        state = torch.load(config.files.params, weights_only=True)
        digests[form] = b"".join(value.numpy().tobytes() for value in state.values())
    assert digests["idx"] == digests["gz"] == digests["csv"]
    print(accuracies)
    assert abs(accuracies["folder"] - accuracies["idx"]) <= most, accuracies
