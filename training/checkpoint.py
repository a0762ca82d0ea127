"""Checkpoints: what the epochs to come depend on, written so that one whole copy is always on disk.

save_checkpoint(files, state)             # the one before is kept beside it
state = load_checkpoint(files, log)       # a damaged one gives way to the one before
config = resumed_config(state, files, {"epochs": 20})
"""

import contextlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from common.cli import Log
from common.files import DamagedFileError, RunFiles, UsageError, atomic_write, existing_runs
from common.results import load_tensors, wrong_fields
from imports import torch
from training.config import TrainConfig, fields_in

CHECKPOINT_SCHEMA = 2

Checkpoint = dict[str, Any]  # as Run.save_checkpoint makes it
_TYPES: dict[str, Any] = {
    "epochs_done": int,
    **dict.fromkeys(("config", "metrics", "model", "optimizer", "scheduler"), dict),
    "data": torch.Tensor,
    "processes": list,
}


def save_checkpoint(files: RunFiles, state: Checkpoint, known: bool = False) -> None:
    """Write ``state``, flushed to the disk; the run's checkpoint before it stays as ``files.previous_checkpoint``.

    ``known``: that one was written by this process, so it is whole.
    """
    first = state["epochs_done"] == 1  # what is there is of an earlier run of this name
    keep = None
    if not first:
        with contextlib.suppress(OSError, DamagedFileError):  # one that cannot be read must not take that place
            if not known:
                _read(files.checkpoint)
            keep = files.previous_checkpoint
    with atomic_write(files.checkpoint, keep=keep) as file:
        torch.save({"schema": CHECKPOINT_SCHEMA, **state}, file)
    if first:
        files.previous_checkpoint.unlink(missing_ok=True)


def load_checkpoint(files: RunFiles, log: Log = print) -> Checkpoint:
    """The last checkpoint of a run, or the one before if that is missing or damaged; ``log`` hears of it.

    A UsageError lists the runs that have one, if this has none; a DamagedFileError says why neither can be read.
    """
    present = [path for path in (files.checkpoint, files.previous_checkpoint) if path.exists()]
    if not present:
        names = ", ".join(existing_runs(files.output_dir, "_checkpoint.pth")) or "none"
        raise UsageError(
            f"resume: {files.checkpoint} does not exist; runs in that folder that have a checkpoint: {names}"
        )
    problems = []
    for path in present:
        try:
            state = _read(path)
        except DamagedFileError as error:
            problems.append(str(error))
            continue
        if path != files.checkpoint:
            reason = "; ".join(problems) or f"{files.checkpoint} is missing"
            log(f"Note: {reason}. Going on from the checkpoint before it.")
        return state
    raise DamagedFileError("; ".join(problems))


def _read(path: Path) -> Checkpoint:
    state = load_tensors(path)
    if not isinstance(state, dict) or state.get("schema") != CHECKPOINT_SCHEMA:
        raise DamagedFileError(f"{path} does not hold a checkpoint of schema {CHECKPOINT_SCHEMA}")
    if wrong := wrong_fields(state, _TYPES):
        raise DamagedFileError(f"{path} is no checkpoint: it has no {', '.join(wrong)}")
    return state


def resumed_config(state: Checkpoint, files: RunFiles, given: Mapping[str, Any], processes: int = 1) -> TrainConfig:
    """The checkpoint's configuration, with what of ``given`` may differ; a UsageError names all that contradicts it."""
    config = {"kernels": False, **state["config"]}  # there were none at first
    try:
        saved = TrainConfig(**config)
    except TypeError as error:
        raise UsageError(f"resume: the checkpoint is of another version of this program: {error}") from None
    folder = None if files.output_dir is None else str(files.output_dir)
    wanted = TrainConfig(**{**config, **given, "name": files.name, "output_dir": folder})
    movable = fields_in("place")  # what it computes may not change
    changed = {
        key: (getattr(saved, key), value)
        for key, value in asdict(wanted).items()
        if key not in movable and value != getattr(saved, key)
    }
    is_longer = changed.keys() == {"epochs"} and wanted.epochs > saved.epochs
    if is_longer and saved.scheduler != "step":
        raise UsageError(
            f"epochs: {wanted.epochs} is not allowed with --resume: the {saved.scheduler} schedule of this run"
            f" spans {saved.epochs} epochs; over {wanted.epochs}, those that are done would have had other rates"
        )
    if changed and not is_longer:
        named = ", ".join(f"{key} ({before!r}, not {value!r})" for key, (before, value) in changed.items())
        raise UsageError(f"resume: contradicts the checkpoint of {files.name} in {named}; leave it out")
    count = len(state["processes"])
    if count != processes:
        raise UsageError(f"resume: the checkpoint is of {count} processes, not of {processes}; start as many again")
    return wanted
