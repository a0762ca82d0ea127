"""Several networks that vote.

    python -m tools.ensemble                              # models 1, 2 and 3, three seeds each, by --config best
    python -m tools.ensemble --models 3 --seeds 10 --config fast --name fast_vote
    python -m tools.ensemble --members mnist_model_1 mnist_model_2 --method soft

    from tools.ensemble import load_ensemble
    log_probabilities = load_ensemble("ensemble")(images)   # used like any network

Members that are not there are trained first. How they vote is chosen, and the weights and the temperature are fitted,
on held-out training images, with twins of the members that were not trained on those: same settings, same seed.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from common.cli import OneLineParser, check_at_least, command
from common.files import RunFiles, UsageError
from data_utils import load_images, split_indices
from image_data.facts import DataSet, facts_of
from imports import F, nn, torch
from model_strategy import known_models
from tools.evaluate.measures import as_input, expected_calibration_error, fit_temperature, predict
from tools.intervals import wilson_interval
from tools.networks import ENSEMBLE_SCHEMA, Network, ensemble_file, load_network, says_ensemble
from tools.networks import load_ensemble as load_ensemble  # to be had from here too
from tools.output import rendered, write_json
from tools.timing import CPU, forward_ms
from tools.trainings import stopping_on_sigterm, train_missing
from tools.voting import METHODS, Ensemble, scale, vote
from training.config import TrainConfig
from training.machine import environment
from visualization import count_parameters, load_metrics_json

TO_TRAIN = ("models", "seeds", "first_seed", "config", "dataset")  # flags that no saved run needs
HELD_OUT = 1 / 6  # part of the training images that the twins do not see: 10,000 of MNIST's 60,000


def fit_votings(log_probabilities: torch.Tensor, labels: torch.Tensor, models: Sequence[str]) -> list[dict[str, Any]]:
    """Fit every method on images that the members were not trained on: [M, N, 10], and labels int64 [N].

    ``models``: the network of each member; those of one have the same weight, since they differ by chance. Returns the
    method's name, weights, temperature, accuracy in percent, and mean negative log-likelihood, each.
    """
    equal = [1 / len(models)] * len(models)
    votings: list[dict[str, Any]] = []
    for method in METHODS:
        weights = equal
        if method == "weighted":  # of members as sure as the soft vote should be, else the surest has all the weight
            weights = fit_weights(scale(log_probabilities, votings[0]["temperature"]), labels, models)
        said = vote(log_probabilities, method, weights)
        right = said.argmax(1) == labels
        temperature = fit_temperature(said, labels)
        loss = F.nll_loss(scale(said, temperature), labels).item()
        accuracy = 100.0 * right.float().mean().item()
        fitted = {"method": method, "weights": weights, "temperature": temperature}
        votings.append(fitted | {"accuracy": accuracy, "loss": loss})
    return votings


def fit_weights(log_probabilities: torch.Tensor, labels: torch.Tensor, models: Sequence[str]) -> list[float]:
    """The weights of the members' probabilities with the least negative log-likelihood, one a network, with sum 1."""
    from scipy.optimize import minimize

    kinds = sorted(set(models))
    of_member = torch.tensor([kinds.index(model) for model in models])
    right = log_probabilities.double().gather(2, labels.expand(len(models), -1).unsqueeze(2)).squeeze(2)

    def loss(logits: Any) -> float:
        log_weights = F.log_softmax(torch.as_tensor(logits)[of_member], dim=0)
        return -(right + log_weights.unsqueeze(1)).logsumexp(0).mean().item()

    best = minimize(loss, torch.zeros(len(kinds), dtype=torch.float64).numpy(), method="Nelder-Mead")
    weights: list[float] = torch.as_tensor(best.x)[of_member].softmax(0).tolist()
    return weights


def wanted_members(args: argparse.Namespace) -> list[TrainConfig]:
    """The runs that the arguments name; a UsageError if one is not there, or if two do not fit together."""
    named, default = args.members, get_args_parser().get_default
    if named and (unused := [key for key in TO_TRAIN if getattr(args, key) != default(key)]):
        raise UsageError(f"{unused[0]}: not allowed with --members; it tells what is to be trained")
    if not named:
        common = {"data_dir": args.data_dir, "output_dir": args.output_dir}
        if args.dataset is not None:
            common["dataset"] = args.dataset
        return [
            TrainConfig.from_sources(
                common | {"model": model, "seed": seed, "name": f"{args.name}_model_{model}_seed_{seed}"}, args.config
            )
            for model in dict.fromkeys(args.models)
            for seed in range(args.first_seed, args.first_seed + args.seeds)
        ]
    members, of_data = [], {}
    if len(set(named)) < len(named):
        raise UsageError(f"members: {max(named, key=named.count)} is named twice; a network has one vote")
    data_dir = {} if args.data_dir is None else {"data_dir": args.data_dir}
    for name in named:
        try:
            metrics = load_metrics_json(name, args.output_dir)
        except FileNotFoundError as error:
            raise UsageError(f"members: {error}") from None
        if metrics["status"] != "finished":
            raise UsageError(f"members: {name} is not finished; its metrics say that it is {metrics['status']}")
        members.append(TrainConfig.of(metrics, **data_dir, name=name, output_dir=args.output_dir))
        of_data[DataSet.of(metrics).sha256] = str(DataSet.of(metrics))
    held_out = {str(member.val_split) for member in members}
    alike = {"are of several data sets": of_data.values(), "hold out different numbers of images": held_out}
    for what, found in alike.items():
        if len(found) > 1:
            raise UsageError(f"members: they {what} ({', '.join(sorted(found))}); take members that agree")
    return members


