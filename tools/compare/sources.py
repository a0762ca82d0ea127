"""What is compared: the runs' metrics and MNIST's test digits, each read again only when a file changed."""

import functools
import math
from datetime import datetime
from pathlib import Path
from typing import Any

from common.cli import silent
from common.files import PROJECT_DIR, DamagedFileError, RunFiles, UsageError, existing_runs
from common.results import Metrics
from data_utils import load_images
from image_data.fetch import DataError, is_there
from tools.networks import FileCache, is_a_name
from visualization import load_metrics_json

MNIST_TRAIN_IMAGES = 60_000


class MetricsCache:
    """The metrics of the runs under ``output_dir``, read again only when a file changed."""

    def __init__(self, output_dir: str | None = None) -> None:
        self.output_dir = output_dir
        self._read: FileCache[Metrics | str] = FileCache()

    def names(self) -> list[str]:
        """The runs that there are."""
        return [name for name in existing_runs(self.output_dir, "_metrics.json") if is_a_name(name)]

    def get(self, name: str) -> Metrics | str:
        """The metrics of a run, or one line that says why they cannot be had."""
        files = RunFiles(name, self.output_dir)
        return self._read.get(name, [files.metrics], functools.partial(self._load, name))

    def _load(self, name: str) -> Metrics | str:
        try:
            return load_metrics_json(name, self.output_dir)
        except (DamagedFileError, OSError) as error:
            return str(error)


def train_images(metrics: Metrics) -> int:
    """How many images an epoch of a run has; runs before this was recorded were of MNIST."""
    return int(metrics.get("train_images", MNIST_TRAIN_IMAGES - metrics["config"]["val_split"]))


def batches_per_epoch(metrics: Metrics) -> int:
    """How many batches an epoch of a run has."""
    return math.ceil(train_images(metrics) / int(metrics["config"]["batch_size"]))


def status_of(metrics: dict[str, Any]) -> str:
    """The run's status; ``crashed`` if it says that it is running while its process is gone."""
    status: str = metrics["status"]
    return "crashed" if status == "running" and not is_alive(metrics["pid"], metrics["updated"]) else status


def is_alive(pid: int, updated: str) -> bool:
    """Whether the process that wrote at ``updated`` (ISO) runs still; one that began later only has its number."""
    import psutil

    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        return process.create_time() <= datetime.fromisoformat(updated).timestamp() + 1
    except psutil.AccessDenied:
        return True
    except (psutil.NoSuchProcess, ValueError, OverflowError):
        return False


_digits: FileCache[Any] = FileCache()


def mnist_test_digits(data_dir: str | None = None) -> Any:
    """The test images uint8 [N, 28, 28] and labels [N] as arrays; None if they are not on this machine."""
    folder = PROJECT_DIR / "data" if data_dir is None else Path(data_dir)
    files = [folder / "MNIST" / "raw" / f"t10k-{kind}-ubyte" for kind in ("images-idx3", "labels-idx1")]
    return _digits.get(folder, files, functools.partial(_read, folder))


def _read(folder: Path) -> Any:
    if not is_there(folder):
        return None  # to fetch them is for the training command
    try:
        images, labels = load_images(folder, train=False, log=silent)
    except (DataError, UsageError):
        return None
    return images.numpy(), labels.numpy()
