"""The exported files of the shipped networks, each run by the runtime that an app would use."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
import time

import numpy as np
import onnx
import onnxruntime
import pytest
from conftest import make_tiny_mnist, write_sums
from executorch.runtime import Runtime

from common.files import PROJECT_DIR
from imports import torch
from model_strategy import get_strategy
from tools.export import __main__ as export
from tools.export.formats import FORMATS, MAX_BATCH
from tools.export.results import ROUNDS, measure_latency
from visualization import load_model_params, save_model_params

NAMES = ["mnist_model_1", "mnist_model_2", "mnist_model_3"]
KINDS = ["fp32.onnx", "int8.onnx", "fp32.pte", "int8.pte"]


class Phone:
    """A file in its runtime, with nothing of the project's around it."""

    def __init__(self, path):
        self.contents = path.read_bytes()
        if path.suffix == ".onnx":
            self.session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        else:
            self.program = Runtime.get().load_program(path)
            self.method = self.program.load_method("forward")

    def __call__(self, images):
        if hasattr(self, "session"):
            return self.session.run(["probabilities"], {"image": images})[0]
        return self.method.execute([torch.from_numpy(images)])[0].numpy()


@pytest.fixture(scope="module")
def test_set(mnist):
    """The test images uint8 [10000, 1, 28, 28] and labels, from the IDX files."""
    raw = mnist / "MNIST" / "raw"
    images = np.frombuffer(bytearray((raw / "t10k-images-idx3-ubyte").read_bytes()), dtype=np.uint8, offset=16)
    labels = np.frombuffer((raw / "t10k-labels-idx1-ubyte").read_bytes(), dtype=np.uint8, offset=8)
    return images.reshape(-1, 1, 28, 28), labels


