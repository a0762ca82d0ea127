import math

import pytest
from torchmetrics.functional.classification import multiclass_calibration_error, multiclass_confusion_matrix

from data_utils import normalize
from imports import F, nn, torch
from model_strategy import get_strategy
from tools.evaluate.measures import (
    as_input,
    calibration,
    confusion_matrix,
    expected_calibration_error,
    find_mistakes,
    fit_temperature,
    integrated_gradients,
    per_class,
    predict,
    reliability_bins,
)
from tools.intervals import wilson_interval
from tools.voting import scale
from visualization import load_model_params

CPU = torch.device("cpu")


def sure_of(digits: list[int], confidences: list[float]) -> torch.Tensor:
    """Log-probabilities with these digits on top at these confidences, the rest spread evenly."""
    rows = torch.tensor([[(1 - confidence) / 9] * 10 for confidence in confidences], dtype=torch.float64)
    rows[range(len(digits)), digits] = torch.tensor(confidences, dtype=torch.float64)
    return rows.log()


@pytest.fixture(scope="module")
def shipped(shipped_project) -> nn.Module:
    return load_model_params(get_strategy("1").build(), "mnist_model_1", shipped_project)


def test_wilson_interval_against_the_formula():
    z, n, share = 1.959963984540054, 10_000, 0.9947  # standard normal, 97.5 %
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    assert wilson_interval(9947, 10_000) == pytest.approx((100 * (centre - half), 100 * (centre + half)))
    assert wilson_interval(10, 10)[1] == pytest.approx(100)
    assert wilson_interval(10, 10)[0] == pytest.approx(100 / (1 + z**2 / 10))  # the formula at a share of 1


def test_confusion_matrix_and_scores_by_hand():
    labels = torch.tensor([0, 0, 0, 1, 1, 2])
    predicted = torch.tensor([0, 0, 1, 1, 1, 1])
    expected = torch.zeros(10, 10, dtype=torch.int64)
    expected[0, 0], expected[0, 1], expected[1, 1], expected[2, 1] = 2, 1, 2, 1
    assert torch.equal(confusion_matrix(predicted, labels), expected)
    zero, one, two, *others = per_class(predicted, labels)
    assert zero == pytest.approx({"digit": 0, "precision": 100, "recall": 200 / 3, "f1": 80, "support": 3})
    assert one == pytest.approx({"digit": 1, "precision": 50, "recall": 100, "f1": 200 / 3, "support": 2})
    assert two == {"digit": 2, "precision": 0, "recall": 0, "f1": 0, "support": 1}
    assert [row["support"] for row in others] == [0] * 7


def test_mistakes_are_those_misclassified_the_most_confident_first():
    log_probabilities = sure_of([3, 1, 7, 7], [0.6, 0.9, 0.99, 0.8])
    mistakes = find_mistakes(log_probabilities, torch.tensor([5, 1, 2, 1]))
    assert [(m["index"], m["true"], m["predicted"]) for m in mistakes] == [(2, 2, 7), (3, 1, 7), (0, 5, 3)]
    assert [m["confidence"] for m in mistakes] == pytest.approx([0.99, 0.8, 0.6])


def test_calibration_error_of_a_constructed_set():
    # 10 images at 95 % of which 8 are right, 10 at 65 % of which 5 are: (0.15 + 0.15) / 2
    log_probabilities = sure_of([0] * 20, [0.95] * 10 + [0.65] * 10)
    labels = torch.tensor([0] * 8 + [1] * 2 + [0] * 5 + [1] * 5)
    assert expected_calibration_error(log_probabilities, labels) == pytest.approx(15, abs=1e-4)
    low, high = reliability_bins(log_probabilities, labels)
    assert (low["images"], low["correct"], low["accuracy"]) == (10, 5, 50)
    assert (high["images"], high["correct"], high["accuracy"]) == (10, 8, 80)
    assert (low["confidence"], high["confidence"]) == (pytest.approx(65), pytest.approx(95))
    assert low["from"] < 65 < low["to"] <= high["from"] < 95 < high["to"] == 100


