import hashlib
import json
import math
from pathlib import Path

import pytest

import training.run
from common.cli import silent
from common.files import UsageError
from data_utils import load_data
from imports import AveragedModel, F, get_ema_multi_avg_fn, nn, optim, torch
from model_strategy import get_strategy
from training import report
from training.config import TrainConfig
from training.report import TrainingError
from training.setup import prepare_run
from training.step import Step, evaluate, train_one_epoch
from training.train import TrainResult, train_and_evaluate
from visualization import load_metrics_json, load_model_params

CPU = torch.device("cpu")


@pytest.fixture
def run(tmp_path, tiny):
    """Trains on the tiny data set; every call into a folder of its own."""
    calls = iter(range(100))

    def train(**settings) -> TrainResult:
        settings = {"epochs": 2, "scheduler": "onecycle", "batch_size": 64, "device": "cpu", **settings}
        output_dir = settings.pop("output_dir", tmp_path / f"run{next(calls)}")
        config = TrainConfig(data_dir=str(tiny), output_dir=str(output_dir), **settings)
        return train_and_evaluate(config, log=lambda line: None)

    return train


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("model", ["1", "2", "3"])
def test_what_a_run_leaves(run, model):
    result = run(model=model)
    name, files = f"mnist_model_{model}", result.files
    written = {p.relative_to(files.root).as_posix() for p in files.root.rglob("*") if p.is_file()}
    assert written == {
        f"outputs/{name}_params.pth",
        f"outputs/{name}_metrics.json",
        f"outputs/{name}_checkpoint.pth",
        f"outputs/{name}_checkpoint_before.pth",
        f"outputs/{name}.log",
        f"summaries/{name}_summary.txt",
        f"plots/{name}.png",
    }
    loaded = load_model_params(get_strategy(model).build(), name, files.root)
    trained = result.model.state_dict()
    assert all(torch.equal(value, trained[key]) for key, value in loaded.state_dict().items())


@pytest.mark.parametrize("pipeline", ["tensor", "torchvision"])
def test_metrics_of_a_run(run, pipeline):
    """2 s: three epochs, by torchvision's pipeline too."""
    result = run(epochs=3, val_split=50, pipeline=pipeline)
    metrics = load_metrics_json("mnist_model_1", result.files.root)
    assert metrics == result.metrics
    assert (metrics["schema"], metrics["name"], metrics["model"]) == (1, "mnist_model_1", "1")
    assert (metrics["status"], metrics["parameters"]) == ("finished", 7_720)
    assert metrics["config"]["val_split"] == 50
    versions = {"python", "torch", "torchvision"}
    machine = {"device", "threads", "platform", "processor", "processes", "kernels", "graph"}
    assert set(metrics["environment"]) == {*versions, *machine, "git_commit"}
    batches = math.ceil(250 / 64)
    assert len(metrics["train_losses"]) == len(metrics["learning_rates"]) == 3 * batches
    for key in ("train_acc", "test_losses", "test_acc", "val_losses", "val_acc", "epoch_seconds"):
        assert len(metrics[key]) == 3, key
    assert metrics["learning_rates"][0] == pytest.approx(0.1)
    assert metrics["learning_rates"][-1] == pytest.approx(0.1 / 7.5)
    assert sum(metrics["epoch_seconds"]) < metrics["total_seconds"]
    assert all(0 <= accuracy <= 100 for accuracy in metrics["train_acc"] + metrics["test_acc"])


def test_it_learns(run):
    metrics = run(epochs=12, batch_size=30).metrics
    assert metrics["test_acc"][-1] > 90
    assert metrics["train_losses"][-1] < metrics["train_losses"][0] / 2


def test_metrics_are_of_the_saved_network(run, tiny):
    result = run()
    data = load_data(TrainConfig(data_dir=str(tiny)), CPU, silent)
    model = load_model_params(get_strategy("1").build(), "mnist_model_1", result.files.root)
    loss, accuracy = evaluate(model, data.test, CPU)
    assert accuracy == pytest.approx(result.metrics["test_acc"][-1])
    assert loss == pytest.approx(result.metrics["test_losses"][-1], abs=1e-5)


