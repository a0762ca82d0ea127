"""What only a GPU shows: ``make gpu-check``. With a stand-in for the graph, test_captured.py has the same code here."""

import os
import socket
import subprocess
import sys
from dataclasses import replace

import pytest

from common.cli import silent
from common.files import PROJECT_DIR
from imports import torch
from training.checkpoint import load_checkpoint, resumed_config
from training.config import TrainConfig
from training.machine import make_deterministic
from training.processes import Processes
from training.run import StoppedError
from training.setup import prepare_run
from training.step import Step, train_one_epoch
from training.together import train_together
from training.train import train_and_evaluate
from visualization import load_metrics_json

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="there is no GPU here: the CUDA paths are not tested"
)
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before the first of these runs, deterministic or not
GPU = torch.device("cuda:0")

# What a step may have in it. Of 300 images in batches of 64 the last of an epoch is short, so not from the graph.
RECIPES = [
    pytest.param({}, id="specification"),
    pytest.param({"augment": "elastic", "label_smoothing": 0.1, "weight_decay": 1e-3, "nesterov": True}, id="rich"),
    pytest.param({"ema_decay": 0.9, "model": "3"}, id="average"),
    pytest.param({"amp": True}, id="amp"),
    pytest.param({"kernels": False, "augment": "affine", "plain_epochs": 1}, id="plain"),
]


@pytest.fixture
def config(tiny_mnist, tmp_path):
    """Of a small run on the GPU, by a name and what is different."""

    def make(name: str, **settings) -> TrainConfig:
        settings = {"scheduler": "onecycle", "epochs": 3, "batch_size": 64, **settings}
        return TrainConfig(name=name, device="cuda", data_dir=str(tiny_mnist), output_dir=str(tmp_path), **settings)

    yield make
    make_deterministic(False)


def train(config: TrainConfig, graph: bool = True):
    """The result of a run, which had a graph or not."""
    lines: list[str] = []
    result = train_and_evaluate(config, lines.append)
    assert result.metrics["environment"]["graph"] is graph, lines
    return result


def assert_equal(one, other):
    """Two runs, to the last bit."""
    assert one.metrics["train_losses"] == other.metrics["train_losses"]
    assert one.metrics["test_acc"] == other.metrics["test_acc"]
    states = one.model.state_dict(), other.model.state_dict()
    assert [key for key in states[0] if not torch.equal(states[0][key], states[1][key])] == []


@pytest.mark.parametrize("recipe", RECIPES)
def test_deterministic_runs_are_equal(config, recipe):
    assert_equal(*(train(config(name, deterministic=True, **recipe)) for name in ("one", "other")))


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_stopped_run_goes_on_bit_for_bit(config, recipe):
    whole = train(config("whole", deterministic=True, **recipe))
    part = config("part", deterministic=True, **recipe)
    with pytest.raises(StoppedError):
        train_and_evaluate(part, silent, stop_requested=iter([False] * 12 + [True] * 9).__next__)  # in the third epoch
    checkpoint = load_checkpoint(part.files, silent)
    assert checkpoint["epochs_done"] == 2
    assert_equal(whole, train_and_evaluate(resumed_config(checkpoint, part.files, {}), silent, checkpoint))


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_graph_computes_what_its_operations_do(config, recipe):
    with_graph = train(config("graph", deterministic=True, **recipe))
    without = train(config("operations", deterministic=True, graph=False, **recipe), graph=False)
    near = {"rel": 0.05, "abs": 0.02} if recipe.get("amp") else {"rel": 2e-3, "abs": 1e-4}
    assert with_graph.metrics["train_losses"] == pytest.approx(without.metrics["train_losses"], **near)
    assert with_graph.metrics["test_losses"] == pytest.approx(without.metrics["test_losses"], **near)
    assert with_graph.metrics["learning_rates"] == without.metrics["learning_rates"]


@pytest.mark.parametrize("recipe", [*RECIPES, pytest.param({"graph": False}, id="no-graph")])
def test_runs_together_are_the_runs_alone(config, recipe):
    graph = recipe.get("graph", True)
    alone = [train(config(f"alone_{seed}", seed=seed, deterministic=True, **recipe), graph) for seed in (1, 2)]
    for call in ("first", "second"):
        configs = [config(f"{call}_{seed}", seed=seed, deterministic=True, **recipe) for seed in (1, 2)]
        for one, other in zip(alone, train_together(configs, silent), strict=True):
            assert_equal(one, other)


@pytest.mark.parametrize("settings", [{}, {"ema_decay": 0.9}, {"amp": True}])
def test_a_step_never_waits_for_the_gpu(config, settings):
    settings = {"batch_size": 60, **settings}
    run = prepare_run(config("run", **settings), GPU, log=silent)
    run.config.files.make_folders()

    def epoch() -> None:
        for result in train_one_epoch(run.step, run.data.train):
            run.report.step(result)

    epoch()  # records
    assert run.metrics["environment"]["graph"] is True
    run.report.fetch()
    run.report.fetch_every = 1000
    torch.cuda.set_sync_debug_mode("error")
    try:
        epoch()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_compiled_step_is_recorded_and_learns(config):
    result = train(config("compiled", compile=True, epochs=8))
    assert result.metrics["train_losses"][-1] < result.metrics["train_losses"][0]


def command(config: TrainConfig, *launcher: str) -> dict:
    """The metrics of a run by the command itself."""
    place = ["--data_dir", config.data_dir, "--output_dir", config.output_dir, "--name", config.name]
    flags = ["--epochs", "2", "--batch_size", "64", "--device", "cuda", *place]
    line = [sys.executable, *launcher, str(PROJECT_DIR / "main.py"), *flags]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return load_metrics_json(config.name, config.output_dir)


def test_the_command_and_torchrun(config):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"]
    for metrics in (command(config("alone")), command(config("torchrun"), *torchrun)):
        assert metrics["environment"]["device"] == torch.cuda.get_device_name(0)
        assert metrics["environment"]["graph"] is True
        assert len(metrics["train_losses"]) == 10


def test_a_process_that_exchanges_by_nccl(config, monkeypatch):
    """Of two it has the part; that there is no other makes each sum its own value."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for key, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(key, str(value))
    processes = Processes(0, 2)
    with processes.connected(GPU):
        assert processes.sum(torch.ones(3, device=GPU)).tolist() == [1, 1, 1]
        run = prepare_run(config("run", epochs=4), GPU, processes, silent)
        run.config.files.make_folders()
        assert type(run.step) is Step
        run.train()
    assert run.metrics["environment"]["graph"] is False
    assert run.metrics["train_losses"][-1] < run.metrics["train_losses"][0]


def test_what_cannot_be_recorded_is_said_and_runs_as_it_is(config):
    """Last of all: a recording that fails could leave its mark."""
    lines: list[str] = []
    run = prepare_run(config("run", kernels=False), GPU, log=lines.append)

    def wait(model, images, output) -> None:
        output.sum().item()

    run.model.register_forward_hook(wait)
    run.config.files.make_folders()
    run.train()
    assert any(line.startswith("Note: without a CUDA graph, so slower: the step cannot be") for line in lines), lines
    assert run.metrics["environment"]["graph"] is False
    again = train(replace(run.config, name="again"))  # and the next run is as if it had not been
    assert again.metrics["status"] == "finished"
