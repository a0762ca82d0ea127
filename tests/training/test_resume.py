"""Going on from a checkpoint: the weights are those of a run that nobody stopped, bit for bit."""

import hashlib
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import make_tiny_mnist, write_sums

import main as command
import training.run
from common.files import PROJECT_DIR, RunFiles, UsageError
from imports import torch
from training import report
from training.checkpoint import load_checkpoint, resumed_config, save_checkpoint
from training.config import TrainConfig
from training.machine import has_bfloat16
from training.run import StoppedError
from training.setup import prepare_run
from training.train import train_and_evaluate
from visualization import load_metrics_json

MAIN = [sys.executable, str(PROJECT_DIR / "main.py")]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", MAIN[1]]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROJECT_DIR)}


def say_nothing(line: str) -> None:
    """A log nobody reads."""


def digest(output_dir: Path, name: str = "run") -> str:
    return hashlib.sha256(RunFiles(name, output_dir).params.read_bytes()).hexdigest()


class StopAfter:
    """Asks a run to stop after so many batches."""

    def __init__(self, batches: int) -> None:
        self.left = batches

    def __call__(self) -> bool:
        self.left -= 1
        return self.left <= 0


@pytest.fixture
def settings(tiny_mnist, tmp_path):
    """Of a run of 4 epochs of 5 batches."""
    folders = {"data_dir": str(tiny_mnist), "output_dir": str(tmp_path / "results")}
    return {"name": "run", "epochs": 4, "batch_size": 60, "device": "cpu", **folders}


@pytest.fixture
def interrupted(settings):
    """The arguments of the command for a run that was stopped in its third epoch, and its files."""
    with pytest.raises(StoppedError):
        train_and_evaluate(TrainConfig(**settings), say_nothing, stop_requested=StopAfter(13))
    arguments = ["--resume", "--name", "run", "--output_dir", settings["output_dir"]]
    return arguments, RunFiles("run", settings["output_dir"])


def fails(arguments, capsys) -> str:
    """The one line of a mistake."""
    with pytest.raises(SystemExit) as caught:
        command.main(arguments)
    assert caught.value.code == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    return captured.err


# Bit for bit


@pytest.mark.parametrize("scheduler", ["step", "onecycle"])
@pytest.mark.parametrize(
    "refinements",
    [
        {},
        {"kernels": False},
        {"amp": True},
        {"pipeline": "torchvision", "val_split": 60},
        {"augment": "elastic", "ema_decay": 0.9},
    ],
)
def test_stopped_at_any_batch_and_resumed(settings, tmp_path, scheduler, refinements):
    if refinements.get("amp") and not has_bfloat16(torch.device("cpu")):
        pytest.skip("this processor has no bfloat16")
    settings |= {"scheduler": scheduler, **refinements}
    config, whole = TrainConfig(**settings), TrainConfig(**{**settings, "output_dir": str(tmp_path / "whole")})
    expected = train_and_evaluate(whole, say_nothing).metrics

    files, checkpoint = config.files, None
    for batches in (1, 6, 3, 7):  # in the first epoch, on the second's first batch, ...
        if files.checkpoint.exists():
            checkpoint = load_checkpoint(files, say_nothing)
        with pytest.raises(StoppedError):
            train_and_evaluate(config, say_nothing, checkpoint, StopAfter(batches))
        assert load_metrics_json("run", files.root)["status"] == "interrupted"
        assert not files.params.exists()
    metrics = train_and_evaluate(config, say_nothing, load_checkpoint(files, say_nothing)).metrics

    assert digest(files.root) == digest(tmp_path / "whole")
    for key in ("train_losses", "learning_rates", "train_acc", "test_losses", "test_acc", "val_losses", "val_acc"):
        assert metrics[key] == expected[key], key
    assert files.log.read_text() == whole.files.log.read_text()
    assert len(metrics["epoch_seconds"]) == 4


def start(launcher: list[str], arguments: list[str]) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [*launcher, *arguments],
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def kill_all(process: "subprocess.Popen[bytes]") -> None:
    """SIGKILL to a process and, first, to those that it started: torchrun's are in sessions of their own."""
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, check=False)
    for pid in [*map(int, listed.stdout.split()), process.pid]:
        os.kill(pid, signal.SIGKILL)
    process.wait()


