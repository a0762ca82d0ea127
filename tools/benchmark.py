"""How fast a training step is, and how accurate a recipe is over seeds.

    python -m tools.benchmark throughput
    python -m tools.benchmark throughput --processes 2 --batch_size 512
    python -m tools.benchmark accuracy --model 1 --seeds 10 --scheduler onecycle --epochs 15

``throughput`` trains in turns, a round of each setting after the other in one run, so that a machine whose speed
drifts is as fair to all of them. ``accuracy`` is resumable: a finished seed is never run again.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from file_utils import PROJECT_DIR, UsageError, atomic_write
from imports import Figure, torch
from main import OneLineParser, add_training_flags
from mnist_files import ensure_mnist
from model_strategy import get_strategy
from models.receptive_field import receptive_fields
from train_config import TrainConfig
from trainer import StepRecorder, environment, prepare_run
from visualization import load_metrics_json

MATRIX = 2048  # side of the float32 matrix product that stands for what the cores can do


@dataclass(frozen=True)
class Setting:
    """One way to train that is timed."""

    label: str
    batch_size: int
    naive: bool = False
    amp: bool = False
    compile: bool = False


def settings_to_compare(batch_size: int) -> list[Setting]:
    """The reference, the command as it is, its best flags, and those at the batch size that suits them best."""
    return [
        Setting("naive reference", batch_size, naive=True),
        Setting("default", batch_size),
        Setting("--amp --compile", batch_size, amp=True, compile=True),
        Setting("--amp --compile --batch_size 512", 512, amp=True, compile=True),
    ]


# ---------------------------------------------------------------------------------------------------------------------
# throughput
# ---------------------------------------------------------------------------------------------------------------------


def throughput(args: argparse.Namespace) -> int:
    """The subcommand: time, print a table, write the JSON and the chart."""
    ensure_mnist(args.data_dir)
    if args.processes:
        return throughput_of_processes(args)
    results: dict[str, Any] = {"environment": environment(torch.device("cpu")), "rounds": args.rounds, "models": {}}
    for model in args.models:
        rows = time_settings(model, settings_to_compare(args.batch_size), args)
        results["models"][model] = rows
        print_throughput(model, rows)
    write_json(args.results / "outputs" / "benchmark_throughput.json", results)
    write_figure(args.results / "plots" / "benchmark_throughput.png", throughput_figure(results))
    return 0


def time_settings(model: str, settings: Sequence[Setting], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Time ``settings`` in turns, each in a process of its own that waits while another works.

    Returns:
        A row a setting: images/s of every round and their median, the ratio to the first setting and to the cores'
        bound (medians of the ratios round by round), and the process's peak memory in MiB.
    """
    context = multiprocessing.get_context("spawn")
    workers: list[tuple[Setting, Connection]] = []
    for setting in settings:
        here, there = context.Pipe()
        context.Process(target=_worker, args=(there, setting, model, str(args.data_dir)), daemon=True).start()
        here.recv()  # it has taken its first steps; one after the other, so that they do not disturb each other
        workers.append((setting, here))
    bound_flops = 6 * multiply_adds(model)  # forward, and twice that backward; a multiply-add is two operations
    rates: dict[str, list[float]] = {setting.label: [] for setting in settings}
    bounds: list[float] = []
    for _ in range(args.rounds):
        for setting, worker in workers:
            worker.send(args.images)
            rates[setting.label].append(worker.recv())
        bounds.append(matrix_flops() / bound_flops)
    rows = []
    for setting, worker in workers:
        worker.send(0)
        mine, first = rates[setting.label], rates[settings[0].label]
        rows.append(
            {
                **asdict(setting),
                "images_per_second": [round(rate, 1) for rate in mine],
                "median": round(statistics.median(mine), 1),
                "ratio": round(statistics.median(a / b for a, b in zip(mine, first, strict=True)), 3),
                "share_of_bound": round(statistics.median(a / b for a, b in zip(mine, bounds, strict=True)), 4),
                "peak_mib": worker.recv(),
            }
        )
    return rows


def _worker(connection: Connection, setting: Setting, model: str, data_dir: str) -> None:
    """Train as ``setting`` says, as many images as each message asks for; answer with images/s. 0 ends it."""
    with tempfile.TemporaryDirectory() as output_dir:
        steps = (
            _naive_steps(setting, model, data_dir) if setting.naive else _steps(setting, model, data_dir, output_dir)
        )
        for _ in range(5):  # compiles, allocates
            next(steps)
        connection.send("ready")
        while images := connection.recv():
            began, done = time.perf_counter(), 0
            while done < images:
                done += next(steps)
            connection.send(done / (time.perf_counter() - began))
    connection.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)


