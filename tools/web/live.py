"""What the runs under a folder are doing now, from the metrics files that they rewrite about once a second.

watcher = Watcher("results")
for run in watcher.look(): print(run.name, run.status, run.images_per_second)
"""

import math
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from tools.compare.comparer import MetricsCache, batches_per_epoch, status_of, train_images

POINTS = 1000  # of a curve; each is the mean of as many batches as that takes
RATE_SECONDS = 10.0  # what images/s looks back on
LOOK_SECONDS = 0.25  # how often the files are looked at


@dataclass(frozen=True)
class LiveRun:
    """A run at one moment. ``version`` changes whenever anything else does."""

    name: str
    version: int
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

    def event(self, points_sent: int | None) -> dict[str, Any]:
        """What a page that has ``points_sent`` points of the curve needs; None: it has none, and wants none yet."""
        facts = {key: value for key, value in vars(self).items() if key not in ("losses", "rates", "version")}
        # the last point that was sent may have been of a part of its batches
        start = 0 if points_sent is None or points_sent > len(self.losses) else max(points_sent - 1, 0)
        if points_sent is None and self.status != "running":
            return facts | {"start": None, "losses": [], "rates": []}
        return facts | {"start": start, "losses": self.losses[start:], "rates": self.rates[start:]}


@dataclass
class _Seen:
    metrics: dict[str, Any] | None = None
    live: LiveRun | None = None
    progress: deque[tuple[float, int]] = field(default_factory=deque)  # seconds since 1970, batches done


class Watcher:
    """Looks at the runs under ``output_dir``, at most every ``LOOK_SECONDS`` however often it is asked."""

    def __init__(self, output_dir: str | None = None) -> None:
        self.cache = MetricsCache(output_dir)
        self._seen: dict[str, _Seen] = {}
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
        seen = self._seen.setdefault(name, _Seen())
        status = status_of(metrics)
        before = seen.live
        if before is not None and metrics is seen.metrics and status == before.status:
            return before
        seen.metrics = metrics
        try:
            seen.live = _live_run(name, metrics, status, seen.progress, before)
        except (KeyError, TypeError, ValueError, ArithmeticError):
            seen.live = None  # a configuration of another version of this program
        return seen.live


def _live_run(
    name: str, metrics: dict[str, Any], status: str, progress: deque[tuple[float, int]], before: LiveRun | None
) -> LiveRun:
    config, done = metrics["config"], len(metrics["train_losses"])
    updated = datetime.fromisoformat(metrics["updated"]).timestamp()
    epochs, epochs_done, batch_size = int(config["epochs"]), len(metrics["test_acc"]), int(config["batch_size"])
    an_epoch = batches_per_epoch(metrics)
    if progress and (progress[-1][1] > done or progress[-1][0] > updated):
        progress.clear()  # another run of this name, or the same one again from its checkpoint
    if before is not None and before.epochs_done != epochs_done:
        progress.clear()  # it was evaluating meanwhile
    progress.append((updated, done))
    while updated - progress[0][0] > RATE_SECONDS and len(progress) > 2:
        progress.popleft()
    rate = _rate(progress, batch_size) or _epoch_rate(metrics, train_images(metrics))
    left = None
    if status == "running" and rate:
        left = (epochs * an_epoch - done) * batch_size / rate
        left += (epochs - epochs_done) * _evaluation_seconds(metrics)
    stride = math.ceil(epochs * an_epoch / POINTS)
    return LiveRun(
        name=name,
        version=0 if before is None else before.version + 1,
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
    )


def _rate(progress: Sequence[tuple[float, int]], batch_size: int) -> float | None:
    seconds = progress[-1][0] - progress[0][0]
    batches = progress[-1][1] - progress[0][1]
    return batches * batch_size / seconds if seconds > 0 and batches > 0 else None


def _epoch_rate(metrics: dict[str, Any], images: int) -> float | None:
    seconds = metrics["epoch_seconds"]
    return images / seconds[-1] if seconds and seconds[-1] > 0 else None


def _evaluation_seconds(metrics: dict[str, Any]) -> float:
    """Of an epoch, besides the training: what the epochs that are done took for evaluation and files."""
    epochs = len(metrics["epoch_seconds"])
    total: float = metrics["total_seconds"] - sum(metrics["epoch_seconds"])
    return max(total / epochs, 0.0) if epochs else 0.0


def means(values: Sequence[float], stride: int) -> list[float]:
    """The mean of every ``stride`` values, the last one of those that are left."""
    parts = [values[start : start + stride] for start in range(0, len(values), stride)]
    return [round(sum(part) / len(part), 6) for part in parts]
