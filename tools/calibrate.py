"""How sure a network is, put right on images that it was not trained on, and what it takes for no digit.

    python -m tools.calibrate --name mnist_model_3            # trains its twin first, if there is none

The twin, NAME_held_out, is a run of the same recipe and seed that held out images. The temperature fitted on those is
folded into the last layer of the network's weights, so that whoever loads them is told calibrated probabilities.
"""

import argparse
import hashlib
import io
import sys
from dataclasses import replace

from common.cli import OneLineParser, command
from common.files import RunFiles, UsageError, write_whole
from common.results import OutputDir
from data_utils import split_indices
from image_data.facts import MNIST
from image_data.fetch import sha256_of
from imports import nn, torch
from tools.evaluate.measures import as_input, expected_calibration_error, fit_temperature, predict
from tools.networks import Network, images_of, load_network, weights_of
from tools.sureness import fit, save_sureness, scores
from tools.timing import CPU
from tools.trainings import stopping_on_sigterm, train_missing
from tools.voting import scale
from training.config import TrainConfig

HELD_OUT = 10000
LOST = 0.0175  # share of held-out digits that are called unsure


def fold(network: nn.Module, temperature: float, example: torch.Tensor) -> None:
    """Divide the logits of ``network`` by ``temperature``, in its last layer, in place; a UsageError if more than a
    log-softmax follows that layer."""
    layers = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    before = predict(network, example)
    with torch.no_grad():
        for values in layers[-1].parameters():
            values.div_(temperature)
    if not torch.allclose(predict(network, example), scale(before, temperature), atol=1e-3):
        raise UsageError("name: its last layer does not give logits; no temperature can be folded into it")


def calibrate(name: str, output_dir: OutputDir = None) -> str:
    """Fit the run ``name`` on its twin's held-out images, or the ensemble of this name. Returns a line on it.

    An ensemble has its temperature already, and its members keep none. A UsageError if there is no such run, it is not
    finished, or of other data than MNIST; a DamagedFileError if its files or its twin's are damaged.
    """
    network, files = load_network(name, output_dir), RunFiles(name, output_dir)
    alone, weights = network.kind == "network", weights_of(network, output_dir)
    if network.data.sha256 != MNIST.sha256 or network.facts.get("status", "finished") != "finished":
        raise UsageError(f"name: {name} is not a finished run on MNIST's digits; only such runs are calibrated")
    images, labels = images_of(network, True, output_dir)
    seen, held_out = split_indices(labels, network.facts.get("config", {}).get("val_split") or HELD_OUT)
    inputs, truth = as_input(images[held_out], CPU), labels[held_out]
    temperatures, line = {sha256_of(weights): network.temperature}, f"{name}: "
    if alone:
        twin = twin_of(network, output_dir)
        said = scale(predict(twin.model, inputs), 1 / twin.temperature)
        temperature = fit_temperature(said, truth)
        fold(network.model, temperature / network.temperature, inputs[:100])
        torch.save(network.model.state_dict(), contents := io.BytesIO())
        temperatures[hashlib.sha256(contents.getvalue()).hexdigest()] = temperature
        ece, after = (expected_calibration_error(values, truth) for values in (said, scale(said, temperature)))
        line += f"ECE {ece:.2f} % before, {after:.2f} % after on {len(truth):,} held-out images; temperature"
        line += f" {temperature:.3f}, "
    # The threshold is of held-out images that the network may know: it is too small to tell them from others.
    sureness = fit(network.model, as_input(images[seen], CPU), labels[seen])
    sureness.threshold = scores(network.model, sureness, inputs).quantile(1 - LOST)
    save_sureness(sureness, files, temperatures)
    if alone:  # after what tells that there is a temperature in them
        write_whole(weights, contents.getvalue())
    return f"{line}unsure above {float(sureness.threshold):.1f}"


def twin_of(network: Network, output_dir: OutputDir) -> Network:
    """The run itself if it held out images, else one of the same recipe that did, trained if it is not there."""
    config = TrainConfig.of(network.facts, name=network.name, output_dir=output_dir)
    if config.val_split:
        return network
    config = replace(config, name=f"{network.name}_held_out", val_split=HELD_OUT)
    train_missing([config], 1)
    return load_network(config.run_name, output_dir, "network")


def get_args_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(description="Calibrate networks on images that they were not trained on.")
    names = [f"mnist_model_{model}" for model in "123"]
    parser.add_argument("--name", nargs="+", default=names, metavar="RUN", help=f"({' '.join(names)})")
    parser.add_argument("--output_dir", help="where outputs is; default: the project")
    return parser


def run(args: argparse.Namespace) -> int:
    """Calibrate each network named and print a line on it."""
    for name in args.name:
        print(calibrate(name, args.output_dir))
    return 0


main = stopping_on_sigterm()(command(get_args_parser, run, interrupted="interrupted; what is trained is kept"))

if __name__ == "__main__":
    sys.exit(main(None))
