"""A drawing or a photo of a digit into MNIST's form.

    image = to_mnist(read_grey("seven.png"))     # uint8 [28, 28], white on black
    image = to_mnist(canvas)                     # any grey levels [H, W], dark on light or light on dark
    page = read_page("numbers.jpg")              # every digit of a picture, with its box

As MNIST was made (LeCun et al. 1998, "Gradient-based learning applied to document recognition", section III-A): the
digit's bounding box is scaled to fit 20x20 pixels with its proportions kept and its edges antialiased, and stands in
28x28 pixels with its centre of mass in the middle, moved by whole pixels.
"""

import io
import itertools
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from image_data.errors import MIN_CONTRAST, ImageError, TooLargeError

if TYPE_CHECKING:
    from image_data.groups import Digit

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")  # and HEIC, where pillow-heif is installed
HEIF_BRANDS = (b"heic", b"heix", b"mif1", b"msf1")  # what such a file begins with, but for its length and ``ftyp``
MAX_BYTES = 10 << 20  # of a file
MAX_PIXELS = 25_000_000  # of an image; what a phone takes has 12 million
WORKING_SIDE = 1120  # pixels; a larger image is averaged down to this first
DIGIT_SIDE, MNIST_SIDE = 20, 28
Grey = NDArray[np.float32]
MnistImage = NDArray[np.uint8]
Box = tuple[int, int, int, int]  # left, top, width, height


@dataclass(frozen=True)
class Page:
    """The digits on a picture in reading order: lines from top to bottom, each from left to right."""

    width: int  # pixels of the picture as it is shown
    height: int
    images: list[MnistImage]  # of each digit, in MNIST's form
    boxes: list[Box]  # where it lies, in the picture's pixels
    lines: list[int]  # which line it stands in, from 0 on
    largest: int = 0  # which of them is the largest

    @classmethod
    def of(cls, image: MnistImage) -> "Page":
        """Of an image that is in its form already, whole."""
        return cls(MNIST_SIDE, MNIST_SIDE, [image], [(0, 0, MNIST_SIDE, MNIST_SIDE)], [0])

    def text(self, signs: Sequence[str]) -> str:
        """What is read, of the digits' ``signs``: a line for each line."""
        found = itertools.groupby(zip(self.lines, signs, strict=True), lambda pair: pair[0])
        return "\n".join("".join(sign for _, sign in line) for _, line in found)


def read_page(source: bytes | str | os.PathLike[str]) -> Page:
    """The digits of an image file. Raises as ``read_grey``, and EmptyImageError if nothing is drawn on it."""
    grey, (width, height) = _read(source, True)
    digits = _digits_of(grey)
    across, down = width / grey.shape[1], height / grey.shape[0]

    def scaled_up(box: Box) -> Box:
        left, top = round(box[0] * across), round(box[1] * down)
        return left, top, round((box[0] + box[2]) * across) - left, round((box[1] + box[3]) * down) - top

    boxes, lines = [scaled_up(digit.box) for digit in digits], [digit.line for digit in digits]
    largest = int(np.argmax([digit.ink.sum() for digit in digits]))
    return Page(width, height, [centred(scaled(digit.ink)) for digit in digits], boxes, lines, largest)


def read_grey(source: bytes | str | os.PathLike[str], mixed: bool = True) -> Grey:
    """The grey levels 0-255, float32 [H, W], of an image file of ``FORMATS``, no side longer than ``WORKING_SIDE``.

    Size and format are looked at before anything is unpacked, so that a small file cannot fill the memory. What is
    transparent becomes paper: white under dark ink, black under light ink. Colours are ``mixed`` as strokes stand out
    most, where their lightness hides them; False: their lightness.

    A TooLargeError: it has more than ``MAX_BYTES`` or ``MAX_PIXELS``. An ImageError: it is damaged, or of another
    format. An OSError: the file cannot be read.
    """
    return _read(source, mixed)[0]


def _read(source: bytes | str | os.PathLike[str], mixed: bool) -> tuple[Grey, tuple[int, int]]:
    """The grey levels, and width and height of the picture as it is shown."""
    if not isinstance(source, bytes):
        with open(source, "rb") as file:
            source = file.read(MAX_BYTES + 1)
    if len(source) > MAX_BYTES:
        raise TooLargeError(f"the image has {len(source):,} bytes; at most {MAX_BYTES:,} are allowed")
    formats = _heif() if source[4:8] == b"ftyp" and source[8:12] in HEIF_BRANDS else FORMATS
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own, of sizes that are looked at below
            image: Image.Image = Image.open(io.BytesIO(source), formats=formats)
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise TooLargeError(f"the image has {width} x {height} pixels; at most {MAX_PIXELS:,} in all")
        image.draft(None, (WORKING_SIDE, WORKING_SIDE))  # lets a JPEG be unpacked at a fraction of its size
        ImageOps.exif_transpose(image, in_place=True)
        shown = (height, width) if (image.width > image.height) != (width > height) else (width, height)
        return _grey(image, mixed), shown
    except Image.DecompressionBombError:
        raise TooLargeError(f"the image has too many pixels; at most {MAX_PIXELS:,} are allowed") from None
    except UnidentifiedImageError:
        raise ImageError(f"this is no {', '.join(FORMATS[:-1])} or {FORMATS[-1]} image") from None
    except ImageError:
        raise
    except Exception as error:  # what a damaged file makes the decoders raise may be anything
        raise ImageError(f"the image is damaged: {str(error) or type(error).__name__}") from None


