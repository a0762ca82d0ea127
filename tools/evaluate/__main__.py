"""Measure a trained network on the test set.

python -m tools.evaluate --name mnist_model_1
python -m tools.evaluate --ensemble ensemble
"""

import argparse
import functools
import sys
from typing import TYPE_CHECKING

from common.cli import OneLineParser, command, shown_path
from common.files import UsageError
from training.config import TrainConfig

if TYPE_CHECKING:
    from tools.networks import Network


def get_args_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        description="Accuracy, errors, calibration, robustness and saliency of a trained network.",
        argument_default=argparse.SUPPRESS,
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--name", help="the run whose network is measured (mnist_model_1)")
    which.add_argument("--ensemble", metavar="NAME", help="the ensemble to measure instead")
    parser.add_argument("--device", help="auto, cpu, cuda, cuda:N or mps; auto is cuda where there is one (auto)")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's choice")
    parser.add_argument("--data_dir", help="folder with MNIST/raw; default: the run's")
    parser.add_argument("--output_dir", help="where outputs and plots are; default: the project")
    return parser


def load(config: TrainConfig, ensemble: bool) -> "Network":
    """The network to measure; a UsageError if there is none of this name, or if it is not finished."""
    from tools.networks import load_network

    try:
        network = load_network(config.run_name, config.output_dir, "ensemble" if ensemble else "network")
    except UsageError as error:
        raise UsageError(f"{'ensemble' if ensemble else 'name'}: {error}") from None
    if not ensemble and network.facts["status"] != "finished":
        raise UsageError(
            f"name: {config.run_name} is not finished; its metrics say that it is {network.facts['status']}"
        )
    return network


def run(args: argparse.Namespace) -> int:
    settings = vars(args)
    ensemble = "ensemble" in settings
    if ensemble:
        settings["name"] = settings.pop("ensemble")
    config = TrainConfig(**settings)
    from data_utils import split_indices
    from imports import nn
    from tools.networks import OnOwnData, images_of
    from tools.voting import Ensemble
    from training.machine import resolve_device
    from training.native import with_kernels
    from training.setup import prepare_machine

    device = resolve_device(config.device)
    network = load(config, ensemble)
    model, of_run = network.model.to(device), {} if ensemble else network.facts["config"]
    prepare_machine(config, device, print)
    if device.type == "cpu":
        log = functools.cache(print)  # what is said of one member is not said of the next

        def fast(part: nn.Module) -> nn.Module:
            if not isinstance(part, OnOwnData | Ensemble | nn.ModuleList):
                return with_kernels(part, log)
            for name, inner in part.named_children():
                setattr(part, name, fast(inner))
            return part

        model = fast(model)

    from common.results import save_json
    from tools.evaluate.figures import all_figures
    from tools.evaluate.measures import evaluate_network, print_evaluation
    from tools.output import write_figure

    files = config.files
    files.make_folders()
    place = config.output_dir, None if config.data_dir is None else config.data_root
    test = images_of(network, False, *place)
    held_out = None
    if val_split := of_run.get("val_split"):
        images, labels = images_of(network, True, *place)
        chosen = split_indices(labels, val_split)[1]
        held_out = images[chosen], labels[chosen]
    evaluation = evaluate_network(config.run_name, model, test, held_out, device, network.data.classes)
    if ensemble:  # fitted when it was made, and a part of what it says
        evaluation["calibration"]["temperature"] = float(network.facts["temperature"])
    print_evaluation(evaluation)
    written = [save_json(evaluation, files.metrics.with_name(f"{files.name}_evaluation.json"))]
    for what, figure in all_figures(evaluation, model, *test, device).items():
        written.append(files.plot.with_name(f"{files.name}_{what}.png"))
        write_figure(written[-1], figure, dpi=90)
    for path in written:
        print(f"  {shown_path(path)}")
    return 0


main = command(get_args_parser, run)

if __name__ == "__main__":
    sys.exit(main(None))
