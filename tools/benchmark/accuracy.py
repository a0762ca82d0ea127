"""How accurate a recipe is over seeds. Resumable: a finished seed is never run again."""

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from common.cli import silent
from common.files import DamagedFileError, RunFiles, UsageError
from image_data.facts import MNIST, facts_of
from imports import Figure, FileLock
from tools.intervals import mean_and_interval
from tools.output import panels, write_figure, write_json
from tools.timing import seconds_of
from tools.trainings import run_with, threads_each, train_in_a_process
from training.config import TrainConfig, fields_in
from training.machine import resolve_device
from training.together import train_together
from visualization import load_metrics_json

# What does not make a series another one: where its files are, how many cores it had, which of its runs this is.
NOT_OF_A_SERIES = ("seed", *fields_in("machine", "place"))
KNOWN_TO_NAIVE = ("model", "epochs", "scheduler", "max_lr", "batch_size")


def accuracy(args: argparse.Namespace, config: TrainConfig) -> int:
    """The subcommand: run the seeds that are missing, several at once, and report the series."""
    defaults = asdict(TrainConfig(model=config.model))
    recipe = {
        key: value
        for key, value in asdict(config).items()
        if key not in NOT_OF_A_SERIES and (key == "model" or value != defaults[key])
    }
    if args.naive:
        if unknown := [key for key in recipe if key not in KNOWN_TO_NAIVE]:
            raise UsageError(f"naive: the reference has no {', '.join(unknown)}; it knows {', '.join(KNOWN_TO_NAIVE)}")
        recipe["naive"] = True
    if args.together > 1 and (args.naive or args.jobs > 1):
        raise UsageError("together: not allowed with --naive or --jobs; those are trainings in processes of their own")
    device = resolve_device(config.device)
    if device.type != "cpu":
        recipe["device"] = device.type
    data = facts_of(config.ensure_data())
    if data.sha256 != MNIST.sha256:
        recipe["data"] = f"{data.name} {data.sha256[:12]}"
    threads = config.threads or threads_each(args.jobs)
    store = SeriesStore(args.results / "outputs" / "benchmark_accuracy.json", recipe, args.label)
    seeds = [args.first_seed + number for number in range(args.seeds)]

    def is_there(seed: int) -> bool:
        kept = args.keep is None or RunFiles(f"{args.keep}_seed_{seed}", args.results).params.exists()
        return kept and str(seed) in store.by_seed

    missing = [seed for seed in seeds if not is_there(seed)]
    at_once = max(args.jobs, args.together)
    print(f"{len(missing)} of {len(seeds)} seeds to run, {at_once} at a time, {threads} threads each", flush=True)

    def run(group: Sequence[int]) -> None:
        runs = [replace(config, seed=seed, threads=threads) for seed in group]
        if args.naive:
            results = [json.loads(run_with(run, "-m", "tools.naive")) for run in runs]
        else:
            results = _train(runs, args.keep, args.results)
        for seed, result in zip(group, results, strict=True):
            store.add(seed, result | {"threads": threads, "jobs": args.jobs, "together": len(group)})
            print(f"seed {seed}: {result['accuracy']:.2f} % in {result['seconds']:.1f} s", flush=True)

    groups = [missing[start : start + args.together] for start in range(0, len(missing), args.together)]
    with ThreadPoolExecutor(args.jobs) as pool:  # what is trained here is so by the main thread, which signals stop
        list(map(run, groups) if args.together > 1 else pool.map(run, groups))
    runs = [store.by_seed[str(seed)] for seed in seeds]
    mean, deviation, half = mean_and_interval([run["accuracy"] for run in runs])
    seconds = [run["seconds"] for run in runs]
    print(
        f"{store.label}: {mean:.3f} % +- {half:.3f} (95 % interval), standard deviation {deviation:.3f},"
        f" n = {len(runs)}; training median {statistics.median(seconds):.1f} s ({min(seconds):.1f}-{max(seconds):.1f})"
    )
    write_figure(args.results / "plots" / "benchmark_accuracy.png", accuracy_figure(store.all_series))
    return 0


class SeriesStore:
    """The series in ``path``, and the one among them of the recipe ``recipe``.

    Every finished run is written at once, and read again before, so that several benchmarks may write in turns.
    """

    def __init__(self, path: Path, recipe: dict[str, Any], label: str | None) -> None:
        self.path, self.recipe, self.label = path, recipe, label or ""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.alone = FileLock(path.with_name(f".{path.name}.lock"))  # keeps other processes and other threads out
        with self.alone:
            self._read()

    def _read(self) -> None:
        self.all_series: list[dict[str, Any]] = []
        if self.path.exists():
            try:
                self.all_series = json.loads(self.path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise DamagedFileError(f"{self.path} is damaged: {error}") from None
        entry = next((entry for entry in self.all_series if entry["recipe"] == self.recipe), None)
        if entry is None:
            words = [f"model {self.recipe['model']}", *(f"{k} {v}" for k, v in self.recipe.items() if k != "model")]
            entry = {"label": ", ".join(words), "recipe": self.recipe, "runs": {}}
            self.all_series.append(entry)
        self.label = entry["label"] = self.label or entry["label"]
        self.by_seed = entry["runs"]

    def add(self, seed: int, run: dict[str, Any]) -> None:
        with self.alone:
            self._read()
            self.by_seed[str(seed)] = run
            write_json(self.path, self.all_series)


def _train(configs: Sequence[TrainConfig], keep: str | None, folder: Path) -> list[dict[str, Any]]:
    """Train one by the command, several together here; with ``keep`` their files stay in ``folder``, under that name
    and the seed's."""
    with tempfile.TemporaryDirectory() as nowhere:
        output_dir = nowhere if keep is None else str(folder)
        runs = [replace(run, name=f"{keep or 'run'}_seed_{run.seed}", output_dir=output_dir) for run in configs]
        wall = seconds_of(lambda: train_together(runs, silent) if len(runs) > 1 else train_in_a_process(runs[0]))
        all_metrics = [load_metrics_json(run.run_name, output_dir) for run in runs]
    split = "val" if configs[0].val_split else "test"
    return [
        {
            "accuracy": metrics[f"{split}_acc"][-1],
            "seconds": metrics["total_seconds"],  # from the first batch to the last evaluation
            "wall_seconds": round(wall, 3),  # of the whole command, or of all that were trained together
            "environment": metrics["environment"],
        }
        for metrics in all_metrics
    ]


def accuracy_figure(all_series: Sequence[dict[str, Any]]) -> Figure:
    """A dot a run, a bar from one end of the mean's 95 % interval to the other, a row a series.

    The bar is left out below three runs: that of two is wider than all the others together.
    """
    series = sorted((entry for entry in all_series if entry["runs"]), key=lambda entry: str(entry["label"]))
    (figure, axes), labels = panels(9, 1.2 + 0.45 * len(series), grid="x"), []
    for row, entry in enumerate(series):
        values = [run["accuracy"] for run in entry["runs"].values()]
        axes.plot(values, [row] * len(values), "o", color="#4292c6", alpha=0.5, markersize=6)
        mean, _, half = mean_and_interval(values)
        if len(values) > 2:
            axes.errorbar(mean, row, xerr=half, fmt="|", color="#08306b", markersize=16, capsize=4)
        held_out = ", held-out images" if entry["recipe"].get("val_split") else ""
        labels.append(f"{entry['label']}{held_out} (n={len(values)})")
    axes.set_yticks(range(len(series)), labels)
    axes.set_ylim(len(series) - 0.4, -0.6)
    axes.set_xlabel("accuracy at the last epoch [%]: each seed, the mean and its 95 % interval")
    return figure
