"""What the page is held to, measured: on digits that are drawn or photographed, by the clock, under a crowd, watched;
and what several processes gain.

    python -m tests.measure drawings         # 1,000 test digits in eight variations through the API
    python -m tests.measure photos           # test digits as people photograph them, in sixteen conditions
    python -m tests.measure pages            # photographed pages of three lines of four digits
    python -m tests.measure signs            # letters and doodles told from test digits, by calibrated network
    python -m tests.measure strokes          # from stroke to answer, in Chromium
    python -m tests.measure clients          # 50 clients at once for 30 s
    python -m tests.measure watched          # a training with and without a page that watches it
    python -m tests.measure processes        # an epoch by one process and by two, into outputs/benchmark_processes.json

The last four time things: let nothing else run meanwhile. ``strokes`` and ``watched`` need Playwright and Chromium.
"""

import argparse
import asyncio
import contextlib
import difflib
import io
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from common.cli import OneLineParser, check_at_least, run_command
from common.files import PROJECT_DIR
from tests.browser import DIGITS, ask, chromium, connected, draw, serving
from tools.output import write_json
from tools.trainings import run_quietly
from visualization import load_metrics_json

CANVAS = 280  # pixels; the page's drawing, and ten times MNIST's 28
STROKE = 9  # pixels: what a thicker or thinner stroke gains or loses, 0.9 of MNIST's
SEED = 0
Canvas = NDArray[np.uint8]


def drawn(digit: Canvas, scale: float = 1.0) -> Canvas:
    """A digit [28, 28] ten times as large (and ``scale`` times that), cut out at its ink."""
    side = round(CANVAS * scale)
    large = np.asarray(Image.fromarray(digit).resize((side, side), Image.Resampling.BICUBIC))
    rows, columns = (np.flatnonzero((large > 25).any(axis=axis)) for axis in (1, 0))
    return large[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def placed(ink: Canvas, x: float = 0.5, y: float = 0.5) -> Canvas:
    """``ink`` on an empty canvas: 0 at the left (top), 0.5 in the middle, 1 at the right (bottom), always inside."""
    canvas = np.zeros((CANVAS, CANVAS), dtype=np.uint8)
    top, left = round(y * (CANVAS - ink.shape[0])), round(x * (CANVAS - ink.shape[1]))
    canvas[top : top + ink.shape[0], left : left + ink.shape[1]] = ink
    return canvas


def shifted(digit: Canvas) -> Canvas:
    """In one of the four corners; which one, the digit's own grey levels say."""
    number = int(digit.sum())
    return placed(drawn(digit), number % 2, number // 2 % 2)


VARIATIONS: dict[str, Callable[[Canvas], Canvas]] = {
    "as it is": lambda digit: placed(drawn(digit)),
    "shifted into a corner": shifted,
    "scaled by 0.5": lambda digit: placed(drawn(digit, 0.5)),
    "scaled by 0.8": lambda digit: placed(drawn(digit, 0.8)),
    "scaled by 1.3": lambda digit: placed(drawn(digit, 1.3)),
    "thicker": lambda digit: np.asarray(Image.fromarray(placed(drawn(digit))).filter(ImageFilter.MaxFilter(STROKE))),
    "thinner": lambda digit: np.asarray(Image.fromarray(placed(drawn(digit))).filter(ImageFilter.MinFilter(STROKE))),
    "inverted": lambda digit: 255 - placed(drawn(digit)),
}


def png(canvas: Canvas) -> bytes:
    """``canvas`` as a PNG image."""
    buffer = io.BytesIO()
    Image.fromarray(canvas).save(buffer, "PNG")
    return buffer.getvalue()


def test_digits(count: int, data_dir: str | None = None) -> tuple[Canvas, list[int]]:  # noqa: PT028  # no test
    """``count`` test digits, always the same, and what they are."""
    from data_utils import load_images
    from imports import torch

    images, labels = load_images(PROJECT_DIR / "data" if data_dir is None else data_dir, train=False)
    chosen = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SEED))[:count]
    return images[chosen].numpy(), labels[chosen].tolist()


