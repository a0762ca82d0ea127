import contextlib
import io
import json
import shutil
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import HERE_FIRST

import tools.trainings
from common.files import DamagedFileError, RunFiles, UsageError
from data_utils import load_images, normalize, split_indices
from imports import nn, torch
from model_strategy import get_strategy
from tools import ensemble
from tools.ensemble import (
    METHODS,
    Ensemble,
    answers_of_twins,
    fit_votings,
    fit_weights,
    load_ensemble,
    predictions,
    scale,
    vote,
)
from tools.evaluate import __main__ as evaluate_command
from tools.networks import Network, ensemble_file
from tools.sureness import Sureness
from training.config import TrainConfig
from visualization import load_metrics_json, load_model_params

RECIPE = 'epochs = 3\nscheduler = "onecycle"\nbatch_size = 30\n'


def log_probabilities(*rows) -> torch.Tensor:
    """[M, N, 10] of members that give each image's first digits these probabilities, the rest none to speak of."""
    out = torch.full((len(rows), len(rows[0]), 10), 1e-9)
    for member, images in enumerate(rows):
        for image, probabilities in enumerate(images):
            out[member, image, : len(probabilities)] = torch.tensor(probabilities)
    return out.log()


# Votes whose result is known


def test_votes():
    # two members are a little for 1, one is sure of 0
    said = log_probabilities([[0.4, 0.6]], [[0.45, 0.55]], [[0.99, 0.01]])
    soft = vote(said, "soft", [])
    assert soft.argmax(1).tolist() == [0]
    torch.testing.assert_close(soft.exp()[0, :2], torch.tensor([0.61333, 0.38667]), rtol=1e-4, atol=1e-4)
    assert vote(said, "hard", []).argmax(1).tolist() == [1]
    weighted = vote(said, "weighted", [0.45, 0.45, 0.1])
    assert weighted.argmax(1).tolist() == [1]
    torch.testing.assert_close(weighted.exp()[0, :2], torch.tensor([0.4815, 0.5185]), rtol=1e-4, atol=1e-4)


def test_equal_weights_are_the_soft_vote():
    said = torch.randn(4, 20, 10).log_softmax(2)
    torch.testing.assert_close(vote(said, "weighted", [0.25] * 4), vote(said, "soft", []))


def test_as_many_votes_are_decided_by_the_mean_probability():
    said = log_probabilities([[0.9, 0.1]], [[0.2, 0.8]])
    assert vote(said, "hard", []).argmax(1).tolist() == [0]
    assert vote(said.flip(2), "hard", []).argmax(1).tolist() == [9]


@pytest.mark.parametrize("method", METHODS)
def test_a_vote_is_a_distribution_and_one_members_is_its_own(method):
    said = torch.randn(1, 20, 10).log_softmax(2)
    out = vote(said, method, [1.0])
    torch.testing.assert_close(out.exp().sum(1), torch.ones(20))
    assert torch.equal(out.argmax(1), said[0].argmax(1))


def test_unknown_method():
    with pytest.raises(ValueError, match="'loud' is not known; choose from soft, hard, weighted"):
        vote(torch.zeros(1, 1, 10), "loud", [1.0])


# What is fitted


def test_the_weight_goes_to_the_network_that_knows():
    torch.manual_seed(0)
    labels = torch.randint(0, 10, (500,))
    knows = (torch.randn(500, 10) + 4 * nn.functional.one_hot(labels, 10)).log_softmax(1)
    guesses = (3 * torch.randn(2, 500, 10)).log_softmax(2)
    weights = fit_weights(torch.stack([guesses[0], knows, guesses[1]]), labels, ["1", "2", "1"])
    assert weights[0] == weights[2]
    assert weights[1] > 0.9
    assert sum(weights) == pytest.approx(1)


def test_weights_are_those_of_a_grid_search():
    torch.manual_seed(0)
    labels = torch.randint(0, 10, (300,))
    said = (2 * torch.randn(2, 300, 10) + 2 * nn.functional.one_hot(labels, 10)).log_softmax(2)
    said[1] = (said[1] / 2).log_softmax(1)
    grid = torch.linspace(0.001, 0.999, 999).tolist()
    losses = [nn.functional.nll_loss(vote(said, "weighted", [w, 1 - w]), labels).item() for w in grid]
    best = grid[losses.index(min(losses))]
    assert fit_weights(said, labels, ["1", "2"])[0] == pytest.approx(best, abs=0.005)


