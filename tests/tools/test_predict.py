import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from common.files import PROJECT_DIR
from tools import predict
from tools.networks import Networks, known_networks
from visualization import load_metrics_json


@pytest.fixture
def scans(test_set, tmp_path) -> list[str]:
    images, labels = test_set
    paths = []
    for index in range(5):
        path = tmp_path / f"{index}_is_{labels[index]}.png"
        Image.fromarray(255 - images[index].numpy()).resize((200, 200)).save(path)
        paths.append(str(path))
    return paths


def test_a_table_of_digits(scans, shipped_project, capsys):
    assert predict.main([*scans, "--name", "mnist_model_3", "--output_dir", str(shipped_project)]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["image", "digit", "confidence", "second", "choice"]
    assert [line.split()[0] for line in lines] == scans
    assert [line.split()[1] for line in lines] == [path[-5] for path in scans]
    assert all(90 < float(line.split()[2].rstrip("%")) <= 100 for line in lines)


def test_a_number_is_read(shipped_project, capsys):
    cases = [str(PROJECT_DIR / "tests" / "cases" / f"{name}.png") for name in ("407", "lamp_10")]
    assert predict.main([*cases, "--name", "mnist_model_3", "--output_dir", str(shipped_project)]) == 0
    _, *rows, empty, reads, text = capsys.readouterr().out.splitlines()
    assert [row.split()[:2] for row in rows] == [[cases[0], "4"], [cases[0], "0"], [cases[0], "7"], [cases[1], "7"]]
    assert [row.split(", ")[-1] for row in rows[:3:2]] == ["147x303 pixels at 54,98", "148x309 pixels at 760,94"]
    assert (empty, reads, text) == ("", f"{cases[0]} reads", "407")


def test_json(scans, shipped_project, tmp_path, capsys):
    Image.new("L", (50, 50), 255).save(tmp_path / "empty.png")
    case = str(PROJECT_DIR / "tests" / "cases" / "seventyseven.png")
    arguments = [scans[0], case, str(tmp_path / "empty.png"), "--json", "--output_dir", str(shipped_project)]
    assert predict.main(arguments) == 0
    one, several, none = json.loads(capsys.readouterr().out)
    assert (one["image"], one["text"], none["text"], none["digits"]) == (scans[0], scans[0][-5], "", [])
    assert several["text"] == "77"
    assert [digit["box"] for digit in several["digits"]] == [[180, 144, 137, 209], [580, 144, 137, 209]]
    assert all(digit["digit"] == 7 and digit["confidence"] > 0.9 for digit in several["digits"])


def test_an_empty_image_has_no_digit(scans, shipped_project, tmp_path, capsys):
    Image.new("L", (50, 50), 255).save(tmp_path / "empty.png")
    assert predict.main([scans[0], str(tmp_path / "empty.png"), "--output_dir", str(shipped_project)]) == 0
    assert capsys.readouterr().out.splitlines()[2].endswith("-  nothing is drawn on it")


def test_a_damaged_picture_among_others_has_its_own_line(scans, shipped_project, tmp_path, capsys):
    whole = Path(scans[0]).read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    arguments = [scans[0], str(tmp_path / "half.png"), scans[1], "--output_dir", str(shipped_project)]
    assert predict.main(arguments) == 1
    said = capsys.readouterr()
    assert [line.split()[0] for line in said.out.splitlines()[1:]] == scans[:2]
    (problem,) = said.err.splitlines()
    assert problem.startswith(f"{tmp_path / 'half.png'}: the image is damaged")


def test_folders_and_patterns_that_the_shell_left_alone(scans, shipped_project, tmp_path, capsys):
    folder = tmp_path / "scans"
    folder.mkdir()
    expected = [shutil.copy(path, str(folder / f"{number}.png")) for number, path in enumerate(scans)]
    for argument in (str(folder), str(folder / "*.png")):
        assert predict.main([argument, "--output_dir", str(shipped_project)]) == 0
        assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]] == expected


