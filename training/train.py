"""A run from its first file to its last.

result = train_and_evaluate(TrainConfig(model="3", scheduler="onecycle", epochs=15))
result.model, result.metrics["test_acc"][-1]
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from common.cli import Log, silent
from common.files import RunFiles, UsageError
from common.results import Metrics
from image_data.facts import DataSet
from imports import FileLock, Timeout, nn
from training.checkpoint import Checkpoint
from training.config import TrainConfig, same_data
from training.machine import resolve_device
from training.processes import ALONE, Processes
from training.report import print_line
from training.run import Run, StoppedError
from training.setup import prepare_run


@dataclass
class TrainResult:
    """A finished run: the network in evaluation mode, its metrics, and where its files are."""

    model: nn.Module
    metrics: Metrics
    files: RunFiles


def train_and_evaluate(
    config: TrainConfig,
    log: Log = print_line,
    checkpoint: Checkpoint | None = None,
    stop_requested: Callable[[], bool] = lambda: False,
) -> TrainResult:
    """Train the network that ``config`` names and write its files; what is saved is that of the last epoch.

    With a ``checkpoint``, of which ``config`` is then the ``resumed_config``, it goes on from there. ``stop_requested``
    is asked after every batch whether to end the run.

    Raises:
        UsageError: the device is not here, a folder cannot be written, too many images are held out, or another
            process trains under this name.
        DataError, OSError: the data are not there and cannot be fetched; a file cannot be written.
        TrainingError, StoppedError: the loss or a weight is no longer finite; it was asked to stop.
        DamagedFileError: ``checkpoint`` is not of a run with its own configuration.
    """
    processes = Processes.from_environment()
    if not processes.is_main:
        log = silent
    if config.batch_size % processes.count:
        raise UsageError(
            f"batch_size: {config.batch_size} is not allowed with {processes.count} processes; it must divide among"
            " them"
        )
    device = resolve_device(config.device, processes)
    if processes.count > 1:  # those of one machine wait for each other here, not for a message that is overdue
        config.ensure_data(silent)
    if checkpoint is not None and checkpoint["metrics"]:  # without them it is damaged, as ``restore`` tells
        same_data(config, DataSet.of(checkpoint["metrics"]), "resume: the run")
    with locked(config.files, processes), processes.connected(device):
        run = prepare_run(config, device, processes, log, resumed=checkpoint is not None)
        run.stop_requested = stop_requested
        if checkpoint is not None:
            run.restore(checkpoint)
        with closing(run):
            run.train()
            run.save_results()
    return TrainResult(run.result.eval(), run.metrics, config.files)


@contextlib.contextmanager
def closing(run: Run) -> Iterator[None]:
    """Let the metrics of a run that ends early say how it ended."""
    try:
        yield
    except BaseException as error:
        # When one process stops, the others lose it in the middle of a step.
        stopped = isinstance(error, StoppedError | KeyboardInterrupt | SystemExit) or run.stop_requested()
        with contextlib.suppress(OSError):  # a full disk or a lost folder: the error under way tells of it
            run.report.save("interrupted" if stopped else "failed")
        if stopped and isinstance(error, RuntimeError):
            raise StoppedError(f"stopped in epoch {run.report.epochs_done}") from None
        raise


@contextlib.contextmanager
def locked(files: RunFiles, processes: Processes = ALONE) -> Iterator[None]:
    """Keep other processes from training under this name into this folder; a UsageError says which one does.

    Ends with the process, however that ends.
    """
    if not processes.is_main:
        yield
        return
    files.make_folders()
    lock = FileLock(files.lock)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        owner = "another process"
        with contextlib.suppress(OSError):
            owner = f"process {files.lock.read_text(encoding='utf-8')}"
        raise UsageError(
            f"name: {owner} is training {files.name} into {files.metrics.parent}; wait for it or choose another --name"
        ) from None
    try:
        files.lock.write_text(str(os.getpid()), encoding="utf-8")
        files.remove_partial()
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows does not remove an open file
            files.lock.unlink()
        lock.release()