def test_weights_tell_who_knows_and_not_who_is_sure():
    """Networks trained with smoothed labels are less sure than they are right; the surest of them knows no more."""
    torch.manual_seed(0)
    labels = torch.randint(0, 10, (3000,))
    honest = torch.randn(2, 3000, 10) + 4 * nn.functional.one_hot(labels, 10)
    said = torch.stack([0.4 * honest[0], 0.6 * honest[1]]).log_softmax(2)
    soft, _, weighted = fit_votings(said, labels, ["1", "2"])
    assert weighted["loss"] < soft["loss"] + 1e-3
    assert min(weighted["weights"]) > 0.2


def test_twins_are_taken_to_be_as_sure_as_their_members():
    twin = Network("twin", "network", get_strategy("1").build().eval(), 7720, None, {})
    images = torch.randint(0, 256, (5, 28, 28), dtype=torch.uint8)
    sure = Sureness(factors=torch.zeros(1), centres=torch.zeros(1), constants=torch.zeros(1), threshold=torch.zeros(1))
    sure.temperature = 0.5
    calibrated = replace(twin, sureness=sure)
    (said,) = predictions([twin.model], images)
    for pair, expected in (((twin, twin), said), ((twin, calibrated), scale(said, 0.5)), ((calibrated,) * 2, said)):
        torch.testing.assert_close(answers_of_twins([pair[0]], [pair[1]], images)[0], expected)


def test_an_over_confident_vote_is_cooled_to_what_it_knows():
    torch.manual_seed(0)
    honest = (2 * torch.randn(4000, 10)).log_softmax(1)
    labels = torch.multinomial(honest.exp(), 1).flatten()  # right as often as it says
    (soft, *_) = fit_votings((3 * honest).log_softmax(1).unsqueeze(0), labels, ["1"])
    assert soft["temperature"] == pytest.approx(3, rel=0.1)


def test_temperature_changes_the_confidence_and_no_decision():
    torch.manual_seed(0)
    images = torch.randn(5, 1, 28, 28)
    members = [get_strategy("1").build(), get_strategy("2").build()]
    plain, cooled = (Ensemble(members, "soft", [0.5, 0.5], temperature) for temperature in (1.0, 3.0))
    assert not plain.training
    torch.testing.assert_close(
        plain(images), torch.stack([member(images) for member in members]).exp().mean(0).log(), rtol=1e-4, atol=1e-4
    )
    assert torch.equal(plain(images).argmax(1), cooled(images).argmax(1))
    assert (cooled(images).max(1).values < plain(images).max(1).values).all()


# The command


@pytest.fixture(scope="module", params=HERE_FIRST, ids=["here", "processes"])
def trained(request, tiny, tmp_path_factory):
    """7 s: the folder of an ensemble of two networks of each of two models, the command's flags, what it printed."""
    folder = tmp_path_factory.mktemp("ensemble")
    (folder / "recipe.toml").write_text(RECIPE)
    flags = ["--models", "1", "3", "--seeds", "2", "--config", str(folder / "recipe.toml"), "--jobs", "2"]
    flags += ["--data_dir", str(tiny), "--output_dir", str(folder)]
    with request.param(), contextlib.redirect_stdout(io.StringIO()) as printed:
        assert ensemble.main(flags) == 0
    return folder, flags, printed.getvalue()


def test_what_it_trains_and_writes(trained, capsys):
    folder, flags, printed = trained
    description = json.loads((folder / "outputs" / "ensemble.json").read_text())
    names = [f"ensemble_model_{model}_seed_{seed}" for model in (1, 3) for seed in (1, 2)]
    assert description["members"] == names
    assert description["models"] == ["1", "1", "3", "3"]
    assert description["parameters"] == 2 * 7_720 + 2 * 8_650
    assert "8 of 8 runs to train, 2 at a time" in printed
    for name in names:
        assert load_metrics_json(name, folder)["config"]["val_split"] == 0
        twin = load_metrics_json(f"{name}_held_out", folder)["config"]
        assert twin["val_split"] == description["held_out"]["images"] == 50
        assert twin["seed"] == load_metrics_json(name, folder)["config"]["seed"]
    chosen = next(v for v in description["held_out"]["votings"] if v["method"] == description["method"])
    assert chosen["accuracy"] == max(v["accuracy"] for v in description["held_out"]["votings"])
    assert (chosen["weights"], chosen["temperature"]) == (description["weights"], description["temperature"])
    assert f"ensemble: {description['accuracy']:.2f} % on the test set" in printed

    assert ensemble.main(flags) == 0
    assert "to train" not in capsys.readouterr().out
    new = json.loads((folder / "outputs" / "ensemble.json").read_text())
    assert [new[key] for key in ("weights", "temperature", "accuracy")] == [
        description[key] for key in ("weights", "temperature", "accuracy")
    ]


