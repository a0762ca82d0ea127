"""The loop: train, evaluate, and leave everything behind that a run leaves.

result = train_and_evaluate(TrainConfig(model="3", scheduler="onecycle", epochs=15))
result.model, result.metrics["test_acc"][-1]
"""

import contextlib
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from itertools import repeat
from typing import Any

from checkpoint import Checkpoint, save_checkpoint
from data_utils import Batch, Data, load_data
from distributed import ALONE, Processes
from file_utils import PROJECT_DIR, DamagedFileError, RunFiles, UsageError
from hardware import CompiledOrEager, has_bfloat16, have_kernels, keep_freed_memory, make_deterministic, resolve_device
from imports import (
    AveragedModel,
    F,
    FileLock,
    LRScheduler,
    Timeout,
    get_ema_multi_avg_fn,
    nn,
    optim,
    torch,
    torchvision,
    tqdm,
)
from lr_schedulers import advances_every_batch, get_scheduler
from mnist_files import ensure_mnist
from model_strategy import ModelContext, get_strategy
from models.kernels import using_kernels
from policies import get_policy
from tensorboard_log import TensorBoardLog
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

METRICS_SECONDS = 1.0  # how often the metrics file is written while training

# Takes the loss and the number of right answers of a batch (both still on the device), its size and its rate.
StepReport = Callable[[torch.Tensor, torch.Tensor, int, float], None]


class TrainingError(RuntimeError):
    """The run cannot go on; one line says why and what to try."""


class StoppedError(RuntimeError):
    """The run ended early because it was asked to."""


def never() -> bool:
    """The answer to whether a run should stop, where nobody can ask for it."""
    return False


def nobody_listens(metrics: Metrics) -> None:
    """What happens after an epoch that nobody waits for."""


@dataclass
class TrainResult:
    """A finished run: the network in evaluation mode, its metrics, and where its files are."""

    model: nn.Module
    metrics: Metrics
    files: RunFiles


def train_one_epoch(
    model: nn.Module,
    batches: Iterable[Batch],
    optimizer: optim.Optimizer,
    scheduler: LRScheduler | None,
    device: torch.device,
    report: StepReport,
    amp: bool = False,
    label_smoothing: float = 0.0,
    average: AveragedModel | None = None,
    loss_weights: Iterable[float] = repeat(1.0),
    kernels: bool = False,
) -> None:
    """One pass over the training images.

    Args:
        scheduler: the one to advance after every batch, if any.
        amp: compute in bfloat16 where that is safe.
        label_smoothing: part of a label that is spread over all classes (Szegedy et al. 2015, arXiv:1512.00567).
        average: the moving average of the weights to bring up to date after every step, if any.
        loss_weights: of the batches, when this process has a part of each: see ``part_weights``.
        kernels: run the blocks as ``models/kernels.py`` has them; ``have_kernels`` must have said that they are here.
    """
    model.train()
    for (images, labels), weight in zip(batches, loss_weights, strict=False):
        images = images.to(device, memory_format=torch.channels_last, non_blocking=True)
        labels = labels.to(device, non_blocking=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=amp), using_kernels(kernels):
            log_probabilities = model(images)
            loss = F.nll_loss(log_probabilities, labels)
            if label_smoothing:
                loss = (1 - label_smoothing) * loss - label_smoothing * log_probabilities.mean()
        optimizer.zero_grad()
        (loss * weight).backward()
        optimizer.step()
        if average is not None:
            average.update_parameters(model)
        correct = (log_probabilities.argmax(1) == labels).sum()
        report(loss.detach(), correct, len(labels), optimizer.param_groups[0]["lr"])
        if scheduler is not None:
            scheduler.step()


def part_weights(images: int, batch_size: int, processes: Processes) -> Iterator[float]:
    """What to multiply a process's mean loss by, batch by batch, so that the mean over the processes is the batch's.

    1 but where the processes' parts differ in size, as those of an epoch's last batch may.
    """
    for start in range(0, images, batch_size):
        whole = min(batch_size, images - start)
        part = whole // processes.count + (processes.rank < whole % processes.count)
        yield part * processes.count / whole


