"""What the server's routes stand on: the networks, the runs, who may ask how much, and how many at once."""

import asyncio
import math
import os
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from fastapi import Depends, HTTPException, Request
from pydantic import BaseModel
from starlette.requests import ClientDisconnect

from tools.compare.comparer import Comparer
from tools.networks import Network, Networks
from tools.web.live import Watcher

Result = TypeVar("Result")

BODY_SECONDS = 15  # within which a request's body must have come
WAITING = 64  # answers under way or waiting at once; more are sent away
WATCHING = 32  # pages that watch at once
MAX_NETWORKS = 12  # that answer a drawing
LOOK_SECONDS = 0.5  # after which their files are looked at again


class Problem(BaseModel):
    """Why a request was refused."""

    detail: str


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": Problem} for status in statuses}


class Bounded:
    """Lets a few calls work at once, in threads, and a few more wait: a flood is sent away, not worked off."""

    def __init__(self, at_once: int, waiting: int) -> None:
        self.threads = ThreadPoolExecutor(at_once)
        self.places = asyncio.Semaphore(waiting)

    @asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """A place among those that wait, to be had before a body is read, which takes memory; HTTPException 503 if all
        are taken."""
        if self.places.locked():
            raise HTTPException(503, "too many requests are under way; try again", {"Retry-After": "1"})
        async with self.places:
            yield

    async def work(self, function: Callable[..., Result], *args: Any) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self.threads, function, *args)

    async def run(self, function: Callable[..., Result], *args: Any) -> Result:
        async with self.place():
            return await self.work(function, *args)


async def read_body(request: Request, limit: int) -> bytes:
    """The request's body; HTTPException 413 if it is longer than ``limit`` bytes, 408 if it took too long."""
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


@dataclass(frozen=True)
class Settings:
    """Where the server listens and what it shows. None: the project's own folders."""

    host: str = "127.0.0.1"
    output_dir: str | None = None
    data_dir: str | None = None
    allowed: tuple[str, ...] = ()  # names of this machine by which it may be asked


class Server:
    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.networks = Networks(settings.output_dir)
        self.comparer = Comparer(settings.output_dir, settings.data_dir, self.networks)
        self.watcher = Watcher(settings.output_dir)
        self.inference = Bounded(os.cpu_count() or 1, WAITING)  # files are read apart from that
        self.reading = Bounded(1, WAITING)
        self.watching = Bounded(1, WATCHING)
        self.answering: list[Network] = []
        self.looked = -math.inf

    def answering_networks(self) -> list[Network]:
        """As they were at most ``LOOK_SECONDS`` ago."""
        if time.monotonic() > self.looked + LOOK_SECONDS:
            self.answering, self.looked = self.networks.all()[:MAX_NETWORKS], time.monotonic()
        return self.answering


async def server_of(request: Request) -> Server:  # FastAPI would call another in a thread
    server: Server = request.app.state.server
    return server


TheServer = Annotated[Server, Depends(server_of)]
