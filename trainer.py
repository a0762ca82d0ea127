"""The loop: train, evaluate, and leave everything behind that a run leaves.

result = train_and_evaluate(TrainConfig(model="3", scheduler="onecycle", epochs=15))
result.model, result.metrics["test_acc"][-1]
"""

import math
import os
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, TextIO

from data_utils import Batches, Data, load_data
from file_utils import PROJECT_DIR, RunFiles, UsageError, atomic_write
from imports import F, LRScheduler, nn, optim, torch, torchvision, tqdm
from lr_schedulers import advances_every_batch, get_scheduler
from model_strategy import ModelContext, get_strategy
from train_config import TrainConfig
from visualization import (
    METRICS_SCHEMA,
    Metrics,
    count_parameters,
    plot_metrics,
    save_metrics_json,
    save_model_params,
    save_model_summary,
)

MOMENTUM = 0.9
METRICS_SECONDS = 1.0  # how often the metrics file is written while training
CHECKPOINT_SCHEMA = 1

# Takes the loss and the number of right answers of a batch (both still on the device), its size and its rate.
StepReport = Callable[[torch.Tensor, torch.Tensor, int, float], None]


class TrainingError(RuntimeError):
    """The run cannot go on; one line says why and what to try."""


@dataclass
class TrainResult:
    """A finished run: the network in evaluation mode, its metrics, and where its files are."""

    model: nn.Module
    metrics: Metrics
    files: RunFiles


