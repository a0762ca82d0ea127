"""What is measured of the files: accuracy beside the float32 network's, latency; as a table and as a picture."""

import functools
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from imports import Figure, MaxNLocator, torch
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


def print_results(results: Mapping[str, Any]) -> None:
    """PyTorch and the files as a table."""
    print(f"{results['name']}: {results['images']:,} test images, one thread, medians in turns")
    print(
        f"{'':<30} {'kB':>5} {'accuracy':>9} {'points lost':>11} {'equal':>8} {'largest diff.':>13}"
        f" {'1 image':>9} {'100 images':>10}"
    )
    pytorch = results["pytorch"] | {"file": "PyTorch", "drop": 0.0, "equal_decisions": 1.0, "largest_difference": 0.0}
    for row in (pytorch, *results["files"]):
        print(
            f"{row['file']:<30} {row['bytes'] / 1000:>5.1f} {row['accuracy']:>7.2f} % {row['drop']:>11.2f}"
            f" {row['equal_decisions']:>8.2%} {row['largest_difference']:>13.1e}"
            f" {row['latency_ms']['1']:>6.3f} ms {row['latency_ms']['100']:>7.2f} ms"
        )


def export_figure(results: Mapping[str, Any]) -> Figure:
    """Size against test accuracy, with the line that the gate would draw there, and against latency."""
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    against_accuracy, against_latency = figure.subplots(1, 2)
    labels = {"onnx": "ONNX Runtime", "executorch": "ExecuTorch"}
    colors = {"onnx": "#d95f0e", "executorch": "#08519c"}
    points = [("PyTorch", "#636363", "D", results["pytorch"])]
    for row in results["files"]:
        label = f"{labels[row['format']]} {row['precision']}"
        points.append((label, colors[row["format"]], "o" if row["precision"] == "fp32" else "s", row))
    for label, color, marker, row in points:
        size, milliseconds = row["bytes"] / 1000, row["latency_ms"]["1"]
        against_accuracy.plot(size, row["accuracy"], marker, color=color, markersize=8, label=label)
        against_latency.plot(size, milliseconds, marker, color=color, markersize=8, label=label)
        against_latency.annotate(
            f"{milliseconds:.3f}",
            (size, milliseconds),
            textcoords="offset points",
            xytext=(0, 8),
            ha="center",
            fontsize=9,
        )
    allowed = results["pytorch"]["accuracy"] - results["max_drop"]
    against_accuracy.axhline(allowed, color="#636363", linestyle="--", linewidth=1)
    against_accuracy.text(0, allowed, f" {results['max_drop']:g} points lost", va="bottom", fontsize=9)
    against_accuracy.margins(y=0.3)
    against_accuracy.yaxis.set_major_formatter("{x:.2f}")
    against_accuracy.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    against_accuracy.set(ylabel="accuracy [%]", title=f"Accuracy on {results['images']:,} test images")
    against_latency.set(ylabel="milliseconds", title="One image on one thread")
    against_latency.set_ylim(0, 1.15 * max(row["latency_ms"]["1"] for *_, row in points))
    for axes in (against_accuracy, against_latency):
        axes.set_xlabel("size of the file [kB]")
        axes.set_xlim(0, 1.1 * max(row["bytes"] for *_, row in points) / 1000)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    against_latency.legend(frameon=False, fontsize=9, loc="upper left")
    figure.suptitle(f"{results['name']} exported")
    return figure
