import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import optuna
import pytest
from conftest import finished, sums_of, write_sums
from optuna.trial import TrialState

from common.files import PROJECT_DIR
from main import main
from tools.intervals import mean_and_interval
from tools.tune import __main__ as tune
from tools.tune import space as tune_space
from tools.tune import storage as tune_storage
from tools.tune import workers as tune_workers
from training.config import TrainConfig
from visualization import load_metrics_json

NAME = "mnist_model_1"

# The command with workers that are forked, and so there at once, and tell every second that they live.
FORKED = """
import multiprocessing, runpy, sys
get_context = multiprocessing.get_context
multiprocessing.get_context = lambda method: get_context("fork")
from tools.tune import storage
storage.HEARTBEAT, storage.GRACE = 1, int(sys.argv.pop(1))
sys.argv[:1] = ["tune", "--threads", "1", "--device", "cpu"]
runpy.run_module("tools.tune", run_name="__main__")
"""


def forked(*arguments: object, grace: int = 60) -> list[object]:
    """The words after ``python`` of the command with these arguments."""
    return ["-c", FORKED, grace, *arguments]


def spawned(*arguments: object) -> list[object]:
    """The same for the command as it is."""
    return ["-m", "tools.tune", "--threads", "1", "--device", "cpu", *arguments]


@pytest.fixture
def tuned(python):
    """Runs the command, with forked workers, to its end."""
    return lambda *arguments: finished(python(*forked(*arguments)))


def load_study(folder: Path, name: str = NAME) -> optuna.Study:
    return optuna.load_study(study_name=name, storage=f"sqlite:///{folder}/outputs/tuning_{NAME}.db")


def states(study: optuna.Study) -> list[str]:
    return [trial.state.name for trial in study.get_trials()]


@pytest.fixture(scope="session", params=[forked, pytest.param(spawned, marks=pytest.mark.long)])
def result(request, tiny, fork_server, once) -> "tuple[Path, str]":
    """10 s: a finished study with its confirmation, long enough for what comes after random trials; what it said."""

    def make(folder: Path) -> None:
        flags = ["--trials", 14, "--workers", 2, "--epochs", 2, "--val_split", 100, "--batch_size", 20, "--confirm", 2]
        process = fork_server.start(request.param(*flags, "--data_dir", tiny, "--output_dir", folder))
        done = finished(process)
        process.end()
        assert (done.returncode, done.stderr) == (0, "")
        (folder / "printed").write_text(done.stdout)

    folder = once(f"study_{request.param.__name__}", make)
    return folder, (folder / "printed").read_text()


# ---------------------------------------------------------------------------------------------------------------------
# the search space
# ---------------------------------------------------------------------------------------------------------------------


def test_every_setting_of_the_space_is_one_of_a_run():
    space, fixed = tune_space.read_space(None, {})
    assert (space, fixed) == (tune_space.SPACE, {})
    order = list(space)
    needs = {key: needed for key, (needed, _) in tune_space.ONLY_WITH.items() if needed in space}
    assert all(order.index(needed) < order.index(key) for key, needed in needs.items())


def test_a_file_narrows_and_extends_and_flags_fix(tmp_path):
    path = tmp_path / "space.toml"
    path.write_text('max_lr = {low = 0.2, high = 1}\namp = [false, true]\nmomentum = 0.9\nscheduler = ["onecycle"]\n')
    space, fixed = tune_space.read_space(path, {"batch_size": 32, "epochs": 2})
    assert fixed == {"momentum": 0.9}
    assert "batch_size" not in space
    assert space["amp"] == [False, True]
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    base = {"scheduler": "step", "batch_size": 32, "pipeline": "tensor", **fixed}
    chosen = [tune_workers.suggest(study.ask(), space, base) for _ in range(50)]
    assert all(set(one) | {"augment_strength"} == set(space) - {"lr"} for one in chosen)
    assert all(0.2 <= one["max_lr"] <= 1.0 for one in chosen)
    assert {one["amp"] for one in chosen} == {True, False}
    assert max(one["dropout"] for one in chosen) > 0.04
    assert tune_space.starting_point(space)["max_lr"] == 0.75
    assert tune_space.starting_point({"max_lr": {"low": 1.0, "high": 2.0}, "batch_size": [64]}) == {}


