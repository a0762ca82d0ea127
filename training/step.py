"""One training step on one batch, a pass over all of them, and evaluation.

step = Step(model, optimizer, device)
for result in train_one_epoch(step, batches):    # result.totals: still on the device
    ...
loss, accuracy = evaluate(model, batches, device)
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import repeat
from typing import Any, NamedTuple

from data_utils import Batch
from imports import AveragedModel, F, LRScheduler, nn, optim, torch
from training.processes import ALONE, Processes


class StepResult(NamedTuple):
    """What a step leaves besides other weights."""

    totals: torch.Tensor  # float32 [3], on the device: the loss summed over the images, right answers, images
    rate: float  # the learning rate that the step was taken at


@dataclass
class Step:
    """Forward, backward, and the optimizer's step, as one call on a batch; ``CapturedStep`` is it as a CUDA graph."""

    model: nn.Module  # as a step runs it: by kernels, compiled, synchronized
    optimizer: optim.Optimizer
    device: torch.device
    scheduler: LRScheduler | None = None  # the one to advance after every batch, if any
    average: AveragedModel | None = None  # the moving average of the weights to bring up to date, if any
    amp: bool = False  # compute in bfloat16 where that is safe
    label_smoothing: float = 0.0  # part of a label spread over all classes (Szegedy et al. 2015, arXiv:1512.00567)
    classes: int = 10  # of the data set; an output beyond them is never the answer

    def inputs(self, batches: Iterable[Batch]) -> Iterator[Any]:
        """What ``__call__`` takes, a batch at a time."""
        return iter(batches)

    def __call__(self, batch: Any, weight: float = 1.0) -> StepResult:
        """Train on images [N, 1, 28, 28] and labels [N]; ``weight``: of the loss, see ``Processes.part_weights``."""
        rate = self.optimizer.param_groups[0]["lr"]
        images, labels = batch
        totals = self.compute(images, labels, weight)
        if self.scheduler is not None:
            self.scheduler.step()
        return StepResult(totals, rate)

    def compute(self, images: torch.Tensor, labels: torch.Tensor, weight: float = 1.0) -> torch.Tensor:
        """All that runs on the device. Returns the step's totals."""
        images = images.to(self.device, memory_format=torch.channels_last, non_blocking=True)
        labels = labels.to(self.device, non_blocking=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            log_probabilities = self.model(images)
            loss = F.nll_loss(log_probabilities, labels)
            if self.label_smoothing:
                loss = (1 - self.label_smoothing) * loss - self.label_smoothing * log_probabilities.mean()
        self.optimizer.zero_grad()
        (loss * weight).backward()
        self.optimizer.step()
        if self.average is not None:
            self.update_average()
        loss, correct = loss.detach(), (log_probabilities[:, : self.classes].argmax(1) == labels).sum()
        return torch.stack([loss * len(labels), correct, torch.full_like(loss, len(labels))])

    def update_average(self) -> None:
        assert self.average is not None
        self.average.update_parameters(self.model)


def train_one_epoch(
    step: Step, batches: Iterable[Batch], loss_weights: Iterable[float] = repeat(1.0)
) -> Iterator[StepResult]:
    """One pass over the training images, a step at a time; yields what each step leaves."""
    step.model.train()
    for batch, weight in zip(step.inputs(batches), loss_weights, strict=False):
        yield step(batch, weight)


@torch.inference_mode()
def evaluate(
    model: nn.Module, batches: Iterable[Batch], device: torch.device, processes: Processes = ALONE, classes: int = 10
) -> tuple[float, float]:
    """The mean negative log-likelihood and the accuracy in percent over all images of all processes' ``batches``."""
    model.eval()
    totals = torch.zeros(3, device=device)  # as those of a step
    for images, labels in batches:
        images, labels = images.to(device, memory_format=torch.channels_last), labels.to(device)
        log_probabilities = model(images)
        loss = F.nll_loss(log_probabilities, labels, reduction="sum")
        correct = (log_probabilities[:, :classes].argmax(1) == labels).sum()
        totals += torch.stack([loss, correct, torch.full_like(loss, len(labels))])
    loss_sum, all_correct, count = processes.sum(totals).tolist()
    return loss_sum / count, 100.0 * all_correct / count
