"""Digits as people photograph them, drawn by a seed: one a picture in any of ``CONDITIONS``, or a page of lines.

    data = photograph("lamp", digit, np.random.default_rng(7))     # digit uint8 [28, 28] -> a file's bytes
    data = page([[d, d, d, d], [d, d, d, d]], np.random.default_rng(7))

What is drawn from the ranges below: the picture's size and proportions, how large the digit is, where it stands and how
far it is turned, the colours of pen and paper, light, blur, grain and JPEG's quality.
"""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

Array = NDArray[Any]
PAPERS = ((250, 250, 248), (240, 238, 230), (225, 222, 215), (236, 229, 205))
PENS = ((20, 20, 25), (25, 35, 110), (45, 45, 50), (60, 20, 25))
TABLES = ((70, 45, 30), (110, 78, 52), (45, 48, 55), (85, 90, 95), (30, 60, 45))


@dataclass
class Scene:
    """What a condition makes: the picture float [H, W, 3], where the digits' ink lies [H, W], and how it is taken."""

    rng: np.random.Generator
    ink: Array
    paper: Array  # [3]
    pen: Array  # [3]
    blur: float = 0.7
    grain: float = 2.0
    quality: int = 88

    def between(self, low: float, high: float) -> float:
        return float(self.rng.uniform(low, high))

    def painted(self) -> Array:
        cover = self.ink[..., None]
        return np.asarray(self.paper * (1 - cover) + self.pen * cover)


