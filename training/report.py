"""What a run says of itself while it trains: its metrics in memory and on disk, its log, the bar, TensorBoard."""

import contextlib
import math
import os
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

from common.cli import Log
from common.results import METRICS_SCHEMA, Metrics, save_metrics_json
from imports import nn, torch, tqdm
from training.config import TrainConfig
from training.machine import environment
from training.processes import Processes
from training.step import StepResult
from training.tensorboard_log import TensorBoardLog
from visualization import count_parameters

METRICS_SECONDS = 1.0  # how often the metrics file is written while training
STEPS_TIMED = 50  # before it is said how long a run will take


class TrainingError(RuntimeError):
    """The run cannot go on; one line says why and what to try."""


def print_line(line: str) -> None:
    """Print ``line`` above the progress bar, if there is one, at once."""
    tqdm.write(line)
    sys.stdout.flush()


def new_metrics(config: TrainConfig, model: nn.Module, device: torch.device, train_images: int) -> Metrics:
    """The metrics of a run of one process, without kernels or graph, that has not begun."""
    return {
        "schema": METRICS_SCHEMA,
        "name": config.run_name,
        "model": config.model,
        "parameters": count_parameters(model),
        "train_images": train_images,
        "status": "running",
        "pid": os.getpid(),
        "updated": "",
        "config": asdict(config),
        "environment": {**environment(device), "processes": 1, "kernels": False, "graph": False},
        **{key: [] for key in ("train_acc", "test_losses", "test_acc", "val_losses", "val_acc", "epoch_seconds")},
        "total_seconds": 0.0,
        **{key: [] for key in ("train_losses", "learning_rates")},
    }


def epoch_line(metrics: Metrics, epoch: int) -> str:
    """What is printed of an epoch; of the test accuracies, the best so far is marked."""
    accuracies = metrics["test_acc"][: epoch + 1]
    line = f"EPOCH: {epoch:<2}"
    if accuracies:
        line += f" - Test Accuracy: {accuracies[-1]:.2f}%"
    if metrics["val_acc"]:
        line += f" - Validation Accuracy: {metrics['val_acc'][epoch]:.2f}%"
    if accuracies and accuracies[-1] > max(accuracies[:-1], default=-1.0):
        line += " ← BEST"
    return line


