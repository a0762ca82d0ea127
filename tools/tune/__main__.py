"""Find better settings for a network on a data set, with Optuna, by one process or by many.

    python -m tools.tune --model 1 --trials 50
    python -m tools.tune --model 1 --trials 50 --workers 2 --threads 1 --confirm 5
    python -m tools.tune --batch_size 128       # a flag of main.py that is given, or a key of --config, is not searched
    python -m tools.tune --trials 200 --storage postgresql+psycopg://user@host/tuning    # on many machines

docs/tune.md tells what a trial is and what a study leaves.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from common.cli import INTERRUPTED, OneLineParser, StopSignals, check_at_least, run_command
from common.files import UsageError
from tools.tune.space import read_space
from training.config import TrainConfig, add_training_flags, given_settings

# Short runs, so that there can be many, judged on images that they were not trained on.
DEFAULTS = {"epochs": 3, "val_split": 10_000}


def get_args_parser() -> argparse.ArgumentParser:
    """The command's flags, and every flag of ``main.py``, which sets what is then not searched."""
    parser = OneLineParser(doc=__doc__, argument_default=argparse.SUPPRESS)
    parser.add_argument("--trials", type=int, default=50, help="trials that the study has at the end (50)")
    parser.add_argument("--workers", type=int, default=1, help="processes on this machine (1)")
    parser.add_argument("--space", type=Path, default=None, help="a TOML file that narrows or extends what is searched")
    parser.add_argument("--storage", default=None, metavar="URL", help="database; default: SQLite in outputs")
    parser.add_argument("--confirm", type=int, default=0, metavar="N", help="then compare the best settings on N seeds")
    parser.add_argument("--epochs", type=int, help=f"of every trial ({DEFAULTS['epochs']})")
    parser.add_argument("--val_split", type=int, help=f"training images held out ({DEFAULTS['val_split']})")
    add_training_flags(parser, leave_out=("epochs", "val_split", "tensorboard"))
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    stopped = "stopped; what is finished is kept, and the same command goes on"
    with StopSignals() as signals:
        status = run_command(get_args_parser(), run, argv, stopped)
    return signals.exit_status if status == INTERRUPTED else status


def run(args: argparse.Namespace) -> int:
    check_at_least(args, trials=1, workers=1, confirm=0)
    if args.confirm == 1:
        raise UsageError("confirm: 1 is not allowed; one seed has no spread, it must be at least 2")
    given = given_settings(args)
    space, of_space = read_space(args.space, given)
    config = TrainConfig(**(DEFAULTS | given | of_space))
    if config.val_split < 1:
        raise UsageError("val_split: 0 is not allowed; trials are compared on held-out images, so hold out at least 1")
    from tools.tune.study import tune

    return tune(args, config, space)


if __name__ == "__main__":
    sys.exit(main())
