import itertools
import json
import math
import shutil
import subprocess
import sys

import pytest
from conftest import make_tiny_mnist, write_sums

from common.files import PROJECT_DIR
from data_utils import load_images, normalize, split_indices
from imports import F, nn, torch
from main import main as train
from model_strategy import get_strategy
from tools.evaluate import corruptions
from tools.evaluate.__main__ import main
from tools.evaluate.corruptions import CORRUPTIONS, corrupt
from tools.evaluate.measures import (
    confusion_matrix,
    expected_calibration_error,
    find_mistakes,
    fit_temperature,
    integrated_gradients,
    per_class,
    predict,
    reliability_bins,
    scale,
)
from tools.evaluate.report import as_input, calibration, mean_corrupted_accuracy
from tools.intervals import wilson_interval
from visualization import load_metrics_json, load_model_params, save_metrics_json

CPU = torch.device("cpu")
PICTURES = ["confusion", "mistakes", "reliability", "robustness", "saliency"]


def sure_of(digits: list[int], confidences: list[float]) -> torch.Tensor:
    """Log-probabilities with these digits on top at these confidences, the rest spread evenly."""
    rows = torch.tensor([[(1 - confidence) / 9] * 10 for confidence in confidences], dtype=torch.float64)
    rows[range(len(digits)), digits] = torch.tensor(confidences, dtype=torch.float64)
    return rows.log()


@pytest.fixture(scope="module")
def test_images(mnist) -> tuple[torch.Tensor, torch.Tensor]:
    return load_images(mnist, train=False)


@pytest.fixture(scope="module")
def shipped(shipped_project) -> nn.Module:
    return load_model_params(get_strategy("1").build(), "mnist_model_1", shipped_project)


# ---------------------------------------------------------------------------------------------------------------------
# measures
# ---------------------------------------------------------------------------------------------------------------------


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


def test_bins_and_calibration_error_agree():
    generator = torch.Generator().manual_seed(0)
    log_probabilities = F.log_softmax(4 * torch.randn(5000, 10, generator=generator), dim=1)
    labels = torch.randint(10, (5000,), generator=generator)
    bins = reliability_bins(log_probabilities, labels)
    assert sum(row["images"] for row in bins) == 5000
    gap = sum(row["images"] / 5000 * abs(row["accuracy"] - row["confidence"]) for row in bins)
    assert expected_calibration_error(log_probabilities, labels) == pytest.approx(gap, abs=1e-3)


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


def test_no_temperature_without_a_mistake():
    log_probabilities = sure_of([1, 2], [0.9, 0.8])
    with pytest.raises(ValueError, match="not one of the 2 images is misclassified"):
        fit_temperature(log_probabilities, torch.tensor([1, 2]))
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


def test_integrated_gradients_sum_to_what_the_image_changes(shipped, test_images):
    images = as_input(test_images[0][:10], CPU)
    black = normalize(torch.zeros(1, 1, 28, 28))
    digits = predict(shipped, images).argmax(1)
    sums = integrated_gradients(shipped, images, digits).sum((1, 2))
    change = predict(shipped, images).gather(1, digits.unsqueeze(1)).squeeze(1) - predict(shipped, black)[0, digits]
    assert torch.allclose(sums, change, rtol=0.05, atol=0.1)
    assert change.max() > 5


# ---------------------------------------------------------------------------------------------------------------------
# corruptions
# ---------------------------------------------------------------------------------------------------------------------

# what leaves an image as it is, but for rounding
HARMLESS = {
    "shot_noise": 1e9,
    "impulse_noise": 0.0,
    "gaussian_blur": 0.01,
    "glass_blur": (0.01, 1, 0),
    "motion_blur": (5, 0.01),
    "shear": 0.0,
    "rotate": 0.0,
    "translate": 0,
    "scale": 1.0,
    "brightness": 0.0,
    "contrast": 1.0,
    "stripe": 0,
    "fog": (0.0, 2.0),
    "spatter": 0.0,
    "dotted_line": 0,
    "zigzag": 0,
}


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_strength_of_nothing_changes_nothing(name, test_images):
    images = test_images[0][:20].unsqueeze(1).float() / 255
    spoilt = CORRUPTIONS[name].apply(images, HARMLESS[name], torch.Generator().manual_seed(0))
    assert (spoilt - images).abs().max() < 0.5 / 255


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_corruptions_hurt_more_with_strength(name, shipped, test_images):
    images, labels = test_images[0][:1000], test_images[1][:1000]
    accuracies = [100 * (predict(shipped, as_input(images, CPU)).argmax(1) == labels).float().mean()]
    for strength in range(1, 6):
        spoilt = corrupt(images, name, strength)
        assert spoilt.shape == images.shape
        assert spoilt.dtype == torch.uint8
        accuracies.append(100 * (predict(shipped, as_input(spoilt, CPU)).argmax(1) == labels).float().mean())
    # of a thousand images a few more or less are chance where two strengths do about the same, as fog's last three
    assert all(after < before + 1.5 for before, after in itertools.pairwise(accuracies))
    assert accuracies[-1] < accuracies[0] - 0.5


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_corruptions_are_the_same_from_the_same_seed(name, test_images):
    images = test_images[0][:10]
    before = images.clone()
    once = corrupt(images, name, 3, seed=5)
    torch.rand(7)  # the global generator has no part in it
    assert torch.equal(corrupt(images, name, 3, seed=5), once)
    assert torch.equal(images, before)
    draws = name not in ("gaussian_blur", "scale", "brightness", "contrast", "stripe")
    assert torch.equal(corrupt(images, name, 3, seed=6), once) != draws


