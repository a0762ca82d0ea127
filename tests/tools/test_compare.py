import base64
import json
import re
import shutil

import numpy as np
import pytest

from tools.compare import __main__ as compare
from tools.compare.comparer import Comparer
from visualization import load_metrics_json

NAMES = ["mnist_model_1", "mnist_model_2", "mnist_model_3"]


@pytest.fixture(scope="module")
def comparison(page_folder, mnist):
    """3 s: three networks on all test images."""
    return Comparer(str(page_folder), str(mnist)).compare()


def test_rows(comparison, page_folder):
    assert sorted(row.name for row in comparison.rows) == NAMES
    for row in comparison.rows:
        metrics = load_metrics_json(row.name, page_folder)
        assert row.accuracy == metrics["test_acc"][-1]
        assert row.best_accuracy == max(metrics["test_acc"])
        assert (row.parameters, row.epochs, row.seconds) == (metrics["parameters"], 15, metrics["total_seconds"])
        assert row.bytes == (page_folder / "outputs" / f"{row.name}_params.pth").stat().st_size
        assert row.latency_ms > 0.01
        assert (row.status, row.scheduler, row.kind) == ("finished", "onecycle", "network")
    assert [row.accuracy for row in comparison.rows] == sorted((row.accuracy for row in comparison.rows), reverse=True)


def test_disagreements_are_those_of_the_evaluations(comparison, page_folder, test_set):
    images, labels = test_set
    wrong = {}
    for name in NAMES:
        found = json.loads((page_folder / "outputs" / f"{name}_evaluation.json").read_text())
        wrong[name] = {entry["index"]: entry["predicted"] for entry in found["mistakes"]}
    expected = {
        index: {name: wrong[name].get(index, int(labels[index])) for name in NAMES}
        for index in set().union(*wrong.values())
    }
    expected = {index: answers for index, answers in expected.items() if len(set(answers.values())) > 1}
    assert {entry["index"]: entry["predicted"] for entry in comparison.disagreements} == expected
    assert len(expected) > 20
    for entry in comparison.disagreements:
        assert entry["true"] == labels[entry["index"]]
        assert np.array_equal(
            np.frombuffer(base64.b64decode(entry["pixels"]), dtype=np.uint8), images[entry["index"]].flatten().numpy()
        )


def test_what_is_missing_is_named_with_its_command(comparison, page_folder):
    missing = {entry["what"]: entry["command"] for entry in comparison.missing}
    assert missing.keys() == {
        "the export of mnist_model_2",
        "the export of mnist_model_3",
        "an ensemble of the networks",
    }
    assert missing["the export of mnist_model_2"] == (
        f"python -m tools.export --name mnist_model_2 --output_dir {page_folder}"
    )
    assert comparison.exports["mnist_model_1"][0]["latency_ms"] == 0.1


def test_a_choice_of_runs(page_folder, mnist):
    found = Comparer(str(page_folder), str(mnist)).compare(["mnist_model_2"])
    assert len(found.rows) == 3
    assert found.chosen == list(found.curves) == list(found.evaluations) == ["mnist_model_2"]
    assert found.disagreements == []


def test_an_ensemble_has_a_row(page_folder, tmp_path):
    shutil.copytree(page_folder / "outputs", tmp_path / "outputs")
    facts = {
        "schema": 1,
        "name": "ensemble",
        "kind": "ensemble",
        "members": NAMES,
        "models": ["1", "2", "3"],
        "method": "soft",
        "weights": [1, 1, 1],
    }
    path = tmp_path / "outputs" / "ensemble.json"
    path.write_text(json.dumps({**facts, "temperature": 1.0, "accuracy": 99.6, "parameters": 24100}))
    found = Comparer(str(tmp_path)).compare()
    first = found.rows[0]
    assert (first.name, first.kind, first.accuracy, first.parameters) == ("ensemble", "ensemble", 99.6, 24100)
    assert "an ensemble of the networks" not in [entry["what"] for entry in found.missing]
    path.write_text("{")
    found = Comparer(str(tmp_path)).compare()
    assert len(found.rows) == 3
    assert "ensemble.json is damaged" in found.problems[0]


def test_damaged_files_are_told_and_left_out(page_folder, tmp_path):
    shutil.copytree(page_folder / "outputs", tmp_path / "outputs")
    (tmp_path / "outputs" / "mnist_model_1_metrics.json").write_text("{}")
    (tmp_path / "outputs" / "mnist_model_2_evaluation.json").write_text('{"confusion": [[1]]}')
    found = Comparer(str(tmp_path)).compare()
    assert [row.name for row in found.rows] == ["mnist_model_3", "mnist_model_2"]
    assert sorted(re.findall(r"mnist_model_\d_\w+", "".join(found.problems))) == [
        "mnist_model_1_metrics",
        "mnist_model_2_evaluation",
    ]
    assert list(found.evaluations) == ["mnist_model_3"]


def test_an_evaluation_of_other_weights_is_marked(page_folder, tmp_path):
    shutil.copytree(page_folder / "outputs", tmp_path / "outputs")
    path = tmp_path / "outputs" / "mnist_model_1_evaluation.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "accuracy": 98.0}))
    found = Comparer(str(tmp_path)).compare()
    assert {name: evaluation["stale"] for name, evaluation in found.evaluations.items()} == {
        "mnist_model_1": True,
        "mnist_model_2": False,
        "mnist_model_3": False,
    }


def test_the_command(page_folder, mnist, tmp_path, capsys):
    output = tmp_path / "sent.html"
    arguments = ["mnist_model_1", "mnist_model_3", "--output", str(output)]
    assert compare.main([*arguments, "--output_dir", str(page_folder), "--data_dir", str(mnist)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["run", "accuracy", "parameters"]
    assert {line.split()[0] for line in lines[1:3]} == {"mnist_model_1", "mnist_model_3"}
    assert lines[3] == f"written to {output}"
    html = output.read_text(encoding="utf-8")
    assert not re.findall(r"(?:src|href)=[\"'](?!data:)", html.replace(compare_script(), ""))
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    assert json.loads(data)["chosen"] == [line.split()[0] for line in lines[1:3]]


def compare_script() -> str:
    from plotly.offline import get_plotlyjs

    return get_plotlyjs()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none"], "there is no run none; there are mnist_model_"),
        (["../x"], "name: '../x' is not allowed"),
        (["--output", "/nowhere/x.html"], "output: the folder /nowhere does not exist"),
        (["--output_dir", "/nowhere"], "output: the folder /nowhere/outputs does not exist"),
        (["--frobnicate"], "unrecognized arguments"),
    ],
)
def test_wrong_arguments(arguments, message, page_folder, tmp_path, capsys):
    defaults = [] if "--output_dir" in arguments else ["--output_dir", str(page_folder)]
    with pytest.raises(SystemExit) as caught:
        compare.main([*arguments, *defaults])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_no_run_yet(tmp_path, capsys):
    (tmp_path / "outputs").mkdir()
    with pytest.raises(SystemExit):
        compare.main(["--output_dir", str(tmp_path)])
    assert "there is no run under" in capsys.readouterr().err
    assert not list((tmp_path / "outputs").iterdir())