def test_settings_without_effect_are_not_suggested():
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    for _ in range(20):
        chosen = tune_workers.suggest(study.ask(), tune_space.SPACE, {"pipeline": "tensor"})
        of_onecycle = {"max_lr", "pct_start", "div_factor", "final_div_factor"}
        absent = {"lr"} if chosen["scheduler"] == "onecycle" else of_onecycle
        absent |= {"augment_strength"} if chosen["augment"] == "none" else set()
        assert set(chosen) == set(tune_space.SPACE) - absent
        slow = tune_workers.suggest(study.ask(), tune_space.SPACE, {"pipeline": "torchvision", "augment": "rotate"})
        assert "augment" not in slow
        assert "augment_strength" in slow


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_rate = 1\n", "unknown key max_rate; known: scheduler, max_lr, lr, batch_size, augment, pct"),
        ("seed = [1, 2]\n", "unknown key seed; known: scheduler"),
        ("max_lr = {low = 0.0, high = 1.0}\n", "space: max_lr: 0.0 is not allowed; it must be above 0"),
        ("max_lr = {low = 2.0, high = 1.0}\n", "space: max_lr: low = 2.0 is above high = 1.0"),
        ("max_lr = {low = 1.0}\n", "a range has low, high and, if you like, log"),
        ("max_lr = {low = 1.0, high = 2.0, step = 1}\n", "a range has low, high and, if you like, log"),
        ("max_lr = {low = 1.0, high = 2.0, log = 1}\n", "log = 1 is not allowed; it must be true or false"),
        ('max_lr = {low = "a", high = 2.0}\n', "space: max_lr: 'a' is not allowed; it must be a number"),
        ("dropout = {low = 0, high = 0.5, log = true}\n", "low = 0 is not allowed with log; it must be above 0"),
        ("nesterov = {low = 0, high = 1}\n", "space: nesterov: a range is not allowed; give a list of choices"),
        ("batch_size = []\n", "space: batch_size: an empty list is not allowed"),
        ("batch_size = [64, 0]\n", "space: batch_size: 0 is not allowed; it must be at least 1"),
        ("batch_size = [[64]]\n", "space: batch_size: [64] is not allowed; it must be a whole number"),
        ("nesterov = true\nmomentum = 0\n", "momentum: 0 is not allowed while nesterov may be true"),
        ("batch_size = \n", "is not valid TOML"),
    ],
)
def test_wrong_space(tmp_path, text, message, capsys):
    path = tmp_path / "space.toml"
    path.write_text(text)
    wrong(["--space", path, "--output_dir", tmp_path], message, capsys)
    assert not (tmp_path / "outputs").exists()


def wrong(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        tune.main([str(argument) for argument in arguments])
    error = capsys.readouterr().err
    assert message in error
    assert caught.value.code == 2
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--trials", "0"], "trials: 0 is not allowed; it must be at least 1"),
        (["--workers", "0"], "workers: 0 is not allowed; it must be at least 1"),
        (["--confirm", "-1"], "confirm: -1 is not allowed; it must be at least 0"),
        (["--confirm", "1"], "confirm: 1 is not allowed; one seed has no spread"),
        (["--val_split", "0"], "val_split: 0 is not allowed; trials are compared on held-out images"),
        (["--model", "9"], "model: '9' is not allowed; choose from 1, 2, 3"),
        (["--space", "absent.toml"], "space: cannot read absent.toml: No such file or directory"),
        (["--config", "absent"], "config: cannot read absent"),
    ],
)
def test_wrong_arguments(arguments, message, capsys):
    wrong(arguments, message, capsys)


def test_nothing_left_to_search(tmp_path, capsys):
    path = tmp_path / "space.toml"
    path.write_text("".join(f"{key} = {json.dumps(getattr(TrainConfig(), key) or 0.0)}\n" for key in tune_space.SPACE))
    path.write_text(path.read_text().replace("nesterov = 0.0", "nesterov = false"))
    wrong(["--space", path], "every setting has one value", capsys)
    wrong(["--space", path, "--max_lr", 1], "has max_lr, which a flag or --config sets", capsys)


def test_wrong_arguments_need_no_torch():
    for arguments in (["--help"], ["--trials", "0"], ["--space", "absent"], ["--model", "9"]):
        line = [sys.executable, "-X", "importtime", "-m", "tools.tune", *arguments]
        done = subprocess.run(line, cwd=PROJECT_DIR, capture_output=True, text=True, check=False)
        assert done.returncode == (0 if arguments == ["--help"] else 2)
        assert not re.search(r"\| +(torch|optuna|sqlalchemy|plotly)$", done.stderr, flags=re.MULTILINE)