def test_impulse_noise_by_its_share():
    grey = torch.full((100, 28, 28), 128, dtype=torch.uint8)
    spoilt = corrupt(grey, "impulse_noise", 5)
    assert (spoilt == 0).float().mean() == pytest.approx(0.27 / 2, abs=0.01)
    assert (spoilt == 255).float().mean() == pytest.approx(0.27 / 2, abs=0.01)
    assert (spoilt == 128).float().mean() == pytest.approx(0.73, abs=0.01)


def test_shot_noise_has_the_variance_of_counted_photons():
    grey = torch.full((200, 28, 28), 51, dtype=torch.uint8)  # a fifth of white
    counted = corrupt(grey, "shot_noise", 1).float() / 255
    assert counted.mean() == pytest.approx(0.2, abs=0.002)
    assert counted.var() == pytest.approx(0.2 / 60, rel=0.03)


def test_translate_moves_by_whole_pixels_in_both_directions():
    images = torch.zeros(50, 28, 28, dtype=torch.uint8)
    images[:, 14, 14] = 200
    spoilt = corrupt(images, "translate", 4)
    places = {tuple(image.nonzero().flatten().tolist()) for image in spoilt}
    assert places == {(10, 10), (10, 18), (18, 10), (18, 18)}
    assert spoilt.amax((1, 2)).unique().tolist() == [200]


def test_scale_keeps_the_centre_and_shrinks():
    square = torch.zeros(1, 28, 28, dtype=torch.uint8)
    square[:, 4:24, 4:24] = 255
    (rows, columns) = corrupt(square, "scale", 5)[0].nonzero().t()
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (9, 18, 9, 18)


def test_rotate_turns_by_radians_either_way():
    bar = torch.zeros(200, 28, 28, dtype=torch.uint8)
    bar[:, 3:25, 13:15] = 255
    spoilt = corrupt(bar, "rotate", 2).double()
    line = torch.arange(28, dtype=torch.float64) - 13.5
    mass = spoilt.sum((1, 2))
    spread = (spoilt * line.view(1, -1, 1) ** 2).sum((1, 2)) / mass, (spoilt * line**2).sum((1, 2)) / mass
    mixed = (spoilt * line.view(1, -1, 1) * line).sum((1, 2)) / mass
    angles = 0.5 * torch.atan2(2 * mixed, spread[0] - spread[1])
    assert sorted({round(float(angle), 2) for angle in angles}) == [-0.4, 0.4]
    assert 60 < (angles > 0).sum() < 140


def test_shear_moves_rows_sideways():
    bar = torch.zeros(1, 28, 28, dtype=torch.uint8)
    bar[:, 8:20, 13:15] = 255
    spoilt = corrupt(bar, "shear", 2).double()[0]
    middles = (spoilt * torch.arange(28)).sum(1)[8:20] / spoilt.sum(1)[8:20]
    assert middles.diff().abs().tolist() == pytest.approx([0.4] * 11, abs=0.06)


def test_stripe_by_hand():
    images = torch.full((1, 28, 28), 55, dtype=torch.uint8)
    spoilt = corrupt(images, "stripe", 4)  # MNIST-C's: seven columns either side
    assert (spoilt[:, :, :7] == 200).all()
    assert (spoilt[:, :, 7:21] == 55).all()
    assert (spoilt[:, :, 21:] == 200).all()


def test_glass_blur_moves_pixels_and_loses_none(monkeypatch):
    monkeypatch.setattr(corruptions, "gaussian_blur", lambda images, sigma, generator: images)
    images = torch.rand(4, 1, 28, 28)
    spoilt = corruptions.glass_blur(images, (0.7, 2, 3), torch.Generator().manual_seed(0))
    assert not torch.equal(spoilt, images)
    assert torch.equal(spoilt.flatten(1).sort().values, images.flatten(1).sort().values)


