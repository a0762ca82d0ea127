from dataclasses import asdict, fields, replace

import pytest

from common.files import PROJECT_DIR, DamagedFileError, UsageError
from training.config import TrainConfig, read_config_file


def test_defaults_are_the_specifications():
    config = TrainConfig()
    assert (config.model, config.epochs, config.scheduler, config.max_lr) == ("1", 10, "step", 0.75)
    assert (config.batch_size, config.lr, config.val_split, config.pipeline) == (128, 0.01, 0, "tensor")
    assert config.run_name == "mnist_model_1"
    assert TrainConfig(model="3").run_name == "mnist_model_3"
    assert TrainConfig(name="mine").files.root == PROJECT_DIR
    assert config.data_folder == PROJECT_DIR / "data"


def test_every_field_has_a_help_text():
    assert all(spec.metadata["help"] for spec in fields(TrainConfig))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"model": "4"}, "model: '4' is not allowed; choose from 1, 2, 3"),
        ({"epochs": 0}, "epochs: 0 is not allowed; it must be at least 1"),
        ({"epochs": 1.5}, "epochs: 1.5 is not allowed; it must be a whole number"),
        ({"epochs": True}, "epochs: True is not allowed; it must be a whole number"),
        ({"epochs": None}, "epochs: None is not allowed; it must be a whole number"),
        ({"scheduler": "cosine"}, "scheduler: 'cosine' is not allowed; choose from step, onecycle"),
        ({"max_lr": 0.0}, "max_lr: 0.0 is not allowed; it must be above 0"),
        ({"max_lr": float("inf")}, "max_lr: inf is not allowed; it must be finite"),
        ({"lr": float("nan")}, "lr: nan is not allowed; it must be finite"),
        ({"lr": "fast"}, "lr: 'fast' is not allowed; it must be a number"),
        ({"batch_size": 0}, "batch_size: 0 is not allowed; it must be at least 1"),
        ({"seed": -1}, "seed: -1 is not allowed; it must be at least 0"),
        ({"threads": 0}, "threads: 0 is not allowed; it must be at least 1"),
        ({"val_split": -5}, "val_split: -5 is not allowed; it must be at least 0"),
        ({"pipeline": "numpy"}, "pipeline: 'numpy' is not allowed; choose from tensor, torchvision"),
        ({"device": "tpu"}, "device: 'tpu' is not allowed; choose from auto, cpu, cuda, cuda:N, mps"),
        ({"dropout": 1.0}, "dropout: 1.0 is not allowed; it must be below 1"),
        ({"final_div_factor": 0.5}, "final_div_factor: 0.5 is not allowed; it must be at least 1"),
        ({"nesterov": 1}, "nesterov: 1 is not allowed; it must be true or false"),
        ({"augment": "mixup"}, "augment: 'mixup' is not allowed; choose from none, rotate, affine, elastic"),
        ({"augment": "affine", "pipeline": "torchvision"}, "augment: 'affine' is not allowed with --pipeline torchv"),
        ({"ema_decay": 1.0}, "ema_decay: 1.0 is not allowed; it must be below 1"),
        ({"nesterov": True, "momentum": 0}, "nesterov: True is not allowed with momentum 0.0; it needs one above 0"),
        ({"momentum": 1}, "momentum: 1.0 is not allowed; it must be below 1"),
        ({"name": "../x"}, "name: '../x' is not allowed"),
        ({"data_dir": 3}, "data_dir: 3 is not allowed; it must be a text"),
    ],
)
def test_wrong_value(setting, message):
    with pytest.raises(UsageError) as caught:
        TrainConfig(**setting)
    assert message in str(caught.value)


def test_a_whole_number_is_a_number():
    assert repr(TrainConfig(max_lr=1).max_lr) == "1.0"


def test_flag_wins_over_file_and_file_over_default(tmp_path):
    path = tmp_path / "my.toml"
    path.write_text('model = 3\nepochs = 2\nscheduler = "onecycle"\n')
    config = TrainConfig.from_sources({"epochs": 7}, str(path))
    assert config == TrainConfig(model="3", epochs=7, scheduler="onecycle")


def test_shipped_config_is_found_by_name(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert TrainConfig.from_sources({}, "reference") == TrainConfig(scheduler="onecycle", epochs=15)


@pytest.mark.parametrize("path", sorted((PROJECT_DIR / "configs").glob("*.toml")), ids=lambda path: path.stem)
def test_every_shipped_config_is_valid(path):
    assert TrainConfig.from_sources({}, path.stem) == TrainConfig(**read_config_file(str(path)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch = 5\n", "unknown key epoch; known: model, epochs, scheduler"),
        ("epochs = \n", "is not valid TOML"),
        ('epochs = "five"\n', "epochs: 'five' is not allowed; it must be a whole number"),
        ("model = 9\n", "model: '9' is not allowed; choose from 1, 2, 3"),
        ("\xff", "it is not UTF-8 text"),
    ],
)
def test_wrong_config_file(tmp_path, text, message):
    path = tmp_path / "my.toml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UsageError) as caught:
        TrainConfig.from_sources({}, str(path))
    assert message in str(caught.value)


@pytest.mark.parametrize("name", ["absent", "absent/file.toml", "/", "../configs"])
def test_missing_config_file_lists_the_shipped_ones(name):
    with pytest.raises(UsageError, match=r"cannot read .*; give the path of a TOML file or one of .*reference"):
        TrainConfig.from_sources({}, name)


def test_flags_without_effect():
    step, onecycle = TrainConfig(), TrainConfig(scheduler="onecycle")
    given = {"max_lr": 0.5, "lr": 0.1, "epochs": 3}
    assert step.flags_without_effect(given) == ["--max_lr has no effect with --scheduler step; it belongs to onecycle"]
    assert onecycle.flags_without_effect(given) == ["--lr has no effect with --scheduler onecycle; it belongs to step"]
    assert step.flags_without_effect({"epochs": 3}) == []


def test_config_survives_a_round_trip():
    config = TrainConfig(model="2", epochs=3, threads=1, name="x")
    assert TrainConfig(**asdict(config)) == config


def test_settings_of_saved_metrics():
    config = TrainConfig(model="2", epochs=3, name="x")
    metrics = {"name": "x", "config": asdict(config)}
    assert TrainConfig.of(metrics) == config
    assert TrainConfig.of(metrics, seed=7) == replace(config, seed=7)
    with pytest.raises(DamagedFileError, match=r"the metrics of x are of another version.*'hue'"):
        TrainConfig.of({"name": "x", "config": {"hue": 3}})
