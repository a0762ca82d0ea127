"""Which digits are on images: drawings, scans or photos, of one digit, a number or a page of numbers.

python -m tools.predict seven.png
python -m tools.predict page.jpg --json
python -m tools.predict scans/*.png --name mnist_model_3
python -m tools.predict test.csv --submission submission.csv
"""

import argparse
import glob
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.cli import OneLineParser, command
from common.files import RunFiles, UsageError, write_whole

if TYPE_CHECKING:
    from image_data.form import Page

DEFAULT_RUN = "mnist_model_1"
TABLES = (".csv", ".csv.gz")  # of images, a row each


def get_args_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        description="Which digits are on images.",
        epilog="An image is a PNG, JPEG, WebP, BMP, GIF or TIFF file, dark on light or light on dark, of one digit or"
        " of several: lines from top to bottom, each from left to right. HEIC needs pillow-heif.",
    )
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files, folders of them, or a CSV file")
    parser.add_argument("--submission", type=Path, metavar="FILE", help="of a CSV file: write ImageId,Label")
    parser.add_argument("--json", action="store_true", help="print JSON, with each digit's box in pixels")
    parser.add_argument("--name", default=DEFAULT_RUN, help=f"the run or ensemble that answers ({DEFAULT_RUN})")
    parser.add_argument("--output_dir", help="folder with outputs; default: the project")
    return parser


def predict_files(args: argparse.Namespace) -> int:
    """Print a line a digit: which it is, how sure the network is, the second choice; and what a page of them reads.

    Returns the exit status: 1 if an image could not be read while others could.
    """
    paths = list(itertools.chain.from_iterable(map(expanded, args.images)))
    if args.submission is not None and (len(paths) > 1 or not paths[0].endswith(TABLES)):
        raise UsageError("submission: give one CSV file of images, as Kaggle's test.csv")
    RunFiles(args.name, args.output_dir)  # checks the name before torch is loaded
    from tools.networks import ask, load_network

    network = load_network(args.name, args.output_dir)
    found, problems = read_all(paths, network.data.form)
    images = [image for page in found.values() if page for image in page.images]
    answers = iter(ask(network, images))
    said = [described(path, page, network.data.classes, answers) for path, page in found.items()]
    if args.submission is not None:
        labels = [one["text"] for one in said]
        lines = ["ImageId,Label\n", *(f"{i},{label}\n" for i, label in enumerate(labels, 1))]
        write_whole(args.submission, "".join(lines).encode())
        print(f"{len(labels):,} answers written to {args.submission}")
        return 0
    print(json.dumps(said, ensure_ascii=False) if args.json else table(said))
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


def described(
    path: str, page: "Page | None", names: Sequence[str], answers: Iterator[tuple[list[float], bool]]
) -> dict[str, Any]:
    """What was read on an image (None: nothing is drawn on it), its digits' probabilities taken from ``answers``."""
    signs = [int(name) if name.isdecimal() else name for name in names]
    digits: list[dict[str, Any]] = []
    for box, (row, unsure) in zip(page.boxes if page else [], answers, strict=False):
        first, second = sorted(range(len(names)), key=lambda place: -row[place])[:2]
        known = {"digit": signs[first], "confidence": row[first], "unsure": unsure, "box": box}
        digits.append({**known, "second": signs[second], "second_confidence": row[second]})
    return {
        "image": path,
        "text": page.text([str(digit["digit"]) for digit in digits]) if page else "",
        "digits": digits,
    }


def table(said: Sequence[dict[str, Any]]) -> str:
    """A line a digit, and after them what each image with several of them reads."""
    width = max(len(name) for name in ("image", *(one["image"] for one in said)))
    lines = [f"{'image':<{width}}  digit  confidence  second choice"]
    for one in said:
        for digit in one["digits"]:
            notes = ["unsure"] if digit["unsure"] else []
            if len(one["digits"]) > 1:
                left, top, wide, high = digit["box"]
                notes.append(f"{wide}x{high} pixels at {left},{top}")
            second = f"{digit['second']} at {digit['second_confidence']:.2%}"
            known = f"{one['image']:<{width}}  {digit['digit']:>5}  {digit['confidence']:>10.2%}"
            lines.append(f"{known}  {', '.join([second, *notes])}")
        if not one["digits"]:
            lines.append(f"{one['image']:<{width}}  {'-':>5}  nothing is drawn on it")
    for one in said:
        if len(one["digits"]) > 1:
            lines += ["", f"{one['image']} reads", one["text"]]
    return "\n".join(lines)


def expanded(path: str) -> list[str]:
    """The files that ``path`` means: also those of a folder, and of a pattern that the shell has left alone."""
    if Path(path).is_dir():
        files = [str(file) for file in sorted(Path(path).iterdir()) if file.is_file() and file.name[0] != "."]
    else:
        files = [path] if Path(path).is_file() else sorted(file for file in glob.glob(path) if Path(file).is_file())
    if not files:
        raise UsageError(f"{path} is no file")
    return files


def read_all(paths: Sequence[str], form: str) -> "tuple[dict[str, Page | None], list[str]]":
    """The images by their names (None: nothing is drawn), and a line for each that cannot be read, if some can."""
    from image_data.errors import EmptyImageError, ImageError
    from image_data.form import Page, read_page
    from image_data.readers import read_csv, read_picture

    found: dict[str, Page | None] = {}
    problems = []
    for path in paths:
        try:
            if path.endswith(TABLES):
                found |= {f"{path}:{row}": Page.of(image) for row, image in enumerate(read_csv(Path(path))[0], 1)}
            else:
                found[path] = read_page(path) if form == "mnist" else Page.of(read_picture(path, form))
        except EmptyImageError:
            found[path] = None
        except ImageError as error:
            problems.append(f"{path}: {error}")
    if not found:
        raise UsageError("; ".join(problems))
    return found, problems


main = command(get_args_parser, predict_files, failures=(OSError, RuntimeError))

if __name__ == "__main__":
    sys.exit(main(None))
