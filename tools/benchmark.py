"""How fast a training step is, and how accurate a recipe is over seeds.

    python -m tools.benchmark throughput
    python -m tools.benchmark throughput --processes 2 --batch_size 512
    python -m tools.benchmark accuracy --model 1 --seeds 10 --scheduler onecycle --epochs 15

``throughput`` trains in turns, a round of each setting after the other in one run, so that a machine whose speed
drifts is as fair to all of them. ``accuracy`` is resumable: a finished seed is never run again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import os
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import Any

from common.cli import OneLineParser, check_at_least, exit_status
from common.files import PROJECT_DIR, CommandError, UsageError, atomic_write
from data_utils import load_images
from image_data.fetch import ensure_mnist
from imports import Figure, FileLock, torch
from model_strategy import get_strategy
from models.receptive_field import receptive_fields
from training.config import TrainConfig, add_training_flags, fields_in
from training.machine import environment, has_bfloat16
from training.setup import prepare_run
from visualization import load_metrics_json

BEST_BATCH = 512  # images a step at which the cores do the most
MATRIX = 2048  # side of the float32 matrix product that stands for what the cores can do


class BenchmarkError(CommandError):
    """A run of the benchmark failed; one line says which and how."""


@dataclass(frozen=True)
class Setting:
    """One way to train that is timed."""

    label: str
    batch_size: int
    naive: bool = False
    kernels: bool = True
    amp: bool = False


def settings_to_compare(batch_size: int) -> list[Setting]:
    """The reference, the command without its kernels and as it is, also at ``BEST_BATCH``, and in bfloat16.

    That is left out where the CPU has none: it would be without kernels once more.
    """
    default = Setting("default", batch_size)
    settings = [
        Setting("naive reference", batch_size, naive=True, kernels=False),
        Setting("--no-kernels", batch_size, kernels=False),
        default,
        replace(default, label=f"--batch_size {BEST_BATCH}", batch_size=BEST_BATCH),
    ]
    if has_bfloat16(torch.device("cpu")):
        settings.append(Setting("--amp", batch_size, amp=True))
    return settings


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
        there.close()  # so that the end of the process is the end of the pipe
        _ask(here, setting)  # it has taken its first steps; one after the other, so as not to disturb each other
        workers.append((setting, here))
    bound_flops = 6 * multiply_adds(model)  # forward, and twice that backward; a multiply-add is two operations
    rates: dict[str, list[float]] = {setting.label: [] for setting in settings}
    bounds: list[float] = []
    for _ in range(args.rounds):
        for setting, worker in workers:
            rates[setting.label].append(_ask(worker, setting, args.images))
        bounds.append(matrix_flops() / bound_flops)
    rows = []
    for setting, worker in workers:
        mine, first = rates[setting.label], rates[settings[0].label]
        rows.append(
            {
                **asdict(setting),
                "images_per_second": [round(rate, 1) for rate in mine],
                "median": round(statistics.median(mine), 1),
                "ratio": round(statistics.median(a / b for a, b in zip(mine, first, strict=True)), 3),
                "share_of_bound": round(statistics.median(a / b for a, b in zip(mine, bounds, strict=True)), 4),
                "peak_mib": _ask(worker, setting, 0),
            }
        )
    return rows


def _ask(worker: Connection, setting: Setting, images: int | None = None) -> Any:
    try:
        if images is not None:
            worker.send(images)
        return worker.recv()
    except (EOFError, BrokenPipeError):
        raise BenchmarkError(f"the process of {setting.label!r} ended early") from None


def _worker(connection: Connection, setting: Setting, model: str, data_dir: str) -> None:
    """Train as ``setting`` says, as many images as each message asks for; answer with images/s. 0 ends it."""
    with tempfile.TemporaryDirectory() as output_dir:
        train = (
            _naive_training(setting, model, data_dir)
            if setting.naive
            else _training(setting, model, data_dir, output_dir)
        )
        train(5)  # compiles, allocates
        connection.send("ready")
        while images := connection.recv():
            began = time.perf_counter()
            done = train(math.ceil(images / setting.batch_size))
            connection.send(done / (time.perf_counter() - began))
    connection.send(_peak_mib())


def _peak_mib() -> int | None:
    """The most memory that this process ever had, in MiB; None where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 << 20 if sys.platform == "darwin" else 1 << 10  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // unit


