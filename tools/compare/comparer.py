"""The comparison of the runs under a folder, as data: their metrics, and MNIST's test digits."""

import base64
import contextlib
import json
import math
from collections.abc import Collection
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil

from common.cli import silent
from common.files import PROJECT_DIR, DamagedFileError, RunFiles, UsageError
from common.results import Metrics
from data_utils import load_images
from image_data.facts import MNIST, DataSet, facts_of
from image_data.fetch import DataError, is_there
from tools.file_cache import FileCache
from tools.networks import ENSEMBLE_COMMAND, Networks, ensemble_file, known_ensembles, read_ensemble
from training.config import TrainConfig

CURVES = ("train_losses", "learning_rates", "train_acc", "test_losses", "test_acc", "val_losses", "val_acc")
MAX_DISAGREEMENTS = 200  # test images that are shown
EXPORTED = {"file": str, "precision": str, "bytes": int, "accuracy": float}  # what is shown of a file
STALE_POINTS = 0.015  # an evaluation whose accuracy is further from the run's is of other weights

Folder = str | None
Details = dict[str, dict[str, Any]]  # by the run's name


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
    bytes: int | None = None  # of the file with the weights
    epochs: int | None = None
    seconds: float | None = None
    scheduler: str = ""


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
    evaluations: Details = field(default_factory=dict)
    exports: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    disagreements: list[dict[str, Any]] = field(default_factory=list)
    missing: list[dict[str, str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


class Comparer:
    """Compares the runs under ``output_dir``; keeps what it read and measured while the files stay as they are."""

    def __init__(self, output_dir: Folder = None, data_dir: Folder = None, networks: Networks | None = None) -> None:
        self.output_dir, self.data_dir = output_dir, data_dir
        self.networks = networks or Networks(output_dir, log=silent)

    def compare(self, names: Collection[str] | None = None) -> Comparison:
        """The comparison; details for ``names`` (None: all). A UsageError lists the runs if there is none of a name."""
        facts, problems = self.networks.metrics()
        for name in sorted(set(known_ensembles(self.output_dir)) - facts.keys()):
            try:
                facts[name] = read_ensemble(RunFiles(name, self.output_dir))
            except DamagedFileError as error:
                problems.append(str(error))
        rows = [self._row(name, found) for name, found in facts.items()]
        rows.sort(key=lambda row: (-(row.accuracy or 0), row.name))
        known = [row.name for row in rows]
        if unknown := [name for name in names or () if name not in known]:
            raise UsageError(f"there is no run {', '.join(unknown)}; there are {', '.join(known) or 'none'}")
        chosen = [name for name in known if names is None or name in names]
        comparison = Comparison(rows=rows, chosen=chosen, problems=problems)
        for row in rows:
            if row.name in chosen:
                self._add_details(comparison, row, facts[row.name])
        of_data: dict[str, Details] = {}  # networks can disagree on the same images alone
        for name, evaluation in comparison.evaluations.items():
            of_data.setdefault(DataSet.of(facts[name]).sha256, {})[name] = evaluation
        if not any(row.kind == "ensemble" for row in rows):
            self._add_missing(comparison, "an ensemble of the networks", ENSEMBLE_COMMAND)
        for evaluations in of_data.values():
            comparison.disagreements.extend(self._disagreements(evaluations, facts))
        return comparison

    def _row(self, name: str, facts: dict[str, Any]) -> RunRow:
        """The row of a run with these metrics, or of the ensemble that ``facts`` describe."""
        files = RunFiles(name, self.output_dir)
        saved = [name] if files.params.is_file() or ensemble_file(files).is_file() else []
        latency = next((network.latency_ms for network in self.networks.named(saved)), None)
        if facts.get("kind") == "ensemble":
            model = f"{len(facts['members'])} networks, {facts['method']}"
            return RunRow(name, "ensemble", model, "finished", float(facts["accuracy"]), facts["parameters"], latency)
        test = facts["test_acc"]
        return RunRow(
            name=name,
            kind="network",
            **{key: facts[key] for key in ("model", "parameters")},
            status=status_of(facts),
            accuracy=test[-1] if test else None,
            best_accuracy=max(test, default=None),
            bytes=files.params.stat().st_size if files.params.is_file() else None,
            epochs=len(test),
            seconds=facts["total_seconds"],
            latency_ms=latency,
            scheduler=str(facts["config"].get("scheduler", "")),
        )

    def _add_details(self, comparison: Comparison, row: RunRow, facts: dict[str, Any]) -> None:
        is_ensemble = row.kind == "ensemble"
        if not is_ensemble:
            try:
                comparison.batches[row.name] = batches_per_epoch(facts)
                comparison.curves[row.name] = {key: facts[key] for key in CURVES}
            except (KeyError, TypeError, ValueError, ArithmeticError) as error:
                comparison.problems.append(f"the metrics of {row.name} are not as the schema says: {error!r}")
        for tool, what, add in (("evaluate", "evaluation", _add_evaluation), ("export", "export", _add_export)):
            path = RunFiles(row.name, self.output_dir).metrics.with_name(f"{row.name}_{what}.json")
            try:
                add(comparison, row, json.loads(path.read_text(encoding="utf-8")))
            except FileNotFoundError:
                if row.bytes is not None or (is_ensemble and tool == "evaluate"):  # an ensemble is not exported
                    command = f"python -m tools.{tool} --name {row.name}"
                    self._add_missing(comparison, f"the {what} of {row.name}", command)
            except (OSError, ValueError, RecursionError, TypeError, LookupError, AttributeError) as error:
                comparison.problems.append(f"{path} is not as its schema says: {type(error).__name__} {error}")

    def _add_missing(self, comparison: Comparison, what: str, command: str) -> None:
        place = "" if self.output_dir is None else f" --output_dir {self.output_dir}"
        comparison.missing.append({"what": what, "command": command + place})

    def _disagreements(self, evaluations: Details, facts: Details) -> list[dict[str, Any]]:
        """The test images that some networks get right and others wrong, or wrong in different ways."""
        mistakes = {name: evaluation.pop("mistakes") for name, evaluation in evaluations.items()}
        labels = {index: label for wrong in mistakes.values() for index, (label, _) in wrong.items()}
        found: list[dict[str, Any]] = []
        for index, label in sorted(labels.items()):
            predicted = {name: wrong.get(index, (label, label))[1] for name, wrong in mistakes.items()}
            if len(set(predicted.values())) > 1:
                found.append({"index": index, "true": label, "predicted": predicted})
        found.sort(key=lambda entry: -len(set(entry["predicted"].values())))  # stable: then by index
        del found[MAX_DISAGREEMENTS:]
        name = next(iter(evaluations))
        digits = self._test_images(name, facts) if found else None
        for entry in found:
            entry["classes"] = evaluations[name]["classes"]
            if digits is not None and entry["index"] < len(digits[0]):
                entry["pixels"] = base64.b64encode(digits[0][entry["index"]].tobytes()).decode()
        return found

    def _test_images(self, name: str, facts: Details) -> Any:
        """As ``mnist_test_digits``, of what ``name`` was trained on; None if those are gone."""
        folder, data = self.data_dir, DataSet.of(facts[name])
        of_run = facts.get(facts[name].get("members", [name])[0])
        if folder is None and of_run is not None and data != MNIST:
            folder = str(TrainConfig.of(of_run).data_folder)
            if not is_there(folder) or facts_of(Path(folder)).sha256 != data.sha256:
                return None
        return mnist_test_digits(folder)


def _add_evaluation(comparison: Comparison, row: RunRow, found: dict[str, Any]) -> None:
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
        "mistakes": {int(entry["index"]): (int(entry["true"]), int(entry["predicted"])) for entry in found["mistakes"]},
        # weights that were trained anew since have another accuracy, but for a lucky hit
        "stale": row.accuracy is not None and abs(float(found["accuracy"]) - row.accuracy) > STALE_POINTS,
    }


def _add_export(comparison: Comparison, row: RunRow, found: dict[str, Any]) -> None:
    comparison.exports[row.name] = [
        {key: kind(entry[key]) for key, kind in EXPORTED.items()} | {"latency_ms": float(entry["latency_ms"]["1"])}
        for entry in found["files"]
    ]


def batches_per_epoch(metrics: Metrics) -> int:
    return math.ceil(int(metrics["train_images"]) / int(metrics["config"]["batch_size"]))


def status_of(metrics: dict[str, Any]) -> str:
    """The run's status; ``crashed`` if it says that it is running while its process is gone."""
    status: str = metrics["status"]
    return "crashed" if status == "running" and not is_alive(metrics["pid"], metrics["updated"]) else status


def is_alive(pid: int, updated: str) -> bool:
    """Whether the process that wrote at ``updated`` (ISO) runs still; one that began later only has its number."""
    try:
        process = psutil.Process(pid)
        is_later = process.create_time() > datetime.fromisoformat(updated).timestamp() + 1
        return process.status() != psutil.STATUS_ZOMBIE and not is_later
    except psutil.AccessDenied:
        return True
    except (psutil.NoSuchProcess, ValueError, OverflowError):
        return False


_digits: FileCache[Any] = FileCache()


def mnist_test_digits(data_dir: str | None = None) -> Any:
    """The test images uint8 [N, 28, 28] and labels [N] as arrays; None if they are not on this machine."""
    folder = PROJECT_DIR / "data" if data_dir is None else Path(data_dir)
    files = [folder / "MNIST" / "raw" / f"t10k-{kind}-ubyte" for kind in ("images-idx3", "labels-idx1")]
    return _digits.get(files, _read, folder)


def _read(folder: Path) -> Any:
    with contextlib.suppress(DataError, UsageError):
        if is_there(folder):  # to fetch them is for the training command
            images, labels = load_images(folder, train=False, log=silent)
            return images.numpy(), labels.numpy()
    return None