@pytest.mark.parametrize("scheduler", ["step", "onecycle"])
@pytest.mark.parametrize("pipeline", ["tensor", "torchvision"])
def test_same_seed_same_weights(run, scheduler, pipeline):
    """3 to 5 s: three trainings."""
    settings = {"scheduler": scheduler, "pipeline": pipeline, "epochs": 1}
    first, again, other = run(**settings), run(**settings), run(**settings, seed=2)
    assert sha256(first.files.params) == sha256(again.files.params) != sha256(other.files.params)
    assert first.metrics["train_losses"] == again.metrics["train_losses"]


def test_step_schedule_falls_after_six_epochs(run):
    rates = run(scheduler="step", epochs=7).metrics["learning_rates"]
    assert rates == pytest.approx([0.01] * 6 * 5 + [0.001] * 5)


def test_log_has_the_specified_lines(run, tmp_path, tiny, monkeypatch):
    """2 s: eleven epochs."""
    accuracies = iter([(0.1, 98.0), (0.1, 99.43), (0.1, 99.43), *[(0.1, 99.0)] * 8])
    monkeypatch.setattr(training.run, "evaluate", lambda *args: next(accuracies))
    lines = run(epochs=11).files.log.read_text(encoding="utf-8").splitlines()
    assert lines[:3] == [
        "EPOCH: 0  - Test Accuracy: 98.00% ← BEST",
        "EPOCH: 1  - Test Accuracy: 99.43% ← BEST",
        "EPOCH: 2  - Test Accuracy: 99.43%",
    ]
    assert lines[10] == "EPOCH: 10 - Test Accuracy: 99.00%"


def test_checkpoint_holds_the_state_of_the_run(run):
    result = run(epochs=2)
    state = torch.load(result.files.checkpoint, weights_only=True)
    assert (state["schema"], state["epochs_done"]) == (2, 2)
    assert state["config"] == result.metrics["config"]
    assert state["metrics"]["test_acc"] == result.metrics["test_acc"]
    (generators,) = state["processes"]
    assert torch.equal(generators["torch"], torch.get_rng_state())
    trained = result.model.state_dict()
    assert all(torch.equal(value, trained[key]) for key, value in state["model"].items())
    assert len(state["optimizer"]["state"]) == len(list(result.model.parameters()))


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_weights(run, tmp_path):
    before = run(output_dir=tmp_path / "same")
    weights = sha256(before.files.params)
    with pytest.raises(TrainingError, match=r"the loss is (nan|inf) in epoch \d+, batch \d+, at learning rate .* try"):
        run(output_dir=tmp_path / "same", max_lr=1e20)
    metrics = load_metrics_json("mnist_model_1", tmp_path / "same")
    assert metrics["status"] == "failed"
    assert sha256(before.files.params) == weights


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt, "interrupted"), (OSError, "failed")])
def test_a_run_that_stops_early_says_so(run, tmp_path, monkeypatch, error, status):
    def stop(*args):
        raise error

    monkeypatch.setattr(training.run, "evaluate", stop)
    with pytest.raises(error):
        run(output_dir=tmp_path / "same")
    metrics = load_metrics_json("mnist_model_1", tmp_path / "same")
    assert metrics["status"] == status
    assert len(metrics["train_losses"]) == 5  # what was measured until then is kept
    assert not (tmp_path / "same" / "outputs" / "mnist_model_1_params.pth").exists()


def test_metrics_are_written_while_training(run, monkeypatch):
    seen = []
    monkeypatch.setattr(report, "METRICS_SECONDS", 0.0)
    save = report.save_metrics_json
    monkeypatch.setattr(report, "save_metrics_json", lambda *a, **k: seen.append(json.dumps(a[0])) or save(*a, **k))
    run(epochs=1, batch_size=30)
    counts = [len(json.loads(metrics)["train_losses"]) for metrics in seen]
    assert counts[:3] == [0, 5, 10]  # fetched 5 at a time
    assert {json.loads(metrics)["status"] for metrics in seen[:-1]} == {"running"}


