"""How fast a training step is, and how accurate a recipe is over seeds.

python -m tools.benchmark throughput
python -m tools.benchmark throughput --device cuda --images 25600 --rounds 3
python -m tools.benchmark accuracy --model 1 --seeds 10 --scheduler onecycle --epochs 15
python -m tools.benchmark accuracy --device cuda --together 10 --scheduler onecycle --epochs 15
"""

import argparse
import sys
from pathlib import Path

from common.cli import OneLineParser, check_at_least, command
from common.files import PROJECT_DIR, CommandError
from tools.benchmark.accuracy import accuracy
from tools.benchmark.throughput import throughput
from tools.trainings import stopping_on_sigterm
from training.config import TrainConfig, add_training_flags, given_settings
from training.report import TrainingError


def get_args_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(description="Speed of a training step, accuracy of a recipe.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=OneLineParser)

    speed = commands.add_parser("throughput", help="images/s of the default and the best flags against a naive loop")
    speed.add_argument("--models", nargs="+", choices=["1", "2", "3"], default=["1", "2", "3"])
    speed.add_argument("--batch_size", type=int, default=128)
    speed.add_argument("--rounds", type=int, default=7, help="interleaved rounds (7)")
    speed.add_argument("--images", type=int, default=5120, help="images a round and setting (5120)")
    speed.add_argument("--device", default="cpu", help="cpu, or a GPU: cuda or cuda:N (cpu)")
    speed.add_argument("--data_dir", type=Path, default=PROJECT_DIR / "data")

    series = commands.add_parser("accuracy", help="a recipe over seeds", argument_default=argparse.SUPPRESS)
    series.add_argument("--seeds", type=int, default=10, help="how many (10)")
    series.add_argument("--first_seed", type=int, default=1, help="the first of them (1)")
    series.add_argument("--jobs", type=int, default=1, help="how many at once, the threads divided among them (1)")
    series.add_argument("--together", type=int, default=1, help="how many at once in one process, on one device (1)")
    series.add_argument("--label", default=None, help="what the series is called in the plot")
    series.add_argument("--keep", metavar="NAME", default=None, help="keep the networks, as runs NAME_seed_SEED")
    series.add_argument("--naive", action="store_true", default=False, help="train with the naive reference instead")
    add_training_flags(series, leave_out=("seed", "name", "output_dir"))
    for subparser in (speed, series):
        subparser.add_argument("--output_dir", dest="results", type=Path, default=PROJECT_DIR)
    return parser


def run(args: argparse.Namespace) -> int:
    check_at_least(args, rounds=1, images=1, batch_size=1, seeds=1, jobs=1, together=1)
    if args.command == "throughput":
        return throughput(args)
    return accuracy(args, TrainConfig(**given_settings(args)))


KEPT, FAILURES = "interrupted; what is finished is kept", (CommandError, OSError, TrainingError)
main = stopping_on_sigterm()(command(get_args_parser, run, interrupted=KEPT, failures=FAILURES))

if __name__ == "__main__":
    sys.exit(main(None))