# ---------------------------------------------------------------------------------------------------------------------
# a study
# ---------------------------------------------------------------------------------------------------------------------


def test_two_workers_never_take_the_same_trial(tmp_path, monkeypatch):
    first, second = (tune_storage.open_storage(f"sqlite:///{tmp_path}/study.db") for _ in range(2))
    study = optuna.create_study(storage=first)
    study.enqueue_trial({})
    number = study.trials[0]._trial_id
    begun, check = threading.Event(), first.check_trial_is_updatable

    def slowly(*arguments):
        begun.set()
        time.sleep(0.5)
        return check(*arguments)

    monkeypatch.setattr(first, "check_trial_is_updatable", slowly)
    with ThreadPoolExecutor() as pool:
        one = pool.submit(first.set_trial_state_values, number, TrialState.RUNNING)
        begun.wait(30)
        other = pool.submit(second.set_trial_state_values, number, TrialState.RUNNING)
        assert (one.result(), other.result()) == (True, False)


def test_what_a_study_leaves(result, tiny):
    folder, printed = result
    study = load_study(folder)
    assert set(states(study)) <= {"COMPLETE", "PRUNED"}
    assert len(study.trials) >= 14
    for trial in study.trials:
        settings = trial.user_attrs["settings"]
        assert (settings["seed"], settings["threads"], settings["batch_size"]) == (1 + trial.number, 1, 20)
        assert {"torch", "optuna", "platform", "git_commit"} <= trial.user_attrs["environment"].keys()
        assert trial.params.items() <= settings.items()
        assert f"trial {trial.number:<3} {trial.value:.2f} %" in printed
    first = {key: value for key, value in study.trials[0].params.items() if key not in ("dropout", "batch_size")}
    onecycle = TrainConfig(scheduler="onecycle")
    assert first == {key: getattr(onecycle, key) for key in first}
    assert "min left" in printed or "s left" in printed
    toml = tomllib.loads((folder / "outputs" / f"tuning_{NAME}.toml").read_text())
    wanted = {key: value for key, value in study.best_trial.user_attrs["settings"].items() if value is not None}
    assert toml == wanted | {"name": f"tuning_{NAME}", "data_dir": str(tiny)}
    table = printed[printed.index("\ntrial  ") :].splitlines()[1:]
    ranked = sorted(study.get_trials(states=(TrialState.COMPLETE,)), key=lambda trial: (-trial.value, trial.number))
    assert table[0].split() == ["trial", *(str(trial.number) for trial in ranked[:8])]
    assert table[1].split()[2:] == [f"{trial.value:.2f}" for trial in ranked[:8]]


def test_the_report_needs_no_network(result):
    page = (result[0] / "outputs" / f"tuning_{NAME}.html").read_text()
    assert page.count("Plotly.newPlot(") == 5
    assert "plotly.js v" in page  # the script itself
    assert not re.search(r"<(script|link|img)[^>]*(src|href)=", page)
    for heading in ("Best trials", "new seeds", "History", "Importance of each setting"):
        assert heading in page


def test_the_settings_reproduce_the_best_trial_exactly(result, tmp_path):
    best = load_study(result[0]).best_trial
    config = result[0] / "outputs" / f"tuning_{NAME}.toml"
    assert main(["--config", str(config), "--output_dir", str(tmp_path)]) == 0
    metrics = load_metrics_json(f"tuning_{NAME}", tmp_path)
    assert metrics["val_acc"] == list(best.intermediate_values.values())
    assert metrics["val_acc"][-1] == best.value


@pytest.mark.long
def test_on_real_mnist_the_settings_reproduce_the_trial(mnist, tmp_path, python):
    flags = ["--trials", 1, "--epochs", 1, "--val_split", 55_000, "--scheduler", "onecycle"]
    done = finished(python(*spawned(*flags, "--output_dir", tmp_path)))
    assert done.returncode == 0, done.stderr
    best = load_study(tmp_path).best_trial
    config = tmp_path / "outputs" / f"tuning_{NAME}.toml"
    assert "data_dir" not in tomllib.loads(config.read_text())
    assert main(["--config", str(config), "--output_dir", str(tmp_path)]) == 0
    assert load_metrics_json(f"tuning_{NAME}", tmp_path)["val_acc"] == [best.value]


