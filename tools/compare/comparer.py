"""The comparison of the runs under a folder, as data: their metrics, and MNIST's test digits."""

import base64
import functools
import json
import math
from collections.abc import Collection
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from common.cli import silent
from common.files import PROJECT_DIR, DamagedFileError, RunFiles, UsageError, existing_runs
from common.results import Metrics
from data_utils import load_images
from image_data.facts import MNIST, DataSet, facts_of
from image_data.fetch import DataError, is_there
from tools.networks import (
    ENSEMBLE_COMMAND,
    FileCache,
    Networks,
    ensemble_file,
    is_a_name,
    known_ensembles,
    read_ensemble,
)
from training.config import TrainConfig
from visualization import load_metrics_json

SCHEMA = 1
CURVES = ("train_losses", "learning_rates", "train_acc", "test_losses", "test_acc", "val_losses", "val_acc")
MAX_DISAGREEMENTS = 200  # test images that are shown
MNIST_TRAIN_IMAGES = 60_000
EXPORTED = {"file": str, "precision": str, "bytes": int, "accuracy": float}  # what is shown of a file
STALE_POINTS = 0.015  # an evaluation whose accuracy is further from the run's is of other weights


@dataclass(frozen=True)
class RunRow:
    """A run's or an ensemble's line in the table. Accuracies in percent; None: not known."""

    name: str
    kind: str  # "network" or "ensemble"
    model: str
    status: str
    accuracy: float | None  # of the test images, at the last epoch
    parameters: int
    latency_ms: float | None  # of one image, on this machine
    best_accuracy: float | None = None
    val_accuracy: float | None = None
    bytes: int | None = None  # of the file with the weights
    epochs: int | None = None
    planned_epochs: int | None = None
    seconds: float | None = None
    scheduler: str = ""
    batch_size: int | None = None
    updated: str = ""