def test_what_it_says_is_what_the_loaded_ensemble_does(trained, tiny):
    folder = trained[0]
    description = json.loads((folder / "outputs" / "ensemble.json").read_text())
    images, labels = load_images(tiny, train=False)
    inputs = normalize(images.unsqueeze(1).float())
    with torch.inference_mode():
        right = load_ensemble("ensemble", folder)(inputs).argmax(1) == labels
        said = [
            load_model_params(get_strategy(model).build(), name, folder)(inputs)
            for name, model in zip(description["members"], description["models"], strict=True)
        ]
    assert 100 * right.float().mean().item() == pytest.approx(description["accuracy"])
    singles = [100 * (one.argmax(1) == labels).float().mean().item() for one in said]
    assert singles == pytest.approx(description["member_accuracies"], abs=1e-3)
    mine = vote(torch.stack(said), description["method"], description["weights"]).argmax(1)
    assert torch.equal(mine == labels, right)


def test_the_method_is_fitted_on_images_that_the_twins_have_not_seen(trained, tiny, monkeypatch):
    folder, flags, _ = trained
    seen = {}

    def spy(said, labels, models):
        seen.update(labels=labels, said=said)
        return fit_votings(said, labels, models)

    monkeypatch.setattr(ensemble, "fit_votings", spy)
    ensemble.build(ensemble.get_args_parser().parse_args(flags))
    images, labels = load_images(tiny, train=True)
    held_out = split_indices(labels, 50)[1]
    assert torch.equal(seen["labels"], labels[held_out])
    twin = load_model_params(get_strategy("3").build(), "ensemble_model_3_seed_2_held_out", folder)
    with torch.inference_mode():
        torch.testing.assert_close(
            seen["said"][3], twin(normalize(images[held_out].unsqueeze(1).float())), rtol=1e-4, atol=1e-4
        )


@pytest.mark.long
def test_it_is_evaluated_like_any_network(trained, tiny, capsys):
    folder = trained[0]
    flags = ["--name", "ensemble", "--data_dir", str(tiny), "--output_dir", str(folder)]
    assert evaluate_command.main(flags) == 0
    evaluation = json.loads((folder / "outputs" / "ensemble_evaluation.json").read_text())
    description = json.loads((folder / "outputs" / "ensemble.json").read_text())
    assert evaluation["accuracy"] == pytest.approx(description["accuracy"])
    assert evaluation["parameters"] == description["parameters"]
    with pytest.raises(SystemExit) as caught:
        evaluate_command.main([*flags[2:], "--name", "nothing"])
    assert caught.value.code == 2
    assert "nothing_metrics.json does not exist" in capsys.readouterr().err


def test_runs_with_held_out_images_of_their_own_need_no_twins(trained, tiny, capsys):
    folder = trained[0]
    members = ["ensemble_model_1_seed_1_held_out", "ensemble_model_3_seed_1_held_out"]
    flags = ["--members", *members, "--method", "hard", "--name", "own"]
    assert ensemble.main([*flags, "--data_dir", str(tiny), "--output_dir", str(folder)]) == 0
    assert "to train" not in capsys.readouterr().out
    description = json.loads((folder / "outputs" / "own.json").read_text())
    assert (description["members"], description["method"]) == (members, "hard")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--members", "nothing"], "nothing"),
        (["--seeds", "0"], "seeds: 0 is not allowed; it must be at least 1"),
        (["--method", "loud"], "invalid choice: 'loud'"),
        (["--name", "../x"], "name: '../x' is not allowed"),
        (["--config", "nowhere"], "config: cannot read nowhere"),
        (["--members", "ensemble_model_1_seed_1", "ensemble_model_1_seed_1_held_out"], "different numbers of images"),
        (["--members", "ensemble_model_1_seed_1"] + ["ensemble_model_1_seed_2"] * 2, "seed_2 is named twice"),
        (["--members", "ensemble_model_1_seed_1", "--seeds", "7"], "seeds: not allowed with --members"),
        (["--name", "ensemble_model_1_seed_1"], "is the name of something else"),
        (["--name", "ensemble_model_1_seed_1_metrics"], "is the name of something else"),
    ],
)
def test_a_mistake_is_told_in_one_line_and_changes_nothing(trained, tiny, flags, message, capsys):
    folder = trained[0]
    before = {path: path.read_bytes() for path in folder.rglob("*.json")}
    with pytest.raises(SystemExit) as caught:
        ensemble.main([*flags, "--data_dir", str(tiny), "--output_dir", str(folder)])
    assert caught.value.code == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert {path: path.read_bytes() for path in folder.rglob("*.json")} == before


