"""Runs as real processes that are stopped, killed, short of disk or in each other's way, and what is left of them."""

import hashlib
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import RUN, eventually, finished, make_tiny_data

import training.run
from common.cli import silent
from common.files import PROJECT_DIR, RunFiles
from imports import torch
from training import report
from training.config import TrainConfig
from training.setup import prepare_run
from visualization import load_metrics_json

MAIN = [str(PROJECT_DIR / "main.py")]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *MAIN]
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX's")


def digest(output_dir: Path, name: str = "run") -> str:
    return hashlib.sha256(RunFiles(name, output_dir).params.read_bytes()).hexdigest()


@pytest.fixture
def settings(tiny, tmp_path):
    """Of a run of epochs of 5 batches."""
    return {**RUN, "data_dir": str(tiny), "output_dir": str(tmp_path / "results")}


def as_flags(settings: dict[str, object], **others: object) -> list[str]:
    return [f"--{key}={value}" for key, value in {**settings, **others}.items()]


def succeeds(process) -> None:
    done = finished(process)
    assert done.returncode == 0, done.stderr


# Signals


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_after_the_batch_and_says_how_to_go_on(settings, python, signum, status):
    process = python(*MAIN, *as_flags(settings, epochs=300))
    assert any("EPOCH: 1 " in line for line in process.stdout)
    process.send_signal(signum)
    assert process.wait() == status
    metrics = load_metrics_json("run", settings["output_dir"])
    done = len(metrics["test_acc"])
    assert metrics["status"] == "interrupted"
    assert done >= 2
    words = f"{MAIN[0]} --resume --name run --output_dir {settings['output_dir']}"
    assert process.stderr.read() == f"main.py: stopped; to go on from epoch {done}: python {words}\n"
    again = python(*words.split())
    assert again.stdout.readline() == f"Going on with run: {done} of 300 epochs are done.\n"


def test_a_signal_before_the_first_epochs_end(settings, mnist, python):
    process = python(*MAIN, *as_flags(settings, batch_size=1, data_dir=mnist))  # 60,000 steps
    metrics = RunFiles("run", settings["output_dir"]).metrics
    eventually(lambda: metrics.exists() and load_metrics_json("run", settings["output_dir"])["train_losses"], process)
    process.send_signal(signal.SIGINT)
    assert process.wait() == 130
    assert "no epoch was done, so there is nothing to go on from" in process.stderr.read()


DEAF = """
import sys, time, main, training.train
def train(config, checkpoint=None, stop_requested=None):
    stop_requested()
    print("training", flush=True)
    time.sleep(600)
training.train.train_and_evaluate = train
sys.exit(main.main(["--output_dir", sys.argv[1]]))
"""


def test_a_second_ctrl_c_ends_a_run_that_does_not_listen(tmp_path, python):
    (tmp_path / "deaf.py").write_text(DEAF)
    process = python(tmp_path / "deaf.py", tmp_path, env={"PYTHONPATH": str(PROJECT_DIR)})
    assert process.stdout.readline() == "training\n"
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1)
    process.send_signal(signal.SIGINT)
    assert process.wait() == 130
    assert process.stderr.read() == "deaf.py: stopped\n"


# Kills


@pytest.mark.parametrize(
    ("launcher", "scheduler", "epochs", "kills"),
    [
        (MAIN, "step", 80, 3),
        pytest.param(MAIN, "step", 150, 9, marks=pytest.mark.long),
        pytest.param(MAIN, "onecycle", 150, 9, marks=pytest.mark.long),
        pytest.param(TORCHRUN, "onecycle", 150, 2, marks=pytest.mark.long),
    ],
    ids=["a few", "step", "onecycle", "torchrun"],
)
def test_killed_at_random_moments(tmp_path, python, launcher, scheduler, epochs, kills):
    """Epochs of some hundredths of a second, so that kills fall into every part of one, also into its files."""
    data = make_tiny_data(tmp_path / "data", train=60, test=20)
    settings = {"name": "run", "epochs": epochs, "scheduler": scheduler, "batch_size": 20, "device": "cpu"}
    flags = as_flags(settings, data_dir=data)
    succeeds(python(*launcher, *flags, "--output_dir", tmp_path / "whole"))

    files, moments = RunFiles("run", tmp_path / "killed"), random.Random(7)
    flags += ["--output_dir", str(files.root)]

    def resume() -> list[str]:  # a kill in the first epoch leaves nothing to go on from
        return ["--resume"] if files.checkpoint.exists() or files.previous_checkpoint.exists() else []

    def metrics() -> bytes:
        return files.metrics.read_bytes() if files.metrics.exists() else b""

    for _ in range(kills):
        before = metrics()
        process = python(*launcher, *flags, *resume())
        eventually(lambda before=before: metrics() != before, process)  # until it has begun to train
        time.sleep(moments.uniform(0, 0.4))
        assert process.poll() is None, process.stderr.read()
        process.end()  # and those that it started
    succeeds(python(*launcher, *flags, *resume()))
    assert digest(files.root) == digest(tmp_path / "whole")
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.long
def test_torchrun_stopped_and_resumed(settings, tmp_path, python):
    flags = ["--amp", *as_flags(settings, epochs=60)]
    succeeds(python(*TORCHRUN, *flags, "--output_dir", tmp_path / "whole"))
    process = python(*TORCHRUN, *flags)
    assert any("EPOCH: 3 " in line for line in process.stdout)
    process.send_signal(signal.SIGTERM)
    assert process.wait() != 0
    assert "to go on from epoch" in process.stderr.read()
    assert load_metrics_json("run", settings["output_dir"])["status"] == "interrupted"
    alone = finished(python(*MAIN, "--resume", *flags))
    assert alone.returncode == 2
    assert "the checkpoint is of 2 processes, not of 1" in alone.stderr
    succeeds(python(*TORCHRUN, *flags, "--resume"))
    assert digest(Path(settings["output_dir"])) == digest(tmp_path / "whole")