def _naive_steps(setting: Setting, model: str, data_dir: str) -> Iterator[int]:
    from tools.naive import NaiveTraining

    training = NaiveTraining(data_dir, model, epochs=1000, batch_size=setting.batch_size)
    while True:
        yield from training.train_batches()


def _steps(setting: Setting, model: str, data_dir: str, output_dir: str) -> Iterator[int]:
    config = TrainConfig(
        model=model,
        scheduler="onecycle",
        epochs=1000,
        batch_size=setting.batch_size,
        amp=setting.amp,
        compile=setting.compile,
        device="cpu",
        data_dir=data_dir,
        output_dir=output_dir,
    )
    run = prepare_run(config, torch.device("cpu"))
    while True:
        with StepRecorder(run, 0) as recorder:
            for batch in run.data.train:
                run.train_batches([batch], recorder)
                yield len(batch[1])


def multiply_adds(model: str) -> int:
    """Multiply-adds of one image's forward pass through the convolutions and linear layers."""
    rows = receptive_fields(get_strategy(model).build())
    return sum(row.parameters * row.output[1] * row.output[2] for row in rows if row.kind in ("Conv2d", "Linear"))


def matrix_flops() -> float:
    """Floating-point operations a second of a large float32 matrix product, the best of three."""
    left, right = torch.rand(MATRIX, MATRIX), torch.rand(MATRIX, MATRIX)
    best = math.inf
    for _ in range(3):
        began = time.perf_counter()
        left @ right
        best = min(best, time.perf_counter() - began)
    return 2 * MATRIX**3 / best


def print_throughput(model: str, rows: Sequence[dict[str, Any]]) -> None:
    """One model's rows as a table."""
    print(f"\nmodel {model}: images/s, medians of {len(rows[0]['images_per_second'])} interleaved rounds")
    print(f"{'setting':<34} {'batch':>5} {'images/s':>9} {'min-max':>15} {'ratio':>6} {'of bound':>8} {'peak MiB':>8}")
    for row in rows:
        rates = row["images_per_second"]
        print(
            f"{row['label']:<34} {row['batch_size']:>5} {row['median']:>9,.0f} {min(rates):>8,.0f}-{max(rates):<6,.0f}"
            f" {row['ratio']:>6.2f} {row['share_of_bound']:>8.1%} {row['peak_mib']:>8}"
        )


