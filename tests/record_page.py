"""Record the page as it reads digits while they are drawn: a picture that moves, for the README.

    python -m tests.record_page docs/page_draw.gif

The page is the real one, served by its own command with the shipped networks. The file loops.
"""

import argparse
import io
import sys
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from tests.browser import DIGITS, chromium, line, ring, serving

WINDOW = {"width": 1000, "height": 820}  # CSS pixels
SHOWN_PART = {"x": 12, "y": 168, "width": 976, "height": 574}
FRAME_MS, HOLD_FRAMES = 90, 14  # a frame's time; so many show the answer
LIMIT = 1_000_000  # bytes
COLORS = 128  # for all frames alike: so what does not move costs nothing
THREE = [[*ring(0.48, 0.34, 0.36, 0.3)[32:], *ring(0.48, 0.34, 0.36, 0.3)[:20], *ring(0.48, 0.66, 0.42, 0.36)[1:30]]]
DRAWN = (DIGITS[7], DIGITS[4], THREE, [line((0.66, 0.2), (0.4, 0.5), (0.36, 0.66)), ring(0.52, 0.66, 0.3, 0.28)])


def frames() -> Iterator[Image.Image]:
    """The page after every second point of every stroke, then for a moment as it answered."""
    with serving() as (address, _), chromium() as browser:
        page = browser.new_page(viewport=WINDOW, color_scheme="light")
        page.goto(address)
        page.wait_for_selector(".network")

        def shot() -> Image.Image:
            page.wait_for_timeout(FRAME_MS)  # the answer and its bars follow within that
            return Image.open(io.BytesIO(page.screenshot(clip=SHOWN_PART))).convert("RGB")

        for strokes in DRAWN:
            for stroke in strokes:
                box = page.locator("#canvas").bounding_box()
                assert box is not None
                for place, (x, y) in enumerate(stroke):
                    page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"])
                    if place == 0:
                        page.mouse.down()
                    if place % 2:
                        yield shot()
                page.mouse.up()
            for _ in range(HOLD_FRAMES):
                yield shot()
            page.click("#clear")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("path", type=Path)
    path = parser.parse_args().path
    found = list(frames())
    some = found[:: max(1, len(found) // 8)]
    together = Image.new("RGB", (found[0].width, found[0].height * len(some)))
    for place, frame in enumerate(some):
        together.paste(frame, (0, place * frame.height))
    palette = together.quantize(COLORS, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    first, *rest = (frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in found)
    first.save(path, save_all=True, append_images=rest, duration=FRAME_MS, loop=0, optimize=True)
    size = path.stat().st_size
    print(f"{path}: {1 + len(rest)} frames, {size:,} bytes; at most {LIMIT:,}")
    return int(size > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
