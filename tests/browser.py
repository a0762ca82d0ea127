"""The page from outside: its server in a process of its own, its API, and Chromium with a hand that draws.

with serving("--output_dir", "results") as (address, _), chromium() as browser:
    page = browser.new_page()
    page.goto(address)
    draw(page, DIGITS[7])
"""

from __future__ import annotations

import http.client
import itertools
import json
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from common.files import PROJECT_DIR, UsageError

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

START_SECONDS = 60
CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome")
# no screen, no sandbox for root, and nothing that asks for the internet
CHROMIUM_FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
NO_BROWSER = (
    "needs Playwright and Chromium: pip install -r requirements-dev.txt, and the system's chromium (Debian: apt install"
    " chromium) or: playwright install chromium"
)


@contextmanager
def serving(*flags: object) -> Iterator[tuple[str, int]]:
    """A server in a process of its own, on a free port: its address and its process's number."""
    command = [sys.executable, "-m", "tools.web", "--port", "0", *map(str, flags)]
    with subprocess.Popen(command, cwd=PROJECT_DIR, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            address = process.stdout.readline().split(" ")[0].strip()
            wait_for(address)
            yield address, process.pid
        finally:
            process.terminate()


def wait_for(address: str) -> None:
    """Wait until the server answers.

    Raises:
        RuntimeError: it does not.
    """
    deadline = time.monotonic() + START_SECONDS
    while address and time.monotonic() < deadline:
        try:
            with connected(address) as connection:
                connection.request("GET", "/api/models")
                connection.getresponse().read()
                return
        except OSError:
            time.sleep(0.05)
    raise RuntimeError("the server did not start")


@contextmanager
def connected(address: str) -> Iterator[http.client.HTTPConnection]:
    """A connection that is kept open from one request to the next."""
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=60)
    try:
        yield connection
    finally:
        connection.close()


def ask(connection: http.client.HTTPConnection, body: bytes, content_type: str = "image/png") -> dict[str, Any]:
    """The answer to an image.

    Raises:
        RuntimeError: it was refused.
    """
    connection.request("POST", "/api/predict", body, {"Content-Type": content_type})
    response = connection.getresponse()
    answer = response.read()
    if response.status != 200:
        raise RuntimeError(f"status {response.status}: {answer.decode(errors='replace')}")
    found: dict[str, Any] = json.loads(answer)
    return found


@contextmanager
def chromium() -> Iterator[Browser]:
    """A headless Chromium, the system's or Playwright's own.

    Raises:
        UsageError: there is none; the message says how to add it.
    """
    try:
        from playwright.sync_api import Error, sync_playwright
    except ImportError:
        raise UsageError(NO_BROWSER) from None
    found = next(filter(None, map(shutil.which, CHROMIUM_NAMES)), None)
    with sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=found, args=list(CHROMIUM_FLAGS))
        except Error as error:
            raise UsageError(f"{NO_BROWSER} ({str(error).splitlines()[0]})") from None
        try:
            yield browser
        finally:
            browser.close()


def draw(page: Page, strokes: Sequence[Sequence[tuple[float, float]]], pause_ms: float = 0) -> None:
    """Draw with the mouse; points from 0 to 1 of the paper's width and height."""
    box = page.locator("#canvas").bounding_box()
    assert box is not None
    for stroke in strokes:
        for place, (x, y) in enumerate(stroke):
            page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"])
            if place == 0:
                page.mouse.down()
            if pause_ms:
                page.wait_for_timeout(pause_ms)
        page.mouse.up()


def line(*corners: tuple[float, float], points: int = 8) -> list[tuple[float, float]]:
    """A stroke from corner to corner."""
    return [
        (a[0] + (b[0] - a[0]) * step / points, a[1] + (b[1] - a[1]) * step / points)
        for a, b in itertools.pairwise(corners)
        for step in range(points + 1)
    ]


def ring(x: float, y: float, width: float, height: float, points: int = 40) -> list[tuple[float, float]]:
    """A closed stroke around a middle."""
    angles = [2 * math.pi * step / (points - 1) - math.pi / 2 for step in range(points)]
    return [(x + width / 2 * math.cos(angle), y + height / 2 * math.sin(angle)) for angle in angles]


DIGITS = {
    0: [ring(0.5, 0.5, 0.4, 0.6)],
    1: [line((0.5, 0.2), (0.5, 0.8))],
    4: [line((0.34, 0.2), (0.3, 0.52), (0.7, 0.52)), line((0.62, 0.22), (0.62, 0.82))],
    7: [line((0.3, 0.25), (0.7, 0.25), (0.46, 0.8))],
}
