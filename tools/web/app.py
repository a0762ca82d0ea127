"""The page's server: its files, and the API under /api.

app = create_app(Settings(output_dir="results"))
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import anyio
import anyio.to_thread
import numpy as np
import plotly
from fastapi import Depends, FastAPI, HTTPException, Query, Request
from fastapi import Path as InPath
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from fastapi.sse import EventSourceResponse, ServerSentEvent
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel, Field
from starlette.requests import ClientDisconnect

from common.files import UsageError
from image_data.form import MAX_BYTES, EmptyImageError, ImageError, MnistImage, TooLargeError, read_grey, to_mnist
from tools.compare import STATIC, Comparer, RunRow, mnist_test_digits
from tools.predict import Network, Networks, probabilities
from tools.web.guard import Guard
from tools.web.live import LOOK_SECONDS, Watcher

Result = TypeVar("Result")

BODY_SECONDS = 15  # within which a request's body must have come
WAITING = 64  # answers under way or waiting at once; more are sent away
WATCHING = 32  # pages that watch at once
MAX_NETWORKS = 12  # that answer a drawing
MNIST_BYTES = 784
IMAGE_TYPES = ("image/png", "image/jpeg", "image/webp")
RAW_TYPE = "application/octet-stream"


@dataclass(frozen=True)
class Settings:
    """Where the server listens and what it shows. None: the project's own folders."""

    host: str = "127.0.0.1"
    output_dir: str | None = None
    data_dir: str | None = None


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


class TestDigit(BaseModel):
    """A test image and its true label."""

    index: int
    label: int = Field(ge=0, le=9)
    pixels: list[int] = Field(description="28 x 28 grey levels, white on black", min_length=784, max_length=784)


class Problem(BaseModel):
    """Why a request was refused."""

    detail: str


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """For the API's description: these statuses come with a reason."""
    return {status: {"model": Problem} for status in statuses}


class Bounded:
    """Lets a few calls work at once, in threads, and a few more wait: a flood is sent away, not worked off."""

    def __init__(self, at_once: int, waiting: int) -> None:
        self.limiter = anyio.CapacityLimiter(at_once)
        self.waiting, self.under_way = waiting, 0

    @asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """A place among those that wait: to be had before a body is read, since that takes memory.

        Raises:
            HTTPException: 503, all are taken.
        """
        if self.under_way >= self.waiting:
            raise HTTPException(503, "too many requests are under way; try again", {"Retry-After": "1"})
        self.under_way += 1
        try:
            yield
        finally:
            self.under_way -= 1

    async def work(self, function: Callable[..., Result], *args: Any) -> Result:
        """What ``function`` returns, when it is its turn."""
        return await anyio.to_thread.run_sync(function, *args, limiter=self.limiter)

    async def run(self, function: Callable[..., Result], *args: Any) -> Result:
        """Both at once."""
        async with self.place():
            return await self.work(function, *args)


async def read_body(request: Request, limit: int) -> bytes:
    """The request's body.

    Raises:
        HTTPException: 413, it is longer than ``limit`` bytes; 408, it took too long.
    """
    too_long = HTTPException(413, f"the body is too long; at most {limit:,} bytes are allowed")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > limit:
        raise too_long
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                body += part
                if len(body) > limit:
                    raise too_long
    except TimeoutError:
        raise HTTPException(408, f"the body did not come within {BODY_SECONDS} s") from None
    except ClientDisconnect:
        raise HTTPException(400, "the body ended early") from None  # nobody hears it, and nothing is logged
    return bytes(body)


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


