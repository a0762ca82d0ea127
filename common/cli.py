"""What every command does alike: a mistake in one line, the exit status, signals.

main = command(get_args_parser, run)       # run takes the parsed arguments and returns the exit status
sys.exit(main())
"""

import argparse
import difflib
import re
import signal
import sys
import textwrap
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from common.files import CommandError, UsageError

INTERRUPTED = 128 + signal.SIGINT

Log = Callable[[str], None]  # gets each line that a person should read


class OneLineParser(argparse.ArgumentParser):
    """Tells a mistake in one line, without the usage block; ``python -m tools.NAME`` is known by these words.

    In a flag's name a dash is as good as an underscore. ``doc``, the command's module's, is a line and examples.
    """

    keys: Collection[str] = ()  # that only a config file can set

    def __init__(self, prog: str | None = None, doc: str | None = None, **options: Any) -> None:
        if doc is not None:
            what, _, rest = doc.partition("\n")
            examples = textwrap.indent(textwrap.dedent(rest.strip("\n").partition("\n\n")[0]), "  ")
            shown = {"description": what, "epilog": f"examples:\n{examples}"}
            options = shown | {"formatter_class": argparse.RawDescriptionHelpFormatter} | options
        module = getattr(sys.modules["__main__"], "__spec__", None)
        if prog is None and module is not None and module.origin == sys.argv[0]:  # as argparse does from 3.14 on
            prog = f"python -m {module.name.removesuffix('.__main__')}"
        super().__init__(prog, allow_abbrev=False, **options)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        known, words = {flag.replace("-", "_"): flag for flag in self._option_string_actions}, []
        for word in sys.argv[1:] if args is None else args:
            flag, equals, value = str(word).partition("=")
            words.append(known.get(flag.replace("-", "_"), flag) + equals + value)
        found, unknown = super().parse_known_args(words, namespace)
        if unknown:
            flag = unknown[0].partition("=")[0].replace("-", "_")
            near, key = difflib.get_close_matches(flag, known, 1), flag.lstrip("_")
            hint = f"; did you mean {known[near[0]]}?" if near else ""
            if key in self.keys:
                hint = f"; {key} is a config file's key: --config FILE, with a line {key} = ..."
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return found, unknown

    def error(self, message: str) -> NoReturn:
        if comma := re.search(r"invalid (?:float|int) value: '([-\d]*),(\d+)'$", message):
            message += f"; with a point: {comma[1]}.{comma[2]}"
        # What was typed may hold anything, line breaks included.
        line = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in message)
        self.exit(2, f"{self.prog}: error: {line}\n")


def run_command(
    parser: argparse.ArgumentParser,
    command: Callable[[argparse.Namespace], int],
    argv: Sequence[str] | None,
    interrupted: str = "interrupted",
    failures: tuple[type[Exception], ...] = (CommandError, OSError),
) -> int:
    """Run the ``command`` of a tool with the arguments in ``argv`` (None: the process's own).

    Returns what it returns; what it raises is told in one line on stderr. A UsageError gives exit status 2, one of
    ``failures`` or a package that is not installed 1, Ctrl-C 130 and the line ``interrupted``.
    """
    forgive_consoles()
    args = parser.parse_args(argv)
    status = 1
    try:
        return command(args)
    except UsageError as error:
        parser.error(str(error))
    except failures as error:
        line = str(error)
    except ModuleNotFoundError as error:
        line = f"{error.name} is not installed; pip install -r requirements-tools.txt installs all that the tools need"
    except KeyboardInterrupt:
        line, status = interrupted, INTERRUPTED
    print(f"{parser.prog}: {line}", file=sys.stderr)
    return status


def forgive_consoles() -> None:
    """Let a console that lacks a character show a replacement; Jupyter's output and a closed one are left alone."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def command(
    parser: Callable[[], argparse.ArgumentParser], run: Callable[[argparse.Namespace], int], **options: Any
) -> Callable[[Sequence[str] | None], int]:
    """The ``main`` of a tool: it takes the arguments (None: the process's own) and returns the exit status."""

    def main(argv: Sequence[str] | None = None) -> int:
        return run_command(parser(), run, argv, **options)

    return main


def check_at_least(args: argparse.Namespace, **least: int) -> None:
    """Hold the numbers that are among ``args`` against the smallest that are allowed; a UsageError names one."""
    for name, smallest in least.items():
        if getattr(args, name, smallest) < smallest:
            raise UsageError(f"{name}: {getattr(args, name)} is not allowed; it must be at least {smallest}")


def shown_path(path: Path) -> Path:
    """``path`` from the current directory, if it is under it."""
    path, here = path.resolve(), Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def silent(told: object) -> None:
    """Takes the lines of a run, or its metrics, where nobody is to read them."""


class StopSignals:
    """Ctrl-C and SIGTERM: once a training has begun the first one asks it to stop, the second ends it at once.

    A second one within ``echo_seconds`` is the first again: torchrun passes on a Ctrl-C that the terminal has sent to
    every process already.
    """

    def __init__(self, echo_seconds: float = 0.0) -> None:
        self.echo_seconds = echo_seconds
        self.training = False
        self.received: signal.Signals | None = None
        self.when = 0.0

    def __enter__(self) -> "StopSignals":
        self.before = [(signum, signal.signal(signum, self._take)) for signum in (signal.SIGINT, signal.SIGTERM)]
        return self

    def __exit__(self, *exc_info: object) -> None:
        for signum, handler in self.before:
            signal.signal(signum, handler)

    @property
    def exit_status(self) -> int:
        """Of a command that was stopped, as shells count it: 130 after Ctrl-C, 143 after SIGTERM."""
        return 128 + (self.received or signal.SIGINT)

    def requested(self) -> bool:
        """Whether to stop. To be asked after every batch: from the first time on, signals wait for that."""
        self.training = True
        return self.received is not None

    def _take(self, signum: int, frame: FrameType | None) -> None:
        first = self.received is None
        if not first and time.monotonic() - self.when < self.echo_seconds:
            return
        self.received, self.when = signal.Signals(signum), time.monotonic()
        if not (first and self.training):
            raise KeyboardInterrupt