@pytest.mark.parametrize(
    ("launcher", "scheduler", "kills"),
    [(MAIN, "step", 9), (MAIN, "onecycle", 9), (TORCHRUN, "onecycle", 2)],
    ids=["step", "onecycle", "torchrun"],
)
def test_killed_at_random_moments(tmp_path, launcher, scheduler, kills):
    """Epochs of some hundredths of a second, so that kills fall into every part of one, also into its files."""
    raw = tmp_path / "data" / "MNIST" / "raw"
    make_tiny_mnist(raw, train=60, test=20)
    write_sums(raw)
    arguments = ["--epochs", "150", "--scheduler", scheduler, "--batch_size", "20", "--device", "cpu", "--name", "run"]
    arguments += ["--data_dir", str(tmp_path / "data"), "--output_dir"]
    whole = start(launcher, [*arguments, str(tmp_path / "whole")])
    assert whole.wait(300) == 0, whole.stderr.read()

    files, moments = RunFiles("run", tmp_path / "killed"), random.Random(7)
    arguments += [str(files.root)]

    def resume() -> list[str]:  # a kill in the first epoch leaves nothing to go on from
        return ["--resume"] if files.checkpoint.exists() or files.previous_checkpoint.exists() else []

    for _ in range(kills):
        before = files.metrics.read_bytes() if files.metrics.exists() else b""
        process = start(launcher, [*arguments, *resume()])
        while process.poll() is None and (not files.metrics.exists() or files.metrics.read_bytes() == before):
            time.sleep(0.005)  # until it has begun to train
        time.sleep(moments.uniform(0, 0.4))
        assert process.poll() is None, process.stderr.read()
        kill_all(process)
        process.stderr.close()
    last = start(launcher, [*arguments, *resume()])
    assert last.wait(300) == 0, last.stderr.read()
    assert digest(files.root) == digest(tmp_path / "whole")
    assert not list(tmp_path.rglob("*.partial"))


def test_more_epochs_of_step_are_those_of_a_longer_run(settings, tmp_path, capsys):
    train_and_evaluate(TrainConfig(**settings), say_nothing)
    train_and_evaluate(TrainConfig(**{**settings, "epochs": 7, "output_dir": str(tmp_path / "long")}), say_nothing)
    arguments = ["--resume", "--name", "run", "--output_dir", settings["output_dir"]]
    assert command.main([*arguments, "--epochs", "7"]) == 0
    assert "Going on with run: 4 of 7 epochs are done." in capsys.readouterr().out
    assert digest(Path(settings["output_dir"])) == digest(tmp_path / "long")


def test_a_run_killed_before_its_last_files_gets_them(settings):
    result = train_and_evaluate(TrainConfig(**settings), say_nothing)
    expected = digest(result.files.root)
    result.files.params.unlink()
    assert command.main(["--resume", "--name", "run", "--output_dir", settings["output_dir"]]) == 0
    assert digest(result.files.root) == expected


# What is refused, and what is said


def test_a_run_already_finished_says_so(settings, capsys):
    files = train_and_evaluate(TrainConfig(**settings), say_nothing).files
    before = {path: path.read_bytes() for path in files.root.rglob("*") if path.is_file()}
    assert command.main(["--resume", "--name", "run", "--output_dir", settings["output_dir"]]) == 0
    assert capsys.readouterr().out == "run is finished: all 4 epochs are done.\n"
    assert {path: path.read_bytes() for path in files.root.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--seed 2", "contradicts the checkpoint of run in seed (1, not 2)"),
        ("--lr 0.02 --model 3 --amp", "run in model ('1', not '3'), lr (0.01, not 0.02), amp (False, not True)"),
        ("--epochs 3", "run in epochs (4, not 3)"),
        ("--epochs 9 --threads 1", "run in epochs (4, not 9), threads (None, not 1)"),
    ],
)
def test_a_flag_that_contradicts_is_refused(interrupted, capsys, flags, message):
    arguments, files = interrupted
    before = files.checkpoint.read_bytes()
    assert message in fails([*arguments, *flags.split()], capsys)
    assert files.checkpoint.read_bytes() == before


