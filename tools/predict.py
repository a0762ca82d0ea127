"""Which digits are on images: PNG, JPEG or WebP files, drawings or photos, dark on light or light on dark.

python -m tools.predict seven.png
python -m tools.predict scans/*.png --name mnist_model_3
python -m tools.predict test.csv --submission submission.csv
"""

import argparse
import glob
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from common.cli import OneLineParser, command
from common.files import RunFiles, UsageError, atomic_write

if TYPE_CHECKING:
    from image_data.form import MnistImage

DEFAULT_RUN = "mnist_model_1"
TABLES = (".csv", ".csv.gz")  # of images, a row each


def get_args_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        description="Which digits are on images.",
        epilog="An image is a PNG, JPEG or WebP file of one digit, dark on light or light on dark.",
    )
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files, folders of them, or a CSV file")
    parser.add_argument("--submission", type=Path, metavar="FILE", help="of a CSV file: write ImageId,Label")
    parser.add_argument("--name", default=DEFAULT_RUN, help=f"the run or ensemble that answers ({DEFAULT_RUN})")
    parser.add_argument("--output_dir", help="folder with outputs; default: the project")
    return parser


def predict_files(args: argparse.Namespace) -> int:
    """Print a line an image: the class, how sure the network is, and the second choice.

    Returns the exit status: 1 if an image could not be read while others could.
    """
    paths = list(itertools.chain.from_iterable(map(expanded, args.images)))
    if args.submission is not None and (len(paths) > 1 or not paths[0].endswith(TABLES)):
        raise UsageError("submission: give one CSV file of images, as Kaggle's test.csv")
    RunFiles(args.name, args.output_dir)  # checks the name before torch is loaded
    from tools.networks import load_network, probabilities

    network = load_network(args.name, args.output_dir)
    found, problems = read_all(paths, network.data.form)
    drawn = [image for image in found.values() if image is not None]
    answers = iter(probabilities(network, drawn) if drawn else [])
    names = network.data.classes
    if args.submission is not None:
        labels = [names[max(range(len(names)), key=row.__getitem__)] for row in answers]
        with atomic_write(args.submission) as file:
            file.write("".join(["ImageId,Label\n", *(f"{i},{label}\n" for i, label in enumerate(labels, 1))]).encode())
        print(f"{len(labels):,} answers written to {args.submission}")
        return 0
    width = max(map(len, [*found, "image"]))
    print(f"{'image':<{width}}  digit  confidence  second choice")
    for path, image in found.items():
        if image is None:
            print(f"{path:<{width}}  {'-':>5}  nothing is drawn on it")
            continue
        row = next(answers)
        first, second = sorted(range(len(names)), key=lambda place: -row[place])[:2]
        print(f"{path:<{width}}  {names[first]:>5}  {row[first]:>10.2%}  {names[second]} at {row[second]:.2%}")
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


def expanded(path: str) -> list[str]:
    """The files that ``path`` means: also those of a folder, and of a pattern that the shell has left alone."""
    if Path(path).is_dir():
        files = [str(file) for file in sorted(Path(path).iterdir()) if file.is_file() and file.name[0] != "."]
    else:
        files = [path] if Path(path).is_file() else sorted(file for file in glob.glob(path) if Path(file).is_file())
    if not files:
        raise UsageError(f"{path} is no file")
    return files


def read_all(paths: Sequence[str], form: str) -> "tuple[dict[str, MnistImage | None], list[str]]":
    """The images by their names (None: nothing is drawn), and a line for each that cannot be read, if some can."""
    from image_data.errors import EmptyImageError, ImageError
    from image_data.readers import read_csv, read_picture

    found: dict[str, MnistImage | None] = {}
    problems = []
    for path in paths:
        if path.endswith(TABLES):
            found |= {f"{path}:{row}": image for row, image in enumerate(read_csv(Path(path))[0], 1)}
            continue
        try:
            found[path] = read_picture(path, form)
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
