"""Find better settings for a network on a data set, with Optuna, by one process or by many.

    python -m tools.tune --model 1 --trials 50
    python -m tools.tune --model 1 --trials 50 --workers 2 --threads 1 --confirm 5
    python -m tools.tune --trials 200 --storage postgresql+psycopg://user@host/tuning    # on many machines

A trial is one training, and its value the accuracy on held-out training images; the test set is not read. The same
command again goes on with the study. It leaves ``outputs/tuning_NAME.toml``, the best settings for ``main.py
--config``, and ``outputs/tuning_NAME.html``, a report.
"""

from __future__ import annotations

import argparse
import contextlib
import html
import json
import multiprocessing
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.cli import OneLineParser, StopSignals, check_at_least, how_to_install
from common.files import RunFiles, UsageError, atomic_write
from image_data.fetch import DataError, ensure_mnist, sha256_of
from tools.tune_space import read_space, starting_point
from tools.tune_worker import (
    CONFIRM_SEED,
    Job,
    TuneError,
    finished,
    is_under_way,
    open_storage,
    quiet,
    storage_errors,
    work,
)
from training.config import TrainConfig, add_training_flags, fields_in, read_config_file

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

# Short runs, so that there can be many, judged on images that they were not trained on.
DEFAULTS = {"epochs": 3, "val_split": 10_000}
SHOWN = 8  # trials in the table
# Of the report: the slices are wider than a window, and scroll.
STYLE = """body { font-family: sans-serif; margin: 2em } div { overflow-x: auto }
td { padding: .15em .8em; text-align: right } td:first-child { text-align: left }"""


ELSEWHERE = fields_in("machine", "place")  # may differ between the machines of a study


def open_study(storage: optuna.storages.RDBStorage, name: str, recipe: dict[str, Any]) -> optuna.Study:
    """The study ``name``, new or as it is.

    Args:
        recipe: what its trials have in common, in parts; kept with the study.

    Raises:
        UsageError: its trials are of another recipe.
    """
    import optuna

    study = optuna.create_study(study_name=name, storage=storage, direction="maximize", load_if_exists=True)
    before = study.user_attrs.get("recipe", recipe)
    other = [
        f"{key} ({before[part].get(key)!r}, not {settings.get(key)!r})"
        for part, settings in recipe.items()
        for key in settings | before[part]
        if key not in ELSEWHERE and before[part].get(key) != settings.get(key)
    ]
    if other:
        raise UsageError(
            f"name: the study {name} exists with other settings: {', '.join(other)}; choose another --name"
        )
    study.set_user_attr("recipe", recipe)
    return study


