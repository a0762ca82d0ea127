"""What the runs under a folder are doing now, from the metrics files that they rewrite about once a second.

watcher = Watcher("results")
for run in watcher.look(): print(run.name, run.status, run.images_per_second)
"""

import math
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from tools.compare.comparer import MetricsCache, batches_per_epoch, status_of, train_images

POINTS = 1000  # of a curve; each is the mean of as many batches as that takes
RATE_SECONDS = 10.0  # what images/s looks back on
LOOK_SECONDS = 0.25  # how often the files are looked at
NOT_TOLD = ("losses", "rates", "version", "metrics", "progress")  # of a run, or of its losses and rates only parts


@dataclass(frozen=True)
class LiveRun:
    """A run at one moment. ``version`` changes whenever anything else does."""

    name: str
    status: str  # running, finished, interrupted, failed, or crashed: it says running, but its process is gone
    model: str
    parameters: int
    scheduler: str
    epochs_done: int
    epochs: int
    batches_done: int
    batches_per_epoch: int
    images_per_second: float | None
    seconds: float  # since the first batch
    seconds_left: float | None
    updated: float  # seconds since 1970
    train_acc: list[float]
    test_acc: list[float]
    val_acc: list[float]
    stride: int  # batches a point
    losses: list[float]
    rates: list[float]
    version: int
    metrics: dict[str, Any]  # that it was read from
    progress: deque[tuple[float, int]]  # seconds since 1970, batches done

    def event(self, points_sent: int | None) -> dict[str, Any]:
        """What a page that has ``points_sent`` points of the curve needs; None: it has none, and wants none yet."""
        facts = {key: value for key, value in vars(self).items() if key not in NOT_TOLD}
        # the last point that was sent may have been of a part of its batches
        start = 0 if points_sent is None or points_sent > len(self.losses) else max(points_sent - 1, 0)
        if points_sent is None and self.status != "running":
            return facts | {"start": None, "losses": [], "rates": []}
        return facts | {"start": start, "losses": self.losses[start:], "rates": self.rates[start:]}


class Watcher:
    """Looks at the runs under ``output_dir``, at most every ``LOOK_SECONDS`` however often it is asked."""

    def __init__(self, output_dir: str | None = None) -> None:
        self.cache = MetricsCache(output_dir)
        self._seen: dict[str, LiveRun] = {}
        self._lock = threading.Lock()
        self._looked = -math.inf
        self._runs: list[LiveRun] = []

    def look(self) -> list[LiveRun]:
        """Every run whose metrics can be read: those that train first, then the latest."""
        with self._lock:
            if time.monotonic() - self._looked >= LOOK_SECONDS:
                read, _ = self.cache.all()  # those that are damaged, or between two names, are not in it
                runs = [run for name, metrics in read.items() if (run := self._look_at(name, metrics))]
                self._runs = sorted(runs, key=lambda run: (run.status != "running", -run.updated))
                self._looked = time.monotonic()
            return self._runs

    def _look_at(self, name: str, metrics: dict[str, Any]) -> LiveRun | None:
        before, status = self._seen.get(name), status_of(metrics)
        if before is None or metrics is not before.metrics or status != before.status:
            try:
                self._seen[name] = _live_run(name, metrics, status, before)
            except (KeyError, TypeError, ValueError, ArithmeticError):  # of another version of this program
                self._seen.pop(name, None)
        return self._seen.get(name)


def _live_run(name: str, metrics: dict[str, Any], status: str, before: LiveRun | None) -> LiveRun:
    config, done = metrics["config"], len(metrics["train_losses"])
    updated = datetime.fromisoformat(metrics["updated"]).timestamp()
    epochs, epochs_done, batch_size = int(config["epochs"]), len(metrics["test_acc"]), int(config["batch_size"])
    an_epoch = batches_per_epoch(metrics)
    progress = deque[tuple[float, int]]() if before is None else before.progress
    if progress and (progress[-1][1] > done or progress[-1][0] > updated):
        progress.clear()  # another run of this name, or the same one again from its checkpoint
    if before is not None and before.epochs_done != epochs_done:
        progress.clear()  # it was evaluating meanwhile
    progress.append((updated, done))
    while updated - progress[0][0] > RATE_SECONDS and len(progress) > 2:
        progress.popleft()
    seconds, epoch_seconds = updated - progress[0][0], metrics["epoch_seconds"]
    rate = left = None
    if seconds > 0 and done > progress[0][1]:
        rate = (done - progress[0][1]) * batch_size / seconds
    elif epoch_seconds and epoch_seconds[-1] > 0:
        rate = train_images(metrics) / epoch_seconds[-1]
    if status == "running" and rate:
        # besides the training an epoch has its evaluation and files
        others = metrics["total_seconds"] - sum(epoch_seconds) if epoch_seconds else 0.0
        left = (epochs * an_epoch - done) * batch_size / rate
        left += (epochs - epochs_done) * max(others, 0.0) / max(len(epoch_seconds), 1)
    stride = math.ceil(epochs * an_epoch / POINTS)
    return LiveRun(
        name=name,
        status=status,
        **{key: metrics[key] for key in ("model", "parameters", "train_acc", "test_acc", "val_acc")},
        scheduler=str(config["scheduler"]),
        epochs_done=epochs_done,
        epochs=epochs,
        batches_done=done,
        batches_per_epoch=an_epoch,
        images_per_second=round(rate, 1) if rate and status == "running" else None,
        seconds=metrics["total_seconds"],
        seconds_left=None if left is None else round(max(left, 0.0), 1),
        updated=updated,
        stride=stride,
        losses=means(metrics["train_losses"], stride),
        rates=metrics["learning_rates"][stride // 2 :: stride],
        version=0 if before is None else before.version + 1,
        metrics=metrics,
        progress=progress,
    )


def means(values: Sequence[float], stride: int) -> list[float]:
    """The mean of every ``stride`` values, the last one of those that are left."""
    parts = [values[start : start + stride] for start in range(0, len(values), stride)]
    return [round(sum(part) / len(part), 6) for part in parts]
