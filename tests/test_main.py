import contextlib
import io
import os
import re
import struct
import subprocess
import sys

import pytest
from conftest import finished

import main as command
from common.files import PROJECT_DIR
from imports import torch
from training.config import TrainConfig
from visualization import load_metrics_json


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
        ("--epoch 5", "unrecognized arguments: --epoch 5; did you mean --epochs?"),
        ("--modle 3", "unrecognized arguments: --modle 3; did you mean --model?"),
        ("--lr 0,01", "argument --lr: invalid float value: '0,01'; with a point: 0.01"),
        ("--batch-size 0", "batch_size: 0 is not allowed"),
        ("--batch-size=0 --no_kernels", "batch_size: 0 is not allowed"),
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
    error = fails_with_one_line(["--nesterov"], capsys)
    assert "unrecognized arguments: --nesterov; nesterov is a config file's key: --config FILE, with a line" in error


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
        before = os.times()
        done = subprocess.run(command_line, cwd=PROJECT_DIR, capture_output=True, check=False)
        seconds.append(sum(os.times()[2:4]) - sum(before[2:4]))
        assert done.returncode == status
    assert min(seconds) < 0.5  # of the processor's, whatever else it has to do


@pytest.mark.parametrize(
    ("tool", "arguments", "package"),
    [
        pytest.param("export", "--model 1", "onnx", marks=pytest.mark.long),  # loads all else that it needs before
        ("tune", "--trials 1", "optuna"),
        ("web", "--port 0", "uvicorn"),
    ],
)
def test_a_tool_without_its_package_says_how_to_install_it(tool, arguments, package, tmp_path, shipped_project, python):
    script = f"""
import runpy, sys
sys.modules[{package!r}] = None
runpy.run_module("tools.{tool}", run_name="__main__", alter_sys=True)
"""
    folders = ["--output_dir", shipped_project, "--data_dir", shipped_project / "data"]
    done = finished(python("-c", script, *arguments.split(), *folders))
    assert done.returncode == 1
    line = f"{package} is not installed; pip install -r requirements-tools.txt installs all that the tools need"
    assert done.stderr.strip().splitlines()[-1].endswith(line)
    assert "Traceback" not in done.stderr


def test_the_command(tmp_path, tiny, python):
    flags = ["--model", "3", "--scheduler", "onecycle", "--epochs", "2", "--lr", "0.5", "--name", "mine"]
    flags += ["--device", "cpu", "--data_dir", tiny, "--output_dir", "results"]
    main = PROJECT_DIR / "main.py"
    done = finished(python(main, *flags, cwd=tmp_path))
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert lines[0] == "Note: --lr has no effect with --scheduler onecycle; it belongs to step."
    assert "this is not the original MNIST" in lines[1]
    lines = [line for line in lines if "compiling the CPU kernels" not in line]  # the first time on a machine
    assert lines.pop(2) == "Training model 3 on 300 images of mnist: 2 epochs, onecycle, on cpu."
    assert lines[2].startswith("EPOCH: 0  - Test Accuracy: ")
    assert lines[3].startswith("EPOCH: 1  - Test Accuracy: ")
    assert lines[4].startswith("mine: 8,650 parameters, test accuracy ")
    assert lines.pop().endswith("python -m tools.export --format html --name mine --output_dir results")
    assert lines.pop().endswith("python -m tools.web --output_dir results")
    assert lines.pop().endswith("python -m tools.evaluate --name mine --output_dir results")
    assert lines.pop() == "What next?"
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


def test_it_is_said_what_a_run_replaces(tmp_path, tiny_mnist, capsys, monkeypatch):
    flags = ["--epochs", "1", "--device", "cpu", "--data_dir", str(tiny_mnist), "--output_dir", str(tmp_path)]
    note = "Note: this replaces the files of mnist_model_1, a finished run"
    other = f"{note} with another batch_size; see --name."
    for more, told in (([], []), ([], []), (["--batch_size", "64"], [other])):
        assert command.main([*flags, *more]) == 0
        assert [line for line in capsys.readouterr().out.splitlines() if "replaces" in line] == told
    with monkeypatch.context() as patch:  # as in a checkout that has them
        patch.setattr(command.subprocess, "run", lambda *args, **options: subprocess.CompletedProcess(args, 0))
        command._say_what_is_replaced(TrainConfig(output_dir=str(tmp_path), batch_size=64, epochs=1), print)
    assert capsys.readouterr().out == f"{note} which git keeps; see --name.\n"


