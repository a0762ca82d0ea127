"""The files of a network: made, held against it, measured in turns, written."""

import argparse
import hashlib
import itertools
import json
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from common.files import RunFiles, atomic_write
from data_utils import MEAN, STD, load_images, split_indices
from imports import torch
from tools.export.formats import FORMATS, Deployed, Format, Runner
from tools.export.results import (
    Images,
    compare,
    export_figure,
    measure_latency,
    percent_right,
    print_results,
    probabilities,
)
from tools.networks import load_network
from tools.output import write_figure, write_json
from training.machine import environment

EXPORT_SCHEMA = 1
CALIBRATION_IMAGES = 1000  # whose activations give int8 its ranges
CALIBRATION_SEED = 0  # which ones
# The rest of the training images is held out from calibration: a sixth, balanced by class, the split of --val_split.
HELD_OUT = 6


@dataclass(frozen=True)
class Subject:
    """The network that is exported, and the images that its files are made and measured with."""

    name: str
    deployed: Deployed
    weights_sha256: str
    calibration: torch.Tensor
    held_out: Images
    test: Images


def read_subject(args: argparse.Namespace) -> Subject:
    """The network and the images that the arguments name."""
    network = load_network(args.name, args.output_dir, "network", args.model)
    deployed = Deployed(network.model).eval()
    weights = RunFiles(args.name, args.output_dir).params.read_bytes()
    train_images, train_labels = load_images(args.data_dir, train=True)
    rest, held_out = split_indices(train_labels, len(train_labels) // HELD_OUT)
    order = torch.randperm(len(rest), generator=torch.Generator().manual_seed(CALIBRATION_SEED))

    def with_expected(images: torch.Tensor, labels: torch.Tensor) -> Images:
        images = images.unsqueeze(1)
        return Images(images, labels, probabilities(deployed.run, images))

    return Subject(
        name=args.name,
        deployed=deployed,
        weights_sha256=hashlib.sha256(weights).hexdigest(),
        calibration=train_images[rest[order[:CALIBRATION_IMAGES]]].unsqueeze(1),
        held_out=with_expected(train_images[held_out], train_labels[held_out]),
        test=with_expected(*load_images(args.data_dir, train=False)),
    )


def make_file(subject: Subject, form: Format, precision: str) -> tuple[bytes, Runner]:
    """The file's bytes and what runs them."""
    make = form.build(subject.deployed, subject.calibration if precision == "int8" else None)
    metadata = {
        "name": subject.name,
        "precision": precision,
        "weights_sha256": subject.weights_sha256,
        "classes": "0 1 2 3 4 5 6 7 8 9",
        "input": "uint8 [N, 1, 28, 28], grey levels, white on black",
        "output": "float32 [N, 10], probabilities",
        "preprocessing": f"inside this file: (grey / 255 - {MEAN}) / {STD}",
        "versions": ", ".join(f"{package} {version(package)}" for package in ("torch", "torchao", form.runtime)),
    }
    # The file has its own accuracy in it, so it is made twice; the metadata does not touch the network.
    found = probabilities(form.load(make(metadata)), subject.test.images)
    accuracy = percent_right(found, subject.test.labels)
    metadata["accuracy"] = f"{accuracy:.2f} % of {len(found)} test images"
    contents = make(metadata)
    return contents, form.load(contents)


def export(args: argparse.Namespace) -> int:
    """Make, measure and write the files. Returns the exit status: 1 if a file was refused."""
    subject, files = read_subject(args), RunFiles(args.name, args.output_dir)
    kinds = list(itertools.product(args.formats, args.precisions))
    rows: list[dict[str, Any]] = []
    runners: dict[str, Runner] = {"pytorch": subject.deployed.run}
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
        with atomic_write(path) as file:
            file.write(contents)
        row = {"file": path.name, "format": name, "precision": precision, "bytes": len(contents)}
        rows.append(row | compare(run, subject.test) | {"held_out_drop": lost})
        runners[path.name] = run
    if rows:
        results = results_of(subject, rows, runners, args)
        print_results(results)
        path = files.metrics.with_name(f"{args.name}_export.json")
        if len(rows) < len(measured_before(path, subject.weights_sha256)):
            print(f"{path.name} stays: it has more files of these weights, measured in one run")
        else:
            write_json(path, results)
            write_figure(files.plot.with_name(f"{args.name}_export.png"), export_figure(results))
    return 0 if len(rows) == len(kinds) else 1


def results_of(
    subject: Subject, rows: list[dict[str, Any]], runners: dict[str, Runner], args: argparse.Namespace
) -> dict[str, Any]:
    """All that is known of the files in ``rows``, with the latency of their ``runners``."""
    latency = measure_latency(runners, subject.test.images)
    packages = [*(form.runtime for form in FORMATS.values()), "torchao"]
    versions = {package: version(package) for package in packages}
    held_out, test = subject.held_out, subject.test
    return {
        "schema": EXPORT_SCHEMA,
        "name": subject.name,
        "images": len(test.labels),
        "held_out_images": len(held_out.labels),
        "calibration_images": len(subject.calibration),
        "max_drop": args.max_drop,
        "weights_sha256": subject.weights_sha256,
        "environment": environment(torch.device("cpu")) | versions,
        "pytorch": {
            "bytes": RunFiles(args.name, args.output_dir).params.stat().st_size,
            "accuracy": percent_right(test.expected, test.labels),
            "held_out_accuracy": percent_right(held_out.expected, held_out.labels),
            "latency_ms": latency["pytorch"],
        },
        "files": [row | {"latency_ms": latency[row["file"]]} for row in rows],
    }


def measured_before(path: Path, weights_sha256: str) -> list[dict[str, Any]]:
    """The files in the results ``path``, if those are there, readable and of the same weights."""
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        files: list[dict[str, Any]] = before["files"] if before["weights_sha256"] == weights_sha256 else []
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return files