@dataclass(frozen=True)
class Comparison:
    """Everything that the page and the file show.

    ``rows`` are of every run there is; the rest of those that were chosen. ``missing`` names commands that would add
    something, ``problems`` files that cannot be read.
    """

    rows: list[RunRow]
    chosen: list[str]
    curves: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    batches: dict[str, int] = field(default_factory=dict)  # an epoch
    evaluations: dict[str, dict[str, Any]] = field(default_factory=dict)
    exports: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    disagreements: list[dict[str, Any]] = field(default_factory=list)
    missing: list[dict[str, str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    schema: int = SCHEMA


class Comparer:
    """Compares the runs under ``output_dir``; keeps what it read and measured while the files stay as they are."""

    def __init__(
        self, output_dir: str | None = None, data_dir: str | None = None, networks: Networks | None = None
    ) -> None:
        self.output_dir, self.data_dir = output_dir, data_dir
        self.metrics = MetricsCache(output_dir)
        self.networks = networks or Networks(output_dir, log=silent)

    def rows(self, problems: list[str] | None = None) -> list[RunRow]:
        """A row a run, the most accurate first; ``problems`` gets a line for every run that cannot be read."""
        rows = []
        for name in self.metrics.names():
            metrics = self.metrics.get(name)
            if isinstance(metrics, str):
                if problems is not None:
                    problems.append(metrics)
                continue
            rows.append(self._row(name, metrics))
        for name in known_ensembles(self.output_dir):
            if any(row.name == name for row in rows):
                continue
            try:
                rows.append(self._ensemble_row(RunFiles(name, self.output_dir)))
            except DamagedFileError as error:
                if problems is not None:
                    problems.append(str(error))
        return sorted(rows, key=lambda row: (-(row.accuracy or 0), row.name))

    def _row(self, name: str, metrics: Metrics) -> RunRow:
        params = RunFiles(name, self.output_dir).params
        config, test = metrics["config"], metrics["test_acc"]
        return RunRow(
            name=name,
            kind="network",
            model=metrics["model"],
            status=status_of(metrics),
            accuracy=test[-1] if test else None,
            best_accuracy=max(test, default=None),
            val_accuracy=metrics["val_acc"][-1] if metrics["val_acc"] else None,
            parameters=metrics["parameters"],
            bytes=params.stat().st_size if params.is_file() else None,
            epochs=len(test),
            planned_epochs=config.get("epochs"),
            seconds=metrics["total_seconds"],
            latency_ms=self._latency(name),
            scheduler=str(config.get("scheduler", "")),
            batch_size=config.get("batch_size"),
            updated=metrics["updated"],
        )

    def _ensemble_row(self, files: RunFiles) -> RunRow:
        facts = read_ensemble(files)
        return RunRow(
            name=files.name,
            kind="ensemble",
            model=f"{len(facts['members'])} networks, {facts.get('method', '')}",
            status="finished",
            accuracy=float(facts["accuracy"]),
            parameters=int(facts["parameters"]),
            latency_ms=self._latency(files.name),
        )

    def _latency(self, name: str) -> float | None:
        """Of one image through the run's saved network; None if it has none that can be loaded."""
        files = RunFiles(name, self.output_dir)
        if not files.params.is_file() and not ensemble_file(files).is_file():
            return None
        return next((network.latency_ms for network in self.networks.named([name])), None)

    def compare(self, names: Collection[str] | None = None) -> Comparison:
        """The comparison; details for ``names`` (None: all). A UsageError lists the runs if there is none of a name."""
        problems: list[str] = []
        rows = self.rows(problems)
        known = [row.name for row in rows]
        unknown = [name for name in names or () if name not in known]
        if unknown:
            raise UsageError(f"there is no run {', '.join(unknown)}; there are {', '.join(known) or 'none'}")
        chosen = [name for name in known if names is None or name in names]
        comparison = Comparison(rows=rows, chosen=chosen, problems=problems)
        for row in rows:
            if row.name in chosen:
                self._add_details(comparison, row)
        if not any(row.kind == "ensemble" for row in rows):
            command = self._command(ENSEMBLE_COMMAND)
            comparison.missing.append({"what": "an ensemble of the networks", "command": command})
        of_data: dict[str, dict[str, dict[str, Any]]] = {}  # networks can disagree on the same images alone
        for name, evaluation in comparison.evaluations.items():
            of_data.setdefault(DataSet.of(self._facts(name)).sha256, {})[name] = evaluation
        for evaluations in of_data.values():
            comparison.disagreements.extend(self._disagreements(evaluations))
        return comparison

    def _add_details(self, comparison: Comparison, row: RunRow) -> None:
        metrics = self.metrics.get(row.name) if row.kind == "network" else ""
        if not isinstance(metrics, str):
            try:
                comparison.batches[row.name] = batches_per_epoch(metrics)
                comparison.curves[row.name] = {key: metrics[key] for key in CURVES}
            except (KeyError, TypeError, ValueError, ArithmeticError) as error:
                comparison.problems.append(f"the metrics of {row.name} are not as the schema says: {error!r}")
        files = RunFiles(row.name, self.output_dir)
        is_ensemble = row.kind == "ensemble"
        flag = "ensemble" if is_ensemble else "name"
        for what, tool, add in (
            ("evaluation", "evaluate", self._add_evaluation),
            ("export", "export", self._add_export),
        ):
            path = files.metrics.with_name(f"{row.name}_{what}.json")
            if not path.is_file():
                if row.bytes is not None or (is_ensemble and tool == "evaluate"):  # an ensemble is not exported
                    command = self._command(f"python -m tools.{tool} --{flag} {row.name}")
                    comparison.missing.append({"what": f"the {what} of {row.name}", "command": command})
                continue
            try:
                add(comparison, row, json.loads(path.read_text(encoding="utf-8")))
            except (OSError, ValueError, RecursionError, TypeError, LookupError, AttributeError) as error:
                comparison.problems.append(f"{path} is not as its schema says: {type(error).__name__} {error}")

    def _facts(self, name: str) -> dict[str, Any]:
        """A run's metrics, or what describes the ensemble."""
        metrics = self.metrics.get(name)
        return read_ensemble(RunFiles(name, self.output_dir)) if isinstance(metrics, str) else metrics

    def _test_images(self, name: str) -> Any:
        """As ``mnist_test_digits``, of what ``name`` was trained on; None if those are gone."""
        facts, folder = self._facts(name), self.data_dir
        of_run = self.metrics.get(facts["members"][0]) if "members" in facts else facts
        if folder is None and not isinstance(of_run, str) and (data := DataSet.of(facts)) != MNIST:
            folder = str(TrainConfig(**of_run["config"]).data_folder)
            if not is_there(folder) or facts_of(Path(folder)).sha256 != data.sha256:
                return None
        return mnist_test_digits(folder)

    def _command(self, command: str) -> str:
        return command if self.output_dir is None else f"{command} --output_dir {self.output_dir}"

    def _add_evaluation(self, comparison: Comparison, row: RunRow, found: dict[str, Any]) -> None:
        confusion = [[int(count) for count in line] for line in found["confusion"]]
        if [len(line) for line in confusion] != [10] * 10:
            raise ValueError("the confusion matrix is not 10 x 10")
        classes = [str(name) for name in found.get("classes", MNIST.classes)]
        comparison.evaluations[row.name] = {
            "accuracy": float(found["accuracy"]),
            "accuracy_interval": [float(end) for end in found["accuracy_interval"]],
            "classes": classes,
            "confusion": [line[: len(classes)] for line in confusion[: len(classes)]],
            "recall": [float(entry["recall"]) for entry in found["per_class"]][: len(classes)],
            "mistakes": {
                int(entry["index"]): (int(entry["true"]), int(entry["predicted"])) for entry in found["mistakes"]
            },
            # weights that were trained anew since have another accuracy, but for a lucky hit
            "stale": row.accuracy is not None and abs(float(found["accuracy"]) - row.accuracy) > STALE_POINTS,
        }

    def _add_export(self, comparison: Comparison, row: RunRow, found: dict[str, Any]) -> None:
        comparison.exports[row.name] = [
            {key: kind(entry[key]) for key, kind in EXPORTED.items()} | {"latency_ms": float(entry["latency_ms"]["1"])}
            for entry in found["files"]
        ]

    def _disagreements(self, evaluations: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
        """The test images that some networks get right and others wrong, or wrong in different ways."""
        wrong: dict[int, dict[str, int]] = {}
        labels: dict[int, int] = {}
        for name, evaluation in evaluations.items():
            for index, (label, predicted) in evaluation.pop("mistakes").items():
                wrong.setdefault(index, {})[name] = predicted
                labels[index] = label
        found: list[dict[str, Any]] = []
        for index, mistaken in sorted(wrong.items()):
            predicted = {name: mistaken.get(name, labels[index]) for name in evaluations}
            if len(set(predicted.values())) > 1:
                found.append({"index": index, "true": labels[index], "predicted": predicted})
        found.sort(key=lambda entry: -len(set(entry["predicted"].values())))  # stable: then by index
        digits = self._test_images(name) if found else None
        for entry in found[:MAX_DISAGREEMENTS]:
            entry["classes"] = evaluations[name]["classes"]
            if digits is not None and entry["index"] < len(digits[0]):
                entry["pixels"] = base64.b64encode(digits[0][entry["index"]].tobytes()).decode()
        return found[:MAX_DISAGREEMENTS]


class MetricsCache:
    """The metrics of the runs under ``output_dir``, read again only when a file changed."""

    def __init__(self, output_dir: str | None = None) -> None:
        self.output_dir = output_dir
        self._read: FileCache[Metrics | str] = FileCache()

    def names(self) -> list[str]:
        return [name for name in existing_runs(self.output_dir, "_metrics.json") if is_a_name(name)]

    def get(self, name: str) -> Metrics | str:
        """The metrics of a run, or one line that says why they cannot be had."""
        files = RunFiles(name, self.output_dir)
        return self._read.get(name, [files.metrics], functools.partial(self._load, name))

    def _load(self, name: str) -> Metrics | str:
        try:
            return load_metrics_json(name, self.output_dir)
        except (DamagedFileError, OSError) as error:
            return str(error)


def train_images(metrics: Metrics) -> int:
    """How many images an epoch of a run has; runs before this was recorded were of MNIST."""
    return int(metrics.get("train_images", MNIST_TRAIN_IMAGES - metrics["config"]["val_split"]))


def batches_per_epoch(metrics: Metrics) -> int:
    return math.ceil(train_images(metrics) / int(metrics["config"]["batch_size"]))


def status_of(metrics: dict[str, Any]) -> str:
    """The run's status; ``crashed`` if it says that it is running while its process is gone."""
    status: str = metrics["status"]
    return "crashed" if status == "running" and not is_alive(metrics["pid"], metrics["updated"]) else status


def is_alive(pid: int, updated: str) -> bool:
    """Whether the process that wrote at ``updated`` (ISO) runs still; one that began later only has its number."""
    import psutil

    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        return process.create_time() <= datetime.fromisoformat(updated).timestamp() + 1
    except psutil.AccessDenied:
        return True
    except (psutil.NoSuchProcess, ValueError, OverflowError):
        return False


_digits: FileCache[Any] = FileCache()


def mnist_test_digits(data_dir: str | None = None) -> Any:
    """The test images uint8 [N, 28, 28] and labels [N] as arrays; None if they are not on this machine."""
    folder = PROJECT_DIR / "data" if data_dir is None else Path(data_dir)
    files = [folder / "MNIST" / "raw" / f"t10k-{kind}-ubyte" for kind in ("images-idx3", "labels-idx1")]
    return _digits.get(folder, files, functools.partial(_read, folder))


def _read(folder: Path) -> Any:
    if not is_there(folder):
        return None  # to fetch them is for the training command
    try:
        images, labels = load_images(folder, train=False, log=silent)
    except (DataError, UsageError):
        return None
    return images.numpy(), labels.numpy()