def _naive_training(setting: Setting, model: str, data_dir: str) -> Callable[[int], int]:
    """A function that takes so many steps of the reference's loop and returns how many images they had."""
    from tools.naive import NaiveTraining

    training = NaiveTraining(data_dir, model, epochs=1000, batch_size=setting.batch_size)
    steps = itertools.chain.from_iterable(training.train_batches() for _ in itertools.count())
    return lambda count: sum(itertools.islice(steps, count))


def _training(setting: Setting, model: str, data_dir: str, output_dir: str) -> Callable[[int], int]:
    """The same for the command's own loop."""
    config = TrainConfig(
        model=model,
        scheduler="onecycle",
        epochs=1000,
        batch_size=setting.batch_size,
        kernels=setting.kernels,
        amp=setting.amp,
        device="cpu",
        data_dir=data_dir,
        output_dir=output_dir,
    )
    config.files.make_folders()
    run = prepare_run(config, torch.device("cpu"))
    batches = itertools.chain.from_iterable(run.data.train for _ in itertools.count())

    def train(count: int) -> int:
        before = run.report.count
        while count > 0:  # an epoch at most, as the loop is asked for
            steps = min(count, len(run.data.train))
            run.train_batches(itertools.islice(batches, steps))
            count -= steps
        run.report.fetch()
        return run.report.count - before

    return train


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


def forward_ms(model: torch.nn.Module, images: int = 1, passes: int = 50) -> float:
    """The median time of ``images`` at once through ``model``, which is in evaluation mode, in milliseconds."""
    batch = torch.zeros(images, 1, 28, 28)
    times = []
    with torch.inference_mode():
        for _ in range(passes + 5):
            began = time.perf_counter()
            model(batch)
            times.append(time.perf_counter() - began)
    return 1000 * statistics.median(times[5:])  # the first passes allocate


def print_throughput(model: str, rows: Sequence[dict[str, Any]]) -> None:
    """One model's rows as a table."""
    print(f"\nmodel {model}: images/s, medians of {len(rows[0]['images_per_second'])} interleaved rounds")
    print(f"{'setting':<34} {'batch':>5} {'images/s':>9} {'min-max':>15} {'ratio':>6} {'of bound':>8} {'peak MiB':>8}")
    for row in rows:
        rates = row["images_per_second"]
        print(
            f"{row['label']:<34} {row['batch_size']:>5} {row['median']:>9,.0f} {min(rates):>8,.0f}-{max(rates):<6,.0f}"
            f" {row['ratio']:>6.2f} {row['share_of_bound']:>8.1%} {row['peak_mib'] or '-':>8}"
        )


