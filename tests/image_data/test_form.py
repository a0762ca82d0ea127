import io
import sys

import numpy as np
import pillow_heif
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from PIL import Image, ImageDraw, ImageFilter

from image_data import form
from image_data.errors import EmptyImageError, ImageError, TooLargeError
from image_data.form import read_grey, to_mnist
from tests.measure import placed

pillow_heif.register_heif_opener()


def encoded(image: Image.Image, form: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def centre_of_mass(image) -> tuple[float, float]:
    rows, columns = np.indices(image.shape)
    return float((image * (rows + 0.5)).sum() / image.sum()), float((image * (columns + 0.5)).sum() / image.sum())


def box_of(image) -> tuple[int, int]:
    rows, columns = np.flatnonzero(image.any(axis=1)), np.flatnonzero(image.any(axis=0))
    return int(rows[-1] - rows[0] + 1), int(columns[-1] - columns[0] + 1)


def test_a_block_by_hand():
    canvas = np.zeros((280, 280), dtype=np.uint8)
    canvas[20:220, 100:150] = 200  # 200 high, 50 wide, so 20 x 5
    expected = np.zeros((28, 28), dtype=np.uint8)
    expected[4:24, 12:17] = 255  # its middle is at 14.5: the nearest whole pixel, halves to the even one
    image = to_mnist(canvas)
    assert image.dtype == np.uint8
    assert box_of(image) == (20, 5)
    assert np.array_equal(np.sort(image, axis=None), np.sort(expected, axis=None))
    assert abs(centre_of_mass(image)[0] - 14) <= 0.5
    assert abs(centre_of_mass(image)[1] - 14) <= 0.5


def test_edges_are_antialiased():
    canvas = np.zeros((100, 100), dtype=np.uint8)
    canvas[10:90, 10:50] = 255
    canvas[10:90, 50:51] = 255  # 80 high, 41 wide: 20 x 10.25, so 10 columns
    image = to_mnist(canvas)
    assert box_of(image) == (20, 10)
    disc = Image.new("L", (200, 200))
    ImageDraw.Draw(disc).ellipse((20, 20, 180, 180), fill=255)
    levels = np.unique(to_mnist(np.asarray(disc)))
    assert len(levels) > 5  # the edge of a disc covers its pixels in part


def test_mass_and_not_the_box_is_centred():
    canvas = np.zeros((100, 100), dtype=np.uint8)
    canvas[10:30, 10:90] = 255  # the bar of a 7, all the way across
    canvas[30:90, 70:90] = 255
    image = to_mnist(canvas)
    assert np.allclose(centre_of_mass(image), 14, atol=0.5)
    rows = np.flatnonzero(image.any(axis=1))
    assert (rows[0], rows[-1]) != (4, 23)


@pytest.mark.parametrize("index", range(0, 60, 6))
def test_real_digits_come_back(test_set, index):
    """A test image drawn ten times as large is brought back to itself, but for its faintest edges."""
    digit = test_set[0][index].numpy()
    large = np.kron(digit, np.ones((10, 10), dtype=np.uint8))
    again = to_mnist(large)
    shifts = [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1)]  # MNIST's own rounding of the centre is not known
    nearest = min(np.abs(np.roll(again, shift, (0, 1)).astype(int) - digit).mean() for shift in shifts)
    assert nearest < 4