@torch.inference_mode()
def evaluate(
    model: nn.Module, batches: Iterable[Batch], device: torch.device, processes: Processes = ALONE
) -> tuple[float, float]:
    """The mean negative log-likelihood and the accuracy in percent over all images of all processes' ``batches``."""
    model.eval()
    loss_sum, correct = torch.zeros((), device=device), torch.zeros((), device=device)
    count = 0
    for images, labels in batches:
        images, labels = images.to(device, memory_format=torch.channels_last), labels.to(device)
        log_probabilities = model(images)
        loss_sum += F.nll_loss(log_probabilities, labels, reduction="sum")
        correct += (log_probabilities.argmax(1) == labels).sum()
        count += len(labels)
    totals = processes.sum(torch.stack([loss_sum, correct, torch.tensor(float(count), device=device)]))
    loss_total, correct_total, all_images = totals.tolist()
    return loss_total / all_images, 100.0 * correct_total / all_images


def print_line(line: str) -> None:
    """Print ``line`` above the progress bar, if there is one, at once."""
    tqdm.write(line)
    sys.stdout.flush()


def train_and_evaluate(
    config: TrainConfig,
    log: Callable[[str], None] = print_line,
    checkpoint: Checkpoint | None = None,
    stop_requested: Callable[[], bool] = never,
) -> TrainResult:
    """Train the network that ``config`` names and write its files.

    What is saved is the network of the last epoch.

    Args:
        log: gets each line that a person should read.
        checkpoint: where to go on from; ``config`` is then ``resumed_config`` of it.
        stop_requested: asked after every batch whether to end the run.

    Raises:
        UsageError: the device is not here, a folder cannot be written, too many images are held out, or another
            process trains under this name.
        DataError: MNIST is not there and cannot be fetched.
        TrainingError: the loss or a weight is no longer finite.
        StoppedError: it was asked to stop.
        DamagedFileError: ``checkpoint`` is not of a run with its own configuration.
        OSError: a file cannot be written.
    """
    processes = Processes.from_environment()
    if not processes.is_main:
        log = _say_nothing
    _check_division(config, processes)
    device = resolve_device(config.device, processes)
    if processes.count > 1:  # those of one machine wait for each other here, not for a message that is overdue
        ensure_mnist(config.data_folder, _say_nothing)
    with locked(config.files, processes), processes.connected(device):
        run = prepare_run(config, device, processes, log, checkpoint, stop_requested)
        try:
            run.train()
            run.save_results()
        except BaseException as error:
            # When one process stops, the others lose it in the middle of a step.
            stopped = isinstance(error, StoppedError | KeyboardInterrupt | SystemExit) or stop_requested()
            with contextlib.suppress(OSError):  # a full disk or a lost folder: the error under way tells of it
                run.save_metrics("interrupted" if stopped else "failed")
            if stopped and isinstance(error, RuntimeError):
                raise StoppedError(f"stopped in epoch {len(run.metrics['test_acc'])}") from None
            raise
    return TrainResult(run.result.eval(), run.metrics, run.files)