def throughput_figure(results: dict[str, Any]) -> Figure:
    """Bars: images/s of each setting, a group a model."""
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    axes = figure.subplots()
    labels = [row["label"] for row in next(iter(results["models"].values()))]
    colors = ["#bdbdbd", "#9ecae1", "#4292c6", "#08519c", "#e6550d"]  # grey, in float32 blue, in bfloat16 orange
    width = 0.8 / len(labels)
    for number, (label, color) in enumerate(zip(labels, colors[: len(labels)], strict=True)):
        rows = [rows[number] for rows in results["models"].values()]
        places = [group + (number - (len(labels) - 1) / 2) * width for group in range(len(rows))]
        medians = [row["median"] for row in rows]
        spread = [
            [row["median"] - min(row["images_per_second"]) for row in rows],
            [max(row["images_per_second"]) - row["median"] for row in rows],
        ]
        bars = axes.bar(places, medians, width=0.95 * width, color=color, label=label, yerr=spread, ecolor="#555555")
        ratios = [f"{row['ratio']:.1f}x" if number else "" for row in rows]
        axes.bar_label(bars, ratios, fontsize=9, padding=2)
    axes.set_xticks(range(len(results["models"])), [f"model {model}" for model in results["models"]])
    axes.set_ylabel("images/s")
    threads, version = results["environment"]["threads"], results["environment"]["torch"]
    axes.set_title(f"Training throughput on {threads} CPU threads, torch {version}: median, min to max")
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=5, fontsize=9)
    axes.margins(y=0.1)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def throughput_of_processes(args: argparse.Namespace) -> int:
    """``--processes N``: whole epochs of the command, by one process of one thread and by N of them, in turns."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={args.processes}"]
    launchers = {"1": [sys.executable], str(args.processes): torchrun}
    models: dict[str, Any] = {}
    for model in args.models:
        rates: dict[str, list[float]] = {count: [] for count in launchers}
        for _ in range(args.rounds):
            for count, launcher in launchers.items():
                rates[count].append(_epoch_rate(launcher, model, args))
        one, many = rates.values()
        ratio = statistics.median(b / a for a, b in zip(one, many, strict=True))
        models[model] = {"images_per_second": rates, "ratio": round(ratio, 3)}
        print(
            f"model {model}, batch {args.batch_size}, one thread a process, {args.rounds} interleaved rounds:"
            f" 1 process {statistics.median(one):,.0f}, {args.processes} processes {statistics.median(many):,.0f}"
            f" images/s, ratio {ratio:.2f}"
        )
    results = {"environment": environment(torch.device("cpu")), "batch_size": args.batch_size, "models": models}
    write_json(args.results / "outputs" / "benchmark_processes.json", results)
    return 0


def _epoch_rate(launcher: Sequence[str], model: str, args: argparse.Namespace) -> float:
    with tempfile.TemporaryDirectory() as output_dir:
        command = [*launcher, str(PROJECT_DIR / "main.py"), "--model", model, "--scheduler", "onecycle"]
        command += ["--epochs", "1", "--threads", "1", "--batch_size", str(args.batch_size), "--name", "run"]
        command += ["--data_dir", str(args.data_dir), "--output_dir", output_dir, "--device", "cpu"]
        _run_quietly(command)
        metrics = load_metrics_json("run", output_dir)
        images = len(load_images(args.data_dir, train=True)[1])
        return images / float(metrics["epoch_seconds"][0])


_under_way: set[subprocess.Popen[str]] = set()


def _run_quietly(command: Sequence[str]) -> str:
    """What ``command`` prints.

    Raises:
        BenchmarkError: it failed.
    """
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=PROJECT_DIR, stdout=pipe, stderr=pipe, text=True) as process:
        _under_way.add(process)
        try:
            out, err = process.communicate()
        finally:
            _under_way.discard(process)
    if process.returncode:
        last_line = (err.strip().splitlines() or ["it printed nothing"])[-1]
        raise BenchmarkError(f"exit status {process.returncode} of {shlex.join(command)}: {last_line}")
    return out


@contextmanager
def stopping_on_sigterm() -> Iterator[None]:
    """Let SIGTERM do what Ctrl-C does, also to the trainings that this process started."""

    def stop(signum: int, frame: FrameType | None) -> None:
        for process in list(_under_way):
            process.terminate()
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# ---------------------------------------------------------------------------------------------------------------------
# accuracy
# ---------------------------------------------------------------------------------------------------------------------

# What does not make a series another one: where its files are, how many cores it had, which of its runs this is.
NOT_OF_A_SERIES = ("seed", *fields_in("machine", "place"))
KNOWN_TO_NAIVE = ("model", "epochs", "scheduler", "max_lr", "batch_size")


def accuracy(args: argparse.Namespace, given: dict[str, Any]) -> int:
    """The subcommand: run the seeds that are missing, several at once, and report the series."""
    config = TrainConfig.from_sources(given, args.config)
    defaults = asdict(TrainConfig(model=config.model))
    recipe = {
        key: value
        for key, value in asdict(config).items()
        if key not in NOT_OF_A_SERIES and (key == "model" or value != defaults[key])
    }
    if args.naive:
        unknown = [key for key in recipe if key not in KNOWN_TO_NAIVE]
        if unknown:
            raise UsageError(f"naive: the reference has no {', '.join(unknown)}; it knows {', '.join(KNOWN_TO_NAIVE)}")
        recipe["naive"] = True
    ensure_mnist(config.data_folder)
    threads = config.threads or max(1, (os.cpu_count() or 1) // args.jobs)
    store = SeriesStore(args.results / "outputs" / "benchmark_accuracy.json", recipe, args.label)
    seeds = [args.first_seed + number for number in range(args.seeds)]
    missing = [seed for seed in seeds if seed not in store.runs]
    print(f"{len(missing)} of {len(seeds)} seeds to run, {args.jobs} at a time, {threads} threads each", flush=True)

    def run(seed: int) -> None:
        if args.naive:
            result = _run_naive(config, seed, threads)
        else:
            result = _run_command(replace(config, seed=seed, threads=threads), args.keep, args.results)
        store.add(seed, result | {"threads": threads, "jobs": args.jobs})
        print(f"seed {seed}: {result['accuracy']:.2f} % in {result['seconds']:.1f} s", flush=True)

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(run, missing))
    print_series(store.label, [store.runs[seed] for seed in seeds])
    write_figure(args.results / "plots" / "benchmark_accuracy.png", accuracy_figure(store.all_series))
    return 0


class SeriesStore:
    """The series in ``path``, and the one among them of the recipe ``recipe``.

    Every finished run is written at once, and read again before, so that several benchmarks may write in turns.
    """

    def __init__(self, path: Path, recipe: dict[str, Any], label: str | None) -> None:
        self.path, self.recipe = path, recipe
        path.parent.mkdir(parents=True, exist_ok=True)
        self.thread_lock = threading.Lock()
        with self._alone():
            self._read()
            self.entry["label"] = label or self.entry.get("label") or _describe(recipe)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        # the file's lock keeps other processes out, but not other threads of this one
        with self.thread_lock, FileLock(self.path.with_name(f".{self.path.name}.lock")):
            yield

    def _read(self) -> None:
        self.all_series: list[dict[str, Any]] = []
        if self.path.exists():
            self.all_series = json.loads(self.path.read_text(encoding="utf-8"))
        found = [entry for entry in self.all_series if entry["recipe"] == self.recipe]
        self.entry: dict[str, Any] = found[0] if found else {"label": None, "recipe": self.recipe, "runs": {}}
        if not found:
            self.all_series.append(self.entry)

    @property
    def label(self) -> str:
        """What the series is called."""
        return str(self.entry["label"])

    @property
    def runs(self) -> dict[int, dict[str, Any]]:
        """Seed -> its finished run."""
        return {int(seed): run for seed, run in self.entry["runs"].items()}

    def add(self, seed: int, run: dict[str, Any]) -> None:
        """Record a finished run."""
        with self._alone():
            label = self.label
            self._read()
            self.entry["label"] = label
            self.entry["runs"][str(seed)] = run
            write_json(self.path, self.all_series)


def _describe(recipe: dict[str, Any]) -> str:
    changed = [f"{key} {value}" for key, value in recipe.items() if key != "model"]
    return ", ".join([f"model {recipe['model']}", *changed])


def train_in_a_process(config: TrainConfig) -> float:
    """Train by the command itself, in a process of its own. Returns the seconds that the whole command took.

    Raises:
        BenchmarkError: it failed.
    """
    settings = asdict(config) | {"data_dir": str(config.data_folder.resolve())}
    if config.output_dir is not None:  # the command runs in the project's folder
        settings["output_dir"] = str(Path(config.output_dir).resolve())
    with tempfile.TemporaryDirectory() as folder:
        config_file = Path(folder) / "run.toml"
        config_file.write_text("".join(f"{k} = {json.dumps(v)}\n" for k, v in settings.items() if v is not None))
        began = time.perf_counter()
        _run_quietly([sys.executable, str(PROJECT_DIR / "main.py"), "--config", str(config_file)])
        return time.perf_counter() - began


def _run_command(config: TrainConfig, keep: str | None, folder: Path) -> dict[str, Any]:
    """Train once by the command; with ``keep`` its files stay in ``folder``, under that name and the seed's."""
    with tempfile.TemporaryDirectory() as nowhere:
        name, output_dir = ("run", nowhere) if keep is None else (f"{keep}_seed_{config.seed}", str(folder))
        wall = train_in_a_process(replace(config, name=name, output_dir=output_dir))
        metrics = load_metrics_json(name, output_dir)
    split = "val" if config.val_split else "test"
    return {
        "accuracy": metrics[f"{split}_acc"][-1],
        "seconds": metrics["total_seconds"],  # from the first batch to the last evaluation
        "wall_seconds": round(wall, 3),  # of the whole command
        "environment": metrics["environment"],
    }


