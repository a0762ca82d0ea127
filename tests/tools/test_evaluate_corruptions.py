import itertools

import pytest

from imports import nn, torch
from model_strategy import get_strategy
from tools.evaluate import corruptions
from tools.evaluate.corruptions import CORRUPTIONS, corrupt
from tools.evaluate.measures import as_input, predict
from visualization import load_model_params

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def shipped(shipped_project) -> nn.Module:
    return load_model_params(get_strategy("1").build(), "mnist_model_1", shipped_project)


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
def test_a_strength_of_nothing_changes_nothing(name, test_set):
    images = test_set[0][:20].unsqueeze(1).float() / 255
    spoilt = CORRUPTIONS[name].apply(images, HARMLESS[name], torch.Generator().manual_seed(0))
    assert (spoilt - images).abs().max() < 0.5 / 255


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_corruptions_hurt_more_with_strength(name, shipped, test_set):
    images, labels = test_set[0][:1000], test_set[1][:1000]
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
def test_corruptions_are_the_same_from_the_same_seed(name, test_set):
    images = test_set[0][:10]
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