def test_the_same_digit_however_it_lies_and_is_inked(test_set):
    digit = test_set[0][0].numpy()
    large = np.kron(digit, np.ones((6, 6), dtype=np.uint8))
    reference = to_mnist(placed(large))
    for x, y in [(0, 0), (1, 0), (0, 1), (1, 1)]:
        assert np.array_equal(to_mnist(placed(large, x, y)), reference)
    assert np.array_equal(to_mnist(255 - placed(large)), reference)
    half = (placed(large) // 2 + 60).astype(np.uint8)  # grey on grey
    assert np.abs(to_mnist(half).astype(int) - reference).max() <= 12


@pytest.mark.parametrize("shade", [0.0, 0.35])
def test_a_photo_of_a_digit_on_paper(shade):
    """Grain, light that falls off across the page, a blurred pen and specks of dirt."""
    rng = np.random.default_rng(0)
    page = Image.new("L", (400, 500), 200)
    draw = ImageDraw.Draw(page)
    draw.line([(130, 130), (270, 130), (190, 380)], fill=60, width=26)
    draw.point([(20, 20), (380, 470), (50, 400)], fill=40)
    noisy = np.asarray(page.filter(ImageFilter.GaussianBlur(2))) + rng.normal(0, 3, (500, 400))
    seen = to_mnist(np.clip(noisy, 0, 255) * np.linspace(1, 1 - shade, 400))
    drawing = Image.new("L", (400, 500))
    ImageDraw.Draw(drawing).line([(130, 130), (270, 130), (190, 380)], fill=255, width=26)
    assert np.abs(seen.astype(int) - to_mnist(np.asarray(drawing))).mean() < 8


@pytest.mark.parametrize("level", [0, 128, 255])
@pytest.mark.parametrize("side", [1, 28, 280])
def test_nothing_is_drawn(level, side):
    with pytest.raises(EmptyImageError, match="nothing is drawn"):
        to_mnist(np.full((side, side), level, dtype=np.uint8))


def test_grain_alone_is_nothing():
    with pytest.raises(EmptyImageError):
        to_mnist(200 + np.random.default_rng(0).normal(0, 3, (300, 300)))


@settings(max_examples=200)
@given(arrays(np.uint8, array_shapes(min_dims=2, max_dims=2, max_side=40)), st.sampled_from([1, 16]))
def test_any_image_has_the_form_or_is_empty(grey, enlarged):
    try:
        image = to_mnist(np.kron(grey, np.ones((enlarged, enlarged), dtype=np.uint8)))
    except EmptyImageError:
        return
    assert (image.shape, image.dtype, image.max()) == ((28, 28), np.uint8, 255)
    assert max(box_of(image)) <= 20


def test_many_dots_are_a_drawing():
    canvas = np.zeros((280, 280), dtype=np.uint8)
    canvas[40:240:20, 40:240:20] = 255
    assert max(box_of(to_mnist(canvas))) == 20


def test_heic_needs_a_package(monkeypatch):
    data = encoded(Image.new("RGB", (64, 64)), "HEIF")
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(ImageError, match="pip install pillow-heif"):
        read_grey(data)


def test_a_dot_is_a_drawing():
    canvas = np.zeros((280, 280), dtype=np.uint8)
    canvas[100:108, 100:108] = 255
    assert box_of(to_mnist(canvas)) == (20, 20)


LOSSLESS = [(form, 0) for form in ("PNG", "BMP", "GIF", "TIFF")]


@pytest.mark.parametrize(("form", "tolerance"), [*LOSSLESS, ("WEBP", 12), ("JPEG", 12), ("HEIF", 12)])
def test_formats(form, tolerance):
    canvas = np.zeros((120, 100), dtype=np.uint8)
    canvas[20:100, 40:60] = 255
    options = {"lossless": True} if form == "WEBP" else {}
    found = to_mnist(read_grey(encoded(Image.fromarray(canvas), form, **options)))
    assert np.abs(found.astype(int) - to_mnist(canvas)).max() <= tolerance


@pytest.mark.parametrize("ink", [0, 255])
def test_transparent_paper(ink):
    image = Image.new("RGBA", (100, 100), (0, 0, 0, 0))
    ImageDraw.Draw(image).rectangle((40, 20, 59, 79), fill=(ink, ink, ink, 255))
    assert box_of(to_mnist(read_grey(encoded(image)))) == (20, 7)


def test_a_phone_that_was_turned():
    upright = Image.new("L", (100, 60), 255)
    ImageDraw.Draw(upright).rectangle((20, 25, 79, 34), fill=0)  # lies; stands once it is turned
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: to be turned by 90 degrees
    height, width = box_of(to_mnist(read_grey(encoded(upright, "JPEG", exif=exif))))
    assert height > 2 * width


def test_sixteen_bits():
    image = Image.fromarray(np.pad(np.full((80, 20), 60_000, dtype=np.uint16), 30))
    assert box_of(to_mnist(read_grey(encoded(image)))) == (20, 5)


def test_a_large_image_is_averaged_down():
    levels = read_grey(encoded(Image.new("L", (4000, 3000))))
    assert max(levels.shape) == form.WORKING_SIDE


def test_a_decompression_bomb_is_refused_unopened():
    """2 s: it has to be made first, of 900 million pixels."""
    bomb = encoded(Image.new("1", (30_000, 30_000)))
    assert len(bomb) < 200_000
    with pytest.raises(TooLargeError, match="at most 25,000,000"):
        read_grey(bomb)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no PNG, JPEG, WEBP, BMP, GIF or TIFF image"),
        (b"hello", "no PNG, JPEG, WEBP, BMP, GIF or TIFF image"),
        (encoded(Image.new("L", (9, 9)), "PPM"), "no PNG, JPEG, WEBP, BMP, GIF or TIFF image"),
        (encoded(Image.effect_noise((90, 90), 50))[:2000], "damaged"),
    ],
)
def test_what_is_no_image(data, message):
    with pytest.raises(ImageError, match=message):
        read_grey(data)


def test_too_many_bytes():
    with pytest.raises(TooLargeError, match="at most 10,485,760"):
        read_grey(bytes(form.MAX_BYTES + 1))


@pytest.mark.parametrize("mode", ["1", "P"])
def test_a_large_scan_of_two_colours_is_averaged_as_a_grey_one_is(mode):
    scan = Image.new("L", (3000, 3000), 255)
    ImageDraw.Draw(scan).line((800, 400, 1900, 2500), fill=0, width=9)
    grey, coloured = (to_mnist(read_grey(encoded(image))) for image in (scan, scan.convert(mode)))
    assert np.abs(grey.astype(int) - coloured).max() <= 2
