"""The reference that speed and accuracy are measured against: MNIST trained as a tutorial does it.

    python -m tools.naive --model 1 --epochs 2 --seed 3

The specification's transforms, image by image, in a DataLoader; ``nn.Dropout``; the default memory layout; one loop
over batches. The networks, the schedule and the evaluation are the project's, nothing of its fast path is.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from common.cli import OneLineParser, run_command
from data_utils import test_transforms, train_transforms
from imports import DataLoader, F, datasets, nn, optim, torch
from lr_schedulers import advances_every_batch, get_scheduler
from model_strategy import get_strategy
from models.blocks import ConvBlock
from training.config import TrainConfig, add_training_flags, given_settings
from training.machine import resolve_device
from training.step import evaluate

DEFAULTS: dict[str, Any] = {"epochs": 1, "scheduler": "onecycle"}


def plain_network(name: str) -> nn.Module:
    """The registered network ``name`` whose layers run one after the other, as PyTorch's own."""
    model = get_strategy(name).build()
    for parent in list(model.modules()):
        for key, child in parent.named_children():
            if isinstance(child, ConvBlock):
                layers = (nn.Dropout(layer.p) if isinstance(layer, nn.Dropout) else layer for layer in child)
                setattr(parent, key, nn.Sequential(*layers))
    return model


class NaiveTraining:
    """One training, by as many of the settings as it knows: ``train_batches``, then ``evaluate``."""

    def __init__(self, config: TrainConfig) -> None:
        torch.manual_seed(config.seed)
        folder = str(config.data_folder)
        self.train_set = datasets.MNIST(folder, train=True, transform=train_transforms())
        self.test_set = datasets.MNIST(folder, train=False, transform=test_transforms())
        self.loader = DataLoader(self.train_set, config.batch_size, shuffle=True)
        self.device = resolve_device(config.device)
        self.model = plain_network(config.model).to(self.device)
        self.optimizer = optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9)
        self.scheduler = get_scheduler(config.scheduler, self.optimizer, config.epochs, len(self.loader), config.max_lr)
        self.every_batch = advances_every_batch(config.scheduler)

    def train_batches(self) -> Iterator[int]:
        """One epoch, a step at a time; yields the number of images of each step."""
        self.model.train()
        for batch in self.loader:
            images, labels = (part.to(self.device) for part in batch)
            self.optimizer.zero_grad()
            loss = F.nll_loss(self.model(images), labels)
            loss.backward()
            self.optimizer.step()
            loss.item()  # what a progress bar shows
            if self.every_batch:
                self.scheduler.step()
            yield len(labels)
        if not self.every_batch:
            self.scheduler.step()

    def evaluate(self) -> float:
        """Percent of the test images that are right."""
        return evaluate(self.model, DataLoader(self.test_set, 1000), self.device)[1]


def train(args: argparse.Namespace) -> int:
    config = TrainConfig(**DEFAULTS | given_settings(args))
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    training = NaiveTraining(config)
    began = time.perf_counter()
    for _ in range(config.epochs):
        for _ in training.train_batches():
            pass
        accuracy = training.evaluate()  # after every epoch, as the command does
    print(json.dumps({"accuracy": accuracy, "seconds": round(time.perf_counter() - began, 3)}))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = OneLineParser(doc=__doc__, argument_default=argparse.SUPPRESS)
    add_training_flags(parser)
    return run_command(parser, train, argv)


if __name__ == "__main__":
    sys.exit(main())
