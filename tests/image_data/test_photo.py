"""What people photograph: the small files of tests/cases, and test digits in each condition of tests/photographs.py."""

import contextlib

import numpy as np
import pytest
from PIL import Image

from common.files import PROJECT_DIR
from data_utils import load_images
from image_data.errors import EmptyImageError, ImageError
from image_data.form import read_grey, to_mnist
from tests.measure import VARIATIONS, png
from tests.photographs import CONDITIONS, photograph
from tools.networks import load_network, probabilities

CASES = PROJECT_DIR / "tests" / "cases"
SEVENS = ["lamp_10", "lamp_16", "shadow", "ruled", "framed", "window_shot", "rounded16", "red_on_green"]


@pytest.fixture(scope="module")
def digit_of(shipped_project):
    """What the shipped model 3 makes of a picture's bytes."""
    network = load_network("mnist_model_3", str(shipped_project))
    return lambda data: int(np.argmax(probabilities(network, [to_mnist(read_grey(data))])[0]))


@pytest.mark.parametrize("name", SEVENS)
def test_a_picture_that_used_to_fail(name, digit_of):
    assert digit_of((CASES / f"{name}.png").read_bytes()) == 7


def test_half_a_file_is_told():
    with pytest.raises(ImageError, match="the image is damaged"):
        read_grey((CASES / "trunc.png").read_bytes())


@pytest.mark.parametrize("condition", CONDITIONS)
def test_digits_are_read_in_every_condition(condition, digit_of, mnist):
    images, labels = load_images(mnist, train=False)
    place = list(CONDITIONS).index(condition)
    pictures = [photograph(condition, images[i].numpy(), np.random.default_rng([place, i])) for i in range(5)]
    assert sum(digit_of(data) == label for data, label in zip(pictures, labels[:5].tolist(), strict=True)) >= 4


@pytest.mark.parametrize("variation", ["as it is", "shifted into a corner", "thicker"])
def test_a_drawing_is_taken_as_it_is(variation, mnist):
    """Its ink is what stands out from its paper, none of it taken for a shadow, a line or a sheet."""
    for digit in load_images(mnist, train=False)[0][:5].numpy():
        canvas = np.asarray(VARIATIONS[variation](digit), dtype=np.float32)
        drawn = to_mnist(read_grey(png(VARIATIONS[variation](digit)))).astype(int)
        assert abs(drawn - to_mnist(255 - canvas).astype(int)).max() <= 1
        assert drawn.astype(bool).sum() > 40


@pytest.mark.parametrize("paper", [0, 255])
def test_a_drawing_cut_off_along_its_ink(paper, digit_of, mnist):
    images, labels = load_images(mnist, train=False)
    right = 0
    for digit, label in zip(images[:20].numpy(), labels[:20].tolist(), strict=True):
        rows, columns = (np.flatnonzero(digit.any(axis=axis)) for axis in (1, 0))
        cut = Image.fromarray(digit[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])
        drawn = np.abs(paper - np.asarray(cut.resize((8 * cut.width, 8 * cut.height)), dtype=np.float32))
        with contextlib.suppress(EmptyImageError):
            right += digit_of(png(drawn.astype(np.uint8))) == label
    assert right >= 16  # 12 of the light drawings without the paper that is put around them


def test_an_even_sheet_is_empty():
    light = np.linspace(250, 180, 300, dtype=np.float32)[:, None] + np.zeros((1, 200), np.float32)
    grain = np.random.default_rng(1).normal(0, 2, light.shape).astype(np.float32)
    for sheet in (light, light + grain):
        with pytest.raises(EmptyImageError):
            to_mnist(sheet)
