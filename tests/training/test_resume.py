"""Going on from a checkpoint: the weights are those of a run that nobody stopped, bit for bit."""

import hashlib
import shutil
from pathlib import Path

import pytest
from conftest import RUN, StopAfter, contents

import main as command
import training.run
from common.cli import silent
from common.files import RunFiles, UsageError
from imports import torch
from training.checkpoint import load_checkpoint, resumed_config, save_checkpoint
from training.config import TrainConfig
from training.machine import has_bfloat16
from training.run import StoppedError
from training.train import train_and_evaluate
from visualization import load_metrics_json


def digest(output_dir: Path, name: str = "run") -> str:
    return hashlib.sha256(RunFiles(name, output_dir).params.read_bytes()).hexdigest()


@pytest.fixture
def settings(tiny, tmp_path):
    """Of a run of 4 epochs of 5 batches."""
    return {**RUN, "data_dir": str(tiny), "output_dir": str(tmp_path / "results")}


def resume(files: RunFiles) -> list[str]:
    """The arguments of the command that goes on with a run."""
    return ["--resume", "--name", "run", "--output_dir", str(files.root)]


def fails(arguments, capsys) -> str:
    """The one line of a mistake."""
    with pytest.raises(SystemExit) as caught:
        command.main(arguments)
    assert caught.value.code == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    return captured.err


# Bit for bit


@pytest.mark.parametrize("scheduler", ["step", pytest.param("onecycle", marks=pytest.mark.long)])
@pytest.mark.parametrize(
    "refinements",
    [
        {},
        {"kernels": False},
        {"amp": True},
        {"pipeline": "torchvision", "val_split": 60},
        {"augment": "elastic", "ema_decay": 0.9},
    ],
    ids=["as it is", "kernels", "amp", "torchvision", "average"],
)
def test_stopped_at_any_batch_and_resumed(settings, tmp_path, scheduler, refinements):
    """2 to 3 s: whole, and once more with four stops, each at another kind of place."""
    if refinements.get("amp") and not has_bfloat16(torch.device("cpu")):
        pytest.skip("this processor has no bfloat16")
    settings |= {"scheduler": scheduler, **refinements}
    config, whole = TrainConfig(**settings), TrainConfig(**{**settings, "output_dir": str(tmp_path / "whole")})
    expected = train_and_evaluate(whole, silent).metrics

    files, checkpoint = config.files, None
    for batches in (1, 6, 3, 7):  # in the first epoch, on the second's first batch, ...
        if files.checkpoint.exists():
            checkpoint = load_checkpoint(files, silent)
        with pytest.raises(StoppedError):
            train_and_evaluate(config, silent, checkpoint, StopAfter(batches))
        assert load_metrics_json("run", files.root)["status"] == "interrupted"
        assert not files.params.exists()
    metrics = train_and_evaluate(config, silent, load_checkpoint(files, silent)).metrics

    assert digest(files.root) == digest(tmp_path / "whole")
    for key in ("train_losses", "learning_rates", "train_acc", "test_losses", "test_acc", "val_losses", "val_acc"):
        assert metrics[key] == expected[key], key
    assert files.log.read_text() == whole.files.log.read_text()
    assert len(metrics["epoch_seconds"]) == 4


def test_more_epochs_of_step_are_those_of_a_longer_run(finished_run, settings, capsys):
    longer = train_and_evaluate(TrainConfig(**{**settings, "epochs": 7}), silent).files
    assert command.main([*resume(finished_run), "--epochs", "7"]) == 0
    assert "Going on with run: 4 of 7 epochs are done." in capsys.readouterr().out
    assert digest(finished_run.root) == digest(longer.root)


def test_a_run_killed_before_its_last_files_gets_them(finished_run):
    expected = digest(finished_run.root)
    finished_run.params.unlink()
    assert command.main(resume(finished_run)) == 0
    assert digest(finished_run.root) == expected


# What is refused, and what is said


def test_a_run_already_finished_says_so(finished_run, capsys):
    before = contents(finished_run.root)
    assert command.main(resume(finished_run)) == 0
    assert capsys.readouterr().out == "run is finished: all 4 epochs are done.\n"
    assert contents(finished_run.root) == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--seed 2", "contradicts the checkpoint of run in seed (1, not 2)"),
        ("--lr 0.02 --model 3 --amp", "run in model ('1', not '3'), lr (0.01, not 0.02), amp (False, not True)"),
        ("--epochs 3", "run in epochs (4, not 3)"),
        ("--epochs 9 --threads 1", "run in epochs (4, not 9), threads (None, not 1)"),
    ],
)
def test_a_flag_that_contradicts_is_refused(stopped_run, capsys, flags, message):
    before = stopped_run.checkpoint.read_bytes()
    assert message in fails([*resume(stopped_run), *flags.split()], capsys)
    assert stopped_run.checkpoint.read_bytes() == before


def test_a_config_file_that_contradicts_is_refused(stopped_run, capsys, tmp_path):
    (tmp_path / "my.toml").write_text("nesterov = true\nepochs = 4\n")
    message = fails([*resume(stopped_run), "--config", str(tmp_path / "my.toml")], capsys)
    assert "contradicts the checkpoint of run in nesterov (False, not True); leave it out" in message


def test_more_epochs_of_onecycle_are_refused_with_the_reason(settings, capsys):
    config = TrainConfig(**settings, scheduler="onecycle")
    with pytest.raises(StoppedError):
        train_and_evaluate(config, silent, stop_requested=StopAfter(6))
    error = fails([*resume(config.files), "--epochs", "9"], capsys)
    assert "epochs: 9 is not allowed with --resume: the onecycle schedule of this run spans 4 epochs" in error


