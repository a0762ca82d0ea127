"""Train one of three small networks on MNIST.

python main.py --model 1 --scheduler onecycle --epochs 15
python main.py --model 2 --scheduler step --epochs 10
python main.py --model 3 --scheduler onecycle --epochs 20 --max_lr 0.5
"""

import argparse
import functools
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from common.cli import Log, OneLineParser, StopSignals, forgive_consoles, shown_path, silent
from common.files import DamagedFileError, RunFiles, UsageError
from image_data.fetch import DataError
from training.config import TrainConfig, add_training_flags, fields_in, read_config_file
from training.processes import Processes
from training.tensorboard_log import check_installed


def get_args_parser() -> argparse.ArgumentParser:
    """The command's flags. Those that are not given are not in the result."""
    parser = OneLineParser(doc=__doc__, argument_default=argparse.SUPPRESS)
    add_training_flags(parser)
    parser.add_argument("--resume", action="store_true", help="go on from the last epoch's end, bit for bit")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns its exit status: 0 done, 1 the run failed, 2 a mistake in the arguments."""
    forgive_consoles()
    parser = get_args_parser()
    processes = Processes.from_environment()
    signals = StopSignals(echo_seconds=1.0 if processes.count > 1 else 0.0)
    try:
        with signals:
            return _run(parser, vars(parser.parse_args(argv)), processes, signals)
    except UsageError as error:
        parser.error(str(error))
    except DamagedFileError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        of_tools = "-tools" if error.name == "cv2" else ""  # what finds the ink on a picture
        how = f"pip install -r requirements{of_tools}.txt adds it, and .venv/bin/python has it after make"
        parser.exit(1, f"{parser.prog}: {error.name} is not installed for {sys.executable}: {how}\n")
    except KeyboardInterrupt:
        if processes.is_main:
            print(f"{parser.prog}: stopped", file=sys.stderr)
        return signals.exit_status


def _run(parser: argparse.ArgumentParser, given: dict[str, Any], processes: Processes, signals: StopSignals) -> int:
    config_file, resume = given.pop("config", None), given.pop("resume", False)
    settings = ({} if config_file is None else read_config_file(config_file)) | given
    config = TrainConfig(**settings)
    if config.tensorboard:
        check_installed()
    say = functools.partial(print, flush=True) if processes.is_main else silent
    checkpoint = None
    if resume:
        from training.checkpoint import load_checkpoint, resumed_config

        checkpoint = load_checkpoint(config.files, say)
        config = resumed_config(checkpoint, config.files, settings, processes.count)
        if checkpoint["epochs_done"] >= config.epochs and _is_finished(config):
            say(f"{config.run_name} is finished: all {config.epochs} epochs are done.")
            return 0
        say(f"Going on with {config.run_name}: {checkpoint['epochs_done']} of {config.epochs} epochs are done.")
    elif processes.is_main:
        config.files.make_folders()
        _say_what_is_replaced(config, say)
    for note in config.flags_without_effect(given):
        say(f"Note: {note}.")

    from training.report import TrainingError
    from training.run import StoppedError
    from training.train import train_and_evaluate

    try:
        result = train_and_evaluate(config, checkpoint=checkpoint, stop_requested=signals.requested)
    except StoppedError:
        if processes.is_main:
            print(f"{parser.prog}: stopped{_how_to_go_on(config, processes)}", file=sys.stderr)
        return signals.exit_status
    except TrainingError as error:  # every process knows of it
        if processes.is_main:
            print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    except (DataError, OSError) as error:
        print(f"{parser.prog}: {error}{_how_to_go_on(config, processes)}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        if processes.count == 1:
            raise
        print(f"{parser.prog}: process {processes.rank} lost the others: {error}", file=sys.stderr)
        return 1
    if processes.is_main:
        print_result(result.metrics, result.files)
    return 0


def _is_finished(config: TrainConfig) -> bool:
    return _metrics_of(config).get("status") == "finished" and config.files.params.exists()


def _metrics_of(config: TrainConfig) -> dict[str, Any]:
    """The run's metrics on disk; none of them if they cannot be read."""
    from visualization import load_metrics_json

    try:
        return load_metrics_json(config.run_name, config.output_dir)
    except (OSError, RuntimeError):
        return {}


def _say_what_is_replaced(config: TrainConfig, say: Log) -> None:
    """Whether the files of a finished run are about to be lost: those of another recipe, or that git keeps."""
    if not _is_finished(config):
        return
    was, now = _metrics_of(config)["config"], asdict(config)
    other = [key for key in fields_in("recipe") if key in was and was[key] != now[key]]
    git = ["git", "-C", str(config.files.root), "ls-files", "--error-unmatch", str(config.files.params)]
    is_kept = shutil.which("git") is not None and subprocess.run(git, capture_output=True).returncode == 0
    if other or is_kept:
        how = ["with another " + ", ".join(other)] * bool(other) + ["which git keeps"] * is_kept
        say(f"Note: this replaces the files of {config.run_name}, a finished run {' and '.join(how)}; see --name.")


def _how_to_go_on(config: TrainConfig, processes: Processes) -> str:
    """What a person does after a run of this process ended early, to be added to the line that says so."""
    metrics = _metrics_of(config)
    if metrics.get("pid") != os.getpid():  # an earlier run's: this one had not begun
        return ""
    done = len(metrics["test_acc"])
    if done == 0:
        return "; no epoch was done, so there is nothing to go on from"
    words = [sys.argv[0], "--resume", "--name", config.run_name]
    if config.output_dir is not None:
        words += ["--output_dir", config.output_dir]
    launcher = "python" if processes.count == 1 else "torchrun <as before>"
    return f"; to go on from epoch {done}: {launcher} {shlex.join(words)}"


def print_result(metrics: dict[str, Any], files: RunFiles) -> None:
    """A short summary of a finished run, where each of its files is, and what there is to do with it."""
    accuracies = metrics["test_acc"]
    best = accuracies.index(max(accuracies))
    print(
        f"{metrics['name']}: {metrics['parameters']:,} parameters, test accuracy {accuracies[-1]:.2f}%"
        f" (best epoch {best}: {accuracies[best]:.2f}%), {metrics['total_seconds']:.0f} s"
        f" on {metrics['environment']['device']}"
    )
    for what in ("params", "metrics", "summary", "plot", "checkpoint", "log"):
        print(f"  {what:<10} {shown_path(getattr(files, what))}")
    place = ["--output_dir", str(files.output_dir)] if files.output_dir else []
    of_it = shlex.join(["--name", metrics["name"], *place])
    print("What next?")
    print(f"  errors, calibration, robustness  python -m tools.evaluate {of_it}")
    print(f"  draw for it                      {shlex.join(['python', '-m', 'tools.web', *place])}")
    print(f"  take it along as one page        python -m tools.export --format html {of_it}")


if __name__ == "__main__":
    sys.exit(main())
