"""Data, runs and processes that many tests share.

    make test                       the first tier: minutes, on every core
    make test-long                  what needs long series, PostgreSQL, all networks, hundreds of draws, or the clock
    pytest tests/test_main.py       one file of the first tier
    pytest -m long tests/tools      the long tests of a folder
    make coverage                   which lines the first tier runs

Marks: ``long`` keeps a test out of the first tier, ``alone`` also from running beside others, since it times something.
What two workers of pytest-xdist would both make is made once, under a lock.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before PyTorch is loaded: the workers share the cores between them

import contextlib
import hashlib
import io
import json
import re
import shutil
import struct
import subprocess
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from forking import SECONDS, Forked, ForkServer
from hypothesis import HealthCheck, settings

import tools.benchmark.accuracy
import tools.trainings
from common.cli import silent
from common.files import PROJECT_DIR, RunFiles, UsageError
from data_utils import load_images, normalize
from image_data.fetch import MNIST_SHA256, ensure_mnist
from imports import FileLock, torch
from model_strategy import get_strategy
from tests.browser import chromium
from training.config import TrainConfig
from training.run import StoppedError
from training.train import train_and_evaluate
from visualization import load_model_params

torch.set_num_threads(1)
# Nothing that a busy machine could fail, and nothing left in the project's folder.
settings.register_profile("tests", deadline=None, database=None, suppress_health_check=list(HealthCheck))
settings.load_profile("tests")

# ---------------------------------------------------------------------------------------------------------------------
# once for all workers
# ---------------------------------------------------------------------------------------------------------------------

Once = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Once:
    """``once(name, make)``: a folder that ``make(folder)`` fills, for the first worker that asks for it."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent

    def make_once(name: str, make: Callable[[Path], object]) -> Path:
        folder, made = shared / name, shared / f"{name}.made"
        with FileLock(shared / f"{name}.lock"):
            if not made.exists():
                shutil.rmtree(folder, ignore_errors=True)  # of a worker that failed
                folder.mkdir()
                make(folder)
                made.touch()
        return folder

    return make_once


# ---------------------------------------------------------------------------------------------------------------------
# processes
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def fork_server() -> Iterator[ForkServer]:
    """This worker's own. The first test that uses it waits until it has loaded PyTorch, 4 s and more."""
    server = ForkServer()
    yield server
    server.close()


@pytest.fixture
def python(fork_server: ForkServer) -> Iterator[Callable[..., Forked]]:
    """Starts ``python ARGUMENTS``; the process and all that it started end with the test."""
    with contextlib.ExitStack() as stack:

        def start(*arguments: object, **options: Any) -> Forked:
            process = fork_server.start(arguments, **options)
            stack.callback(process.end)
            return process

        yield start


def finished(process: Forked) -> "subprocess.CompletedProcess[str]":
    """What came of a process, when it has ended."""
    out, err = process.communicate()
    return subprocess.CompletedProcess(process.args, process.wait(), out, err)


def eventually(condition: Callable[[], Any], process: "Forked | None" = None) -> Any:
    """The first true answer of ``condition``, waited for as long as ``process`` lives, and for minutes at most."""
    deadline = time.monotonic() + SECONDS
    while not (answer := condition()):
        if process is not None and process.poll() is not None:
            pytest.fail(f"it ended before, with status {process.returncode}: {process.stderr.read()}")
        if time.monotonic() > deadline:
            pytest.fail(f"not within {SECONDS} seconds")
        time.sleep(0.01)
    return answer


# ---------------------------------------------------------------------------------------------------------------------
# a tiny data set, and runs on it
# ---------------------------------------------------------------------------------------------------------------------


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


def make_tiny_data(folder: Path, train: int = 300, test: int = 100) -> Path:
    """Make ``folder`` a data folder of noisy bars, with the sums that make them a data set of one's own."""
    raw = folder / "MNIST" / "raw"
    make_tiny_mnist(raw, train, test)
    write_sums(raw)
    return folder


@pytest.fixture
def tiny_mnist(tmp_path: Path) -> Path:
    """A data folder with 300 training and 100 test images, the test's own."""
    return make_tiny_data(tmp_path / "tiny")


@pytest.fixture(scope="session")
def tiny(once: Once) -> Path:
    """As ``tiny_mnist``, but everybody's: only to be read."""
    return once("tiny", make_tiny_data)


class StopAfter:
    """Asks a run to stop after so many batches."""

    def __init__(self, batches: int) -> None:
        self.left = batches

    def __call__(self) -> bool:
        self.left -= 1
        return self.left <= 0


RUN = {"name": "run", "epochs": 4, "batch_size": 60, "device": "cpu"}  # 5 batches an epoch


@pytest.fixture(scope="session")
def a_finished_run(tiny: Path, once: Once) -> Path:
    """The output folder of the finished run ``run`` on ``tiny``: only to be read."""

    def train(folder: Path) -> None:
        train_and_evaluate(TrainConfig(**RUN, data_dir=str(tiny), output_dir=str(folder)), silent)

    return once("finished", train)


@pytest.fixture(scope="session")
def a_stopped_run(tiny: Path, once: Once) -> Path:
    """The same, stopped in its third epoch."""

    def train(folder: Path) -> None:
        with pytest.raises(StoppedError):
            train_and_evaluate(
                TrainConfig(**RUN, data_dir=str(tiny), output_dir=str(folder)), silent, stop_requested=StopAfter(13)
            )

    return once("stopped", train)


