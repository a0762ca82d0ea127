"""Training by two processes on this machine: started one by one in the first tier, by torchrun in the other."""

import hashlib
import os
import re
import signal
import socket
import subprocess
import sys

import pytest
from conftest import finished, make_tiny_data

from common.files import PROJECT_DIR
from data_utils import load_data
from imports import torch
from training.config import TrainConfig
from training.processes import Processes
from visualization import load_metrics_json

MAIN = PROJECT_DIR / "main.py"
TORCHRUN = ["-m", "torch.distributed.run"]
STANDALONE = ["--standalone", "--nproc-per-node=2"]


@pytest.fixture
def data(tmp_path):
    """305 images: the last of the batches of 50 has 5, which two processes share as 3 and 2."""
    return make_tiny_data(tmp_path / "data", train=305)


def flags_of(data, output_dir, *others) -> list[str]:
    """Of two epochs of batches of 50, if ``others`` do not say otherwise."""
    folders = ["--data_dir", str(data), "--output_dir", str(output_dir)]
    return ["--epochs", "2", "--batch_size", "50", "--device", "cpu", *folders, *others]


def environment(**others: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(PROJECT_DIR), **others}


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def one_by_one(python, *arguments: object) -> list:
    """Two processes of what torchrun calls a worker group, which meet without it."""
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "TORCHELASTIC_RUN_ID": "test"}
    ranks = [{"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2"} for rank in "01"]
    return [python(*arguments, env=environment(**meeting, **rank)) for rank in ranks]


def by_torchrun(python, *arguments: object) -> list:
    return [python(*TORCHRUN, *STANDALONE, *arguments, env=environment())]


@pytest.fixture(params=[one_by_one, pytest.param(by_torchrun, marks=pytest.mark.long)], ids=["alone", "torchrun"])
def train(request, python):
    """Runs a script by two processes. Returns whether they succeeded, and what they printed together."""

    def run(*arguments: object) -> "subprocess.CompletedProcess[str]":
        done = [finished(process) for process in request.param(python, *arguments)]
        out, err = ("".join(parts) for parts in zip(*((one.stdout, one.stderr) for one in done), strict=True))
        return subprocess.CompletedProcess(arguments, max(abs(one.returncode) for one in done), out, err)

    return run


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


def test_two_processes_train_what_one_trains(data, tmp_path, own_network, python, train):
    """On a network without BatchNorm and dropout, where it makes no difference who computes what."""
    one, two = (flags_of(data, tmp_path / n, "--model", "linear", "--val_split", "20") for n in ("one", "two"))
    for done in (finished(python(own_network, *one, env=environment())), train(own_network, *two)):
        assert done.returncode == 0, done.stderr
    one, two = (load_metrics_json("mnist_model_linear", tmp_path / name) for name in ("one", "two"))
    assert (one["environment"]["processes"], two["environment"]["processes"]) == (1, 2)
    for key in ("train_losses", "learning_rates", "train_acc", "test_losses", "test_acc", "val_losses", "val_acc"):
        assert two[key] == pytest.approx(one[key], rel=1e-4), key
    weights = (torch.load(tmp_path / n / "outputs" / "mnist_model_linear_params.pth") for n in ("one", "two"))
    torch.testing.assert_close(*weights)


def test_one_process_speaks_and_writes_and_the_seed_decides(data, tmp_path, train):
    digests = []
    for name in ("first", "again"):
        done = train(MAIN, *flags_of(data, tmp_path / name, "--lr", "0.02", "--max_lr", "0.5", "--batch_size", "64"))
        assert done.returncode == 0, done.stderr
        assert "FutureWarning" not in done.stderr
        said = ("Note: --max_lr", "not the original", "EPOCH: 0 ", "EPOCH: 1 ", "7,720 parameters", "  params ")
        for pattern in said:
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
def test_a_mistake_is_told(data, tmp_path, train, flags, message):
    done = train(MAIN, *flags_of(data, tmp_path / "results", *flags))
    assert done.returncode != 0
    assert re.search(rf"main.py: error: .*{message}", done.stderr)
    assert not list(tmp_path.rglob("*.pth"))


@pytest.mark.long
def test_two_agents_meet_as_two_machines_would(data, tmp_path, python):
    agent = [*TORCHRUN, "--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-id=test"]
    agent += [f"--rdzv-endpoint=127.0.0.1:{free_port()}", "--local-addr=127.0.0.1"]
    arguments = flags_of(data, tmp_path / "results", "--epochs", "1")
    agents = [python(*agent, MAIN, *arguments, env=environment()) for _ in range(2)]
    done = [finished(process) for process in agents]
    assert [one.returncode for one in done] == [0, 0]
    assert sum("7,720 parameters" in one.stdout for one in done) == 1
    assert load_metrics_json("mnist_model_1", tmp_path / "results")["environment"]["processes"] == 2


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX's")
def test_when_one_process_dies_the_other_ends(data, tmp_path, python):
    main, other = one_by_one(python, MAIN, *flags_of(data, tmp_path / "results", "--epochs", "100000"))
    assert any("EPOCH: 1 " in line for line in main.stdout)
    main.kill()
    done = finished(other)  # long before the five minutes after which a silent process is taken for dead
    assert done.returncode == 1
    assert "process 1 lost the others" in done.stderr


@pytest.mark.long
def test_when_one_process_dies_torchrun_ends(data, tmp_path, python):
    arguments = flags_of(data, tmp_path / "results", "--epochs", "100000")
    (launcher,) = by_torchrun(python, MAIN, *arguments)
    assert any("EPOCH: 1 " in line for line in launcher.stdout)
    os.kill(load_metrics_json("mnist_model_1", tmp_path / "results")["pid"], signal.SIGKILL)
    _, error = launcher.communicate(240)  # likewise
    assert launcher.wait() != 0
    assert "SIGKILL" in error