@pytest.mark.long
def test_a_network_of_ones_own(own_network, tiny, tmp_path, python):
    page = (PROJECT_DIR / "docs" / "tune.md").read_text(encoding="utf-8")
    (script,) = re.findall(r"```python\n(# my_tuning\.py\n.*?)```", page, flags=re.DOTALL)
    (own_network.parent / "my_tuning.py").write_text(script)
    flags = ["--model", "linear", "--trials", "2", "--workers", "2", "--epochs", "1", "--val_split", "100"]
    line = [own_network.parent / "my_tuning.py", *flags, "--data_dir", tiny, "--output_dir", tmp_path]
    environment = os.environ | {"PYTHONPATH": str(PROJECT_DIR)}
    done = finished(python(*line, cwd=own_network.parent, env=environment))
    assert done.returncode == 0, done.stderr
    settings = tomllib.loads((tmp_path / "outputs" / "tuning_mnist_model_linear.toml").read_text())
    assert settings["model"] == "linear"


def test_the_confirmation(result):
    folder, printed = result
    best = load_study(folder).best_trial
    trials = load_study(folder, f"{NAME}_confirm_{best.number}").trials
    rivals = [trial for trial in trials if trial.state.name == "COMPLETE"]  # one that stood still for long came back
    seeds = [1_000_001, 1_000_002]
    assert sorted((trial.params["recipe"], trial.params["seed"]) for trial in rivals) == [
        *(("specification", seed) for seed in seeds),
        *(("tuned", seed) for seed in seeds),
    ]
    for trial in rivals:
        mine = trial.user_attrs["settings"]
        if trial.params["recipe"] == "tuned":
            assert mine == best.user_attrs["settings"] | {"seed": trial.params["seed"]}
        else:
            given = {"epochs": 2, "val_split": 100, "seed": trial.params["seed"], "threads": 1, "device": "cpu"}
            assert TrainConfig(**mine) == TrainConfig(scheduler="onecycle", **given)
    tuned = [trial.value for trial in rivals if trial.params["recipe"] == "tuned"]
    mean, deviation, _ = mean_and_interval(tuned)
    assert re.search(rf"^tuned +{mean:.3f} \+- {deviation:.3f} .* 2$", printed, flags=re.MULTILINE)


def test_a_confirmed_run_is_evaluated_on_the_test_images_as_main_does(result, tiny, tmp_path):
    best = load_study(result[0]).best_trial
    trial = load_study(result[0], f"{NAME}_confirm_{best.number}").trials[0]
    config = tmp_path / "run.toml"
    settings = {key: value for key, value in trial.user_attrs["settings"].items() if value is not None}
    config.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in settings.items()))
    assert main(["--config", str(config), "--data_dir", str(tiny), "--output_dir", str(tmp_path)]) == 0
    metrics = load_metrics_json(NAME, tmp_path)
    assert metrics["val_acc"][-1] == trial.value
    assert metrics["test_acc"][-1] == trial.user_attrs["test_accuracy"]


def test_a_study_goes_on_and_refuses_other_settings(result, tiny, tmp_path, tuned):
    """6 s: the command four times, each in a process of its own."""
    shutil.copytree(result[0], tmp_path, dirs_exist_ok=True)
    before = load_study(tmp_path).get_trials()
    flags = ["--epochs", 2, "--val_split", 100, "--batch_size", 20, "--data_dir", tiny, "--output_dir", tmp_path]
    again = tuned(*flags, "--trials", 14)
    assert again.returncode == 0, again.stderr
    assert f"Going on with {NAME}: {len(before)} of 14 trials are done." in again.stdout
    assert load_study(tmp_path).get_trials() == before
    more = tuned(*flags, "--trials", len(before) + 1)
    assert more.returncode == 0, more.stderr
    assert load_study(tmp_path).get_trials()[:-1] == before
    other = tuned("--epochs", 3, *flags[2:], "--trials", 20)
    assert other.returncode == 2
    assert f"the study {NAME} exists with other settings: epochs (2, not 3); choose another --name" in other.stderr
    narrower = tmp_path / "space.toml"
    narrower.write_text("dropout = {low = 0.0, high = 0.01}\n")
    other = tuned(*flags, "--trials", 20, "--space", narrower)
    assert "dropout ({'low': 0.0, 'high': 0.05}, not {'low': 0.0, 'high': 0.01})" in other.stderr
    assert len(load_study(tmp_path).get_trials()) == len(before) + 1


