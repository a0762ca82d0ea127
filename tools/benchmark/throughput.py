"""How fast a training step is: images/s of each way to train, in turns.

Each way has a process of its own, and a round of each follows after the other, so that a machine whose speed drifts is
as fair to all of them. A GPU has done all that it was asked to before a clock is read.

Two bounds are measured on the same device. That of the arithmetic: a large float32 matrix product, against the
multiply-adds of convolutions and linear layers, one pass forward and two back. That of the memory: a large copy,
against the least that is moved: the output of each of those layers is written, read by the next layer and once more by
its backward pass, and the output's gradient is written and read.
"""

import argparse
import itertools
import math
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from common.cli import silent
from common.files import CommandError
from data_utils import load_images
from image_data.fetch import ensure_mnist
from imports import torch
from model_strategy import get_strategy
from models.receptive_field import receptive_fields
from tools.naive import NaiveTraining
from tools.output import rendered, write_json
from tools.timing import copied_bytes, matrix_flops, synchronize
from training.config import TrainConfig
from training.machine import environment, has_bfloat16, resolve_device
from training.setup import prepare_run
from training.step import train_one_epoch

BEST_BATCH = 512  # images a step at which the cores do the most


@dataclass(frozen=True)
class Setting:
    label: str
    batch_size: int
    naive: bool = False
    kernels: bool = True
    graph: bool = True
    amp: bool = False


def settings_to_compare(batch_size: int, device: torch.device) -> list[Setting]:
    """The reference, the command without its fast step and as it is, also at ``BEST_BATCH``, in bfloat16.

    What has no effect on ``device`` is left out.
    """
    default, on_cpu = Setting("default", batch_size), device.type == "cpu"
    settings = [
        Setting("naive reference", batch_size, naive=True, kernels=False, graph=on_cpu),
        Setting("--no-kernels", batch_size, kernels=False),
        default,
        replace(default, label=f"--batch_size {BEST_BATCH}", batch_size=BEST_BATCH),
    ]
    if has_bfloat16(device):
        settings.append(Setting("--amp", batch_size, amp=True))
    if not on_cpu:
        settings.append(Setting("--no-graph", batch_size, graph=False))
    return settings


def throughput(args: argparse.Namespace) -> int:
    """The subcommand: time, print a table, write the JSON."""
    device = resolve_device(args.device)
    ensure_mnist(args.data_dir)
    results: dict[str, Any] = {"environment": environment(device), "rounds": args.rounds, "models": {}}
    for model in args.models:
        try:
            rows = time_settings(model, settings_to_compare(args.batch_size, device), args)
        except BrokenProcessPool:
            raise CommandError(f"a process that trained model {model} ended early") from None
        results["models"][model] = rows
        print(rendered(Path(__file__).with_suffix(".txt"), model=model, rows=rows), end="")
    name = "benchmark_throughput" if device.type == "cpu" else f"benchmark_throughput_{device.type}"
    write_json(args.results / "outputs" / f"{name}.json", results)
    return 0