def train_one_epoch(
    model: nn.Module,
    batches: Batches,
    optimizer: optim.Optimizer,
    scheduler: LRScheduler | None,
    device: torch.device,
    report: StepReport,
) -> None:
    """One pass over the training images. ``scheduler``: the one to advance after every batch, if any."""
    model.train()
    for images, labels in batches:
        images = images.to(device, memory_format=torch.channels_last, non_blocking=True)
        labels = labels.to(device, non_blocking=True)
        log_probabilities = model(images)
        loss = F.nll_loss(log_probabilities, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        correct = (log_probabilities.argmax(1) == labels).sum()
        report(loss.detach(), correct, len(labels), optimizer.param_groups[0]["lr"])
        if scheduler is not None:
            scheduler.step()


@torch.inference_mode()
def evaluate(model: nn.Module, batches: Batches, device: torch.device) -> tuple[float, float]:
    """The mean negative log-likelihood and the accuracy in percent over all images of ``batches``."""
    model.eval()
    loss_sum, correct = torch.zeros((), device=device), torch.zeros((), device=device)
    count = 0
    for images, labels in batches:
        images, labels = images.to(device, memory_format=torch.channels_last), labels.to(device)
        log_probabilities = model(images)
        loss_sum += F.nll_loss(log_probabilities, labels, reduction="sum")
        correct += (log_probabilities.argmax(1) == labels).sum()
        count += len(labels)
    return loss_sum.item() / count, 100.0 * correct.item() / count


def resolve_device(name: str) -> torch.device:
    """``auto`` is CUDA where there is one, else the CPU.

    Raises:
        UsageError: the device is not on this machine.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda":
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= found:
            raise UsageError(f"device: {name!r} is not on this machine ({found} CUDA devices); use cpu or auto")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UsageError("device: 'mps' is not on this machine; use cpu or auto")
    return device


def train_and_evaluate(config: TrainConfig, log: Callable[[str], None] = tqdm.write) -> TrainResult:
    """Train the network that ``config`` names and write its files.

    What is saved is the network of the last epoch. ``log`` gets each line that a person should read.

    Raises:
        UsageError: the device is not here, a folder cannot be written, or too many images are held out.
        DataError: MNIST is not there and cannot be fetched.
        TrainingError: the loss is no longer finite.
        OSError: a file cannot be written.
    """
    device = resolve_device(config.device)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    files = config.files
    files.make_folders()
    data = load_data(config.data_folder, config.batch_size, device, config.seed, config.pipeline, config.val_split, log)
    torch.manual_seed(config.seed)
    model = ModelContext(get_strategy(config.model)).get_model(device)
    model = model.to(memory_format=torch.channels_last)
    optimizer = optim.SGD(model.parameters(), lr=config.lr, momentum=MOMENTUM)
    scheduler = get_scheduler(config.scheduler, optimizer, config.epochs, len(data.train), config.max_lr)
    metrics = new_metrics(config, model, device)

    with open(files.log, "w", encoding="utf-8") as log_file:
        run = _Run(config, files, data, device, model, optimizer, scheduler, metrics, log, log_file)
        try:
            run.train()
        except BaseException as error:
            stopped = isinstance(error, KeyboardInterrupt | SystemExit)
            run.save_metrics("interrupted" if stopped else "failed")
            raise
        save_model_params(model, files.name, config.output_dir)
        save_model_summary(model, files.name, config.output_dir)
        run.save_metrics("finished")
        plot_metrics(metrics, files.name, config.output_dir)
    return TrainResult(model.eval(), metrics, files)


def new_metrics(config: TrainConfig, model: nn.Module, device: torch.device) -> Metrics:
    """The metrics of a run that has not begun."""
    return {
        "schema": METRICS_SCHEMA,
        "name": config.run_name,
        "model": config.model,
        "parameters": count_parameters(model),
        "status": "running",
        "pid": os.getpid(),
        "updated": "",
        "config": asdict(config),
        "environment": environment(device),
        "train_acc": [],
        "test_losses": [],
        "test_acc": [],
        "val_losses": [],
        "val_acc": [],
        "epoch_seconds": [],
        "total_seconds": 0.0,
        "train_losses": [],
        "learning_rates": [],
    }


def environment(device: torch.device) -> dict[str, Any]:
    """What the numbers of a run depend on besides its configuration."""
    # --exclude: no tag in place of the commit's hash
    git = ["git", "-C", str(PROJECT_DIR), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        commit = None  # no git, or no repository
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": torchvision.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "git_commit": commit,
    }


@dataclass
class _Run:
    """A run under way: everything that its epochs share."""

    config: TrainConfig
    files: RunFiles
    data: Data
    device: torch.device
    model: nn.Module
    optimizer: optim.Optimizer
    scheduler: LRScheduler
    metrics: Metrics
    log: Callable[[str], None]
    log_file: TextIO

    def train(self) -> None:
        """All epochs."""
        self.started = time.perf_counter()
        every_batch = advances_every_batch(self.config.scheduler)
        self.save_metrics("running")
        for epoch in range(self.config.epochs):
            with StepRecorder(self, epoch) as recorder:
                began = time.perf_counter()
                train_one_epoch(
                    self.model,
                    self.data.train,
                    self.optimizer,
                    self.scheduler if every_batch else None,
                    self.device,
                    recorder.step,
                )
                recorder.fetch()
                self.metrics["epoch_seconds"].append(round(time.perf_counter() - began, 3))
            if not every_batch:
                self.scheduler.step()
            self.metrics["train_acc"].append(round(recorder.accuracy, 4))
            self.evaluate_epoch()
            self.report_epoch(epoch)
            self.save_checkpoint(epoch)
            self.save_metrics("running")

    def evaluate_epoch(self) -> None:
        for split, batches in (("test", self.data.test), ("val", self.data.val)):
            if batches is not None:
                loss, accuracy = evaluate(self.model, batches, self.device)
                self.metrics[f"{split}_losses"].append(round(loss, 6))
                self.metrics[f"{split}_acc"].append(round(accuracy, 4))

    def report_epoch(self, epoch: int) -> None:
        accuracies = self.metrics["test_acc"]
        line = f"EPOCH: {epoch:<2} - Test Accuracy: {accuracies[-1]:.2f}%"
        if self.metrics["val_acc"]:
            line += f" - Validation Accuracy: {self.metrics['val_acc'][-1]:.2f}%"
        if accuracies[-1] > max(accuracies[:-1], default=-1.0):
            line += " ← BEST"
        self.log(line)
        print(line, file=self.log_file, flush=True)

    def save_metrics(self, status: str) -> None:
        self.metrics["status"] = status
        self.metrics["updated"] = datetime.now(UTC).isoformat(timespec="milliseconds")
        self.metrics["total_seconds"] = round(time.perf_counter() - self.started, 3)
        save_metrics_json(self.metrics, self.files.name, self.config.output_dir, durable=status != "running")

    def save_checkpoint(self, epoch: int) -> None:
        """Everything that the epochs after ``epoch`` depend on."""
        generators = {"torch": torch.get_rng_state(), "data": self.data.generator.get_state()}
        if self.device.type == "cuda":
            generators["cuda"] = torch.cuda.get_rng_state(self.device)
        state = {
            "schema": CHECKPOINT_SCHEMA,
            "epoch": epoch,
            "config": asdict(self.config),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "metrics": self.metrics,
            "generators": generators,
        }
        with atomic_write(self.files.checkpoint) as file:
            torch.save(state, file)


class StepRecorder:
    """Records what each step reports: in the metrics, their file once a second, and the progress bar.

    On a GPU the losses of many steps are fetched together: asking for one would wait for the device.
    """

    def __init__(self, run: _Run, epoch: int) -> None:
        self.run, self.epoch = run, epoch
        self.fetch_every = 1 if run.device.type == "cpu" else 50
        self.waiting: list[tuple[torch.Tensor, int, float]] = []
        self.correct, self.count = 0, 0
        self.written = time.monotonic()
        # disable=None: no bar where the output is not a terminal, so that a log is not flooded
        self.bar = tqdm(
            total=run.data.train_size,
            desc=f"epoch {epoch}",
            unit="img",
            unit_scale=True,
            disable=None,
            leave=False,
            dynamic_ncols=True,
        )

    def __enter__(self) -> "StepRecorder":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.bar.close()

    @property
    def accuracy(self) -> float:
        """Percent right so far in this epoch, each batch at the weights that it was trained on."""
        return 100.0 * self.correct / max(self.count, 1)

    def step(self, loss: torch.Tensor, correct: torch.Tensor, size: int, rate: float) -> None:
        self.waiting.append((torch.stack([loss, correct]), size, rate))
        if len(self.waiting) >= self.fetch_every:
            self.fetch()

    def fetch(self) -> None:
        """Take the waiting results from the device.

        Raises:
            TrainingError: a loss is not finite.
        """
        if not self.waiting:
            return
        results = torch.stack([result for result, _, _ in self.waiting]).tolist()
        metrics = self.run.metrics
        for (loss, correct), (_, size, rate) in zip(results, self.waiting, strict=True):
            if not math.isfinite(loss):
                raise TrainingError(
                    f"the loss is {loss} in epoch {self.epoch}, batch {len(metrics['train_losses'])}, at learning"
                    f" rate {rate:.4g}; try a lower --max_lr or --lr"
                )
            metrics["train_losses"].append(round(loss, 6))
            metrics["learning_rates"].append(round(rate, 9))
            self.correct += int(correct)
            self.count += size
            self.bar.update(size)
        self.waiting.clear()
        self.bar.set_postfix(loss=f"{loss:.4f}", acc=f"{self.accuracy:.2f}%", lr=f"{rate:.4f}", refresh=False)
        if time.monotonic() - self.written >= METRICS_SECONDS:
            self.run.save_metrics("running")
            self.written = time.monotonic()