def test_a_study_lies_in_its_folder_whatever_that_is_called(tiny, tmp_path, tuned):
    """3 s: a study of one training."""
    folder = tmp_path / "50% done? #1 a%20b"
    done = tuned("--trials", 1, "--epochs", 1, "--val_split", 100, "--data_dir", tiny, "--output_dir", folder)
    assert done.returncode == 0, done.stderr
    assert {f"tuning_{NAME}.db", f"tuning_{NAME}.toml"} <= {path.name for path in (folder / "outputs").iterdir()}
    assert f"main.py --config '{folder / 'outputs' / f'tuning_{NAME}.toml'}'" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


def test_one_worker_repeats_a_study(tiny, tmp_path, tuned):
    """5 s: two studies of three trainings."""
    flags = ["--trials", 3, "--epochs", 1, "--val_split", 100, "--data_dir", tiny]
    for folder in (tmp_path / "a", tmp_path / "b"):
        assert tuned(*flags, "--output_dir", folder).returncode == 0
    first, second = (load_study(tmp_path / name).get_trials() for name in ("a", "b"))
    assert [(trial.params, trial.value) for trial in first] == [(trial.params, trial.value) for trial in second]
    assert first[0].params != first[1].params


def test_a_trial_does_not_read_the_test_set(tiny, tmp_path, tuned):
    """5 s: a study, by the command, whose test images cannot be read, and its confirmation."""
    data = tmp_path / "data"
    shutil.copytree(tiny, data)
    raw = data / "MNIST" / "raw"
    (raw / "t10k-images-idx3-ubyte").write_bytes(b"nothing that can be read")
    write_sums(raw)
    assert sums_of(raw) != sums_of(tiny / "MNIST" / "raw")
    flags = ["--trials", 2, "--epochs", 1, "--val_split", 100, "--data_dir", data, "--output_dir", tmp_path]
    done = tuned(*flags)
    assert done.returncode == 0, done.stderr
    confirmed = tuned(*flags, "--confirm", 2)  # reads it, at the end
    assert confirmed.returncode == 1
    assert "is not in MNIST's format" in confirmed.stderr
    assert confirmed.stderr.count("\n") == 1


def test_settings_that_diverge_are_pruned(tiny, tmp_path, tuned):
    space = tmp_path / "space.toml"
    space.write_text('max_lr = [1e20, 1e21]\nscheduler = "onecycle"\n')
    flags = ["--trials", 2, "--epochs", 1, "--val_split", 100, "--data_dir", tiny, "--output_dir", tmp_path]
    done = tuned(*flags, "--space", space)
    assert done.returncode == 1
    assert done.stderr.endswith("no trial was trained to its end; narrow the --space to lower rates\n")
    assert done.stdout.count("diverged") == 2
    study = load_study(tmp_path)
    assert states(study) == ["PRUNED", "PRUNED"]
    assert all(re.search("loss is (nan|inf)", trial.user_attrs["diverged"]) for trial in study.trials)


@pytest.mark.parametrize(
    ("url", "status", "message"),
    [
        ("study.db", 2, "storage: not the URL of a database; it must read like sqlite:///study.db"),
        ("oracle://me:secret@host/x", 2, "storage: oracle://me:***@host/x needs a driver that is not installed"),
        ("nosuch://me:secret@host/x", 2, "needs a driver that is not installed: Can't load plugin"),
        ("postgresql+psycopg://me:secret@127.0.0.1:1/x", 1, "storage: postgresql+psycopg://me:***@127.0.0.1:1/x: "),
        ("sqlite:////absent/folder/study.db", 1, "unable to open database file"),
    ],
)
def test_wrong_storage(tiny, tmp_path, url, status, message, capsys):
    flags = ["--storage", url, "--val_split", "100", "--data_dir", str(tiny), "--output_dir", str(tmp_path)]
    try:
        found = tune.main(flags)
    except SystemExit as exit_:
        found = exit_.code
    assert found == status
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert "secret" not in error


@pytest.mark.parametrize(
    ("flags", "status", "message"),
    [
        (["--val_split", 300], 2, "val_split: 300 is not allowed; there are 300 training images"),
        (["--val_split", 100, "--device", "cuda:99"], 2, "device: 'cuda:99' is not on this machine"),
    ],
)
def test_what_a_worker_finds_wrong_is_told_once(tiny, tmp_path, flags, status, message, tuned):
    """2 s: two workers of the command."""
    done = tuned("--workers", 2, *flags, "--data_dir", tiny, "--output_dir", tmp_path)
    assert done.returncode == status
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