def throughput_figure(results: dict[str, Any]) -> Figure:
    """Bars: images/s of each setting, a group a model."""
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    axes = figure.subplots()
    labels = [row["label"] for row in next(iter(results["models"].values()))]
    colors = ["#bdbdbd", "#9ecae1", "#4292c6", "#08519c"]
    for number, (label, color) in enumerate(zip(labels, colors, strict=True)):
        rows = [rows[number] for rows in results["models"].values()]
        places = [group + (number - 1.5) * 0.2 for group in range(len(rows))]
        medians = [row["median"] for row in rows]
        spread = [
            [row["median"] - min(row["images_per_second"]) for row in rows],
            [max(row["images_per_second"]) - row["median"] for row in rows],
        ]
        bars = axes.bar(places, medians, width=0.19, color=color, label=label, yerr=spread, ecolor="#555555")
        ratios = [f"{row['ratio']:.1f}x" if number else "" for row in rows]
        axes.bar_label(bars, ratios, fontsize=9, padding=2)
    axes.set_xticks(range(len(results["models"])), [f"model {model}" for model in results["models"]])
    axes.set_ylabel("images/s")
    threads, version = results["environment"]["threads"], results["environment"]["torch"]
    axes.set_title(f"Training throughput on {threads} CPU threads, torch {version}: median, min to max")
    axes.legend(frameon=False, loc="upper left", fontsize=9)
    axes.margins(y=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def throughput_of_processes(args: argparse.Namespace) -> int:
    """``--processes N``: whole epochs of the command, by one process of one thread and by N of them, in turns."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={args.processes}"]
    launchers = {"1 process": [sys.executable], f"{args.processes} processes": torchrun}
    for model in args.models:
        rates: dict[str, list[float]] = {label: [] for label in launchers}
        for _ in range(args.rounds):
            for label, launcher in launchers.items():
                rates[label].append(_epoch_rate(launcher, model, args))
        (first, one), (second, many) = rates.items()
        ratio = statistics.median(b / a for a, b in zip(one, many, strict=True))
        print(
            f"model {model}, batch {args.batch_size}, one thread a process, {args.rounds} interleaved rounds:"
            f" {first} {statistics.median(one):,.0f}, {second} {statistics.median(many):,.0f} images/s,"
            f" ratio {ratio:.2f}"
        )
    return 0


def _epoch_rate(launcher: Sequence[str], model: str, args: argparse.Namespace) -> float:
    with tempfile.TemporaryDirectory() as output_dir:
        command = [*launcher, str(PROJECT_DIR / "main.py"), "--model", model, "--scheduler", "onecycle"]
        command += ["--epochs", "1", "--threads", "1", "--batch_size", str(args.batch_size), "--name", "run"]
        command += ["--data_dir", str(args.data_dir), "--output_dir", output_dir]
        subprocess.run(command, check=True, capture_output=True)
        metrics = load_metrics_json("run", output_dir)
        return 60_000 / float(metrics["epoch_seconds"][0])


# ---------------------------------------------------------------------------------------------------------------------
# accuracy
# ---------------------------------------------------------------------------------------------------------------------

# What does not make a series another one: where its files are, and which of its runs this is.
NOT_OF_A_SERIES = ("seed", "name", "data_dir", "output_dir", "threads")


def accuracy(args: argparse.Namespace, given: dict[str, Any]) -> int:
    """The subcommand: run the seeds that are missing, several at once, and report the series."""
    config = TrainConfig.from_sources(given, args.config)
    ensure_mnist(config.data_folder)
    threads = args.threads or max(1, (os.cpu_count() or 1) // args.jobs)
    series = {key: value for key, value in asdict(config).items() if key not in NOT_OF_A_SERIES}
    series |= {"naive": args.naive, "threads": threads, "jobs": args.jobs}
    store = SeriesStore(args.results / "outputs" / "benchmark_accuracy.json", series, args.label)
    seeds = [args.first_seed + number for number in range(args.seeds)]
    missing = [seed for seed in seeds if seed not in store.runs]
    print(f"{len(missing)} of {len(seeds)} seeds to run, {args.jobs} at a time, {threads} threads each", flush=True)

    def run(seed: int) -> None:
        result = _run_naive(config, seed, threads) if args.naive else _run_command(config, seed, threads)
        store.add(seed, result)
        print(f"seed {seed}: {result['accuracy']:.2f} % in {result['seconds']:.1f} s", flush=True)

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(run, missing))
    print_series(store.label, [store.runs[seed] for seed in seeds])
    write_figure(args.results / "plots" / "benchmark_accuracy.png", accuracy_figure(store.all_series))
    return 0


class SeriesStore:
    """The series in ``path``, and the one among them whose settings are ``series``. Every finished run is written."""

    def __init__(self, path: Path, series: dict[str, Any], label: str | None) -> None:
        self.path, self.lock = path, threading.Lock()
        self.all_series: list[dict[str, Any]] = json.loads(path.read_text("utf-8")) if path.exists() else []
        found = [entry for entry in self.all_series if entry["settings"] == series]
        if not found:
            found = [{"label": label or _describe(series), "settings": series, "runs": {}}]
            self.all_series += found
        self.entry = found[0]
        self.entry["label"] = label or self.entry["label"]
        self.entry["environment"] = environment(torch.device("cpu")) | {"threads": series["threads"]}

    @property
    def label(self) -> str:
        return str(self.entry["label"])

    @property
    def runs(self) -> dict[int, dict[str, float]]:
        return {int(seed): run for seed, run in self.entry["runs"].items()}

    def add(self, seed: int, run: dict[str, float]) -> None:
        with self.lock:  # several seeds may finish at once
            self.entry["runs"][str(seed)] = run
            write_json(self.path, self.all_series)


def _describe(series: dict[str, Any]) -> str:
    defaults = asdict(TrainConfig())
    changed = [f"{key} {value}" for key, value in series.items() if key in defaults and value != defaults[key]]
    return ", ".join([f"model {series['model']}", *changed[:4]])


def _run_command(config: TrainConfig, seed: int, threads: int) -> dict[str, float]:
    """Train once by the command itself, in a process of its own."""
    with tempfile.TemporaryDirectory() as output_dir:
        settings = asdict(config) | {"seed": seed, "threads": threads, "name": "run", "output_dir": output_dir}
        config_file = Path(output_dir) / "run.toml"
        config_file.write_text("".join(f"{k} = {json.dumps(v)}\n" for k, v in settings.items() if v is not None))
        command = [sys.executable, str(PROJECT_DIR / "main.py"), "--config", str(config_file)]
        began = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"seed {seed} failed: {shlex.join(command)}: {done.stderr.strip()}")
        wall = time.perf_counter() - began
        metrics = load_metrics_json("run", output_dir)
    split = "val" if config.val_split else "test"
    return {
        "accuracy": metrics[f"{split}_acc"][-1],
        "seconds": metrics["total_seconds"],
        "wall_seconds": round(wall, 3),
    }


def _run_naive(config: TrainConfig, seed: int, threads: int) -> dict[str, float]:
    """Train once by the naive reference, in a process of its own."""
    settings = {"model": config.model, "epochs": config.epochs, "scheduler": config.scheduler, "max_lr": config.max_lr}
    settings |= {"batch_size": config.batch_size, "seed": seed, "threads": threads, "data_dir": config.data_folder}
    flags = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    command = [sys.executable, "-m", "tools.naive", *flags]
    done = subprocess.run(command, cwd=PROJECT_DIR, capture_output=True, text=True, check=True)
    result: dict[str, float] = json.loads(done.stdout)
    return result


def mean_and_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean, sample standard deviation, and half the width of Student's 95 % interval of the mean."""
    from scipy.stats import t

    mean = statistics.mean(values)
    if len(values) < 2:
        return mean, math.nan, math.nan
    deviation = statistics.stdev(values)
    return mean, deviation, float(t.ppf(0.975, len(values) - 1)) * deviation / math.sqrt(len(values))


def print_series(label: str, runs: Sequence[dict[str, float]]) -> None:
    """Mean, spread and interval of the accuracy, and the seconds."""
    mean, deviation, half = mean_and_interval([run["accuracy"] for run in runs])
    seconds = [run["seconds"] for run in runs]
    print(
        f"{label}: {mean:.3f} % +- {half:.3f} (95 % interval), standard deviation {deviation:.3f}, n = {len(runs)};"
        f" training median {statistics.median(seconds):.1f} s ({min(seconds):.1f}-{max(seconds):.1f})"
    )


def accuracy_figure(all_series: Sequence[dict[str, Any]]) -> Figure:
    """A dot a run, a bar from one end of the mean's 95 % interval to the other, a row a series."""
    figure = Figure(figsize=(9, 1.2 + 0.45 * len(all_series)), layout="constrained")
    axes = figure.subplots()
    for row, entry in enumerate(all_series):
        values = [run["accuracy"] for run in entry["runs"].values()]
        axes.plot(values, [row] * len(values), "o", color="#4292c6", alpha=0.5, markersize=6)
        mean, _, half = mean_and_interval(values)
        if not math.isnan(half):
            axes.errorbar(mean, row, xerr=half, fmt="|", color="#08306b", markersize=16, capsize=4)
    axes.set_yticks(range(len(all_series)), [f"{entry['label']} (n={len(entry['runs'])})" for entry in all_series])
    axes.set_ylim(len(all_series) - 0.4, -0.6)
    axes.set_xlabel("accuracy at the last epoch [%]: each seed, the mean and its 95 % interval")
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


# ---------------------------------------------------------------------------------------------------------------------


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` to ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write((json.dumps(value, indent=1) + "\n").encode())


def write_figure(path: Path, figure: Figure) -> None:
    """Write ``figure`` to ``path`` as PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=120)


def get_args_parser() -> argparse.ArgumentParser:
    """The two subcommands and their flags."""
    parser = OneLineParser(description="Speed of a training step, accuracy of a recipe.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=OneLineParser)

    speed = commands.add_parser("throughput", help="images/s of the default and the best flags against a naive loop")
    speed.add_argument("--models", nargs="+", choices=["1", "2", "3"], default=["1", "2", "3"])
    speed.add_argument("--batch_size", type=int, default=128)
    speed.add_argument("--rounds", type=int, default=7, help="interleaved rounds (7)")
    speed.add_argument("--images", type=int, default=5120, help="images a round and setting (5120)")
    speed.add_argument("--processes", type=int, default=0, help="instead: 1 process against this many under torchrun")
    speed.add_argument("--data_dir", type=Path, default=PROJECT_DIR / "data")

    series = commands.add_parser("accuracy", help="a recipe over seeds", argument_default=argparse.SUPPRESS)
    series.add_argument("--seeds", type=int, default=10, help="how many (10)")
    series.add_argument("--first_seed", type=int, default=1, help="the first of them (1)")
    series.add_argument("--jobs", type=int, default=1, help="how many at once, the threads divided among them (1)")
    series.add_argument("--label", default=None, help="what the series is called in the plot")
    series.add_argument("--naive", action="store_true", default=False, help="train with the naive reference instead")
    add_training_flags(series, leave_out=("seed", "name", "output_dir"))
    for command in (speed, series):
        command.add_argument("--output_dir", dest="results", type=Path, default=PROJECT_DIR)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns its exit status."""
    parser = get_args_parser()
    args = parser.parse_args(argv)
    try:
        for name in ("rounds", "images", "batch_size", "seeds", "jobs"):
            if getattr(args, name, 1) < 1:
                raise UsageError(f"{name}: {getattr(args, name)} is not allowed; it must be at least 1")
        if args.command == "throughput":
            return throughput(args)
        names = {spec.name for spec in fields(TrainConfig)}
        given = {key: value for key, value in vars(args).items() if key in names}
        args.config, args.threads = getattr(args, "config", None), given.get("threads")
        return accuracy(args, given)
    except UsageError as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