class Workers:
    """The workers of this machine, and what the study that they work on has come to."""

    def __init__(self, job: Job, count: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.processes: list[tuple[BaseProcess, Connection]] = []
        # A child that Ctrl-C reaches before it has its own handlers would say so in ten lines.
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            for _ in range(count):
                here, there = context.Pipe(duplex=False)
                process = context.Process(target=work, args=(job, there))
                process.start()
                there.close()
                self.processes.append((process, here))
        finally:
            signal.signal(signal.SIGINT, handler)

    def alive(self) -> bool:
        """Whether any of them works."""
        return any(process.is_alive() for process, _ in self.processes)

    def stop(self) -> None:
        """Have them give back the trials under way, and wait for them; a second interrupt ends them at once."""
        try:
            for process, _ in self.processes:
                process.terminate()
            for process, _ in self.processes:
                process.join()
        except KeyboardInterrupt:
            for process, _ in self.processes:
                process.kill()
            raise

    def troubles(self) -> list[tuple[int, str]]:
        """The exit status and the line of every worker that did not end well."""
        found = []
        for process, connection in self.processes:
            with contextlib.suppress(EOFError):
                if connection.poll():
                    found.append(connection.recv())
                    continue
            if process.exitcode:
                reason = signal.Signals(-process.exitcode).name if process.exitcode < 0 else process.exitcode
                found.append((1, f"worker {process.pid} ended early ({reason})"))
        return sorted(set(found), reverse=True)


def run_workers(study: optuna.Study, job: Job, count: int, progress: Callable[[], None]) -> None:
    """Start ``count`` workers and wait until the study is done.

    Raises:
        UsageError, TuneError: none is left, and it is not done.
    """
    trials = study.get_trials(deepcopy=False)
    if job.to_come(trials) <= 0 and not is_under_way(trials):
        return
    workers = Workers(job, count)
    try:
        while workers.alive():
            progress()
            time.sleep(0.5)
    finally:
        workers.stop()
    progress()
    trials = study.get_trials(deepcopy=False)
    troubles = workers.troubles()
    if job.to_come(trials) <= 0 and not is_under_way(trials):
        for _, line in troubles:
            print(f"Note: {line}; {'its trial was tried again' if 'ended early' in line else 'the others went on'}.")
        return
    status, line = troubles[0] if troubles else (1, "the workers ended early")
    raise UsageError(line) if status == 2 else TuneError(f"{line}; the same command goes on")


class Progress:
    """A line for every trial that ends: its value, how many are done and pruned, the best so far, the time left."""

    def __init__(self, study: optuna.Study, wanted: int) -> None:
        self.study, self.wanted = study, wanted
        trials = study.get_trials(deepcopy=False)
        self.told = {trial.number for trial in trials if trial.state.is_finished()}
        self.before, self.began = finished(trials), time.monotonic()
        if self.before:
            print(f"Going on with {study.study_name}: {self.before} of {wanted} trials are done.", flush=True)

    def __call__(self) -> None:
        trials = self.study.get_trials(deepcopy=False)
        for trial in trials:
            if trial.state.is_finished() and trial.number not in self.told:
                self.told.add(trial.number)
                print(f"{what_became_of(trial)} | {self._summary(trials)}", flush=True)

    def _summary(self, trials: Sequence[FrozenTrial]) -> str:
        done, names = finished(trials), Counter(trial.state.name for trial in trials)
        parts = [f"{done} of {self.wanted} done, {names['PRUNED']} pruned"]
        best = best_trials(self.study)
        if best and "recipe" not in best[0].params:
            parts.append(f"best {best[0].value:.2f} % (trial {best[0].number})")
        if self.before < done < self.wanted:
            left = (time.monotonic() - self.began) / (done - self.before) * (self.wanted - done)
            parts.append(f"about {left / 60:.0f} min left" if left >= 60 else f"about {left:.0f} s left")
        return " | ".join(parts)


def what_became_of(trial: FrozenTrial) -> str:
    """The end of a trial in a few words."""
    head = f"trial {trial.number:<3}"
    if "recipe" in trial.params:
        head += f" {trial.params['recipe']:<13} seed {trial.params['seed']}"
    if trial.state.name == "FAIL":
        return f"{head} lost"
    if "diverged" in trial.user_attrs:
        return f"{head} diverged"
    return f"{head} {trial.value:.2f} %" + (f" after epoch {trial.last_step}" if trial.state.name == "PRUNED" else "")


# ---------------------------------------------------------------------------------------------------------------------
# results
# ---------------------------------------------------------------------------------------------------------------------


def best_trials(study: optuna.Study) -> list[FrozenTrial]:
    """The trials that were trained to the end, best first; of equal ones the first."""
    complete = [trial for trial in study.get_trials(deepcopy=False) if trial.state.name == "COMPLETE"]
    return sorted(complete, key=lambda trial: trial.value or 0.0, reverse=True)


def trial_table(trials: Sequence[FrozenTrial], space: Mapping[str, Any]) -> list[list[str]]:
    """The best trials as columns; rows: number, accuracy, seed, and every setting that was searched in one of them."""
    rows = [
        ["trial", *(str(trial.number) for trial in trials)],
        ["validation [%]", *(f"{trial.value:.2f}" for trial in trials)],
        ["seed", *(str(trial.user_attrs["settings"]["seed"]) for trial in trials)],
    ]
    searched = [key for key in space if any(key in trial.params for trial in trials)]
    return rows + [[key, *(_short(trial.params.get(key)) for trial in trials)] for key in searched]


def _short(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value).lower()


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Columns aligned, the first to the left."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = [f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True)]
        print(f"{row[0]:<{widths[0]}}  {'  '.join(cells)}".rstrip())


def write_settings(path: Path, study: optuna.Study, best: FrozenTrial, data_dir: str | None) -> None:
    """Write what ``main.py --config`` needs to train the trial ``best`` again, bit for bit."""
    settings = best.user_attrs["settings"] | {"name": path.stem}
    if data_dir is not None:
        settings["data_dir"] = data_dir
    made_with = best.user_attrs["environment"]
    done = finished(study.get_trials(deepcopy=False))
    lines = [
        f"# The best of {done} trials of {study.study_name} is trial {best.number}:"
        f" {best.value:.2f} % of {settings['val_split']:,} held-out images.",
        "# " + ", ".join(f"{key} {made_with[key]}" for key in ("torch", "device", "threads", "platform")),
        "# The same network again:                     python main.py --config FILE",
        "# With these settings, on all the images:     python main.py --config FILE --val_split 0",
        *(f"{key} = {json.dumps(value)}" for key, value in settings.items() if value is not None),
    ]
    with atomic_write(path) as file:
        file.write(("\n".join(lines) + "\n").encode())


def write_report(path: Path, study: optuna.Study, tables: Mapping[str, Sequence[Sequence[str]]]) -> None:
    """Write one page with ``tables`` and Optuna's plots of the study, which opens without a network."""
    import optuna
    import plotly.io
    from optuna import visualization

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
    # The better half fills the plots: a trial that learnt nothing would press the others into one line.
    final = [trial.value or 0.0 for trial in better]
    all_epochs = [value for trial in better for value in trial.intermediate_values.values()]
    shown_values = {"History": final, "Accuracy after every epoch": all_epochs, "Each setting by itself": final}
    for heading, values in shown_values.items():
        margin = 0.1 * (max(values) - min(values)) + 0.01
        plots[heading].update_yaxes(range=[min(values) - margin, max(values) + margin])
    plots["Accuracy after every epoch"].update_layout(xaxis={"title": "epochs", "dtick": 1}, yaxis_title=name)

    title = html.escape(f"Tuning of {study.study_name}")
    parts = [f'<!DOCTYPE html><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style><h1>{title}</h1>']
    for heading, rows in tables.items():
        body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}" for cell in row) for row in rows)
        parts.append(f"<h2>{html.escape(heading)}</h2><table>{body}</table>")
    for number, (heading, plot) in enumerate(plots.items()):
        plot.update_layout(title=None, margin={"t": 30})
        parts.append(
            f"<h2>{heading}</h2><div>{plotly.io.to_html(plot, full_html=False, include_plotlyjs=not number)}</div>"
        )
    with atomic_write(path) as file:
        file.write("\n".join(parts).encode())