def test_evaluate_against_the_definition():
    class Fixed(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.log_softmax(x.flatten(1)[:, :10], dim=1)

    images, labels = torch.randn(25, 1, 28, 28), torch.randint(0, 10, (25,))
    logits = images.flatten(1)[:, :10]
    batches = [(images[:20], labels[:20]), (images[20:], labels[20:])]  # of unequal sizes
    loss, accuracy = evaluate(Fixed(), batches, CPU)
    assert loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert accuracy == pytest.approx(100 * (logits.argmax(1) == labels).float().mean().item())


def test_train_one_epoch_is_sgd_with_momentum():
    """Against the update written out by hand, on a network without randomness."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 10), nn.LogSoftmax(dim=1))
    weight, velocity = model[1].weight.detach().clone(), torch.zeros(10, 784)
    batches = [(torch.randn(6, 1, 28, 28), torch.randint(0, 10, (6,))) for _ in range(3)]
    optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    reported = list(train_one_epoch(Step(model, optimizer, CPU), batches))
    bias, bias_velocity = torch.zeros(10), torch.zeros(10)
    torch.manual_seed(0)
    bias = nn.Linear(784, 10).bias.detach().clone()
    for images, labels in batches:
        x = images.flatten(1)
        error = (torch.softmax(x @ weight.T + bias, dim=1) - F.one_hot(labels, 10)) / 6
        velocity = 0.9 * velocity + error.T @ x
        bias_velocity = 0.9 * bias_velocity + error.sum(0)
        weight, bias = weight - 0.1 * velocity, bias - 0.1 * bias_velocity
    torch.testing.assert_close(model[1].weight.detach(), weight)
    assert [(result.totals[2].item(), result.rate) for result in reported] == [(6, 0.1)] * 3


def test_the_moving_average_of_the_weights_is_its_closed_form():
    torch.manual_seed(0)
    model = get_strategy("1").build()
    decay, batches = 0.6, [(torch.randn(8, 1, 28, 28), torch.randint(0, 10, (8,))) for _ in range(5)]
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    steps = []

    optimizer = optim.SGD(model.parameters(), lr=0.1)
    for _ in train_one_epoch(Step(model, optimizer, CPU, average=average), batches):
        steps.append({key: value.clone() for key, value in model.state_dict().items()})
    # after n steps decay^(n - 1) of the first step's, and (1 - decay) * decay^(n - k) of each later step k's
    weights = [decay ** (len(steps) - 1), *((1 - decay) * decay ** (len(steps) - k) for k in range(2, len(steps) + 1))]
    assert sum(weights) == pytest.approx(1)
    averaged = average.module.state_dict()
    for key in ("stem.0.0.weight", "stem.0.2.weight", "stem.0.2.running_mean", "stem.0.2.running_var", "output.weight"):
        expected = sum(weight * step[key] for weight, step in zip(weights, steps, strict=True))
        torch.testing.assert_close(averaged[key], expected)
        assert not torch.equal(averaged[key], steps[-1][key])


@pytest.mark.parametrize("kernels", [False, True])
def test_with_a_moving_average_the_average_is_evaluated_and_saved(run, tiny, kernels):
    result = run(ema_decay=0.9, kernels=kernels)
    checkpoint = torch.load(result.files.checkpoint, weights_only=True)
    saved = torch.load(result.files.params, weights_only=True)
    for key, value in saved.items():
        assert torch.equal(value, checkpoint["average"][f"module.{key}"])
    assert not torch.equal(saved["output.weight"], checkpoint["model"]["output.weight"])
    network = load_model_params(get_strategy("1").build(), "mnist_model_1", result.files.root)
    data = load_data(TrainConfig(data_dir=str(tiny)), CPU, silent)
    assert evaluate(network, data.test, CPU)[1] == pytest.approx(result.metrics["test_acc"][-1], abs=1e-4)


def test_threads(run):
    before = torch.get_num_threads()
    try:
        assert run(epochs=1, threads=1).metrics["environment"]["threads"] == 1
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_too_large_a_split_is_the_users_mistake(run):
    with pytest.raises(UsageError, match="val_split: 300 is not allowed"):
        run(val_split=300)


def test_settings_of_a_config_file_reach_the_training(tmp_path, tiny):
    refined = {
        "dropout": 0.3,
        "bn_momentum": 0.02,
        "nesterov": True,
        "pct_start": 0.5,
        "div_factor": 5.0,
        "final_div_factor": 1000.0,
        "weight_decay": 0.01,
        "label_smoothing": 0.1,
    }
    folders = {"data_dir": str(tiny), "output_dir": str(tmp_path)}
    config = TrainConfig(scheduler="onecycle", epochs=2, batch_size=30, device="cpu", **refined, **folders)
    config.files.make_folders()
    run = prepare_run(config, CPU, log=silent)
    assert {layer.p for layer in run.model.modules() if isinstance(layer, nn.Dropout)} == {0.3}
    assert {layer.momentum for layer in run.model.modules() if isinstance(layer, nn.BatchNorm2d)} == {0.02}
    weights, others = run.step.optimizer.param_groups
    assert (weights["weight_decay"], others["weight_decay"]) == (0.01, 0.0)
    assert sum(p.numel() for p in weights["params"]) == 7_720 - 2 * (8 + 3 * 16 + 2 * 10)  # all but BatchNorm's
    assert all(p.dim() == 1 for p in others["params"])
    for group in run.step.optimizer.param_groups:
        assert (group["nesterov"], group["momentum"]) == (True, 0.9)
        assert group["lr"] == pytest.approx(0.75 / 5)
        assert group["min_lr"] == pytest.approx(0.75 / 5 / 1000)
    run.train()
    rates = run.metrics["learning_rates"]
    assert rates.index(max(rates)) == 9  # half of 20 batches
    # The loss of guessing spread labels cannot fall below their entropy; that of the last batches would.
    entropy = -(0.91 * math.log(0.91) + 9 * 0.01 * math.log(0.01))
    assert min(run.metrics["train_losses"]) > entropy


def test_what_batchnorm_remembers_changes_no_weight(run):
    quick, slow = run(name="quick", bn_momentum=0.5).model, run(name="slow", bn_momentum=0.01).model
    for (name, one), other in zip(quick.named_parameters(), slow.parameters(), strict=True):
        assert torch.equal(one, other), name
    for name, one in quick.named_buffers():
        if name.endswith("running_var"):
            assert not torch.equal(one, slow.get_buffer(name)), name


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_label_smoothing_is_torchs(smoothing):
    torch.manual_seed(0)
    images, labels = torch.randn(12, 1, 1, 5), torch.randint(0, 4, (12,))
    model = nn.Sequential(nn.Flatten(), nn.Linear(5, 4), nn.LogSoftmax(1))
    expected = F.cross_entropy(model[:2](images), labels, label_smoothing=smoothing)
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    batches = [(images, labels)]
    (result,) = train_one_epoch(Step(model, optimizer, CPU, label_smoothing=smoothing), batches)
    torch.testing.assert_close(result.totals[0] / result.totals[2], expected.detach())


@pytest.mark.parametrize("pipeline", ["tensor", "torchvision"])
def test_a_run_without_the_test_set_is_the_same_run(tiny, tmp_path, pipeline):
    config = TrainConfig(
        epochs=3, val_split=100, batch_size=20, pipeline=pipeline, data_dir=str(tiny), output_dir=str(tmp_path)
    )
    config.files.make_folders()
    heard: list[list[float]] = []
    runs = []
    for with_test in (True, False):
        run = prepare_run(config, CPU, log=silent, with_test=with_test)
        run.after_epoch = lambda metrics: heard.append(list(metrics["val_acc"]))
        run.train()
        runs.append(run)
    with_test, without = runs
    assert [len(run.metrics["test_acc"]) for run in runs] == [3, 0]
    history = with_test.metrics["val_acc"]
    assert without.metrics["val_acc"] == history
    assert heard == 2 * [history[:1], history[:2], history]
    weights = without.model.state_dict()
    assert all(torch.equal(weights[key], value) for key, value in with_test.model.state_dict().items())


def test_momentum_is_a_setting(tiny, tmp_path):
    config = TrainConfig(momentum=0.5, data_dir=str(tiny), output_dir=str(tmp_path))
    config.files.make_folders()
    assert prepare_run(config, CPU).step.optimizer.param_groups[0]["momentum"] == 0.5


def test_the_last_epochs_are_on_images_as_they_are(run):
    losses = [run(**s).metrics["train_losses"] for s in ({"augment": "none"}, {"plain_epochs": 2}, {"plain_epochs": 1})]
    assert losses[0] == losses[1] != losses[2]
    with pytest.raises(UsageError, match="plain_epochs: not allowed with --pipeline torchvision"):
        run(plain_epochs=1, pipeline="torchvision")
