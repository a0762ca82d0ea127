"""Training under torchrun, by real processes on this machine."""

import hashlib
import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
from conftest import make_tiny_mnist, write_sums

from common.files import PROJECT_DIR
from data_utils import load_data
from imports import torch
from training.config import TrainConfig
from training.processes import Processes
from visualization import load_metrics_json

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


@pytest.fixture
def data(tmp_path):
    """305 images: the last of the batches of 50 has 5, which two processes share as 3 and 2."""
    raw = tmp_path / "data" / "MNIST" / "raw"
    make_tiny_mnist(raw, train=305)
    write_sums(raw)
    return tmp_path / "data"


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(PROJECT_DIR), "OMP_NUM_THREADS": "1"}


def train(launcher, data, output_dir, *flags, script=PROJECT_DIR / "main.py") -> "subprocess.CompletedProcess[str]":
    arguments = [
        "--epochs",
        "2",
        "--batch_size",
        "50",
        "--device",
        "cpu",
        "--data_dir",
        data,
        "--output_dir",
        output_dir,
        *flags,
    ]
    command = [*launcher, script, *arguments]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, check=False, timeout=180)


def two_processes() -> list[str]:
    return [*TORCHRUN, "--standalone", "--nproc-per-node=2"]


@pytest.mark.parametrize("pipeline", ["tensor", "torchvision"])
def test_the_parts_of_the_batches_are_the_batches(data, pipeline):
    def epoch(share: tuple[int, int]):
        torch.manual_seed(0)
        settings = TrainConfig(batch_size=50, seed=7, pipeline=pipeline, data_dir=str(data))
        return list(load_data(settings, torch.device("cpu"), share=share).train)

    whole, first, second = epoch((0, 1)), epoch((0, 2)), epoch((1, 2))
    assert [len(labels) for _, labels in first] == [25] * 6 + [3]
    assert [len(labels) for _, labels in second] == [25] * 6 + [2]
    for (images, labels), left, right in zip(whole, first, second, strict=True):
        assert torch.equal(labels, torch.cat([left[1], right[1]]))
        if pipeline == "tensor":  # torchvision's rotations are each process's own draws
            assert torch.equal(images, torch.cat([left[0], right[0]]))


def test_part_weights_make_the_mean_of_means_the_mean():
    values = [torch.randn(50) for _ in range(6)] + [torch.randn(5)]
    weights = [list(Processes(rank, 2).part_weights(305, 50)) for rank in range(2)]
    for step, value in enumerate(values):
        parts = value.tensor_split(2)
        averaged = sum(part.mean() * weights[rank][step] for rank, part in enumerate(parts)) / 2
        torch.testing.assert_close(averaged, value.mean())
    assert weights[0][0] == weights[1][0] == 1.0


def test_two_processes_train_what_one_trains(data, tmp_path, own_network):
    """On a network without BatchNorm and dropout, where it makes no difference who computes what."""
    flags = ["--model", "linear", "--val_split", "20"]
    for name, launcher in (("one", [sys.executable]), ("two", two_processes())):
        done = train(launcher, data, tmp_path / name, *flags, script=own_network)
        assert done.returncode == 0, done.stderr
    one, two = (load_metrics_json("mnist_model_linear", tmp_path / name) for name in ("one", "two"))
    assert (one["environment"]["processes"], two["environment"]["processes"]) == (1, 2)
    for key in ("train_losses", "learning_rates", "train_acc", "test_losses", "test_acc", "val_losses", "val_acc"):
        assert two[key] == pytest.approx(one[key], rel=1e-4), key
    weights = (torch.load(tmp_path / n / "outputs" / "mnist_model_linear_params.pth") for n in ("one", "two"))
    torch.testing.assert_close(*weights)


def test_one_process_speaks_and_writes_and_the_seed_decides(data, tmp_path):
    digests = []
    for name in ("first", "again"):
        done = train(two_processes(), data, tmp_path / name, "--lr", "0.02", "--max_lr", "0.5", "--batch_size", "64")
        assert done.returncode == 0, done.stderr
        for pattern in (
            "Note: --max_lr",
            "not the original",
            "EPOCH: 0 ",
            "EPOCH: 1 ",
            "7,720 parameters",
            "  params ",
        ):
            assert len(re.findall(pattern, done.stdout)) == 1, pattern
        params = tmp_path / name / "outputs" / "mnist_model_1_params.pth"
        digests.append(hashlib.sha256(params.read_bytes()).hexdigest())
        assert load_metrics_json("mnist_model_1", tmp_path / name)["status"] == "finished"
        assert not list((tmp_path / name).rglob("*.partial"))
    assert digests[0] == digests[1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch_size", "51"], "batch_size: 51 is not allowed with 2 processes"),
        (["--batch_size", "76"], "the last batch of 305 images has 1, and every process needs one"),
        (["--epochs", "0"], "epochs: 0 is not allowed"),
    ],
)
def test_a_mistake_is_told(data, tmp_path, flags, message):
    done = train(two_processes(), data, tmp_path / "results", *flags)
    assert done.returncode != 0
    assert re.search(rf"main.py: error: .*{message}", done.stderr)
    assert not list(tmp_path.rglob("*.pth"))


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def test_two_agents_meet_as_two_machines_would(data, tmp_path):
    agent = [*TORCHRUN, "--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-id=test"]
    agent += [f"--rdzv-endpoint=127.0.0.1:{free_port()}", "--local-addr=127.0.0.1"]
    arguments = [
        "--epochs",
        "1",
        "--batch_size",
        "50",
        "--device",
        "cpu",
        "--data_dir",
        data,
        "--output_dir",
        tmp_path / "results",
    ]
    agents = [
        subprocess.Popen([*agent, PROJECT_DIR / "main.py", *arguments], env=environment(), stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    printed = [process.communicate(timeout=120)[0].decode() for process in agents]
    assert [process.returncode for process in agents] == [0, 0]
    assert sum("7,720 parameters" in text for text in printed) == 1
    assert load_metrics_json("mnist_model_1", tmp_path / "results")["environment"]["processes"] == 2


def test_when_one_process_dies_the_others_end(data, tmp_path):
    arguments = [
        "--epochs",
        "100000",
        "--batch_size",
        "50",
        "--device",
        "cpu",
        "--data_dir",
        data,
        "--output_dir",
        tmp_path / "results",
    ]
    with subprocess.Popen(
        [*two_processes(), PROJECT_DIR / "main.py", *arguments],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as launcher:
        assert any("EPOCH: 1 " in line for line in launcher.stdout)
        os.kill(load_metrics_json("mnist_model_1", tmp_path / "results")["pid"], signal.SIGKILL)
        began = time.monotonic()
        assert launcher.wait(60) != 0
        assert time.monotonic() - began < 45
        assert "SIGKILL" in launcher.stderr.read()
