"""Which digit is on an image, by every network: /api/predict and /api/models."""

from __future__ import annotations

import numpy as np
from fastapi import APIRouter, HTTPException, Request
from pydantic import BaseModel, Field

from image_data.form import MAX_BYTES, EmptyImageError, ImageError, MnistImage, TooLargeError, read_grey, to_mnist
from tools.networks import Network, probabilities
from tools.web.limits import problems, read_body
from tools.web.server import TheServer

MNIST_BYTES = 784
RAW_TYPE = "application/octet-stream"
IMAGE_TYPES = ("image/png", "image/jpeg", "image/webp")
IMAGE_SCHEMA = {"schema": {"type": "string", "format": "binary"}}
RAW_SCHEMA = {"schema": {"type": "string", "format": "binary", "minLength": MNIST_BYTES, "maxLength": MNIST_BYTES}}
BODY_SCHEMA = {
    "required": True,
    "description": "A PNG, JPEG or WebP image, or 784 raw bytes in MNIST's form.",
    "content": {**dict.fromkeys(IMAGE_TYPES, IMAGE_SCHEMA), RAW_TYPE: RAW_SCHEMA},
}

router = APIRouter(prefix="/api", tags=["predict"])


class Prediction(BaseModel):
    """What one network answers."""

    digit: int = Field(ge=0, le=9)
    probabilities: list[float] = Field(description="of the digits 0 to 9", min_length=10, max_length=10)


class Answer(BaseModel):
    """What all networks answer, and the image that they saw."""

    predictions: dict[str, Prediction]
    input: list[int] = Field(description="28 x 28 grey levels, white on black", min_length=784, max_length=784)


class ModelInfo(BaseModel):
    """A network that answers drawings."""

    name: str
    kind: str = Field(description="network or ensemble")
    parameters: int
    accuracy: float | None = Field(description="of the 10,000 test images, in percent")


def mnist_form(content_type: str, body: bytes) -> MnistImage:
    """The image that the networks see, from the body of a request.

    Raises:
        HTTPException: 413, 415 or 422, with the reason.
    """
    if content_type == RAW_TYPE:
        if len(body) != MNIST_BYTES:
            raise HTTPException(422, f"raw bytes must be {MNIST_BYTES}, 28 rows of 28 grey levels; got {len(body)}")
        image = np.frombuffer(body, dtype=np.uint8).reshape(28, 28)
        if not image.any():
            raise HTTPException(422, "nothing is drawn on the image")
        return image
    try:
        return to_mnist(read_grey(body))
    except TooLargeError as error:
        raise HTTPException(413, str(error)) from None
    except (ImageError, EmptyImageError) as error:
        raise HTTPException(422, str(error)) from None


def answer(networks: list[Network], image: MnistImage) -> Answer:
    """Ask every network."""
    predictions = {}
    for network in networks:
        (row,) = probabilities(network.model, [image])
        digit = max(range(10), key=row.__getitem__)
        predictions[network.name] = Prediction(digit=digit, probabilities=[round(p, 6) for p in row])
    return Answer(predictions=predictions, input=image.reshape(-1).tolist())


@router.post(
    "/predict",
    response_model=Answer,
    responses=problems(403, 408, 413, 415, 422, 503),
    openapi_extra={"requestBody": BODY_SCHEMA},
)
async def predict(request: Request, server: TheServer) -> Answer:
    """Which digit is on an image, by every network."""
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type not in (*IMAGE_TYPES, RAW_TYPE):
        allowed = ", ".join((*IMAGE_TYPES, RAW_TYPE))
        raise HTTPException(415, f"the content type {content_type!r} is not allowed; send one of {allowed}")
    async with server.inference.place():
        body = await read_body(request, MAX_BYTES)

        def work() -> Answer:
            image = mnist_form(content_type, body)
            asked = server.answering_networks()
            if not asked:
                raise HTTPException(503, "there is no trained network; train one: python main.py")
            return answer(asked, image)

        return await server.inference.work(work)


@router.get("/models", response_model=list[ModelInfo], responses=problems(403, 503))
async def models(server: TheServer) -> list[ModelInfo]:
    """The networks that answer."""
    found = await server.reading.run(server.answering_networks)
    return [ModelInfo.model_validate(network, from_attributes=True) for network in found]
