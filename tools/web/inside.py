"""/api/inside: what the blocks of one network make of an image, and which of its pixels spoke for the answer."""

import copy
import functools
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, HTTPException, Query, Request, Response
from pydantic import BaseModel, Field

from data_utils import normalize
from image_data.form import MnistImage
from imports import nn, torch
from tools.networks import Network
from tools.web.routes import MNIST_BYTES, RAW_SCHEMA, RAW_TYPE, asked_of, mnist_form
from tools.web.server import problems

router = APIRouter(prefix="/api", responses=problems(403, 404, 408, 413, 415, 422, 503))
LAST_OF_A_BLOCK = (nn.BatchNorm2d, nn.MaxPool2d)  # but for dropout, which evaluates to nothing
BODY = {"requestBody": {"required": True, "content": {RAW_TYPE: RAW_SCHEMA}, "description": "784 raw bytes"}}


class Block(BaseModel):
    """What a block leaves: its channels as grey levels, from the least of them all to the most."""

    name: str
    channels: list[list[int]]


class Inside(BaseModel):
    """How a network came to its answer."""

    digit: int = Field(ge=0, le=9)
    blocks: list[Block]
    saliency: list[float] = Field(description="what each pixel speaks for the answer, or against it: -1 to 1")


def inside(network: Network, image: MnistImage) -> Inside:
    """The activations of ``network`` for one image uint8 [28, 28], and the integrated gradients of its answer."""
    from tools.evaluate.measures import integrated_gradients  # and with it torchvision, which no digit needs

    model, blocks = copy.deepcopy(network.model), []  # a copy: others may ask it at the same time
    batch = normalize(torch.from_numpy(np.array(image))[None, None].float())
    with torch.no_grad():
        digit = model(batch).argmax(1)
    pixels = integrated_gradients(model, batch, digit)[0].flatten()

    def keep(name: str, _layer: nn.Module, _inputs: Any, output: torch.Tensor) -> None:
        levels = output[0] - output.min()
        levels = (levels * (255 / levels.max().clamp(min=1e-6))).round().int()
        blocks.append(Block(name=name, channels=levels.flatten(1).tolist()))

    for name, layer in model.named_modules():
        if isinstance(layer, LAST_OF_A_BLOCK):
            layer.register_forward_hook(functools.partial(keep, name.rpartition(".")[0]))
    with torch.no_grad():
        model(batch)
    return Inside(digit=int(digit), blocks=blocks, saliency=(pixels / pixels.abs().max().clamp(min=1e-9)).tolist())


@router.post("/inside", response_model=Inside, openapi_extra=BODY, tags=["predict"])
async def look_inside(request: Request, network: Annotated[str, Query(max_length=100)]) -> Response:
    """What the blocks of a network make of an image, and which pixels spoke for its answer."""

    def work(networks: list[Network], body: bytes, _raw: bool) -> Inside:
        image = mnist_form(body)
        for asked in networks:
            if asked.name == network and asked.kind == "network":
                return inside(asked, image)
        raise HTTPException(404, f"there is no single network {network!r}; /api/models lists them")

    return await asked_of(request, (RAW_TYPE,), work, MNIST_BYTES)
