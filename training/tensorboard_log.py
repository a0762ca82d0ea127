"""The numbers of a run in TensorBoard's form: ``main.py --tensorboard``, then ``tensorboard --logdir outputs``.

TensorBoard itself is optional: requirements-tools.txt has it, training does without.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from common.files import UsageError

PER_BATCH = {"train_losses": "loss/train", "learning_rates": "learning_rate"}
PER_EPOCH = {
    "train_acc": "accuracy/train",
    "test_acc": "accuracy/test",
    "val_acc": "accuracy/validation",
    "test_losses": "loss/test",
    "val_losses": "loss/validation",
}


def check_installed() -> None:
    """Make sure that TensorBoard is there, without loading it; else a UsageError says how to add it."""
    if find_spec("tensorboard") is None:
        raise UsageError("tensorboard: it is not installed; add it with: pip install -r requirements-tools.txt")


class TensorBoardLog:
    """Writes what is new in the metrics of a run as event files in ``folder``; every step is a number of batches.

    What TensorBoard has from where ``metrics`` begin, of an earlier run of this name or checkpoint, is dropped.
    """

    def __init__(self, folder: Path, metrics: dict[str, Any]) -> None:
        check_installed()
        from torch.utils.tensorboard import SummaryWriter

        self.known = {key: len(metrics[key]) for key in PER_BATCH | PER_EPOCH}
        self.writer = SummaryWriter(str(folder), purge_step=self.known["train_losses"] + 1)

    def write(self, metrics: dict[str, Any]) -> None:
        batches = len(metrics["train_losses"])
        for key, tag in (PER_BATCH | PER_EPOCH).items():
            for place, value in enumerate(metrics[key][self.known[key] :], self.known[key] + 1):
                self.writer.add_scalar(tag, value, place if key in PER_BATCH else batches)
            self.known[key] = len(metrics[key])
        self.writer.flush()
