"""What the page asks: /api/predict and /api/models, which digit it is; /api/digits, one of MNIST's; /api/runs,
/api/comparison and, while runs train, /api/live."""

import asyncio
import random
from base64 import b64encode
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import asdict
from typing import Annotated, Any

import anyio.to_thread
import numpy as np
from fastapi import APIRouter, Depends, HTTPException, Path, Query, Request, Response
from fastapi.sse import EventSourceResponse, ServerSentEvent
from pydantic import AliasPath, BaseModel, Field

from common.files import UsageError
from image_data.errors import EmptyImageError, ImageError, TooLargeError
from image_data.form import MAX_BYTES, Box, MnistImage, read_page
from image_data.readers import read_picture
from tools.compare.comparer import RunRow, mnist_test_digits
from tools.networks import Network, ask
from tools.web.live import LOOK_SECONDS
from tools.web.server import Server, TheServer, problems, read_body, server_of

MNIST_BYTES = 784
RAW_TYPE = "application/octet-stream"
IMAGE_TYPES = tuple(f"image/{kind}" for kind in ("png", "jpeg", "webp", "bmp", "gif", "tiff", "heic", "heif"))
IMAGE_CONTENT: dict[str, Any] = {kind: {"schema": {"type": "string", "format": "binary"}} for kind in IMAGE_TYPES}
RAW_SCHEMA = {"schema": {"type": "string", "format": "binary", "minLength": MNIST_BYTES, "maxLength": MNIST_BYTES}}
BODY = {"required": True, "description": "A drawing or a photo, or (to /api/predict) 784 raw bytes in MNIST's form."}

router = APIRouter(prefix="/api", responses=problems(403, 503))  # what any of them may refuse
Work = Callable[[list[Network], bytes, bool], BaseModel]  # what networks answer to a body, which is raw or a picture


class Prediction(BaseModel):
    """What one network answers."""

    digit: int = Field(ge=0, le=9)
    probabilities: list[float] = Field(description="of the digits 0 to 9", min_length=10, max_length=10)
    unsure: bool = Field(description="whether it may well be no digit at all")


class Answer(BaseModel):
    """What all networks answer, and the image that they saw."""

    predictions: dict[str, Prediction]
    count: int = Field(description="how many digits the picture shows")
    input: list[int] = Field(description="28 x 28 grey levels, white on black", min_length=784, max_length=784)


class ModelInfo(BaseModel):
    """A network that answers drawings."""

    name: str
    kind: str = Field(description="network or ensemble")
    parameters: int
    accuracy: float | None = Field(description="of its test images, in percent")
    classes: list[str] = Field(validation_alias=AliasPath("data", "classes"), description="their names, in order")


class TestDigit(BaseModel):
    """A test image and its true label."""

    index: int
    label: int = Field(ge=0, le=9)
    pixels: list[int] = Field(description="28 x 28 grey levels, white on black", min_length=784, max_length=784)


class Read(BaseModel):
    """One of the digits that were read."""

    digit: int = Field(ge=0, le=9)
    confidence: float = Field(ge=0, le=1)
    unsure: bool = Field(description="whether it may well be no digit at all")
    box: Box = Field(description="left, top, width and height in pixels of the picture as shown")
    line: int = Field(description="which line it stands in, from 0 on")
    form: str = Field(description="28 x 28 grey levels as the network saw them, white on black, base64")


class Reading(BaseModel):
    """All digits of a picture in reading order: lines from top to bottom, each from left to right."""

    name: str = Field(description="of the network that answered")
    text: str = Field(description="a line for each line of the picture")
    width: int = Field(description="of the picture as shown, in pixels")
    height: int
    digits: list[Read]


def mnist_form(body: bytes) -> MnistImage:
    """The image uint8 [28, 28] that raw bytes are; HTTPException 422 if they are none."""
    if len(body) != MNIST_BYTES:
        raise HTTPException(422, f"raw bytes must be {MNIST_BYTES}, 28 rows of 28 grey levels; got {len(body)}")
    image = np.frombuffer(body, dtype=np.uint8).reshape(28, 28)
    if not image.any():
        raise HTTPException(422, "nothing is drawn on the image")
    return image


def answer(networks: list[Network], body: bytes, raw: bool) -> Answer:
    """Ask every network, each with the largest digit of the image in the form of its data."""
    if raw:
        image, count = mnist_form(body), 1
    else:
        page = read_page(body)
        image, count = page.images[page.largest], len(page.images)
    if not networks:
        raise HTTPException(503, "there is no trained network; train one: python main.py")
    predictions = {}
    for network in networks:
        images = [image if raw or network.data.form == "mnist" else read_picture(body, network.data.form)]
        ((row, unsure),) = ask(network, images)
        digit = row.index(max(row))
        predictions[network.name] = Prediction(digit=digit, probabilities=[round(p, 6) for p in row], unsure=unsure)
    return Answer(predictions=predictions, input=image.reshape(-1).tolist(), count=count)


def reading(networks: list[Network], name: str | None, body: bytes) -> Reading:
    """What the network of this name, or the first, which is an ensemble if there is one, reads."""
    asked = [network for network in networks if name in (network.name, None) and network.data.form == "mnist"]
    if not asked:
        raise HTTPException(404, f"there is no network {name or ''} for drawings; /api/models lists them")
    page, network = read_page(body), asked[0]
    digits = []
    found = zip(ask(network, page.images), page.boxes, page.lines, page.images, strict=True)
    for (row, unsure), box, line, image in found:
        confidence, form = round(max(row), 6), b64encode(image.tobytes()).decode()
        digit = row.index(max(row))
        digits.append(Read(digit=digit, confidence=confidence, unsure=unsure, box=box, line=line, form=form))
    text = page.text([network.data.classes[one.digit] for one in digits])
    return Reading(name=network.name, text=text, width=page.width, height=page.height, digits=digits)