@pytest.fixture
def finished_run(a_finished_run: Path, tmp_path: Path) -> RunFiles:
    """The files of a finished run, the test's own."""
    return RunFiles("run", shutil.copytree(a_finished_run, tmp_path / "finished"))


@pytest.fixture
def stopped_run(a_stopped_run: Path, tmp_path: Path) -> RunFiles:
    """The files of a run that was stopped in its third epoch, the test's own."""
    return RunFiles("run", shutil.copytree(a_stopped_run, tmp_path / "stopped"))


@contextlib.contextmanager
def training_here() -> Iterator[None]:
    """Within, tools train in this process in place of new ones, one run after the other."""
    alone = threading.Lock()

    def train_here(config: TrainConfig) -> float:
        with alone:
            return float(train_and_evaluate(config, silent).metrics["total_seconds"])

    with pytest.MonkeyPatch.context() as patch:
        for module in (tools.trainings, tools.benchmark.accuracy):
            patch.setattr(module, "train_in_a_process", train_here)
        yield


# In the long tier they start processes, as they do.
HERE_FIRST = [training_here, pytest.param(contextlib.nullcontext, marks=pytest.mark.long)]


def contents(root: Path) -> dict[Path, bytes]:
    """Every file under ``root``."""
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.fixture
def own_network(tmp_path: Path) -> Path:
    """The README's script that registers and trains a network of one's own: linear, so without any randomness."""
    readme = (PROJECT_DIR / "README.md").read_text(encoding="utf-8")
    (script,) = re.findall(r"```python\n(# my_network\.py\n.*?)```", readme, flags=re.DOTALL)
    path = tmp_path / "my_network.py"
    path.write_text(script)
    return path


# ---------------------------------------------------------------------------------------------------------------------
# the real one, and what was shipped
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def mnist(once: Once) -> Path:
    """The project's data folder with the real MNIST, fetched if it is not there."""
    once("mnist", lambda _: ensure_mnist(PROJECT_DIR / "data"))
    return PROJECT_DIR / "data"


@pytest.fixture(scope="session")
def test_set(mnist: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """MNIST's test images uint8 [10000, 28, 28] and labels int64 [10000]: only to be read."""
    return load_images(mnist, train=False)


@pytest.fixture(scope="session")
def shipped_project(mnist: Path, once: Once) -> Path:
    """A copy of the project with the results that are committed, whatever was trained over them since."""
    return once("project", lambda folder: copy_project(folder, mnist))


def copy_project(copy: Path, mnist: Path) -> None:
    """Into the empty folder ``copy``, with a link to the data."""
    for path in PROJECT_DIR.glob("*.py"):
        shutil.copy(path, copy)
    for folder in ("common", "configs", "image_data", "models", "notebooks", "tools", "training"):
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


def write_evaluation(
    name: str, network: torch.nn.Module, test_set: tuple[torch.Tensor, torch.Tensor], output_dir: Path
) -> dict[str, Any]:
    """What ``tools.evaluate`` leaves of a run, as far as the comparison reads it."""
    images, labels = test_set
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
def page_folder(shipped_project: Path, test_set: tuple[torch.Tensor, torch.Tensor], once: Once) -> Path:
    """An output folder for the page: the shipped runs, evaluated, and an export of the first one; only to be read."""
    return once("page", lambda folder: fill_page_folder(folder, shipped_project, test_set))


def fill_page_folder(folder: Path, shipped_project: Path, test_set: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Make ``folder`` the page's."""
    (folder / "outputs").mkdir()
    for number in "123":
        name = f"mnist_model_{number}"
        for ending in ("_metrics.json", "_params.pth"):
            shutil.copy(shipped_project / "outputs" / f"{name}{ending}", folder / "outputs")
        write_evaluation(name, load_model_params(get_strategy(number).build(), name, folder), test_set, folder)
    file = {"file": "mnist_model_1.onnx", "precision": "float32", "bytes": 40000, "accuracy": 99.47}
    export = {"schema": 1, "name": "mnist_model_1", "files": [{**file, "latency_ms": {"1": 0.1, "100": 5.0}}]}
    (folder / "outputs" / "mnist_model_1_export.json").write_text(json.dumps(export))


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    """A headless Chromium."""
    started = chromium()
    try:
        found = started.__enter__()
    except UsageError as error:
        if os.environ.get("REQUIRE_BROWSER"):
            raise
        pytest.skip(f"the page is not tried in a browser: this {error}")
    yield found
    started.__exit__(None, None, None)


@pytest.fixture(scope="session")
def server(page_folder: Path, fork_server: ForkServer) -> Iterator[str]:
    """The address of the page, served by its own command from ``page_folder``."""
    process = fork_server.start(["-m", "tools.web", "--port", "0", "--output_dir", page_folder])
    yield address_of(process)
    process.end()


@pytest.fixture
def serve(python: Callable[..., Forked]) -> Callable[..., tuple[str, Forked]]:
    """Starts a server of the test's own, with these flags: its address and its process."""

    def start(*flags: object) -> tuple[str, Forked]:
        process = python("-m", "tools.web", "--port", "0", *flags)
        return address_of(process), process

    return start


def address_of(server: Forked) -> str:
    """Where it listens; it says so as soon as it does."""
    line = server.stdout.readline()
    assert line, server.stderr.read()
    return line.split(" ")[0].strip()