@contextlib.contextmanager
def locked(files: RunFiles, processes: Processes = ALONE) -> Iterator[None]:
    """Keep other processes from training under this name into this folder. Ends with the process, however that ends.

    Raises:
        UsageError: another process does; the message says which.
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


def _say_nothing(line: str) -> None:
    """The log of every process but the main one."""


def prepare_run(
    config: TrainConfig,
    device: torch.device,
    processes: Processes = ALONE,
    log: Callable[[str], None] = print_line,
    checkpoint: Checkpoint | None = None,
    stop_requested: Callable[[], bool] = never,
    after_epoch: Callable[[Metrics], None] = nobody_listens,
    with_test: bool = True,
) -> "Run":
    """Everything up to the first batch.

    Args:
        after_epoch: called after every epoch, with the metrics so far; what it raises ends the run.
        with_test: False: the test set is not read, and the metrics have no ``test_losses`` and ``test_acc``.

    For the other arguments and the errors see ``train_and_evaluate``.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if device.type == "cpu":
        keep_freed_memory()
    else:
        make_deterministic(config.deterministic)
    if config.deterministic and device.type == "cpu":
        log("Note: --deterministic changes nothing on a CPU: a run there is always the same.")
    amp = config.amp and has_bfloat16(device)
    if config.amp and not amp:
        log(f"Note: --amp has no effect: {device.type} here has no bfloat16 of its own.")
    batch_part = config.batch_size // processes.count
    kernels = config.kernels and device.type == "cpu" and not amp and have_kernels(batch_part, log)
    share = (processes.rank, processes.count)
    data = load_data(
        config.data_folder,
        config.batch_size,
        device,
        config.seed,
        config.pipeline,
        config.val_split,
        log,
        share,
        get_policy(config.augment, config.augment_strength),
        with_test,
    )
    last = data.train_size % config.batch_size
    if 0 < last < processes.count:
        raise UsageError(
            f"batch_size: {config.batch_size} is not allowed with {processes.count} processes; the last batch of"
            f" {data.train_size} images has {last}, and every process needs one"
        )

    torch.manual_seed(config.seed)
    model = ModelContext(get_strategy(config.model)).get_model(device)
    model = model.to(memory_format=torch.channels_last)
    for layer in model.modules():
        if isinstance(layer, nn.Dropout) and config.dropout is not None:
            layer.p = config.dropout
        if isinstance(layer, nn.BatchNorm2d) and config.bn_momentum is not None:
            layer.momentum = config.bn_momentum
    if processes.count > 1:  # the same weights, but dropout of its own in every process
        torch.manual_seed(config.seed + processes.rank)
    step_model = CompiledOrEager(model, batch_part, log) if config.compile else model
    optimizer = optim.SGD(
        decay_groups(model, config.weight_decay),
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.nesterov,
        fused=device.type in ("cpu", "cuda"),
    )
    scheduler = get_scheduler(
        config.scheduler,
        optimizer,
        config.epochs,
        len(data.train),
        config.max_lr,
        config.pct_start,
        config.div_factor,
        config.final_div_factor,
    )
    average = None
    if config.ema_decay:  # of the running statistics too: they belong to the weights that they were taken with
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay), use_buffers=True)
    run = Run(
        config=config,
        data=data,
        device=device,
        processes=processes,
        model=model,
        step_model=processes.synchronized(step_model, device),
        amp=amp,
        kernels=kernels,
        average=average,
        optimizer=optimizer,
        scheduler=scheduler,
        metrics=new_metrics(config, model, device, processes, data.train_size, kernels),
        log=log,
        stop_requested=stop_requested,
        after_epoch=after_epoch,
    )
    if checkpoint is not None:
        try:
            run.restore(checkpoint)
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DamagedFileError(f"{config.files.checkpoint} does not fit its own configuration: {reason}") from None
    if config.tensorboard and processes.is_main:
        run.board = TensorBoardLog(run.files.tensorboard, run.metrics)
    return run


