"""The reference that speed and accuracy are measured against: MNIST trained as a tutorial does it.

The specification's transforms, image by image, in a DataLoader; ``nn.Dropout``; the default memory layout; one loop
over batches. The networks and the schedule are the project's, nothing of its fast path is.

    python -m tools.naive --model 1 --epochs 2 --seed 3
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator

from common.files import PROJECT_DIR
from data_utils import test_transforms, train_transforms
from imports import DataLoader, F, datasets, nn, optim, torch
from lr_schedulers import advances_every_batch, get_scheduler
from model_strategy import get_strategy
from models.blocks import ConvBlock


def plain_network(name: str) -> nn.Module:
    """The registered network ``name`` whose layers run one after the other, as PyTorch's own."""
    model = get_strategy(name).build()
    for parent in list(model.modules()):
        for key, child in parent.named_children():
            if isinstance(child, ConvBlock):
                setattr(parent, key, nn.Sequential(*child))
    return model


class NaiveTraining:
    """One training on the CPU. ``train_batches`` yields after every step; ``evaluate`` gives percent right."""

    def __init__(
        self,
        data_dir: str | os.PathLike[str],
        model: str = "1",
        epochs: int = 1,
        scheduler: str = "onecycle",
        max_lr: float = 0.75,
        batch_size: int = 128,
        seed: int = 1,
    ) -> None:
        torch.manual_seed(seed)
        self.train_set = datasets.MNIST(str(data_dir), train=True, transform=train_transforms())
        self.test_set = datasets.MNIST(str(data_dir), train=False, transform=test_transforms())
        self.loader = DataLoader(self.train_set, batch_size, shuffle=True)
        self.model = plain_network(model)
        self.optimizer = optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9)
        self.scheduler = get_scheduler(scheduler, self.optimizer, epochs, len(self.loader), max_lr)
        self.every_batch = advances_every_batch(scheduler)

    def train_batches(self) -> Iterator[int]:
        """One epoch, a step at a time; yields the number of images of each step."""
        self.model.train()
        for images, labels in self.loader:
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

    @torch.inference_mode()
    def evaluate(self) -> float:
        """Percent of the test images that are right."""
        self.model.eval()
        right = sum(
            int((self.model(images).argmax(1) == labels).sum()) for images, labels in DataLoader(self.test_set, 1000)
        )
        return 100.0 * right / len(self.test_set)


def main() -> None:
    """Train once and print the accuracy and the seconds as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model", default="1")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--scheduler", default="onecycle")
    parser.add_argument("--max_lr", type=float, default=0.75)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--data_dir", default=PROJECT_DIR / "data")
    args = vars(parser.parse_args())
    torch.set_num_threads(args.pop("threads"))
    training = NaiveTraining(**args)
    began = time.perf_counter()
    for _ in range(args["epochs"]):
        for _ in training.train_batches():
            pass
        accuracy = training.evaluate()  # after every epoch, as the command does
    print(json.dumps({"accuracy": accuracy, "seconds": round(time.perf_counter() - began, 3)}))


if __name__ == "__main__":
    main()
