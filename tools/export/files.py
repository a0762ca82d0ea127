"""The files of a network: made, held against it, measured in turns, written; their table."""

import argparse
import contextlib
import functools
import itertools
import json
import statistics
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from common.files import RunFiles, write_whole
from data_utils import split_indices
from image_data.fetch import sha256_of
from imports import torch
from tools.export.formats import FORMATS, Format, Runner
from tools.networks import Deployed, images_of, load_network
from tools.output import rendered, write_json
from tools.timing import seconds_of
from training.machine import environment

EXPORT_SCHEMA = 1
CALIBRATION_IMAGES = 1000  # whose activations give int8 its ranges
CALIBRATION_SEED = 0  # which ones
# The rest of the training images is held out from calibration: a sixth, balanced by class, the split of --val_split.
HELD_OUT = 6
EVAL_BATCH = 100
# Latency: images at once -> runs in a row of one runtime before it is the next one's turn
BURSTS = {1: 10, 100: 1}
ROUNDS = 100


class Images(NamedTuple):
    """Some images uint8 [N, 1, 28, 28], their labels [N], and what the float32 network makes of them."""

    images: torch.Tensor
    labels: torch.Tensor
    expected: torch.Tensor  # probabilities [N, 10]


class Subject:
    """The network that is exported, and the images uint8 [N, 1, 28, 28] that its files are made and measured with."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.network = load_network(args.name, args.output_dir, "network", args.model)
        self.deployed = Deployed(self.network.model).eval()
        self.files, self.max_drop = RunFiles(args.name, args.output_dir), args.max_drop
        self.weights_sha256 = sha256_of(self.files.params)
        train, test = (images_of(self.network, train, args.output_dir, args.data_dir) for train in (True, False))
        rest, held_out = split_indices(train[1], len(train[1]) // HELD_OUT)
        order = torch.randperm(len(rest), generator=torch.Generator().manual_seed(CALIBRATION_SEED))
        self.calibration = train[0][rest[order[:CALIBRATION_IMAGES]]].unsqueeze(1)
        self.held_out, self.test = (
            Images(images.unsqueeze(1), labels, probabilities(self.deployed, images.unsqueeze(1)))
            for images, labels in ((train[0][held_out], train[1][held_out]), test)
        )


def make_file(subject: Subject, form: Format, precision: str) -> tuple[bytes, Runner]:
    make = form.build(subject.deployed, subject.calibration if precision == "int8" else None)
    data = subject.network.data
    metadata = {
        "name": subject.network.name,
        "precision": precision,
        "weights_sha256": subject.weights_sha256,
        "classes": " ".join(data.classes),
        "input": "uint8 [N, 1, 28, 28], grey levels, white on black",
        "output": "float32 [N, 10], probabilities",
        "preprocessing": f"inside this file: (grey / 255 - {data.mean}) / {data.std}",
        "versions": ", ".join(f"{package} {version(package)}" for package in ("torch", "torchao", form.runtime)),
    }
    # The file has its own accuracy in it, so it is made twice; the metadata does not touch the network.
    accuracy = compare(form.load(make(metadata)), subject.test)["accuracy"]
    metadata["accuracy"] = f"{accuracy:.2f} % of {len(subject.test.labels)} test images"
    contents = make(metadata)
    return contents, form.load(contents)


def export(args: argparse.Namespace) -> int:
    """Make, measure and write the files. Returns the exit status: 1 if a file was refused."""
    subject = Subject(args)
    files = subject.files
    kinds = list(itertools.product(args.formats, args.precisions))
    rows: list[dict[str, Any]] = []
    runners: dict[str, Runner] = {"pytorch": subject.deployed}
    for name, precision in kinds:
        path = files.params.with_name(f"{args.name}_{precision}.{FORMATS[name].suffix}")
        contents, run = make_file(subject, FORMATS[name], precision)
        lost = compare(run, subject.held_out)["drop"]
        if lost > args.max_drop:
            print(
                f"tools.export: {path.name} loses {lost:.2f} points on {len(subject.held_out.labels)} training images"
                f" that it was not calibrated on, and max_drop is {args.max_drop:g}: not written",
                file=sys.stderr,
            )
            continue
        write_whole(path, contents)
        row = {"file": path.name, "format": name, "precision": precision, "bytes": len(contents)}
        rows.append(row | compare(run, subject.test) | {"held_out_drop": lost})
        runners[path.name] = run
    if rows:
        results = results_of(subject, rows, runners)
        print(rendered(Path(__file__).with_name("results.txt"), **results), end="")
        path = files.metrics.with_name(f"{args.name}_export.json")
        before: list[Any] = []
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # none, or none that can be read
            found = json.loads(path.read_text(encoding="utf-8"))
            before = found["files"] if found["weights_sha256"] == subject.weights_sha256 else []
        if len(rows) < len(before):
            print(f"{path.name} stays: it has more files of these weights, measured in one run")
        else:
            write_json(path, results)
    return 0 if len(rows) == len(kinds) else 1


def results_of(subject: Subject, rows: list[dict[str, Any]], runners: dict[str, Runner]) -> dict[str, Any]:
    """All that is known of the files in ``rows``, with the latency of their ``runners``."""
    held_out, test = subject.held_out, subject.test
    latency = measure_latency(runners, test.images)
    versions = {package: version(package) for package in [*(form.runtime for form in FORMATS.values()), "torchao"]}
    return {
        "schema": EXPORT_SCHEMA,
        "name": subject.network.name,
        "images": len(test.labels),
        "held_out_images": len(held_out.labels),
        "calibration_images": len(subject.calibration),
        "max_drop": subject.max_drop,
        "weights_sha256": subject.weights_sha256,
        "environment": environment(torch.device("cpu")) | versions,
        "pytorch": {
            "bytes": subject.files.params.stat().st_size,
            "accuracy": percent_right(test.expected, test.labels),
            "held_out_accuracy": percent_right(held_out.expected, held_out.labels),
            "latency_ms": latency["pytorch"],
        },
        "files": [row | {"latency_ms": latency[row["file"]]} for row in rows],
    }


@torch.inference_mode()
def probabilities(run: Runner, images: torch.Tensor) -> torch.Tensor:
    """[N, 10] of uint8 [N, 1, 28, 28]."""
    return torch.cat([run(batch) for batch in images.split(EVAL_BATCH)])


def percent_right(found: torch.Tensor, labels: torch.Tensor) -> float:
    """Percent of the images whose largest probability is that of their label."""
    return 100 * int((found.argmax(1) == labels).sum()) / len(labels)


def compare(run: Runner, images: Images) -> dict[str, float]:
    """Accuracy in percent, points lost against float32, share of equal decisions, largest difference."""
    found = probabilities(run, images.images)
    accuracy = percent_right(found, images.labels)
    return {
        "accuracy": accuracy,
        "drop": round(percent_right(images.expected, images.labels) - accuracy, 6),
        "equal_decisions": float((found.argmax(1) == images.expected.argmax(1)).double().mean()),
        "largest_difference": float((found - images.expected).abs().max()),
    }


@torch.inference_mode()
def measure_latency(runners: Mapping[str, Runner], images: torch.Tensor) -> dict[str, dict[str, float]]:
    """Median milliseconds of a call on one thread, for 1 and for 100 images at once.

    The runners take turns, so that a machine whose speed drifts is as fair to all of them.
    """
    latency: dict[str, dict[str, float]] = {name: {} for name in runners}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for size, burst in BURSTS.items():
        seconds: dict[str, list[float]] = {name: [] for name in runners}
        for _ in range(ROUNDS + 1):
            for name, run in runners.items():
                seconds[name] += [seconds_of(functools.partial(run, images[:size])) for _ in range(burst)]
        for name, values in seconds.items():
            latency[name][str(size)] = round(1000 * statistics.median(values[burst:]), 4)  # the first calls allocate
    torch.set_num_threads(threads)
    return latency
