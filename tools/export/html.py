"""A network as one file that reads digits in a browser, from disk, without anything else.

    write_html(load_network("mnist_model_3"), path)

The forward pass and MNIST's form are plain JavaScript (static/digit.js), the numbers float32. A content security policy
inside lets the file's own script run, and nothing be loaded or asked for.
"""

import base64
import hashlib
from itertools import islice
from pathlib import Path
from typing import Any

from common.files import UsageError, write_whole
from image_data.facts import DataSet
from imports import F, nn, torch
from models.kernels import UnknownLayersError, divided
from tools.networks import Network, OnOwnData
from tools.output import rendered
from tools.voting import Ensemble

STATIC = Path(__file__).parent / "static"


def write_html(network: Network, path: Path) -> int:
    """Write the file of a run or of an ensemble. Returns its bytes; a UsageError if the script knows not all layers."""
    accuracy = "" if network.accuracy is None else f", {network.accuracy:.2f} % of its test images right"
    style, script = ((STATIC / name).read_text(encoding="utf-8") for name in ("digit.css", "digit.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    contents = rendered(
        STATIC / "digit.html",
        policy=f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'",
        name=network.name,
        about=f"{network.name}: {network.parameters:,} parameters{accuracy}",
        style=style,
        classes=network.data.classes,
        network=described(network.model, network.data),
        script=script,
    ).encode()
    write_whole(path, contents)
    return len(contents)


@torch.no_grad()
def described(model: nn.Module, data: DataSet) -> dict[str, Any]:
    """What the script knows of a network: of each member its layers, how they vote, and all numbers in order of use."""
    vote = model if isinstance(model, Ensemble) else Ensemble([model], "soft", [1.0], 1.0)
    numbers: list[torch.Tensor] = []
    members = [_layers(member, numbers) for member in vote.members]
    flat = torch.cat([part.flatten() for part in numbers])
    return {
        "members": members,
        **{"method": vote.method, "weights": vote.weights, "temperature": vote.temperature},
        **{"classes": data.classes, "mean": data.mean, "std": data.std},
        "numbers": base64.b64encode(flat.numpy().astype("<f4").tobytes()).decode(),
    }


def _layers(model: nn.Module, numbers: list[torch.Tensor]) -> dict[str, Any]:
    start, model = sum(part.numel() for part in numbers), model.network if isinstance(model, OnOwnData) else model
    try:
        layers, head = divided(model)
    except UnknownLayersError as error:
        raise UsageError(f"format: html knows the shipped networks' layers alone: {error}") from None
    parameters, statistics, settings = iter(layers.parameters), iter(layers.statistics), iter(layers.settings)
    blocks = []
    for is_block in layers.blocks:
        weight, padding = next(parameters), None
        numbers.append(weight)
        if is_block:  # BatchNorm as a scale and a shift
            gain, bias = islice(parameters, 2)
            mean, variance, _ = islice(statistics, 3)
            padding, _, _, eps = islice(settings, 4)
            scale = gain / (variance + eps).sqrt()
            numbers += [scale, bias - scale * mean]
        blocks.append({"made": len(weight), "padding": padding})
    numbers += _linear(head, len(weight))
    return {"start": start, "blocks": blocks}


def _linear(head: nn.Module, channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [10, C] and bias [10] of what makes logits of the means, read off its answers; a UsageError if bent."""

    def centred(means: torch.Tensor) -> torch.Tensor:  # log-probabilities are logits but for a number that all share
        found: torch.Tensor = head(means[:, :, None, None]).double()
        return found - found.mean(1, keepdim=True)

    bias = centred(torch.zeros(1, channels))[0]
    weights = (centred(torch.eye(channels)) - bias).T
    means = torch.linspace(-3, 3, 100 * channels).sin().view(100, channels)
    if not torch.allclose(centred(means), F.linear(means.double(), weights, bias), atol=1e-4):
        raise UsageError("format: html knows networks that end in one linear layer, and this one does not")
    return weights.float(), bias.float()