class Report:
    """Takes what steps and evaluations leave. Only the main process prints and writes.

    The results of several steps are fetched together, of many on a GPU or with other processes: there each fetch waits.
    """

    def __init__(
        self, config: TrainConfig, metrics: Metrics, device: torch.device, processes: Processes, log: Log
    ) -> None:
        self.config, self.metrics, self.processes, self.log = config, metrics, processes, log
        self.advice = f"try a lower {'--max_lr' if config.scheduler == 'onecycle' else '--lr'}"
        self.fetch_every = 5 if device.type == "cpu" and processes.count == 1 else 50
        self.waiting: list[StepResult] = []
        self.correct, self.count = 0, 0  # in this epoch
        self.has_bar = processes.is_main
        self.bar = tqdm(disable=True)
        self.board: TensorBoardLog | None = None
        self.started = self.written = self.epoch_began = -math.inf
        self.timed: list[tuple[int, float]] = []  # so many steps were done, and when
        self.has_said = False  # how long the run will take

    @property
    def epochs_done(self) -> int:
        return len(self.metrics["train_acc"])

    def begin(self) -> None:
        """The run's first batch, or the first after it was stopped, is next."""
        self.started = time.perf_counter() - self.metrics["total_seconds"]
        if self.processes.is_main:
            lines = [epoch_line(self.metrics, epoch) for epoch in range(self.epochs_done)]
            self.config.files.log.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
            if self.config.tensorboard:
                self.board = TensorBoardLog(self.config.files.tensorboard, self.metrics)
        config, images = self.config, f"{self.metrics['train_images']:,} images of {Path(self.config.dataset).name}"
        where = self.metrics["environment"]["device"]
        self.log(f"Training model {config.model} on {images}: {config.epochs} epochs, {config.scheduler}, on {where}.")
        self.save("running")

    @contextlib.contextmanager
    def epoch(self, images: int) -> Iterator[None]:
        """Within, an epoch of ``images`` images is trained."""
        self.correct, self.count = 0, 0
        # a run's first batches are written at once: whoever watches it sees that it trains
        self.written = time.monotonic() if self.metrics["train_losses"] else -math.inf
        self.bar = tqdm(
            total=images,
            desc=f"epoch {self.epochs_done}",
            unit="img",
            unit_scale=True,
            # None: no bar where the output is not a terminal, so that a log is not flooded
            disable=None if self.has_bar else True,
            leave=False,
            dynamic_ncols=True,
        )
        self.epoch_began = time.perf_counter()
        with self.bar:
            yield
            self.fetch()
            seconds = time.perf_counter() - self.epoch_began
        self.metrics["epoch_seconds"].append(round(seconds, 3))
        self.metrics["train_acc"].append(round(self.accuracy, 4))

    @property
    def accuracy(self) -> float:
        """Percent right so far in this epoch, each batch at the weights that it was trained on."""
        return 100.0 * self.correct / max(self.count, 1)

    def step(self, result: StepResult) -> None:
        """Take what a step leaves; a TrainingError if a loss is not finite."""
        self.waiting.append(result)
        if len(self.waiting) >= self.fetch_every:
            self.fetch()

    def fetch(self) -> None:
        """Take the waiting results from the device. Raises as ``step``."""
        if not self.waiting:
            return
        metrics = self.metrics
        totals = self.processes.sum(torch.stack([result.totals for result in self.waiting])).tolist()
        for (loss_sum, correct, size), (_, rate) in zip(totals, self.waiting, strict=True):
            loss = loss_sum / size
            if not math.isfinite(loss):
                raise TrainingError(
                    f"the loss is {loss} in epoch {self.epochs_done}, batch {len(metrics['train_losses'])}, at"
                    f" learning rate {rate:.4g}; {self.advice}"
                )
            metrics["train_losses"].append(round(loss, 6))
            metrics["learning_rates"].append(round(rate, 9))
            self.correct += int(correct)
            self.count += int(size)
        self.bar.set_postfix(loss=f"{loss:.4f}", acc=f"{self.accuracy:.2f}%", lr=f"{rate:.4f}", refresh=False)
        self.bar.update(self.count - self.bar.n)
        self.waiting.clear()
        self._say_how_long()
        metrics["images_per_second"] = round(self.count / (time.perf_counter() - self.epoch_began), 1)
        if time.monotonic() - self.written >= METRICS_SECONDS:
            self.save("running")
            self.written = time.monotonic()

    def _say_how_long(self) -> None:
        """Once, as soon as the first steps tell: they are timed without the very first, which make things ready."""
        done = len(self.metrics["train_losses"])
        if not self.has_said:
            self.timed.append((done, time.perf_counter()))
        if not self.has_said and done - self.timed[0][0] >= STEPS_TIMED:
            # one wait for a disk or another process would be a multiple of so few steps
            each = statistics.median((end - start) / (n - m) for (m, start), (n, end) in pairwise(self.timed))
            left = self.config.epochs * math.ceil(self.metrics["train_images"] / self.config.batch_size) - done
            self.log(f"About {tqdm.format_interval(left * each)} to go; Ctrl-C stops it, and --resume goes on.")
            self.has_said = True

    def evaluated(self, split: str, loss: float, accuracy: float) -> None:
        """Take what an evaluation on ``split``, test or val, gave; a TrainingError if the loss is not finite."""
        if not math.isfinite(loss):
            raise TrainingError(
                f"the {split} loss is {loss} after epoch {self.epochs_done - 1}: the last steps left weights that are"
                f" not finite; {self.advice}"
            )
        self.metrics[f"{split}_losses"].append(round(loss, 6))
        self.metrics[f"{split}_acc"].append(round(accuracy, 4))

    def end_epoch(self) -> None:
        """Log the epoch's line, on the terminal and in the run's log file."""
        self.metrics["total_seconds"] = round(time.perf_counter() - self.started, 3)
        line = epoch_line(self.metrics, self.epochs_done - 1)
        self.log(line)
        if self.processes.is_main:
            with open(self.config.files.log, "a", encoding="utf-8") as log_file:
                print(line, file=log_file)

    def save(self, status: str) -> None:
        if not self.processes.is_main:
            return
        self.metrics |= {"status": status, "updated": datetime.now(UTC).isoformat(timespec="milliseconds")}
        save_metrics_json(self.metrics, self.config.run_name, self.config.output_dir, durable=status != "running")
        if self.board is not None:
            self.board.write(self.metrics)
            if status != "running":
                self.board.writer.close()
