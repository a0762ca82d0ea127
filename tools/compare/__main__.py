"""Compare trained runs: a table here, and curves, confusion, recall and disagreements as one HTML file to pass on.

python -m tools.compare
python -m tools.compare mnist_model_1 mnist_model_3 --output comparison.html
"""

import argparse
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from common.cli import OneLineParser, command
from common.files import PROJECT_DIR, RunFiles, UsageError, write_whole

STATIC = PROJECT_DIR / "tools" / "web" / "static"  # compare.js draws the same on the page


def comparison_html(data: dict[str, Any]) -> str:
    """One HTML file that shows a comparison and needs nothing else, the internet least of all."""
    from plotly.offline import get_plotlyjs

    from tools.output import rendered

    # modules cannot import one another inside a file: the two that it takes stand one after the other
    sources = [(STATIC / name).read_text(encoding="utf-8") for name in ("common.js", "compare.js")]
    return rendered(
        STATIC / "comparison.html",
        style=(STATIC / "style.css").read_text(encoding="utf-8"),
        script="\n".join(re.sub(r"^import .*\n|^export ", "", source, flags=re.MULTILINE) for source in sources),
        data=data,
        plotly=get_plotlyjs(),
    )


def get_args_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(description="Compare trained runs, as a table and as one HTML file.")
    parser.add_argument("names", nargs="*", metavar="RUN", help="runs or ensembles; default: all that there are")
    parser.add_argument("--output", type=Path, help="the HTML file; default: outputs/comparison.html")
    parser.add_argument("--output_dir", help="folder with outputs; default: the project")
    parser.add_argument("--data_dir", help="folder with MNIST/raw; default: the project's data")
    return parser


def compare_and_write(args: argparse.Namespace) -> int:
    """Print the table of the runs that are named and write the file."""
    path = args.output or RunFiles("any", args.output_dir).metrics.with_name("comparison.html")
    if not path.parent.is_dir():
        raise UsageError(f"output: the folder {path.parent} does not exist")
    if path.is_dir():
        raise UsageError(f"output: {path} is a folder")
    for name in args.names:
        RunFiles(name)  # checks the names before torch is loaded
    from imports import torch
    from tools.compare.comparer import Comparer
    from tools.output import rendered

    torch.set_num_threads(1)  # one image is too little work to share
    comparison = Comparer(args.output_dir, args.data_dir).compare(args.names or None)
    for problem in comparison.problems:
        print(f"Note: left out: {problem}", file=sys.stderr)
    if not comparison.rows:
        raise UsageError(f"there is no run under {path.parent}; train one: python main.py")
    rows = [row for row in comparison.rows if row.name in comparison.chosen]
    print(rendered(Path(__file__).with_name("table.txt"), rows=rows), end="")
    write_whole(path, comparison_html(asdict(comparison)).encode())
    print(f"written to {path}")
    for missing in comparison.missing:
        print(f"  {missing['what']} would be in it after: {missing['command']}")
    return 0


main = command(get_args_parser, compare_and_write)

if __name__ == "__main__":
    sys.exit(main(None))
