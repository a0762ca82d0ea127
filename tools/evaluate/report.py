"""Everything that is measured of one network, as a dictionary and as a table in the terminal.

evaluation = evaluate_network("mnist_model_1", model, test_images, test_labels)
print_evaluation(evaluation)
"""

from typing import Any

from data_utils import normalize
from imports import F, nn, torch, tqdm
from tools.evaluate.corruptions import CORRUPTIONS, corrupt
from tools.evaluate.measures import (
    confusion_matrix,
    expected_calibration_error,
    find_mistakes,
    fit_temperature,
    per_class,
    predict,
    reliability_bins,
)
from tools.intervals import wilson_interval
from tools.networks import scale
from training.machine import environment
from visualization import count_parameters

EVALUATION_SCHEMA = 1
STRENGTHS = range(1, 6)

LabelledImages = tuple[torch.Tensor, torch.Tensor]  # uint8 [N, 28, 28], int64 [N]


def as_input(images: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Grey levels uint8 [N, 28, 28] -> the networks' input, float32 [N, 1, 28, 28], on ``device``."""
    return normalize(images.to(device).unsqueeze(1).float())


def evaluate_network(
    name: str, model: nn.Module, test: LabelledImages, held_out: LabelledImages | None, device: torch.device
) -> dict[str, Any]:
    """All measures of ``model``, which is on ``device``: docs/evaluate.md lists the fields.

    Args:
        held_out: training images that the network was not trained on, for its temperature; None: there are none.
    """
    images, labels = test
    log_probabilities = predict(model, as_input(images, device)).cpu()
    predicted = log_probabilities.argmax(1)
    correct = int((predicted == labels).sum())
    held_out_log_probabilities = None
    if held_out is not None:
        held_out_log_probabilities = predict(model, as_input(held_out[0], device)).cpu(), held_out[1]
    return {
        "schema": EVALUATION_SCHEMA,
        "name": name,
        "parameters": count_parameters(model),
        "images": len(labels),
        "accuracy": 100.0 * correct / len(labels),
        "accuracy_interval": list(wilson_interval(correct, len(labels))),
        "calibration": calibration(log_probabilities, labels, held_out_log_probabilities),
        "per_class": per_class(predicted, labels),
        "confusion": confusion_matrix(predicted, labels).tolist(),
        "mistakes": find_mistakes(log_probabilities, labels),
        "corruptions": robustness(model, images, labels, device),
        "environment": environment(device),
    }


def calibration(
    log_probabilities: torch.Tensor, labels: torch.Tensor, held_out: LabelledImages | None
) -> dict[str, Any]:
    """Calibration on the test images, as the network is and at the temperature that fits ``held_out`` best.

    Args:
        held_out: log-probabilities [N, 10] and labels [N] of images that the network was not trained on. Without
            them no temperature is fitted: on the test images it would be chosen by what it is measured with, and on
            the network's own training images it comes out too sure.
    """
    result: dict[str, Any] = {
        "ece": expected_calibration_error(log_probabilities, labels),
        "loss": float(F.nll_loss(log_probabilities, labels)),
        "bins": reliability_bins(log_probabilities, labels),
        "temperature": None,
        "fitted_on": 0,
        "ece_scaled": None,
        "loss_scaled": None,
        "bins_scaled": None,
    }
    if held_out is not None and bool((held_out[0].argmax(1) != held_out[1]).any()):
        temperature = fit_temperature(*held_out)
        scaled = scale(log_probabilities, temperature)
        result |= {
            "temperature": temperature,
            "fitted_on": len(held_out[1]),
            "ece_scaled": expected_calibration_error(scaled, labels),
            "loss_scaled": float(F.nll_loss(scaled, labels)),
            "bins_scaled": reliability_bins(scaled, labels),
        }
    return result


def robustness(
    model: nn.Module, images: torch.Tensor, labels: torch.Tensor, device: torch.device
) -> dict[str, list[float]]:
    """The accuracy in percent under every corruption at strengths 1 to 5."""

    def accuracy(corruption: str, strength: int) -> float:
        predicted = predict(model, as_input(corrupt(images, corruption, strength), device)).argmax(1).cpu()
        return 100.0 * int((predicted == labels).sum()) / len(labels)

    bar = tqdm(CORRUPTIONS, desc="robustness", leave=False, disable=None)
    return {corruption: [accuracy(corruption, strength) for strength in STRENGTHS] for corruption in bar}


def mean_corrupted_accuracy(corruptions: dict[str, list[float]]) -> float:
    """Over all corruptions and strengths, in percent."""
    return sum(sum(row) / len(row) for row in corruptions.values()) / len(corruptions)


def print_evaluation(evaluation: dict[str, Any]) -> None:
    """The evaluation as tables."""
    low, high = evaluation["accuracy_interval"]
    print(
        f"{evaluation['name']}: {evaluation['parameters']:,} parameters, {evaluation['images']:,} test images\n"
        f"accuracy {evaluation['accuracy']:.2f} %, 95 % interval {low:.2f} to {high:.2f} %,"
        f" {len(evaluation['mistakes'])} mistakes\n"
    )
    print(f"{'digit':<6} {'precision':>9} {'recall':>7} {'F1':>7} {'images':>7}   taken for")
    for row, counts in zip(evaluation["per_class"], evaluation["confusion"], strict=True):
        others = sorted((-count, digit) for digit, count in enumerate(counts) if count and digit != row["digit"])
        taken_for = ", ".join(f"{digit} ({-count})" for count, digit in others[:4]) + (", ..." if others[4:] else "")
        print(
            f"{row['digit']:<6} {row['precision']:>9.2f} {row['recall']:>7.2f} {row['f1']:>7.2f}"
            f" {row['support']:>7,}   {taken_for}".rstrip()
        )

    measured = evaluation["calibration"]
    print(f"\ncalibration: ECE {measured['ece']:.2f} %, mean negative log-likelihood {measured['loss']:.4f}")
    if measured["temperature"] is None:
        print("temperature: none fitted, for want of held-out training images (main.py --val_split)")
    elif measured["ece_scaled"] is None:
        print(f"temperature {measured['temperature']:.3f}, a part of the ensemble: these are at it")
    else:
        print(
            f"temperature {measured['temperature']:.3f}, fitted on {measured['fitted_on']:,} held-out training images:"
            f" ECE {measured['ece_scaled']:.2f} %, mean negative log-likelihood {measured['loss_scaled']:.4f}"
        )

    strengths = " ".join(f"{strength:>6}" for strength in STRENGTHS)
    print(f"\n{'accuracy [%] at strength':<24} {strengths}   strengths")
    for name, accuracies in evaluation["corruptions"].items():
        corruption = CORRUPTIONS[name]
        values = ", ".join(str(value).replace(" ", "").strip("()") for value in corruption.strengths)
        if isinstance(corruption.strengths[0], tuple):
            values = " | ".join(str(value).replace(" ", "").strip("()") for value in corruption.strengths)
        print(f"{name:<24} {' '.join(f'{value:>6.2f}' for value in accuracies)}   {corruption.meaning}: {values}")
    print(f"{'mean of all':<24} {mean_corrupted_accuracy(evaluation['corruptions']):>6.2f}\n")
