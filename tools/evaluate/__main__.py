"""Accuracy, errors, calibration, robustness and saliency of a trained network.

python -m tools.evaluate --name mnist_model_1
python -m tools.evaluate --name ensemble
"""

import argparse
import functools
import sys

from common.cli import OneLineParser, command, shown_path
from common.files import UsageError
from training.config import TrainConfig


def get_args_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(doc=__doc__, argument_default=argparse.SUPPRESS)
    parser.add_argument("--name", "--ensemble", help="the run or ensemble that is measured (mnist_model_1)")
    parser.add_argument("--device", help="auto, cpu, cuda, cuda:N or mps; auto is cuda where there is one (auto)")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's choice")
    parser.add_argument("--data_dir", help="folder with MNIST/raw; default: the run's")
    parser.add_argument("--output_dir", help="where outputs and plots are; default: the project")
    return parser


def run(args: argparse.Namespace) -> int:
    config = TrainConfig(**vars(args))
    from data_utils import split_indices
    from tools.networks import images_of, load_network
    from training.machine import resolve_device
    from training.setup import prepare_machine

    device = resolve_device(config.device)
    try:
        network = load_network(config.run_name, config.output_dir)
    except UsageError as error:
        raise UsageError(f"name: {error}") from None
    status = network.facts.get("status", "finished")  # an ensemble has none
    if status != "finished":
        raise UsageError(f"name: {config.run_name} is not finished; its metrics say that it is {status}")
    prepare_machine(config, device, print)
    model = network.model.to(device)

    from common.results import save_json
    from tools.evaluate.figures import all_figures
    from tools.evaluate.measures import evaluate_network, print_evaluation, with_fast_parts
    from tools.output import write_figure

    if device.type == "cpu":
        model = with_fast_parts(model, functools.cache(print))  # what is said of one member is not said of the next
    files = config.files
    files.make_folders()
    place = config.output_dir, None if config.data_dir is None else config.data_root
    test = images_of(network, False, *place)
    held_out = None
    if val_split := network.facts.get("config", {}).get("val_split"):
        images, labels = images_of(network, True, *place)
        chosen = split_indices(labels, val_split)[1]
        held_out = images[chosen], labels[chosen]
    evaluation = evaluate_network(config.run_name, model, test, held_out, device, network.data.classes)
    if network.kind == "ensemble":  # fitted when it was made, and a part of what it says
        evaluation["calibration"]["temperature"] = float(network.facts["temperature"])
    print_evaluation(evaluation)
    written = [save_json(evaluation, files.metrics.with_name(f"{files.name}_evaluation.json"))]
    for what, figure in all_figures(evaluation, model, test).items():
        written.append(files.plot.with_name(f"{files.name}_{what}.png"))
        write_figure(written[-1], figure, dpi=90)
    for path in written:
        print(f"  {shown_path(path)}")
    return 0


main = command(get_args_parser, run)

if __name__ == "__main__":
    sys.exit(main(None))