def stroke(digit: Array, height: int, turn: float) -> Array:
    """The coverage [H, W], 0 to 1, of a digit as a pen would draw it, its ink ``height`` pixels high."""
    rows, columns = (np.flatnonzero((digit > 40).any(axis=axis)) for axis in (1, 0))
    cut = digit[max(rows[0] - 1, 0) : rows[-1] + 2, max(columns[0] - 1, 0) : columns[-1] + 2]
    factor = height / (rows[-1] - rows[0] + 1)
    large = cv2.resize(cut.astype(np.float32), None, fx=factor, fy=factor, interpolation=cv2.INTER_CUBIC)
    large = np.pad(np.clip((large - 60) / 120, 0, 1), height // 3)
    h, w = large.shape
    return np.asarray(cv2.warpAffine(large, cv2.getRotationMatrix2D((w / 2, h / 2), turn, 1), (w, h)))


def put(ink: Array, drawn: Array, x: float, y: float) -> None:
    """Draw onto ``ink`` with the middle of the digit's box at pixel (x, y), kept inside."""
    rows, columns = (np.flatnonzero((drawn > 0.05).any(axis=axis)) for axis in (1, 0))
    cut = drawn[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    room = min(1.0, *(0.95 * have / need for have, need in zip(ink.shape, cut.shape, strict=True)))
    if room < 1:  # a wide digit on a narrow sheet
        cut = cv2.resize(cut, None, fx=room, fy=room, interpolation=cv2.INTER_AREA)
    top = min(max(round(y - cut.shape[0] / 2), 0), ink.shape[0] - cut.shape[0])
    left = min(max(round(x - cut.shape[1] / 2), 0), ink.shape[1] - cut.shape[1])
    part = ink[top : top + cut.shape[0], left : left + cut.shape[1]]
    np.maximum(part, cut, out=part)


def scene(digit: Array, rng: np.random.Generator, smallest: float = 0.3, largest: float = 0.7) -> Scene:
    height, width = (int(rng.integers(420, 900)) for _ in range(2))
    side = min(height, width)
    size = rng.uniform(smallest, largest) * side
    ink = np.zeros((height, width), dtype=np.float32)
    room = 0.62 * size
    x, y = (rng.uniform(min(room, length / 2), max(length - room, length / 2)) for length in (width, height))
    put(ink, stroke(digit, round(size), rng.uniform(-8, 8)), x, y)
    paper, pen = (np.array(colours[rng.integers(len(colours))], np.float32) for colours in (PAPERS, PENS))
    return Scene(rng, ink, paper, pen, rng.uniform(0.4, 1.2), rng.uniform(1, 4), int(rng.integers(70, 95)))


def field(shape: tuple[int, ...], x: float, y: float) -> tuple[Array, Array]:
    """Across and down from the point (x, y), both from 0 to 1 of the picture's longer side."""
    down, across = np.mgrid[: shape[0], : shape[1]].astype(np.float32)
    longer = max(shape[:2])
    return across / longer - x * shape[1] / longer, down / longer - y * shape[0] / longer


def lamp(s: Scene, low: float = 0.10, high: float = 0.35) -> Array:
    """Light from a lamp somewhere over the picture: that much darker at the farthest corner."""
    across, down = field(s.ink.shape, s.between(0.2, 0.8), s.between(0.2, 0.8))
    far = across**2 + down**2
    return np.asarray((1 - s.between(low, high) * far / far.max())[..., None])


def shadow(s: Scene) -> Array:
    """A shadow's edge across the picture, through the digit or beside it, more or less sharp."""
    across, down = field(s.ink.shape, s.between(0.25, 0.75), s.between(0.25, 0.75))
    angle = s.between(0, 2 * np.pi)
    distance = across * np.cos(angle) + down * np.sin(angle)
    soft = s.between(0.002, 0.03)
    return np.asarray((1 - s.between(0.25, 0.55) / (1 + np.exp(-np.clip(distance / soft, -50, 50))))[..., None])


def lines(s: Scene, squared: bool) -> Array:
    """The coverage of printed lines, a little turned."""
    across, down = field(s.ink.shape, 0.5, 0.5)
    longer, turn = max(s.ink.shape), np.deg2rad(s.between(-4, 4))
    step, thick = s.between(22, 48) if squared else s.between(36, 80), s.between(1.0, 2.2)
    found = np.zeros_like(s.ink)
    for c, d in ((-np.sin(turn), np.cos(turn)), (np.cos(turn), np.sin(turn)))[: 1 + squared]:
        place = (longer * (across * c + down * d)) % step
        found = np.maximum(found, np.clip(thick / 2 + 0.5 - np.minimum(place, step - place), 0, 1))
    return found


def on_lines(s: Scene, squared: bool) -> Array:
    colour = np.array(((120, 150, 200), (150, 150, 155), (170, 120, 130), (170, 190, 210))[s.rng.integers(4)])
    cover = (s.between(0.5, 1.0) * lines(s, squared))[..., None]
    s.paper = s.paper * (1 - cover) + colour * cover
    return s.painted() * lamp(s, 0, 0.2)


def table(s: Scene) -> Array:
    """A sheet that lies on a table with a grain of its own, seen a little from the side."""
    h, w = s.ink.shape
    margin = [s.between(0.06, 0.2) for _ in range(4)]
    wide, high = w * (1 + margin[0] + margin[1]), h * (1 + margin[2] + margin[3])
    corners = np.array([[0, 0], [w, 0], [w, h], [0, h]], np.float32)
    there = corners + np.array([w * margin[0], h * margin[2]]) + s.rng.uniform(-0.02, 0.02, (4, 2)) * [w, h]
    middle, angle = there.mean(0), np.deg2rad(s.between(-5, 5))
    turned = (there - middle) @ np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]) + middle
    matrix = cv2.getPerspectiveTransform(corners, turned.astype(np.float32))
    size = (round(wide), round(high))
    wood = cv2.GaussianBlur(s.rng.normal(0, 1, (size[1], size[0])).astype(np.float32), (0, 0), 40, sigmaY=1.5)
    wood = 1 + s.between(0.02, 0.10) * wood / wood.std()
    ground = np.array(TABLES[s.rng.integers(len(TABLES))], np.float32) * wood[..., None]
    sheet = cv2.warpPerspective(s.painted().astype(np.float32), matrix, size, borderMode=cv2.BORDER_REPLICATE)
    there = cv2.warpPerspective(np.ones((h, w), np.float32), matrix, size)[..., None]
    s.ink = cv2.warpPerspective(s.ink, matrix, size)
    return np.asarray(ground * (1 - there) + sheet * there) * lamp(s, 0, 0.2)


