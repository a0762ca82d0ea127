"""A tiny data set in MNIST's format, so that the unit tests need no network, and the real one for the rest."""

import hashlib
import io
import json
import re
import shutil
import struct
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from common.files import PROJECT_DIR
from data_utils import load_images, normalize
from image_data.fetch import MNIST_SHA256, ensure_mnist
from imports import torch
from model_strategy import get_strategy
from tools.browser import serving
from visualization import load_model_params


def write_idx(path: Path, values: torch.Tensor) -> None:
    """Write a uint8 tensor in the IDX format (a magic number, the sizes, the bytes)."""
    header = struct.pack(">HBB", 0, 8, values.dim()) + struct.pack(f">{values.dim()}I", *values.shape)
    path.write_bytes(header + values.numpy().tobytes())


def make_tiny_mnist(raw: Path, train: int = 300, test: int = 100, seed: int = 0) -> None:
    """Noisy bars, one position a class: learnable within an epoch or two, 28x28 and uint8 like the original."""
    raw.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    for prefix, count in (("train", train), ("t10k", test)):
        labels = torch.arange(count) % 10
        images = torch.randint(0, 60, (count, 28, 28), generator=generator)
        for image, label in zip(images, labels, strict=True):
            image[4:24, 4 + 2 * label : 6 + 2 * label] = 250
        write_idx(raw / f"{prefix}-images-idx3-ubyte", images.to(torch.uint8))
        write_idx(raw / f"{prefix}-labels-idx1-ubyte", labels.to(torch.uint8))


def write_sums(raw: Path) -> None:
    """Make the files in ``raw`` a data set of one's own."""
    (raw / "SHA256SUMS").write_text("".join(f"{digest}  {name}\n" for name, digest in sums_of(raw).items()))


def sums_of(raw: Path) -> dict[str, str]:
    """The SHA-256 of the four files in ``raw``."""
    return {name: hashlib.sha256((raw / name).read_bytes()).hexdigest() for name in MNIST_SHA256}


@pytest.fixture
def tiny_mnist(tmp_path: Path) -> Path:
    """A data folder with 300 training and 100 test images and the sums that make them a data set of one's own."""
    raw = tmp_path / "tiny" / "MNIST" / "raw"
    make_tiny_mnist(raw)
    write_sums(raw)
    return tmp_path / "tiny"


@pytest.fixture
def own_network(tmp_path: Path) -> Path:
    """The README's script that registers and trains a network of one's own: linear, so without any randomness."""
    readme = (PROJECT_DIR / "README.md").read_text(encoding="utf-8")
    (script,) = re.findall(r"```python\n(# my_network\.py\n.*?)```", readme, flags=re.DOTALL)
    path = tmp_path / "my_network.py"
    path.write_text(script)
    return path


@pytest.fixture(scope="session")
def mnist() -> Path:
    """The project's data folder with the real MNIST, fetched if it is not there."""
    ensure_mnist(PROJECT_DIR / "data")
    return PROJECT_DIR / "data"


@pytest.fixture(scope="session")
def shipped_project(mnist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project with the results that are committed, whatever was trained over them since."""
    copy = tmp_path_factory.mktemp("project")
    for path in PROJECT_DIR.glob("*.py"):
        shutil.copy(path, copy)
    for folder in ("models", "notebooks", "configs"):
        shutil.copytree(PROJECT_DIR / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    results = ["outputs", "plots", "summaries"]
    archive = subprocess.run(["git", "archive", "HEAD", *results], cwd=PROJECT_DIR, capture_output=True, check=False)
    if archive.returncode == 0:
        with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as committed:
            committed.extractall(copy, filter="data")
    else:  # no git, or downloaded without its history: the files are as they came
        for folder in results:
            shutil.copytree(PROJECT_DIR / folder, copy / folder)
    (copy / "data").symlink_to(mnist, target_is_directory=True)
    return copy


def write_evaluation(name: str, network: torch.nn.Module, mnist: Path, output_dir: Path) -> dict[str, Any]:
    """What ``tools.evaluate`` leaves of a run, as far as the comparison reads it, from the real test images."""
    images, labels = load_images(mnist, train=False)
    with torch.inference_mode():
        rows = torch.cat([network(normalize(part.unsqueeze(1).float())).exp() for part in images.split(1000)])
    digits, truth = rows.argmax(1).tolist(), labels.tolist()
    confusion = [[0] * 10 for _ in range(10)]
    for label, digit in zip(truth, digits, strict=True):
        confusion[label][digit] += 1
    accuracy = 100 * sum(confusion[digit][digit] for digit in range(10)) / len(truth)
    evaluation = {
        "schema": 1,
        "name": name,
        "accuracy": accuracy,
        "accuracy_interval": [accuracy - 0.15, accuracy + 0.15],
        "images": len(truth),
        "per_class": [
            {"digit": digit, "recall": 100 * confusion[digit][digit] / sum(confusion[digit])} for digit in range(10)
        ],
        "confusion": confusion,
        "mistakes": [
            {"index": index, "true": label, "predicted": digit, "confidence": rows[index, digit].item()}
            for index, (label, digit) in enumerate(zip(truth, digits, strict=True))
            if label != digit
        ],
    }
    (output_dir / "outputs" / f"{name}_evaluation.json").write_text(json.dumps(evaluation))
    return evaluation


@pytest.fixture(scope="session")
def page_folder(shipped_project: Path, mnist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output folder for the page: the shipped runs, evaluated, and an export of the first one."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "outputs").mkdir()
    for number in "123":
        name = f"mnist_model_{number}"
        for ending in ("_metrics.json", "_params.pth"):
            shutil.copy(shipped_project / "outputs" / f"{name}{ending}", folder / "outputs")
        write_evaluation(name, load_model_params(get_strategy(number).build(), name, folder), mnist, folder)
    file = {"file": "mnist_model_1.onnx", "precision": "float32", "bytes": 40000, "accuracy": 99.47}
    export = {"schema": 1, "name": "mnist_model_1", "files": [{**file, "latency_ms": {"1": 0.1, "100": 5.0}}]}
    (folder / "outputs" / "mnist_model_1_export.json").write_text(json.dumps(export))
    return folder


@pytest.fixture(scope="session")
def server(page_folder: Path) -> Iterator[str]:
    """The address of the page, served by its own command from ``page_folder``."""
    with serving("--output_dir", page_folder) as (address, _):
        yield address
