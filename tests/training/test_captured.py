"""A GPU is not at hand here: a stand-in takes the place of recording and replaying, and nothing else."""

from dataclasses import replace

import pytest

from common.cli import silent
from imports import torch
from training import captured, setup
from training.captured import CapturedStep
from training.config import TrainConfig
from training.processes import Processes
from training.report import TrainingError
from training.setup import make_network, prepare_run
from training.together import train_together
from visualization import load_metrics_json

CPU = torch.device("cpu")


class Recorder:
    """Warms up as ``record`` does, and replays by computing again."""

    def __init__(self) -> None:
        self.recordings = self.replays = 0

    def __call__(self, function, generators):
        self.recordings += 1
        for _ in range(captured.WARM_UP_STEPS):
            function()

        def replay() -> None:
            self.replays += 1
            function()

        return replay


@pytest.fixture
def recorder(monkeypatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr(captured, "record", recorder)
    return recorder


def as_captured(run, without=pytest.fail):
    run.step = CapturedStep(**vars(run.step), batches=run.data.train, without=without)
    return run


@pytest.fixture
def make_run(tiny_mnist, tmp_path):
    """A run of the tiny data set: 300 images in batches of 64, so that the last of an epoch is short."""

    def make(name: str, **settings):
        settings = {"scheduler": "onecycle", "epochs": 3, "batch_size": 64, "kernels": False, **settings}
        config = TrainConfig(name=name, device="cpu", data_dir=str(tiny_mnist), output_dir=str(tmp_path), **settings)
        config.files.make_folders()
        return prepare_run(config, CPU, log=silent)

    return make


RECIPES = [
    {"augment": "elastic", "label_smoothing": 0.1, "weight_decay": 1e-3, "nesterov": True},
    {"ema_decay": 0.9},
    {"augment": "affine", "plain_epochs": 1},
    {"scheduler": "step", "momentum": 0.0},
]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_captured_step_computes_what_a_step_does(make_run, recorder, recipe):
    plain = make_run("plain", **recipe)
    plain.train()
    replayed = as_captured(make_run("captured", **recipe))
    replayed.train()
    assert recorder.recordings == 1 + ("plain_epochs" in recipe)  # the step without augmentation is another one
    assert recorder.replays == 3 * 4 - ("ema_decay" in recipe)  # of five batches the last is short
    for key in ("train_losses", "learning_rates", "test_losses"):  # the rate on the device has 24 bits
        assert replayed.metrics[key] == pytest.approx(plain.metrics[key], rel=2e-4), key
    for one, other in zip(plain.result.state_dict().values(), replayed.result.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_warming_up_leaves_no_trace(make_run, recorder):
    run = as_captured(make_run("run", augment="affine"))
    run.model.train()
    batch = next(run.step.inputs(run.data.train))

    def state():
        run_tensors = [tensor.clone() for tensor in run.step._tensors()]
        return [*run_tensors, run.data.generator.get_state(), torch.get_rng_state()]

    run.step._make_momentum()
    before = state()
    run.step._record()
    assert all(torch.equal(one, other) for one, other in zip(before, state(), strict=True))
    run.step(batch)
    assert not any(torch.equal(one, other) for one, other in zip(before[:2], state()[:2], strict=True))


def test_a_stopped_run_goes_on_bit_for_bit(make_run, recorder):
    """The recording of the process that goes on is another one; what it computes is not."""
    recipe = {"ema_decay": 0.9, "augment": "affine"}
    whole = as_captured(make_run("whole", **recipe))
    whole.train()

    class EnoughError(Exception):
        pass

    def enough(metrics):
        raise EnoughError

    first = as_captured(make_run("part", **recipe))
    first.after_epoch = enough
    with pytest.raises(EnoughError):
        first.train()
    second = as_captured(make_run("part", **recipe))
    second.restore(torch.load(second.config.files.checkpoint, weights_only=True))
    second.train()
    assert second.metrics["train_losses"] == whole.metrics["train_losses"]
    for one, other in zip(whole.result.state_dict().values(), second.result.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_what_cannot_be_recorded_is_said_and_runs_as_it_is(make_run, monkeypatch):
    def refuse(function, generators):
        function()  # the warm-up goes well, and leaves its traces
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(captured, "record", refuse)
    heard = []
    run = as_captured(make_run("run"), without=heard.append)
    run.train()
    assert heard == ["the step cannot be recorded: operation not permitted when stream is capturing"]
    plain = make_run("plain")
    plain.train()
    assert run.metrics["train_losses"] == pytest.approx(plain.metrics["train_losses"], rel=2e-4)


def test_a_gpu_gets_a_graph_where_that_can_be(make_run):
    run, lines = make_run("run"), []
    run.report.log = lines.append
    assert isinstance(setup.captured(run.step, run.data.train, Processes(), run.report), CapturedStep)
    assert run.metrics["environment"]["graph"] is True
    assert setup.captured(run.step, run.data.train, Processes(0, 2), run.report) is run.step
    assert run.metrics["environment"]["graph"] is False
    batches = make_run("other", pipeline="torchvision").data.train
    assert setup.captured(run.step, batches, Processes(), run.report) is run.step
    assert lines == [
        "Note: without a CUDA graph, so slower: several processes exchange their gradients within a step.",
        "Note: without a CUDA graph, so slower: the torchvision pipeline makes its batches on the CPU.",
    ]


def test_runs_together_are_the_runs_alone(make_run):
    alone = [make_run(f"alone_{seed}", seed=seed) for seed in (1, 2)]
    for run in alone:
        torch.manual_seed(run.config.seed)  # as where it is made
        make_network(run.config, CPU)
        run.train()
    configs = [replace(run.config, name=run.config.run_name.replace("alone", "together")) for run in alone]
    results = train_together(configs, silent)
    for run, result in zip(alone, results, strict=True):
        assert result.metrics["status"] == "finished"
        assert result.metrics["train_losses"] == run.metrics["train_losses"]
        saved = torch.load(result.files.params, weights_only=True)
        for key, value in run.result.state_dict().items():
            assert torch.equal(saved[key], value), key


def test_an_error_of_one_run_ends_all_and_each_says_how(make_run, tmp_path):
    good, bad = (
        replace(make_run(name, **lr).config, name=name) for name, lr in (("good", {}), ("bad", {"max_lr": 1e20}))
    )
    with pytest.raises(TrainingError):
        train_together([good, bad], silent)
    assert {load_metrics_json(name, tmp_path)["status"] for name in ("good", "bad")} == {"failed"}