def accuracy_of_drawings(address: str, count: int, data_dir: str | None = None) -> dict[str, dict[str, float]]:
    """Percent right of ``count`` test digits, drawn: variation -> network -> accuracy."""
    digits, truth = test_digits(count, data_dir)

    def of_variation(vary: Callable[[Canvas], Canvas]) -> dict[str, float]:
        right: dict[str, int] = {}
        with connected(address) as connection:
            for digit, label in zip(digits, truth, strict=True):
                for name, answer in ask(connection, png(vary(digit)))["predictions"].items():
                    right[name] = right.get(name, 0) + (answer["digit"] == label)
        return {name: 100 * number / len(truth) for name, number in right.items()}

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(VARIATIONS, pool.map(of_variation, VARIATIONS.values()), strict=True))


def mean_over_variations(found: dict[str, dict[str, float]]) -> dict[str, float]:
    """The mean of each network over all variations."""
    return {name: statistics.mean(row[name] for row in found.values()) for name in next(iter(found.values()))}


def drawings(args: argparse.Namespace) -> int:
    """The subcommand: a table, a variation a row."""
    with serving() as (address, _):
        found = accuracy_of_drawings(address, args.count)
    print(f"{args.count:,} test digits drawn on {CANVAS} x {CANVAS} pixels, right answers [%]")
    print_table(found)
    return 0


def accuracy_of_photos(count: int, data_dir: str | None = None) -> dict[str, dict[str, float]]:
    """Percent right of ``count`` test digits, photographed: condition -> network -> accuracy."""
    from image_data.errors import EmptyImageError
    from image_data.form import read_grey, to_mnist
    from tests.photographs import CONDITIONS, photograph
    from tools.networks import Networks, probabilities

    digits, truth = test_digits(count, data_dir)
    networks = Networks().all()
    found = {}
    for number, condition in enumerate(CONDITIONS):
        forms = {}
        for place, digit in enumerate(digits):
            with contextlib.suppress(EmptyImageError):
                picture = photograph(condition, digit, np.random.default_rng([SEED, number, place]))
                forms[place] = to_mnist(read_grey(picture))
        found[condition] = {}
        for network in networks:
            rows = probabilities(network, list(forms.values()))
            right = sum(int(np.argmax(row)) == truth[place] for place, row in zip(forms, rows, strict=True))
            found[condition][network.name] = 100 * right / count
    return found


def photos(args: argparse.Namespace) -> int:
    """The subcommand: a table, a condition a row."""
    found = accuracy_of_photos(args.count)
    print(f"{args.count:,} test digits photographed, right answers [%]")
    print_table(found)
    return 0


def accuracy_of_pages(count: int, data_dir: str | None = None) -> dict[str, dict[str, float]]:
    """Percent of digits right and in order, and of pages without a fault, of ``count`` photographed pages.

    A page has three lines of four test digits.
    """
    from image_data.errors import EmptyImageError
    from image_data.form import read_page
    from tests.photographs import page
    from tools.networks import Networks, probabilities

    digits, truth = test_digits(12 * count, data_dir)
    networks = Networks().all()
    found = {kind: dict.fromkeys((network.name for network in networks), 0.0) for kind in ("digits", "whole pages")}
    for number in range(count):
        places = [range(12 * number + first, 12 * number + first + 4) for first in (0, 4, 8)]
        expected = "\n".join("".join(str(truth[place]) for place in line) for line in places)
        picture = page([[digits[place] for place in line] for line in places], np.random.default_rng([SEED, number]))
        for network in networks:
            text = ""
            with contextlib.suppress(EmptyImageError):
                seen = read_page(picture)
                text = seen.text([str(np.argmax(row)) for row in probabilities(network, seen.images)])
            same = difflib.SequenceMatcher(None, expected, text, autojunk=False).get_matching_blocks()
            right = sum(len(expected[at : at + size].replace("\n", "")) for at, _, size in same)
            found["digits"][network.name] += 100 * right / 12 / count
            found["whole pages"][network.name] += 100 * (text == expected) / count
    return found


