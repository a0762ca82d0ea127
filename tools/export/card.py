"""A network's weights as safetensors, and the model card that belongs to them.

    write_safetensors(load_network("mnist_model_3"), RunFiles("mnist_model_3"))

The card says what the run's own metrics and its evaluation say, and of what nobody has measured that nobody has.
"""

import json
from pathlib import Path
from typing import Any

from common.files import RunFiles, write_whole
from tools.evaluate.measures import mean_corrupted_accuracy
from tools.export.html import STATIC
from tools.intervals import wilson_interval
from tools.networks import Network, OnOwnData
from tools.output import rendered
from training.config import fields_in

VOTE = ("members", "method", "weights", "temperature")  # an ensemble's recipe
SAME_WEIGHTS = 0.05  # points between a run's metrics and an evaluation of it, which may round otherwise


def write_safetensors(network: Network, files: RunFiles) -> tuple[Path, Path]:
    """Write ``outputs/NAME.safetensors`` and ``outputs/NAME_card.md``; the tensors are those of the .pth, by name."""
    from safetensors.torch import save

    model = network.model.network if isinstance(network.model, OnOwnData) else network.model
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    about = {"format": "pt", "name": network.name, "classes": json.dumps(network.data.classes)}
    path, card = (files.params.with_name(f"{files.name}{ending}") for ending in (".safetensors", "_card.md"))
    return write_whole(path, save(tensors, about)), write_whole(card, card_of(network, files).encode())


def card_of(network: Network, files: RunFiles) -> str:
    """The model card, in Markdown."""
    config, images = network.facts.get("config", network.facts), network.data.test_images
    recipe = {key: config[key] for key in (*fields_in("recipe"), *VOTE) if key in config}
    right = None if network.accuracy is None else round(network.accuracy * images / 100)
    interval, evaluation = right and wilson_interval(right, images), evaluation_of(network, files)
    known = {"network": network, "recipe": recipe, "interval": interval, "evaluation": evaluation}
    return rendered(STATIC / "card.md", **known, mean=mean_corrupted_accuracy)


def evaluation_of(network: Network, files: RunFiles) -> dict[str, Any]:
    """What ``tools.evaluate`` measured of these weights; nothing, if there is none or it was of others."""
    try:
        found: Any = json.loads(files.metrics.with_name(f"{files.name}_evaluation.json").read_text(encoding="utf-8"))
        same = network.accuracy is not None and abs(found["accuracy"] - network.accuracy) <= SAME_WEIGHTS
        return dict(found) if same else {}
    except (OSError, ValueError, TypeError, KeyError):
        return {}
