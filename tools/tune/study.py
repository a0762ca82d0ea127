"""A study from its start, or from where it stands, to what it leaves: the best settings as a file for ``main.py
--config``, tables, plots, a confirmation."""

import argparse
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import optuna
from optuna import visualization
from optuna.trial import FrozenTrial

from common.files import CommandError, RunFiles, write_whole
from image_data.facts import MNIST
from image_data.fetch import sha256_of
from tools.intervals import mean_and_interval
from tools.output import rendered
from tools.trainings import threads_each
from tools.tune.space import starting_point
from tools.tune.storage import ELSEWHERE, open_storage, open_study, using_storage
from tools.tune.workers import CONFIRM_SEED, Job, best_trials, progress_of, run_workers, states_of
from training.config import TrainConfig, read_config_file

SHOWN = 8  # trials in the table


def tune(args: argparse.Namespace, config: TrainConfig, space: dict[str, Any]) -> int:
    """Run the study to its end, leave its results, and confirm them if that is asked for."""
    fixed = {key: value for key, value in asdict(config).items() if key not in ELSEWHERE}
    files = RunFiles(f"tuning_{config.run_name}", config.output_dir)
    files.make_folders()

    raw = config.ensure_data() / "MNIST" / "raw"
    data = {kind: sha256_of(raw / f"train-{kind}-ubyte") for kind in ("images-idx3", "labels-idx1")}
    data_dir = str(config.data_folder.resolve())
    own_place = config.data_dir is not None or config.dataset != MNIST.name
    toml, page = (files.metrics.with_name(f"{files.name}.{ending}") for ending in ("toml", "html"))
    url = args.storage or f"sqlite:///{quote(str(toml.with_suffix('.db').resolve()))}"
    with using_storage(url):
        storage = open_storage(url)
        study = open_study(storage, config.run_name, {"fixed": fixed, "space": space, "data": data})
        done = len(study.get_trials(deepcopy=False))
        if not done:
            study.enqueue_trial(starting_point(space))
        job = Job(
            storage=url,
            study=study.study_name,
            trials=args.trials,
            config=replace(config, threads=config.threads or threads_each(args.workers), data_dir=data_dir),
            # one worker draws the same again from the same seed; of several, here or on other machines, each must
            # draw something else
            sampler_seed=config.seed + done if args.workers == 1 and args.storage is None else None,
        )
        run_workers(study, job, args.workers, progress_of(study, args.trials))
        best = best_trials(study)
        if not best:
            raise CommandError("no trial was trained to its end; narrow the --space to lower rates")
        tables = {"Best trials": trial_table(best[:SHOWN], space)}
        write_settings(toml, study, best[0], data_dir if own_place else None)
        write_report(page, study, tables)
        print_table(tables["Best trials"])
        if args.confirm:
            seeds = range(CONFIRM_SEED + 1, CONFIRM_SEED + 1 + args.confirm)
            recipes = recipes_to_compare(best[0])
            rivals = open_study(storage, f"{study.study_name}_confirm_{best[0].number}", recipes)
            trials = [trial for trial in rivals.get_trials(deepcopy=False) if trial.state.name != "FAIL"]
            present = [trial.system_attrs.get("fixed_params", trial.params) for trial in trials]
            for wanted in [{"recipe": recipe, "seed": seed} for seed in seeds for recipe in recipes]:
                if wanted not in present:  # neither done nor under way nor queued
                    rivals.enqueue_trial(wanted)
            print(f"\nTrial {best[0].number} against the specification, {args.confirm} new seeds:", flush=True)
            job = replace(job, study=rivals.study_name, trials=0)
            run_workers(rivals, job, args.workers, progress_of(rivals, 2 * len(seeds)))
            title = f"Trial {best[0].number} and the specification, {config.epochs} epochs, {args.confirm} new seeds"
            tables[title] = confirmation_table(rivals, seeds)
            write_report(page, study, tables)
            print_table(tables[title])
    print(f"\n  settings  {toml}    python main.py --config {shlex.quote(str(toml))}\n  report    {page}")
    return 0


def trial_table(trials: Sequence[FrozenTrial], space: Mapping[str, Any]) -> list[list[str]]:
    """The best trials as columns; rows: number, accuracy, seed, and every setting that was searched in one of them."""
    rows = [
        ["trial", *(str(trial.number) for trial in trials)],
        ["validation [%]", *(f"{trial.value:.2f}" for trial in trials)],
        ["seed", *(str(trial.user_attrs["settings"]["seed"]) for trial in trials)],
    ]
    for key in space:
        if any(key in trial.params for trial in trials):
            values = [trial.params.get(key, "-") for trial in trials]
            rows.append([key, *(f"{v:.3g}" if isinstance(v, float) else str(v).lower() for v in values)])
    return rows


