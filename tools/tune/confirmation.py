"""The best settings of a study against the specification's, on seeds that neither was chosen with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tools.tune.results import best_trials
from training.config import TrainConfig, read_config_file

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial


def recipes_to_compare(best: FrozenTrial) -> dict[str, dict[str, Any]]:
    """The settings of the trial ``best``, and the specification's for as many epochs of the same network and images."""
    tuned = best.user_attrs["settings"]
    common = {key: tuned[key] for key in ("model", "epochs", "val_split")}
    specification = TrainConfig(**(read_config_file("reference") | common))
    return {"tuned": tuned, "specification": {key: getattr(specification, key) for key in tuned}}


def queue_seeds(study: optuna.Study, seeds: Sequence[int]) -> None:
    """Queue the runs of every recipe and seed that are neither done nor under way nor queued."""
    trials = [trial for trial in study.get_trials(deepcopy=False) if trial.state.name != "FAIL"]
    present = [trial.system_attrs.get("fixed_params", trial.params) for trial in trials]
    for seed in seeds:
        for recipe in study.user_attrs["recipe"]:
            wanted = {"recipe": recipe, "seed": seed}
            if wanted not in present:
                study.enqueue_trial(wanted)


def confirmation_table(study: optuna.Study, seeds: Sequence[int]) -> list[list[str]]:
    """A row a recipe: mean and standard deviation on validation and test images, n; and the difference."""
    from tools.intervals import mean_and_interval

    accuracies: dict[tuple[str, int], tuple[float, float]] = {}
    for trial in best_trials(study):
        accuracies[trial.params["recipe"], trial.params["seed"]] = trial.value or 0.0, trial.user_attrs["test_accuracy"]
    rows = [["mean and standard deviation [%]", "validation", "test", "n"]]
    for recipe in study.user_attrs["recipe"]:
        found = [accuracies[recipe, seed] for seed in seeds if (recipe, seed) in accuracies]
        spreads = [mean_and_interval([pair[split] for pair in found])[:2] for split in (0, 1) if found]
        cells = [f"{mean:.3f} +- {deviation:.3f}" for mean, deviation in spreads]
        without = f" ({len(seeds) - len(found)} diverged or lost)" if len(found) < len(seeds) else ""
        rows.append([recipe, *(cells or ["-", "-"]), f"{len(found)}{without}"])
    both = [seed for seed in seeds if {("tuned", seed), ("specification", seed)} <= accuracies.keys()]
    if both:
        pairs = [(accuracies["tuned", seed], accuracies["specification", seed]) for seed in both]
        gains = [mean_and_interval([tuned[split] - other[split] for tuned, other in pairs]) for split in (0, 1)]
        cells = [f"{mean:+.3f} +- {half:.3f}" for mean, _, half in gains]
        rows.append(["difference seed by seed, 95 % interval", *cells, str(len(both))])
    return rows
