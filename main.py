"""Train one of three small networks on MNIST.

python main.py --model 1 --scheduler onecycle --epochs 15
python main.py --model 2 --scheduler step --epochs 10
python main.py --model 3 --scheduler onecycle --epochs 20 --max_lr 0.5
"""

import argparse
import functools
import os
import shlex
import signal
import sys
import textwrap
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import fields
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from distributed import Processes
from file_utils import CommandError, DamagedFileError, UsageError
from tensorboard_log import check_installed
from train_config import TrainConfig, field_type, read_config_file

if TYPE_CHECKING:
    from trainer import TrainResult

INTERRUPTED = 128 + signal.SIGINT


class OneLineParser(argparse.ArgumentParser):
    """Tells a mistake in one line, without the usage block."""

    def error(self, message: str) -> NoReturn:
        # What was typed may hold anything, line breaks included.
        line = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in message)
        self.exit(2, f"{self.prog}: error: {line}\n")


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
    parser.add_argument("--resume", action="store_true", help="go on from the last epoch's end, bit for bit")
    return parser


def exit_status(
    parser: argparse.ArgumentParser,
    command: Callable[[], int],
    interrupted: str = "interrupted",
    failures: tuple[type[Exception], ...] = (CommandError, OSError),
) -> int:
    """Run the ``command`` of a tool. Returns what it returns; what it raises is told in one line on stderr.

    A UsageError gives exit status 2, one of ``failures`` or a package that is not installed 1, Ctrl-C 130 and the line
    ``interrupted``.
    """
    try:
        return command()
    except UsageError as error:
        parser.error(str(error))
    except failures as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        print(f"{parser.prog}: {how_to_install(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{parser.prog}: {interrupted}", file=sys.stderr)
        return INTERRUPTED


def how_to_install(error: ModuleNotFoundError) -> str:
    """What to tell the user of a tool whose packages are not all here."""
    return f"{error.name} is not installed; pip install -r requirements-tools.txt installs all that the tools need"


def check_at_least(args: argparse.Namespace, **least: int) -> None:
    """Hold the numbers among ``args`` against the smallest that are allowed; those that are not there are right.

    Raises:
        UsageError: one is smaller.
    """
    for name, smallest in least.items():
        if getattr(args, name, smallest) < smallest:
            raise UsageError(f"{name}: {getattr(args, name)} is not allowed; it must be at least {smallest}")


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


class StopSignals:
    """Ctrl-C and SIGTERM: once a training has begun the first one asks it to stop, the second ends it at once."""

    # torchrun passes on a Ctrl-C that the terminal has sent to every process already
    ECHO_SECONDS = 1.0

    def __init__(self, processes: Processes) -> None:
        self.echo = self.ECHO_SECONDS if processes.count > 1 else 0.0
        self.training = False
        self.received: signal.Signals | None = None
        self.when = 0.0

    def __enter__(self) -> "StopSignals":
        self.before = [(signum, signal.signal(signum, self._take)) for signum in (signal.SIGINT, signal.SIGTERM)]
        return self

    def __exit__(self, *exc_info: object) -> None:
        for signum, handler in self.before:
            signal.signal(signum, handler)

    def requested(self) -> bool:
        """Whether to stop. To be asked after every batch: from the first time on, signals wait for that."""
        self.training = True
        return self.received is not None

    def _take(self, signum: int, frame: FrameType | None) -> None:
        first = self.received is None
        if not first and time.monotonic() - self.when < self.echo:
            return
        self.received, self.when = signal.Signals(signum), time.monotonic()
        if not (first and self.training):
            raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns its exit status: 0 done, 1 the run failed, 2 a mistake in the arguments."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]  # a terminal without the arrow sign
    parser = get_args_parser()
    processes = Processes.from_environment()
    signals = StopSignals(processes)
    try:
        with signals:
            return _run(parser, vars(parser.parse_args(argv)), processes, signals)
    except UsageError as error:
        parser.error(str(error))
    except DamagedFileError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        if processes.is_main:
            print(f"{parser.prog}: stopped", file=sys.stderr)
        return 128 + (signals.received or signal.SIGINT)


def _run(parser: argparse.ArgumentParser, given: dict[str, Any], processes: Processes, signals: StopSignals) -> int:
    config_file, resume = given.pop("config", None), given.pop("resume", False)
    config = TrainConfig.from_sources(given, config_file)
    if config.tensorboard:
        check_installed()
    say = functools.partial(print, flush=True) if processes.is_main else _say_nothing
    checkpoint = None
    if resume:
        from checkpoint import load_checkpoint, resumed_config

        settings = {**(read_config_file(config_file) if config_file else {}), **given}
        checkpoint = load_checkpoint(config.files, say)
        config = resumed_config(checkpoint, config.files, settings, processes.count)
        if checkpoint["epochs_done"] >= config.epochs and _is_finished(config):
            say(f"{config.run_name} is finished: all {config.epochs} epochs are done.")
            return 0
        say(f"Going on with {config.run_name}: {checkpoint['epochs_done']} of {config.epochs} epochs are done.")
    elif processes.is_main:
        config.files.make_folders()
    for note in config.flags_without_effect(given):
        say(f"Note: {note}.")

    from mnist_files import DataError
    from trainer import StoppedError, TrainingError, train_and_evaluate

    try:
        result = train_and_evaluate(config, checkpoint=checkpoint, stop_requested=signals.requested)
    except StoppedError:
        if processes.is_main:
            print(f"{parser.prog}: stopped{_how_to_go_on(config, processes)}", file=sys.stderr)
        return 128 + (signals.received or signal.SIGINT)
    except TrainingError as error:  # every process knows of it
        if processes.is_main:
            print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    except (DataError, OSError) as error:
        print(f"{parser.prog}: {error}{_how_to_go_on(config, processes)}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        if processes.count == 1:
            raise
        print(f"{parser.prog}: process {processes.rank} lost the others: {error}", file=sys.stderr)
        return 1
    if processes.is_main:
        print_result(result)
    return 0


def _say_nothing(line: str) -> None:
    """What every process but the main one prints."""


def _is_finished(config: TrainConfig) -> bool:
    """Whether the run's last files were written too."""
    from visualization import load_metrics_json

    try:
        metrics = load_metrics_json(config.run_name, config.output_dir)
    except (OSError, RuntimeError):
        return False
    return metrics["status"] == "finished" and config.files.params.exists()


def _how_to_go_on(config: TrainConfig, processes: Processes) -> str:
    """What a person does after a run of this process ended early, to be added to the line that says so."""
    from visualization import load_metrics_json

    try:
        metrics = load_metrics_json(config.run_name, config.output_dir)
    except (OSError, RuntimeError):
        return ""
    if metrics["pid"] != os.getpid():  # an earlier run's: this one had not begun
        return ""
    done = len(metrics["test_acc"])
    if done == 0:
        return "; no epoch was done, so there is nothing to go on from"
    words = [sys.argv[0], "--resume", "--name", config.run_name]
    if config.output_dir is not None:
        words += ["--output_dir", config.output_dir]
    launcher = "python" if processes.count == 1 else "torchrun <as before>"
    return f"; to go on from epoch {done}: {launcher} {shlex.join(words)}"


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


if __name__ == "__main__":
    sys.exit(main())