def framed(s: Scene) -> Array:
    """A rectangle drawn around the digit, at the picture's edge or further in, the digit apart from it."""
    rows, columns = (np.flatnonzero((s.ink > 0.05).any(axis=axis)) for axis in (1, 0))
    h, w = s.ink.shape
    inner = (columns[0], rows[0], w - 1 - columns[-1], h - 1 - rows[-1])
    left, top, right, bottom = (int(s.between(0, 0.7) * room) for room in inner)
    corners = ((left, top), (w - 1 - right, h - 1 - bottom))
    cv2.rectangle(s.ink, *corners, 1.0, int(s.rng.integers(2, 9)))
    return s.painted()


def perspective(s: Scene) -> Array:
    h, w = s.ink.shape
    corners = np.array([[0, 0], [w, 0], [w, h], [0, h]], np.float32)
    moved = (corners + s.rng.uniform(-0.1, 0.1, (4, 2)) * [w, h]).astype(np.float32)
    s.ink = cv2.warpPerspective(s.ink, cv2.getPerspectiveTransform(corners, moved), (w, h))
    return s.painted() * lamp(s, 0, 0.25)


def equal_lightness(s: Scene) -> Array:
    """Pen and paper of other colours that a grey picture would show alike."""
    hues = s.rng.permutation(6)[:2]
    weights = np.array([0.299, 0.587, 0.114])
    colours = np.array([(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1), (1, 0, 1)], np.float64)[hues]
    level = s.between(70, 110)
    colours = colours * 0.75 + 0.25 * colours.mean(1, keepdims=True)
    s.paper, s.pen = (np.clip(level * c / (c @ weights), 0, 255) for c in colours)
    return s.painted()


def coloured(s: Scene) -> Array:
    """A felt pen on coloured paper or white paper: any two colours that are told apart by eye."""
    while True:
        paper, pen = s.rng.uniform(90, 255, 3), s.rng.uniform(0, 200, 3)
        if np.linalg.norm(paper - pen) > 110:
            break
    s.paper, s.pen = paper, pen
    return s.painted() * lamp(s, 0, 0.2)


def pencil(s: Scene) -> Array:
    """Faint graphite that takes to the paper's tooth."""
    tooth = cv2.GaussianBlur(s.rng.normal(0, 1, s.ink.shape).astype(np.float32), (0, 0), s.between(0.8, 1.6))
    s.ink = s.ink * np.clip(s.between(0.75, 0.95) + 0.25 * tooth / tooth.std(), 0, 1)
    s.pen = s.paper * s.between(0.68, 0.85)
    return s.painted() * lamp(s, 0, 0.2)


def chalk(s: Scene) -> Array:
    """Chalk on a board, with wiped traces of what stood there."""
    tooth = cv2.GaussianBlur(s.rng.normal(0, 1, s.ink.shape).astype(np.float32), (0, 0), s.between(0.8, 1.6))
    s.ink = s.ink * np.clip(s.between(0.7, 0.95) + 0.3 * tooth / tooth.std(), 0, 1)
    s.paper = np.array(((40, 65, 50), (45, 48, 50), (25, 30, 32))[s.rng.integers(3)], np.float32)
    s.pen = np.array((225, 225, 215), np.float32)
    wiped = cv2.GaussianBlur(s.rng.normal(0, 1, s.ink.shape).astype(np.float32), (0, 0), 30)
    return (s.painted() + s.between(2, 8) * (wiped / wiped.std())[..., None]) * lamp(s, 0, 0.25)


def low_light(s: Scene) -> Array:
    s.grain, s.quality = s.between(5, 9), 85
    return s.painted() * s.between(0.25, 0.45) * lamp(s, 0, 0.3)


def blurred(s: Scene) -> Array:
    s.blur = s.between(2, 0.012 * min(s.ink.shape) + 2)
    return s.painted()


def compressed(s: Scene) -> Array:
    s.quality = int(s.rng.integers(8, 25))
    return s.painted() * lamp(s, 0, 0.15)


