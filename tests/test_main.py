import contextlib
import fcntl
import os
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time

import pytest

import main as command
from common.files import PROJECT_DIR
from imports import torch
from visualization import load_metrics_json

MAIN = [sys.executable, str(PROJECT_DIR / "main.py")]


def fails_with_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as caught:
        command.main(arguments)
    assert caught.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--model 4", "model: '4' is not allowed; choose from 1, 2, 3"),
        ("--epochs 0", "epochs: 0 is not allowed; it must be at least 1"),
        ("--epochs ten", "argument --epochs: invalid int value: 'ten'"),
        ("--epochs", "argument --epochs: expected one argument"),
        ("--scheduler cosine", "scheduler: 'cosine' is not allowed; choose from step, onecycle"),
        ("--max_lr -1", "max_lr: -1.0 is not allowed; it must be above 0"),
        ("--max_lr nan", "max_lr: nan is not allowed; it must be finite"),
        ("--lr 0", "lr: 0.0 is not allowed; it must be above 0"),
        ("--batch_size 0", "batch_size: 0 is not allowed"),
        ("--seed -1", "seed: -1 is not allowed"),
        ("--seed 1.5", "argument --seed: invalid int value: '1.5'"),
        ("--threads 0", "threads: 0 is not allowed"),
        ("--val_split -1", "val_split: -1 is not allowed"),
        ("--pipeline numpy", "pipeline: 'numpy' is not allowed; choose from tensor, torchvision"),
        ("--device gpu", "device: 'gpu' is not allowed; choose from auto, cpu, cuda, cuda:N, mps"),
        ("--seed 18446744073709551616", "seed: 18446744073709551616 is not allowed; it must be at most"),
        ("--batch_size 99999999999", "batch_size: 99999999999 is not allowed; it must be at most"),
        ("--device cuda:99999999999", "device: 'cuda:99999999999' is not on this machine"),
        ("--name ../x", "name: '../x' is not allowed"),
        ("--config absent", "config: cannot read absent"),
        ("--output_dir {file}", "output_dir: cannot write into"),
        ("--output_dir /proc/none", "output_dir: cannot write into /proc/none/outputs"),  # not even by root
        ("--data_dir {file}", "data_dir: cannot write into"),
        ("--frobnicate", "unrecognized arguments: --frobnicate"),
        ("--epoch 5", "unrecognized arguments: --epoch 5"),
        ("extra", "unrecognized arguments: extra"),
        (f"--device cuda:{torch.cuda.device_count()}", "is not on this machine"),
    ],
)
def test_wrong_arguments(arguments, message, tmp_path, capsys):
    (tmp_path / "file").write_text("no folder")
    words = arguments.format(file=tmp_path / "file").split()
    if "--output_dir" not in words:
        words += ["--output_dir", str(tmp_path / "results")]
    error = fails_with_one_line(words, capsys)
    assert error.startswith(f"{command.get_args_parser().prog}: error: ")
    assert message in error
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "file"]


def test_what_only_a_config_file_sets_is_no_flag(capsys):
    assert "unrecognized arguments: --nesterov" in fails_with_one_line(["--nesterov"], capsys)


def test_help_shows_the_specified_commands_and_answers_at_once(capsys):
    with pytest.raises(SystemExit) as caught:
        command.main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for example in (
        "python main.py --model 1 --scheduler onecycle --epochs 15",
        "python main.py --model 2 --scheduler step --epochs 10",
        "python main.py --model 3 --scheduler onecycle --epochs 20 --max_lr 0.5",
    ):
        assert example in text
    for default in ("(10)", "(0.75)", "(128)", "(0.01)", "{1,2,3}", "{step,onecycle}", "{tensor,torchvision}"):
        assert default in text


@pytest.mark.parametrize(("arguments", "status"), [("--help", 0), ("--epochs 0", 2), ("--config absent", 2)])
def test_answers_without_torch(arguments, status):
    script = """
import sys, main
try:
    main.main(sys.argv[1:])
except SystemExit as exit:
    sys.exit(100 if "torch" in sys.modules else exit.code)
"""
    command_line = [sys.executable, "-c", script, *arguments.split()]
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        done = subprocess.run(command_line, cwd=PROJECT_DIR, capture_output=True, check=False)
        seconds.append(time.perf_counter() - began)
        assert done.returncode == status
    assert min(seconds) < 0.5