def pages(args: argparse.Namespace) -> int:
    """The subcommand: digits and whole pages read, by network."""
    print(f"{args.count:,} photographed pages of 3 lines of 4 test digits, right and in order [%]")
    print_table(accuracy_of_pages(args.count), mean=False)
    return 0


def signs(_: argparse.Namespace) -> int:
    """The subcommand: how letters and doodles are told from the test digits, by calibrated network."""
    from image_data.form import read_grey, to_mnist
    from imports import torch
    from tests.signs import doodles, letters
    from tools.evaluate.measures import as_input
    from tools.networks import Networks
    from tools.sureness import scores

    device = torch.device("cpu")
    digits = as_input(torch.from_numpy(test_digits(10_000)[0]), device)
    strange = {
        kind: as_input(torch.from_numpy(np.stack([to_mnist(read_grey(picture)) for picture in pictures])), device)
        for kind, pictures in (("letters", letters()), ("doodles", doodles()))
    }
    print(
        f"{'':<22}{'digits unsure':>16}" + "".join(f"{kind + what:>16}" for kind in strange for what in ("", " AUROC"))
    )
    for network in Networks().all():
        if network.sureness is None:
            continue
        told = scores(network.model, network.sureness, digits)
        row = [100 * (told > network.sureness.threshold).float().mean().item()]
        for pictures in strange.values():
            of_signs = scores(network.model, network.sureness, pictures)
            row.append(100 * (of_signs > network.sureness.threshold).float().mean().item())
            row.append((of_signs[:, None] > told).float().mean().item())
        print(f"{network.name:<22}" + "".join(f"{value:>16.4g}" for value in row))
    return 0


def print_table(found: dict[str, dict[str, float]], mean: bool = True) -> None:
    means = mean_over_variations(found)
    print(f"{'':<22}" + "".join(f"{name:>16}" for name in means))
    for variation, row in {**found, **({"all": means} if mean else {})}.items():
        print(f"{variation:<22}" + "".join(f"{accuracy:>16.2f}" for accuracy in row.values()))


def strokes(args: argparse.Namespace) -> int:
    """The subcommand: the time from a change of the drawing to its answer on the page."""
    times: list[float] = []
    with serving() as (address, _), chromium() as browser:
        page = browser.new_page()
        page.goto(address)
        for _ in range(args.rounds):
            for digit in DIGITS.values():
                draw(page, digit, pause_ms=16)  # as often as a mouse tells where it is
                page.wait_for_timeout(200)
                page.click("#clear")
        entries = "performance.getEntriesByName('stroke to answer').map((entry) => entry.duration)"
        times = sorted(page.evaluate(entries))
    print(
        f"{len(times)} answers while drawing: median {statistics.median(times):.1f} ms,"
        f" 95th percentile {times[int(0.95 * len(times))]:.1f} ms from stroke to answer"
    )
    return 0


def request_of(body: bytes) -> bytes:
    """What a client sends to ask for a PNG's digit. By hand: a client's own work takes from the server's two cores."""
    head = f"POST /api/predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\nContent-Length: {len(body)}"
    return f"{head}\r\n\r\n".encode() + body


