"""What the runs under a folder are doing now, from the metrics files that they rewrite about once a second.

watcher = Watcher("results")
for run in watcher.look(): print(run.name, run.status, run.images_per_second)
"""

import math
import threading
import time
from collections.abc import Sequence
from datetime import datetime
from statistics import fmean
from typing import Any

from tools.compare.comparer import batches_per_epoch, status_of
from tools.networks import Networks

POINTS = 1000  # of a curve; each is the mean of as many batches as that takes
LOOK_SECONDS = 0.25  # how often the files are looked at
NOT_TOLD = ("losses", "rates", "version", "metrics")  # of a run, or of its losses and rates only parts


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
        # not said by a run whose first step is under way, nor by one of an older version
        rate = self.images_per_second = metrics.get("images_per_second") if status == "running" else None
        # seconds a batch, with the evaluations as soon as there was one
        done = self.epochs_done * self.batches_per_epoch
        each = self.seconds / done if done else rate and int(config["batch_size"]) / rate
        left = self.epochs * self.batches_per_epoch - self.batches_done
        self.seconds_left = round(max(left, 0) * each, 1) if rate and each else None
        self.stride = math.ceil(self.epochs * self.batches_per_epoch / POINTS)  # batches a point
        self.losses = means(metrics["train_losses"], self.stride)
        self.rates = metrics["learning_rates"][self.stride // 2 :: self.stride]

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
