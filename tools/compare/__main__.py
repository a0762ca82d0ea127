"""Compare trained runs: a table here, and curves, confusion, recall and disagreements as one HTML file to pass on.

    python -m tools.compare
    python -m tools.compare mnist_model_1 mnist_model_3 --output comparison.html

The page (``python -m tools.web``) shows the same: what is compared is computed here, and drawn by ``compare.js`` under
``tools/web/static`` in both.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from common.cli import OneLineParser, exit_status
from common.files import RunFiles, UsageError, atomic_write
from tools.compare.comparer import Comparer, RunRow
from tools.compare.page import comparison_html


def print_table(rows: Sequence[RunRow]) -> None:
    """The table as text."""

    def shown(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    width = max(len(row.name) for row in rows)
    print(
        f"{'run':<{width}} {'accuracy':>9} {'parameters':>10} {'bytes':>8} {'epochs':>6} {'seconds':>8} {'ms/image':>8}"
        "  status"
    )
    for row in rows:
        print(
            f"{row.name:<{width}} {shown(row.accuracy, '.2f'):>8}% {row.parameters:>10,} {shown(row.bytes, ','):>8}"
            f" {shown(row.epochs, 'd'):>6} {shown(row.seconds, '.1f'):>8} {shown(row.latency_ms, '.2f'):>8}"
            f"  {row.status}"
        )


def get_args_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = OneLineParser(description="Compare trained runs, as a table and as one HTML file.", allow_abbrev=False)
    parser.add_argument("names", nargs="*", metavar="RUN", help="runs or ensembles; default: all that there are")
    parser.add_argument("--output", type=Path, help="the HTML file; default: outputs/comparison.html")
    parser.add_argument("--output_dir", help="folder with outputs; default: the project")
    parser.add_argument("--data_dir", help="folder with MNIST/raw; default: the project's data")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns its exit status."""
    parser = get_args_parser()
    args = parser.parse_args(argv)
    path = args.output or RunFiles("any", args.output_dir).metrics.with_name("comparison.html")
    return exit_status(parser, lambda: compare_and_write(args.names or None, path, args.output_dir, args.data_dir))


def compare_and_write(names: Sequence[str] | None, path: Path, output_dir: str | None, data_dir: str | None) -> int:
    """Print the table of ``names`` and write the file."""
    if not path.parent.is_dir():
        raise UsageError(f"output: the folder {path.parent} does not exist")
    if path.is_dir():
        raise UsageError(f"output: {path} is a folder")
    for name in names or ():
        RunFiles(name)  # checks the names before torch is loaded
    from imports import torch

    torch.set_num_threads(1)  # one image is too little work to share
    comparison = Comparer(output_dir, data_dir).compare(names)
    for problem in comparison.problems:
        print(f"Note: left out: {problem}", file=sys.stderr)
    if not comparison.rows:
        raise UsageError(f"there is no run under {path.parent}; train one: python main.py")
    print_table([row for row in comparison.rows if row.name in comparison.chosen])
    with atomic_write(path) as file:
        file.write(comparison_html(comparison).encode())
    print(f"written to {path}")
    for missing in comparison.missing:
        print(f"  {missing['what']} would be in it after: {missing['command']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