def window(s: Scene) -> Array:
    """A white page with a transparent margin around it, its corners perhaps round."""
    s.grain = s.blur = s.quality = 0
    s.paper = np.full(3, 255.0)
    page, margin = s.painted(), int(s.between(5, 90))
    h, w = page.shape[:2]
    alpha, radius = np.zeros((h, w), np.uint8), int(s.between(0, 60)) if s.rng.random() < 0.5 else 0
    cv2.rectangle(alpha, (radius, radius), (w - 1 - radius, h - 1 - radius), 255, max(2 * radius, 1))
    cv2.rectangle(alpha, (radius, radius), (w - 1 - radius, h - 1 - radius), 255, -1)
    return np.pad(np.dstack([page, alpha]), ((margin, margin), (margin, margin), (0, 0)))


CONDITIONS: dict[str, Callable[[Scene], Array]] = {
    "plain paper": lambda s: s.painted() * lamp(s, 0, 0.1),
    "a lamp": lambda s: s.painted() * lamp(s),
    "a shadow's edge": lambda s: s.painted() * shadow(s),
    "ruled paper": lambda s: on_lines(s, False),
    "squared paper": lambda s: on_lines(s, True),
    "on a table": table,
    "a frame": framed,
    "a transparent margin": window,
    "equal lightness": equal_lightness,
    "coloured": coloured,
    "pencil": pencil,
    "chalk": chalk,
    "from the side": perspective,
    "low light": low_light,
    "out of focus": blurred,
    "strong JPEG": compressed,
}
SCENES = {"a frame": (0.25, 0.5), "from the side": (0.3, 0.55)}  # how large the digit is there


def photograph(condition: str, digit: Array, rng: np.random.Generator) -> bytes:
    """A picture of ``digit`` uint8 [28, 28] in ``condition``: JPEG, or PNG where something is transparent."""
    s = scene(digit, rng, *SCENES.get(condition, (0.3, 0.7)))
    return taken(s, CONDITIONS[condition](s))


def taken(s: Scene, picture: Array) -> bytes:
    """The bytes of the picture as a camera gives it: blurred, with grain, as a JPEG of the scene's quality."""
    if s.blur:
        picture = cv2.GaussianBlur(picture.astype(np.float32), (0, 0), s.blur)
    if s.grain:
        picture = picture + s.rng.normal(0, s.grain, picture.shape)
    image, buffer = Image.fromarray(np.clip(np.rint(picture), 0, 255).astype(np.uint8)), io.BytesIO()
    if s.quality:
        image.save(buffer, "JPEG", quality=s.quality)
    else:
        image.save(buffer, "PNG")
    return buffer.getvalue()


def page(rows: Sequence[Sequence[Array]], rng: np.random.Generator) -> bytes:
    """A photo of a page with a line of digits for each of ``rows``, by one pen, in uneven light, on any paper."""
    size = rng.uniform(70, 130)
    pitch, gap = size * rng.uniform(1.4, 2.0), size * rng.uniform(0.25, 0.6)
    drawn = [[stroke(d, round(size * rng.uniform(0.85, 1.1)), rng.uniform(-6, 6)) for d in digits] for digits in rows]
    wide = [[int((one > 0.05).any(axis=0).sum()) for one in line] for line in drawn]
    h = round(pitch * (len(rows) + 0.6))
    ink = np.zeros((h, round(max(map(sum, wide)) + gap * (max(map(len, rows)) + 3))), np.float32)
    for line, digits in enumerate(drawn):
        x, slope = gap * rng.uniform(1.2, 2.2), rng.uniform(-0.03, 0.03)
        for one, width in zip(digits, wide[line], strict=True):
            put(ink, one, x + width / 2, (line + 0.8) * pitch + slope * x + rng.uniform(-0.06, 0.06) * size)
            x += width + gap * rng.uniform(0.8, 1.2)
    paper, pen = (np.array(colours[rng.integers(len(colours))], np.float32) for colours in (PAPERS, PENS))
    s = Scene(rng, ink, paper, pen, rng.uniform(0.4, 1.0), rng.uniform(1, 4), int(rng.integers(70, 95)))
    kind = rng.integers(5)
    if kind == 0:
        return taken(s, on_lines(s, bool(rng.integers(2))))
    if kind == 1:
        return taken(s, table(s))
    return taken(s, s.painted() * (shadow(s) if kind == 2 else lamp(s)))
