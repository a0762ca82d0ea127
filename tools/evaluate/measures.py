"""Accuracy, errors by class, calibration, robustness and saliency, as functions on tensors, and all of them at once.

log_probabilities = predict(model, as_input(images, device))
confusion_matrix(log_probabilities.argmax(1), labels)
temperature = fit_temperature(log_probabilities_of_held_out_images, their_labels)
evaluation = evaluate_network("mnist_model_1", model, test, held_out, device, MNIST.classes)
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from data_utils import EVAL_BATCH_SIZE, Batch, normalize
from imports import F, nn, torch, tqdm
from tools.evaluate.corruptions import CORRUPTIONS, corrupt
from tools.intervals import wilson_interval
from tools.networks import OnOwnData
from tools.output import rendered
from tools.voting import Ensemble, scale
from training.machine import environment
from training.native import with_kernels
from visualization import count_parameters

EVALUATION_SCHEMA = 1
STRENGTHS = range(1, 6)
CLASSES = 10
CALIBRATION_BINS = 15  # as in Guo et al. 2017
PATH_STEPS = 512  # of integrated gradients, from a black image to the one that is explained
MISTAKE = ("index", "true", "predicted", "confidence")
PER_CLASS = ("digit", "precision", "recall", "f1", "support")
TEMPERATURES = (0.01, 100.0)  # between which the best one is searched


def as_input(images: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Grey levels uint8 [N, 28, 28] -> the networks' input, float32 [N, 1, 28, 28], on ``device``."""
    return normalize(images.to(device).unsqueeze(1).float())


def with_fast_parts(model: nn.Module, log: Callable[[str], None]) -> nn.Module:
    """``model``, or every network inside it, as the CPU's kernels compute it."""
    if not isinstance(model, OnOwnData | Ensemble | nn.ModuleList):
        return with_kernels(model, log)
    for name, part in model.named_children():
        setattr(model, name, with_fast_parts(part, log))
    return model