# ---------------------------------------------------------------------------------------------------------------------
# confirmation
# ---------------------------------------------------------------------------------------------------------------------


def recipes_to_compare(best: FrozenTrial) -> dict[str, dict[str, Any]]:
    """The settings of the trial ``best``, and the specification's for as many epochs of the same network and images."""
    tuned = best.user_attrs["settings"]
    common = {key: tuned[key] for key in ("model", "epochs", "val_split")}
    specification = TrainConfig(**(read_config_file("reference") | common))
    return {"tuned": tuned, "specification": {key: getattr(specification, key) for key in tuned}}


def queue_seeds(study: optuna.Study, seeds: Sequence[int]) -> None:
    """Queue the runs of every recipe and seed that are neither done nor under way nor queued."""
    trials = [trial for trial in study.get_trials(deepcopy=False) if trial.state.name != "FAIL"]
    present = [trial.system_attrs.get("fixed_params", trial.params) for trial in trials]
    for seed in seeds:
        for recipe in study.user_attrs["recipe"]:
            wanted = {"recipe": recipe, "seed": seed}
            if wanted not in present:
                study.enqueue_trial(wanted)


def confirmation_table(study: optuna.Study, seeds: Sequence[int]) -> list[list[str]]:
    """A row a recipe: mean and standard deviation on validation and test images, n; and the difference."""
    from tools.benchmark import mean_and_interval

    accuracies: dict[tuple[str, int], tuple[float, float]] = {}
    for trial in best_trials(study):
        accuracies[trial.params["recipe"], trial.params["seed"]] = trial.value or 0.0, trial.user_attrs["test_accuracy"]
    rows = [["mean and standard deviation [%]", "validation", "test", "n"]]
    for recipe in study.user_attrs["recipe"]:
        found = [accuracies[recipe, seed] for seed in seeds if (recipe, seed) in accuracies]
        spreads = [mean_and_interval([pair[split] for pair in found])[:2] for split in (0, 1) if found]
        cells = [f"{mean:.3f} +- {deviation:.3f}" for mean, deviation in spreads]
        without = f" ({len(seeds) - len(found)} diverged or lost)" if len(found) < len(seeds) else ""
        rows.append([recipe, *(cells or ["-", "-"]), f"{len(found)}{without}"])
    both = [seed for seed in seeds if {("tuned", seed), ("specification", seed)} <= accuracies.keys()]
    if both:
        pairs = [(accuracies["tuned", seed], accuracies["specification", seed]) for seed in both]
        gains = [mean_and_interval([tuned[split] - other[split] for tuned, other in pairs]) for split in (0, 1)]
        cells = [f"{mean:+.3f} +- {half:.3f}" for mean, _, half in gains]
        rows.append(["difference seed by seed, 95 % interval", *cells, str(len(both))])
    return rows


# ---------------------------------------------------------------------------------------------------------------------


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
    signals = StopSignals()
    try:
        with signals:
            args = parser.parse_args(argv)
            check_at_least(args, trials=1, workers=1, confirm=0)
            if args.confirm == 1:
                raise UsageError("confirm: 1 is not allowed; one seed has no spread, it must be at least 2")
            names = {spec.name for spec in fields(TrainConfig)}
            given = {key: value for key, value in vars(args).items() if key in names}
            args.config = getattr(args, "config", None)
            return tune(args, given)
    except UsageError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        print(f"{parser.prog}: stopped; what is finished is kept, and the same command goes on", file=sys.stderr)
        return 128 + (signals.received or signal.SIGINT)
    except ModuleNotFoundError as error:
        print(f"{parser.prog}: {how_to_install(error)}", file=sys.stderr)
        return 1
    except (TuneError, DataError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