def time_settings(model: str, settings: Sequence[Setting], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Time ``settings`` in turns, each in a process of its own that waits while another works.

    Returns:
        A row a setting: seconds to the end of the first batch (data, compilation, recording), images/s of every round
        and their median, seconds an epoch, the ratio to the first setting and to the two bounds (medians of the ratios
        round by round), and the peak memory in MiB: of the process, or what it allocated on the GPU.
    """
    device, spawn = resolve_device(args.device), multiprocessing.get_context("spawn")
    epoch_images = len(load_images(args.data_dir, train=True)[1])
    pools = [ProcessPoolExecutor(1, spawn) for _ in settings]
    begun = (model, str(args.data_dir), args.device)
    first_batches = [pool.submit(_begin, which, *begun).result() for which, pool in zip(settings, pools, strict=True)]
    image_flops, image_bytes = work_of_an_image(model)
    rounds = []  # images/s: of every setting, and of the two bounds
    for _ in range(args.rounds):
        work = zip(settings, pools, strict=True)
        rates = [pool.submit(_rate, args.images, setting.batch_size).result() for setting, pool in work]
        rounds.append([*rates, matrix_flops(device) / image_flops, copied_bytes(device) / image_bytes])
    *all_rates, bounds, memory_bounds = np.array(rounds).T
    rows = []
    for setting, pool, first_batch, mine in zip(settings, pools, first_batches, all_rates, strict=True):
        median = float(np.median(mine))
        ratio, share, memory_share = (float(np.median(mine / other)) for other in (all_rates[0], bounds, memory_bounds))
        rows.append(
            {
                **asdict(setting),
                "first_batch_seconds": round(first_batch, 3),
                "images_per_second": mine.round(1).tolist(),
                "median": round(median, 1),
                "epoch_seconds": round(epoch_images / median, 4),
                "ratio": round(ratio, 3),
                "share_of_bound": round(share, 4),
                "share_of_memory_bound": round(memory_share, 4),
                "peak_mib": pool.submit(_peak_mib).result(),
            }
        )
        pool.shutdown()
    return rows


_under_way: dict[str, Any] = {}  # in a process of one setting: its training, its device, its folder


def _begin(setting: Setting, model: str, data_dir: str, device_name: str) -> float:
    """Make the training that ``setting`` says. Returns the seconds to the end of its first batch."""
    began, folder = time.perf_counter(), tempfile.TemporaryDirectory()
    settings = {key: value for key, value in asdict(setting).items() if key not in ("label", "naive")}
    settings |= {"device": device_name, "data_dir": data_dir, "output_dir": folder.name}
    config = TrainConfig(model=model, scheduler="onecycle", epochs=1000, **settings)
    train, device = (_naive_training if setting.naive else _training)(config), resolve_device(device_name)
    _under_way.update(train=train, device=device, folder=folder)
    train(1)
    synchronize(device)
    first_batch = time.perf_counter() - began
    train(4)  # allocates
    return first_batch


def _rate(images: int, batch_size: int) -> float:
    """Images/s of a training under way."""
    began = time.perf_counter()
    done: int = _under_way["train"](math.ceil(images / batch_size))
    synchronize(_under_way["device"])
    return done / (time.perf_counter() - began)


def _peak_mib() -> int | None:
    """The most memory that this process ever had, in MiB; None where the system does not tell."""
    if _under_way["device"].type == "cuda":
        return torch.cuda.max_memory_allocated(_under_way["device"]) >> 20
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 << 20 if sys.platform == "darwin" else 1 << 10  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // unit


def _naive_training(config: TrainConfig) -> Callable[[int], int]:
    """A function that takes so many steps of the reference's loop and returns how many images they had."""
    training = NaiveTraining(config)
    steps = itertools.chain.from_iterable(training.train_batches() for _ in itertools.count())
    return lambda count: sum(itertools.islice(steps, count))


def _training(config: TrainConfig) -> Callable[[int], int]:
    config.files.make_folders()
    run = prepare_run(config, resolve_device(config.device), log=silent)
    steps = itertools.chain.from_iterable(train_one_epoch(run.step, run.data.train) for _ in itertools.count())

    def train(count: int) -> int:
        before = run.report.count
        for result in itertools.islice(steps, count):
            run.report.step(result)
        run.report.fetch()
        return run.report.count - before

    return train


def work_of_an_image(model: str) -> tuple[int, int]:
    """Operations and bytes that the bounds of a step count: see above."""
    rows = [row for row in receptive_fields(get_strategy(model).build()) if row.kind in ("Conv2d", "Linear")]
    multiply_adds = sum(row.parameters * row.output[1] * row.output[2] for row in rows)
    return 3 * 2 * multiply_adds, 5 * 4 * sum(math.prod(row.output) for row in rows)