def clients(args: argparse.Namespace) -> int:
    """The subcommand: many clients at once; what they wait, and what the server's memory does."""
    import psutil

    from data_utils import load_images

    images = load_images(PROJECT_DIR / "data", train=False)[0][: args.count].numpy()
    requests = [request_of(png(placed(drawn(image)))) for image in images]
    times: list[float] = []
    errors: list[str] = []

    async def client(request: bytes, address: str, end: float) -> None:
        reader, writer = await asyncio.open_connection(*urlsplit(address).netloc.split(":"))
        while time.perf_counter() < end:
            began = time.perf_counter()
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            answer = await reader.readexactly(int(head.lower().partition(b"content-length: ")[2].split()[0]))
            if head.startswith(b"HTTP/1.1 200"):
                times.append(time.perf_counter() - began)
            else:
                errors.append(answer.decode())
        writer.close()

    async def look_on(process: psutil.Process, memory: list[float]) -> None:
        for _ in range(args.seconds):
            await asyncio.sleep(1)
            memory.append(process.memory_info().rss / 2**20)

    async def crowd(address: str, process: psutil.Process, memory: list[float]) -> None:
        end = time.perf_counter() + args.seconds
        await asyncio.gather(look_on(process, memory), *(client(request, address, end) for request in requests))

    memory: list[float] = []
    with serving() as (address, pid):
        asyncio.run(crowd(address, psutil.Process(pid), memory))
    if not times:
        raise RuntimeError(f"no answer came: {errors[0]}")
    times.sort()
    third = len(memory) // 3
    print(
        f"{args.count} clients for {args.seconds} s: {len(times):,} answers ({len(times) / args.seconds:,.0f}/s),"
        f" {len(errors)} errors{': ' + errors[0] if errors else ''}; median {1000 * statistics.median(times):.0f} ms,"
        f" 95th percentile {1000 * times[int(0.95 * len(times))]:.0f} ms; memory"
        f" {statistics.median(memory[:third]):.0f} MiB in the first third, {statistics.median(memory[-third:]):.0f} in"
        " the last"
    )
    return 1 if errors else 0


FIRST_POINT = """
window.firstPoint = new Promise((resolve) => {
  const look = () => {
    const losses = [...document.querySelectorAll(".facts div:nth-child(2) dd")];
    if (losses.some((loss) => /\\d/.test(loss.textContent))) resolve(Date.now() / 1000);
    else requestAnimationFrame(look);
  };
  look();
});
0
"""


def watched(args: argparse.Namespace) -> int:
    """The subcommand: a training's images/s alone and watched, in turns, and how soon the page shows it."""
    alone: list[float] = []
    seen: list[float] = []
    first: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "outputs").mkdir()
        for number in range(args.rounds):
            alone.append(_train(folder, f"alone{number}", args.epochs)[0])
            with serving("--output_dir", folder) as (address, _), chromium() as browser:
                page = browser.new_page()
                page.goto(f"{address}/#/live")
                page.evaluate(FIRST_POINT)
                rate, began = _train(folder, f"watched{number}", args.epochs)
                seen.append(rate)
                first.append(page.evaluate("window.firstPoint") - began)
    ratio = statistics.median(b / a for a, b in zip(alone, seen, strict=True))
    print(
        f"{args.rounds} interleaved rounds of {args.epochs} epochs of model 1: {statistics.median(alone):,.0f} images/s"
        f" alone, {statistics.median(seen):,.0f} watched, ratio {ratio:.3f}; first point"
        f" {statistics.median(first):.2f} s after the first batch began (at most {max(first):.2f} s)"
    )
    return 0


def _train(folder: str, name: str, epochs: int) -> tuple[float, float]:
    """Images/s of the last epoch of a run, and when its first batch began."""
    flags = ["--epochs", str(epochs), "--name", name, "--output_dir", folder, "--device", "cpu"]
    process = subprocess.Popen([sys.executable, str(PROJECT_DIR / "main.py"), *flags], stdout=subprocess.DEVNULL)
    began = None
    metrics = Path(folder) / "outputs" / f"{name}_metrics.json"
    while process.poll() is None:
        if began is None and metrics.exists():
            began = metrics.stat().st_mtime  # written for the first time just before the first batch
        time.sleep(0.02 if began is None else 0.2)
    if process.returncode or began is None:
        raise RuntimeError("the training failed")
    found = load_metrics_json(name, folder)
    return found["train_images"] / found["epoch_seconds"][-1], began