def _check_division(config: TrainConfig, processes: Processes) -> None:
    if config.batch_size % processes.count:
        raise UsageError(
            f"batch_size: {config.batch_size} is not allowed with {processes.count} processes; it must divide among"
            " them"
        )


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The parameters in two groups: weights of convolutions and linear layers, which decay, and all others.

    BatchNorm's parameters and biases are left alone: He et al. 2018, arXiv:1812.01187, section 3.1.
    """
    weights = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    return [{"params": weights, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def new_metrics(
    config: TrainConfig,
    model: nn.Module,
    device: torch.device,
    processes: Processes,
    train_images: int,
    kernels: bool,
) -> Metrics:
    """The metrics of a run that has not begun."""
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
        "environment": {**environment(device), "processes": processes.count, "kernels": kernels},
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
    git = ["git", "-C", str(PROJECT_DIR)]
    describe = [*git, "describe", "--always", "--abbrev=40", "--exclude=*"]
    sources = ["*.py", "*.cpp", "*.toml"]  # not what runs write
    changed = [*git, "status", "--porcelain", "--untracked-files=no", "--", *sources]
    try:
        commit, changes = (
            subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
            for command in (describe, changed)
        )
        commit += "-dirty" if changes else ""
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
class Run:
    """A run under way: everything that its epochs share."""

    config: TrainConfig
    data: Data
    device: torch.device
    processes: Processes
    model: nn.Module  # what is trained
    step_model: nn.Module  # the same network as a training step runs it: compiled, synchronized
    average: AveragedModel | None  # of the weights, over the steps
    amp: bool
    kernels: bool
    optimizer: optim.Optimizer
    scheduler: LRScheduler
    metrics: Metrics
    log: Callable[[str], None]
    stop_requested: Callable[[], bool] = never
    board: TensorBoardLog | None = None
    after_epoch: Callable[[Metrics], None] = nobody_listens
    started: float = field(default_factory=time.perf_counter)  # the first batch, from then on

    @property
    def files(self) -> RunFiles:
        return self.config.files

    @property
    def result(self) -> nn.Module:
        """The network that is evaluated and saved."""
        if self.average is None:
            return self.model
        averaged: nn.Module = self.average.module
        return averaged

    def restore(self, checkpoint: Checkpoint) -> None:
        """Be where the run was when ``checkpoint`` was written."""
        self.model.load_state_dict(checkpoint["model"])
        if self.average is not None:
            self.average.load_state_dict(checkpoint["average"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.scheduler.load_state_dict(checkpoint["scheduler"])
        self.data.generator.set_state(checkpoint["data"])
        mine = checkpoint["processes"][self.processes.rank]
        torch.set_rng_state(mine["torch"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(mine["cuda"], self.device)
        before, now = checkpoint["metrics"], self.metrics
        was = {"kernels": False, **before["environment"]}  # there were none at first
        here = now["environment"]
        other = [k for k in ("torch", "device", "threads", "platform", "kernels") if was[k] != here[k]]
        if other:
            changes = ", ".join(f"{k} {was[k]} -> {here[k]}" for k in other)
            self.log(f"Note: not as when the checkpoint was written, so the last bits may differ: {changes}.")
        self.metrics = {**before, **{key: now[key] for key in ("config", "environment", "pid", "train_images")}}

    @property
    def epochs_done(self) -> int:
        return len(self.metrics["train_acc"])

    def train(self) -> None:
        """All epochs, or those that are still to come."""
        self.started = time.perf_counter() - self.metrics["total_seconds"]
        if self.processes.is_main:
            lines = [epoch_line(self.metrics, epoch) for epoch in range(self.epochs_done)]
            self.files.log.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        self.save_metrics("running")
        for epoch in range(self.epochs_done, self.config.epochs):
            with StepRecorder(self, epoch) as recorder:
                began = time.perf_counter()
                self.train_batches(self.data.train, recorder)
                seconds = round(time.perf_counter() - began, 3)
            if not advances_every_batch(self.config.scheduler):
                self.scheduler.step()
            self.metrics["epoch_seconds"].append(seconds)
            self.metrics["train_acc"].append(round(recorder.accuracy, 4))
            self.evaluate_epoch()
            self.metrics["total_seconds"] = round(time.perf_counter() - self.started, 3)
            self.report_epoch(epoch)
            self.save_checkpoint()
            self.save_metrics("running")
            self.after_epoch(self.metrics)

    def train_batches(self, batches: Iterable[Batch], recorder: "StepRecorder") -> None:
        """Train on ``batches`` with the run's schedule and precision."""
        train_one_epoch(
            self.step_model,
            batches,
            self.optimizer,
            self.scheduler if advances_every_batch(self.config.scheduler) else None,
            self.device,
            recorder.step,
            self.amp,
            self.config.label_smoothing,
            self.average,
            part_weights(self.data.train_size, self.config.batch_size, self.processes),
            self.kernels,
        )
        recorder.fetch()

    def evaluate_epoch(self) -> None:
        """Evaluate on the test images and on those held out, as far as there are any."""
        self.processes.copy_buffers(self.model)
        if self.average is not None:
            self.processes.copy_buffers(self.average)
        for split, batches in (("test", self.data.test), ("val", self.data.val)):
            if batches is not None:
                loss, accuracy = evaluate(self.result, batches, self.device, self.processes)
                if not math.isfinite(loss):
                    raise TrainingError(
                        f"the {split} loss is {loss} after epoch {self.epochs_done - 1}: the last steps left weights"
                        f" that are not finite; {self.advice}"
                    )
                self.metrics[f"{split}_losses"].append(round(loss, 6))
                self.metrics[f"{split}_acc"].append(round(accuracy, 4))

    def report_epoch(self, epoch: int) -> None:
        """Log the epoch's line, on the terminal and in the run's log file."""
        line = epoch_line(self.metrics, epoch)
        self.log(line)
        if self.processes.is_main:
            with open(self.files.log, "a", encoding="utf-8") as log_file:
                print(line, file=log_file)

    def save_metrics(self, status: str) -> None:
        """Write the metrics as they are now."""
        if not self.processes.is_main:
            return
        self.metrics["status"] = status
        self.metrics["updated"] = datetime.now(UTC).isoformat(timespec="milliseconds")
        save_metrics_json(self.metrics, self.files.name, self.config.output_dir, durable=status != "running")
        if self.board is not None:
            self.board.write(self.metrics)
            if status != "running":
                self.board.close()

    def save_results(self) -> None:
        """Write the files of a run that is done."""
        if not self.processes.is_main:
            return
        save_model_params(self.result, self.files.name, self.config.output_dir)
        save_model_summary(self.result, self.files.name, self.config.output_dir)
        self.save_metrics("finished")
        plot_metrics(self.metrics, self.files.name, self.config.output_dir)

    def save_checkpoint(self) -> None:
        """Write what the epochs to come depend on."""
        generators = {"torch": torch.get_rng_state()}
        if self.device.type == "cuda":
            generators["cuda"] = torch.cuda.get_rng_state(self.device)
        of_all = self.processes.gather(generators)
        if not self.processes.is_main:
            return
        state = {
            "epochs_done": self.epochs_done,
            "config": asdict(self.config),
            "metrics": self.metrics,
            "model": self.model.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "data": self.data.generator.get_state(),
            "processes": of_all,
        }
        save_checkpoint(self.files, state)

    @property
    def advice(self) -> str:
        """What to try when a number is no longer finite."""
        rate = "--max_lr" if self.config.scheduler == "onecycle" else "--lr"
        return f"try a lower {rate}"


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