@pytest.fixture(scope="module")
def exported(mnist, shipped_project, tmp_path_factory):
    """A folder with every file of the three shipped networks."""
    folder = tmp_path_factory.mktemp("exported")
    (folder / "outputs").mkdir()
    for name in NAMES:
        for ending in ("_params.pth", "_metrics.json"):
            shutil.copy(shipped_project / "outputs" / f"{name}{ending}", folder / "outputs")
        assert export.main(["--name", name, "--data_dir", str(mnist), "--output_dir", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def expected(exported, test_set):
    """Name -> the float32 network's probabilities of the test images, by PyTorch alone."""
    images = (torch.from_numpy(test_set[0]).float() / 255 - 0.1307) / 0.3081
    found = {}
    for name in NAMES:
        model = load_model_params(get_strategy(name[-1]).build(), name, exported)
        with torch.inference_mode():
            found[name] = torch.cat([model(part).exp() for part in images.split(1000)]).numpy()
    return found


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_is_as_good_as_its_network(name, kind, exported, test_set, expected):
    images, labels = test_set
    path = exported / "outputs" / f"{name}_{kind}"
    phone = Phone(path)
    found = np.concatenate([phone(images[start : start + 100]) for start in range(0, 10_000, 100)])
    assert found.dtype == np.float32
    assert np.allclose(found.sum(1), 1, atol=1e-5)
    accuracy = 100 * (found.argmax(1) == labels).mean()
    drop = 100 * (expected[name].argmax(1) == labels).mean() - accuracy
    if kind.startswith("fp32"):
        assert (found.argmax(1) == expected[name].argmax(1)).all()
        assert np.abs(found - expected[name]).max() < 1e-4
    else:
        assert drop <= 0.10 + 1e-9
        assert path.stat().st_size <= 40_000

    results = json.loads((exported / "outputs" / f"{name}_export.json").read_text())
    assert (results["schema"], results["name"], results["images"]) == (1, name, 10_000)
    (row,) = [row for row in results["files"] if row["file"] == path.name]
    assert row["bytes"] == path.stat().st_size
    assert row["accuracy"] == pytest.approx(accuracy)
    assert row["drop"] == pytest.approx(drop, abs=1e-4)
    assert row["equal_decisions"] == pytest.approx((found.argmax(1) == expected[name].argmax(1)).mean())
    assert row["largest_difference"] == pytest.approx(np.abs(found - expected[name]).max(), abs=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_measured(name, exported):
    results = json.loads((exported / "outputs" / f"{name}_export.json").read_text())
    assert [row["file"] for row in results["files"]] == [f"{name}_{kind}" for kind in KINDS]
    for row in (results["pytorch"], *results["files"]):
        assert 0 < row["latency_ms"]["1"] < row["latency_ms"]["100"]
    assert (results["held_out_images"], results["calibration_images"]) == (10_000, 1000)
    assert (exported / "plots" / f"{name}_export.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("kind", KINDS)
def test_any_number_of_images(kind, exported, test_set):
    images, _ = test_set
    phone = Phone(exported / "outputs" / f"mnist_model_2_{kind}")
    together = phone(images[:100])
    for count in (1, 2, 17, 99):
        assert phone(images[:count]).shape == (count, 10)
        assert np.allclose(phone(images[:count]), together[:count], atol=1e-5)
    if kind.endswith("onnx"):
        assert np.allclose(phone(images[:250])[:100], together, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "wrong",
    [
        np.zeros((3, 1, 28, 28), np.float32),
        np.zeros((3, 1, 28, 28), np.int8),
        np.zeros((28, 28), np.uint8),
        np.zeros((3, 28, 28), np.uint8),
        np.zeros((3, 1, 27, 28), np.uint8),
        np.zeros((3, 1, 28, 56), np.uint8),
        np.zeros((3, 1, 14, 56), np.uint8),
        np.zeros((3, 1, 32, 32), np.uint8),
        np.zeros((3, 28, 28, 1), np.uint8),
        np.zeros((3, 3, 28, 28), np.uint8),
    ],
    ids=lambda array: f"{array.dtype}{list(array.shape)}",
)
def test_a_wrong_input_is_refused(kind, wrong, exported):
    phone = Phone(exported / "outputs" / f"mnist_model_3_{kind}")
    with pytest.raises(Exception, match=r"(?i)invalid|unexpected|failed"):
        phone(wrong)


@pytest.mark.parametrize("kind", ["fp32.pte", "int8.pte"])
def test_executorch_takes_so_many_images_at_once(kind, exported):
    phone = Phone(exported / "outputs" / f"mnist_model_1_{kind}")
    assert phone(np.zeros((MAX_BATCH, 1, 28, 28), np.uint8)).shape == (MAX_BATCH, 10)
    with pytest.raises(RuntimeError, match="set_inputs"):
        phone(np.zeros((MAX_BATCH + 1, 1, 28, 28), np.uint8))


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_file_says_of_itself(kind, exported):
    path = exported / "outputs" / f"mnist_model_2_{kind}"
    (form,) = [form for form in FORMATS.values() if form.suffix == path.suffix[1:]]
    metadata = form.read_metadata(path.read_bytes())
    weights = (exported / "outputs" / "mnist_model_2_params.pth").read_bytes()
    assert metadata["weights_sha256"] == hashlib.sha256(weights).hexdigest()
    assert metadata["classes"].split() == [str(digit) for digit in range(10)]
    assert metadata["precision"] == kind[:4]
    assert torch.__version__.split("+")[0] in metadata["versions"]
    rows = json.loads((exported / "outputs" / "mnist_model_2_export.json").read_text())["files"]
    (accuracy,) = [row["accuracy"] for row in rows if row["file"] == path.name]
    assert metadata["accuracy"] == f"{accuracy:.2f} % of 10000 test images"
    assert str(PROJECT_DIR).encode() not in path.read_bytes()
    assert sys.prefix.encode() not in path.read_bytes()


def test_an_onnx_file_says_what_it_takes(exported):
    model = onnx.load(exported / "outputs" / "mnist_model_1_int8.onnx")
    onnx.checker.check_model(model, full_check=True)
    ((takes,), (gives,)) = model.graph.input, model.graph.output
    assert [dim.dim_param or dim.dim_value for dim in takes.type.tensor_type.shape.dim] == ["N", 1, 28, 28]
    assert takes.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert [dim.dim_param or dim.dim_value for dim in gives.type.tensor_type.shape.dim] == ["N", 10]
    assert {"QuantizeLinear", "DequantizeLinear"} <= {node.op_type for node in model.graph.node}


@pytest.mark.parametrize("name", NAMES)
def test_no_processor_saturates(name, exported):
    """Two products of a weight and an activation fit into the 16 bits that a processor without VNNI adds them in."""
    model = onnx.load(exported / "outputs" / f"{name}_int8.onnx")
    weights = [
        onnx.numpy_helper.to_array(tensor)
        for tensor in model.graph.initializer
        if tensor.data_type == onnx.TensorProto.INT8 and len(tensor.dims) > 1
    ]
    assert len(weights) == 8 + (name == "mnist_model_3")  # convolutions and linear layers
    assert all(2 * 255 * np.abs(weight.astype(int)).max() < 2**15 for weight in weights)


def test_a_file_that_loses_too_much_is_refused(mnist, shipped_project, tmp_path, capsys):
    """One channel a ten-thousandfold larger, undone by the next convolution: nothing to float32, much to 8 bits."""
    (tmp_path / "outputs").mkdir()
    model = load_model_params(get_strategy("1").build(), "mnist_model_1", shipped_project)
    norm, following = model.stem[0][2], model.stem[1][0]
    with torch.no_grad():
        norm.weight[0] *= 1e4
        norm.bias[0] *= 1e4
        following.weight[:, 0] /= 1e4
    save_model_params(model, "spread", tmp_path)
    before = tmp_path / "outputs" / "spread_int8.onnx"
    before.write_bytes(b"an earlier file")
    flags = ["--model", "1", "--name", "spread", "--format", "onnx", "--data_dir", str(mnist)]
    assert export.main([*flags, "--output_dir", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert re.fullmatch(r"tools\.export: spread_int8\.onnx loses \d+\.\d\d points on 10000 .*\n", error)
    assert before.read_bytes() == b"an earlier file"
    results = json.loads((tmp_path / "outputs" / "spread_export.json").read_text())
    assert [row["file"] for row in results["files"]] == ["spread_fp32.onnx"]


def test_the_test_images_choose_nothing(shipped_project, tmp_path):
    """Files made beside two test sets differ in the accuracy that they note alone."""
    made = []
    for folder, seed in ((tmp_path / "a", 0), (tmp_path / "b", 1)):
        raw = folder / "data" / "MNIST" / "raw"
        make_tiny_mnist(raw)
        make_tiny_mnist(folder / "other", seed=seed)
        for name in ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"):
            shutil.copy(folder / "other" / name, raw)
        write_sums(raw)
        (folder / "outputs").mkdir()
        shutil.copy(shipped_project / "outputs" / "mnist_model_1_params.pth", folder / "outputs")
        flags = ["--model", "1", "--format", "onnx", "--precision", "int8", "--max_drop", "100"]
        assert export.main([*flags, "--data_dir", str(folder / "data"), "--output_dir", str(folder)]) == 0
        model = onnx.load(folder / "outputs" / "mnist_model_1_int8.onnx")
        del model.metadata_props[:]
        made.append(model.SerializeToString())
    assert made[0] == made[1]


def test_runners_take_turns():
    order = []

    def runner(name, seconds):
        def run(images):
            assert torch.get_num_threads() == 1
            order.append(name)
            time.sleep(seconds)
            return images

        return run

    threads = torch.get_num_threads()
    latency = measure_latency({"slow": runner("s", 2e-3), "fast": runner("f", 2e-4)}, torch.zeros(100, 1))
    assert torch.get_num_threads() == threads
    assert latency["slow"]["1"] >= 2
    assert 0.2 <= latency["fast"]["1"] < latency["slow"]["1"]
    assert "".join(order).count("sf") == 2 * (ROUNDS + 1)


def test_the_guide_runs(exported, monkeypatch):
    """The Python of docs/export.md, as it stands there."""
    guide = (PROJECT_DIR / "docs" / "export.md").read_text(encoding="utf-8")
    snippets = re.findall(r"```python\n(.*?)```", guide, flags=re.DOTALL)
    assert len(snippets) == 2
    monkeypatch.chdir(exported)
    for snippet in snippets:
        values = {}
        exec(snippet, values)
        assert np.asarray(values["probabilities"]).shape == (1, 10)


def test_the_guide_shows_what_was_measured(shipped_project):
    guide = (PROJECT_DIR / "docs" / "export.md").read_text(encoding="utf-8")
    measured = [json.loads((shipped_project / "outputs" / f"{name}_export.json").read_text()) for name in NAMES]
    for results in measured:
        weights = (shipped_project / "outputs" / f"{results['name']}_params.pth").read_bytes()
        assert results["weights_sha256"] == hashlib.sha256(weights).hexdigest()
        results["pytorch"] |= {"equal_decisions": 1.0}
    for place, label in enumerate(["PyTorch", *(f"`{kind}`" for kind in KINDS)]):
        rows = [[results["pytorch"], *results["files"]][place] for results in measured]
        cells = [
            " / ".join(f"{row['bytes'] / 1000:.0f}" for row in rows),
            " / ".join(f"{row['accuracy']:.2f}" for row in rows),
            " / ".join(f"{row['equal_decisions']:.2%}" for row in rows),
            " / ".join(f"{row['latency_ms']['1']:.3f}" for row in rows),
            " / ".join(f"{row['latency_ms']['100']:.1f}" for row in rows),
        ]
        assert f"| {label} | {' | '.join(cells)} |" in guide


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --model or --name"),
        (["--model", "7"], "invalid choice: '7'"),
        (["--model", "1", "--format", "tflite"], "invalid choice: 'tflite'"),
        (["--model", "1", "--precision", "int4"], "invalid choice: 'int4'"),
        (["--model", "1", "--max_drop", "nan"], "max_drop: nan is not allowed; it must be from 0 to 100 points"),
        (["--model", "1", "--max_drop", "-1"], "max_drop: -1.0 is not allowed"),
        (["--name", "../x"], "name: '../x' is not allowed"),
        (["--name", "absent"], "runs with such a file in that folder: mnist_model_1"),
        (["--model", "1", "--name", "mnist_model_3"], "they fit model 3"),
    ],
)
def test_wrong_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        export.main(arguments)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_help_needs_no_torch():
    code = "import sys, runpy; sys.argv[1:] = ['--help']\n"
    code += "try: runpy.run_module('tools.export', run_name='__main__')\n"
    code += "except SystemExit: sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT_DIR, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "--max_drop" in done.stdout
