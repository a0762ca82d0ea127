"""Train one of three small networks on MNIST.

python main.py --model 1 --scheduler onecycle --epochs 15
python main.py --model 2 --scheduler step --epochs 10
python main.py --model 3 --scheduler onecycle --epochs 20 --max_lr 0.5
"""

import argparse
import signal
import sys
import textwrap
from collections.abc import Collection, Sequence
from dataclasses import fields
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from distributed import Processes
from file_utils import UsageError
from train_config import TrainConfig, field_type

if TYPE_CHECKING:
    from trainer import TrainResult

INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM


class OneLineParser(argparse.ArgumentParser):
    """Tells a mistake in one line, without the usage block."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def get_args_parser() -> argparse.ArgumentParser:
    """The command's flags. Those that are not given are not in the result."""
    examples = (__doc__ or "").split("\n", 2)[2]
    parser = OneLineParser(
        description="Train one of three small networks on MNIST.",
        epilog="examples:\n" + textwrap.indent(examples, "  "),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    add_training_flags(parser)
    return parser


def add_training_flags(parser: argparse.ArgumentParser, leave_out: Collection[str] = ()) -> None:
    """Add a flag for every field of TrainConfig and ``--config``; ``parser`` must suppress what is not given."""
    for spec in fields(TrainConfig):
        if spec.name in leave_out or not spec.metadata.get("flag", True):
            continue
        # TrainConfig checks the limits, for flags and files alike; the parser only reads the type
        choices = spec.metadata.get("choices")
        if field_type(spec) is bool:
            parser.add_argument(f"--{spec.name}", action=argparse.BooleanOptionalAction, help=spec.metadata["help"])
            continue
        parser.add_argument(
            f"--{spec.name}",
            type=field_type(spec),
            metavar="{" + ",".join(choices()) + "}" if choices else spec.name.upper(),
            help=spec.metadata["help"] + ("" if spec.default is None else f" ({spec.default})"),
        )
    parser.add_argument("--config", metavar="NAME|FILE", help="settings from configs/NAME.toml or a TOML file")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns its exit status: 0 done, 1 the run failed, 2 a mistake in the arguments."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]  # a terminal without the arrow sign
    parser = get_args_parser()
    processes = Processes.from_environment()
    try:
        given = vars(parser.parse_args(argv))
        config_file = given.pop("config", None)
        config = TrainConfig.from_sources(given, config_file)
        if processes.is_main:
            config.files.make_folders()
            for note in config.flags_without_effect(given):
                print(f"Note: {note}.", flush=True)
    except UsageError as error:
        parser.error(str(error))

    signal.signal(signal.SIGTERM, _terminate)
    try:
        from mnist_files import DataError
        from trainer import TrainingError, train_and_evaluate

        try:
            result = train_and_evaluate(config)
        except UsageError as error:
            parser.error(str(error))
        except TrainingError as error:  # every process knows of it
            if processes.is_main:
                print(f"{parser.prog}: {error}", file=sys.stderr)
            return 1
        except (DataError, OSError) as error:
            print(f"{parser.prog}: {error}", file=sys.stderr)
            return 1
        except RuntimeError as error:
            if processes.count == 1:
                raise
            print(f"{parser.prog}: process {processes.rank} lost the others: {error}", file=sys.stderr)
            return 1
    except KeyboardInterrupt:
        if processes.is_main:
            print(f"{parser.prog}: interrupted", file=sys.stderr)
        return INTERRUPTED
    if processes.is_main:
        print_result(result)
    return 0


def print_result(result: "TrainResult") -> None:
    """A short summary of a finished run, and where each of its files is."""
    accuracies, metrics = result.metrics["test_acc"], result.metrics
    best = accuracies.index(max(accuracies))
    print(
        f"{metrics['name']}: {metrics['parameters']:,} parameters, test accuracy {accuracies[-1]:.2f}%"
        f" (best epoch {best}: {accuracies[best]:.2f}%), {metrics['total_seconds']:.0f} s"
        f" on {metrics['environment']['device']}"
    )
    here = Path.cwd()
    for what in ("params", "metrics", "summary", "plot", "checkpoint", "log"):
        path = getattr(result.files, what).resolve()
        shown = path.relative_to(here) if path.is_relative_to(here) else path
        print(f"  {what:<10} {shown}")


def _terminate(signum: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(TERMINATED)


if __name__ == "__main__":
    sys.exit(main())
