"""How sure a network is, put right on images that it was not trained on, and what it takes for no digit.

    python -m tools.calibrate --name mnist_model_3            # trains its twin first, if there is none
    python -m tools.calibrate --name mnist_model_3 --twin trial

The twin is a run of the same recipe and seed that held out images. The temperature fitted on those is folded into the
last layer of the network's weights, so that whoever loads them is told calibrated probabilities.
"""

import argparse
import sys
from dataclasses import replace
from typing import Any

from common.cli import OneLineParser, command
from common.files import DamagedFileError, RunFiles, UsageError, atomic_write
from common.results import Metrics, OutputDir, load_tensors, save_metrics_json, save_model_params
from data_utils import load_images, split_indices
from image_data.facts import MNIST, DataSet
from image_data.fetch import sha256_of
from imports import nn, torch
from tools.evaluate.measures import as_input, expected_calibration_error, fit_temperature, predict
from tools.networks import ensemble_file, images_of, load_network, load_run
from tools.sureness import Sureness, sureness_file
from tools.trainings import stopping_on_sigterm, train_missing
from tools.voting import scale
from training.config import TrainConfig
from visualization import load_metrics_json

HELD_OUT = 10000
LOST = 0.0175  # share of held-out digits that are called unsure
CPU = torch.device("cpu")


def folded(metrics: Metrics, files: RunFiles) -> float:
    """The temperature that is in the weights already; 1 for weights that were not calibrated, or trained since."""
    return float(metrics.get("temperatures", {}).get(sha256_of(files.params), 1.0))


def fold(network: nn.Module, temperature: float, example: torch.Tensor) -> None:
    """Divide the logits of ``network`` by ``temperature``: in its last layer, in place.

    Raises:
        UsageError: what follows the last layer is not a log-softmax alone.
    """
    layers = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    before = predict(network, example)
    with torch.no_grad():
        for values in layers[-1].parameters():
            values.div_(temperature)
    if not torch.allclose(predict(network, example), scale(before, temperature), atol=1e-3):
        raise UsageError("name: its last layer does not give logits; no temperature can be folded into it")


def twin_of(metrics: Metrics, name: str, output_dir: OutputDir, twin: str | None) -> TrainConfig:
    """The run that held out images, trained if it is not there. Raises UsageError for one of another recipe."""
    config = TrainConfig(**metrics["config"] | {"name": name, "output_dir": output_dir})
    wanted = replace(config, name=twin or f"{name}_held_out", val_split=HELD_OUT)
    if twin is not None:
        found = read_metrics(twin, output_dir)["config"]
        wanted = replace(wanted, val_split=found["val_split"])
        if not found["val_split"]:
            raise UsageError(f"twin: {twin} held out no images; train it with --val_split {HELD_OUT}")
    train_missing([wanted], 1)
    return wanted


def read_metrics(name: str, output_dir: OutputDir) -> Metrics:
    try:
        return load_metrics_json(name, output_dir)
    except FileNotFoundError as error:
        raise UsageError(f"name: {error}") from None
    except DamagedFileError as error:
        raise UsageError(str(error)) from None


def fit_sureness(
    network: nn.Module, files: RunFiles, images: torch.Tensor, labels: torch.Tensor, held_out: int = HELD_OUT
) -> float:
    """Write what tells digits from the rest, fitted on the training images but those held out. Returns the threshold.

    The threshold is of the held-out images. The network may have been trained on them: it is too small to know them.
    """
    seen, others = split_indices(labels, held_out)
    sureness = Sureness.fit(network, as_input(images[seen], CPU), labels[seen])
    threshold = sureness.scores(network, as_input(images[others], CPU)).quantile(1 - LOST)
    with atomic_write(sureness_file(files)) as file:
        torch.save(replace(sureness, threshold=threshold).as_tensors(), file)
    return float(threshold)


def calibrate(name: str, output_dir: OutputDir = None, twin: str | None = None) -> dict[str, Any]:
    """Fit the run ``name`` on its twin's held-out images, write its weights, and return what was found.

    Raises:
        UsageError: there is no such run, its files are damaged, or it is of other data than MNIST.
    """
    metrics, files = read_metrics(name, output_dir), RunFiles(name, output_dir)
    if DataSet.of(metrics).sha256 != MNIST.sha256 or metrics["status"] != "finished":
        raise UsageError(f"name: {name} is not a finished run on MNIST's digits; only such runs are calibrated")
    try:
        load_tensors(files.params)
    except (FileNotFoundError, DamagedFileError) as error:
        raise UsageError(str(error)) from None
    run = twin_of(metrics, name, output_dir, twin)
    images, labels = load_images(run.data_folder, train=True)
    held_out = split_indices(labels, run.val_split)[1]
    other, network = load_run(run.model, run.run_name, output_dir), load_run(metrics["model"], name, output_dir)
    inputs = as_input(images[held_out], CPU)
    said = scale(predict(other, inputs), 1 / folded(read_metrics(run.run_name, output_dir), run.files))
    temperature = fit_temperature(said, labels[held_out])

    before = folded(metrics, files)
    fold(network, temperature / before, inputs[:100])
    threshold = fit_sureness(network, files, images, labels, run.val_split)
    known = {sha256_of(files.params): before}
    draft = f"{name}.calibrated"
    path = save_model_params(network, draft, output_dir)
    found = {"temperature": temperature, "temperature_twin": run.run_name, "temperature_images": len(held_out)}
    known[sha256_of(path)] = temperature  # written first: weights that are not listed have no temperature in them
    save_metrics_json(metrics | found | {"temperatures": known}, name, output_dir)
    path.replace(files.params)
    truth = labels[held_out]
    eces = [expected_calibration_error(values, truth) for values in (said, scale(said, temperature))]
    return found | {"eces": eces, "threshold": threshold}


def get_args_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(description="Calibrate networks on images that they were not trained on.")
    names = [f"mnist_model_{model}" for model in "123"]
    parser.add_argument("--name", nargs="+", default=names, metavar="RUN", help=f"({' '.join(names)})")
    parser.add_argument(
        "--twin", metavar="RUN", help="that held out images; default: NAME_held_out, trained if missing"
    )
    parser.add_argument("--output_dir", help="where outputs is; default: the project")
    return parser


def run(args: argparse.Namespace) -> int:
    """Calibrate each network named and print a line on it."""
    if args.twin is not None and len(args.name) > 1:
        raise UsageError("twin: is of one network; give one --name")
    for name in args.name:
        files = RunFiles(name, args.output_dir)
        if ensemble_file(files).is_file() and not files.metrics.is_file():  # its temperature is tools.ensemble's
            network = load_network(name, args.output_dir, "ensemble")
            threshold = fit_sureness(network.model, files, *images_of(network, True, args.output_dir))
            print(f"{name}: unsure above {threshold:.1f}")
            continue
        found = calibrate(name, args.output_dir, args.twin)
        before, after = found["eces"]
        print(
            f"{name}: ECE {before:.2f} % before, {after:.2f} % after on {found['temperature_images']:,} held-out"
            f" images; temperature {found['temperature']:.3f}, unsure above {found['threshold']:.1f}"
        )
    return 0


main = stopping_on_sigterm()(command(get_args_parser, run, interrupted="interrupted; what is trained is kept"))

if __name__ == "__main__":
    sys.exit(main(None))
