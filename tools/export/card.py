"""A network's weights as safetensors, and the model card that belongs to them.

    write_safetensors(load_network("mnist_model_3"), RunFiles("mnist_model_3"))

The card says what the run's own metrics and its evaluation say, and of what nobody has measured that nobody has.
"""

import json
from pathlib import Path
from typing import Any

from common.files import RunFiles, atomic_write
from tools.evaluate.measures import mean_corrupted_accuracy
from tools.export.html import STATIC
from tools.intervals import wilson_interval
from tools.networks import Network, OnOwnData
from tools.output import filled
from training.config import fields_in

SAME_WEIGHTS = 0.05  # points between a run's metrics and an evaluation of it, which may round otherwise


def write_safetensors(network: Network, files: RunFiles) -> tuple[Path, Path]:
    """Write ``outputs/NAME.safetensors`` and ``outputs/NAME_card.md``; the tensors are those of the .pth, by name.

    Raises:
        ModuleNotFoundError: safetensors is not installed.
    """
    from safetensors.torch import save

    model = network.model.network if isinstance(network.model, OnOwnData) else network.model
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    about = {"format": "pt", "name": network.name, "classes": json.dumps(network.data.classes)}
    path, card = (files.params.with_name(f"{files.name}{ending}") for ending in (".safetensors", "_card.md"))
    for target, contents in ((path, save(tensors, about)), (card, card_of(network, files).encode())):
        with atomic_write(target) as file:
            file.write(contents)
    return path, card


def card_of(network: Network, files: RunFiles) -> str:
    """The model card, in Markdown."""
    data, facts, evaluation = network.data, network.facts, evaluation_of(network, files)
    recipe = {key: value for key, value in facts.get("config", {}).items() if key in fields_in("recipe")}
    recipe = recipe or {key: facts[key] for key in ("members", "method", "weights", "temperature") if key in facts}
    parts = {
        **{key: str(getattr(data, key)) for key in ("mean", "std", "sha256", "form")},
        **{"name": network.name, "parameters": f"{network.parameters:,}", "data": data.name},
        **{"train_images": f"{data.train_images:,}", "test_images": f"{data.test_images:,}"},
        "classes": ", ".join(data.classes),
        "recipe": "\n".join(f"| `{key}` | {value} |" for key, value in recipe.items()) or "| not known | |",
        **dict.fromkeys(("accuracy", "calibration", "robustness"), "Not measured."),
    }
    if network.accuracy is not None:
        low, high = wilson_interval(round(network.accuracy * data.test_images / 100), data.test_images)
        parts["accuracy"] = f"**{network.accuracy:.2f} %** of the test images, 95 % interval {low:.2f} to {high:.2f} %."
    if measured := evaluation.get("calibration"):
        loss = f"mean negative log-likelihood {measured['loss']:.4f}"
        parts["calibration"] = f"Expected calibration error {measured['ece']:.2f} %, {loss}, on the test images."
    if corruptions := evaluation.get("corruptions"):
        rows = [" | ".join([name, *map("{:.2f}".format, found)]) for name, found in corruptions.items()]
        head = f"Mean of all: **{mean_corrupted_accuracy(corruptions):.2f} %**. Percent right by severity:\n\n"
        head += "| corruption | 1 | 2 | 3 | 4 | 5 |\n|---|---|---|---|---|---|\n"
        parts["robustness"] = head + "\n".join(f"| {row} |" for row in rows)
    return filled(STATIC / "card.md", parts)


def evaluation_of(network: Network, files: RunFiles) -> dict[str, Any]:
    """What ``tools.evaluate`` measured of these weights; nothing, if there is none or it was of others."""
    try:
        found: Any = json.loads(files.metrics.with_name(f"{files.name}_evaluation.json").read_text(encoding="utf-8"))
        same = network.accuracy is not None and abs(found["accuracy"] - network.accuracy) <= SAME_WEIGHTS
        return dict(found) if same else {}
    except (OSError, ValueError, TypeError, KeyError):
        return {}
