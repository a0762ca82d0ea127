"""What is searched: the table of settings, and a file that changes it.

space, fixed = read_space(Path("space.toml"), {"batch_size": 256})
"""

from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from common.files import UsageError
from training.config import TrainConfig, field_type, fields_in, read_config_file, read_toml

SPACE = read_toml("space", Path(__file__).with_name("space.toml"), "it")  # what is searched
# What a setting needs of another one, which stands before it in SPACE, to have an effect.
ONLY_WITH: dict[str, tuple[str, tuple[Any, ...]]] = {
    **dict.fromkeys(("max_lr", "pct_start", "div_factor", "final_div_factor"), ("scheduler", ("onecycle",))),
    "lr": ("scheduler", ("step",)),
    "augment": ("pipeline", ("tensor",)),
    "augment_strength": ("augment", ("rotate", "affine", "elastic")),
}
TYPES = {spec.name: field_type(spec) for spec in fields(TrainConfig)}
# What makes a run the run that it is, or a study comparable with itself; it is given by flags and not searched.
GIVEN = ("model", "epochs", "val_split", "seed", "pipeline", "image_form", "init", *fields_in("machine", "place"))


def read_space(path: Path | None, given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is searched, and what stays: ``SPACE``, changed by the file ``path`` and by the flags ``given``.

    A UsageError if the file cannot be read, has an unknown key, a value that is not allowed, or one that a flag sets.
    """
    wanted = {} if path is None else read_toml("space", path, "the path of a TOML file")
    known = [key for key in TYPES if key not in GIVEN]
    if unknown := [key for key in wanted if key not in known]:
        raise UsageError(f"space: {path}: unknown key {', '.join(unknown)}; known: {', '.join(known)}")
    if twice := [key for key in wanted if key in given]:
        raise UsageError(
            f"space: {path} has {', '.join(twice)}, which a flag or --config sets; leave out one of the two"
        )
    space = {key: value for key, value in (SPACE | wanted).items() if key not in given}
    for key, values in space.items():
        _check_values(key, values)
    if 0 in _extremes(space.get("momentum", 0.9)) and True in _extremes(space.get("nesterov", False)):
        raise UsageError("space: momentum: 0 is not allowed while nesterov may be true; set nesterov = false")
    fixed = {key: space.pop(key) for key in list(space) if not isinstance(space[key], dict | list)}
    if not space:
        raise UsageError("space: every setting has one value, so there is nothing to search")
    return space, fixed


def _check_values(key: str, values: Any) -> None:
    if isinstance(values, dict):
        if not {"low", "high"} <= values.keys() <= {"low", "high", "log"}:
            raise UsageError(f"space: {key}: {values} is not allowed; a range has low, high and, if you like, log")
        if TYPES[key] not in (int, float):
            raise UsageError(f"space: {key}: a range is not allowed; give a list of choices")
        if not isinstance(values.get("log", False), bool):
            raise UsageError(f"space: {key}: log = {values['log']!r} is not allowed; it must be true or false")
    elif values == []:
        raise UsageError(f"space: {key}: an empty list is not allowed; give at least one choice")
    for value in _extremes(values):
        try:
            TrainConfig(**{key: value})
        except UsageError as error:
            raise UsageError(f"space: {error}") from None
    if isinstance(values, dict):
        if values["low"] > values["high"]:
            raise UsageError(f"space: {key}: low = {values['low']} is above high = {values['high']}")
        if values.get("log") and values["low"] <= 0:
            raise UsageError(f"space: {key}: low = {values['low']} is not allowed with log; it must be above 0")


def _extremes(values: Any) -> list[Any]:
    """The ends of a range, all of a list, or the one value."""
    ends = [values["low"], values["high"]] if isinstance(values, dict) else values
    return ends if isinstance(ends, list) else [ends]


def starting_point(space: Mapping[str, Any]) -> dict[str, Any]:
    """The specification's onecycle, as far as ``space`` has it: the first trial, so that the search begins there."""
    start = asdict(TrainConfig(**read_config_file("reference")))
    in_lists = {key for key, values in space.items() if isinstance(values, list) and start[key] in values}
    ranges = {key: values for key, values in space.items() if isinstance(values, dict) and start[key] is not None}
    in_ranges = {key for key, values in ranges.items() if values["low"] <= start[key] <= values["high"]}
    return {key: start[key] for key in space if key in in_lists | in_ranges}
