"""Trainings in processes of their own, by the command itself."""

import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from types import FrameType

from common.files import PROJECT_DIR, CommandError, UsageError
from image_data.facts import DataSet, facts_of
from tools.timing import seconds_of
from training.config import TrainConfig, fields_in
from visualization import load_metrics_json


def run_quietly(command: Sequence[str]) -> str:
    """What ``command`` prints; a CommandError if it fails."""
    done = subprocess.run(command, cwd=PROJECT_DIR, capture_output=True, text=True)
    if done.returncode:
        last_line = (done.stderr.strip().splitlines() or ["it printed nothing"])[-1]
        raise CommandError(f"exit status {done.returncode} of {shlex.join(command)}: {last_line}")
    return done.stdout


@contextmanager
def stopping_on_sigterm() -> Iterator[None]:
    """Let SIGTERM do what Ctrl-C does, also to the processes that this one started."""

    def stop(signum: int, frame: FrameType | None) -> None:
        import psutil

        for process in psutil.Process().children():
            process.terminate()
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def threads_each(jobs: int) -> int:
    return max(1, (os.cpu_count() or 1) // jobs)


def train_in_a_process(config: TrainConfig) -> float:
    """Train by the command itself. Returns the seconds that all of it took; a CommandError if it fails."""
    return seconds_of(lambda: run_with(config, str(PROJECT_DIR / "main.py")))


def run_with(config: TrainConfig, *program: str) -> str:
    """What ``program`` of Python's prints, with these settings as its --config; a CommandError if it fails."""
    settings = asdict(config) | {"data_dir": str(config.data_root.resolve())}
    if config.output_dir is not None:  # the command runs in the project's folder
        settings["output_dir"] = str(Path(config.output_dir).resolve())
    with tempfile.TemporaryDirectory() as folder:
        config_file = Path(folder) / "run.toml"
        lines = (f"{k} = {json.dumps(v, ensure_ascii=False)}\n" for k, v in settings.items() if v is not None)
        config_file.write_text("".join(lines), encoding="utf-8")
        return run_quietly([sys.executable, *program, "--config", str(config_file)])


def is_trained(config: TrainConfig) -> bool:
    """Whether the run is there and finished; a UsageError if one of this name has other settings."""
    try:
        metrics = load_metrics_json(config.run_name, config.output_dir)
    except FileNotFoundError:
        if config.files.params.exists():
            lost = f"{config.files.params} has no metrics, and a training would replace it"
            raise UsageError(f"name: {lost}; choose another --name, or remove that file") from None
        return False
    if metrics["status"] != "finished":
        return False
    saved = TrainConfig.of(metrics)
    other = [key for key in fields_in("recipe") if getattr(config, key) != getattr(saved, key)]
    if config.data_folder.is_dir() and facts_of(config.data_folder).sha256 != DataSet.of(metrics).sha256:
        other.append("data set")
    if other:
        raise UsageError(
            f"name: the run {config.run_name} is there with another {', '.join(other)}; choose another --name, or"
            " remove that run"
        )
    return config.files.params.exists()


def train_missing(runs: Sequence[TrainConfig], jobs: int) -> None:
    missing = [run for run in runs if not is_trained(run)]
    if not missing:
        return
    print(f"{len(missing)} of {len(runs)} runs to train, {jobs} at a time", flush=True)

    def train(run: TrainConfig) -> None:
        seconds = train_in_a_process(replace(run, threads=run.threads or threads_each(jobs)))
        print(f"{run.run_name}: trained in {seconds:.1f} s", flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(train, missing))