async def asked_of(request: Request, allowed: Sequence[str], work: Work, limit: int = MAX_BYTES) -> Response:
    """What ``work`` answers to a request's image of at most ``limit`` bytes, its content type one of ``allowed``.

    As JSON already: FastAPI would check the answer and write it in the loop that all requests share.
    """
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type not in allowed:
        raise HTTPException(415, f"the content type {content_type!r} is not allowed; send one of {', '.join(allowed)}")
    server = await server_of(request)
    async with server.inference.place():
        body = await read_body(request, limit)

        def read() -> str:
            try:
                return work(server.answering_networks(), body, content_type == RAW_TYPE).model_dump_json()
            except TooLargeError as error:
                raise HTTPException(413, str(error)) from None
            except (ImageError, EmptyImageError) as error:
                raise HTTPException(422, str(error)) from None

        return Response(await server.inference.work(read), media_type="application/json")


@router.post(
    "/predict",
    response_model=Answer,
    responses=problems(408, 413, 415, 422),
    openapi_extra={"requestBody": {**BODY, "content": {**IMAGE_CONTENT, RAW_TYPE: RAW_SCHEMA}}},
    tags=["predict"],
)
async def predict(request: Request) -> Response:
    """Which digit is on an image, by every network; of several the largest."""
    return await asked_of(request, (*IMAGE_TYPES, RAW_TYPE), answer)


@router.post(
    "/read",
    response_model=Reading,
    responses=problems(404, 408, 413, 415, 422),
    openapi_extra={"requestBody": {**BODY, "content": IMAGE_CONTENT}},
    tags=["predict"],
)
async def read(
    request: Request,
    name: Annotated[str | None, Query(max_length=100, description="the network; else the ensemble")] = None,
) -> Response:
    """Which digits are on a picture of one, of a number, or of a page of numbers, by one network."""
    return await asked_of(request, IMAGE_TYPES, lambda networks, body, _raw: reading(networks, name, body))


@router.get("/models", response_model=list[ModelInfo], tags=["predict"])
async def models(server: TheServer) -> list[ModelInfo]:
    """The networks that answer."""
    found = await server.reading.run(server.answering_networks)
    return [ModelInfo.model_validate(network, from_attributes=True) for network in found]


async def test_digit(server: Server, index: int | None) -> TestDigit:
    """The test image ``index`` (None: any of them); HTTPException 404 if there is none."""
    digits = await server.reading.run(mnist_test_digits, server.settings.data_dir)
    if digits is None:
        raise HTTPException(404, "MNIST is not on this machine; a training fetches it: python main.py --epochs 1")
    images, labels = digits
    if index is None:
        index = random.randrange(len(labels))
    if index >= len(labels):
        raise HTTPException(404, f"there is no test image {index}; there are {len(labels):,}")
    return TestDigit(index=index, label=int(labels[index]), pixels=images[index].reshape(-1).tolist())


@router.get("/digits/random", response_model=TestDigit, responses=problems(404), tags=["digits"])
async def random_digit(server: TheServer) -> TestDigit:
    """A test image, drawn at random."""
    return await test_digit(server, None)


@router.get("/digits/{index}", response_model=TestDigit, responses=problems(404, 422), tags=["digits"])
async def one_digit(server: TheServer, index: Annotated[int, Path(ge=0, le=1_000_000)]) -> TestDigit:
    """The test image of this number."""
    return await test_digit(server, index)


@router.get("/runs", response_model=list[RunRow], tags=["runs"])
async def runs(server: TheServer) -> list[RunRow]:
    """Every run under outputs/, and the ensemble."""
    return (await server.reading.run(server.comparer.compare, [])).rows


@router.get("/comparison", responses=problems(404, 422), tags=["runs"])
async def comparison(
    server: TheServer,
    run: Annotated[list[str] | None, Query(max_length=50, description="a run's name; may be repeated")] = None,
) -> dict[str, Any]:
    """What the view Compare shows; details for the runs that are named, or all."""
    try:
        return asdict(await server.reading.run(server.comparer.compare, run))
    except UsageError as error:
        raise HTTPException(404, str(error)) from None


async def place_to_watch(server: TheServer) -> AsyncIterator[None]:
    """One of the places of pages that watch, until the page goes."""
    async with server.watching.place():
        yield


@router.get("/live", response_class=EventSourceResponse, tags=["runs"], dependencies=[Depends(place_to_watch)])
async def live(request: Request, server: TheServer) -> AsyncIterator[ServerSentEvent]:
    """Server-sent events: a run's state whenever it changes."""
    sent: dict[str, tuple[int, int | None]] = {}  # name -> version and points of what the page has
    begun = False
    while not request.app.state.ending():
        looked = await anyio.to_thread.run_sync(server.watcher.look)
        for run in looked:
            version, points = sent.get(run.name, (None, None))
            if version != run.version:
                event = run.event(points)
                yield ServerSentEvent(event="run", data=event)
                sent[run.name] = (run.version, None if event["start"] is None else len(run.losses))
        for gone in sent.keys() - {run.name for run in looked}:
            del sent[gone]
            yield ServerSentEvent(event="gone", data={"name": gone})
        if not begun:  # so that a page can tell that there is none from that none has come yet
            yield ServerSentEvent(event="begun", data={"runs": len(looked)})
            begun = True
        await asyncio.sleep(LOOK_SECONDS)
