"""A trained network as one small file for a phone or a browser, measured in the runtime that will run it.

    python -m tools.export --model 3                                   # ONNX and ExecuTorch, float32 and int8
    python -m tools.export --name trial --format executorch --precision int8
    python -m tools.export --model 3 --format html                     # a page that reads what one draws, from disk
    python -m tools.export --model 3 --format safetensors              # the weights alone, with a model card

docs/export.md tells what a file takes and returns, what it is held against, and how an app runs it.
"""

import argparse
import logging
import sys
import warnings
from pathlib import Path

from common.cli import OneLineParser, command
from common.files import RunFiles, UsageError
from model_strategy import known_models

FORMATS = ("onnx", "executorch")
PRECISIONS = ("fp32", "int8")


def get_args_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(doc=__doc__)
    parser.add_argument("--model", choices=known_models(), help="which network; default: what the run's metrics say")
    parser.add_argument("--name", help="which run; default: mnist_model_MODEL")
    parser.add_argument("--format", choices=[*FORMATS, "html", "safetensors", "all"], default="all", help="(all)")
    parser.add_argument("--precision", choices=[*PRECISIONS, "all"], default="all", help="(all)")
    parser.add_argument("--max_drop", type=float, default=0.1, help="points that a file may lose (0.1)")
    parser.add_argument("--data_dir", type=Path, help="folder with MNIST/raw; default: the run's")
    parser.add_argument("--output_dir", type=Path, help="folder of the run and its files; default: the project")
    return parser


def run(args: argparse.Namespace) -> int:
    if args.model is None and args.name is None:
        raise UsageError("give --model or --name")
    if not 0 <= args.max_drop <= 100:  # not a number neither
        raise UsageError(f"max_drop: {args.max_drop} is not allowed; it must be from 0 to 100 points")
    args.name = args.name or f"mnist_model_{args.model}"
    files = RunFiles(args.name, args.output_dir)  # checks the name
    if args.format in ("html", "safetensors"):
        from tools.export.card import write_safetensors
        from tools.export.html import write_html
        from tools.networks import load_network

        network, page = load_network(args.name, args.output_dir), files.params.with_name(f"{args.name}.html")
        if args.format == "safetensors":
            print(*write_safetensors(network, files), sep="\n")
        else:
            print(f"{page}: {write_html(network, page) / 1000:.1f} kB")
        return 0
    args.formats = FORMATS if args.format == "all" else (args.format,)
    args.precisions = PRECISIONS if args.precision == "all" else (args.precision,)
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # what the exporters say of their own insides; errors are raised, not logged
    try:
        with warnings.catch_warnings(action="ignore"):
            from tools.export.files import export

            return export(args)
    finally:
        logging.disable(before)


main = command(get_args_parser, run)

if __name__ == "__main__":
    sys.exit(main(None))