def rates_of_processes(args: argparse.Namespace, data_dir: str | None = None) -> dict[str, Any]:
    """Images/s of whole epochs of the command, by one process of one thread and by several of them, in turns."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={args.processes}"]
    launchers = {"1": [sys.executable], str(args.processes): torchrun}
    rates: dict[str, list[float]] = {count: [] for count in launchers}
    recipe = {"model": args.model, "scheduler": "onecycle", "epochs": 1, "batch_size": args.batch_size}
    place = {"data_dir": str(PROJECT_DIR / "data") if data_dir is None else data_dir, "device": "cpu", "threads": 1}
    for _ in range(args.rounds):
        for count, launcher in launchers.items():
            with tempfile.TemporaryDirectory() as folder:
                settings = recipe | place | {"name": "run", "output_dir": folder}
                flags = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
                run_quietly([*launcher, str(PROJECT_DIR / "main.py"), *flags])
                metrics = load_metrics_json("run", folder)
            rates[count].append(metrics["train_images"] / metrics["epoch_seconds"][0])
    one, many = rates.values()
    ratio = statistics.median(b / a for a, b in zip(one, many, strict=True))
    return {"images_per_second": rates, "ratio": round(ratio, 3)}


def processes(args: argparse.Namespace) -> int:
    """The subcommand: an epoch by one process and by several under torchrun, in turns; a line, and the JSON."""
    from imports import torch
    from training.machine import environment

    found = rates_of_processes(args)
    one, many = map(statistics.median, found["images_per_second"].values())
    print(
        f"model {args.model}, batch {args.batch_size}, one thread a process, {args.rounds} interleaved rounds:"
        f" 1 process {one:,.0f}, {args.processes} processes {many:,.0f} images/s, ratio {found['ratio']:.2f}"
    )
    about = {"environment": environment(torch.device("cpu")), "batch_size": args.batch_size}
    write_json(PROJECT_DIR / "outputs" / "benchmark_processes.json", {**about, "models": {str(args.model): found}})
    return 0


def get_args_parser() -> argparse.ArgumentParser:
    """The subcommands and their flags."""
    parser = OneLineParser(description="What the page is held to, and what several processes gain, measured.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=OneLineParser)
    for function, what, flags in (
        (drawings, "test digits drawn large, through the API", {"count": (1000, "how many digits")}),
        (photos, "test digits as people photograph them", {"count": (200, "how many digits")}),
        (pages, "photographed pages of numbers", {"count": (100, "how many pages")}),
        (signs, "letters and doodles, told from digits", {}),
        (strokes, "from stroke to answer, in Chromium", {"rounds": (5, "how often each of four digits is drawn")}),
        (clients, "many clients at once", {"count": (50, "how many clients"), "seconds": (30, "how long")}),
        (
            watched,
            "a training with and without a page that watches it",
            {"rounds": (3, "interleaved rounds"), "epochs": (1, "of each training")},
        ),
        (
            processes,
            "an epoch by one process, and by several under torchrun",
            {
                "processes": (2, "how many"),
                "rounds": (5, "interleaved rounds"),
                "model": (1, "which network"),
                "batch_size": (512, "images a step, of all processes together"),
            },
        ),
    ):
        command = commands.add_parser(function.__name__, help=what)
        command.set_defaults(run=function)
        for flag, (default, meaning) in flags.items():
            command.add_argument(f"--{flag}", type=int, default=default, help=f"{meaning} ({default})")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns its exit status."""
    return run_command(get_args_parser(), run, argv, failures=(OSError, RuntimeError))


def run(args: argparse.Namespace) -> int:
    """The subcommand that the arguments name."""
    check_at_least(args, count=1, rounds=1, epochs=1, seconds=3, processes=2, batch_size=1)
    status: int = args.run(args)
    return status


if __name__ == "__main__":
    sys.exit(main())
