"""How sure a network is, put right on images that it was not trained on, and what it takes for no digit.

    python -m tools.calibrate --name mnist_model_3            # trains its twin first, if there is none

The twin, NAME_held_out, is a run of the same recipe and seed that held out images. The temperature fitted on those is
folded into the last layer of the network's weights, so that whoever loads them is told calibrated probabilities.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from common.cli import OneLineParser, command
from common.files import RunFiles, UsageError, atomic_write
from common.results import Metrics, OutputDir, save_metrics_json
from data_utils import split_indices
from image_data.facts import MNIST
from image_data.fetch import sha256_of
from imports import nn, torch
from tools.evaluate.measures import as_input, expected_calibration_error, fit_temperature, predict
from tools.networks import ensemble_file, images_of, load_network
from tools.sureness import fit, save_sureness, scores
from tools.trainings import stopping_on_sigterm, train_missing
from tools.voting import scale
from training.config import TrainConfig

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


def twin_of(metrics: Metrics, name: str, output_dir: OutputDir) -> TrainConfig:
    """The run itself if it held out images, else one of the same recipe that did, trained if it is not there."""
    config = TrainConfig(**metrics["config"] | {"name": name, "output_dir": output_dir})
    if not config.val_split:
        config = replace(config, name=f"{name}_held_out", val_split=HELD_OUT)
        train_missing([config], 1)
    return config


def fit_sureness(
    network: nn.Module, files: RunFiles, weights: Path, images: torch.Tensor, labels: torch.Tensor, val_split: int
) -> float:
    """Write what tells digits from the rest, fitted on the training images but those held out. Returns the threshold.

    The threshold is of the held-out images. The network may have been trained on them: it is too small to know them.
    """
    seen, held_out = split_indices(labels, val_split)
    sureness = fit(network, as_input(images[seen], CPU), labels[seen])
    sureness.threshold = scores(network, sureness, as_input(images[held_out], CPU)).quantile(1 - LOST)
    save_sureness(sureness, files, weights)
    return float(sureness.threshold)


def calibrate(name: str, output_dir: OutputDir = None) -> str:
    """Fit the run ``name`` on its twin's held-out images, write its weights, and return a line on it.

    Raises:
        UsageError: there is no such run, it is not finished, or it is of other data than MNIST.
        DamagedFileError: its files or its twin's are damaged.
    """
    network = load_network(name, output_dir, "network")
    metrics, files = network.facts, RunFiles(name, output_dir)
    if network.data.sha256 != MNIST.sha256 or metrics["status"] != "finished":
        raise UsageError(f"name: {name} is not a finished run on MNIST's digits; only such runs are calibrated")
    run = twin_of(metrics, name, output_dir)
    twin = load_network(run.run_name, output_dir, "network")
    images, labels = images_of(network, True, output_dir)
    held_out = split_indices(labels, run.val_split)[1]
    inputs, truth = as_input(images[held_out], CPU), labels[held_out]
    said = scale(predict(twin.model, inputs), 1 / folded(twin.facts, run.files))
    temperature, before = fit_temperature(said, truth), folded(metrics, files)

    fold(network.model, temperature / before, inputs[:100])
    known = {sha256_of(files.params): before}
    with atomic_write(files.params) as file:
        torch.save(network.model.state_dict(), file)
        file.flush()
        known[sha256_of(Path(file.name))] = temperature
        # Before the weights: those that are not listed have no temperature in them.
        save_metrics_json(metrics | {"temperature": temperature, "temperatures": known}, name, output_dir)
    threshold = fit_sureness(network.model, files, files.params, images, labels, run.val_split)
    ece, calibrated = (expected_calibration_error(values, truth) for values in (said, scale(said, temperature)))
    return (
        f"{name}: ECE {ece:.2f} % before, {calibrated:.2f} % after on {len(truth):,} held-out images; temperature"
        f" {temperature:.3f}, unsure above {threshold:.1f}"
    )


def get_args_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(description="Calibrate networks on images that they were not trained on.")
    names = [f"mnist_model_{model}" for model in "123"]
    parser.add_argument("--name", nargs="+", default=names, metavar="RUN", help=f"({' '.join(names)})")
    parser.add_argument("--output_dir", help="where outputs is; default: the project")
    return parser


def run(args: argparse.Namespace) -> int:
    """Calibrate each network named and print a line on it."""
    for name in args.name:
        files = RunFiles(name, args.output_dir)
        if ensemble_file(files).is_file() and not files.metrics.is_file():  # its temperature is tools.ensemble's
            network = load_network(name, args.output_dir, "ensemble")
            weights = RunFiles(network.facts["members"][-1], args.output_dir).params
            images, labels = images_of(network, True, args.output_dir)
            threshold = fit_sureness(network.model, files, weights, images, labels, HELD_OUT)
            print(f"{name}: unsure above {threshold:.1f}")
        else:
            print(calibrate(name, args.output_dir))
    return 0


main = stopping_on_sigterm()(command(get_args_parser, run, interrupted="interrupted; what is trained is kept"))

if __name__ == "__main__":
    sys.exit(main(None))