@torch.inference_mode()
def predict(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """The log-probabilities [N, 10] of normalised images [N, 1, 28, 28]; both on the device that ``model`` is on."""
    model.eval()
    return torch.cat([model(part.to(memory_format=torch.channels_last)) for part in images.split(EVAL_BATCH_SIZE)])


def confusion_matrix(predicted: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Counts int64 [10, 10]: row the true digit, column the predicted one. Both arguments are int64 [N]."""
    return (CLASSES * labels + predicted).bincount(minlength=CLASSES**2).view(CLASSES, CLASSES)


def per_class(predicted: torch.Tensor, labels: torch.Tensor) -> list[dict[str, Any]]:
    """Precision, recall and F1 of every digit in percent, and how many images of it there are (its support)."""
    from torchmetrics.functional.classification import multiclass_f1_score, multiclass_precision, multiclass_recall

    scores = multiclass_precision, multiclass_recall, multiclass_f1_score
    found = [100.0 * score(predicted, labels, num_classes=CLASSES, average="none") for score in scores]
    columns = [range(CLASSES), *(column.tolist() for column in found), labels.bincount(minlength=CLASSES).tolist()]
    return [dict(zip(PER_CLASS, row, strict=True)) for row in zip(*columns, strict=True)]


def find_mistakes(log_probabilities: torch.Tensor, labels: torch.Tensor) -> list[dict[str, Any]]:
    """Every misclassified image, the most confident mistake first: index, true and predicted digit, confidence."""
    confidences, predicted = log_probabilities.exp().max(1)
    wrong = (predicted != labels).nonzero().flatten()
    order = wrong[confidences[wrong].argsort(descending=True, stable=True)]
    found = [column.tolist() for column in (order, labels[order], predicted[order], confidences[order])]
    return [dict(zip(MISTAKE, row, strict=True)) for row in zip(*found, strict=True)]


def expected_calibration_error(log_probabilities: torch.Tensor, labels: torch.Tensor) -> float:
    """ECE in percent: how far confidence and accuracy lie apart, over 15 bins of equal width, weighted by their images.

    Guo et al. 2017, arXiv:1706.04599, section 2.
    """
    bins = reliability_bins(log_probabilities, labels)
    return float(sum(row["images"] * abs(row["accuracy"] - row["confidence"]) for row in bins)) / len(labels)


def reliability_bins(log_probabilities: torch.Tensor, labels: torch.Tensor) -> list[dict[str, Any]]:
    """The bins of ``expected_calibration_error`` that have images: range of the confidence, images, both means in %."""
    from scipy.stats import binned_statistic

    confidences, predicted = log_probabilities.exp().double().max(1)
    values = [torch.ones_like(confidences), predicted == labels, confidences]
    sums = binned_statistic(confidences, values, "sum", CALIBRATION_BINS, (0, 1)).statistic.T.tolist()
    return [
        {
            "from": 100.0 * number / CALIBRATION_BINS,
            "to": 100.0 * (number + 1) / CALIBRATION_BINS,
            "images": int(images),
            "correct": int(correct),
            "confidence": 100.0 * sure / images,
            "accuracy": 100.0 * correct / images,
        }
        for number, (images, correct, sure) in enumerate(sums)
        if images
    ]


def fit_temperature(log_probabilities: torch.Tensor, labels: torch.Tensor) -> float:
    """The temperature at which the mean negative log-likelihood is lowest, of images that were not trained on.

    Log-probabilities [N, 10] do as well as logits: they differ by a constant an image, which the softmax takes out.
    Guo et al. 2017, arXiv:1706.04599, section 4.2. It is 1 if every image is classified correctly: the more certain
    were always the better.
    """
    from scipy.optimize import minimize_scalar

    if bool((log_probabilities.argmax(1) == labels).all()):
        return 1.0
    exact = log_probabilities.double()

    def loss(log_temperature: float) -> float:
        return float(F.nll_loss(scale(exact, math.exp(log_temperature)), labels))

    bounds = [math.log(temperature) for temperature in TEMPERATURES]
    return math.exp(minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-6}).x)


def integrated_gradients(model: nn.Module, images: torch.Tensor, digits: torch.Tensor) -> torch.Tensor:
    """What each pixel adds to the log-probability of a digit, compared with a black image: [N, 28, 28].

    An image's attributions sum to the difference between its log-probability and the black image's, but for the
    error of a path of 512 steps: Sundararajan et al. 2017, arXiv:1703.01365. The ``images`` are normalised,
    [N, 1, 28, 28], the ``digits`` int64 [N], both on the device that ``model`` is on.
    """
    from captum.attr import IntegratedGradients

    model.eval()
    black = normalize(torch.zeros_like(images[:1]))
    attributions: torch.Tensor = IntegratedGradients(model).attribute(
        images, black, target=digits, n_steps=PATH_STEPS, internal_batch_size=EVAL_BATCH_SIZE
    )
    return attributions.detach().squeeze(1)


def evaluate_network(
    name: str, model: nn.Module, test: Batch, held_out: Batch | None, device: torch.device, classes: Sequence[str]
) -> dict[str, Any]:
    """All measures of ``model``, which is on ``device``: docs/evaluate.md lists the fields. ``held_out`` are training
    images that the network was not trained on, for its temperature; None: there are none."""
    images, labels = test
    log_probabilities = predict(model, as_input(images, device)).cpu()
    predicted = log_probabilities.argmax(1)
    correct = int((predicted == labels).sum())
    said_of_held_out = held_out and (predict(model, as_input(held_out[0], device)).cpu(), held_out[1])
    return {
        "schema": EVALUATION_SCHEMA,
        "name": name,
        "parameters": count_parameters(model),
        "images": len(labels),
        "accuracy": 100.0 * correct / len(labels),
        "accuracy_interval": list(wilson_interval(correct, len(labels))),
        "calibration": calibration(log_probabilities, labels, said_of_held_out),
        "per_class": per_class(predicted, labels),
        "confusion": confusion_matrix(predicted, labels).tolist(),
        "mistakes": find_mistakes(log_probabilities, labels),
        "corruptions": robustness(model, test, device),
        "classes": list(classes),
        "environment": environment(device),
    }


def calibration(log_probabilities: torch.Tensor, labels: torch.Tensor, held_out: Batch | None) -> dict[str, Any]:
    """Calibration on the test images, as the network is and at the temperature that fits best the log-probabilities
    [N, 10] and labels [N] of images ``held_out`` from its training. Without those none is fitted: on the test images it
    would be chosen by what it is measured with, on the network's own training images it comes out too sure.
    """

    def measured(said: torch.Tensor) -> dict[str, Any]:
        loss = float(F.nll_loss(said, labels))
        return {"ece": expected_calibration_error(said, labels), "loss": loss, "bins": reliability_bins(said, labels)}

    result = measured(log_probabilities)
    temperature, fitted_on, scaled = None, 0, dict.fromkeys(result)
    if held_out is not None and bool((held_out[0].argmax(1) != held_out[1]).any()):
        temperature, fitted_on = fit_temperature(*held_out), len(held_out[1])
        scaled = measured(scale(log_probabilities, temperature))
    result |= {"temperature": temperature, "fitted_on": fitted_on}
    return result | {f"{key}_scaled": value for key, value in scaled.items()}


def robustness(model: nn.Module, test: Batch, device: torch.device) -> dict[str, list[float]]:
    """The accuracy in percent under every corruption at strengths 1 to 5."""

    def accuracy(corruption: str, strength: int) -> float:
        predicted = predict(model, as_input(corrupt(test[0], corruption, strength), device)).argmax(1).cpu()
        return 100.0 * int((predicted == test[1]).sum()) / len(predicted)

    bar = tqdm(CORRUPTIONS, desc="robustness", leave=False, disable=None)
    return {corruption: [accuracy(corruption, strength) for strength in STRENGTHS] for corruption in bar}


def mean_corrupted_accuracy(corruptions: dict[str, list[float]]) -> float:
    """Over all corruptions and strengths, in percent."""
    return sum(sum(row) / len(row) for row in corruptions.values()) / len(corruptions)


def print_evaluation(evaluation: dict[str, Any]) -> None:
    names, taken_for = evaluation["classes"], []
    for digit, counts in enumerate(evaluation["confusion"]):
        others = sorted((-count, other) for other, count in enumerate(counts) if count and other != digit)
        shown = [f"{names[other]} ({-count})" for count, other in others[:4]] + ["..."] * bool(others[4:])
        taken_for.append("   " * bool(shown) + ", ".join(shown))
    more = {"taken_for": taken_for, "table": CORRUPTIONS, "mean": mean_corrupted_accuracy(evaluation["corruptions"])}
    print(rendered(Path(__file__).with_name("report.txt"), **evaluation, **more), end="")