def create_app(settings: Settings) -> FastAPI:
    """The whole server."""
    networks = Networks(settings.output_dir)
    comparer = Comparer(settings.output_dir, settings.data_dir, networks)
    watcher = Watcher(settings.output_dir)
    # half of the cores, so that a training beside it goes on; files are read apart from that
    inference = Bounded(max(1, (os.cpu_count() or 1) // 2), WAITING)
    reading = Bounded(1, WAITING)
    watching = 0

    def answering_networks() -> list[Network]:
        return networks.all()[:MAX_NETWORKS]

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        from imports import torch

        torch.set_num_threads(1)  # one image is too little work to share
        blank = np.full((28, 28), 1, dtype=np.uint8)
        await anyio.to_thread.run_sync(lambda: answer(answering_networks(), blank))  # the first pass is a slow one
        yield

    app = FastAPI(
        title="Small networks on MNIST",
        description="Which digit is it? Networks of less than 10,000 parameters answer.",
        version="0.1.0",
        docs_url=None,  # FastAPI's own documentation page loads its script from the internet
        redoc_url=None,
        openapi_url="/openapi.json",
        lifespan=lifespan,
    )
    app.state.ending = lambda: False  # whoever runs the server may know better; pages that watch are then let go
    app.add_middleware(Guard, host=settings.host)

    @app.exception_handler(RequestValidationError)
    async def explain(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        return JSONResponse({"detail": f"{first['loc'][-1]}: {first['msg']}"}, status_code=422)

    raw_schema = {"schema": {"type": "string", "format": "binary", "minLength": MNIST_BYTES, "maxLength": MNIST_BYTES}}
    image_schema = {"schema": {"type": "string", "format": "binary"}}
    body_schema = {
        "required": True,
        "description": "A PNG, JPEG or WebP image, or 784 raw bytes in MNIST's form.",
        "content": {**dict.fromkeys(IMAGE_TYPES, image_schema), RAW_TYPE: raw_schema},
    }

    @app.post(
        "/api/predict",
        response_model=Answer,
        responses=problems(403, 408, 413, 415, 422, 503),
        openapi_extra={"requestBody": body_schema},
        tags=["predict"],
    )
    async def predict(request: Request) -> Answer:
        """Which digit is on an image, by every network."""
        content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if content_type not in (*IMAGE_TYPES, RAW_TYPE):
            allowed = ", ".join((*IMAGE_TYPES, RAW_TYPE))
            raise HTTPException(415, f"the content type {content_type!r} is not allowed; send one of {allowed}")
        async with inference.place():
            body = await read_body(request, MAX_BYTES)

            def work() -> Answer:
                image = mnist_form(content_type, body)
                asked = answering_networks()
                if not asked:
                    raise HTTPException(503, "there is no trained network; train one: python main.py")
                return answer(asked, image)

            return await inference.work(work)

    @app.get("/api/models", response_model=list[ModelInfo], responses=problems(403, 503), tags=["predict"])
    async def models() -> list[ModelInfo]:
        """The networks that answer."""
        found = await reading.run(answering_networks)
        return [ModelInfo.model_validate(network, from_attributes=True) for network in found]

    @app.get("/api/runs", response_model=list[RunRow], responses=problems(403, 503), tags=["runs"])
    async def runs() -> list[RunRow]:
        """Every run under outputs/, and the ensemble."""
        return await reading.run(comparer.rows)

    @app.get("/api/comparison", responses=problems(403, 404, 422, 503), tags=["runs"])
    async def comparison(
        run: Annotated[list[str] | None, Query(max_length=50, description="a run's name; may be repeated")] = None,
    ) -> dict[str, Any]:
        """What the view Compare shows; details for the runs that are named, or all."""
        try:
            return asdict(await reading.run(comparer.compare, run))
        except UsageError as error:
            raise HTTPException(404, str(error)) from None

    async def place_to_watch() -> AsyncIterator[None]:
        nonlocal watching
        if watching >= WATCHING:
            raise HTTPException(503, "too many pages are watching; close one")
        watching += 1
        try:
            yield
        finally:
            watching -= 1

    @app.get(
        "/api/live",
        response_class=EventSourceResponse,
        responses=problems(403, 503),
        dependencies=[Depends(place_to_watch)],
        tags=["runs"],
    )
    async def live() -> AsyncIterator[ServerSentEvent]:
        """Server-sent events: a run's state whenever it changes."""
        sent: dict[str, tuple[int, int | None]] = {}  # name -> version and points of what the page has
        begun = False
        while not app.state.ending():
            looked = await anyio.to_thread.run_sync(watcher.look)
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

    async def test_digit(index: int | None) -> TestDigit:
        digits = await reading.run(mnist_test_digits, settings.data_dir)
        if digits is None:
            raise HTTPException(404, "MNIST is not on this machine; a training fetches it: python main.py --epochs 1")
        images, labels = digits
        if index is None:
            index = random.randrange(len(labels))
        if index >= len(labels):
            raise HTTPException(404, f"there is no test image {index}; there are {len(labels):,}")
        return TestDigit(index=index, label=int(labels[index]), pixels=images[index].reshape(-1).tolist())

    @app.get("/api/digits/random", response_model=TestDigit, responses=problems(403, 404, 503), tags=["digits"])
    async def random_digit() -> TestDigit:
        """A test image, drawn at random."""
        return await test_digit(None)

    @app.get("/api/digits/{index}", response_model=TestDigit, responses=problems(403, 404, 422, 503), tags=["digits"])
    async def one_digit(index: Annotated[int, InPath(ge=0, le=1_000_000)]) -> TestDigit:
        """The test image of this number."""
        return await test_digit(index)

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(STATIC / "index.html")

    @app.get("/docs", include_in_schema=False)
    async def docs() -> FileResponse:
        return FileResponse(STATIC / "index.html")

    @app.get("/static/plotly.min.js", include_in_schema=False)
    async def plotly_script() -> FileResponse:
        return FileResponse(Path(plotly.__file__).parent / "package_data" / "plotly.min.js")

    app.mount("/static", StaticFiles(directory=STATIC))
    return app
