"""Find better settings for a network on a data set, with Optuna, by one process or by many.

    python -m tools.tune --model 1 --trials 50
    python -m tools.tune --model 1 --trials 50 --workers 2 --threads 1 --confirm 5
    python -m tools.tune --trials 200 --storage postgresql+psycopg://user@host/tuning    # on many machines

A trial is one training, and its value the accuracy on held-out training images; the test set is not read. The same
command again goes on with the study. It leaves ``outputs/tuning_NAME.toml``, the best settings for ``main.py
--config``, and ``outputs/tuning_NAME.html``, a report.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from common.cli import INTERRUPTED, OneLineParser, StopSignals, check_at_least, exit_status
from common.files import RunFiles, UsageError
from image_data.fetch import ensure_mnist, sha256_of
from tools.tune.results import (
    best_trials,
    confirmation_table,
    print_table,
    queue_seeds,
    recipes_to_compare,
    trial_table,
    write_report,
    write_settings,
)
from tools.tune.space import read_space, starting_point
from tools.tune.storage import ELSEWHERE, TuneError, open_storage, open_study, quiet, storage_errors
from tools.tune.worker import CONFIRM_SEED, Job
from tools.tune.workers import Progress, run_workers
from training.config import TrainConfig, add_training_flags, read_config_file

# Short runs, so that there can be many, judged on images that they were not trained on.
DEFAULTS = {"epochs": 3, "val_split": 10_000}
SHOWN = 8  # trials in the table


def tune(args: argparse.Namespace, given: dict[str, Any]) -> int:
    """Run the study to its end, leave its results, and confirm them if that is asked for."""
    from_file = read_config_file(args.config) if args.config else {}
    space, of_space = read_space(args.space, from_file | given)
    config = TrainConfig(**(DEFAULTS | from_file | given | of_space))
    if config.val_split < 1:
        raise UsageError("val_split: 0 is not allowed; trials are compared on held-out images, so hold out at least 1")
    fixed = {key: value for key, value in asdict(config).items() if key not in ELSEWHERE}
    files = RunFiles(f"tuning_{config.run_name}", config.output_dir)
    files.make_folders()

    raw = ensure_mnist(config.data_folder)
    data = {kind: sha256_of(raw / f"train-{kind}-ubyte") for kind in ("images-idx3", "labels-idx1")}
    data_dir = str(config.data_folder.resolve())
    toml, page = (files.metrics.with_name(f"{files.name}.{ending}") for ending in ("toml", "html"))
    url = args.storage or f"sqlite:///{toml.with_suffix('.db').resolve()}"
    with quiet(), storage_errors(url):
        storage = open_storage(url)
        recipe = {"fixed": fixed, "space": space, "data": data}
        study = open_study(storage, config.run_name, recipe)
        done = len(study.get_trials(deepcopy=False))
        if not done:
            study.enqueue_trial(starting_point(space))
        job = Job(
            storage=url,
            study=study.study_name,
            trials=args.trials,
            epochs=config.epochs,
            threads=config.threads or max(1, (os.cpu_count() or 1) // args.workers),
            device=config.device,
            data_dir=data_dir,
            # one worker draws the same again from the same seed; of several, here or on other machines, each must
            # draw something else
            sampler_seed=config.seed + done if args.workers == 1 and args.storage is None else None,
        )
        run_workers(study, job, args.workers, Progress(study, args.trials))
        best = best_trials(study)
        if not best:
            raise TuneError("no trial was trained to its end; narrow the --space to lower rates")
        tables = {"Best trials": trial_table(best[:SHOWN], space)}
        write_settings(toml, study, best[0], None if config.data_dir is None else data_dir)
        write_report(page, study, tables)
        print()
        print_table(tables["Best trials"])
        if args.confirm:
            seeds = range(CONFIRM_SEED + 1, CONFIRM_SEED + 1 + args.confirm)
            rivals = open_study(storage, f"{study.study_name}_confirm_{best[0].number}", recipes_to_compare(best[0]))
            queue_seeds(rivals, seeds)
            print(f"\nTrial {best[0].number} against the specification, {args.confirm} new seeds:", flush=True)
            job = replace(job, study=rivals.study_name, trials=0)
            run_workers(rivals, job, args.workers, Progress(rivals, 2 * len(seeds)))
            title = f"Trial {best[0].number} and the specification, {config.epochs} epochs, {args.confirm} new seeds"
            tables[title] = confirmation_table(rivals, seeds)
            write_report(page, study, tables)
            print()
            print_table(tables[title])
    print(f"\n  settings  {toml}    python main.py --config {toml}\n  report    {page}")
    return 0


def get_args_parser() -> argparse.ArgumentParser:
    """The command's flags, and every flag of ``main.py``, which sets what is then not searched."""
    parser = OneLineParser(
        description="Find better settings for a network on a data set.",
        epilog="A flag of main.py that is given, or a key of --config, is not searched.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
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
    """Run the command. Returns its exit status."""
    parser = get_args_parser()
    with StopSignals() as signals:
        stopped = "stopped; what is finished is kept, and the same command goes on"
        status = exit_status(parser, lambda: run(parser.parse_args(argv)), stopped)
    return signals.exit_status if status == INTERRUPTED else status


def run(args: argparse.Namespace) -> int:
    """Check the arguments, then tune."""
    check_at_least(args, trials=1, workers=1, confirm=0)
    if args.confirm == 1:
        raise UsageError("confirm: 1 is not allowed; one seed has no spread, it must be at least 2")
    names = {spec.name for spec in fields(TrainConfig)}
    given = {key: value for key, value in vars(args).items() if key in names}
    args.config = getattr(args, "config", None)
    return tune(args, given)


if __name__ == "__main__":
    sys.exit(main())