def test_a_config_file_that_contradicts_is_refused(interrupted, capsys, tmp_path):
    (tmp_path / "my.toml").write_text("nesterov = true\nepochs = 4\n")
    message = fails([*interrupted[0], "--config", str(tmp_path / "my.toml")], capsys)
    assert "contradicts the checkpoint of run in nesterov (False, not True); leave it out" in message


def test_more_epochs_of_onecycle_are_refused_with_the_reason(settings, capsys):
    train_and_evaluate(TrainConfig(**settings, scheduler="onecycle"), say_nothing)
    error = fails(["--resume", "--name", "run", "--output_dir", settings["output_dir"], "--epochs", "9"], capsys)
    assert "epochs: 9 is not allowed with --resume: the onecycle schedule of this run spans 4 epochs" in error


def test_the_same_flags_again_are_no_contradiction(interrupted, settings, tmp_path):
    arguments, files = interrupted
    moved = tmp_path / "moved"
    shutil.move(settings["data_dir"], moved)  # where the files are is not what is computed
    again = ["--epochs", "4", "--batch_size", "60", "--device", "cpu", "--data_dir", str(moved)]
    assert command.main([*arguments, *again]) == 0
    assert load_metrics_json("run", files.root)["config"]["data_dir"] == str(moved)


def test_no_checkpoint_lists_those_that_exist(interrupted, capsys):
    files = interrupted[1]
    error = fails(["--resume", "--name", "other", "--output_dir", str(files.root)], capsys)
    assert "other_checkpoint.pth does not exist; runs in that folder that have a checkpoint: run\n" in error


def test_another_number_of_processes_is_refused(interrupted):
    files = interrupted[1]
    with pytest.raises(UsageError, match=r"the checkpoint is of 1 processes, not of 2; start as many again"):
        resumed_config(load_checkpoint(files), files, {}, processes=2)


def test_a_checkpoint_from_before_the_kernels_goes_on_without(interrupted):
    files = interrupted[1]
    state = load_checkpoint(files)
    assert resumed_config(state, files, {}).kernels is True
    del state["config"]["kernels"]
    assert resumed_config(state, files, {}).kernels is resumed_config(state, files, {"kernels": False}).kernels is False


def test_other_threads_are_told(interrupted, capsys):
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert command.main(interrupted[0]) == 0
    finally:
        torch.set_num_threads(threads)
    change = f"so the last bits may differ: threads {threads} -> {threads + 1}."
    assert change in capsys.readouterr().out


# Checkpoints


def test_the_one_before_is_kept(interrupted):
    files = interrupted[1]
    assert torch.load(files.checkpoint, weights_only=True)["epochs_done"] == 2
    assert torch.load(files.previous_checkpoint, weights_only=True)["epochs_done"] == 1


def test_a_new_run_of_the_name_does_not_keep_the_old_ones(interrupted, settings):
    files = interrupted[1]
    with pytest.raises(StoppedError):
        train_and_evaluate(TrainConfig(**settings, seed=5), say_nothing, stop_requested=StopAfter(7))
    assert load_checkpoint(files)["config"]["seed"] == 5
    assert not files.previous_checkpoint.exists()