def test_a_console_that_lacks_a_character(scans, shipped_project, tmp_path, monkeypatch):
    """And one that is none, as Jupyter's output, or closed."""
    path = shutil.copy(scans[0], tmp_path / "数字.png")
    arguments = [str(path), "--output_dir", str(shipped_project)]
    for stream in (io.TextIOWrapper(io.BytesIO(), encoding="cp1252"), io.StringIO()):
        monkeypatch.setattr("sys.stdout", stream)
        assert predict.main(arguments) == 0
        stream.seek(0)
        assert ("??.png" if isinstance(stream, io.TextIOWrapper) else "数字.png") in stream.read()
    monkeypatch.setattr("sys.stdout", None)
    assert predict.main(arguments) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: IMAGE"),
        (["absent.png"], "absent.png is no file"),
        (["{folder}/text.png"], "text.png: this is no PNG, JPEG, WEBP, BMP, GIF or TIFF image"),
        (["{folder}/0_is_7.png", "--name", "../x"], "name: '../x' is not allowed"),
        (["{folder}/0_is_7.png", "--name", "none", "--output_dir", "{folder}"], "none_metrics.json does not exist"),
    ],
)
def test_wrong_arguments(arguments, message, scans, tmp_path, capsys):
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(SystemExit) as caught:
        predict.main([word.format(folder=tmp_path) for word in arguments])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("tool", ["predict", "compare", "web"])
def test_help_answers_without_torch(tool):
    seconds = []
    for _ in range(3):
        before = os.times()
        command = [sys.executable, "-X", "importtime", "-m", f"tools.{tool}", "--help"]
        done = subprocess.run(command, cwd=PROJECT_DIR, capture_output=True, text=True, check=True)
        seconds.append(sum(os.times()[2:4]) - sum(before[2:4]))
        assert not any(line.endswith(" torch") for line in done.stderr.splitlines())
    assert min(seconds) < 0.5  # of the processor's, whatever else it has to do


def test_networks_follow_their_files(shipped_project, tmp_path):
    said: list[str] = []
    networks = Networks(str(tmp_path), log=said.append)
    (tmp_path / "outputs").mkdir()
    assert networks.all() == []
    for ending in ("_metrics.json", "_params.pth"):
        shutil.copy(shipped_project / "outputs" / f"mnist_model_1{ending}", tmp_path / "outputs")
    (first,) = networks.all()
    accuracy = load_metrics_json("mnist_model_1", shipped_project)["test_acc"][-1]
    assert (first.name, first.kind, first.parameters, first.accuracy) == ("mnist_model_1", "network", 7720, accuracy)
    assert networks.all()[0] is first
    shutil.copy(
        shipped_project / "outputs" / "mnist_model_3_params.pth", tmp_path / "outputs" / "mnist_model_1_params.pth"
    )
    assert networks.all() == []
    assert networks.all() == []
    assert len(said) == 1  # once, not at every look
    assert "they fit model 3" in said[0]
    shutil.copy(tmp_path / "outputs" / "mnist_model_1_metrics.json", tmp_path / "outputs" / "no name_metrics.json")
    assert "no name" not in known_networks(str(tmp_path))


def test_a_twin_is_no_network_of_its_own(shipped_project, tmp_path):
    (tmp_path / "outputs").mkdir()
    for name in ("mine", "mine_held_out", "other_held_out"):
        for ending in ("_metrics.json", "_params.pth"):
            shutil.copy(
                shipped_project / "outputs" / f"mnist_model_1{ending}", tmp_path / "outputs" / f"{name}{ending}"
            )
    assert known_networks(str(tmp_path)) == ["mine", "other_held_out"]


def test_an_ensemble_hides_its_own_members_alone(shipped_project, tmp_path):
    (tmp_path / "outputs").mkdir()
    for name in ("mnist_model_1", "mnist_model_1_seed_2"):
        for ending in ("_metrics.json", "_params.pth"):
            shutil.copy(shipped_project / f"outputs/mnist_model_1{ending}", tmp_path / f"outputs/{name}{ending}")
    (tmp_path / "outputs" / "mnist.json").write_text('{"kind": "ensemble"}')
    assert known_networks(str(tmp_path)) == ["mnist", "mnist_model_1"]


def test_a_damaged_ensemble_is_left_out(shipped_project, tmp_path):
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs" / "ensemble.json").write_text('{"kind": "ensemble", "accuracy": "high"}')
    said: list[str] = []
    assert Networks(str(tmp_path), log=said.append).all() == []
    assert "accuracy, parameters, members missing or of another type" in said[0]