@pytest.mark.parametrize(
    ("tool", "arguments", "package"),
    [("export", "--model 1", "onnx"), ("tune", "--trials 1", "optuna"), ("web", "--port 0", "uvicorn")],
)
def test_a_tool_without_its_package_says_how_to_install_it(tool, arguments, package, tmp_path, shipped_project):
    script = """
import runpy, sys
sys.modules[sys.argv.pop(1)] = None
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""
    shutil.copytree(shipped_project / "outputs", tmp_path / "outputs")
    command_line = [sys.executable, "-c", script, package, f"tools.{tool}", *arguments.split()]
    command_line += ["--output_dir", tmp_path, "--data_dir", shipped_project / "data"]
    done = subprocess.run(command_line, cwd=PROJECT_DIR, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    line = f"{package} is not installed; pip install -r requirements-tools.txt installs all that the tools need"
    assert done.stderr.strip().splitlines()[-1].endswith(line)
    assert "Traceback" not in done.stderr


def test_the_command(tmp_path, tiny_mnist):
    arguments = [
        "--model",
        "3",
        "--scheduler",
        "onecycle",
        "--epochs",
        "2",
        "--lr",
        "0.5",
        "--name",
        "mine",
        "--device",
        "cpu",
    ]
    folders = ["--data_dir", tiny_mnist, "--output_dir", "results"]
    done = subprocess.run([*MAIN, *arguments, *folders], cwd=tmp_path, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[0] == "Note: --lr has no effect with --scheduler onecycle; it belongs to step."
    assert "this is not the original MNIST" in lines[1]
    assert lines[2].startswith("EPOCH: 0  - Test Accuracy: ")
    assert lines[3].startswith("EPOCH: 1  - Test Accuracy: ")
    assert lines[4].startswith("mine: 8,650 parameters, test accuracy ")
    assert [line.split() for line in lines[5:]] == [
        ["params", "results/outputs/mine_params.pth"],
        ["metrics", "results/outputs/mine_metrics.json"],
        ["summary", "results/summaries/mine_summary.txt"],
        ["plot", "results/plots/mine.png"],
        ["checkpoint", "results/outputs/mine_checkpoint.pth"],
        ["log", "results/outputs/mine.log"],
    ]
    assert all((tmp_path / line.split()[1]).is_file() for line in lines[5:])
    assert done.stderr == ""  # no bar where there is no terminal


def test_the_bar_shows_on_a_terminal(tmp_path, tiny_mnist):
    terminal, its_end = os.openpty()
    fcntl.ioctl(its_end, termios.TIOCSWINSZ, struct.pack("4H", 40, 120, 0, 0))  # rows, columns
    folders = ["--data_dir", tiny_mnist, "--output_dir", tmp_path / "results"]
    env = {**os.environ, "TQDM_MININTERVAL": "0"}
    process = subprocess.Popen([*MAIN, "--epochs", "1", *folders], env=env, stdout=its_end, stderr=its_end)
    os.close(its_end)
    shown = b""
    with contextlib.suppress(OSError):  # what the end of a terminal's output is on Linux
        while part := os.read(terminal, 65536):
            shown += part
    os.close(terminal)
    assert process.wait(30) == 0
    for text in (b"epoch 0:", b"img/s", b"loss=", b"acc=", b"lr=0.0100"):
        assert text in shown


def test_a_terminal_without_the_arrow_sign(tmp_path, tiny_mnist):
    folders = ["--data_dir", tiny_mnist, "--output_dir", tmp_path / "results"]
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([*MAIN, "--epochs", "1", *folders], env=env, capture_output=True, text=True, check=True)
    assert "% ? BEST" in done.stdout


def test_data_that_cannot_be_had_is_a_failure_in_one_line(tmp_path, tiny_mnist, capsys):
    (tiny_mnist / "MNIST" / "raw" / "t10k-labels-idx1-ubyte").unlink()
    status = command.main(["--data_dir", str(tiny_mnist), "--output_dir", str(tmp_path / "results")])
    error = capsys.readouterr().err
    assert status == 1
    assert "t10k-labels-idx1-ubyte missing" in error
    assert error.count("\n") == 1


def test_a_run_that_diverges_is_a_failure_in_one_line(tmp_path, tiny_mnist, capsys):
    folders = ["--data_dir", str(tiny_mnist), "--output_dir", str(tmp_path / "results")]
    assert command.main(["--scheduler", "onecycle", "--max_lr", "1e20", *folders]) == 1
    error = capsys.readouterr().err
    assert "the loss is" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_the_run(tmp_path, tiny_mnist, signum, status):
    folders = ["--data_dir", tiny_mnist, "--output_dir", tmp_path]
    arguments = [*MAIN, "--epochs", "10000", *folders]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert any("EPOCH: 1 " in line for line in process.stdout)
        process.send_signal(signum)
        assert process.wait(30) == status
        assert "Traceback" not in process.stderr.read()
    metrics = load_metrics_json("mnist_model_1", tmp_path)
    assert metrics["status"] == "interrupted"
    assert len(metrics["test_acc"]) >= 2


def test_the_config_flag(tmp_path, tiny_mnist, capsys):
    folders = ["--data_dir", str(tiny_mnist), "--output_dir", str(tmp_path)]
    assert command.main(["--config", "reference", "--epochs", "1", *folders]) == 0
    config = load_metrics_json("mnist_model_1", tmp_path)["config"]
    assert (config["scheduler"], config["epochs"]) == ("onecycle", 1)
