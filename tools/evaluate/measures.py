"""Accuracy, errors by class, calibration and saliency, as functions on tensors.

log_probabilities = predict(model, images)
confusion_matrix(log_probabilities.argmax(1), labels)
temperature = fit_temperature(log_probabilities_of_held_out_images, their_labels)
"""

import math
from typing import Any

from data_utils import EVAL_BATCH_SIZE
from imports import F, nn, torch
from tools.networks import scale

CLASSES = 10
CALIBRATION_BINS = 15  # as in Guo et al. 2017
BLACK = 0  # grey level of the image that integrated gradients start from
PATH_STEPS = 1024  # of the path from there to the image
TEMPERATURES = (0.01, 100.0)  # between which the best one is searched


@torch.inference_mode()
def predict(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """The log-probabilities [N, 10] of normalised images [N, 1, 28, 28]; both on the device that ``model`` is on."""
    model.eval()
    return torch.cat([model(part.to(memory_format=torch.channels_last)) for part in images.split(EVAL_BATCH_SIZE)])


def confusion_matrix(predicted: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Counts int64 [10, 10]: row the true digit, column the predicted one. Both arguments are int64 [N]."""
    from torchmetrics.functional.classification import multiclass_confusion_matrix

    counts: torch.Tensor = multiclass_confusion_matrix(predicted, labels, num_classes=CLASSES)
    return counts


def per_class(predicted: torch.Tensor, labels: torch.Tensor) -> list[dict[str, Any]]:
    """Precision, recall and F1 of every digit in percent, and how many images of it there are (its support)."""
    from torchmetrics.functional.classification import multiclass_f1_score, multiclass_precision, multiclass_recall

    precision, recall, f1 = (
        (100.0 * score(predicted, labels, num_classes=CLASSES, average="none")).tolist()
        for score in (multiclass_precision, multiclass_recall, multiclass_f1_score)
    )
    support = labels.bincount(minlength=CLASSES).tolist()
    return [
        {"digit": digit, "precision": precision[digit], "recall": recall[digit], "f1": f1[digit], "support": count}
        for digit, count in enumerate(support)
    ]


def find_mistakes(log_probabilities: torch.Tensor, labels: torch.Tensor) -> list[dict[str, Any]]:
    """Every misclassified image, the most confident mistake first: index, true and predicted digit, confidence."""
    confidences, predicted = log_probabilities.exp().max(1)
    wrong = (predicted != labels).nonzero().flatten()
    by_confidence = wrong[confidences[wrong].argsort(descending=True, stable=True)]
    return [
        {
            "index": int(index),
            "true": int(labels[index]),
            "predicted": int(predicted[index]),
            "confidence": float(confidences[index]),
        }
        for index in by_confidence
    ]


def expected_calibration_error(log_probabilities: torch.Tensor, labels: torch.Tensor) -> float:
    """ECE in percent: how far confidence and accuracy lie apart, over 15 bins of equal width, weighted by their images.

    Guo et al. 2017, arXiv:1706.04599, section 2.
    """
    from torchmetrics.functional.classification import multiclass_calibration_error

    probabilities = _below_one(log_probabilities.exp())
    error = multiclass_calibration_error(probabilities, labels, CLASSES, n_bins=CALIBRATION_BINS, norm="l1")
    return 100.0 * float(error)


def reliability_bins(log_probabilities: torch.Tensor, labels: torch.Tensor) -> list[dict[str, Any]]:
    """The bins of ``expected_calibration_error`` that have images: range of the confidence, images, both means in %."""
    confidences, predicted = log_probabilities.exp().max(1)
    bins = torch.bucketize(_below_one(confidences), torch.linspace(0, 1, CALIBRATION_BINS + 1), right=True) - 1
    rows = []
    for number in bins.unique().tolist():
        inside = bins == number
        images, correct = int(inside.sum()), int((predicted == labels)[inside].sum())
        rows.append(
            {
                "from": 100.0 * number / CALIBRATION_BINS,
                "to": 100.0 * (number + 1) / CALIBRATION_BINS,
                "images": images,
                "correct": correct,
                "confidence": 100.0 * float(confidences[inside].mean()),
                "accuracy": 100.0 * correct / images,
            }
        )
    return rows


def _below_one(probabilities: torch.Tensor) -> torch.Tensor:
    # torchmetrics opens a bin of its own for what rounds to exactly 1
    return probabilities.clamp(max=1 - 2**-24)


def fit_temperature(log_probabilities: torch.Tensor, labels: torch.Tensor) -> float:
    """The temperature at which the mean negative log-likelihood is lowest.

    Log-probabilities do as well as logits: they differ by a constant an image, which the softmax takes out.
    Guo et al. 2017, arXiv:1706.04599, section 4.2.

    Args:
        log_probabilities: [N, 10], of images that the network was not trained on.
        labels: int64 [N].

    Raises:
        ValueError: every image is classified correctly, so that the more certain were always the better.
    """
    from scipy.optimize import minimize_scalar

    if bool((log_probabilities.argmax(1) == labels).all()):
        raise ValueError(f"no temperature can be fitted: not one of the {len(labels)} images is misclassified")
    exact = log_probabilities.double()

    def loss(log_temperature: float) -> float:
        return float(F.nll_loss(scale(exact, math.exp(log_temperature)), labels))

    bounds = [math.log(temperature) for temperature in TEMPERATURES]
    return math.exp(minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-6}).x)


def integrated_gradients(model: nn.Module, images: torch.Tensor, digits: torch.Tensor) -> torch.Tensor:
    """What each pixel adds to the log-probability of a digit, compared with a black image.

    An image's attributions sum to the difference between its log-probability and the black image's, but for the
    error of a path of 1,024 steps: Sundararajan et al. 2017, arXiv:1703.01365.

    Args:
        images: normalised, [N, 1, 28, 28], on the device that ``model`` is on.
        digits: int64 [N], there too.

    Returns:
        [N, 28, 28]
    """
    from captum.attr import IntegratedGradients

    from data_utils import normalize

    model.eval()
    black = normalize(torch.full_like(images[:1], BLACK))
    attributions: torch.Tensor = IntegratedGradients(model).attribute(
        images, black, target=digits, n_steps=PATH_STEPS, internal_batch_size=EVAL_BATCH_SIZE
    )
    return attributions.detach().squeeze(1)
