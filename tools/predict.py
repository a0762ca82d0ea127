"""Which digits are on images: PNG, JPEG or WebP files, drawings or photos, dark on light or light on dark.

python -m tools.predict seven.png
python -m tools.predict scans/*.png --name mnist_model_3
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from common.cli import OneLineParser, run_command
from common.files import RunFiles, UsageError

DEFAULT_RUN = "mnist_model_1"


def get_args_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = OneLineParser(
        description="Which digits are on images.",
        epilog="An image is a PNG, JPEG or WebP file of one digit, dark on light or light on dark.",
        allow_abbrev=False,
    )
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files")
    parser.add_argument("--name", default=DEFAULT_RUN, help=f"the run or ensemble that answers ({DEFAULT_RUN})")
    parser.add_argument("--output_dir", help="folder with outputs; default: the project")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns its exit status."""
    return run_command(get_args_parser(), predict_files, argv, failures=(OSError, RuntimeError))


def predict_files(args: argparse.Namespace) -> int:
    """Print a line a file: the digit, how sure the network is, and the second choice."""
    paths: list[str] = args.images
    for path in paths:
        if not Path(path).is_file():
            raise UsageError(f"{path} is no file")
    RunFiles(args.name, args.output_dir)  # checks the name before torch is loaded
    from image_data.form import EmptyImageError, ImageError, MnistImage, read_grey, to_mnist
    from tools.networks import load_network, probabilities

    digits: list[MnistImage | None] = []
    for path in paths:
        try:
            digits.append(to_mnist(read_grey(path)))
        except EmptyImageError:
            digits.append(None)
        except ImageError as error:
            raise UsageError(f"{path}: {error}") from None
    network = load_network(args.name, args.output_dir)
    drawn = [digit for digit in digits if digit is not None]
    answers = iter(probabilities(network.model, drawn) if drawn else [])
    width = max(map(len, [*paths, "image"]))
    print(f"{'image':<{width}}  digit  confidence  second choice")
    for path, digit in zip(paths, digits, strict=True):
        if digit is None:
            print(f"{path:<{width}}  {'-':>5}  nothing is drawn on it")
            continue
        row = next(answers)
        first, second = sorted(range(10), key=lambda digit: -row[digit])[:2]
        print(f"{path:<{width}}  {first:>5}  {row[first]:>10.2%}  {second} at {row[second]:.2%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
