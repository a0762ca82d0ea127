"""A study from its start, or from where it stands, to what it leaves."""

import argparse
import os
from dataclasses import asdict, replace
from typing import Any

from common.files import RunFiles
from image_data.fetch import ensure_mnist, sha256_of
from tools.tune.results import (
    confirmation_table,
    print_table,
    queue_seeds,
    recipes_to_compare,
    trial_table,
    write_report,
    write_settings,
)
from tools.tune.space import starting_point
from tools.tune.storage import ELSEWHERE, TuneError, open_storage, open_study, quiet, storage_errors
from tools.tune.workers import CONFIRM_SEED, Job, Progress, best_trials, run_workers
from training.config import TrainConfig

SHOWN = 8  # trials in the table


def tune(args: argparse.Namespace, config: TrainConfig, space: dict[str, Any]) -> int:
    """Run the study to its end, leave its results, and confirm them if that is asked for."""
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
