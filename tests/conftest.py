"""A tiny data set in MNIST's format, so that the unit tests need no network, and the real one for the rest."""

import hashlib
import io
import re
import shutil
import struct
import subprocess
import tarfile
from pathlib import Path

import pytest

from file_utils import PROJECT_DIR
from imports import torch
from mnist_files import MNIST_SHA256, ensure_mnist


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
