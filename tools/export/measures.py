"""What is measured of an exported file: its accuracy beside the float32 network's, and its latency."""

import functools
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from imports import torch
from tools.export.formats import Runner
from tools.timing import seconds_of

EVAL_BATCH = 100
# Latency: images at once -> runs in a row of one runtime before it is the next one's turn
BURSTS = {1: 10, 100: 1}
ROUNDS = 100


@dataclass(frozen=True)
class Images:
    """Some images uint8 [N, 1, 28, 28], their labels [N], and what the float32 network makes of them."""

    images: torch.Tensor
    labels: torch.Tensor
    expected: torch.Tensor  # probabilities [N, 10]


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


def measure_latency(runners: Mapping[str, Runner], images: torch.Tensor) -> dict[str, dict[str, float]]:
    """Median milliseconds of a call on one thread, for 1 and for 100 images at once.

    The runners take turns, so that a machine whose speed drifts is as fair to all of them.
    """
    latency: dict[str, dict[str, float]] = {name: {} for name in runners}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for size, burst in BURSTS.items():
        batch = images[:size]
        seconds: dict[str, list[float]] = {name: [] for name in runners}
        for run in runners.values():  # the first calls allocate
            for _ in range(10):
                run(batch)
        for _ in range(ROUNDS):
            for name, run in runners.items():
                for _ in range(burst):
                    seconds[name].append(seconds_of(functools.partial(run, batch)))
        for name, values in seconds.items():
            latency[name][str(size)] = round(1000 * statistics.median(values), 4)
    torch.set_num_threads(threads)
    return latency