def _run_naive(config: TrainConfig, seed: int, threads: int) -> dict[str, float]:
    """Train once by the naive reference, in a process of its own."""
    settings = {key: getattr(config, key) for key in KNOWN_TO_NAIVE}
    settings |= {"seed": seed, "threads": threads, "data_dir": config.data_folder.resolve()}
    flags = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    result: dict[str, float] = json.loads(_run_quietly([sys.executable, "-m", "tools.naive", *flags]))
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
    """A dot a run, a bar from one end of the mean's 95 % interval to the other, a row a series.

    The bar is left out below three runs: that of two is wider than all the others together.
    """
    series = sorted((entry for entry in all_series if entry["runs"]), key=lambda entry: str(entry["label"]))
    figure = Figure(figsize=(9, 1.2 + 0.45 * len(series)), layout="constrained")
    axes = figure.subplots()
    for row, entry in enumerate(series):
        values = [run["accuracy"] for run in entry["runs"].values()]
        axes.plot(values, [row] * len(values), "o", color="#4292c6", alpha=0.5, markersize=6)
        mean, _, half = mean_and_interval(values)
        if len(values) > 2:
            axes.errorbar(mean, row, xerr=half, fmt="|", color="#08306b", markersize=16, capsize=4)
    held_out = [", held-out images" if entry["recipe"].get("val_split") else "" for entry in series]
    labels = [f"{entry['label']}{on} (n={len(entry['runs'])})" for entry, on in zip(series, held_out, strict=True)]
    axes.set_yticks(range(len(series)), labels)
    axes.set_ylim(len(series) - 0.4, -0.6)
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
    series.add_argument("--keep", metavar="NAME", default=None, help="keep the networks, as runs NAME_seed_SEED")
    series.add_argument("--naive", action="store_true", default=False, help="train with the naive reference instead")
    add_training_flags(series, leave_out=("seed", "name", "output_dir"))
    for command in (speed, series):
        command.add_argument("--output_dir", dest="results", type=Path, default=PROJECT_DIR)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns its exit status."""
    parser = get_args_parser()
    args = parser.parse_args(argv)
    with stopping_on_sigterm():
        return exit_status(parser, lambda: run(args), "interrupted; what is finished is kept")


def run(args: argparse.Namespace) -> int:
    """The subcommand that the arguments name."""
    check_at_least(args, rounds=1, images=1, batch_size=1, seeds=1, jobs=1)
    if args.command == "throughput":
        if args.processes < 0 or args.processes == 1:
            raise UsageError(f"processes: {args.processes} is not allowed; it must be at least 2")
        return throughput(args)
    names = {spec.name for spec in fields(TrainConfig)}
    given = {key: value for key, value in vars(args).items() if key in names}
    args.config = getattr(args, "config", None)
    return accuracy(args, given)


if __name__ == "__main__":
    sys.exit(main())