def test_it_is_said_how_long_a_run_will_take(tmp_path, tiny_mnist, capsys, monkeypatch):
    monkeypatch.setattr("training.report.STEPS_TIMED", 5)
    flags = ["--epochs", "2", "--device", "cpu", "--batch_size", "16", "--output_dir", str(tmp_path)]
    assert command.main([*flags, "--data_dir", str(tiny_mnist)]) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("About ")]
    assert len(told) == 1
    assert re.fullmatch(r"About \d\d:\d\d to go; Ctrl-C stops it, and --resume goes on\.", told[0])


def test_one_epoch_on_real_mnist(mnist, tmp_path, capsys):
    """9 s: 60,000 images by one thread. The command against a bar; the long tier has it in bfloat16 and compiled."""
    folders = ["--data_dir", str(mnist), "--output_dir", str(tmp_path)]
    assert command.main(["--model", "1", "--scheduler", "onecycle", "--epochs", "1", *folders]) == 0
    assert load_metrics_json("mnist_model_1", tmp_path)["test_acc"][-1] >= 98.3


def test_the_bar_shows_on_a_terminal(tmp_path, tiny, python):
    fcntl, termios = pytest.importorskip("fcntl"), pytest.importorskip("termios")
    terminal, its_end = os.openpty()
    fcntl.ioctl(its_end, termios.TIOCSWINSZ, struct.pack("4H", 40, 120, 0, 0))  # rows, columns
    folders = ["--data_dir", tiny, "--output_dir", tmp_path / "results"]
    # 150 steps, so that the bar is drawn again, which it is ten times a second
    process = python("main.py", "--epochs", "1", "--batch_size", "2", *folders, terminal=its_end)
    os.close(its_end)
    shown = b""
    with contextlib.suppress(OSError):  # what the end of a terminal's output is on Linux
        while part := os.read(terminal, 65536):
            shown += part
    os.close(terminal)
    assert process.wait() == 0
    for text in (b"epoch 0:", b"img/s", b"loss=", b"acc=", b"lr=0.0100"):
        assert text in shown


def test_a_terminal_without_the_arrow_sign(tmp_path, tiny, monkeypatch):
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="ascii", write_through=True))
    assert command.main(["--epochs", "1", "--data_dir", str(tiny), "--output_dir", str(tmp_path)]) == 0
    assert b"% ? BEST" in shown.getvalue()


def test_data_that_cannot_be_had_is_a_failure_in_one_line(tmp_path, tiny_mnist, capsys):
    (tiny_mnist / "MNIST" / "raw" / "t10k-labels-idx1-ubyte").unlink()
    status = command.main(["--data_dir", str(tiny_mnist), "--output_dir", str(tmp_path / "results")])
    error = capsys.readouterr().err
    assert status == 1
    assert "t10k-labels-idx1-ubyte missing" in error
    assert error.count("\n") == 1


def test_a_run_that_diverges_is_a_failure_in_one_line(tmp_path, tiny, capsys):
    folders = ["--data_dir", str(tiny), "--output_dir", str(tmp_path / "results")]
    assert command.main(["--scheduler", "onecycle", "--max_lr", "1e20", *folders]) == 1
    error = capsys.readouterr().err
    assert "the loss is" in error
    assert error.count("\n") == 1


def test_the_config_flag(tmp_path, tiny, capsys):
    folders = ["--data_dir", str(tiny), "--output_dir", str(tmp_path)]
    assert command.main(["--config", "reference", "--epochs", "1", *folders]) == 0
    config = load_metrics_json("mnist_model_1", tmp_path)["config"]
    assert (config["scheduler"], config["epochs"]) == ("onecycle", 1)


def test_without_pytorch_one_line_says_what_to_do():
    script = "import sys; sys.modules['torch'] = None; import main; sys.exit(main.main(['--epochs', '1']))"
    done = subprocess.run([sys.executable, "-c", script], cwd=PROJECT_DIR, capture_output=True, text=True)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert f"torch is not installed for {sys.executable}: pip install -r requirements.txt" in line