@pytest.mark.parametrize("damage", ["truncated", "a flipped bit", "empty", "missing", "other tensors"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(interrupted, settings, tmp_path, capsys, damage):
    arguments, files = interrupted
    whole = {**settings, "output_dir": str(tmp_path / "whole")}
    train_and_evaluate(TrainConfig(**whole), say_nothing)
    content = bytearray(files.checkpoint.read_bytes())
    if damage == "a flipped bit":
        content[len(content) // 2] ^= 1
    if damage == "missing":
        files.checkpoint.unlink()
    elif damage == "other tensors":
        torch.save({"schema": 2, "weight": torch.zeros(3)}, files.checkpoint)
    else:
        files.checkpoint.write_bytes({"truncated": content[:1000], "empty": b""}.get(damage, content))
    assert command.main(arguments) == 0
    out = capsys.readouterr().out
    reason = {"missing": "is missing", "other tensors": "is no checkpoint: it has no epochs_done"}
    assert reason.get(damage, "run_checkpoint.pth is damaged") in out
    assert "Going on from the checkpoint before it." in out
    assert "Going on with run: 1 of 4 epochs are done." in out
    assert digest(files.root) == digest(tmp_path / "whole")


def test_a_damaged_checkpoint_never_takes_the_place_of_the_one_before(interrupted):
    files = interrupted[1]
    state = load_checkpoint(files)
    before = files.previous_checkpoint.read_bytes()
    files.checkpoint.write_bytes(files.checkpoint.read_bytes()[:1000])
    save_checkpoint(files, {key: value for key, value in state.items() if key != "schema"})
    assert files.previous_checkpoint.read_bytes() == before
    assert load_checkpoint(files)["epochs_done"] == 2


def test_two_damaged_checkpoints_are_a_failure_and_left_alone(interrupted, capsys):
    arguments, files = interrupted
    for path in (files.checkpoint, files.previous_checkpoint):
        path.write_bytes(path.read_bytes()[:500])
    assert command.main(arguments) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.count("is damaged") == 2
    assert files.checkpoint.stat().st_size == 500


# Signals, disks, locks


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_after_the_batch_and_says_how_to_go_on(settings, tmp_path, signum, status):
    flags = [f"--{key}={value}" for key, value in {**settings, "epochs": 300}.items()]
    with subprocess.Popen(
        [*MAIN, *flags], env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert any("EPOCH: 1 " in line for line in process.stdout)
        process.send_signal(signum)
        assert process.wait(30) == status
        error = process.stderr.read()
    metrics = load_metrics_json("run", settings["output_dir"])
    assert metrics["status"] == "interrupted"
    words = f"{MAIN[1]} --resume --name run --output_dir {settings['output_dir']}"
    assert error == f"main.py: stopped; to go on from epoch {len(metrics['test_acc'])}: python {words}\n"
    with subprocess.Popen([*MAIN, *words.split()[1:]], env=ENVIRONMENT, stdout=subprocess.PIPE, text=True) as process:
        done = len(metrics["test_acc"])
        assert process.stdout.readline() == f"Going on with run: {done} of 300 epochs are done.\n"
        process.kill()


def test_a_signal_before_the_first_epochs_end(settings):
    flags = [f"--{key}={value}" for key, value in {**settings, "batch_size": 1}.items()]
    with subprocess.Popen([*MAIN, *flags], env=ENVIRONMENT, stderr=subprocess.PIPE, text=True) as process:
        files = RunFiles("run", settings["output_dir"])
        while not files.metrics.exists():
            time.sleep(0.01)
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        assert "no epoch was done, so there is nothing to go on from" in process.stderr.read()


def test_a_second_ctrl_c_ends_a_run_that_does_not_listen(tmp_path):
    script = tmp_path / "deaf.py"
    script.write_text("""
import sys, time, main, training.train
def train(config, checkpoint=None, stop_requested=None):
    stop_requested()
    print("training", flush=True)
    time.sleep(60)
training.train.train_and_evaluate = train
sys.exit(main.main(["--output_dir", sys.argv[1]]))
""")
    command_line = [sys.executable, str(script), str(tmp_path)]
    with subprocess.Popen(
        command_line, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "training\n"
        process.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1)
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130
        assert process.stderr.read() == "deaf.py: stopped\n"


def test_torchrun_stopped_and_resumed(settings, tmp_path):
    flags = ["--amp", *(f"--{key}={value}" for key, value in {**settings, "epochs": 60}.items())]
    whole = start(TORCHRUN, [*flags, "--output_dir", str(tmp_path / "whole")])
    assert whole.wait(120) == 0
    with subprocess.Popen(
        [*TORCHRUN, *flags], env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert any("EPOCH: 3 " in line for line in process.stdout)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) != 0
        assert "to go on from epoch" in process.stderr.read()
    assert load_metrics_json("run", settings["output_dir"])["status"] == "interrupted"
    alone = subprocess.run(
        [*MAIN, "--resume", *flags], env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=60
    )
    assert alone.returncode == 2
    assert "the checkpoint is of 2 processes, not of 1" in alone.stderr
    resumed = start(TORCHRUN, [*flags, "--resume"])
    assert resumed.wait(120) == 0
    assert digest(Path(settings["output_dir"])) == digest(tmp_path / "whole")


def test_the_second_run_of_a_name_is_refused_with_the_firsts_process_id(settings):
    flags = [f"--{key}={value}" for key, value in {**settings, "epochs": 10_000}.items()]
    with subprocess.Popen([*MAIN, *flags], env=ENVIRONMENT, stdout=subprocess.PIPE, text=True) as first:
        assert any("EPOCH: 0 " in line for line in first.stdout)
        second = subprocess.run([*MAIN, *flags], env=ENVIRONMENT, capture_output=True, text=True, check=False)
        assert second.returncode == 2
        assert f"name: process {first.pid} is training run into " in second.stderr
        first.kill()
    other = subprocess.run([*MAIN, *flags, "--epochs=1"], env=ENVIRONMENT, check=False)
    assert other.returncode == 0  # the lock died with its process


def test_a_disk_that_fills_up_stops_the_run_and_resume_goes_on(settings, tmp_path):
    flags = [f"--{key}={value}" for key, value in {**settings, "epochs": 60}.items()]
    whole = start(MAIN, [*flags, "--output_dir", str(tmp_path / "whole")])
    assert whole.wait(120) == 0, whole.stderr.read()
    files = RunFiles("run", settings["output_dir"])
    train_and_evaluate(TrainConfig(**{**settings, "epochs": 2}), say_nothing)  # what must not be lost
    size = files.checkpoint.stat().st_size
    kept = files.params.read_bytes(), files.plot.read_bytes()

    def limit() -> None:  # the checkpoint grows with the metrics in it; when it no longer fits, the disk is full
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 1500, size + 1500))

    full = subprocess.run(
        [*MAIN, *flags], env=ENVIRONMENT, capture_output=True, text=True, check=False, preexec_fn=limit
    )
    assert full.returncode == 1
    assert full.stderr.count("\n") == 1
    assert "File too large" in full.stderr
    assert "to go on from epoch" in full.stderr
    assert (files.params.read_bytes(), files.plot.read_bytes()) == kept
    assert not list(files.root.rglob("*.partial"))
    resumed = start(MAIN, [*flags, "--resume"])
    assert resumed.wait(120) == 0, resumed.stderr.read()
    assert digest(files.root) == digest(tmp_path / "whole")


def test_a_folder_that_vanishes_is_a_failure_in_one_line(settings):
    flags = [f"--{key}={value}" for key, value in {**settings, "epochs": 10_000}.items()]
    with subprocess.Popen(
        [*MAIN, *flags], env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert any("EPOCH: 1 " in line for line in process.stdout)
        shutil.rmtree(settings["output_dir"], ignore_errors=True)
        shutil.rmtree(settings["output_dir"], ignore_errors=True)
        assert process.wait(60) == 1
        error = process.stderr.read()
    assert error.count("\n") == 1
    assert "No such file or directory" in error


def test_weights_that_are_no_longer_finite_leave_the_last_good_checkpoint(settings, monkeypatch, capsys):
    """The last step's update may overflow after its loss was measured; the evaluation finds it."""
    evaluate, calls = training.run.evaluate, []

    def overflown(model, *args):
        calls.append(model)
        if len(calls) == 3:
            next(model.parameters()).data.fill_(float("nan"))
        return evaluate(model, *args)

    monkeypatch.setattr(training.run, "evaluate", overflown)
    flags = [f"--{key}={value}" for key, value in settings.items()]
    assert command.main(flags) == 1
    error = capsys.readouterr().err
    assert (
        "the test loss is nan after epoch 2: the last steps left weights that are not finite; try a lower --lr" in error
    )
    assert error.count("\n") == 1
    state = load_checkpoint(RunFiles("run", settings["output_dir"]))
    assert state["epochs_done"] == 2
    assert all(value.isfinite().all() for value in state["model"].values())


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
    run = prepare_run(config, torch.device("cpu"), log=say_nothing)
    for key in ("train_losses", "learning_rates"):
        run.metrics[key] = [0.123456] * (14 * 469)
    for key in ("train_acc", "test_losses", "test_acc", "epoch_seconds"):
        run.metrics[key] = [99.1234] * 14
    began = time.perf_counter()
    run.train()
    seconds = time.perf_counter() - began
    assert len(spent) > 3
    assert sum(spent) < 0.02 * seconds, f"{sum(spent):.3f} s of {seconds:.1f}"
