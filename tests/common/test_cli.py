import argparse
import os
import signal
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest

from common.cli import OneLineParser, StopSignals, check_at_least, run_command
from common.files import CommandError, DamagedFileError, UsageError


def ended(outcome, capsys) -> tuple[int, str]:
    """The exit status of a command with this outcome, and its line on stderr."""

    def command(args) -> int:
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    try:
        status = run_command(OneLineParser(prog="tool"), command, [], interrupted="what is finished is kept")
    except SystemExit as exit_:
        status = exit_.code
    return status, capsys.readouterr().err


@pytest.mark.parametrize(
    ("outcome", "status", "line"),
    [
        (0, 0, ""),
        (1, 1, ""),
        (UsageError("name: 'x y' is not allowed"), 2, "tool: error: name: 'x y' is not allowed\n"),
        (CommandError("no trial was trained"), 1, "tool: no trial was trained\n"),
        (DamagedFileError("x.pth is damaged"), 1, "tool: x.pth is damaged\n"),
        (OSError("the disk is full"), 1, "tool: the disk is full\n"),
        (
            ModuleNotFoundError(name="onnx"),
            1,
            "tool: onnx is not installed; pip install -r requirements",
        ),
        (KeyboardInterrupt(), 130, "tool: what is finished is kept\n"),
    ],
)
def test_what_becomes_of_a_command(outcome, status, line, capsys):
    found, error = ended(outcome, capsys)
    assert found == status
    assert error.startswith(line)
    assert error.count("\n") == bool(line)


def test_what_nobody_expected_is_not_hidden(capsys):
    with pytest.raises(ZeroDivisionError):
        ended(ZeroDivisionError(), capsys)


def test_a_line_break_in_a_mistake_is_shown_as_such(capsys):
    with pytest.raises(SystemExit):
        OneLineParser(prog="tool").error("not\nallowed")
    assert capsys.readouterr().err == "tool: error: not\\nallowed\n"


def test_the_smallest_values():
    args = argparse.Namespace(trials=0, workers=3)
    check_at_least(args, workers=1, absent=5)
    with pytest.raises(UsageError, match="trials: 0 is not allowed; it must be at least 1"):
        check_at_least(args, workers=1, trials=1)


def send(signum: int) -> None:
    os.kill(os.getpid(), signum)


def test_the_first_signal_asks_and_the_second_ends():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals() as signals:
        assert not signals.requested()  # so the training has begun
        send(signal.SIGTERM)
        assert signals.requested()
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
    assert signals.exit_status == 128 + signal.SIGINT
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_signal_before_the_training_ends_at_once():
    with StopSignals() as signals, pytest.raises(KeyboardInterrupt):
        send(signal.SIGTERM)
    assert signals.exit_status == 143


def test_a_signal_that_is_passed_on_is_no_second_one():
    with StopSignals(echo_seconds=60) as signals:
        signals.requested()
        for _ in range(3):
            send(signal.SIGINT)
        assert signals.requested()


# --- flags ------------------------------------------------------------------------------------------------------------


def tool() -> OneLineParser:
    parser = OneLineParser(prog="tool")
    parser.add_argument("words", nargs="*")
    parser.add_argument("--output_dir")
    parser.add_argument("--max_drop", type=float)
    parser.add_argument("--dry-run", action="store_true")
    return parser


@pytest.mark.parametrize("typed", ["--output-dir=a-b_c=d", "--output_dir=a-b_c=d"])
def test_dashes_are_as_good_as_underscores_in_a_flag_and_stay_in_a_value(typed):
    args = tool().parse_args([typed, "--dry_run", "x-y_z"])
    assert (args.output_dir, args.dry_run, args.words) == ("a-b_c=d", True, ["x-y_z"])


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        (["--max-drp", "1"], "unrecognized arguments: --max-drp; did you mean --max_drop?"),
        (["--max_drop", "0,5"], "argument --max_drop: invalid float value: '0,5'; with a point: 0.5"),
        (["--zebra"], "unrecognized arguments: --zebra"),
    ],
)
def test_what_was_meant_is_told(typed, told, capsys):
    with pytest.raises(SystemExit) as ended:
        tool().parse_args(typed)
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"tool: error: {told}\n"


def test_the_usage_names_the_command_that_works(monkeypatch):
    module = ModuleType("__main__")
    module.__spec__ = ModuleSpec("tools.evaluate.__main__", None, origin="/somewhere/__main__.py")
    monkeypatch.setitem(sys.modules, "__main__", module)
    monkeypatch.setattr(sys, "argv", ["/somewhere/__main__.py"])
    assert OneLineParser().format_usage() == "usage: python -m tools.evaluate [-h]\n"