def test_the_same_flags_again_are_no_contradiction(stopped_run, tiny, tmp_path):
    moved = shutil.copytree(tiny, tmp_path / "moved")  # where the files are is not what is computed
    again = ["--epochs", "4", "--batch_size", "60", "--device", "cpu", "--data_dir", str(moved)]
    assert command.main([*resume(stopped_run), *again]) == 0
    assert load_metrics_json("run", stopped_run.root)["config"]["data_dir"] == str(moved)


def test_no_checkpoint_lists_those_that_exist(stopped_run, capsys):
    error = fails(["--resume", "--name", "other", "--output_dir", str(stopped_run.root)], capsys)
    assert "other_checkpoint.pth does not exist; runs in that folder that have a checkpoint: run\n" in error


def test_another_number_of_processes_is_refused(stopped_run):
    with pytest.raises(UsageError, match=r"the checkpoint is of 1 processes, not of 2; start as many again"):
        resumed_config(load_checkpoint(stopped_run), stopped_run, {}, processes=2)


def test_a_checkpoint_from_before_the_kernels_goes_on_without(stopped_run):
    files = stopped_run
    state = load_checkpoint(files)
    assert resumed_config(state, files, {}).kernels is True
    del state["config"]["kernels"]
    assert resumed_config(state, files, {}).kernels is resumed_config(state, files, {"kernels": False}).kernels is False


def test_other_threads_are_told(stopped_run, capsys):
    state = load_checkpoint(stopped_run)
    threads = state["metrics"]["environment"]["threads"]
    state["metrics"]["environment"]["threads"] = threads + 1
    torch.save(state, stopped_run.checkpoint)
    assert command.main(resume(stopped_run)) == 0
    change = f"so the last bits may differ: threads {threads + 1} -> {threads}."
    assert change in capsys.readouterr().out


# Checkpoints


def test_the_one_before_is_kept(stopped_run):
    files = stopped_run
    assert torch.load(files.checkpoint, weights_only=True)["epochs_done"] == 2
    assert torch.load(files.previous_checkpoint, weights_only=True)["epochs_done"] == 1


def test_a_new_run_of_the_name_does_not_keep_the_old_ones(stopped_run, settings):
    files = stopped_run
    config = TrainConfig(**{**settings, "seed": 5, "output_dir": str(files.root)})
    with pytest.raises(StoppedError):
        train_and_evaluate(config, silent, stop_requested=StopAfter(7))
    assert load_checkpoint(files)["config"]["seed"] == 5
    assert not files.previous_checkpoint.exists()


@pytest.mark.parametrize("damage", ["truncated", "a flipped bit", "empty", "missing", "other tensors"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(stopped_run, a_finished_run, capsys, damage):
    files = stopped_run
    content = bytearray(files.checkpoint.read_bytes())
    if damage == "a flipped bit":
        content[len(content) // 2] ^= 1
    if damage == "missing":
        files.checkpoint.unlink()
    elif damage == "other tensors":
        torch.save({"schema": 2, "weight": torch.zeros(3)}, files.checkpoint)
    else:
        files.checkpoint.write_bytes({"truncated": content[:1000], "empty": b""}.get(damage, content))
    assert command.main(resume(files)) == 0
    out = capsys.readouterr().out
    reason = {"missing": "is missing", "other tensors": "is no checkpoint: it has no epochs_done"}
    assert reason.get(damage, "run_checkpoint.pth is damaged") in out
    assert "Going on from the checkpoint before it." in out
    assert "Going on with run: 1 of 4 epochs are done." in out
    assert digest(files.root) == digest(a_finished_run)


def test_a_damaged_checkpoint_never_takes_the_place_of_the_one_before(stopped_run):
    files = stopped_run
    state = load_checkpoint(files)
    before = files.previous_checkpoint.read_bytes()
    files.checkpoint.write_bytes(files.checkpoint.read_bytes()[:1000])
    save_checkpoint(files, {key: value for key, value in state.items() if key != "schema"})
    assert files.previous_checkpoint.read_bytes() == before
    assert load_checkpoint(files)["epochs_done"] == 2


def test_two_damaged_checkpoints_are_a_failure_and_left_alone(stopped_run, capsys):
    files = stopped_run
    for path in (files.checkpoint, files.previous_checkpoint):
        path.write_bytes(path.read_bytes()[:500])
    assert command.main(resume(files)) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.count("is damaged") == 2
    assert files.checkpoint.stat().st_size == 500


def test_weights_that_are_no_longer_finite_leave_the_last_good_checkpoint(settings, monkeypatch, capsys):
    """The last step's update may overflow after its loss was measured; the evaluation finds it."""
    evaluate, calls = training.run.evaluate, []

    def overflown(model, *args):
        calls.append(model)
        if len(calls) == 3:
            next(model.parameters()).data.fill_(float("nan"))
        return evaluate(model, *args)

    monkeypatch.setattr(training.run, "evaluate", overflown)
    flags = [f"--{key}={value}" for key, value in settings.items()]
    assert command.main(flags) == 1
    error = capsys.readouterr().err
    assert (
        "the test loss is nan after epoch 2: the last steps left weights that are not finite; try a lower --lr" in error
    )
    assert error.count("\n") == 1
    state = load_checkpoint(RunFiles("run", settings["output_dir"]))
    assert state["epochs_done"] == 2
    assert all(value.isfinite().all() for value in state["model"].values())