def test_motion_blur_keeps_the_light():
    images = torch.zeros(30, 1, 28, 28)
    images[:, :, 14, 24] = 1
    spoilt = corruptions.motion_blur(images, (10, 3.0), torch.Generator().manual_seed(0))
    assert torch.allclose(spoilt.sum((1, 2, 3)), torch.ones(30), atol=1e-3)
    rows, columns = spoilt[0, 0].nonzero().t()
    assert columns.max() <= 25  # the copies move the picture's content to the left
    assert len(rows) > 3


def test_fog_lies_between_the_image_and_white():
    black, white = (torch.full((20, 1, 28, 28), grey) for grey in (0.0, 1.0))
    spoilt = corruptions.fog(white, (1.5, 2.0), torch.Generator().manual_seed(0))
    assert spoilt.min() >= 1 / 2.5 - 1e-6
    assert spoilt.max() <= 1 + 1e-6
    assert spoilt.std() > 0.05
    clouds = corruptions._plasma(2.0, torch.Generator().manual_seed(0))
    assert (clouds.amin((1, 2)) == 0).all()
    assert (clouds.amax((1, 2)) == 1).all()
    assert torch.equal(corruptions.fog(black, (1.5, 2.0), torch.Generator().manual_seed(0)), black)


def test_spatter_covers_its_share():
    spoilt = corrupt(torch.zeros(50, 28, 28, dtype=torch.uint8), "spatter", 3)
    assert (spoilt == 63).float().mean() == pytest.approx(0.3, abs=0.01)


def test_lines_are_added():
    black = torch.zeros(30, 28, 28, dtype=torch.uint8)
    for name, columns in (("dotted_line", [2, 3, 6, 7]), ("zigzag", range(2, 25))):
        once, twice = corrupt(black, name, 1), corrupt(black, name, 2)
        assert (twice >= once).all()
        assert set(columns) <= set(once.amax((0, 1)).nonzero().flatten().tolist())
    assert corrupt(black, "dotted_line", 5)[:, :, [0, 1, 4, 5, 27]].max() == 0
    assert corrupt(black, "zigzag", 5)[:, :, [0, 1, 25, 26, 27]].max() == 0


