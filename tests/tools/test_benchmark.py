import json
import math
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import HERE_FIRST, eventually

import tools.benchmark.throughput
import tools.timing
from imports import nn, torch
from models.blocks import ConvBlock
from tests import measure
from tools.benchmark import __main__ as benchmark
from tools.benchmark.accuracy import SeriesStore, accuracy_figure
from tools.benchmark.throughput import settings_to_compare, work_of_an_image
from tools.intervals import mean_and_interval
from tools.naive import NaiveTraining, plain_network
from training.config import TrainConfig
from training.machine import has_bfloat16
from visualization import load_metrics_json


@pytest.fixture
def benchmarked(capsys):
    """Runs the command: its exit status, and what it said."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        return benchmark.main(list(map(str, arguments))), *capsys.readouterr()

    return run


def test_mean_and_interval_by_hand():
    mean, deviation, half = mean_and_interval([1.0, 2.0, 3.0, 4.0])
    assert mean == 2.5
    assert deviation == pytest.approx(math.sqrt(5 / 3))
    assert half == pytest.approx(3.182446 * math.sqrt(5 / 3) / 2)  # Student's t, 3 degrees of freedom
    assert math.isnan(mean_and_interval([1.0])[2])


def test_the_work_of_an_image_by_hand():
    convolutions = 72 * 26**2 + 1152 * 24**2 + 160 * 24**2 + 1440 * 10**2 + 2304 * 8**2 + 1440 * 6**2 + 900 * 6**2
    outputs = 8 * 26**2 + 16 * 24**2 + 10 * 24**2 + 16 * 10**2 + 16 * 8**2 + 10 * 6**2 + 10 * 6**2
    assert work_of_an_image("1") == (6 * (convolutions + 100), 20 * (outputs + 10))


def test_the_reference_is_naive():
    model = plain_network("3")
    dropouts = [module for module in model.modules() if isinstance(module, nn.Dropout)]
    assert [type(module) for module in dropouts] == [nn.Dropout] * 7
    assert {module.p for module in dropouts} == {0.025}
    assert not any(isinstance(module, ConvBlock) for module in model.modules())
    assert sum(p.numel() for p in model.parameters()) == 8_650


def test_the_reference_learns(tiny):
    """2 s: twelve epochs, naively."""
    training = NaiveTraining(TrainConfig(data_dir=str(tiny), scheduler="onecycle", epochs=12, batch_size=30))
    for _ in range(12):
        assert sum(training.train_batches()) == 300
    assert training.evaluate() > 90
    assert training.optimizer.param_groups[0]["lr"] == pytest.approx(0.75 / 7.5 / 7.5, rel=0.05)


def test_a_gpu_is_compared_by_its_own_settings(monkeypatch):
    monkeypatch.setattr("tools.benchmark.throughput.has_bfloat16", lambda device: True)
    settings = settings_to_compare(128, torch.device("cuda"))
    assert [setting.label for setting in settings] == [
        "naive reference",
        "--no-kernels",
        "default",
        "--batch_size 512",
        "--amp",
        "--no-graph",
    ]
    assert [setting.graph for setting in settings] == [False, True, True, True, True, False]


@pytest.mark.long
def test_throughput(tiny, tmp_path, benchmarked, monkeypatch):
    bounds = {"matrix_flops": 1e12, "copied_bytes": 1e11}  # a second; the machine's own depend on what else it does
    for name, bound in bounds.items():
        assert getattr(tools.timing, name)() > 0
        monkeypatch.setattr(tools.benchmark.throughput, name, lambda device, bound=bound: bound)
    flops, moved = work_of_an_image("1")
    flags = ["--models", 1, "--rounds", 2, "--images", 128, "--batch_size", 64]
    status, printed, error = benchmarked("throughput", *flags, "--data_dir", tiny, "--output_dir", tmp_path)
    assert status == 0, error
    (rows,) = json.loads((tmp_path / "outputs" / "benchmark_throughput.json").read_text())["models"].values()
    batches = {
        "naive reference": 64,
        "--no-kernels": 64,
        "default": 64,
        "--batch_size 512": 512,
    }
    if has_bfloat16(torch.device("cpu")):
        batches |= {"--amp": 64}
    assert {row["label"]: row["batch_size"] for row in rows} == batches
    for row in rows:
        assert row["label"] in printed
        assert len(row["images_per_second"]) == 2
        assert min(row["images_per_second"]) <= row["median"] <= max(row["images_per_second"])
        assert row["share_of_bound"] == pytest.approx(row["median"] * flops / 1e12, rel=0.01, abs=1e-4)
        assert row["share_of_memory_bound"] == pytest.approx(row["median"] * moved / 1e11, rel=0.01, abs=1e-4)
        assert row["first_batch_seconds"] > 0
        assert row["epoch_seconds"] == pytest.approx(300 / row["median"], rel=0.01)
        assert row["peak_mib"] > 100
    assert rows[0]["ratio"] == 1.0


@pytest.mark.long
def test_throughput_of_processes(tiny):
    args = measure.get_args_parser().parse_args(["processes", "--rounds", "1", "--batch_size", "60"])
    result = measure.rates_of_processes(args, str(tiny))
    (one,), (two,) = result["images_per_second"]["1"], result["images_per_second"]["2"]
    assert result["ratio"] == pytest.approx(two / one, abs=1e-3)


def test_a_run_that_fails_is_told_in_one_line(tiny, tmp_path, benchmarked):
    """4 s: the one training here in a process of its own, by the command."""
    flags = ["--scheduler", "onecycle", "--max_lr", 1e20, "--epochs", 1]
    status, _, error = benchmarked("accuracy", "--seeds", 1, *flags, "--data_dir", tiny, "--output_dir", tmp_path)
    assert status == 1
    assert "the loss is" in error
    assert error.count("\n") == 1


def test_seeds_that_finish_at_once_are_all_kept(tmp_path):
    store = SeriesStore(tmp_path / "outputs" / "series.json", {"model": "1"}, None)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda seed: store.add(seed, {"accuracy": 99.0}), range(40)))
    (series,) = json.loads((tmp_path / "outputs" / "series.json").read_text())
    assert sorted(map(int, series["runs"])) == list(range(40))


@pytest.mark.parametrize("trainings", HERE_FIRST, ids=["here", "processes"])
def test_accuracy_is_resumable(tiny, tmp_path, benchmarked, trainings):
    """3 s: four trainings, and their figures as a plot."""
    with trainings():
        run_series(tiny, tmp_path, benchmarked)


def run_series(data_dir, tmp_path, benchmarked):
    flags = ["--epochs", 1, "--data_dir", data_dir, "--output_dir", tmp_path, "--jobs", 2, "--label", "tiny"]
    status, printed, error = benchmarked("accuracy", "--seeds", 2, *flags)
    assert status == 0, error
    assert "2 of 2 seeds to run" in printed
    _, again, _ = benchmarked("accuracy", "--seeds", 3, *flags, "--jobs", 1)  # how many at once makes no other series
    assert "1 of 3 seeds to run" in again
    assert again.count("seed ") == 1
    _, other, _ = benchmarked("accuracy", "--seeds", 1, *flags, "--epochs", 2, "--label", "longer", "--val_split", 50)
    assert "1 of 1 seeds to run" in other
    tiny, longer = json.loads((tmp_path / "outputs" / "benchmark_accuracy.json").read_text())
    assert sorted(tiny["runs"]) == ["1", "2", "3"]  # in the order in which they finished
    data = {"data": tiny["recipe"]["data"]}  # a series of another data set is another one
    assert re.fullmatch("tiny [0-9a-f]{12}", data["data"])
    assert (tiny["label"], tiny["recipe"]) == ("tiny", {"model": "1", "epochs": 1, **data})
    assert longer["recipe"] == {"model": "1", "epochs": 2, "val_split": 50, **data}
    mean, deviation, half = mean_and_interval([run["accuracy"] for run in tiny["runs"].values()])
    expected = f"tiny: {mean:.3f} % +- {half:.3f} (95 % interval), standard deviation {deviation:.3f}, n = 3"
    assert expected in again
    assert (tmp_path / "plots" / "benchmark_accuracy.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.long
def test_seeds_that_train_together_have_the_figures_of_seeds_alone(tiny, tmp_path, benchmarked):
    flags = ["accuracy", "--seeds", 3, "--epochs", 1, "--batch_size", 60, "--threads", 1, "--data_dir", tiny]
    status, alone, error = benchmarked(*flags, "--output_dir", tmp_path / "alone")
    assert status == 0, error
    flags += ["--together", 2, "--keep", "kept", "--output_dir", tmp_path / "together"]
    status, together, error = benchmarked(*flags)
    assert status == 0, error
    assert "3 of 3 seeds to run, 2 at a time" in together
    figures = []
    for folder in ("alone", "together"):
        (series,) = json.loads((tmp_path / folder / "outputs" / "benchmark_accuracy.json").read_text())
        figures.append({seed: run["accuracy"] for seed, run in series["runs"].items()})
    assert sorted(figures[0]) == ["1", "2", "3"]
    assert figures[0] == figures[1], alone
    assert {run["together"] for run in series["runs"].values()} == {1, 2}
    for seed in "123":
        assert load_metrics_json(f"kept_seed_{seed}", tmp_path / "together")["status"] == "finished"
    assert "0 of 3 seeds to run" in benchmarked(*flags)[1]
    (tmp_path / "together" / "outputs" / "kept_seed_2_params.pth").unlink()  # recorded, but no longer kept
    assert "1 of 3 seeds to run" in benchmarked(*flags)[1]


def test_a_series_on_a_gpu_is_another_one(tiny, tmp_path, benchmarked, monkeypatch):
    """And its device is passed on."""
    seen = []

    def train(configs, keep, folder):
        seen.extend(config.device for config in configs)
        return [{"accuracy": 99.0, "seconds": 1.0} for _ in configs]

    monkeypatch.setattr("tools.benchmark.accuracy._train", train)
    monkeypatch.setattr("tools.benchmark.accuracy.resolve_device", torch.device)
    for device in ("cpu", "cuda"):
        flags = ["--seeds", "1", "--device", device, "--data_dir", tiny, "--output_dir", tmp_path]
        assert benchmarked("accuracy", *flags)[0] == 0
    assert seen == ["cpu", "cuda"]
    on_cpu, on_cuda = json.loads((tmp_path / "outputs" / "benchmark_accuracy.json").read_text())
    assert on_cuda["recipe"] == {**on_cpu["recipe"], "device": "cuda"}


def test_a_damaged_record_is_kept_as_it_is(tiny, tmp_path, benchmarked):
    (tmp_path / "outputs").mkdir()
    record = tmp_path / "outputs" / "benchmark_accuracy.json"
    record.write_text('[{"label": "model 1", "rec')
    status, _, error = benchmarked("accuracy", "--seeds", 1, "--data_dir", tiny, "--output_dir", tmp_path)
    assert (status, error.count("\n")) == (1, 1)
    assert "benchmark_accuracy.json is damaged" in error
    assert record.read_text() == '[{"label": "model 1", "rec'


@pytest.mark.long
def test_accuracy_of_the_reference(tiny, tmp_path, benchmarked):
    flags = ["--scheduler", "onecycle", "--epochs", 1, "--data_dir", tiny, "--output_dir", tmp_path]
    status, printed, error = benchmarked("accuracy", "--naive", "--seeds", 1, *flags)
    assert status == 0, error
    assert "n = 1" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["throughput", "--rounds", "0"], "rounds: 0 is not allowed"),
        (["throughput", "--models", "7"], "invalid choice: '7'"),
        (["throughput", "--device", "cuda:99"], "device: 'cuda:99' is not on this machine"),
        (["accuracy", "--device", "cuda:99"], "device: 'cuda:99' is not on this machine"),
        (["accuracy", "--together", "2", "--jobs", "2"], "together: not allowed with --naive or --jobs"),
        (["accuracy", "--naive", "--val_split", "100"], "naive: the reference has no val_split"),
        (["accuracy", "--seeds", "0"], "seeds: 0 is not allowed"),
        (["accuracy", "--epochs", "0"], "epochs: 0 is not allowed"),
        (["accuracy", "--config", "absent"], "config: cannot read absent"),
        ([], "the following arguments are required: command"),
    ],
)
def test_wrong_arguments(arguments, message, capsys):
    refused(benchmark.main, arguments, message, capsys)


@pytest.mark.parametrize("count", [0, 1])
def test_processes_are_compared_from_two_on(count, capsys):
    refused(measure.main, ["processes", "--processes", str(count)], f"processes: {count} is not allowed", capsys)


def refused(main, arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.long
def test_sigterm_stops_the_series_and_what_it_trains(tiny, tmp_path, python):
    flags = ["--epochs", 100_000, "--data_dir", tiny, "--output_dir", tmp_path, "--keep", "kept"]
    series = python("-m", "tools.benchmark", "accuracy", "--seeds", "2", *flags)
    eventually((tmp_path / "outputs" / "kept_seed_1_metrics.json").exists, series)
    series.terminate()
    _, err = series.communicate()
    assert series.returncode == 130
    assert "interrupted; what is finished is kept" in err
    assert load_metrics_json("kept_seed_1", tmp_path)["status"] == "interrupted"
    assert not (tmp_path / "outputs" / "kept_seed_2_metrics.json").exists()
    assert not accuracy_figure([{"label": "none yet", "recipe": {}, "runs": {}}]).axes[0].lines


def test_the_figure_sorts_its_rows_and_shows_an_interval_of_three_runs_or_more():
    def series(label: str, runs: int) -> dict:
        return {
            "label": label,
            "recipe": {},
            "runs": {str(seed): {"accuracy": 99.0 + seed / 10} for seed in range(runs)},
        }

    axes = accuracy_figure([series("b", 3), series("a", 2)]).axes[0]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["a (n=2)", "b (n=3)"]
    assert [bar.get_segments()[0][0][1] for bar in axes.collections] == [1]