def print_table(rows: Sequence[Sequence[str]]) -> None:
    print()
    first_width, *widths = (max(map(len, column)) for column in zip(*rows, strict=True))
    for first, *cells in rows:
        print("  ".join([first.ljust(first_width), *map(str.rjust, cells, widths)]).rstrip())


def write_settings(path: Path, study: optuna.Study, best: FrozenTrial, data_dir: str | None) -> None:
    """Write what ``main.py --config`` needs to train the trial ``best`` again, bit for bit."""
    settings = best.user_attrs["settings"] | {"name": path.stem, "data_dir": data_dir}
    known = {"study": study.study_name, "done": states_of(study)["DONE"], "best": best, "settings": settings}
    write_whole(path, rendered(Path(__file__).with_name("settings.txt"), **known, dumps=json.dumps).encode())


def write_report(path: Path, study: optuna.Study, tables: Mapping[str, Sequence[Sequence[str]]]) -> None:
    """Write one page with ``tables`` and Optuna's plots of the study, which opens without a network."""
    name, best = "validation accuracy [%]", best_trials(study)
    better = best[: max(len(best) // 2, 2)]
    study_of_better = optuna.create_study(direction="maximize")
    study_of_better.add_trials(better)
    plots = {
        "History": visualization.plot_optimization_history(study, target_name=name),
        "Accuracy after every epoch": visualization.plot_intermediate_values(study),
        "Each setting by itself": visualization.plot_slice(study, target_name=name),
        "Importance of each setting": visualization.plot_param_importances(study, target_name=name),
        "The better half of the trials": visualization.plot_parallel_coordinate(study_of_better, target_name=name),
    }
    plots["Accuracy after every epoch"].update_layout(xaxis={"title": "epochs", "dtick": 1}, yaxis_title=name)
    # The better half fills the first three: a trial that learnt nothing would press the others into one line.
    final = [trial.value or 0.0 for trial in better]
    all_epochs = [value for trial in better for value in trial.intermediate_values.values()]
    for plot, values in zip(plots.values(), (final, all_epochs, final), strict=False):
        margin = 0.1 * (max(values) - min(values)) + 0.01
        plot.update_yaxes(range=[min(values) - margin, max(values) + margin])
    for plot in plots.values():
        plot.update_layout(title=None, margin={"t": 30})
    title = f"Tuning of {study.study_name}"
    template = Path(__file__).with_name("report.html")
    write_whole(path, rendered(template, title=title, tables=tables, plots=plots).encode())


def recipes_to_compare(best: FrozenTrial) -> dict[str, dict[str, Any]]:
    """The settings of the trial ``best``, and the specification's for as many epochs of the same network and images."""
    tuned = best.user_attrs["settings"]
    common = {key: tuned[key] for key in ("model", "epochs", "val_split")}
    specification = asdict(TrainConfig(**(read_config_file("reference") | common)))
    return {"tuned": tuned, "specification": {key: specification[key] for key in tuned}}


def confirmation_table(study: optuna.Study, seeds: Sequence[int]) -> list[list[str]]:
    """A row a recipe: mean and standard deviation on validation and test images, n; and the difference."""
    found: dict[str, dict[int, np.ndarray]] = {recipe: {} for recipe in study.user_attrs["recipe"]}
    for trial in best_trials(study):
        accuracies = np.array([trial.value, trial.user_attrs["test_accuracy"]])
        found[trial.params["recipe"]][trial.params["seed"]] = accuracies
    rows = [["mean and standard deviation [%]", "validation", "test", "n"]]
    for recipe, by_seed in found.items():
        measured = [by_seed[seed] for seed in seeds if seed in by_seed]
        cells = ["{:.3f} +- {:.3f}".format(*mean_and_interval(column)) for column in zip(*measured, strict=True)]
        without = f" ({len(seeds) - len(measured)} diverged or lost)" if len(measured) < len(seeds) else ""
        rows.append([recipe, *(cells or ["-", "-"]), f"{len(measured)}{without}"])
    tuned, other = found["tuned"], found["specification"]
    if gains := [tuned[seed] - other[seed] for seed in seeds if seed in tuned and seed in other]:
        cells = ["{0:+.3f} +- {2:.3f}".format(*mean_and_interval(column)) for column in zip(*gains, strict=True)]
        rows.append(["difference seed by seed, 95 % interval", *cells, str(len(gains))])
    return rows