def test_a_confidence_of_exactly_one_belongs_to_the_last_bin():
    # one bin: 98 % sure, 75 % right; with one of their own for the last two it would be (4 + 50) / 2
    log_probabilities = sure_of([0, 0, 0, 0], [0.96, 0.96, 1.0, 1.0])
    labels = torch.tensor([0, 0, 0, 1])
    assert expected_calibration_error(log_probabilities, labels) == pytest.approx(98 - 75, abs=1e-4)
    (only,) = reliability_bins(log_probabilities, labels)
    assert (only["images"], only["correct"]) == (4, 3)


def test_bins_and_matrix_are_those_of_torchmetrics():
    generator = torch.Generator().manual_seed(0)
    log_probabilities = F.log_softmax(4 * torch.randn(5000, 10, generator=generator), dim=1)
    labels = torch.randint(10, (5000,), generator=generator)
    bins, predicted = reliability_bins(log_probabilities, labels), log_probabilities.argmax(1)
    assert sum(row["images"] for row in bins) == 5000
    gap = sum(row["images"] / 5000 * abs(row["accuracy"] - row["confidence"]) for row in bins)
    measured = expected_calibration_error(log_probabilities, labels)
    assert measured == pytest.approx(gap)
    reference = multiclass_calibration_error(log_probabilities.exp(), labels, 10, n_bins=15, norm="l1")
    assert measured == pytest.approx(100 * float(reference), abs=1e-3)
    assert torch.equal(confusion_matrix(predicted, labels), multiclass_confusion_matrix(predicted, labels, 10))


@pytest.mark.parametrize("factor", [0.5, 1.0, 2.5])
def test_temperature_of_a_network_made_over_confident(factor):
    """Labels are drawn from the network's own probabilities, so it is calibrated; then its logits are multiplied."""
    generator = torch.Generator().manual_seed(0)
    calibrated = F.log_softmax(3 * torch.randn(100_000, 10, generator=generator), dim=1)
    labels = calibrated.exp().multinomial(1, generator=generator).squeeze(1)
    made_sure = F.log_softmax(factor * calibrated, dim=1)
    temperature = fit_temperature(made_sure, labels)
    assert temperature == pytest.approx(factor, rel=0.02)
    assert expected_calibration_error(scale(made_sure, temperature), labels) < 0.5
    if factor != 1.0:
        assert expected_calibration_error(made_sure, labels) > 5
    for other in (0.99 * temperature, 1.01 * temperature):
        assert F.nll_loss(scale(made_sure, temperature), labels) < F.nll_loss(scale(made_sure, other), labels)


def test_without_a_mistake_no_temperature_is_better():
    log_probabilities = sure_of([1, 2], [0.9, 0.8])
    assert fit_temperature(log_probabilities, torch.tensor([1, 2])) == 1
    measured = calibration(log_probabilities, torch.tensor([1, 3]), (log_probabilities, torch.tensor([1, 2])))
    assert measured["temperature"] is None


def test_the_temperature_is_of_the_held_out_images_alone():
    test, held_out = sure_of([0] * 10, [0.9] * 10), sure_of([0] * 10, [0.99] * 10)
    labels = torch.tensor([0] * 5 + [1] * 5)
    measured = calibration(test, labels, (held_out, labels))
    assert measured["temperature"] == fit_temperature(held_out, labels) != fit_temperature(test, labels)
    assert measured["fitted_on"] == 10
    assert measured["loss_scaled"] == pytest.approx(float(F.nll_loss(scale(test, measured["temperature"]), labels)))


def test_integrated_gradients_of_a_linear_network():
    """There they are the weights times the difference from black, whatever the path."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    images = torch.rand(3, 1, 28, 28)
    digits = torch.tensor([4, 0, 9])
    black = normalize(torch.zeros(1, 1, 28, 28))
    expected = ((images - black).flatten(1) * model[1].weight[digits]).view(3, 28, 28)
    assert torch.allclose(integrated_gradients(model, images, digits), expected, atol=1e-5)


def test_integrated_gradients_sum_to_what_the_image_changes(shipped, test_set):
    """2 to 5 s: ten images, along a path of many steps each."""
    images = as_input(test_set[0][:10], CPU)
    black = normalize(torch.zeros(1, 1, 28, 28))
    digits = predict(shipped, images).argmax(1)
    sums = integrated_gradients(shipped, images, digits).sum((1, 2))
    change = predict(shipped, images).gather(1, digits.unsqueeze(1)).squeeze(1) - predict(shipped, black)[0, digits]
    assert torch.allclose(sums, change, rtol=0.05, atol=0.1)
    assert change.max() > 5