def _heif() -> tuple[str, ...]:
    """The format of what phones take, which a package of its own lets Pillow read."""
    try:
        import pillow_heif
    except ImportError:
        raise ImageError("this is a HEIC image; pip install pillow-heif lets it be read") from None
    pillow_heif.register_heif_opener()
    return ("HEIF",)


def _grey(image: Image.Image, mixed: bool) -> Grey:
    if image.mode == "P":  # of two colours or a palette, Pillow would take single pixels when it makes it smaller
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    elif image.mode == "1":
        image = image.convert("L")
    image.thumbnail((WORKING_SIDE, WORKING_SIDE), Image.Resampling.BOX)
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        levels = np.asarray(image, dtype=np.float32)
        return levels * (255 / max(float(levels.max()), 1.0))
    if image.has_transparency_data:
        return _on_paper(np.asarray(image.convert("LA"), dtype=np.float32))
    if mixed and image.mode in ("RGB", "CMYK", "YCbCr"):
        from image_data import photo

        return photo.most_contrast(np.asarray(image.convert("RGB")))
    return np.asarray(image.convert("L"), dtype=np.float32)


def _on_paper(grey_alpha: Grey) -> Grey:
    """The grey levels [H, W] of a picture [H, W, 2] that is transparent in parts: those become paper.

    Paper is the commonest level of a page with something on it, and otherwise what the ink stands out from.
    """
    grey, alpha = grey_alpha[..., 0], grey_alpha[..., 1] / 255
    solid = alpha > 0.99
    levels = np.bincount(grey[solid].astype(np.uint8), minlength=256)
    paper = float(levels.argmax())
    off = np.abs(np.arange(256) - paper) > MIN_CONTRAST
    rows, columns = (np.flatnonzero(solid.any(axis=axis)) for axis in (1, 0))
    box = (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1) if len(rows) else 1
    if not (0.001 < levels[off].sum() / max(levels.sum(), 1) < 0.5 and solid.sum() > 0.8 * box):
        paper = 0.0 if float((grey * alpha).sum()) > 127 * float(alpha.sum()) else 255.0
    return np.asarray(grey * alpha + np.float32(paper) * (1 - alpha), dtype=np.float32)


def to_mnist(grey: NDArray[Any]) -> MnistImage:
    """The largest digit among grey levels 0-255 [H, W] in MNIST's form: uint8 [28, 28], white on black.

    Dark on light or light on dark: what lies along the edge is the paper. An EmptyImageError if nothing is drawn on it.
    """
    return centred(scaled(max((digit.ink for digit in _digits_of(grey)), key=np.sum)))


def _digits_of(grey: NDArray[Any]) -> "list[Digit]":
    from image_data import groups, photo  # they load OpenCV, which reading files does without

    return groups.digits_in(photo.ink_of(np.asarray(grey, dtype=np.float32)))


def scaled(box: Grey) -> Grey:
    """The cut-out digit with its longer side 20 pixels long, [<= 20, <= 20].

    A pixel is the mean of what it covers. On 2,000 training images, drawn large, bilinear, bicubic, Hamming and Lanczos
    filters made no difference that could be told from chance (99.3 to 99.5 % right either way).
    """
    height, width = box.shape
    factor = DIGIT_SIDE / max(height, width)
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    method = Image.Resampling.BOX if factor <= 1 else Image.Resampling.BICUBIC
    small: Grey = np.clip(np.asarray(Image.fromarray(box).resize(size, method)), 0, 1)
    return small


def centred(digit: Grey) -> MnistImage:
    """The digit in 28x28 pixels, its centre of mass as near the middle as whole pixels and the frame allow."""
    total = float(digit.sum())
    corner = []
    for axis, side in enumerate(digit.shape):
        centre = float((digit.sum(axis=1 - axis) * (np.arange(side) + 0.5)).sum()) / total
        corner.append(min(max(round(MNIST_SIDE / 2 - centre), 0), MNIST_SIDE - side))
    image = np.zeros((MNIST_SIDE, MNIST_SIDE), dtype=np.uint8)
    levels = np.rint(255 * digit / float(digit.max())).astype(np.uint8)
    image[corner[0] : corner[0] + digit.shape[0], corner[1] : corner[1] + digit.shape[1]] = levels
    return image
