"""The exported files of the shipped networks, each run by the runtime that an app would use."""

import hashlib
import itertools
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import onnxruntime
import pytest
from conftest import make_tiny_mnist, write_idx, write_sums

from common.files import PROJECT_DIR
from data_utils import load_images
from imports import torch
from model_strategy import get_strategy
from tools.export import __main__ as export
from tools.export.files import ROUNDS, measure_latency
from tools.export.formats import MAX_BATCH
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
            from executorch.runtime import Runtime

            self.program = Runtime.get().load_program(path)
            self.method = self.program.load_method("forward")

    def metadata(self):
        if hasattr(self, "session"):
            return self.session.get_modelmeta().custom_metadata_map
        keys = self.program.method_names - {"forward"}
        return {key: self.program.load_method(key).execute([])[0] for key in keys}

    def __call__(self, images):
        if hasattr(self, "session"):
            return self.session.run(["probabilities"], {"image": images})[0]
        return self.method.execute([torch.from_numpy(images)])[0].numpy()


class Exported(NamedTuple):
    """A folder with every file of some networks, and the images that they were measured on."""

    folder: Path
    names: list[str]
    images: np.ndarray  # uint8 [N, 1, 28, 28]
    labels: np.ndarray

    kinds: list[str]

    def path(self, kind: str) -> Path:
        """One network's file of a kind."""
        return self.folder / "outputs" / f"{self.names[-1]}_{kind}"


def some_of_mnist(mnist: Path, folder: Path) -> Path:
    """A data set of one's own: the first 1,200 training and 400 test images of the real one."""
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for train, prefix, count in ((True, "train", 1200), (False, "t10k", 400)):
        images, labels = load_images(mnist, train=train)
        write_idx(raw / f"{prefix}-images-idx3-ubyte", images[:count])
        write_idx(raw / f"{prefix}-labels-idx1-ubyte", labels[:count].to(torch.uint8))
    write_sums(raw)
    return folder


@pytest.fixture(scope="session", params=["one", pytest.param("all", marks=pytest.mark.long)])
def exported(request, mnist, shipped_project, once) -> Exported:
    """All that there is. In the first tier, 12 s: model 3 as ONNX, held against a few real images."""
    everything = request.param == "all"
    names, kinds = (NAMES, KINDS) if everything else (NAMES[-1:], KINDS[:2])
    data = mnist if everything else once("some_of_mnist", lambda folder: some_of_mnist(mnist, folder))
    flags = ["--format", "all" if everything else "onnx", "--data_dir", str(data)]

    def make(folder: Path) -> None:
        (folder / "outputs").mkdir()
        for name in names:
            for ending in ("_params.pth", "_metrics.json"):
                shutil.copy(shipped_project / "outputs" / f"{name}{ending}", folder / "outputs")
            assert export.main(["--name", name, *flags, "--output_dir", str(folder)]) == 0

    folder = once(f"exported_{request.param}", make)
    images, labels = load_images(data, train=False)
    return Exported(folder, names, images.unsqueeze(1).numpy(), labels.numpy(), kinds)


@pytest.fixture(scope="session")
def expected(exported):
    """Name -> the float32 network's probabilities of the test images, by PyTorch alone."""
    images = (torch.from_numpy(exported.images).float() / 255 - 0.1307) / 0.3081
    found = {}
    for name in exported.names:
        model = load_model_params(get_strategy(name[-1]).build(), name, exported.folder)
        with torch.inference_mode():
            found[name] = torch.cat([model(part).exp() for part in images.split(1000)]).numpy()
    return found


def test_a_file_is_as_good_as_its_network(exported, expected):
    for name, kind in itertools.product(exported.names, exported.kinds):
        path = exported.folder / "outputs" / f"{name}_{kind}"
        phone, images = Phone(path), exported.images
        found = np.concatenate([phone(images[start : start + 100]) for start in range(0, len(images), 100)])
        assert found.dtype == np.float32
        assert np.allclose(found.sum(1), 1, atol=1e-5)
        accuracy = 100 * (found.argmax(1) == exported.labels).mean()
        drop = 100 * (expected[name].argmax(1) == exported.labels).mean() - accuracy
        if kind.startswith("fp32"):
            assert (found.argmax(1) == expected[name].argmax(1)).all()
            assert np.abs(found - expected[name]).max() < 1e-4
        else:
            assert drop <= 0.10 + 1e-9
            assert path.stat().st_size <= 40_000

        results = json.loads((exported.folder / "outputs" / f"{name}_export.json").read_text())
        assert (results["schema"], results["name"], results["images"]) == (1, name, len(images))
        (row,) = [row for row in results["files"] if row["file"] == path.name]
        assert row["bytes"] == path.stat().st_size
        assert row["accuracy"] == pytest.approx(accuracy)
        assert row["drop"] == pytest.approx(drop, abs=1e-4)
        assert row["equal_decisions"] == pytest.approx((found.argmax(1) == expected[name].argmax(1)).mean())
        assert row["largest_difference"] == pytest.approx(np.abs(found - expected[name]).max(), abs=1e-5)


