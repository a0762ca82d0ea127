"""What keeps the server from being asked too much: places for few at a time, bodies of few bytes, reasons told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import anyio
import anyio.to_thread
from fastapi import HTTPException, Request
from pydantic import BaseModel
from starlette.requests import ClientDisconnect

Result = TypeVar("Result")

BODY_SECONDS = 15  # within which a request's body must have come


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