# Locks, disks


def test_the_second_run_of_a_name_is_refused_with_the_firsts_process_id(settings, python):
    flags = as_flags(settings, epochs=10_000)
    first = python(*MAIN, *flags)
    assert any("EPOCH: 0 " in line for line in first.stdout)
    second = finished(python(*MAIN, *flags))
    assert second.returncode == 2
    assert f"name: process {first.pid} is training run into " in second.stderr
    first.kill()
    first.wait()
    succeeds(python(*MAIN, *flags, "--epochs=1"))  # the lock died with its process


ON_A_SMALL_DISK = """
import resource, signal, sys, main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, 2 * (int(sys.argv.pop(1)),))
sys.exit(main.main())
"""


def test_a_disk_that_fills_up_stops_the_run_and_resume_goes_on(finished_run, settings, tmp_path, python):
    """2 s: three runs by the command, one of them on a full disk."""
    flags = as_flags(settings, epochs=15, output_dir=finished_run.root)
    succeeds(python(*MAIN, *flags, "--output_dir", tmp_path / "whole"))
    # the checkpoint grows with the metrics in it; when it no longer fits, the disk is full
    size = finished_run.checkpoint.stat().st_size + 300
    kept = finished_run.params.read_bytes(), finished_run.plot.read_bytes()  # what must not be lost
    full = finished(python("-c", ON_A_SMALL_DISK, size, *flags))
    assert full.returncode == 1
    assert full.stderr.count("\n") == 1
    assert "File too large" in full.stderr
    assert "to go on from epoch" in full.stderr
    assert (finished_run.params.read_bytes(), finished_run.plot.read_bytes()) == kept
    assert not list(finished_run.root.rglob("*.partial"))
    succeeds(python(*MAIN, *flags, "--resume"))
    assert digest(finished_run.root) == digest(tmp_path / "whole")


def test_a_folder_that_vanishes_is_a_failure_in_one_line(settings, python):
    process = python(*MAIN, *as_flags(settings, epochs=10_000))
    assert any("EPOCH: 1 " in line for line in process.stdout)
    shutil.rmtree(settings["output_dir"], ignore_errors=True)
    shutil.rmtree(settings["output_dir"], ignore_errors=True)
    _, error = process.communicate()
    assert process.wait() == 1
    assert error.count("\n") == 1
    assert "No such file or directory" in error


@pytest.mark.alone
def test_checkpoints_and_metrics_cost_less_than_two_percent_of_an_epoch(mnist, tmp_path, monkeypatch):
    """In the last of 15 epochs, when the metrics are longest, on the real images."""
    spent = []

    def timed(function):
        def timer(*args, **kwargs):
            began = time.perf_counter()
            function(*args, **kwargs)
            spent.append(time.perf_counter() - began)

        return timer

    monkeypatch.setattr(report, "save_metrics_json", timed(report.save_metrics_json))
    monkeypatch.setattr(training.run, "save_checkpoint", timed(training.run.save_checkpoint))
    config = TrainConfig(epochs=15, device="cpu", data_dir=str(mnist), output_dir=str(tmp_path))
    config.files.make_folders()
    run = prepare_run(config, torch.device("cpu"), log=silent)
    for key in ("train_losses", "learning_rates"):
        run.metrics[key] = [0.123456] * (14 * 469)
    for key in ("train_acc", "test_losses", "test_acc", "epoch_seconds"):
        run.metrics[key] = [99.1234] * 14
    began = time.perf_counter()
    run.train()
    seconds = time.perf_counter() - began
    assert len(spent) > 3
    assert sum(spent) < 0.02 * seconds, f"{sum(spent):.3f} s of {seconds:.1f}"
