"""Which patches of ink are one digit, and the order in which digits are read."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from common.files import PROJECT_DIR
from data_utils import load_images
from image_data.errors import EmptyImageError
from image_data.form import read_page, to_mnist
from image_data.groups import MOST, digits_in
from tests.measure import VARIATIONS, png
from tests.photographs import page

CASES = PROJECT_DIR / "tests" / "cases"


def ink_of(*rectangles: tuple[int, int, int, int], side: int = 400) -> np.ndarray:
    """Full ink within each left, top, width, height."""
    ink = np.zeros((side, side), dtype=np.float32)
    for left, top, width, height in rectangles:
        ink[top : top + height, left : left + width] = 1
    return ink


def boxes(*rectangles: tuple[int, int, int, int]) -> list[tuple[int, int, int, int]]:
    return [digit.box for digit in digits_in(ink_of(*rectangles))]


def test_lines_are_read_from_top_to_bottom():
    """Also when they run uphill, and the second begins further left."""
    upper = [(80 + 60 * place, 60 - 9 * place, 30, 50) for place in range(5)]
    lower = [(20 + 60 * place, 160 - 9 * place, 30, 50) for place in range(6)]
    found = digits_in(ink_of(*reversed(lower), *reversed(upper)))
    assert [digit.box for digit in found] == upper + lower
    assert [digit.line for digit in found] == [0] * 5 + [1] * 6


@pytest.mark.parametrize(
    "parts",
    [
        ((100, 100, 40, 90), (105, 80, 50, 12)),  # a 5 and its bar
        ((100, 100, 40, 90), (143, 85, 30, 12)),  # whose bar begins where it ends
        ((100, 100, 50, 48), (100, 152, 50, 48)),  # broken in the middle
        ((100, 100, 10, 60), (100, 160, 50, 10), (152, 100, 10, 100)),  # a 4 of an open corner and a stem
    ],
)
def test_a_digit_in_parts_is_one(parts):
    assert len(boxes(*parts)) == 1
    assert len(boxes(*parts, *((left + 120, *rest) for left, *rest in parts))) == 2


def test_neighbours_are_two():
    assert len(boxes((100, 100, 12, 90), (125, 100, 12, 90))) == 2  # 11
    assert len(boxes((100, 100, 50, 90), (100, 210, 50, 90))) == 2  # one above the other


def test_dirt_is_left_out():
    assert boxes((100, 100, 50, 90), (300, 300, 9, 9), (20, 20, 2, 2)) == [(100, 100, 50, 90)]


def test_as_many_as_can_be_told():
    every = [(8 * (place % 40), 14 * (place // 40), 4, 9) for place in range(MOST + 100)]
    assert len(digits_in(ink_of(*every))) == MOST
    with pytest.raises(EmptyImageError):
        digits_in(np.zeros((50, 50), dtype=np.float32))


@pytest.mark.parametrize(("name", "size", "number"), [("407", (1000, 500), 3), ("seventyseven", (900, 500), 2)])
def test_numbers(name, size, number):
    found = read_page(CASES / f"{name}.png")
    assert (found.width, found.height) == size
    assert found.lines == [0] * number
    assert found.text("407"[:number]) == "407"[:number]
    drawn = np.asarray(Image.open(CASES / f"{name}.png").convert("L"))
    for left, top, width, height in found.boxes:  # each holds all the ink that is near it
        around = drawn[top - 30 : top + height + 30, left - 30 : left + width + 30] < 200
        rows, columns = np.flatnonzero(around.any(axis=1)), np.flatnonzero(around.any(axis=0))
        inked = (columns[0] - 30, rows[0] - 30, columns[-1] + 1 - columns[0], rows[-1] + 1 - rows[0])
        assert np.abs(np.array(inked) - (0, 0, width, height)).max() <= 4


def test_boxes_are_of_the_picture_as_it_is_shown(tmp_path):
    """One that is larger than what is worked on, and was turned in the hand."""
    image = Image.new("L", (3000, 2000), 255)
    ImageDraw.Draw(image).rectangle((300, 600, 1499, 799), fill=0)  # lying
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: to be turned by 90 degrees clockwise
    image.save(tmp_path / "turned.jpg", exif=exif)
    found = read_page(tmp_path / "turned.jpg")
    assert (found.width, found.height) == (2000, 3000)
    assert np.abs(np.array(found.boxes[0]) - (1200, 300, 200, 1200)).max() <= 10


def test_the_largest_is_the_one():
    canvas = 255 * (1 - ink_of((40, 100, 20, 60), (200, 60, 60, 150)))
    assert np.array_equal(to_mnist(canvas), to_mnist(255 * (1 - ink_of((200, 60, 60, 150)))))


@pytest.mark.parametrize("variation", ["as it is", "thinner"])
def test_a_drawn_digit_is_one(variation, mnist):
    for digit in load_images(mnist, train=False)[0][:100].numpy():
        assert len(read_page(png(VARIATIONS[variation](digit))).images) == 1


def test_photos_of_pages(mnist):
    """2 s: three photos of three lines."""
    images, _ = load_images(mnist, train=False)
    for seed in range(3):
        rows = [[images[12 * seed + 4 * line + place].numpy() for place in range(4)] for line in range(3)]
        found = read_page(page(rows, np.random.default_rng(seed)))
        assert found.lines == [0] * 4 + [1] * 4 + [2] * 4
