"""Weights and metrics on disk: written beside and renamed, verified when they are read.

save_metrics_json(metrics, "mnist_model_1")
metrics = load_metrics_json("mnist_model_1")
state_dict = load_tensors(RunFiles("mnist_model_1").params)
"""

import json
import math
import os
import zipfile
from pathlib import Path
from types import GenericAlias
from typing import Any

from common.files import DamagedFileError, RunFiles, atomic_write, existing_runs, write_whole
from imports import nn, torch

METRICS_SCHEMA = 1
_METRICS_TYPES: dict[str, Any] = {
    **dict.fromkeys(("name", "model", "status", "updated"), str),
    **dict.fromkeys(("config", "environment"), dict),
    **dict.fromkeys(("parameters", "pid"), int),
    **dict.fromkeys(("train_losses", "learning_rates", "train_acc", "epoch_seconds"), list[float]),
    **dict.fromkeys(("test_losses", "test_acc", "val_losses", "val_acc"), list[float]),
    "total_seconds": float,
}

OutputDir = str | os.PathLike[str] | None
Metrics = dict[str, Any]


def save_model_params(model: nn.Module, name: str, output_dir: OutputDir = None) -> Path:
    """Write ``model.state_dict()`` to ``outputs/NAME_params.pth`` and return that path."""
    path = RunFiles(name, output_dir).params
    with atomic_write(path) as file:
        torch.save({key: value.cpu().contiguous() for key, value in model.state_dict().items()}, file)
    return path


def load_tensors(path: Path) -> Any:
    """What ``torch.save`` wrote to ``path``, if it is whole and nothing but tensors and plain values.

    Else a DamagedFileError, also of a pickle that would run code: nothing is run. FileNotFoundError: it is not there.
    """
    try:
        with open(path, "rb") as file:
            if file.read(4) == b"\x80\x02\x8a\x0a":  # what torch.save wrote before version 1.6
                raise DamagedFileError(
                    f"{path} is of the format before PyTorch 1.6; save it again:"
                    f" torch.save(torch.load({str(path)!r}, weights_only=True), {str(path)!r})"
                )
        with zipfile.ZipFile(path) as archive:  # torch.load does not look at the checksums
            changed = archive.testzip()
        if changed is not None:
            raise DamagedFileError(f"{path} is damaged: the checksum of {changed} is wrong")
        return torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, DamagedFileError):
        raise
    except Exception as error:  # what damaged bytes raise may be anything, KeyError included
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DamagedFileError(f"{path} is damaged or holds more than tensors: {reason}") from None


def no_such_run(path: Path, output_dir: OutputDir, ending: str) -> FileNotFoundError:
    """The error of a run that has no file ``path``; it lists those that have one."""
    names = ", ".join(existing_runs(output_dir, ending)) or "none"
    return FileNotFoundError(f"{path} does not exist; runs with such a file in that folder: {names}")


def save_metrics_json(metrics: Metrics, name: str, output_dir: OutputDir = None, durable: bool = True) -> Path:
    """Write ``metrics`` to ``outputs/NAME_metrics.json``, one line a field, and return that path."""
    return save_json(metrics, RunFiles(name, output_dir).metrics, durable)


def save_json(fields: dict[str, Any], path: Path, durable: bool = True) -> Path:
    """Write ``fields`` to ``path``, one line a field, and return that path; a ValueError if a number is not finite."""
    lines = [f"{json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in fields.items()]
    return write_whole(path, ("{\n" + ",\n".join(lines) + "\n}\n").encode(), durable)


def load_metrics_json(name: str, output_dir: OutputDir = None) -> Metrics:
    """The metrics of the run ``name``: docs/train.md has the fields.

    A FileNotFoundError lists the runs there are; a DamagedFileError says how the file is not as the schema says.
    """
    path = RunFiles(name, output_dir).metrics
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise no_such_run(path, output_dir, "_metrics.json") from None
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or nested without end
        raise DamagedFileError(f"{path} is damaged: {error}") from None
    if not isinstance(metrics, dict) or metrics.get("schema") != METRICS_SCHEMA:
        raise DamagedFileError(f"{path} does not hold metrics of schema {METRICS_SCHEMA}")
    if wrong := wrong_fields(metrics, _METRICS_TYPES):
        raise DamagedFileError(f"{path} is not as the schema says: {', '.join(wrong)} missing or of another type")
    return metrics


def wrong_fields(found: dict[str, Any], kinds: dict[str, Any]) -> list[str]:
    """Those of ``kinds`` that are missing or of another type: float is any finite number, list[float] many."""
    return [key for key, kind in kinds.items() if not _is_a(found.get(key), kind)]


def _is_a(value: Any, kind: Any) -> bool:
    if isinstance(kind, GenericAlias):
        return isinstance(value, list) and all(_is_a(item, *kind.__args__) for item in value)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, kind)
