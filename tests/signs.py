"""Pictures of no digit: letters and signs of twelve fonts that come with matplotlib, and doodles, as PNG bytes."""

import io
import math
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

FONTS = (
    *("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic"),
    *("DejaVuSansMono", "DejaVuSansMono-Bold", "STIXGeneral", "STIXGeneralBol", "cmr10", "cmss10"),
)
SIGNS = "AEFHMPTVWXY#&%?+@vyt"  # written down before anything was measured
SIDE = 280  # pixels
KINDS = ("zigzag", "spiral", "house", "triangle", "star", "heart", "cross")


def _png(image: Image.Image) -> bytes:
    contents = io.BytesIO()
    image.save(contents, "PNG")
    return contents.getvalue()


def letters() -> Iterator[bytes]:
    """240 pictures: each sign in each font, dark on white."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    for name in FONTS:
        font = ImageFont.truetype(str(folder / f"{name}.ttf"), 180)
        for sign in SIGNS:
            image = Image.new("L", (SIDE, SIDE), 255)
            ImageDraw.Draw(image).text((SIDE / 2, SIDE / 2), sign, font=font, anchor="mm", fill=0)
            yield _png(image)


def _lines(kind: str, rng: np.random.Generator) -> list[list[tuple[float, float]]]:
    """Strokes within -1..1."""
    if kind == "zigzag":
        corners = int(rng.integers(5, 9))
        return [[(-1 + 2 * i / corners, (-1) ** i * rng.uniform(0.4, 0.9)) for i in range(corners + 1)]]
    if kind == "spiral":
        turns = rng.uniform(2.5, 4) * 2 * math.pi
        return [[(t * math.cos(turns * t), t * math.sin(turns * t)) for t in np.linspace(0.05, 1, 120)]]
    if kind == "star":
        return [[(math.sin(4 * math.pi * i / 5), -math.cos(4 * math.pi * i / 5)) for i in range(6)]]
    if kind == "heart":
        angles = np.linspace(0, 2 * math.pi, 60)
        heights = [13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t) for t in angles]
        return [[(math.sin(t) ** 3, -height / 16) for t, height in zip(angles, heights, strict=True)]]
    if kind == "cross":
        return [[(-1, -1), (1, 1)], [(-1, 1), (1, -1)]]
    roof: list[tuple[float, float]] = [(-0.9, 0), (0, -1), (0.9, 0), (-0.9, 0)]
    return [roof, [(-0.8, 0), (-0.8, 1), (0.8, 1), (0.8, 0)]] if kind == "house" else [roof]


def doodles(each: int = 20, seed: int = 0) -> Iterator[bytes]:
    """``each`` pictures of every kind, turned, stretched and shaken, dark on white."""
    rng = np.random.default_rng(seed)
    for kind in KINDS:
        for _ in range(each):
            image, angle = Image.new("L", (SIDE, SIDE), 255), rng.uniform(-0.25, 0.25)
            turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
            size, width = rng.uniform(60, 100, 2), int(rng.integers(14, 24))
            for line in _lines(kind, rng):
                points = (np.array(line) * size + rng.normal(0, 2, (len(line), 2))) @ turn.T + SIDE / 2
                ImageDraw.Draw(image).line([tuple(point) for point in points], fill=0, width=width, joint="curve")
            yield _png(image)