# ---------------------------------------------------------------------------------------------------------------------
# the command
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """A run on a tiny data set with 100 images held out, and its evaluation by the command."""
    folder = tmp_path_factory.mktemp("evaluate")
    raw = folder / "data" / "MNIST" / "raw"
    make_tiny_mnist(raw)
    write_sums(raw)
    places = ["--name", "trial", "--data_dir", str(folder / "data"), "--output_dir", str(folder), "--threads", "1"]
    assert train([*places, "--epochs", "3", "--batch_size", "20", "--val_split", "100"]) == 0
    line = [sys.executable, "-m", "tools.evaluate", *places]
    done = subprocess.run(line, cwd=PROJECT_DIR, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder, json.loads((folder / "outputs" / "trial_evaluation.json").read_text()), done.stdout


def test_the_evaluation_is_of_the_test_images(evaluated):
    folder, evaluation, printed = evaluated
    metrics = load_metrics_json("trial", folder)
    images, labels = load_images(folder / "data", train=False)
    model = load_model_params(get_strategy("1").build(), "trial", folder)
    log_probabilities = predict(model, as_input(images, CPU))
    predicted = log_probabilities.argmax(1)
    wrong = (predicted != labels).nonzero().flatten().tolist()
    assert wrong, "the tiny run must make mistakes for this test to say something"

    assert evaluation["schema"] == 1
    assert (evaluation["name"], evaluation["parameters"], evaluation["images"]) == ("trial", 7720, 100)
    assert evaluation["accuracy"] == pytest.approx(metrics["test_acc"][-1], abs=1e-4)
    assert evaluation["accuracy_interval"] == list(wilson_interval(100 - len(wrong), 100))
    assert torch.equal(torch.tensor(evaluation["confusion"]), confusion_matrix(predicted, labels))
    assert sorted(mistake["index"] for mistake in evaluation["mistakes"]) == wrong
    assert all(labels[m["index"]] == m["true"] != m["predicted"] for m in evaluation["mistakes"])
    assert [row["support"] for row in evaluation["per_class"]] == [10] * 10
    assert list(evaluation["corruptions"]) == list(CORRUPTIONS)
    for name, accuracies in evaluation["corruptions"].items():
        spoilt = predict(model, as_input(corrupt(images, name, 5), CPU)).argmax(1)
        assert accuracies[4] == pytest.approx(100 * float((spoilt == labels).float().mean()), abs=1.01)
        assert len(accuracies) == 5
        row = next(line for line in printed.splitlines() if line.startswith(f"{name} "))
        assert all(f"{accuracy:.2f}" in row for accuracy in accuracies)
    low, high = evaluation["accuracy_interval"]
    assert f"accuracy {evaluation['accuracy']:.2f} %, 95 % interval {low:.2f} to {high:.2f} %" in printed


def test_the_temperature_is_fitted_on_the_runs_held_out_images(evaluated):
    folder, evaluation, printed = evaluated
    images, labels = load_images(folder / "data", train=True)
    held_out = split_indices(labels, 100)[1]
    model = load_model_params(get_strategy("1").build(), "trial", folder)
    temperature = fit_temperature(predict(model, as_input(images[held_out], CPU)), labels[held_out])
    assert evaluation["calibration"]["temperature"] == pytest.approx(temperature, rel=1e-3)
    assert evaluation["calibration"]["fitted_on"] == 100
    assert f"temperature {temperature:.3f}, fitted on 100 held-out training images" in printed


def test_every_picture_is_written(evaluated):
    folder, _, printed = evaluated
    for what in PICTURES:
        path = folder / "plots" / f"trial_{what}.png"
        assert path.read_bytes().startswith(b"\x89PNG")
        assert str(path) in printed
    assert not list(folder.rglob("*.partial"))


def test_a_damaged_network_is_told_in_one_line(evaluated, tmp_path, capsys):
    folder, _, _ = evaluated
    shutil.copytree(folder / "outputs", tmp_path / "outputs")
    weights = tmp_path / "outputs" / "trial_params.pth"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert main(["--name", "trial", "--output_dir", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert "is damaged" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "plots").exists()


def test_a_run_under_way_is_refused(evaluated, tmp_path, capsys):
    folder, _, _ = evaluated
    shutil.copytree(folder / "outputs", tmp_path / "outputs")
    save_metrics_json({**load_metrics_json("trial", tmp_path), "status": "running"}, "trial", tmp_path)
    with pytest.raises(SystemExit) as caught:
        main(["--name", "trial", "--output_dir", str(tmp_path)])
    assert caught.value.code == 2
    assert "trial is not finished; its metrics say that it is running" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--name", "absent"], "absent_metrics.json does not exist; runs with such a file in that folder: mnist_model"),
        (["--name", "a/b"], "name: 'a/b' is not allowed"),
        (["--threads", "0"], "threads: 0 is not allowed; it must be at least 1"),
        (["--device", "tpu"], "device: 'tpu' is not allowed"),
        (["--name", "a", "--ensemble", "b"], "not allowed with argument"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
    ],
)
def test_wrong_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_flags_are_read_without_torch():
    code = "import sys, tools.evaluate.__main__ as command; command.get_args_parser(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT_DIR, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# ---------------------------------------------------------------------------------------------------------------------
# what is shipped
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", ["1", "2", "3"])
def test_the_shipped_evaluations_are_of_the_shipped_networks(number, shipped_project, test_images):
    name = f"mnist_model_{number}"
    evaluation = json.loads((shipped_project / "outputs" / f"{name}_evaluation.json").read_text())
    images, labels = test_images
    model = load_model_params(get_strategy(number).build(), name, shipped_project)
    predicted = predict(model, as_input(images, CPU)).argmax(1)
    wrong = set((predicted != labels).nonzero().flatten().tolist())
    # another processor rounds otherwise, which may turn one image in ten thousand
    assert len(wrong ^ {mistake["index"] for mistake in evaluation["mistakes"]}) <= 1
    assert evaluation["accuracy"] == load_metrics_json(name, shipped_project)["test_acc"][-1]
    assert (torch.tensor(evaluation["confusion"]) - confusion_matrix(predicted, labels)).abs().sum() <= 2
    assert evaluation["calibration"]["temperature"] is None  # no image was held out


def test_the_page_shows_the_shipped_evaluations(shipped_project):
    page = (PROJECT_DIR / "docs" / "evaluate.md").read_text(encoding="utf-8")
    for number in ("1", "2", "3"):
        evaluation = json.loads((shipped_project / "outputs" / f"mnist_model_{number}_evaluation.json").read_text())
        assert row_of(number, evaluation) in page
    for what in PICTURES:
        assert f"plots/mnist_model_3_{what}.png" in page
        assert (shipped_project / "plots" / f"mnist_model_3_{what}.png").read_bytes().startswith(b"\x89PNG")


def row_of(number: str, evaluation: dict) -> str:
    low, high = evaluation["accuracy_interval"]
    lowest = min(evaluation["per_class"], key=lambda row: row["f1"])
    ece, spoilt = evaluation["calibration"]["ece"], mean_corrupted_accuracy(evaluation["corruptions"])
    return (
        f"| {number} | {evaluation['accuracy']:.2f} | {low:.2f} to {high:.2f} | {lowest['f1']:.2f} ({lowest['digit']})"
        f" | {ece:.2f} | {spoilt:.2f} |"
    )