class StepRecorder:
    """Records what each step reports: in the metrics, their file once a second, and the progress bar.

    The results of several steps are fetched together, of many on a GPU or with other processes: there each fetch waits.
    """

    def __init__(self, run: Run, epoch: int) -> None:
        self.run, self.epoch = run, epoch
        self.fetch_every = 5 if run.device.type == "cpu" and run.processes.count == 1 else 50
        self.waiting: list[torch.Tensor] = []  # loss summed over the images, right answers, images; one a step
        self.rates: list[float] = []
        self.correct, self.count = 0, 0
        # a run's first batches are written at once: whoever watches it sees that it trains
        self.written = time.monotonic() if run.metrics["train_losses"] else -math.inf
        # disable=None: no bar where the output is not a terminal, so that a log is not flooded
        self.bar = tqdm(
            total=run.data.train_size,
            desc=f"epoch {epoch}",
            unit="img",
            unit_scale=True,
            disable=None if run.processes.is_main else True,
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
        """Take what ``train_one_epoch`` reports of a step."""
        self.waiting.append(torch.stack([loss * size, correct, torch.full_like(loss, size)]))
        self.rates.append(rate)
        if len(self.waiting) >= self.fetch_every:
            self.fetch()
        if self.run.stop_requested():
            raise StoppedError

    def fetch(self) -> None:
        """Take the waiting results from the device.

        Raises:
            TrainingError: a loss is not finite.
        """
        if not self.waiting:
            return
        metrics = self.run.metrics
        results = self.run.processes.sum(torch.stack(self.waiting)).tolist()
        for (loss_sum, correct, size), rate in zip(results, self.rates, strict=True):
            loss = loss_sum / size
            if not math.isfinite(loss):
                raise TrainingError(
                    f"the loss is {loss} in epoch {self.epoch}, batch {len(metrics['train_losses'])}, at learning"
                    f" rate {rate:.4g}; {self.run.advice}"
                )
            metrics["train_losses"].append(round(loss, 6))
            metrics["learning_rates"].append(round(rate, 9))
            self.correct += int(correct)
            self.count += int(size)
        self.bar.set_postfix(loss=f"{loss:.4f}", acc=f"{self.accuracy:.2f}%", lr=f"{rate:.4f}", refresh=False)
        self.bar.update(self.count - self.bar.n)
        self.waiting.clear()
        self.rates.clear()
        if time.monotonic() - self.written >= METRICS_SECONDS:
            self.run.save_metrics("running")
            self.written = time.monotonic()
