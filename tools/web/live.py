"""What the runs under a folder are doing now, from the metrics files that they rewrite about once a second.

watcher = Watcher("results")
for run in watcher.look(): print(run.name, run.status, run.images_per_second)
"""

import math
import threading
import time
from collections import deque
from collections.abc import Sequence
from datetime import datetime
from statistics import fmean
from typing import Any

from tools.compare.comparer import batches_per_epoch, status_of
from tools.networks import Networks

POINTS = 1000  # of a curve; each is the mean of as many batches as that takes
RATE_SECONDS = 10.0  # what images/s looks back on
LOOK_SECONDS = 0.25  # how often the files are looked at
NOT_TOLD = ("losses", "rates", "version", "metrics", "progress")  # of a run, or of its losses and rates only parts


class LiveRun:
    """A run at one moment, read from its metrics. ``version`` changes whenever anything else does.

    ``status``: running, finished, interrupted, failed, or crashed: it says running, but its process is gone.
    ``before``: what was read of this name the last time.
    """

    def __init__(self, name: str, metrics: dict[str, Any], status: str, before: "LiveRun | None") -> None:
        self.name, self.status, self.metrics = name, status, metrics
        self.version: int = 0 if before is None else before.version + 1
        config = metrics["config"]
        self.model, self.parameters, self.scheduler = metrics["model"], metrics["parameters"], str(config["scheduler"])
        self.train_acc, self.test_acc, self.val_acc = (metrics[f"{split}_acc"] for split in ("train", "test", "val"))
        self.epochs_done, self.epochs = len(self.test_acc), int(config["epochs"])
        self.batches_done, self.batches_per_epoch = len(metrics["train_losses"]), batches_per_epoch(metrics)
        self.updated = datetime.fromisoformat(metrics["updated"]).timestamp()  # seconds since 1970
        self.seconds: float = metrics["total_seconds"]  # since the first batch
        self.progress = self._progress(before)  # seconds since 1970, batches done
        rate = self._rate(int(config["batch_size"])) if status == "running" else None
        self.images_per_second = None if rate is None else round(rate, 1)
        self.seconds_left = None if rate is None else round(self._seconds_left(rate / int(config["batch_size"])), 1)
        self.stride = math.ceil(self.epochs * self.batches_per_epoch / POINTS)  # batches a point
        self.losses = means(metrics["train_losses"], self.stride)
        self.rates = metrics["learning_rates"][self.stride // 2 :: self.stride]

    def _progress(self, before: "LiveRun | None") -> deque[tuple[float, int]]:
        progress = deque[tuple[float, int]]() if before is None else before.progress
        if progress and (progress[-1][1] > self.batches_done or progress[-1][0] > self.updated):
            progress.clear()  # another run of this name, or the same one again from its checkpoint
        if before is not None and before.epochs_done != self.epochs_done:
            progress.clear()  # it was evaluating meanwhile
        progress.append((self.updated, self.batches_done))
        while self.updated - progress[0][0] > RATE_SECONDS and len(progress) > 2:
            progress.popleft()
        return progress

    def _rate(self, batch_size: int) -> float | None:
        """Images a second: of the last seconds, else of the last epoch."""
        since, batches = self.progress[0]
        if self.updated > since and self.batches_done > batches:
            return (self.batches_done - batches) * batch_size / (self.updated - since)
        last = self.metrics["epoch_seconds"][-1:]
        return int(self.metrics["train_images"]) / last[0] if last and last[0] > 0 else None

    def _seconds_left(self, batches_a_second: float) -> float:
        seconds = self.metrics["epoch_seconds"]
        left = (self.epochs * self.batches_per_epoch - self.batches_done) / batches_a_second
        if seconds:  # besides the training an epoch has its evaluation and files
            left += (self.epochs - self.epochs_done) * max((self.seconds - sum(seconds)) / len(seconds), 0.0)
        return max(left, 0.0)

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
        self.networks = Networks(output_dir)
        self._seen: dict[str, LiveRun] = {}
        self._lock = threading.Lock()
        self._looked = -math.inf
        self._runs: list[LiveRun] = []

    def look(self) -> list[LiveRun]:
        """Every run whose metrics can be read: those that train first, then the latest."""
        with self._lock:
            if time.monotonic() - self._looked >= LOOK_SECONDS:
                read, _ = self.networks.metrics()  # those that are damaged, or between two names, are not in it
                runs = [run for name, metrics in read.items() if (run := self._look_at(name, metrics))]
                self._runs = sorted(runs, key=lambda run: (run.status != "running", -run.updated))
                self._looked = time.monotonic()
            return self._runs

    def _look_at(self, name: str, metrics: dict[str, Any]) -> LiveRun | None:
        before, status = self._seen.get(name), status_of(metrics)
        if before is None or metrics is not before.metrics or status != before.status:
            try:
                self._seen[name] = LiveRun(name, metrics, status, before)
            except (KeyError, TypeError, ValueError, ArithmeticError):  # of another version of this program
                self._seen.pop(name, None)
        return self._seen.get(name)


def means(values: Sequence[float], stride: int) -> list[float]:
    """The mean of every ``stride`` values, the last one of those that are left."""
    return [round(fmean(values[start : start + stride]), 6) for start in range(0, len(values), stride)]