def load_runs(runs: Sequence[TrainConfig]) -> list[Network]:
    return [load_network(run.run_name, run.output_dir, "network") for run in runs]


def predictions(networks: Sequence[nn.Module], images: torch.Tensor) -> torch.Tensor:
    """The log-probabilities [M, N, 10] of ``networks`` on images uint8 [N, 28, 28]."""
    inputs = as_input(images, CPU)
    return torch.stack([predict(network, inputs) for network in networks])


def answers_of_twins(twins: Sequence[Network], members: Sequence[Network], images: torch.Tensor) -> torch.Tensor:
    """As ``predictions``, of ``twins`` made as sure as their ``members``, which were calibrated or were not."""
    said = zip(predictions([twin.model for twin in twins], images), twins, members, strict=True)
    return torch.stack([scale(one, member.temperature / twin.temperature) for one, twin, member in said])


def build(args: argparse.Namespace) -> dict[str, Any]:
    """Train what is missing, choose how to vote, measure, write ``outputs/NAME.json``, and return what it says."""
    files = RunFiles(args.name, args.output_dir)
    target = ensemble_file(files)
    if files.metrics.exists() or (target.exists() and not says_ensemble(target)):
        raise UsageError(f"name: {args.name} is the name of something else under {target.parent}; choose another")
    members = wanted_members(args)
    models = [member.model for member in members]
    data = facts_of(members[0].ensure_data())
    images, labels = load_images(members[0].data_folder, train=True)
    size = round(HELD_OUT * len(labels))
    twins = [
        member if member.val_split else replace(member, name=f"{member.run_name}_held_out", val_split=size)
        for member in members
    ]
    train_missing(members + [twin for twin in twins if twin not in members], args.jobs)

    held_out, voters = split_indices(labels, twins[0].val_split)[1], load_runs(members)
    votings = fit_votings(answers_of_twins(load_runs(twins), voters, images[held_out]), labels[held_out], models)
    allowed = [voting for voting in votings if args.method in ("best", voting["method"])]
    chosen = max(allowed, key=lambda voting: (voting["accuracy"], -voting["loss"]))
    how = {key: chosen[key] for key in ("method", "weights", "temperature")}

    test_images, test_labels = load_images(members[0].data_folder, train=False)
    networks = [voter.model for voter in voters]
    singles = (predictions(networks, test_images).argmax(2) == test_labels).float().mean(1).mul(100).tolist()
    ensemble = Ensemble(networks, **how)
    (log_probabilities,) = predictions([ensemble], test_images)
    correct = int((log_probabilities.argmax(1) == test_labels).sum())
    description = {
        "schema": ENSEMBLE_SCHEMA,
        "name": args.name,
        "kind": "ensemble",
        "data": data.as_json(),
        "members": [member.run_name for member in members],
        "models": models,
        **how,
        "parameters": count_parameters(ensemble),
        "accuracy": 100.0 * correct / len(test_labels),
        "accuracy_interval": wilson_interval(correct, len(test_labels)),
        "ece": expected_calibration_error(log_probabilities, test_labels),
        "member_accuracies": [round(accuracy, 4) for accuracy in singles],
        "latency_ms": {str(count): round(forward_ms(ensemble, count), 3) for count in (1, 100)},
        "member_latency_ms": {str(count): round(forward_ms(networks[0], count), 3) for count in (1, 100)},
        "held_out": {"images": len(held_out), "votings": votings},
        "environment": environment(CPU),
    }
    write_json(target, description)
    return description


def get_args_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(doc=__doc__)
    parser.add_argument("--name", default="ensemble", help="of the ensemble and its file (ensemble)")
    parser.add_argument("--members", nargs="+", metavar="RUN", help="saved runs that vote; default: those of the next")
    parser.add_argument("--models", nargs="+", choices=known_models(), default=["1", "2", "3"], help="(1 2 3)")
    parser.add_argument("--seeds", type=int, default=3, help="networks of each model (3)")
    parser.add_argument("--first_seed", type=int, default=1, help="the first of them (1)")
    parser.add_argument("--config", default="best", help="their settings, as of main.py (best)")
    parser.add_argument(
        "--method", choices=["best", *METHODS], default="best", help="how they vote; best: on held-out images"
    )
    parser.add_argument("--jobs", type=int, default=1, help="how many to train at once, the threads divided (1)")
    parser.add_argument("--dataset", help="what they are trained on, as of main.py (mnist)")
    parser.add_argument("--data_dir", default=None, help="folder with MNIST/raw; default: the project's data")
    parser.add_argument("--output_dir", default=None, help="where outputs is; default: the project")
    return parser


def run(args: argparse.Namespace) -> int:
    check_at_least(args, seeds=1, jobs=1)
    print(rendered(Path(__file__).with_suffix(".txt"), **build(args)), end="")
    return 0


main = stopping_on_sigterm()(command(get_args_parser, run, interrupted="interrupted; what is trained is kept"))

if __name__ == "__main__":
    sys.exit(main(None))
