"""A run under way: its epochs, its state, and being where it was when a checkpoint was written."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from common.cli import silent
from common.files import DamagedFileError
from common.results import Metrics, save_model_params
from data_utils import Data, TensorBatches
from imports import LRScheduler, nn, torch
from training.checkpoint import Checkpoint, save_checkpoint
from training.config import TrainConfig
from training.machine import first_line
from training.processes import Processes
from training.report import Report
from training.step import Step, evaluate, train_one_epoch
from visualization import plot_metrics, save_model_summary


class StoppedError(RuntimeError):
    """The run ended early because it was asked to."""


@dataclass
class Run:
    """A run under way: everything that its epochs share."""

    config: TrainConfig
    data: Data
    processes: Processes
    model: nn.Module  # what is trained; step.model is the same network as a step runs it
    result: nn.Module  # what is evaluated and saved: ``model``, or its average
    evaluated: nn.Module  # ``result`` as an evaluation runs it
    step: Step
    scheduler: LRScheduler
    report: Report
    stop_requested: Callable[[], bool] = lambda: False  # asked after every batch
    after_epoch: Callable[[Metrics], None] = silent  # what it raises ends the run
    has_saved: bool = False  # a checkpoint

    @property
    def metrics(self) -> Metrics:
        return self.report.metrics

    def train(self) -> None:
        """All epochs still to come; a TrainingError if the loss is not finite, a StoppedError if asked to stop."""
        for _ in self.steps():
            pass

    def steps(self) -> Iterator[None]:
        """The same, a step at a time, so that several runs can take turns."""
        self.report.begin()
        for epoch in range(self.report.epochs_done, self.config.epochs):
            if isinstance(self.data.train, TensorBatches) and epoch >= self.config.epochs - self.config.plain_epochs:
                self.data.train.policy = None
            with self.report.epoch(self.data.train_size):
                parts = self.processes.part_weights(self.data.train_size, self.config.batch_size)
                for result in train_one_epoch(self.step, self.data.train, parts):
                    self.report.step(result)
                    if self.stop_requested():
                        raise StoppedError(f"stopped in epoch {self.report.epochs_done}")
                    yield
            if self.step.scheduler is None:  # it is advanced once an epoch
                self.scheduler.step()
            self.evaluate_epoch()
            self.report.end_epoch()
            self.save_checkpoint()
            self.report.save("running")
            self.after_epoch(self.metrics)

    def evaluate_epoch(self) -> None:
        """Evaluate on the test images and on those held out, as far as there are any."""
        self.processes.copy_buffers(self.model)
        if self.step.average is not None:
            self.processes.copy_buffers(self.step.average)
        for split, batches in (("test", self.data.test), ("val", self.data.val)):
            if batches is not None:
                where = self.step.device, self.processes, self.step.classes
                self.report.evaluated(split, *evaluate(self.evaluated, batches, *where))

    def save_results(self) -> None:
        if not self.processes.is_main:
            return
        name, output_dir = self.config.run_name, self.config.output_dir
        save_model_params(self.result, name, output_dir)
        save_model_summary(self.result, name, output_dir)
        self.report.save("finished")
        plot_metrics(self.metrics, name, output_dir)

    def save_checkpoint(self) -> None:
        generators = {"torch": torch.get_rng_state()}
        if self.step.device.type == "cuda":
            generators["cuda"] = torch.cuda.get_rng_state(self.step.device)
        of_all = self.processes.gather(generators)
        if not self.processes.is_main:
            return
        state = {
            "epochs_done": self.report.epochs_done,
            "config": asdict(self.config),
            "metrics": self.metrics,
            **{name: None if part is None else part.state_dict() for name, part in self._stateful().items()},
            "data": self.data.generator.get_state(),
            "processes": of_all,
        }
        save_checkpoint(self.config.files, state, self.has_saved)
        self.has_saved = True

    def _stateful(self) -> dict[str, Any]:
        """What has a state of its own, by its name in a checkpoint."""
        step = self.step
        return {"model": self.model, "average": step.average, "optimizer": step.optimizer, "scheduler": self.scheduler}

    def restore(self, checkpoint: Checkpoint) -> None:
        """Be where ``checkpoint`` was written; a DamagedFileError if it is not of a run with its own configuration."""
        before, now, here = checkpoint["metrics"], self.metrics, self.metrics["environment"]
        try:
            for name, part in self._stateful().items():
                if part is not None:
                    part.load_state_dict(checkpoint[name])
            self.data.generator.set_state(checkpoint["data"])
            mine = checkpoint["processes"][self.processes.rank]
            torch.set_rng_state(mine["torch"])
            if self.step.device.type == "cuda":
                torch.cuda.set_rng_state(mine["cuda"], self.step.device)
            was = {"kernels": False, "graph": False, **before["environment"]}  # there were none at first
            other = [k for k in ("torch", "device", "threads", "platform", "kernels", "graph") if was[k] != here[k]]
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
            file = self.config.files.checkpoint
            raise DamagedFileError(f"{file} does not fit its own configuration: {first_line(error)}") from None
        if other:
            changes = ", ".join(f"{k} {was[k]} -> {here[k]}" for k in other)
            self.report.log(f"Note: not as when the checkpoint was written, so the last bits may differ: {changes}.")
        kept = {key: now[key] for key in ("config", "environment", "pid", "train_images")}
        self.report.metrics = {**before, **kept}