def test_what_is_measured(exported):
    for name in exported.names:
        results = json.loads((exported.folder / "outputs" / f"{name}_export.json").read_text())
        assert [row["file"] for row in results["files"]] == [f"{name}_{kind}" for kind in exported.kinds]
        for row in (results["pytorch"], *results["files"]):
            assert 0 < row["latency_ms"]["1"] < row["latency_ms"]["100"]
        held_out = 10_000 if len(exported.images) == 10_000 else 200
        assert (results["held_out_images"], results["calibration_images"]) == (held_out, 1000)


def test_any_number_of_images(exported):
    images = exported.images
    for kind in exported.kinds:
        phone = Phone(exported.path(kind))
        together = phone(images[:100])
        for count in (1, 2, 17, 99):
            assert phone(images[:count]).shape == (count, 10)
            assert np.allclose(phone(images[:count]), together[:count], atol=1e-5)
        if kind.endswith("onnx"):
            assert np.allclose(phone(images[:250])[:100], together, atol=1e-5)


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
def test_a_wrong_input_is_refused(wrong, exported):
    for kind in exported.kinds:
        phone = Phone(exported.path(kind))
        with pytest.raises(Exception, match=r"(?i)invalid|unexpected|failed"):
            phone(wrong)


@pytest.mark.long
@pytest.mark.parametrize("exported", ["all"], indirect=True)
@pytest.mark.parametrize("kind", ["fp32.pte", "int8.pte"])
def test_executorch_takes_so_many_images_at_once(kind, exported):
    phone = Phone(exported.path(kind))
    assert phone(np.zeros((MAX_BATCH, 1, 28, 28), np.uint8)).shape == (MAX_BATCH, 10)
    with pytest.raises(RuntimeError, match="set_inputs"):
        phone(np.zeros((MAX_BATCH + 1, 1, 28, 28), np.uint8))


def test_what_a_file_says_of_itself(exported):
    weights = exported.path("params.pth").read_bytes()
    rows = json.loads(exported.path("export.json").read_text())["files"]
    for kind in exported.kinds:
        path = exported.path(kind)
        metadata = Phone(path).metadata()
        assert metadata["weights_sha256"] == hashlib.sha256(weights).hexdigest()
        assert metadata["classes"].split() == [str(digit) for digit in range(10)]
        assert metadata["precision"] == kind[:4]
        assert torch.__version__.split("+")[0] in metadata["versions"]
        (accuracy,) = [row["accuracy"] for row in rows if row["file"] == path.name]
        assert metadata["accuracy"] == f"{accuracy:.2f} % of {len(exported.images)} test images"
        assert str(PROJECT_DIR).encode() not in path.read_bytes()
        assert sys.prefix.encode() not in path.read_bytes()


def test_an_onnx_file_says_what_it_takes(exported):
    model = onnx.load(exported.path("int8.onnx"))
    onnx.checker.check_model(model, full_check=True)
    ((takes,), (gives,)) = model.graph.input, model.graph.output
    assert [dim.dim_param or dim.dim_value for dim in takes.type.tensor_type.shape.dim] == ["N", 1, 28, 28]
    assert takes.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert [dim.dim_param or dim.dim_value for dim in gives.type.tensor_type.shape.dim] == ["N", 10]
    assert {"QuantizeLinear", "DequantizeLinear"} <= {node.op_type for node in model.graph.node}


def test_no_processor_saturates(exported):
    """Two products of a weight and an activation fit into the 16 bits that a processor without VNNI adds them in."""
    for name in exported.names:
        model = onnx.load(exported.folder / "outputs" / f"{name}_int8.onnx")
        weights = [
            onnx.numpy_helper.to_array(tensor)
            for tensor in model.graph.initializer
            if tensor.data_type == onnx.TensorProto.INT8 and len(tensor.dims) > 1
        ]
        assert len(weights) == 8 + (name == "mnist_model_3")  # convolutions and linear layers
        assert all(2 * 255 * np.abs(weight.astype(int)).max() < 2**15 for weight in weights)


@pytest.mark.long
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


@pytest.mark.long
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


@pytest.mark.alone
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
    monkeypatch.chdir(exported.folder)
    for snippet in snippets if "int8.pte" in exported.kinds else snippets[:1]:  # the other runs ExecuTorch
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