def test_a_run_of_the_name_with_other_settings_is_not_taken_for_it(trained):
    folder, flags, _ = trained
    (folder / "other.toml").write_text(RECIPE + "dropout = 0.0\n")
    args = ensemble.get_args_parser().parse_args([*flags, "--config", str(folder / "other.toml")])
    with pytest.raises(UsageError, match="ensemble_model_1_seed_1 is there with another dropout"):
        ensemble.build(args)


def test_weights_without_metrics_are_not_replaced(trained, tiny, tmp_path):
    """As the shipped ensemble's members are."""
    shutil.copytree(trained[0], tmp_path, dirs_exist_ok=True)
    (tmp_path / "outputs" / "ensemble_model_3_seed_2_metrics.json").unlink()
    weights = RunFiles("ensemble_model_3_seed_2", tmp_path).params
    before = weights.read_bytes()
    with pytest.raises(UsageError, match=r"seed_2_params\.pth has no metrics"):
        ensemble.build(ensemble.get_args_parser().parse_args([*trained[1], "--output_dir", str(tmp_path)]))
    assert weights.read_bytes() == before


def test_members_of_one_data_set_in_two_places(trained, tiny, tmp_path):
    shutil.copytree(trained[0], tmp_path, dirs_exist_ok=True)
    path = RunFiles("ensemble_model_3_seed_1", tmp_path).metrics
    path.write_text(path.read_text().replace(str(tiny), f"{tiny}/../{tiny.name}"))
    members = ["ensemble_model_1_seed_1", "ensemble_model_3_seed_1"]
    flags = ["--members", *members, "--data_dir", str(tiny), "--output_dir", str(tmp_path)]
    assert len(ensemble.wanted_members(ensemble.get_args_parser().parse_args(flags))) == 2


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: text.replace('"schema": 1', '"schema": 9'),
        lambda text: text.replace('"kind": "ensemble"', '"kind": "choir"'),
        lambda text: text.replace('"models": [', '"models": ["2", '),
        lambda text: json.dumps(json.loads(text) | {"members": [], "models": [], "weights": []}),
    ],
)
def test_a_damaged_description(trained, tmp_path, damage):
    files = RunFiles("ensemble", tmp_path)
    files.make_folders()
    whole = ensemble_file(RunFiles("ensemble", trained[0])).read_text()
    ensemble_file(files).write_text(damage(whole))
    with pytest.raises(DamagedFileError, match="does not describe an ensemble"):
        load_ensemble("ensemble", tmp_path)
    with pytest.raises(FileNotFoundError):
        load_ensemble("nothing", tmp_path)


def test_a_training_is_told_folders_of_any_name(tmp_path, monkeypatch):
    told = {}

    def read(command):
        told.update(tomllib.loads(Path(command[-1]).read_text(encoding="utf-8")))

    monkeypatch.setattr(tools.trainings, "run_quietly", read)
    config = TrainConfig(epochs=7, output_dir=str(tmp_path / 'ä "🙂'))
    tools.trainings.run_with(config, "main.py")
    assert (told["epochs"], told["output_dir"]) == (7, config.output_dir)


def test_a_recipe_that_says_how_many_threads_gets_them(tmp_path, monkeypatch):
    started = {}

    def note(run: TrainConfig) -> float:
        started[run.name] = run.threads
        return 0.0

    monkeypatch.setattr(tools.trainings, "train_in_a_process", note)
    monkeypatch.setattr(tools.trainings.os, "cpu_count", lambda: 8)
    runs = [
        TrainConfig(name="said", threads=3, output_dir=str(tmp_path)),
        TrainConfig(name="not", output_dir=str(tmp_path)),
    ]
    tools.trainings.train_missing(runs, jobs=2)
    assert started == {"said": 3, "not": 4}
