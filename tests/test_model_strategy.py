import pytest
from conftest import finished

import model_strategy
from common.files import PROJECT_DIR
from imports import torch
from model_strategy import ModelContext, ModelStrategy, get_strategy, known_models, register
from models import model_v1, model_v2, model_v3
from visualization import load_metrics_json


@pytest.mark.parametrize(("name", "net"), [("1", model_v1.Net), ("2", model_v2.Net), ("3", model_v3.Net)])
def test_strategy_makes_its_network(name, net):
    strategy = get_strategy(name)
    assert isinstance(strategy, ModelStrategy)
    assert type(ModelContext(strategy).get_model("cpu")) is net
    assert type(ModelContext(strategy).get_model(torch.device("cpu"))) is net


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown model '4'; known: 1, 2, 3"):
        get_strategy("4")


def test_a_name_can_be_taken_once(monkeypatch):
    monkeypatch.setattr(model_strategy, "_REGISTRY", dict(model_strategy._REGISTRY))

    @register("mine")
    class MineStrategy(model_strategy.Model1Strategy):
        pass

    assert known_models() == ["1", "2", "3", "mine"]
    assert isinstance(get_strategy("mine"), MineStrategy)
    with pytest.raises(ValueError, match="registered already, by MineStrategy"):
        register("mine")(MineStrategy)


def test_a_strategy_without_a_network_is_refused():
    with pytest.raises(TypeError, match="build"):
        ModelStrategy()  # type: ignore[abstract]


def test_the_command_trains_a_network_of_ones_own(tmp_path, tiny, own_network, python):
    folders = ["--data_dir", tiny, "--output_dir", tmp_path / "results"]
    env = {"PYTHONPATH": str(PROJECT_DIR), "PATH": ""}
    done = finished(python(own_network, "--model", "linear", "--epochs", "2", *folders, env=env))
    assert done.returncode == 0, done.stderr
    assert "mnist_model_linear: 7,850 parameters" in done.stdout
    assert load_metrics_json("mnist_model_linear", tmp_path / "results")["status"] == "finished"
    # the same main.py still names all it knows
    wrong = finished(python(own_network, "--model", "cubic", env=env))
    assert wrong.returncode == 2
    assert "choose from 1, 2, 3, linear" in wrong.stderr
